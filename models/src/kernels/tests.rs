//! Every instruction set of this machine against plain loops, over sizes that no tile divides.

use half::f16;
use proptest::prelude::*;

use super::epilogue::Epilogue;
use super::functions::{Activation, activate};
use super::gemm::{Dense, multiply};
use super::isa::Isa;
use super::packed::{Compute, Form, Packed};
use super::simd::{BLOCK, round};
use super::strips::Tiles;

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

/// The product of rounded activations with 8-bit blocks, block by block: the safe twin of the tiles.
fn rounded(x: &[f32], weights: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let blocks = |row: &[f32]| -> Vec<[f32; BLOCK]> {
        let filled = |part: &[f32]| std::array::from_fn(|i| part.get(i).copied().unwrap_or(0.0));
        row.chunks(BLOCK).map(filled).collect()
    };
    let weight_block = |x: &[f32; BLOCK]| {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = f16::from_f32(largest / 127.0).to_f32();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        (x.map(|v| ((v * inverse).round() as i32).clamp(-127, 127)), scale)
    };
    let weights: Vec<Vec<_>> =
        weights.chunks(inputs).map(|w| blocks(w).iter().map(weight_block).collect()).collect();
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        let x: Vec<_> = blocks(x).iter().map(round).collect();
        for weights in weights.iter().take(outputs) {
            let mut total = 0f32;
            for ((q, x_scale, _), (w, w_scale)) in x.iter().zip(weights) {
                let sum: i32 = q.iter().zip(w).map(|(q, w)| i32::from(*q) * w).sum();
                total = (sum as f32).mul_add(w_scale * x_scale, total);
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
}

#[test]
fn blocks_are_widened_to_what_they_mean() {
    let (inputs, outputs) = (77, 59);
    let w = numbers(outputs * inputs, 9);
    each_isa(|isa| {
        let packed = Packed::from_values(&w, inputs, Compute::Int8);
        assert!(matches!(packed.form, Form::Blocks { .. }));
        for (row, expected) in unpacked(&packed).chunks(inputs).zip(w.chunks(inputs)) {
            for (row, expected) in row.chunks(BLOCK).zip(expected.chunks(BLOCK)) {
                let step = expected.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
                for (found, expected) in row.iter().zip(expected) {
                    let error = (found - expected).abs();
                    assert!(error <= step * 0.51, "{}: {error} of {step}", isa.name());
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
