//! SigLIP: a vision transformer whose every patch becomes one token.
//!
//! Source: transformers `models/siglip/modeling_siglip.py` (and `smolvlm`, whose tower is the same).

use candle_core::Result;
use serde::Deserialize;

use super::KeysValues;
use crate::ModelError;
use crate::checkpoint::TensorStore;
use crate::kernels::pool::pool;
use crate::kernels::{Activation, LayerNorm, Linear, Matrix, Planes, Visible, attend};

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
    layers: Vec<KeysValues>,
    /// `[patches, D]` after the last norm.
    hidden: Matrix,
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
    /// The tower's output, `[patches, D]`.
    pub fn hidden(&self) -> &Matrix {
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
                .matrix("vision.embeddings.position_embedding.weight", &[side * side, width])?,
            layers,
            post_norm: LayerNorm::load(store, "vision.post_layernorm", width, eps)?,
        })
    }

    /// Side of a patch (pixels).
    pub fn patch(&self) -> usize {
        self.patch
    }

    /// `pixels` (in [−1, 1]) through the tower and its last norm: `[patches, D]`. `words`
    /// (`[1, film]`) is the embedding that scales and shifts the layers, where they have that.
    ///
    /// # Errors
    /// When a patch's side does not divide the image's sides.
    pub fn forward(&self, pixels: &Planes, words: Option<&Matrix>) -> Result<Matrix> {
        self.run(pixels, words, Keep::Nothing)
    }

    /// As [`Self::forward`], all of it; what it becomes is kept.
    ///
    /// # Errors
    /// As there.
    pub fn forward_all(&self, pixels: &Planes, kept: &mut TowerRows) -> Result<Matrix> {
        self.run(pixels, None, Keep::All(kept))
    }

    /// As [`Self::forward`], with only the patches `rows` (rising) of `pixels` computed: they attend to the keys and values
    /// kept of the others, whose output is that of before.
    ///
    /// # Errors
    /// As there, and when `kept` is of a picture of another size.
    pub fn forward_rows(
        &self,
        pixels: &Planes,
        rows: &[usize],
        kept: &mut TowerRows,
    ) -> Result<Matrix> {
        self.run(pixels, None, Keep::Rows(kept, rows))
    }

    fn run(&self, pixels: &Planes, words: Option<&Matrix>, mut keep: Keep<'_>) -> Result<Matrix> {
        let (height, width) = pixels.size;
        if !height.is_multiple_of(self.patch) || !width.is_multiple_of(self.patch) {
            candle_core::bail!(
                "an image of {width} x {height} pixels cannot be cut into squares of {}",
                self.patch
            );
        }
        let (rows, columns) = (height / self.patch, width / self.patch);
        let count = rows * columns;
        let mut chosen = None;
        match &mut keep {
            Keep::Nothing => {}
            Keep::All(kept) => kept.layers.resize_with(self.layers.len(), KeysValues::default),
            Keep::Rows(kept, rows) => {
                let size = (count, self.width());
                if kept.layers.len() != self.layers.len() || kept.hidden.dims() != size {
                    candle_core::bail!("what is kept is of a picture of another size");
                }
                if rows.is_empty() {
                    return Ok(kept.hidden.clone());
                }
                chosen = Some(*rows);
            }
        }
        let places = Places { count: chosen.map_or(count, <[usize]>::len), chosen };
        let patches = self.cut(pixels, columns, &places)?;
        let moved = self.position_rows((rows, columns), &places);
        let positions = moved.as_ref().unwrap_or(&self.positions);
        let mut h = self.patches.forward_add(&patches, positions)?;
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
                kept.hidden = h.clone();
                Ok(h)
            }
            Keep::Rows(kept, rows) => {
                for (row, values) in rows.iter().zip(h.iter()) {
                    kept.hidden.row_mut(*row).copy_from_slice(values);
                }
                Ok(kept.hidden.clone())
            }
        }
    }

    /// Hidden size `D`.
    fn width(&self) -> usize {
        self.patches.outputs()
    }

    /// The patches at `places`, each in the order of the convolution's weights: `[places, 3·patch²]`.
    fn cut(&self, pixels: &Planes, columns: usize, places: &Places<'_>) -> Result<Matrix> {
        let (p, channels, (height, width)) = (self.patch, pixels.channels(), pixels.size);
        let image = pixels.values.values();
        let mut patches = Matrix::unwritten(places.count, channels * p * p);
        pool().chunks(patches.values_mut(), (channels * p * p).max(1), |i, patch| {
            let (row, column) = (places.get(i) / columns, places.get(i) % columns);
            for (line, to) in patch.chunks_exact_mut(p).enumerate() {
                let from = (line / p * height + row * p + line % p) * width + column * p;
                to.copy_from_slice(&image[from..from + p]);
            }
        });
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
        kept: Option<(&mut KeysValues, Option<&[usize]>)>,
    ) -> Result<Matrix> {
        let x = layer.norm1.forward(&h)?;
        let (qkv, width) = (layer.qkv.forward(&x)?, h.width());
        drop(x);
        let (q, heads) = (qkv.columns(0..width), (self.heads, self.heads));
        let (k, v) = (qkv.columns(width..2 * width), qkv.columns(2 * width..3 * width));
        let compute = layer.qkv.compute();
        let attended = match kept {
            Some((kept, rows)) => {
                match rows {
                    None => *kept = KeysValues::copied(&k, &v),
                    Some(rows) => kept.put(rows, &k, &v)?,
                }
                kept.attend(&q, None, heads, Visible::All, compute)?
            }
            None => attend(&q, &[k], &[v], heads, Visible::All, compute)?,
        };
        drop(qkv);
        let mut h = layer.out.forward_add(&attended, &h)?;
        drop(attended);
        if let (Some((scale, shift)), Some(words)) = (&layer.film, words) {
            let (scale, shift) = (scale.forward(words)?, shift.forward(words)?);
            for row in h.values_mut().chunks_exact_mut(width) {
                let by = scale.row(0).iter().zip(shift.row(0));
                row.iter_mut()
                    .zip(by)
                    .for_each(|(x, (scale, shift))| *x = *x * (scale + 1.0) + shift);
            }
        }
        let x = layer.norm2.forward(&h)?;
        let x = layer.fc1.forward_with(&x, Activation::Gelu)?;
        layer.fc2.forward_add(&x, &h)
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
