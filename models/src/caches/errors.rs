//! Actions of many chunks beside those that they should be.

use std::time::Duration;

use super::schedule::Measured;

/// Actions and times of some chunks.
#[derive(Default)]
pub(crate) struct Errors {
    actions: Vec<f64>,
    chunks: usize,
    time: Duration,
}

impl Errors {
    /// Adds a chunk of `actions`, which took `time`.
    pub fn add(&mut self, actions: &[f64], time: Duration) {
        self.actions.extend_from_slice(actions);
        self.chunks += 1;
        self.time += time;
    }

    /// What it costs against the `exact` chunks, of `dim` values an action.
    pub fn against(self, exact: &Self, dim: usize) -> Measured {
        let mut errors: Vec<f64> =
            self.actions.iter().zip(&exact.actions).map(|(a, b)| (a - b).abs()).collect();
        let count = errors.len().max(1) as f64;
        let column = |d: usize| exact.actions.iter().skip(d).step_by(dim.max(1));
        let shares = (0..dim).map(|d| {
            let low = column(d).copied().fold(f64::INFINITY, f64::min);
            let high = column(d).copied().fold(f64::NEG_INFINITY, f64::max);
            let own = errors.iter().skip(d).step_by(dim);
            let mean = own.sum::<f64>() / (count / dim as f64);
            // A dimension that never moves has no range to be a share of.
            if high > low { mean / (high - low) } else { 0.0 }
        });
        let mean_relative = shares.sum::<f64>() / dim.max(1) as f64;
        let mean = errors.iter().sum::<f64>() / count;
        Measured {
            computed: 1.0,
            time: self.time.as_secs_f64() / exact.time.as_secs_f64().max(1e-12),
            chunks: self.chunks,
            mean,
            p99: quantile(&mut errors, 0.99),
            max: errors.iter().copied().fold(0.0, f64::max),
            mean_relative,
        }
    }
}

/// The value that the share `q` of `values` is not above; 0 of none.
pub(super) fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (q * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}
