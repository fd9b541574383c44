//! Attention with grouped heads.
//!
//! A unit of work is one head's block of queries, as many as a tile has columns: the scores of the whole block stay in
//! the second-level cache, and are never written to memory. They are held transposed, keys by queries, so that the
//! softmax runs over vectors of queries and its result is at once an operand of the product with the values.

use std::cell::RefCell;

use candle_core::{Result, Tensor};

use super::functions::exp;
use super::gemm::{Interleave, Tiles};
use super::isa::Isa;
use super::pool::{Cell, Grid, pool};
use super::simd::{Aligned, Loop, Products, TILE_COLUMNS, TILE_ROWS};
use super::{tally, tensors};

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
    /// Queries and scores of the block that this thread works on.
    static SCORES: RefCell<Aligned<f32>> = const { RefCell::new(Aligned::new()) };
}

/// Attention of `q` (`[H, L, hd]`) over `k` and `v` (`[K, C, hd]`, `K` dividing `H`): `[L, H·hd]`.
///
/// Query head `h` uses key head `h / (H/K)`; scores are scaled by `hd^−0.5`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, visible: Visible) -> Result<Tensor> {
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
    counted(q, k, v, Sizes { heads, key_heads, rows, columns, visible }, &mut out);
    tensors::matrix(out, rows, heads * size)
}

/// As [`attend`], with heads side by side in each row: `q` `[L, H·hd]`, `k` and `v` `[C, K·hd]`, as linear layers give
/// them. Each is a tensor and the column at which it begins there.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn attend_rows(
    q: (&Tensor, usize),
    k: (&Tensor, usize),
    v: (&Tensor, usize),
    (heads, key_heads, size): (usize, usize, usize),
    visible: Visible,
) -> Result<Tensor> {
    let (rows, columns) = (q.0.dim(0)?, k.0.dim(0)?);
    let wide = |(t, start): (&Tensor, usize), heads: usize| {
        Ok::<_, candle_core::Error>(start + heads * size <= t.dims2()?.1)
    };
    let fits = wide(q, heads)? && wide(k, key_heads)? && wide(v, key_heads)?;
    if !fits || v.0.dim(0)? != columns || key_heads == 0 || !heads.is_multiple_of(key_heads) {
        candle_core::bail!(
            "{heads} heads of {size} in {:?} cannot attend to {key_heads} in {:?} and {:?}",
            q.0.dims(),
            k.0.dims(),
            v.0.dims()
        );
    }
    let views = [tensors::read(q.0)?, tensors::read(k.0)?, tensors::read(v.0)?];
    let view = |index: usize, (t, start): (&Tensor, usize)| {
        Ok::<_, candle_core::Error>(Heads {
            values: &views[index].get()[start..],
            head_step: size,
            row_step: t.dim(1)?,
            size,
        })
    };
    let (q, k, v) = (view(0, q)?, view(1, k)?, view(2, v)?);
    let mut out = vec![0.0; rows * heads * size];
    counted(q, k, v, Sizes { heads, key_heads, rows, columns, visible }, &mut out);
    tensors::matrix(out, rows, heads * size)
}

fn counted(q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, sizes: Sizes, out: &mut [f32]) {
    let products = 2 * out.len() * sizes.columns;
    tally::counted(|t| &mut t.attention, products, || run(q, k, v, sizes, out));
}

