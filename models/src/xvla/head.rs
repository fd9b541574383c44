//! The soft-prompted transformer: actions, features of the encoder, tokens of the further cameras and learned
//! prompts attend to each other; the result is read off the actions.

use candle_core::{Device, Result, Tensor, bail};

use super::config::XvlaConfig;
use crate::ModelError;
use crate::backbones::florence2::packed_heads;
use crate::caches::{Block as Branch, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Visible, add, attend};

/// Added to the variance in every norm.
const EPS: f64 = 1e-5;

/// Longest period of the time embedding, in units of 2π.
const MAX_PERIOD: f64 = 100.0;

/// Embedding of flow time `t`: `width / 2` cosines, then as many sines; an odd width ends in a zero.
pub fn time_embedding(t: f64, width: usize) -> Vec<f32> {
    let half = width / 2;
    let angle = |i: usize| t * MAX_PERIOD.powf(-(i as f64) / half as f64);
    let cosines = (0..half).map(|i| angle(i).cos() as f32);
    let mut out: Vec<f32> = cosines.chain((0..half).map(|i| angle(i).sin() as f32)).collect();
    out.resize(width, 0.0);
    out
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
    let turned = row("fc", inputs * outputs)?.reshape((inputs, outputs))?.t()?.contiguous()?;
    let bias = row("bias", outputs)?.flatten_all()?.to_vec1()?;
    let weight = turned.flatten_all()?.to_vec1()?;
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
    context: Tensor,
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
    positions: Tensor,
    /// `[prompts, W]`
    prompts: Option<Tensor>,
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
                Some(table.rows(&[domain])?.reshape((count, width))?)
            }
        };
        let positions = store.tensor("head.pos_emb", &[1, config.max_len_seq, width])?;
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
            positions: positions.squeeze(0)?,
            prompts,
            blocks: (0..config.depth).map(block).collect::<std::result::Result<_, _>>()?,
            norm: LayerNorm::load(store, "head.norm", width, EPS)?,
        })
    }

    /// What the denoise steps share: `features` (`[L, D]`) and the further cameras' tokens `views` (`[L', D]`).
    ///
    /// # Errors
    /// When the sequence is longer than the learned positions.
    pub fn prepare(&self, features: &Tensor, views: Option<&Tensor>) -> Result<HeadCache> {
        let mut parts = vec![self.features_in.forward(features)?];
        if let Some(views) = views {
            parts.push(self.views_in.forward(views)?);
        }
        let context = Tensor::cat(&parts, 0)?;
        let (length, most) = (context.dim(0)?, self.positions.dim(0)?);
        if self.horizon + length > most {
            let total = self.horizon + length;
            bail!("the transformer gets {total} tokens, max_len_seq is {most}");
        }
        let mut context = (context + self.positions.narrow(0, self.horizon, length)?)?;
        if let Some(prompts) = &self.prompts {
            context = Tensor::cat(&[&context, prompts], 0)?;
        }
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
        x: &Tensor,
        state: &[f32],
        t: f64,
        branches: &mut Branches,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let mut shared = state.to_vec();
        shared.extend(time_embedding(t, self.time_width));
        let width = shared.len();
        let shared = Tensor::from_vec(shared, (1, width), &Device::Cpu)?;
        let inputs = Tensor::cat(&[x, &shared.broadcast_as((rows, width))?.contiguous()?], 1)?;
        let actions = add(self.action_in.forward(&inputs)?, &self.positions.narrow(0, 0, rows)?)?;
        let mut h = Tensor::cat(&[&actions, &cache.context], 0)?;
        for (i, block) in self.blocks.iter().enumerate() {
            h = branches.add(2 * i, &h, || self.attention(block, &h))?;
            h = branches.add(2 * i + 1, &h, || {
                let x = block.norm2.forward(&h)?;
                block.fc2.forward(&block.fc1.forward_with(&x, Activation::Gelu)?)
            })?;
        }
        self.action_out.forward(&self.norm.forward(&h.narrow(0, 0, rows)?)?)
    }

    fn attention(&self, block: &Block, h: &Tensor) -> Result<Tensor> {
        let packed = block.qkv.forward(&block.norm1.forward(h)?)?;
        let part = |index| packed_heads(&packed, index, self.heads);
        let attended = attend(&part(0)?, &part(1)?, &part(2)?, Visible::All, block.qkv.compute())?;
        block.out.forward(&attended)
    }
}
