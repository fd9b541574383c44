//! Weights in the order in which the tiles read them.
//!
//! A matrix of `N` outputs and `K` inputs is cut into *panels* of as many outputs as a tile has columns. In a panel,
//! depth follows depth, and at each depth the outputs lie side by side. Quantised panels keep a file's blocks of 32
//! depths, each with its scale. Only 8-bit weights that meet activations of 8 bits are rounded anew, to one scale for all
//! depths of an output: to multiply by a scale after every 32 depths costs as much as a third of their products.

use half::f16;

use super::isa::Isa;
use super::packing::{Source, blocks_of, pack_blocks, transposed};
use super::simd::{Aligned, BLOCK, Quants, Shape, Weights, Widening};
use crate::checkpoint::{StoredTensor, StoredType};
use crate::gguf::blocks;

/// How a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Compute {
    /// Weights as they are stored, activations in 32-bit floats.
    #[default]
    #[serde(rename = "exact")]
    Exact,
    /// Weights in 8 bits with a scale for each output (or in 4 bits, where they are stored so, with their blocks' scales),
    /// activations rounded to 8 bits with a scale for every 64 (or 32) of them.
    #[serde(rename = "w8a8")]
    Int8,
}

#[derive(Debug)]
pub(super) enum Form {
    /// `[k][column]` in each panel.
    Float(Aligned<f32>),
    /// The same in half precision.
    Half(Aligned<u16>),
    /// Blocks of depths.
    Blocks { blocks: Blocks, compute: Compute },
}

/// Quantised weights, panel by panel.
#[derive(Debug)]
pub(super) struct Blocks {
    pub quants: Quants,
    /// Per block and group of depths, `[column][depth]`.
    pub bytes: Aligned<u8>,
    /// `[block][column]`; what they are, [`Quants`] says.
    pub scales: Aligned<u16>,
    /// `[line][column]`, where there are any; what they are, [`Weights`] says.
    pub factors: Aligned<u16>,
}

/// A packed matrix.
#[derive(Debug)]
pub struct Packed {
    pub(super) isa: Isa,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) form: Form,
}

/// The panels of a matrix: all of the same width but the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels {
    pub lanes: usize,
    pub width: usize,
    pub outputs: usize,
}

impl Panels {
    pub fn new(shape: Shape, outputs: usize) -> Self {
        Self { lanes: shape.lanes, width: shape.lanes * shape.vectors, outputs }
    }

    pub fn count(self) -> usize {
        self.outputs.div_ceil(self.width)
    }

    /// Outputs of panel `index`.
    pub fn outputs(self, index: usize) -> std::ops::Range<usize> {
        index * self.width..((index + 1) * self.width).min(self.outputs)
    }

    /// Columns of panel `index`, whole vectors.
    pub fn columns(self, index: usize) -> usize {
        self.outputs(index).len().next_multiple_of(self.lanes)
    }

    /// Columns of all panels.
    pub fn all_columns(self) -> usize {
        self.outputs.next_multiple_of(self.lanes)
    }
}

impl Packed {
    /// The matrix of the rows of `parts` one below the other, all `inputs` wide, packed for [`Isa::current`].
    ///
    /// Stored blocks stay as they are, and so does half precision; but [`Compute::Int8`] rounds all that is not 4 bits to
    /// 8 bits with one scale for each output. The pages of the mapped file are given back on the way.
    pub fn new(parts: &[StoredTensor], inputs: usize, compute: Compute) -> Self {
        let isa = Isa::current();
        let outputs = parts.iter().map(|part| part.values() / inputs.max(1)).sum();
        let same = |dtype| parts.iter().all(|part| part.dtype == dtype);
        let source = Source { parts, inputs };
        let form = if same(StoredType::Q4_0) {
            blocks_of(isa, outputs, &source, Quants::Nibbles, compute)
        } else if same(StoredType::Q4K) {
            blocks_of(isa, outputs, &source, Quants::Minima, compute)
        } else if compute == Compute::Int8 {
            blocks_of(isa, outputs, &source, Quants::Columns, compute)
        } else if same(StoredType::Q8_0) {
            blocks_of(isa, outputs, &source, Quants::Bytes, compute)
        } else if same(StoredType::F16) {
            Form::Half(transposed(isa, outputs, inputs, |row, out: &mut [u16]| {
                source.halves(row, out);
            }))
        } else {
            Form::Float(transposed(isa, outputs, inputs, |row, out: &mut [f32]| {
                source.floats(row, out);
            }))
        };
        parts.iter().for_each(StoredTensor::release);
        Self { isa, outputs, inputs, form }
    }

    /// The matrix `values` (`[outputs, inputs]` row by row).
    pub fn from_values(values: &[f32], inputs: usize, compute: Compute) -> Self {
        let isa = Isa::current();
        let outputs = values.len() / inputs.max(1);
        let row = |row: usize| &values[row * inputs..(row + 1) * inputs];
        let form = match compute {
            Compute::Exact => {
                Form::Float(transposed(isa, outputs, inputs, |index, out: &mut [f32]| {
                    out.copy_from_slice(row(index));
                }))
            }
            Compute::Int8 => {
                let blocks = pack_blocks(isa, outputs, inputs, Quants::Columns, |index, out| {
                    out.quantise(isa, row(index));
                });
                Form::Blocks { blocks, compute }
            }
        };
        Self { isa, outputs, inputs, form }
    }

