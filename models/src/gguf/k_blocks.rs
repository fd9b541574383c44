//! `Q4_K`: 256 values in 8 blocks of 32, as ggml defines it.
//!
//! Two half-precision factors `d` and `dmin`, then per block a 6-bit scale and a 6-bit minimum in 12 bytes, then 128 bytes
//! of nibbles: bytes `32·j..` hold block `2j` in their low and block `2j + 1` in their high halves. The values of block `b`
//! are `d·scale[b]·q − dmin·min[b]`. Source: ggml `src/ggml-common.h`, `block_q4_K`; `src/ggml-quants.c`,
//! `get_scale_min_k4`.

use half::f16;

use super::blocks::BLOCK;

/// Values in a super-block.
pub const SUPER_BLOCK: usize = 256;
/// Bytes of a `Q4_K` super-block.
pub const Q4_K_BYTES: usize = 4 + SCALES + SUPER_BLOCK / 2;

/// Blocks in a super-block.
pub const BLOCKS: usize = SUPER_BLOCK / BLOCK;
/// Bytes of the scales and minima.
const SCALES: usize = 12;
/// The largest 4-bit value.
const LEVELS: f32 = 15.0;
/// The largest 6-bit scale or minimum.
const STEPS: f32 = 63.0;

/// What stands before a super-block's nibbles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    /// What the scales are multiplied with (bits of an `f16`).
    pub d: u16,
    /// What the minima are multiplied with (bits of an `f16`).
    pub dmin: u16,
    /// Scale and minimum of each block, below 64.
    pub blocks: [(u8, u8); BLOCKS],
}

impl Head {
    /// The head of the super-block `bytes`, which are [`Q4_K_BYTES`].
    pub fn read(bytes: &[u8]) -> Self {
        let s = &bytes[4..4 + SCALES];
        // Six bits of the first four blocks; the others' low four bits are in the last bytes, their high two above the
        // first ones'.
        let blocks = std::array::from_fn(|b| match b {
            0..4 => (s[b] & 63, s[b + 4] & 63),
            _ => (s[b + 4] & 15 | s[b - 4] >> 6 << 4, s[b + 4] >> 4 | s[b] >> 6 << 4),
        });
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self { d: half(0), dmin: half(2), blocks }
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[..2].copy_from_slice(&self.d.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.dmin.to_le_bytes());
        let s = &mut bytes[4..4 + SCALES];
        for (b, (scale, min)) in self.blocks.into_iter().enumerate() {
            if b < 4 {
                s[b] |= scale;
                s[b + 4] |= min;
            } else {
                s[b + 4] = scale & 15 | (min & 15) << 4;
                s[b - 4] |= scale >> 4 << 6;
                s[b] |= min >> 4 << 6;
            }
        }
    }

    /// Scale and minimum of block `b`.
    fn factors(&self, b: usize) -> (f32, f32) {
        let (scale, min) = self.blocks[b];
        let by = |bits: u16, n: u8| f16::from_bits(bits).to_f32() * f32::from(n);
        (by(self.d, scale), by(self.dmin, min))
    }
}

/// The 4-bit values of block `b` of the super-block `bytes`.
pub fn nibbles(bytes: &[u8], b: usize) -> [u8; BLOCK] {
    let shift = b % 2 * 4;
    let from = &bytes[4 + SCALES + b / 2 * BLOCK..];
    std::array::from_fn(|i| from[i] >> shift & 15)
}

/// Widens one super-block, or the first values of it.
pub(super) fn decode(bytes: &[u8], out: &mut [f32]) {
    let head = Head::read(bytes);
    for (b, out) in out.chunks_mut(BLOCK).enumerate() {
        let (scale, min) = head.factors(b);
        for (o, q) in out.iter_mut().zip(nibbles(bytes, b)) {
            *o = scale * f32::from(q) - min;
        }
    }
}

/// A block on its way: its values, and what an error of each counts.
struct Block {
    x: [f32; BLOCK],
    weight: [f32; BLOCK],
}

impl Block {
    /// An error counts more where the value is large, as it meets larger sums there: `√mean(x²) + |x|`, the weights of
    /// ggml's writer.
    fn new(values: &[f32]) -> Self {
        let x: [f32; BLOCK] = std::array::from_fn(|i| values[i]);
        let spread = (x.iter().map(|x| x * x).sum::<f32>() / BLOCK as f32).sqrt();
        Self { x, weight: x.map(|x| spread + x.abs()) }
    }

