//! π0 and π0.5: an action expert that denoises a chunk while it attends to PaliGemma's keys and values.
//!
//! Source: LeRobot 0.6.1 `src/lerobot/policies/pi0/modeling_pi0.py` and `pi05/modeling_pi05.py`.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

use super::{ImageFeatures, PaliGemma, PiConfig, PiSizes};
use crate::ModelError;
use crate::backbones::gemma::{Gemma, KvCache, Modulations, Use};
use crate::caches::{Block, Branches};
use crate::checkpoint::Checkpoint;
use crate::heads::flow::{FlowTime, NoiseAtOne, time_embedding};
use crate::kernels::{Activation, Linear, Matrix, Planes, Visible};

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

    /// One image (in [−1, 1]) through vision tower and projector.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes) -> Result<ImageFeatures> {
        self.vlm.encode_image(pixels)
    }

    /// The prefix as it enters the first text layer, `[P, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed_prefix(&self, images: &[Arc<Matrix>], tokens: &[u32]) -> Result<Matrix> {
        self.vlm.embed_prefix(images, tokens)
    }

    /// Keys and values of the prefix in every text layer.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn prefill(&self, embeddings: Matrix) -> Result<KvCache> {
        Ok(self.vlm.forward(embeddings, None, Visible::All)?.0)
    }

    /// The state token as it enters the expert, `[1, w]`; none in π0.5.
    ///
    /// # Errors
    /// When `state` is wider than the network takes.
    pub fn embed_state(&self, state: &[f32]) -> Result<Option<Matrix>> {
        let Entry::Mixed { state: projection } = &self.entry else { return Ok(None) };
        let mut padded = Matrix::zeros(1, self.state_width);
        let Some(values) = padded.values_mut().get_mut(..state.len()) else {
            let (found, most) = (state.len(), self.state_width);
            candle_core::bail!("the state has {found} values, the network takes {most}");
        };
        values.copy_from_slice(state);
        projection.forward(&padded).map(Some)
    }

    /// What the actions attend to, computed once for all denoise steps: the prefix, and the state token,
    /// which sees the prefix and itself only.
    ///
    /// # Errors
    /// When `state` is wider than the network takes.
    pub fn prepare(&self, prefix: KvCache, state: &[f32]) -> Result<KvCache> {
        match self.embed_state(state)? {
            Some(token) => Ok(self.expert.forward(token, Some(&prefix), Visible::All, None)?.0),
            None => Ok(prefix),
        }
    }

    /// One row for each of `times`, `[times, w]`.
    fn embed_times(&self, times: &[FlowTime<NoiseAtOne>]) -> Matrix {
        let width = self.expert.width();
        let mut rows = Matrix::unwritten(times.len(), width);
        for (row, time) in rows.values_mut().chunks_exact_mut(width).zip(times) {
            time_embedding(time.value(), self.periods, row);
        }
        rows
    }

    /// The actions as they enter the expert, `[H, w]`.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`, or `times` has neither one value nor `H`.
    pub fn embed_actions(&self, x: &Matrix, times: &[FlowTime<NoiseAtOne>]) -> Result<Matrix> {
        let actions = self.action_in.forward(x)?;
        if matches!(self.entry, Entry::Conditioned { .. }) {
            return Ok(actions);
        }
        let both = Matrix::beside(&[&actions, &self.embed_times(times)])?;
        self.time_out.forward(&self.time_in.forward_with(&both, Activation::Silu)?)
    }

    /// What `times` do to the norms: the conditioning vector of each, `[times, w]` (π0.5).
    ///
    /// # Errors
    /// When memory runs out.
    pub fn condition(&self, times: &[FlowTime<NoiseAtOne>]) -> Result<Matrix> {
        let hidden = self.time_in.forward_with(&self.embed_times(times), Activation::Silu)?;
        self.time_out.forward_with(&hidden, Activation::Silu)
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
        cache: &KvCache,
        x: &Matrix,
        times: &[FlowTime<NoiseAtOne>],
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let suffix = self.embed_actions(x, times)?;
        let modulations = self.modulations(times)?;
        let hidden = self.expert.denoise(suffix, cache, modulations.as_deref(), branches)?;
        self.action_out.forward(&hidden)
    }

    /// The expert's residual branches.
    pub fn blocks(&self) -> Vec<Block> {
        self.expert.blocks()
    }
}
