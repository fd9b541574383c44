//! X-VLA as an anytime task.

use std::sync::Arc;
use std::time::Instant;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix, PrefixUse,
    Progress,
};

use super::preparer::{Inputs, Preparer};
use super::{CleanSampler, HeadCache, Xvla, XvlaConfig};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};
use crate::caches::{Branches, DENOISER, FRAMES, Frames};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{gaussian_noise, reuse};
use crate::kernels::Matrix;
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "denoise"];
const VISION: usize = 1;
const PREFIX: usize = 2;
const DENOISE: usize = 3;

struct Run {
    ticket: Ticket<4>,
    inputs: Inputs,
    state: Vec<f32>,
    /// Tokens of the images encoded so far.
    tokens: Vec<Arc<Matrix>>,
    cache: Option<HeadCache>,
    sampler: CleanSampler,
    prefix: Option<Prefix>,
}

impl Run {
    fn total(&self) -> usize {
        self.inputs.pixels.len() + 1 + self.sampler.steps()
    }

    fn done(&self) -> usize {
        self.tokens.len() + usize::from(self.cache.is_some()) + self.sampler.done()
    }
}

/// An X-VLA policy: one step per camera, one for the encoder, one per denoise step.
///
/// Planned actions can be started from (they take the place of the clean estimate, which is what the network
/// was trained to see beside the noise). It knows no guidance: there is no reference for it.
pub struct XvlaPolicy {
    model: Xvla,
    preparer: Preparer,
    spec: PolicySpec,
    run: Option<Run>,
    noise: Option<Vec<f32>>,
    noise_scale: f32,
    branches: Branches,
    frames: Frames,
}

impl XvlaPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = XvlaConfig::of(checkpoint)?;
        let preparer = Preparer::new(checkpoint, &config, options.missing_cameras)?;
        let model = Xvla::load(checkpoint, &config)?;
        let boundary = preparer.boundary();
        let spec = boundary.spec(
            checkpoint,
            options,
            config.chunk_size,
            options.denoise_steps.unwrap_or(config.num_denoising_steps),
        )?;
        let noise_scale = checkpoint.actions.noise_scale.unwrap_or(1.0) as f32;
        let branches = options.caches.branches(checkpoint, model.blocks())?;
        Ok(Self {
            model,
            preparer,
            spec,
            run: None,
            noise: None,
            noise_scale,
            branches,
            frames: Frames::default(),
        })
    }

    /// Starts the next inference from `noise` (`[H, M]` row by row) instead of the request's seed.
    pub fn set_noise(&mut self, noise: Vec<f32>) {
        self.noise = Some(noise);
    }

    /// The sampling that `prefix` asks for, from `noise`.
    fn start(
        &self,
        prefix: Option<&Prefix>,
        noise: Vec<f32>,
        steps: usize,
    ) -> Result<CleanSampler, PolicyError> {
        let shape = self.model.sample_shape();
        let Some(prefix) = prefix.filter(|p| p.rows() > 0) else {
            return CleanSampler::new(noise, shape, steps).map_err(compute);
        };
        let expected = self.spec.action_dim;
        if prefix.dim != expected {
            return Err(PolicyError::PrefixWidth { expected, found: prefix.dim });
        }
        let time = match prefix.usage {
            PrefixUse::Guided { .. } => return Err(PolicyError::Unsupported("guidance")),
            PrefixUse::Trained => return Err(PolicyError::Unsupported("clean prefixes")),
            PrefixUse::WarmStart { time } if time > 0.0 && time < 1.0 => time,
            PrefixUse::WarmStart { time } => {
                return Err(PolicyError::Compute(format!(
                    "a warm start at flow time {time} was asked for; use a value between 0 and 1"
                )));
            }
        };
        let planned = self.preparer.boundary().model_actions(&prefix.actions, expected)?;
        let (horizon, width) = shape;
        let space = self.model.space();
        let rows = planned.chunks_exact(expected).take(horizon);
        let mut rows: Vec<f32> = rows.flat_map(|row| space.channels(row.iter().copied())).collect();
        // Past the plan's end the last planned action goes on.
        while rows.len() < horizon * width {
            rows.extend_from_within(rows.len() - width..);
        }
        CleanSampler::from_estimate(rows, noise, shape, steps, time).map_err(compute)
    }
}

impl Policy for XvlaPolicy {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.run = None;
        self.frames.begin();
        let start = Instant::now();
        let steps = steps(request, &self.spec, STEP_LIMIT)?;
        let inputs = self.preparer.prepare(observation)?;
        let (horizon, width) = self.model.sample_shape();
        let noise = self.noise.take().unwrap_or_else(|| {
            let mut noise = gaussian_noise(request.seed, horizon * width);
            noise.iter_mut().for_each(|x| *x *= self.noise_scale);
            noise
        });
        let sampler = self.start(request.prefix.as_ref(), noise, steps)?;
        self.branches.begin(request.seed, request.exact);
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            state: self.model.pad_state(&inputs.state),
            inputs,
            tokens: Vec::new(),
            cache: None,
            sampler,
            prefix: request.prefix.clone(),
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOT_BEGUN)?;
        if run.sampler.is_done() {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = if let Some(pixels) = run.inputs.pixels.get(run.tokens.len()) {
            let (camera, model) = (run.tokens.len(), &self.model);
            let encode = || Ok(model.encode_image(pixels)?.tokens);
            run.tokens.push(self.frames.tokens(camera, pixels, encode).map_err(compute)?);
            VISION
        } else if let Some(cache) = &run.cache {
            let (x, time) = (run.sampler.sample().map_err(compute)?, run.sampler.time());
            let (model, last) = (&self.model, run.sampler.done() + 1 == run.sampler.steps());
            let clean = self.branches.evaluate(1.0 - time, last, |branches| {
                model.predict_with(cache, &x, &run.state, time, branches)
            });
            run.sampler.step(clean.map_err(compute)?);
            DENOISE
        } else {
            let features = self.model.encode(&run.tokens, &run.inputs.tokens).map_err(compute)?;
            run.cache = Some(self.model.prepare(&features).map_err(compute)?);
            PREFIX
        };
        run.ticket.add(stage, start);
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
        let run = self.run.take_if(|run| run.sampler.is_done()).ok_or(NOT_DONE)?;
        let actions = self.model.actions(run.sampler.clean(), self.preparer.boundary())?;
        let mut chunk = run.ticket.chunk(&self.spec, actions, run.sampler.done())?;
        chunk.report.caches.extend(run.prefix.as_ref().map(|prefix| reuse(prefix, &chunk)));
        chunk.report.caches.extend(self.branches.end().map(|used| (DENOISER, used)));
        chunk.report.caches.push((FRAMES, self.frames.used()));
        Ok(chunk)
    }

    fn forget(&mut self) {
        (self.run, self.frames) = (None, Frames::default());
        self.branches.forget();
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(run.sampler.set_steps(steps.min(STEP_LIMIT)))
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(run.sampler.finish())
    }
}
