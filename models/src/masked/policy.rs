//! Masked diffusion as an anytime task.

use std::sync::Arc;
use std::time::Instant;

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, PrefixUse,
    Progress,
};

use super::{MaskedConfig, MaskedVla};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::reuse;
use crate::heads::{AnchorSearch, Anchored, Bins, MaskedDecoder, Masking, smooth};
use crate::kernels::Matrix;
use crate::processors::Normalizer;
use crate::smolvla::{Inputs, Prefix, Preparer, SmolVlaConfig};
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "denoise"];
const VISION: usize = 1;
const PREFIX: usize = 2;
const DENOISE: usize = 3;

struct Run {
    ticket: Ticket<4>,
    inputs: Inputs,
    /// Tokens of the images encoded so far.
    images: Vec<Arc<Matrix>>,
    prefix: Option<Prefix>,
    decoder: MaskedDecoder,
    /// What became of actions that broke a limit; decided, and nothing left to mend: the chunk is done.
    anchored: Anchored,
    done: bool,
    /// The frozen actions as the network has them, row by row.
    frozen: Vec<f32>,
    planned: Option<sinew_runtime::Prefix>,
}

/// A masked-diffusion policy: one step per camera, one for the prefix, one per round.
pub struct MaskedPolicy {
    model: MaskedVla,
    preparer: Preparer,
    masking: Masking,
    /// Per dimension, passes of smoothing; empty: none.
    smoothing: Vec<usize>,
    /// Per dimension, the bins inside the limits; none: all.
    allowed: Option<Vec<Vec<bool>>>,
    /// Per dimension, the largest change from one action to the next (the policy's unit); none: any.
    step_limits: Option<Vec<f64>>,
    anchors: AnchorSearch,
    spec: PolicySpec,
    run: Option<Run>,
}

impl MaskedPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint nor
    /// `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let model = MaskedVla::load(checkpoint)?;
        let (config, head) = (SmolVlaConfig::of(checkpoint)?, MaskedConfig::of(checkpoint)?);
        let boundary = preparer.boundary();
        let spec = boundary.spec(
            checkpoint,
            options,
            config.chunk_size,
            options.denoise_steps.unwrap_or(config.num_steps),
        )?;
        let (masking, smoothing) = (head.masking(), head.smoothing.clone());
        let (anchors, step_limits) = (head.anchors(), head.step_limits.clone());
        let mut policy = Self {
            model,
            preparer,
            masking,
            smoothing,
            allowed: None,
            step_limits,
            anchors,
            spec,
            run: None,
        };
        if let Some(limits) = &head.action_limits {
            let pairs: Vec<_> =
                limits.lower.iter().copied().zip(limits.upper.iter().copied()).collect();
            policy.set_limits(&pairs).map_err(|dim| {
                let reason = format!("leaves no bin of dimension {dim}; widen it");
                ModelError::config(&checkpoint.config_path(), "action_limits", reason)
            })?;
        }
        Ok(policy)
    }

    /// Lets actions change by no more than `limits` (each dimension's, above 0, in the policy's unit) from one to the
    /// next; `None`: by any.
    ///
    /// # Errors
    /// The number of limits that is needed; nothing changes then.
    pub fn set_step_limits(&mut self, limits: Option<Vec<f64>>) -> Result<(), usize> {
        let dim = self.spec.action_dim;
        let fits = |l: &Vec<f64>| l.len() == dim && l.iter().all(|l| *l > 0.0);
        if !limits.as_ref().is_none_or(fits) {
            return Err(dim);
        }
        self.step_limits = limits;
        Ok(())
    }

    /// Lets actions only have values from `limits`, least and largest of each dimension in the policy's unit.
    ///
    /// Bins outside are never chosen: the model decides the rest of the chunk around that.
    ///
    /// # Errors
    /// The first dimension that has no bin inside its limits, or no limits; nothing changes then.
    pub fn set_limits(&mut self, limits: &[(f64, f64)]) -> Result<(), usize> {
        let (_, action) = self.preparer.boundary().normalizers();
        let bins = self.model.bins();
        let mut allowed = Vec::with_capacity(self.spec.action_dim);
        for dim in 0..self.spec.action_dim {
            let (lower, upper) = limits.get(dim).copied().ok_or(dim)?;
            let inside = |bin| {
                let value = action.unnormalize(dim, f64::from(bins.decode(bin)));
                (lower..=upper).contains(&value)
            };
            let row: Vec<bool> = (0..bins.classes()).map(inside).collect();
            if !row.contains(&true) {
                return Err(dim);
            }
            allowed.push(row);
        }
        self.allowed = Some(allowed);
        Ok(())
    }

    /// The decoder of one chunk: limits applied, planned actions frozen; and those actions.
    fn decoder(
        &self,
        request: &ChunkRequest,
        rounds: usize,
    ) -> Result<(MaskedDecoder, Vec<f32>), PolicyError> {
        let (horizon, dim) = self.model.shape();
        let bins = self.model.bins();
        let mut decoder =
            MaskedDecoder::new(horizon * dim, bins.classes(), rounds, self.masking, request.seed);
        if let Some(allowed) = &self.allowed {
            for position in 0..horizon * dim {
                let row = &allowed[position % dim];
                decoder.allow(position, |bin| row[bin]).map_err(compute)?;
            }
        }
        let Some(prefix) = request.prefix.as_ref().filter(|p| p.rows() > 0) else {
            return Ok((decoder, Vec::new()));
        };
        if prefix.dim != dim {
            return Err(PolicyError::PrefixWidth { expected: dim, found: prefix.dim });
        }
        match (prefix.usage, self.spec.prefix.trained) {
            (PrefixUse::Trained, Some(most)) if prefix.frozen > most => {
                Err(PolicyError::PrefixTooLong { frozen: prefix.frozen, most })
            }
            (PrefixUse::Trained, Some(_)) => {
                let mut rows = self.preparer.boundary().model_actions(&prefix.actions, dim)?;
                rows.truncate(prefix.frozen.min(horizon) * dim);
                for (position, value) in rows.iter().enumerate() {
                    decoder.freeze(position, bins.encode(*value));
                }
                Ok((decoder, rows))
            }
            (PrefixUse::Trained, None) => Err(PolicyError::Unsupported("clean prefixes")),
            (PrefixUse::Guided { .. }, _) => Err(PolicyError::Unsupported("guidance")),
            (PrefixUse::WarmStart { .. }, _) => Err(PolicyError::Unsupported("warm starts")),
        }
    }
}

