//! What follows a product, done on each tile before it leaves the cache.

use std::ops::Range;

use super::functions::{Activation, activate};
use super::isa::Isa;
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

    /// Writes the finished `columns` of row `row`, of a result `width` wide.
    pub(super) fn finish(
        &self,
        isa: Isa,
        sums: &[f32],
        row: usize,
        columns: Range<usize>,
        width: usize,
        out: &mut [f32],
    ) {
        let here = row * width + columns.start..row * width + columns.end;
        isa.run(Finish {
            sums,
            bias: self.bias.map(|bias| &bias[columns]),
            activation: self.activation,
            gate: self.gate.map(|gate| &gate[here.clone()]),
            residual: self.residual.map(|residual| &residual[here]),
            last: self.last,
            out,
        });
    }
}

struct Finish<'a> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    activation: Activation,
    gate: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    last: Activation,
    out: &'a mut [f32],
}

impl Loop for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let out = self.out;
        match self.bias {
            Some(bias) => {
                let terms = self.sums.iter().zip(bias);
                out.iter_mut().zip(terms).for_each(|(o, (s, b))| *o = s + b);
            }
            None => out.copy_from_slice(self.sums),
        }
        activate(self.activation, out);
        if let Some(gate) = self.gate {
            out.iter_mut().zip(gate).for_each(|(o, g)| *o *= g);
        }
        if let Some(residual) = self.residual {
            out.iter_mut().zip(residual).for_each(|(o, r)| *o += r);
        }
        activate(self.last, out);
    }
}
