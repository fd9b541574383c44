//! Attention against whole matrices, over shapes that no tile divides.

use std::ops::Range;

use candle_core::{D, Device, Tensor};

use super::*;
use crate::kernels::tests::each_isa;

#[test]
fn rows_see_what_they_may() {
    assert_eq!(Visible::LastOnlyByItself.columns(0, 3, 3), 2);
    assert_eq!(Visible::LastOnlyByItself.columns(2, 3, 3), 3);
    assert_eq!(Visible::Causal { prefix: 4 }.columns(1, 3, 7), 6);
}

fn numbers(shape: (usize, usize, usize), seed: usize) -> Tensor {
    let count = shape.0 * shape.1 * shape.2;
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 250.0 - 2.0;
    Tensor::from_iter((0..count).map(value), &Device::Cpu)
        .and_then(|t| t.reshape(shape))
        .expect("the shape holds the values")
}

/// The same by whole matrices, in candle's products.
fn by_matrices(q: &Tensor, k: &Tensor, v: &Tensor, visible: Visible) -> Result<Tensor> {
    let ((heads, rows, size), (key_heads, columns, _)) = (q.dims3()?, k.dims3()?);
    let spread = |t: &Tensor| {
        let parts = (0..heads).map(|h| t.narrow(0, h / (heads / key_heads), 1));
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    };
    let scores = (q.matmul(&spread(k)?.t()?)? * (size as f64).powf(-0.5))?;
    let hidden = (0..rows).flat_map(|r| {
        let seen = visible.columns(r, rows, columns);
        (0..columns).map(move |c| if c < seen { 0f32 } else { -1e30 })
    });
    let hidden = Tensor::from_iter(hidden, &Device::Cpu)?.reshape((rows, columns))?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&hidden)?, D::Minus1)?;
    weights.matmul(&spread(v)?)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))
}

const SHAPES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 1, 1, 1, 8),
    (2, 1, 5, 9, 12),
    (6, 2, 50, 227, 64),
    (3, 3, 49, 49, 20),
    (4, 1, 33, 100, 7),
    (12, 12, 70, 70, 16),
    (2, 1, 3, 300, 256),
];

fn kinds(rows: usize, columns: usize) -> Vec<Visible> {
    let mut kinds = vec![Visible::All];
    if columns >= rows {
        kinds.push(Visible::Causal { prefix: columns - rows });
    }
    if columns > 1 {
        kinds.push(Visible::LastOnlyByItself);
    }
    kinds
}

/// `[heads, L, size]` with heads side by side, `[L, heads·size]`.
fn side_by_side(x: &Tensor) -> Result<Matrix> {
    let (heads, rows, size) = x.dims3()?;
    Matrix::of_tensor(&x.transpose(0, 1)?.contiguous()?.reshape((rows, heads * size))?)
}

/// Keys and values in matrices of their own, and side by side in two pieces; equal to the bit.
fn both_ways(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    visible: Visible,
    compute: Compute,
) -> Result<Matrix> {
    let heads = (q.dim(0)?, k.dim(0)?);
    let (q, k, v) = (side_by_side(q)?, side_by_side(k)?, side_by_side(v)?);
    let found = attend(&q.all(), &[k.all()], &[v.all()], heads, visible, compute)?;
    let (kv, cut) = (Matrix::beside(&[&k, &v])?, k.rows() / 3);
    let side = |columns: Range<usize>| {
        let side = kv.columns(columns);
        [side.clone().rows_of(0..cut), side.rows_of(cut..k.rows())]
    };
    let (keys, values) = (side(0..k.width()), side(k.width()..kv.width()));
    let again = attend(&q.all(), &keys, &values, heads, visible, compute)?;
    assert_eq!(found.values(), again.values());
    Ok(found)
}

