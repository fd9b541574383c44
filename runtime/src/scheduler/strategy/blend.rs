//! Asynchronous execution with LeRobot's aggregation rules: actions of the same instant are combined.
//!
//! Source: LeRobot 0.6.1 `async_inference` (`weighted_average`, `latest_only`, `average`, `conservative`).
//! Two differences are deliberate: what the old chunk says beyond the new one's end is not needed, because
//! the new one ends later; and kinds that must not be averaged take the new value.

use serde::{Deserialize, Serialize};

use super::{Guide, Incoming, PlanView, Strategy};

/// How an old and a new action of the same instant are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlendRule {
    /// The new one.
    LatestOnly,
    /// 0.3 old, 0.7 new.
    WeightedAverage,
    /// Half and half.
    Average,
    /// 0.7 old, 0.3 new.
    Conservative,
}

impl BlendRule {
    /// Name in launch files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::LatestOnly => "latest-only",
            Self::WeightedAverage => "weighted-average",
            Self::Average => "average",
            Self::Conservative => "conservative",
        }
    }

    /// Share of the new action.
    fn new_share(self) -> f64 {
        match self {
            Self::LatestOnly => 1.0,
            Self::WeightedAverage => 0.7,
            Self::Average => 0.5,
            Self::Conservative => 0.3,
        }
    }
}

/// Asks so that the next chunk takes over at the execution horizon.
#[derive(Debug)]
pub(super) struct Blend(pub BlendRule);

impl Strategy for Blend {
    fn ask(&self, view: &PlanView) -> Option<Guide> {
        view.horizon_in_reach().then_some(Guide::Free)
    }

    fn merge(&self, incoming: Incoming<'_>) {
        let (share, Some(old)) = (self.0.new_share(), incoming.old) else { return };
        if share == 1.0 {
            return;
        }
        let dim = incoming.chunk.dim();
        for (k, action) in incoming.chunk.values_mut().chunks_exact_mut(dim).enumerate() {
            let Some(before) = old.at_action(k) else { break };
            for (joint, value) in action.iter_mut().enumerate() {
                if incoming.kinds[joint].blends() {
                    *value = share * *value + (1.0 - share) * before[joint];
                }
            }
        }
    }
}
