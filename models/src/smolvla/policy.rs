//! SmolVLA as an anytime task.

use candle_core::{Result, Tensor};
use sinew_runtime::{Observation, PolicyError};

use super::{ExpertCache, Inputs, Preparer, SmolVla, SmolVlaConfig};
use crate::caches::{Branches, KeptPrefix, KeptTower};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{FlowModel, FlowPolicy, FlowTime, NoiseAtOne, Sampling};
use crate::{LoadOptions, ModelError};

/// A SmolVLA policy: one step per camera, one for the prefix, one per denoise step.
pub type SmolVlaPolicy = FlowPolicy<Prepared>;

/// The network with its processors.
pub struct Prepared {
    model: SmolVla,
    preparer: Preparer,
}

impl SmolVlaPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
    ) -> std::result::Result<Self, ModelError> {
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let model = SmolVla::load(checkpoint)?;
        let config = SmolVlaConfig::of(checkpoint)?;
        let boundary = preparer.boundary();
        let spec = boundary.spec(
            checkpoint,
            options,
            config.chunk_size,
            options.denoise_steps.unwrap_or(config.num_steps),
        )?;
        let sampling = Sampling {
            noise_scale: checkpoint.actions.noise_scale.unwrap_or(1.0) as f32,
            solver: options.solver.unwrap_or_default(),
        };
        let branches = options.caches.branches(checkpoint, model.blocks())?;
        Ok(Self::new(Prepared { model, preparer }, spec, sampling)
            .with_branches(branches)
            .with_vision(options.caches.vision))
    }
}

impl FlowModel for Prepared {
    type Time = NoiseAtOne;
    type Inputs = Inputs;
    type Cache = ExpertCache;

    fn sample_shape(&self) -> (usize, usize) {
        self.model.sample_shape()
    }

    fn prepare(&mut self, observation: &Observation) -> std::result::Result<Inputs, PolicyError> {
        self.preparer.prepare(observation)
    }

    fn images(inputs: &Inputs) -> &[Tensor] {
        &inputs.pixels
    }

    fn encode_image(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.model.encode_image(pixels)?.tokens)
    }

    fn encode_image_kept(&self, pixels: &Tensor, kept: &mut KeptTower) -> Result<Tensor> {
        Ok(self.model.encode_image_kept(pixels, kept)?.tokens)
    }

    fn encode_prefix_kept(
        &self,
        inputs: &Inputs,
        images: &[Tensor],
        kept: &mut KeptPrefix,
    ) -> Result<ExpertCache> {
        let Inputs { dummies, tokens, state, .. } = inputs;
        let embeddings = self.model.embed_prefix(images, *dummies, tokens, state)?;
        self.model.prepare(&self.model.prefill_kept(&embeddings, kept)?)
    }

    fn same_prefix(a: &Inputs, b: &Inputs) -> bool {
        let words = (a.dummies, &a.tokens) == (b.dummies, &b.tokens);
        words && a.state.iter().map(|v| v.to_bits()).eq(b.state.iter().map(|v| v.to_bits()))
    }

    fn encode_prefix(&self, inputs: &Inputs, images: &[Tensor]) -> Result<ExpertCache> {
        let Inputs { dummies, tokens, state, .. } = inputs;
        let embeddings = self.model.embed_prefix(images, *dummies, tokens, state)?;
        self.model.prepare(&self.model.prefill(&embeddings)?)
    }

    fn velocity(
        &self,
        cache: &ExpertCache,
        x: &Tensor,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Tensor> {
        let times: Vec<f64> = times.iter().map(|t| t.value()).collect();
        self.model.velocity_with(cache, x, &times, branches)
    }

    fn model_actions(
        &self,
        _: &Inputs,
        actions: &[f64],
        width: usize,
    ) -> std::result::Result<Vec<f32>, PolicyError> {
        self.preparer.boundary().model_actions(actions, width)
    }

    fn actions(&self, _: &Inputs, sample: &Tensor) -> std::result::Result<Vec<f64>, PolicyError> {
        self.preparer.actions(sample)
    }
}
