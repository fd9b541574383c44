//! The soft-prompted transformer: actions, features of the encoder, tokens of the further cameras and learned
//! prompts attend to each other; the result is read off the actions.

use candle_core::{Result, bail};

use super::config::XvlaConfig;
use crate::ModelError;
use crate::caches::{Block as Branch, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Visible, attend};

/// Added to the variance in every norm.
const EPS: f64 = 1e-5;

/// Longest period of the time embedding, in units of 2π.
const MAX_PERIOD: f64 = 100.0;

/// Writes the embedding of flow time `t` to `row`: cosines, then as many sines; an odd width ends in a zero.
pub fn time_embedding(t: f64, row: &mut [f32]) {
    let half = row.len() / 2;
    let (cosines, sines) = row.split_at_mut(half);
    sines.fill(0.0);
    for (i, (cosine, sine)) in cosines.iter_mut().zip(sines).enumerate() {
        let angle = t * MAX_PERIOD.powf(-(i as f64) / half as f64);
        (*cosine, *sine) = (angle.cos() as f32, angle.sin() as f32);
    }
}

/// A layer that exists once per domain, for one of them.
///
/// The weights are rows of a table, each one domain's matrix `[in, out]`.
fn domain_linear(
    store: &TensorStore,
    name: &str,
    (inputs, outputs): (usize, usize),
    config: &XvlaConfig,
    domain: u32,
) -> std::result::Result<Linear, ModelError> {
    let row = |part: &str, width: usize| {
        let table = store.get(&format!("{name}.{part}.weight"), &[config.num_domains, width])?;
        Ok::<_, ModelError>(table.rows(&[domain])?)
    };
    let turned = row("fc", inputs * outputs)?.reshaped(inputs, outputs)?.transposed();
    let (weight, bias) = (turned.values().to_vec(), row("bias", outputs)?.values().to_vec());
    Ok(Linear::from_values(weight, Some(bias), (inputs, outputs))?)
}

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// Everything of the sequence that one chunk's denoise steps share.
#[derive(Debug, Clone)]
pub struct HeadCache {
    /// Features and further cameras with their positions, then the prompts: `[L, W]`.
    context: Matrix,
}

/// The transformer of one domain.
pub struct Head {
    heads: usize,
    time_width: usize,
    horizon: usize,
    action_in: Linear,
    action_out: Linear,
    features_in: Linear,
    views_in: Linear,
    /// `[max_len_seq, W]`
    positions: Matrix,
    /// `[prompts, W]`
    prompts: Option<Matrix>,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

impl Head {
    /// Builds the transformer of `domain` from tensors `head.*`; features have `features` values, samples `channels`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(
        store: &TensorStore,
        config: &XvlaConfig,
        domain: u32,
        features: usize,
        channels: usize,
    ) -> std::result::Result<Self, ModelError> {
        let width = config.hidden_size;
        let inputs = channels + config.state_width() + config.dim_time;
        let of_domain = |name: &str, sizes| domain_linear(store, name, sizes, config, domain);
        let projection = |name: &str| {
            if config.use_hetero_proj {
                of_domain(name, (features, width))
            } else {
                Linear::load(store, name, features, width, true)
            }
        };
        let prompts = match config.len_soft_prompts {
            0 => None,
            count => {
                let name = "head.soft_prompt_hub.weight";
                let table = store.get(name, &[config.num_domains, count * width])?;
                Some(table.rows(&[domain])?.reshaped(count, width)?)
            }
        };
        let positions = store.matrix("head.pos_emb", &[1, config.max_len_seq, width])?;
        let block = |i: usize| {
            let name = |part: &str| format!("head.blocks.{i}.{part}");
            let linear = |part: &str, inputs, outputs| {
                Linear::load(store, &name(part), inputs, outputs, true)
            };
            let inner = config.mlp_width();
            Ok::<_, ModelError>(Block {
                norm1: LayerNorm::load(store, &name("norm1"), width, EPS)?,
                qkv: linear("attn.qkv", width, 3 * width)?,
                out: linear("attn.proj", width, width)?,
                norm2: LayerNorm::load(store, &name("norm2"), width, EPS)?,
                fc1: linear("mlp.fc1", width, inner)?,
                fc2: linear("mlp.fc2", inner, width)?,
            })
        };
        Ok(Self {
            heads: config.num_heads,
            time_width: config.dim_time,
            horizon: config.chunk_size,
            action_in: of_domain("head.action_encoder", (inputs, width))?,
            action_out: of_domain("head.action_decoder", (width, channels))?,
            features_in: projection("head.vlm_proj")?,
            views_in: projection("head.aux_visual_proj")?,
            positions,
            prompts,
            blocks: (0..config.depth).map(block).collect::<std::result::Result<_, _>>()?,
            norm: LayerNorm::load(store, "head.norm", width, EPS)?,
        })
    }

