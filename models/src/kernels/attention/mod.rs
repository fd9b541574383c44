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

use candle_core::{Result, Tensor};

use super::isa::Isa;
use super::matrix::{Columns, Matrix};
use super::packed::Compute;
use super::pool::{Cell, Grid, pool};
use super::simd::Aligned;
use super::strips::Tiles;
use super::{tally, tensors};
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

/// Heads of queries, keys or values in memory.
#[derive(Debug, Clone, Copy)]
struct Heads<'a> {
    values: &'a [f32],
    /// Distance between heads.
    head_step: usize,
    /// Distance between rows.
    row_step: usize,
    /// Width of a head.
    size: usize,
}

impl<'a> Heads<'a> {
    fn row(&self, head: usize, row: usize) -> &'a [f32] {
        let start = head * self.head_step + row * self.row_step;
        &self.values[start..start + self.size]
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

/// Attention of `q` (`[H, L, hd]`) over `k` and `v` (`[K, C, hd]`, `K` dividing `H`): `[L, H·hd]`.
///
/// Query head `h` uses key head `h / (H/K)`; scores are scaled by `hd^−0.5`. With [`Compute::Int8`] both products are of
/// values rounded to 8 bits.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    visible: Visible,
    compute: Compute,
) -> Result<Tensor> {
    let ((heads, rows, size), (key_heads, columns, _)) = (q.dims3()?, k.dims3()?);
    let fits = k.dims() == [key_heads, columns, size] && v.dims() == k.dims();
    if !fits || key_heads == 0 || !heads.is_multiple_of(key_heads) {
        candle_core::bail!("{:?} cannot attend to {:?} and {:?}", q.dims(), k.dims(), v.dims());
    }
    let views = [tensors::read(q)?, tensors::read(k)?, tensors::read(v)?];
    let [q, k, v] =
        [(&views[0], rows), (&views[1], columns), (&views[2], columns)].map(|(values, rows)| {
            Heads { values: values.get(), head_step: rows * size, row_step: size, size }
        });
    let mut out = vec![0.0; rows * heads * size];
    counted(q, k, v, Sizes { heads, key_heads, rows, columns, visible }, compute, &mut out);
    tensors::matrix(out, rows, heads * size)
}

/// As [`attend`], with heads side by side in each row: `q` `[L, H·hd]`, `k` and `v` `[C, K·hd]`, as linear layers give
/// them; `heads` is `(H, K)`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend_rows(
    q: &Columns<'_>,
    k: &Columns<'_>,
    v: &Columns<'_>,
    (heads, key_heads): (usize, usize),
    visible: Visible,
    compute: Compute,
) -> Result<Matrix> {
    let size = q.width() / heads.max(1);
    let fits = q.width() == heads * size
        && [k, v].iter().all(|side| side.width() == key_heads * size && side.rows() == k.rows());
    if !fits || key_heads == 0 || !heads.is_multiple_of(key_heads) {
        candle_core::bail!(
            "{heads} heads in rows of {} cannot attend to {key_heads} in {} rows of {} and {} of {}",
            q.width(),
            k.rows(),
            k.width(),
            v.rows(),
            v.width()
        );
    }
    let mut out = Matrix::unwritten(q.rows(), q.width());
    let sizes = Sizes { heads, key_heads, rows: q.rows(), columns: k.rows(), visible };
    counted(
        side_by_side(q, size),
        side_by_side(k, size),
        side_by_side(v, size),
        sizes,
        compute,
        out.values_mut(),
    );
    Ok(out)
}

/// Heads side by side in each row.
fn side_by_side<'a>(columns: &Columns<'a>, size: usize) -> Heads<'a> {
    let (values, row_step) = columns.parts();
    Heads { values, head_step: size, row_step, size }
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
    let row_edges: Vec<usize> = (0..=blocks.count).map(|b| blocks.start(b)).collect();
    let head_edges: Vec<usize> = (0..=heads).map(|h| h * size).collect();
    let grid = Grid { width: heads * size, rows: &row_edges, columns: &head_edges };
    pool().grid(out, &grid, |cell| work(cell.along / (heads / key_heads), cell));
}

/// `x` (`[L, heads·hd]`) as heads: `[heads, L, hd]`.
///
/// # Errors
/// When `heads` does not divide the width.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    x.reshape((rows, heads, width / heads))?.transpose(0, 1)?.contiguous()
}

#[cfg(test)]
mod tests;
