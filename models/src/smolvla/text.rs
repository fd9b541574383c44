//! The text model (SmolLM2 kind). Of the prefix only the keys and values of each layer are used; heads whose
//! tokens follow the prefix in the same layers load it whole.

use candle_core::{Result, Tensor};

use super::config::TextConfig;
use crate::ModelError;
use crate::backbones::{ROPE_BASE, split_heads};
use crate::caches::{KeptPrefix, pick, spread};
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::kernels::{Activation, After, Linear, RmsNorm, Rope, Visible, attend};

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

    /// `x` (`[L, D]`) through the layer, added to `residual`.
    pub fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.down.forward_add(&self.inner(x)?, residual)
    }

    /// `x` (`[L, D]`) through the layer.
    pub fn branch(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&self.inner(x)?)
    }

    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.gate.forward_with(x, Activation::Silu)?;
        self.up.forward_then(x, After { gate: Some(&gate), ..After::default() })
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

/// A prefix that has come through some of the layers.
#[derive(Debug, Clone)]
pub(crate) struct Growing {
    /// What of it is known.
    pub prefix: Prefix,
    rope: Rope,
    /// The stream before the newest layer, `[P, D]`, and normed by it.
    h: Tensor,
    x: Option<Tensor>,
}

struct Layer {
    input_norm: RmsNorm,
    k: Linear,
    v: Linear,
    /// What follows keys and values; the last layer's is loaded only for tokens that follow the prefix.
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
    /// The norm after the last layer, loaded with the whole of it.
    norm: Option<RmsNorm>,
}

