//! What the policy says and what the arm gets.

use std::time::Duration;

use super::{ActionKind, JointVec, Prefix};
use crate::Stamp;

/// What the scheduler asks of the policy for one chunk.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct ChunkRequest {
    /// Counts the requests; the chunk carries it back.
    pub id: u64,
    /// Denoise steps; `None` for the checkpoint's own number.
    pub denoise_steps: Option<usize>,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Planned actions that the chunk has to join; `None` for a chunk of its own.
    pub prefix: Option<Prefix>,
    /// Nothing that is only nearly the same is to be reused: there is time.
    #[serde(default)]
    pub exact: bool,
    /// Nothing is to end before it must: the chunk takes as long as one ever does.
    #[serde(default)]
    pub whole: bool,
}

/// Time one stage of an inference took.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct StageTime {
    /// Stage name: `preprocess`, `vision`, `prefix`, `denoise`.
    pub stage: &'static str,
    /// Wall time.
    pub time: Duration,
}

/// How far a cache is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opening {
    /// Nothing is reused: reuse cost too much.
    Closed,
    /// Only the freshest is reused.
    Narrow,
    /// All that its settings allow.
    #[default]
    Open,
}

impl Opening {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Narrow => "narrow",
            Self::Open => "open",
        }
    }
}

/// Why a cache that is open was not used for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unused {
    /// There were too few denoise steps for anything to be reused.
    FewSteps,
    /// An exact chunk was asked for: there was time.
    Exact,
    /// There was nothing from before: the first chunk, or after something that ends what was.
    Fresh,
    /// It is renewed from time to time.
    Refresh,
    /// Too much had changed.
    Changed,
}

impl Unused {
    /// Words for reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::FewSteps => "too few steps",
            Self::Exact => "exact",
            Self::Fresh => "nothing from before",
            Self::Refresh => "renewed",
            Self::Changed => "too much changed",
        }
    }
}

/// What one cache did for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct CacheUse {
    /// Number of blocks that were asked for.
    pub lookups: u32,
    /// How many of them were reused.
    pub hits: u32,
    /// Largest error that the reuse is known to have cost (the action's physical units); `None` when exact, or unknown.
    pub error: Option<f64>,
    /// Computing time that the reuse saved, by what the same blocks took when they were computed.
    #[serde(default)]
    pub saved: Duration,
    /// Relative error that one reuse seldom exceeds, by running comparisons; `None` without them.
    #[serde(default)]
    pub bound: Option<f64>,
    /// How far it was open.
    #[serde(default)]
    pub opening: Opening,
    /// Why nothing was reused, when it could have been.
    #[serde(default)]
    pub unused: Option<Unused>,
}

/// How well the arm's joints meet a chunk of tool poses ([`crate::action_space`]).
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Reach {
    /// Poses of the chunk.
    pub poses: u32,
    /// Poses that the arm cannot reach in time: it goes to the nearest ones instead.
    pub missed: u32,
    /// Largest distance (m) from a wanted position.
    pub position_error: f64,
    /// Largest angle (rad) from a wanted rotation.
    pub rotation_error: f64,
    /// Largest distance (m) of the tip from the straight way, half-way between two poses.
    pub path_error: f64,
}

impl Reach {
    /// Counts the poses of `other` too.
    pub fn merge(&mut self, other: &Self) {
        self.poses = self.poses.saturating_add(other.poses);
        self.missed = self.missed.saturating_add(other.missed);
        self.position_error = self.position_error.max(other.position_error);
        self.rotation_error = self.rotation_error.max(other.rotation_error);
        self.path_error = self.path_error.max(other.path_error);
    }

    /// Counts a pose that is met to `position` (m) and `rotation` (rad).
    pub fn add(&mut self, position: f64, rotation: f64, reached: bool) {
        self.poses += 1;
        self.missed += u32::from(!reached);
        self.position_error = self.position_error.max(position);
        self.rotation_error = self.rotation_error.max(rotation);
    }
}

/// How a chunk came to be.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize)]
pub struct ChunkReport {
    /// What each stage took, in order.
    pub stages: Vec<StageTime>,
    /// Denoise steps that were done.
    pub denoise_steps: usize,
    /// What each cache did, by name: `warm_start`, `frozen_prefix`, later `denoiser`, `prefix_kv`, `vision`;
    /// `success_memory`: records looked at and followed; `candidates`: those wanted and made, and as error the chosen one's
    /// score.
    pub caches: Vec<(&'static str, CacheUse)>,
    /// How well the joints meet the policy's poses; `None` when it speaks of joints.
    pub reach: Option<Reach>,
}

/// Actions predicted at once: `horizon` actions of `dim` values, `dt` apart.
///
/// Action `k` belongs to `instant + k·dt`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "super::wire::RawChunk")]
pub struct ActionChunk {
    /// The request that it answers.
    pub request: u64,
    /// Instant of the observation that it was made from.
    pub instant: Stamp,
    /// Time between two actions.
    pub dt: Duration,
    dim: usize,
    actions: Vec<f64>,
    /// How it came to be.
    pub report: ChunkReport,
}

/// A chunk's values do not fit its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an action chunk of {found} values cannot be cut into actions of {dim}")]
pub struct ChunkShapeError {
    dim: usize,
    found: usize,
}

impl ActionChunk {
    /// A chunk of `actions` (row-major `[H, D]`, physical units), `dt` apart from `instant` on.
    ///
    /// # Errors
    /// [`ChunkShapeError`] when `actions` is empty or no multiple of `dim`.
    pub fn new(
        request: u64,
        instant: Stamp,
        dt: Duration,
        dim: usize,
        actions: Vec<f64>,
    ) -> Result<Self, ChunkShapeError> {
        if dim == 0 || actions.is_empty() || !actions.len().is_multiple_of(dim) {
            return Err(ChunkShapeError { dim, found: actions.len() });
        }
        Ok(Self { request, instant, dt, dim, actions, report: ChunkReport::default() })
    }

    /// Action horizon `H`.
    pub fn horizon(&self) -> usize {
        self.actions.len() / self.dim
    }

    /// Action dimension `D`.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Action `k`, `[D]`; `None` past the horizon.
    pub fn action(&self, k: usize) -> Option<&[f64]> {
        self.actions.chunks_exact(self.dim).nth(k)
    }

    /// All values, row-major `[H, D]`.
    pub fn values(&self) -> &[f64] {
        &self.actions
    }

    /// All values, to be changed in place.
    pub fn values_mut(&mut self) -> &mut [f64] {
        &mut self.actions
    }

    /// Makes the [`ActionKind::Delta`] actions absolute: they count from `origin`, the measured position at
    /// [`ActionChunk::instant`], whatever the arm has done since.
    pub fn make_absolute(&mut self, kinds: &[ActionKind], origin: &[f64]) {
        for action in self.actions.chunks_exact_mut(self.dim) {
            for ((value, kind), from) in action.iter_mut().zip(kinds).zip(origin) {
                if *kind == ActionKind::Delta {
                    *value += from;
                }
            }
        }
    }
}

/// One target for all joints, on its way to the arm driver.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Command {
    /// When the control thread made it.
    pub stamp: Stamp,
    /// Counts the control periods, from 1; gaps are lost or missed ones.
    pub sequence: u64,
    /// Target positions (rad).
    pub position: JointVec,
    /// Target velocities (rad/s).
    pub velocity: JointVec,
}
