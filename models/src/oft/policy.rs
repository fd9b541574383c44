//! Parallel decoding as an anytime task.

use std::sync::Arc;
use std::time::Instant;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Progress,
};

use super::OftVla;
use crate::anytime::{NOT_BEGUN, NOT_DONE, Ticket, compute};
use crate::checkpoint::Checkpoint;
use crate::kernels::Matrix;
use crate::smolvla::{Inputs, Preparer, SmolVlaConfig};
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 3] = ["preprocess", "vision", "decode"];
const VISION: usize = 1;
const DECODE: usize = 2;

struct Run {
    ticket: Ticket<3>,
    inputs: Inputs,
    /// The instruction for the vision layers.
    words: Option<Matrix>,
    /// Tokens of the images encoded so far.
    images: Vec<Arc<Matrix>>,
    /// Normalised actions, `[H, D]`.
    actions: Option<Matrix>,
}

/// A policy that decodes in parallel: one step per camera, one for the whole chunk.
pub struct OftPolicy {
    model: OftVla,
    preparer: Preparer,
    spec: PolicySpec,
    run: Option<Run>,
}

impl OftPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint nor
    /// `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let model = OftVla::load(checkpoint)?;
        let boundary = preparer.boundary();
        let spec =
            boundary.spec(checkpoint, options, SmolVlaConfig::of(checkpoint)?.chunk_size, 1)?;
        Ok(Self { model, preparer, spec, run: None })
    }
}

impl Policy for OftPolicy {
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
        if request.prefix.as_ref().is_some_and(|p| p.rows() > 0) {
            return Err(PolicyError::Unsupported("planned prefixes"));
        }
        let inputs = self.preparer.prepare(observation)?;
        let words = self.model.words(&inputs.tokens).map_err(compute)?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            words,
            images: Vec::new(),
            actions: None,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOT_BEGUN)?;
        if run.actions.is_some() {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = if let Some(pixels) = run.inputs.pixels.get(run.images.len()) {
            let features = self.model.encode_image(pixels, run.words.as_ref()).map_err(compute)?;
            run.images.push(Arc::new(features.tokens));
            VISION
        } else {
            let Inputs { dummies, tokens, state, .. } = &run.inputs;
            let actions = self
                .model
                .embed_prefix(&run.images, *dummies, tokens, state)
                .and_then(|prefix| self.model.decode(&prefix))
                .and_then(|states| self.model.actions(states))
                .map_err(compute)?;
            run.actions = Some(actions);
            DECODE
        };
        run.ticket.add(stage, start);
        if run.actions.is_some() {
            return Ok(Progress::Done);
        }
        let (done, cameras) = (run.images.len(), run.inputs.pixels.len());
        Ok(Progress::Step {
            stage: STAGES[stage],
            done,
            total: cameras + 1,
            denoised: false,
            next_denoises: done == cameras,
        })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.actions.is_some()).ok_or(NOT_DONE)?;
        let actions = self.preparer.actions(run.actions.as_ref().ok_or(NOT_DONE)?)?;
        run.ticket.chunk(&self.spec, actions, 1)
    }
}
