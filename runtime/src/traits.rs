//! Where the runtime meets the world: policies, arms, cameras.

use std::time::Duration;

use crate::scheduler::strategy::StrategyConfig;
use crate::{ActionChunk, CameraFrame, ChunkRequest, Command, JointState, Observation, Stamp};

/// How far an inference has come after one [`Policy::advance`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// `done` of `total` bounded steps are behind; `stage` is the one just finished.
    Step {
        /// Stage name, as in [`crate::StageTime`].
        stage: &'static str,
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
        /// The step denoised.
        denoised: bool,
        /// Only denoise steps follow.
        next_denoises: bool,
    },
    /// The chunk is ready: call [`Policy::take_chunk`].
    Done,
}

/// Why a policy made no chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// The observation lacks a camera that the policy needs.
    #[error("the observation has no image of camera `{camera}`, which the policy needs")]
    MissingCamera {
        /// The policy's input name.
        camera: String,
    },
    /// The state's width is not the policy's.
    #[error("the observation's state has {found} values, the policy was trained with {expected}")]
    StateWidth {
        /// Width in the checkpoint.
        expected: usize,
        /// Width observed.
        found: usize,
    },
    /// A value that is no number came out.
    #[error("the policy's {what} holds a value that is not finite")]
    NotFinite {
        /// Where it was found.
        what: &'static str,
    },
    /// The request asks for something that the head does not know.
    #[error("this policy does not support {0}; choose another [scheduler] strategy")]
    Unsupported(&'static str),
    /// The prefix has another width than the actions.
    #[error("the planned prefix has {found} values an action, the policy gives {expected}")]
    PrefixWidth {
        /// Action dimension.
        expected: usize,
        /// Width of the prefix.
        found: usize,
    },
    /// More actions are frozen than the head was trained for.
    #[error(
        "{frozen} actions are frozen, the head was trained for at most {most}; a faster policy or a \
         smaller action rate helps"
    )]
    PrefixTooLong {
        /// Frozen actions.
        frozen: usize,
        /// Most that the head knows.
        most: usize,
    },
    /// The chunk cannot become joint positions, or the plan not actions of the policy.
    #[error("the policy's actions cannot be played: {0}; the log says which")]
    ActionSpace(&'static str),
    /// `advance` or `take_chunk` out of turn.
    #[error("{0}")]
    OutOfTurn(&'static str),
    /// The computation failed.
    #[error("inference failed: {0}")]
    Compute(String),
}

/// What a policy takes and gives; fixed once it is loaded.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PolicySpec {
    /// Names of the camera inputs, in the checkpoint's order (`observation.images.` cut off).
    pub cameras: Vec<String>,
    /// Cameras that may be missing from an observation.
    pub optional_cameras: usize,
    /// Width of the proprioception.
    pub state_dim: usize,
    /// Action dimension `D`.
    pub action_dim: usize,
    /// Joint names of the actions, in order; empty when the checkpoint does not say.
    pub action_names: Vec<String>,
    /// Action horizon `H`.
    pub action_horizon: usize,
    /// Actions a second that it was trained at; `None` when the checkpoint does not say.
    pub action_rate_hz: Option<f64>,
    /// Denoise steps of the checkpoint.
    pub denoise_steps: usize,
    /// Which uses of planned actions its head knows.
    pub prefix: PrefixSupport,
}

impl PolicySpec {
    /// Whether the head can be used with `strategy`.
    pub fn supports(&self, strategy: StrategyConfig) -> bool {
        match strategy {
            StrategyConfig::RtcGuided { .. } => self.prefix.guided,
            StrategyConfig::RtcTrained => self.prefix.trained.is_some(),
            // The state at the take-over is the plan's: both must mean the same.
            StrategyConfig::RollForward => self.state_dim == self.action_dim,
            _ => true,
        }
    }

    /// Time between two actions; zero when the checkpoint does not say.
    pub fn dt(&self) -> Duration {
        self.action_rate_hz.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate))
    }
}

/// What a head can do with planned actions ([`crate::Prefix`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct PrefixSupport {
    /// Guidance at inference.
    pub guided: bool,
    /// Trained on clean prefixes of at most so many actions.
    pub trained: Option<usize>,
    /// Starting from a noised guess.
    pub warm_start: bool,
}

