//! π0 and π0.5: an action expert that denoises a chunk while it attends to PaliGemma's keys and values.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/pi0/modeling_pi0.py` and `pi05/modeling_pi05.py`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};

use super::{ImageFeatures, PaliGemma, PiConfig, PiSizes};
use crate::ModelError;
use crate::backbones::gemma::{Gemma, KvCache, Modulations, Use};
use crate::caches::{Block, Branches};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{FlowTime, NoiseAtOne, time_embedding};
use crate::kernels::{Linear, Visible, silu};

/// Flow times whose modulations are kept: the steps of a few step counts.
const KEPT_TIMES: usize = 32;

/// How state and flow time enter the expert.
enum Entry {
    /// π0: a state token before the actions, the time mixed into each action.
    Mixed { state: Linear },
    /// π0.5: the time steers every norm; the state is in the prompt. The last modulations, by time.
    Conditioned { kept: Mutex<Vec<(f64, Arc<Modulations>)>> },
}

/// A π0 or π0.5 network.
pub struct Pi {
    vlm: PaliGemma,
    expert: Gemma,
    entry: Entry,
    action_in: Linear,
    time_in: Linear,
    time_out: Linear,
    action_out: Linear,
    periods: (f64, f64),
    state_width: usize,
    sample_shape: (usize, usize),
}

