//! SmolVLA as an anytime task.

use std::time::{Duration, Instant};

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix,
    PrefixSupport, PrefixUse, Progress, StageTime, Stamp,
};

use super::planned::Planned;
use super::{EulerSampler, ExpertCache, Inputs, Preparer, SmolVla, SmolVlaConfig, gaussian_noise};
use crate::checkpoint::Checkpoint;
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "denoise"];
const PREPROCESS: usize = 0;
const VISION: usize = 1;
const PREFIX: usize = 2;
const DENOISE: usize = 3;

/// The most denoise steps that one request may ask for.
const STEP_LIMIT: usize = 1000;

struct Run {
    request: u64,
    instant: Stamp,
    inputs: Inputs,
    /// Tokens of the images encoded so far.
    tokens: Vec<candle_core::Tensor>,
    cache: Option<ExpertCache>,
    sampler: EulerSampler,
    planned: Planned,
    prefix: Option<Prefix>,
    times: [Duration; 4],
}

impl Run {
    fn total(&self) -> usize {
        self.inputs.pixels.len() + 1 + self.sampler.steps()
    }

    fn done(&self) -> usize {
        self.tokens.len() + usize::from(self.cache.is_some()) + self.sampler.done()
    }
}

/// A SmolVLA policy: one step per camera, one for the prefix, one per denoise step.
pub struct SmolVlaPolicy {
    model: SmolVla,
    preparer: Preparer,
    spec: PolicySpec,
    dt: Duration,
    run: Option<Run>,
    /// The run whose chunk was taken: another sample may be made from what it saw.
    spent: Option<Run>,
    noise: Option<Vec<f32>>,
    noise_scale: f32,
}

impl SmolVlaPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let model = SmolVla::load(checkpoint)?;
        let config = SmolVlaConfig::of(checkpoint)?;
        let rate = options.rate(checkpoint)?;
        let boundary = preparer.boundary();
        let spec = PolicySpec {
            cameras: boundary.cameras(),
            optional_cameras: boundary.optional_cameras(),
            state_dim: boundary.state_dim(),
            action_dim: boundary.action_dim(),
            action_names: checkpoint.actions.action_names.clone(),
            action_horizon: config.chunk_size,
            action_rate_hz: Some(rate),
            denoise_steps: options.denoise_steps.unwrap_or(config.num_steps),
            prefix: PrefixSupport {
                guided: true,
                trained: checkpoint.actions.trained_prefix,
                warm_start: true,
            },
        };
        let dt = Duration::from_secs_f64(1.0 / rate);
        let noise_scale = checkpoint.actions.noise_scale.unwrap_or(1.0) as f32;
        Ok(Self { model, preparer, spec, dt, run: None, spent: None, noise: None, noise_scale })
    }

    fn check(&self, prefix: &Prefix) -> Result<(), PolicyError> {
        let expected = self.spec.action_dim;
        if prefix.dim != expected {
            return Err(PolicyError::PrefixWidth { expected, found: prefix.dim });
        }
        match (prefix.usage, self.spec.prefix.trained) {
            (PrefixUse::Trained, None) => Err(PolicyError::Unsupported("clean prefixes")),
            (PrefixUse::Trained, Some(most)) if prefix.frozen > most => {
                Err(PolicyError::PrefixTooLong { frozen: prefix.frozen, most })
            }
            _ => Ok(()),
        }
    }

    /// The sampling that `request` asks for.
    fn sampling(&mut self, request: &ChunkRequest) -> Result<(Planned, EulerSampler), PolicyError> {
        let steps = request.denoise_steps.unwrap_or(self.spec.denoise_steps);
        if steps == 0 || steps > STEP_LIMIT {
            return Err(PolicyError::Compute(format!(
                "{steps} denoise steps were asked for; use 1 to {STEP_LIMIT}"
            )));
        }
        if let Some(prefix) = &request.prefix {
            self.check(prefix)?;
        }
        let shape = self.model.sample_shape();
        let noise = self.noise.take().unwrap_or_else(|| {
            let mut noise = gaussian_noise(request.seed, shape.0 * shape.1);
            noise.iter_mut().for_each(|x| *x *= self.noise_scale);
            noise
        });
        Planned::start(request.prefix.as_ref(), self.preparer.boundary(), noise, shape, steps)
    }

    /// Starts the next inference from `noise` (`[H, M]` row by row) instead of the request's seed.
    pub fn set_noise(&mut self, noise: Vec<f32>) {
        self.noise = Some(noise);
    }
}