/// `out`: `[rows, heads·size]`.
fn run(q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, sizes: Sizes, out: &mut [f32]) {
    let Sizes { heads, key_heads, rows, columns, .. } = sizes;
    if out.is_empty() || columns == 0 {
        return;
    }
    let (isa, size) = (Isa::current(), q.size);
    let shape = isa.float_shape();
    let plan = Plan {
        keys: Tiles::new(columns, shape.rows),
        values: Tiles::new(size, shape.rows),
        columns,
        size,
    };
    let blocks = Tiles::new(rows, shape.lanes * shape.vectors);
    SIDES.with_borrow_mut(|packed| {
        packed.grow(key_heads * plan.head());
        let packed = &mut packed[..key_heads * plan.head()];
        pool().chunks(packed, plan.head(), |head, packed| plan.pack(isa, k, v, head, packed));
        let row_edges: Vec<usize> = (0..=blocks.count).map(|b| blocks.start(b)).collect();
        let head_edges: Vec<usize> = (0..=heads).map(|h| h * size).collect();
        let grid = Grid { width: heads * size, rows: &row_edges, columns: &head_edges };
        let packed = &*packed;
        pool().grid(out, &grid, |cell| {
            let head = cell.along / (heads / key_heads);
            let (keys, values) = packed[head * plan.head()..][..plan.head()].split_at(plan.keys());
            let block = Block { isa, q, keys, values, plan, sizes };
            SCORES.with_borrow_mut(|scratch| block.run(cell, scratch));
        });
    });
}

/// How the keys and values of a head are cut into tiles.
#[derive(Clone, Copy)]
struct Plan {
    keys: Tiles,
    values: Tiles,
    columns: usize,
    size: usize,
}

impl Plan {
    /// Numbers of a head's keys.
    fn keys(&self) -> usize {
        self.keys.count * self.keys.most() * self.size
    }

    /// Numbers of a head's keys and values.
    fn head(&self) -> usize {
        self.keys() + self.values.count * self.values.most() * self.columns
    }

    /// Puts a head's keys and values in order: of the keys a few side by side, depth after depth; of the values a few
    /// of their width side by side, key after key. Side by side in memory, they are not a page apart as in the rows
    /// that a layer gave.
    fn pack(&self, isa: Isa, k: Heads<'_>, v: Heads<'_>, head: usize, packed: &mut [f32]) {
        let (keys, values) = packed.split_at_mut(self.keys());
        for (index, tile) in keys.chunks_exact_mut(self.keys.most() * self.size).enumerate() {
            let (start, height) = (self.keys.start(index), self.keys.height(index));
            let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
            for (r, row) in rows.iter_mut().enumerate().take(height) {
                *row = k.row(head, start + r);
            }
            isa.run(Interleave { rows, height, tile });
        }
        let stride = self.values.most() * self.columns;
        for column in 0..self.columns {
            let row = v.row(head, column);
            for index in 0..self.values.count {
                let (start, height) = (self.values.start(index), self.values.height(index));
                values[index * stride + column * height..][..height]
                    .copy_from_slice(&row[start..start + height]);
            }
        }
    }
}

/// What a unit of work needs.
struct Block<'a> {
    isa: Isa,
    q: Heads<'a>,
    keys: &'a [f32],
    values: &'a [f32],
    plan: Plan,
    sizes: Sizes,
}

