//! The encoder half of the language model (BART): post-norm layers over image and text tokens.

use candle_core::{Result, bail};

use super::EPS;
use super::config::TextConfig;
use crate::ModelError;
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Visible, add, attend};

/// The position table begins with rows that no position uses.
const POSITION_OFFSET: usize = 2;

struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    attention_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    final_norm: LayerNorm,
}

/// The token table and the encoder's layers.
pub struct Encoder {
    heads: usize,
    scale: f32,
    /// `[V, D]`, read row by row from the mapped file.
    table: StoredTensor,
    /// `[positions, D]`
    positions: Matrix,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Encoder {
    /// Builds the encoder from tensors `bart.*`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(store: &TensorStore, config: &TextConfig) -> std::result::Result<Self, ModelError> {
        let (width, inner) = (config.d_model, config.encoder_ffn_dim);
        let layer = |i: usize| {
            let name = |part: &str| format!("bart.layers.{i}.{part}");
            let linear = |part: &str, inputs, outputs| {
                Linear::load(store, &name(part), inputs, outputs, true)
            };
            let norm = |part: &str| LayerNorm::load(store, &name(part), width, EPS);
            Ok::<_, ModelError>(Layer {
                q: linear("self_attn.q_proj", width, width)?,
                k: linear("self_attn.k_proj", width, width)?,
                v: linear("self_attn.v_proj", width, width)?,
                out: linear("self_attn.out_proj", width, width)?,
                attention_norm: norm("self_attn_layer_norm")?,
                fc1: linear("fc1", width, inner)?,
                fc2: linear("fc2", inner, width)?,
                final_norm: norm("final_layer_norm")?,
            })
        };
        let table = store.get("bart.embed_tokens.weight", &[config.vocab_size, width])?.clone();
        let rows = config.max_position_embeddings + POSITION_OFFSET;
        let positions = store.matrix("bart.embed_positions.weight", &[rows, width])?;
        Ok(Self {
            heads: config.encoder_attention_heads,
            scale: if config.scale_embedding { (width as f64).sqrt() as f32 } else { 1.0 },
            table,
            positions: positions.part(POSITION_OFFSET..rows)?,
            norm: LayerNorm::load(store, "bart.layernorm_embedding", width, EPS)?,
            layers: (0..config.encoder_layers).map(layer).collect::<std::result::Result<_, _>>()?,
        })
    }

    /// Embeddings of the tokens `ids`, `[tokens, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn embed(&self, ids: &[u32]) -> Result<Matrix> {
        Ok(self.table.rows(ids)?.scaled(self.scale))
    }

    /// `embeddings` (`[L, D]`) through all layers; every token sees every other.
    ///
    /// # Errors
    /// When there are more tokens than learned positions.
    pub fn forward(&self, embeddings: &Matrix) -> Result<Matrix> {
        let (length, most) = (embeddings.rows(), self.positions.rows());
        if length > most {
            bail!("the encoder gets {length} tokens and has positions for {most}");
        }
        let h = self.norm.forward(&add(self.positions.part(0..length)?, embeddings)?)?;
        self.layers.iter().try_fold(h, |h, layer| self.layer(layer, &h))
    }

    fn layer(&self, layer: &Layer, h: &Matrix) -> Result<Matrix> {
        let (q, k, v) = (layer.q.forward(h)?, layer.k.forward(h)?, layer.v.forward(h)?);
        let (heads, compute) = ((self.heads, self.heads), layer.q.compute());
        let attended = attend(&q.all(), &[k.all()], &[v.all()], heads, Visible::All, compute)?;
        let h = layer.attention_norm.forward(&layer.out.forward_add(&attended, h)?)?;
        let x = layer.fc1.forward_with(&h, Activation::GeluErf)?;
        layer.final_norm.forward(&layer.fc2.forward_add(&x, &h)?)
    }
}
