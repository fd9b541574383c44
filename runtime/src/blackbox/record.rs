//! What is recorded: plain `Copy` records of the control thread, and serialisable ones of the others.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::action_space::JointMap;
use crate::arbiter::{AuthorityChange, AuthorityRequest};
use crate::control::{
    AuthorityConfig, ControlConfig, ControlEvent, Cycle, Effect, OperatorAnswer, OperatorRequest,
    ResidualConfig, ResidualRefusal, ResidualSample, SampleRefusal, TeleopSample,
};
use crate::guard::SpaceConfig;
use crate::scheduler::Refusal;
use crate::{
    ActionChunk, CacheUse, ChunkRequest, Clock, JointState, JointVec, Observation, Reach, Stamp,
};

/// Which camera frames are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Images {
    /// Every frame that came in.
    #[default]
    All,
    /// Only those that the policy was given: enough to replay, not to ask what another strategy would have seen.
    Observed,
    /// None: the policy cannot be replayed.
    None,
}

/// The first record: what the run was made with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of Sinew.
    pub version: String,
    /// When recording began.
    pub started: Stamp,
    /// What was added to the monotonic clock to make stamps (ns).
    pub clock_offset_ns: i64,
    /// The robot's name on the bus.
    pub robot: String,
    /// The arm's joints, in order.
    pub joints: Vec<String>,
    /// Scheduler, arbiter and guard as they were set.
    pub control: ControlConfig,
    /// Who could have authority, and how a person's motions were followed.
    pub authority: AuthorityConfig,
    /// Where the arm could be; `None`: anywhere within its limits.
    pub space: Option<SpaceConfig>,
    /// The residual stage; `None`: there was none.
    #[serde(default)]
    pub residual: Option<ResidualConfig>,
    /// Denoise steps that were wanted; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Seed of the first chunk's noise; each further chunk counted up.
    pub seed: u64,
    /// The cameras of an observation, in order: (policy's name, robot's name).
    pub views: Vec<(String, String)>,
    /// Older parts made no observation.
    pub max_observation_age: Duration,
    /// Which frames are in the file.
    pub images: Images,
    /// How the policy's actions became joint positions; `None` when they were.
    #[serde(default)]
    pub actions: Option<JointMap>,
    /// Where the policy was, as the launch file names it.
    pub policy: String,
    /// SHA-256 of each of the policy's files (weights, configuration, statistics), by name.
    pub policy_sha256: BTreeMap<String, String>,
    /// The launch file's text, as written.
    pub launch_text: String,
    /// The launch as it was resolved, with its arguments.
    pub launch: serde_json::Value,
    /// The computer.
    pub machine: serde_json::Value,
}

impl Header {
    /// The header of a run of `robot` with `joints`, set as `control` says: begun now, without a policy.
    pub fn new(robot: &str, joints: &[String], control: &ControlConfig) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: Clock::now(),
            clock_offset_ns: Clock::offset(),
            robot: robot.to_owned(),
            joints: joints.to_vec(),
            control: control.clone(),
            authority: AuthorityConfig::default(),
            space: None,
            residual: None,
            denoise_steps: None,
            seed: 0,
            views: Vec::new(),
            max_observation_age: Duration::MAX,
            images: Images::default(),
            actions: None,
            policy: String::new(),
            policy_sha256: BTreeMap::new(),
            launch_text: String::new(),
            launch: serde_json::Value::Null,
            machine: serde_json::Value::Null,
        }
    }
}

/// A chunk without its actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkHead {
    /// The request that it answers.
    pub request: u64,
    /// Instant of its observation.
    pub instant: Stamp,
    /// Time between two actions.
    pub dt: Duration,
    /// Action dimension `D`.
    pub dim: usize,
    /// Action horizon `H`.
    pub horizon: usize,
}

impl ChunkHead {
    /// The head of `chunk`.
    pub fn of(chunk: &ActionChunk) -> Self {
        let ActionChunk { request, instant, dt, .. } = *chunk;
        Self { request, instant, dt, dim: chunk.dim(), horizon: chunk.horizon() }
    }

