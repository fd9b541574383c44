//! What is kept of something that an evaluation computes, and what it is taken to be now.

use candle_core::Result;

use crate::kernels::{Matrix, add_scaled};

struct Computed {
    output: Matrix,
    /// The evaluation that computed it, and its position.
    evaluation: usize,
    position: f64,
}

/// The newest two outputs of one block, or of the whole network.
#[derive(Default)]
pub(super) struct Kept {
    newest: Option<Computed>,
    before: Option<Computed>,
    /// Running mean of its computing time (s).
    cost: f64,
}

/// Newest computing time's share in a running mean.
const NEWEST: f64 = 0.1;
/// An output goes on for at most so many times the way between the two that are known.
const FARTHEST: f64 = 4.0;

impl Kept {
    /// Nothing is kept any more; what computing it takes is still known.
    pub fn clear(&mut self) {
        (self.newest, self.before) = (None, None);
    }

    /// It was computed.
    pub fn keep(&mut self, output: Matrix, evaluation: usize, position: f64, took: f64) {
        let cost = &mut self.cost;
        *cost = if *cost == 0.0 { took } else { *cost + NEWEST * (took - *cost) };
        self.before = self.newest.replace(Computed { output, evaluation, position });
    }

    /// Time that computing it takes (s).
    pub fn cost(&self) -> f64 {
        self.cost
    }

    /// Evaluations since it was computed, in evaluation `now`; `None`: nothing is kept.
    pub fn age(&self, now: usize) -> Option<usize> {
        self.newest.as_ref().map(|kept| now - kept.evaluation)
    }

    /// What it is taken to be at `position`: the newest output, moved on by the share `slope` of what it moved between the
    /// newest two, in proportion to the positions. `None`: nothing is kept.
    pub fn at(&self, position: f64, slope: f64) -> Result<Option<Matrix>> {
        let Some(newest) = &self.newest else { return Ok(None) };
        let mut guess = newest.output.clone();
        if let Some(before) = self.before.as_ref().filter(|_| slope != 0.0) {
            let way = newest.position - before.position;
            let part = if way > 0.0 { (position - newest.position) / way } else { 0.0 };
            let mut moved = newest.output.clone();
            add_scaled(&mut moved, &before.output, -1.0)?;
            add_scaled(&mut guess, &moved, (slope * part.clamp(0.0, FARTHEST)) as f32)?;
        }
        Ok(Some(guess))
    }
}

/// The length of `kept − exact` relative to that of `sum`.
pub(super) fn relative(kept: &Matrix, exact: &Matrix, sum: &Matrix) -> f64 {
    let pairs = kept.values().iter().zip(exact.values());
    let off: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let whole: f64 = sum.values().iter().map(|x| f64::from(*x).powi(2)).sum();
    (off / whole.max(f64::MIN_POSITIVE)).sqrt()
}
