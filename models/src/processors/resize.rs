//! Images resized keeping their aspect, and padded.
//!
//! Source: LeRobot `src/lerobot/policies/smolvla/modeling_smolvla.py`, `resize_with_pad`, and
//! `pi0/modeling_pi0.py`, `resize_with_pad_torch`. Bilinear with
//! half-pixel centres and without antialiasing, even when shrinking: the model was trained on that.

use crate::kernels::pool::pool;
use crate::kernels::{Matrix, Planes};

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
pub fn resize_with_pad(image: Planes, to: (usize, usize)) -> Planes {
    resize_padded(image, to, Padding::LeftTop)
}

/// Resizes `image` into `to` (width, height), with zeros around as `padding` says. No side may be zero.
pub fn resize_padded(image: Planes, to: (usize, usize), padding: Padding) -> Planes {
    let from = width_height(&image);
    if from == to {
        return image;
    }
    let inner = inner_size(from, to);
    let (left, top) = match padding {
        Padding::LeftTop => (to.0 - inner.0, to.1 - inner.1),
        Padding::Centered => ((to.0 - inner.0) / 2, (to.1 - inner.1) / 2),
    };
    let lines = Lines::new(&image, inner);
    each_line(image.channels(), to, |plane, y, out| {
        let Some(y) = y.checked_sub(top).filter(|y| *y < inner.1) else { return out.fill(0.0) };
        let (before, rest) = out.split_at_mut(left);
        let (line, after) = rest.split_at_mut(inner.0);
        before.fill(0.0);
        after.fill(0.0);
        lines.stretch(plane, y, line);
        if padding == Padding::Centered {
            line.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
        }
    })
}

/// Resizes `image` to `to` (width, height), whatever becomes of the aspect. No side may be zero.
pub fn stretch(image: Planes, to: (usize, usize)) -> Planes {
    if width_height(&image) == to {
        return image;
    }
    let lines = Lines::new(&image, to);
    each_line(image.channels(), to, |plane, y, out| lines.stretch(plane, y, out))
}

/// RGB bytes (`[height, width, 3]`) of an image of `size` (width, height) as planes in [0, 1].
///
/// There must be as many bytes.
pub fn to_planes(rgb: &[u8], size: (usize, usize)) -> Planes {
    each_line(3, size, |channel, y, out| {
        let line = rgb[3 * y * size.0..].chunks_exact(3);
        out.iter_mut().zip(line).for_each(|(o, p)| *o = f32::from(p[channel]) / 255.0);
    })
}

fn width_height(image: &Planes) -> (usize, usize) {
    (image.size.1, image.size.0)
}

/// An image of `channels` planes of size (width, height), of which `make` writes line after line (plane, line, values).
fn each_line(
    channels: usize,
    (width, height): (usize, usize),
    make: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Planes {
    let mut values = Matrix::unwritten(channels, height * width);
    pool().chunks(values.values_mut(), width.max(1), |line, out| {
        make(line / height, line % height, out);
    });
    Planes { values, size: (height, width) }
}

/// Lines of an image as it is stretched.
struct Lines<'a> {
    image: &'a Planes,
    columns: Vec<(usize, usize, f32)>,
    rows: Vec<(usize, usize, f32)>,
}

impl<'a> Lines<'a> {
    fn new(image: &'a Planes, to: (usize, usize)) -> Self {
        let (width, height) = width_height(image);
        Self { image, columns: taps(width, to.0), rows: taps(height, to.1) }
    }

    /// Line `y` of plane `plane`.
    fn stretch(&self, plane: usize, y: usize, out: &mut [f32]) {
        let (plane, width) = (self.image.values.row(plane), self.image.size.1);
        let (y0, y1, wy) = self.rows[y];
        let (row0, row1) = (&plane[y0 * width..][..width], &plane[y1 * width..][..width]);
        for (o, &(x0, x1, wx)) in out.iter_mut().zip(&self.columns) {
            let upper = row0[x0] * (1.0 - wx) + row0[x1] * wx;
            let lower = row1[x0] * (1.0 - wx) + row1[x1] * wx;
            *o = upper * (1.0 - wy) + lower * wy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ones, of a size (width, height).
    fn ones((width, height): (usize, usize)) -> Planes {
        let mut values = Matrix::zeros(1, width * height);
        values.values_mut().fill(1.0);
        Planes { values, size: (height, width) }
    }

    #[test]
    fn padding_is_left_and_top() {
        let out = resize_with_pad(ones((3, 2)), (6, 6));
        let out = out.values.values();
        assert!(out[..12].iter().all(|v| *v == 0.0) && out[12..].iter().all(|v| *v == 1.0));
        let out = resize_with_pad(ones((2, 3)), (6, 6));
        let mut rows = out.values.values().chunks(6);
        assert!(rows.all(|row| row == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]));
    }

    #[test]
    fn extreme_aspects_keep_a_pixel() {
        let out = resize_with_pad(ones((1000, 1)), (8, 8));
        assert_eq!(out.values.values().iter().filter(|v| **v == 1.0).count(), 8);
    }

    #[test]
    fn bytes_become_planes() {
        let planes = to_planes(&[0, 51, 255, 102, 0, 204], (1, 2));
        assert_eq!((planes.size, planes.channels()), ((2, 1), 3));
        assert_eq!(planes.values.values(), [0.0, 0.4, 0.2, 0.0, 1.0, 0.8]);
    }
}
