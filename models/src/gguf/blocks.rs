//! The formats of values in files; of the blocks those with one half-precision scale for 32 values, as ggml defines them.
//!
//! `Q8_0`: scale `d`, then 32 signed bytes; value = `d·q`. `Q4_0`: scale `d`, then 16 bytes, byte `j`
//! holding value `j` (low nibble) and value `j + 16` (high nibble); value = `d·(q − 8)`.
//! Source: ggml `src/ggml-quants.c`, `quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::k_blocks;
use crate::checkpoint::StoredType;
use crate::kernels::pool::pool;

pub use super::k_blocks::{Q4_K_BYTES, SUPER_BLOCK};

/// Values in a block.
pub const BLOCK: usize = 32;
/// Bytes of a `Q8_0` block.
pub const Q8_0_BYTES: usize = 2 + BLOCK;
/// Bytes of a `Q4_0` block.
pub const Q4_0_BYTES: usize = 2 + BLOCK / 2;

/// Values that one thread takes at a time, about.
const SLICE: usize = 1 << 16;

/// Widens `bytes` into `out`; both must describe the same number of values.
pub fn decode(dtype: StoredType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        StoredType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        StoredType::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        StoredType::F16 => {
            // By slices: `half` then uses the processor's own conversion.
            let mut halves = [f16::ZERO; 256];
            for (o, b) in out.chunks_mut(256).zip(bytes.chunks(512)) {
                let halves = &mut halves[..o.len()];
                for (h, b) in halves.iter_mut().zip(b.chunks_exact(2)) {
                    *h = f16::from_bits(u16::from_le_bytes([b[0], b[1]]));
                }
                halves.convert_to_f32_slice(o);
            }
        }
        StoredType::Q8_0 => {
            for (o, b) in out.chunks_mut(BLOCK).zip(bytes.chunks_exact(Q8_0_BYTES)) {
                let d = scale(b);
                for (o, q) in o.iter_mut().zip(&b[2..]) {
                    *o = d * f32::from(*q as i8);
                }
            }
        }
        StoredType::Q4_0 => {
            for (o, b) in out.chunks_mut(BLOCK).zip(bytes.chunks_exact(Q4_0_BYTES)) {
                let d = scale(b);
                let (low, high) = o.split_at_mut(o.len().min(BLOCK / 2));
                let value = |q: u8| d * f32::from(q as i8 - 8);
                low.iter_mut().zip(&b[2..]).for_each(|(o, q)| *o = value(q & 15));
                high.iter_mut().zip(&b[2..]).for_each(|(o, q)| *o = value(q >> 4));
            }
        }
        StoredType::Q4K => {
            for (o, b) in out.chunks_mut(SUPER_BLOCK).zip(bytes.chunks_exact(Q4_K_BYTES)) {
                k_blocks::decode(b, o);
            }
        }
    }
}

fn scale(block: &[u8]) -> f32 {
    f16::from_bits(u16::from_le_bytes([block[0], block[1]])).to_f32()
}

/// Rows of `width` values that a thread takes at a time.
fn rows_at_once(width: usize) -> usize {
    (SLICE / width.max(1)).max(1)
}

/// [`decode`] of rows of `width` values, each of whole blocks, on all threads of the pool.
pub fn decode_rows(dtype: StoredType, width: usize, bytes: &[u8], out: &mut [f32]) {
    // A file has no row whose bytes cannot be counted.
    let (rows, Some(row_bytes)) = (rows_at_once(width), dtype.row_bytes(width)) else { return };
    pool().chunks(out, (rows * width).max(1), |index, out| {
        let bytes = bytes.get(index * rows * row_bytes..).unwrap_or_default();
        if width.is_multiple_of(dtype.block_values()) {
            decode(dtype, bytes, out);
            return;
        }
        for (row, bytes) in out.chunks_mut(width).zip(bytes.chunks_exact(row_bytes)) {
            decode(dtype, bytes, row);
        }
    });
}

