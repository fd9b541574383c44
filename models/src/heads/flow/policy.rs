//! Any flow-matching network as an anytime task: one step per camera, one for the prefix, one per denoise step.

use std::time::{Duration, Instant};

use candle_core::{Result, Tensor};
use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix,
    PrefixUse, Progress,
};

use super::{Convention, FlowTime, Planned, Sampler, Solver, Start, gaussian_noise, reuse};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};
use crate::caches::{self, Branches, DENOISER, FRAMES, Frames, Seen, VisionConfig};
use crate::caches::{KeptPrefix, KeptTower};

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "denoise"];
const VISION: usize = 1;
const PREFIX: usize = 2;
const DENOISE: usize = 3;

/// A network with its processors, stage by stage.
pub trait FlowModel: Send {
    /// Direction of its flow time.
    type Time: Convention + Send;
    /// What it is called with.
    type Inputs: Send;
    /// What its velocities read; made once per chunk and never written.
    type Cache: Send;

    /// Shape of the sample that is denoised, `(H, M)`.
    fn sample_shape(&self) -> (usize, usize);

    /// The inputs of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when the observation does not fit.
    fn prepare(
        &mut self,
        observation: &Observation,
    ) -> std::result::Result<Self::Inputs, PolicyError>;

    /// Images of `inputs`, in the model's order, `[3, height, width]`.
    fn images(inputs: &Self::Inputs) -> &[Tensor];

    /// Tokens of one image.
    ///
    /// # Errors
    /// When its size does not fit.
    fn encode_image(&self, pixels: &Tensor) -> Result<Tensor>;

    /// As [`Self::encode_image`], with what `kept` says computed; a model that cannot computes all.
    ///
    /// # Errors
    /// As there.
    fn encode_image_kept(&self, pixels: &Tensor, _kept: &mut KeptTower) -> Result<Tensor> {
        self.encode_image(pixels)
    }

    /// As [`Self::encode_prefix`], with what `kept` says computed; a model that cannot computes all.
    ///
    /// # Errors
    /// As there.
    fn encode_prefix_kept(
        &self,
        inputs: &Self::Inputs,
        images: &[Tensor],
        _kept: &mut KeptPrefix,
    ) -> Result<Self::Cache> {
        self.encode_prefix(inputs, images)
    }

    /// Whether [`Self::encode_prefix`] gives the same for `a` and `b` when the images' tokens are the same.
    fn same_prefix(a: &Self::Inputs, b: &Self::Inputs) -> bool;

    /// The part of `inputs` that does not depend on the sample, with the `images`' tokens.
    ///
    /// # Errors
    /// When a token is not in the table.
    fn encode_prefix(&self, inputs: &Self::Inputs, images: &[Tensor]) -> Result<Self::Cache>;

    /// Velocity of the sample `x` (`[H, M]`) at `times`: one for all actions, or one for each. Its residual branches are
    /// computed, or not, by `branches`.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn velocity(
        &self,
        cache: &Self::Cache,
        x: &Tensor,
        times: &[FlowTime<Self::Time>],
        branches: &mut Branches,
    ) -> Result<Tensor>;

    /// Planned actions (rows of `D`, physical units) as the network has them: rows of `width`.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a value that is none.
    fn model_actions(
        &self,
        inputs: &Self::Inputs,
        actions: &[f64],
        width: usize,
    ) -> std::result::Result<Vec<f32>, PolicyError>;

    /// A finished sample (`[H, M]`) as actions `[H, D]`, row by row, in physical units.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] when a value is no number.
    fn actions(
        &self,
        inputs: &Self::Inputs,
        sample: &Tensor,
    ) -> std::result::Result<Vec<f64>, PolicyError>;
}

struct Run<M: FlowModel> {
    ticket: Ticket<4>,
    inputs: M::Inputs,
    /// Tokens of the images encoded so far.
    tokens: Vec<Tensor>,
    cache: Option<M::Cache>,
    sampler: Sampler<M::Time>,
    planned: Planned,
    prefix: Option<Prefix>,
    /// The prefix is that of the run before, which took so long.
    kept: Option<Duration>,
}

