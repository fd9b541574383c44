//! The scheduler: turns overlapping, late action chunks into one continuous wish for the guard.
//!
//! A pure state machine on the control thread. It plays the executing chunk, asks for the next one while
//! that still runs, and splices a new chunk at the number of actions *really executed* since the new
//! chunk's instant, which it counts itself; the predicted latency only decides when to ask and how much of
//! the plan is frozen. When to ask and how chunks follow each other is the [`strategy`]'s; the blocks
//! themselves lie in one place. The step between the old curve and the new one decays over a bounded
//! join, so position, velocity and acceleration stay continuous. A chunk played to its end leaves the
//! arm at rest on its last action.

mod blocks;
mod curve;
mod history;
mod join;

pub mod starvation;
pub mod strategy;

use std::time::Duration;

use crate::latency::LatencyWindow;
use crate::{ActionChunk, ActionKind, JointLimits, JointVec, PlannedBlock, Stamp};
use blocks::{Arrival, Blocks};
use curve::Curve;
use history::{Entry, History};
use strategy::{Guide, Incoming, PlanView, Strategy, StrategyConfig};

pub use curve::MAX_HORIZON;
pub use join::{CommandState, JoinBounds};

/// How one joint is played.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JointPlay {
    /// What its actions mean.
    pub kind: ActionKind,
    /// What a join may add to its motion.
    pub join: JoinBounds,
}

/// How chunks are played.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SchedulerConfig {
    /// The joints, in the arm's order.
    pub joints: Vec<JointPlay>,
    /// Control period.
    pub control_period: Duration,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
    /// The policy's tail latency, measured before the start; replaced by what is seen while running.
    pub latency: Option<Duration>,
    /// Plans never count on less than this: a policy that is often done early takes as long now and then.
    #[serde(default)]
    pub least_latency: Duration,
}

impl SchedulerConfig {
    /// The defaults for joints with `limits`, all of them positions: chunks replace each other.
    pub fn new(limits: &[JointLimits], control_period: Duration, execution_horizon: usize) -> Self {
        let joint = |limits| JointPlay { kind: ActionKind::Position, join: JoinBounds::of(limits) };
        Self {
            joints: limits.iter().map(joint).collect(),
            control_period,
            execution_horizon,
            strategy: StrategyConfig::default(),
            latency: None,
            least_latency: Duration::ZERO,
        }
    }
}

/// A demand for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ChunkOrder {
    /// Number of the request; the chunk carries it back.
    pub request: u64,
    /// When it was made.
    pub at: Stamp,
    /// When the chunk is expected: the tail of the latencies seen.
    pub expected: Stamp,
    /// When the executing chunk is played out; `None` when nothing plays.
    pub deadline: Option<Stamp>,
    /// What the head is to know of the plan ([`Scheduler::plan`]).
    pub guide: Guide,
}

/// Why a chunk was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It answers no open request (authority changed, or it came twice).
    NotAsked,
    /// Its actions have not one value per joint, or no time between them.
    WrongShape,
    /// It has more than [`MAX_HORIZON`] actions.
    TooLong,
    /// It holds a value that is not finite.
    NotFinite,
    /// All of its actions are in the past.
    Expired,
}

/// What the arm follows right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nothing is to be played.
    Idle,
    /// The first chunk has not come yet.
    Waiting,
    /// A chunk is being played.
    Playing,
    /// The chunk is played out and the next is late.
    Starved,
}

/// What the scheduler wants in one control period.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wish {
    /// Position (rad).
    pub position: JointVec,
    /// Velocity (rad/s).
    pub velocity: JointVec,
    /// What is being followed.
    pub mode: Mode,
    /// Time until the executing chunk is played out.
    pub buffer_left: Duration,
}

/// An order that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Open {
    request: u64,
    at: Stamp,
    /// Play time (s) that the chunk belongs to; `None`: that of its observation.
    anchor: Option<f64>,
}

