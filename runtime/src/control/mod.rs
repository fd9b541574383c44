//! The control cycle: scheduler → arbiter → guard, once every control period.
//!
//! A pure state machine: events come in with the time, one command goes out per period. The thread around
//! it is in [`crate::stream`]; replay and tests drive the same code with a virtual clock.

mod event;
mod residual;
mod teleop;

use std::time::Duration;

pub use event::{
    AuthorityConfig, ControlConfig, ControlEvent, Cycle, CycleReport, Effect, OperatorAnswer,
    OperatorRequest,
};
pub use residual::{
    Correction, ResidualConfig, ResidualInput, ResidualRefusal, ResidualSample, ResidualTrack,
};
pub use teleop::{SampleRefusal, TeleopConfig, TeleopSample, TeleopTarget};

use self::teleop::TeleopTrack;
use crate::arbiter::{Arbiter, Authority, AuthorityChange, AuthorityRequest, Denied, Source};
use crate::guard::{Guard, GuardError, Interventions, SpaceConfig, SpaceError};
use crate::scheduler::{CommandState, Mode, Refusal, Scheduler, Wish};
use crate::{ActionChunk, Command, JointLimits, JointState, JointVec, PlannedBlock, Stamp};

/// Measured and commanded position may differ by this much (rad) before a new start begins at the measured one.
const FOLLOWING_TOLERANCE: f64 = 0.35;

/// Scheduler, arbiter and guard of one arm.
///
/// Real time: [`ControlCore::tick`] and [`ControlCore::on_event`] neither allocate, free, lock nor log.
#[derive(Debug)]
pub struct ControlCore {
    scheduler: Scheduler,
    arbiter: Arbiter,
    guard: Guard,
    teleop: TeleopTrack,
    residual: Option<ResidualTrack>,
    /// What a residual policy is to answer.
    residual_input: Option<ResidualInput>,
    state: Option<JointState>,
    state_timeout: Duration,
    /// After a silence or a stop: the command is still where it was before.
    rejoins: bool,
    /// No cycle ran for so long that the driver holds the arm by itself, and when that was found: no command goes out
    /// until a newer state says where.
    lapsed: Option<Stamp>,
    /// The first cycle that found the command at rest, while it is.
    rested: Option<Stamp>,
    /// The last cycle.
    ticked: Option<Stamp>,
    period: f64,
    sequence: u64,
    /// A chunk that a cycle was done with, until somebody fetches it to be freed.
    spent: Option<ActionChunk>,
}

impl ControlCore {
    /// A core in [`Authority::Hold`].
    ///
    /// # Errors
    /// [`GuardError`] for limits that cannot protect.
    pub fn new(config: &ControlConfig) -> Result<Self, GuardError> {
        Ok(Self {
            scheduler: Scheduler::new(config.scheduler.clone()),
            arbiter: Arbiter::default(),
            guard: Guard::new(&config.limits, config.period)?,
            teleop: TeleopTrack::new(TeleopConfig::default(), &config.limits),
            residual: None,
            residual_input: None,
            state: None,
            state_timeout: config.state_timeout,
            rejoins: false,
            lapsed: None,
            rested: None,
            ticked: None,
            period: config.period.as_secs_f64(),
            sequence: 0,
            spent: None,
        })
    }

    /// The core with other rules for authority, before anything has happened.
    pub fn with_authority(mut self, config: &AuthorityConfig, limits: &[JointLimits]) -> Self {
        self.arbiter = Arbiter::new(config.arbiter);
        self.teleop = TeleopTrack::new(config.teleop, limits);
        self
    }

    /// The core with a residual stage, before anything has happened.
    pub fn with_residual(mut self, config: ResidualConfig, limits: &[JointLimits]) -> Self {
        self.residual = Some(ResidualTrack::new(config, limits));
        self
    }

