//! Diffusion Policy as an anytime task.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec,
    PrefixSupport, Progress, Stamp, Unused,
};

use super::planned::start;
use super::streaming::{ROLLING, Sampling, Streaming};
use super::{Condition, DiffusionConfig, DiffusionModel, ENVIRONMENT, History};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, Ticket, compute, steps};
use crate::caches::{Branches, DENOISER, FRAMES, Frames};
use crate::checkpoint::Checkpoint;
use crate::heads::ddpm::Schedule;
use crate::heads::flow::{fill_with_noise, gaussian_noise};
use crate::kernels::{Matrix, Planes};
use crate::processors::Boundary;
use crate::random::SplitMix64;
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 3] = ["preprocess", "vision", "denoise"];
const VISION: usize = 1;
const DENOISE: usize = 2;

/// An observation on its way into the history.
struct Seen {
    instant: Stamp,
    instruction: String,
    state: Vec<f32>,
    /// Images not yet encoded, in order.
    images: VecDeque<Planes>,
    features: Vec<Arc<Matrix>>,
}

struct Run {
    ticket: Ticket<3>,
    seen: Seen,
    condition: Option<Condition>,
    sampling: Sampling,
    /// Why the rolling buffer is not used.
    unused: Option<Unused>,
    random: SplitMix64,
    /// Whether the observation's features were known already.
    remembered: bool,
}

/// A Diffusion Policy: one step per camera, one per denoise step.
///
/// The chunk begins at the current observation: of the horizon that is denoised, the first `n_obs_steps - 1` actions
/// lie in the past, and `n_action_steps` from there on are given.
///
/// Planned actions are inpainted: at every denoise step the estimate of the clean actions is replaced by them
/// ([`crate::heads::ddpm::Inpainting`]); a warm start begins at the plan, noised.
///
/// With a rolling buffer ([`LoadOptions::streaming`]) a chunk goes on from what is left of the one before; plans of others
/// are refused then.
pub struct DiffusionPolicy {
    model: DiffusionModel,
    boundary: Boundary,
    schedule: Schedule,
    spec: PolicySpec,
    past: usize,
    history: History<(Vec<Arc<Matrix>>, Vec<f32>)>,
    run: Option<Run>,
    noise: VecDeque<Vec<f32>>,
    branches: Branches,
    frames: Frames,
    streaming: Option<Streaming>,
}