    /// The nearest levels.
    fn levels(&self, scale: f32, min: f32) -> [f32; BLOCK] {
        // Adding 1.5 · 2^23 rounds to the nearest integer, in vectors, too.
        const MIDDLE: f32 = 12_582_912.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        self.x.map(|x| ((x + min) * inverse).clamp(0.0, LEVELS) + MIDDLE - MIDDLE)
    }

    /// The weighted square error of `levels`.
    fn error(&self, levels: &[f32; BLOCK], scale: f32, min: f32) -> f32 {
        let all = self.x.iter().zip(&self.weight).zip(levels);
        all.map(|((x, w), q)| w * (scale * q - min - x).powi(2)).sum()
    }

    /// Scale and minimum (what is taken from the scaled levels, not below zero) of least weighted error for `levels`.
    fn fit(&self, levels: &[f32; BLOCK]) -> (f32, f32) {
        let (mut w, mut q, mut qq, mut x, mut xq) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for ((value, weight), level) in self.x.iter().zip(&self.weight).zip(levels) {
            w += weight;
            q += weight * level;
            qq += weight * level * level;
            x += weight * value;
            xq += weight * value * level;
        }
        let determinant = w * qq - q * q;
        let (scale, min) = match determinant > 0.0 {
            true => ((w * xq - q * x) / determinant, (q * xq - qq * x) / determinant),
            false => (0.0, -x / w.max(f32::MIN_POSITIVE)),
        };
        if min >= 0.0 {
            return (scale.max(0.0), min);
        }
        // All values are above zero: the line goes through it.
        (if qq > 0.0 { (xq / qq).max(0.0) } else { 0.0 }, 0.0)
    }

    /// Scale and minimum of the least weighted error found: levels by evenly spaced widths of the steps, each followed by
    /// its best line.
    fn search(&self) -> (f32, f32) {
        let low = self.x.iter().fold(0f32, |m, x| m.min(*x));
        let high = self.x.iter().fold(f32::MIN, |m, x| m.max(*x));
        if high <= low {
            // All the same and not above zero: the minimum alone is that value.
            return (0.0, -low);
        }
        let first = ((high - low) / LEVELS, -low);
        let error = |(scale, min): (f32, f32)| self.error(&self.levels(scale, min), scale, min);
        let mut best = (error(first), first);
        // From 14 levels over the whole range to 16.5, which cut off its ends.
        for step in 0..=20 {
            let scale = (high - low) / (LEVELS - 1.0 + 0.125 * step as f32);
            let line = self.fit(&self.levels(scale, -low));
            // Its own nearest levels may fit better than those that it was made of.
            let found = (error(line), line);
            if found.0 < best.0 {
                best = found;
            }
        }
        best.1
    }

    /// The 6-bit scale and minimum near `near` that cost least.
    fn rounded(&self, near: (f32, f32), d: f32, dmin: f32) -> (u8, u8) {
        let nearest = |x: f32, by: f32| {
            if by > 0.0 { (x / by).round_ties_even().clamp(0.0, STEPS) } else { 0.0 }
        };
        let around = |n: f32| [n, n - 1.0, n + 1.0].map(|n| n.clamp(0.0, STEPS));
        let mut best = (f32::INFINITY, (nearest(near.0, d), nearest(near.1, dmin)));
        for scale in around(best.1.0) {
            for min in around(nearest(near.1, dmin)) {
                let line = (scale * d, min * dmin);
                let error = self.error(&self.levels(line.0, line.1), line.0, line.1);
                if error < best.0 {
                    best = (error, (scale, min));
                }
            }
        }
        (best.1.0 as u8, best.1.1 as u8)
    }
}