    /// What the denoise steps share: `features` (`[L, D]`) and the further cameras' tokens `views` (`[L', D]`).
    ///
    /// # Errors
    /// When the sequence is longer than the learned positions.
    pub fn prepare(&self, features: &Matrix, views: Option<&Matrix>) -> Result<HeadCache> {
        let length = features.rows() + views.map_or(0, Matrix::rows);
        let most = self.positions.rows();
        if self.horizon + length > most {
            let total = self.horizon + length;
            bail!("the transformer gets {total} tokens, max_len_seq is {most}");
        }
        let mut first = self.horizon;
        let mut placed = |linear: &Linear, x: &Matrix| {
            let positions = self.positions.part(first..first + x.rows())?;
            first += x.rows();
            linear.forward_add(x, &positions)
        };
        let features = placed(&self.features_in, features)?;
        let views = views.map(|views| placed(&self.views_in, views)).transpose()?;
        let parts = [Some(&features), views.as_ref(), self.prompts.as_ref()];
        let context = Matrix::stacked(parts.into_iter().flatten(), self.positions.width())?;
        Ok(HeadCache { context })
    }

    /// The residual branches, in the order in which they run.
    pub fn blocks(&self) -> Vec<Branch> {
        let kinds = [BlockKind::Attention, BlockKind::FeedForward];
        let layers = 0..self.blocks.len();
        layers.flat_map(|layer| kinds.map(|kind| Branch::new(kind, layer))).collect()
    }

    /// The clean actions (`[H, M]`) that the sample `x` (`[H, M]`) at flow time `t` comes from; `state` is padded. Of the
    /// residual branches what `branches` says is computed.
    ///
    /// # Errors
    /// When `x` is not `[H, M]`.
    pub fn predict(
        &self,
        cache: &HeadCache,
        x: &Matrix,
        state: &[f32],
        t: f64,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        let rows = x.rows();
        let mut shared = Matrix::unwritten(1, state.len() + self.time_width);
        let (known, time) = shared.values_mut().split_at_mut(state.len());
        known.copy_from_slice(state);
        time_embedding(t, time);
        let inputs = Matrix::beside(&[x, &shared])?;
        let actions = self.action_in.forward_add(&inputs, &self.positions.part(0..rows)?)?;
        let both = [&actions, &cache.context];
        let mut h = Matrix::stacked(both.into_iter(), self.positions.width())?;
        for (i, block) in self.blocks.iter().enumerate() {
            h = branches.add(2 * i, h, |h| self.attention(block, h))?;
            h = branches.add(2 * i + 1, h, |h| {
                let x = block.norm2.forward(h)?;
                block.fc2.forward(&block.fc1.forward_with(&x, Activation::Gelu)?)
            })?;
        }
        self.action_out.forward(&self.norm.forward(&h.part(0..rows)?)?)
    }

    fn attention(&self, block: &Block, h: &Matrix) -> Result<Matrix> {
        let (width, heads) = (h.width(), (self.heads, self.heads));
        let packed = block.qkv.forward(&block.norm1.forward(h)?)?;
        let part = |index: usize| packed.columns(index * width..(index + 1) * width);
        let (keys, values, compute) = ([part(1)], [part(2)], block.qkv.compute());
        let attended = attend(&part(0), &keys, &values, heads, Visible::All, compute)?;
        block.out.forward(&attended)
    }
}