impl DiffusionPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let path = checkpoint.config_path();
        let config = DiffusionConfig::of(checkpoint)?;
        if checkpoint.features.input_dim(&path, ENVIRONMENT)?.is_some() {
            let reason = "is an input, which no robot gives; train the policy without it";
            return Err(ModelError::config(&path, ENVIRONMENT, reason));
        }
        let boundary = Boundary::new(checkpoint, 0)?;
        let steps = options.denoise_steps.unwrap_or(config.denoise_steps());
        let mut spec = boundary.spec(checkpoint, options, config.n_action_steps, steps)?;
        let mut streaming = None;
        if options.streaming {
            let rolling = Streaming::new(checkpoint, &config, steps, spec.dt().as_secs_f64())?;
            spec.denoise_steps = rolling.steps();
            spec.prefix = PrefixSupport::default();
            streaming = Some(rolling);
        }
        let model = DiffusionModel::load(checkpoint)?;
        let branches = options.caches.branches(checkpoint, model.blocks())?;
        Ok(Self {
            model,
            branches,
            frames: Frames::default(),
            boundary,
            schedule: config.schedule(),
            past: config.n_obs_steps - 1,
            history: History::new(config.n_obs_steps, spec.dt()),
            spec,
            run: None,
            noise: VecDeque::new(),
            streaming,
        })
    }

    /// Takes the noise of the next inference from `noise` (`[H, A]` each, row by row: the starting noise, then what
    /// each step adds) instead of the request's seed.
    pub fn set_noise(&mut self, noise: impl IntoIterator<Item = Vec<f32>>) {
        self.noise = noise.into_iter().collect();
    }

    /// `observation` prepared, and whether its features are in the history.
    fn see(&self, observation: &Observation) -> Result<(Seen, bool), PolicyError> {
        let state = self.boundary.state(observation)?;
        let known = self.history.find(observation.instant, &observation.instruction);
        let (images, features) = match known {
            Some((features, _)) => (VecDeque::new(), features.clone()),
            None => {
                let seen = self.boundary.images(observation)?;
                let images = seen.iter().enumerate().map(|(index, image)| {
                    // No camera may be missing, so every input has its image.
                    let image = image.ok_or(PolicyError::OutOfTurn("a camera is missing"))?;
                    let planes = self.boundary.planes(index, image)?;
                    self.model.prepare(planes).map_err(compute)
                });
                (images.collect::<Result<_, PolicyError>>()?, Vec::new())
            }
        };
        let (instant, instruction) = (observation.instant, observation.instruction.clone());
        Ok((Seen { instant, instruction, state, images, features }, known.is_some()))
    }

    fn encode(&mut self, seen: &mut Seen, pixels: &Planes) -> candle_core::Result<()> {
        let (camera, model) = (seen.features.len(), &self.model);
        let encode = || Ok(model.encode_image(camera, pixels)?.features);
        seen.features.push(self.frames.tokens(camera, pixels, encode)?);
        Ok(())
    }

    /// The condition with the observation of `run` as the newest.
    fn condition(&mut self, seen: &Seen) -> candle_core::Result<Condition> {
        let newest = (seen.features.clone(), seen.state.clone());
        self.history.push(seen.instant, &seen.instruction, newest);
        let window = self.history.window();
        let rows = window
            .iter()
            .map(|(features, state)| self.model.observation(state, features, None))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let width = rows.first().map_or(0, Matrix::width);
        Ok(Condition::new(Matrix::stacked(rows.iter(), width)?))
    }

    /// Does one bounded step of `run`; the stage it belonged to.
    fn step(&mut self, run: &mut Run) -> candle_core::Result<usize> {
        if let Some(pixels) = run.seen.images.pop_front() {
            self.encode(&mut run.seen, &pixels)?;
            if run.seen.images.is_empty() {
                run.condition = Some(self.condition(&run.seen)?);
            }
            return Ok(VISION);
        }
        let condition = match run.condition.take() {
            Some(condition) => condition,
            None => self.condition(&run.seen)?,
        };
        let (x, times) = (run.sampling.sample(), run.sampling.timesteps());
        let last = run.sampling.done() + 1 == run.sampling.steps();
        let t = times.first().copied().unwrap_or(0);
        let behind = 1.0 - (t + 1) as f64 / self.schedule.training_steps() as f64;
        let model = &self.model;
        let output = self.branches.evaluate(behind, last, |branches| {
            model.predict_with(x, times, &condition, branches)
        })?;
        run.condition = Some(condition);
        let shape = self.model.sample_shape();
        let (random, noise) = (&mut run.random, &mut self.noise);
        run.sampling.step(&output, || next_noise(noise, random, shape))?;
        Ok(DENOISE)
    }
}

/// The next noise (`[H, A]`): the first of `given`, otherwise what `random` gives, which moves on either way.
fn next_noise(
    given: &mut VecDeque<Vec<f32>>,
    random: &mut SplitMix64,
    shape: (usize, usize),
) -> candle_core::Result<Matrix> {
    let (given, seed) = (given.pop_front(), random.next_u64());
    if let Some(given) = given {
        return Matrix::new(&given, shape);
    }
    let mut noise = Matrix::unwritten(shape.0, shape.1);
    fill_with_noise(seed, noise.values_mut());
    Ok(noise)
}

