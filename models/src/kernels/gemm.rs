//! Products of activations with packed weights.
//!
//! Activations are put in the order of the tiles once per product (and rounded to 8 bits there, if the layer computes
//! so). Then each unit of work takes a block of rows, small enough to stay in the second-level cache, through a few
//! panels of weights; what follows the product (bias, activation, gate, residual) is done on each tile while it is
//! still in the first-level cache.

use std::cell::RefCell;

use super::epilogue::Epilogue;
use super::isa::Isa;
use super::packed::{Compute, Form, Packed, Panels};
use super::pool::{Cell, Grid, pool};
use super::quantise::Words;
use super::simd::{
    Aligned, BLOCK, Dots, Loop, Products, Quants, TILE_COLUMNS, TILE_ROWS, prefetch,
};
use super::tally;

/// Bytes of activations in a block of rows.
const ROWS_BYTES: usize = 512 << 10;
/// Bytes of weights of one panel that are gone through at a time.
const DEPTH_BYTES: usize = 640 << 10;
/// Multiplications that are worth a unit of work.
const UNIT: usize = 1 << 20;

thread_local! {
    /// Packed activations of the product that this thread asked for.
    static ACTIVATIONS: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
    /// The same, rounded.
    static ROUNDED: RefCell<Words> = const { RefCell::new(Words::new()) };
    /// A panel's weights, widened by this thread.
    static WIDENED: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
}

/// Activations: `rows` rows of the matrix's width.
pub trait Rows: Sync {
    /// Number of rows.
    fn count(&self) -> usize;
    /// Row `row`, as it lies in memory or gathered in `buffer`.
    fn row<'a>(&'a self, row: usize, buffer: &'a mut Vec<f32>) -> &'a [f32];
}

/// Rows of a matrix in memory.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// The values.
    pub values: &'a [f32],
    /// Values in a row.
    pub width: usize,
}

impl Rows for Dense<'_> {
    fn count(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    fn row<'a>(&'a self, row: usize, _buffer: &'a mut Vec<f32>) -> &'a [f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }
}

/// Tiles of nearly equal height that cover `rows`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub rows: usize,
    pub count: usize,
}

impl Tiles {
    pub fn new(rows: usize, most: usize) -> Self {
        Self { rows, count: rows.div_ceil(most) }
    }

    /// The first row of tile `index`; of the one past the last, the end.
    pub fn start(self, index: usize) -> usize {
        let (each, more) = (self.rows / self.count.max(1), self.rows % self.count.max(1));
        index * each + index.min(more)
    }

    pub fn height(self, index: usize) -> usize {
        self.start(index + 1) - self.start(index)
    }

    /// Height of the highest tile.
    pub fn most(self) -> usize {
        self.rows.div_ceil(self.count.max(1))
    }
}

/// `out = epilogue(x·Wᵀ)`, `[rows, outputs]` row by row.
///
/// # Panics
/// When `out` has another size: callers make it from the same numbers.
pub fn multiply(x: &impl Rows, weights: &Packed, epilogue: &Epilogue<'_>, out: &mut [f32]) {
    let (rows, outputs) = (x.count(), weights.outputs());
    assert_eq!(out.len(), rows * outputs, "the result's size");
    if rows == 0 || outputs == 0 {
        return;
    }
    tally::counted(
        |t| &mut t.layers,
        rows * outputs * weights.inputs(),
        || {
            multiply_all(x, weights, epilogue, out);
        },
    );
}

fn multiply_all(x: &impl Rows, weights: &Packed, epilogue: &Epilogue<'_>, out: &mut [f32]) {
    let rows = x.count();
    match &weights.form {
        Form::Blocks { quants, compute: Compute::Int8, .. } => ROUNDED.with_borrow_mut(|words| {
            let tiles = Tiles::new(rows, weights.isa.dot_shape().rows);
            words.pack(x, weights.inputs(), tiles, *quants, weights.isa);
            let cost = weights.inputs() / 4;
            each_cell(weights, tiles, cost, out, |cell, panel, block| {
                dots(cell, panel, block, words, weights, *quants, epilogue);
            });
        }),
        _ => ACTIVATIONS.with_borrow_mut(|packed| {
            let tiles = Tiles::new(rows, weights.isa.float_shape().rows);
            pack(packed, x, weights.inputs(), tiles, weights.isa);
            each_cell(weights, tiles, weights.inputs(), out, |cell, panel, block| {
                products(cell, panel, block, packed, weights, epilogue);
            });
        }),
    }
}

