//! The control cycle: scheduler → arbiter → guard, once every control period.
//!
//! A pure state machine: events come in with the time, one command goes out per period. The thread around
//! it is in [`crate::stream`]; replay and tests drive the same code with a virtual clock.

use std::time::Duration;

use crate::arbiter::{Arbiter, Authority, AuthorityChange, AuthorityRequest};
use crate::guard::{Guard, GuardError, Interventions};
use crate::scheduler::{ChunkOrder, Mode, Refusal, Scheduler, SchedulerConfig};
use crate::{ActionChunk, Command, JointLimits, JointState, JointVec, Stamp};

/// Measured and commanded position may differ by this much (rad) before a new start begins at the measured one.
const FOLLOWING_TOLERANCE: f64 = 0.35;

/// Settings of the control cycle.
#[derive(Debug, Clone, PartialEq)]
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

/// What happened since the last cycle.
#[derive(Debug)]
pub enum ControlEvent {
    /// The arm's measured state arrived.
    State(JointState),
    /// The policy answered a request.
    Chunk(ActionChunk),
    /// The policy could not answer the request of this number.
    ChunkFailed(u64),
    /// Authority is asked for.
    Authority(AuthorityRequest),
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
    /// What was followed.
    pub mode: Mode,
    /// Time until the executing chunk is played out.
    pub buffer_left: Duration,
    /// Age of the measured state.
    pub state_age: Duration,
    /// What the guard changed.
    pub interventions: Interventions,
    /// The publisher's ring was full: the command was not handed over.
    pub dropped: bool,
}

/// Scheduler, arbiter and guard of one arm.
///
/// Real time: [`ControlCore::tick`] and [`ControlCore::on_event`] neither allocate, free, lock nor log.
#[derive(Debug)]
pub struct ControlCore {
    scheduler: Scheduler,
    arbiter: Arbiter,
    guard: Guard,
    state: Option<JointState>,
    state_timeout: Duration,
    sequence: u64,
}

/// One cycle's result.
#[derive(Debug, Clone, Copy)]
pub struct Cycle {
    /// The command; none before the first measured state, when nobody knows where the arm is.
    pub command: Option<Command>,
    /// A request for the next chunk.
    pub order: Option<ChunkOrder>,
    /// Authority changed in this cycle.
    pub change: Option<AuthorityChange>,
    /// Who holds authority.
    pub authority: Authority,
    /// What was followed.
    pub mode: Mode,
    /// Time until the executing chunk is played out.
    pub buffer_left: Duration,
    /// Age of the measured state.
    pub state_age: Duration,
    /// What the guard changed.
    pub interventions: Interventions,
}

impl ControlCore {
    /// A core in [`Authority::Hold`].
    ///
    /// # Errors
    /// [`GuardError`] for limits that cannot protect.
    pub fn new(config: &ControlConfig) -> Result<Self, GuardError> {
        Ok(Self {
            scheduler: Scheduler::new(config.scheduler),
            arbiter: Arbiter::default(),
            guard: Guard::new(&config.limits, config.period)?,
            state: None,
            state_timeout: config.state_timeout,
            sequence: 0,
        })
    }

    /// Who holds authority.
    pub fn authority(&self) -> Authority {
        self.arbiter.authority()
    }

    /// Takes in one event at `now`.
    pub fn on_event(&mut self, event: ControlEvent, now: Stamp) -> Effect {
        let mut effect = Effect::default();
        match event {
            ControlEvent::State(state) => self.on_state(state),
            ControlEvent::ChunkFailed(request) => self.scheduler.on_failure(request),
            ControlEvent::Chunk(chunk) => {
                let (p, v) = (*self.guard.position(), *self.guard.velocity());
                effect.take(self.scheduler.on_chunk(chunk, now, &p, &v));
            }
            ControlEvent::Authority(request) => {
                effect.change = self
                    .arbiter
                    .on_request(request, crate::arbiter::Source::RUN, now)
                    .unwrap_or_default();
                if effect.change.is_some() {
                    effect.freed = self.begin();
                }
            }
            ControlEvent::Motion(chunk) => {
                effect.change = self
                    .arbiter
                    .on_request(AuthorityRequest::Motion, crate::arbiter::Source::RUN, now)
                    .unwrap_or_default();
                if self.arbiter.authority() == Authority::Motion {
                    let before = self.begin();
                    let position = *self.guard.position();
                    effect.take(self.scheduler.play(chunk, &position));
                    effect.freed = effect.freed.or(before);
                } else {
                    effect.refused = Some(Refusal::NotAsked);
                    effect.freed = Some(chunk);
                }
            }
        }
        effect
    }

