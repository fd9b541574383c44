//! Rotary positions.
//!
//! Source: Su et al. 2021 (arXiv 2104.09864), with the halves of a head as pairs, as transformers has them.

use candle_core::Result;

use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::Loop;

/// Values that a thread rotates at a time, at least.
const SLICE: usize = 1 << 14;

/// Rotary positions `start..start + L`, for heads of one size.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[L, hd/2]`
    cos: Matrix,
    /// `[L, hd/2]`
    sin: Matrix,
    head: usize,
}

impl Rope {
    /// Tables for `length` positions from `start` on. Angles in single precision, as in training.
    pub fn new(base: f32, head: usize, start: usize, length: usize) -> Self {
        let half = head / 2;
        let mut periods = Matrix::unwritten(1, half);
        for (i, period) in periods.values_mut().iter_mut().enumerate() {
            *period = base.powf((2 * i) as f32 / head as f32);
        }
        let table = |f: fn(f32) -> f32| {
            let mut table = Matrix::unwritten(length, half);
            for (row, place) in (start..start + length).enumerate() {
                let angles = periods.values().iter().map(|period| place as f32 / period);
                table.row_mut(row).iter_mut().zip(angles).for_each(|(to, angle)| *to = f(angle));
            }
            table
        };
        Self { cos: table(f32::cos), sin: table(f32::sin), head }
    }

    /// `x` (`[L, heads·hd]`) rotated in its place: halves `x1, x2` of a head become `x1·cos − x2·sin, x2·cos + x1·sin`.
    ///
    /// # Errors
    /// When the width of `x` is no whole heads, or it has more rows than there are positions.
    pub fn rotate(&self, x: Matrix) -> Result<Matrix> {
        self.turn(x, |row| row)
    }

    /// As [`Self::rotate`], with row `r` of `x` at position `start + places[r]`.
    ///
    /// # Errors
    /// As there, and when there is no place for a row.
    pub fn rotate_at(&self, x: Matrix, places: &[usize]) -> Result<Matrix> {
        if places.len() != x.rows() || places.iter().any(|place| *place >= self.positions()) {
            let (rows, known) = (x.rows(), self.positions());
            candle_core::bail!("{} places for {rows} rows do not fit {known}", places.len());
        }
        self.turn(x, |row| places[row])
    }

    fn positions(&self) -> usize {
        self.cos.rows()
    }

    fn turn(&self, mut x: Matrix, place: impl Fn(usize) -> usize + Sync) -> Result<Matrix> {
        let ((rows, width), size, known) = (x.dims(), self.head, self.positions());
        let last = (0..rows).map(&place).max().unwrap_or(0);
        if size == 0 || !size.is_multiple_of(2) || !width.is_multiple_of(size) || last >= known {
            candle_core::bail!(
                "{rows} rows of {width} do not fit {known} positions of heads of {size}"
            );
        }
        let (isa, together) = (Isa::current(), (SLICE / width.max(1)).max(1));
        pool().chunks(x.values_mut(), (together * width).max(1), |index, rows| {
            for (row, values) in rows.chunks_exact_mut(width).enumerate() {
                let place = place(index * together + row);
                let (cos, sin) = (self.cos.row(place), self.sin.row(place));
                isa.run(Rotate { cos, sin, heads: values });
            }
        });
        Ok(x)
    }
}

/// The heads of one row.
struct Rotate<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    heads: &'a mut [f32],
}

impl Loop for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (x1, x2) = head.split_at_mut(half);
            let angles = self.cos.iter().zip(self.sin);
            for ((x1, x2), (cos, sin)) in x1.iter_mut().zip(x2).zip(angles) {
                (*x1, *x2) = (*x1 * cos - *x2 * sin, *x2 * cos + *x1 * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn heads_and_rows_are_rotated_as_candle_rotates_them() -> Result<()> {
        let (heads, rows, size) = (3, 301, 20);
        let x = (0..heads * rows * size).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0);
        let flat = Tensor::from_iter(x, &Device::Cpu)?.reshape((rows, heads * size))?;
        let rope = Rope::new(10_000.0, size, 5, rows + 2);
        let table = |t: &Matrix| {
            Tensor::from_slice(&t.values()[..rows * size / 2], (rows, size / 2), &Device::Cpu)
        };
        let split = flat.reshape((rows, heads, size))?.transpose(0, 1)?.contiguous()?;
        let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
        let expected = candle_nn::rotary_emb::rope(&split.unsqueeze(0)?, &cos, &sin)?.squeeze(0)?;
        let expected = expected.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))?;
        let expected = Matrix::of_tensor(&expected)?;
        let x = Matrix::of_tensor(&flat)?;
        let found = rope.rotate(x.clone())?;
        let pairs = || found.values().iter().zip(expected.values());
        assert!(pairs().all(|(a, b)| (a - b).abs() < 1e-6));
        let places = [4, 0, 300];
        let some = Matrix::of_rows(places.iter().map(|p| x.row(*p)), x.width());
        let some = rope.rotate_at(some, &places)?;
        assert!(places.iter().zip(some.iter()).all(|(p, row)| row == found.row(*p)));
        assert!(Rope::new(10_000.0, 14, 0, rows).rotate(x.clone()).is_err(), "no whole heads");
        assert!(Rope::new(10_000.0, size, 0, rows - 1).rotate(x.clone()).is_err(), "too few");
        assert!(rope.rotate_at(x.part(0..1)?, &[rows + 2]).is_err());
        Ok(())
    }
}
