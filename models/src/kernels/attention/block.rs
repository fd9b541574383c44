//! A block of queries on its way through the keys, in 32-bit floats.

use super::columns::Columns;
use super::{Heads, KEYS, Sizes};
use crate::kernels::isa::Isa;
use crate::kernels::pool::Cell;
use crate::kernels::simd::{Aligned, Interleave, Piece, Products, Softmax, TILE_ROWS};
use crate::kernels::strips::Tiles;

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
            let rows = (start..start + height).map(|key| k.row(head, key));
            isa.interleave(Interleave::new(rows, height, tile));
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
        let mut columns = Columns::new(&cell, self.sizes);
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
                    ahead: &[],
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
            if first > 0 {
                columns.shrink(isa, sums, width);
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
                    ahead: &[],
                });
            }
        }
        // The queries' place is free now.
        columns.finish(isa, cell, sums, queries);
    }

    /// The block's queries side by side, scaled.
    fn pack_queries(&self, cell: &Cell<'_>, queries: &mut [f32], width: usize) {
        let span = cell.rows();
        // What an earlier block left in the padding is a number or not: it must be one.
        if span.len() < width {
            queries.fill(0.0);
        }
        for first in span.clone().step_by(TILE_ROWS) {
            let rows = (first..span.end).map(|row| self.q.row(cell.along, row));
            let tile = &mut queries[first - span.start..];
            self.isa.interleave(Interleave::new(rows, width, tile));
        }
        let scale = (self.plan.size as f32).powf(-0.5);
        queries.iter_mut().for_each(|x| *x *= scale);
    }
}
