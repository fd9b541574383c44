//! Rotary positions.
//!
//! Source: Su et al. 2021 (arXiv 2104.09864), with the halves of a head as pairs, as transformers has them.

use candle_core::{Device, Result, Tensor};

use super::isa::Isa;
use super::pool::pool;
use super::simd::Loop;
use super::tensors;

/// Values that a thread rotates at a time, at least.
const SLICE: usize = 1 << 14;

/// Rotary positions `start..start + L`, for heads of one size.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[L, hd/2]`
    cos: Vec<f32>,
    /// `[L, hd/2]`
    sin: Vec<f32>,
    head: usize,
}

impl Rope {
    /// Tables for `length` positions from `start` on. Angles in single precision, as in training.
    pub fn new(base: f32, head: usize, start: usize, length: usize) -> Self {
        let half = head / 2;
        let angle = |p: usize, i: usize| p as f32 / base.powf((2 * i) as f32 / head as f32);
        let table = |f: fn(f32) -> f32| {
            (start..start + length).flat_map(|p| (0..half).map(move |i| f(angle(p, i)))).collect()
        };
        Self { cos: table(f32::cos), sin: table(f32::sin), head }
    }

    /// `x` (`[heads, L, hd]`) rotated: halves `x1, x2` become `x1·cos − x2·sin, x2·cos + x1·sin`.
    ///
    /// # Errors
    /// When the shape of `x` does not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, rows, size) = x.dims3()?;
        self.rotate(&x.contiguous()?, (heads, rows, size), (rows * size, size))
    }

    /// `x` (`[L, heads·hd]`, as a linear layer gives it) rotated, as heads: `[heads, L, hd]`.
    ///
    /// # Errors
    /// When the shape of `x` does not fit.
    pub fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        self.rotate(&x.contiguous()?, (heads, rows, width / heads.max(1)), (self.head, width))
    }

    /// `steps`: how far heads and rows are apart in `x`.
    fn rotate(
        &self,
        x: &Tensor,
        (heads, rows, size): (usize, usize, usize),
        (head_step, row_step): (usize, usize),
    ) -> Result<Tensor> {
        let known = self.cos.len() / (self.head / 2).max(1);
        if size != self.head || rows > known || !size.is_multiple_of(2) {
            candle_core::bail!(
                "{rows} rows of heads of {size} do not fit {known} positions of heads of {}",
                self.head
            );
        }
        let values = tensors::read(x)?;
        let values = values.get();
        let mut out = vec![0.0; heads * rows * size];
        let isa = Isa::current();
        let together = (SLICE / size.max(1)).max(1);
        pool().chunks(&mut out, together * size, |index, out| {
            isa.run(Rotate {
                rope: self,
                values,
                rows,
                head_step,
                row_step,
                first: index * together,
                out,
            });
        });
        Tensor::from_vec(out, (heads, rows, size), &Device::Cpu)
    }
}

/// Rows from number `first` on, counted through all heads.
struct Rotate<'a> {
    rope: &'a Rope,
    values: &'a [f32],
    rows: usize,
    head_step: usize,
    row_step: usize,
    first: usize,
    out: &'a mut [f32],
}

impl Loop for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (size, half) = (self.rope.head, self.rope.head / 2);
        for (index, out) in self.out.chunks_exact_mut(size).enumerate() {
            let (head, row) = ((self.first + index) / self.rows, (self.first + index) % self.rows);
            let x = &self.values[head * self.head_step + row * self.row_step..][..size];
            let angles = row * half..(row + 1) * half;
            let angles = self.rope.cos[angles.clone()].iter().zip(&self.rope.sin[angles]);
            let ((x1, x2), (y1, y2)) = (x.split_at(half), out.split_at_mut(half));
            let places = y1.iter_mut().zip(y2).zip(x1.iter().zip(x2)).zip(angles);
            for (((y1, y2), (x1, x2)), (cos, sin)) in places {
                (*y1, *y2) = (x1 * cos - x2 * sin, x2 * cos + x1 * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_rows_are_rotated_as_candle_rotates_them() -> Result<()> {
        let (heads, rows, size) = (3, 301, 20);
        let x = (0..heads * rows * size).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0);
        let flat = Tensor::from_iter(x, &Device::Cpu)?.reshape((rows, heads * size))?;
        let rope = Rope::new(10_000.0, size, 5, rows + 2);
        let table =
            |t: &[f32]| Tensor::from_slice(&t[..rows * size / 2], (rows, size / 2), &Device::Cpu);
        let split = flat.reshape((rows, heads, size))?.transpose(0, 1)?.contiguous()?;
        let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
        let expected = candle_nn::rotary_emb::rope(&split.unsqueeze(0)?, &cos, &sin)?.squeeze(0)?;
        let expected = expected.flatten_all()?.to_vec1::<f32>()?;
        for found in [rope.apply(&split)?, rope.split(&flat, heads)?] {
            assert_eq!(found.dims(), [heads, rows, size]);
            let found = found.flatten_all()?.to_vec1::<f32>()?;
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
        }
        assert!(rope.split(&flat, 2).is_err(), "heads of another size");
        assert!(Rope::new(10_000.0, size, 0, rows - 1).apply(&split).is_err(), "too few positions");
        Ok(())
    }
}
