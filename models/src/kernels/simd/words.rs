//! Products of two sides that were both rounded, and the step of a softmax that rounds its result to be one of them.

use super::Shape;
use super::tile::{Bytes, Floats};

/// Operands of a tile whose two sides are words of a few 8-bit values each ([`Rounding`](super::Rounding)).
#[derive(Debug)]
pub struct Words<'a> {
    /// Words that are summed over.
    pub count: usize,
    /// The side of the rows: row `r` has `a[k·rows + r]`, signed values.
    pub a: &'a [u32],
    /// What the sum of each row starts from (bits of an `i32`): minus what the other side has more than it means, times
    /// the sum of the row's values.
    pub starts: &'a [u32],
    /// Each row's scale (bits of an `f32`).
    pub a_scales: &'a [u32],
    /// The side of the columns: `b[k·b_step + c]`, as the instruction set wants them
    /// ([`Isa::other_side`](super::Isa::other_side), [`Weigh`]).
    pub b: &'a [u32],
    /// Distance between words in `b`.
    pub b_step: usize,
    /// Each column's scale.
    pub b_scales: &'a [f32],
    /// Rows of the tile.
    pub rows: usize,
    /// Vectors of columns of the tile.
    pub vectors: usize,
    /// The result, as in [`Products`](super::Products).
    pub out: &'a mut [f32],
    /// True when `out` holds sums to go on from.
    pub accumulate: bool,
}

impl Words<'_> {
    pub(super) fn check(&self, shape: Shape) {
        assert!(self.rows > 0 && self.rows <= shape.rows, "rows of a tile");
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a tile");
        let columns = self.vectors * shape.lanes;
        assert!(self.out.len() >= self.rows * columns, "the result");
        assert!(self.a.len() >= self.count * self.rows, "the rows' side");
        assert!(self.starts.len() >= self.rows && self.a_scales.len() >= self.rows, "rows' scales");
        assert!(self.b_scales.len() >= columns, "columns' scales");
        if let Some(last) = self.count.checked_sub(1) {
            assert!(last * self.b_step + columns <= self.b.len(), "the columns' side");
        }
    }
}

/// Scores of some keys, base 2, on their way into a softmax over all keys, which become one side of a product.
///
/// Each column is rounded with a scale of its own for these keys: its largest becomes the largest number there is. So
/// keys whose scores are far below others' keep their precision among themselves.
#[derive(Debug)]
pub struct Weigh<'a> {
    /// `[key][column]`, whole words of keys.
    pub scores: &'a [f32],
    /// Vectors of columns.
    pub vectors: usize,
    /// Per word of keys and column, 2 to the power of the score less the largest of these keys, rounded.
    pub words: &'a mut [u32],
    /// Per column, the largest score so far; −∞ at first.
    pub largest: &'a mut [f32],
    /// Per column, the sum so far; 0 at first.
    pub sums: &'a mut [f32],
    /// Per column, what earlier results must be multiplied by, as their largest score was another one.
    pub shrink: &'a mut [f32],
    /// Per column, the scale of `words`.
    pub scales: &'a mut [f32],
}

impl Weigh<'_> {
    pub(super) fn check(&self, shape: Shape, group: usize) {
        let width = self.vectors * shape.lanes;
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a block");
        assert!(self.scores.len().is_multiple_of(group * width), "scores of whole words");
        assert!(self.words.len() >= self.scores.len() / group, "words");
        assert!(self.largest.len() >= width, "the largest scores");
        assert!(self.sums.len() >= width, "the sums");
        assert!(self.shrink.len() >= width, "the factors");
        assert!(self.scales.len() >= width, "the scales");
    }
}

/// One tile of `R` rows and `C` vectors.
///
/// # Safety
/// `w` was checked, has these sizes, and the processor has the instruction set of `B`.
#[inline(always)]
pub(super) unsafe fn words<B: Bytes, const R: usize, const C: usize>(w: &mut Words<'_>) {
    // SAFETY: every address below lies in the slices, by `Words::check`.
    unsafe {
        let lanes = B::Float::LANES;
        let mut sums = [[B::sums(0); C]; R];
        for (r, row) in sums.iter_mut().enumerate() {
            *row = [B::sums(*w.starts.as_ptr().add(r) as i32); C];
        }
        let (mut a, mut b) = (w.a.as_ptr(), w.b.as_ptr());
        for _ in 0..w.count {
            let mut columns = [B::words(b); C];
            for (c, column) in columns.iter_mut().enumerate().skip(1) {
                *column = B::words(b.add(c * lanes));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let word = *a.add(r);
                for (sum, column) in row.iter_mut().zip(&columns) {
                    *sum = B::dot(*sum, *column, word);
                }
            }
            a = a.add(R);
            b = b.wrapping_add(w.b_step);
        }
        let mut by = [B::Float::zero(); C];
        for (c, by) in by.iter_mut().enumerate() {
            *by = B::Float::load(w.b_scales.as_ptr().add(c * lanes));
        }
        let out = w.out.as_mut_ptr();
        for (r, row) in sums.iter().enumerate() {
            let scale = B::Float::splat(f32::from_bits(*w.a_scales.as_ptr().add(r)));
            for (c, sum) in row.iter().enumerate() {
                let at = out.add((r * C + c) * lanes);
                let before = if w.accumulate { B::Float::load(at) } else { B::Float::zero() };
                B::float(*sum).fma(scale.mul(by[c]), before).store(at);
            }
        }
    }
}

