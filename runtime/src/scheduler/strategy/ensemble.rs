//! Temporal ensembling: the weighted mean of all predictions for an instant.
//!
//! Source: ACT (arXiv 2304.13705), LeRobot's online form: with `n` predictions so far and weights
//! `w_i = exp(-m·i)`, `i` = 0 the oldest, the mean becomes `(mean·W[n-1] + new·w[n]) / W[n]`.

use super::{Guide, Incoming, PlanView, Strategy};
use crate::scheduler::curve::MAX_HORIZON;

/// Asks after every action.
#[derive(Debug)]
pub(super) struct Ensemble {
    /// `exp(-m·i)` and its running sum.
    weights: [f64; MAX_HORIZON],
    sums: [f64; MAX_HORIZON],
}

impl Ensemble {
    pub fn new(decay: f64) -> Self {
        let weights = std::array::from_fn(|i| (-decay * i as f64).exp());
        let mut sum = 0.0;
        let sums = weights.map(|w: f64| {
            sum += w;
            sum
        });
        Self { weights, sums }
    }
}

impl Strategy for Ensemble {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        (view.phase.is_none() || view.since_order + 1e-6 >= 1.0).then_some(Guide::Free)
    }

    fn merge(&self, incoming: Incoming<'_>) {
        let Some(old) = incoming.old else { return };
        let dim = incoming.chunk.dim();
        let horizon = incoming.chunk.horizon();
        let rows = incoming.chunk.values_mut().chunks_exact_mut(dim);
        for ((k, action), count) in rows.enumerate().zip(incoming.counts) {
            let Some(mean) = old.at_action(k) else { break };
            let seen = usize::from(old.predictions(k)).min(MAX_HORIZON - 1);
            for (joint, value) in action.iter_mut().enumerate() {
                if incoming.kinds[joint].blends() {
                    let sum = mean[joint] * self.sums[seen - 1] + *value * self.weights[seen];
                    *value = sum / self.sums[seen];
                }
            }
            *count = (seen + 1).min(horizon).max(1) as u16;
        }
    }
}
