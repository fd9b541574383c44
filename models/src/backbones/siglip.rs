//! SigLIP: a vision transformer whose every patch becomes one token.
//!
//! Source: transformers `models/siglip/modeling_siglip.py` (and `smolvlm`, whose tower is the same).

use candle_core::{Result, Tensor};
use serde::Deserialize;

use crate::ModelError;
use crate::caches::LayerRows;
use crate::checkpoint::TensorStore;
use crate::kernels::{Activation, Columns, LayerNorm, Linear, Matrix, Visible, attend_rows};

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

/// Keeps the keys and values in `qkv` (`[L, 3·D]`), of all patches or of `rows`.
fn keep_rows(qkv: &Matrix, kept: &mut LayerRows, rows: Option<&[usize]>) -> Result<()> {
    let width = qkv.width() / 3;
    // As of one head: a row is a row.
    let part = |index: usize| {
        let columns = qkv.columns(index * width..(index + 1) * width);
        Matrix::of_rows(columns.iter(), width).to_tensor()?.unsqueeze(0)
    };
    let (keys, values) = (part(1)?, part(2)?);
    match rows {
        None => *kept = LayerRows::whole(&keys, &values)?,
        Some(rows) => kept.put(rows, &keys, &values)?,
    }
    Ok(())
}

/// The vision tower.
pub struct Siglip {
    patch: usize,
    heads: usize,
    /// Side of the grid that the position table was trained for (patches).
    side: usize,
    patches: Linear,
    /// `[side², D]`.
    positions: Matrix,
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
            positions: Matrix::of_tensor(
                &store
                    .tensor("vision.embeddings.position_embedding.weight", &[side * side, width])?,
            )?,
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
        let mut chosen = None;
        match &mut keep {
            Keep::Nothing => {}
            Keep::All(kept) => kept.layers.resize_with(self.layers.len(), LayerRows::default),
            Keep::Rows(kept, rows) => {
                if kept.layers.len() != self.layers.len() || kept.hidden.len() != count * hidden {
                    candle_core::bail!("what is kept is of a picture of another size");
                }
                if rows.is_empty() {
                    return Tensor::from_slice(&kept.hidden, (count, hidden), pixels.device());
                }
                chosen = Some(*rows);
            }
        }
        let words = words.map(Matrix::of_tensor).transpose()?;
        let places = Places { count: chosen.map_or(count, <[usize]>::len), chosen };
        let patches = self.cut(pixels, columns, &places)?;
        let moved = self.position_rows((rows, columns), &places);
        let positions = moved.as_ref().unwrap_or(&self.positions);
        let mut h = self.patches.through(&patches, Activation::None, Some(positions))?;
        for (i, layer) in self.layers.iter().enumerate() {
            let kept = match &mut keep {
                Keep::Nothing => None,
                Keep::All(kept) => Some((&mut kept.layers[i], None)),
                Keep::Rows(kept, rows) => Some((&mut kept.layers[i], Some(*rows))),
            };
            h = self.layer(layer, h, words.as_ref(), kept)?;
        }
        let h = self.post_norm.through(&h)?;
        match keep {
            Keep::Nothing => h.to_tensor(),
            Keep::All(kept) => {
                kept.hidden = h.values().to_vec();
                h.to_tensor()
            }
            Keep::Rows(kept, rows) => {
                for (row, values) in rows.iter().zip(h.values().chunks_exact(hidden)) {
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

    /// The patches at `places`, each in the order of the convolution's weights: `[places, 3·patch²]`.
    fn cut(&self, pixels: &Tensor, columns: usize, places: &Places<'_>) -> Result<Matrix> {
        let (p, (channels, height, width)) = (self.patch, pixels.dims3()?);
        let image = Matrix::of_tensor(&pixels.reshape((channels * height, width))?)?;
        let mut patches = Matrix::unwritten(places.count, channels * p * p);
        for (i, patch) in patches.values_mut().chunks_exact_mut(channels * p * p).enumerate() {
            let (row, column) = (places.get(i) / columns, places.get(i) % columns);
            for (line, to) in patch.chunks_exact_mut(p).enumerate() {
                let from = image.row(line / p * height + row * p + line % p);
                to.copy_from_slice(&from[column * p..(column + 1) * p]);
            }
        }
        Ok(patches)
    }

    /// Rows of the position table for a grid of `rows` by `columns`, unless it is the whole table as it lies. A grid of
    /// another size takes the trained position at the same fraction of the side.
    fn position_rows(
        &self,
        (rows, columns): (usize, usize),
        places: &Places<'_>,
    ) -> Option<Matrix> {
        let side = self.side;
        if (rows, columns) == (side, side) && places.chosen.is_none() {
            return None;
        }
        let trained = (0..places.count).map(|i| {
            let (r, c) = (places.get(i) / columns, places.get(i) % columns);
            self.positions.row(r * side / rows * side + c * side / columns)
        });
        Some(Matrix::of_rows(trained, self.width()))
    }

    /// `kept`: where the layer's keys and values are kept, and which rows `h` has of them when it has not all.
    fn layer(
        &self,
        layer: &Layer,
        h: Matrix,
        words: Option<&Matrix>,
        kept: Option<(&mut LayerRows, Option<&[usize]>)>,
    ) -> Result<Matrix> {
        let x = layer.norm1.through(&h)?;
        let (qkv, width) = (layer.qkv.through(&x, Activation::None, None)?, h.width());
        drop(x);
        let (q, heads) = (qkv.columns(0..width), (self.heads, self.heads));
        let compute = layer.qkv.compute();
        let attended = match kept {
            Some((kept, rows)) => {
                keep_rows(&qkv, kept, rows)?;
                let (keys, values) = kept.values();
                let all = |side| Columns::all(side, keys.len() / width);
                attend_rows(&q, &all(keys)?, &all(values)?, heads, Visible::All, compute)?
            }
            None => {
                let (k, v) = (qkv.columns(width..2 * width), qkv.columns(2 * width..3 * width));
                attend_rows(&q, &k, &v, heads, Visible::All, compute)?
            }
        };
        drop(qkv);
        let mut h = layer.out.through(&attended, Activation::None, Some(&h))?;
        drop(attended);
        if let (Some((scale, shift)), Some(words)) = (&layer.film, words) {
            let scale = scale.through(words, Activation::None, None)?;
            let shift = shift.through(words, Activation::None, None)?;
            for row in h.values_mut().chunks_exact_mut(width) {
                let by = scale.row(0).iter().zip(shift.row(0));
                row.iter_mut()
                    .zip(by)
                    .for_each(|(x, (scale, shift))| *x = *x * (scale + 1.0) + shift);
            }
        }
        let x = layer.norm2.through(&h)?;
        let x = layer.fc1.through(&x, Activation::Gelu, None)?;
        layer.fc2.through(&x, Activation::None, Some(&h))
    }
}

/// Patches of a picture.
struct Places<'a> {
    count: usize,
    /// Which, rising; all where there is none.
    chosen: Option<&'a [usize]>,
}

impl Places<'_> {
    fn get(&self, index: usize) -> usize {
        self.chosen.map_or(index, |chosen| chosen[index])
    }
}
