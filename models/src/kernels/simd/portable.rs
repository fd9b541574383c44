//! Tiles in plain Rust, in vectors of four values: what runs where no better set is known, and what tests compare
//! the others with.

use super::operands::{Dots, Products, Widening};
use super::softmax::{self, Softmax};
use super::square::{self, Back, Forth};
use super::tile::{self, Bytes, Floats, by_size, by_vectors};
use super::words::{self, Weigh, Words};
use half::f16;

/// Four floats. Not `FUSED`, their products are rounded before they are added where the target has no fused form:
/// that one would be a call for each.
#[derive(Clone, Copy)]
struct Four<const FUSED: bool>([f32; 4]);

impl<const FUSED: bool> Floats for Four<FUSED> {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 4])
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for four values, by the trait's contract.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        // SAFETY: good for four values, by the trait's contract.
        Self(
            unsafe { from.cast::<[u16; 4]>().read_unaligned() }.map(|h| f16::from_bits(h).to_f32()),
        )
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u16) -> [Self; 2] {
        // SAFETY: good for four values, by the trait's contract.
        let words = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
        [Self(words.map(|w| f32::from(w & 255))), Self(words.map(|w| f32::from(w >> 8)))]
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for four values, by the trait's contract.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn mul(mut self, by: Self) -> Self {
        self.0.iter_mut().zip(by.0).for_each(|(x, y)| *x *= y);
        self
    }
    #[inline(always)]
    unsafe fn add(mut self, to: Self) -> Self {
        self.0.iter_mut().zip(to.0).for_each(|(x, y)| *x += y);
        self
    }
    #[inline(always)]
    unsafe fn max(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(x, y)| *x = if *x > y { *x } else { y });
        self
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1f32.to_bits()))))
    }
    #[inline(always)]
    unsafe fn sub(mut self, by: Self) -> Self {
        self.0.iter_mut().zip(by.0).for_each(|(x, y)| *x -= y);
        self
    }
    #[inline(always)]
    unsafe fn fma(mut self, by: Self, plus: Self) -> Self {
        for (x, (y, z)) in self.0.iter_mut().zip(by.0.into_iter().zip(plus.0)) {
            *x = if FUSED || cfg!(target_arch = "aarch64") { x.mul_add(y, z) } else { *x * y + z };
        }
        self
    }
}

/// Pairs of 16-bit values.
struct Pairs;

impl Bytes for Pairs {
    type Float = Four<true>;
    type Sums = [i32; 4];
    type Weights = [[i16; 2]; 4];
    const GROUP: usize = 2;

    #[inline(always)]
    unsafe fn sums(start: i32) -> [i32; 4] {
        [start; 4]
    }
    #[inline(always)]
    unsafe fn weights(from: *const u8) -> Self::Weights {
        // SAFETY: good for eight bytes, by the trait's contract.
        unsafe { from.cast::<[[u8; 2]; 4]>().read() }.map(|pair| pair.map(i16::from))
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [Self::Weights; 2] {
        // SAFETY: good for eight bytes, by the trait's contract.
        let bytes = unsafe { from.cast::<[[u8; 2]; 4]>().read() };
        [
            bytes.map(|pair| pair.map(|b| i16::from(b & 15))),
            bytes.map(|pair| pair.map(|b| i16::from(b >> 4))),
        ]
    }
    #[inline(always)]
    unsafe fn dot(mut sums: [i32; 4], weights: Self::Weights, word: u32) -> [i32; 4] {
        let (first, second) = (word as i16, (word >> 16) as i16);
        for (sum, [w0, w1]) in sums.iter_mut().zip(weights) {
            *sum += i32::from(w0) * i32::from(first) + i32::from(w1) * i32::from(second);
        }
        sums
    }
    #[inline(always)]
    unsafe fn float(sums: [i32; 4]) -> Four<true> {
        Four(sums.map(|s| s as f32))
    }
    #[inline(always)]
    unsafe fn words(from: *const u32) -> Self::Weights {
        // SAFETY: good for four words, by the trait's contract.
        unsafe { from.cast::<[u32; 4]>().read_unaligned() }.map(|w| [w as i16, (w >> 16) as i16])
    }
    #[inline(always)]
    unsafe fn pack(values: [Self::Float; 4], to: *mut u32) {
        let [a, b, ..] = values.map(|v| v.0.map(|v| v.to_bits() & 255));
        let words: [u32; 4] = std::array::from_fn(|i| a[i] | b[i] << 16);
        // SAFETY: good for four words, by the trait's contract.
        unsafe { to.cast::<[u32; 4]>().write_unaligned(words) }
    }
    #[inline(always)]
    unsafe fn depth(weights: Self::Weights, k: usize) -> Four<true> {
        Four(weights.map(|pair| f32::from(pair[k])))
    }
}

/// # Safety
/// `p` was checked.
pub(super) unsafe fn multiply(p: &mut Products<'_>) {
    use tile::multiply as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(p, tile::<Four<false>>, vectors: [1 2 3], rows: [1 2 3 4 5 6]) }
}

/// # Safety
/// `s` was checked.
pub(super) unsafe fn softmax(s: Softmax<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(s, softmax::softmax::<Four<false>>, [1 2 3]) }
}

/// # Safety
/// `f` was checked.
pub(super) unsafe fn forth(f: Forth<'_>) {
    // SAFETY: the caller's.
    unsafe { square::forth::<Four<false>>(f) }
}

/// # Safety
/// `b` was checked.
pub(super) unsafe fn back(b: Back<'_>) {
    // SAFETY: the caller's.
    unsafe { square::back::<Four<false>>(b) }
}

/// # Safety
/// `d` was checked.
pub(super) unsafe fn dot(d: Dots<'_>) {
    use tile::dot as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(d, tile::<Pairs>, vectors: [1 2], rows: [1 2 3 4 5 6]) }
}

/// # Safety
/// `w` was checked.
pub(super) unsafe fn widen(w: Widening<'_>) {
    // SAFETY: the caller's.
    unsafe { tile::widen::<Pairs>(w) }
}

/// # Safety
/// `w` was checked.
pub(super) unsafe fn words(w: &mut Words<'_>) {
    use words::words as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(w, tile::<Pairs>, vectors: [1 2 3], rows: [1 2 3 4 5 6]) }
}

/// # Safety
/// `w` was checked.
pub(super) unsafe fn weigh(w: Weigh<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(w, words::weigh::<Pairs>, [1 2 3]) }
}
