//! Putting weights in the order of the panels: rows of a file's tensors, or of floats, each become a column.

use half::f16;

use super::isa::Isa;
use super::packed::{Blocks, Compute, Form, Panels};
use super::pool::pool;
use super::simd::{Aligned, BLOCK, Loop, Plain, Quants, SUPER_BLOCKS};
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
    /// One for each line.
    pub factors: Vec<u16>,
}

impl Row {
    /// Rounds `values` to 8 bits with one scale; blocks are filled up with zeros.
    pub fn quantise(&mut self, isa: Isa, values: &[f32]) {
        let scale = isa.run(Quantise { values, blocks: &mut self.blocks });
        self.factors.fill(scale.to_bits());
    }

    /// Takes the blocks of a stored row as they are; nothing when `dtype` has none.
    pub fn take(&mut self, dtype: StoredType, bytes: &[u8]) {
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
                let factors = self.factors.chunks_exact_mut(2);
                let supers = self.blocks.chunks_mut(SUPER_BLOCKS).zip(factors);
                for ((row, factors), b) in supers.zip(bytes.chunks_exact(blocks::Q4_K_BYTES)) {
                    let head = Head::read(b);
                    factors.copy_from_slice(&[head.d, head.dmin]);
                    for (index, (block, (scale, min))) in
                        row.iter_mut().zip(head.blocks).enumerate()
                    {
                        *block = (k_blocks::nibbles(b, index), u16::from_le_bytes([scale, min]));
                    }
                }
            }
            StoredType::F32 | StoredType::F16 | StoredType::Bf16 => {}
        }
    }
}

/// A row on its way to 8 bits; gives their scale.
struct Quantise<'a> {
    values: &'a [f32],
    blocks: &'a mut [RowBlock],
}

impl Loop for Quantise<'_> {
    type Output = f16;

    #[inline(always)]
    fn run(self) -> f16 {
        // As whole numbers, the bits of magnitudes rise with them, and what is no number is above all: it has to reach
        // the scale.
        let largest = self.values.iter().fold(0u32, |most, v| most.max(v.to_bits() & 0x7fff_ffff));
        let scale = f16::from_f32(f32::from_bits(largest) / 127.0);
        // By the scale as it is stored, so that rounding it is not a second error.
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        for ((to, _), values) in self.blocks.iter_mut().zip(self.values.chunks(BLOCK)) {
            let mut x = [0.0; BLOCK];
            x[..values.len()].copy_from_slice(values);
            for (to, x) in to.iter_mut().zip(x) {
                // 1.5 · 2^23: adding it rounds to the nearest integer and leaves that in the low bits.
                let q = ((x * inverse).clamp(-127.0, 127.0) + 12_582_912.0).to_bits();
                *to = q as u8 ^ 0x80;
            }
        }
        scale
    }
}

/// The rows of `source`, which all are stored as `quants`, or rounded to [`Quants::Columns`].
pub(super) fn blocks_of(
    isa: Isa,
    outputs: usize,
    source: &Source<'_>,
    quants: Quants,
    compute: Compute,
) -> Form {
    let blocks = pack_blocks(isa, outputs, source.inputs, quants, |row, out| {
        if quants == Quants::Columns {
            let mut values = vec![0.0; source.inputs];
            source.floats(row, &mut values);
            out.quantise(isa, &values);
        } else if let Some((dtype, bytes)) = source.bytes(row) {
            out.take(dtype, bytes);
        }
    });
    Form::Blocks { blocks, compute }
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
    // Of each, what a column has.
    let numbers = depth_blocks * quants.bytes();
    let own = if quants == Quants::Columns { 0 } else { depth_blocks };
    let lines = quants.factors(depth_blocks);
    let mut bytes = Aligned::<u8>::zeros(panels.all_columns() * numbers);
    let mut scales = Aligned::<u16>::zeros(panels.all_columns() * own);
    let mut factors = Aligned::<u16>::zeros(panels.all_columns() * lines);
    let mut all_scales = scales.chunks_mut((panels.width * own).max(1));
    let mut all_factors = factors.chunks_mut((panels.width * lines).max(1));
    let mut parts: Vec<_> = bytes
        .chunks_mut((panels.width * numbers).max(1))
        .map(|bytes| {
            let scales = all_scales.next().unwrap_or_default();
            (bytes, scales, all_factors.next().unwrap_or_default())
        })
        .collect();
    pool().chunks(&mut parts, 1, |index, parts| {
        let columns = panels.columns(index);
        let mut row = Row { blocks: vec![([0; BLOCK], 0); depth_blocks], factors: vec![0; lines] };
        for (bytes, scales, factors) in parts {
            for (column, output) in panels.outputs(index).enumerate() {
                read(output, &mut row);
                for (block, (values, scale)) in row.blocks.iter().enumerate() {
                    let line = &mut bytes[block * quants.bytes() * columns..];
                    place(values, quants, group, columns, column, line);
                    if let Some(to) = scales.get_mut(block * columns + column) {
                        *to = *scale;
                    }
                }
                for (line, factor) in factors.chunks_exact_mut(columns).zip(&row.factors) {
                    line[column] = *factor;
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
            Quants::Bytes | Quants::Columns => (index, 0),
            // Two groups share their bytes.
            Quants::Nibbles | Quants::Minima => (index / 2, index % 2 * 4),
        };
        let start = (line * columns + column) * group;
        for (to, value) in block[start..start + group].iter_mut().zip(depths) {
            *to |= value << shift;
        }
    }
}
