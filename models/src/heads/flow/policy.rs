//! Any flow-matching network as an anytime task: one step per camera, one for the prefix, one per denoise step.
//!
//! With early exits a denoise step is one exit: the layers up to it, and its flow steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix,
    PrefixUse, Progress,
};

use super::{FlowModel, FlowTime, Planned, Sampler, Solver, Start, gaussian_noise, reuse};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};
use crate::caches::{self, Branches, DENOISER, FRAMES, Frames, Seen, VisionConfig};
use crate::exits::{EARLY_EXIT, Exiting, Exits};
use crate::kernels::Matrix;

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "denoise"];
const VISION: usize = 1;
const PREFIX: usize = 2;
const DENOISE: usize = 3;

struct Run<M: FlowModel> {
    ticket: Ticket<4>,
    inputs: M::Inputs,
    /// Tokens of the images encoded so far.
    tokens: Vec<Arc<Matrix>>,
    cache: Option<M::Cache>,
    sampler: Sampler<M::Time>,
    planned: Planned,
    prefix: Option<Prefix>,
    /// The prefix is that of the run before, which took so long.
    kept: Option<Duration>,
    /// The exits that it goes through; none: it is that of the whole network.
    exiting: Option<Exiting>,
}

impl<M: FlowModel> Run<M> {
    fn total(&self) -> usize {
        let steps = self.exiting.as_ref().map_or(self.sampler.steps(), Exiting::most);
        M::images(&self.inputs).len() + 1 + steps
    }

    fn done(&self) -> usize {
        self.tokens.len() + usize::from(self.cache.is_some()) + self.denoised()
    }

    /// Denoise steps that are behind.
    fn denoised(&self) -> usize {
        self.exiting.as_ref().map_or(self.sampler.done(), Exiting::done)
    }

    fn is_done(&self) -> bool {
        self.exiting.as_ref().map_or(self.sampler.is_done(), Exiting::ended)
    }

    /// The part that does not depend on the sample, `cache` being what there is of it, for the layers that run next.
    fn deepen(&mut self, model: &M, cache: Option<M::Cache>) -> Result<(), PolicyError> {
        let depth = self.exiting.as_ref().map_or(model.depth(), Exiting::depth);
        let made = model.encode_prefix_to(&self.inputs, &self.tokens, cache, depth);
        self.cache = Some(made.map_err(compute)?);
        Ok(())
    }

    /// A denoise step, with what `branches` computes of it: `together` flow steps. At an exit these are all there are;
    /// `dim` values of an action count.
    fn denoise(
        &mut self,
        model: &M,
        branches: &mut Branches,
        (together, dim): (usize, usize),
    ) -> Result<(), PolicyError> {
        if self.exiting.is_some() {
            self.sampler.restart();
        }
        let start = Instant::now();
        let cache = self.cache.as_ref().ok_or(NOT_BEGUN)?;
        for _ in 0..together.min(self.sampler.steps() - self.sampler.done()) {
            let last = self.sampler.done() + 1 == self.sampler.steps();
            let velocity = |x: &Matrix, times: &[FlowTime<M::Time>]| {
                let level = times.iter().map(|t| t.level()).fold(0.0, f64::max);
                branches.evaluate(1.0 - level, last, |branches| {
                    model.velocity(cache, x, times, branches)
                })
            };
            self.planned.step(&mut self.sampler, velocity).map_err(compute)?;
        }
        self.ticket.add(DENOISE, start);
        let Some(exiting) = &mut self.exiting else { return Ok(()) };
        let sample = self.sampler.sample();
        let values = sample.columns(0..dim).iter().flatten().copied().collect();
        let physical = exiting.recorded().then(|| model.actions(&self.inputs, sample));
        let time = self.ticket.time(PREFIX) + self.ticket.time(DENOISE);
        exiting.reached(values, physical.transpose()?, time);
        Ok(())
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
    exits: Option<Exits>,
}

/// What the noise becomes in one inference.
type Way<M> = (Planned, Sampler<<M as FlowModel>::Time>, Option<Exiting>);

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
            exits: None,
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

