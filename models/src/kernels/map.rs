//! Features of images whose channels lie side by side.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::{Interleave, Loop, TILE_ROWS};
use super::window::Window;

/// What is seen of the places that a pooled place stands for.
pub(super) const POOL: Window = Window { kernel: (3, 3), stride: 2, padding: (1, 1) };

/// Features of an image.
#[derive(Debug, Clone)]
pub struct Map {
    /// `[height·width, C]`, row by row.
    pub values: Matrix,
    /// Height and width (places).
    pub size: (usize, usize),
}

impl Map {
    /// The image `planes`.
    pub fn of_planes(planes: &Planes) -> Self {
        let (channels, (height, width)) = (planes.channels(), planes.size);
        let pixels = planes.values.values();
        let isa = Isa::current();
        let mut values = Matrix::unwritten(height * width, channels);
        let line = (width * channels).max(1);
        pool().chunks(values.values_mut(), line, |y, line| {
            for first in (0..channels).step_by(TILE_ROWS) {
                let rows =
                    (first..channels).map(|plane| &pixels[(plane * height + y) * width..][..width]);
                isa.interleave(Interleave::new(rows, channels, &mut line[first..]));
            }
        });
        Self { values, size: (height, width) }
    }

    /// Plane by plane.
    pub fn to_planes(&self) -> Planes {
        Planes { values: self.values.transposed(), size: self.size }
    }
}

/// An image plane by plane.
#[derive(Debug, Clone)]
pub struct Planes {
    /// `[C, height·width]`, row by row.
    pub values: Matrix,
    /// Height and width (pixels).
    pub size: (usize, usize),
}

impl Planes {
    /// The image `values` (`[C, height, width]`), copied.
    ///
    /// # Errors
    /// When they are no whole planes.
    pub fn new(values: &[f32], (height, width): (usize, usize)) -> Result<Self> {
        let area = height * width;
        let values = Matrix::new(values, (values.len() / area.max(1), area))?;
        Ok(Self { values, size: (height, width) })
    }

    /// The image in a tensor `[C, height, width]`, copied.
    ///
    /// # Errors
    /// When it has another number of dimensions, or is no f32.
    pub fn of_tensor(pixels: &Tensor) -> Result<Self> {
        let (_, height, width) = pixels.dims3()?;
        Self::new(&pixels.flatten_all()?.to_vec1::<f32>()?, (height, width))
    }

    /// Number of planes `C`.
    pub fn channels(&self) -> usize {
        self.values.rows()
    }
}

/// Largest value of each 3 × 3 square, at every second place; the border counts for nothing.
pub fn max_pool(x: &Map) -> Map {
    let (channels, (height, width)) = (x.values.width(), x.size);
    let size = POOL.result(height, width);
    let mut values = Matrix::unwritten(size.0 * size.1, channels);
    let isa = Isa::current();
    pool().chunks(values.values_mut(), (size.1 * channels).max(1), |top, out| {
        let lines = (2 * top).saturating_sub(1)..(2 * top + 2).min(height);
        isa.run(Largest { values: x.values.values(), width, channels, lines, out });
    });
    Map { values, size }
}

/// One line of the result.
pub(super) struct Largest<'a> {
    pub values: &'a [f32],
    pub width: usize,
    pub channels: usize,
    /// Lines of the image that it sees.
    pub lines: Range<usize>,
    pub out: &'a mut [f32],
}

impl Loop for Largest<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { values, width, channels, lines, out } = self;
        for (left, place) in out.chunks_exact_mut(channels).enumerate() {
            place.fill(f32::NEG_INFINITY);
            for y in lines.clone() {
                for x in (2 * left).saturating_sub(1)..(2 * left + 2).min(width) {
                    let seen = &values[(y * width + x) * channels..][..channels];
                    for (p, s) in place.iter_mut().zip(seen) {
                        // NaN stays.
                        *p = if *s > *p || s.is_nan() { *s } else { *p };
                    }
                }
            }
        }
    }
}
