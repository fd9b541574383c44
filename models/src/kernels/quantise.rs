//! Activations rounded to 8 bits.
//!
//! Every block of 32 values of a row has its own scale, as the weights' blocks have. So an outlier costs its own block
//! its precision and no other, and no range has to be known beforehand.

use std::cell::RefCell;

use super::isa::Isa;
use super::pool::pool;
use super::simd::{BLOCK, Interleave, Quants, Rounding, TILE_ROWS};
use super::strips::{GATHERED, Strips};

thread_local! {
    /// The places that this thread rounds, one after the other.
    static ROUNDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// What a place of a strip holds once it is rounded: words (per block and group of depths), then what the sums start
/// from, then the scales (both per block).
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub blocks: usize,
    groups: usize,
}

impl Place {
    /// A place of `depth` values, for weights packed for `isa`.
    pub fn new(depth: usize, isa: Isa) -> Self {
        Self { blocks: depth.div_ceil(BLOCK), groups: BLOCK / isa.group() }
    }

    /// Its words.
    fn words(self) -> usize {
        self.blocks * self.groups
    }

    /// All its numbers.
    pub fn lines(self) -> usize {
        self.words() + 2 * self.blocks
    }

    /// Words, starts and scales of strips with `step` places: a [`Piece`](super::simd::Piece) begins at the same index
    /// in all of them.
    pub fn split(self, laid: &[u32], step: usize) -> [&[u32]; 3] {
        [laid, &laid[self.words() * step..], &laid[(self.words() + self.blocks) * step..]]
    }
}

/// Puts `x` in order, rounded, for weights stored as `quants` and packed for `isa`: per strip, `[number][place]`.
pub(super) fn lay_words(laid: &mut Vec<u32>, x: &impl Strips, quants: Quants, isa: Isa) {
    let place = Place::new(x.depth(), isa);
    let (lines, offset) = (place.lines(), quants.offset());
    let stride = x.most() * lines;
    laid.resize(x.strips() * stride, 0);
    pool().chunks(&mut laid[..], stride, |strip, to| {
        GATHERED.with_borrow_mut(|[buffer, ..]| {
            ROUNDED.with_borrow_mut(|rounded| {
                rounded.resize(TILE_ROWS * lines, 0);
                let step = x.places(strip);
                for first in (0..step).step_by(TILE_ROWS) {
                    let height = TILE_ROWS.min(step - first);
                    for (r, row) in rounded.chunks_exact_mut(lines).enumerate().take(height) {
                        let x = x.place(strip, first + r, buffer);
                        round_row(x, isa, offset, row, place.words());
                        if quants == Quants::Minima {
                            scale_starts(&mut row[place.words()..]);
                        }
                    }
                    let mut rows: [&[u32]; TILE_ROWS] = [&[]; TILE_ROWS];
                    let used = rounded.chunks_exact(lines).take(height);
                    rows.iter_mut().zip(used).for_each(|(to, row)| *to = row);
                    isa.interleave(Interleave { rows, height, step, tile: &mut to[first..] });
                }
            });
        });
    });
}

/// Starts by their scales: what the minima are multiplied with.
fn scale_starts(sides: &mut [u32]) {
    let (starts, scales) = sides.split_at_mut(sides.len() / 2);
    for (start, scale) in starts.iter_mut().zip(scales) {
        *start = (*start as i32 as f32 * f32::from_bits(*scale)).to_bits();
    }
}

/// One row: its words, then where the sums start, then the scales. What lacks to a whole block is zero.
fn round_row(x: &[f32], isa: Isa, offset: i32, row: &mut [u32], words: usize) {
    let whole = x.len() / BLOCK;
    let mut last = [0f32; BLOCK];
    last[..x.len() - whole * BLOCK].copy_from_slice(&x[whole * BLOCK..]);
    let (words, sides) = row.split_at_mut(words);
    let (starts, scales) = sides.split_at_mut(sides.len() / 2);
    let (words, more_words) = words.split_at_mut(whole * (BLOCK / isa.group()));
    let (starts, more_starts) = starts.split_at_mut(whole);
    let (scales, more_scales) = scales.split_at_mut(whole);
    let group = isa.group();
    isa.round(Rounding {
        x: &x[..whole * BLOCK],
        block: BLOCK,
        group,
        offset,
        words,
        starts,
        scales,
    });
    if !more_starts.is_empty() {
        let (words, starts, scales) = (more_words, more_starts, more_scales);
        isa.round(Rounding { x: &last, block: BLOCK, group, offset, words, starts, scales });
    }
}
