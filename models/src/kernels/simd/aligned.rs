//! Buffers that begin with a cache line: a vector that lies across two lines costs two loads.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A number of plain bits: all of them are valid, and it has no padding.
pub trait Plain: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($number:ty)*) => {
        $(impl sealed::Sealed for $number {}
        impl Plain for $number {})*
    };
}
plain!(u8 u16 u32 f32);

/// Numbers that begin with a cache line; zeros at first.
pub struct Aligned<T> {
    lines: Vec<Line>,
    length: usize,
    numbers: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// None.
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new(), length: 0, numbers: PhantomData }
    }

    /// `length` zeros.
    pub fn zeros(length: usize) -> Self {
        let mut new = Self::new();
        new.grow(length);
        new
    }

    /// Makes room for `length` numbers at least. What was there stays, what comes is zero.
    pub fn grow(&mut self, length: usize) {
        let lines = (length * size_of::<T>()).div_ceil(size_of::<Line>());
        if lines > self.lines.len() {
            self.lines.reserve_exact(lines - self.lines.len());
            large_pages(self.lines.spare_capacity_mut());
            self.lines.resize(lines, Line([0; 64]));
        }
        self.length = self.length.max(length);
    }
}

/// Asks for large pages for memory that was not touched yet: a panel then takes one entry of the address cache and not
/// hundreds.
fn large_pages(memory: &mut [MaybeUninit<Line>]) {
    const PAGE: usize = 4096;
    const LARGE: usize = 2 << 20;
    let range = memory.as_mut_ptr_range();
    let start = range.start.cast::<u8>();
    let skip = start.align_offset(PAGE);
    let bytes = size_of_val(memory).saturating_sub(skip) / PAGE * PAGE;
    if bytes >= LARGE {
        // SAFETY: whole pages inside one allocation of ours; the advice changes what backs them and never their values.
        let advised = unsafe {
            rustix::mm::madvise(start.add(skip).cast(), bytes, rustix::mm::Advice::LinuxHugepage)
        };
        // Only advice: without it the pages stay small.
        let _ = advised;
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the lines hold `length` numbers at least (`grow`), all bits of them are set and valid (`Plain`), and
        // a line is aligned more strictly than a number.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the numbers are borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length) }
    }
}

impl<T> std::fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aligned").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::Aligned;

    #[test]
    fn numbers_begin_with_a_line_and_stay_when_there_are_more() {
        let mut a = Aligned::<f32>::zeros(7);
        a[6] = 3.0;
        a.grow(1000);
        assert_eq!(a.as_ptr() as usize % 64, 0);
        assert_eq!((a.len(), a[6], a[999]), (1000, 3.0, 0.0));
        a.grow(3);
        assert_eq!(a.len(), 1000);
        assert!(Aligned::<u16>::new().is_empty());
    }
}
