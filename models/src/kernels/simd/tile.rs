//! The tiles, written once over the vectors of any instruction set.

use super::operands::{Dots, Products, Quants, Weights, Widening};
use super::{BLOCK, LINE, SPAN, SUPER_BLOCKS};

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
    /// The low and the high bytes of 16-bit words.
    unsafe fn load_bytes(from: *const u16) -> [Self; 2];
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
    /// The largest value of columns' words.
    const MOST: f32 = 255.0;
    /// Columns' words.
    unsafe fn words(from: *const u32) -> Self::Weights;
    /// Columns' words of `GROUP` values each, 1.5 · 2^23 added to all.
    unsafe fn pack(values: [Self::Float; 4], to: *mut u32);
    /// Weights of depth `k` of the group, as floats.
    unsafe fn depth(weights: Self::Weights, k: usize) -> Self::Float;
}

/// Depths that weights are asked for before they are used: about the time that the second-level cache takes.
const AHEAD: usize = 8;

/// Depths between two times that weights of another panel are asked for, and lines of them at a time.
const STRETCH: usize = 8;

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

/// The same, for the second-level cache.
#[inline(always)]
fn prefetch_far<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint; addresses that are none are ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
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
        let mut ahead = p.ahead.chunks(LINE);
        for piece in p.pieces {
            let mut a = p.a.as_ptr().wrapping_add(piece.a);
            let mut b = p.b.as_ptr().wrapping_add(piece.b * p.b_step);
            let mut left = piece.count;
            while left > 0 {
                let depths = left.min(STRETCH);
                left -= depths;
                // Not one by one: most tiles ask for nothing.
                ahead.by_ref().take(STRETCH).for_each(|line| prefetch_far(line.as_ptr()));
                for _ in 0..depths {
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
pub(super) unsafe fn dot<B: Bytes, const R: usize, const C: usize>(mut d: Dots<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match d.b.quants {
            Quants::Columns => dot_columns::<B, R, C>(&mut d),
            _ => dot_blocks::<B, R, C>(&mut d),
        }
    }
}

/// One tile of `R` rows and `C` vectors, weights with a scale for each column.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn dot_columns<B: Bytes, const R: usize, const C: usize>(d: &mut Dots<'_>) {
    // SAFETY: every address below lies in the slices, by `Dots::check`.
    unsafe {
        let lanes = B::Float::LANES;
        let mut total = [[B::Float::zero(); C]; R];
        for piece in d.pieces {
            let mut a = d.a.as_ptr().wrapping_add(piece.a);
            let mut starts = d.starts.as_ptr().wrapping_add(piece.a);
            let mut a_scales = d.a_scales.as_ptr().wrapping_add(piece.a);
            let mut b = d.b.bytes.as_ptr().wrapping_add(piece.b * C * lanes * BLOCK);
            let mut left = piece.count * (BLOCK / B::GROUP);
            while left > 0 {
                let groups = left.min(SPAN / B::GROUP);
                let mut sums = [[B::sums(0); C]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    // Without an offset there is nothing to make good.
                    *row = [B::sums(if B::SIGNED { 0 } else { *starts.add(r) as i32 }); C];
                }
                for _ in 0..groups {
                    let mut weights = [B::weights(b); C];
                    for (c, weight) in weights.iter_mut().enumerate() {
                        *weight = B::weights(b.add(c * lanes * B::GROUP));
                        prefetch(b.wrapping_add((AHEAD * C + c) * lanes * B::GROUP));
                    }
                    products::<B, R, C>(&mut sums, &weights, a);
                    a = a.wrapping_add(d.step);
                    b = b.wrapping_add(C * lanes * B::GROUP);
                }
                for (r, (total, sums)) in total.iter_mut().zip(&sums).enumerate() {
                    let scale = B::Float::splat(f32::from_bits(*a_scales.add(r)));
                    for (total, sum) in total.iter_mut().zip(sums) {
                        *total = B::float(*sum).fma(scale, *total);
                    }
                }
                starts = starts.wrapping_add(d.step);
                a_scales = a_scales.wrapping_add(d.step);
                left -= groups;
            }
        }
        let out = d.out.as_mut_ptr();
        let mut by = [B::Float::zero(); C];
        for (c, by) in by.iter_mut().enumerate() {
            *by = B::Float::load_half(d.b.factors.as_ptr().add(c * lanes));
        }
        for (r, row) in total.iter().enumerate() {
            for (c, total) in row.iter().enumerate() {
                let at = out.add((r * C + c) * lanes);
                let before = if d.accumulate { B::Float::load(at) } else { B::Float::zero() };
                total.fma(by[c], before).store(at);
            }
        }
    }
}

/// One tile of `R` rows and `C` vectors, weights with a scale for each block.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn dot_blocks<B: Bytes, const R: usize, const C: usize>(d: &mut Dots<'_>) {
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
        let quants = d.b.quants;
        for piece in d.pieces {
            let mut a = d.a.as_ptr().wrapping_add(piece.a);
            let mut starts = d.starts.as_ptr().wrapping_add(piece.a);
            let mut a_scales = d.a_scales.as_ptr().wrapping_add(piece.a);
            let first = piece.b * C * lanes;
            let mut b = d.b.bytes.as_ptr().wrapping_add(first * quants.bytes());
            let mut b_scales = d.b.scales.as_ptr().wrapping_add(first);
            for block in piece.b..piece.b + piece.count {
                let mut sums = [[B::sums(0); C]; R];
                for (r, row) in sums.iter_mut().enumerate() {
                    // A minimum is no whole number.
                    let start = if quants == Quants::Minima { 0 } else { *starts.add(r) as i32 };
                    *row = [B::sums(start); C];
                }
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
                for c in 0..C {
                    if quants == Quants::Minima {
                        let [by, min] = minima::<B::Float>(&d.b, block, C * lanes, c * lanes);
                        for r in 0..R {
                            let number = |at: *const u32| B::Float::splat(f32::from_bits(*at));
                            let scale = by.mul(number(a_scales.add(r)));
                            let less = number(starts.add(r)).fma(min, total[r][c]);
                            total[r][c] = B::float(sums[r][c]).fma(scale, less);
                        }
                        continue;
                    }
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

/// Scales and minima of the columns from `column` on, of `columns`, in block `block`.
///
/// # Safety
/// They were checked to be there, are [`Quants::Minima`], and the processor has the instruction set.
#[inline(always)]
unsafe fn minima<F: Floats>(
    b: &Weights<'_>,
    block: usize,
    columns: usize,
    column: usize,
) -> [F; 2] {
    // SAFETY: inside the slices, by the caller.
    unsafe {
        let [scale, min] = F::load_bytes(b.scales.as_ptr().add(block * columns + column));
        let factors = b.factors.as_ptr().add(block / SUPER_BLOCKS * 2 * columns + column);
        [scale.mul(F::load_half(factors)), min.mul(F::load_half(factors.add(columns)))]
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
        let quants = w.b.quants;
        let bytes = matches!(quants, Quants::Bytes | Quants::Columns);
        let signed = B::SIGNED && bytes;
        let offset = B::Float::splat(if signed { 0.0 } else { quants.offset() as f32 });
        let (mut b, mut out) = (w.b.bytes.as_ptr(), w.out.as_mut_ptr());
        for block in 0..w.blocks {
            let scales = match quants {
                Quants::Columns => w.b.factors.as_ptr(),
                _ => w.b.scales.as_ptr().add(block * columns),
            };
            let halves = BLOCK / quants.bytes();
            for _ in 0..BLOCK / B::GROUP / halves {
                for c in 0..w.vectors {
                    let to = out.add(c * lanes);
                    let [by, less] = if quants == Quants::Minima {
                        minima::<B::Float>(&w.b, block, columns, c * lanes)
                    } else {
                        let by = B::Float::load_half(scales.add(c * lanes));
                        // Exact, as all products of half precision with bytes are: nothing is rounded twice.
                        [by, offset.mul(by)]
                    };
                    let put = |weights, first: usize| {
                        for k in 0..B::GROUP {
                            let value = B::depth(weights, k).mul(by).sub(less);
                            value.store(to.add((first + k) * columns));
                        }
                    };
                    if bytes {
                        put(B::weights(b), 0);
                    } else {
                        let [low, high] = B::nibbles(b);
                        put(low, 0);
                        put(high, B::GROUP);
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