fn compute(error: candle_core::Error) -> PolicyError {
    PolicyError::Compute(error.to_string())
}

impl Policy for SmolVlaPolicy {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        (self.run, self.spent) = (None, None);
        let start = Instant::now();
        let (planned, sampler) = self.sampling(request)?;
        let inputs = self.preparer.prepare(observation)?;
        let mut times = [Duration::ZERO; 4];
        times[PREPROCESS] = start.elapsed();
        self.run = Some(Run {
            request: request.id,
            instant: observation.instant,
            inputs,
            tokens: Vec::new(),
            cache: None,
            sampler,
            planned,
            prefix: request.prefix.clone(),
            times,
        });
        Ok(())
    }

    fn resample(&mut self, request: &ChunkRequest) -> Result<bool, PolicyError> {
        let Some(spent) = self.spent.take().filter(|spent| spent.cache.is_some()) else {
            return Ok(false);
        };
        let (planned, sampler) = self.sampling(request)?;
        let (prefix, times) = (request.prefix.clone(), [Duration::ZERO; 4]);
        self.run = Some(Run { request: request.id, sampler, planned, prefix, times, ..spent });
        Ok(true)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run =
            self.run.as_mut().ok_or(PolicyError::OutOfTurn("advance was called before begin"))?;
        if run.sampler.is_done() {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = if let Some(pixels) = run.inputs.pixels.get(run.tokens.len()) {
            let features = self.model.encode_image(pixels).map_err(compute)?;
            run.tokens.push(features.tokens);
            VISION
        } else if let Some(cache) = &run.cache {
            let model = &self.model;
            let step = |x: &candle_core::Tensor, times: &[f64]| model.velocity(cache, x, times);
            run.planned.step(&mut run.sampler, step).map_err(compute)?;
            DENOISE
        } else {
            let Inputs { dummies, tokens, state, .. } = &run.inputs;
            let cache = self
                .model
                .embed_prefix(&run.tokens, *dummies, tokens, state)
                .and_then(|embeddings| self.model.prefill(&embeddings))
                .and_then(|prefix| self.model.prepare(&prefix))
                .map_err(compute)?;
            run.cache = Some(cache);
            PREFIX
        };
        run.times[stage] += start.elapsed();
        if run.sampler.is_done() {
            return Ok(Progress::Done);
        }
        Ok(Progress::Step {
            stage: STAGES[stage],
            done: run.done(),
            total: run.total(),
            denoised: stage == DENOISE,
            next_denoises: run.cache.is_some(),
        })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self
            .run
            .take_if(|run| run.sampler.is_done())
            .ok_or(PolicyError::OutOfTurn("take_chunk was called before the chunk was done"))?;
        let run = self.spent.insert(run);
        let actions = self.preparer.actions(run.sampler.sample())?;
        let mut chunk =
            ActionChunk::new(run.request, run.instant, self.dt, self.spec.action_dim, actions)
                .map_err(|e| PolicyError::Compute(e.to_string()))?;
        chunk.report.stages =
            STAGES.iter().zip(run.times).map(|(stage, time)| StageTime { stage, time }).collect();
        chunk.report.denoise_steps = run.sampler.done();
        chunk.report.caches.extend(run.prefix.as_ref().map(|prefix| reuse(prefix, &chunk)));
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(PolicyError::OutOfTurn("nothing was begun"))?;
        Ok(run.sampler.set_steps(steps.min(STEP_LIMIT)))
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(PolicyError::OutOfTurn("nothing was begun"))?;
        run.sampler.finish().map_err(compute)
    }
}

/// How well `chunk` kept the planned actions: the largest difference on the frozen ones (physical units).
pub(crate) fn reuse(prefix: &Prefix, chunk: &ActionChunk) -> (&'static str, CacheUse) {
    let rows = prefix.rows().min(chunk.horizon());
    let (name, kept) = match prefix.usage {
        PrefixUse::WarmStart { .. } => ("warm_start", rows),
        PrefixUse::Guided { .. } | PrefixUse::Trained => ("frozen_prefix", prefix.frozen.min(rows)),
    };
    let pairs = prefix.actions.iter().zip(chunk.values()).take(kept * prefix.dim);
    let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    (name, CacheUse { lookups: count(chunk.horizon()), hits: count(kept), error: Some(error) })
}