/// The scheduler of one arm.
///
/// Real time: [`Scheduler::tick`], [`Scheduler::due`] and [`Scheduler::on_chunk`] neither allocate nor free; a
/// chunk that is no longer needed is handed back to be freed elsewhere.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    kinds: Vec<ActionKind>,
    strategy: Box<dyn Strategy>,
    active: bool,
    /// Where the arm is to stay while nothing is played.
    rest: JointVec,
    blocks: Blocks,
    history: History,
    latency: LatencyWindow,
    open: Option<Open>,
    plan: Option<PlannedBlock>,
    retired: Option<ActionChunk>,
    /// Play time (s) of the last order.
    ordered: f64,
    next_request: u64,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(config: SchedulerConfig) -> Self {
        let kinds: Vec<_> = config.joints.iter().map(|j| j.kind).collect();
        Self {
            strategy: config.strategy.build(),
            active: false,
            rest: JointVec::zeros(kinds.len()),
            blocks: Blocks::new(Curve::new(kinds.clone())),
            history: History::new(),
            latency: LatencyWindow::new(),
            open: None,
            plan: None,
            retired: None,
            ordered: 0.0,
            next_request: 1,
            kinds,
            config,
        }
    }

    /// Begins anew from rest at `position` (rad); an executing chunk is handed back.
    ///
    /// Requests still open are forgotten: what answers them is refused.
    pub fn start(&mut self, position: &JointVec) -> Option<ActionChunk> {
        let freed = self.stop();
        self.active = true;
        self.rest = *position;
        freed
    }

    /// Ends playing; the executing chunk is handed back.
    pub fn stop(&mut self) -> Option<ActionChunk> {
        self.active = false;
        self.history.clear();
        (self.open, self.plan, self.ordered) = (None, None, 0.0);
        let [executing, next] = self.blocks.clear();
        self.retire(next);
        executing
    }

    /// A chunk to be freed on another thread; call it after [`Scheduler::tick`] and [`Scheduler::stop`].
    pub fn take_retired(&mut self) -> Option<ActionChunk> {
        self.retired.take()
    }

    /// Keeps `chunk` for [`Scheduler::take_retired`].
    fn retire(&mut self, chunk: Option<ActionChunk>) {
        // Both places are full only when nobody takes: a leak is better than a free on this thread.
        if let (Some(left), true) = (self.retired.take(), chunk.is_some()) {
            std::mem::forget(left);
        }
        self.retired = chunk.or(self.retired.take());
    }

    /// The wish for the period that begins at `now`, the arm being commanded to `command`; counts what it executes.
    pub fn tick(&mut self, now: Stamp, command: &CommandState) -> Wish {
        if let Some((chunk, anchor)) = self.blocks.take_due() {
            let before = self.splice(chunk, anchor, command);
            self.retire(before);
        }
        let mut wish = Wish {
            position: self.rest,
            velocity: JointVec::zeros(self.kinds.len()),
            mode: if self.active { Mode::Waiting } else { Mode::Idle },
            buffer_left: Duration::ZERO,
        };
        let ended = self.blocks.progress().is_some_and(|(phase, end)| phase + 1e-6 >= end);
        if let Some(played) = self.blocks.advance(self.config.control_period.as_secs_f64()) {
            wish.mode = if ended { Mode::Starved } else { Mode::Playing };
            wish.position = played.state.position;
            wish.velocity = played.state.velocity;
            let left = (played.end - played.phase).max(0.0);
            wish.buffer_left = self.blocks.dt().unwrap_or_default().mul_f64(left);
            self.rest = wish.position;
        }
        let played = self.blocks.played();
        self.history.push(Entry { at: now, played, position: wish.position });
        wish
    }

    /// Seconds played since the start.
    pub fn played(&self) -> f64 {
        self.blocks.played()
    }

    /// A request for the next chunk, when the strategy says that it is time for one.
    pub fn due(&mut self, now: Stamp) -> Option<ChunkOrder> {
        if !self.active || self.open.is_some() || self.blocks.waits() {
            return None;
        }
        let latency = self.latency.tail().or(self.config.latency).unwrap_or_default();
        let latency = latency.max(self.config.least_latency);
        let dt = self.blocks.dt().unwrap_or(self.config.control_period).as_secs_f64();
        let progress = self.blocks.progress();
        let (phase, end) = progress.unwrap_or_default();
        let lead = latency.as_secs_f64() / dt;
        let execution_horizon = self.config.execution_horizon as f64;
        let view = PlanView {
            phase: progress.map(|p| p.0),
            end,
            lead,
            since_order: (self.blocks.played() - self.ordered) / dt,
            execution_horizon,
        };
        let mut guide = self.strategy.ask(&view)?;
        let mut anchor = None;
        self.plan = match guide {
            Guide::Free => None,
            Guide::Guided { .. } | Guide::Trained => self.blocks.plan(now, &self.history),
            Guide::RollForward => {
                // Takes over at the execution horizon, or when the chunk can be there at the earliest.
                let ahead = (execution_horizon.max(phase + lead).min(end) - phase).max(0.0) * dt;
                anchor = progress.map(|_| self.blocks.played() + ahead);
                self.blocks.plan_from(now, ahead)
            }
        };
        if self.plan.is_none() {
            guide = Guide::Free;
        }
        let request = self.next_request;
        self.next_request += 1;
        self.ordered = self.blocks.played();
        self.open = Some(Open { request, at: now, anchor });
        let left = Duration::from_secs_f64((end - phase).max(0.0) * dt);
        let deadline = progress.map(|_| now + left);
        Some(ChunkOrder { request, at: now, expected: now + latency, deadline, guide })
    }

    /// What the last order's head is to know of the plan; `None` when its guide is [`Guide::Free`].
    pub fn plan(&self) -> Option<&PlannedBlock> {
        self.plan.as_ref()
    }

    /// A policy gave up on `request`: it may be asked for again.
    pub fn on_failure(&mut self, request: u64) {
        self.open.take_if(|o| o.request == request);
    }

    /// Takes over `chunk`, answering an open request, while the arm is commanded to `command`.
    ///
    /// Gives back the chunk that is no longer needed: the one before, or `chunk` itself with the reason.
    // A refused chunk is handed back as it is: boxing it would allocate on the control thread.
    #[allow(clippy::result_large_err)]
    pub fn on_chunk(
        &mut self,
        chunk: ActionChunk,
        now: Stamp,
        command: &CommandState,
    ) -> Result<Option<ActionChunk>, (ActionChunk, Refusal)> {
        let Some(order) = self.open.take_if(|o| o.request == chunk.request) else {
            return Err((chunk, Refusal::NotAsked));
        };
        // What was asked for at standstill pays first-use costs: it counts only when nothing better is known.
        if self.blocks.progress().is_some() || self.config.latency.is_none() {
            self.latency.push(now.since(order.at));
        }
        if let Some(why) = self.flaw(&chunk) {
            return Err((chunk, why));
        }
        let seen = self.history.at(chunk.instant);
        // Without a history nothing was played since the observation.
        let played = self.blocks.played();
        let anchor = order.anchor.unwrap_or_else(|| seen.map_or(played, |e| e.played));
        if (played - anchor) / chunk.dt.as_secs_f64() >= chunk.horizon() as f64 {
            return Err((chunk, Refusal::Expired));
        }
        if anchor > played + 1e-9 {
            self.blocks.keep(chunk, anchor);
            return Ok(None);
        }
        Ok(self.splice(chunk, anchor, command))
    }

    /// Plays `chunk`, a motion of the runtime's own, from its first action on.
    // As in `on_chunk`.
    #[allow(clippy::result_large_err)]
    pub fn play(
        &mut self,
        chunk: ActionChunk,
        command: &CommandState,
    ) -> Result<Option<ActionChunk>, (ActionChunk, Refusal)> {
        match self.flaw(&chunk) {
            Some(why) => Err((chunk, why)),
            None => {
                let anchor = self.blocks.played();
                let end = chunk.horizon();
                let origin = Some(command.position);
                let counts = [1; MAX_HORIZON];
                let arrival = Arrival { chunk, anchor, origin, end, counts };
                Ok(self.blocks.replace(arrival, command, bounds(&self.config)))
            }
        }
    }

    fn flaw(&self, chunk: &ActionChunk) -> Option<Refusal> {
        if chunk.dim() != self.kinds.len() || chunk.dt.is_zero() {
            Some(Refusal::WrongShape)
        } else if chunk.horizon() > MAX_HORIZON {
            Some(Refusal::TooLong)
        } else if !chunk.values().iter().all(|v| v.is_finite()) {
            Some(Refusal::NotFinite)
        } else {
            None
        }
    }

    fn splice(
        &mut self,
        mut chunk: ActionChunk,
        anchor: f64,
        command: &CommandState,
    ) -> Option<ActionChunk> {
        let mut counts = [1; MAX_HORIZON];
        let old = self.blocks.old_plan(&chunk, anchor);
        let incoming = Incoming { chunk: &mut chunk, kinds: &self.kinds, old, counts: &mut counts };
        self.strategy.merge(incoming);
        let end = self.strategy.play_end(chunk.horizon(), self.config.execution_horizon);
        let arrival = Arrival { chunk, anchor, origin: None, end, counts };
        self.blocks.replace(arrival, command, bounds(&self.config))
    }
}

fn bounds(config: &SchedulerConfig) -> impl Iterator<Item = JoinBounds> {
    config.joints.iter().map(|j| j.join)
}

#[cfg(test)]
mod tests;
