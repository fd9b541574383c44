//! The head's keys in `config.json`; those of the observation are SmolVLA's.

use serde::Deserialize;

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::heads::{AnchorSearch, Bins, Confidence, MaskSchedule, Masking, bins};

/// Values that actions may have, per dimension, in the policy's unit.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ActionLimits {
    /// Least values.
    pub lower: Vec<f64>,
    /// Largest values.
    pub upper: Vec<f64>,
}

/// How action tokens are made and decided. `num_steps`, read with the observation's keys, says in how many rounds.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct MaskedConfig {
    /// Classes of the head.
    pub num_bins: usize,
    /// Tokens that stay unknown, by round.
    pub mask_schedule: MaskSchedule,
    /// What the order goes by.
    pub confidence: Confidence,
    /// Noise on choice and order in the first round.
    pub temperature: f32,
    /// Tokens this sure are decided at once; `null`: as many as the schedule says.
    pub commit_threshold: Option<f32>,
    /// Decided tokens that no bin of is this likely become unknown again; `null`: never.
    pub remask_threshold: Option<f32>,
    /// Decided tokens whose probability fell by more become unknown again; `null`: never.
    pub remask_drop: Option<f32>,
    /// Bins outside are never chosen; `null`: all may be.
    pub action_limits: Option<ActionLimits>,
    /// Largest change from one action to the next, per dimension, in the policy's unit; `null`: any. An action that
    /// changes more is moved to the nearest bin that does not, and the rest is decided anew around it
    /// ([`crate::heads::AnchorSearch`]).
    pub step_limits: Option<Vec<f64>>,
    /// Farthest that an action is moved so (bins).
    pub anchor_reach: usize,
    /// Passes at most in which the rest is decided anew.
    pub anchor_passes: usize,
    /// Rounds of such a pass.
    pub anchor_rounds: usize,
    /// Per dimension, how often decoded values are smoothed along the chunk ([`crate::heads::smooth`]); empty:
    /// never.
    pub smoothing: Vec<usize>,
}

/// Smoothing more often than this flattens every chunk; more passes and rounds than this bring no more.
const PASSES_LIMIT: usize = 100;

impl Default for MaskedConfig {
    fn default() -> Self {
        Self {
            num_bins: 256,
            mask_schedule: MaskSchedule::default(),
            confidence: Confidence::default(),
            temperature: 0.0,
            commit_threshold: None,
            remask_threshold: None,
            remask_drop: None,
            action_limits: None,
            step_limits: None,
            anchor_reach: 10,
            anchor_passes: 10,
            anchor_rounds: 2,
            smoothing: Vec::new(),
        }
    }
}

impl MaskedConfig {
    /// The configuration of `checkpoint`, checked.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the key.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let path = checkpoint.config_path();
        let config: Self = serde_json::from_str(&checkpoint.config_text)
            .map_err(|e| ModelError::config(&path, "the file", format!("cannot be read: {e}")))?;
        if Bins::new(config.num_bins).is_none() {
            let reason = format!("is {}, expected 2 to 65536", config.num_bins);
            return Err(ModelError::config(&path, "num_bins", reason));
        }
        for (key, value) in [
            ("temperature", Some(config.temperature)),
            ("commit_threshold", config.commit_threshold),
            ("remask_threshold", config.remask_threshold),
            ("remask_drop", config.remask_drop),
        ] {
            if let Some(value) = value.filter(|v| !(0.0..=100.0).contains(v)) {
                let reason = format!("is {value}, expected 0 to 100");
                return Err(ModelError::config(&path, key, reason));
            }
        }
        let expected = checkpoint.features.action_dim(&path)?;
        let passes = &config.smoothing;
        if passes.iter().any(|n| *n > PASSES_LIMIT) || ![0, expected].contains(&passes.len()) {
            let reason = format!("is {passes:?}, expected {expected} numbers to {PASSES_LIMIT}");
            return Err(ModelError::config(&path, "smoothing", reason));
        }
        if let Some(limits) = &config.action_limits {
            let found = (limits.lower.len(), limits.upper.len());
            if found != (expected, expected) {
                let reason = format!("has {found:?} values, the action has {expected}");
                return Err(ModelError::config(&path, "action_limits", reason));
            }
        }
        if let Some(limits) = &config.step_limits
            && (limits.len() != expected || !limits.iter().all(|l| *l > 0.0))
        {
            let reason = format!("is {limits:?}, expected {expected} numbers above 0");
            return Err(ModelError::config(&path, "step_limits", reason));
        }
        for (key, value, most) in [
            ("anchor_reach", config.anchor_reach, bins::MOST),
            ("anchor_passes", config.anchor_passes, PASSES_LIMIT),
            ("anchor_rounds", config.anchor_rounds, PASSES_LIMIT),
        ] {
            if !(1..=most).contains(&value) {
                let reason = format!("is {value}, expected 1 to {most}");
                return Err(ModelError::config(&path, key, reason));
            }
        }
        Ok(config)
    }

    /// The bins.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a number that [`Self::of`] refuses.
    pub(super) fn bins(&self, checkpoint: &Checkpoint) -> Result<Bins, ModelError> {
        Bins::new(self.num_bins).ok_or_else(|| {
            ModelError::config(&checkpoint.config_path(), "num_bins", "is out of range")
        })
    }

    /// How actions that change too fast are mended.
    pub fn anchors(&self) -> AnchorSearch {
        let Self { anchor_reach: reach, anchor_passes: passes, anchor_rounds: rounds, .. } = *self;
        AnchorSearch { reach, passes, rounds }
    }

    /// How to decode.
    pub fn masking(&self) -> Masking {
        let default = Masking::default();
        Masking {
            schedule: self.mask_schedule,
            confidence: self.confidence,
            temperature: self.temperature,
            sure: self.commit_threshold.unwrap_or(default.sure),
            remask_below: self.remask_threshold.unwrap_or(default.remask_below),
            remask_drop: self.remask_drop.unwrap_or(default.remask_drop),
        }
    }
}
