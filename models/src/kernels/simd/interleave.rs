//! Rows turned into columns.

use super::aligned::Plain;
use super::{Loop, TILE_ROWS};

/// Rows of one length, side by side: row `r` at depth `k` goes to `tile[k·step + r]`.
#[derive(Debug)]
pub struct Interleave<'a, T> {
    /// The rows; those from `height` on are empty.
    pub rows: [&'a [T]; TILE_ROWS],
    /// How many.
    pub height: usize,
    /// Distance between depths, at least `height`.
    pub step: usize,
    /// The result; what lies between the depths stays as it was.
    pub tile: &'a mut [T],
}

impl<'a, T> Interleave<'a, T> {
    /// The first [`TILE_ROWS`] of the rows `from`, `step` apart at each depth of `tile`.
    #[inline]
    pub fn new(from: impl IntoIterator<Item = &'a [T]>, step: usize, tile: &'a mut [T]) -> Self {
        let (mut rows, mut height): ([&[T]; TILE_ROWS], _) = ([&[]; TILE_ROWS], 0);
        for (to, row) in rows.iter_mut().zip(from) {
            *to = row;
            height += 1;
        }
        Self { rows, height, step, tile }
    }

    pub(super) fn check(&self) {
        let depth = self.rows[0].len();
        assert!(self.height > 0 && self.height <= TILE_ROWS, "rows of a tile");
        assert!(self.step >= self.height, "distance between depths");
        assert!(
            self.rows[..self.height].iter().all(|row| row.len() == depth),
            "rows of one length"
        );
        if let Some(last) = depth.checked_sub(1) {
            assert!(last * self.step + self.height <= self.tile.len(), "the tile");
        }
    }
}

/// In plain Rust: what runs where no better way is known, and what tests compare the others with.
pub(super) struct Twin<'a, T>(pub Interleave<'a, T>);

impl<T: Plain> Loop for Twin<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Interleave { rows, height, step, tile } = self.0;
        match height {
            8 => plain::<T, 8>(rows, step, tile),
            7 => plain::<T, 7>(rows, step, tile),
            6 => plain::<T, 6>(rows, step, tile),
            5 => plain::<T, 5>(rows, step, tile),
            4 => plain::<T, 4>(rows, step, tile),
            3 => plain::<T, 3>(rows, step, tile),
            2 => plain::<T, 2>(rows, step, tile),
            1 => plain::<T, 1>(rows, step, tile),
            _ => {}
        }
    }
}

#[inline(always)]
fn plain<T: Plain, const R: usize>(rows: [&[T]; TILE_ROWS], step: usize, tile: &mut [T]) {
    let depth = rows[0].len();
    let rows: [&[T]; R] = std::array::from_fn(|r| &rows[r][..depth]);
    for (k, to) in tile.chunks_mut(step).enumerate().take(depth) {
        for (to, row) in to[..R].iter_mut().zip(&rows) {
            *to = row[k];
        }
    }
}

/// Eight rows by eight depths at a time, in registers.
///
/// # Safety
/// `i` was checked, and the processor has AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
pub(super) unsafe fn eights<T: Plain>(i: Interleave<'_, T>) {
    use std::arch::x86_64::*;

    const { assert!(size_of::<T>() == size_of::<f32>()) };
    let depth = i.rows[0].len();
    // Rows past the last are copies of it: what they give is written over, or not written.
    let rows: [*const f32; TILE_ROWS] =
        std::array::from_fn(|r| i.rows[r.min(i.height - 1)].as_ptr().cast());
    let tile = i.tile.as_mut_ptr().cast::<f32>();
    // Whole vectors may be written where the next depth follows at once, or the vector is full; but never past the end.
    let whole = i.height == TILE_ROWS || i.step == i.height;
    let end = i.tile.len();
    let mut k = 0;
    while whole && k + 8 <= depth && (k + 7) * i.step + 8 <= end {
        // SAFETY: eight values of each row from `k` on, by the condition and `Interleave::check`; the stores end before
        // `end`. Numbers of four bytes are moved and never computed with, so it does not matter what kind they are.
        unsafe {
            let row = |r: usize| _mm256_loadu_ps(rows[r].add(k));
            let pair = |a: __m256, b: __m256| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (a0, a1) = pair(row(0), row(1));
            let (b0, b1) = pair(row(2), row(3));
            let (c0, c1) = pair(row(4), row(5));
            let (d0, d1) = pair(row(6), row(7));
            let four = |a: __m256, b: __m256| {
                (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b))
            };
            let (l0, l1) = four(a0, b0);
            let (l2, l3) = four(a1, b1);
            let (h0, h1) = four(c0, d0);
            let (h2, h3) = four(c1, d1);
            let to = |d: usize| tile.add((k + d) * i.step);
            _mm256_storeu_ps(to(0), _mm256_permute2f128_ps::<0x20>(l0, h0));
            _mm256_storeu_ps(to(1), _mm256_permute2f128_ps::<0x20>(l1, h1));
            _mm256_storeu_ps(to(2), _mm256_permute2f128_ps::<0x20>(l2, h2));
            _mm256_storeu_ps(to(3), _mm256_permute2f128_ps::<0x20>(l3, h3));
            _mm256_storeu_ps(to(4), _mm256_permute2f128_ps::<0x31>(l0, h0));
            _mm256_storeu_ps(to(5), _mm256_permute2f128_ps::<0x31>(l1, h1));
            _mm256_storeu_ps(to(6), _mm256_permute2f128_ps::<0x31>(l2, h2));
            _mm256_storeu_ps(to(7), _mm256_permute2f128_ps::<0x31>(l3, h3));
        }
        k += 8;
    }
    let rows = i.rows.map(|row| row.get(k..).unwrap_or_default());
    let rest = i.tile.get_mut(k * i.step..).unwrap_or_default();
    Twin(Interleave { rows, height: i.height, step: i.step, tile: rest }).run();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn every_height_depth_and_step_lies_where_it_should() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (height, depth, more) in
                (1..=TILE_ROWS).flat_map(|h| [0, 1, 7, 8, 9, 24, 33].map(|d| (h, d, (h * d) % 3)))
            {
                let all: Vec<Vec<f32>> = (0..height)
                    .map(|r| (0..depth).map(|k| (r * 100 + k) as f32).collect())
                    .collect();
                let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
                rows.iter_mut().zip(&all).for_each(|(to, row)| *to = row);
                let step = height + more * 5;
                // As short as allowed: nothing follows the last depth.
                let length = depth.checked_sub(1).map_or(0, |last| last * step + height);
                let mut tile = vec![-1.0; length];
                isa.interleave(Interleave { rows, height, step, tile: &mut tile });
                for (at, value) in tile.into_iter().enumerate() {
                    let (k, r) = (at / step, at % step);
                    let expected = if r < height { all[r][k] } else { -1.0 };
                    assert_eq!(value, expected, "{} {height} x {depth} by {step}", isa.name());
                }
            }
        }
    }
}