    /// The chunk of this head and `values`; `None` when they do not fit it.
    pub fn with(self, values: Vec<f64>) -> Option<ActionChunk> {
        let whole = self.dim.checked_mul(self.horizon) == Some(values.len());
        ActionChunk::new(self.request, self.instant, self.dt, self.dim, values)
            .ok()
            .filter(|_| whole)
    }
}

/// A [`ControlEvent`], its chunk cut to the head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventRecord {
    /// [`ControlEvent::State`].
    State(JointState),
    /// [`ControlEvent::Chunk`].
    Chunk(ChunkHead),
    /// [`ControlEvent::ChunkFailed`].
    ChunkFailed(u64),
    /// [`ControlEvent::Authority`].
    Authority(AuthorityRequest),
    /// [`ControlEvent::Operator`].
    Operator(OperatorRequest),
    /// [`ControlEvent::Teleop`].
    Teleop(TeleopSample),
    /// [`ControlEvent::Residual`].
    Residual(ResidualSample),
    /// [`ControlEvent::Motion`].
    Motion(ChunkHead),
}

impl EventRecord {
    /// `event` and, apart, the chunk that it carries.
    pub fn split(event: &ControlEvent) -> (Self, Option<&ActionChunk>) {
        match event {
            ControlEvent::State(state) => (Self::State(*state), None),
            ControlEvent::Chunk(chunk) => (Self::Chunk(ChunkHead::of(chunk)), Some(chunk)),
            ControlEvent::ChunkFailed(request) => (Self::ChunkFailed(*request), None),
            ControlEvent::Authority(request) => (Self::Authority(*request), None),
            ControlEvent::Operator(request) => (Self::Operator(*request), None),
            ControlEvent::Teleop(sample) => (Self::Teleop(*sample), None),
            ControlEvent::Residual(sample) => (Self::Residual(*sample), None),
            ControlEvent::Motion(chunk) => (Self::Motion(ChunkHead::of(chunk)), Some(chunk)),
        }
    }

    /// The event again, with `chunk` where it carries one; `None` when that is missing.
    pub fn join(self, chunk: Option<ActionChunk>) -> Option<ControlEvent> {
        Some(match self {
            Self::State(state) => ControlEvent::State(state),
            Self::Chunk(_) => ControlEvent::Chunk(chunk?),
            Self::ChunkFailed(request) => ControlEvent::ChunkFailed(request),
            Self::Authority(request) => ControlEvent::Authority(request),
            Self::Operator(request) => ControlEvent::Operator(request),
            Self::Teleop(sample) => ControlEvent::Teleop(sample),
            Self::Residual(sample) => ControlEvent::Residual(sample),
            Self::Motion(_) => ControlEvent::Motion(chunk?),
        })
    }

    /// The head of the chunk that it carries.
    pub fn head(&self) -> Option<ChunkHead> {
        match self {
            Self::Chunk(head) | Self::Motion(head) => Some(*head),
            _ => None,
        }
    }
}

/// An [`Effect`] without the chunk that it frees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EffectRecord {
    /// The event's chunk plays.
    pub accepted: bool,
    /// Why it was not taken.
    pub refused: Option<Refusal>,
    /// Authority changed.
    pub change: Option<AuthorityChange>,
    /// What an operator was answered.
    pub answer: Option<OperatorAnswer>,
    /// Why a teleop sample was left out.
    pub sample_refused: Option<SampleRefusal>,
    /// Why a residual policy's offset was left out.
    #[serde(default)]
    pub residual_refused: Option<ResidualRefusal>,
}

impl EffectRecord {
    /// What `effect` says.
    pub fn of(effect: &Effect) -> Self {
        let Effect {
            accepted,
            refused,
            change,
            answer,
            sample_refused,
            residual_refused,
            freed: _,
        } = effect;
        Self {
            accepted: *accepted,
            refused: *refused,
            change: *change,
            answer: *answer,
            sample_refused: *sample_refused,
            residual_refused: *residual_refused,
        }
    }
}

/// One control cycle.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CycleRecord {
    /// Counts the cycles, from 1.
    pub number: u64,
    /// The time that the cycle was given.
    pub now: Stamp,
    /// When it was due.
    pub due: Stamp,
    /// Whole periods slept through before it.
    pub missed: u32,
    /// Time of the work of the cycle before.
    pub last_work: Duration,
    /// Its result.
    pub cycle: Cycle,
}

