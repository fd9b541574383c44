//! The tiles, written once over the vectors of any instruction set.

use super::{BLOCK, Shape};

/// A vector of 32-bit floats.
///
/// # Safety
/// All methods: the processor has the instruction set, and pointers are good for a whole vector.
pub(super) trait Floats: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Half-precision values, widened.
    unsafe fn load_half(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn mul(self, by: Self) -> Self;
    unsafe fn add(self, to: Self) -> Self;
    unsafe fn sub(self, by: Self) -> Self;
    /// The larger one; `other` where one of them is no number.
    unsafe fn max(self, other: Self) -> Self;
    /// 2 to the power of the integer in the low bits.
    unsafe fn power_of_two(self) -> Self;
    /// `self·by + plus`, rounded once.
    unsafe fn fma(self, by: Self, plus: Self) -> Self;
}

/// Vectors of 8-bit products, `GROUP` of them summed in each lane.
///
/// # Safety
/// As [`Floats`].
pub(super) trait Bytes {
    type Float: Floats;
    /// One 32-bit sum for each lane of `Float`.
    type Sums: Copy;
    /// Weights of `GROUP` depths for each lane, ready to be multiplied.
    type Weights: Copy;
    const GROUP: usize;
    /// True when whole bytes are weights without their offset.
    const SIGNED: bool = false;
    unsafe fn sums(start: i32) -> Self::Sums;
    /// `LANES·GROUP` bytes.
    unsafe fn weights(from: *const u8) -> Self::Weights;
    /// `LANES·GROUP` bytes of two nibbles each: the groups of the low ones, and of the high ones.
    unsafe fn nibbles(from: *const u8) -> [Self::Weights; 2];
    /// Adds the products of the weights with the activations in `word`.
    unsafe fn dot(sums: Self::Sums, weights: Self::Weights, word: u32) -> Self::Sums;
    unsafe fn float(sums: Self::Sums) -> Self::Float;
    /// Weights of depth `k` of the group, as floats.
    unsafe fn depth(weights: Self::Weights, k: usize) -> Self::Float;
}

/// Depths that weights are asked for before they are used: about the time that the second-level cache takes.
const AHEAD: usize = 8;

/// Asks for a line of memory. Any address will do: nothing is read.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; addresses that are none are ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

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
    /// One byte each, 128 added.
    Bytes,
    /// Four bits each, 8 added.
    Nibbles,
}

impl Quants {
    /// What is added to the stored weights.
    pub fn offset(self) -> i32 {
        match self {
            Self::Bytes => 128,
            Self::Nibbles => 8,
        }
    }

    /// Bytes of a block of one column.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bytes => BLOCK,
            Self::Nibbles => BLOCK / 2,
        }
    }
}

/// Operands of a tile of quantised products.
#[derive(Debug)]
pub struct Dots<'a> {
    /// What is summed over, in blocks of [`BLOCK`] depths.
    pub pieces: &'a [Piece],
    /// Activations, in words of a group of depths: `a[piece.a + (block·groups + group)·step + r]`.
    pub a: &'a [u32],
    /// Per block and row, what the sum starts from (bits of an `i32`): minus the weights' offset times the sum of the
    /// row's activations. At `[piece.a + block·step + r]`.
    pub starts: &'a [u32],
    /// Per block and row, the activations' scale (bits of an `f32`); as `starts`.
    pub a_scales: &'a [u32],
    /// Distance between groups in `a`, between blocks in `starts` and `a_scales`.
    pub step: usize,
    /// How the weights are stored.
    pub quants: Quants,
    /// Weights: per block, per group, per column, the group's depths.
    pub b: &'a [u8],
    /// Per block and column, the weights' scale (half precision).
    pub b_scales: &'a [u16],
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
        for piece in self.pieces.iter().filter(|piece| piece.count > 0) {
            let end = |lines: usize| piece.a + (lines - 1) * self.step + self.rows;
            assert!(end(piece.count * (BLOCK / group)) <= self.a.len(), "activations");
            assert!(end(piece.count) <= self.starts.len(), "starts");
            assert!(end(piece.count) <= self.a_scales.len(), "scales of the activations");
            let weights = (piece.b + piece.count) * columns;
            assert!(weights * self.quants.bytes() <= self.b.len(), "weights");
            assert!(weights <= self.b_scales.len(), "scales of the weights");
        }
    }
}

