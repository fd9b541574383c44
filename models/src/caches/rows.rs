//! Keys and values of a layer whose rows are replaced one by one.

use candle_core::{Device, Result, Tensor};

/// Keys and values of one layer, `[heads, length, size]` each.
#[derive(Debug, Clone, Default)]
pub struct LayerRows {
    shape: (usize, usize, usize),
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl LayerRows {
    /// Takes over all rows.
    ///
    /// # Errors
    /// When one is not three-dimensional f32.
    pub fn whole(keys: &Tensor, values: &Tensor) -> Result<Self> {
        let flat = |t: &Tensor| t.contiguous()?.flatten_all()?.to_vec1::<f32>();
        Ok(Self { shape: keys.dims3()?, keys: flat(keys)?, values: flat(values)? })
    }

    /// Replaces the rows `rows` by those of `keys` and `values` (`[heads, rows, size]`).
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn put(&mut self, rows: &[usize], keys: &Tensor, values: &Tensor) -> Result<()> {
        put(&mut self.keys, self.shape, rows, keys)?;
        put(&mut self.values, self.shape, rows, values)
    }

    /// All keys and values, head after head and row after row.
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.keys, &self.values)
    }

    /// All keys and values.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn tensors(&self) -> Result<(Tensor, Tensor)> {
        let tensor = |values: &[f32]| Tensor::from_slice(values, self.shape, &Device::Cpu);
        Ok((tensor(&self.keys)?, tensor(&self.values)?))
    }
}

/// Replaces the rows `rows` of `target` (`[heads, length, size]`) by those of `source` (`[heads, rows, size]`).
fn put(
    target: &mut [f32],
    (heads, length, size): (usize, usize, usize),
    rows: &[usize],
    source: &Tensor,
) -> Result<()> {
    let fits = source.dims3()? == (heads, rows.len(), size) && rows.iter().all(|r| *r < length);
    if !fits {
        candle_core::bail!("rows of {:?} do not fit {heads} x {length} x {size}", source.dims());
    }
    let source = source.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    for (i, part) in source.chunks_exact(size).enumerate() {
        let (head, row) = (i / rows.len(), rows[i % rows.len()]);
        let at = (head * length + row) * size;
        target[at..at + size].copy_from_slice(part);
    }
    Ok(())
}

/// `rows` (`[heads, rows, size]`) at their places among `length` rows, zeros in between: `[heads, length, size]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn spread(rows: &Tensor, places: &[usize], length: usize) -> Result<Tensor> {
    let (heads, _, size) = rows.dims3()?;
    let mut all = vec![0.0; heads * length * size];
    put(&mut all, (heads, length, size), places, rows)?;
    Tensor::from_vec(all, (heads, length, size), &Device::Cpu)
}

/// The rows `places` along dimension `dim` of `x`.
///
/// # Errors
/// When there is no such row.
pub fn pick(x: &Tensor, places: &[usize], dim: usize) -> Result<Tensor> {
    let index: Vec<u32> = places.iter().map(|p| *p as u32).collect();
    x.contiguous()?.index_select(&Tensor::from_vec(index, places.len(), &Device::Cpu)?, dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_replaced_in_every_head() {
        let tensor = |values: Vec<f32>, shape| Tensor::from_vec(values, shape, &Device::Cpu);
        let whole = tensor((0..12).map(|i| i as f32).collect(), (2, 3, 2)).expect("it fits");
        let mut kept = LayerRows::whole(&whole, &whole).expect("three dimensions");
        let new = tensor(vec![90., 91., 92., 93.], (2, 1, 2)).expect("it fits");
        kept.put(&[1], &new, &new).expect("it fits");
        let (keys, values) = kept.tensors().expect("it is small");
        let flat = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        let expected = [0., 1., 90., 91., 4., 5., 6., 7., 92., 93., 10., 11.];
        assert_eq!((flat(&keys), flat(&values)), (expected.to_vec(), expected.to_vec()));
        assert!(kept.put(&[3], &new, &new).is_err(), "there is no such row");
        assert!(kept.put(&[0, 1], &new, &new).is_err());
        let spread = spread(&new, &[2], 3).expect("it fits");
        assert_eq!(flat(&spread)[4..6], [90., 91.]);
        assert_eq!(flat(&pick(&spread, &[2], 1).expect("it is there")), flat(&new));
    }
}
