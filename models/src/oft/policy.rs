//! Parallel decoding as an anytime task.

use std::time::{Duration, Instant};

use candle_core::Tensor;
use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Progress, StageTime,
    Stamp,
};

use super::OftVla;
use crate::checkpoint::Checkpoint;
use crate::smolvla::{Inputs, Preparer, SmolVlaConfig};
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 3] = ["preprocess", "vision", "decode"];
const PREPROCESS: usize = 0;
const VISION: usize = 1;
const DECODE: usize = 2;

struct Run {
    request: u64,
    instant: Stamp,
    inputs: Inputs,
    /// The instruction for the vision layers.
    words: Option<Tensor>,
    /// Tokens of the images encoded so far.
    images: Vec<Tensor>,
    /// Normalised actions, `[H, D]`.
    actions: Option<Tensor>,
    times: [Duration; 3],
}

/// A policy that decodes in parallel: one step per camera, one for the whole chunk.
pub struct OftPolicy {
    model: OftVla,
    preparer: Preparer,
    spec: PolicySpec,
    dt: Duration,
    run: Option<Run>,
}

fn compute(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Compute(error.to_string())
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
        let dt = spec.dt();
        Ok(Self { model, preparer, spec, dt, run: None })
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
        let mut times = [Duration::ZERO; 3];
        times[PREPROCESS] = start.elapsed();
        self.run = Some(Run {
            request: request.id,
            instant: observation.instant,
            inputs,
            words,
            images: Vec::new(),
            actions: None,
            times,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run =
            self.run.as_mut().ok_or(PolicyError::OutOfTurn("advance was called before begin"))?;
        if run.actions.is_some() {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = if let Some(pixels) = run.inputs.pixels.get(run.images.len()) {
            let features = self.model.encode_image(pixels, run.words.as_ref()).map_err(compute)?;
            run.images.push(features.tokens);
            VISION
        } else {
            let Inputs { dummies, tokens, state, .. } = &run.inputs;
            let actions = self
                .model
                .embed_prefix(&run.images, *dummies, tokens, state)
                .and_then(|prefix| self.model.decode(&prefix))
                .and_then(|states| self.model.actions(&states))
                .map_err(compute)?;
            run.actions = Some(actions);
            DECODE
        };
        run.times[stage] += start.elapsed();
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
        let early = PolicyError::OutOfTurn("take_chunk was called before the chunk was done");
        let run = self.run.take_if(|run| run.actions.is_some()).ok_or(early.clone())?;
        let actions = self.preparer.actions(&run.actions.ok_or(early)?)?;
        let dim = self.spec.action_dim;
        let mut chunk =
            ActionChunk::new(run.request, run.instant, self.dt, dim, actions).map_err(compute)?;
        chunk.report.stages =
            STAGES.iter().zip(run.times).map(|(stage, time)| StageTime { stage, time }).collect();
        chunk.report.denoise_steps = 1;
        Ok(chunk)
    }
}
