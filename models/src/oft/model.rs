//! The network: SmolVLA's observer seeing empty action tokens, and the regression head.

use std::sync::Arc;

use candle_core::Result;
use serde::Deserialize;

use crate::ModelError;
use crate::checkpoint::{Checkpoint, TensorStore, check_size};
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Planes, add};
use crate::smolvla::{Observer, Parts, Prefix, SmolVlaConfig, VisionFeatures, VlmConfig};

/// The most action tokens of a chunk.
const LENGTH_LIMIT: usize = 1 << 14;
/// PyTorch's default.
const NORM_EPS: f64 = 1e-5;

/// The head's keys in `config.json`; those of the observation are SmolVLA's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct OftConfig {
    /// The instruction scales and shifts the vision layers.
    pub use_film: bool,
    /// Width of the head's hidden layers.
    pub head_width: usize,
    /// Its residual blocks.
    pub head_blocks: usize,
}

impl Default for OftConfig {
    fn default() -> Self {
        Self { use_film: false, head_width: 4096, head_blocks: 2 }
    }
}

impl OftConfig {
    /// The configuration of `checkpoint`, checked.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let path = checkpoint.config_path();
        let config: Self = serde_json::from_str(&checkpoint.config_text)
            .map_err(|e| ModelError::config(&path, "the file", format!("cannot be read: {e}")))?;
        check_size(&path, "head_width", config.head_width)?;
        check_size(&path, "head_blocks", config.head_blocks)?;
        Ok(config)
    }
}

/// States of action tokens to actions: `relu(fc(norm(z)))`, residual blocks `u + relu(fc(norm(u)))`,
/// `fc(norm(u))`.
struct Head {
    norm_in: LayerNorm,
    fc_in: Linear,
    blocks: Vec<(LayerNorm, Linear)>,
    norm_out: LayerNorm,
    fc_out: Linear,
}

impl Head {
    fn load(
        store: &TensorStore,
        config: &OftConfig,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        let width = config.head_width;
        let norm = |name: &str, width| {
            LayerNorm::load(store, &format!("action_head.{name}"), width, NORM_EPS)
        };
        let linear = |name: &str, from, to| {
            Linear::load(store, &format!("action_head.{name}"), from, to, true)
        };
        let blocks = (0..config.head_blocks)
            .map(|i| {
                let fc = linear(&format!("blocks.{i}.fc"), width, width)?;
                Ok((norm(&format!("blocks.{i}.norm"), width)?, fc))
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        Ok(Self {
            norm_in: norm("norm_in", inputs)?,
            fc_in: linear("fc_in", inputs, width)?,
            blocks,
            norm_out: norm("norm_out", width)?,
            fc_out: linear("fc_out", width, outputs)?,
        })
    }

    fn forward(&self, z: &Matrix) -> Result<Matrix> {
        let mut u = self.fc_in.forward_with(&self.norm_in.forward(z)?, Activation::Relu)?;
        for (norm, fc) in &self.blocks {
            u = add(fc.forward_with(&norm.forward(&u)?, Activation::Relu)?, &u)?;
        }
        self.fc_out.forward(&self.norm_out.forward(&u)?)
    }
}

/// A network that gives a whole chunk in one pass.
pub struct OftVla {
    observer: Observer,
    state: (Linear, Linear),
    state_dim: usize,
    head: Head,
    film: bool,
    shape: (usize, usize),
}

impl OftVla {
    /// Builds the network from `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let (config, vlm) = (&SmolVlaConfig::of(checkpoint)?, &VlmConfig::of(checkpoint)?);
        let (store, path) = (&checkpoint.store, checkpoint.config_path());
        let own = OftConfig::of(checkpoint)?;
        let parts = Parts { whole_text: true, film: own.use_film };
        let observer = Observer::load(checkpoint, config, vlm, parts)?;
        let features = &checkpoint.features;
        let (state_dim, dim) = (features.state_dim(&path)?, features.action_dim(&path)?);
        let length = config.chunk_size * dim;
        if length > LENGTH_LIMIT {
            let reason = format!("makes {length} action tokens, expected at most {LENGTH_LIMIT}");
            return Err(ModelError::config(&path, "chunk_size", reason));
        }
        let width = observer.width();
        let linear = |name: &str, inputs| Linear::load(store, name, inputs, width, true);
        Ok(Self {
            state: (linear("proprio.fc1", state_dim)?, linear("proprio.fc2", width)?),
            state_dim,
            head: Head::load(store, &own, dim * width, dim)?,
            film: own.use_film,
            shape: (config.chunk_size, dim),
            observer,
        })
    }

    /// Actions of a chunk and their dimension, `(H, D)`.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The instruction as the vision layers take it (`[1, D]`); none without FiLM.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn words(&self, tokens: &[u32]) -> Result<Option<Matrix>> {
        if !self.film || tokens.is_empty() {
            return Ok(None);
        }
        let words = self.observer.embed_words(tokens)?;
        let mut mean = Matrix::zeros(1, words.width());
        for row in words.iter() {
            mean.values_mut().iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        Ok(Some(mean.scaled(1.0 / words.rows() as f32)))
    }

    /// One image (in [−1, 1]) through vision tower and connector; `words` as
    /// [`Self::words`] gives them.
    ///
    /// # Errors
    /// When the size cannot be cut into patches.
    pub fn encode_image(&self, pixels: &Planes, words: Option<&Matrix>) -> Result<VisionFeatures> {
        self.observer.encode_image(pixels, words)
    }

    /// The observation as it enters the first text layer, `[P, D]`.
    ///
    /// # Errors
    /// When a token is not in the table, or `state` has another width.
    pub fn embed_prefix(
        &self,
        images: &[Arc<Matrix>],
        dummies: usize,
        tokens: &[u32],
        state: &[f32],
    ) -> Result<Matrix> {
        if state.len() != self.state_dim {
            candle_core::bail!("a state of {} values for {}", state.len(), self.state_dim);
        }
        let hidden = self.state.0.forward_with(&Matrix::of_row(state), Activation::GeluErf)?;
        self.observer.embed(images, dummies, tokens, &self.state.1.forward(&hidden)?)
    }

    /// States of the action tokens after the last norm, `[H·D, D]`, from the observation's embeddings.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn decode(&self, prefix: &Matrix) -> Result<Matrix> {
        let empty = Matrix::zeros(self.shape.0 * self.shape.1, prefix.width());
        let tokens = Matrix::stacked([prefix, &empty].into_iter(), prefix.width())?;
        let nothing = Prefix { layers: Vec::new(), length: 0 };
        let all = self.observer.follow(tokens, &nothing)?;
        all.part(prefix.rows()..all.rows())
    }

    /// Normalised actions `[H, D]` of the action tokens' `states`.
    ///
    /// # Errors
    /// When `states` has another shape.
    pub fn actions(&self, states: Matrix) -> Result<Matrix> {
        let ((horizon, dim), width) = (self.shape, states.width());
        self.head.forward(&states.reshaped(horizon, dim * width)?)
    }
}
