//! What the kernels did for one thread: multiplications and the time they took.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Work of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiplications with an addition.
    pub products: u64,
    /// From call to return.
    pub time: Duration,
}

/// Work since the last [`take`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Products with weights.
    pub layers: Work,
    /// Attention, its softmax included.
    pub attention: Work,
}

thread_local! {
    static TALLY: Cell<Tally> = const {
        let none = Work { products: 0, time: Duration::ZERO };
        Cell::new(Tally { layers: none, attention: none })
    };
}

/// What the kernels did for this thread since the last call.
pub fn take() -> Tally {
    TALLY.take()
}

/// Runs `work`, counted as `products` of a kind.
pub(super) fn counted(
    kind: impl Fn(&mut Tally) -> &mut Work,
    products: usize,
    work: impl FnOnce(),
) {
    let start = Instant::now();
    work();
    let mut tally = TALLY.get();
    let sum = kind(&mut tally);
    sum.products += products as u64;
    sum.time += start.elapsed();
    TALLY.set(tally);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_adds_up_until_it_is_taken() {
        take();
        counted(|t| &mut t.layers, 5, || {});
        counted(|t| &mut t.layers, 7, || {});
        counted(|t| &mut t.attention, 1, || {});
        let tally = take();
        assert_eq!((tally.layers.products, tally.attention.products), (12, 1));
        assert_eq!(take(), Tally::default());
    }
}