impl Block<'_> {
    fn run(&self, mut cell: Cell<'_>, scratch: &mut Aligned<f32>) {
        let Self { isa, q, keys, values, plan, sizes } = *self;
        let (size, lanes, span) = (q.size, isa.float_shape().lanes, cell.rows());
        let width = span.len().next_multiple_of(lanes);
        let vectors = width / lanes;
        scratch.grow((size + sizes.columns) * width);
        let (queries, scores) = scratch.split_at_mut(size * width);
        let scores = &mut scores[..sizes.columns * width];
        // What an earlier block left in the padding is a number or not: it must be one.
        queries.fill(0.0);
        let scale = (size as f32).powf(-0.5);
        for (column, row) in span.clone().enumerate() {
            let to = queries[column..].iter_mut().step_by(width);
            to.zip(q.row(cell.along, row)).for_each(|(to, x)| *to = x * scale);
        }
        for tile in 0..plan.keys.count {
            let (start, rows) = (plan.keys.start(tile), plan.keys.height(tile));
            isa.multiply_tile(Products {
                depth: size,
                a: &keys[tile * plan.keys.most() * size..][..size * rows],
                a_step: rows,
                b: queries,
                b_step: width,
                rows,
                vectors,
                out: &mut scores[start * width..],
                accumulate: false,
            });
        }
        // Columns past the block's end are padding: they see one key, so that their sums are numbers.
        let mut seen = [1; TILE_COLUMNS];
        for (seen, row) in seen.iter_mut().zip(span.clone()) {
            *seen = sizes.visible.columns(row, sizes.rows, sizes.columns);
        }
        let least = seen[..span.len()].iter().copied().min().unwrap_or(0);
        let mut inverse = [0.0; TILE_COLUMNS];
        isa.run(Softmax { scores, width, least, seen: &seen, inverse: &mut inverse });
        for tile in 0..plan.values.count {
            let (first, rows) = (plan.values.start(tile), plan.values.height(tile));
            let mut out = [0.0; TILE_ROWS * TILE_COLUMNS];
            isa.multiply_tile(Products {
                depth: sizes.columns,
                a: &values[tile * plan.values.most() * sizes.columns..],
                a_step: rows,
                b: scores,
                b_step: width,
                rows,
                vectors,
                out: &mut out,
                accumulate: false,
            });
            for (column, row) in span.clone().enumerate() {
                let to = &mut cell.row(row)[first..first + rows];
                for (to, sums) in to.iter_mut().zip(out.chunks_exact(width)) {
                    *to = sums[column] * inverse[column];
                }
            }
        }
    }
}

/// Softmax of every column, but for the division by its sum.
struct Softmax<'a> {
    /// `[key][query]`
    scores: &'a mut [f32],
    width: usize,
    /// Keys that every query sees.
    least: usize,
    /// Keys that each query sees.
    seen: &'a [usize; TILE_COLUMNS],
    /// One over the sums.
    inverse: &'a mut [f32; TILE_COLUMNS],
}

impl Loop for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // As many queries at a time as make a cache line, so that what goes along with a column stays in registers.
        let mut first = 0;
        while first < self.width {
            let (scores, left) = (&mut self.scores[first..], self.width - first);
            let (seen, inverse) = (&self.seen[first..], &mut self.inverse[first..]);
            first += match left {
                16.. => columns::<16>(scores, self.width, self.least, seen, inverse),
                8.. => columns::<8>(scores, self.width, self.least, seen, inverse),
                _ => columns::<4>(scores, self.width, self.least, seen, inverse),
            };
        }
    }
}

