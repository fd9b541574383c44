//! Values of a feature map in another order: window by window, or with channels in the place of places.

use super::convolution::Grid;
use crate::kernels::pool::pool;
use crate::kernels::simd::{Interleave, TILE_ROWS};
use crate::kernels::{Columns, Isa, Matrix};

/// Squares of side `side` that cover a map, row by row; the last ones may reach past its right and its bottom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Windows {
    pub grid: Grid,
    pub side: usize,
}

impl Windows {
    /// Places of a window.
    pub fn places(&self) -> usize {
        self.side * self.side
    }

    /// Windows side by side, and one below the other.
    fn counts(&self) -> (usize, usize) {
        (self.grid.1.div_ceil(self.side), self.grid.0.div_ceil(self.side))
    }

    /// `x` (`[h·w, C]`) window after window: `[windows·places, C]`, zero outside the map.
    pub fn split(&self, x: &Matrix) -> Matrix {
        let Self { grid: (height, width), side } = *self;
        let ((across, down), channels) = (self.counts(), x.width());
        let mut out = Matrix::unwritten(across * down * self.places(), channels);
        pool().chunks(out.values_mut(), side * channels, |line, out| {
            let (window, line) = (line / side, line % side);
            let (top, left) = (window / across * side, window % across * side);
            let inside = if top + line < height { side.min(width - left) } else { 0 };
            let (inside, outside) = out.split_at_mut(inside * channels);
            if !inside.is_empty() {
                let from = ((top + line) * width + left) * channels;
                inside.copy_from_slice(&x.values()[from..][..inside.len()]);
            }
            outside.fill(0.0);
        });
        out
    }

    /// The map (`[h·w, C]`) whose windows are `windows`; what lies outside it is dropped.
    pub fn join(&self, windows: &Matrix) -> Matrix {
        let Self { grid: (height, width), side } = *self;
        let ((across, _), channels) = (self.counts(), windows.width());
        let mut out = Matrix::unwritten(height * width, channels);
        pool().chunks(out.values_mut(), width * channels, |y, line| {
            for (column, to) in line.chunks_mut(side * channels).enumerate() {
                let window = y / side * across + column;
                let from = (window * side + y % side) * side * channels;
                to.copy_from_slice(&windows.values()[from..][..to.len()]);
            }
        });
        out
    }
}

/// Each of `count` blocks that lie side by side in `x` (`[L, count·W]`) with its rows as columns: `[W, count·L]`. Blocks
/// turned twice are as they were.
pub(super) fn turned(x: &Columns<'_>, count: usize) -> Matrix {
    let (isa, length, width) = (Isa::current(), x.rows(), x.width() / count);
    let step = count * length;
    let mut out = Matrix::unwritten(width, step);
    pool().chunks(out.values_mut(), TILE_ROWS * step, |index, lines| {
        let (first, depth) = (index * TILE_ROWS, lines.len() / step);
        for block in 0..count {
            let columns = block * width + first..block * width + first + depth;
            for start in (0..length).step_by(TILE_ROWS) {
                let rows = x.clone().rows_of(start..length.min(start + TILE_ROWS));
                let rows = rows.iter().map(|row| &row[columns.clone()]);
                let tile = &mut lines[block * length + start..];
                isa.interleave(Interleave::new(rows, step, tile));
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use candle_core::Result;

    use super::*;

    fn numbers(rows: usize, width: usize) -> Result<Matrix> {
        let values: Vec<f32> = (0..rows * width).map(|i| i as f32 + 1.0).collect();
        Matrix::new(&values, (rows, width))
    }

    #[test]
    fn windows_hold_their_places_and_zeros_outside() -> Result<()> {
        for (grid, side) in [((5, 7), 3), ((4, 6), 2), ((2, 3), 4), ((1, 1), 1)] {
            let (x, windows) = (numbers(grid.0 * grid.1, 3)?, Windows { grid, side });
            let split = windows.split(&x);
            let across = grid.1.div_ceil(side);
            assert_eq!(split.rows(), across * grid.0.div_ceil(side) * windows.places());
            for (index, row) in split.iter().enumerate() {
                let (window, place) = (index / windows.places(), index % windows.places());
                let y = window / across * side + place / side;
                let left = window % across * side + place % side;
                let inside = y < grid.0 && left < grid.1;
                let expected = if inside { x.row(y * grid.1 + left) } else { &[0.0; 3] };
                assert_eq!(row, expected, "{grid:?}, windows of {side}: {index}");
            }
            assert_eq!(windows.join(&split).values(), x.values());
        }
        Ok(())
    }

    #[test]
    fn blocks_are_turned_each_for_itself() -> Result<()> {
        for (length, count, width) in [(13, 3, 10), (8, 1, 8), (1, 4, 2), (49, 2, 17)] {
            let x = numbers(length, 2 + count * width)?;
            let out = turned(&x.columns(2..2 + count * width), count);
            assert_eq!(out.dims(), (width, count * length));
            for (channel, row) in out.iter().enumerate() {
                for (i, value) in row.iter().enumerate() {
                    let (block, place) = (i / length, i % length);
                    assert_eq!(*value, x.row(place)[2 + block * width + channel]);
                }
            }
            let back = turned(&out.all(), count);
            assert!(back.iter().zip(x.iter()).all(|(back, x)| *back == x[2..]));
        }
        Ok(())
    }
}
