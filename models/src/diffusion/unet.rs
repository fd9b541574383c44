//! The U-Net over time that denoises a chunk of actions.
//!
//! Every residual block is modulated by the condition (FiLM, Perez et al. 2018, arXiv 1709.07871), which is the
//! embedded training step followed by the global condition.

use candle_core::Result;

use super::config::DiffusionConfig;
use crate::ModelError;
use crate::backbones::conv::{Conv1d, group_norm};
use crate::caches::{Block, BlockKind, Branches};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, GroupNorm, Linear, Matrix, activate_all, add_all, multiply_all};

type Loaded<T> = std::result::Result<T, ModelError>;

/// Groups of the norm before the last convolution, whatever the configuration says of the others.
const LAST_GROUPS: usize = 8;

/// Convolution, group norm, Mish.
struct ConvBlock {
    conv: Conv1d,
    norm: GroupNorm,
}

impl ConvBlock {
    fn load(
        store: &TensorStore,
        name: &str,
        channels: (usize, usize),
        kernel: usize,
        groups: usize,
    ) -> Loaded<Self> {
        let norm = format!("{name}.block.1");
        Ok(Self {
            conv: Conv1d::load(store, &format!("{name}.block.0"), channels, kernel, 1)?,
            norm: group_norm(store, &norm, channels.1, groups, "n_groups")?,
        })
    }

    fn forward(&self, x: &Matrix) -> Result<Matrix> {
        let mut y = self.conv.forward(x)?;
        self.norm.apply(&mut y)?;
        activate_all(Activation::Mish, &mut y);
        Ok(y)
    }
}

struct ResidualBlock {
    first: ConvBlock,
    /// From the condition to scale and shift, or to the shift alone.
    film: Linear,
    second: ConvBlock,
    shortcut: Option<Conv1d>,
    channels: usize,
}

/// What every residual block of one evaluation shares: the condition, and what computes the branches.
struct Pass<'a> {
    condition: Matrix,
    branches: &'a mut Branches,
    /// Residual blocks that are behind.
    done: usize,
}

impl Pass<'_> {
    /// `x` through `block`, which is the next.
    fn through(&mut self, block: &ResidualBlock, x: Matrix) -> Result<Matrix> {
        let (index, condition) = (self.done, &self.condition);
        self.done += 1;
        let Some(shortcut) = &block.shortcut else {
            return self.branches.add(index, x, |x| block.branch(x, condition));
        };
        let straight = shortcut.forward(&x)?;
        self.branches.add(index, straight, |_| block.branch(&x, condition))
    }
}

impl ResidualBlock {
    /// What is added to the shortcut.
    fn branch(&self, x: &Matrix, condition: &Matrix) -> Result<Matrix> {
        let mut y = self.first.forward(x)?;
        // [1, out] or [1, 2·out].
        let film = self.film.forward(condition)?;
        if film.width() == self.channels {
            add_all(&mut y, &film)?;
        } else {
            let (scale, shift) = film.values().split_at(self.channels);
            multiply_all(&mut y, &Matrix::of_row(scale))?;
            add_all(&mut y, &Matrix::of_row(shift))?;
        }
        self.second.forward(&y)
    }
}

/// Two residual blocks, and the convolution that changes the length after them.
struct Level {
    blocks: [ResidualBlock; 2],
    resample: Option<Conv1d>,
}

impl Level {
    fn forward(&self, x: Matrix, pass: &mut Pass<'_>) -> Result<Matrix> {
        let x = pass.through(&self.blocks[0], x)?;
        pass.through(&self.blocks[1], x)
    }
}

/// A conditional U-Net over sequences of actions.
pub struct Unet {
    step_width: usize,
    /// Timesteps that it is told: one, or one for each action.
    timesteps: usize,
    step_in: Linear,
    step_out: Linear,
    down: Vec<Level>,
    middle: [ResidualBlock; 2],
    up: Vec<Level>,
    last: ConvBlock,
    out: Conv1d,
}

struct Loader<'a> {
    store: &'a TensorStore,
    config: &'a DiffusionConfig,
    condition: usize,
}

impl Loader<'_> {
    fn block(&self, name: &str, inputs: usize, outputs: usize) -> Loaded<ResidualBlock> {
        let (kernel, groups) = (self.config.kernel_size, self.config.n_groups);
        let part = |part: &str| format!("unet.{name}.{part}");
        let conv = |conv: &str, inputs| {
            ConvBlock::load(self.store, &part(conv), (inputs, outputs), kernel, groups)
        };
        let scales = usize::from(self.config.use_film_scale_modulation);
        let modulated = outputs * (1 + scales);
        let film =
            Linear::load(self.store, &part("cond_encoder.1"), self.condition, modulated, true)?;
        let shortcut = match inputs == outputs {
            true => None,
            false => {
                let name = part("residual_conv");
                Some(Conv1d::load(self.store, &name, (inputs, outputs), 1, 1)?)
            }
        };
        Ok(ResidualBlock {
            first: conv("conv1", inputs)?,
            film,
            second: conv("conv2", outputs)?,
            shortcut,
            channels: outputs,
        })
    }

    fn pair(&self, name: &str, inputs: usize, outputs: usize) -> Loaded<[ResidualBlock; 2]> {
        Ok([
            self.block(&format!("{name}.0"), inputs, outputs)?,
            self.block(&format!("{name}.1"), outputs, outputs)?,
        ])
    }
}