impl<M: FlowModel> Run<M> {
    fn total(&self) -> usize {
        M::images(&self.inputs).len() + 1 + self.sampler.steps()
    }

    fn done(&self) -> usize {
        self.tokens.len() + usize::from(self.cache.is_some()) + self.sampler.done()
    }
}

/// How samples are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Scale of the starting noise.
    pub noise_scale: f32,
    /// How a step follows the velocity.
    pub solver: Solver,
}

/// A flow-matching policy.
pub struct FlowPolicy<M: FlowModel> {
    model: M,
    spec: PolicySpec,
    run: Option<Run<M>>,
    /// The run whose chunk was taken: another sample may be made from what it saw, and what has not changed since need
    /// not be computed again.
    spent: Option<Run<M>>,
    frames: Frames,
    /// What is kept of the cameras' pictures; `None`: all is computed.
    seen: Option<Seen>,
    /// Time that the newest prefix took.
    prefix_time: Duration,
    noise: Option<Vec<f32>>,
    sampling: Sampling,
    branches: Branches,
}

impl<M: FlowModel> FlowPolicy<M> {
    /// The policy of `model`; `spec` must be the model's, with an action rate.
    pub fn new(model: M, spec: PolicySpec, sampling: Sampling) -> Self {
        Self {
            model,
            spec,
            run: None,
            spent: None,
            frames: Frames::default(),
            seen: None,
            prefix_time: Duration::ZERO,
            noise: None,
            sampling,
            branches: Branches::off(),
        }
    }

    /// Computes the denoiser's residual branches as `branches` says.
    #[must_use]
    pub fn with_branches(self, branches: Branches) -> Self {
        Self { branches, ..self }
    }

    /// Keeps the patches of pictures that have not changed, as `config` says.
    #[must_use]
    pub fn with_vision(self, config: Option<VisionConfig>) -> Self {
        Self { seen: config.map(Seen::new), ..self }
    }

