//! The scheduler: turns overlapping, late action chunks into one continuous wish for the guard.
//!
//! A pure state machine on the control thread. It plays the executing chunk, asks for the next one while
//! that still runs, and splices a new chunk at the number of actions *really executed* since the new
//! chunk's observation, which it counts itself; the predicted latency only decides when to ask. What is
//! left of the step between the old curve and the new one decays over a bounded join, so neither position
//! nor velocity jumps. A chunk played to its end leaves the arm at rest on its last action.

mod history;
mod interpolant;
mod latency;

use std::time::Duration;

use crate::{ActionChunk, JointVec, Stamp};
use history::{Entry, History};
use latency::LatencyWindow;

/// How chunks are played.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Number of joints.
    pub joints: usize,
    /// Control period.
    pub control_period: Duration,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// Shortest join between two chunks.
    pub join_time: Duration,
    /// Highest speed (rad/s) that a join may add.
    pub join_velocity: f64,
}

/// A demand for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkOrder {
    /// Number of the request; the chunk carries it back.
    pub request: u64,
    /// When it was made.
    pub at: Stamp,
}

/// Why a chunk was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It answers no open request (authority changed, or it came twice).
    NotAsked,
    /// Its actions have not one value per joint.
    WrongShape,
    /// It holds a value that is not finite.
    NotFinite,
    /// All of its actions are in the past.
    Expired,
}

/// What the arm follows right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
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

/// The executing chunk.
#[derive(Debug)]
struct Track {
    chunk: ActionChunk,
    /// Command at the chunk's instant: the knot before its first action.
    origin: JointVec,
    phase: f64,
    join: Join,
}

/// The decaying rest of the step at a splice: one cubic takes the offset to zero, another the rate.
///
/// The rate has its own, always short time: over a long join it would carry the arm far past both
/// curves (a cubic from rate `r` swings out by `4/27 · r · time`).
#[derive(Debug, Clone, Copy)]
struct Join {
    offset: JointVec,
    rate: JointVec,
    offset_time: f64,
    rate_time: f64,
    elapsed: f64,
}

impl Join {
    fn sample(&self, joint: usize) -> (f64, f64) {
        let share = |time: f64| (self.elapsed / time).min(1.0);
        let (f, g) = (share(self.offset_time), share(self.rate_time));
        let (offset, rate) = (self.offset[joint], self.rate[joint]);
        let value = offset * (1.0 - f * f * (3.0 - 2.0 * f))
            + rate * self.rate_time * g * (1.0 - g) * (1.0 - g);
        let speed =
            offset * 6.0 * f * (f - 1.0) / self.offset_time + rate * (1.0 - g) * (1.0 - 3.0 * g);
        (value, speed)
    }
}

