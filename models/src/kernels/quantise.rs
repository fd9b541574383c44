//! Activations rounded to 8 bits.
//!
//! Every block of 32 values of a row has its own scale, as the weights' blocks have. So an outlier costs its own block
//! its precision and no other, and no range has to be known beforehand.

use std::cell::RefCell;

use super::gemm::{GATHERED, Rows, Tiles};
use super::isa::Isa;
use super::pool::pool;
use super::simd::{BLOCK, Interleave, Quants, Rounding, TILE_ROWS};

thread_local! {
    /// The rows of a tile that this thread rounds, one after the other.
    static ROWS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Rounded activations in the order of the tiles: of each tile the words (per block and group of depths, per row), then
/// what the sums start from, then the scales (both per block, per row).
#[derive(Debug)]
pub(super) struct Words {
    all: Vec<u32>,
    blocks: usize,
    groups: usize,
    most_rows: usize,
}

/// One tile of them.
pub(super) struct Part<'a> {
    pub words: &'a [u32],
    pub starts: &'a [u32],
    pub scales: &'a [u32],
}

impl Words {
    pub const fn new() -> Self {
        Self { all: Vec::new(), blocks: 0, groups: 0, most_rows: 0 }
    }

    /// Words of one row in a tile.
    fn per_row(&self) -> usize {
        self.blocks * (self.groups + 2)
    }

    /// Tile `index`, of `rows` rows.
    pub fn tile(&self, index: usize, rows: usize) -> Part<'_> {
        let tile = &self.all[index * self.most_rows * self.per_row()..];
        let (words, rest) = tile.split_at(self.blocks * self.groups * rows);
        let (starts, rest) = rest.split_at(self.blocks * rows);
        Part { words, starts, scales: &rest[..self.blocks * rows] }
    }

    /// Rounds `x` (`depth` wide), for weights stored as `quants` and packed for `isa`.
    pub fn pack(&mut self, x: &impl Rows, depth: usize, tiles: Tiles, quants: Quants, isa: Isa) {
        self.blocks = depth.div_ceil(BLOCK);
        self.groups = BLOCK / isa.group();
        self.most_rows = tiles.most();
        let (blocks, groups, per_row) = (self.blocks, self.groups, self.per_row());
        let stride = self.most_rows * self.per_row();
        self.all.resize(tiles.count * stride, 0);
        let offset = quants.offset();
        pool().chunks(&mut self.all[..tiles.count * stride], stride, |index, tile| {
            let height = tiles.height(index);
            GATHERED.with_borrow_mut(|[buffer, ..]| {
                ROWS.with_borrow_mut(|rounded| {
                    rounded.resize(TILE_ROWS.max(height) * per_row, 0);
                    for (r, row) in rounded.chunks_exact_mut(per_row).enumerate().take(height) {
                        let x = x.row(tiles.start(index) + r, buffer);
                        round_row(x, isa, offset, row, blocks * groups);
                    }
                    let mut rows: [&[u32]; TILE_ROWS] = [&[]; TILE_ROWS];
                    let used = rounded.chunks_exact(per_row).take(height);
                    rows.iter_mut().zip(used).for_each(|(to, row)| *to = row);
                    isa.interleave(Interleave { rows, height, step: height, tile });
                });
            });
        });
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
    isa.round(Rounding { x: &x[..whole * BLOCK], group, offset, words, starts, scales });
    if !more_starts.is_empty() {
        let (words, starts, scales) = (more_words, more_starts, more_scales);
        isa.round(Rounding { x: &last, group, offset, words, starts, scales });
    }
}
