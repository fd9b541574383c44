//! Vectors of x86-64.

use std::arch::x86_64::*;

use super::Loop;
use super::operands::{Dots, Products, Widening};
use super::softmax::{self, Softmax};
use super::square::{self, Back, Forth};
use super::tile::{self, Bytes, Floats, by_size, by_vectors};
use super::words::{self, Weigh, Words};

macro_rules! floats {
    ($name:ident, $vector:ty, $lanes:literal, $half:ty, $load_half:expr, $zero:ident $splat:ident $load:ident
     $store:ident $mul:ident $add:ident $sub:ident $max:ident $fma:ident, $power:expr,
     $load_words:ident $widen:ident $and:ident $shift:ident $set1:ident $cvt:ident) => {
        #[derive(Clone, Copy)]
        struct $name($vector);

        // SAFETY (all methods): the set is available and pointers are good for a vector, by the trait's contract.
        impl Floats for $name {
            const LANES: usize = $lanes;
            #[inline(always)]
            unsafe fn zero() -> Self {
                Self(unsafe { $zero() })
            }
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                Self(unsafe { $splat(x) })
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                Self(unsafe { $load(from) })
            }
            #[inline(always)]
            unsafe fn load_half(from: *const u16) -> Self {
                Self(unsafe { $load_half(from.cast::<$half>()) })
            }
            #[inline(always)]
            unsafe fn load_bytes(from: *const u16) -> [Self; 2] {
                unsafe {
                    let words = $widen($load_words(from.cast()));
                    [Self($cvt($and(words, $set1(255)))), Self($cvt($shift::<8>(words)))]
                }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn mul(self, by: Self) -> Self {
                Self(unsafe { $mul(self.0, by.0) })
            }
            #[inline(always)]
            unsafe fn add(self, to: Self) -> Self {
                Self(unsafe { $add(self.0, to.0) })
            }
            #[inline(always)]
            unsafe fn sub(self, by: Self) -> Self {
                Self(unsafe { $sub(self.0, by.0) })
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                // The second operand is what comes out where one is no number.
                Self(unsafe { $max(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn power_of_two(self) -> Self {
                Self(unsafe { $power(self.0) })
            }
            #[inline(always)]
            unsafe fn fma(self, by: Self, plus: Self) -> Self {
                Self(unsafe { $fma(self.0, by.0, plus.0) })
            }
        }
    };
}

floats!(Eight, __m256, 8, __m128i, |p| _mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_setzero_ps
_mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_mul_ps _mm256_add_ps _mm256_sub_ps _mm256_max_ps
_mm256_fmadd_ps,
|x| _mm256_castsi256_ps(_mm256_add_epi32(
    _mm256_slli_epi32::<23>(_mm256_castps_si256(x)),
    _mm256_set1_epi32(127 << 23),
)),
_mm_loadu_si128 _mm256_cvtepu16_epi32 _mm256_and_si256 _mm256_srli_epi32 _mm256_set1_epi32 _mm256_cvtepi32_ps);
floats!(Sixteen, __m512, 16, __m256i, |p| _mm512_cvtph_ps(_mm256_loadu_si256(p)), _mm512_setzero_ps
_mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_mul_ps _mm512_add_ps _mm512_sub_ps _mm512_max_ps
_mm512_fmadd_ps,
|x| _mm512_castsi512_ps(_mm512_add_epi32(
    _mm512_slli_epi32::<23>(_mm512_castps_si512(x)),
    _mm512_set1_epi32(127 << 23),
)),
_mm256_loadu_si256 _mm512_cvtepu16_epi32 _mm512_and_si512 _mm512_srli_epi32 _mm512_set1_epi32 _mm512_cvtepi32_ps);

/// Groups of four bytes: the processor multiplies unsigned weights with signed activations and adds the four.
macro_rules! quads {
    ($name:ident, $float:ident, $vector:ty, $splat:ident $load:ident $dot:ident $and:ident $shift:ident $cvt:ident,
     $bits:ident $left:ident $or:ident $store:ident) => {
        struct $name;

        // SAFETY (all methods): as in `floats`.
        impl Bytes for $name {
            type Float = $float;
            type Sums = $vector;
            type Weights = $vector;
            const GROUP: usize = 4;
            #[inline(always)]
            unsafe fn words(from: *const u32) -> $vector {
                unsafe { $load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn pack(values: [$float; 4], to: *mut u32) {
                unsafe {
                    let low = $splat(255);
                    let [a, b, c, d] = values.map(|v| $bits(v.0));
                    let first = $or($and(a, low), $left::<8>($and(b, low)));
                    let second = $or($and(c, low), $left::<8>($and(d, low)));
                    $store(to.cast(), $or(first, $left::<16>(second)));
                }
            }
            #[inline(always)]
            unsafe fn sums(start: i32) -> $vector {
                unsafe { $splat(start) }
            }
            #[inline(always)]
            unsafe fn weights(from: *const u8) -> $vector {
                unsafe { $load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn nibbles(from: *const u8) -> [$vector; 2] {
                unsafe {
                    let (both, low) = ($load(from.cast()), $splat(0x0f0f_0f0f));
                    [$and(both, low), $and($shift::<4>(both), low)]
                }
            }
            #[inline(always)]
            unsafe fn dot(sums: $vector, weights: $vector, word: u32) -> $vector {
                unsafe { $dot(sums, weights, $splat(word as i32)) }
            }
            #[inline(always)]
            unsafe fn float(sums: $vector) -> $float {
                $float(unsafe { $cvt(sums) })
            }
            #[inline(always)]
            unsafe fn depth(weights: $vector, k: usize) -> $float {
                unsafe {
                    let moved = match k {
                        0 => weights,
                        1 => $shift::<8>(weights),
                        2 => $shift::<16>(weights),
                        _ => $shift::<24>(weights),
                    };
                    $float($cvt($and(moved, $splat(0xff))))
                }
            }
        }
    };
}

quads!(Quads256, Eight, __m256i, _mm256_set1_epi32 _mm256_loadu_si256 _mm256_dpbusd_avx_epi32
    _mm256_and_si256 _mm256_srli_epi32 _mm256_cvtepi32_ps,
    _mm256_castps_si256 _mm256_slli_epi32 _mm256_or_si256 _mm256_storeu_si256);
quads!(Quads512, Sixteen, __m512i, _mm512_set1_epi32 _mm512_loadu_si512 _mm512_dpbusd_epi32
    _mm512_and_si512 _mm512_srli_epi32 _mm512_cvtepi32_ps,
    _mm512_castps_si512 _mm512_slli_epi32 _mm512_or_si512 _mm512_storeu_si512);

/// Groups of two bytes widened to 16 bits: sums of two products then never saturate, as those of `vpmaddubsw` would.
macro_rules! pairs {
    ($name:ident, $float:ident, $vector:ty, $splat:ident $load:ident $widen:ident $madd:ident $add:ident $and:ident
     $shift:ident $cvt:ident, $half_and:ident $half_shift:ident $half_splat:ident,
     $load_words:ident $bits:ident $left:ident $or:ident $store:ident) => {
        struct $name;

        // SAFETY (all methods): as in `floats`.
        impl Bytes for $name {
            type Float = $float;
            type Sums = $vector;
            type Weights = $vector;
            const GROUP: usize = 2;
            #[inline(always)]
            unsafe fn words(from: *const u32) -> $vector {
                unsafe { $load_words(from.cast()) }
            }
            #[inline(always)]
            unsafe fn pack(values: [$float; 4], to: *mut u32) {
                unsafe {
                    let [a, b, ..] = values.map(|v| $and($bits(v.0), $splat(255)));
                    $store(to.cast(), $or(a, $left::<16>(b)));
                }
            }
            #[inline(always)]
            unsafe fn sums(start: i32) -> $vector {
                unsafe { $splat(start) }
            }
            #[inline(always)]
            unsafe fn weights(from: *const u8) -> $vector {
                unsafe { $widen($load(from.cast())) }
            }
            #[inline(always)]
            unsafe fn nibbles(from: *const u8) -> [$vector; 2] {
                unsafe {
                    let (both, low) = ($load(from.cast()), $half_splat(0x0f0f_0f0f));
                    [$widen($half_and(both, low)), $widen($half_and($half_shift::<4>(both), low))]
                }
            }
            #[inline(always)]
            unsafe fn dot(sums: $vector, weights: $vector, word: u32) -> $vector {
                unsafe { $add(sums, $madd(weights, $splat(word as i32))) }
            }
            #[inline(always)]
            unsafe fn float(sums: $vector) -> $float {
                $float(unsafe { $cvt(sums) })
            }
            #[inline(always)]
            unsafe fn depth(weights: $vector, k: usize) -> $float {
                unsafe {
                    let moved =
                        if k == 0 { $and(weights, $splat(0xffff)) } else { $shift::<16>(weights) };
                    $float($cvt(moved))
                }
            }
        }
    };
}

pairs!(Pairs256, Eight, __m256i, _mm256_set1_epi32 _mm_loadu_si128 _mm256_cvtepu8_epi16 _mm256_madd_epi16
    _mm256_add_epi32 _mm256_and_si256 _mm256_srli_epi32 _mm256_cvtepi32_ps,
    _mm_and_si128 _mm_srli_epi32 _mm_set1_epi32,
    _mm256_loadu_si256 _mm256_castps_si256 _mm256_slli_epi32 _mm256_or_si256 _mm256_storeu_si256);
pairs!(Pairs512, Sixteen, __m512i, _mm512_set1_epi32 _mm256_loadu_si256 _mm512_cvtepu8_epi16 _mm512_madd_epi16
    _mm512_add_epi32 _mm512_and_si512 _mm512_srli_epi32 _mm512_cvtepi32_ps,
    _mm256_and_si256 _mm256_srli_epi32 _mm256_set1_epi32,
    _mm512_loadu_si512 _mm512_castps_si512 _mm512_slli_epi32 _mm512_or_si512 _mm512_storeu_si512);

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply_avx2(p: &mut Products<'_>) {
    use tile::multiply as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(p, tile::<Eight>, vectors: [1 2], rows: [1 2 3 4 5 6]) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn multiply_avx512(p: &mut Products<'_>) {
    use tile::multiply as tile;
    // SAFETY: the caller's.
    unsafe { by_size!(p, tile::<Sixteen>, vectors: [1 2 3], rows: [1 2 3 4 5 6 7 8]) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn softmax_avx2(s: Softmax<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(s, softmax::softmax::<Eight>, [1 2]) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn softmax_avx512(s: Softmax<'_>) {
    // SAFETY: the caller's.
    unsafe { by_vectors!(s, softmax::softmax::<Sixteen>, [1 2 3]) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn forth_avx2(f: Forth<'_>) {
    // SAFETY: the caller's.
    unsafe { square::forth::<Eight>(f) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn back_avx2(b: Back<'_>) {
    // SAFETY: the caller's.
    unsafe { square::back::<Eight>(b) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn forth_avx512(f: Forth<'_>) {
    // SAFETY: the caller's.
    unsafe { square::forth::<Sixteen>(f) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn back_avx512(b: Back<'_>) {
    // SAFETY: the caller's.
    unsafe { square::back::<Sixteen>(b) }
}

macro_rules! quantised {
    ($dot:ident, $widen:ident, $words:ident, $weigh:ident, $bytes:ty, $features:literal, $rows:tt, $float_rows:tt,
     $vectors:tt) => {
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $dot(d: Dots<'_>) {
            use tile::dot as tile;
            // SAFETY: the caller's.
            unsafe { by_size!(d, tile::<$bytes>, vectors: [1 2], rows: $rows) }
        }

        #[target_feature(enable = $features)]
        pub(super) unsafe fn $widen(w: Widening<'_>) {
            // SAFETY: the caller's.
            unsafe { tile::widen::<$bytes>(w) }
        }

        #[target_feature(enable = $features)]
        pub(super) unsafe fn $words(w: &mut Words<'_>) {
            use words::words as tile;
            // SAFETY: the caller's.
            unsafe { by_size!(w, tile::<$bytes>, vectors: $vectors, rows: $float_rows) }
        }

        #[target_feature(enable = $features)]
        pub(super) unsafe fn $weigh(w: Weigh<'_>) {
            // SAFETY: the caller's.
            unsafe { by_vectors!(w, words::weigh::<$bytes>, $vectors) }
        }
    };
}

quantised!(
    dot_avx2, widen_avx2, words_avx2, weigh_avx2, Pairs256, "avx2,fma,f16c",
    [1 2 3 4 5 6], [1 2 3 4 5 6], [1 2]
);
quantised!(
    dot_avx_vnni, widen_avx_vnni, words_avx_vnni, weigh_avx_vnni, Quads256, "avx2,fma,f16c,avxvnni",
    [1 2 3 4 5 6], [1 2 3 4 5 6], [1 2]
);
quantised!(
    dot_avx512, widen_avx512, words_avx512, weigh_avx512, Pairs512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
    [1 2 3 4 5 6 7], [1 2 3 4 5 6 7 8], [1 2 3]
);
quantised!(
    dot_avx512_vnni, widen_avx512_vnni, words_avx512_vnni, weigh_avx512_vnni, Quads512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c",
    [1 2 3 4 5 6 7], [1 2 3 4 5 6 7 8], [1 2 3]
);

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<L: Loop>(body: L) -> L::Output {
    body.run()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<L: Loop>(body: L) -> L::Output {
    body.run()
}
