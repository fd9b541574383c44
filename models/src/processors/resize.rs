//! Images resized keeping their aspect, and padded.
//!
//! Source: LeRobot `src/lerobot/policies/smolvla/modeling_smolvla.py`, `resize_with_pad`, and
//! `pi0/modeling_pi0.py`, `resize_with_pad_torch`. Bilinear with
//! half-pixel centres and without antialiasing, even when shrinking: the model was trained on that.

/// Where an output row or column reads: first index, second index, weight of the second.
fn taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let source = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = (source as usize).min(from - 1);
            (first, (first + 1).min(from - 1), source - first as f32)
        })
        .collect()
}

/// Size that `from` (width, height) is resized to inside `to`, before padding.
fn inner_size(from: (usize, usize), to: (usize, usize)) -> (usize, usize) {
    let ratio = (from.0 as f64 / to.0 as f64).max(from.1 as f64 / to.1 as f64);
    let size = |n: usize, limit: usize| ((n as f64 / ratio) as usize).clamp(1, limit);
    (size(from.0, to.0), size(from.1, to.1))
}

/// Where the padding goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// To the left and the top (SmolVLA, X-VLA).
    LeftTop,
    /// To all sides, the odd pixel to the right and the bottom; values are cut to [0, 1] (π).
    Centered,
}

/// [`resize_padded`] to the left and the top.
pub fn resize_with_pad(pixels: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    resize_padded(pixels, from, to, Padding::LeftTop)
}

/// Resizes the channel planes `pixels` (`[channels, height, width]`) of size `from` into `to`
/// (both width, height), with zeros around as `padding` says.
///
/// Every plane must hold `from.0 · from.1` values, and no side may be zero.
pub fn resize_padded(
    pixels: &[f32],
    from: (usize, usize),
    to: (usize, usize),
    padding: Padding,
) -> Vec<f32> {
    if from == to {
        return pixels.to_vec();
    }
    let (width, height) = inner_size(from, to);
    let (left, top) = match padding {
        Padding::LeftTop => (to.0 - width, to.1 - height),
        Padding::Centered => ((to.0 - width) / 2, (to.1 - height) / 2),
    };
    let inner = stretch(pixels, from, (width, height));
    let mut out = vec![0.0; inner.len() / (width * height) * to.0 * to.1];
    for (plane, out) in inner.chunks_exact(width * height).zip(out.chunks_exact_mut(to.0 * to.1)) {
        for (y, row) in plane.chunks_exact(width).enumerate() {
            out[(top + y) * to.0 + left..][..width].copy_from_slice(row);
        }
    }
    if padding == Padding::Centered {
        out.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
    }
    out
}

/// Resizes the channel planes `pixels` (`[channels, height, width]`) of size `from` to `to` (both width,
/// height), whatever becomes of the aspect.
///
/// Every plane must hold `from.0 · from.1` values, and no side may be zero.
pub fn stretch(pixels: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    if from == to {
        return pixels.to_vec();
    }
    let (columns, rows) = (taps(from.0, to.0), taps(from.1, to.1));
    let planes = pixels.len() / (from.0 * from.1);
    let mut out = vec![0.0; planes * to.0 * to.1];
    for (plane, out) in pixels.chunks_exact(from.0 * from.1).zip(out.chunks_exact_mut(to.0 * to.1))
    {
        for (out, &(y0, y1, wy)) in out.chunks_exact_mut(to.0).zip(&rows) {
            let (row0, row1) = (&plane[y0 * from.0..][..from.0], &plane[y1 * from.0..][..from.0]);
            for (o, &(x0, x1, wx)) in out.iter_mut().zip(&columns) {
                let upper = row0[x0] * (1.0 - wx) + row0[x1] * wx;
                let lower = row1[x0] * (1.0 - wx) + row1[x1] * wx;
                *o = upper * (1.0 - wy) + lower * wy;
            }
        }
    }
    out
}

/// RGB bytes (`[height, width, 3]`) as planes in [0, 1] (`[3, height, width]`).
pub fn to_planes(rgb: &[u8]) -> Vec<f32> {
    let pixels = rgb.len() / 3;
    let mut out = vec![0.0; pixels * 3];
    for (channel, plane) in out.chunks_exact_mut(pixels.max(1)).enumerate() {
        for (o, p) in plane.iter_mut().zip(rgb.chunks_exact(3)) {
            *o = f32::from(p[channel]) / 255.0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_left_and_top() {
        let out = resize_with_pad(&[1.0; 6], (3, 2), (6, 6));
        assert!(out[..12].iter().all(|v| *v == 0.0) && out[12..].iter().all(|v| *v == 1.0));
        let out = resize_with_pad(&[1.0; 6], (2, 3), (6, 6));
        assert!(out.chunks(6).all(|row| row == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]));
    }

    #[test]
    fn extreme_aspects_keep_a_pixel() {
        let out = resize_with_pad(&[1.0; 1000], (1000, 1), (8, 8));
        assert_eq!(out.iter().filter(|v| **v == 1.0).count(), 8);
    }
}
