//! A block of queries on its way through the keys.

use super::{Heads, Sizes};
use crate::kernels::isa::Isa;
use crate::kernels::pool::Cell;
use crate::kernels::simd::{
    Aligned, Interleave, Loop, Piece, Products, Softmax, TILE_COLUMNS, TILE_ROWS,
};
use crate::kernels::strips::Tiles;

/// Keys whose scores are held at a time: with the sums over the values they fill the first-level cache.
const KEYS: usize = 96;

/// How the keys and values of a head are cut into tiles.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub keys: Tiles,
    pub values: Tiles,
    pub columns: usize,
    pub size: usize,
}

impl Plan {
    /// Numbers of a head's keys.
    fn keys(&self) -> usize {
        self.keys.count * self.keys.most() * self.size
    }

    /// Numbers of a head's keys and values.
    pub fn head(&self) -> usize {
        self.keys() + self.columns * self.size
    }

    /// Puts a head's keys and values in order: of the keys a few side by side, depth after depth; the values key after
    /// key. In memory they are then not a page apart as in the rows that a layer gave.
    pub fn pack(&self, isa: Isa, k: Heads<'_>, v: Heads<'_>, head: usize, packed: &mut [f32]) {
        let (keys, values) = packed.split_at_mut(self.keys());
        for (index, tile) in keys.chunks_exact_mut(self.keys.most() * self.size).enumerate() {
            let (start, height) = (self.keys.start(index), self.keys.height(index));
            let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
            for (r, row) in rows.iter_mut().enumerate().take(height) {
                *row = k.row(head, start + r);
            }
            isa.interleave(Interleave { rows, height, step: height, tile });
        }
        for (column, to) in values.chunks_exact_mut(self.size).enumerate() {
            to.copy_from_slice(v.row(head, column));
        }
    }
}

/// What a unit of work needs.
pub(super) struct Block<'a> {
    pub isa: Isa,
    pub q: Heads<'a>,
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub plan: Plan,
    pub sizes: Sizes,
}

/// What goes along with the columns of a block.
struct Columns {
    largest: [f32; TILE_COLUMNS],
    sums: [f32; TILE_COLUMNS],
    shrink: [f32; TILE_COLUMNS],
    /// Keys that each query sees.
    seen: [usize; TILE_COLUMNS],
    /// Keys that every query sees.
    least: usize,
    /// Keys that any query sees.
    most: usize,
}

impl<'a> Block<'a> {
    /// The block over a head's `packed` keys and values ([`Plan::pack`]).
    pub fn new(isa: Isa, q: Heads<'a>, packed: &'a [f32], plan: Plan, sizes: Sizes) -> Self {
        let (keys, values) = packed.split_at(plan.keys());
        Self { isa, q, keys, values, plan, sizes }
    }

    pub fn run(&self, cell: Cell<'_>, scratch: &mut Aligned<f32>) {
        let Self { isa, plan, .. } = *self;
        let lanes = isa.float_shape().lanes;
        let width = cell.rows().len().next_multiple_of(lanes);
        scratch.grow((2 * plan.size + KEYS) * width);
        let (queries, scores) = scratch.split_at_mut(plan.size * width);
        let (sums, scores) = scores.split_at_mut(plan.size * width);
        self.pack_queries(&cell, queries, width);
        let mut columns = self.columns(&cell);
        let together = KEYS / plan.keys.most();
        for first in (0..plan.keys.count).step_by(together) {
            let last = (first + together).min(plan.keys.count);
            let keys = plan.keys.start(first)..plan.keys.start(last);
            if keys.start >= columns.most {
                break;
            }
            let scores = &mut scores[..keys.len() * width];
            for tile in first..last {
                let (start, rows) = (plan.keys.start(tile), plan.keys.height(tile));
                isa.multiply_tile(Products {
                    pieces: &[Piece::whole(plan.size)],
                    a: &self.keys[tile * plan.keys.most() * plan.size..][..plan.size * rows],
                    a_step: rows,
                    b: queries,
                    b_step: width,
                    rows,
                    vectors: width / lanes,
                    out: &mut scores[(start - keys.start) * width..],
                    accumulate: false,
                });
            }
            columns.hide(scores, width, keys.start, f32::NEG_INFINITY);
            isa.softmax_step(Softmax {
                scores,
                vectors: width / lanes,
                largest: &mut columns.largest,
                sums: &mut columns.sums,
                shrink: &mut columns.shrink,
            });
            columns.hide(scores, width, keys.start, 0.0);
            if first > 0 && columns.shrink[..width].iter().any(|by| *by != 1.0) {
                isa.run(Shrink { sums, by: &columns.shrink[..width] });
            }
            for tile in 0..plan.values.count {
                let (start, rows) = (plan.values.start(tile), plan.values.height(tile));
                isa.multiply_tile(Products {
                    pieces: &[Piece::whole(keys.len())],
                    a: &self.values[keys.start * plan.size + start..],
                    a_step: plan.size,
                    b: scores,
                    b_step: width,
                    rows,
                    vectors: width / lanes,
                    out: &mut sums[start * width..],
                    accumulate: first > 0,
                });
            }
        }
        // The queries' place is free now.
        self.finish(cell, sums, queries, &columns.sums);
    }

