//! Convolutions of 3 × 3 places with fewer multiplications: F(2 × 2, 3 × 3) of Winograd's minimal filtering.
//!
//! Squares of 4 × 4 places that overlap by two are transformed, multiplied with transformed weights (16 products of
//! matrices, one for each place of a square), and transformed back to 2 × 2 places of the result: 16 multiplications
//! instead of 36. All factors are 1 and ½, so that little precision is lost: the result differs from that of the plain
//! sum by a few roundings.
//!
//! Source: Lavin and Gray 2015 (arXiv 1509.09308).

use std::cell::RefCell;

use super::epilogue::{Epilogue, Tile};
use super::isa::Isa;
use super::packed::{Compute, Packed};
use super::pool::{Cell, Edges, Grid, pool};
use super::simd::{
    Aligned, BLOCK, Back, Forth, Interleave, PLACES, Piece, Products, SIDE, TILE_COLUMNS, TILE_ROWS,
};
use super::strips::Tiles;
use super::tally;
use super::window::Window;

/// Squares that a thread works on at a time, at most about: they stay in the second-level cache.
const SQUARES: usize = 96;
/// The same as values, in all places of the squares.
const VALUES: usize = 320 << 10;
/// The most weights (of one place) that are transformed: more of them take longer to read than the products that they
/// save.
const WEIGHTS: usize = 256 * 256;
/// Channels that are transformed together: a block of squares then fits the first-level cache.
const TOGETHER: usize = 64;
/// What is seen beyond the border.
const NOTHING: [f32; TOGETHER] = [0.0; TOGETHER];

thread_local! {
    /// Transformed squares as tiles want them, sums, and the squares on their way.
    static SCRATCH: RefCell<[Aligned<f32>; 3]> =
        const { RefCell::new([const { Aligned::new() }; 3]) };
}

/// Transformed weights, a matrix for each place of a square.
#[derive(Debug)]
pub(super) struct Winograd {
    weights: Vec<Packed>,
    channels: usize,
}

impl Winograd {
    /// True for convolutions that gain by it.
    pub fn suits(window: Window, channels: usize, outputs: usize) -> bool {
        window == Window { kernel: (3, 3), stride: 1, padding: (1, 1) }
            && channels.is_multiple_of(BLOCK)
            && channels * outputs <= WEIGHTS
    }

    /// The convolution of `weight` (`[out, C, 3, 3]`, row by row) over `channels` channels.
    pub fn new(weight: &[f32], channels: usize) -> Self {
        let of_place = |place: usize| {
            let kernels = weight.chunks_exact(9);
            let values: Vec<f32> = kernels.map(|kernel| transformed(kernel, place)).collect();
            Packed::from_values(&values, channels, Compute::Exact)
        };
        Self { weights: (0..PLACES).map(of_place).collect(), channels }
    }

    pub fn outputs(&self) -> usize {
        self.weights[0].outputs()
    }

    /// `values` (`[height·width, C]`) convolved into `out`, which has as many places.
    pub fn apply(
        &self,
        values: &[f32],
        size: (usize, usize),
        epilogue: &Epilogue<'_>,
        out: &mut [f32],
    ) {
        let (height, width) = size;
        let across = width.div_ceil(2);
        if out.is_empty() {
            return;
        }
        let most = SQUARES.min(VALUES / (PLACES * self.channels));
        let lines = (most / across).max(1);
        let units = height.div_ceil(2 * lines);
        let rows = Edges::new((0..=units).map(|unit| (2 * lines * unit).min(height) * width));
        let grid = Grid { width: self.outputs(), rows: &rows, columns: &[0, self.outputs()] };
        let products = height.div_ceil(2) * across * PLACES * self.channels * self.outputs();
        tally::counted(
            |t| &mut t.layers,
            products,
            || {
                pool().grid(out, &grid, |cell| {
                    let first = cell.down * lines;
                    let count = (first + lines).min(height.div_ceil(2)) - first;
                    let squares = Squares { values, size, across, first, count: count * across };
                    SCRATCH.with_borrow_mut(|scratch| self.unit(cell, &squares, epilogue, scratch));
                });
            },
        );
    }

    /// Some lines of squares.
    fn unit(
        &self,
        mut cell: Cell<'_>,
        squares: &Squares<'_>,
        epilogue: &Epilogue<'_>,
        [laid, sums, patch]: &mut [Aligned<f32>; 3],
    ) {
        let first = &self.weights[0];
        let (isa, panels, depth) = (first.isa, first.panels(), self.channels);
        let blocks = Tiles::new(squares.count, isa.float_shape().rows);
        let stride = blocks.most() * depth;
        laid.grow(blocks.count * PLACES * stride);
        patch.grow(PLACES * TILE_ROWS * TOGETHER);
        for (block, laid) in laid.chunks_exact_mut(PLACES * stride).enumerate().take(blocks.count) {
            let (start, rows) = (blocks.start(block), blocks.height(block));
            squares.lay(isa, (start, rows), depth, patch, laid);
        }
        let tile = blocks.most() * TILE_COLUMNS;
        sums.grow(blocks.count * PLACES * tile);
        let mut found = [0.0; 4 * TILE_COLUMNS];
        for panel in 0..panels.count() {
            let (columns, outputs) = (panels.columns(panel), panels.outputs(panel));
            for (place, weights) in self.weights.iter().enumerate() {
                let b = weights.panel(panel, 0, depth, &mut []);
                for block in 0..blocks.count {
                    let (at, rows) = (block * PLACES + place, blocks.height(block));
                    isa.multiply_tile(Products {
                        pieces: &[Piece::whole(depth)],
                        a: &laid[at * stride..][..rows * depth],
                        a_step: rows,
                        b,
                        b_step: columns,
                        rows,
                        vectors: columns / panels.lanes,
                        out: &mut sums[at * tile..][..tile],
                        accumulate: false,
                        ahead: &[],
                    });
                }
            }
            for block in 0..blocks.count {
                let sums = &sums[block * PLACES * tile..];
                for row in 0..blocks.height(block) {
                    let (sums, to) = (&sums[row * columns..], &mut found[..]);
                    isa.square_back(Back { sums, step: tile, columns, to });
                    let tile = Tile {
                        rows: squares.result(blocks.start(block) + row),
                        sums: &found,
                        step: columns,
                        place: outputs.clone(),
                        outputs: outputs.clone(),
                        width: panels.outputs,
                        cell: &mut cell,
                    };
                    epilogue.finish(isa, tile);
                }
            }
        }
    }
}