    /// One control cycle at `now`.
    pub fn tick(&mut self, now: Stamp) -> Cycle {
        let state_age = self.state.map_or(Duration::MAX, |s| now.since(s.stamp));
        let change = self.arbiter.on_state(state_age <= self.state_timeout, now);
        let authority = self.arbiter.authority();
        let wish = self.scheduler.tick(now);
        let moving = matches!(authority, Authority::Policy | Authority::Motion);
        let mut interventions = Interventions::default();
        if moving {
            interventions = self.guard.filter(&wish.position, &wish.velocity);
        } else {
            self.guard.brake();
        }
        let order = if authority == Authority::Policy { self.scheduler.due(now) } else { None };
        self.sequence += 1;
        let command = self.state.map(|_| Command {
            stamp: now,
            sequence: self.sequence,
            position: *self.guard.position(),
            velocity: *self.guard.velocity(),
        });
        let mode = if moving { wish.mode } else { Mode::Idle };
        let buffer_left = wish.buffer_left;
        Cycle { command, order, change, authority, mode, buffer_left, state_age, interventions }
    }

    fn on_state(&mut self, state: JointState) {
        if !state.position.is_finite() || state.position.len() != self.guard.position().len() {
            return; // as if it had not come: it turns stale
        }
        if self.state.is_none() {
            self.guard.rebase(&state.position);
        }
        if self.state.is_none_or(|before| state.stamp >= before.stamp) {
            self.state = Some(state);
        }
    }

    /// A new holder of authority begins where the arm is commanded to be, or where it is when it stands elsewhere.
    fn begin(&mut self) -> Option<ActionChunk> {
        if let (Some(state), true) = (&self.state, self.guard.at_rest()) {
            let far = |p: &JointVec, q: &JointVec| {
                p.as_slice()
                    .iter()
                    .zip(q.as_slice())
                    .any(|(a, b)| (a - b).abs() > FOLLOWING_TOLERANCE)
            };
            if far(&state.position, self.guard.position()) {
                self.guard.rebase(&state.position);
            }
        }
        match self.arbiter.authority() {
            Authority::Policy | Authority::Motion => self.scheduler.start(self.guard.position()),
            _ => self.scheduler.stop(),
        }
    }
}

