//! What the tokens of one layer are attended to by.

use candle_core::Result;

use crate::kernels::{Columns, Compute, Matrix, Visible, attend};

/// Keys (after rotation) and values of one layer, `[L, K·hd]` each, heads side by side.
#[derive(Debug, Clone, Default)]
pub struct KeysValues {
    /// Of every token, what queries are compared with.
    pub keys: Matrix,
    /// Of every token, what is summed up.
    pub values: Matrix,
}

impl KeysValues {
    /// Those that lie in a wider matrix, copied.
    pub fn copied(keys: &Columns<'_>, values: &Columns<'_>) -> Self {
        let copy = |side: &Columns<'_>| Matrix::of_rows(side.iter(), side.width());
        Self { keys: copy(keys), values: copy(values) }
    }

    /// Those of `past`, then these.
    ///
    /// # Errors
    /// When the widths differ.
    pub fn after(self, past: Option<&Self>) -> Result<Self> {
        let Some(past) = past else { return Ok(self) };
        let join = |a: &Matrix, b: &Matrix| Matrix::stacked([a, b].into_iter(), a.width());
        Ok(Self { keys: join(&past.keys, &self.keys)?, values: join(&past.values, &self.values)? })
    }

    /// Replaces the rows `rows` by those of `keys` and `values`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn put(&mut self, rows: &[usize], keys: &Columns<'_>, values: &Columns<'_>) -> Result<()> {
        put(&mut self.keys, rows, keys)?;
        put(&mut self.values, rows, values)
    }

    /// Attention of `q` (`[L, H·hd]`) over those of `past`, then these; see [`attend`].
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn attend(
        &self,
        q: &Columns<'_>,
        past: Option<&Self>,
        heads: (usize, usize),
        visible: Visible,
        compute: Compute,
    ) -> Result<Matrix> {
        let (keys, values) = (self.keys.all(), self.values.all());
        match past {
            Some(past) => {
                let (keys, values) = ([past.keys.all(), keys], [past.values.all(), values]);
                attend(q, &keys, &values, heads, visible, compute)
            }
            None => attend(q, &[keys], &[values], heads, visible, compute),
        }
    }
}

/// Replaces the rows `rows` of `target` by those of `source`.
fn put(target: &mut Matrix, rows: &[usize], source: &Columns<'_>) -> Result<()> {
    let (length, width) = target.dims();
    let fits = (source.rows(), source.width()) == (rows.len(), width);
    if !fits || rows.iter().any(|row| *row >= length) {
        let (found, of) = (source.rows(), source.width());
        candle_core::bail!("{found} rows of {of} do not fit {length} x {width}");
    }
    for (row, values) in rows.iter().zip(source.iter()) {
        target.row_mut(*row).copy_from_slice(values);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_replaced_and_joined() -> Result<()> {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let whole = Matrix::new(&values, (3, 4))?;
        let mut kept = KeysValues::copied(&whole.columns(0..2), &whole.columns(2..4));
        let new = Matrix::of_row(&[90., 91.]);
        kept.put(&[1], &new.all(), &new.all())?;
        assert_eq!(kept.keys.values(), [0., 1., 90., 91., 8., 9.]);
        assert_eq!(kept.values.values(), [2., 3., 90., 91., 10., 11.]);
        assert!(kept.put(&[3], &new.all(), &new.all()).is_err(), "there is no such row");
        assert!(kept.put(&[0, 1], &new.all(), &new.all()).is_err());
        assert!(kept.put(&[0], &whole.all(), &whole.all()).is_err());
        let more = KeysValues { keys: new.clone(), values: new };
        let joined = more.after(Some(&kept))?;
        assert_eq!(joined.keys.values(), [0., 1., 90., 91., 8., 9., 90., 91.]);
        assert_eq!(joined.values.values(), [2., 3., 90., 91., 10., 11., 90., 91.]);
        Ok(())
    }
}