/// A block of tiles of one cell.
#[derive(Clone, Copy)]
struct Block {
    tiles: Tiles,
    first: usize,
    end: usize,
}

/// Cuts the result into cells, each a block of rows by some panels, and calls `work` for each panel of each.
fn each_cell(
    weights: &Packed,
    tiles: Tiles,
    floats_per_row: usize,
    out: &mut [f32],
    work: impl Fn(&mut Cell<'_>, usize, Block) + Sync,
) {
    let panels = weights.panels();
    let tile_bytes = tiles.most() * floats_per_row.max(1) * 4;
    let per_block = (ROWS_BYTES / tile_bytes).max(1);
    // Blocks of equal size, and panels together until they are worth a unit.
    let blocks = tiles.count.div_ceil(per_block);
    let per_block = tiles.count.div_ceil(blocks);
    let products = per_block * tiles.most() * panels.width * weights.inputs().max(1);
    let threads = pool().threads();
    let most = panels.count().div_ceil(if threads > 1 { 3 * threads } else { 1 });
    let together = (UNIT / products.max(1)).clamp(1, most.max(1));
    let edge = |tile: usize| tiles.start(tile.min(tiles.count));
    let rows: Vec<usize> = (0..=blocks).map(|b| edge(b * per_block)).collect();
    let groups = panels.count().div_ceil(together);
    let columns: Vec<usize> =
        (0..=groups).map(|g| (g * together * panels.width).min(panels.outputs)).collect();
    let grid = Grid { width: panels.outputs, rows: &rows, columns: &columns };
    pool().grid(out, &grid, |mut cell| {
        let first = cell.down * per_block;
        let block = Block { tiles, first, end: (first + per_block).min(tiles.count) };
        let panel = cell.along * together;
        for panel in panel..(panel + together).min(panels.count()) {
            work(&mut cell, panel, block);
        }
    });
}

/// Puts `x` in the order of the tiles: per tile, `[k][row]`.
fn pack(packed: &mut Aligned<f32>, x: &impl Rows, depth: usize, tiles: Tiles, isa: Isa) {
    let stride = tiles.most() * depth;
    packed.grow(tiles.count * stride);
    pool().chunks(&mut packed[..tiles.count * stride], stride, |index, tile| {
        let (start, height) = (tiles.start(index), tiles.height(index));
        let mut buffers: [Vec<f32>; TILE_ROWS] = Default::default();
        let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
        for (r, (row, buffer)) in rows.iter_mut().zip(&mut buffers).enumerate().take(height) {
            *row = x.row(start + r, buffer);
        }
        isa.run(Interleave { rows, height, tile });
    });
}

/// Rows of one length, side by side: `[k][row]`.
pub(super) struct Interleave<'a> {
    pub rows: [&'a [f32]; TILE_ROWS],
    pub height: usize,
    pub tile: &'a mut [f32],
}

impl Loop for Interleave<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.height {
            8 => interleave::<8>(self.rows, self.tile),
            7 => interleave::<7>(self.rows, self.tile),
            6 => interleave::<6>(self.rows, self.tile),
            5 => interleave::<5>(self.rows, self.tile),
            4 => interleave::<4>(self.rows, self.tile),
            3 => interleave::<3>(self.rows, self.tile),
            2 => interleave::<2>(self.rows, self.tile),
            1 => interleave::<1>(self.rows, self.tile),
            _ => {}
        }
    }
}

#[inline(always)]
fn interleave<const R: usize>(rows: [&[f32]; TILE_ROWS], tile: &mut [f32]) {
    /// Depths that are moved at a time.
    const STRIP: usize = 16;
    let depth = rows[0].len();
    let rows: [&[f32]; R] = std::array::from_fn(|r| &rows[r][..depth]);
    let mut strips = tile.chunks_exact_mut(STRIP * R);
    let mut k = 0;
    while k + STRIP <= depth {
        let Some(to) = strips.next() else { return };
        for (i, to) in to.chunks_exact_mut(R).enumerate() {
            for (to, row) in to.iter_mut().zip(&rows) {
                *to = row[k + i];
            }
        }
        k += STRIP;
    }
    for (k, to) in (k..depth).zip(tile[k * R..].chunks_exact_mut(R)) {
        for (to, row) in to.iter_mut().zip(&rows) {
            *to = row[k];
        }
    }
}

