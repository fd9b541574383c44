//! Weights in the order in which the tiles read them.
//!
//! A matrix of `N` outputs and `K` inputs is cut into *panels* of as many outputs as a tile has columns. In a panel,
//! depth follows depth, and at each depth the outputs lie side by side. Quantised panels keep a file's blocks of 32
//! depths, each with its scale, so nothing is rounded twice.

use half::f16;

use super::isa::Isa;
use super::pool::pool;
use super::simd::{Aligned, BLOCK, Plain, Quants, Shape, Widening};
use crate::checkpoint::{StoredTensor, StoredType};
use crate::gguf::blocks;

/// How a layer computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Compute {
    /// Weights as they are stored, activations in 32-bit floats.
    #[default]
    #[serde(rename = "exact")]
    Exact,
    /// Weights in 8 bits (or 4, where they are stored so), activations rounded to 8 bits in blocks of 32.
    #[serde(rename = "w8a8")]
    Int8,
}

#[derive(Debug)]
pub(super) enum Form {
    /// `[k][column]` in each panel.
    Float(Aligned<f32>),
    /// The same in half precision.
    Half(Aligned<u16>),
    /// Per block and group of depths, `[column][depth]`; scales `[block][column]`.
    Blocks { quants: Quants, bytes: Aligned<u8>, scales: Aligned<u16>, compute: Compute },
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
    fn new(shape: Shape, outputs: usize) -> Self {
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
    fn all_columns(self) -> usize {
        self.outputs.next_multiple_of(self.lanes)
    }
}

impl Packed {
    /// The matrix of the rows of `parts` one below the other, all `inputs` wide, packed for [`Isa::current`].
    ///
    /// Stored blocks stay as they are, and so does half precision; [`Compute::Int8`] rounds the others to 8-bit
    /// blocks. The pages of the mapped file are given back on the way.
    pub fn new(parts: &[StoredTensor], inputs: usize, compute: Compute) -> Self {
        let isa = Isa::current();
        let outputs = parts.iter().map(|part| part.values() / inputs.max(1)).sum();
        let same = |dtype| parts.iter().all(|part| part.dtype == dtype);
        let source = Source { parts, inputs };
        let form = if same(StoredType::Q8_0) {
            blocks_of(isa, outputs, &source, Quants::Bytes, compute)
        } else if same(StoredType::Q4_0) {
            blocks_of(isa, outputs, &source, Quants::Nibbles, compute)
        } else if compute == Compute::Int8 {
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
                pack_blocks(isa, outputs, inputs, Quants::Bytes, compute, |index, out| {
                    quantise_row(row(index), out);
                })
            }
        };
        Self { isa, outputs, inputs, form }
    }

    /// The same blocks, computed with as `compute` says; other forms have one way only.
    #[must_use]
    pub fn with_compute(mut self, compute: Compute) -> Self {
        if let Form::Blocks { compute: own, .. } = &mut self.form {
            *own = compute;
        }
        self
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
            Form::Blocks { bytes, scales, .. } => bytes.len() + scales.len() * 2,
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
            Form::Blocks { quants, .. } => {
                let blocks = depth.div_ceil(BLOCK);
                let (b, b_scales) = self.blocks(index, from / BLOCK, blocks);
                let vectors = columns / panels.lanes;
                let quants = *quants;
                self.isa.widen_panel(Widening {
                    blocks,
                    quants,
                    b,
                    b_scales,
                    vectors,
                    out: scratch,
                });
                scratch
            }
        }
    }

    /// `count` blocks of panel `index` from block `from` on, with their scales; nothing for other forms.
    pub(super) fn blocks(&self, index: usize, from: usize, count: usize) -> (&[u8], &[u16]) {
        let Form::Blocks { quants, bytes, scales, .. } = &self.form else { return (&[], &[]) };
        let panels = self.panels();
        let columns = panels.columns(index);
        let start = index * panels.width * self.inputs.div_ceil(BLOCK) + from * columns;
        let end = start + count * columns;
        (&bytes[start * quants.bytes()..end * quants.bytes()], &scales[start..end])
    }
}

/// Rows of stored matrices, one below the other.
struct Source<'a> {
    parts: &'a [StoredTensor],
    inputs: usize,
}

impl Source<'_> {
    fn find(&self, mut row: usize) -> Option<(&StoredTensor, usize)> {
        for part in self.parts {
            let rows = part.values() / self.inputs.max(1);
            if row < rows {
                return Some((part, row));
            }
            row -= rows;
        }
        None
    }

    fn bytes(&self, row: usize) -> Option<(StoredType, &[u8])> {
        let (part, row) = self.find(row)?;
        let width = part.dtype.bytes(&[self.inputs])?;
        Some((part.dtype, &part.bytes()[row * width..(row + 1) * width]))
    }

    fn floats(&self, row: usize, out: &mut [f32]) {
        if let Some((dtype, bytes)) = self.bytes(row) {
            blocks::decode(dtype, bytes, out);
        }
    }

    fn halves(&self, row: usize, out: &mut [u16]) {
        if let Some((_, bytes)) = self.bytes(row) {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = u16::from_le_bytes([b[0], b[1]]);
            }
        }
    }
}

