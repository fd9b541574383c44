//! What goes along with the queries of a block on its way through the keys.

use super::Sizes;
use crate::kernels::isa::Isa;
use crate::kernels::pool::Cell;
use crate::kernels::simd::{Interleave, Loop, TILE_COLUMNS, TILE_ROWS};

/// The queries of a block, which are the columns of its scores.
pub(super) struct Columns {
    pub largest: [f32; TILE_COLUMNS],
    pub sums: [f32; TILE_COLUMNS],
    pub shrink: [f32; TILE_COLUMNS],
    /// Keys that each query sees.
    seen: [usize; TILE_COLUMNS],
    /// Keys that every query sees.
    least: usize,
    /// Keys that any query sees.
    pub most: usize,
}

impl Columns {
    pub fn new(cell: &Cell<'_>, sizes: Sizes) -> Self {
        // Columns past the block's end are padding: they see one key, so that their sums are numbers.
        let mut seen = [1; TILE_COLUMNS];
        for (seen, row) in seen.iter_mut().zip(cell.rows()) {
            *seen = sizes.visible.columns(row, sizes.rows, sizes.columns);
        }
        let used = || seen[..cell.rows().len()].iter().copied();
        Self {
            largest: [f32::NEG_INFINITY; TILE_COLUMNS],
            sums: [0.0; TILE_COLUMNS],
            shrink: [1.0; TILE_COLUMNS],
            seen,
            least: used().min().unwrap_or(0),
            most: used().max().unwrap_or(0),
        }
    }

    /// Writes `value` over the scores, of keys from `first` on, of those that a query does not see.
    pub fn hide(&self, scores: &mut [f32], width: usize, first: usize, value: f32) {
        let skip = self.least.saturating_sub(first);
        for (key, row) in scores.chunks_exact_mut(width).enumerate().skip(skip) {
            for (score, seen) in row.iter_mut().zip(&self.seen) {
                *score = if first + key < *seen { *score } else { value };
            }
        }
    }

    /// Takes the sums over the values so far on to the largest score that is known now.
    pub fn shrink(&self, isa: Isa, sums: &mut [f32], width: usize) {
        let by = &self.shrink[..width];
        if by.iter().any(|by| *by != 1.0) {
            isa.run(Shrink { sums, by });
        }
    }

    /// The block's rows of the result, from the sums over the values (`[width of a head][query]`); `turned` is as large.
    pub fn finish(&self, isa: Isa, mut cell: Cell<'_>, sums: &[f32], turned: &mut [f32]) {
        let width = cell.rows().len().next_multiple_of(isa.float_shape().lanes);
        let size = sums.len() / width;
        for (index, tile) in sums.chunks(TILE_ROWS * width).enumerate() {
            let rows = tile.chunks_exact(width);
            isa.interleave(Interleave::new(rows, size, &mut turned[index * TILE_ROWS..]));
        }
        let rows = cell.rows().zip(turned.chunks_exact(size).zip(&self.sums));
        for (row, (sums, by)) in rows {
            let by = 1.0 / by;
            cell.row(row).iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * by);
        }
    }
}

/// Sums on from another largest score.
struct Shrink<'a> {
    sums: &'a mut [f32],
    by: &'a [f32],
}

impl Loop for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for row in self.sums.chunks_exact_mut(self.by.len()) {
            row.iter_mut().zip(self.by).for_each(|(sum, by)| *sum *= by);
        }
    }
}
