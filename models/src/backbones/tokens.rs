//! A table with one row a token: looked up on the way in, multiplied on the way out.

use std::ops::Range;

use candle_core::{Result, bail};

use crate::ModelError;
use crate::checkpoint::{StoredTensor, TensorStore};
use crate::gguf::blocks;
use crate::kernels::pool::pool;
use crate::kernels::simd::Loop;
use crate::kernels::{Isa, Matrix};

/// Values of the table that a thread multiplies at a time, about.
const SLICE: usize = 1 << 16;

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
    pub fn rows(&self, ids: &[u32]) -> Result<Matrix> {
        self.stored.rows(ids)
    }

    /// The products of `h` (`[L, D]`) with the rows of tokens `range`: `[L, range]`.
    ///
    /// # Errors
    /// When a token is not in the table, or `h` has another width.
    pub fn logits(&self, h: &Matrix, range: Range<usize>) -> Result<Matrix> {
        if h.width() != self.width {
            bail!("a token table of width {} met rows of {}", self.width, h.width());
        }
        let (isa, dtype, bytes) = (Isa::current(), self.stored.dtype, self.bytes(range.clone())?);
        let row_bytes = bytes.len().checked_div(range.len()).unwrap_or(0).max(1);
        let (each, together) = (h.rows().max(1), (SLICE / self.width.max(1)).max(1));
        // Token by token, so that a row is widened once and by one thread, for all rows of `h`.
        let mut products = Matrix::unwritten(range.len(), h.rows());
        pool().chunks(products.values_mut(), together * each, |index, products| {
            let mut row = Matrix::unwritten(1, self.width);
            let tokens = bytes.chunks_exact(row_bytes).skip(index * together);
            for (out, bytes) in products.chunks_exact_mut(each).zip(tokens) {
                blocks::decode(dtype, bytes, row.values_mut());
                isa.run(Multiply { row: row.values(), h: h.values(), out });
            }
        });
        match h.rows() {
            1 => products.reshaped(1, range.len()),
            _ => Ok(products.transposed()),
        }
    }
}

/// A row of the table, with each row of `h`.
struct Multiply<'a> {
    row: &'a [f32],
    h: &'a [f32],
    out: &'a mut [f32],
}

impl Loop for Multiply<'_> {
    type Output = ();

    /// In sixteen lanes, so that it runs in vectors.
    #[inline(always)]
    fn run(self) {
        const LANES: usize = 16;
        for (out, h) in self.out.iter_mut().zip(self.h.chunks_exact(self.row.len())) {
            let mut lanes = [0f32; LANES];
            let (h, row) = (h.chunks_exact(LANES), self.row.chunks_exact(LANES));
            let product = |(h, row): (&f32, &f32)| h * row;
            let rest: f32 = h.remainder().iter().zip(row.remainder()).map(product).sum();
            for (h, row) in h.zip(row) {
                lanes.iter_mut().zip(h.iter().zip(row)).for_each(|(l, pair)| *l += product(pair));
            }
            *out = lanes.iter().sum::<f32>() + rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::checkpoint::StoredType;
    use crate::checkpoint::map::MappedFile;

    #[test]
    fn logits_are_the_products_with_the_rows() {
        // Rows that end in a part of a block, and more of them than a thread takes at a time.
        let (tokens, width) = (3 * SLICE / 1000, 1000);
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 504.0 - 1.0;
        let values: Vec<f32> = (0..tokens * width).map(value).collect();
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        for dtype in [StoredType::F32, StoredType::F16, StoredType::Q8_0] {
            let mut bytes = Vec::new();
            match dtype {
                StoredType::Q8_0 => blocks::encode_rows(dtype, width, &values, &mut bytes),
                _ => blocks::encode(dtype, &values, &mut bytes),
            }
            std::fs::write(file.path(), &bytes).expect("there is room");
            let map = Arc::new(MappedFile::open(file.path()).expect("it was written"));
            let shape = vec![tokens, width];
            let stored = StoredTensor::new("table".into(), dtype, shape, 0..bytes.len(), map);
            let table = TokenTable { stored: stored.expect("it is whole"), width };
            for rows in [1, 3] {
                let h: Vec<f32> = (0..rows * width).map(|i| value(i + 13)).collect();
                let h = Matrix::new(&h, (rows, width)).expect("so many");
                let range = 5..tokens - 2;
                let ids: Vec<u32> = range.clone().map(|t| t as u32).collect();
                let known = table.rows(&ids).and_then(|t| t.to_tensor()).expect("all are there");
                let expected = h.to_tensor().and_then(|h| h.matmul(&known.t()?));
                let expected = expected.and_then(|e| Matrix::of_tensor(&e)).expect("they fit");
                let found = table.logits(&h, range).expect("all are there");
                assert_eq!(found.dims(), expected.dims());
                let mut pairs = found.values().iter().zip(expected.values());
                assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-3), "{dtype:?} {rows}");
                assert_eq!(table.logits(&h, 7..7).expect("none").dims(), (rows, 0));
            }
        }
    }

    #[test]
    fn tokens_that_are_not_there_are_refused() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), [0; 4 * 8]).expect("there is room");
        let map = Arc::new(MappedFile::open(file.path()).expect("it was written"));
        let stored = StoredTensor::new("table".into(), StoredType::F32, vec![4, 2], 0..32, map);
        let table = TokenTable { stored: stored.expect("it is whole"), width: 2 };
        assert!(table.logits(&Matrix::zeros(1, 2), 0..4).is_ok());
        assert!(table.logits(&Matrix::zeros(1, 2), 3..5).is_err());
        assert!(table.logits(&Matrix::zeros(1, 3), 0..4).is_err());
        assert!(table.rows(&[4]).is_err());
    }
}
