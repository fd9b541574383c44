//! Images as Diffusion Policy sees them: both sides resized, smoothed where they shrink, then the middle cut out.
//!
//! Source: torchvision `transforms/v2/functional/_geometry.py` (`resize` with antialiasing, `center_crop`), PyTorch
//! `UpSampleKernel.cpp` (`_upsample_bilinear2d_aa`). Sizes asked for are (width, height).

use crate::kernels::pool::pool;
use crate::kernels::{Matrix, Planes};

/// Where an output row or column reads: first index, and the weights from there on (a triangle as wide as two
/// output pixels, at least two input pixels).
fn smooth_taps(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let scale = from as f32 / to as f32;
    let support = scale.max(1.0);
    (0..to)
        .map(|i| {
            let center = scale * (i as f32 + 0.5);
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weight = |j: usize| (1.0 - ((j as f32 - center + 0.5) / support).abs()).max(0.0);
            let weights: Vec<f32> = (first..end).map(weight).collect();
            let sum: f32 = weights.iter().sum();
            (first, weights.into_iter().map(|w| w / sum).collect())
        })
        .collect()
}

/// Resizes `image` to size `to`, bilinear with antialiasing. The aspect is not kept, and no side may be zero.
pub fn resize_smooth(image: Planes, to: (usize, usize)) -> Planes {
    let (height, width) = image.size;
    if (width, height) == to {
        return image;
    }
    let (columns, rows) = (smooth_taps(width, to.0), smooth_taps(height, to.1));
    let channels = image.channels();
    let mut narrowed = Matrix::unwritten(channels * height, to.0);
    pool().chunks(narrowed.values_mut(), to.0, |line, out| {
        let row = &image.values.values()[line * width..][..width];
        for (o, (first, weights)) in out.iter_mut().zip(&columns) {
            *o = weights.iter().zip(&row[*first..]).map(|(w, v)| w * v).sum();
        }
    });
    let mut values = Matrix::unwritten(channels, to.0 * to.1);
    pool().chunks(values.values_mut(), to.0, |line, out| {
        let (plane, (first, weights)) = (line / to.1, &rows[line % to.1]);
        out.fill(0.0);
        for (i, weight) in weights.iter().enumerate() {
            let row = narrowed.row(plane * height + first + i);
            out.iter_mut().zip(row).for_each(|(o, v)| *o += weight * v);
        }
    });
    Planes { values, size: (to.1, to.0) }
}

/// The middle of `image`, of size `to`; `None` when that is larger.
///
/// Half a pixel goes to the even side, as Python rounds.
pub fn center_crop(image: &Planes, to: (usize, usize)) -> Option<Planes> {
    let start = |from: usize, to: usize| {
        from.checked_sub(to).map(|rest| (rest as f64 / 2.0).round_ties_even() as usize)
    };
    let (height, width) = image.size;
    let (left, top) = (start(width, to.0)?, start(height, to.1)?);
    let lines = (0..image.channels()).flat_map(|plane| {
        let rows = image.values.row(plane).chunks_exact(width.max(1)).skip(top).take(to.1);
        rows.map(|row| &row[left..left + to.0])
    });
    let mut values = Matrix::unwritten(image.channels(), to.0 * to.1);
    for (out, line) in values.values_mut().chunks_exact_mut(to.0.max(1)).zip(lines) {
        out.copy_from_slice(line);
    }
    Some(Planes { values, size: (to.1, to.0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_image_stays_even() -> candle_core::Result<()> {
        for to in [(3, 2), (5, 7), (16, 16)] {
            let out = resize_smooth(Planes::new(&[0.5; 2 * 7 * 9], (9, 7))?, to);
            assert_eq!((out.channels(), out.size), (2, (to.1, to.0)));
            assert!(out.values.values().iter().all(|v| (v - 0.5).abs() < 1e-6), "{to:?}");
        }
        Ok(())
    }

    #[test]
    fn the_middle_is_cut_out() -> candle_core::Result<()> {
        let pixels: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let image = Planes::new(&pixels, (4, 4))?;
        let middle = center_crop(&image, (2, 2)).map(|middle| middle.values.values().to_vec());
        assert_eq!(middle, Some(vec![5.0, 6.0, 9.0, 10.0]));
        assert!(center_crop(&image, (4, 5)).is_none());
        Ok(())
    }
}
