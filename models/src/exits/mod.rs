//! Early exit: an inference may end before the network's last layer, when the actions no longer change from exit to exit.
//!
//! Source: A1 (arXiv 2604.05672). With exits after layers `i_1 < i_2 < …` of a stack whose head reads every layer, exit `k`
//! makes its actions with the network truncated to `i_k` layers, by a few flow steps that start from the actions of the exit
//! before, as if these were noise (inter-layer truncated flow). The inference ends where the gap between the two is below a
//! threshold. Layers behind the exit are not computed at all.
//!
//! The network must have been trained to end there, or it must be measured what ending there costs: calibration does that
//! in every case, and gives no thresholds where it is more than is allowed.

mod calibrate;
mod file;
mod options;
mod rule;
mod running;

pub use calibrate::{
    ExitCalibration, ExitCalibrationError, ExitCalibrationPlan, LEAST_OBSERVATIONS, TriedExits,
    calibrate,
};
pub use file::ExitPlan;
pub use options::{EarlyExit, ExitTuned, ExitTuning, SeenExits};
pub use rule::{Gap, LEAST_EXITS, ends, shares, taken, thresholds};
pub(crate) use running::{Exiting, Exits};

/// Name of early exits in reports.
pub const EARLY_EXIT: &str = "early_exit";
