//! SigLIP: a vision transformer whose every patch becomes one token.
//!
//! Source: transformers `models/siglip/modeling_siglip.py` (and `smolvlm`, whose tower is the same).

use candle_core::{Device, Result, Tensor};
use serde::Deserialize;

use crate::ModelError;
use crate::caches::{LayerRows, pick};
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, LayerNorm, Linear, Visible, add, attend_rows};

/// Sizes of the tower.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SiglipConfig {
    /// Hidden size.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Side of the images that the position table was trained for (pixels).
    pub image_size: usize,
    /// Side of a patch (pixels).
    pub patch_size: usize,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        // transformers' SmolVLMVisionConfig.
        Self {
            hidden_size: 1152,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 32,
            layer_norm_eps: 1e-6,
        }
    }
}

struct Layer {
    norm1: LayerNorm,
    /// Queries, keys and values side by side.
    qkv: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// Scale and shift by the instruction, from its mean embedding.
    film: Option<(Linear, Linear)>,
}

/// What is kept of one picture: keys and values of every layer, and the tower's output.
#[derive(Debug, Clone, Default)]
pub struct TowerRows {
    layers: Vec<LayerRows>,
    /// `[patches, D]` after the last norm.
    hidden: Vec<f32>,
}

/// What to compute of a picture whose last state is kept.
enum Keep<'a> {
    /// Nothing is kept.
    Nothing,
    /// Everything is computed, and kept.
    All(&'a mut TowerRows),
    /// These patches, rising, are computed; of the others what is kept counts.
    Rows(&'a mut TowerRows, &'a [usize]),
}

/// All keys and values, `[patches, D]` each: those in `qkv` (`[L, 3·D]`), which are kept, and those kept of the patches that
/// are not among its `rows`.
fn kept_rows(
    qkv: &Tensor,
    width: usize,
    kept: &mut LayerRows,
    rows: Option<&[usize]>,
) -> Result<(Tensor, Tensor)> {
    // As of one head: a row is a row.
    let part = |index: usize| qkv.narrow(1, index * width, width)?.contiguous()?.unsqueeze(0);
    let (keys, values) = (part(1)?, part(2)?);
    match rows {
        None => *kept = LayerRows::whole(&keys, &values)?,
        Some(rows) => kept.put(rows, &keys, &values)?,
    }
    let (keys, values) = kept.tensors()?;
    Ok((keys.squeeze(0)?, values.squeeze(0)?))
}

/// The vision tower.
pub struct Siglip {
    patch: usize,
    heads: usize,
    /// Side of the grid that the position table was trained for (patches).
    side: usize,
    patches: Linear,
    /// `[side², D]`, row by row.
    positions: Tensor,
    layers: Vec<Layer>,
    post_norm: LayerNorm,
}

