//! Encoder and decoder layers in which positions enter at every attention.
//!
//! Positions are added to queries and keys, never to values nor to the stream (as in DETR).

use candle_core::Result;

use super::config::{ActConfig, FeedForward};
use crate::ModelError;
use crate::backbones::multihead::MultiheadAttention;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Visible, sum};

type Loaded<T> = std::result::Result<T, ModelError>;

/// Added to the variance in every norm.
const EPS: f64 = 1e-5;

struct Mlp {
    first: Linear,
    second: Linear,
    activation: FeedForward,
}

impl Mlp {
    fn load(store: &TensorStore, name: &str, config: &ActConfig) -> Loaded<Self> {
        let (width, inner) = (config.dim_model, config.dim_feedforward);
        Ok(Self {
            first: Linear::load(store, &format!("{name}.linear1"), width, inner, true)?,
            second: Linear::load(store, &format!("{name}.linear2"), inner, width, true)?,
            activation: config.feedforward_activation,
        })
    }

    fn forward(&self, x: &Matrix, residual: &Matrix) -> Result<Matrix> {
        let activation = match self.activation {
            FeedForward::Relu => Activation::Relu,
            FeedForward::Gelu => Activation::GeluErf,
        };
        self.second.forward_add(&self.first.forward_with(x, activation)?, residual)
    }
}

/// `f(x)` with `x` added: `f` is given what it works on, and what it adds. The norm comes before or after.
fn residual(
    x: &Matrix,
    norm: &LayerNorm,
    pre_norm: bool,
    f: impl FnOnce(&Matrix, &Matrix) -> Result<Matrix>,
) -> Result<Matrix> {
    if pre_norm { f(&norm.forward(x)?, x) } else { norm.forward(&f(x, x)?) }
}

struct EncoderLayer {
    attention: MultiheadAttention,
    norm1: LayerNorm,
    mlp: Mlp,
    norm2: LayerNorm,
}

/// Self-attention over all tokens.
pub(super) struct Encoder {
    layers: Vec<EncoderLayer>,
    /// Only with `pre_norm`.
    norm: Option<LayerNorm>,
    pre_norm: bool,
}

impl Encoder {
    pub fn load(store: &TensorStore, config: &ActConfig) -> Loaded<Self> {
        let (width, heads) = (config.dim_model, config.n_heads);
        let layers = (0..config.n_encoder_layers)
            .map(|i| {
                let name = |part: &str| format!("encoder.layers.{i}.{part}");
                Ok(EncoderLayer {
                    attention: MultiheadAttention::load(store, &name("self_attn"), width, heads)?,
                    norm1: LayerNorm::load(store, &name("norm1"), width, EPS)?,
                    mlp: Mlp::load(store, &format!("encoder.layers.{i}"), config)?,
                    norm2: LayerNorm::load(store, &name("norm2"), width, EPS)?,
                })
            })
            .collect::<Loaded<_>>()?;
        let norm = match config.pre_norm {
            true => Some(LayerNorm::load(store, "encoder.norm", width, EPS)?),
            false => None,
        };
        Ok(Self { layers, norm, pre_norm: config.pre_norm })
    }

    /// `x` (`[L, D]`) with positions of the same shape.
    pub fn forward(&self, x: &Matrix, positions: &Matrix) -> Result<Matrix> {
        let mut x = x.clone();
        for layer in &self.layers {
            x = residual(&x, &layer.norm1, self.pre_norm, |x, added| {
                let placed = &sum(x, positions)?;
                layer.attention.forward((placed, placed, x), Visible::All, Some(added))
            })?;
            x = residual(&x, &layer.norm2, self.pre_norm, |x, added| layer.mlp.forward(x, added))?;
        }
        match &self.norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

struct DecoderLayer {
    own: MultiheadAttention,
    norm1: LayerNorm,
    cross: MultiheadAttention,
    norm2: LayerNorm,
    mlp: Mlp,
    norm3: LayerNorm,
}

/// Attention of the actions to each other and to the encoder's tokens.
pub(super) struct Decoder {
    layers: Vec<DecoderLayer>,
    norm: LayerNorm,
    /// `[H, D]`
    positions: Matrix,
    pre_norm: bool,
}

impl Decoder {
    pub fn load(store: &TensorStore, config: &ActConfig) -> Loaded<Self> {
        let (width, heads) = (config.dim_model, config.n_heads);
        let layers = (0..config.n_decoder_layers)
            .map(|i| {
                let name = |part: &str| format!("decoder.layers.{i}.{part}");
                let norm = |part: &str| LayerNorm::load(store, &name(part), width, EPS);
                Ok(DecoderLayer {
                    own: MultiheadAttention::load(store, &name("self_attn"), width, heads)?,
                    norm1: norm("norm1")?,
                    cross: MultiheadAttention::load(store, &name("multihead_attn"), width, heads)?,
                    norm2: norm("norm2")?,
                    mlp: Mlp::load(store, &format!("decoder.layers.{i}"), config)?,
                    norm3: norm("norm3")?,
                })
            })
            .collect::<Loaded<_>>()?;
        Ok(Self {
            layers,
            norm: LayerNorm::load(store, "decoder.norm", width, EPS)?,
            positions: store.matrix("decoder_pos_embed.weight", &[config.chunk_size, width])?,
            pre_norm: config.pre_norm,
        })
    }

    /// One row for each action, `[H, D]`, from the encoder's tokens and their positions.
    pub fn forward(&self, memory: &Matrix, memory_positions: &Matrix) -> Result<Matrix> {
        let keys = sum(memory, memory_positions)?;
        let mut x = Matrix::zeros(self.positions.rows(), self.positions.width());
        for layer in &self.layers {
            x = residual(&x, &layer.norm1, self.pre_norm, |x, added| {
                let placed = &sum(x, &self.positions)?;
                layer.own.forward((placed, placed, x), Visible::All, Some(added))
            })?;
            x = residual(&x, &layer.norm2, self.pre_norm, |x, added| {
                let placed = &sum(x, &self.positions)?;
                layer.cross.forward((placed, &keys, memory), Visible::All, Some(added))
            })?;
            x = residual(&x, &layer.norm3, self.pre_norm, |x, added| layer.mlp.forward(x, added))?;
        }
        self.norm.forward(&x)
    }
}