/// Panels `[k][column]` of the rows that `read` gives.
fn transposed<T: Plain + Default + Send>(
    isa: Isa,
    outputs: usize,
    inputs: usize,
    read: impl Fn(usize, &mut [T]) + Sync,
) -> Aligned<T> {
    let panels = Panels::new(isa.float_shape(), outputs);
    let mut values = Aligned::zeros(panels.all_columns() * inputs);
    pool().chunks(&mut values, panels.width * inputs, |index, panel| {
        let columns = panels.columns(index);
        let mut row = vec![T::default(); inputs];
        for (column, output) in panels.outputs(index).enumerate() {
            read(output, &mut row);
            for (to, value) in panel[column..].iter_mut().step_by(columns).zip(&row) {
                *to = *value;
            }
        }
    });
    values
}

/// A row's blocks: values without sign, and the scale's bits.
type RowBlock = ([u8; BLOCK], u16);

fn blocks_of(
    isa: Isa,
    outputs: usize,
    source: &Source<'_>,
    quants: Quants,
    compute: Compute,
) -> Form {
    pack_blocks(isa, outputs, source.inputs, quants, compute, |row, out| match source.bytes(row) {
        Some((StoredType::Q8_0, bytes)) => {
            for (block, b) in out.iter_mut().zip(bytes.chunks_exact(blocks::Q8_0_BYTES)) {
                let values = block.0.iter_mut().zip(&b[2..]);
                values.for_each(|(value, q)| *value = q ^ 0x80);
                block.1 = u16::from_le_bytes([b[0], b[1]]);
            }
        }
        Some((StoredType::Q4_0, bytes)) => {
            for (block, b) in out.iter_mut().zip(bytes.chunks_exact(blocks::Q4_0_BYTES)) {
                let (low, high) = block.0.split_at_mut(BLOCK / 2);
                for ((low, high), q) in low.iter_mut().zip(high).zip(&b[2..]) {
                    (*low, *high) = (q & 15, q >> 4);
                }
                block.1 = u16::from_le_bytes([b[0], b[1]]);
            }
        }
        _ => {
            let mut row_values = vec![0.0; source.inputs];
            source.floats(row, &mut row_values);
            quantise_row(&row_values, out);
        }
    })
}

/// A row of floats as 8-bit blocks; the last one is filled up with zeros.
fn quantise_row(values: &[f32], out: &mut [RowBlock]) {
    for (block, x) in out.iter_mut().zip(values.chunks(BLOCK)) {
        // What is no number has to reach the scale.
        let larger = |m: f32, v: &f32| if v.abs() > m || v.is_nan() { v.abs() } else { m };
        let largest = x.iter().fold(0f32, larger);
        let scale = f16::from_f32(largest / 127.0);
        // By the scale as it is stored, so that rounding it is not a second error.
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        block.0 = [128; BLOCK];
        for (value, v) in block.0.iter_mut().zip(x) {
            *value = ((v * inverse).round() as i8).max(-127) as u8 ^ 0x80;
        }
        block.1 = scale.to_bits();
    }
}

fn pack_blocks(
    isa: Isa,
    outputs: usize,
    inputs: usize,
    quants: Quants,
    compute: Compute,
    read: impl Fn(usize, &mut [RowBlock]) + Sync,
) -> Form {
    let panels = Panels::new(isa.dot_shape(), outputs);
    let (depth_blocks, group) = (inputs.div_ceil(BLOCK), isa.group());
    let mut bytes = Aligned::<u8>::zeros(panels.all_columns() * depth_blocks * quants.bytes());
    let mut scales = Aligned::<u16>::zeros(panels.all_columns() * depth_blocks);
    let panel_blocks = panels.width * depth_blocks;
    let parts = bytes.chunks_mut((panel_blocks * quants.bytes()).max(1));
    let mut parts: Vec<_> = parts.zip(scales.chunks_mut(panel_blocks.max(1))).collect();
    pool().chunks(&mut parts, 1, |index, parts| {
        let columns = panels.columns(index);
        let mut row = vec![([0; BLOCK], 0); depth_blocks];
        for (bytes, scales) in parts {
            for (column, output) in panels.outputs(index).enumerate() {
                read(output, &mut row);
                for (block, (values, scale)) in row.iter().enumerate() {
                    let line = &mut bytes[block * quants.bytes() * columns..];
                    place(values, quants, group, columns, column, line);
                    scales[block * columns + column] = *scale;
                }
            }
        }
    });
    Form::Blocks { quants, bytes, scales, compute }
}

/// Puts one block of one column where the tiles look for it.
fn place(
    values: &[u8; BLOCK],
    quants: Quants,
    group: usize,
    columns: usize,
    column: usize,
    block: &mut [u8],
) {
    for (index, depths) in values.chunks_exact(group).enumerate() {
        let (line, shift) = match quants {
            Quants::Bytes => (index, 0),
            // Two groups share their bytes.
            Quants::Nibbles => (index / 2, index % 2 * 4),
        };
        let start = (line * columns + column) * group;
        for (to, value) in block[start..start + group].iter_mut().zip(depths) {
            *to |= value << shift;
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