/// 1.5 · 2^23: adding it rounds to the nearest integer and leaves that in the low bits.
const ROUND: f32 = 12_582_912.0;

/// 2 to the power of `x`, for `x` from −126 up; off by a fraction of 1.02e-4 at most, and not for
/// 0. What is no number stays none.
///
/// # Safety
/// The processor has the instruction set of `F`.
#[inline(always)]
unsafe fn exp2<F: Floats>(x: F) -> F {
    // SAFETY: the caller's.
    unsafe {
        let x = F::splat(-126.0).max(x);
        let shifted = x.add(F::splat(ROUND));
        let rest = x.sub(shifted.sub(F::splat(ROUND)));
        // The polynomial of degree 3 with the least relative error over [−1/2, 1/2] of those that are 1 at 0.
        let mut p = F::splat(0.055_008_75);
        for c in [0.242_210_76, 0.693_282_9, 1.0] {
            p = p.fma(rest, F::splat(c));
        }
        p.mul(shifted.power_of_two())
    }
}

/// # Safety
/// `w` was checked, has `C` vectors, and the processor has the instruction set of `B`.
#[inline(always)]
pub(super) unsafe fn weigh<B: Bytes, const C: usize>(w: Weigh<'_>) {
    // SAFETY: every address below lies in the slices, by `Weigh::check`.
    unsafe {
        let lanes = B::Float::LANES;
        let width = C * lanes;
        let keys = w.scores.len() / width;
        let scores = w.scores.as_ptr();
        // Where no key is seen the largest is a number still.
        let mut largest = [B::Float::splat(-1e30); C];
        for key in 0..keys {
            for (c, m) in largest.iter_mut().enumerate() {
                *m = B::Float::load(scores.add(key * width + c * lanes)).max(*m);
            }
        }
        let mut sums = [B::Float::zero(); C];
        let (most, round) = (B::Float::splat(B::MOST.log2()), B::Float::splat(ROUND));
        for word in 0..keys / B::GROUP {
            for c in 0..C {
                let less = largest[c].sub(most);
                let mut values = [round; 4];
                for (k, value) in values.iter_mut().enumerate().take(B::GROUP) {
                    let at = scores.add((word * B::GROUP + k) * width + c * lanes);
                    *value = exp2(B::Float::load(at).sub(less)).add(round);
                    // Of what is rounded: so the weights' sum is one.
                    sums[c] = sums[c].add(value.sub(round));
                }
                B::pack(values, w.words.as_mut_ptr().add(word * width + c * lanes));
            }
        }
        for c in 0..C {
            let at = c * lanes;
            let before = B::Float::load(w.largest.as_ptr().add(at));
            let now = before.max(largest[c]);
            let (shrink, scale) = (exp2(before.sub(now)), exp2(largest[c].sub(now)));
            let sum = B::Float::load(w.sums.as_ptr().add(at)).mul(shrink);
            sums[c].fma(scale, sum).store(w.sums.as_mut_ptr().add(at));
            now.store(w.largest.as_mut_ptr().add(at));
            shrink.store(w.shrink.as_mut_ptr().add(at));
            scale.store(w.scales.as_mut_ptr().add(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;
    use crate::kernels::simd::{BLOCK, Rounding};
    use proptest::prelude::*;

    /// `count` numbers, rounded with one scale: the words that `group` values make each, the start and the scale.
    fn rounded(isa: Isa, x: &[f32]) -> (Vec<u32>, u32, u32) {
        let (mut words, mut start, mut scale) = (vec![0; x.len() / isa.group()], [0], [0]);
        isa.round(Rounding {
            x,
            block: x.len(),
            group: isa.group(),
            offset: i32::from(isa.other_side()),
            words: &mut words,
            starts: &mut start,
            scales: &mut scale,
        });
        (words, start[0], scale[0])
    }

    /// The values of words that are signed.
    fn values(isa: Isa, words: &[u32]) -> Vec<i64> {
        let of = |word: &u32| match isa.group() {
            4 => word.to_le_bytes().map(|b| i64::from(b as i8)).to_vec(),
            _ => vec![i64::from(*word as i16), i64::from((*word >> 16) as i16)],
        };
        words.iter().flat_map(of).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn every_set_multiplies_words_as_whole_numbers(
            blocks in 1usize..4,
            rows in 1usize..9,
            vectors in 1usize..4,
            seed in 0usize..1000,
            accumulate: bool,
        ) {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let shape = isa.float_shape();
                let (rows, vectors) = (rows.min(shape.rows), vectors.min(shape.vectors));
                let (columns, depth) = (vectors * shape.lanes, blocks * BLOCK);
                let line = |i: usize| -> Vec<f32> {
                    (0..depth).map(|k| ((k * 7919 + (i + seed) * 104_729) % 1009) as f32 - 504.0).collect()
                };
                let a: Vec<_> = (0..rows).map(|r| rounded(isa, &line(r))).collect();
                let b: Vec<_> = (0..columns).map(|c| rounded(isa, &line(100 + c))).collect();
                let count = depth / isa.group();
                let other = if isa.other_side() == 0 { 0 } else { 0x8080_8080 };
                let a_words: Vec<u32> = (0..count).flat_map(|k| a.iter().map(move |a| a.0[k])).collect();
                let b_words: Vec<u32> =
                    (0..count).flat_map(|k| b.iter().map(move |b| b.0[k] ^ other)).collect();
                let starts: Vec<u32> = a.iter().map(|a| a.1).collect();
                let a_scales: Vec<u32> = a.iter().map(|a| a.2).collect();
                let b_scales: Vec<f32> = b.iter().map(|b| f32::from_bits(b.2)).collect();
                let mut out = vec![3.0; rows * columns];
                isa.word_tile(Words {
                    count, a: &a_words, starts: &starts, a_scales: &a_scales, b: &b_words, b_step: columns,
                    b_scales: &b_scales, rows, vectors, out: &mut out, accumulate,
                });
                for (r, c) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                    let sum: i64 =
                        values(isa, &a[r].0).iter().zip(values(isa, &b[c].0)).map(|(a, b)| a * b).sum();
                    let sum = sum as f64 * f64::from(f32::from_bits(a[r].2)) * f64::from(b_scales[c]);
                    let expected = sum + if accumulate { 3.0 } else { 0.0 };
                    let found = f64::from(out[r * columns + c]);
                    prop_assert!(
                        (found - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                        "{} {rows} x {vectors}: {found} {expected}", isa.name()
                    );
                }
            }
        }

        #[test]
        fn every_set_weighs_as_a_softmax_does(
            words in 1usize..20,
            vectors in 1usize..4,
            seed in 0usize..1000,
            before in prop::option::of(-20f32..20.0),
            unseen in 0usize..4,
        ) {
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let (shape, group) = (isa.float_shape(), isa.group());
                let vectors = vectors.min(shape.vectors);
                let (width, keys) = (vectors * shape.lanes, words * group);
                let score = |key: usize, c: usize| {
                    // The last keys are not seen; some columns see none at all.
                    if key + unseen >= keys || c == 1 { return f32::NEG_INFINITY; }
                    ((key * 7919 + (c + seed) * 104_729) % 1009) as f32 / 30.0 - 17.0
                };
                let scores: Vec<f32> =
                    (0..keys).flat_map(|key| (0..width).map(move |c| score(key, c))).collect();
                let mut packed = vec![0; words * width];
                let (mut largest, mut sums) = (vec![f32::NEG_INFINITY; width], vec![0.0; width]);
                if let Some(before) = before {
                    largest.fill(before);
                    sums.fill(100.0);
                }
                let (mut shrink, mut scales) = (vec![0.0; width], vec![0.0; width]);
                isa.weigh(Weigh {
                    scores: &scores, vectors, words: &mut packed, largest: &mut largest, sums: &mut sums,
                    shrink: &mut shrink, scales: &mut scales,
                });
                let most = if isa == Isa::NeonDot { 127.0 } else { 255.0 };
                for c in 0..width {
                    let here = (0..keys).map(|k| score(k, c)).fold(f32::NEG_INFINITY, f32::max);
                    let all = here.max(before.unwrap_or(f32::NEG_INFINITY));
                    let mut sum = 0.0;
                    for key in 0..keys {
                        let word = packed[key / group * width + c];
                        let found = if group == 4 {
                            f64::from(word.to_le_bytes()[key % 4])
                        } else {
                            f64::from((word >> (16 * (key % 2))) as u16)
                        };
                        let expected = if score(key, c) == f32::NEG_INFINITY { 0.0 } else {
                            f64::from(score(key, c) - here).exp2() * most
                        };
                        prop_assert!((found - expected).abs() < 0.53, "{}: {found} {expected}", isa.name());
                        sum += found;
                    }
                    if here == f32::NEG_INFINITY {
                        // Nothing seen: the others' sums stay what they were.
                        prop_assert_eq!(sum, 0.0);
                        prop_assert_eq!(sums[c], before.map_or(0.0, |_| 100.0 * shrink[c]));
                        prop_assert!(before.is_none() || (shrink[c] - 1.0).abs() < 1e-4);
                        continue;
                    }
                    let near = |found: f32, expected: f64| {
                        (f64::from(found) - expected).abs() <= 2e-4 * expected.abs() + 1e-30
                    };
                    prop_assert_eq!(largest[c], all);
                    prop_assert!(near(scales[c], f64::from(here - all).exp2()));
                    let shrunk = before.map_or(0.0, |before| f64::from(before - all).exp2());
                    prop_assert!(near(shrink[c], shrunk) || shrunk == 0.0 && shrink[c] < 1e-30);
                    let expected = sum * f64::from(scales[c]) + before.map_or(0.0, |_| 100.0) * f64::from(shrink[c]);
                    prop_assert!(near(sums[c], expected), "{} {expected}", sums[c]);
                }
            }
        }
    }
}