/// Operands of a widening.
#[derive(Debug)]
pub struct Widening<'a> {
    /// Blocks of [`BLOCK`] depths.
    pub blocks: usize,
    /// How the weights are stored.
    pub quants: Quants,
    /// Weights, as in [`Dots`].
    pub b: &'a [u8],
    /// Scales, as in [`Dots`].
    pub b_scales: &'a [u16],
    /// Vectors of columns.
    pub vectors: usize,
    /// `out[k·columns + c]`
    pub out: &'a mut [f32],
}

impl Widening<'_> {
    pub(super) fn check(&self, shape: Shape) {
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a panel");
        let columns = self.vectors * shape.lanes;
        assert!(self.b.len() >= self.blocks * self.quants.bytes() * columns, "weights");
        assert!(self.b_scales.len() >= self.blocks * columns, "scales of the weights");
        assert!(self.out.len() >= self.blocks * BLOCK * columns, "the result");
    }
}

/// One tile of `R` rows and `C` vectors.
///
/// # Safety
/// `p` was checked, has these sizes, and the processor has the instruction set of `F`.
#[inline(always)]
pub(super) unsafe fn multiply<F: Floats, const R: usize, const C: usize>(p: &mut Products<'_>) {
    // SAFETY: every address below lies in the slices, by `Products::check`.
    unsafe {
        let out = p.out.as_mut_ptr();
        let mut sums = [[F::zero(); C]; R];
        if p.accumulate {
            for (r, row) in sums.iter_mut().enumerate() {
                for (c, sum) in row.iter_mut().enumerate() {
                    *sum = F::load(out.add((r * C + c) * F::LANES));
                }
            }
        }
        for piece in p.pieces {
            let mut a = p.a.as_ptr().wrapping_add(piece.a);
            let mut b = p.b.as_ptr().wrapping_add(piece.b * p.b_step);
            for _ in 0..piece.count {
                let mut weights = [F::zero(); C];
                for (c, weight) in weights.iter_mut().enumerate() {
                    *weight = F::load(b.add(c * F::LANES));
                    prefetch(b.wrapping_add(c * F::LANES + AHEAD * p.b_step));
                }
                for (r, row) in sums.iter_mut().enumerate() {
                    let x = F::splat(*a.add(r));
                    for (sum, weight) in row.iter_mut().zip(&weights) {
                        *sum = x.fma(*weight, *sum);
                    }
                }
                a = a.wrapping_add(p.a_step);
                b = b.wrapping_add(p.b_step);
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (c, sum) in row.iter().enumerate() {
                sum.store(out.add((r * C + c) * F::LANES));
            }
        }
    }
}

/// One tile of `R` rows and `C` vectors.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
pub(super) unsafe fn dot<B: Bytes, const R: usize, const C: usize>(d: Dots<'_>) {
    // SAFETY: every address below lies in the slices, by `Dots::check`.
    unsafe {
        let lanes = B::Float::LANES;
        let out = d.out.as_mut_ptr();
        let mut total = [[B::Float::zero(); C]; R];
        if d.accumulate {
            for (r, row) in total.iter_mut().enumerate() {
                for (c, sum) in row.iter_mut().enumerate() {
                    *sum = B::Float::load(out.add((r * C + c) * lanes));
                }
            }
        }
        for piece in d.pieces {
            let mut a = d.a.as_ptr().wrapping_add(piece.a);
            let mut starts = d.starts.as_ptr().wrapping_add(piece.a);
            let mut a_scales = d.a_scales.as_ptr().wrapping_add(piece.a);
            let first = piece.b * C * lanes;
            let mut b = d.b.as_ptr().wrapping_add(first * d.quants.bytes());
            let mut b_scales = d.b_scales.as_ptr().wrapping_add(first);
            for _ in 0..piece.count {
                let mut sums = [[B::sums(0); C]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    // Without an offset there is nothing to make good.
                    let signed = B::SIGNED && d.quants == Quants::Bytes;
                    *row = [B::sums(if signed { 0 } else { *starts.add(r) as i32 }); C];
                }
                match d.quants {
                    Quants::Bytes => {
                        for _ in 0..BLOCK / B::GROUP {
                            let mut weights = [B::weights(b); C];
                            for (c, weight) in weights.iter_mut().enumerate().skip(1) {
                                *weight = B::weights(b.add(c * lanes * B::GROUP));
                            }
                            products::<B, R, C>(&mut sums, &weights, a);
                            a = a.wrapping_add(d.step);
                            b = b.add(C * lanes * B::GROUP);
                        }
                    }
                    Quants::Nibbles => {
                        for _ in 0..BLOCK / B::GROUP / 2 {
                            let mut pairs = [B::nibbles(b); C];
                            for (c, pair) in pairs.iter_mut().enumerate().skip(1) {
                                *pair = B::nibbles(b.add(c * lanes * B::GROUP));
                            }
                            products::<B, R, C>(&mut sums, &pairs.map(|p| p[0]), a);
                            products::<B, R, C>(&mut sums, &pairs.map(|p| p[1]), a.add(d.step));
                            a = a.wrapping_add(2 * d.step);
                            b = b.add(C * lanes * B::GROUP);
                        }
                    }
                }
                for c in 0..C {
                    let by = B::Float::load_half(b_scales.add(c * lanes));
                    for r in 0..R {
                        let scale = by.mul(B::Float::splat(f32::from_bits(*a_scales.add(r))));
                        total[r][c] = B::float(sums[r][c]).fma(scale, total[r][c]);
                    }
                }
                starts = starts.wrapping_add(d.step);
                a_scales = a_scales.wrapping_add(d.step);
                b_scales = b_scales.add(C * lanes);
            }
        }
        for (r, row) in total.iter().enumerate() {
            for (c, sum) in row.iter().enumerate() {
                sum.store(out.add((r * C + c) * lanes));
            }
        }
    }
}

/// Adds one group of depths to all sums.
///
/// # Safety
/// `a` is good for `R` words.
#[inline(always)]
unsafe fn products<B: Bytes, const R: usize, const C: usize>(
    sums: &mut [[B::Sums; C]; R],
    weights: &[B::Weights; C],
    a: *const u32,
) {
    for (r, row) in sums.iter_mut().enumerate() {
        // SAFETY: `r` is below `R`.
        let word = unsafe { *a.add(r) };
        for (sum, weight) in row.iter_mut().zip(weights) {
            // SAFETY: the caller's.
            *sum = unsafe { B::dot(*sum, *weight, word) };
        }
    }
}

/// Weights of `vectors` vectors as floats.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
pub(super) unsafe fn widen<B: Bytes>(w: Widening<'_>) {
    // SAFETY: every address below lies in the slices, by `Widening::check`.
    unsafe {
        let (lanes, columns) = (B::Float::LANES, w.vectors * B::Float::LANES);
        let signed = B::SIGNED && w.quants == Quants::Bytes;
        let offset = B::Float::splat(if signed { 0.0 } else { w.quants.offset() as f32 });
        let (mut b, mut out) = (w.b.as_ptr(), w.out.as_mut_ptr());
        for block in 0..w.blocks {
            let scales = w.b_scales.as_ptr().add(block * columns);
            let halves = match w.quants {
                Quants::Bytes => 1,
                Quants::Nibbles => 2,
            };
            for _ in 0..BLOCK / B::GROUP / halves {
                for c in 0..w.vectors {
                    let by = B::Float::load_half(scales.add(c * lanes));
                    let to = out.add(c * lanes);
                    let put = |weights, first: usize| {
                        for k in 0..B::GROUP {
                            let value = B::depth(weights, k).sub(offset).mul(by);
                            value.store(to.add((first + k) * columns));
                        }
                    };
                    match w.quants {
                        Quants::Bytes => put(B::weights(b), 0),
                        Quants::Nibbles => {
                            let [low, high] = B::nibbles(b);
                            put(low, 0);
                            put(high, B::GROUP);
                        }
                    }
                    b = b.add(lanes * B::GROUP);
                }
                out = out.add(halves * B::GROUP * columns);
            }
        }
    }
}

/// Calls `$tile::<$v, R, C>` for the sizes in `$p`; sizes that no shape allows are unreachable after the check.
macro_rules! by_size {
    ($p:expr, $tile:ident::<$v:ty>, vectors: [$($c:literal)*], rows: $rows:tt) => {
        match $p.vectors {
            $($c => by_size!(@rows $p, $tile::<$v, $c>, $rows),)*
            _ => {}
        }
    };
    (@rows $p:expr, $tile:ident::<$v:ty, $c:literal>, [$($r:literal)*]) => {
        match $p.rows {
            $($r => $tile::<$v, $r, $c>($p),)*
            _ => {}
        }
    };
}
pub(super) use by_size;

/// Calls `$kernel::<$v, C>` for the vectors in `$p`.
macro_rules! by_vectors {
    ($p:expr, $module:ident::$kernel:ident::<$v:ty>, [$($c:literal)*]) => {
        match $p.vectors {
            $($c => $module::$kernel::<$v, $c>($p),)*
            _ => {}
        }
    };
}
pub(super) use by_vectors;
