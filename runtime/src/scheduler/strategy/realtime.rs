//! Real-time chunking: the head makes a chunk that agrees with what will be executed before it arrives.
//!
//! Sources: arXiv 2506.07339 (guidance at inference), 2512.05964 (clean prefixes in training). The plan is
//! handed over on its own instants and sampled on the observation's, so that a prefix is never shifted
//! by the delay; rows that do not exist are left out instead of being filled with zeros.

use super::{Guide, PlanView, Strategy};
use crate::MaskSchedule;

/// Guidance at inference.
#[derive(Debug)]
pub(super) struct Guided {
    pub mask: MaskSchedule,
    pub max_weight: f64,
    pub horizon: Option<usize>,
}

impl Strategy for Guided {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        let Self { mask, max_weight, horizon } = *self;
        view.horizon_in_reach().then_some(Guide::Guided { mask, max_weight, horizon })
    }
}

/// Heads trained with clean prefixes.
#[derive(Debug)]
pub(super) struct Trained;

impl Strategy for Trained {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        view.horizon_in_reach().then_some(Guide::Trained)
    }
}
