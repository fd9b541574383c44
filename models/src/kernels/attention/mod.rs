//! Attention with grouped heads.
//!
//! A unit of work is one head's block of queries, as many as a tile has columns. It goes through the keys a few at a
//! time: their scores, the softmax so far and the sums over the values all stay in the first-level cache (Dao et al.
//! 2022, arXiv 2205.14135). Scores are held transposed, keys by queries, so that the softmax runs over vectors of
//! queries and its result is at once an operand of the product with the values.

mod block;
mod columns;
mod rounded;

use std::cell::RefCell;

use candle_core::Result;

use super::isa::Isa;
use super::matrix::{Columns, Matrix};
use super::packed::Compute;
use super::pool::{Cell, Edges, Grid, pool};
use super::simd::Aligned;
use super::strips::Tiles;
use super::tally;
use block::{Block, Plan};

/// Keys whose scores are held at a time: with the sums over the values they fill the first-level cache.
const KEYS: usize = 96;

/// Which columns a row of the scores sees: always the first so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// Every row sees every column.
    All,
    /// The last row sees every column, all others see all but the last.
    LastOnlyByItself,
    /// Row `r` sees `prefix + r + 1` columns.
    Causal {
        /// Columns that every row sees.
        prefix: usize,
    },
}

impl Visible {
    fn columns(self, row: usize, rows: usize, columns: usize) -> usize {
        match self {
            Self::All => columns,
            Self::LastOnlyByItself if row + 1 == rows => columns,
            Self::LastOnlyByItself => columns - 1,
            Self::Causal { prefix } => (prefix + row + 1).min(columns),
        }
    }
}

/// Heads of queries, keys or values, side by side in each row, in one piece of memory or in two.
#[derive(Debug, Clone, Copy)]
struct Heads<'a> {
    pieces: [Piece<'a>; 2],
    /// Rows of the first piece.
    first: usize,
    /// Width of a head.
    size: usize,
}

/// Rows one below the other.
#[derive(Debug, Clone, Copy, Default)]
struct Piece<'a> {
    values: &'a [f32],
    /// Distance between rows.
    step: usize,
}

impl<'a> Heads<'a> {
    /// `None` when they are in more than two pieces.
    fn new(pieces: &[Columns<'a>], size: usize) -> Option<Self> {
        let mut heads = Self { pieces: Default::default(), first: usize::MAX, size };
        for (to, piece) in heads.pieces.iter_mut().zip(pieces) {
            let (values, step) = piece.parts();
            *to = Piece { values, step };
        }
        if let [first, _] = pieces {
            heads.first = first.rows();
        }
        (pieces.len() <= heads.pieces.len()).then_some(heads)
    }

    #[inline]
    fn row(&self, head: usize, row: usize) -> &'a [f32] {
        let (piece, row) = match row.checked_sub(self.first) {
            None => (&self.pieces[0], row),
            Some(row) => (&self.pieces[1], row),
        };
        &piece.values[row * piece.step + head * self.size..][..self.size]
    }
}

/// The numbers of one attention.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    key_heads: usize,
    rows: usize,
    columns: usize,
    visible: Visible,
}

thread_local! {
    /// Keys and values in the order of the tiles.
    static SIDES: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
    /// The same, rounded.
    static ROUNDED: RefCell<Aligned<u32>> = const { RefCell::new(Aligned::new()) };
    /// Queries and scores of the block that this thread works on.
    static SCORES: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
    /// The same of blocks in 8 bits.
    static WORDS: RefCell<rounded::Scratch> = const { RefCell::new(rounded::Scratch::new()) };
}

