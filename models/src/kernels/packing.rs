//! Putting weights in the order of the panels: rows of a file's tensors, or of floats, each become a column.

use half::f16;

use super::isa::Isa;
use super::packed::{Blocks, Compute, Form, Panels};
use super::pool::pool;
use super::simd::{Aligned, BLOCK, Plain, Quants, SUPER_BLOCK, SUPER_BLOCKS};
use crate::checkpoint::{StoredTensor, StoredType};
use crate::gguf::blocks;
use crate::gguf::k_blocks::{self, Head};

/// Rows of stored matrices, one below the other.
pub(super) struct Source<'a> {
    pub parts: &'a [StoredTensor],
    pub inputs: usize,
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
        let width = part.dtype.row_bytes(self.inputs)?;
        Some((part.dtype, &part.bytes()[row * width..(row + 1) * width]))
    }

    pub fn floats(&self, row: usize, out: &mut [f32]) {
        if let Some((dtype, bytes)) = self.bytes(row) {
            blocks::decode(dtype, bytes, out);
        }
    }

    pub fn halves(&self, row: usize, out: &mut [u16]) {
        if let Some((_, bytes)) = self.bytes(row) {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = u16::from_le_bytes([b[0], b[1]]);
            }
        }
    }
}

/// Panels `[k][column]` of the rows that `read` gives.
pub(super) fn transposed<T: Plain + Default + Send>(
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

/// Values of a block without their sign, and what [`Quants`] says of its scale.
type RowBlock = ([u8; BLOCK], u16);

/// A row on its way to its column.
#[derive(Default)]
pub(super) struct Row {
    pub blocks: Vec<RowBlock>,
    /// Two for each super-block.
    pub factors: Vec<[u16; 2]>,
}

impl Row {
    /// Takes the blocks of a stored row as they are; false when `dtype` has none.
    pub fn take(&mut self, dtype: StoredType, bytes: &[u8]) -> bool {
        match dtype {
            StoredType::Q8_0 => {
                let stored = bytes.chunks_exact(blocks::Q8_0_BYTES);
                for (block, b) in self.blocks.iter_mut().zip(stored) {
                    let values = block.0.iter_mut().zip(&b[2..]);
                    values.for_each(|(value, q)| *value = q ^ 0x80);
                    block.1 = u16::from_le_bytes([b[0], b[1]]);
                }
            }
            StoredType::Q4_0 => {
                let stored = bytes.chunks_exact(blocks::Q4_0_BYTES);
                for (block, b) in self.blocks.iter_mut().zip(stored) {
                    let (low, high) = block.0.split_at_mut(BLOCK / 2);
                    for ((low, high), q) in low.iter_mut().zip(high).zip(&b[2..]) {
                        (*low, *high) = (q & 15, q >> 4);
                    }
                    block.1 = u16::from_le_bytes([b[0], b[1]]);
                }
            }
            StoredType::Q4K => {
                let supers = self.blocks.chunks_mut(SUPER_BLOCKS).zip(&mut self.factors);
                for ((row, factors), b) in supers.zip(bytes.chunks_exact(blocks::Q4_K_BYTES)) {
                    let head = Head::read(b);
                    *factors = [head.d, head.dmin];
                    for (index, (block, (scale, min))) in
                        row.iter_mut().zip(head.blocks).enumerate()
                    {
                        *block = (k_blocks::nibbles(b, index), u16::from_le_bytes([scale, min]));
                    }
                }
            }
            StoredType::F32 | StoredType::F16 | StoredType::Bf16 => return false,
        }
        true
    }
}

/// The rows of `source`, which all have `quants` or are rounded to [`Quants::Bytes`].
pub(super) fn blocks_of(
    isa: Isa,
    outputs: usize,
    source: &Source<'_>,
    quants: Quants,
    compute: Compute,
) -> Form {
    let blocks = pack_blocks(isa, outputs, source.inputs, quants, |row, out| {
        let stored = source.bytes(row);
        let taken = |(dtype, bytes): (StoredType, &[u8])| match dtype {
            // Four bits among rows of other types are rounded like these.
            StoredType::Q4_0 if quants != Quants::Nibbles => false,
            StoredType::Q4K if quants != Quants::Minima => false,
            dtype => out.take(dtype, bytes),
        };
        if !stored.is_some_and(taken) {
            let mut values = vec![0.0; source.inputs];
            source.floats(row, &mut values);
            quantise_row(&values, &mut out.blocks);
        }
    });
    Form::Blocks { blocks, compute }
}

/// A row of floats as 8-bit blocks; the last one is filled up with zeros.
pub(super) fn quantise_row(values: &[f32], out: &mut [RowBlock]) {
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

pub(super) fn pack_blocks(
    isa: Isa,
    outputs: usize,
    inputs: usize,
    quants: Quants,
    read: impl Fn(usize, &mut Row) + Sync,
) -> Blocks {
    let panels = Panels::new(isa.dot_shape(), outputs);
    let (depth_blocks, group) = (inputs.div_ceil(BLOCK), isa.group());
    let supers = if quants == Quants::Minima { inputs.div_ceil(SUPER_BLOCK) } else { 0 };
    let mut bytes = Aligned::<u8>::zeros(panels.all_columns() * depth_blocks * quants.bytes());
    let mut scales = Aligned::<u16>::zeros(panels.all_columns() * depth_blocks);
    let mut factors = Aligned::<u16>::zeros(panels.all_columns() * supers * 2);
    let panel_blocks = panels.width * depth_blocks;
    let mut all_factors = factors.chunks_mut((panels.width * supers * 2).max(1));
    let parts = bytes.chunks_mut((panel_blocks * quants.bytes()).max(1));
    let mut parts: Vec<_> = parts
        .zip(scales.chunks_mut(panel_blocks.max(1)))
        .map(|(bytes, scales)| (bytes, scales, all_factors.next().unwrap_or_default()))
        .collect();
    pool().chunks(&mut parts, 1, |index, parts| {
        let columns = panels.columns(index);
        let mut row =
            Row { blocks: vec![([0; BLOCK], 0); depth_blocks], factors: vec![[0; 2]; supers] };
        for (bytes, scales, factors) in parts {
            for (column, output) in panels.outputs(index).enumerate() {
                read(output, &mut row);
                for (block, (values, scale)) in row.blocks.iter().enumerate() {
                    let line = &mut bytes[block * quants.bytes() * columns..];
                    place(values, quants, group, columns, column, line);
                    scales[block * columns + column] = *scale;
                }
                for (line, [d, dmin]) in factors.chunks_exact_mut(2 * columns).zip(&row.factors) {
                    (line[column], line[columns + column]) = (*d, *dmin);
                }
            }
        }
    });
    Blocks { quants, bytes, scales, factors }
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
            Quants::Nibbles | Quants::Minima => (index / 2, index % 2 * 4),
        };
        let start = (line * columns + column) * group;
        for (to, value) in block[start..start + group].iter_mut().zip(depths) {
            *to |= value << shift;
        }
    }
}
