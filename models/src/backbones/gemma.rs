//! Gemma: a text model, and with other sizes the action expert that attends to its keys and values.
//!
//! Gains are stored as their difference from 1. Source: transformers `models/gemma/modeling_gemma.py`; the
//! adaptive norms are those of π0.5 (openpi `src/openpi/models/gemma.py`).

use candle_core::Result;
use serde::Deserialize;

use super::{KeysValues, ROPE_BASE};
use crate::ModelError;
use crate::caches::{Block, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{
    Activation, After, Linear, Matrix, RmsNorm, Rope, Visible, add, multiply_all,
};

/// Added to the mean square in each norm.
const EPS: f64 = 1e-6;

/// Sizes of the layers, under openpi's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct GemmaConfig {
    /// Hidden size `D`.
    pub width: usize,
    /// Layers.
    pub depth: usize,
    /// Width of the MLP.
    pub mlp_dim: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
}

impl GemmaConfig {
    /// The sizes that openpi calls `name`.
    pub fn named(name: &str) -> Option<Self> {
        let (width, mlp_dim) = match name {
            "gemma_300m" => (1024, 4096),
            "gemma_2b" => (2048, 16_384),
            _ => return None,
        };
        Some(Self { width, depth: 18, mlp_dim, num_heads: 8, num_kv_heads: 1, head_dim: 256 })
    }
}

/// What the flow time does to one norm; each part has one row for all tokens, or one for each.
#[derive(Debug, Clone)]
struct Modulation {
    /// `1 + scale`
    gain: Matrix,
    shift: Matrix,
    gate: Matrix,
}

/// What the flow time does to every norm.
#[derive(Debug, Clone)]
pub struct Modulations {
    layers: Vec<[Modulation; 2]>,
    last: Modulation,
}

enum Norm {
    /// `1 + weight`
    Gain(RmsNorm),
    /// From the conditioning vector to scale, shift and gate; the first part of the norm has gain 1.
    Adaptive { dense: Linear, plain: RmsNorm },
}

impl Norm {
    fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
        adaptive: bool,
    ) -> std::result::Result<Self, ModelError> {
        if adaptive {
            let dense = Linear::load(store, &format!("{name}.dense"), width, 3 * width, true)?;
            return Ok(Self::Adaptive { dense, plain: RmsNorm::new(vec![1.0; width], EPS) });
        }
        let gain = store.vector(&format!("{name}.weight"), width)?;
        Ok(Self::Gain(RmsNorm::new(gain.into_iter().map(|g| g + 1.0).collect(), EPS)))
    }

    fn modulation(&self, condition: &Matrix) -> Result<Modulation> {
        let Self::Adaptive { dense, .. } = self else {
            candle_core::bail!("a norm with a gain takes no condition");
        };
        let (all, width) = (dense.forward(condition)?, dense.outputs() / 3);
        let part =
            |i: usize| Matrix::of_rows(all.columns(i * width..(i + 1) * width).iter(), width);
        let mut gain = part(0);
        gain.values_mut().iter_mut().for_each(|g| *g += 1.0);
        Ok(Modulation { gain, shift: part(1), gate: part(2) })
    }

    fn forward(&self, x: &Matrix, modulation: Option<&Modulation>) -> Result<Matrix> {
        match (self, modulation) {
            (Self::Gain(norm), _) => norm.forward(x),
            (Self::Adaptive { plain, .. }, Some(m)) => {
                let mut x = plain.forward(x)?;
                multiply_all(&mut x, &m.gain)?;
                add(x, &m.shift)
            }
            (Self::Adaptive { .. }, None) => {
                candle_core::bail!("an adaptive norm has no condition")
            }
        }
    }
}

/// `gate·branch`: what is added to the stream.
fn gated(mut branch: Matrix, modulation: Option<&Modulation>) -> Result<Matrix> {
    if let Some(m) = modulation {
        multiply_all(&mut branch, &m.gate)?;
    }
    Ok(branch)
}