/// By how much the token at a position changes its dimension more than `limits` from the action before, in the policy's
/// unit; `frozen` are actions that are known better than to a bin.
fn too_fast(
    action: &Normalizer,
    bins: Bins,
    frozen: &[f32],
    limits: &[f64],
) -> impl Fn(usize, &[usize]) -> f64 {
    let dim = limits.len();
    move |position, tokens| {
        let Some(before) = position.checked_sub(dim) else { return 0.0 };
        let column = position % dim;
        let value = |at: usize| {
            let x = frozen.get(at).copied().unwrap_or_else(|| bins.decode(tokens[at]));
            action.unnormalize(column, f64::from(x))
        };
        (value(position) - value(before)).abs() - limits[column]
    }
}

impl Policy for MaskedPolicy {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.run = None;
        let start = Instant::now();
        let rounds = steps(request, &self.spec, STEP_LIMIT)?;
        let (decoder, frozen) = self.decoder(request, rounds)?;
        let inputs = self.preparer.prepare(observation)?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            images: Vec::new(),
            prefix: None,
            decoder,
            anchored: Anchored::default(),
            done: false,
            frozen,
            planned: request.prefix.clone(),
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOT_BEGUN)?;
        if run.done {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = if let Some(pixels) = run.inputs.pixels.get(run.images.len()) {
            let tokens = self.model.encode_image(pixels).map_err(compute)?.tokens;
            run.images.push(Arc::new(tokens));
            VISION
        } else if let Some(prefix) = &run.prefix {
            let tokens = run.decoder.tokens(self.model.mask());
            let logits = self.model.logits(prefix, &tokens).map_err(compute)?;
            run.decoder.step(logits.values()).map_err(compute)?;
            DENOISE
        } else {
            let Inputs { dummies, tokens, state, .. } = &run.inputs;
            let prefix = self.model.prefill(&run.images, *dummies, tokens, state);
            run.prefix = Some(prefix.map_err(compute)?);
            PREFIX
        };
        if run.decoder.is_done() {
            run.done = true;
            if let Some(limits) = &self.step_limits {
                let (_, action) = self.preparer.boundary().normalizers();
                let excess = too_fast(action, self.model.bins(), &run.frozen, limits);
                let (dim, anchored) = (limits.len(), &mut run.anchored);
                run.done = !self.anchors.repair(&mut run.decoder, dim, anchored, excess);
            }
        }
        run.ticket.add(stage, start);
        if run.done {
            return Ok(Progress::Done);
        }
        let ready = usize::from(run.prefix.is_some());
        Ok(Progress::Step {
            stage: STAGES[stage],
            done: run.images.len() + ready + run.decoder.done(),
            total: run.inputs.pixels.len() + 1 + run.decoder.rounds(),
            denoised: stage == DENOISE,
            next_denoises: run.prefix.is_some(),
        })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.done).ok_or(NOT_DONE)?;
        let bins = self.model.bins();
        let tokens = run.decoder.tokens(self.model.mask());
        let mut values: Vec<f32> = tokens.into_iter().map(|bin| bins.decode(bin)).collect();
        // What is being executed is known better than to a bin.
        values[..run.frozen.len()].copy_from_slice(&run.frozen);
        let dim = self.spec.action_dim;
        for (column, passes) in self.smoothing.iter().enumerate() {
            smooth(&mut values, dim, column, run.frozen.len() / dim, *passes);
        }
        let actions = self.preparer.boundary().actions(values.chunks_exact(dim))?;
        let mut chunk = run.ticket.chunk(&self.spec, actions, run.decoder.done())?;
        if self.step_limits.is_some() {
            let Anchored { passes, moved, excess } = run.anchored;
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let used = CacheUse {
                lookups: count(passes),
                hits: count(moved),
                error: Some(excess),
                ..CacheUse::default()
            };
            chunk.report.caches.push(("anchors", used));
        }
        chunk.report.caches.extend(run.planned.as_ref().map(|prefix| reuse(prefix, &chunk)));
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        Ok(run.decoder.set_rounds(steps.min(STEP_LIMIT)))
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if !run.decoder.finish() {
            return Ok(false);
        }
        if let Some(limits) = self.step_limits.as_ref().filter(|_| !run.done) {
            let (_, action) = self.preparer.boundary().normalizers();
            let excess = too_fast(action, self.model.bins(), &run.frozen, limits);
            self.anchors.settle(&mut run.decoder, &mut run.anchored, excess);
        }
        run.done = true;
        Ok(true)
    }
}