#[test]
fn every_shape_equals_the_plain_form() -> Result<()> {
    for (heads, key_heads, rows, columns, size) in SHAPES {
        let q = numbers((heads, rows, size), 1);
        let (k, v) =
            (numbers((key_heads, columns, size), 2), numbers((key_heads, columns, size), 3));
        for visible in kinds(rows, columns) {
            let expected = by_matrices(&q, &k, &v, visible)?;
            // In turn with the tests that choose a set: both ways must be of one.
            each_isa(|isa| {
                let found = both_ways(&q, &k, &v, visible, Compute::Exact);
                let worst =
                    found.and_then(|f| (f.to_tensor()? - &expected)?.abs()?.max_all()?.to_scalar());
                let worst: f32 = worst.expect("the shapes fit");
                let name = isa.name();
                assert!(
                    worst < 1e-5,
                    "{name} {heads} {rows} {columns} {size} {visible:?}: {worst}"
                );
            });
        }
    }
    Ok(())
}

/// Rounded as [`rounded`] says, step by step in plain loops of 64-bit floats: what lies between it and the kernels is
/// the rounding of a weight that is nearly halfway, no more.
fn rounded_twin(
    isa: Isa,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    visible: Visible,
) -> Result<Vec<f64>> {
    let ((heads, rows, size), (key_heads, columns, _)) = (q.dims3()?, k.dims3()?);
    let (q, k, v) = (q.to_vec3::<f32>()?, k.to_vec3::<f32>()?, v.to_vec3::<f32>()?);
    let most = if isa == Isa::NeonDot { 127.0 } else { 255.0 };
    let round = |x: &[f32]| -> Vec<f64> {
        // In 32 bits: many a number here lies halfway between two steps.
        let scale = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        x.iter().map(|x| f64::from((x * inverse).round_ties_even() * scale)).collect()
    };
    let mut out = vec![0.0; rows * heads * size];
    for head in 0..heads {
        let (q, from) = (&q[head], head / (heads / key_heads));
        let mean: Vec<f32> =
            (0..size).map(|d| k[from].iter().map(|k| k[d]).sum::<f32>() / columns as f32).collect();
        let keys: Vec<Vec<f64>> = k[from]
            .iter()
            .map(|k| round(&k.iter().zip(&mean).map(|(k, m)| k - m).collect::<Vec<_>>()))
            .collect();
        for row in 0..rows {
            let query = round(&q[row]);
            let seen = visible.columns(row, rows, columns);
            let (mut sum, mut sums) = (0.0, vec![0.0; size]);
            let scores: Vec<f64> = keys[..seen]
                .iter()
                .map(|k| {
                    k.iter().zip(&query).map(|(k, q)| k * q).sum::<f64>() * (size as f64).powf(-0.5)
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            for (part, scores) in scores.chunks(KEYS).enumerate() {
                let here = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights =
                    scores.iter().map(|s| ((s - here).exp() * most).round()).collect::<Vec<_>>();
                let by = (here - largest).exp();
                sum += by * weights.iter().sum::<f64>();
                let all = &v[from][part * KEYS..((part + 1) * KEYS).min(columns)];
                for (d, to) in sums.iter_mut().enumerate() {
                    let column = round(&all.iter().map(|v| v[d]).collect::<Vec<_>>());
                    *to += by * column.iter().zip(&weights).map(|(v, w)| v * w).sum::<f64>();
                }
            }
            for (d, value) in sums.iter().enumerate() {
                out[row * heads * size + head * size + d] = value / sum;
            }
        }
    }
    Ok(out)
}

#[test]
fn in_8_bits_every_set_rounds_alike_and_stays_near_the_plain_form() -> Result<()> {
    for (heads, key_heads, rows, columns, size) in SHAPES {
        // Values of a network: scores of some units, and keys that all lie to one side.
        let q = (numbers((heads, rows, size), 1) * (4.0 / size as f64).powf(0.25))?;
        let k = (numbers((key_heads, columns, size), 2) * (4.0 / size as f64).powf(0.25))?;
        let (k, v) = ((k + 5.0)?, numbers((key_heads, columns, size), 3));
        for visible in kinds(rows, columns) {
            let expected = by_matrices(&q, &k, &v, visible)?.flatten_all()?.to_vec1::<f32>()?;
            let shape = format!("{heads} {rows} {columns} {size} {visible:?}");
            let mut same: Option<Vec<f32>> = None;
            each_isa(|isa| {
                let found = both_ways(&q, &k, &v, visible, Compute::Int8);
                let found = found.map(|f| f.values().to_vec());
                let twin = rounded_twin(isa, &q, &k, &v, visible);
                let (Ok(found), Ok(twin)) = (found, twin) else { panic!("{shape}: shapes") };
                for ((found, twin), expected) in found.iter().zip(&twin).zip(&expected) {
                    let name = isa.name();
                    assert!(
                        (f64::from(*found) - twin).abs() < 0.01,
                        "{name} {shape}: {found} {twin}"
                    );
                    assert!((found - expected).abs() < 0.06, "{name} {shape}: {found} {expected}");
                }
                if isa.name().starts_with("avx") {
                    // To the bit, so that a recorded run can be replayed on another processor.
                    assert_eq!(same.get_or_insert_with(|| found.clone()), &found, "{}", isa.name());
                }
            });
        }
    }
    Ok(())
}

#[test]
fn far_away_keys_keep_their_precision() -> Result<()> {
    // One key outweighs all others 500 times, so that these together weigh as much as it: each alone would round to nothing
    // beside it.
    let (columns, size) = (480, 32);
    let q = Tensor::ones((1, 1, size), candle_core::DType::F32, &Device::Cpu)?;
    let sharp = 500f64.ln() / (size as f64).sqrt();
    let k: Vec<f32> =
        (0..columns * size).map(|i| if i < size { sharp as f32 } else { 0.0 }).collect();
    let k = Tensor::from_vec(k, (1, columns, size), &Device::Cpu)?;
    let v = numbers((1, columns, size), 5);
    let expected = by_matrices(&q, &k, &v, Visible::All)?;
    let found = both_ways(&q, &k, &v, Visible::All, Compute::Int8)?.to_tensor()?;
    // The 95 keys that lie with it are lost, the others are not.
    let worst = (&found - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(worst < 0.2, "{worst}");
    Ok(())
}

#[test]
fn what_is_no_number_stays_none_and_shapes_are_checked() -> Result<()> {
    let (q, k) = (numbers((1, 3, 8), 1), numbers((1, 4, 8), 2));
    for compute in [Compute::Exact, Compute::Int8] {
        let attend = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Matrix> {
            let heads = (q.dim(0)?, k.dim(0)?);
            let (q, k, v) = (side_by_side(q)?, side_by_side(k)?, side_by_side(v)?);
            attend(&q.all(), &[k.all()], &[v.all()], heads, Visible::All, compute)
        };
        for bad in [f64::NAN, f64::INFINITY] {
            let wrong = (&q * bad)?;
            let out = attend(&wrong, &k, &k)?;
            assert!(out.values().iter().all(|v| v.is_nan()), "{compute:?} {bad}");
            let wrong = (&k * bad)?;
            for out in [attend(&q, &wrong, &k)?, attend(&q, &k, &wrong)?] {
                assert!(out.values().iter().all(|v| !v.is_finite()));
            }
        }
        assert!(attend(&q, &k, &numbers((1, 5, 8), 3)).is_err());
        let (q, other) = (numbers((3, 3, 8), 1), numbers((2, 4, 8), 2));
        assert!(attend(&q, &other, &k).is_err());
    }
    let x = Matrix::zeros(2, 8);
    let three = [x.all(), x.all(), x.all()];
    assert!(attend(&x.all(), &three, &three, (1, 1), Visible::All, Compute::Exact).is_err());
    Ok(())
}
