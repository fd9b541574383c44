//! Any flow-matching network as an anytime task: one step per camera, one for the prefix, one per denoise step.

use std::time::Instant;

use candle_core::{Result, Tensor};
use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix, PrefixUse,
    Progress,
};

use super::{Convention, FlowTime, Planned, Sampler, Solver, Start, gaussian_noise, reuse};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};

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

    /// The part of `inputs` that does not depend on the sample, with the `images`' tokens.
    ///
    /// # Errors
    /// When a token is not in the table.
    fn encode_prefix(&self, inputs: &Self::Inputs, images: &[Tensor]) -> Result<Self::Cache>;

    /// Velocity of the sample `x` (`[H, M]`) at `times`: one for all actions, or one for each.
    ///
    /// # Errors
    /// When shapes do not fit.
    fn velocity(
        &self,
        cache: &Self::Cache,
        x: &Tensor,
        times: &[FlowTime<Self::Time>],
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
    /// The run whose chunk was taken: another sample may be made from what it saw.
    spent: Option<Run<M>>,
    noise: Option<Vec<f32>>,
    sampling: Sampling,
}

impl<M: FlowModel> FlowPolicy<M> {
    /// The policy of `model`; `spec` must be the model's, with an action rate.
    pub fn new(model: M, spec: PolicySpec, sampling: Sampling) -> Self {
        Self { model, spec, run: None, spent: None, noise: None, sampling }
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
        (self.run, self.spent) = (None, None);
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
        });
        Ok(())
    }

    fn resample(&mut self, request: &ChunkRequest) -> std::result::Result<bool, PolicyError> {
        let Some(spent) = self.spent.take().filter(|spent| spent.cache.is_some()) else {
            return Ok(false);
        };
        let (planned, sampler) = self.sampling(&spent.inputs, request)?;
        let (ticket, prefix) = (spent.ticket.again(request), request.prefix.clone());
        self.run = Some(Run { ticket, sampler, planned, prefix, ..spent });
        Ok(true)
    }

    fn advance(&mut self) -> std::result::Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOT_BEGUN)?;
        if run.sampler.is_done() {
            return Ok(Progress::Done);
        }
        let (start, model) = (Instant::now(), &self.model);
        let stage = if let Some(pixels) = M::images(&run.inputs).get(run.tokens.len()) {
            run.tokens.push(model.encode_image(pixels).map_err(compute)?);
            VISION
        } else if let Some(cache) = &run.cache {
            let velocity =
                |x: &Tensor, times: &[FlowTime<M::Time>]| model.velocity(cache, x, times);
            run.planned.step(&mut run.sampler, velocity).map_err(compute)?;
            DENOISE
        } else {
            run.cache = Some(model.encode_prefix(&run.inputs, &run.tokens).map_err(compute)?);
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
        Ok(chunk)
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
