//! What the windows of a convolution see, as strips.
//!
//! Features are held with their channels side by side, `[places, C]`. Where the channels fill whole blocks, a strip is
//! every `stride`-th place of a line of the image, and each tap of the window a part of the depth. Few channels are
//! spread first: a place of a strip is then all that a window sees in that line, and each line of the window a part.

use std::ops::Range;

use super::simd::BLOCK;
use super::strips::{Part, Rows, Strips, Tiles};

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

    /// True when lines are spread.
    fn spreads(&self, channels: usize) -> bool {
        !channels.is_multiple_of(BLOCK)
    }

    /// How long the parts are that a window's depth comes in (values), over `channels` channels.
    pub(super) fn part(&self, channels: usize) -> usize {
        if self.spreads(channels) { self.kernel.1 * channels } else { channels }
    }
}

/// An image seen through a window.
#[derive(Debug, Clone)]
pub struct Seen<'a> {
    /// `[height·width, C]`
    pub values: &'a [f32],
    /// Height and width of the image (places).
    pub size: (usize, usize),
    /// `C`
    pub channels: usize,
    /// What it is seen through.
    pub window: Window,
    /// Lines of the result that are wanted.
    pub lines: Range<usize>,
}

impl Rows for Seen<'_> {
    fn count(&self) -> usize {
        self.lines.len() * self.window.result(self.size.0, self.size.1).1
    }

    fn strips(&self, most: usize) -> impl Strips {
        let across = self.window.result(self.size.0, self.size.1).1;
        let spread = self.window.spreads(self.channels);
        let Window { kernel, stride, padding } = self.window;
        let (phases, places) =
            if spread { (1, across) } else { (stride, across + (kernel.1 - 1) / stride) };
        let seen = (self.lines.start * stride).saturating_sub(padding.0)
            ..(self.lines.end * stride + kernel.0).saturating_sub(stride + padding.0);
        let seen = seen.start..seen.end.min(self.size.0).max(seen.start);
        Lines { image: self, seen, across: Tiles::new(across, most), spread, phases, places }
    }
}

/// The lines of an image.
struct Lines<'a> {
    image: &'a Seen<'a>,
    /// Lines that are seen.
    seen: Range<usize>,
    /// Tiles of one of them.
    across: Tiles,
    spread: bool,
    /// Strips of a line: places so far apart as windows are, from the first place on, from the second one, ….
    phases: usize,
    /// Places of a strip.
    places: usize,
}

impl Lines<'_> {
    /// The columns of the window at column `left` that lie in the image (places of the window), and the first of them
    /// in the image.
    fn inside(&self, left: usize) -> (Range<usize>, usize) {
        let (kernel, padding) = (self.image.window.kernel.1, self.image.window.padding.1);
        let first = padding.saturating_sub(left).min(kernel);
        let end = (self.image.size.1 + padding).saturating_sub(left).min(kernel).max(first);
        (first..end, (left + first).saturating_sub(padding))
    }
}

