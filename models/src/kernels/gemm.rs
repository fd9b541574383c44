//! Products of activations with packed weights.
//!
//! Activations are put in [strips](super::strips) once per product (and rounded to 8 bits there, if the layer computes
//! so). Then each unit of work takes as many panels of weights as the second-level cache holds, and tile after tile of
//! a block of rows through all of them: weights come from far once, and a tile's activations from the first-level
//! cache. What follows the product (bias, activation, gate, residual) is done on each tile before it goes.

use std::cell::RefCell;
use std::ops::Range;

use super::epilogue::{Epilogue, Tile};
use super::isa::Isa;
use super::packed::{Blocks, Compute, Form, Packed, Panels};
use super::pool::{Cell, Edges, Grid, pool};
use super::quantise::{Place, lay_words};
use super::simd::{
    Aligned, BLOCK, Dots, LINE, Products, SUPER_BLOCK, TILE_COLUMNS, TILE_ROWS, prefetch,
};
use super::strips::{Read, Rows, Strips, lay_floats};
use super::tally;

pub use super::strips::Dense;

/// Bytes of weights that a unit of work goes through: they stay in the second-level cache beside a few tiles.
const GROUP_BYTES: usize = 640 << 10;
/// The most panels in a unit of work.
const GROUP: usize = 16;
/// Units of work for each thread, at least, where there is enough for that: the threads end at nearly one time then.
const UNITS: usize = 4;
/// Multiplications that are worth a unit of work.
const UNIT: usize = 1 << 20;

thread_local! {
    /// Activations in order, of the product that this thread asked for.
    static LAID: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
    /// The same, rounded.
    static ROUNDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
    /// A panel's weights, widened by this thread.
    static WIDENED: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
    /// What a tile reads in this thread.
    static READ: RefCell<Read> = RefCell::default();
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
    match &weights.form {
        Form::Blocks { blocks, compute: Compute::Int8 } => ROUNDED.with_borrow_mut(|laid| {
            let x = &x.strips(weights.isa.dot_shape().rows);
            lay_words(laid, x, blocks.quants, weights.isa);
            each_unit(weights, x, blocks.quants.bytes() + 2, BLOCK, out, |unit| {
                unit.dots(laid, blocks, epilogue);
            });
        }),
        _ => LAID.with_borrow_mut(|laid| {
            let x = &x.strips(weights.isa.float_shape().rows);
            lay_floats(laid, x, weights.isa);
            each_unit(weights, x, 4, 1, out, |unit| unit.products(laid, epilogue));
        }),
    }
}

/// Cuts the result into cells, each a block of rows by a group of panels, and calls `work` for each. `bytes` are those
/// of `values` weights on their way through a tile.
fn each_unit<X: Strips>(
    weights: &Packed,
    x: &X,
    bytes: usize,
    values: usize,
    out: &mut [f32],
    work: impl Fn(Unit<'_, '_, X>) + Sync,
) {
    let (panels, threads, tiles) = (weights.panels(), pool().threads(), x.tiles());
    let panel_bytes = panels.width * weights.inputs().div_ceil(values) * bytes;
    let panel_products = panels.width * weights.inputs().max(1) * x.start(tiles);
    // Panels that fit the cache, but no more than leave every thread its units.
    let spread = panels.count().div_ceil(if threads > 1 { UNITS * threads } else { 1 });
    let most = (GROUP_BYTES / panel_bytes.max(1)).clamp(1, GROUP);
    let group = match panels.count() <= most && tiles >= 2 * UNITS * threads {
        // Few weights and many rows: a tile's activations stay at hand for all panels.
        true => panels.count(),
        false => most.min(spread.max(UNIT / panel_products.max(1))).max(1),
    };
    let groups = panels.count().div_ceil(group);
    // Rows are cut only where there are too few groups.
    let blocks = if threads > 1 { (UNITS * threads).div_ceil(groups) } else { 1 };
    let worth = (group * panel_products / UNIT).max(1);
    let blocks = blocks.min(worth).min(tiles);
    let per_block = tiles.div_ceil(blocks);
    let blocks = tiles.div_ceil(per_block);
    let rows = Edges::new((0..=blocks).map(|b| x.start((b * per_block).min(tiles))));
    let columns = Edges::new((0..=groups).map(|g| (g * group * panels.width).min(panels.outputs)));
    let grid = Grid { width: panels.outputs, rows: &rows, columns: &columns };
    pool().grid(out, &grid, |cell| {
        let first = cell.down * per_block;
        let tiles = first..(first + per_block).min(tiles);
        let panel = cell.along * group;
        let panels = panel..(panel + group).min(panels.count());
        work(Unit { cell, weights, x, tiles, panels });
    });
}

/// A unit of work.
struct Unit<'a, 'c, X> {
    cell: Cell<'c>,
    weights: &'a Packed,
    x: &'a X,
    tiles: Range<usize>,
    panels: Range<usize>,
}

