//! Images as Diffusion Policy sees them: both sides resized, smoothed where they shrink, then the middle cut out.
//!
//! Source: torchvision `transforms/v2/functional/_geometry.py` (`resize` with antialiasing, `center_crop`), PyTorch
//! `UpSampleKernel.cpp` (`_upsample_bilinear2d_aa`). Planes are `[channels, height, width]`, sizes (width, height).

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

/// Resizes the channel planes `pixels` of size `from` to size `to`, bilinear with antialiasing. The aspect is not kept.
///
/// Every plane must hold `from.0 · from.1` values, and no side may be zero.
pub fn resize_smooth(pixels: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    if from == to {
        return pixels.to_vec();
    }
    let (columns, rows) = (smooth_taps(from.0, to.0), smooth_taps(from.1, to.1));
    let planes = pixels.len() / (from.0 * from.1);
    let mut out = Vec::with_capacity(planes * to.0 * to.1);
    for plane in pixels.chunks_exact(from.0 * from.1) {
        let mut narrowed = Vec::with_capacity(to.0 * from.1);
        for row in plane.chunks_exact(from.0) {
            narrowed.extend(columns.iter().map(|(first, weights)| {
                weights.iter().zip(&row[*first..]).map(|(w, v)| w * v).sum::<f32>()
            }));
        }
        for (first, weights) in &rows {
            out.extend((0..to.0).map(|x| {
                let column = narrowed[first * to.0 + x..].iter().step_by(to.0);
                weights.iter().zip(column).map(|(w, v)| w * v).sum::<f32>()
            }));
        }
    }
    out
}

/// The middle of the channel planes `pixels`, of size `to`; `None` when that is larger than `from`.
///
/// Half a pixel goes to the even side, as Python rounds.
pub fn center_crop(pixels: &[f32], from: (usize, usize), to: (usize, usize)) -> Option<Vec<f32>> {
    let start = |from: usize, to: usize| {
        from.checked_sub(to).map(|rest| (rest as f64 / 2.0).round_ties_even() as usize)
    };
    let (left, top) = (start(from.0, to.0)?, start(from.1, to.1)?);
    let mut out = Vec::with_capacity(pixels.len() / (from.0 * from.1).max(1) * to.0 * to.1);
    for plane in pixels.chunks_exact((from.0 * from.1).max(1)) {
        for row in plane.chunks_exact(from.0).skip(top).take(to.1) {
            out.extend_from_slice(&row[left..left + to.0]);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_image_stays_even() {
        for to in [(3, 2), (5, 7), (16, 16)] {
            let out = resize_smooth(&[0.5; 2 * 7 * 9], (7, 9), to);
            assert_eq!(out.len(), 2 * to.0 * to.1);
            assert!(out.iter().all(|v| (v - 0.5).abs() < 1e-6), "{to:?}");
        }
    }

    #[test]
    fn the_middle_is_cut_out() {
        let pixels: Vec<f32> = (0..16).map(|i| i as f32).collect();
        assert_eq!(center_crop(&pixels, (4, 4), (2, 2)), Some(vec![5.0, 6.0, 9.0, 10.0]));
        assert_eq!(center_crop(&pixels, (4, 4), (5, 2)), None);
    }
}
