//! The action blocks, owned in one place: the executing chunk with its committed and its editable part,
//! the chunk that waits for its instant, and the plan that heads get as prefix, guidance or warm start.
//!
//! Play time counts the seconds that were really played; a chunk's phase is the play time since its anchor,
//! in actions. Nothing before the present phase ever changes: that part of the executing block is
//! committed. A new chunk may only change what comes after it, and the join keeps the command continuous.

use std::time::Duration;

use super::curve::{Curve, MAX_HORIZON};
use super::history::History;
use super::join::{CommandState, Join, JoinBounds};
use crate::{ActionChunk, ActionKind, JointVec, PlannedBlock, Stamp};

/// Rows of the past that a plan begins with: an observation is older than its order.
const PAST_ROWS: usize = 16;

/// The executing block.
#[derive(Debug)]
struct Executing {
    chunk: ActionChunk,
    /// Play time (s) at the chunk's instant.
    anchor: f64,
    join: Join,
}

/// What is left of the old plan, on the instants of an arriving chunk.
pub(super) struct OldPlan<'a> {
    curve: &'a Curve,
    chunk: &'a ActionChunk,
    counts: &'a [u16],
    /// Phase of the old chunk at the new one's phase 0, and old actions per new action.
    start: f64,
    ratio: f64,
}

impl OldPlan<'_> {
    fn phase(&self, action: usize) -> Option<f64> {
        let phase = self.start + (action + 1) as f64 * self.ratio;
        (phase <= self.curve.last() as f64 + 1e-6).then_some(phase)
    }

    /// What was planned for the instant of the new chunk's `action` (rad); `None` past the old plan's end.
    pub fn at_action(&self, action: usize) -> Option<JointVec> {
        Some(self.curve.sample(self.chunk, self.phase(action)?).position)
    }

    /// How many predictions that plan combined, at least one.
    pub fn predictions(&self, action: usize) -> u16 {
        let phase = self.phase(action).unwrap_or(f64::MAX).round().max(1.0) as usize;
        self.counts.get(phase - 1).copied().unwrap_or(1).max(1)
    }
}

/// The plan's state in one control period.
#[derive(Debug, Clone, Copy)]
pub(super) struct Played {
    pub state: CommandState,
    /// Actions executed of the chunk, and how many it is played to.
    pub phase: f64,
    pub end: f64,
}

/// The block cache of one arm. Room is made once; nothing here allocates later.
#[derive(Debug)]
pub(super) struct Blocks {
    curve: Curve,
    counts: [u16; MAX_HORIZON],
    executing: Option<Executing>,
    /// A chunk whose anchor lies ahead.
    next: Option<(ActionChunk, f64)>,
    played: f64,
}

impl Blocks {
    pub fn new(curve: Curve) -> Self {
        Self { curve, counts: [1; MAX_HORIZON], executing: None, next: None, played: 0.0 }
    }

    /// Forgets everything; the chunks are handed back to be freed elsewhere.
    pub fn clear(&mut self) -> [Option<ActionChunk>; 2] {
        self.played = 0.0;
        [self.executing.take().map(|e| e.chunk), self.next.take().map(|n| n.0)]
    }

    /// Seconds played since the last [`Blocks::clear`].
    pub fn played(&self) -> f64 {
        self.played
    }

    /// Time between two actions of the executing chunk.
    pub fn dt(&self) -> Option<Duration> {
        self.executing.as_ref().map(|e| e.chunk.dt)
    }

    /// Phase of the executing chunk and the action that it is played to.
    pub fn progress(&self) -> Option<(f64, f64)> {
        let executing = self.executing.as_ref()?;
        Some((self.phase_of(executing), self.curve.last() as f64))
    }

    fn phase_of(&self, executing: &Executing) -> f64 {
        self.phase(executing.anchor, executing.chunk.dt)
    }

    fn phase(&self, anchor: f64, dt: Duration) -> f64 {
        ((self.played - anchor) / dt.as_secs_f64()).clamp(0.0, self.curve.last() as f64)
    }

    /// Plays on by `period` (s), no further than the chunk's end.
    pub fn advance(&mut self, period: f64) -> Option<Played> {
        let (phase, end) = self.progress()?;
        let executing = self.executing.as_mut()?;
        let dt = executing.chunk.dt.as_secs_f64();
        self.played += period.min((end - phase) * dt);
        executing.join.advance(period);
        let executing = self.executing.as_ref()?;
        let phase = self.phase_of(executing);
        Some(Played { state: self.state_at(executing, phase, 0.0), phase, end })
    }

    /// What `chunk` itself wants at `phase`.
    fn wanted(&self, chunk: &ActionChunk, phase: f64) -> CommandState {
        let dt = chunk.dt.as_secs_f64();
        let sample = self.curve.sample(chunk, phase);
        let mut state = CommandState::at_rest(&sample.position);
        for joint in 0..sample.position.len() {
            state.velocity[joint] = sample.slope[joint] / dt;
            state.acceleration[joint] = sample.curvature[joint] / (dt * dt);
        }
        state
    }

