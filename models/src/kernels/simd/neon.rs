//! Vectors of aarch64, with its 8-bit dot products (ARMv8.2 `dotprod`).

use std::arch::aarch64::*;
use std::arch::asm;

use super::operands::{Dots, Products, Widening};
use super::softmax::{self, Softmax};
use super::square::{self, Back, Forth};
use super::tile::{self, Bytes, Floats, by_size, by_vectors};
use super::words::{self, Weigh, Words};

#[derive(Clone, Copy)]
struct Four(float32x4_t);

// SAFETY (all methods): the set is available and pointers are good for a vector, by the trait's contract.
impl Floats for Four {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self(unsafe { vdupq_n_f32(0.0) })
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { vld1q_f32(from) })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        let wide: float32x4_t;
        // The language's own half-precision vectors are not stable yet; the instruction is in every ARMv8 processor.
        unsafe {
            let half = vld1_u16(from);
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) half,
                options(pure, nomem, nostack, preserves_flags));
        }
        Self(wide)
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u16) -> [Self; 2] {
        unsafe {
            let words = vmovl_u16(vld1_u16(from));
            let (low, high) = (vandq_u32(words, vdupq_n_u32(255)), vshrq_n_u32::<8>(words));
            [Self(vcvtq_f32_u32(low)), Self(vcvtq_f32_u32(high))]
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { vst1q_f32(to, self.0) }
    }
    #[inline(always)]
    unsafe fn mul(self, by: Self) -> Self {
        Self(unsafe { vmulq_f32(self.0, by.0) })
    }
    #[inline(always)]
    unsafe fn add(self, to: Self) -> Self {
        Self(unsafe { vaddq_f32(self.0, to.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, by: Self) -> Self {
        Self(unsafe { vsubq_f32(self.0, by.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // Not the instruction of that name: where one is no number, that gives no number.
        Self(unsafe { vbslq_f32(vcgtq_f32(self.0, other.0), self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let bits = vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0));
            Self(vreinterpretq_f32_u32(vaddq_u32(bits, vdupq_n_u32(1f32.to_bits()))))
        }
    }
    #[inline(always)]
    unsafe fn fma(self, by: Self, plus: Self) -> Self {
        Self(unsafe { vfmaq_f32(plus.0, self.0, by.0) })
    }
}

/// Groups of four bytes. The processor multiplies signed with signed, so bytes lose what was added to them when they
/// are loaded.
struct Quads;

// SAFETY (all methods): as above.
impl Bytes for Quads {
    type Float = Four;
    type Sums = int32x4_t;
    type Weights = int8x16_t;
    const GROUP: usize = 4;
    const SIGNED: bool = true;
    const MOST: f32 = 127.0;

    #[inline(always)]
    unsafe fn sums(start: i32) -> int32x4_t {
        unsafe { vdupq_n_s32(start) }
    }
    #[inline(always)]
    unsafe fn weights(from: *const u8) -> int8x16_t {
        unsafe { vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(0x80))) }
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [int8x16_t; 2] {
        unsafe {
            let both = vld1q_u8(from);
            let (low, high) = (vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8::<4>(both));
            [vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)]
        }
    }
    #[inline(always)]
    unsafe fn dot(sums: int32x4_t, weights: int8x16_t, word: u32) -> int32x4_t {
        let mut sums = sums;
        // The intrinsic of this instruction is not stable yet.
        unsafe {
            let word = vdupq_n_u32(word);
            asm!(".arch_extension dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                inout(vreg) sums, in(vreg) weights, in(vreg) word,
                options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }
    #[inline(always)]
    unsafe fn float(sums: int32x4_t) -> Four {
        Four(unsafe { vcvtq_f32_s32(sums) })
    }
    #[inline(always)]
    unsafe fn words(from: *const u32) -> int8x16_t {
        unsafe { vld1q_s8(from.cast()) }
    }
    #[inline(always)]
    unsafe fn pack(values: [Four; 4], to: *mut u32) {
        unsafe {
            let low = vdupq_n_u32(255);
            let [a, b, c, d] = values.map(|v| vandq_u32(vreinterpretq_u32_f32(v.0), low));
            let first = vorrq_u32(a, vshlq_n_u32::<8>(b));
            let second = vorrq_u32(c, vshlq_n_u32::<8>(d));
            vst1q_u32(to, vorrq_u32(first, vshlq_n_u32::<16>(second)));
        }
    }
    #[inline(always)]
    unsafe fn depth(weights: int8x16_t, k: usize) -> Four {
        unsafe {
            let lanes = vreinterpretq_s32_s8(weights);
            let moved = match k {
                0 => vshlq_n_s32::<24>(lanes),
                1 => vshlq_n_s32::<16>(lanes),
                2 => vshlq_n_s32::<8>(lanes),
                _ => lanes,
            };
            Four(vcvtq_f32_s32(vshrq_n_s32::<24>(moved)))
        }
    }
}

/// # Safety
/// `p` was checked.
pub(super) unsafe fn multiply(p: &mut Products<'_>) {
    use tile::multiply as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(p, tile::<Four>, vectors: [1 2 3], rows: [1 2 3 4 5 6 7 8]) }
}

/// # Safety
/// `s` was checked.
pub(super) unsafe fn softmax(s: Softmax<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(s, softmax::softmax::<Four>, [1 2 3]) }
}

/// # Safety
/// `f` was checked.
pub(super) unsafe fn forth(f: Forth<'_>) {
    // SAFETY: the caller's.
    unsafe { square::forth::<Four>(f) }
}

/// # Safety
/// `b` was checked.
pub(super) unsafe fn back(b: Back<'_>) {
    // SAFETY: the caller's.
    unsafe { square::back::<Four>(b) }
}

/// # Safety
/// `d` was checked, and the processor has `dotprod`.
pub(super) unsafe fn dot(d: Dots<'_>) {
    use tile::dot as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(d, tile::<Quads>, vectors: [1 2], rows: [1 2 3 4 5 6]) }
}

/// # Safety
/// `w` was checked.
pub(super) unsafe fn widen(w: Widening<'_>) {
    // SAFETY: the caller's.
    unsafe { tile::widen::<Quads>(w) }
}

/// # Safety
/// `w` was checked, and the processor has `dotprod`.
pub(super) unsafe fn words(w: &mut Words<'_>) {
    use words::words as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(w, tile::<Quads>, vectors: [1 2 3], rows: [1 2 3 4 5 6 7 8]) }
}

/// # Safety
/// `w` was checked.
pub(super) unsafe fn weigh(w: Weigh<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(w, words::weigh::<Quads>, [1 2 3]) }
}
