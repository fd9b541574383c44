//! Matrices in memory that is used again: a network's large results, of which each is gone when the next but one is
//! made, take no memory from the system after its first run, and are not cleared before they are written.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::isa::Isa;
use super::simd::{Aligned, Interleave, TILE_ROWS};

/// The most buffers that a thread keeps for later: more than a deep network's keys, values and kept branches.
const SPARE: usize = 512;

thread_local! {
    static BUFFERS: RefCell<Vec<Aligned<f32>>> = const { RefCell::new(Vec::new()) };
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// Buffers that this thread took from the system so far.
pub fn buffers_taken() -> u64 {
    TAKEN.get()
}

/// `rows` rows of `width` values.
#[derive(Debug)]
pub struct Matrix {
    /// At least `rows·width` values.
    buffer: Aligned<f32>,
    rows: usize,
    width: usize,
}

impl Matrix {
    /// A matrix to be written: its values are those of whatever was there before.
    pub fn unwritten(rows: usize, width: usize) -> Self {
        let length = rows * width;
        if length == 0 {
            return Self { buffer: Aligned::new(), rows, width };
        }
        let spare = BUFFERS.with_borrow_mut(|buffers| {
            // The smallest that is large enough, but none that a much larger result will want back.
            let fits = |b: &Aligned<f32>| b.len() >= length && b.len() / 2 <= length;
            // Of equals the one that was used last: it may still be in the cache.
            let best = (0..buffers.len())
                .rev()
                .filter(|i| fits(&buffers[*i]))
                .min_by_key(|i| buffers[*i].len())?;
            Some(buffers.remove(best))
        });
        let buffer = spare.unwrap_or_else(|| {
            TAKEN.set(TAKEN.get() + 1);
            Aligned::zeros(length)
        });
        Self { buffer, rows, width }
    }

    /// A matrix of zeros.
    pub fn zeros(rows: usize, width: usize) -> Self {
        let mut all = Self::unwritten(rows, width);
        all.values_mut().fill(0.0);
        all
    }

    /// `rows` rows of `width` values that lie one after the other, copied.
    ///
    /// # Errors
    /// When `values` are not so many.
    pub fn new(values: &[f32], (rows, width): (usize, usize)) -> Result<Self> {
        if values.len() != rows * width {
            candle_core::bail!("{} values are no {rows} x {width}", values.len());
        }
        let mut all = Self::unwritten(rows, width);
        all.values_mut().copy_from_slice(values);
        Ok(all)
    }

    /// One row, copied.
    pub fn of_row(values: &[f32]) -> Self {
        Self::of_rows(std::iter::once(values), values.len())
    }

    /// Rows `rows` of `width` values each, copied.
    pub fn of_rows<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, width: usize) -> Self {
        let mut all = Self::unwritten(rows.len(), width);
        for (to, row) in all.values_mut().chunks_exact_mut(width.max(1)).zip(rows) {
            to.copy_from_slice(row);
        }
        all
    }

    /// Matrices of `width` columns, one below the other, copied.
    ///
    /// # Errors
    /// When one has another width.
    pub fn stacked<'a>(
        parts: impl Iterator<Item = &'a Self> + Clone,
        width: usize,
    ) -> Result<Self> {
        if let Some(other) = parts.clone().find(|part| part.width != width) {
            candle_core::bail!("{} columns do not fit below {width}", other.width);
        }
        let mut all = Self::unwritten(parts.clone().map(|part| part.rows).sum(), width);
        let mut rest = all.values_mut();
        for part in parts {
            let (to, below) = rest.split_at_mut(part.values().len());
            to.copy_from_slice(part.values());
            rest = below;
        }
        Ok(all)
    }

    /// Matrices side by side, copied; one with a single row stands beside every row of the others.
    ///
    /// # Errors
    /// When they have other numbers of rows.
    pub fn beside(parts: &[&Self]) -> Result<Self> {
        let rows = parts.iter().map(|part| part.rows).max().unwrap_or(0);
        if let Some(other) = parts.iter().find(|part| part.rows != rows && part.rows != 1) {
            candle_core::bail!("{} rows do not fit beside {rows}", other.rows);
        }
        let mut all = Self::unwritten(rows, parts.iter().map(|part| part.width).sum());
        for row in 0..rows {
            let mut rest = all.row_mut(row);
            for part in parts {
                let (to, after) = rest.split_at_mut(part.width);
                to.copy_from_slice(part.row(if part.rows == 1 { 0 } else { row }));
                rest = after;
            }
        }
        Ok(all)
    }

    /// Some of its rows, copied.
    ///
    /// # Errors
    /// When it has no such rows.
    pub fn part(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            candle_core::bail!("rows {rows:?} are not among {}", self.rows);
        }
        let values = &self.values()[rows.start * self.width..rows.end * self.width];
        Self::new(values, (rows.len(), self.width))
    }

    /// The same values as rows of another width.
    ///
    /// # Errors
    /// When these are not as many.
    pub fn reshaped(mut self, rows: usize, width: usize) -> Result<Self> {
        if rows * width != self.rows * self.width {
            candle_core::bail!("{} x {} values are no {rows} x {width}", self.rows, self.width);
        }
        (self.rows, self.width) = (rows, width);
        Ok(self)
    }

    /// Rows as columns, copied.
    pub fn transposed(&self) -> Self {
        let mut turned = Self::unwritten(self.width, self.rows);
        let isa = Isa::current();
        for first in (0..self.rows).step_by(TILE_ROWS) {
            let rows = (first..self.rows).map(|row| self.row(row));
            let tile = &mut turned.values_mut()[first..];
            isa.interleave(Interleave::new(rows, self.rows, tile));
        }
        turned
    }

    /// Every value times `by`.
    #[must_use]
    pub fn scaled(mut self, by: f32) -> Self {
        self.values_mut().iter_mut().for_each(|x| *x *= by);
        self
    }

    /// The values of a tensor of two dimensions, copied.
    ///
    /// # Errors
    /// When it is not f32.
    pub fn of_tensor(tensor: &Tensor) -> Result<Self> {
        Self::new(&tensor.flatten_all()?.to_vec1()?, tensor.dims2()?)
    }

    /// As a tensor, copied.
    ///
    /// # Errors
    /// Never: the shape is that of the values.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Tensor::from_slice(self.values(), (self.rows, self.width), &Device::Cpu)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows, and values in a row.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.width)
    }

    /// Row after row.
    pub fn values(&self) -> &[f32] {
        &self.buffer[..self.rows * self.width]
    }

    /// Row after row.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.rows * self.width]
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.width..(row + 1) * self.width]
    }

    /// One row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self.values_mut()[row * width..(row + 1) * width]
    }

    /// Its rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f32]> + Clone {
        (0..self.rows).map(|row| self.row(row))
    }

    /// All columns of all rows.
    pub fn all(&self) -> Columns<'_> {
        self.columns(0..self.width)
    }

    /// Some columns of all rows.
    pub fn columns(&self, columns: Range<usize>) -> Columns<'_> {
        Columns { values: self.values(), rows: self.rows, step: self.width, columns }
    }
}