/// Attention of `q` (`[L, H·hd]`, heads side by side as linear layers give them) over `keys` and `values` (`[C, K·hd]`, `K`
/// dividing `H`): `[L, H·hd]`; `heads` is `(H, K)`. Keys and values may come in two pieces each, one below the other.
///
/// Query head `h` uses key head `h / (H/K)`; scores are scaled by `hd^−0.5`. With [`Compute::Int8`] both products are of
/// values rounded to 8 bits.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend(
    q: &Columns<'_>,
    keys: &[Columns<'_>],
    values: &[Columns<'_>],
    heads: (usize, usize),
    visible: Visible,
    compute: Compute,
) -> Result<Matrix> {
    let mut out = Matrix::unwritten(q.rows(), q.width());
    attend_into(q, (keys, values), heads, visible, compute, out.values_mut())?;
    Ok(out)
}

/// As [`attend`], with the result in `out`.
///
/// # Errors
/// As there.
pub fn attend_into(
    q: &Columns<'_>,
    (keys, values): (&[Columns<'_>], &[Columns<'_>]),
    (heads, key_heads): (usize, usize),
    visible: Visible,
    compute: Compute,
    out: &mut [f32],
) -> Result<()> {
    let size = q.width() / heads.max(1);
    let count = |side: &[Columns<'_>]| side.iter().map(Columns::rows).sum::<usize>();
    let columns = count(keys);
    let fits = q.width() == heads * size
        && keys.iter().chain(values).all(|piece| piece.width() == key_heads * size)
        && count(values) == columns
        && out.len() == q.rows() * q.width();
    let grouped = key_heads > 0 && heads.is_multiple_of(key_heads);
    let sides = (Heads::new(keys, size), Heads::new(values, size));
    let (Some(queries), (Some(k), Some(v)), true) =
        (Heads::new(std::slice::from_ref(q), size), sides, fits && grouped)
    else {
        let widths =
            |side: &[Columns<'_>]| side.iter().map(|p| (p.rows(), p.width())).collect::<Vec<_>>();
        candle_core::bail!(
            "{heads} heads in rows of {} cannot attend to {key_heads} in {:?} and {:?}",
            q.width(),
            widths(keys),
            widths(values)
        );
    };
    let sizes = Sizes { heads, key_heads, rows: q.rows(), columns, visible };
    counted(queries, k, v, sizes, compute, out);
    Ok(())
}

fn counted(
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    sizes: Sizes,
    compute: Compute,
    out: &mut [f32],
) {
    if out.is_empty() || sizes.columns == 0 {
        // Over no keys the sums are empty.
        out.fill(0.0);
        return;
    }
    let products = 2 * out.len() * sizes.columns;
    tally::counted(
        |t| &mut t.attention,
        products,
        || match compute {
            Compute::Exact => in_floats(q, k, v, sizes, out),
            Compute::Int8 => in_bytes(q, k, v, sizes, out),
        },
    );
}

/// `out`: `[rows, heads·size]`.
fn in_floats(q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, sizes: Sizes, out: &mut [f32]) {
    let (isa, size) = (Isa::current(), q.size);
    let shape = isa.float_shape();
    let plan = Plan {
        keys: Tiles::new(sizes.columns, shape.rows),
        values: Tiles::new(size, shape.rows),
        columns: sizes.columns,
        size,
    };
    SIDES.with_borrow_mut(|packed| {
        packed.grow(sizes.key_heads * plan.head());
        let packed = &mut packed[..sizes.key_heads * plan.head()];
        pool().chunks(packed, plan.head(), |head, packed| plan.pack(isa, k, v, head, packed));
        let packed = &*packed;
        each_block(isa, size, sizes, out, |head, cell| {
            let packed = &packed[head * plan.head()..][..plan.head()];
            let block = Block::new(isa, q, packed, plan, sizes);
            SCORES.with_borrow_mut(|scratch| block.run(cell, scratch));
        });
    });
}

/// `out`: `[rows, heads·size]`.
fn in_bytes(q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, sizes: Sizes, out: &mut [f32]) {
    let (isa, size) = (Isa::current(), q.size);
    let plan = rounded::Plan::new(isa, sizes.columns, size);
    ROUNDED.with_borrow_mut(|packed| {
        packed.grow(sizes.key_heads * plan.head());
        let packed = &mut packed[..sizes.key_heads * plan.head()];
        pool().chunks(packed, plan.head(), |head, packed| plan.pack(k, v, head, packed));
        let packed = &*packed;
        each_block(isa, size, sizes, out, |head, cell| {
            let packed = &packed[head * plan.head()..][..plan.head()];
            let block = rounded::Block { plan, q, packed, sizes };
            WORDS.with_borrow_mut(|scratch| block.run(cell, scratch));
        });
    });
}

/// Runs `work` with each block of queries, and the head of the keys that these use.
fn each_block(
    isa: Isa,
    size: usize,
    sizes: Sizes,
    out: &mut [f32],
    work: impl Fn(usize, Cell<'_>) + Sync,
) {
    let Sizes { heads, key_heads, rows, .. } = sizes;
    let shape = isa.float_shape();
    let blocks = Tiles::new(rows, shape.lanes * shape.vectors);
    let row_edges = Edges::new((0..=blocks.count).map(|b| blocks.start(b)));
    let head_edges = Edges::new((0..=heads).map(|h| h * size));
    let grid = Grid { width: heads * size, rows: &row_edges, columns: &head_edges };
    pool().grid(out, &grid, |cell| work(cell.along / (heads / key_heads), cell));
}

#[cfg(test)]
mod tests;
