//! The strategies: when to ask for the next chunk, what to tell the head about the plan, and how a chunk
//! takes the old one's place. One trait, one file per family; everything else is shared.

mod blend;
mod ensemble;
mod realtime;
mod roll_forward;
mod synchronous;

use serde::{Deserialize, Serialize};

use super::blocks::OldPlan;
use crate::{ActionChunk, ActionKind, MaskSchedule};

pub use blend::BlendRule;

/// Which strategy plays the chunks, with its own settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "strategy", rename_all = "kebab-case")]
pub enum StrategyConfig {
    /// Stop and think: play the execution horizon, come to rest, ask, wait.
    Synchronous,
    /// Ask while playing; where old and new overlap in time, combine them by a rule.
    Blend {
        /// The rule.
        rule: BlendRule,
    },
    /// Ask after every action; play the weighted mean of all predictions for an instant (ACT).
    Ensemble {
        /// `m` in the weight `exp(-m·i)` of the `i`-th oldest prediction; above zero favours the oldest.
        decay: f64,
    },
    /// Real-time chunking: the head is guided to agree with the planned actions.
    RtcGuided {
        /// How guidance fades.
        mask: MaskSchedule,
        /// Largest guidance weight.
        max_weight: f64,
        /// Planned actions from here on carry no weight; `None`: all that is left of the chunk.
        horizon: Option<usize>,
    },
    /// Real-time chunking with a head trained on clean prefixes.
    RtcTrained,
    /// The head is given the state that the arm will have when the chunk takes over (VLASH).
    RollForward,
}

impl Default for StrategyConfig {
    fn default() -> Self {
        Self::Blend { rule: BlendRule::LatestOnly }
    }
}

impl StrategyConfig {
    /// Every strategy with its default settings.
    pub const ALL: [StrategyConfig; 9] = [
        Self::Synchronous,
        Self::Blend { rule: BlendRule::LatestOnly },
        Self::Blend { rule: BlendRule::WeightedAverage },
        Self::Blend { rule: BlendRule::Average },
        Self::Blend { rule: BlendRule::Conservative },
        Self::Ensemble { decay: 0.01 },
        Self::RtcGuided { mask: MaskSchedule::Exponential, max_weight: 10.0, horizon: None },
        Self::RtcTrained,
        Self::RollForward,
    ];

    /// Name in launch files, tables and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Synchronous => "synchronous",
            Self::Blend { rule } => rule.name(),
            Self::Ensemble { .. } => "ensemble",
            Self::RtcGuided { .. } => "rtc-guided",
            Self::RtcTrained => "rtc-trained",
            Self::RollForward => "roll-forward",
        }
    }

    /// The strategy called `name`, with its default settings.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    pub(super) fn build(self) -> Box<dyn Strategy> {
        match self {
            Self::Synchronous => Box::new(synchronous::Synchronous),
            Self::Blend { rule } => Box::new(blend::Blend(rule)),
            Self::Ensemble { decay } => Box::new(ensemble::Ensemble::new(decay)),
            Self::RtcGuided { mask, max_weight, horizon } => {
                Box::new(realtime::Guided { mask, max_weight, horizon })
            }
            Self::RtcTrained => Box::new(realtime::Trained),
            Self::RollForward => Box::new(roll_forward::RollForward),
        }
    }
}

/// What the next chunk has to know of the plan.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guide {
    /// Nothing: a chunk of its own.
    Free,
    /// Planned actions as guidance.
    Guided {
        /// How guidance fades.
        mask: MaskSchedule,
        /// Largest guidance weight.
        max_weight: f64,
        /// Planned actions from here on carry no weight.
        horizon: Option<usize>,
    },
    /// Planned actions as a clean prefix.
    Trained,
    /// The state at the take-over, which is the plan's first row.
    RollForward,
}

/// Where the executing chunk stands; times in actions.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlanView {
    /// Actions executed of the executing chunk; `None` when nothing plays.
    pub phase: Option<f64>,
    /// Actions that it is played to.
    pub end: f64,
    /// Tail latency of the policy.
    pub lead: f64,
    /// Actions executed since the last order.
    pub since_order: f64,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: f64,
}

impl PlanView {
    /// True when a chunk asked for now takes over at the execution horizon or later.
    ///
    /// With a latency beyond the execution horizon a chunk asked for at once would come when its actions are
    /// past: then it is asked for so late that no more than the horizon's actions are lost.
    fn horizon_in_reach(&self) -> bool {
        // A sum of many steps may fall short of a whole number by a rounding error.
        let at_most = |a: f64, b: f64| a <= b + 1e-6;
        self.phase.is_none_or(|phase| {
            let lost = self.lead.min(self.end - phase);
            at_most(self.execution_horizon, phase + self.lead)
                && at_most(lost, self.execution_horizon)
        })
    }
}

/// A chunk on its way into the plan, and what it replaces.
pub(super) struct Incoming<'a> {
    pub chunk: &'a mut ActionChunk,
    pub kinds: &'a [ActionKind],
    /// The plan so far; `None` when nothing plays.
    pub old: Option<OldPlan<'a>>,
    /// How many predictions each action of the chunk combines, itself included.
    pub counts: &'a mut [u16],
}

/// How chunks follow each other. Called on the control thread: no allocation, no lock.
pub(super) trait Strategy: std::fmt::Debug + Send {
    /// What to ask the policy for, when it is time to ask. Called while no order is open.
    fn ask(&self, view: &PlanView) -> Option<Guide>;

    /// How many actions of a chunk are played if nothing follows.
    fn play_end(&self, horizon: usize, _execution_horizon: usize) -> usize {
        horizon
    }

    /// Changes the arriving chunk's editable actions in the light of the old plan.
    fn merge(&self, _incoming: Incoming<'_>) {}
}