impl Strips for Lines<'_> {
    fn tiles(&self) -> usize {
        self.image.lines.len() * self.across.count
    }

    fn start(&self, index: usize) -> usize {
        let (line, tile) = (index / self.across.count, index % self.across.count);
        line * self.across.rows + self.across.start(tile)
    }

    fn strips(&self) -> usize {
        self.seen.len() * self.phases
    }

    fn places(&self, index: usize) -> usize {
        let Window { kernel, stride, padding } = self.image.window;
        let (line, phase) = (self.seen.start + index / self.phases, index % self.phases);
        // A window smaller than its step passes over some.
        let seen = (line + padding.0) % stride < kernel.0 && phase < kernel.1;
        if seen { self.places } else { 0 }
    }

    fn most(&self) -> usize {
        self.places
    }

    fn depth(&self) -> usize {
        self.image.window.part(self.image.channels)
    }

    fn place<'a>(&'a self, strip: usize, place: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        let Seen { values, size: (_, width), channels, window, .. } = *self.image;
        let (line, phase) = (self.seen.start + strip / self.phases, strip % self.phases);
        let left = place * window.stride + phase;
        let line = &values[line * width * channels..][..width * channels];
        if !self.spread {
            let column = left.checked_sub(window.padding.1).filter(|column| *column < width);
            if let Some(column) = column {
                return &line[column * channels..][..channels];
            }
        }
        buffer.clear();
        buffer.resize(self.depth(), 0.0);
        if self.spread {
            let (columns, start) = self.inside(left);
            let seen = &line[start * channels..][..columns.len() * channels];
            buffer[columns.start * channels..columns.end * channels].copy_from_slice(seen);
        }
        buffer
    }

    fn parts(&self) -> usize {
        let kernel = self.image.window.kernel;
        if self.spread { kernel.0 } else { kernel.0 * kernel.1 }
    }

    fn each_part(&self, index: usize, mut each: impl FnMut(Part)) {
        let Window { kernel, stride, padding } = self.image.window;
        let (line, tile) = (index / self.across.count, index % self.across.count);
        let (line, column) = (self.image.lines.start + line, self.across.start(tile));
        for down in 0..kernel.0 {
            let line = (line * stride + down).checked_sub(padding.0);
            let Some(line) = line.filter(|line| self.seen.contains(line)) else { continue };
            let line = line - self.seen.start;
            if self.spread {
                each(Part { strip: line, place: column, index: down });
                continue;
            }
            for along in 0..kernel.1 {
                each(Part {
                    strip: line * self.phases + along % stride,
                    place: column + along / stride,
                    index: down * kernel.1 + along,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the windows see, `[window][part][value]`, read through the strips; `None` for parts that lack.
    fn seen(seen: &Seen<'_>, most: usize) -> Vec<Vec<Option<Vec<f32>>>> {
        let strips = seen.strips(most);
        let mut all = vec![vec![None; strips.parts()]; seen.count()];
        let mut buffer = Vec::new();
        for tile in 0..strips.tiles() {
            let first = strips.start(tile);
            let rows = all.iter_mut().enumerate().take(strips.start(tile + 1)).skip(first);
            for (row, parts) in rows {
                strips.each_part(tile, |part| {
                    let place = part.place + row - first;
                    assert!(place < strips.places(part.strip) && place < strips.most());
                    let values = strips.place(part.strip, place, &mut buffer).to_vec();
                    assert_eq!(values.len(), strips.depth());
                    parts[part.index] = Some(values);
                });
            }
        }
        all
    }

    #[test]
    fn windows_see_the_image_and_zeros_around_it() {
        // Every sum of coordinates is another number: what a window must see is known without the strips.
        let value = |y: usize, x: usize, c: usize| (y * 10_000 + x * 100 + c + 1) as f32;
        for (height, width, channels, kernel, stride, padding) in [
            (3, 2, 2, (3, 3), 2, (1, 1)),
            (5, 9, 32, (3, 3), 1, (1, 1)),
            (6, 7, 32, (3, 3), 2, (1, 1)),
            (7, 6, 32, (1, 1), 2, (0, 0)),
            (1, 11, 64, (1, 5), 1, (0, 2)),
            (9, 8, 3, (7, 7), 2, (3, 3)),
            (8, 12, 3, (4, 4), 4, (0, 0)),
            (1, 3, 4, (1, 9), 1, (0, 4)),
        ] {
            let places = (0..height).flat_map(|y| (0..width).map(move |x| (y, x)));
            let values: Vec<f32> =
                places.flat_map(|(y, x)| (0..channels).map(move |c| value(y, x, c))).collect();
            let window = Window { kernel, stride, padding };
            let (lines, columns) = window.result(height, width);
            let all = [0..lines, 0..1, lines / 2..lines].into_iter();
            for (row, parts) in all.flat_map(|lines| {
                let first = lines.start * columns;
                let size = (height, width);
                let image = Seen { values: &values, size, channels, window, lines };
                (first..).zip(seen(&image, 3))
            }) {
                let all: Vec<f32> = parts
                    .into_iter()
                    .flat_map(|part| part.unwrap_or_else(|| vec![0.0; window.part(channels)]))
                    .collect();
                let mut expected = Vec::new();
                for (down, along) in (0..kernel.0).flat_map(|d| (0..kernel.1).map(move |a| (d, a)))
                {
                    let y = (row / columns * stride + down).checked_sub(padding.0);
                    let x = (row % columns * stride + along).checked_sub(padding.1);
                    let at = y.zip(x).filter(|(y, x)| *y < height && *x < width);
                    expected.extend((0..channels).map(|c| at.map_or(0.0, |(y, x)| value(y, x, c))));
                }
                assert_eq!(all, expected, "window {row} of {window:?} over {channels} channels");
            }
        }
    }
}
