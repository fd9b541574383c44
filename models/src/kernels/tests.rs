//! Every instruction set of this machine against plain loops, over sizes that no tile divides.

use half::f16;
use proptest::prelude::*;

use super::epilogue::Epilogue;
use super::functions::{Activation, activate};
use super::gemm::{Dense, multiply};
use super::isa::Isa;
use super::packed::{Compute, Form, Packed};
use super::simd::{BLOCK, SPAN, SUPER_BLOCK, round};
use super::strips::Tiles;
use crate::checkpoint::StoredType;
use crate::gguf::blocks::{Q4_K_BYTES, decode_rows, encode_rows};
use crate::gguf::k_blocks::{self, Head};

pub(super) fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
}

/// The packed weights by element, `[output][input]`, whatever their form.
fn unpacked(packed: &Packed) -> Vec<f32> {
    let (outputs, inputs) = (packed.outputs(), packed.inputs());
    let panels = packed.panels();
    let mut scratch = vec![0.0; panels.width * inputs.next_multiple_of(BLOCK)];
    let mut all = vec![0.0; outputs * inputs];
    for panel in 0..panels.count() {
        let columns = panels.columns(panel);
        let values = packed.panel(panel, 0, inputs, &mut scratch);
        for (column, output) in panels.outputs(panel).enumerate() {
            for k in 0..inputs {
                all[output * inputs + k] = values[k * columns + column];
            }
        }
    }
    all
}

/// The product in double precision.
fn plain(x: &[f32], weights: &[f32], inputs: usize, outputs: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    x.chunks(inputs)
        .flat_map(|x| (0..outputs).map(move |o| dot(x, &weights[o * inputs..(o + 1) * inputs])))
        .collect()
}

/// `x` in steps of `scale`.
fn steps(x: &[f32], scale: f32) -> Vec<i32> {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    x.iter().map(|x| (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i32).collect()
}

/// The product of rounded activations with 8-bit columns, span by span: the safe twin of the tiles.
fn rounded(x: &[f32], weights: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let largest = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let weights: Vec<_> = weights
        .chunks(inputs)
        .map(|w| {
            let scale = f16::from_f32(largest(w) / 127.0).to_f32();
            (steps(w, scale), scale)
        })
        .collect();
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        let spans: Vec<_> =
            x.chunks(SPAN).map(|x| (steps(x, largest(x) / 127.0), largest(x) / 127.0)).collect();
        for (weights, scale) in weights.iter().take(outputs) {
            let mut total = 0f32;
            for ((q, x_scale), w) in spans.iter().zip(weights.chunks(SPAN)) {
                let sum: i32 = q.iter().zip(w).map(|(q, w)| q * w).sum();
                total = (sum as f32).mul_add(*x_scale, total);
            }
            out.push(total * scale);
        }
    }
    out
}

/// The product of rounded activations with rows of stored `Q4_K`, block by block: the safe twin of the tiles.
fn rounded_minima(x: &[f32], stored: &[u8], inputs: usize, outputs: usize) -> Vec<f32> {
    let row_bytes = inputs.div_ceil(SUPER_BLOCK) * Q4_K_BYTES;
    let factor = |bits: u16, by: u8| f16::from_bits(bits).to_f32() * f32::from(by);
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        let part = |x: &[f32]| std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0));
        let x: Vec<_> = x.chunks(BLOCK).map(|x| round(&part(x))).collect();
        for row in stored.chunks(row_bytes).take(outputs) {
            let mut total = 0f32;
            for (index, (q, x_scale, x_sum)) in x.iter().enumerate() {
                let (of, block) = (index * BLOCK / SUPER_BLOCK, index % (SUPER_BLOCK / BLOCK));
                let bytes = &row[of * Q4_K_BYTES..(of + 1) * Q4_K_BYTES];
                let (head, levels) = (Head::read(bytes), k_blocks::nibbles(bytes, block));
                let (scale, min) = head.blocks[block];
                let (scale, min) = (factor(head.d, scale), factor(head.dmin, min));
                let dot: i32 =
                    q.iter().zip(levels).map(|(q, w)| i32::from(*q) * i32::from(w)).sum();
                total = (-x_sum as f32 * x_scale).mul_add(min, total);
                total = (dot as f32).mul_add(scale * x_scale, total);
            }
            out.push(total);
        }
    }
    out
}

