//! Tensors as they lie in a file, under the names that the model's code uses.
//!
//! Checkpoint and bundle differ in their header only: both give a [`TensorStore`], and the model is
//! built from it by one code path. Names are shortened on the way in
//! ([`crate::families::Family::short_name`]).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::map::MappedFile;
use crate::ModelError;
use crate::families::{Family, Keep};
use crate::gguf::{blocks, hex};
use crate::kernels::{Compute, Matrix};

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub enum StoredType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    #[serde(rename = "BF16")]
    Bf16,
    /// Blocks of 32 8-bit values with one half-precision scale.
    #[serde(rename = "Q8_0")]
    Q8_0,
    /// Blocks of 32 4-bit values with one half-precision scale.
    #[serde(rename = "Q4_0")]
    Q4_0,
    /// Blocks of 256 4-bit values, a 6-bit scale and minimum for every 32 of them.
    #[serde(rename = "Q4_K")]
    Q4K,
}

impl StoredType {
    /// Name as GGUF and safetensors write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4K => "Q4_K",
        }
    }

    /// Values in one block.
    pub fn block_values(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => blocks::BLOCK,
            Self::Q4K => blocks::SUPER_BLOCK,
            _ => 1,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => blocks::Q8_0_BYTES,
            Self::Q4_0 => blocks::Q4_0_BYTES,
            Self::Q4K => blocks::Q4_K_BYTES,
        }
    }

    /// Values that a row of `width` takes in a file: blocks are whole, what lacks to the last one is zero.
    pub fn filled(self, width: usize) -> Option<usize> {
        width.checked_next_multiple_of(self.block_values())
    }

    /// Values in a row of a tensor of `shape` (its innermost dimension), and how many a row takes in a file.
    pub fn widths(self, shape: &[usize]) -> (usize, usize) {
        let width = shape.last().copied().unwrap_or(1);
        (width, self.filled(width).unwrap_or(width))
    }

    /// Bytes of a row of `width` values.
    pub fn row_bytes(self, width: usize) -> Option<usize> {
        width.div_ceil(self.block_values()).checked_mul(self.block_bytes())
    }

    /// Bytes that a tensor of `shape` takes, row by row; `None` when that overflows.
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (width, outer) = shape.split_last().map_or((1, shape), |(w, outer)| (*w, outer));
        let rows = outer.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        // That the values can be counted, too, is what everything else relies on.
        rows.checked_mul(self.filled(width)?)?;
        rows.checked_mul(self.row_bytes(width)?)
    }
}

/// One tensor in a mapped file.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// The name in the file.
    pub name: String,
    /// How it is stored.
    pub dtype: StoredType,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    range: Range<usize>,
    file: Arc<MappedFile>,
}

impl StoredTensor {
    /// A tensor whose bytes are `range` of `file`; `None` when they do not fit its shape or the file.
    pub(crate) fn new(
        name: String,
        dtype: StoredType,
        shape: Vec<usize>,
        range: Range<usize>,
        file: Arc<MappedFile>,
    ) -> Option<Self> {
        let fits = range.start <= range.end
            && range.end <= file.bytes().len()
            && dtype.bytes(&shape) == Some(range.end - range.start);
        fits.then_some(Self { name, dtype, shape, range, file })
    }

    /// The same with rows of `width` values, of which the stored ones are filled up to whole blocks; `None` when they are
    /// not, or it is no matrix.
    pub(crate) fn narrowed(&self, width: usize) -> Option<Self> {
        let &[rows, filled] = self.shape.as_slice() else { return None };
        let fits = self.dtype.filled(width) == Some(filled);
        fits.then(|| Self { shape: vec![rows, width], ..self.clone() })
    }

    /// Its bytes, straight from the mapped file.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Values in a row (the innermost dimension), and how many a row takes in the file.
    pub fn widths(&self) -> (usize, usize) {
        self.dtype.widths(&self.shape)
    }