    /// The block's queries side by side, scaled.
    fn pack_queries(&self, cell: &Cell<'_>, queries: &mut [f32], width: usize) {
        let span = cell.rows();
        // What an earlier block left in the padding is a number or not: it must be one.
        if span.len() < width {
            queries.fill(0.0);
        }
        for first in span.clone().step_by(TILE_ROWS) {
            let height = TILE_ROWS.min(span.end - first);
            let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
            for (r, row) in rows.iter_mut().enumerate().take(height) {
                *row = self.q.row(cell.along, first + r);
            }
            let tile = &mut queries[first - span.start..];
            self.isa.interleave(Interleave { rows, height, step: width, tile });
        }
        let scale = (self.plan.size as f32).powf(-0.5);
        queries.iter_mut().for_each(|x| *x *= scale);
    }

    /// The block's rows of the result, from `sums` (`[width of a head][query]`); `turned` is as large.
    fn finish(&self, mut cell: Cell<'_>, sums: &[f32], turned: &mut [f32], by: &[f32]) {
        let (size, width) = (self.plan.size, sums.len() / self.plan.size);
        for (index, tile) in sums.chunks(TILE_ROWS * width).enumerate() {
            let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
            rows.iter_mut().zip(tile.chunks_exact(width)).for_each(|(to, row)| *to = row);
            let height = tile.len() / width;
            let tile = &mut turned[index * TILE_ROWS..];
            self.isa.interleave(Interleave { rows, height, step: size, tile });
        }
        let rows = cell.rows().zip(turned.chunks_exact(size).zip(by));
        for (row, (sums, by)) in rows {
            let by = 1.0 / by;
            cell.row(row).iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * by);
        }
    }

    fn columns(&self, cell: &Cell<'_>) -> Columns {
        // Columns past the block's end are padding: they see one key, so that their sums are numbers.
        let mut seen = [1; TILE_COLUMNS];
        for (seen, row) in seen.iter_mut().zip(cell.rows()) {
            *seen = self.sizes.visible.columns(row, self.sizes.rows, self.sizes.columns);
        }
        let used = || seen[..cell.rows().len()].iter().copied();
        Columns {
            largest: [f32::NEG_INFINITY; TILE_COLUMNS],
            sums: [0.0; TILE_COLUMNS],
            shrink: [1.0; TILE_COLUMNS],
            seen,
            least: used().min().unwrap_or(0),
            most: used().max().unwrap_or(0),
        }
    }
}

impl Columns {
    /// Writes `value` over the scores, of keys from `first` on, of those that a query does not see.
    fn hide(&self, scores: &mut [f32], width: usize, first: usize, value: f32) {
        let skip = self.least.saturating_sub(first);
        for (key, row) in scores.chunks_exact_mut(width).enumerate().skip(skip) {
            for (score, seen) in row.iter_mut().zip(&self.seen) {
                *score = if first + key < *seen { *score } else { value };
            }
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
