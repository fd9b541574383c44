//! A DaViT block: first places mix inside windows, then channels mix inside groups.

use candle_core::{Result, Tensor};

use super::config::VisionConfig;
use super::convolution::{Depthwise, Grid};
use super::{EPS, packed_heads};
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Visible, add, attend};

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
    pub fn forward(&self, x: Tensor, grid: Grid) -> Result<Tensor> {
        self.0.iter().try_fold(x, |x, half| half.forward(&x, grid))
    }
}

impl Half {
    fn forward(&self, x: &Tensor, grid: Grid) -> Result<Tensor> {
        let x = self.conv1.add_to(x, grid)?;
        let x = add(self.attend(&self.norm1.forward(&x)?, grid)?, &x)?;
        let x = self.conv2.add_to(&x, grid)?;
        let inner = self.fc1.forward_with(&self.norm2.forward(&x)?, Activation::GeluErf)?;
        add(self.fc2.forward(&inner)?, &x)
    }

    fn attend(&self, x: &Tensor, grid: Grid) -> Result<Tensor> {
        match self.mixing {
            Mixing::Places { window, heads } => self.attend_in_windows(x, grid, window, heads),
            Mixing::Channels { groups } => self.attend_between_channels(x, groups),
        }
    }

    /// Attention inside windows. The map is filled up with zeros at the right and the bottom, and these
    /// places take part, as in training: keys and values of a zero are the biases.
    fn attend_in_windows(
        &self,
        x: &Tensor,
        (height, width): Grid,
        window: usize,
        heads: usize,
    ) -> Result<Tensor> {
        let channels = x.dim(1)?;
        let (full_height, full_width) =
            (height.next_multiple_of(window), width.next_multiple_of(window));
        let (down, across) = (full_height / window, full_width / window);
        let (windows, places) = (down * across, window * window);
        let x = x
            .reshape((height, width, channels))?
            .pad_with_zeros(0, 0, full_height - height)?
            .pad_with_zeros(1, 0, full_width - width)?
            .reshape((down, window, across, window, channels))?
            .permute((0, 2, 1, 3, 4))?
            .contiguous()?
            .reshape((windows * places, channels))?;
        let packed =
            self.qkv.forward(&x)?.reshape((windows, places, 3, heads, channels / heads))?;
        let part = |index: usize| {
            packed.narrow(2, index, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous()?.reshape((
                windows * heads,
                places,
                channels / heads,
            ))
        };
        // Rows of the result are places, each holding that place of all windows.
        let mixed = attend(&part(0)?, &part(1)?, &part(2)?, Visible::All, self.qkv.compute())?
            .reshape((places, windows, channels))?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((windows * places, channels))?;
        self.out
            .forward(&mixed)?
            .reshape((down, across, window, window, channels))?
            .permute((0, 2, 1, 3, 4))?
            .contiguous()?
            .reshape((full_height, full_width, channels))?
            .narrow(0, 0, height)?
            .narrow(1, 0, width)?
            .contiguous()?
            .reshape((height * width, channels))
    }

    /// Attention between the channels of each group, scaled by `places^−0.5`.
    fn attend_between_channels(&self, x: &Tensor, groups: usize) -> Result<Tensor> {
        let (places, channels) = x.dims2()?;
        let packed = self.qkv.forward(x)?;
        // `[groups, channels of a group, places]`: what is elsewhere a token is here a channel.
        let part = |index| packed_heads(&packed, index, groups)?.transpose(1, 2)?.contiguous();
        let mixed = attend(&part(0)?, &part(1)?, &part(2)?, Visible::All, self.qkv.compute())?
            .reshape((channels / groups, groups, places))?
            .permute((2, 1, 0))?
            .contiguous()?
            .reshape((places, channels))?;
        self.out.forward(&mixed)
    }
}
