//! Convolutions as products: a row of the left matrix is what one place of the result sees.
//!
//! The rows are gathered while a product puts its activations in order, so the matrix of all of them never exists.
//! Features are held with their channels side by side, `[places, C]`: what a window sees in one row of the image is
//! then one piece of memory.

use super::gemm::Rows;

/// What a convolution slides over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Height and width (places).
    pub kernel: (usize, usize),
    /// Places from one window to the next.
    pub stride: usize,
    /// Zeros above and below, left and right (places).
    pub padding: (usize, usize),
}

impl Window {
    /// Height and width of the result for an image of `height` and `width`.
    pub fn result(&self, height: usize, width: usize) -> (usize, usize) {
        let along = |size: usize, kernel: usize, padding: usize| {
            (size + 2 * padding).checked_sub(kernel).map_or(0, |rest| rest / self.stride + 1)
        };
        (along(height, self.kernel.0, self.padding.0), along(width, self.kernel.1, self.padding.1))
    }
}

/// An image seen through a window.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// `[height·width, C]`
    pub values: &'a [f32],
    /// Height and width of the image (places).
    pub size: (usize, usize),
    /// `C`
    pub channels: usize,
    /// What it is seen through.
    pub window: Window,
}

impl Rows for Seen<'_> {
    fn count(&self) -> usize {
        let (rows, columns) = self.window.result(self.size.0, self.size.1);
        rows * columns
    }

    fn row<'a>(&'a self, row: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        let (height, width) = self.size;
        let Window { kernel, stride, padding } = self.window;
        let columns = self.window.result(height, width).1;
        let (top, left) = (row / columns * stride, row % columns * stride);
        // Columns of the window that lie in the image: one piece of memory in each of its rows.
        let first = padding.1.saturating_sub(left).min(kernel.1);
        let end = (width + padding.1).saturating_sub(left).min(kernel.1).max(first);
        buffer.clear();
        buffer.resize(kernel.0 * kernel.1 * self.channels, 0.0);
        for (index, line) in buffer.chunks_exact_mut(kernel.1 * self.channels).enumerate() {
            let Some(y) = (top + index).checked_sub(padding.0).filter(|y| *y < height) else {
                continue;
            };
            if first < end {
                let start = (y * width + left + first - padding.1) * self.channels;
                let count = (end - first) * self.channels;
                line[first * self.channels..end * self.channels]
                    .copy_from_slice(&self.values[start..start + count]);
            }
        }
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_see_the_image_and_zeros_around_it() {
        let values: Vec<f32> = (1..=12).map(|v| v as f32).collect();
        let window = Window { kernel: (3, 3), stride: 2, padding: (1, 1) };
        let seen = Seen { values: &values, size: (3, 2), channels: 2, window };
        assert_eq!(seen.count(), 2);
        let mut buffer = Vec::new();
        let row = seen.row(0, &mut buffer).to_vec();
        let expected =
            [[0., 0., 0., 0., 0., 0.], [0., 0., 1., 2., 3., 4.], [0., 0., 5., 6., 7., 8.]];
        assert_eq!(row, expected.concat());
        let row = seen.row(1, &mut buffer).to_vec();
        let expected =
            [[0., 0., 5., 6., 7., 8.], [0., 0., 9., 10., 11., 12.], [0., 0., 0., 0., 0., 0.]];
        assert_eq!(row, expected.concat());
        let wide = Window { kernel: (1, 9), stride: 1, padding: (0, 4) };
        let seen = Seen { values: &values, size: (1, 3), channels: 4, window: wide };
        assert_eq!(seen.count(), 3);
        let row = seen.row(2, &mut buffer);
        assert_eq!((&row[8..20], row[20]), (&values[..], 0.0));
    }
}
