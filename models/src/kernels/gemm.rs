//! Products of activations with packed weights.
//!
//! Activations are put in the order of the tiles once per product (and rounded to 8 bits there, if the layer computes
//! so). Then each unit of work takes as many panels of weights as the second-level cache holds, and tile after tile of
//! a block of rows through all of them: weights come from far once, and a tile's activations from the first-level
//! cache. What follows the product (bias, activation, gate, residual) is done on each tile before it goes.

use std::cell::RefCell;
use std::ops::Range;

use super::epilogue::Epilogue;
use super::isa::Isa;
use super::packed::{Compute, Form, Packed, Panels};
use super::pool::{Cell, Grid, pool};
use super::quantise::Words;
use super::simd::{
    Aligned, BLOCK, Dots, Interleave, Products, Quants, TILE_COLUMNS, TILE_ROWS, prefetch,
};
use super::tally;

/// Bytes of weights that a unit of work goes through: they stay in the second-level cache beside a few tiles.
const GROUP_BYTES: usize = 640 << 10;
/// The most panels in a unit of work.
const GROUP: usize = 16;
/// Units of work for each thread, at least, where there is enough for that: the threads end at nearly one time then.
const UNITS: usize = 4;
/// Multiplications that are worth a unit of work.
const UNIT: usize = 1 << 20;

thread_local! {
    /// Rows that this thread gathers for a tile.
    pub(super) static GATHERED: RefCell<[Vec<f32>; TILE_ROWS]> =
        const { RefCell::new([const { Vec::new() }; TILE_ROWS]) };
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
    if weights.inputs() == 0 {
        // No tile is multiplied then, and `out` may hold anything.
        out.fill(0.0);
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
            each_unit(weights, tiles, quants.bytes() + 2, BLOCK, out, |unit| {
                unit.dots(words, *quants, epilogue);
            });
        }),
        _ => ACTIVATIONS.with_borrow_mut(|packed| {
            let tiles = Tiles::new(rows, weights.isa.float_shape().rows);
            pack(packed, x, weights.inputs(), tiles, weights.isa);
            each_unit(weights, tiles, 4, 1, out, |unit| unit.products(packed, epilogue));
        }),
    }
}

/// Cuts the result into cells, each a block of rows by a group of panels, and calls `work` for each. `bytes` are those
/// of `values` weights on their way through a tile.
fn each_unit(
    weights: &Packed,
    tiles: Tiles,
    bytes: usize,
    values: usize,
    out: &mut [f32],
    work: impl Fn(Unit<'_, '_>) + Sync,
) {
    let (panels, threads) = (weights.panels(), pool().threads());
    let panel_bytes = panels.width * weights.inputs().div_ceil(values) * bytes;
    let panel_products = panels.width * weights.inputs().max(1) * tiles.rows;
    // Panels that fit the cache, but no more than leave every thread its units.
    let spread = panels.count().div_ceil(if threads > 1 { UNITS * threads } else { 1 });
    let most = (GROUP_BYTES / panel_bytes.max(1)).clamp(1, GROUP);
    let group = most.min(spread.max(UNIT / panel_products.max(1))).max(1);
    let groups = panels.count().div_ceil(group);
    // Rows are cut only where there are too few groups.
    let blocks = if threads > 1 { (UNITS * threads).div_ceil(groups) } else { 1 };
    let worth = (group * panel_products / UNIT).max(1);
    let blocks = blocks.min(worth).min(tiles.count);
    let per_block = tiles.count.div_ceil(blocks);
    let blocks = tiles.count.div_ceil(per_block);
    let rows: Vec<usize> =
        (0..=blocks).map(|b| tiles.start((b * per_block).min(tiles.count))).collect();
    let columns: Vec<usize> =
        (0..=groups).map(|g| (g * group * panels.width).min(panels.outputs)).collect();
    let grid = Grid { width: panels.outputs, rows: &rows, columns: &columns };
    pool().grid(out, &grid, |cell| {
        let first = cell.down * per_block;
        let tiles_here = first..(first + per_block).min(tiles.count);
        let panel = cell.along * group;
        let panels_here = panel..(panel + group).min(panels.count());
        work(Unit { cell, weights, tiles, tiles_here, panels_here });
    });
}