/// The next `N` columns; gives their number.
#[inline(always)]
fn columns<const N: usize>(
    scores: &mut [f32],
    width: usize,
    least: usize,
    seen: &[usize],
    inverse: &mut [f32],
) -> usize {
    let mut largest = [f32::NEG_INFINITY; N];
    for row in scores.chunks(width).take(least) {
        for (m, v) in largest.iter_mut().zip(&row[..N]) {
            *m = if *v > *m { *v } else { *m };
        }
    }
    for (key, row) in scores.chunks(width).enumerate().skip(least) {
        for (c, (m, v)) in largest.iter_mut().zip(&row[..N]).enumerate() {
            *m = if key < seen[c] && *v > *m { *v } else { *m };
        }
    }
    let mut sums = [0f32; N];
    for row in scores.chunks_mut(width).take(least) {
        for (c, (sum, v)) in sums.iter_mut().zip(&mut row[..N]).enumerate() {
            *v = exp(*v - largest[c]);
            *sum += *v;
        }
    }
    for (key, row) in scores.chunks_mut(width).enumerate().skip(least) {
        for (c, (sum, v)) in sums.iter_mut().zip(&mut row[..N]).enumerate() {
            *v = if key < seen[c] { exp(*v - largest[c]) } else { 0.0 };
            *sum += *v;
        }
    }
    for (inverse, sum) in inverse.iter_mut().zip(sums) {
        *inverse = 1.0 / sum;
    }
    N
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
mod tests {
    use candle_core::{D, Device};

    use super::*;

    #[test]
    fn rows_see_what_they_may() {
        assert_eq!(Visible::LastOnlyByItself.columns(0, 3, 3), 2);
        assert_eq!(Visible::LastOnlyByItself.columns(2, 3, 3), 3);
        assert_eq!(Visible::Causal { prefix: 4 }.columns(1, 3, 7), 6);
    }

    fn numbers(shape: (usize, usize, usize), seed: usize) -> Tensor {
        let count = shape.0 * shape.1 * shape.2;
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 250.0 - 2.0;
        Tensor::from_iter((0..count).map(value), &Device::Cpu)
            .and_then(|t| t.reshape(shape))
            .expect("the shape holds the values")
    }

    /// The same by whole matrices, in candle's products.
    fn by_matrices(q: &Tensor, k: &Tensor, v: &Tensor, visible: Visible) -> Result<Tensor> {
        let ((heads, rows, size), (key_heads, columns, _)) = (q.dims3()?, k.dims3()?);
        let spread = |t: &Tensor| {
            let parts = (0..heads).map(|h| t.narrow(0, h / (heads / key_heads), 1));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
        };
        let scores = (q.matmul(&spread(k)?.t()?)? * (size as f64).powf(-0.5))?;
        let hidden = (0..rows).flat_map(|r| {
            let seen = visible.columns(r, rows, columns);
            (0..columns).map(move |c| if c < seen { 0f32 } else { -1e30 })
        });
        let hidden = Tensor::from_iter(hidden, &Device::Cpu)?.reshape((rows, columns))?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&hidden)?, D::Minus1)?;
        weights.matmul(&spread(v)?)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
    }

    #[test]
    fn every_shape_equals_the_plain_form() -> Result<()> {
        for (heads, key_heads, rows, columns, size) in [
            (1, 1, 1, 1, 8),
            (2, 1, 5, 9, 12),
            (6, 2, 50, 227, 64),
            (3, 3, 49, 49, 20),
            (4, 1, 33, 100, 7),
            (12, 12, 70, 70, 16),
        ] {
            let q = numbers((heads, rows, size), 1);
            let (k, v) =
                (numbers((key_heads, columns, size), 2), numbers((key_heads, columns, size), 3));
            let mut kinds = vec![Visible::All];
            if columns >= rows {
                kinds.push(Visible::Causal { prefix: columns - rows });
            }
            if columns > 1 {
                kinds.push(Visible::LastOnlyByItself);
            }
            for visible in kinds {
                let expected = by_matrices(&q, &k, &v, visible)?;
                let found = attend(&q, &k, &v, visible)?;
                let worst = (&found - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(worst < 1e-5, "{heads} {rows} {columns} {size} {visible:?}: {worst}");
                let flat = |t: &Tensor| {
                    let (h, l, s) = t.dims3()?;
                    t.transpose(0, 1)?.contiguous()?.reshape((l, h * s))
                };
                let kv = Tensor::cat(&[flat(&k)?, flat(&v)?], 1)?;
                let sizes = (heads, key_heads, size);
                let sides = [(&kv, 0), (&kv, key_heads * size)];
                let again = attend_rows((&flat(&q)?, 0), sides[0], sides[1], sizes, visible)?;
                assert_eq!(found.to_vec2::<f32>()?, again.to_vec2::<f32>()?);
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_no_number_stays_none_and_shapes_are_checked() -> Result<()> {
        let (q, k) = (numbers((1, 3, 8), 1), numbers((1, 4, 8), 2));
        let bad = (&q * f64::NAN)?;
        let out = attend(&bad, &k, &k, Visible::All)?;
        assert!(out.to_vec2::<f32>()?.iter().flatten().all(|v| v.is_nan()));
        assert!(attend(&q, &k, &numbers((1, 5, 8), 3), Visible::All).is_err());
        assert!(attend(&numbers((3, 3, 8), 1), &numbers((2, 4, 8), 2), &k, Visible::All).is_err());
        Ok(())
    }
}
