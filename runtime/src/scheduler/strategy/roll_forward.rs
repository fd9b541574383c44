//! Future-state roll-forward: the head sees the state that the arm will have when its chunk takes over.
//!
//! Source: VLASH (arXiv 2512.01031). The chunk belongs to the take-over instant, not to the observation: it
//! waits for that instant when it comes early, and loses the actions that are past when it comes late.

use super::{Guide, PlanView, Strategy};

/// Takes over at the execution horizon.
#[derive(Debug)]
pub(super) struct RollForward;

impl Strategy for RollForward {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        view.horizon_in_reach().then_some(Guide::RollForward)
    }
}
