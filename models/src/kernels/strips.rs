//! Activations in the order in which tiles read them.
//!
//! A *strip* is a run of places (rows of a matrix, pixels of an image's line) side by side: their first values, then
//! their second ones, and so on. A matrix is cut into strips as high as a tile. An image's lines are strips as they are,
//! and what the windows of a convolution's tile see are parts of several of them: no place is put in order, or
//! rounded, more than once, and the matrix of all windows never exists.

use std::cell::RefCell;
use std::ops::Range;

use super::isa::Isa;
use super::pool::pool;
use super::simd::{Aligned, Interleave, Piece, TILE_ROWS};

thread_local! {
    /// Places that this thread gathers, as many as go into order together.
    pub(super) static GATHERED: RefCell<[Vec<f32>; TILE_ROWS]> =
        const { RefCell::new([const { Vec::new() }; TILE_ROWS]) };
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

/// What a product multiplies with weights.
pub trait Rows: Sync {
    /// Rows of the result.
    fn count(&self) -> usize;
    /// As strips, for tiles of `most` rows at most.
    fn strips(&self, most: usize) -> impl Strips;
}

/// Where a part of a tile's depth lies: the place of the tile's first row in a strip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which strip.
    pub strip: usize,
    /// Which of its places.
    pub place: usize,
    /// Which part of the depth it is.
    pub index: usize,
}

/// Activations as strips, and where tiles find theirs in them.
pub trait Strips: Sync {
    /// Tiles, from the first row of the result on.
    fn tiles(&self) -> usize;
    /// First row of tile `index`; of the one past the last, the end.
    fn start(&self, index: usize) -> usize;
    /// Number of strips.
    fn strips(&self) -> usize;
    /// Places of strip `index`; none when nothing looks at it.
    fn places(&self, index: usize) -> usize;
    /// Places of the longest strip.
    fn most(&self) -> usize;
    /// Values of a place.
    fn depth(&self) -> usize;
    /// Place `place` of strip `strip`, as it lies in memory or gathered in `buffer`.
    fn place<'a>(&'a self, strip: usize, place: usize, buffer: &'a mut Vec<f32>) -> &'a [f32];
    /// Parts that the whole depth of a tile has, present or not.
    fn parts(&self) -> usize;
    /// Calls `each` with the parts of tile `index`; those that lack are zeros. All its strips are equally long.
    fn each_part(&self, index: usize, each: impl FnMut(Part));
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

    fn strips(&self, most: usize) -> impl Strips {
        Stacked { rows: *self, tiles: Tiles::new(self.count(), most) }
    }
}

/// A matrix, each tile a strip.
struct Stacked<'a> {
    rows: Dense<'a>,
    tiles: Tiles,
}

impl Strips for Stacked<'_> {
    fn tiles(&self) -> usize {
        self.tiles.count
    }

    fn start(&self, index: usize) -> usize {
        self.tiles.start(index)
    }

    fn strips(&self) -> usize {
        self.tiles.count
    }

    fn places(&self, index: usize) -> usize {
        self.tiles.height(index)
    }

    fn most(&self) -> usize {
        self.tiles.most()
    }

    fn depth(&self) -> usize {
        self.rows.width
    }

    fn place<'a>(&'a self, strip: usize, place: usize, _buffer: &'a mut Vec<f32>) -> &'a [f32] {
        let Dense { values, width } = self.rows;
        &values[(self.tiles.start(strip) + place) * width..][..width]
    }

    fn parts(&self) -> usize {
        1
    }

    fn each_part(&self, index: usize, mut each: impl FnMut(Part)) {
        each(Part { strip: index, place: 0, index: 0 });
    }
}

/// Puts `x` in order: per strip, `[value][place]`.
pub(super) fn lay_floats(laid: &mut Aligned<f32>, x: &impl Strips, isa: Isa) {
    let stride = x.most() * x.depth();
    laid.grow(x.strips() * stride);
    pool().chunks(&mut laid[..x.strips() * stride], stride, |strip, to| {
        GATHERED.with_borrow_mut(|buffers| {
            let step = x.places(strip);
            for first in (0..step).step_by(TILE_ROWS) {
                let height = TILE_ROWS.min(step - first);
                let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
                let free = rows.iter_mut().zip(buffers.iter_mut());
                for (r, (row, buffer)) in free.enumerate().take(height) {
                    *row = x.place(strip, first + r, buffer);
                }
                isa.interleave(Interleave { rows, height, step, tile: &mut to[first..] });
            }
        });
    });
}

/// What a tile reads of the strips of `x`.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub pieces: Vec<Piece>,
    /// Distance between depths.
    pub step: usize,
}

impl Read {
    /// Finds the pieces of tile `index` for the `span` of the weights' depth, whose parts are `part` long; all in depths,
    /// or in blocks of them. Strips hold `lines` numbers of each place.
    pub fn find(
        &mut self,
        x: &impl Strips,
        index: usize,
        (span, part): (Range<usize>, usize),
        lines: usize,
    ) {
        let (stride, here) = (x.most() * lines, part.min(lines));
        self.pieces.clear();
        x.each_part(index, |p| {
            self.step = x.places(p.strip);
            let first = p.index * part;
            let (from, to) = (span.start.max(first), span.end.min(first + here));
            if from < to {
                let a = p.strip * stride + p.place + (from - first) * self.step;
                self.pieces.push(Piece { a, b: from - span.start, count: to - from });
            }
        });
    }
}
