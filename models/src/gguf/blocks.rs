//! The block formats: 32 values with one half-precision scale, as ggml defines them.
//!
//! `Q8_0`: scale `d`, then 32 signed bytes; value = `d·q`. `Q4_0`: scale `d`, then 16 bytes, byte `j`
//! holding value `j` (low nibble) and value `j + 16` (high nibble); value = `d·(q − 8)`.
//! Source: ggml `src/ggml-quants.c`, `quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::checkpoint::StoredType;
use crate::kernels::pool::pool;

/// Values in a block.
pub const BLOCK: usize = 32;
/// Bytes of a `Q8_0` block.
pub const Q8_0_BYTES: usize = 2 + BLOCK;
/// Bytes of a `Q4_0` block.
pub const Q4_0_BYTES: usize = 2 + BLOCK / 2;

/// Values that one thread decodes at a time (a multiple of [`BLOCK`]).
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
            for (o, b) in out.chunks_exact_mut(BLOCK).zip(bytes.chunks_exact(Q8_0_BYTES)) {
                let d = scale(b);
                for (o, q) in o.iter_mut().zip(&b[2..]) {
                    *o = d * f32::from(*q as i8);
                }
            }
        }
        StoredType::Q4_0 => {
            for (o, b) in out.chunks_exact_mut(BLOCK).zip(bytes.chunks_exact(Q4_0_BYTES)) {
                let d = scale(b);
                let (low, high) = o.split_at_mut(BLOCK / 2);
                for ((l, h), q) in low.iter_mut().zip(high).zip(&b[2..]) {
                    *l = d * f32::from((q & 15) as i8 - 8);
                    *h = d * f32::from((q >> 4) as i8 - 8);
                }
            }
        }
    }
}

fn scale(block: &[u8]) -> f32 {
    f16::from_bits(u16::from_le_bytes([block[0], block[1]])).to_f32()
}

/// [`decode`] on all threads of the pool.
pub fn decode_parallel(dtype: StoredType, bytes: &[u8], out: &mut [f32]) {
    let slice_bytes = SLICE / dtype.block_values() * dtype.block_bytes();
    pool().chunks(out, SLICE, |index, out| {
        decode(dtype, bytes.get(index * slice_bytes..).unwrap_or_default(), out);
    });
}

/// `values` stored as `dtype`; for block types their number must be a multiple of [`BLOCK`].
pub fn encode(dtype: StoredType, values: &[f32], out: &mut Vec<u8>) {
    match dtype {
        StoredType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        StoredType::Bf16 => {
            out.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
        }
        StoredType::F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        StoredType::Q8_0 => values.chunks_exact(BLOCK).for_each(|x| encode_q8_0(x, out)),
        StoredType::Q4_0 => values.chunks_exact(BLOCK).for_each(|x| encode_q4_0(x, out)),
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

    fn round_trip(dtype: StoredType) -> f32 {
        let values: Vec<f32> =
            (0..640).map(|i| ((i * 37 % 641) as f32 / 320.0 - 1.0) * 0.3).collect();
        let mut bytes = Vec::new();
        encode(dtype, &values, &mut bytes);
        assert_eq!(Some(bytes.len()), dtype.bytes(&[20, 32]));
        let mut back = vec![0.0; 640];
        decode_parallel(dtype, &bytes, &mut back);
        values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn block_formats_keep_their_precision() {
        assert_eq!(round_trip(StoredType::F32), 0.0);
        assert!(round_trip(StoredType::F16) < 2e-4);
        assert!(round_trip(StoredType::Bf16) < 2e-3);
        assert!(round_trip(StoredType::Q8_0) < 0.3 / 127.0);
        assert!(round_trip(StoredType::Q4_0) < 0.3 / 7.0);
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