    fn check(&self, prefix: &Prefix) -> std::result::Result<(), PolicyError> {
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

    /// The sampling that `request` asks for, in an inference with `inputs`.
    fn sampling(
        &mut self,
        inputs: &M::Inputs,
        request: &ChunkRequest,
    ) -> std::result::Result<(Planned, Sampler<M::Time>), PolicyError> {
        let steps = steps(request, &self.spec, STEP_LIMIT)?;
        if let Some(prefix) = &request.prefix {
            self.check(prefix)?;
        }
        let shape = self.model.sample_shape();
        let noise = self.noise.take().unwrap_or_else(|| {
            let mut noise = gaussian_noise(request.seed, shape.0 * shape.1);
            noise.iter_mut().for_each(|x| *x *= self.sampling.noise_scale);
            noise
        });
        let model = &self.model;
        let to_model = |actions: &[f64], width| model.model_actions(inputs, actions, width);
        self.branches.begin(request.seed, request.exact);
        let start = Start { noise, shape, steps, solver: self.sampling.solver };
        Planned::start(request.prefix.as_ref(), to_model, start)
    }

    /// Starts the next inference from `noise` (`[H, M]` row by row) instead of the request's seed.
    pub fn set_noise(&mut self, noise: Vec<f32>) {
        self.noise = Some(noise);
    }
}

impl<M: FlowModel> Policy for FlowPolicy<M> {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> std::result::Result<(), PolicyError> {
        // One that was dropped has changed what is kept of the pictures, and nobody will ever say how far.
        let dropped = self.run.take().is_some();
        if let Some(seen) = &mut self.seen {
            seen.begin(dropped || request.exact);
        }
        self.frames.begin();
        let start = Instant::now();
        let inputs = self.model.prepare(observation)?;
        let (planned, sampler) = self.sampling(&inputs, request)?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            tokens: Vec::new(),
            cache: None,
            sampler,
            planned,
            prefix: request.prefix.clone(),
            kept: None,
        });
        Ok(())
    }

    fn resample(&mut self, request: &ChunkRequest) -> std::result::Result<bool, PolicyError> {
        let spent = self.spent.take_if(|spent| self.run.is_none() && spent.cache.is_some());
        let Some(spent) = spent else { return Ok(false) };
        let (planned, sampler) = self.sampling(&spent.inputs, request)?;
        self.frames.begin();
        if let Some(seen) = &mut self.seen {
            seen.begin(false);
        }
        let (ticket, prefix) = (spent.ticket.again(request), request.prefix.clone());
        let kept = None;
        self.run = Some(Run { ticket, sampler, planned, prefix, kept, ..spent });
        Ok(true)
    }

    fn advance(&mut self) -> std::result::Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOT_BEGUN)?;
        if run.sampler.is_done() {
            return Ok(Progress::Done);
        }
        let (start, model, branches) = (Instant::now(), &self.model, &mut self.branches);
        let stage = if let Some(pixels) = M::images(&run.inputs).get(run.tokens.len()) {
            let camera = run.tokens.len();
            let tokens = match &mut self.seen {
                Some(seen) => seen.image(camera, |kept| model.encode_image_kept(pixels, kept)),
                // What is kept there is only nearly the picture's, so this is for whole pictures.
                None => self.frames.tokens(camera, pixels, || model.encode_image(pixels)),
            };
            run.tokens.push(tokens.map_err(compute)?);
            VISION
        } else if let Some(cache) = &run.cache {
            let last = run.sampler.done() + 1 == run.sampler.steps();
            let velocity = |x: &Tensor, times: &[FlowTime<M::Time>]| {
                let level = times.iter().map(|t| t.level()).fold(0.0, f64::max);
                branches.evaluate(1.0 - level, last, |branches| {
                    model.velocity(cache, x, times, branches)
                })
            };
            run.planned.step(&mut run.sampler, velocity).map_err(compute)?;
            DENOISE
        } else {
            let same = |spent: &mut Run<M>| {
                let ids = |run: &Run<M>| run.tokens.iter().map(Tensor::id).collect::<Vec<_>>();
                ids(spent) == ids(run) && M::same_prefix(&spent.inputs, &run.inputs)
            };
            // Its own sample has been taken, so the run before has no more use for its prefix.
            run.cache = match self.spent.take_if(same).and_then(|spent| spent.cache) {
                Some(cache) => {
                    run.kept = Some(self.prefix_time);
                    Some(cache)
                }
                None => {
                    let (inputs, tokens) = (&run.inputs, &run.tokens);
                    let made = match &mut self.seen {
                        Some(seen) => model.encode_prefix_kept(inputs, tokens, seen.prefix()),
                        None => model.encode_prefix(inputs, tokens),
                    };
                    Some(made.map_err(compute)?)
                }
            };
            if run.kept.is_none() {
                self.prefix_time = start.elapsed();
            }
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

    fn take_chunk(&mut self) -> std::result::Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.sampler.is_done()).ok_or(NOT_DONE)?;
        let run = self.spent.insert(run);
        let actions = self.model.actions(&run.inputs, run.sampler.sample())?;
        let mut chunk = run.ticket.chunk(&self.spec, actions, run.sampler.done())?;
        chunk.report.caches.extend(run.prefix.as_ref().map(|prefix| reuse(prefix, &chunk)));
        chunk.report.caches.extend(self.branches.end().map(|used| (DENOISER, used)));
        chunk.report.caches.extend(match &self.seen {
            Some(seen) => seen.used(),
            None => Some((FRAMES, self.frames.used())),
        });
        let (hits, saved) = (u32::from(run.kept.is_some()), run.kept.unwrap_or_default());
        let whole = CacheUse { lookups: 1, hits, saved, ..CacheUse::default() };
        let partly = self.seen.as_ref().and_then(Seen::prefix_used);
        let prefix = partly.filter(|_| run.kept.is_none()).unwrap_or(whole);
        chunk.report.caches.push((caches::PREFIX, prefix));
        Ok(chunk)
    }

    fn forget(&mut self) {
        (self.run, self.spent, self.frames) = (None, None, Frames::default());
        self.seen = self.seen.take().map(|seen| Seen::new(seen.config()));
        self.branches.forget();
    }

    fn set_denoise_steps(&mut self, steps: usize) -> std::result::Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(run.sampler.set_steps(steps.min(STEP_LIMIT)))
    }

    fn finish_early(&mut self) -> std::result::Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        run.sampler.finish().map_err(compute)
    }
}