impl TowerRows {
    /// The tower's output, `[patches, D]` row by row.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}

impl Siglip {
    /// The tower whose tensors are named `vision.…`; with `film`, the width of an embedding that scales and shifts
    /// its layers.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor that does not fit.
    pub fn load(
        store: &TensorStore,
        config: &SiglipConfig,
        film: Option<usize>,
    ) -> std::result::Result<Self, ModelError> {
        let (width, eps, patch) = (config.hidden_size, config.layer_norm_eps, config.patch_size);
        let side = config.image_size / patch;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let name = |part: &str| format!("vision.layers.{i}.{part}");
                let linear = |part: &str, inputs, outputs| {
                    Linear::load(store, &name(part), inputs, outputs, true)
                };
                Ok(Layer {
                    norm1: LayerNorm::load(store, &name("layer_norm1"), width, eps)?,
                    qkv: Linear::load_joined(
                        store,
                        &["q_proj", "k_proj", "v_proj"]
                            .map(|part| (name(&format!("self_attn.{part}")), width)),
                        width,
                        true,
                    )?,
                    out: linear("self_attn.out_proj", width, width)?,
                    norm2: LayerNorm::load(store, &name("layer_norm2"), width, eps)?,
                    fc1: linear("mlp.fc1", width, config.intermediate_size)?,
                    fc2: linear("mlp.fc2", config.intermediate_size, width)?,
                    film: match film {
                        Some(words) => Some((
                            linear("film.scale", words, width)?,
                            linear("film.shift", words, width)?,
                        )),
                        None => None,
                    },
                })
            })
            .collect::<std::result::Result<_, ModelError>>()?;
        Ok(Self {
            patch,
            heads: config.num_attention_heads,
            side,
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
        })
    }

    /// Side of a patch (pixels).
    pub fn patch(&self) -> usize {
        self.patch
    }

    /// `pixels` (`[3, height, width]`, in [−1, 1]) through the tower and its last norm: `[patches, D]`. `words`
    /// (`[1, film]`) is the embedding that scales and shifts the layers, where they have that.
    ///
    /// # Errors
    /// When a patch's side does not divide the image's sides.
    pub fn forward(&self, pixels: &Tensor, words: Option<&Tensor>) -> Result<Tensor> {
        self.run(pixels, words, Keep::Nothing)
    }

    /// As [`Self::forward`], all of it; what it becomes is kept.
    ///
    /// # Errors
    /// As there.
    pub fn forward_all(&self, pixels: &Tensor, kept: &mut TowerRows) -> Result<Tensor> {
        self.run(pixels, None, Keep::All(kept))
    }

    /// As [`Self::forward`], with only the patches `rows` (rising) of `pixels` computed: they attend to the keys and values
    /// kept of the others, whose output is that of before.
    ///
    /// # Errors
    /// As there, and when `kept` is of a picture of another size.
    pub fn forward_rows(
        &self,
        pixels: &Tensor,
        rows: &[usize],
        kept: &mut TowerRows,
    ) -> Result<Tensor> {
        self.run(pixels, None, Keep::Rows(kept, rows))
    }

    fn run(&self, pixels: &Tensor, words: Option<&Tensor>, mut keep: Keep<'_>) -> Result<Tensor> {
        let (_, height, width) = pixels.dims3()?;
        if !height.is_multiple_of(self.patch) || !width.is_multiple_of(self.patch) {
            candle_core::bail!(
                "an image of {width} x {height} pixels cannot be cut into squares of {}",
                self.patch
            );
        }
        let (rows, columns) = (height / self.patch, width / self.patch);
        let (count, hidden) = (rows * columns, self.width());
        let mut patches = self.cut(pixels, rows, columns)?;
        let mut positions = self.position_rows(rows, columns)?;
        match &mut keep {
            Keep::Nothing => {}
            Keep::All(kept) => kept.layers.resize_with(self.layers.len(), LayerRows::default),
            Keep::Rows(kept, chosen) => {
                if kept.layers.len() != self.layers.len() || kept.hidden.len() != count * hidden {
                    candle_core::bail!("what is kept is of a picture of another size");
                }
                if chosen.is_empty() {
                    return Tensor::from_slice(&kept.hidden, (count, hidden), pixels.device());
                }
                patches = pick(&patches, chosen, 0)?;
                positions = pick(&positions, chosen, 0)?;
            }
        }
        let mut h = add(self.patches.forward(&patches)?, &positions)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let kept = match &mut keep {
                Keep::Nothing => None,
                Keep::All(kept) => Some((&mut kept.layers[i], None)),
                Keep::Rows(kept, rows) => Some((&mut kept.layers[i], Some(*rows))),
            };
            h = self.layer(layer, h, words, kept)?;
        }
        let h = self.post_norm.forward(&h)?;
        match keep {
            Keep::Nothing => Ok(h),
            Keep::All(kept) => {
                kept.hidden = h.flatten_all()?.to_vec1()?;
                Ok(h)
            }
            Keep::Rows(kept, rows) => {
                let new = h.flatten_all()?.to_vec1::<f32>()?;
                for (row, values) in rows.iter().zip(new.chunks_exact(hidden)) {
                    kept.hidden[row * hidden..(row + 1) * hidden].copy_from_slice(values);
                }
                Tensor::from_slice(&kept.hidden, (count, hidden), pixels.device())
            }
        }
    }

    /// Hidden size `D`.
    fn width(&self) -> usize {
        self.patches.outputs()
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

    /// `kept`: where the layer's keys and values are kept, and which rows `h` has of them when it has not all.
    fn layer(
        &self,
        layer: &Layer,
        h: Tensor,
        words: Option<&Tensor>,
        kept: Option<(&mut LayerRows, Option<&[usize]>)>,
    ) -> Result<Tensor> {
        let x = layer.norm1.forward(&h)?;
        let (qkv, width) = (layer.qkv.forward(&x)?, h.dim(1)?);
        let sizes = (self.heads, self.heads, width / self.heads);
        let kept = kept.map(|(kept, rows)| kept_rows(&qkv, width, kept, rows)).transpose()?;
        let (k, v) = match &kept {
            Some((keys, values)) => ((keys, 0), (values, 0)),
            None => ((&qkv, width), (&qkv, 2 * width)),
        };
        let attended = attend_rows((&qkv, 0), k, v, sizes, Visible::All)?;
        let mut h = layer.out.forward_add(&attended, &h)?;
        if let (Some((scale, shift)), Some(words)) = (&layer.film, words) {
            let scale = (scale.forward(words)? + 1.0)?;
            h = h.broadcast_mul(&scale)?.broadcast_add(&shift.forward(words)?)?;
        }
        let x = layer.norm2.forward(&h)?;
        let x = layer.fc1.forward_with(&x, Activation::Gelu)?;
        layer.fc2.forward_add(&x, &h)
    }
}
