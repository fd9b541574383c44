//! Activations rounded to 8 bits.
//!
//! Every span of a few values of a row has its own scale: 32 values, as the weights' blocks have, or 64 where a column of
//! weights has one scale for all its depths. So an outlier costs its own span its precision and no other, and no range has
//! to be known beforehand.

use std::cell::RefCell;

use super::isa::Isa;
use super::pool::pool;
use super::simd::{BLOCK, Interleave, Quants, Rounding, SPAN, TILE_ROWS};
use super::strips::{GATHERED, Strips};

thread_local! {
    /// The places that this thread rounds, one after the other.
    static ROUNDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// What a place of a strip holds once it is rounded: words (per block and group of depths), then what the sums start
/// from, then the scales (both per span).
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    blocks: usize,
    groups: usize,
    spans: usize,
}

impl Place {
    /// A place of `depth` values, for weights packed for `isa`.
    pub fn new(depth: usize, quants: Quants, isa: Isa) -> Self {
        let spans = depth.div_ceil(quants.span());
        Self { blocks: depth.div_ceil(BLOCK), groups: BLOCK / isa.group(), spans }
    }

    /// Its words.
    fn words(self) -> usize {
        self.blocks * self.groups
    }

    /// All its numbers.
    pub fn lines(self) -> usize {
        self.words() + 2 * self.spans
    }

    /// Words, starts and scales of strips with `step` places: a [`Piece`](super::simd::Piece) begins at the same index
    /// in all of them.
    pub fn split(self, laid: &[u32], step: usize) -> [&[u32]; 3] {
        [laid, &laid[self.words() * step..], &laid[(self.words() + self.spans) * step..]]
    }
}

/// Puts `x` in order, rounded, for weights stored as `quants` and packed for `isa`: per strip, `[number][place]`.
pub(super) fn lay_words(laid: &mut Vec<u32>, x: &impl Strips, quants: Quants, isa: Isa) {
    let place = Place::new(x.depth(), quants, isa);
    let lines = place.lines();
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
                        round_row(x, isa, quants, row, place.words());
                        if quants == Quants::Minima {
                            scale_starts(&mut row[place.words()..]);
                        }
                    }
                    let rows = rounded.chunks_exact(lines).take(height);
                    isa.interleave(Interleave::new(rows, step, &mut to[first..]));
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
fn round_row(x: &[f32], isa: Isa, quants: Quants, row: &mut [u32], words: usize) {
    let (group, offset) = (isa.group(), quants.offset());
    let whole = x.len() / quants.span() * quants.span();
    let (x, rest) = x.split_at(whole);
    let (words, sides) = row.split_at_mut(words);
    let (starts, scales) = sides.split_at_mut(sides.len() / 2);
    let (words, last_words) = words.split_at_mut(whole / group);
    let (starts, last_start) = starts.split_at_mut(whole / quants.span());
    let (scales, last_scale) = scales.split_at_mut(whole / quants.span());
    isa.round(Rounding { x, block: quants.span(), group, offset, words, starts, scales });
    if !rest.is_empty() {
        let mut last = [0f32; SPAN];
        last[..rest.len()].copy_from_slice(rest);
        let (x, words) = (&last[..rest.len().next_multiple_of(BLOCK)], last_words);
        let (block, starts, scales) = (x.len(), last_start, last_scale);
        isa.round(Rounding { x, block, group, offset, words, starts, scales });
    }
}
