//! Where a policy's exits come from, and calibration's handle on them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::file::ExitPlan;

/// Where a policy's early exits come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum EarlyExit {
    /// There are none.
    #[default]
    Off,
    /// A file that `sinew calibrate exit` wrote.
    File(PathBuf),
    /// From outside, from chunk to chunk.
    Tuned(ExitTuning),
}

/// What is done at the exits, set from outside while a policy is loaded: calibration's handle.
#[derive(Debug, Clone, Default)]
pub struct ExitTuning(Arc<Mutex<ExitTuned>>);

impl PartialEq for ExitTuning {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl ExitTuning {
    /// What is set and was found.
    pub fn lock(&self) -> MutexGuard<'_, ExitTuned> {
        // Whole values only: whoever panicked while holding it left it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`ExitTuning`].
#[derive(Debug, Default)]
pub struct ExitTuned {
    /// The exits that the next inference goes through, which is recorded; none: it is that of the whole network.
    pub plan: Option<ExitPlan>,
    /// The policy's layers, once it was loaded.
    pub depth: usize,
    /// The exits that its checkpoint says it was trained with.
    pub trained: Option<Vec<usize>>,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
    /// What was recorded, inference by inference.
    pub seen: Vec<SeenExits>,
}

/// What one inference was at its exits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SeenExits {
    /// Gaps of the second exit and those after it, in the network's units.
    pub gaps: Vec<f64>,
    /// The actions at each exit, `[H, D]` row by row, in physical units.
    pub actions: Vec<Vec<f64>>,
    /// Time of prefix and denoising until each exit.
    pub times: Vec<Duration>,
}
