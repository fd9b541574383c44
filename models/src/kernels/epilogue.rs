//! What follows a product, done on each tile before it leaves the cache.

use std::ops::Range;

use super::functions::{Activation, activate, gelu_erf, gelu_tanh, mish, relu, sigmoid_mul};
use super::isa::Isa;
use super::pool::Cell;
use super::simd::Loop;

/// `last(activation(sum + bias)·gate + residual)`, each where it is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value for each output.
    pub bias: Option<&'a [f32]>,
    /// What follows the bias.
    pub activation: Activation,
    /// A matrix of the result's size to multiply with.
    pub gate: Option<&'a [f32]>,
    /// A matrix of the result's size to add.
    pub residual: Option<&'a [f32]>,
    /// What follows the residual.
    pub last: Activation,
}

impl Epilogue<'_> {
    /// True when nothing follows the product.
    pub(super) fn is_plain(&self) -> bool {
        let Self { bias, activation, gate, residual, last } = self;
        let bare = bias.is_none() && gate.is_none() && residual.is_none();
        bare && *activation == Activation::None && *last == Activation::None
    }

    /// Writes a tile's sums, finished.
    pub(super) fn finish<R: Iterator<Item = Option<usize>>>(
        &self,
        isa: Isa,
        mut tile: Tile<'_, '_, R>,
    ) {
        if self.is_plain() {
            while let Some(line) = tile.next() {
                line.to.copy_from_slice(line.sums);
            }
        } else {
            isa.run(Finish { epilogue: self, tile });
        }
    }
}

/// The sums of a tile on their way to the result.
pub(super) struct Tile<'t, 'c, R> {
    pub cell: &'t mut Cell<'c>,
    /// Rows of the result, one for each row of the tile; none where there is nothing to write.
    pub rows: R,
    /// Row by row.
    pub sums: &'t [f32],
    /// Distance between rows in `sums`.
    pub step: usize,
    /// Columns of the cell.
    pub place: Range<usize>,
    /// Columns of the result, as many.
    pub outputs: Range<usize>,
    /// Width of the result.
    pub width: usize,
}

/// A row of a tile.
struct Line<'l> {
    to: &'l mut [f32],
    sums: &'l [f32],
    /// Where it lies in a matrix of the result's size.
    here: Range<usize>,
}

impl<R: Iterator<Item = Option<usize>>> Tile<'_, '_, R> {
    /// The next row that is written.
    #[inline(always)]
    fn next(&mut self) -> Option<Line<'_>> {
        loop {
            let row = self.rows.next()?;
            let (sums, rest) = self.sums.split_at_checked(self.step)?;
            self.sums = rest;
            let Some(row) = row else { continue };
            let start = row * self.width;
            let to = &mut self.cell.row(row)[self.place.clone()];
            let here = start + self.outputs.start..start + self.outputs.end;
            return Some(Line { sums: &sums[..to.len()], to, here });
        }
    }
}

struct Finish<'e, 't, 'c, R> {
    epilogue: &'e Epilogue<'e>,
    tile: Tile<'t, 'c, R>,
}

impl<R: Iterator<Item = Option<usize>>> Loop for Finish<'_, '_, '_, R> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let Epilogue { bias, activation, gate, residual, last } = *self.epilogue;
        let bias = bias.map(|bias| &bias[self.tile.outputs.clone()]);
        while let Some(Line { to, sums, here }) = self.tile.next() {
            match activation {
                Activation::None => begin(to, sums, bias, |x| x),
                Activation::Gelu => begin(to, sums, bias, gelu_tanh),
                Activation::GeluErf => begin(to, sums, bias, gelu_erf),
                Activation::Silu => begin(to, sums, bias, |x| sigmoid_mul(x, x)),
                Activation::Relu => begin(to, sums, bias, relu),
                Activation::Mish => begin(to, sums, bias, mish),
            }
            if let Some(gate) = gate {
                to.iter_mut().zip(&gate[here.clone()]).for_each(|(o, g)| *o *= g);
            }
            match (residual, last) {
                (Some(residual), Activation::Relu) => {
                    to.iter_mut().zip(&residual[here]).for_each(|(o, r)| *o = relu(*o + r));
                }
                (Some(residual), last) => {
                    to.iter_mut().zip(&residual[here]).for_each(|(o, r)| *o += r);
                    activate(last, to);
                }
                (None, last) => activate(last, to),
            }
        }
    }
}

/// `activation(sums + bias)`.
#[inline(always)]
fn begin(out: &mut [f32], sums: &[f32], bias: Option<&[f32]>, activation: impl Fn(f32) -> f32) {
    match bias {
        Some(bias) => {
            let terms = sums.iter().zip(bias);
            out.iter_mut().zip(terms).for_each(|(o, (s, b))| *o = activation(s + b));
        }
        None => out.iter_mut().zip(sums).for_each(|(o, s)| *o = activation(*s)),
    }
}
