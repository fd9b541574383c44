//! Element-wise loops over matrices, in their place.

use candle_core::{Result, bail};

use super::functions::{Activation, activate};
use super::isa::Isa;
use super::matrix::Matrix;
use super::pool::pool;
use super::simd::Loop;

/// Values that one thread takes at a time, about.
const SLICE: usize = 1 << 14;

/// Values to which `activation` is applied.
struct Activate<'a>(Activation, &'a mut [f32]);

impl Loop for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        activate(self.0, self.1);
    }
}

/// What becomes of a value and the one that it meets.
#[derive(Clone, Copy)]
enum Meeting {
    /// Their sum.
    Sum,
    /// Their product.
    Product,
    /// The sum with so many times the other.
    SumWith(f32),
}

/// Rows of one width, as many as their others or these one row for all.
struct Meet<'a>(Meeting, &'a mut [f32], &'a [f32]);

impl Loop for Meet<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(meeting, x, y) = self;
        for x in x.chunks_mut(y.len().max(1)) {
            match meeting {
                Meeting::Sum => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
                Meeting::Product => x.iter_mut().zip(y).for_each(|(x, y)| *x *= y),
                Meeting::SumWith(by) => x.iter_mut().zip(y).for_each(|(x, y)| *x += y * by),
            }
        }
    }
}

fn meet(meeting: Meeting, x: &mut Matrix, y: &Matrix) -> Result<()> {
    if x.width() != y.width() || (y.rows() != x.rows() && y.rows() != 1) {
        bail!("{} x {} values meet {} x {}", x.rows(), x.width(), y.rows(), y.width());
    }
    let (isa, width) = (Isa::current(), x.width().max(1));
    let (one, step) = (y.rows() == 1, (SLICE / width).max(1) * width);
    pool().chunks(x.values_mut(), step, |index, x| {
        let all = y.values();
        let y = if one { all } else { &all[index * step..index * step + x.len()] };
        isa.run(Meet(meeting, x, y));
    });
    Ok(())
}

/// `activation` of every value.
pub fn activate_all(activation: Activation, x: &mut Matrix) {
    let isa = Isa::current();
    pool().chunks(x.values_mut(), SLICE, |_, x| isa.run(Activate(activation, x)));
}

/// Adds `y` to `x`; a single row is added to every row.
///
/// # Errors
/// When the sizes differ.
pub fn add_all(x: &mut Matrix, y: &Matrix) -> Result<()> {
    meet(Meeting::Sum, x, y)
}

/// Adds `by` times `y` to `x`; a single row is added to every row.
///
/// # Errors
/// When the sizes differ.
pub fn add_scaled(x: &mut Matrix, y: &Matrix, by: f32) -> Result<()> {
    meet(Meeting::SumWith(by), x, y)
}

/// Multiplies `x` with `y`, value by value; every row with a single row.
///
/// # Errors
/// When the sizes differ.
pub fn multiply_all(x: &mut Matrix, y: &Matrix) -> Result<()> {
    meet(Meeting::Product, x, y)
}

/// `x + y`, in the memory of `x`; a single row is added to every row.
///
/// # Errors
/// When the sizes differ.
pub fn add(mut x: Matrix, y: &Matrix) -> Result<Matrix> {
    add_all(&mut x, y)?;
    Ok(x)
}

/// `x + y`; a single row is added to every row.
///
/// # Errors
/// When the sizes differ.
pub fn sum(x: &Matrix, y: &Matrix) -> Result<Matrix> {
    add(x.clone(), y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_rows_or_one_row() -> Result<()> {
        let x = Matrix::new(&[1.0, 2.0, 3.0, 4.0], (2, 2))?;
        let (row, other) = (Matrix::of_row(&[10.0, 20.0]), Matrix::new(&[0.5; 4], (2, 2))?);
        assert_eq!(sum(&x, &row)?.values(), [11.0, 22.0, 13.0, 24.0]);
        assert_eq!(sum(&x, &other)?.values(), [1.5, 2.5, 3.5, 4.5]);
        let mut y = x.clone();
        multiply_all(&mut y, &row)?;
        assert_eq!(y.values(), [10.0, 40.0, 30.0, 80.0]);
        add_scaled(&mut y, &x, -2.0)?;
        assert_eq!(y.values(), [8.0, 36.0, 24.0, 72.0]);
        activate_all(Activation::Relu, &mut y);
        assert_eq!(y.values(), [8.0, 36.0, 24.0, 72.0]);
        assert!(add_all(&mut y, &Matrix::zeros(3, 2)).is_err());
        assert!(add_all(&mut y, &Matrix::zeros(2, 3)).is_err());
        Ok(())
    }

    #[test]
    fn more_rows_than_a_thread_takes_meet_their_own() -> Result<()> {
        let (rows, width) = (3 * SLICE / 100 + 7, 100);
        let values: Vec<f32> = (0..rows * width).map(|i| (i % 8191) as f32).collect();
        let x = Matrix::new(&values, (rows, width))?;
        let twice = sum(&x, &x)?;
        assert!(twice.values().iter().zip(&values).all(|(t, v)| *t == 2.0 * v));
        let row = Matrix::of_row(&values[..width]);
        let more = sum(&x, &row)?;
        let expected = |i: usize| values[i] + values[i % width];
        assert!(more.values().iter().enumerate().all(|(i, m)| *m == expected(i)));
        Ok(())
    }
}