/// The super-block of [`SUPER_BLOCK`] values.
pub(super) fn encode(values: &[f32]) -> [u8; Q4_K_BYTES] {
    let mut bytes = [0; Q4_K_BYTES];
    let blocks: [Block; BLOCKS] =
        std::array::from_fn(|b| Block::new(&values[b * BLOCK..(b + 1) * BLOCK]));
    let lines = blocks.each_ref().map(Block::search);
    let largest = |part: fn(&(f32, f32)) -> f32| lines.iter().map(part).fold(0f32, f32::max);
    let d = f16::from_f32(largest(|l| l.0) / STEPS);
    let dmin = f16::from_f32(largest(|l| l.1) / STEPS);
    let mut head = Head { d: d.to_bits(), dmin: dmin.to_bits(), blocks: [(0, 0); BLOCKS] };
    for (b, block) in blocks.iter().enumerate() {
        head.blocks[b] = block.rounded(lines[b], d.to_f32(), dmin.to_f32());
        let (scale, min) = head.factors(b);
        let to = &mut bytes[4 + SCALES + b / 2 * BLOCK..][..BLOCK];
        for (to, level) in to.iter_mut().zip(block.levels(scale, min)) {
            *to |= (level as u8) << (b % 2 * 4);
        }
    }
    head.write(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    /// Bell-shaped values, the blocks of different widths, some of them above zero altogether.
    fn values(blocks: usize, seed: u64) -> Vec<f32> {
        let mut word = seed;
        let mut uniform = move || {
            word = word
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (word >> 40) as f32 / (1 << 24) as f32
        };
        let mut all = Vec::new();
        for block in 0..blocks * BLOCKS {
            let (width, shift) = (0.02 + uniform() * 0.1, if block % 5 == 0 { 0.3 } else { 0.0 });
            for _ in 0..BLOCK {
                all.push((0..6).map(|_| uniform() - 0.5).sum::<f32>() * width + shift);
            }
        }
        all
    }

    fn decoded(bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![0.0; bytes.len() / Q4_K_BYTES * SUPER_BLOCK];
        for (out, bytes) in out.chunks_mut(SUPER_BLOCK).zip(bytes.chunks(Q4_K_BYTES)) {
            decode(bytes, out);
        }
        out
    }

    fn by_candle(bytes: &[u8]) -> candle_core::Result<Vec<f32>> {
        let device = Device::Cpu;
        let storage = QStorage::from_data(bytes.into(), &device, GgmlDType::Q4K)?;
        let shape = bytes.len() / Q4_K_BYTES * SUPER_BLOCK;
        QTensor::new(storage, shape)?.dequantize(&device)?.to_vec1()
    }

    fn error(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / a.len() as f32
    }

    #[test]
    fn blocks_mean_what_another_decoder_reads() -> candle_core::Result<()> {
        let values = values(12, 7);
        let ours: Vec<u8> = values.chunks(SUPER_BLOCK).flat_map(encode).collect();
        assert_eq!(by_candle(&ours)?, decoded(&ours));
        let tensor = Tensor::from_vec(values.clone(), (12, SUPER_BLOCK), &Device::Cpu)?;
        let theirs = QTensor::quantize(&tensor, GgmlDType::Q4K)?;
        let theirs = theirs.data()?.into_owned();
        assert_eq!(by_candle(&theirs)?, decoded(&theirs));
        // Every bit of the packed scales and nibbles is looked at.
        let noise: Vec<u8> = (0..4 * Q4_K_BYTES)
            .map(|i| match i % Q4_K_BYTES {
                1 | 3 => 0x2c,
                _ => (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0],
            })
            .collect();
        assert_eq!(by_candle(&noise)?, decoded(&noise));
        let (ours, theirs) = (error(&decoded(&ours), &values), error(&decoded(&theirs), &values));
        println!("mean square error: ours {ours:e}, candle's {theirs:e}");
        assert!(ours < theirs, "{ours:e}, {theirs:e}");
        Ok(())
    }

    #[test]
    fn heads_are_read_as_they_were_written() {
        for seed in 0..64u8 {
            let blocks = std::array::from_fn(|b| {
                ((seed * 7 + 11 * b as u8) & 63, (seed * 5 + 23 * b as u8 + 3) & 63)
            });
            let head = Head { d: 0x1234, dmin: 0x0fed, blocks };
            let mut bytes = [0; Q4_K_BYTES];
            head.write(&mut bytes);
            assert_eq!(Head::read(&bytes), head);
        }
    }

    #[test]
    fn blocks_of_one_value_are_nearly_that_value() {
        for value in [0.0, 0.3, -0.3, 0.06, -7.0] {
            let mut values = [value; SUPER_BLOCK];
            let back = decoded(&encode(&values));
            for (back, value) in back.iter().zip(&values) {
                assert!((back - value).abs() <= value.abs() * 2e-3, "{back} for {value}");
            }
            // One among zeros.
            values[1..].fill(0.0);
            let back = decoded(&encode(&values));
            assert!(
                (back[0] - value).abs() <= value.abs() * 2e-3
                    && back[1..].iter().all(|x| x.abs() <= value.abs() * 2e-3)
            );
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_super_block() {
        let mut values = values(2, 3);
        values[5] = f32::NAN;
        let bytes: Vec<u8> = values.chunks(SUPER_BLOCK).flat_map(encode).collect();
        assert!(error(&decoded(&bytes)[SUPER_BLOCK..], &values[SUPER_BLOCK..]) < 1e-4);
    }
}