    /// Ends inferences early, as `exits` say; every exit then counts as one denoise step.
    #[must_use]
    pub(crate) fn with_exits(mut self, exits: Option<Exits>) -> Self {
        if let Some(exits) = &exits {
            self.spec.denoise_steps = exits.count();
            // Every exit starts from the one before, and the first from noise.
            self.spec.prefix.warm_start = false;
        }
        Self { exits, ..self }
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
            (PrefixUse::WarmStart { .. }, _) if self.exits.is_some() => {
                Err(PolicyError::Unsupported("starts from a guess with early exits"))
            }
            _ => Ok(()),
        }
    }

    /// The sampling that `request` asks for, in an inference with `inputs`.
    fn sampling(
        &mut self,
        inputs: &M::Inputs,
        request: &ChunkRequest,
    ) -> Result<Way<M>, PolicyError> {
        let mut steps = steps(request, &self.spec, STEP_LIMIT)?;
        let exiting = self.exits.as_ref().and_then(|exits| exits.begin(request, steps));
        match (&exiting, &self.exits) {
            (Some(exiting), _) => steps = exiting.steps(),
            // The request counts exits, which are left out.
            (None, Some(exits)) => steps = exits.whole_steps(),
            (None, None) => {}
        }
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
        let (planned, sampler) = Planned::start(request.prefix.as_ref(), to_model, start)?;
        Ok((planned, sampler, exiting))
    }

    /// The part of the inference `run` that does not depend on the sample, as deep as it is needed first.
    fn read(&mut self, run: &mut Run<M>) -> Result<(), PolicyError> {
        let (start, model) = (Instant::now(), &self.model);
        let same = |spent: &mut Run<M>| {
            let (before, now) = (&spent.tokens, &run.tokens);
            let pictures =
                before.len() == now.len() && before.iter().zip(now).all(|(a, b)| Arc::ptr_eq(a, b));
            pictures && M::same_prefix(&spent.inputs, &run.inputs)
        };
        // Its own sample has been taken, so the run before has no more use for its prefix.
        let spent = self.spent.take_if(same).and_then(|spent| spent.cache);
        let spent = spent.filter(|_| !self.exits.as_ref().is_some_and(Exits::measured));
        run.kept = spent.is_some().then_some(self.prefix_time);
        let (inputs, tokens) = (&run.inputs, &run.tokens);
        match (spent, &mut self.seen) {
            (spent, _) if self.exits.is_some() => run.deepen(model, spent)?,
            (Some(cache), _) => run.cache = Some(cache),
            (None, seen) => {
                let made = match seen {
                    Some(seen) => model.encode_prefix_kept(inputs, tokens, seen.prefix()),
                    None => model.encode_prefix(inputs, tokens),
                };
                run.cache = Some(made.map_err(compute)?);
            }
        }
        if run.kept.is_none() {
            self.prefix_time = start.elapsed();
        }
        run.ticket.add(PREFIX, start);
        Ok(())
    }

    /// The next step of `run`: its stage; none when there is no more.
    fn step(&mut self, run: &mut Run<M>) -> Result<Option<usize>, PolicyError> {
        if run.is_done() {
            return Ok(None);
        }
        let model = &self.model;
        if let Some(pixels) = M::images(&run.inputs).get(run.tokens.len()) {
            let (start, camera) = (Instant::now(), run.tokens.len());
            let tokens = match &mut self.seen {
                Some(seen) => {
                    seen.image(camera, |kept| model.encode_image_kept(pixels, kept)).map(Arc::new)
                }
                // What is kept there is only nearly the picture's, so this is for whole pictures.
                None => self.frames.tokens(camera, pixels, || model.encode_image(pixels)),
            };
            run.tokens.push(tokens.map_err(compute)?);
            run.ticket.add(VISION, start);
            return Ok(Some(VISION));
        }
        if run.cache.is_none() {
            self.read(run)?;
            return Ok(Some(PREFIX));
        }
        // Where exits count as denoise steps, so do as many flow steps of the whole network.
        let together = self.exits.as_ref().map_or(1, Exits::together);
        if self.exits.is_some() {
            let (start, cache) = (Instant::now(), run.cache.take());
            run.deepen(model, cache)?;
            run.ticket.add(PREFIX, start);
        }
        run.denoise(model, &mut self.branches, (together, self.spec.action_dim))?;
        Ok(Some(DENOISE))
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
    ) -> Result<(), PolicyError> {
        // One that was dropped has changed what is kept of the pictures, and nobody will ever say how far.
        let dropped = self.run.take().is_some();
        if let Some(seen) = &mut self.seen {
            seen.begin(dropped || request.exact);
        }
        self.frames.begin();
        let start = Instant::now();
        let inputs = self.model.prepare(observation)?;
        let (planned, sampler, exiting) = self.sampling(&inputs, request)?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            tokens: Vec::new(),
            cache: None,
            sampler,
            planned,
            prefix: request.prefix.clone(),
            kept: None,
            exiting,
        });
        Ok(())
    }

    fn resample(&mut self, request: &ChunkRequest) -> Result<bool, PolicyError> {
        let spent = self.spent.take_if(|spent| self.run.is_none() && spent.cache.is_some());
        let Some(spent) = spent else { return Ok(false) };
        let (planned, sampler, exiting) = self.sampling(&spent.inputs, request)?;
        self.frames.begin();
        if let Some(seen) = &mut self.seen {
            seen.begin(false);
        }
        let (ticket, prefix) = (spent.ticket.again(request), request.prefix.clone());
        let kept = None;
        self.run = Some(Run { ticket, sampler, planned, prefix, kept, exiting, ..spent });
        Ok(true)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let mut run = self.run.take().ok_or(NOT_BEGUN)?;
        let stepped = self.step(&mut run);
        let run = self.run.insert(run);
        Ok(match stepped? {
            Some(stage) if !run.is_done() => Progress::Step {
                stage: STAGES[stage],
                done: run.done(),
                total: run.total(),
                denoised: stage == DENOISE,
                next_denoises: run.cache.is_some(),
            },
            _ => Progress::Done,
        })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.is_done()).ok_or(NOT_DONE)?;
        let run = self.spent.insert(run);
        let actions = self.model.actions(&run.inputs, run.sampler.sample())?;
        let mut chunk = run.ticket.chunk(&self.spec, actions, run.denoised())?;
        chunk.report.caches.extend(run.prefix.as_ref().map(|prefix| reuse(prefix, &chunk)));
        chunk.report.caches.extend(self.branches.end().map(|used| (DENOISER, used)));
        let exits = self.exits.as_mut().and_then(|exits| exits.end(run.exiting.as_mut()));
        chunk.report.caches.extend(exits.map(|used| (EARLY_EXIT, used)));
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

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(match (&mut run.exiting, &self.exits) {
            (Some(exiting), _) => exiting.set_limit(steps),
            (None, Some(_)) => false,
            (None, None) => run.sampler.set_steps(steps.min(STEP_LIMIT)),
        })
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        match &mut run.exiting {
            Some(exiting) => Ok(exiting.finish()),
            None => run.sampler.finish().map_err(compute),
        }
    }
}
