//! ACT as an anytime task.

use std::time::Instant;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Image, Observation, Policy, PolicyError, PolicySpec, Progress,
};

use super::{Act, ActConfig, Encoded};
use crate::anytime::{NOT_BEGUN, NOT_DONE, Ticket, compute};
use crate::checkpoint::Checkpoint;
use crate::kernels::{Map, Matrix, Planes};
use crate::processors::Boundary;
use crate::{LoadOptions, ModelError};

/// Key of the environment's state, which the network knows and robots do not give.
const ENVIRONMENT: &str = "observation.environment_state";

const STAGES: [&str; 4] = ["preprocess", "vision", "encode", "decode"];
const VISION: usize = 1;
const ENCODE: usize = 2;
const DECODE: usize = 3;

struct Run {
    ticket: Ticket<4>,
    state: Vec<f32>,
    /// Images not yet encoded, the last first.
    images: Vec<Planes>,
    /// Feature maps of the images encoded so far.
    maps: Vec<Map>,
    encoded: Option<Encoded>,
    chunk: Option<Matrix>,
}

impl Run {
    fn progress(&self, stage: usize) -> Progress {
        if self.chunk.is_some() {
            return Progress::Done;
        }
        let done = self.maps.len() + usize::from(self.encoded.is_some());
        Progress::Step {
            stage: STAGES[stage],
            done,
            total: self.images.len() + self.maps.len() + 2,
            denoised: false,
            next_denoises: self.encoded.is_some(),
        }
    }
}

/// An ACT policy: one step per camera, one for the encoder, one for the decoder (its only "denoise step").
///
/// It knows nothing of planned actions: a chunk depends on the observation alone.
pub struct ActPolicy {
    model: Act,
    boundary: Boundary,
    spec: PolicySpec,
    run: Option<Run>,
}

impl ActPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let path = checkpoint.config_path();
        let config = ActConfig::of(checkpoint)?;
        if checkpoint.features.input_dim(&path, ENVIRONMENT)?.is_some() {
            let reason = "is an input, which no robot gives; train the policy without it";
            return Err(ModelError::config(&path, ENVIRONMENT, reason));
        }
        let boundary = Boundary::new(checkpoint, 0)?;
        let spec = boundary.spec(checkpoint, options, config.chunk_size, 1)?;
        Ok(Self { model: Act::load(checkpoint)?, boundary, spec, run: None })
    }

    /// Does one bounded step of `run`; the stage it belonged to.
    fn step(&self, run: &mut Run) -> candle_core::Result<usize> {
        if let Some(pixels) = run.images.pop() {
            run.maps.push(self.model.encode_image(&pixels)?);
            return Ok(VISION);
        }
        if let Some(encoded) = &run.encoded {
            run.chunk = Some(self.model.actions(&self.model.decode(encoded)?)?);
            return Ok(DECODE);
        }
        run.encoded = Some(self.model.encode(Some(&run.state), None, &run.maps)?);
        Ok(ENCODE)
    }
}

impl Policy for ActPolicy {
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
        if request.prefix.as_ref().is_some_and(|prefix| prefix.rows() > 0) {
            return Err(PolicyError::Unsupported("planned actions"));
        }
        let state = self.boundary.state(observation)?;
        let seen = self.boundary.images(observation)?;
        let image = |(index, image): (usize, &Option<&Image>)| {
            // No camera may be missing, so every input has its image.
            let image = image.ok_or(PolicyError::OutOfTurn("a camera is missing"))?;
            self.boundary.planes(index, image)
        };
        let images = seen.iter().enumerate().rev().map(image).collect::<Result<_, _>>()?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            state,
            images,
            maps: Vec::new(),
            encoded: None,
            chunk: None,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let mut run = self.run.take().ok_or(NOT_BEGUN)?;
        if run.chunk.is_none() {
            let start = Instant::now();
            let stage = self.step(&mut run).map_err(compute)?;
            run.ticket.add(stage, start);
            let progress = run.progress(stage);
            self.run = Some(run);
            return Ok(progress);
        }
        self.run = Some(run);
        Ok(Progress::Done)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.chunk.is_some()).ok_or(NOT_DONE)?;
        // `take_if` let only a finished run through.
        let sample = run.chunk.as_ref().ok_or(NOT_DONE)?;
        let actions = self.boundary.actions(sample.iter())?;
        run.ticket.chunk(&self.spec, actions, 1)
    }
}
