//! The vision tower (SigLIP kind) and the connector to the text model.

use candle_core::{Device, Result, Tensor};

use super::VlmConfig;
use super::split_heads;
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Visible, add, attend};

/// What one image became.
#[derive(Debug, Clone)]
pub struct VisionFeatures {
    /// The tower's output after its last norm, `[patches, Dv]`.
    pub last_hidden: Tensor,
    /// Tokens for the text model, `[tokens, D]`, not scaled.
    pub tokens: Tensor,
}

struct Layer {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// Scale and shift by the instruction, from its mean embedding.
    film: Option<(Linear, Linear)>,
}

/// Vision tower and connector.
pub(super) struct Vision {
    patch: usize,
    heads: usize,
    /// Side of the grid that the position table was trained for (patches).
    side: usize,
    scale: usize,
    patches: Linear,
    /// `[side², Dv]`, row by row.
    positions: Tensor,
    layers: Vec<Layer>,
    post_norm: LayerNorm,
    connector: Linear,
}

impl Vision {
    /// Tower and connector; `film`: layers that the instruction scales and shifts.
    pub fn load(
        store: &TensorStore,
        config: &VlmConfig,
        film: bool,
    ) -> std::result::Result<Self, ModelError> {
        let v = &config.vision_config;
        let words = config.text_config.hidden_size;
        let (width, eps) = (v.hidden_size, v.layer_norm_eps);
        let side = v.image_size / v.patch_size;
        let layers = (0..v.num_hidden_layers)
            .map(|i| {
                let name = |part: &str| format!("vision.layers.{i}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, true)
                };
                Ok(Layer {
                    norm1: LayerNorm::load(store, &name("layer_norm1"), width, eps)?,
                    q: linear("self_attn.q_proj", width, width)?,
                    k: linear("self_attn.k_proj", width, width)?,
                    v: linear("self_attn.v_proj", width, width)?,
                    out: linear("self_attn.out_proj", width, width)?,
                    norm2: LayerNorm::load(store, &name("layer_norm2"), width, eps)?,
                    fc1: linear("mlp.fc1", width, v.intermediate_size)?,
                    fc2: linear("mlp.fc2", v.intermediate_size, width)?,
                    film: if film {
                        Some((
                            linear("film.scale", words, width)?,
                            linear("film.shift", words, width)?,
                        ))
                    } else {
                        None
                    },
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        let patch = v.patch_size;
        let merged = width * config.scale_factor * config.scale_factor;
        Ok(Self {
            patch,
            heads: v.num_attention_heads,
            side,
            scale: config.scale_factor,
            patches: Linear::load_shaped(
                store,
                "vision.embeddings.patch_embedding",
                &[width, 3, patch, patch],
                true,
            )?,
            positions: store
                .tensor("vision.embeddings.position_embedding.weight", &[side * side, width])?,
            layers,
            post_norm: LayerNorm::load(store, "vision.post_layernorm", width, eps)?,
            connector: Linear::load(
                store,
                "connector",
                merged,
                config.text_config.hidden_size,
                false,
            )?,
        })
    }

    /// Pixels that a side must be a multiple of.
    pub fn granularity(&self) -> usize {
        self.patch * self.scale
    }

    /// `pixels` (`[3, height, width]`, in [−1, 1]) through tower and connector; `words` (`[1, D]`) is the
    /// instruction's mean embedding for layers that it scales and shifts.
    pub fn forward(&self, pixels: &Tensor, words: Option<&Tensor>) -> Result<VisionFeatures> {
        let (_, height, width) = pixels.dims3()?;
        if !height.is_multiple_of(self.granularity()) || !width.is_multiple_of(self.granularity()) {
            candle_core::bail!(
                "an image of {width} x {height} pixels cannot be cut into squares of {}",
                self.granularity()
            );
        }
        let (rows, columns) = (height / self.patch, width / self.patch);
        let patches = self.cut(pixels, rows, columns)?;
        let mut h = add(self.patches.forward(&patches)?, &self.position_rows(rows, columns)?)?;
        for layer in &self.layers {
            h = self.layer(layer, h, words)?;
        }
        let last_hidden = self.post_norm.forward(&h)?;
        let tokens = self.connector.forward(&self.merge(&last_hidden, rows, columns)?)?;
        Ok(VisionFeatures { last_hidden, tokens })
    }

    /// Patches, row by row: `[rows·columns, 3·patch²]`, in the order of the convolution's weights.
    fn cut(&self, pixels: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let p = self.patch;
        pixels
            .reshape((3, rows, p, columns, p))?
            .permute((1, 3, 0, 2, 4))?
            .contiguous()?
            .reshape((rows * columns, 3 * p * p))
    }

    /// Rows of the position table. A grid of another size takes the trained position at the same
    /// fraction of the side.
    fn position_rows(&self, rows: usize, columns: usize) -> Result<Tensor> {
        if rows == self.side && columns == self.side {
            return Ok(self.positions.clone());
        }
        let side = self.side;
        let index: Vec<u32> = (0..rows)
            .flat_map(|r| {
                (0..columns).map(move |c| (r * side / rows * side + c * side / columns) as u32)
            })
            .collect();
        self.positions.index_select(&Tensor::from_vec(index, rows * columns, &Device::Cpu)?, 0)
    }

    fn layer(&self, layer: &Layer, h: Tensor, words: Option<&Tensor>) -> Result<Tensor> {
        let x = layer.norm1.forward(&h)?;
        let split = |linear: &Linear| split_heads(&linear.forward(&x)?, self.heads);
        let attended =
            attend(&split(&layer.q)?, &split(&layer.k)?, &split(&layer.v)?, Visible::All)?;
        let mut h = add(layer.out.forward(&attended)?, &h)?;
        if let (Some((scale, shift)), Some(words)) = (&layer.film, words) {
            let scale = (scale.forward(words)? + 1.0)?;
            h = h.broadcast_mul(&scale)?.broadcast_add(&shift.forward(words)?)?;
        }
        let x = layer.norm2.forward(&h)?;
        let x = layer.fc1.forward_with(&x, Activation::Gelu)?;
        add(layer.fc2.forward(&x)?, &h)
    }

    /// Squares of `scale × scale` patches side by side: `[tokens, scale²·Dv]`.
    fn merge(&self, h: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let (s, width) = (self.scale, h.dim(1)?);
        h.reshape((rows / s, s, columns / s, s, width))?
            .permute((0, 2, 1, 3, 4))?
            .contiguous()?
            .reshape((rows / s * (columns / s), s * s * width))
    }
}