/// Squares of an image from line `first` of squares on.
struct Squares<'a> {
    values: &'a [f32],
    size: (usize, usize),
    /// Squares in a line.
    across: usize,
    first: usize,
    count: usize,
}

impl Squares<'_> {
    /// The line and column of the result's first place that comes from square `index`.
    fn place(&self, index: usize) -> (usize, usize) {
        (2 * (self.first + index / self.across), 2 * (index % self.across))
    }

    /// The places of the result that come from square `index`; nothing beyond the border.
    fn result(&self, index: usize) -> impl Iterator<Item = Option<usize>> {
        let ((height, width), (top, left)) = (self.size, self.place(index));
        [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter().map(move |(down, along)| {
            let (y, x) = (top + down, left + along);
            (y < height && x < width).then_some(y * width + x)
        })
    }

    /// Transforms `count` squares from `start` on, and puts them in order: per place of a square, `[channel][square]`.
    fn lay(
        &self,
        isa: Isa,
        (start, count): (usize, usize),
        depth: usize,
        patch: &mut [f32],
        laid: &mut [f32],
    ) {
        let (height, width) = self.size;
        let stride = laid.len() / PLACES;
        for from in (0..depth).step_by(TOGETHER) {
            let channels = from..(from + TOGETHER).min(depth);
            let wide = channels.len();
            for r in 0..count {
                let (top, left) = self.place(start + r);
                // The first place of a square is one up and one left of the result's.
                let seen = |down: usize, along: usize| {
                    let (y, x) = ((top + down).wrapping_sub(1), (left + along).wrapping_sub(1));
                    match y < height && x < width {
                        true => &self.values[(y * width + x) * depth..][channels.clone()],
                        false => &NOTHING[..wide],
                    }
                };
                let places = std::array::from_fn(|place| seen(place / SIDE, place % SIDE));
                let (to, step) = (&mut patch[r * wide..], TILE_ROWS * wide);
                isa.square_forth(Forth { places, to, step });
            }
            let places = patch.chunks_exact(TILE_ROWS * wide).zip(laid.chunks_exact_mut(stride));
            for (squares, laid) in places.take(PLACES) {
                let mut rows: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
                let used = squares.chunks_exact(wide).take(count);
                rows.iter_mut().zip(used).for_each(|(to, row)| *to = row);
                let tile = &mut laid[from * count..];
                isa.interleave(Interleave { rows, height: count, step: count, tile });
            }
        }
    }
}

/// The weight of a 3 × 3 kernel at `place` of a square: `G·g·Gᵀ`.
fn transformed(kernel: &[f32], place: usize) -> f32 {
    const G: [[f64; 3]; SIDE] =
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let (down, along) = (G[place / SIDE], G[place % SIDE]);
    let terms = kernel.iter().enumerate();
    terms.map(|(at, w)| down[at / 3] * along[at % 3] * f64::from(*w)).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::gemm::multiply;
    use super::super::tests::{each_isa, numbers};
    use super::super::window::Seen;
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn it_equals_the_plain_convolution(
            height in 1usize..19, width in 1usize..23, blocks in 1usize..4, outputs in 1usize..100,
            seed in 0usize..1000
        ) {
            let channels = 32 * blocks;
            let window = Window { kernel: (3, 3), stride: 1, padding: (1, 1) };
            let (x, w) = (numbers(height * width * channels, seed), numbers(outputs * channels * 9, seed + 1));
            let turned: Vec<f32> = w
                .chunks_exact(channels * 9)
                .flat_map(|w| (0..9).flat_map(move |p| (0..channels).map(move |c| w[c * 9 + p])))
                .collect();
            let (bias, residual) = (numbers(outputs, 3), numbers(height * width * outputs, 4));
            let epilogue =
                Epilogue { bias: Some(&bias), residual: Some(&residual), ..Epilogue::default() };
            each_isa(|isa| {
                let (size, lines) = ((height, width), 0..height);
                let seen = Seen { values: &x, size, channels, window, lines };
                let mut plain = vec![f32::NAN; height * width * outputs];
                let packed = Packed::from_values(&turned, channels * 9, Compute::Exact);
                multiply(&seen, &packed, &epilogue, &mut plain);
                let mut found = vec![f32::NAN; plain.len()];
                let winograd = Winograd::new(&w, channels);
                winograd.apply(&x, size, &epilogue, &mut found);
                for (found, plain) in found.iter().zip(&plain) {
                    let error = (found - plain).abs();
                    assert!(error < 1e-6 * channels as f32, "{}: {error:e}", isa.name());
                }
            });
        }
    }
}
