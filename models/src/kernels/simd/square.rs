//! Transforms of the 4 × 4 squares of F(2 × 2, 3 × 3); see [`winograd`](crate::kernels::winograd).

use super::Shape;
use super::tile::Floats;

/// Places of a square along each side.
pub const SIDE: usize = 4;
/// Places of a square.
pub const PLACES: usize = SIDE * SIDE;

/// A square on its way into the products: `Bᵀ·d·B`.
#[derive(Debug)]
pub struct Forth<'a> {
    /// Channels of each place, line by line; equally many, and whole vectors.
    pub places: [&'a [f32]; PLACES],
    /// Place `p` of the transformed square goes to `to[p·step..]`.
    pub to: &'a mut [f32],
    /// Distance between places in `to`.
    pub step: usize,
}

impl Forth<'_> {
    pub(super) fn check(&self, shape: Shape) {
        let wide = self.places[0].len();
        assert!(wide.is_multiple_of(shape.lanes), "whole vectors of channels");
        assert!(self.places.iter().all(|place| place.len() == wide), "channels of the places");
        assert!((PLACES - 1) * self.step + wide <= self.to.len(), "the transformed square");
    }
}

/// The products' sums on their way to 2 × 2 places: `Aᵀ·m·A`.
#[derive(Debug)]
pub struct Back<'a> {
    /// Sums of place `p` begin at `sums[p·step]`.
    pub sums: &'a [f32],
    /// Distance between places in `sums`.
    pub step: usize,
    /// How many sums a place has; whole vectors.
    pub columns: usize,
    /// Line by line, one place after the other.
    pub to: &'a mut [f32],
}

impl Back<'_> {
    pub(super) fn check(&self, shape: Shape) {
        assert!(self.columns.is_multiple_of(shape.lanes), "whole vectors of columns");
        assert!((PLACES - 1) * self.step + self.columns <= self.sums.len(), "the sums");
        assert!(4 * self.columns <= self.to.len(), "the result");
    }
}

/// # Safety
/// The processor has the instruction set of `F`.
#[inline(always)]
unsafe fn spread<F: Floats>([a, b, c, d]: [F; SIDE]) -> [F; SIDE] {
    // SAFETY: the caller's.
    unsafe { [a.sub(c), b.add(c), c.sub(b), b.sub(d)] }
}

/// # Safety
/// As [`spread`].
#[inline(always)]
unsafe fn gather<F: Floats>([a, b, c, d]: [F; SIDE]) -> [F; 2] {
    // SAFETY: the caller's.
    unsafe { [a.add(b.add(c)), b.sub(c.add(d))] }
}

/// # Safety
/// `f` was checked, and the processor has the instruction set of `F`.
#[inline(always)]
pub(super) unsafe fn forth<F: Floats>(f: Forth<'_>) {
    let places = f.places.map(<[f32]>::as_ptr);
    let to = f.to.as_mut_ptr();
    for at in (0..f.places[0].len()).step_by(F::LANES) {
        // SAFETY: `at` and the lanes behind it are in every place, and `Forth::check` saw where the results go.
        unsafe {
            let mut lines = [[F::zero(); SIDE]; SIDE];
            for (down, line) in lines.iter_mut().enumerate() {
                let mut seen = [F::zero(); SIDE];
                for (along, value) in seen.iter_mut().enumerate() {
                    *value = F::load(places[down * SIDE + along].add(at));
                }
                *line = spread(seen);
            }
            for along in 0..SIDE {
                let [a, b, c, d] = &lines;
                let column = spread([a[along], b[along], c[along], d[along]]);
                for (down, value) in column.iter().enumerate() {
                    value.store(to.add((down * SIDE + along) * f.step + at));
                }
            }
        }
    }
}

/// # Safety
/// `b` was checked, and the processor has the instruction set of `F`.
#[inline(always)]
pub(super) unsafe fn back<F: Floats>(b: Back<'_>) {
    let (sums, to) = (b.sums.as_ptr(), b.to.as_mut_ptr());
    for at in (0..b.columns).step_by(F::LANES) {
        // SAFETY: `at` and the lanes behind it are columns, and `Back::check` saw where they lie and go.
        unsafe {
            let mut lines = [[F::zero(); 2]; SIDE];
            for (down, line) in lines.iter_mut().enumerate() {
                let mut seen = [F::zero(); SIDE];
                for (along, value) in seen.iter_mut().enumerate() {
                    *value = F::load(sums.add((down * SIDE + along) * b.step + at));
                }
                *line = gather(seen);
            }
            for along in 0..2 {
                let [p, q, r, s] = &lines;
                let column = gather([p[along], q[along], r[along], s[along]]);
                for (down, value) in column.iter().enumerate() {
                    value.store(to.add((2 * down + along) * b.columns + at));
                }
            }
        }
    }
}