    /// The core with a guard that also keeps the arm in `space`, before anything has happened.
    ///
    /// # Errors
    /// [`SpaceError`] for a space that cannot be guarded.
    pub fn with_space(mut self, space: SpaceConfig) -> Result<Self, SpaceError> {
        self.guard = self.guard.with_space(space)?;
        Ok(self)
    }

    /// Who holds authority.
    pub fn authority(&self) -> Authority {
        self.arbiter.authority()
    }

    /// Takes in one event at `now`.
    pub fn on_event(&mut self, event: ControlEvent, now: Stamp) -> Effect {
        let mut effect = Effect::default();
        match event {
            ControlEvent::State(state) => {
                effect.change = self.on_state(state, now);
                if let Some(change) = effect.change {
                    effect.freed = self.begin(&change);
                }
            }
            ControlEvent::ChunkFailed(request) => self.scheduler.on_failure(request),
            ControlEvent::Chunk(chunk) => {
                let command = self.policy_command();
                effect.take(self.scheduler.on_chunk(chunk, now, &command));
            }
            ControlEvent::Authority(request) => {
                // The run sees from the cycles what became of it.
                let _ = self.ask(request, Source::RUN, now, &mut effect);
            }
            ControlEvent::Operator(OperatorRequest { ticket, by, request }) => {
                let result = self.ask(request, by, now, &mut effect);
                let standing = self.arbiter.standing();
                effect.answer =
                    (ticket != 0).then_some(OperatorAnswer { ticket, result, standing });
            }
            ControlEvent::Teleop(sample) => {
                effect.sample_refused = self.on_sample(&sample, now).err();
            }
            ControlEvent::Residual(sample) => {
                effect.residual_refused = match &mut self.residual {
                    Some(track) => track.on_sample(&sample, now).err(),
                    None => Some(ResidualRefusal::NotConfigured),
                };
            }
            ControlEvent::Motion(chunk) => {
                let granted = self.ask(AuthorityRequest::Motion, Source::RUN, now, &mut effect);
                if granted.is_ok() {
                    let command = self.policy_command();
                    let before = effect.freed.take();
                    effect.take(self.scheduler.play(chunk, &command));
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
        self.notice_lapse(now);
        // A lapse ends authority, whatever was measured since.
        let fresh = state_age <= self.state_timeout && self.lapsed.is_none();
        let change = self.arbiter.on_state(fresh, now);
        let change = change.or_else(|| self.arbiter.on_time(now));
        if let Some(change) = change {
            let freed = self.begin(&change);
            self.spent = freed.or(self.spent.take());
        }
        self.end_lapse();
        self.rested = self.guard.at_rest().then(|| self.rested.unwrap_or(now));
        if let (true, Some(state)) = (self.rejoins, self.state_at_rest()) {
            self.rejoin(&state.position);
        }
        self.ticked = Some(now);
        let authority = self.arbiter.authority();
        let commanded = self.policy_command();
        let wish = self.scheduler.tick(now, &commanded);
        self.correct(authority, &wish, now);
        let mut interventions = Interventions::default();
        match self.combine(authority, &wish, now) {
            Some((position, velocity)) => interventions = self.guard.filter(&position, &velocity),
            None => self.guard.brake(),
        }
        self.teleop.on_command(self.guard.position());
        let policy = matches!(authority, Authority::Policy | Authority::Shared);
        let order = if policy { self.scheduler.due(now) } else { None };
        self.sequence += 1;
        let command = self.state.filter(|_| self.lapsed.is_none()).map(|_| Command {
            stamp: now,
            sequence: self.sequence,
            position: *self.guard.position(),
            velocity: *self.guard.velocity(),
        });
        let plays = policy || authority == Authority::Motion;
        Cycle {
            command,
            order,
            change,
            standing: self.arbiter.standing(),
            authority,
            mode: if plays { wish.mode } else { Mode::Idle },
            buffer_left: wish.buffer_left,
            played: self.scheduler.played(),
            state_age,
            interventions,
            teleop_delay: self.teleop.take_arrival().map(|arrived| now.since(arrived)),
        }
    }

    /// A chunk that the core is done with, to be freed on another thread; ask until there is none, after
    /// every event and every cycle.
    pub fn take_spent(&mut self) -> Option<ActionChunk> {
        self.spent.take().or_else(|| self.scheduler.take_retired())
    }

    /// What the last order's head is to know of the plan; `None` when it asks for a chunk of its own.
    pub fn plan(&self) -> Option<&PlannedBlock> {
        self.scheduler.plan()
    }

    /// Position and velocity that authority wants next; none: brake.
    fn combine(
        &mut self,
        authority: Authority,
        wish: &Wish,
        now: Stamp,
    ) -> Option<(JointVec, JointVec)> {
        match authority {
            Authority::Hold | Authority::Stop => None,
            Authority::Teleop => {
                self.teleop.tick(now, self.period).map(|f| (f.position, f.velocity))
            }
            // Until its first chunk comes a new holder only brakes what was under way.
            Authority::Policy | Authority::Motion | Authority::Shared
                if wish.mode == Mode::Waiting =>
            {
                None
            }
            Authority::Motion => Some((wish.position, wish.velocity)),
            Authority::Policy => {
                let (mut position, mut velocity) = (wish.position, wish.velocity);
                if let Some(track) = &self.residual {
                    let by = track.correction();
                    add(&mut position, &mut velocity, &by.position, &by.velocity, 1.0);
                }
                Some((position, velocity))
            }
            Authority::Shared => {
                let by = self.teleop.tick(now, self.period).unwrap_or(self.teleop.correction());
                let (mut position, mut velocity) = (wish.position, wish.velocity);
                add(&mut position, &mut velocity, &by.position, &by.velocity, 1.0);
                if let Some(track) = &self.residual {
                    let by = track.correction();
                    add(&mut position, &mut velocity, &by.position, &by.velocity, 1.0);
                }
                Some((position, velocity))
            }
        }
    }

    /// Moves the residual policy's correction on, and says what it is to answer next.
    fn correct(&mut self, authority: Authority, wish: &Wish, now: Stamp) {
        let Some(track) = &mut self.residual else { return };
        let policy = matches!(authority, Authority::Policy | Authority::Shared);
        let plays = policy && wish.mode == Mode::Playing;
        track.tick(now, self.period, plays);
        let state = self.state.filter(|_| plays);
        self.residual_input = state.map(|JointState { stamp, position, velocity, .. }| {
            ResidualInput { stamp, position, velocity, planned: wish.position }
        });
    }

    /// What a residual policy is to answer, once for each cycle in which the plan is executed.
    pub fn take_residual_input(&mut self) -> Option<ResidualInput> {
        self.residual_input.take()
    }

    /// Where the policy's own curve stands: the command without a person's and a residual policy's correction.
    fn policy_command(&self) -> CommandState {
        let (mut position, mut velocity) = (*self.guard.position(), *self.guard.velocity());
        let by = self.teleop.correction();
        add(&mut position, &mut velocity, &by.position, &by.velocity, -1.0);
        if let Some(track) = &self.residual {
            let by = track.correction();
            add(&mut position, &mut velocity, &by.position, &by.velocity, -1.0);
        }
        CommandState { position, velocity, acceleration: self.guard.acceleration() }
    }

    fn ask(
        &mut self,
        request: AuthorityRequest,
        by: Source,
        now: Stamp,
        effect: &mut Effect,
    ) -> Result<(), Denied> {
        effect.change = self.arbiter.on_request(request, by, now)?;
        if let Some(change) = effect.change {
            effect.freed = self.begin(&change);
        } else if request == AuthorityRequest::Motion {
            // One motion after another: each begins anew.
            effect.freed = self.scheduler.start(self.guard.position());
        }
        Ok(())
    }

    fn on_sample(&mut self, sample: &TeleopSample, now: Stamp) -> Result<(), SampleRefusal> {
        if !self.arbiter.on_sample(sample.source, now) {
            return Err(SampleRefusal::NoLease);
        }
        self.teleop.on_sample(sample, self.guard.position(), self.guard.velocity())
    }

    fn on_state(&mut self, state: JointState, now: Stamp) -> Option<AuthorityChange> {
        if !state.position.is_finite() || state.position.len() != self.guard.position().len() {
            return None; // as if it had not come: it turns stale
        }
        self.notice_lapse(now);
        let before = self.state.map_or(state.stamp, |before| before.stamp);
        if state.stamp < before {
            return None;
        }
        if self.state.replace(state).is_none() || self.ticked.is_none() {
            // It was told nothing yet.
            self.guard.rebase(&state.position);
        }
        if state.stamp.since(before) <= self.state_timeout {
            return None;
        }
        // A silence ends authority even when no cycle ran in it. The arm did not follow meanwhile, or is another one:
        // it is held where it stands now, not pulled to where it was told to be.
        self.rejoins = true;
        self.arbiter.on_state(false, now)
    }

    /// Without commands the arm is not where the last one was: there is none to be continuous with.
    fn notice_lapse(&mut self, now: Stamp) {
        if self.ticked.is_some_and(|at| now.since(at) > self.state_timeout) {
            self.lapsed.get_or_insert(now);
        }
    }

    /// Begins anew where a state that was measured after a lapse finds the arm.
    fn end_lapse(&mut self) {
        if let (Some(since), Some(state)) = (self.lapsed, self.state)
            && state.stamp >= since
        {
            self.guard.rebase(&state.position);
            (self.lapsed, self.rejoins) = (None, false);
        }
    }

    /// The newest state, when it was measured after the command came to rest: an older one says where the arm was.
    fn state_at_rest(&self) -> Option<JointState> {
        let rested = self.rested.filter(|_| self.guard.at_rest())?;
        self.state.filter(|state| state.stamp >= rested)
    }

    /// After a silence: the held arm is where it stands.
    fn rejoin(&mut self, position: &JointVec) {
        if !self.arbiter.authority().moves() {
            self.guard.rebase(position);
        }
        self.rejoins = false;
    }

    /// A new holder of authority begins where the arm is commanded to be, or where it is when it stands elsewhere.
    fn begin(&mut self, change: &AuthorityChange) -> Option<ActionChunk> {
        // After a stop the arm may have had its torque off: it is where it is.
        let anew = change.from == Authority::Stop;
        self.rejoins |= anew;
        if let Some(state) = self.state_at_rest() {
            let far = |p: &JointVec, q: &JointVec| {
                p.as_slice()
                    .iter()
                    .zip(q.as_slice())
                    .any(|(a, b)| (a - b).abs() > FOLLOWING_TOLERANCE)
            };
            if anew || far(&state.position, self.guard.position()) {
                self.guard.rebase(&state.position);
                self.rejoins = false;
            }
        }
        self.teleop.begin(change.to == Authority::Shared);
        match change.to {
            // A correction is laid over what plays.
            Authority::Shared if matches!(change.from, Authority::Policy | Authority::Shared) => {
                None
            }
            Authority::Policy | Authority::Motion | Authority::Shared => {
                self.forget_correction();
                self.scheduler.start(self.guard.position())
            }
            Authority::Hold | Authority::Stop | Authority::Teleop => {
                self.forget_correction();
                self.scheduler.stop()
            }
        }
    }

    /// What comes next begins at the command itself: no correction is in it any more.
    fn forget_correction(&mut self) {
        if let Some(track) = &mut self.residual {
            track.reset();
        }
    }
}

/// Adds `factor` times an offset and its velocity.
fn add(
    position: &mut JointVec,
    velocity: &mut JointVec,
    offset: &JointVec,
    rate: &JointVec,
    factor: f64,
) {
    for joint in 0..position.len() {
        position[joint] += factor * offset[joint];
        velocity[joint] += factor * rate[joint];
    }
}

#[cfg(test)]
mod residual_tests;
#[cfg(test)]
mod teleop_tests;
#[cfg(test)]
mod tests;
