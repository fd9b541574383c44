//! Activations rounded to 8 bits.
//!
//! Every block of 32 values of a row has its own scale, as the weights' blocks have. So an outlier costs its own block
//! its precision and no other, and no range has to be known beforehand.

use super::gemm::{GATHERED, Rows, Tiles};
use super::isa::Isa;
use super::pool::pool;
use super::simd::{BLOCK, Loop, Quants};

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
        let (blocks, groups) = (self.blocks, self.groups);
        let stride = self.most_rows * self.per_row();
        self.all.resize(tiles.count * stride, 0);
        pool().chunks(&mut self.all[..tiles.count * stride], stride, |index, tile| {
            let rows = tiles.height(index);
            let (words, sides) = tile.split_at_mut(blocks * groups * rows);
            let (starts, scales) = sides.split_at_mut(blocks * rows);
            GATHERED.with_borrow_mut(|[buffer, ..]| {
                for r in 0..rows {
                    let x = x.row(tiles.start(index) + r, buffer);
                    let (words, starts, scales) =
                        (&mut words[r..], &mut starts[r..], &mut scales[r..]);
                    let offset = quants.offset();
                    let round = Round { x, words, starts, scales, step: rows, offset };
                    if groups == BLOCK / 4 {
                        isa.run(Fours(round));
                    } else {
                        isa.run(Twos(round));
                    }
                }
            });
        });
    }
}

/// Rounds one row.
struct Round<'a> {
    x: &'a [f32],
    words: &'a mut [u32],
    starts: &'a mut [u32],
    scales: &'a mut [u32],
    /// Distance between the row's words.
    step: usize,
    offset: i32,
}

impl Round<'_> {
    #[inline(always)]
    fn into<const GROUPS: usize>(self, words_of: impl Fn(&[i8; BLOCK]) -> [u32; GROUPS]) {
        for (index, block) in self.x.chunks(BLOCK).enumerate() {
            let (q, scale, sum) = match block.try_into() {
                Ok(whole) => round(whole),
                Err(_) => {
                    let mut x = [0f32; BLOCK];
                    x[..block.len()].copy_from_slice(block);
                    round(&x)
                }
            };
            self.starts[index * self.step] = (-self.offset * sum) as u32;
            self.scales[index * self.step] = scale.to_bits();
            let to = self.words[index * GROUPS * self.step..].iter_mut().step_by(self.step);
            to.zip(words_of(&q)).for_each(|(to, word)| *to = word);
        }
    }
}

/// Four values to a word.
struct Fours<'a>(Round<'a>);

impl Loop for Fours<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.0.into(|q| -> [u32; BLOCK / 4] {
            std::array::from_fn(|g| u32::from_le_bytes(std::array::from_fn(|i| q[4 * g + i] as u8)))
        });
    }
}

/// Two values to a word, 16 bits each.
struct Twos<'a>(Round<'a>);

impl Loop for Twos<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.0.into(|q| -> [u32; BLOCK / 2] {
            std::array::from_fn(|g| {
                let wide = |i: usize| u32::from(i16::from(q[2 * g + i]) as u16);
                wide(0) | wide(1) << 16
            })
        });
    }
}

/// One block: the rounded values, their scale and their sum. A value that is no number makes all of the block none.
#[inline(always)]
pub(super) fn round(x: &[f32; BLOCK]) -> ([i8; BLOCK], f32, i32) {
    let mut largest = [0f32; 8];
    for part in x.chunks_exact(8) {
        for (m, v) in largest.iter_mut().zip(part) {
            // NaN stays, as it has to reach the scale.
            *m = if v.abs() > *m || v.is_nan() { v.abs() } else { *m };
        }
    }
    let largest = largest.into_iter().fold(0f32, |m, v| if v > m || v.is_nan() { v } else { m });
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut q = [0i8; BLOCK];
    let mut sum = 0i32;
    for (q, v) in q.iter_mut().zip(x) {
        // 1.5 · 2^23: adding it rounds to the nearest integer (ties to even) and leaves that in the low bits.
        let bits = (v * inverse + 12_582_912.0).to_bits();
        *q = bits as u8 as i8;
        sum += i32::from(*q);
    }
    (q, scale, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
