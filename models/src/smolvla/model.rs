//! The network, stage by stage.

use std::sync::Arc;

use candle_core::Result;

use super::expert::Expert;
use super::observer::{Observer, Parts};
use super::text::Growing;
use super::{ExpertCache, Prefix, SmolVlaConfig, VisionFeatures, VlmConfig};
use crate::ModelError;
use crate::caches::{Block, Branches, KeptPrefix, KeptTower};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{FlowTime, NoiseAtOne, time_embedding};
use crate::kernels::{Activation, Linear, Matrix, Planes};

/// A prefix that has come through some of the layers, and what the expert's layers beside them read of it.
pub struct Stack {
    /// None: there is no more to compute.
    growing: Option<Growing>,
    /// For velocities of the network truncated to the depth that was asked for last.
    pub cache: ExpertCache,
}

impl Stack {
    /// Of the whole network.
    pub fn whole(cache: ExpertCache) -> Self {
        Self { growing: None, cache }
    }
}

/// A SmolVLA network.
pub struct SmolVla {
    observer: Observer,
    expert: Expert,
    state_proj: Linear,
    action_in: Linear,
    time_in: Linear,
    time_out: Linear,
    action_out: Linear,
    periods: (f64, f64),
    state_width: usize,
    sample_shape: (usize, usize),
}

impl SmolVla {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, vlm) = (&SmolVlaConfig::of(checkpoint)?, &VlmConfig::of(checkpoint)?);
        let store = &checkpoint.store;
        let path = checkpoint.config_path();
        let observer = Observer::load(checkpoint, config, vlm, Parts::default())?;
        let expert = Expert::load(store, config, vlm, observer.depth(), &path)?;
        let (width, depth) = (expert.width(), observer.width());
        let linear = |name: &str, inputs, outputs| Linear::load(store, name, inputs, outputs, true);
        Ok(Self {
            state_proj: linear("state_proj", config.max_state_dim, depth)?,
            action_in: linear("action_in_proj", config.max_action_dim, width)?,
            time_in: linear("action_time_mlp_in", 2 * width, width)?,
            time_out: linear("action_time_mlp_out", width, width)?,
            action_out: linear("action_out_proj", width, config.max_action_dim)?,
            periods: (config.min_period, config.max_period),
            state_width: config.max_state_dim,
            sample_shape: (config.chunk_size, config.max_action_dim),
            observer,
            expert,
        })
    }

    /// Shape of the sample that is denoised, `(H, M)`.
    pub fn sample_shape(&self) -> (usize, usize) {
        self.sample_shape
    }

    /// One image (in [−1, 1]) through vision tower and connector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes) -> Result<VisionFeatures> {
        self.observer.encode_image(pixels, None)
    }

    /// As [`Self::encode_image`], with what `kept` says computed of the tower.
    ///
    /// # Errors
    /// As there.
    pub fn encode_image_kept(
        &self,
        pixels: &Planes,
        kept: &mut KeptTower,
    ) -> Result<VisionFeatures> {
        self.observer.encode_image_kept(pixels, kept)
    }

    /// As [`Self::prefill`], with the tokens that `kept` knows already left as they were.
    ///
    /// # Errors
    /// As there.
    pub fn prefill_kept(&self, embeddings: Matrix, kept: &mut KeptPrefix) -> Result<Prefix> {
        self.observer.prefill_kept(embeddings, kept)
    }

    /// `state` padded to the width that the network takes.
    pub fn pad_state(&self, state: &[f32]) -> Vec<f32> {
        let mut padded = state.to_vec();
        padded.resize(self.state_width, 0.0);
        padded
    }

    /// The prefix as it enters the first text layer, `[P, D]`: images, `dummies` masked cameras,
    /// instruction, state. A masked camera leaves only its special tokens behind.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(
        &self,
        images: &[Arc<Matrix>],
        dummies: usize,
        tokens: &[u32],
        state: &[f32],
    ) -> Result<Matrix> {
        let state = self.state_proj.forward(&Matrix::of_row(&self.pad_state(state)))?;
        self.observer.embed(images, dummies, tokens, &state)
    }

    /// Keys and values of the prefix in every text layer.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: Matrix) -> Result<Prefix> {
        self.observer.prefill(embeddings)
    }

    /// What the expert reads of the prefix, computed once for all denoise steps.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prepare(&self, prefix: &Prefix) -> Result<ExpertCache> {
        self.expert.prepare(prefix)
    }

    /// Text layers.
    pub fn depth(&self) -> usize {
        self.observer.depth()
    }

    /// The prefix `embeddings` before the first layer.
    pub fn stack(&self, embeddings: Matrix) -> Stack {
        let growing = self.observer.start(embeddings);
        let cache = self.expert.start(growing.prefix.length);
        Stack { growing: Some(growing), cache }
    }

    /// The network as if it had `depth` text layers, and those of the expert that read them: what a velocity needs of the
    /// prefix, of which only what `stack` lacks is computed.
    ///
    /// # Errors
    /// For a stack that was made [whole](Stack::whole), which cannot be truncated.
    pub fn truncate(&self, stack: &mut Stack, depth: usize) -> Result<()> {
        let Some(growing) = &mut stack.growing else {
            candle_core::bail!("a whole prefix cannot be truncated");
        };
        self.observer.grow(growing, depth)?;
        self.expert.grow(&mut stack.cache, &growing.prefix, depth)
    }

    /// The suffix as it enters the expert, `[H, w]`.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`, or `times` has neither one value nor `H`.
    pub fn embed_suffix(&self, x: &Matrix, times: &[FlowTime<NoiseAtOne>]) -> Result<Matrix> {
        let (width, (min, max)) = (self.expert.width(), self.periods);
        let mut table = Matrix::unwritten(times.len(), width);
        for (row, time) in table.values_mut().chunks_exact_mut(width).zip(times) {
            time_embedding(time.value(), (min, max), row);
        }
        let both = Matrix::beside(&[&self.action_in.forward(x)?, &table])?;
        self.time_out.forward(&self.time_in.forward_with(&both, Activation::Silu)?)
    }

    /// Velocity of the sample `x` (`[H, M]`) at `times`: one for all actions, or one for each.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`, or `times` has neither one value nor `H`.
    pub fn velocity(
        &self,
        cache: &ExpertCache,
        x: &Matrix,
        times: &[FlowTime<NoiseAtOne>],
    ) -> Result<Matrix> {
        self.velocity_with(cache, x, times, &mut Branches::off())
    }

    /// As [`Self::velocity`], with what `branches` computes of the expert's.
    ///
    /// # Errors
    /// As there.
    pub fn velocity_with(
        &self,
        cache: &ExpertCache,
        x: &Matrix,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let out = self.expert.forward(self.embed_suffix(x, times)?, cache, branches)?;
        self.action_out.forward(&out)
    }

    /// The expert's residual branches.
    pub fn blocks(&self) -> Vec<Block> {
        self.expert.blocks()
    }
}