/// A policy as an anytime task: `begin`, then `advance` until [`Progress::Done`], then `take_chunk`.
///
/// Each `advance` is one bounded step (a camera's vision tower, the prefix, one denoise step), so the
/// caller may drop an inference between two steps. The policy reports; the scheduler decides.
pub trait Policy: Send {
    /// What it takes and gives.
    fn spec(&self) -> &PolicySpec;

    /// Starts an inference, dropping an unfinished one.
    ///
    /// # Errors
    /// [`PolicyError`] when the observation does not fit [`Policy::spec`].
    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError>;

    /// After a chunk was taken: begins another of the same observation, keeping all that depends on neither noise nor
    /// prefix. False when the head cannot, or has nothing left: [`Policy::begin`] then does it.
    ///
    /// # Errors
    /// As [`Policy::begin`].
    fn resample(&mut self, _request: &ChunkRequest) -> Result<bool, PolicyError> {
        Ok(false)
    }

    /// Does one bounded step.
    ///
    /// # Errors
    /// [`PolicyError::OutOfTurn`] without `begin`; [`PolicyError::Compute`] when the step fails.
    fn advance(&mut self) -> Result<Progress, PolicyError>;

    /// The finished chunk (physical units), with the time each stage took.
    ///
    /// # Errors
    /// [`PolicyError::OutOfTurn`] before [`Progress::Done`].
    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError>;

    /// Time between the observations that the head sees together; `None` when it sees one alone.
    ///
    /// Such a policy is shown an observation in this rhythm ([`Policy::remember`]) while no chunk is wanted.
    fn history_period(&self) -> Option<Duration> {
        None
    }

    /// Takes in an observation without making a chunk of it.
    ///
    /// # Errors
    /// [`PolicyError`] when the observation does not fit [`Policy::spec`].
    fn remember(&mut self, _observation: &Observation) -> Result<(), PolicyError> {
        Ok(())
    }

    /// Changes the denoise steps of the running inference; false when it is too late or not possible.
    ///
    /// # Errors
    /// [`PolicyError::OutOfTurn`] without `begin`.
    fn set_denoise_steps(&mut self, _steps: usize) -> Result<bool, PolicyError> {
        Ok(false)
    }

    /// Forgets what was kept from earlier inferences to do less in later ones: the next is as the first after loading.
    fn forget(&mut self) {}

    /// Makes the best chunk so far the result: false when there is none yet, and the inference goes on.
    ///
    /// # Errors
    /// [`PolicyError::OutOfTurn`] without `begin`; [`PolicyError::Compute`] when the last estimate fails.
    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        Ok(false)
    }
}

/// Why a device failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct DeviceError {
    /// The device's name in the launch file.
    pub device: String,
    /// What failed, and what to do.
    pub reason: String,
}

/// An arm, as its driver's thread sees it. Watchdog and bus are around it, not in it.
pub trait ArmDriver: Send {
    /// Joint names, in command order.
    fn joint_names(&self) -> &[String];

    /// Sends the targets of `command` to the servos.
    ///
    /// # Errors
    /// [`DeviceError`] when the device did not take it.
    fn write(&mut self, command: &Command) -> Result<(), DeviceError>;

    /// The measured state at about `now`; the caller numbers it.
    ///
    /// # Errors
    /// [`DeviceError`] when the device did not answer.
    fn read(&mut self, now: Stamp) -> Result<JointState, DeviceError>;

    /// Brings the arm to rest where it is and holds it there with torque on, also when it was off.
    ///
    /// # Errors
    /// [`DeviceError`] when the device did not take it.
    fn hold(&mut self) -> Result<(), DeviceError>;

    /// Takes the torque off at once; an arm without brakes may fall.
    ///
    /// # Errors
    /// [`DeviceError`] when the device did not take it, or cannot do it: the caller then holds.
    fn torque_off(&mut self) -> Result<(), DeviceError> {
        Err(DeviceError {
            device: "arm".to_owned(),
            reason: "its driver cannot take the torque off; set on_silence and on_stop to \"hold\""
                .to_owned(),
        })
    }

    /// A joint that moves slower than this (rad/s) stands still.
    fn standstill_speed(&self) -> f64 {
        0.02
    }
}

/// A camera, as its driver's thread sees it.
pub trait Camera: Send {
    /// Time between two frames.
    fn frame_period(&self) -> Duration;

    /// Takes one frame; the caller numbers it.
    ///
    /// # Errors
    /// [`DeviceError`] when the camera gave no frame.
    fn capture(&mut self) -> Result<CameraFrame, DeviceError>;
}
