//! The text model (SmolLM2 kind). Of the prefix only the keys and values of each layer are used; heads whose
//! tokens follow the prefix in the same layers load it whole.

use std::sync::Arc;

use candle_core::Result;

use super::config::TextConfig;
use crate::ModelError;
use crate::backbones::{KeysValues, ROPE_BASE};
use crate::caches::KeptPrefix;
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::kernels::{Activation, After, Linear, Matrix, RmsNorm, Rope, Visible};

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
    pub fn forward(&self, x: &Matrix, residual: &Matrix) -> Result<Matrix> {
        self.down.forward_add(&self.inner(x)?, residual)
    }

    /// `x` (`[L, D]`) through the layer.
    pub fn branch(&self, x: &Matrix) -> Result<Matrix> {
        self.down.forward(&self.inner(x)?)
    }

    fn inner(&self, x: &Matrix) -> Result<Matrix> {
        let gate = self.gate.forward_with(x, Activation::Silu)?;
        self.up.forward_then(x, After { gate: Some(&gate), ..After::default() })
    }
}

/// Keys and values of the prefix, per text layer.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// Per layer.
    pub layers: Vec<Arc<KeysValues>>,
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
    h: Matrix,
    x: Option<Matrix>,
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

impl Layer {
    /// Keys and values of the normed `x`.
    fn keys_values(&self, x: &Matrix, rope: &Rope) -> Result<KeysValues> {
        Ok(KeysValues { keys: rope.rotate(self.k.forward(x)?)?, values: self.v.forward(x)? })
    }
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
    pub fn embed(&self, ids: &[u32]) -> Result<Matrix> {
        self.table.rows(ids)
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Runs the prefix `embeddings` (`[P, D]`, the state last) through all layers.
    pub fn prefill(&self, embeddings: Matrix) -> Result<Prefix> {
        let mut growing = self.start(embeddings);
        self.grow(&mut growing, self.layers.len())?;
        Ok(growing.prefix)
    }

    /// The prefix `embeddings` (`[P, D]`, the state last) before the first layer.
    pub fn start(&self, embeddings: Matrix) -> Growing {
        let length = embeddings.rows();
        let prefix = Prefix { layers: Vec::with_capacity(self.layers.len()), length };
        Growing { prefix, rope: Rope::new(ROPE_BASE, self.head, 0, length), h: embeddings, x: None }
    }

    /// Keys and values of the first `depth` layers, as far as they are not known yet. What comes after them in a layer is
    /// computed when the next one is.
    pub fn grow(&self, growing: &mut Growing, depth: usize) -> Result<()> {
        while let Some(layer) =
            self.layers[..depth.min(self.layers.len())].get(growing.prefix.layers.len())
        {
            let Growing { prefix, rope, h, x } = growing;
            if let (Some(kv), Some(x)) = (prefix.layers.last(), &x) {
                let before = &self.layers[prefix.layers.len() - 1];
                let Some(rest) = &before.rest else { candle_core::bail!("a layer is not whole") };
                let q = rope.rotate(rest.q.forward(x)?)?;
                *h = self.rest(rest, h, &q, (kv, None), Visible::LastOnlyByItself)?;
            }
            let normed = layer.input_norm.forward(h)?;
            prefix.layers.push(Arc::new(layer.keys_values(&normed, rope)?));
            *x = Some(normed);
        }
        Ok(())
    }

    /// As [`Self::prefill`], with the tokens whose embeddings `kept` knows already left as they were: keys and values of
    /// the others, and of the last, which attend to all, are computed.
    pub fn prefill_kept(&self, embeddings: Matrix, kept: &mut KeptPrefix) -> Result<Prefix> {
        let length = embeddings.rows();
        let Some(rows) = kept.changed(&embeddings) else {
            let prefix = self.prefill(embeddings)?;
            kept.keep(&prefix.layers);
            return Ok(prefix);
        };
        let rope = Rope::new(ROPE_BASE, self.head, 0, length);
        let mut h = Matrix::of_rows(rows.iter().map(|row| embeddings.row(*row)), self.width);
        let mut layers = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let x = layer.input_norm.forward(&h)?;
            let keys = rope.rotate_at(layer.k.forward(&x)?, &rows)?;
            let new = KeysValues { keys, values: layer.v.forward(&x)? };
            let kv = kept.layer(i, &rows, &new)?;
            if let Some(rest) = layer.rest.as_ref().filter(|_| i + 1 < self.layers.len()) {
                let q = rope.rotate_at(rest.q.forward(&x)?, &rows)?;
                // The last token is the last of the rows, so it alone sees itself here, too.
                h = self.rest(rest, &h, &q, (&kv, None), Visible::LastOnlyByItself)?;
            }
            layers.push(kv);
        }
        Ok(Prefix { layers, length })
    }

    /// Runs tokens that come after `prefix` (`[L, D]`) through all layers and the last norm. They see the
    /// prefix and each other; the prefix does not see them.
    pub fn follow(&self, embeddings: Matrix, prefix: &Prefix) -> Result<Matrix> {
        let rope = Rope::new(ROPE_BASE, self.head, prefix.length, embeddings.rows());
        let mut h = embeddings;
        for (i, layer) in self.layers.iter().enumerate() {
            let x = layer.input_norm.forward(&h)?;
            let own = layer.keys_values(&x, &rope)?;
            let past = prefix.layers.get(i).map(Arc::as_ref);
            let Some(rest) = &layer.rest else { candle_core::bail!("layer {i} is not whole") };
            let q = rope.rotate(rest.q.forward(&x)?)?;
            h = self.rest(rest, &h, &q, (&own, past), Visible::All)?;
        }
        match &self.norm {
            Some(norm) => norm.forward(&h),
            None => candle_core::bail!("the last norm was not loaded"),
        }
    }

    /// The stream `h` after attention of `q` over the keys and values that come before its own, these, and the MLP.
    fn rest(
        &self,
        rest: &Rest,
        h: &Matrix,
        q: &Matrix,
        (own, past): (&KeysValues, Option<&KeysValues>),
        visible: Visible,
    ) -> Result<Matrix> {
        let heads = (self.heads, self.key_heads);
        let attended = own.attend(&q.all(), past, heads, visible, rest.q.compute())?;
        let h = rest.out.forward_add(&attended, h)?;
        rest.mlp.forward(&rest.post_norm.forward(&h)?, &h)
    }
}
