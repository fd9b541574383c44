//! Calibration's handle on a loaded denoiser.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::likeness::Likeness;
use super::super::monitor::MonitorConfig;
use super::super::plan::Block;
use super::super::schedule::Schedule;

/// What is done with the branches, set from outside while a policy is loaded: calibration's handle.
#[derive(Debug, Clone, Default)]
pub struct Tuning(Arc<Mutex<Tuned>>);

impl PartialEq for Tuning {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// See [`Tuning`].
#[derive(Debug, Default)]
pub struct Tuned {
    /// What the next denoising does.
    pub mode: TunedMode,
    /// The policy's blocks, once it was loaded.
    pub blocks: Vec<Block>,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
    /// Positions of the newest recorded denoising's evaluations.
    pub positions: Vec<f64>,
    /// What was recorded, block by block.
    pub likeness: Vec<Likeness>,
    /// What was recorded of the whole network's output.
    pub whole: Option<Likeness>,
    /// Errors of the reuses that were compared.
    pub errors: Vec<f64>,
}

/// What a tuned denoiser does.
#[derive(Debug, Clone, Default)]
pub enum TunedMode {
    /// It computes everything.
    #[default]
    Off,
    /// It computes everything and records it.
    Record,
    /// It follows a schedule, comparing as the monitor's settings say.
    Reuse(Arc<Schedule>, MonitorConfig),
}

/// Outputs of one denoising.
#[derive(Default)]
pub(super) struct Recorded {
    /// Block by block and evaluation by evaluation.
    pub blocks: Vec<Vec<Vec<f32>>>,
    /// The whole network's, evaluation by evaluation.
    pub whole: Vec<Vec<f32>>,
    pub positions: Vec<f64>,
}

impl Tuning {
    /// What is set and was found.
    pub fn lock(&self) -> MutexGuard<'_, Tuned> {
        // Whole values only: whoever panicked while holding it left it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tuned {
    /// Takes in the outputs of one denoising.
    pub(super) fn recorded(&mut self, recorded: Recorded) {
        let count = recorded.positions.len();
        self.likeness.retain(|seen| seen.evaluations() == count);
        if self.likeness.len() != recorded.blocks.len() {
            self.likeness = recorded.blocks.iter().map(|_| Likeness::new(count)).collect();
            self.whole = None;
        }
        for (seen, outputs) in self.likeness.iter_mut().zip(&recorded.blocks) {
            // One that is no number makes no sample; the chunk itself is refused then.
            let _ = seen.add(outputs);
        }
        let _ = self.whole.get_or_insert_with(|| Likeness::new(count)).add(&recorded.whole);
        self.positions = recorded.positions;
    }
}