impl Pi {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, store) = (PiConfig::of(checkpoint)?, &checkpoint.store);
        let sizes = PiSizes::of(checkpoint, true)?;
        let Some(expert) = sizes.expert else {
            return Err(ModelError::config(&checkpoint.config_path(), "expert", "has no sizes"));
        };
        let conditioned = checkpoint.family.name == super::PI05.name;
        let (width, used) = match conditioned {
            true => (expert.width, Use::Conditioned),
            false => (2 * expert.width, Use::Hidden),
        };
        let linear = |name: &str, inputs, outputs| Linear::load(store, name, inputs, outputs, true);
        let (entry, mlp) = if conditioned {
            (Entry::Conditioned { kept: Mutex::default() }, "time_mlp")
        } else {
            let state = linear("state_proj", config.max_state_dim, expert.width)?;
            (Entry::Mixed { state }, "action_time_mlp")
        };
        Ok(Self {
            vlm: PaliGemma::load(store, &config, &sizes, Use::KeysAndValues)?,
            expert: Gemma::load(store, "expert", expert, used)?,
            entry,
            action_in: linear("action_in_proj", config.max_action_dim, expert.width)?,
            time_in: linear(&format!("{mlp}_in"), width, expert.width)?,
            time_out: linear(&format!("{mlp}_out"), expert.width, expert.width)?,
            action_out: linear("action_out_proj", expert.width, config.max_action_dim)?,
            periods: (config.min_period, config.max_period),
            state_width: config.max_state_dim,
            sample_shape: (config.chunk_size, config.max_action_dim),
        })
    }

    /// Shape of the sample that is denoised, `(H, M)`.
    pub fn sample_shape(&self) -> (usize, usize) {
        self.sample_shape
    }

    /// One image (`[3, height, width]`, in [−1, 1]) through vision tower and projector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Tensor) -> Result<ImageFeatures> {
        self.vlm.encode_image(pixels)
    }

    /// The prefix as it enters the first text layer, `[P, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(&self, images: &[Tensor], tokens: &[u32]) -> Result<Tensor> {
        self.vlm.embed_prefix(images, tokens)
    }

    /// Keys and values of the prefix in every text layer.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: &Tensor) -> Result<KvCache> {
        Ok(self.vlm.forward(embeddings, None, Visible::All)?.0)
    }

    /// The state token as it enters the expert, `[1, w]`; none in π0.5.
    ///
    /// # Errors
    /// When `state` is wider than the network takes.
    pub fn embed_state(&self, state: &[f32]) -> Result<Option<Tensor>> {
        let Entry::Mixed { state: projection } = &self.entry else { return Ok(None) };
        let mut padded = state.to_vec();
        padded.resize(self.state_width, 0.0);
        let padded = Tensor::from_vec(padded, (1, self.state_width), &Device::Cpu)?;
        projection.forward(&padded).map(Some)
    }

    /// What the actions attend to, computed once for all denoise steps: the prefix, and the state token,
    /// which sees the prefix and itself only.
    ///
    /// # Errors
    /// When `state` is wider than the network takes.
    pub fn prepare(&self, prefix: &KvCache, state: &[f32]) -> Result<KvCache> {
        match self.embed_state(state)? {
            Some(token) => Ok(self.expert.forward(&token, Some(prefix), Visible::All, None)?.0),
            None => Ok(prefix.clone()),
        }
    }

    /// One row for each of `times`, `[times, w]`.
    fn embed_times(&self, times: &[FlowTime<NoiseAtOne>]) -> Result<Tensor> {
        let (width, (min, max)) = (self.expert.width(), self.periods);
        let rows = times.iter().flat_map(|t| time_embedding(t.value(), width, min, max));
        Tensor::from_vec(rows.collect(), (times.len(), width), &Device::Cpu)
    }

    /// The actions as they enter the expert, `[H, w]`.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`, or `times` has neither one value nor `H`.
    pub fn embed_actions(&self, x: &Tensor, times: &[FlowTime<NoiseAtOne>]) -> Result<Tensor> {
        let actions = self.action_in.forward(x)?;
        if matches!(self.entry, Entry::Conditioned { .. }) {
            return Ok(actions);
        }
        let times = self.embed_times(times)?.broadcast_as(actions.shape())?.contiguous()?;
        let both = Tensor::cat(&[&actions, &times], 1)?;
        self.time_out.forward(&silu(self.time_in.forward(&both)?)?)
    }

    /// What `times` do to the norms: the conditioning vector of each, `[times, w]` (π0.5).
    ///
    /// # Errors
    /// When memory runs out.
    pub fn condition(&self, times: &[FlowTime<NoiseAtOne>]) -> Result<Tensor> {
        let hidden = silu(self.time_in.forward(&self.embed_times(times)?)?)?;
        silu(self.time_out.forward(&hidden)?)
    }

    fn modulations(&self, times: &[FlowTime<NoiseAtOne>]) -> Result<Option<Arc<Modulations>>> {
        let Entry::Conditioned { kept } = &self.entry else { return Ok(None) };
        let make = || self.expert.modulate(&self.condition(times)?).map(Arc::new);
        let [time] = times else { return make().map(Some) };
        // A list of finished values: whoever panicked while holding it left it whole.
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = kept.iter().find(|(t, _)| *t == time.value()) {
            return Ok(Some(known.clone()));
        }
        let new = make()?;
        if kept.len() == KEPT_TIMES {
            kept.remove(0);
        }
        kept.push((time.value(), new.clone()));
        Ok(Some(new))
    }

    /// Velocity of the sample `x` (`[H, M]`) at `times`: one for all actions, or one for each.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`, or `times` has neither one value nor `H`.
    pub fn velocity(
        &self,
        cache: &KvCache,
        x: &Tensor,
        times: &[FlowTime<NoiseAtOne>],
    ) -> Result<Tensor> {
        self.velocity_with(cache, x, times, &mut Branches::off())
    }

    /// As [`Self::velocity`], with what `branches` computes of the expert's.
    ///
    /// # Errors
    /// As there.
    pub fn velocity_with(
        &self,
        cache: &KvCache,
        x: &Tensor,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Tensor> {
        let suffix = self.embed_actions(x, times)?;
        let modulations = self.modulations(times)?;
        let hidden = self.expert.denoise(&suffix, cache, modulations.as_deref(), branches)?;
        self.action_out.forward(&hidden)
    }

    /// The expert's residual branches.
    pub fn blocks(&self) -> Vec<Block> {
        self.expert.blocks()
    }
}
