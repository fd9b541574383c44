//! The action expert: from a noisy chunk and a time to a velocity.

use std::path::Path;
use std::sync::Arc;

use candle_core::Result;

use super::text::Mlp;
use super::{AttentionMode, Prefix, SmolVlaConfig, VlmConfig};
use crate::ModelError;
use crate::backbones::{KeysValues, ROPE_BASE};
use crate::caches::{Block, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{Linear, Matrix, RmsNorm, Rope, Visible};

/// What the expert's layers read of the prefix; made once per chunk.
#[derive(Debug, Clone)]
pub struct ExpertCache {
    layers: Vec<Arc<KeysValues>>,
    /// Layers that run.
    depth: usize,
    prefix: usize,
    /// Positions of the suffix after the prefix.
    after_prefix: Rope,
}

enum Attention {
    /// Keys and values: the prefix's, then the suffix's own.
    SelfAndPrefix { k: Linear, v: Linear },
    /// Keys and values: the prefix's, projected.
    Cross { k: Linear, v: Linear },
}

struct Layer {
    /// The text layer whose keys and values it reads.
    text_layer: usize,
    input_norm: RmsNorm,
    q: Linear,
    attention: Attention,
    out: Linear,
    post_norm: RmsNorm,
    mlp: Mlp,
}

/// The expert's layers.
pub(super) struct Expert {
    width: usize,
    heads: usize,
    key_heads: usize,
    head: usize,
    horizon: usize,
    /// Positions from 0, for cross-attention.
    from_zero: Rope,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

/// Width of the expert's MLP at width `w`, as the reference rounds it.
pub(crate) fn mlp_width(w: usize) -> usize {
    (4 * (2 * w / 3)).next_multiple_of(256)
}

impl Expert {
    pub fn load(
        store: &TensorStore,
        config: &SmolVlaConfig,
        vlm: &VlmConfig,
        text_layers: usize,
        path: &Path,
    ) -> std::result::Result<Self, ModelError> {
        let text = &vlm.text_config;
        let width = (text.hidden_size as f64 * config.expert_width_multiplier) as usize;
        if width < 4 || !width.is_multiple_of(2) {
            let reason = format!("gives an expert of width {width}, expected an even one from 4");
            return Err(ModelError::config(path, "expert_width_multiplier", reason));
        }
        let count = match usize::try_from(config.num_expert_layers) {
            Ok(n) if n > 0 => n,
            _ => text_layers,
        };
        if count > text_layers || !text_layers.is_multiple_of(count) {
            let reason = format!("is {count}, expected a divisor of the {text_layers} text layers");
            return Err(ModelError::config(path, "num_expert_layers", reason));
        }
        let cross = config.attention_mode == AttentionMode::CrossAttn;
        if cross && count != text_layers {
            let reason = format!(
                "is {count} of {text_layers} with attention_mode cross_attn, which the reference \
                 cannot run either; expected 0"
            );
            return Err(ModelError::config(path, "num_expert_layers", reason));
        }
        let every = usize::try_from(config.self_attn_every_n_layers).unwrap_or(0);
        let (head, heads, key_heads) =
            (text.head(), text.num_attention_heads, text.num_key_value_heads);
        let eps = text.rms_norm_eps;
        let layers = (0..count)
            .map(|j| {
                let i = j * (text_layers / count);
                let name = |part: &str| format!("expert.layers.{j}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, false)
                };
                let keys = key_heads * head;
                // By default every other layer attends to the suffix too, from the first on.
                let own = !cross || (every != 0 && i.is_multiple_of(every));
                let from = if own { width } else { keys };
                let k = linear("self_attn.k_proj", from, keys)?;
                let v = linear("self_attn.v_proj", from, keys)?;
                let attention =
                    if own { Attention::SelfAndPrefix { k, v } } else { Attention::Cross { k, v } };
                Ok(Layer {
                    text_layer: i,
                    input_norm: RmsNorm::load(store, &name("input_layernorm"), width, eps)?,
                    q: linear("self_attn.q_proj", width, heads * head)?,
                    attention,
                    out: linear("self_attn.o_proj", heads * head, width)?,
                    post_norm: RmsNorm::load(store, &name("post_attention_layernorm"), width, eps)?,
                    mlp: Mlp::load(store, &name("mlp"), width, mlp_width(width))?,
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        Ok(Self {
            width,
            heads,
            key_heads,
            head,
            horizon: config.chunk_size,
            from_zero: Rope::new(ROPE_BASE, head, 0, config.chunk_size),
            layers,
            norm: RmsNorm::load(store, "expert.norm", width, eps)?,
        })
    }

    /// Width of the expert's stream.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The part of every layer that depends on the prefix only.
    pub fn prepare(&self, prefix: &Prefix) -> Result<ExpertCache> {
        let mut cache = self.start(prefix.length);
        self.grow(&mut cache, prefix, prefix.layers.len())?;
        Ok(cache)
    }

    /// Nothing yet of a prefix of `length` tokens.
    pub fn start(&self, length: usize) -> ExpertCache {
        let after_prefix = Rope::new(ROPE_BASE, self.head, length, self.horizon);
        let layers = Vec::with_capacity(self.layers.len());
        ExpertCache { layers, depth: 0, prefix: length, after_prefix }
    }

    /// Of the network's first `depth` text layers, which `prefix` has, what the layers that read them need; from now on
    /// these run, and no others.
    pub fn grow(&self, cache: &mut ExpertCache, prefix: &Prefix, depth: usize) -> Result<()> {
        cache.depth = self.layers.iter().filter(|layer| layer.text_layer < depth).count();
        while let Some(layer) = self.layers[..cache.depth].get(cache.layers.len()) {
            let kv = &prefix.layers[layer.text_layer];
            cache.layers.push(match &layer.attention {
                Attention::SelfAndPrefix { .. } => kv.clone(),
                Attention::Cross { k, v } => Arc::new(KeysValues {
                    keys: k.forward(&kv.keys)?,
                    values: v.forward(&kv.values)?,
                }),
            });
        }
        Ok(())
    }

    /// The residual branches, in the order in which they run.
    pub fn blocks(&self) -> Vec<Block> {
        let kinds = [BlockKind::Attention, BlockKind::FeedForward];
        let layers = 0..self.layers.len();
        layers.flat_map(|layer| kinds.map(|kind| Block::new(kind, layer))).collect()
    }

    /// The suffix `embeddings` (`[H, w]`) through the layers that `cache` says and the last norm, with what `branches`
    /// computes of them.
    pub fn forward(
        &self,
        embeddings: Matrix,
        cache: &ExpertCache,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let mut h = embeddings;
        let running = self.layers.iter().zip(&cache.layers).take(cache.depth);
        for (i, (layer, prefix)) in running.enumerate() {
            h = branches.add(2 * i, h, |h| self.attention(layer, h, prefix, cache))?;
            let mlp = |h: &Matrix| layer.mlp.branch(&layer.post_norm.forward(h)?);
            h = branches.add(2 * i + 1, h, mlp)?;
        }
        self.norm.forward(&h)
    }

    fn attention(
        &self,
        layer: &Layer,
        h: &Matrix,
        prefix: &KeysValues,
        cache: &ExpertCache,
    ) -> Result<Matrix> {
        let x = layer.input_norm.forward(h)?;
        let (q, compute) = (layer.q.forward(&x)?, layer.q.compute());
        let heads = (self.heads, self.key_heads);
        let attended = match &layer.attention {
            Attention::SelfAndPrefix { k, v } => {
                let rope = &cache.after_prefix;
                let keys = rope.rotate(k.forward(&x)?)?;
                let own = KeysValues { keys, values: v.forward(&x)? };
                let visible = Visible::Causal { prefix: cache.prefix };
                own.attend(&rope.rotate(q)?.all(), Some(prefix), heads, visible, compute)?
            }
            Attention::Cross { .. } => {
                let q = self.from_zero.rotate(q)?;
                prefix.attend(&q.all(), None, heads, Visible::All, compute)?
            }
        };
        layer.out.forward(&attended)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn mlp_widths_are_those_of_the_reference() {
        assert_eq!(super::mlp_width(720), 2048);
        assert_eq!(super::mlp_width(36), 256);
    }
}