/// The scheduler of one arm.
///
/// Real time: [`Scheduler::tick`] and [`Scheduler::on_chunk`] neither allocate nor free; a chunk that is
/// no longer needed is handed back to be freed elsewhere.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    active: bool,
    /// Where the arm is to stay while nothing is played.
    rest: JointVec,
    track: Option<Track>,
    executed: f64,
    history: History,
    latency: LatencyWindow,
    open: Option<ChunkOrder>,
    next_request: u64,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            active: false,
            rest: JointVec::zeros(config.joints),
            track: None,
            executed: 0.0,
            history: History::new(),
            latency: LatencyWindow::new(),
            open: None,
            next_request: 1,
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
        self.executed = 0.0;
        self.history.clear();
        self.open = None;
        self.track.take().map(|t| t.chunk)
    }

    /// The wish for the period that begins at `now`; counts what it executes.
    pub fn tick(&mut self, now: Stamp) -> Wish {
        let mut wish = Wish {
            position: self.rest,
            velocity: JointVec::zeros(self.config.joints),
            mode: if self.active { Mode::Waiting } else { Mode::Idle },
            buffer_left: Duration::ZERO,
        };
        if let Some(track) = &mut self.track {
            let (dt, period) =
                (track.chunk.dt.as_secs_f64(), self.config.control_period.as_secs_f64());
            let end = track.chunk.horizon() as f64;
            wish.mode = if track.phase >= end { Mode::Starved } else { Mode::Playing };
            let step = (period / dt).min(end - track.phase);
            track.phase += step;
            track.join.elapsed += period;
            self.executed += step;
            let (position, slope) = interpolant::sample(&track.chunk, &track.origin, track.phase);
            for joint in 0..self.config.joints {
                let (offset, rate) = track.join.sample(joint);
                wish.position[joint] = position[joint] + offset;
                wish.velocity[joint] = slope[joint] / dt + rate;
            }
            wish.buffer_left = track.chunk.dt.mul_f64(end - track.phase);
            self.rest = wish.position;
        }
        self.history.push(Entry { at: now, executed: self.executed, position: wish.position });
        wish
    }

    /// A request for the next chunk, when it is time for one.
    ///
    /// Asked early enough that a chunk with tail latency takes over after the execution horizon.
    pub fn due(&mut self, now: Stamp) -> Option<ChunkOrder> {
        if !self.active || self.open.is_some() {
            return None;
        }
        if let Some(track) = &self.track {
            let lead = self.latency.tail().unwrap_or_default().as_secs_f64()
                / track.chunk.dt.as_secs_f64();
            // A sum of many steps may fall short of a whole number by a rounding error.
            if track.phase + lead + 1e-6 < self.config.execution_horizon as f64 {
                return None;
            }
        }
        let order = ChunkOrder { request: self.next_request, at: now };
        self.next_request += 1;
        self.open = Some(order);
        Some(order)
    }

    /// A policy gave up on `request`: it may be asked for again.
    pub fn on_failure(&mut self, request: u64) {
        self.open.take_if(|o| o.request == request);
    }

    /// Takes over `chunk`, answering an open request, while the arm is commanded to `command` (rad) at `rate` (rad/s).
    ///
    /// Gives back the chunk that is no longer needed: the one before, or `chunk` itself with the reason.
    pub fn on_chunk(
        &mut self,
        chunk: ActionChunk,
        now: Stamp,
        command: &JointVec,
        rate: &JointVec,
    ) -> Result<Option<ActionChunk>, (ActionChunk, Refusal)> {
        let Some(order) = self.open.take_if(|o| o.request == chunk.request) else {
            return Err((chunk, Refusal::NotAsked));
        };
        self.latency.push(now.since(order.at));
        self.splice(chunk, command, rate)
    }

    /// Plays `chunk`, a motion of the runtime's own, from its first action on.
    pub fn play(
        &mut self,
        chunk: ActionChunk,
        command: &JointVec,
    ) -> Result<Option<ActionChunk>, (ActionChunk, Refusal)> {
        self.open = Some(ChunkOrder { request: u64::MAX, at: chunk.instant });
        let still = JointVec::zeros(self.config.joints);
        self.splice(chunk, command, &still)
    }

    fn splice(
        &mut self,
        chunk: ActionChunk,
        command: &JointVec,
        rate: &JointVec,
    ) -> Result<Option<ActionChunk>, (ActionChunk, Refusal)> {
        if chunk.dim() != self.config.joints || chunk.dt.is_zero() {
            return Err((chunk, Refusal::WrongShape));
        }
        if !chunk.values().iter().all(|v| v.is_finite()) {
            return Err((chunk, Refusal::NotFinite));
        }
        let then = self.history.at(chunk.instant);
        let phase = then.map_or(0.0, |e| self.executed - e.executed);
        if phase >= chunk.horizon() as f64 {
            return Err((chunk, Refusal::Expired));
        }
        let origin = then.map_or(*command, |e| e.position);
        let (position, slope) = interpolant::sample(&chunk, &origin, phase);
        let dt = chunk.dt.as_secs_f64();
        let (mut offset, mut offset_rate) =
            (JointVec::zeros(self.config.joints), JointVec::zeros(self.config.joints));
        let rate_time = self.config.join_time.as_secs_f64().max(1e-3);
        let mut offset_time = rate_time;
        for joint in 0..self.config.joints {
            offset[joint] = command[joint] - position[joint];
            offset_rate[joint] = rate[joint] - slope[joint] / dt;
            // A cubic from offset to zero peaks at 1.5 · offset / time.
            offset_time = offset_time.max(1.5 * offset[joint].abs() / self.config.join_velocity);
        }
        let join = Join { offset, rate: offset_rate, offset_time, rate_time, elapsed: 0.0 };
        let before = self.track.replace(Track { chunk, origin, phase, join });
        Ok(before.map(|t| t.chunk))
    }
}

#[cfg(test)]
mod tests;
