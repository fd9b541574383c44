//! Values rounded to 8 bits, block by block.

use super::BLOCK;

/// A row of whole blocks, on its way to words of `group` depths each.
#[derive(Debug)]
pub struct Rounding<'a> {
    /// The values.
    pub x: &'a [f32],
    /// Values with one scale, a multiple of [`BLOCK`].
    pub block: usize,
    /// Depths in a word: four values of 8 bits, or two of 16.
    pub group: usize,
    /// What is added to the weights that the row will meet: the sums start from minus that times the row's sum.
    pub offset: i32,
    /// The rounded values.
    pub words: &'a mut [u32],
    /// Per block, where the sums start (bits of an `i32`).
    pub starts: &'a mut [u32],
    /// Per block, the scale (bits of an `f32`).
    pub scales: &'a mut [u32],
}

impl Rounding<'_> {
    pub(super) fn check(&self) {
        assert!(self.block > 0 && self.block.is_multiple_of(BLOCK), "values with one scale");
        assert!(self.x.len().is_multiple_of(self.block), "whole blocks");
        let blocks = self.x.len() / self.block;
        assert!(self.group == 2 || self.group == 4, "depths of a word");
        assert!(self.words.len() == self.x.len() / self.group, "words");
        assert!(self.starts.len() == blocks && self.scales.len() == blocks, "one for each block");
    }
}

/// One block: the rounded values, their scale and their sum. A value that is no number makes all of the block none.
pub fn round(x: &[f32; BLOCK]) -> ([i8; BLOCK], f32, i32) {
    let scale = scale(x);
    let (q, sum) = round_by(x, scale);
    (q, scale, sum)
}

/// The scale of `x`: with it the largest value becomes 127.
fn scale(x: &[f32]) -> f32 {
    let mut largest = [0f32; 8];
    for part in x.chunks_exact(8) {
        for (m, v) in largest.iter_mut().zip(part) {
            // NaN stays, as it has to reach the scale.
            *m = if v.abs() > *m || v.is_nan() { v.abs() } else { *m };
        }
    }
    let largest = largest.into_iter().fold(0f32, |m, v| if v > m || v.is_nan() { v } else { m });
    largest / 127.0
}

/// `x` in steps of `scale`, and the sum of that.
fn round_by(x: &[f32; BLOCK], scale: f32) -> ([i8; BLOCK], i32) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut q = [0i8; BLOCK];
    let mut sum = 0i32;
    for (q, v) in q.iter_mut().zip(x) {
        // 1.5 · 2^23: adding it rounds to the nearest integer (ties to even) and leaves that in the low bits.
        let bits = (v * inverse + 12_582_912.0).to_bits();
        *q = bits as u8 as i8;
        sum += i32::from(*q);
    }
    (q, sum)
}

/// In plain Rust: what runs where no better way is known, and what tests compare the other with.
pub(super) fn twin(r: Rounding<'_>) {
    let blocks = r.x.chunks_exact(r.block).zip(r.words.chunks_exact_mut(r.block / r.group));
    for ((x, words), (start, by)) in blocks.zip(r.starts.iter_mut().zip(r.scales)) {
        let scale = scale(x);
        let mut all = 0;
        let parts = x.as_chunks::<BLOCK>().0.iter();
        for (x, words) in parts.zip(words.chunks_exact_mut(BLOCK / r.group)) {
            let (q, sum) = round_by(x, scale);
            all += sum;
            for (word, q) in words.iter_mut().zip(q.chunks_exact(r.group)) {
                *word = match *q {
                    [a, b, c, d] => u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]),
                    [a, b] => u32::from(i16::from(a) as u16) | u32::from(i16::from(b) as u16) << 16,
                    // `check` allows nothing else.
                    _ => 0,
                };
            }
        }
        *start = (-r.offset * all) as u32;
        *by = scale.to_bits();
    }
}

/// What eight whole numbers have in common: halves of them against each other, until one is left.
#[cfg(target_arch = "x86_64")]
mod halves {
    use std::arch::x86_64::*;

    /// The largest, none of them signed.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn largest(x: __m256i) -> u32 {
        let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        let x = _mm_max_epu32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
        _mm_cvtsi128_si32(x) as u32
    }

    /// Their sum.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sum(x: __m256i) -> i32 {
        let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
    }
}