    /// Its values as 32-bit floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.values()];
        blocks::decode_rows(self.dtype, self.widths().0, self.bytes(), &mut out);
        out
    }

    /// Rows `indices` (of the outermost of two dimensions), widened: `[rows, width]`.
    ///
    /// # Errors
    /// When it is no matrix, or a row is past its end.
    pub fn rows(&self, indices: &[u32]) -> candle_core::Result<Matrix> {
        let &[count, width] = self.shape.as_slice() else {
            candle_core::bail!(
                "tensor `{}` has shape {:?}, not two dimensions",
                self.name,
                self.shape
            );
        };
        let mut out = Matrix::unwritten(indices.len(), width);
        for (row, index) in out.values_mut().chunks_exact_mut(width.max(1)).zip(indices) {
            let index = *index as usize;
            let Some(bytes) = self.row_bytes(index..index + 1) else {
                candle_core::bail!(
                    "row {index} is not among the {count} of tensor `{}`",
                    self.name
                );
            };
            blocks::decode(self.dtype, bytes, row);
        }
        Ok(out)
    }

    /// Bytes of rows `rows`; `None` when there are not so many.
    pub(crate) fn row_bytes(&self, rows: Range<usize>) -> Option<&[u8]> {
        let bytes = self.dtype.row_bytes(self.widths().0)?;
        self.bytes().get(rows.start.checked_mul(bytes)?..rows.end.checked_mul(bytes)?)
    }

    /// Appends the values of `range` as 32-bit floats; it must begin and end with a row.
    pub(crate) fn read(&self, range: Range<usize>, out: &mut Vec<f32>) {
        let (start, width) = (out.len(), self.widths().0.max(1));
        out.resize(start + range.len(), 0.0);
        let bytes = self.row_bytes(range.start / width..range.end / width).unwrap_or_default();
        blocks::decode_rows(self.dtype, width, bytes, &mut out[start..]);
    }

    /// `count` rows from `start` on, as a tensor of their own; `None` when it has no such rows.
    pub(crate) fn part(&self, start: usize, count: usize) -> Option<Self> {
        let (rows, rest) = self.shape.split_first()?;
        let end = start.checked_add(count).filter(|end| end <= rows)?;
        let row_bytes = self.dtype.bytes(rest)?;
        let at = |row: usize| self.range.start + row * row_bytes;
        let shape = std::iter::once(count).chain(rest.iter().copied()).collect();
        let range = at(start)..at(end);
        Self::new(self.name.clone(), self.dtype, shape, range, self.file.clone())
    }

    /// Lets the kernel take back its pages.
    pub(crate) fn release(&self) {
        self.file.release(self.range.clone());
    }
}

/// All tensors of one weights file.
#[derive(Debug, Clone)]
pub struct TensorStore {
    path: PathBuf,
    entries: BTreeMap<String, StoredTensor>,
    /// Whose names a checkpoint's file has; none: ours.
    family: Option<&'static Family>,
    compute: Compute,
    /// Layers that stay exact whatever `compute` says.
    keep: fn(&str) -> Keep,
    /// The only group of layers that `compute` is for; none: all.
    only: Option<String>,
}

/// The group of layers that tensor `name` belongs to: a numbered layer of a stack, or what stands alone.
pub(crate) fn layer_group(name: &str) -> &str {
    let mut end = 0;
    for part in name.split('.') {
        end += part.len();
        if part.bytes().all(|b| b.is_ascii_digit()) {
            return &name[..end];
        }
        end += 1;
    }
    name.rsplit_once('.').map_or(name, |(layer, _)| layer)
}

impl TensorStore {
    /// An empty store of a checkpoint's file, which has the names of `family`, or of a bundle.
    pub(crate) fn new(path: &Path, family: Option<&'static Family>) -> Self {
        let (path, entries) = (path.to_owned(), BTreeMap::new());
        Self { path, entries, family, compute: Compute::Exact, keep: |_| None, only: None }
    }

    pub(crate) fn insert(&mut self, name: String, tensor: StoredTensor) -> Option<StoredTensor> {
        self.entries.insert(name, tensor)
    }

