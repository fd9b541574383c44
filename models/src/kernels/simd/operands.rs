//! What the tiles work on, checked once before their loops.

use super::{BLOCK, SPAN, SUPER_BLOCKS, Shape};

/// A run of depths that lie evenly in the activations, and one after the other in the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the activations: the place of the first depth's first row.
    pub a: usize,
    /// Where it begins in the weights: depths, or blocks of them.
    pub b: usize,
    /// How long it is: depths, or blocks of them.
    pub count: usize,
}

impl Piece {
    /// Everything, from the beginning.
    pub fn whole(count: usize) -> Self {
        Self { a: 0, b: 0, count }
    }
}

/// Operands of a tile of floats.
#[derive(Debug)]
pub struct Products<'a> {
    /// What is summed over.
    pub pieces: &'a [Piece],
    /// Activations: row `r` at depth `k` of a piece is `a[piece.a + k·a_step + r]`.
    pub a: &'a [f32],
    /// Distance between depths in `a`.
    pub a_step: usize,
    /// Weights: column `c` at depth `k` of a piece is `b[(piece.b + k)·b_step + c]`.
    pub b: &'a [f32],
    /// Distance between depths in `b`.
    pub b_step: usize,
    /// Rows of the tile.
    pub rows: usize,
    /// Vectors of columns of the tile.
    pub vectors: usize,
    /// The result, row by row, rows as far apart as `vectors` vectors are wide.
    pub out: &'a mut [f32],
    /// True when `out` holds sums to go on from.
    pub accumulate: bool,
    /// Weights that are wanted soon: asked for on the way, a line at each depth.
    pub ahead: &'a [f32],
}

impl Products<'_> {
    pub(super) fn check(&self, shape: Shape) {
        assert!(self.rows > 0 && self.rows <= shape.rows, "rows of a tile");
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a tile");
        let columns = self.vectors * shape.lanes;
        assert!(self.out.len() >= self.rows * columns, "the result");
        for piece in self.pieces {
            let Some(last) = piece.count.checked_sub(1) else { continue };
            assert!(piece.a + last * self.a_step + self.rows <= self.a.len(), "activations");
            assert!((piece.b + last) * self.b_step + columns <= self.b.len(), "weights");
        }
    }
}

/// How weights of [`BLOCK`] depths are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quants {
    /// One byte each, 128 added. They are widened and not multiplied as they are.
    Bytes,
    /// The same, with one scale for all depths of a column.
    Columns,
    /// Four bits each, 8 added.
    Nibbles,
    /// Four bits each, less a minimum. Scale and minimum are whole numbers, the low and the high byte of what stands for
    /// the scale, and each is multiplied with a factor of [`super::SUPER_BLOCK`] depths.
    Minima,
}

impl Quants {
    /// What is added to the stored weights; with minima one, as the sums of a row's activations are all that is wanted.
    pub fn offset(self) -> i32 {
        match self {
            Self::Bytes | Self::Columns => 128,
            Self::Nibbles => 8,
            Self::Minima => 1,
        }
    }

    /// Activations with one scale.
    pub fn span(self) -> usize {
        if self == Self::Columns { SPAN } else { BLOCK }
    }

    /// Lines of factors that a panel has for columns of `blocks` blocks.
    pub fn factors(self, blocks: usize) -> usize {
        match self {
            Self::Bytes | Self::Nibbles => 0,
            Self::Columns => 1,
            Self::Minima => 2 * blocks.div_ceil(SUPER_BLOCKS),
        }
    }

    /// Bytes of a block of one column.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bytes | Self::Columns => BLOCK,
            Self::Nibbles | Self::Minima => BLOCK / 2,
        }
    }
}

/// Quantised weights of some blocks of depths.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// How they are stored.
    pub quants: Quants,
    /// Per block, per group, per column, the group's depths.
    pub bytes: &'a [u8],
    /// Per block and column, the scale (half precision), or what [`Quants::Minima`] has there; [`Quants::Columns`] none.
    pub scales: &'a [u16],
    /// Per super-block, the scales' factor of each column, then the minima's (half precision). Of [`Quants::Columns`]
    /// each column's scale.
    pub factors: &'a [u16],
}

impl Weights<'_> {
    fn check(&self, blocks: usize, columns: usize) {
        assert!(self.bytes.len() >= blocks * self.quants.bytes() * columns, "weights");
        let one = self.quants == Quants::Columns;
        assert!(one || self.scales.len() >= blocks * columns, "scales of the weights");
        assert!(self.factors.len() >= self.quants.factors(blocks) * columns, "factors");
    }
}

/// Operands of a tile of quantised products.
#[derive(Debug)]
pub struct Dots<'a> {
    /// What is summed over, in blocks of [`BLOCK`] depths.
    pub pieces: &'a [Piece],
    /// Activations, in words of a group of depths: `a[piece.a + (block·groups + group)·step + r]`.
    pub a: &'a [u32],
    /// Per span of activations and row, what the sum starts from (bits of an `i32`): minus the weights' offset times the
    /// sum of the row's activations. At `[piece.a + span·step + r]`; pieces begin with a span. For [`Quants::Minima`]
    /// minus that sum by its scale (bits of an `f32`).
    pub starts: &'a [u32],
    /// Per span and row, the activations' scale (bits of an `f32`); as `starts`.
    pub a_scales: &'a [u32],
    /// Distance between groups in `a`, between spans in `starts` and `a_scales`.
    pub step: usize,
    /// Weights.
    pub b: Weights<'a>,
    /// Rows of the tile.
    pub rows: usize,
    /// Vectors of columns of the tile.
    pub vectors: usize,
    /// The result, as in [`Products`].
    pub out: &'a mut [f32],
    /// True when `out` holds sums to go on from.
    pub accumulate: bool,
}

impl Dots<'_> {
    pub(super) fn check(&self, shape: Shape, group: usize) {
        assert!(self.rows > 0 && self.rows <= shape.rows, "rows of a tile");
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a tile");
        let columns = self.vectors * shape.lanes;
        assert!(self.out.len() >= self.rows * columns, "the result");
        assert!(self.b.quants != Quants::Bytes, "weights that are multiplied as they are");
        for piece in self.pieces.iter().filter(|piece| piece.count > 0) {
            let end = |lines: usize| piece.a + (lines - 1) * self.step + self.rows;
            assert!(end(piece.count * (BLOCK / group)) <= self.a.len(), "activations");
            let spans = (piece.count * BLOCK).div_ceil(self.b.quants.span());
            assert!(end(spans) <= self.starts.len(), "starts");
            assert!(end(spans) <= self.a_scales.len(), "scales of the activations");
            self.b.check(piece.b + piece.count, columns);
        }
    }
}

/// Operands of a widening.
#[derive(Debug)]
pub struct Widening<'a> {
    /// Blocks of [`BLOCK`] depths.
    pub blocks: usize,
    /// Weights.
    pub b: Weights<'a>,
    /// Vectors of columns.
    pub vectors: usize,
    /// `out[k·columns + c]`
    pub out: &'a mut [f32],
}

impl Widening<'_> {
    pub(super) fn check(&self, shape: Shape) {
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a panel");
        let columns = self.vectors * shape.lanes;
        self.b.check(self.blocks, columns);
        assert!(self.out.len() >= self.blocks * BLOCK * columns, "the result");
    }
}
