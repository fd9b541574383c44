//! The text model (SmolLM2 kind), of which only the keys and values of each layer are used.

use candle_core::{Result, Tensor};

use super::config::TextConfig;
use super::{ROPE_BASE, split_heads};
use crate::ModelError;
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::kernels::{Linear, Rope, Visible, add, attend, silu_mul};

/// RMS norm with a gain.
pub(super) struct RmsNorm {
    gain: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self { gain: store.tensor(&format!("{name}.weight"), &[width])?, eps: eps as f32 })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm(x, &self.gain, self.eps)
    }
}

/// Gated MLP: `down(silu(gate(x))·up(x))`.
pub(super) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        inner: usize,
    ) -> std::result::Result<Self, ModelError> {
        let linear = |part: &str, inputs, outputs| {
            Linear::load(store, &format!("{name}.{part}"), inputs, outputs, false)
        };
        Ok(Self {
            gate: linear("gate_proj", width, inner)?,
            up: linear("up_proj", width, inner)?,
            down: linear("down_proj", inner, width)?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&silu_mul(self.gate.forward(x)?, &self.up.forward(x)?)?)
    }
}

/// Keys (after rotation) and values of the prefix, per text layer.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// Per layer, keys and values, each `[K, P, hd]`.
    pub layers: Vec<(Tensor, Tensor)>,
    /// Tokens `P`.
    pub length: usize,
}

struct Layer {
    input_norm: RmsNorm,
    k: Linear,
    v: Linear,
    /// What follows keys and values; the last layer's is never used, and never loaded.
    rest: Option<Rest>,
}

struct Rest {
    q: Linear,
    out: Linear,
    post_norm: RmsNorm,
    mlp: Mlp,
}

/// The text layers and the token table.
pub(super) struct Text {
    width: usize,
    heads: usize,
    key_heads: usize,
    head: usize,
    /// `[V, D]`, read row by row from the mapped file.
    table: StoredTensor,
    layers: Vec<Layer>,
}

impl Text {
    pub fn load(
        store: &TensorStore,
        config: &TextConfig,
        count: usize,
    ) -> std::result::Result<Self, ModelError> {
        let (width, eps, head) = (config.hidden_size, config.rms_norm_eps, config.head());
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let layers = (0..count)
            .map(|i| {
                let name = |part: &str| format!("text.layers.{i}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, false)
                };
                let rest = if i + 1 == count {
                    None
                } else {
                    Some(Rest {
                        q: linear("self_attn.q_proj", width, heads * head)?,
                        out: linear("self_attn.o_proj", heads * head, width)?,
                        post_norm: RmsNorm::load(
                            store,
                            &name("post_attention_layernorm"),
                            width,
                            eps,
                        )?,
                        mlp: Mlp::load(store, &name("mlp"), width, config.intermediate_size)?,
                    })
                };
                Ok(Layer {
                    input_norm: RmsNorm::load(store, &name("input_layernorm"), width, eps)?,
                    k: linear("self_attn.k_proj", width, key_heads * head)?,
                    v: linear("self_attn.v_proj", width, key_heads * head)?,
                    rest,
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        let table = store.get("text.embed_tokens.weight", &[config.vocab_size, width])?.clone();
        Ok(Self { width, heads, key_heads, head, table, layers })
    }

    /// Hidden size `D`.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows of the token table, `[tokens, D]`, not scaled.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.table.rows(ids)
    }

    /// Runs the prefix `embeddings` (`[P, D]`, the state last) through all layers.
    pub fn prefill(&self, embeddings: &Tensor) -> Result<Prefix> {
        let length = embeddings.dim(0)?;
        let rope = Rope::new(ROPE_BASE, self.head, 0, length)?;
        let mut h = embeddings.clone();
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let x = layer.input_norm.forward(&h)?;
            let k = rope.apply(&split_heads(&layer.k.forward(&x)?, self.key_heads)?)?;
            let v = split_heads(&layer.v.forward(&x)?, self.key_heads)?;
            if let Some(rest) = &layer.rest {
                let q = rope.apply(&split_heads(&rest.q.forward(&x)?, self.heads)?)?;
                let attended = attend(&q, &k, &v, Visible::LastOnlyByItself)?;
                h = add(rest.out.forward(&attended)?, &h)?;
                h = add(rest.mlp.forward(&rest.post_norm.forward(&h)?)?, &h)?;
            }
            layers.push((k, v));
        }
        Ok(Prefix { layers, length })
    }
}