/// Puts `x` in the order of the tiles: per tile, `[k][row]`.
fn pack(packed: &mut Aligned<f32>, x: &impl Rows, depth: usize, tiles: Tiles, isa: Isa) {
    let stride = tiles.most() * depth;
    packed.grow(tiles.count * stride);
    pool().chunks(&mut packed[..tiles.count * stride], stride, |index, tile| {
        let (start, height) = (tiles.start(index), tiles.height(index));
        GATHERED.with_borrow_mut(|buffers| {
            let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
            for (r, (row, buffer)) in rows.iter_mut().zip(buffers).enumerate().take(height) {
                *row = x.row(start + r, buffer);
            }
            isa.interleave(Interleave { rows, height, step: height, tile });
        });
    });
}

/// A unit of work.
struct Unit<'a, 'c> {
    cell: Cell<'c>,
    weights: &'a Packed,
    tiles: Tiles,
    tiles_here: Range<usize>,
    panels_here: Range<usize>,
}

impl<'c> Unit<'_, 'c> {
    /// Where the sums of a tile go.
    fn target(&mut self, tile: usize, panel: usize) -> Target<'_, 'c> {
        let (panels, isa) = (self.weights.panels(), self.weights.isa);
        let (first, rows) = (self.tiles.start(tile), self.tiles.height(tile));
        let columns = panels.columns(panel);
        Target { cell: &mut self.cell, isa, panels, panel, first, rows, columns }
    }

    /// Products of floats.
    fn products(mut self, packed: &[f32], epilogue: &Epilogue<'_>) {
        let (depth, panels) = (self.weights.inputs(), self.weights.panels());
        let stride = self.tiles.most() * depth;
        // Deep products in parts, so that a panel's part fits the cache.
        let parts = (depth * panels.width * 4).div_ceil(GROUP_BYTES).max(1);
        let part = depth.div_ceil(parts).next_multiple_of(BLOCK);
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for from in (0..depth).step_by(part) {
            let length = part.min(depth - from);
            let last = (from + length == depth).then_some(epilogue);
            let each = part * panels.width;
            WIDENED.with_borrow_mut(|scratch| {
                scratch.grow(if self.weights.is_float() { 0 } else { GROUP * each });
                let mut scratch = scratch.chunks_mut(each);
                let b: [&[f32]; GROUP] = std::array::from_fn(|i| {
                    let panel = self.panels_here.start + i;
                    let scratch = scratch.next().unwrap_or_default();
                    match panel < self.panels_here.end {
                        true => self.weights.panel(panel, from, length, scratch),
                        false => &[],
                    }
                });
                for tile in self.tiles_here.clone() {
                    let rows = self.tiles.height(tile);
                    let a = &packed[tile * stride + from * rows..][..length * rows];
                    for (panel, b) in self.panels_here.clone().zip(b) {
                        let columns = panels.columns(panel);
                        let mut target = self.target(tile, panel);
                        target.prefetch();
                        if from > 0 {
                            target.load(&mut out);
                        }
                        target.isa.multiply_tile(Products {
                            depth: length,
                            a,
                            a_step: rows,
                            b,
                            b_step: columns,
                            rows,
                            vectors: columns / panels.lanes,
                            out: &mut out,
                            accumulate: from > 0,
                        });
                        target.store(&out, last);
                    }
                }
            });
        }
    }

    /// Products of blocks, activations rounded.
    fn dots(mut self, words: &Words, quants: Quants, epilogue: &Epilogue<'_>) {
        let panels = self.weights.panels();
        let blocks = self.weights.inputs().div_ceil(BLOCK);
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for tile in self.tiles_here.clone() {
            let rows = self.tiles.height(tile);
            let part = words.tile(tile, rows);
            for panel in self.panels_here.clone() {
                let (b, b_scales) = self.weights.blocks(panel, 0, blocks);
                let vectors = panels.columns(panel) / panels.lanes;
                let mut target = self.target(tile, panel);
                target.prefetch();
                target.isa.dot_tile(Dots {
                    blocks,
                    a: part.words,
                    starts: part.starts,
                    a_scales: part.scales,
                    quants,
                    b,
                    b_scales,
                    rows,
                    vectors,
                    out: &mut out,
                    accumulate: false,
                });
                target.store(&out, Some(epilogue));
            }
        }
    }
}

/// Where a tile's sums go.
struct Target<'a, 'c> {
    cell: &'a mut Cell<'c>,
    isa: Isa,
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
    fn store(&mut self, sums: &[f32], epilogue: Option<&Epilogue<'_>>) {
        let (place, outputs, isa) = (self.place(), self.panels.outputs(self.panel), self.isa);
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