impl<'c, X: Strips> Unit<'_, 'c, X> {
    /// Where the sums of a tile go.
    fn target(&mut self, tile: usize, panel: usize) -> Target<'_, 'c> {
        let (panels, isa) = (self.weights.panels(), self.weights.isa);
        let (first, end) = (self.x.start(tile), self.x.start(tile + 1));
        let columns = panels.columns(panel);
        Target { cell: &mut self.cell, isa, panels, panel, first, rows: end - first, columns }
    }

    /// Products of floats.
    fn products(mut self, laid: &[f32], epilogue: &Epilogue<'_>) {
        let (depth, panels, weights) = (self.weights.inputs(), self.weights.panels(), self.weights);
        let each = depth / self.x.parts().max(1);
        // Deep products in parts, so that a panel's part fits the cache.
        let parts = (depth * panels.width * 4).div_ceil(GROUP_BYTES).max(1);
        let part = depth.div_ceil(parts).next_multiple_of(SUPER_BLOCK);
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for from in (0..depth).step_by(part) {
            let length = part.min(depth - from);
            let last = (from + length == depth).then_some(epilogue);
            let room = part * panels.width;
            WIDENED.with_borrow_mut(|scratch| {
                scratch.grow(if weights.is_float() { 0 } else { GROUP * room });
                let mut scratch = scratch.chunks_mut(room);
                let first = self.panels.start;
                let b: [&[f32]; GROUP] = std::array::from_fn(|i| {
                    let scratch = scratch.next().unwrap_or_default();
                    match first + i < self.panels.end {
                        true => weights.panel(first + i, from, length, scratch),
                        false => &[],
                    }
                });
                let order = self.order(length);
                let mut found = None;
                order.run(
                    |panel| weights.floats(panel, from, length),
                    |tile, panel, ahead| {
                        READ.with_borrow_mut(|read| {
                            if found.replace(tile) != Some(tile) {
                                let span = (from..from + length, each);
                                read.find(self.x, tile, span, self.x.depth());
                            }
                            let columns = panels.columns(panel);
                            let mut target = self.target(tile, panel);
                            target.prefetch();
                            if from > 0 {
                                target.load(&mut out);
                            }
                            target.isa.multiply_tile(Products {
                                pieces: &read.pieces,
                                a: laid,
                                a_step: read.step,
                                b: b[panel - first],
                                b_step: columns,
                                rows: target.rows,
                                vectors: columns / panels.lanes,
                                out: &mut out,
                                accumulate: from > 0,
                                ahead,
                            });
                            target.store(&out, last);
                        });
                    },
                );
            });
        }
    }

    /// Products of blocks, activations rounded.
    fn dots(mut self, laid: &[u32], all: &Blocks, epilogue: &Epilogue<'_>) {
        let panels = self.weights.panels();
        let blocks = self.weights.inputs().div_ceil(BLOCK);
        let each = blocks / self.x.parts().max(1);
        let place = Place::new(self.x.depth(), all.quants, self.weights.isa);
        let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
        for tile in self.tiles.clone() {
            READ.with_borrow_mut(|read| {
                read.find(self.x, tile, (0..blocks, each), place.lines());
                let [a, starts, a_scales] = place.split(laid, read.step);
                for panel in self.panels.clone() {
                    let b = self.weights.blocks_of(all, panel, 0, blocks);
                    let vectors = panels.columns(panel) / panels.lanes;
                    let mut target = self.target(tile, panel);
                    target.prefetch();
                    target.isa.dot_tile(Dots {
                        pieces: &read.pieces,
                        a,
                        starts,
                        a_scales,
                        step: read.step,
                        b,
                        rows: target.rows,
                        vectors,
                        out: &mut out,
                        accumulate: false,
                    });
                    target.store(&out, Some(epilogue));
                }
            });
        }
    }

    /// The order of its work over `depth` depths.
    fn order(&self, depth: usize) -> Order {
        // Where the threads are equally fast, this one goes on there.
        let next = self.panels.end + self.panels.len() * (pool().threads() - 1);
        Order {
            tiles: self.tiles.clone(),
            panels: self.panels.clone(),
            few: self.tiles.len() * TILE_ROWS * depth * 4 < GROUP_BYTES,
            next: Some(next).filter(|next| *next < self.weights.panels().count()),
        }
    }
}

/// In which order a unit's tiles meet its panels.
///
/// Many rows: tile after tile, each through all panels, which stay in the second-level cache. Few rows stay there
/// themselves, while panel after panel comes from far: each is asked for while the one before it is multiplied.
struct Order {
    tiles: Range<usize>,
    panels: Range<usize>,
    few: bool,
    /// A panel of what comes after this unit.
    next: Option<usize>,
}

impl Order {
    /// Calls `step` with every tile, panel, and the part of what `weights` of another panel has that is to be asked for
    /// meanwhile.
    fn run<'w>(
        self,
        weights: impl Fn(usize) -> Option<&'w [f32]>,
        mut step: impl FnMut(usize, usize, &'w [f32]),
    ) {
        let Self { tiles, panels, few, next } = self;
        if !few {
            tiles.for_each(|tile| panels.clone().for_each(|panel| step(tile, panel, &[])));
            return;
        }
        for panel in panels.clone() {
            let after = if panel + 1 < panels.end { Some(panel + 1) } else { next };
            let ahead = after.and_then(&weights).unwrap_or_default();
            let part = ahead.len().div_ceil(tiles.len().max(1)).next_multiple_of(LINE).max(1);
            let mut parts = ahead.chunks(part);
            for tile in tiles.clone() {
                step(tile, panel, parts.next().unwrap_or_default());
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
        let tile = Tile {
            rows: (self.first..self.first + self.rows).map(Some),
            sums,
            step: self.columns,
            place: self.place(),
            outputs: self.panels.outputs(self.panel),
            width: self.panels.outputs,
            cell: &mut *self.cell,
        };
        epilogue.unwrap_or(&Epilogue::default()).finish(self.isa, tile);
    }
}
