//! Stop and think: the baseline that every asynchronous strategy is compared with.

use super::{Guide, PlanView, Strategy};

/// Plays the execution horizon to rest, then asks.
#[derive(Debug)]
pub(super) struct Synchronous;

impl Strategy for Synchronous {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        view.phase.is_none_or(|p| p + 1e-6 >= view.end).then_some(Guide::Free)
    }

    fn play_end(&self, horizon: usize, execution_horizon: usize) -> usize {
        horizon.min(execution_horizon)
    }
}