impl Effect {
    fn take(&mut self, result: Result<Option<ActionChunk>, (ActionChunk, Refusal)>) {
        match result {
            Ok(before) => (self.freed, self.accepted) = (before, true),
            Err((chunk, why)) => (self.freed, self.refused) = (Some(chunk), Some(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::Cause;

    const PERIOD: Duration = Duration::from_millis(10);

    fn core() -> ControlCore {
        let limit = JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 20.0 };
        let scheduler = SchedulerConfig {
            joints: 1,
            control_period: PERIOD,
            execution_horizon: 8,
            join_time: Duration::from_millis(200),
            join_velocity: 1.0,
        };
        let config = ControlConfig {
            limits: vec![limit],
            period: PERIOD,
            state_timeout: Duration::from_millis(250),
            scheduler,
        };
        ControlCore::new(&config).expect("the limits are sound")
    }

    fn state(stamp: Stamp, position: f64) -> ControlEvent {
        let position = JointVec::from_slice(&[position]).expect("one joint");
        ControlEvent::State(JointState {
            stamp,
            sequence: 1,
            position,
            velocity: JointVec::zeros(1),
        })
    }

    fn chunk(request: u64, instant: Stamp, values: Vec<f64>) -> ActionChunk {
        ActionChunk::new(request, instant, Duration::from_millis(100), 1, values)
            .expect("one joint")
    }

    fn ask(core: &mut ControlCore, request: AuthorityRequest, now: Stamp) {
        core.on_event(ControlEvent::Authority(request), now);
    }

    #[test]
    fn no_command_before_the_arm_was_seen() {
        let mut core = core();
        assert!(core.tick(Stamp(0)).command.is_none());
        core.on_event(state(Stamp(0), 0.4), Stamp(0));
        let command = core.tick(Stamp(0)).command.expect("the arm was seen");
        assert_eq!(command.position[0], 0.4, "the first command is where the arm is");
    }

    #[test]
    fn losing_the_state_brakes_the_arm_and_takes_authority_away() {
        let mut core = core();
        core.on_event(state(Stamp(0), 0.0), Stamp(0));
        core.tick(Stamp(0));
        ask(&mut core, AuthorityRequest::Policy, Stamp(0));
        let order = core.tick(Stamp(0)).order.expect("the first chunk is asked for");
        core.on_event(ControlEvent::Chunk(chunk(order.request, Stamp(0), vec![0.1; 16])), Stamp(0));
        let mut last = 0.0;
        for k in 1..60u32 {
            let now = Stamp(0) + PERIOD * k;
            let cycle = core.tick(now);
            let p = cycle.command.expect("seen").position[0];
            if k < 25 {
                assert_eq!(cycle.authority, Authority::Policy);
            } else if k > 26 {
                assert_eq!(cycle.authority, Authority::Hold);
            }
            assert!(p >= last - 1e-12);
            last = p;
        }
    }

    #[test]
    fn a_nan_chunk_never_reaches_the_guard() {
        let mut core = core();
        core.on_event(state(Stamp(0), 0.0), Stamp(0));
        core.tick(Stamp(0));
        ask(&mut core, AuthorityRequest::Policy, Stamp(0));
        let order = core.tick(Stamp(0)).order.expect("asked");
        let effect = core.on_event(
            ControlEvent::Chunk(chunk(order.request, Stamp(0), vec![0.1, f64::NAN])),
            Stamp(0),
        );
        assert_eq!(effect.refused, Some(Refusal::NotFinite));
        let cycle = core.tick(Stamp(0) + PERIOD);
        assert!(!cycle.interventions.contains(0, Cause::NotFinite));
        assert_eq!(cycle.command.expect("seen").position[0], 0.0);
        assert!(cycle.order.is_some(), "another chunk is asked for");
    }

    #[test]
    fn a_motion_within_the_limits_passes_the_guard_unchanged() {
        let mut core = core();
        core.on_event(state(Stamp(0), 0.2), Stamp(0));
        core.tick(Stamp(0));
        // A quintic, as homing uses it: 0.5 rad in 1 s.
        let at = |f: f64| 0.2 + 0.5 * f * f * f * (10.0 - 15.0 * f + 6.0 * f * f);
        let values = (1..=10).map(|k| at(f64::from(k) / 10.0)).collect();
        let effect = core.on_event(ControlEvent::Motion(chunk(0, Stamp(0), values)), Stamp(0));
        assert!(effect.accepted);
        for k in 1..=120u32 {
            let now = Stamp(0) + PERIOD * k;
            core.on_event(state(now, 0.2), now);
            let cycle = core.tick(now);
            let found = cycle.interventions;
            assert_eq!(found, Interventions::default(), "cycle {k}");
        }
        let end = core.guard.position()[0];
        assert!((end - 0.7).abs() < 1e-9, "{end}");
    }

    #[test]
    fn stop_beats_a_playing_chunk_and_stays() {
        let mut core = core();
        core.on_event(state(Stamp(0), 0.0), Stamp(0));
        core.tick(Stamp(0));
        let motion = chunk(0, Stamp(0), vec![0.3; 10]);
        assert!(core.on_event(ControlEvent::Motion(motion), Stamp(0)).accepted);
        for k in 1..5 {
            core.tick(Stamp(0) + PERIOD * k);
        }
        ask(&mut core, AuthorityRequest::Stop, Stamp(0));
        ask(&mut core, AuthorityRequest::Policy, Stamp(0));
        assert_eq!(core.authority(), Authority::Stop);
        let motion = chunk(0, Stamp(0), vec![0.3; 10]);
        let effect = core.on_event(ControlEvent::Motion(motion), Stamp(0));
        assert_eq!(effect.refused, Some(Refusal::NotAsked));
    }
}
