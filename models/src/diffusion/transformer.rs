//! The transformer that denoises a chunk of actions.
//!
//! Actions attend to each other and to a memory of one token for the training step and one for each observation. Layers
//! are PyTorch's `nn.TransformerDecoderLayer` and `nn.TransformerEncoderLayer` with `norm_first`.

use candle_core::Result;

use super::config::DiffusionConfig;
use super::unet::step_embeddings;
use crate::ModelError;
use crate::backbones::multihead::MultiheadAttention;
use crate::caches::{Block, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Visible, add};

type Loaded<T> = std::result::Result<T, ModelError>;

/// Added to the variance in every norm.
const EPS: f64 = 1e-5;

/// What a self-attention layer and a feed-forward block share in both kinds of layers.
struct Layer {
    own: MultiheadAttention,
    /// Attention to the memory, with its norm; none in the encoder.
    cross: Option<(LayerNorm, MultiheadAttention)>,
    norm_own: LayerNorm,
    norm_mlp: LayerNorm,
    mlp: [Linear; 2],
}

impl Layer {
    fn load(
        store: &TensorStore,
        name: &str,
        config: &DiffusionConfig,
        cross: bool,
    ) -> Loaded<Self> {
        let (width, heads) = (config.n_emb, config.n_head);
        let part = |part: &str| format!("{name}.{part}");
        let norm =
            |index: usize| LayerNorm::load(store, &part(&format!("norm{index}")), width, EPS);
        let attention = |name: &str| MultiheadAttention::load(store, &part(name), width, heads);
        let linear =
            |name: &str, inputs, outputs| Linear::load(store, &part(name), inputs, outputs, true);
        Ok(Self {
            own: attention("self_attn")?,
            cross: if cross { Some((norm(2)?, attention("multihead_attn")?)) } else { None },
            norm_own: norm(1)?,
            norm_mlp: norm(if cross { 3 } else { 2 })?,
            mlp: [linear("linear1", width, 4 * width)?, linear("linear2", 4 * width, width)?],
        })
    }

    /// `x` (`[L, w]`) through the layer; `memory` is what it attends to, with what each row sees of it. Of its residual
    /// branches, which are `first` and the following, what `branches` says is computed.
    fn forward(
        &self,
        x: Matrix,
        visible: Visible,
        memory: Option<(&Matrix, Visible)>,
        (branches, first): (&mut Branches, usize),
    ) -> Result<Matrix> {
        let mut x = branches.add(first, x, |x| {
            let y = &self.norm_own.forward(x)?;
            self.own.forward((y, y, y), visible, None)
        })?;
        if let (Some((norm, cross)), Some((memory, seen))) = (&self.cross, memory) {
            x = branches.add(first + 1, x, |x| {
                cross.forward((&norm.forward(x)?, memory, memory), seen, None)
            })?;
        }
        branches.add(first + 2, x, |x| {
            let y = self.norm_mlp.forward(x)?;
            self.mlp[1].forward(&self.mlp[0].forward_with(&y, Activation::GeluErf)?)
        })
    }
}

/// What makes the memory of its tokens.
enum Encoder {
    /// Two matrices, token by token.
    Mlp(Box<[Linear; 2]>),
    Layers(Vec<Layer>),
}

/// A denoiser over sequences of actions.
pub struct Transformer {
    actions: Linear,
    /// `[H, w]`
    action_positions: Matrix,
    observations: Linear,
    /// `[1 + n_obs_steps, w]`
    memory_positions: Matrix,
    encoder: Encoder,
    layers: Vec<Layer>,
    norm: LayerNorm,
    head: Linear,
    width: usize,
    causal: bool,
}

impl Transformer {
    /// The network whose tensors lie under `transformer`, for observations of `observed` values each.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that is missing or does not fit.
    pub fn load(
        store: &TensorStore,
        config: &DiffusionConfig,
        action_dim: usize,
        observed: usize,
    ) -> Loaded<Self> {
        let width = config.n_emb;
        let name = |part: &str| format!("transformer.{part}");
        let linear =
            |part: &str, inputs, outputs| Linear::load(store, &name(part), inputs, outputs, true);
        let table = |part: &str, rows: usize| store.matrix(&name(part), &[1, rows, width]);
        let stack = |part: &str, count: usize, cross: bool| {
            let layer = |i| Layer::load(store, &name(&format!("{part}.layers.{i}")), config, cross);
            (0..count).map(layer).collect::<Loaded<Vec<_>>>()
        };
        let encoder = match config.n_cond_layers {
            0 => Encoder::Mlp(Box::new([
                linear("encoder.0", width, 4 * width)?,
                linear("encoder.2", 4 * width, width)?,
            ])),
            count => Encoder::Layers(stack("encoder", count, false)?),
        };
        Ok(Self {
            actions: linear("input_emb", action_dim, width)?,
            action_positions: table("pos_emb", config.horizon)?,
            observations: linear("cond_obs_emb", observed, width)?,
            memory_positions: table("cond_pos_emb", 1 + config.n_obs_steps)?,
            encoder,
            layers: stack("decoder", config.n_layer, true)?,
            norm: LayerNorm::load(store, &name("ln_f"), width, EPS)?,
            head: linear("head", width, action_dim)?,
            width,
            causal: config.causal_attn,
        })
    }

    /// The decoder's residual branches, in the order in which they run.
    pub fn blocks(&self) -> Vec<Block> {
        let kinds = [BlockKind::Attention, BlockKind::CrossAttention, BlockKind::FeedForward];
        let layers = 0..self.layers.len();
        layers.flat_map(|layer| kinds.map(|kind| Block::new(kind, layer))).collect()
    }

    /// What the network says of the sample `x` (`[H, A]`) at training step `t`, given `observations` (`[n_obs_steps, width]`),
    /// with what `branches` computes of the decoder's.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        x: &Matrix,
        t: usize,
        observations: &Matrix,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let step = step_embeddings(std::iter::once(t), 1, self.width);
        let observed = self.observations.forward(observations)?;
        let tokens = Matrix::stacked([&step, &observed].into_iter(), self.width)?;
        let memory = self.encode(add(tokens, &self.memory_positions)?)?;
        // The step is the first token of the memory: action k sees it and the observations up to k.
        let (own, seen) = match self.causal {
            true => (Visible::Causal { prefix: 0 }, Visible::Causal { prefix: 1 }),
            false => (Visible::All, Visible::All),
        };
        let mut x = self.actions.forward_add(x, &self.action_positions)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, own, Some((&memory, seen)), (&mut *branches, 3 * i))?;
        }
        self.head.forward(&self.norm.forward(&x)?)
    }

    fn encode(&self, tokens: Matrix) -> Result<Matrix> {
        match &self.encoder {
            Encoder::Mlp(mlp) => mlp[1].forward(&mlp[0].forward_with(&tokens, Activation::Mish)?),
            Encoder::Layers(layers) => {
                let whole = |x, layer: &Layer| {
                    layer.forward(x, Visible::All, None, (&mut Branches::off(), 0))
                };
                layers.iter().try_fold(tokens, whole)
            }
        }
    }
}
