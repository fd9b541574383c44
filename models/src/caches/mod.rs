//! Caches: what an inference need not compute again, and what that costs.
//!
//! Every approximation is off unless it is asked for, and says in the chunk's report what it did.

mod branches;
mod calibrate;
mod errors;
mod frames;
mod kept;
mod likeness;
mod monitor;
mod plan;
mod schedule;
mod slope;
#[cfg(test)]
mod surge;
mod vision;

use std::path::{Path, PathBuf};

use sinew_runtime::ActionKind;

pub use branches::{Branches, Tuned, TunedMode, Tuning};
pub use calibrate::{
    Calibration, CalibrationError, CalibrationPlan, LEAST_OBSERVATIONS, Tried, calibrate,
};
pub(crate) use errors::Errors;
pub use frames::{FRAMES, Frames};
pub use kept::{KeptPrefix, KeptTower, Seen};
pub use likeness::Likeness;
pub use monitor::{Monitor, MonitorConfig, Verdict};
pub use plan::{Block, BlockKind, Updates, bubble, schedule};
pub use schedule::{BlockPlan, Form, Measured, Schedule};
pub use vision::{Patches, Recompute, VISION, VisionConfig};

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::exits::EarlyExit;

/// Name of the denoiser's cache in reports.
pub const DENOISER: &str = "denoiser";
/// Name of the kept prefix in reports.
pub const PREFIX: &str = "prefix_kv";

/// Name of the comparison of chunks in reports.
pub const COMPARISON: &str = "comparison";

/// How chunks are compared with what they would be without caches ([`crate::wrappers::Compared`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompareConfig {
    /// Chunks from one comparison to the next.
    pub every: u32,
    /// Error of a chunk (the 99th percentile of its values', in the network's units) above which the caches close.
    pub limit: f64,
}

/// What of a policy family can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reusable {
    /// The residual branches of a denoiser.
    pub blocks: bool,
    /// Patches in the vision tower.
    pub patches: bool,
    /// Nothing, but an inference can end before the last layer.
    pub exits: bool,
}

/// Which caches a policy uses.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CacheOptions {
    /// Reuse of a denoiser's residual branches.
    pub denoiser: DenoiserCache,
    /// Reuse of a vision tower's patches from picture to picture; `None`: every picture is computed whole.
    pub vision: Option<VisionConfig>,
    /// Start from the last chunk, for actions of these kinds; `None`: every chunk is made from noise.
    pub warm_start: Option<Vec<ActionKind>>,
    /// Ends before the last layer.
    pub early_exit: EarlyExit,
    /// Share of the reuses that are compared.
    pub check: Option<f64>,
    /// Errors above so many times what calibration measured close a cache.
    pub tolerance: Option<f64>,
    /// How chunks are compared with what they would be without caches; `None`: they are not.
    pub compare: Option<CompareConfig>,
}

/// Where a denoiser's cache schedule comes from.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum DenoiserCache {
    /// There is none.
    #[default]
    Off,
    /// A file that `sinew calibrate cache` wrote.
    File(PathBuf),
    /// From outside, from chunk to chunk.
    Tuned(Tuning),
}

/// Errors above so many times what calibration measured close a cache, unless it is said otherwise.
pub const TOLERANCE: f64 = 2.0;
/// No limit is below this relative error: single precision is not far.
const LEAST_LIMIT: f64 = 1e-4;

impl CacheOptions {
    /// Whether the policy at `path`, whose `head` can keep what `reusable` says, has these caches.
    ///
    /// # Errors
    /// [`ModelError`] naming the one that it has not.
    pub(crate) fn check(
        &self,
        path: &Path,
        head: &str,
        reusable: Reusable,
    ) -> Result<(), ModelError> {
        let file = matches!(self.denoiser, DenoiserCache::File(_));
        let early = self.early_exit != EarlyExit::Off;
        let (cache, why) = if file && !reusable.blocks {
            ("cache_denoiser", "has no denoiser whose blocks could be kept")
        } else if self.vision.is_some() && !reusable.patches {
            ("cache_vision", "has no vision tower whose patches could be kept")
        } else if early && !reusable.exits {
            ("early_exit", "has no layers that an inference could end before")
        } else if early && file {
            ("cache_denoiser", "with `early_exit` has another denoiser at every exit")
        } else if early && self.warm_start.is_some() {
            ("cache_warm_start", "with `early_exit` starts from noise, then from exit to exit")
        } else if early && self.vision.is_some_and(|vision| vision.prefix) {
            ("cache_prefix", "with `early_exit` computes its prefix from exit to exit")
        } else {
            return Ok(());
        };
        let (path, head) = (path.to_owned(), head.to_owned());
        Err(ModelError::NoCache { path, head, cache, why })
    }

    /// The branches of the denoiser of `checkpoint`, which has `blocks`.
    ///
    /// # Errors
    /// [`ModelError`] for a schedule that cannot be read or belongs to another policy, or a denoiser without blocks.
    pub(crate) fn branches(
        &self,
        checkpoint: &Checkpoint,
        blocks: Vec<Block>,
    ) -> Result<Branches, ModelError> {
        match &self.denoiser {
            DenoiserCache::Off => Ok(Branches::off()),
            DenoiserCache::Tuned(tuning) => {
                let branches = Branches::tuned(tuning.clone(), blocks.len());
                let weights_sha256 = checkpoint.weights_sha256();
                let mut tuned = tuning.lock();
                (tuned.blocks, tuned.weights_sha256) = (blocks, weights_sha256);
                Ok(branches)
            }
            DenoiserCache::File(path) => {
                let schedule = Schedule::read(path, &blocks, &checkpoint.weights_sha256())?;
                let config = self.monitor(schedule.reuse_error);
                Ok(Branches::scheduled(schedule, config))
            }
        }
    }

    /// The settings of the monitor of a cache whose reuses had the relative error `measured` at calibration.
    pub(crate) fn monitor(&self, measured: f64) -> MonitorConfig {
        let default = MonitorConfig::default();
        let limit = (self.tolerance.unwrap_or(TOLERANCE) * measured).max(LEAST_LIMIT);
        MonitorConfig { share: self.check.unwrap_or(default.share), limit, ..default }
    }
}
