//! SmolVLA as an anytime task.

use std::sync::Arc;

use candle_core::Result;
use sinew_runtime::{Observation, PolicyError};

use super::{Inputs, Preparer, SmolVla, SmolVlaConfig, Stack};
use crate::caches::{Branches, KeptPrefix, KeptTower};
use crate::checkpoint::Checkpoint;
use crate::exits::Exits;
use crate::heads::flow::{FlowModel, FlowPolicy, FlowTime, NoiseAtOne, Sampling};
use crate::kernels::{Matrix, Planes};
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
        let steps = options.denoise_steps.unwrap_or(config.num_steps);
        let spec = boundary.spec(checkpoint, options, config.chunk_size, steps)?;
        let (trained, sizes) = (config.early_exit_layers.as_deref(), (model.depth(), steps));
        let exits = Exits::of(&options.caches.early_exit, checkpoint, trained, sizes)?;
        let sampling = Sampling {
            noise_scale: checkpoint.actions.noise_scale.unwrap_or(1.0) as f32,
            solver: options.solver.unwrap_or_default(),
        };
        let branches = options.caches.branches(checkpoint, model.blocks())?;
        Ok(Self::new(Prepared { model, preparer }, spec, sampling)
            .with_branches(branches)
            .with_exits(exits)
            .with_vision(options.caches.vision))
    }
}

impl Prepared {
    /// The prefix of `inputs` with the `images`' tokens, as it enters the first layer.
    fn embed(&self, inputs: &Inputs, images: &[Arc<Matrix>]) -> Result<Matrix> {
        let Inputs { dummies, tokens, state, .. } = inputs;
        self.model.embed_prefix(images, *dummies, tokens, state)
    }
}

impl FlowModel for Prepared {
    type Time = NoiseAtOne;
    type Inputs = Inputs;
    type Cache = Stack;

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

    fn encode_image_kept(&self, pixels: &Planes, kept: &mut KeptTower) -> Result<Matrix> {
        Ok(self.model.encode_image_kept(pixels, kept)?.tokens)
    }

    fn encode_prefix_kept(
        &self,
        inputs: &Inputs,
        images: &[Arc<Matrix>],
        kept: &mut KeptPrefix,
    ) -> Result<Stack> {
        let prefix = self.model.prefill_kept(self.embed(inputs, images)?, kept)?;
        Ok(Stack::whole(self.model.prepare(&prefix)?))
    }

    fn depth(&self) -> usize {
        self.model.depth()
    }

    fn encode_prefix_to(
        &self,
        inputs: &Inputs,
        images: &[Arc<Matrix>],
        stack: Option<Stack>,
        depth: usize,
    ) -> Result<Stack> {
        let mut stack = match stack {
            Some(stack) => stack,
            None => self.model.stack(self.embed(inputs, images)?),
        };
        self.model.truncate(&mut stack, depth)?;
        Ok(stack)
    }

    fn same_prefix(a: &Inputs, b: &Inputs) -> bool {
        let words = (a.dummies, &a.tokens) == (b.dummies, &b.tokens);
        words && a.state.iter().map(|v| v.to_bits()).eq(b.state.iter().map(|v| v.to_bits()))
    }

    fn encode_prefix(&self, inputs: &Inputs, images: &[Arc<Matrix>]) -> Result<Stack> {
        let prefix = self.model.prefill(self.embed(inputs, images)?)?;
        Ok(Stack::whole(self.model.prepare(&prefix)?))
    }

    fn velocity(
        &self,
        stack: &Stack,
        x: &Matrix,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Matrix> {
        self.model.velocity_with(&stack.cache, x, times, branches)
    }

    fn model_actions(
        &self,
        _: &Inputs,
        actions: &[f64],
        width: usize,
    ) -> std::result::Result<Vec<f32>, PolicyError> {
        self.preparer.boundary().model_actions(actions, width)
    }

    fn actions(&self, _: &Inputs, sample: &Matrix) -> std::result::Result<Vec<f64>, PolicyError> {
        self.preparer.actions(sample)
    }
}