    /// The same tensors, each under the name that `rename` gives it.
    pub(crate) fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        let entries = self.entries.iter().map(|(name, tensor)| (rename(name), tensor.clone()));
        Self { entries: entries.collect(), ..self.clone() }
    }

    /// Lets layers compute as `compute` says from now on, but for those that `keep` keeps in 32-bit floats.
    pub(crate) fn set_compute(&mut self, compute: Compute, keep: fn(&str) -> Keep) {
        (self.compute, self.keep) = (compute, keep);
    }

    /// As they are, but the layers of `group` as those of `other`, and only these computing as `compute` says.
    pub(crate) fn with_group(&self, group: &str, other: &Self, compute: Compute) -> Self {
        let mut mixed = self.clone();
        for (name, tensor) in other.entries.iter().filter(|(name, _)| layer_group(name) == group) {
            mixed.entries.insert(name.clone(), tensor.clone());
        }
        (mixed.compute, mixed.keep, mixed.only) = (compute, other.keep, Some(group.to_owned()));
        mixed
    }

    /// How the layer `name` computes.
    pub(crate) fn compute(&self, name: &str) -> Compute {
        if self.only.as_ref().is_some_and(|group| layer_group(&format!("{name}.weight")) != group) {
            return Compute::Exact;
        }
        // Half precision is how a bundle stores what it cannot cut into blocks; that says nothing of errors.
        match (self.keep)(&format!("{name}.weight")) {
            Some((StoredType::F32, _)) => Compute::Exact,
            _ => self.compute,
        }
    }

    /// The weights file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors by the runtime's names, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.entries.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// SHA-256 over the names, types and bytes of all tensors.
    pub fn sha256(&self) -> String {
        let mut all = Sha256::new();
        for (name, tensor) in &self.entries {
            all.update(name);
            all.update(tensor.dtype.name());
            all.update(tensor.bytes());
        }
        hex(&all.finalize())
    }

    /// Tensor `name` of shape `expected`.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`], [`ModelError::TensorShape`].
    pub fn get(&self, name: &str, expected: &[usize]) -> Result<&StoredTensor, ModelError> {
        let tensor = self.find(name)?;
        // A bundle stores convolutions as the matrices they are used as.
        let flat = [expected[0], expected.iter().skip(1).product()];
        if tensor.shape == expected || (expected.len() == 4 && tensor.shape == flat) {
            Ok(tensor)
        } else {
            Err(ModelError::TensorShape {
                path: self.path.clone(),
                tensor: tensor.name.clone(),
                found: tensor.shape.clone(),
                expected: expected.to_vec(),
            })
        }
    }

    /// Tensor `name`, whatever its shape.
    ///
    /// # Errors
    /// [`ModelError::TensorMissing`].
    pub fn find(&self, name: &str) -> Result<&StoredTensor, ModelError> {
        self.entries.get(name).ok_or_else(|| ModelError::TensorMissing {
            path: self.path.clone(),
            tensor: self.family.map_or_else(|| name.to_owned(), |f| f.long_name(name)),
        })
    }

    /// Vector `name` of `width` values, widened.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.get(name, &[width])?;
        let values = tensor.to_f32();
        tensor.release();
        Ok(values)
    }

    /// Tensor `name` of shape `expected`, widened, as rows of its last dimension.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn matrix(&self, name: &str, expected: &[usize]) -> Result<Matrix, ModelError> {
        let tensor = self.get(name, expected)?;
        let values = tensor.to_f32();
        tensor.release();
        let (width, rows) = expected.split_last().map_or((1, &[][..]), |(w, rows)| (*w, rows));
        Ok(Matrix::new(&values, (rows.iter().product(), width))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_belong_to_numbered_layers_or_stand_alone() {
        let groups = [
            ("vision.layers.3.mlp.fc1.weight", "vision.layers.3"),
            ("unet.down_modules.0.1.conv1.block.0.weight", "unet.down_modules.0"),
            ("connector.weight", "connector"),
            ("text.embed", "text"),
            ("alone", "alone"),
        ];
        for (name, group) in groups {
            assert_eq!(layer_group(name), group);
        }
    }

    #[test]
    fn sizes_that_overflow_have_no_bytes() {
        assert_eq!(StoredType::F32.bytes(&[usize::MAX, 2]), None);
        assert_eq!(StoredType::Q4K.bytes(&[2, usize::MAX]), None);
        assert_eq!(StoredType::Q8_0.bytes(&[usize::MAX / 32, 33]), None);
        assert_eq!(StoredType::Q8_0.bytes(&[2, 64]), Some(4 * 34));
        assert_eq!(StoredType::Q8_0.bytes(&[2, 65]), Some(6 * 34), "rows end with whole blocks");
        assert_eq!(StoredType::Q4K.bytes(&[3, 720]), Some(9 * 144));
    }
}
