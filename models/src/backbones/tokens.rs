//! A table with one row a token: looked up on the way in, multiplied on the way out.

use std::ops::Range;

use candle_core::{Device, Result, Tensor, bail};

use crate::ModelError;
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::gguf::blocks;

/// Rows that are widened at a time when the table is multiplied (values).
const SLICE: usize = 1 << 22;

/// A table `[V, D]`, read from the mapped file row by row and never widened as a whole.
pub struct TokenTable {
    stored: StoredTensor,
    width: usize,
}

impl TokenTable {
    /// Tensor `name` with rows of `width` values, as many as it has.
    ///
    /// # Errors
    /// [`ModelError`] when it is missing or has another shape.
    pub fn load(
        store: &TensorStore,
        name: &str,
        width: usize,
    ) -> std::result::Result<Self, ModelError> {
        let rows = store.find(name)?.shape.first().copied().unwrap_or(0);
        let stored = store.get(name, &[rows, width])?.clone();
        Ok(Self { stored, width })
    }

    /// Number of tokens `V`.
    pub fn tokens(&self) -> usize {
        self.stored.shape[0]
    }

    fn bytes(&self, rows: Range<usize>) -> Result<&[u8]> {
        match self.stored.row_bytes(rows.clone()) {
            Some(bytes) => Ok(bytes),
            None => bail!("token {} is not among the table's {}", rows.end - 1, self.tokens()),
        }
    }

    /// The rows of `ids`: `[ids, D]`.
    ///
    /// # Errors
    /// When a token is not in the table.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        self.stored.rows(ids)
    }

    /// The products of `h` (`[L, D]`) with the rows of tokens `range`: `[L, range]`.
    ///
    /// # Errors
    /// When a token is not in the table, or `h` has another width.
    pub fn logits(&self, h: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let step = (SLICE / self.width).max(1);
        let mut parts = Vec::with_capacity(range.len().div_ceil(step));
        for start in range.clone().step_by(step) {
            let rows = start..range.end.min(start + step);
            let mut values = vec![0.0; rows.len() * self.width];
            let bytes = self.bytes(rows.clone())?;
            blocks::decode_rows(self.stored.dtype, self.width, bytes, &mut values);
            let table = Tensor::from_vec(values, (rows.len(), self.width), &Device::Cpu)?;
            parts.push(h.matmul(&table.t()?)?);
        }
        Tensor::cat(&parts, 1)
    }
}
