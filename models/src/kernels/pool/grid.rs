//! Parts of one buffer, each written by one thread.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

use super::workers::Workers;

/// A buffer that threads write parts of.
#[derive(Clone, Copy)]
struct Start<T>(*mut T);

// SAFETY: each unit of a job derives a part of its own from it, below, and `Workers::run` runs each unit once.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// Runs `work` on each piece of `values`, `size` long but for the last.
pub(super) fn chunks<T: Send>(
    workers: &Workers,
    values: &mut [T],
    size: usize,
    work: &(impl Fn(usize, &mut [T]) + Sync),
) {
    let length = values.len();
    let start = Start(values.as_mut_ptr());
    workers.run(length.div_ceil(size), &|unit| {
        let first = unit * size;
        // SAFETY: inside `values`, which is borrowed until all units are done; units do not overlap.
        let part =
            unsafe { std::slice::from_raw_parts_mut(start.at(first), size.min(length - first)) };
        work(unit, part);
    });
}

thread_local! {
    /// Memory of edges that are gone.
    static SPARE: RefCell<Vec<Vec<usize>>> = const { RefCell::new(Vec::new()) };
}

/// Where the cells of a matrix begin and end, in memory that is used again.
#[derive(Debug)]
pub struct Edges(Vec<usize>);

impl Edges {
    /// These.
    pub fn new(edges: impl Iterator<Item = usize>) -> Self {
        let mut all = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        all.clear();
        all.extend(edges);
        Self(all)
    }
}

impl Deref for Edges {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl Drop for Edges {
    fn drop(&mut self) {
        let all = std::mem::take(&mut self.0);
        // While the thread ends there may be no store any more; the memory is freed then.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(all));
    }
}

/// A matrix cut into cells.
#[derive(Debug, Clone, Copy)]
pub struct Grid<'a> {
    /// Values in a row of the matrix.
    pub width: usize,
    /// Where cells begin and end, in rows, ascending.
    pub rows: &'a [usize],
    /// Where cells begin and end, in columns, ascending.
    pub columns: &'a [usize],
}

/// Runs `work` on each cell of `matrix`.
pub(super) fn cells(
    workers: &Workers,
    matrix: &mut [f32],
    grid: &Grid<'_>,
    work: &(impl Fn(Cell<'_>) + Sync),
) {
    let ascending = |edges: &[usize]| edges.windows(2).all(|w| w[0] <= w[1]);
    assert!(ascending(grid.rows) && ascending(grid.columns), "edges of cells");
    let (rows, columns) = (grid.rows.last().copied(), grid.columns.last().copied());
    assert!(rows.unwrap_or(0) * grid.width <= matrix.len(), "rows of the matrix");
    assert!(columns.unwrap_or(0) <= grid.width, "columns of the matrix");
    let start = Start(matrix.as_mut_ptr());
    let high = grid.rows.len().saturating_sub(1);
    workers.run(grid.columns.len().saturating_sub(1) * high, &|unit| {
        let (along, down) = (unit / high, unit % high);
        work(Cell {
            unit,
            down,
            along,
            start: start.at(0),
            width: grid.width,
            rows: grid.rows[down]..grid.rows[down + 1],
            columns: grid.columns[along]..grid.columns[along + 1],
            matrix: PhantomData,
        });
    });
}

/// One cell.
#[derive(Debug)]
pub struct Cell<'a> {
    /// Its number, column by column: cells of the same columns follow each other.
    pub unit: usize,
    /// Its place among the rows' edges.
    pub down: usize,
    /// Its place among the columns' edges.
    pub along: usize,
    start: *mut f32,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

impl Cell<'_> {
    /// Rows of the matrix that it has.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Columns of the matrix that it has.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Its values in row `row` of the matrix.
    ///
    /// # Panics
    /// When the row is none of its own.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row), "a row of the cell");
        // SAFETY: inside the matrix (`cells` checked the last row and column), and no other cell has these
        // values; the slice borrows the cell, so it is the only one of this cell.
        unsafe {
            let first = self.start.add(row * self.width + self.columns.start);
            std::slice::from_raw_parts_mut(first, self.columns.len())
        }
    }
}
