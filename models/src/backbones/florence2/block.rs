//! A DaViT block: first places mix inside windows, then channels mix inside groups.

use candle_core::Result;

use super::EPS;
use super::arrange::{Windows, turned};
use super::config::VisionConfig;
use super::convolution::{Depthwise, Grid};
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Visible, attend, attend_into};

/// What attends to what in one half of a block.
#[derive(Debug, Clone, Copy)]
enum Mixing {
    /// Places inside squares of side `window`.
    Places { window: usize, heads: usize },
    /// Channels inside `groups` groups.
    Channels { groups: usize },
}

/// Convolution, attention, convolution, MLP; each added to its input.
struct Half {
    mixing: Mixing,
    conv1: Depthwise,
    norm1: LayerNorm,
    qkv: Linear,
    out: Linear,
    conv2: Depthwise,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// One block of a stage.
pub(super) struct Block([Half; 2]);

impl Block {
    /// The block named `name` of stage `stage`.
    pub fn load(
        store: &TensorStore,
        name: &str,
        config: &VisionConfig,
        stage: usize,
    ) -> std::result::Result<Self, ModelError> {
        let places = Mixing::Places { window: config.window_size, heads: config.num_heads[stage] };
        let channels = Mixing::Channels { groups: config.num_groups[stage] };
        let half = |part: &str, attention: &str, mixing| {
            let (width, inner) = (config.embed_dim[stage], config.mlp_width(stage));
            let name = |layer: &str| format!("{name}.{part}.{layer}");
            let attention = |layer: &str| name(&format!("{attention}.{layer}"));
            let norm = |layer: &str| LayerNorm::load(store, &name(layer), width, EPS);
            let bias = config.qkv_bias;
            Ok::<_, ModelError>(Half {
                mixing,
                conv1: Depthwise::load(store, &name("conv1"), width)?,
                norm1: norm("norm1")?,
                qkv: Linear::load(store, &attention("qkv"), width, 3 * width, bias)?,
                out: Linear::load(store, &attention("proj"), width, width, true)?,
                conv2: Depthwise::load(store, &name("conv2"), width)?,
                norm2: norm("norm2")?,
                fc1: Linear::load(store, &name("ffn.fc1"), width, inner, true)?,
                fc2: Linear::load(store, &name("ffn.fc2"), inner, width, true)?,
            })
        };
        Ok(Self([
            half("spatial_block", "window_attn", places)?,
            half("channel_block", "channel_attn", channels)?,
        ]))
    }

    /// `x` (`[h·w, C]`) through both halves.
    pub fn forward(&self, x: Matrix, grid: Grid) -> Result<Matrix> {
        self.0.iter().try_fold(x, |x, half| half.forward(&x, grid))
    }
}

impl Half {
    fn forward(&self, x: &Matrix, grid: Grid) -> Result<Matrix> {
        let x = self.conv1.add_to(x, grid)?;
        let mixed = self.attend(&self.norm1.forward(&x)?, grid)?;
        let x = self.conv2.add_to(&self.out.forward_add(&mixed, &x)?, grid)?;
        let inner = self.fc1.forward_with(&self.norm2.forward(&x)?, Activation::GeluErf)?;
        self.fc2.forward_add(&inner, &x)
    }

    fn attend(&self, x: &Matrix, grid: Grid) -> Result<Matrix> {
        match self.mixing {
            Mixing::Places { window, heads } => {
                self.attend_in_windows(x, Windows { grid, side: window }, heads)
            }
            Mixing::Channels { groups } => self.attend_between_channels(x, groups),
        }
    }

    /// Attention inside windows. The map is filled up with zeros at the right and the bottom, and these
    /// places take part, as in training: keys and values of a zero are the biases.
    fn attend_in_windows(&self, x: &Matrix, windows: Windows, heads: usize) -> Result<Matrix> {
        let (places, channels) = (windows.places(), x.width());
        let packed = self.qkv.forward(&windows.split(x))?;
        let mut mixed = Matrix::unwritten(packed.rows(), channels);
        let each = mixed.values_mut().chunks_exact_mut(places * channels);
        for (window, mixed) in each.enumerate() {
            let part = |index: usize| {
                let columns = packed.columns(index * channels..(index + 1) * channels);
                columns.rows_of(window * places..(window + 1) * places)
            };
            attend_into(
                &part(0),
                (&[part(1)], &[part(2)]),
                (heads, heads),
                Visible::All,
                self.qkv.compute(),
                mixed,
            )?;
        }
        Ok(windows.join(&mixed))
    }

    /// Attention between the channels of each group, scaled by `places^−0.5`.
    fn attend_between_channels(&self, x: &Matrix, groups: usize) -> Result<Matrix> {
        let channels = x.width();
        let packed = self.qkv.forward(x)?;
        // `[channels of a group, groups·places]`: what is elsewhere a token is here a channel, and a group a head.
        let part = |index: usize| {
            turned(&packed.columns(index * channels..(index + 1) * channels), groups)
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let (heads, compute) = ((groups, groups), self.qkv.compute());
        let mixed = attend(&q.all(), &[k.all()], &[v.all()], heads, Visible::All, compute)?;
        Ok(turned(&mixed.all(), groups))
    }
}