/// Eight values at a time; equal to [`twin`] to the bit.
///
/// # Safety
/// `r` was checked, and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn eights(r: Rounding<'_>) {
    use std::arch::x86_64::*;

    let parts = r.block / BLOCK;
    let per_part = BLOCK / r.group;
    for block in 0..r.starts.len() {
        // SAFETY: the parts of block `block` of the values and of the words, by `Rounding::check`.
        unsafe {
            let part = |part: usize| {
                let x = r.x.as_ptr().add((block * parts + part) * BLOCK);
                [0, 8, 16, 24].map(|at| _mm256_loadu_ps(x.add(at)))
            };
            // As whole numbers, the bits of magnitudes rise with them, and what is no number is above all.
            let magnitude = _mm256_set1_epi32(0x7fff_ffff);
            let larger = |all, x: [__m256; 4]| {
                let x = x.map(|x| _mm256_and_si256(_mm256_castps_si256(x), magnitude));
                let (low, high) = (_mm256_max_epu32(x[0], x[1]), _mm256_max_epu32(x[2], x[3]));
                _mm256_max_epu32(all, _mm256_max_epu32(low, high))
            };
            let mut x = part(0);
            let mut most = larger(_mm256_setzero_si256(), x);
            for index in 1..parts {
                most = larger(most, part(index));
            }
            let scale = f32::from_bits(halves::largest(most)) / 127.0;
            let inverse = _mm256_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
            // 1.5 · 2^23, as in `round_by`; less its bits, what is left is the number.
            let middle = _mm256_set1_ps(12_582_912.0);
            let mut all = _mm256_setzero_si256();
            for index in 0..parts {
                if index > 0 {
                    x = part(index);
                }
                let q = x.map(|x| {
                    let shifted = _mm256_add_ps(_mm256_mul_ps(x, inverse), middle);
                    _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(middle))
                });
                let sum =
                    _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
                all = _mm256_add_epi32(all, sum);
                // Packing works within halves of 128 bits: what came from where is put right after it.
                let (low, high) = (_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
                let to = r.words.as_mut_ptr().add((block * parts + index) * per_part);
                let to = to.cast::<__m256i>();
                if r.group == 4 {
                    let bytes = _mm256_packs_epi16(low, high);
                    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                    _mm256_storeu_si256(to, _mm256_permutevar8x32_epi32(bytes, order));
                } else {
                    let order = |x| _mm256_permute4x64_epi64::<0b11_01_10_00>(x);
                    _mm256_storeu_si256(to, order(low));
                    _mm256_storeu_si256(to.add(1), order(high));
                }
            }
            r.starts[block] = (-r.offset).wrapping_mul(halves::sum(all)) as u32;
            r.scales[block] = scale.to_bits();
        }
    }
}

