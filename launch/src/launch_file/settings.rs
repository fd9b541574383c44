//! What a launch file says, in the runtime's units: plain data.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use sinew_models::onnx::Engine;
use sinew_runtime::blackbox::Images;
use sinew_runtime::rt::RealtimeMode;

use crate::supervise::Restart;

use super::action_space::ActionSettings;
use super::args::Argument;
use super::authority::AuthoritySettings;
use super::cache::CacheSettings;
use super::finding::Finding;
use super::kernels::KernelSettings;
use super::sampling::SamplingSettings;
use super::scheduling::SchedulerSettings;
use super::space::SpaceSettings;

/// A launch, read and checked as far as the file alone allows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaunchConfig {
    /// The file that it came from.
    pub file: PathBuf,
    /// Its arguments.
    pub arguments: Vec<Argument>,
    /// The arm.
    pub robot: RobotConfig,
    /// The cameras, by name.
    pub cameras: Vec<CameraConfig>,
    /// The policy.
    pub policy: PolicySettings,
    /// The scheduler.
    pub scheduler: SchedulerSettings,
    /// The control thread and the guard.
    pub control: ControlSettings,
    /// Authority, teleoperation and stops.
    pub authority: AuthoritySettings,
    /// Where the runtime listens and the drivers connect.
    pub endpoint: String,
    /// The black box.
    pub record: RecordSettings,
    #[serde(skip)]
    pub(super) lines: Vec<(&'static str, usize)>,
}

/// The black box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordSettings {
    /// The file; `None`: no recording, unless `--record` names one.
    pub file: Option<PathBuf>,
    /// Which frames are in it.
    pub images: Images,
}

/// Where a part runs, and what happens when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RunSettings {
    /// It is a supervised process of its own, not threads of the launching one.
    pub process: bool,
    /// What the supervisor does when the process fails.
    pub restart: Restart,
}

/// The arm.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RobotConfig {
    /// Its name on the bus.
    pub name: String,
    /// Which driver.
    pub driver: String,
    /// Joints and limits; `None` for the driver's own.
    pub description: Option<PathBuf>,
    /// Time between two measured states.
    pub state_period: Duration,
    /// No command for this long: the arm holds by itself.
    pub watchdog: Duration,
    /// Where its driver runs.
    pub run: RunSettings,
    /// Seed of the first scene (simulation).
    pub seed: u64,
}

/// A camera.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CameraConfig {
    /// The robot's name of it.
    pub name: String,
    /// Which driver.
    pub driver: String,
    /// Width and height (pixels).
    pub size: [usize; 2],
    /// Time between two frames.
    pub period: Duration,
    /// Where its driver runs.
    pub run: RunSettings,
    /// Line of its section.
    pub line: usize,
}

/// The policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicySettings {
    /// Bundle or checkpoint folder.
    pub file: PathBuf,
    /// The instruction; empty for each scene's own.
    pub instruction: String,
    /// The text that it stands in, in place of `{instruction}`.
    pub prompt: Option<String>,
    /// The policy's input and the robot's camera.
    pub cameras: Vec<(String, String)>,
    /// What its actions are.
    pub actions: ActionSettings,
    /// Candidates and memory.
    pub sampling: SamplingSettings,
    /// What need not be computed again.
    pub cache: CacheSettings,
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Arithmetic and threads of the network.
    pub kernels: KernelSettings,
    /// Older parts make no observation.
    pub max_observation_age: Duration,
    /// What runs ONNX files.
    pub onnx_engine: Engine,
    /// ONNX Runtime's library; `None`: looked for.
    pub onnx_library: Option<PathBuf>,
    /// The residual stage.
    pub residual: Option<ResidualSettings>,
    /// Where it runs.
    pub run: RunSettings,
    /// Seed of the noise.
    pub seed: u64,
}

/// A network that corrects the plan at control rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResidualSettings {
    /// Folder with its manifest.
    pub folder: PathBuf,
    /// Largest correction of each joint (rad).
    pub limit: f64,
}

/// Control thread and guard.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ControlSettings {
    /// Control period.
    pub period: Duration,
    /// Commands a second.
    pub rate_hz: f64,
    /// How much of real time is demanded.
    pub realtime: RealtimeMode,
    /// `SCHED_FIFO` priority.
    pub priority: i32,
    /// Measured state older than this is stale.
    pub state_timeout: Duration,
    /// Share of the description's speed limits that the guard allows.
    pub velocity_scale: f64,
    /// Share of the description's acceleration limits that the guard allows.
    pub acceleration_scale: f64,
    /// The processor that the control thread runs on; `None`: any.
    pub cpu: Option<usize>,
    /// Share of the description's jerk limits that the guard allows.
    pub jerk_scale: f64,
    /// Where the arm may be.
    pub space: SpaceSettings,
}

impl LaunchConfig {
    /// A finding at `key`, whose value is `value`.
    pub fn finding(
        &self,
        key: &'static str,
        value: impl ToString,
        problem: impl ToString,
        remedy: impl ToString,
    ) -> Finding {
        Finding {
            file: self.file.clone(),
            line: self.lines.iter().find(|l| l.0 == key).map(|l| l.1),
            key: key.to_owned(),
            value: value.to_string(),
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        }
    }
}