impl Text {
    /// The first `count` layers; `whole`: with what [`Self::follow`] needs of the last.
    pub fn load(
        store: &TensorStore,
        config: &TextConfig,
        count: usize,
        whole: bool,
    ) -> std::result::Result<Self, ModelError> {
        let (width, eps, head) = (config.hidden_size, config.rms_norm_eps, config.head());
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let layers = (0..count)
            .map(|i| {
                let name = |part: &str| format!("text.layers.{i}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, false)
                };
                let rest = if i + 1 == count && !whole {
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
        let norm = if whole { Some(RmsNorm::load(store, "text.norm", width, eps)?) } else { None };
        Ok(Self { width, heads, key_heads, head, table, layers, norm })
    }

    /// Hidden size `D`.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows of the token table, `[tokens, D]`, not scaled.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.table.rows(ids)
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Runs the prefix `embeddings` (`[P, D]`, the state last) through all layers.
    pub fn prefill(&self, embeddings: &Tensor) -> Result<Prefix> {
        let mut growing = self.start(embeddings)?;
        self.grow(&mut growing, self.layers.len())?;
        Ok(growing.prefix)
    }

    /// The prefix `embeddings` (`[P, D]`, the state last) before the first layer.
    pub fn start(&self, embeddings: &Tensor) -> Result<Growing> {
        let length = embeddings.dim(0)?;
        let prefix = Prefix { layers: Vec::with_capacity(self.layers.len()), length };
        let rope = Rope::new(ROPE_BASE, self.head, 0, length);
        Ok(Growing { prefix, rope, h: embeddings.clone(), x: None })
    }

    /// Keys and values of the first `depth` layers, as far as they are not known yet. What comes after them in a layer is
    /// computed when the next one is.
    pub fn grow(&self, growing: &mut Growing, depth: usize) -> Result<()> {
        while let Some(layer) =
            self.layers[..depth.min(self.layers.len())].get(growing.prefix.layers.len())
        {
            let Growing { prefix, rope, h, x } = growing;
            if let (Some((k, v)), Some(x)) = (prefix.layers.last(), &x) {
                let before = &self.layers[prefix.layers.len() - 1];
                let Some(rest) = &before.rest else { candle_core::bail!("a layer is not whole") };
                *h = self.rest(rest, h.clone(), x, (k, v), rope, Visible::LastOnlyByItself)?;
            }
            let normed = layer.input_norm.forward(h)?;
            prefix.layers.push(self.keys_values(layer, &normed, rope)?);
            *x = Some(normed);
        }
        Ok(())
    }

    /// As [`Self::prefill`], with the tokens whose embeddings `kept` knows already left as they were: keys and values of
    /// the others, and of the last, which attend to all, are computed.
    pub fn prefill_kept(&self, embeddings: &Tensor, kept: &mut KeptPrefix) -> Result<Prefix> {
        let length = embeddings.dim(0)?;
        let Some(rows) = kept.changed(embeddings)? else {
            let prefix = self.prefill(embeddings)?;
            kept.keep(&prefix.layers)?;
            return Ok(prefix);
        };
        let rope = Rope::new(ROPE_BASE, self.head, 0, length);
        // Rotated at their own places.
        let rotated = |x: &Tensor| pick(&rope.apply(&spread(x, &rows, length)?)?, &rows, 1);
        let mut h = pick(embeddings, &rows, 0)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let x = layer.input_norm.forward(&h)?;
            let k = rotated(&split_heads(&layer.k.forward(&x)?, self.key_heads)?)?;
            let v = split_heads(&layer.v.forward(&x)?, self.key_heads)?;
            let (k, v) = kept.layer(i, &rows, &k, &v)?;
            if let Some(rest) = layer.rest.as_ref().filter(|_| i + 1 < self.layers.len()) {
                let q = rotated(&split_heads(&rest.q.forward(&x)?, self.heads)?)?;
                // The last token is the last of the rows, so it alone sees itself here, too.
                let attended = attend(&q, &k, &v, Visible::LastOnlyByItself, rest.q.compute())?;
                h = rest.out.forward_add(&attended, &h)?;
                h = rest.mlp.forward(&rest.post_norm.forward(&h)?, &h)?;
            }
            layers.push((k, v));
        }
        Ok(Prefix { layers, length })
    }

    /// Runs tokens that come after `prefix` (`[L, D]`) through all layers and the last norm. They see the
    /// prefix and each other; the prefix does not see them.
    pub fn follow(&self, embeddings: &Tensor, prefix: &Prefix) -> Result<Tensor> {
        let rope = Rope::new(ROPE_BASE, self.head, prefix.length, embeddings.dim(0)?);
        let mut h = embeddings.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            let x = layer.input_norm.forward(&h)?;
            let (mut k, mut v) = self.keys_values(layer, &x, &rope)?;
            if let Some((before_k, before_v)) = prefix.layers.get(i) {
                k = Tensor::cat(&[before_k, &k], 1)?;
                v = Tensor::cat(&[before_v, &v], 1)?;
            }
            let Some(rest) = &layer.rest else { candle_core::bail!("layer {i} is not whole") };
            h = self.rest(rest, h, &x, (&k, &v), &rope, Visible::All)?;
        }
        match &self.norm {
            Some(norm) => norm.forward(&h),
            None => candle_core::bail!("the last norm was not loaded"),
        }
    }

    fn keys_values(&self, layer: &Layer, x: &Tensor, rope: &Rope) -> Result<(Tensor, Tensor)> {
        let k = rope.split(&layer.k.forward(x)?, self.key_heads)?;
        Ok((k, split_heads(&layer.v.forward(x)?, self.key_heads)?))
    }

    /// The stream `h`, normed `x`, after attention over `keys` and values, and the MLP.
    fn rest(
        &self,
        rest: &Rest,
        h: Tensor,
        x: &Tensor,
        (keys, values): (&Tensor, &Tensor),
        rope: &Rope,
        visible: Visible,
    ) -> Result<Tensor> {
        let q = rope.split(&rest.q.forward(x)?, self.heads)?;
        let h = rest.out.forward_add(&attend(&q, keys, values, visible, rest.q.compute())?, &h)?;
        rest.mlp.forward(&rest.post_norm.forward(&h)?, &h)
    }
}