/// Runs `check` for every instruction set of this machine. One at a time: the choice is the process's.
pub(super) fn each_isa(mut check: impl FnMut(Isa)) {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for isa in Isa::ALL {
        if isa.choose() {
            check(isa);
        } else {
            println!("{} is not on this machine", isa.name());
        }
    }
    Isa::best().choose();
}

fn product(x: &[f32], packed: &Packed, epilogue: &Epilogue<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / packed.inputs() * packed.outputs()];
    multiply(&Dense { values: x, width: packed.inputs() }, packed, epilogue, &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_equal_the_plain_loops(
        rows in 1usize..70,
        inputs in 1usize..150,
        outputs in 1usize..120,
        seed in 0usize..1000,
    ) {
        let (x, w) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1));
        each_isa(|isa| {
            let packed = Packed::from_values(&w, inputs, Compute::Exact);
            assert_eq!(unpacked(&packed), w, "{}", isa.name());
            let found = product(&x, &packed, &Epilogue::default());
            for (found, expected) in found.iter().zip(plain(&x, &w, inputs, outputs)) {
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 1e-6 * inputs as f64, "{}: {error:e}", isa.name());
            }
        });
    }

    #[test]
    fn rounded_products_equal_their_twin_to_the_bit(
        rows in 1usize..40,
        inputs in 1usize..150,
        outputs in 1usize..90,
        seed in 0usize..1000,
    ) {
        let (x, w) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1));
        let expected = rounded(&x, &w, inputs, outputs);
        each_isa(|isa| {
            let packed = Packed::from_values(&w, inputs, Compute::Int8);
            let found = product(&x, &packed, &Epilogue::default());
            assert_eq!(found, expected, "{}", isa.name());
        });
    }

    #[test]
    fn four_bits_with_minima_are_widened_and_multiplied_as_by_their_twins(
        rows in 1usize..20,
        inputs in 1usize..700,
        outputs in 1usize..90,
        seed in 0usize..1000,
    ) {
        let (x, mut w) = (numbers(rows * inputs, seed), numbers(outputs * inputs, seed + 1));
        // Some rows with their values on one side of zero.
        w.iter_mut().skip(seed).step_by(3).for_each(|w| *w = w.abs() + 0.2);
        let mut stored = Vec::new();
        encode_rows(StoredType::Q4K, inputs, &w, &mut stored);
        let mut meant = vec![0.0; w.len()];
        decode_rows(StoredType::Q4K, inputs, &stored, &mut meant);
        let expected = rounded_minima(&x, &stored, inputs, outputs);
        let widened = plain(&x, &meant, inputs, outputs);
        each_isa(|isa| {
            let packed = Packed::in_blocks(&w, inputs, StoredType::Q4K, Compute::Exact);
            assert_eq!(unpacked(&packed), meant, "{}", isa.name());
            let found = product(&x, &packed, &Epilogue::default());
            for (found, expected) in found.iter().zip(&widened) {
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 2e-6 * inputs as f64, "{}: {error:e}", isa.name());
            }
            let packed = Packed::in_blocks(&w, inputs, StoredType::Q4K, Compute::Int8);
            let found = product(&x, &packed, &Epilogue::default());
            assert_eq!(found, expected, "{}", isa.name());
        });
    }
}

#[test]
fn deep_products_are_summed_in_parts() {
    // Deeper than one pass through a panel, and more rows than one block.
    let (rows, inputs, outputs) = (61, 16_500, 33);
    let (x, w) = (numbers(rows * inputs, 3), numbers(outputs * inputs, 4));
    let expected = plain(&x, &w, inputs, outputs);
    each_isa(|isa| {
        let packed = Packed::from_values(&w, inputs, Compute::Exact);
        let found = product(&x, &packed, &Epilogue::default());
        for (found, expected) in found.iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 3e-6 * inputs as f64, "{}: {error:e}", isa.name());
        }
    });
    let mut stored = Vec::new();
    encode_rows(StoredType::Q4K, inputs, &w, &mut stored);
    let mut meant = vec![0.0; w.len()];
    decode_rows(StoredType::Q4K, inputs, &stored, &mut meant);
    let expected = plain(&x, &meant, inputs, outputs);
    each_isa(|isa| {
        let packed = Packed::in_blocks(&w, inputs, StoredType::Q4K, Compute::Exact);
        let found = product(&x, &packed, &Epilogue::default());
        for (found, expected) in found.iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 3e-6 * inputs as f64, "{}: {error:e}", isa.name());
        }
    });
}