/// One panel of floats for the rows of a cell.
fn products(
    cell: &mut Cell<'_>,
    panel: usize,
    block: Block,
    packed: &[f32],
    weights: &Packed,
    epilogue: &Epilogue<'_>,
) {
    let (tiles, depth, panels) = (block.tiles, weights.inputs(), weights.panels());
    let (stride, columns) = (tiles.most() * depth, panels.columns(panel));
    let parts = depth.div_ceil((DEPTH_BYTES / 4 / columns).next_multiple_of(BLOCK).max(BLOCK));
    let part = depth.div_ceil(parts.max(1)).next_multiple_of(BLOCK);
    WIDENED.with_borrow_mut(|scratch| {
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for from in (0..depth).step_by(part.max(1)) {
            let length = part.min(depth - from);
            let b = weights.panel(panel, from, length, scratch);
            for tile in block.first..block.end {
                let rows = tiles.height(tile);
                let mut target =
                    Target { cell, panels, panel, first: tiles.start(tile), rows, columns };
                target.prefetch();
                if from > 0 {
                    target.load(&mut out);
                }
                weights.isa.multiply_tile(Products {
                    depth: length,
                    a: &packed[tile * stride + from * rows..][..length * rows],
                    a_step: rows,
                    b,
                    b_step: columns,
                    rows,
                    vectors: columns / panels.lanes,
                    out: &mut out,
                    accumulate: from > 0,
                });
                target.store(&out, (from + length == depth).then_some(epilogue), weights.isa);
            }
        }
    });
}

/// One panel of blocks for the rows of a cell, activations rounded.
fn dots(
    cell: &mut Cell<'_>,
    panel: usize,
    block: Block,
    words: &Words,
    weights: &Packed,
    quants: Quants,
    epilogue: &Epilogue<'_>,
) {
    let (tiles, panels) = (block.tiles, weights.panels());
    let columns = panels.columns(panel);
    let blocks = weights.inputs().div_ceil(BLOCK);
    let (b, b_scales) = weights.blocks(panel, 0, blocks);
    let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
    for tile in block.first..block.end {
        let rows = tiles.height(tile);
        let part = words.tile(tile, rows);
        let mut target = Target { cell, panels, panel, first: tiles.start(tile), rows, columns };
        target.prefetch();
        weights.isa.dot_tile(Dots {
            blocks,
            a: part.words,
            starts: part.starts,
            a_scales: part.scales,
            quants,
            b,
            b_scales,
            rows,
            vectors: columns / panels.lanes,
            out: &mut out,
            accumulate: false,
        });
        target.store(&out, Some(epilogue), weights.isa);
    }
}

/// Where a tile's sums go.
struct Target<'a, 'c> {
    cell: &'a mut Cell<'c>,
    panels: Panels,
    panel: usize,
    first: usize,
    rows: usize,
    columns: usize,
}

impl Target<'_, '_> {
    /// Columns of the panel in the cell's rows.
    fn place(&self) -> std::ops::Range<usize> {
        let outputs = self.panels.outputs(self.panel);
        let start = self.cell.columns().start;
        outputs.start - start..outputs.end - start
    }

    /// Asks for the lines that the sums go to.
    fn prefetch(&mut self) {
        let place = self.place();
        for r in 0..self.rows {
            prefetch(&self.cell.row(self.first + r)[place.clone()]);
        }
    }

    /// The unfinished sums.
    fn load(&mut self, out: &mut [f32]) {
        let place = self.place();
        for (r, sums) in out.chunks_exact_mut(self.columns).take(self.rows).enumerate() {
            sums[..place.len()].copy_from_slice(&self.cell.row(self.first + r)[place.clone()]);
        }
    }

    /// Writes the sums, with what follows them when they are finished.
    fn store(&mut self, sums: &[f32], epilogue: Option<&Epilogue<'_>>, isa: Isa) {
        let (place, outputs) = (self.place(), self.panels.outputs(self.panel));
        for (r, sums) in sums.chunks_exact(self.columns).take(self.rows).enumerate() {
            let row = self.first + r;
            let to = &mut self.cell.row(row)[place.clone()];
            let sums = &sums[..place.len()];
            match epilogue {
                Some(epilogue) if !epilogue.is_plain() => {
                    epilogue.finish(isa, sums, row, outputs.clone(), self.panels.outputs, to);
                }
                _ => to.copy_from_slice(sums),
            }
        }
    }
}