    /// The command at `phase`, which lies `ahead` seconds away.
    fn state_at(&self, executing: &Executing, phase: f64, ahead: f64) -> CommandState {
        let mut state = self.wanted(&executing.chunk, phase);
        for joint in 0..state.position.len() {
            let [value, rate, acceleration] = executing.join.sample(joint, ahead);
            state.position[joint] += value;
            state.velocity[joint] += rate;
            state.acceleration[joint] += acceleration;
        }
        state
    }

    /// True when a chunk waits for its instant.
    pub fn waits(&self) -> bool {
        self.next.is_some()
    }

    /// Keeps `chunk` until play time reaches `anchor` (s).
    pub fn keep(&mut self, chunk: ActionChunk, anchor: f64) {
        self.next = Some((chunk, anchor));
    }

    /// The waiting chunk, when its instant has come.
    pub fn take_due(&mut self) -> Option<(ActionChunk, f64)> {
        let played = self.played;
        self.next.take_if(|n| played + 1e-9 >= n.1)
    }

    /// What an arriving chunk, anchored at play time `anchor` (s), finds of the plan, and room for its counts.
    pub fn old_plan(&self, chunk: &ActionChunk, anchor: f64) -> Option<OldPlan<'_>> {
        let executing = self.executing.as_ref()?;
        let dt = executing.chunk.dt.as_secs_f64();
        Some(OldPlan {
            curve: &self.curve,
            chunk: &executing.chunk,
            counts: &self.counts,
            start: (anchor - executing.anchor) / dt,
            ratio: chunk.dt.as_secs_f64() / dt,
        })
    }

    /// Puts `chunk` in the executing one's place, the arm being commanded to `command`; gives the old one back.
    pub fn replace(
        &mut self,
        arrival: Arrival,
        command: &CommandState,
        bounds: impl Iterator<Item = JoinBounds>,
    ) -> Option<ActionChunk> {
        let Arrival { chunk, anchor, origin, end, counts } = arrival;
        self.curve.fit(&chunk, origin.as_ref(), end);
        self.counts = counts;
        let phase = self.phase(anchor, chunk.dt);
        let mut difference = self.wanted(&chunk, phase);
        for joint in 0..difference.position.len() {
            // A switch is thrown, not moved: it has nothing to decay.
            let moved = self.curve.kind(joint) != ActionKind::Switch;
            let share = f64::from(u8::from(moved));
            let less = |from: f64, what: f64| share * (from - what);
            difference.position[joint] = less(command.position[joint], difference.position[joint]);
            difference.velocity[joint] = less(command.velocity[joint], difference.velocity[joint]);
            difference.acceleration[joint] =
                less(command.acceleration[joint], difference.acceleration[joint]);
        }
        let executing = Executing { chunk, anchor, join: Join::new(difference, bounds) };
        self.executing.replace(executing).map(|e| e.chunk)
    }

    /// The plan as it stands at `now`: what was executed shortly before, and what will be.
    ///
    /// Rows lie on the instants at which the executing chunk's actions are reached.
    pub fn plan(&self, now: Stamp, history: &History) -> Option<PlannedBlock> {
        let executing = self.executing.as_ref()?;
        let dt = executing.chunk.dt;
        let phase = self.phase_of(executing);
        // The first row lies at or before the present phase, further rows one action apart.
        let first = phase.floor() - PAST_ROWS as f64;
        let instant = shifted(now, (first - phase) * dt.as_secs_f64());
        let mut plan = PlannedBlock::empty(instant, dt, executing.chunk.dim());
        let rows = (self.curve.last() as f64 - first).floor() as usize + 1;
        for row in 0..rows {
            let at = first + row as f64;
            let seconds = (at - phase) * dt.as_secs_f64();
            let position = match history.at(shifted(now, seconds)) {
                Some(entry) if seconds <= 0.0 => entry.position,
                _ => self.state_at(executing, at.max(0.0), seconds.max(0.0)).position,
            };
            if !plan.push(&position) {
                break;
            }
        }
        Some(plan)
    }

    /// The plan from play time `anchor` (s) on, which lies `ahead` seconds after `now`.
    pub fn plan_from(&self, now: Stamp, ahead: f64) -> Option<PlannedBlock> {
        let executing = self.executing.as_ref()?;
        let dt = executing.chunk.dt;
        let start = self.phase_of(executing) + ahead / dt.as_secs_f64();
        let mut plan = PlannedBlock::empty(shifted(now, ahead), dt, executing.chunk.dim());
        let mut row = 0.0;
        while start + row <= self.curve.last() as f64 + 1e-6 || row == 0.0 {
            let after = ahead + row * dt.as_secs_f64();
            if !plan.push(&self.state_at(executing, start + row, after).position) {
                break;
            }
            row += 1.0;
        }
        Some(plan)
    }
}

/// A chunk ready to take over.
pub(super) struct Arrival {
    pub chunk: ActionChunk,
    /// Play time (s) at its instant.
    pub anchor: f64,
    /// Where its curve begins; `None`: where its first actions point back to.
    pub origin: Option<JointVec>,
    /// Actions that it is played to.
    pub end: usize,
    pub counts: [u16; MAX_HORIZON],
}

fn shifted(stamp: Stamp, seconds: f64) -> Stamp {
    let step = Duration::from_secs_f64(seconds.abs());
    if seconds < 0.0 { stamp - step } else { stamp + step }
}
