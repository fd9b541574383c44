//! π0 and π0.5 as anytime tasks.

use std::sync::Arc;

use candle_core::Result;
use sinew_runtime::{Observation, PolicyError};

use super::{Inputs, Pi, PiConfig, Preparer};
use crate::backbones::gemma::KvCache;
use crate::caches::Branches;
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{FlowModel, FlowPolicy, FlowTime, NoiseAtOne, Sampling};
use crate::kernels::{Matrix, Planes};
use crate::{LoadOptions, ModelError};

/// A π0 or π0.5 policy: one step per camera, one for the prefix, one per denoise step.
pub type PiPolicy = FlowPolicy<Prepared>;

/// The network with its processors.
pub struct Prepared {
    model: Pi,
    preparer: Preparer,
}

impl PiPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
    ) -> std::result::Result<Self, ModelError> {
        let config = PiConfig::of(checkpoint)?;
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let model = Pi::load(checkpoint)?;
        let steps = options.denoise_steps.unwrap_or(config.num_inference_steps);
        let spec = preparer.boundary().spec(checkpoint, options, config.chunk_size, steps)?;
        let sampling = Sampling {
            noise_scale: checkpoint.actions.noise_scale.unwrap_or(1.0) as f32,
            solver: options.solver.unwrap_or_default(),
        };
        let branches = options.caches.branches(checkpoint, model.blocks())?;
        Ok(Self::new(Prepared { model, preparer }, spec, sampling).with_branches(branches))
    }
}

impl FlowModel for Prepared {
    type Time = NoiseAtOne;
    type Inputs = Inputs;
    type Cache = KvCache;

    fn sample_shape(&self) -> (usize, usize) {
        self.model.sample_shape()
    }

    fn prepare(&mut self, observation: &Observation) -> std::result::Result<Inputs, PolicyError> {
        self.preparer.prepare(observation)
    }

    fn images(inputs: &Inputs) -> &[Planes] {
        &inputs.pixels
    }

    fn encode_image(&self, pixels: &Planes) -> Result<Matrix> {
        Ok(self.model.encode_image(pixels)?.tokens)
    }

    fn same_prefix(a: &Inputs, b: &Inputs) -> bool {
        let state = a.state.iter().map(|v| v.to_bits()).eq(b.state.iter().map(|v| v.to_bits()));
        state && a.tokens == b.tokens
    }

    fn encode_prefix(&self, inputs: &Inputs, images: &[Arc<Matrix>]) -> Result<KvCache> {
        let embeddings = self.model.embed_prefix(images, &inputs.tokens)?;
        self.model.prepare(self.model.prefill(embeddings)?, &inputs.state)
    }

    fn velocity(
        &self,
        cache: &KvCache,
        x: &Matrix,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Matrix> {
        self.model.velocity_with(cache, x, times, branches)
    }

    fn model_actions(
        &self,
        inputs: &Inputs,
        actions: &[f64],
        width: usize,
    ) -> std::result::Result<Vec<f32>, PolicyError> {
        self.preparer.boundary().model_actions_from(&inputs.origin, actions, width)
    }

    fn actions(
        &self,
        inputs: &Inputs,
        sample: &Matrix,
    ) -> std::result::Result<Vec<f64>, PolicyError> {
        self.preparer.actions(sample, &inputs.origin)
    }
}