impl Default for Matrix {
    fn default() -> Self {
        Self { buffer: Aligned::new(), rows: 0, width: 0 }
    }
}

impl Clone for Matrix {
    fn clone(&self) -> Self {
        let mut copy = Self::unwritten(self.rows, self.width);
        copy.values_mut().copy_from_slice(self.values());
        copy
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let buffer = std::mem::replace(&mut self.buffer, Aligned::new());
        // While the thread ends there may be no store any more; the buffer is freed then.
        let _ = BUFFERS.try_with(|buffers| {
            let mut buffers = buffers.borrow_mut();
            if buffers.len() == SPARE {
                // What was not asked for again for the longest time, another network's perhaps.
                buffers.remove(0);
            }
            buffers.push(buffer);
        });
    }
}

/// Some columns of rows in memory.
#[derive(Debug, Clone)]
pub struct Columns<'a> {
    values: &'a [f32],
    rows: usize,
    step: usize,
    columns: Range<usize>,
}

impl<'a> Columns<'a> {
    /// All columns of `rows` rows that lie one after the other.
    ///
    /// # Errors
    /// When `values` are not so many rows.
    pub fn all(values: &'a [f32], rows: usize) -> Result<Self> {
        if rows == 0 || !values.len().is_multiple_of(rows) {
            candle_core::bail!("{} values are no {rows} rows", values.len());
        }
        let step = values.len() / rows;
        Ok(Self { values, rows, step, columns: 0..step })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// Of these rows, which it has, some.
    #[must_use]
    pub fn rows_of(self, rows: Range<usize>) -> Self {
        let values = &self.values[rows.start * self.step..];
        Self { values, rows: rows.len(), ..self }
    }

    /// From the first value on, and how far rows are apart.
    pub(super) fn parts(&self) -> (&'a [f32], usize) {
        (&self.values[self.columns.start..], self.step)
    }

    /// Its rows.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [f32]> {
        let (values, step, columns) = (self.values, self.step, self.columns.clone());
        (0..self.rows).map(move |row| &values[row * step..][columns.clone()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_rows_and_columns_are_where_they_were() -> Result<()> {
        let run = || -> Result<f32> {
            let a = Matrix::of_rows([[1.0, 2.0, 3.0].as_slice(), &[4.0, 5.0, 6.0]].into_iter(), 3);
            let columns = a.columns(1..3);
            assert_eq!((columns.rows(), columns.width()), (2, 2));
            let b = Matrix::of_rows(columns.iter(), 2);
            assert_eq!((b.row(1), a.row(0)), ([5.0, 6.0].as_slice(), [1.0, 2.0, 3.0].as_slice()));
            let c = Matrix::unwritten(5, 40);
            Ok(b.values()[0] + c.rows() as f32)
        };
        run()?;
        let before = buffers_taken();
        for _ in 0..3 {
            assert_eq!(run()?, 7.0);
        }
        assert_eq!(buffers_taken(), before, "nothing new was taken");
        let tensor = Matrix::of_rows([[7.0f32; 4].as_slice()].into_iter(), 4).to_tensor()?;
        assert_eq!(tensor.dims(), [1, 4]);
        assert_eq!(Matrix::of_tensor(&tensor)?.values(), [7.0; 4]);
        assert!(Columns::all(&[0.0; 5], 2).is_err());
        let (one, two) = (
            Matrix::of_tensor(&tensor)?,
            Matrix::of_rows([[8.0f32; 4]; 2].iter().map(|r| &r[..]), 4),
        );
        let both = Matrix::stacked([&one, &two].into_iter(), 4)?;
        assert_eq!((both.rows(), both.row(0), both.row(2)), (3, &[7.0; 4][..], &[8.0; 4][..]));
        assert!(Matrix::stacked([&one, &both].into_iter(), 3).is_err());
        Ok(())
    }

    #[test]
    fn a_thread_keeps_so_many_buffers_only() {
        let all: Vec<Matrix> = (1..=2 * SPARE).map(|n| Matrix::unwritten(n, 1000)).collect();
        drop(all);
        assert_eq!(BUFFERS.with_borrow(Vec::len), SPARE);
    }
}
