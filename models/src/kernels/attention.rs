//! Attention with grouped heads, and rotary positions.

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;

use super::exp;
use super::inplace::values_mut;

/// Which columns a row of the scores sees: always the first so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// Every row sees every column.
    All,
    /// The last row sees every column, all others see all but the last.
    LastOnlyByItself,
    /// Row `r` sees `prefix + r + 1` columns.
    Causal {
        /// Columns that every row sees.
        prefix: usize,
    },
}

impl Visible {
    fn columns(self, row: usize, rows: usize, columns: usize) -> usize {
        match self {
            Self::All => columns,
            Self::LastOnlyByItself if row + 1 == rows => columns,
            Self::LastOnlyByItself => columns - 1,
            Self::Causal { prefix } => (prefix + row + 1).min(columns),
        }
    }
}

struct Softmax {
    scale: f32,
    rows: usize,
    columns: usize,
    visible: Visible,
}

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let scores = values_mut(storage, layout)?;
        scores.par_chunks_mut(self.columns).with_min_len(16).enumerate().for_each(
            |(index, row)| {
                let seen = self.visible.columns(index % self.rows, self.rows, self.columns);
                let (row, hidden) = row.split_at_mut(seen);
                hidden.fill(0.0);
                softmax(row, self.scale);
            },
        );
        Ok(())
    }
}

/// Softmax of `scale·row`, in place. Sums run in eight lanes, so that they vectorise.
fn softmax(row: &mut [f32], scale: f32) {
    const LANES: usize = 8;
    let mut largest = [f32::NEG_INFINITY; LANES];
    let (body, tail) = row.split_at(row.len() / LANES * LANES);
    for chunk in body.chunks_exact(LANES) {
        for (m, v) in largest.iter_mut().zip(chunk) {
            *m = if *v > *m { *v } else { *m };
        }
    }
    let largest = largest.iter().chain(tail).fold(f32::NEG_INFINITY, |m, v| m.max(*v)) * scale;
    let mut sums = [0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (s, v) in sums.iter_mut().zip(chunk) {
            *v = exp(*v * scale - largest);
            *s += *v;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for v in chunks.into_remainder() {
        *v = exp(*v * scale - largest);
        sum += *v;
    }
    let inverse = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= inverse);
}

/// Scores held at a time (values): 4 MiB stay in the cache.
const SCORES: usize = 1 << 20;

/// Attention of `q` (`[H, L, hd]`) over `k` and `v` (`[K, C, hd]`, `K` dividing `H`): `[L, H·hd]`.
///
/// Query head `h` uses key head `h / (H/K)`; scores are scaled by `hd^−0.5`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, visible: Visible) -> Result<Tensor> {
    let (heads, rows, size) = q.dims3()?;
    let (key_heads, columns, _) = k.dims3()?;
    let grouped = q.contiguous()?.reshape((key_heads, heads / key_heads * rows, size))?;
    let keys = k.t()?;
    let softmax = Softmax { scale: (size as f32).powf(-0.5), rows, columns, visible };
    let per_head = heads / key_heads * rows * columns;
    let step = (SCORES / per_head.max(1)).clamp(1, key_heads);
    let mut parts = Vec::with_capacity(key_heads.div_ceil(step));
    for start in (0..key_heads).step_by(step) {
        let count = step.min(key_heads - start);
        let part = |t: &Tensor| t.narrow(0, start, count);
        let scores = part(&grouped)?.matmul(&part(&keys)?)?;
        scores.inplace_op1(&softmax)?;
        parts.push(scores.matmul(&part(v)?)?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0)? };
    out.reshape((heads, rows, size))?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
}

/// `x` (`[L, heads·hd]`) as heads: `[heads, L, hd]`.
///
/// # Errors
/// When `heads` does not divide the width.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    x.reshape((rows, heads, width / heads))?.transpose(0, 1)?.contiguous()
}

/// Rotary positions `start..start + L`, for heads of one size.
#[derive(Debug, Clone)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Tables for `length` positions from `start` on. Angles in single precision, as in training.
    ///
    /// # Errors
    /// When the tables cannot be allocated.
    pub fn new(base: f32, head: usize, start: usize, length: usize) -> Result<Self> {
        let half = head / 2;
        let angles: Vec<f32> = (start..start + length)
            .flat_map(|p| {
                (0..half).map(move |i| {
                    let exponent = (2 * i) as f32 / head as f32;
                    p as f32 / base.powf(exponent)
                })
            })
            .collect();
        let table = |f: fn(f32) -> f32| {
            Tensor::from_iter(angles.iter().map(|a| f(*a)), &Device::Cpu)?.reshape((length, half))
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }

    /// `x` (`[heads, L, hd]`) rotated: halves `x1, x2` become `x1·cos − x2·sin, x2·cos + x1·sin`.
    ///
    /// # Errors
    /// When the shape of `x` does not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope(&x.unsqueeze(0)?.contiguous()?, &self.cos, &self.sin)?
            .squeeze(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_see_what_they_may() {
        assert_eq!(Visible::LastOnlyByItself.columns(0, 3, 3), 2);
        assert_eq!(Visible::LastOnlyByItself.columns(2, 3, 3), 3);
        assert_eq!(Visible::Causal { prefix: 4 }.columns(1, 3, 7), 6);
    }

    #[test]
    fn softmax_sums_to_one() {
        let mut row: Vec<f32> = (0..19).map(|i| i as f32 * 3.0 - 20.0).collect();
        softmax(&mut row, 0.5);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let mut row = vec![1.0, f32::NAN, 2.0];
        softmax(&mut row, 1.0);
        assert!(row.iter().any(|v| v.is_nan()));
    }
}