impl Unet {
    /// The network whose tensors lie under `unet`, for a global condition of `global` values.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn load(
        store: &TensorStore,
        config: &DiffusionConfig,
        action_dim: usize,
        global: usize,
    ) -> Loaded<Self> {
        let (step, levels) = (config.diffusion_step_embed_dim, &config.down_dims);
        let loader = Loader { store, config, condition: step + global };
        let linear = |name: &str, inputs, outputs| Linear::load(store, name, inputs, outputs, true);
        let mut down = Vec::new();
        let mut inputs = action_dim;
        for (i, outputs) in levels.iter().copied().enumerate() {
            let name = format!("down_modules.{i}");
            let resample = match i + 1 == levels.len() {
                true => None,
                false => {
                    let name = format!("unet.{name}.2");
                    Some(Conv1d::load(store, &name, (outputs, outputs), 3, 2)?)
                }
            };
            down.push(Level { blocks: loader.pair(&name, inputs, outputs)?, resample });
            inputs = outputs;
        }
        let middle = loader.pair("mid_modules", inputs, inputs)?;
        let mut up = Vec::new();
        for (i, outputs) in levels.iter().rev().skip(1).copied().enumerate() {
            let name = format!("up_modules.{i}");
            let resample = Conv1d::load_doubling(store, &format!("unet.{name}.2"), outputs)?;
            let blocks = loader.pair(&name, 2 * inputs, outputs)?;
            up.push(Level { blocks, resample: Some(resample) });
            inputs = outputs;
        }
        let kernel = config.kernel_size;
        let timesteps = if config.per_element_timesteps { config.horizon } else { 1 };
        Ok(Self {
            step_width: step,
            timesteps,
            step_in: linear("unet.diffusion_step_encoder.1", timesteps * step, 4 * step)?,
            step_out: linear("unet.diffusion_step_encoder.3", 4 * step, step)?,
            down,
            middle,
            up,
            last: ConvBlock::load(
                store,
                "unet.final_conv.0",
                (inputs, inputs),
                kernel,
                LAST_GROUPS,
            )?,
            out: Conv1d::load(store, "unet.final_conv.1", (inputs, action_dim), 1, 1)?,
        })
    }

    /// The residual branches, in the order in which they run.
    pub fn blocks(&self) -> Vec<Block> {
        let count = 2 * (self.down.len() + self.up.len()) + self.middle.len();
        (0..count).map(|layer| Block::new(BlockKind::Convolution, layer)).collect()
    }

    /// What the network says of the sample `x` (`[H, A]`) at the training steps `times`: one for all actions or, where it
    /// was trained so, one for each; given the global condition `[1, G]`, with what `branches` computes of its residual
    /// blocks.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        x: &Matrix,
        times: &[usize],
        global: &Matrix,
        branches: &mut Branches,
    ) -> Result<Matrix> {
        if times.len() != 1 && times.len() != self.timesteps {
            candle_core::bail!("{} timesteps for a network of {}", times.len(), self.timesteps);
        }
        let all = times.iter().copied().cycle().take(self.timesteps);
        let step = step_embeddings(all, self.timesteps, self.step_width);
        // Side by side, as one row.
        let step = step.reshaped(1, self.timesteps * self.step_width)?;
        let step = self.step_out.forward(&self.step_in.forward_with(&step, Activation::Mish)?)?;
        let mut condition = Matrix::beside(&[&step, global])?;
        activate_all(Activation::Mish, &mut condition);
        let mut pass = Pass { condition, branches, done: 0 };
        let x = self.levels(0, x.clone(), &mut pass)?;
        self.out.forward(&self.last.forward(&x)?)
    }

    /// `x` down from level `depth`, through the middle and up to it again.
    fn levels(&self, depth: usize, x: Matrix, pass: &mut Pass<'_>) -> Result<Matrix> {
        let Some(level) = self.down.get(depth) else {
            return self.middle.iter().try_fold(x, |x, block| pass.through(block, x));
        };
        let skip = level.forward(x, pass)?;
        let below = match &level.resample {
            Some(halve) => halve.forward(&skip)?,
            None => skip.clone(),
        };
        let x = self.levels(depth + 1, below, pass)?;
        // The finest level's skip is never used.
        let up = if depth == 0 { None } else { self.up.get(self.down.len() - 1 - depth) };
        let Some(up) = up else { return Ok(x) };
        let x = up.forward(Matrix::beside(&[&x, &skip])?, pass)?;
        match &up.resample {
            Some(double) => double.forward(&x),
            None => Ok(x),
        }
    }
}

/// `count` training steps as sines and cosines, `[count, width]`, in single precision as in training; `width` is even.
pub(super) fn step_embeddings(
    times: impl Iterator<Item = usize>,
    count: usize,
    width: usize,
) -> Matrix {
    let half = width / 2;
    let rate = (10_000f64.ln() / (half.max(2) - 1) as f64) as f32;
    let mut rows = Matrix::unwritten(count, 2 * half);
    for (row, t) in rows.values_mut().chunks_exact_mut((2 * half).max(1)).zip(times) {
        let (sines, cosines) = row.split_at_mut(half);
        for (i, (sine, cosine)) in sines.iter_mut().zip(cosines).enumerate() {
            (*sine, *cosine) = (t as f32 * (-rate * i as f32).exp()).sin_cos();
        }
    }
    rows
}