impl Policy for DiffusionPolicy {
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
        let begun = Instant::now();
        let most = self.schedule.training_steps();
        let steps = steps(request, &self.spec, most)?;
        // What is asked for is what a chunk takes that goes on from the buffer.
        let steps = self.streaming.as_ref().map_or(steps, |s| s.whole_steps(steps, most));
        let (seen, remembered) = self.see(observation)?;
        let mut random = SplitMix64::new(request.seed);
        let noise = next_noise(&mut self.noise, &mut random, self.model.sample_shape());
        let noise = noise.map_err(compute)?;
        let schedule = self.schedule.clone();
        let prefix = request.prefix.as_ref();
        let (mut unused, mut rolled) = (None, None);
        if let Some(streaming) = &self.streaming {
            if prefix.is_some() {
                return Err(PolicyError::Unsupported("plans beside its rolling buffer"));
            }
            let values = |count| gaussian_noise(random.next_u64(), count);
            let kept = match request.exact {
                true => Err(Unused::Exact),
                false => streaming.rolled(observation, steps, values),
            };
            match kept {
                Ok(buffer) => rolled = Some(buffer.map_err(compute)?),
                Err(why) => unused = Some(why),
            }
        }
        let sampling = match rolled {
            Some(buffer) => Sampling::Rolling(buffer),
            None => {
                let (boundary, past) = (&self.boundary, self.past);
                Sampling::Whole(start(schedule, prefix, boundary, past, noise, steps)?)
            }
        };
        self.branches.begin(request.seed, request.exact);
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, begun),
            seen,
            condition: None,
            sampling,
            unused,
            random,
            remembered,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let mut run = self.run.take().ok_or(NOT_BEGUN)?;
        let mut stage = DENOISE;
        if !run.sampling.is_done() {
            let begun = Instant::now();
            stage = self.step(&mut run).map_err(compute)?;
            run.ticket.add(stage, begun);
        }
        let cameras = run.seen.images.len() + run.seen.features.len();
        let progress = match run.sampling.is_done() {
            true => Progress::Done,
            false => Progress::Step {
                stage: STAGES[stage],
                done: run.seen.features.len() + run.sampling.done(),
                total: cameras + run.sampling.steps(),
                denoised: stage == DENOISE,
                next_denoises: run.seen.images.is_empty(),
            },
        };
        self.run = Some(run);
        Ok(progress)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.sampling.is_done()).ok_or(NOT_DONE)?;
        self.noise.clear();
        let current = run.sampling.sample().iter().skip(self.past);
        let actions = self.boundary.actions(current.take(self.spec.action_horizon))?;
        let mut chunk = run.ticket.chunk(&self.spec, actions, run.sampling.done())?;
        let hits = u32::from(run.remembered);
        let used = CacheUse { lookups: 1, hits, ..CacheUse::default() };
        chunk.report.caches.push(("observation_features", used));
        chunk.report.caches.extend(self.branches.end().map(|used| (DENOISER, used)));
        chunk.report.caches.push((FRAMES, self.frames.used()));
        if let Some(streaming) = &mut self.streaming {
            let seen = (run.seen.instant, run.seen.instruction.as_str());
            streaming.made(&run.sampling, &self.schedule, seen);
            let used = streaming.used(&run.sampling, run.ticket.time(DENOISE), run.unused);
            chunk.report.caches.push((ROLLING, used));
        }
        Ok(chunk)
    }

    fn history_period(&self) -> Option<Duration> {
        (self.past > 0).then(|| self.spec.dt())
    }

    fn remember(&mut self, observation: &Observation) -> Result<(), PolicyError> {
        let (mut seen, _) = self.see(observation)?;
        while let Some(pixels) = seen.images.pop_front() {
            self.encode(&mut seen, &pixels).map_err(compute)?;
        }
        self.history.push(seen.instant, &seen.instruction, (seen.features, seen.state));
        Ok(())
    }

    fn forget(&mut self) {
        (self.run, self.frames) = (None, Frames::default());
        self.branches.forget();
        if let Some(streaming) = &mut self.streaming {
            streaming.forget();
        }
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(match &mut run.sampling {
            // The levels of a buffer's actions are those of its steps.
            Sampling::Whole(sampler) if self.streaming.is_none() => sampler.set_steps(steps),
            _ => false,
        })
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(match &mut run.sampling {
            Sampling::Whole(sampler) if self.streaming.is_none() => sampler.finish(),
            _ => false,
        })
    }
}