/// One record of the control thread.
// Boxing would allocate on the control thread.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ControlRecord {
    /// The core is given an event. The values of its chunk follow.
    Event {
        /// The cycle that it belongs to.
        cycle: u64,
        /// The time that it was given with.
        now: Stamp,
        /// The event.
        event: EventRecord,
    },
    /// Values of the chunk of the event before, row-major, as many as fit.
    Values(JointVec),
    /// What the event before led to, when that is something.
    Effect(EffectRecord),
    /// The core made a cycle.
    Cycle(CycleRecord),
    /// This many records before had no room.
    Lost(u64),
}

/// What is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapKind {
    /// Records of the control thread: an exact replay ends here.
    Control,
    /// Camera frames.
    Frames,
    /// Joint states, as received.
    States,
    /// Inferences.
    Inferences,
    /// Notes.
    Notes,
}

impl GapKind {
    /// All kinds.
    pub const ALL: [GapKind; 5] =
        [Self::Control, Self::Frames, Self::States, Self::Inferences, Self::Notes];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control records",
            Self::Frames => "frames",
            Self::States => "joint states",
            Self::Inferences => "inferences",
            Self::Notes => "notes",
        }
    }
}

/// Something said of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Note {
    /// The instruction from now on.
    Instruction(String),
    /// An episode ended so.
    Episode(serde_json::Value),
}

/// Records that had no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Which.
    pub kind: GapKind,
    /// How many.
    pub lost: u64,
}

/// A frame that an observation used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// The robot's name of the camera.
    pub camera: String,
    /// The frame's number.
    pub sequence: u64,
    /// Its stamp.
    pub stamp: Stamp,
    /// Its age when it was observed.
    pub age: Duration,
}

/// An observation, its frames by number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObservationRecord {
    /// The instant that it describes.
    pub instant: Stamp,
    /// Its frames, in order.
    pub images: Vec<ImageRef>,
    /// Joint positions (rad); `null` where not finite.
    pub proprioception: Vec<Option<f64>>,
    /// Age of the joint state.
    pub proprioception_age: Duration,
    /// The language input.
    pub instruction: String,
}

impl ObservationRecord {
    /// The record of `seen`.
    pub fn of(seen: &Observation) -> Self {
        let image = |i: &crate::ObservedImage| ImageRef {
            camera: i.camera.clone(),
            sequence: i.frame.sequence,
            stamp: i.frame.stamp,
            age: i.age,
        };
        Self {
            instant: seen.instant,
            images: seen.images.iter().map(image).collect(),
            proprioception: seen
                .proprioception
                .iter()
                .map(|v| v.is_finite().then_some(*v))
                .collect(),
            proprioception_age: seen.proprioception_age,
            instruction: seen.instruction.clone(),
        }
    }
}

/// How an inference ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InferenceResult {
    /// With a chunk, whose values the control thread's event holds.
    Chunk {
        /// Its head.
        head: ChunkHead,
        /// What each stage took, in order.
        stages: Vec<(String, Duration)>,
        /// Denoise steps that were done.
        denoise_steps: usize,
        /// What each cache did, by name.
        caches: Vec<(String, CacheUse)>,
        /// How well the joints meet the policy's poses.
        #[serde(default)]
        reach: Option<Reach>,
    },
    /// With an error.
    Failed(String),
    /// It was dropped for a newer order.
    Dropped,
}

/// A change of an inference under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Steering {
    /// After so many steps it was given another number of denoise steps.
    Steps {
        /// Steps done by then.
        after: usize,
        /// Denoise steps from then on.
        steps: usize,
    },
    /// After so many steps it was ended with the best chunk so far.
    Finish {
        /// Steps done by then.
        after: usize,
    },
}

/// One inference: what was asked, seen and made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferenceRecord {
    /// When the policy began.
    pub begun: Stamp,
    /// When it ended.
    pub ended: Stamp,
    /// The request, as asked.
    pub request: ChunkRequest,
    /// What it saw.
    pub observation: ObservationRecord,
    /// How it was changed under way.
    pub steering: Vec<Steering>,
    /// What it made.
    pub result: InferenceResult,
}
