//! ResNet-18 and -34 up to the last feature map (He et al. 2015, arXiv 1512.03385).
//!
//! Names and layout are torchvision's `models/resnet.py` (BasicBlock); the widths and the number of blocks are read
//! from the tensors, so narrowed networks load too. Batch norms are in inference mode, which makes LeRobot's frozen
//! and ordinary ones the same; they are folded into the convolutions.

use candle_core::Result;

use super::conv::{conv2d, group_norm};
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{
    Activation, Convolution, GroupNorm, Map, Planes, activate_all, add_all, max_pool,
};

/// How the parts of the network are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `conv1`, `bn1`, `layer1` to `layer4` (ACT).
    Torchvision,
    /// `0`, `1`, `4` to `7`: the places in a list of torchvision's parts (Diffusion Policy).
    Sequential,
}

impl Naming {
    fn stem(self) -> (&'static str, &'static str) {
        match self {
            Self::Torchvision => ("conv1", "bn1"),
            Self::Sequential => ("0", "1"),
        }
    }

    fn stage(self, index: usize) -> String {
        match self {
            Self::Torchvision => format!("layer{}", index + 1),
            Self::Sequential => (index + 4).to_string(),
        }
    }
}

/// What stands after each convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// Batch norm with stored statistics.
    Batch,
    /// Group norm, a group for every 16 channels.
    Group,
}

/// Stages of a ResNet.
const STAGES: usize = 4;

/// No stage has more blocks (ResNet-34 has 6, ResNet-152 36).
const BLOCK_LIMIT: usize = 64;

/// A convolution and its norm.
struct Unit {
    conv: Convolution,
    /// `None` when it is folded into the convolution.
    norm: Option<GroupNorm>,
}

impl Unit {
    /// `x` through convolution and norm, followed by `activation`: a ReLU or nothing.
    fn forward(&self, x: &Map, activation: Activation) -> Result<Map> {
        let Some(norm) = &self.norm else { return self.conv.forward(x, activation) };
        let mut y = self.conv.forward(x, Activation::None)?;
        norm.apply(&mut y.values)?;
        if activation != Activation::None {
            activate_all(activation, &mut y.values);
        }
        Ok(y)
    }

    /// `x` through convolution, norm, a ReLU and a pool.
    fn forward_pooled(&self, x: &Map) -> Result<Map> {
        match self.norm {
            Some(_) => Ok(max_pool(&self.forward(x, Activation::Relu)?)),
            None => self.conv.forward_pooled(x, Activation::Relu),
        }
    }

    /// `x` through convolution and norm; then `residual` is added, and a ReLU follows.
    fn forward_add_relu(&self, x: &Map, residual: &Map) -> Result<Map> {
        if self.norm.is_none() {
            return self.conv.forward_add_relu(x, residual);
        }
        let mut y = self.forward(x, Activation::None)?;
        add_all(&mut y.values, &residual.values)?;
        activate_all(Activation::Relu, &mut y.values);
        Ok(y)
    }
}

struct Block {
    first: Unit,
    second: Unit,
    shortcut: Option<Unit>,
}

/// A residual network from pixels to its last feature map.
pub struct ResNet {
    stem: Unit,
    blocks: Vec<Block>,
    outputs: usize,
}

struct Loader<'a> {
    store: &'a TensorStore,
    prefix: &'a str,
    norm: Norm,
}

impl Loader<'_> {
    /// The convolution `conv` from `inputs` channels, with the norm `norm`.
    fn unit(
        &self,
        (conv, norm): (&str, &str),
        inputs: usize,
        kernel: usize,
        stride: usize,
    ) -> std::result::Result<Unit, ModelError> {
        let (conv, norm) = (format!("{}.{conv}", self.prefix), format!("{}.{norm}", self.prefix));
        let outputs = self.outputs(&conv)?;
        let folded = (self.norm == Norm::Batch).then_some(norm.as_str());
        let conv = conv2d(self.store, &conv, (inputs, outputs), kernel, stride, folded)?;
        let norm = match self.norm {
            Norm::Batch => None,
            Norm::Group => {
                Some(group_norm(self.store, &norm, outputs, outputs / 16, "use_group_norm")?)
            }
        };
        Ok(Unit { conv, norm })
    }

    /// Channels that the convolution `name` makes.
    fn outputs(&self, name: &str) -> std::result::Result<usize, ModelError> {
        let tensor = self.store.find(&format!("{name}.weight"))?;
        match tensor.shape.first() {
            Some(width) if *width > 0 => Ok(*width),
            _ => Err(ModelError::malformed(
                self.store.path(),
                format!("the shape of tensor `{}`", tensor.name),
                format!("{:?}", tensor.shape),
                "a convolution with at least one output channel",
            )),
        }
    }

    fn has(&self, part: &str) -> bool {
        self.store.find(&format!("{}.{part}.weight", self.prefix)).is_ok()
    }

    fn block(
        &self,
        name: &str,
        inputs: usize,
        stride: usize,
    ) -> std::result::Result<Block, ModelError> {
        if self.has(&format!("{name}.conv3")) {
            let reason = "is a ResNet with bottleneck blocks (50 layers and more); resnet18 and \
                          resnet34 are supported";
            return Err(ModelError::config(self.store.path(), "vision_backbone", reason));
        }
        let part = |part: &str| format!("{name}.{part}");
        let first = self.unit((&part("conv1"), &part("bn1")), inputs, 3, stride)?;
        let width = first.conv.outputs();
        let second = self.unit((&part("conv2"), &part("bn2")), width, 3, 1)?;
        let down = (part("downsample.0"), part("downsample.1"));
        let needed = stride != 1 || inputs != second.conv.outputs();
        let shortcut = match needed || self.has(&down.0) {
            true => Some(self.unit((&down.0, &down.1), inputs, 1, stride)?),
            false => None,
        };
        Ok(Block { first, second, shortcut })
    }
}

impl ResNet {
    /// The network whose tensors lie under `prefix`.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that is missing or does not fit.
    pub fn load(
        store: &TensorStore,
        prefix: &str,
        naming: Naming,
        norm: Norm,
    ) -> std::result::Result<Self, ModelError> {
        let loader = Loader { store, prefix, norm };
        let stem = loader.unit(naming.stem(), 3, 7, 2)?;
        let mut outputs = stem.conv.outputs();
        let mut blocks = Vec::new();
        for stage in 0..STAGES {
            let name = naming.stage(stage);
            for index in 0..BLOCK_LIMIT {
                if index > 0 && !loader.has(&format!("{name}.{index}.conv1")) {
                    break;
                }
                let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                let block = loader.block(&format!("{name}.{index}"), outputs, stride)?;
                outputs = block.second.conv.outputs();
                blocks.push(block);
            }
        }
        Ok(Self { stem, blocks, outputs })
    }

    /// Channels of the feature map.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `pixels` (three planes) as a feature map a 32nd as high and wide, rounded up.
    ///
    /// # Errors
    /// When `pixels` has no three planes.
    pub fn forward(&self, pixels: &Planes) -> Result<Map> {
        let mut x = self.stem.forward_pooled(&Map::of_planes(pixels))?;
        for block in &self.blocks {
            let y = block.first.forward(&x, Activation::Relu)?;
            x = match &block.shortcut {
                Some(unit) => {
                    let shortcut = unit.forward(&x, Activation::None)?;
                    block.second.forward_add_relu(&y, &shortcut)?
                }
                None => block.second.forward_add_relu(&y, &x)?,
            };
        }
        Ok(x)
    }
}