/// Sixteen values at a time; equal to [`twin`] to the bit.
///
/// # Safety
/// `r` was checked, and the processor has AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub(super) unsafe fn sixteens(r: Rounding<'_>) {
    use std::arch::x86_64::*;

    let parts = r.block / BLOCK;
    let per_part = BLOCK / r.group;
    for block in 0..r.starts.len() {
        // SAFETY: the parts of block `block` of the values and of the words, by `Rounding::check`.
        unsafe {
            let part = |part: usize| {
                let x = r.x.as_ptr().add((block * parts + part) * BLOCK);
                [_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))]
            };
            // As in `eights`.
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let mut most = _mm512_setzero_si512();
            for index in 0..parts {
                for x in part(index) {
                    most =
                        _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), magnitude));
                }
            }
            let most = _mm256_max_epu32(
                _mm512_castsi512_si256(most),
                _mm512_extracti64x4_epi64::<1>(most),
            );
            let scale = f32::from_bits(halves::largest(most)) / 127.0;
            let inverse = _mm512_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
            let mut all = _mm512_setzero_si512();
            for index in 0..parts {
                // To the nearest, ties to even, as adding 1.5 · 2^23 does.
                let q = part(index).map(|x| {
                    _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                        _mm512_mul_ps(x, inverse),
                    )
                });
                all = _mm512_add_epi32(all, _mm512_add_epi32(q[0], q[1]));
                let to = r.words.as_mut_ptr().add((block * parts + index) * per_part);
                if r.group == 4 {
                    let to = to.cast::<__m128i>();
                    _mm_storeu_si128(to, _mm512_cvtepi32_epi8(q[0]));
                    _mm_storeu_si128(to.add(1), _mm512_cvtepi32_epi8(q[1]));
                } else {
                    let to = to.cast::<__m256i>();
                    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(q[0]));
                    _mm256_storeu_si256(to.add(1), _mm512_cvtepi32_epi16(q[1]));
                }
            }
            let sum =
                _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
            r.starts[block] = (-r.offset).wrapping_mul(halves::sum(sum)) as u32;
            r.scales[block] = scale.to_bits();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn rounding_is_to_the_nearest_step_and_keeps_what_is_no_number() {
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 - 11.3) * 0.37);
        let (q, scale, sum) = round(&x);
        assert_eq!(sum, q.iter().map(|q| i32::from(*q)).sum::<i32>());
        assert_eq!(q.iter().map(|q| q.abs()).max(), Some(127));
        for (q, x) in q.iter().zip(x) {
            assert!((f32::from(*q) * scale - x).abs() <= scale * 0.5001);
        }
        let (q, scale, _) = round(&[0.0; BLOCK]);
        assert_eq!((q, scale), ([0; BLOCK], 0.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = x;
            x[17] = bad;
            assert!(!round(&x).1.is_finite(), "{bad}");
        }
    }

    #[test]
    fn every_set_rounds_as_plain_rust_does() {
        const BLOCKS: usize = 5;
        let mut x: Vec<f32> =
            (0..BLOCKS * BLOCK).map(|i| ((i * 7919) % 1009) as f32 - 504.3).collect();
        x[BLOCK..2 * BLOCK].fill(0.0);
        x[3 * BLOCK + 7] = 1e-30;
        for bad in [0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[4 * BLOCK + 3] = bad;
            for (group, isa) in [2, 4].into_iter().flat_map(|g| Isa::ALL.map(|isa| (g, isa))) {
                let run = |by: &dyn Fn(Rounding<'_>)| {
                    let (mut words, mut sides) = (vec![0; x.len() / group], [[0; BLOCKS]; 2]);
                    let [starts, scales] = &mut sides;
                    let (block, words_to) = (BLOCK, &mut words);
                    by(Rounding {
                        x: &x,
                        block,
                        group,
                        offset: 128,
                        words: words_to,
                        starts,
                        scales,
                    });
                    (words, sides)
                };
                if isa.available() {
                    let ((words, sides), (expected, twins)) = (run(&|r| isa.round(r)), run(&twin));
                    // A block with a value that is none has a scale that is none: its words do not matter.
                    let whole = if f32::from_bits(twins[1][4]).is_finite() { BLOCKS } else { 4 };
                    let to = whole * BLOCK / group;
                    assert_eq!(words[..to], expected[..to], "{} {group} {bad}", isa.name());
                    assert_eq!(sides[0][..whole], twins[0][..whole]);
                    assert_eq!(sides[1][..whole], twins[1][..whole]);
                    assert_eq!(f32::from_bits(sides[1][4]).is_finite(), whole == BLOCKS);
                }
            }
        }
    }

    #[test]
    fn blocks_of_any_length_share_one_scale() {
        let x: Vec<f32> = (0..6 * BLOCK).map(|i| ((i * 7919) % 1009) as f32 - 504.3).collect();
        for (block, group, isa) in
            [2, 3, 6].iter().flat_map(|b| [2, 4].map(|g| (b * BLOCK, g))).flat_map(|(b, g)| {
                Isa::ALL.into_iter().filter(|isa| isa.available()).map(move |isa| (b, g, isa))
            })
        {
            let blocks = x.len() / block;
            let run = |by: &dyn Fn(Rounding<'_>)| {
                let (mut words, mut starts) = (vec![0; x.len() / group], vec![0; blocks]);
                let mut scales = vec![0; blocks];
                let (words_to, starts_to, scales_to) = (&mut words, &mut starts, &mut scales);
                by(Rounding {
                    x: &x,
                    block,
                    group,
                    offset: 128,
                    words: words_to,
                    starts: starts_to,
                    scales: scales_to,
                });
                (words, starts, scales)
            };
            let (found, expected) = (run(&|r| isa.round(r)), run(&twin));
            assert_eq!(found, expected, "{} {block} {group}", isa.name());
            for (part, scale) in x.chunks_exact(block).zip(&found.2) {
                let most = part.iter().fold(0f32, |m, x| m.max(x.abs()));
                assert_eq!(f32::from_bits(*scale), most / 127.0);
            }
        }
    }
}
