//! What goes into the control cycle and what comes out of it: plain data.

use std::time::Duration;

use super::residual::{ResidualRefusal, ResidualSample};
use super::teleop::{SampleRefusal, TeleopConfig, TeleopSample};
use crate::arbiter::{
    ArbiterConfig, Authority, AuthorityChange, AuthorityRequest, Denied, Source, Standing,
};
use crate::guard::Interventions;
use crate::scheduler::{ChunkOrder, Mode, Refusal, SchedulerConfig};
use crate::{ActionChunk, Command, JointLimits, JointState, Stamp};

/// Settings of the control cycle.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ControlConfig {
    /// Limits, one per joint.
    pub limits: Vec<JointLimits>,
    /// Control period.
    pub period: Duration,
    /// Measured state older than this is stale.
    pub state_timeout: Duration,
    /// Scheduler settings.
    pub scheduler: SchedulerConfig,
}

/// Who may have authority, and how a person's motions are followed.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct AuthorityConfig {
    /// The arbiter's settings.
    pub arbiter: ArbiterConfig,
    /// Teleoperation.
    pub teleop: TeleopConfig,
}

/// A request that came over the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OperatorRequest {
    /// Number that the answer carries back; zero when nobody waits for one.
    pub ticket: u64,
    /// Who asks.
    pub by: Source,
    /// What for.
    pub request: AuthorityRequest,
}

/// What became of an [`OperatorRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OperatorAnswer {
    /// The request's number.
    pub ticket: u64,
    /// Granted, or why not.
    pub result: Result<(), Denied>,
    /// Who holds authority now.
    pub standing: Standing,
}

/// What happened since the last cycle. All but the chunks are plain numbers (`Copy`).
#[derive(Debug)]
pub enum ControlEvent {
    /// The arm's measured state arrived.
    State(JointState),
    /// The policy answered a request.
    Chunk(ActionChunk),
    /// The policy could not answer the request of this number.
    ChunkFailed(u64),
    /// The run asks for authority.
    Authority(AuthorityRequest),
    /// Somebody on the bus asks for authority.
    Operator(OperatorRequest),
    /// A teleop device's sample.
    Teleop(TeleopSample),
    /// A residual policy's offset.
    Residual(ResidualSample),
    /// A motion of the runtime's own: asks for authority `Motion` and plays it.
    Motion(ActionChunk),
}

/// What an event led to.
#[derive(Debug, Default)]
pub struct Effect {
    /// A chunk to be freed on another thread.
    pub freed: Option<ActionChunk>,
    /// Why the event's chunk was not taken.
    pub refused: Option<Refusal>,
    /// The event's chunk plays now.
    pub accepted: bool,
    /// A change of authority.
    pub change: Option<AuthorityChange>,
    /// The answer to an operator who waits for one.
    pub answer: Option<OperatorAnswer>,
    /// Why a teleop sample was left out.
    pub sample_refused: Option<SampleRefusal>,
    /// Why a residual policy's offset was left out.
    pub residual_refused: Option<ResidualRefusal>,
}

/// Plain numbers of one control cycle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CycleReport {
    /// Number of the cycle, from 1.
    pub sequence: u64,
    /// When the cycle was due.
    pub due: Stamp,
    /// From due to wake-up.
    pub lateness: Duration,
    /// From wake-up to hand-over.
    pub work: Duration,
    /// Whole periods that were slept through before this cycle.
    pub missed: u32,
    /// Who held authority.
    pub authority: Authority,
    /// An operator must agree before the policy moves again.
    pub awaits_consent: bool,
    /// What was followed.
    pub mode: Mode,
    /// Time until the executing chunk is played out.
    pub buffer_left: Duration,
    /// Age of the measured state.
    pub state_age: Duration,
    /// What the guard changed.
    pub interventions: Interventions,
    /// This cycle was the first to follow a teleop sample: time since that arrived.
    pub teleop_delay: Option<Duration>,
    /// The publisher's ring was full: the command was not handed over.
    pub dropped: bool,
}

/// One cycle's result.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Cycle {
    /// The command; none before the first measured state, when nobody knows where the arm is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Command>,
    /// A request for the next chunk.
    pub order: Option<ChunkOrder>,
    /// Authority changed in this cycle.
    pub change: Option<AuthorityChange>,
    /// Who holds authority, and what the policy waits for.
    pub standing: Standing,
    /// Who holds authority.
    pub authority: Authority,
    /// What was followed.
    pub mode: Mode,
    /// Time until the executing chunk is played out.
    pub buffer_left: Duration,
    /// Seconds of chunks played since authority was given.
    pub played: f64,
    /// Age of the measured state.
    pub state_age: Duration,
    /// What the guard changed.
    pub interventions: Interventions,
    /// This cycle was the first to follow a teleop sample: time since that arrived.
    pub teleop_delay: Option<Duration>,
}

impl Effect {
    /// The chunk that its place was taken from, or the refused one, is to be freed.
    pub(super) fn take(&mut self, result: Result<Option<ActionChunk>, (ActionChunk, Refusal)>) {
        match result {
            Ok(before) => (self.freed, self.accepted) = (before, true),
            Err((chunk, why)) => (self.freed, self.refused) = (Some(chunk), Some(why)),
        }
    }
}
