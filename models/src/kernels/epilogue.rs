//! What follows a product, done on each tile before it leaves the cache.

use std::ops::Range;

use super::functions::{Activation, activate, gelu_erf, gelu_tanh, relu, sigmoid_mul};
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
        tile: Tile<'_, '_, R>,
    ) {
        if self.is_plain() {
            tile.each(|to, sums, _, _| to.copy_from_slice(sums));
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

impl<R: Iterator<Item = Option<usize>>> Tile<'_, '_, R> {
    /// Calls `each` for every row with its place, its sums, its columns and its place in a matrix of the result's size.
    #[inline(always)]
    fn each(self, mut each: impl FnMut(&mut [f32], &[f32], Range<usize>, Range<usize>)) {
        for (row, sums) in self.rows.zip(self.sums.chunks_exact(self.step)) {
            let Some(row) = row else { continue };
            let to = &mut self.cell.row(row)[self.place.clone()];
            let start = row * self.width;
            let here = start + self.outputs.start..start + self.outputs.end;
            let sums = &sums[..to.len()];
            each(to, sums, self.outputs.clone(), here);
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
    fn run(self) {
        let Epilogue { bias, activation, gate, residual, last } = *self.epilogue;
        self.tile.each(|out, sums, columns, here| {
            let bias = bias.map(|bias| &bias[columns]);
            match activation {
                Activation::None => begin(out, sums, bias, |x| x),
                Activation::Gelu => begin(out, sums, bias, gelu_tanh),
                Activation::GeluErf => begin(out, sums, bias, gelu_erf),
                Activation::Silu => begin(out, sums, bias, |x| sigmoid_mul(x, x)),
                Activation::Relu => begin(out, sums, bias, relu),
            }
            if let Some(gate) = gate {
                out.iter_mut().zip(&gate[here.clone()]).for_each(|(o, g)| *o *= g);
            }
            match (residual, last) {
                (Some(residual), Activation::Relu) => {
                    out.iter_mut().zip(&residual[here]).for_each(|(o, r)| *o = relu(*o + r));
                }
                (Some(residual), last) => {
                    out.iter_mut().zip(&residual[here]).for_each(|(o, r)| *o += r);
                    activate(last, out);
                }
                (None, last) => activate(last, out),
            }
        });
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