#[test]
fn eight_bits_are_widened_to_what_they_mean() {
    let (inputs, outputs) = (77, 59);
    let w = numbers(outputs * inputs, 9);
    let columns = |w: &_| Packed::from_values(w, inputs, Compute::Int8);
    let blocks = |w: &_| Packed::in_blocks(w, inputs, StoredType::Q8_0, Compute::Exact);
    each_isa(|isa| {
        for (packed, span) in [(columns(&w[..]), inputs), (blocks(&w[..]), BLOCK)] {
            assert!(matches!(packed.form, Form::Blocks { .. }));
            for (row, expected) in unpacked(&packed).chunks(inputs).zip(w.chunks(inputs)) {
                for (row, expected) in row.chunks(span).zip(expected.chunks(span)) {
                    let step = expected.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                    for (found, expected) in row.iter().zip(expected) {
                        let error = (found - expected).abs();
                        // Half a step, and what 127 steps lose as their length is rounded to half precision.
                        assert!(error <= step * 0.57, "{}: {error} of {step}", isa.name());
                    }
                }
            }
        }
    });
}

#[test]
fn what_follows_a_product_is_done_to_each_value() {
    let (rows, inputs, outputs) = (13, 40, 53);
    let (x, w) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
    let (bias, gate) = (numbers(outputs, 3), numbers(rows * outputs, 4));
    let residual = numbers(rows * outputs, 5);
    each_isa(|isa| {
        let packed = Packed::from_values(&w, inputs, Compute::Exact);
        let bare = product(&x, &packed, &Epilogue::default());
        for activation in [Activation::None, Activation::Gelu, Activation::Silu, Activation::Relu] {
            let epilogue = Epilogue {
                bias: Some(&bias),
                activation,
                gate: Some(&gate),
                residual: Some(&residual),
                last: Activation::Relu,
            };
            let found = product(&x, &packed, &epilogue);
            for (i, found) in found.iter().enumerate() {
                let mut value = [bare[i] + bias[i % outputs]];
                activate(activation, &mut value);
                let expected = (value[0] * gate[i] + residual[i]).max(0.0);
                assert!((found - expected).abs() < 1e-6, "{} {activation:?}", isa.name());
            }
        }
    });
}

#[test]
fn what_is_no_number_stays_none() {
    let (inputs, outputs) = (64, 40);
    let w = numbers(outputs * inputs, 2);
    let mut x = numbers(3 * inputs, 1);
    x[inputs + 5] = f32::NAN;
    each_isa(|isa| {
        for compute in [Compute::Exact, Compute::Int8] {
            let out = product(&x, &Packed::from_values(&w, inputs, compute), &Epilogue::default());
            let bad = |row: usize| out[row * outputs..(row + 1) * outputs].iter();
            assert!(bad(1).all(|v| v.is_nan()), "{} {compute:?}", isa.name());
            assert!(bad(0).chain(bad(2)).all(|v| v.is_finite()), "{} {compute:?}", isa.name());
        }
    });
}

#[test]
fn tiles_cover_all_rows_and_differ_by_one_at_most() {
    for rows in 1..200 {
        for most in 1..9 {
            let tiles = Tiles::new(rows, most);
            let heights: Vec<usize> = (0..tiles.count).map(|i| tiles.height(i)).collect();
            assert_eq!(heights.iter().sum::<usize>(), rows);
            let (low, high) = (heights.iter().min(), heights.iter().max());
            assert!(high.zip(low).is_some_and(|(h, l)| h - l <= 1 && *h <= most));
            assert_eq!(tiles.most(), high.copied().unwrap_or(0));
        }
    }
}
