//! One step of a softmax that takes its keys a few at a time.

use super::Shape;
use super::tile::Floats;

/// Scores of some keys, on their way into a softmax over all keys.
///
/// Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), the online normaliser.
#[derive(Debug)]
pub struct Softmax<'a> {
    /// `[key][column]`; becomes e to the power of the score less the largest so far.
    pub scores: &'a mut [f32],
    /// Vectors of columns.
    pub vectors: usize,
    /// Per column, the largest score so far; −∞ at first.
    pub largest: &'a mut [f32],
    /// Per column, the sum so far; 0 at first.
    pub sums: &'a mut [f32],
    /// Per column, what earlier results must be multiplied by, as their largest score was another one.
    pub shrink: &'a mut [f32],
}

impl Softmax<'_> {
    pub(super) fn check(&self, shape: Shape) {
        let width = self.vectors * shape.lanes;
        assert!(self.vectors > 0 && self.vectors <= shape.vectors, "vectors of a block");
        assert!(self.scores.len().is_multiple_of(width), "scores");
        assert!(self.largest.len() >= width, "the largest scores");
        assert!(self.sums.len() >= width, "the sums");
        assert!(self.shrink.len() >= width, "the factors");
    }
}

/// e to the power of `x`, for `x` up to 88; as [`functions::exp`](crate::kernels::functions::exp).
///
/// # Safety
/// The processor has the instruction set of `F`.
#[inline(always)]
unsafe fn exp<F: Floats>(x: F) -> F {
    // SAFETY: the caller's.
    unsafe {
        // 1.5 · 2^23: adding it rounds to the nearest integer and leaves that in the low bits.
        let round = F::splat(12_582_912.0);
        let x = F::splat(-87.0).max(x);
        let shifted = x.fma(F::splat(std::f32::consts::LOG2_E), round);
        let n = shifted.sub(round);
        let r = n.fma(F::splat(-0.693_359_4), x);
        let r = n.fma(F::splat(2.121_944_4e-4), r);
        let mut p = F::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
            p = p.fma(r, F::splat(c));
        }
        p.mul(shifted.power_of_two())
    }
}

/// # Safety
/// `s` was checked, has `C` vectors, and the processor has the instruction set of `F`.
#[inline(always)]
pub(super) unsafe fn softmax<F: Floats, const C: usize>(s: Softmax<'_>) {
    // SAFETY: every address below lies in the slices, by `Softmax::check`.
    unsafe {
        let width = C * F::LANES;
        let keys = s.scores.len() / width;
        let scores = s.scores.as_mut_ptr();
        let mut largest = [F::zero(); C];
        for (c, m) in largest.iter_mut().enumerate() {
            *m = F::load(s.largest.as_ptr().add(c * F::LANES));
        }
        let before = largest;
        for key in 0..keys {
            for (c, m) in largest.iter_mut().enumerate() {
                *m = F::load(scores.add(key * width + c * F::LANES)).max(*m);
            }
        }
        let mut sums = [F::zero(); C];
        for c in 0..C {
            let shrink = exp(before[c].sub(largest[c]));
            sums[c] = F::load(s.sums.as_ptr().add(c * F::LANES)).mul(shrink);
            shrink.store(s.shrink.as_mut_ptr().add(c * F::LANES));
            largest[c].store(s.largest.as_mut_ptr().add(c * F::LANES));
        }
        for key in 0..keys {
            for c in 0..C {
                let at = scores.add(key * width + c * F::LANES);
                let value = exp(F::load(at).sub(largest[c]));
                value.store(at);
                sums[c] = sums[c].add(value);
            }
        }
        for (c, sum) in sums.iter().enumerate() {
            sum.store(s.sums.as_mut_ptr().add(c * F::LANES));
        }
    }
}
