//! Attention against whole matrices, over shapes that no tile divides.

use candle_core::{D, Device};

use super::*;

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

#[test]
fn every_shape_equals_the_plain_form() -> Result<()> {
    for (heads, key_heads, rows, columns, size) in [
        (1, 1, 1, 1, 8),
        (2, 1, 5, 9, 12),
        (6, 2, 50, 227, 64),
        (3, 3, 49, 49, 20),
        (4, 1, 33, 100, 7),
        (12, 12, 70, 70, 16),
    ] {
        let q = numbers((heads, rows, size), 1);
        let (k, v) =
            (numbers((key_heads, columns, size), 2), numbers((key_heads, columns, size), 3));
        let mut kinds = vec![Visible::All];
        if columns >= rows {
            kinds.push(Visible::Causal { prefix: columns - rows });
        }
        if columns > 1 {
            kinds.push(Visible::LastOnlyByItself);
        }
        for visible in kinds {
            let expected = by_matrices(&q, &k, &v, visible)?;
            let found = attend(&q, &k, &v, visible)?;
            let worst = (&found - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 1e-5, "{heads} {rows} {columns} {size} {visible:?}: {worst}");
            let flat = |t: &Tensor| {
                let (h, l, s) = t.dims3()?;
                t.transpose(0, 1)?.contiguous()?.reshape((l, h * s))
            };
            let kv = Matrix::of_tensor(&Tensor::cat(&[flat(&k)?, flat(&v)?], 1)?)?;
            let (q, width) = (Matrix::of_tensor(&flat(&q)?)?, key_heads * size);
            let (k, v) = (kv.columns(0..width), kv.columns(width..2 * width));
            let again = attend_rows(&q.columns(0..q.width()), &k, &v, (heads, key_heads), visible)?;
            assert_eq!(found.flatten_all()?.to_vec1::<f32>()?, again.values());
        }
    }
    Ok(())
}

#[test]
fn what_is_no_number_stays_none_and_shapes_are_checked() -> Result<()> {
    let (q, k) = (numbers((1, 3, 8), 1), numbers((1, 4, 8), 2));
    let bad = (&q * f64::NAN)?;
    let out = attend(&bad, &k, &k, Visible::All)?;
    assert!(out.to_vec2::<f32>()?.iter().flatten().all(|v| v.is_nan()));
    assert!(attend(&q, &k, &numbers((1, 5, 8), 3), Visible::All).is_err());
    assert!(attend(&numbers((3, 3, 8), 1), &numbers((2, 4, 8), 2), &k, Visible::All).is_err());
    Ok(())
}