/// Rows of `width` values stored as `dtype`, on all threads of the pool; what lacks to a row's last block is zero.
pub fn encode_rows(dtype: StoredType, width: usize, values: &[f32], out: &mut Vec<u8>) {
    let (rows, row_bytes) = (rows_at_once(width), dtype.row_bytes(width).unwrap_or(0));
    if width == 0 || row_bytes == 0 {
        return;
    }
    let start = out.len();
    out.resize(start + values.len() / width * row_bytes, 0);
    pool().chunks(&mut out[start..], rows * row_bytes, |index, out| {
        let values = &values[index * rows * width..];
        let (mut row, mut bytes) = (Vec::new(), Vec::with_capacity(row_bytes));
        for (out, values) in out.chunks_exact_mut(row_bytes).zip(values.chunks_exact(width)) {
            row.clear();
            row.extend_from_slice(values);
            row.resize(width.next_multiple_of(dtype.block_values()), 0.0);
            bytes.clear();
            encode(dtype, &row, &mut bytes);
            out.copy_from_slice(&bytes);
        }
    });
}

/// `values` stored as `dtype`; for block types their number must be a multiple of the block's.
pub fn encode(dtype: StoredType, values: &[f32], out: &mut Vec<u8>) {
    match dtype {
        StoredType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        StoredType::Bf16 => {
            out.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
        }
        StoredType::F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        StoredType::Q8_0 => values.chunks_exact(BLOCK).for_each(|x| encode_q8_0(x, out)),
        StoredType::Q4_0 => values.chunks_exact(BLOCK).for_each(|x| encode_q4_0(x, out)),
        StoredType::Q4K => {
            values.chunks_exact(SUPER_BLOCK).for_each(|x| out.extend(k_blocks::encode(x)));
        }
    }
}

fn encode_q8_0(x: &[f32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    out.extend(f16::from_f32(d).to_le_bytes());
    // `as` saturates, so a value rounded just past 127 stays in range.
    out.extend(x.iter().map(|v| (v * inverse).round() as i8 as u8));
}

fn encode_q4_0(x: &[f32], out: &mut Vec<u8>) {
    // The value of largest magnitude becomes exactly −8: the format has one more step below zero.
    let extreme = x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = extreme / -8.0;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    out.extend(f16::from_f32(d).to_le_bytes());
    let nibble = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    let (low, high) = x.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| nibble(*l) | (nibble(*h) << 4)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error of a round trip of 20 rows of `width` values.
    fn round_trip(dtype: StoredType, width: usize) -> f32 {
        let count = 20 * width;
        let values: Vec<f32> =
            (0..count).map(|i| ((i * 37 % 641) as f32 / 320.0 - 1.0) * 0.3).collect();
        let mut bytes = Vec::new();
        encode_rows(dtype, width, &values, &mut bytes);
        assert_eq!(Some(bytes.len()), dtype.bytes(&[20, width]));
        let mut back = vec![f32::NAN; count];
        decode_rows(dtype, width, &bytes, &mut back);
        values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn formats_keep_their_precision_in_rows_of_any_width() {
        for width in [1, 15, 17, 31, 32, 48, 255, 256, 257, 720] {
            assert_eq!(round_trip(StoredType::F32, width), 0.0);
            assert!(round_trip(StoredType::F16, width) < 2e-4);
            assert!(round_trip(StoredType::Bf16, width) < 2e-3);
            assert!(round_trip(StoredType::Q8_0, width) < 0.3 / 127.0);
            assert!(round_trip(StoredType::Q4_0, width) < 0.3 / 7.0);
            assert!(round_trip(StoredType::Q4K, width) < 0.6 / 15.0, "{width}");
        }
    }

    #[test]
    fn formats_are_those_of_ggml() {
        use candle_core::quantized::{GgmlDType, QTensor};
        let values: Vec<f32> = (0..96).map(|i| ((i * 29 % 97) as f32 / 48.0 - 1.0) * 0.7).collect();
        let tensor =
            candle_core::Tensor::from_vec(values.clone(), (3, 32), &candle_core::Device::Cpu);
        for (ours, theirs) in
            [(StoredType::Q8_0, GgmlDType::Q8_0), (StoredType::Q4_0, GgmlDType::Q4_0)]
        {
            let mut bytes = Vec::new();
            encode(ours, &values, &mut bytes);
            let tensor = tensor.as_ref().expect("the shape fits the values");
            let q = QTensor::quantize(tensor, theirs).expect("32 values make one block");
            assert_eq!(bytes, q.data().expect("on the CPU").as_ref(), "{ours:?}");
        }
    }
}