/// What follows keys and values.
struct Rest {
    q: Linear,
    out: Linear,
    post_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Layer {
    input_norm: Norm,
    k: Linear,
    v: Linear,
    rest: Option<Rest>,
}

impl Layer {
    /// Keys and values of the normed `x`.
    fn keys_values(&self, x: &Matrix, rope: &Rope) -> Result<KeysValues> {
        Ok(KeysValues { keys: rope.rotate(self.k.forward(x)?)?, values: self.v.forward(x)? })
    }
}

/// Keys and values of every layer.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    /// Per layer.
    pub layers: Vec<KeysValues>,
    /// Tokens `L`.
    pub length: usize,
}

/// Which parts of the layers are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// The keys and values only: what follows them in the last layer is never loaded, nor the last norm.
    KeysAndValues,
    /// The hidden states after the last norm, too.
    Hidden,
    /// As `Hidden`, with every norm steered by a condition.
    Conditioned,
}

/// The layers of a Gemma model.
pub struct Gemma {
    config: GemmaConfig,
    layers: Vec<Layer>,
    norm: Option<Norm>,
}

impl Gemma {
    /// The layers whose tensors are named `NAME.layers.…`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(
        store: &TensorStore,
        name: &str,
        config: GemmaConfig,
        used: Use,
    ) -> std::result::Result<Self, ModelError> {
        let (width, head) = (config.width, config.head_dim);
        let (queries, keys) = (config.num_heads * head, config.num_kv_heads * head);
        let adaptive = used == Use::Conditioned;
        let layers = (0..config.depth)
            .map(|i| {
                let name = |part: &str| format!("{name}.layers.{i}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, false)
                };
                let norm = |part: &str| Norm::load(store, &name(part), width, adaptive);
                let last = i + 1 == config.depth;
                let rest = if last && used == Use::KeysAndValues {
                    None
                } else {
                    Some(Rest {
                        q: linear("self_attn.q_proj", width, queries)?,
                        out: linear("self_attn.o_proj", queries, width)?,
                        post_norm: norm("post_attention_layernorm")?,
                        gate: linear("mlp.gate_proj", width, config.mlp_dim)?,
                        up: linear("mlp.up_proj", width, config.mlp_dim)?,
                        down: linear("mlp.down_proj", config.mlp_dim, width)?,
                    })
                };
                Ok(Layer {
                    input_norm: norm("input_layernorm")?,
                    k: linear("self_attn.k_proj", width, keys)?,
                    v: linear("self_attn.v_proj", width, keys)?,
                    rest,
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        let norm = match used {
            Use::KeysAndValues => None,
            _ => Some(Norm::load(store, &format!("{name}.norm"), width, adaptive)?),
        };
        Ok(Self { config, layers, norm })
    }

    /// Hidden size `D`.
    pub fn width(&self) -> usize {
        self.config.width
    }

    /// What `condition` (`[1, D]`, or one row a token) does to every norm.
    ///
    /// # Errors
    /// When the norms are not conditioned, or the condition has another width.
    pub fn modulate(&self, condition: &Matrix) -> Result<Modulations> {
        let layers = self.layers.iter().map(|layer| {
            let Some(rest) = &layer.rest else { candle_core::bail!("the last layer is not whole") };
            Ok([layer.input_norm.modulation(condition)?, rest.post_norm.modulation(condition)?])
        });
        let layers = layers.collect::<Result<_>>()?;
        match &self.norm {
            Some(norm) => Ok(Modulations { layers, last: norm.modulation(condition)? }),
            None => candle_core::bail!("the last norm is not loaded"),
        }
    }

    /// The residual branches, in the order in which they run.
    pub fn blocks(&self) -> Vec<Block> {
        let kinds = [BlockKind::Attention, BlockKind::FeedForward];
        let layers = 0..self.layers.len();
        layers.flat_map(|layer| kinds.map(|kind| Block::new(kind, layer))).collect()
    }

    /// Hidden states after the last norm of `embeddings` (`[L, D]`), the tokens after `past`, which see all of it and
    /// each other, with what `branches` computes of the layers.
    ///
    /// # Errors
    /// As [`Self::forward`], and when the layers are not whole.
    pub fn denoise(
        &self,
        embeddings: Matrix,
        past: &KvCache,
        modulations: Option<&Modulations>,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let rope = Rope::new(ROPE_BASE, self.config.head_dim, past.length, embeddings.rows());
        let mut h = embeddings;
        for (i, layer) in self.layers.iter().enumerate() {
            let Some(rest) = &layer.rest else { candle_core::bail!("layer {i} is not whole") };
            let before = past.layers.get(i);
            let modulation = modulations.and_then(|m| m.layers.get(i));
            h = branches.add(2 * i, h, |h| {
                let x = layer.input_norm.forward(h, modulation.map(|m| &m[0]))?;
                let own = layer.keys_values(&x, &rope)?;
                self.attention(rest, &x, (&own, before), &rope, Visible::All, modulation)
            })?;
            h = branches.add(2 * i + 1, h, |h| self.mlp(rest, h, modulation))?;
        }
        match &self.norm {
            Some(norm) => norm.forward(&h, modulations.map(|m| &m.last)),
            None => candle_core::bail!("the last norm is not loaded"),
        }
    }

    /// Runs `embeddings` (`[L, D]`), the tokens after `past`, through all layers.
    ///
    /// Every token sees the whole of `past`, and of the new tokens what `visible` says (its columns count
    /// from the first token of `past`). The result is the cache with the new tokens, and their hidden
    /// states after the last norm when that is loaded.
    ///
    /// # Errors
    /// When shapes differ, or the norms are conditioned and `modulations` is `None`.
    pub fn forward(
        &self,
        embeddings: Matrix,
        past: Option<&KvCache>,
        visible: Visible,
        modulations: Option<&Modulations>,
    ) -> Result<(KvCache, Option<Matrix>)> {
        let new = embeddings.rows();
        let start = past.map_or(0, |p| p.length);
        let rope = Rope::new(ROPE_BASE, self.config.head_dim, start, new);
        let mut h = embeddings;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let past = past.and_then(|p| p.layers.get(i));
            let modulation = modulations.and_then(|m| m.layers.get(i));
            let (kv, out) = self.layer(layer, h, past, &rope, visible, modulation)?;
            layers.push(kv);
            h = out;
        }
        let cache = KvCache { layers, length: start + new };
        let hidden = self.norm.as_ref().map(|norm| norm.forward(&h, modulations.map(|m| &m.last)));
        Ok((cache, hidden.transpose()?))
    }

    fn layer(
        &self,
        layer: &Layer,
        h: Matrix,
        past: Option<&KeysValues>,
        rope: &Rope,
        visible: Visible,
        modulation: Option<&[Modulation; 2]>,
    ) -> Result<(KeysValues, Matrix)> {
        let x = layer.input_norm.forward(&h, modulation.map(|m| &m[0]))?;
        let kv = layer.keys_values(&x, rope)?.after(past)?;
        let Some(rest) = &layer.rest else { return Ok((kv, h)) };
        let h = add(self.attention(rest, &x, (&kv, None), rope, visible, modulation)?, &h)?;
        let h = add(self.mlp(rest, &h, modulation)?, &h)?;
        Ok((kv, h))
    }

    /// Attention of the normed `x` over keys and values, after those of the past where these are kept apart.
    fn attention(
        &self,
        rest: &Rest,
        x: &Matrix,
        (kv, past): (&KeysValues, Option<&KeysValues>),
        rope: &Rope,
        visible: Visible,
        modulation: Option<&[Modulation; 2]>,
    ) -> Result<Matrix> {
        let q = rope.rotate(rest.q.forward(x)?)?;
        let heads = (self.config.num_heads, self.config.num_kv_heads);
        let attended = kv.attend(&q.all(), past, heads, visible, rest.q.compute())?;
        gated(rest.out.forward(&attended)?, modulation.map(|m| &m[0]))
    }

    fn mlp(&self, rest: &Rest, h: &Matrix, modulation: Option<&[Modulation; 2]>) -> Result<Matrix> {
        let x = rest.post_norm.forward(h, modulation.map(|m| &m[1]))?;
        let gate = rest.gate.forward_with(&x, Activation::Gelu)?;
        let x = rest.up.forward_then(&x, After { gate: Some(&gate), ..After::default() })?;
        gated(rest.down.forward(&x)?, modulation.map(|m| &m[1]))
    }
}