    /// The matrix `values` (`[outputs, inputs]` row by row) in the blocks of `dtype`, as a bundle of that type has it; of a
    /// type whose blocks are not kept as [`Self::from_values`].
    pub fn in_blocks(values: &[f32], inputs: usize, dtype: StoredType, compute: Compute) -> Self {
        let quants = match dtype {
            StoredType::Q8_0 if compute == Compute::Exact => Quants::Bytes,
            StoredType::Q4_0 => Quants::Nibbles,
            StoredType::Q4K => Quants::Minima,
            _ => return Self::from_values(values, inputs, compute),
        };
        let (isa, outputs) = (Isa::current(), values.len() / inputs.max(1));
        let mut stored = Vec::new();
        blocks::encode_rows(dtype, inputs, values, &mut stored);
        let row_bytes = stored.len() / outputs.max(1);
        let blocks = pack_blocks(isa, outputs, inputs, quants, |row, out| {
            out.take(dtype, &stored[row * row_bytes..(row + 1) * row_bytes]);
        });
        Self { isa, outputs, inputs, form: Form::Blocks { blocks, compute } }
    }

    /// How it computes.
    pub fn compute(&self) -> Compute {
        match &self.form {
            Form::Blocks { compute, .. } => *compute,
            Form::Float(_) | Form::Half(_) => Compute::Exact,
        }
    }

    /// Rows of the matrix, which are the width of a product with it.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix, which are the width of what it is multiplied with.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Float(values) => values.len() * 4,
            Form::Half(values) => values.len() * 2,
            Form::Blocks { blocks: b, .. } => {
                b.bytes.len() + (b.scales.len() + b.factors.len()) * 2
            }
        }
    }

    /// True when panels are floats in memory.
    pub(super) fn is_float(&self) -> bool {
        matches!(self.form, Form::Float(_))
    }

    pub(super) fn panels(&self) -> Panels {
        let shape = match self.form {
            Form::Blocks { .. } => self.isa.dot_shape(),
            _ => self.isa.float_shape(),
        };
        Panels::new(shape, self.outputs)
    }

    /// As [`Self::panel`], where they lie in memory as floats.
    pub(super) fn floats(&self, index: usize, from: usize, depth: usize) -> Option<&[f32]> {
        match &self.form {
            Form::Float(_) => Some(self.panel(index, from, depth, &mut [])),
            _ => None,
        }
    }

    /// Weights of panel `index` from depth `from` on, `depth` of them (blocks: whole ones), as floats `[k][column]`:
    /// straight from memory, or through `scratch`, which has room for the depth in whole blocks.
    pub(super) fn panel<'a>(
        &'a self,
        index: usize,
        from: usize,
        depth: usize,
        scratch: &'a mut [f32],
    ) -> &'a [f32] {
        let panels = self.panels();
        let columns = panels.columns(index);
        let start = (index * panels.width * self.inputs) + from * columns;
        match &self.form {
            Form::Float(values) => &values[start..start + depth * columns],
            Form::Half(values) => {
                use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
                let scratch = &mut scratch[..depth * columns];
                values[start..start + depth * columns]
                    .reinterpret_cast::<f16>()
                    .convert_to_f32_slice(scratch);
                scratch
            }
            Form::Blocks { blocks: all, .. } => {
                let blocks = depth.div_ceil(BLOCK);
                let b = self.blocks_of(all, index, from / BLOCK, blocks);
                let vectors = columns / panels.lanes;
                self.isa.widen_panel(Widening { blocks, b, vectors, out: scratch });
                scratch
            }
        }
    }

    /// `count` blocks of panel `index` of `all`, from block `from` on, with which a super-block begins.
    pub(super) fn blocks_of<'a>(
        &self,
        all: &'a Blocks,
        index: usize,
        from: usize,
        count: usize,
    ) -> Weights<'a> {
        let (panels, quants) = (self.panels(), all.quants);
        let columns = panels.columns(index);
        let start = index * panels.width * self.inputs.div_ceil(BLOCK) + from * columns;
        let end = start + count * columns;
        let lines = quants.factors(self.inputs.div_ceil(BLOCK));
        let before = if quants == Quants::Minima { quants.factors(from) } else { 0 };
        let factors = index * panels.width * lines + before * columns;
        let last = factors + quants.factors(count) * columns;
        Weights {
            quants,
            bytes: &all.bytes[start * quants.bytes()..end * quants.bytes()],
            scales: all.scales.get(start..end).unwrap_or_default(),
            factors: &all.factors[factors..last],
        }
    }
}

impl Compute {
    /// Name as options and reports write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Int8 => "w8a8",
        }
    }
}

impl std::str::FromStr for Compute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Exact, Self::Int8]
            .into_iter()
            .find(|c| c.name() == text)
            .ok_or_else(|| format!("`{text}` is no way to compute; expected `exact` or `w8a8`"))
    }
}
