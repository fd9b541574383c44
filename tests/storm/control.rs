//! A storm of events against the whole control core, for every strategy: chunks late, early, overlapping,
//! reordered, not finite, of the wrong size; teleop grabs, stops, stale states. Whatever comes, no command leaves
//! the limits of position, velocity, acceleration and jerk, time does not run back, authority is never
//! ambiguous, and no executed action is skipped.
//!
//! `SINEW_STORM` sets the number of sequences of each strategy; the default is small.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use sinew_runtime::arbiter::{
    ArbiterConfig, Authority, AuthorityRequest, Claim, LeaseMode, Resume, Source,
};
use sinew_runtime::control::{
    AuthorityConfig, ControlConfig, ControlCore, ControlEvent, Cycle, OperatorRequest,
    TeleopSample, TeleopTarget,
};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::scheduler::{ChunkOrder, MAX_HORIZON, SchedulerConfig};
use sinew_runtime::{ActionChunk, ActionKind, JointLimits, JointState, JointVec, Stamp};

/// Control periods of a sequence.
const TICKS: u32 = 60;

fn sequences() -> u64 {
    std::env::var("SINEW_STORM").ok().and_then(|n| n.parse().ok()).unwrap_or(1500)
}

/// What a sequence is made of.
struct Storm {
    random: Pcg64Mcg,
    core: ControlCore,
    limits: Vec<JointLimits>,
    period: Duration,
    dt: Duration,
    horizon: usize,
    now: Stamp,
    tick: u32,
    state_sequence: u64,
    sample_sequence: u64,
    /// Chunks on their way: when they come, and what.
    coming: Vec<(u32, ControlEvent)>,
    /// The newest commands, oldest first.
    commands: Vec<JointVec>,
    played: f64,
    silent_until: u32,
}

impl Storm {
    fn new(strategy: StrategyConfig, seed: u64) -> Self {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let joints = random.random_range(1..=3);
        let limits: Vec<_> = (0..joints)
            .map(|_| {
                let velocity = random.random_range(0.3..4.0);
                let acceleration = velocity * random.random_range(4.0..20.0);
                let jerk = acceleration * random.random_range(15.0..60.0);
                let upper = random.random_range(0.3..2.5);
                JointLimits { lower: -upper, upper, velocity, acceleration, jerk }
            })
            .collect();
        let period = Duration::from_millis([1, 2, 5, 10][random.random_range(0..4)]);
        let dt = Duration::from_millis([20, 33, 50, 100][random.random_range(0..4)]);
        let horizon = random.random_range(1..=20usize);
        let mut scheduler = SchedulerConfig::new(&limits, period, random.random_range(1..=horizon));
        for joint in &mut scheduler.joints {
            joint.kind = [
                ActionKind::Position,
                ActionKind::Position,
                ActionKind::Gripper,
                ActionKind::Switch,
            ][random.random_range(0..4)];
        }
        scheduler.strategy = strategy;
        scheduler.latency = random.random_bool(0.5).then_some(period * random.random_range(0..20));
        let config =
            ControlConfig { limits: limits.clone(), period, state_timeout: period * 8, scheduler };
        let resume = if random.random_bool(0.5) { Resume::Auto } else { Resume::Ask };
        let authority = AuthorityConfig {
            arbiter: ArbiterConfig { resume, ..ArbiterConfig::default() },
            ..AuthorityConfig::default()
        };
        let core = ControlCore::new(&config).expect("sound limits");
        Self {
            core: core.with_authority(&authority, &limits),
            random,
            limits,
            period,
            dt,
            horizon,
            now: Stamp(1_000_000_000),
            tick: 0,
            state_sequence: 0,
            sample_sequence: 0,
            coming: Vec::new(),
            commands: Vec::new(),
            played: 0.0,
            silent_until: 0,
        }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.random.random_bool(p)
    }

    /// A joint value: mostly in range, sometimes far outside or no number.
    fn value(&mut self) -> f64 {
        match self.random.random_range(0..200) {
            0 => f64::NAN,
            1 => f64::INFINITY,
            2..8 => self.random.random_range(-20.0..20.0),
            _ => self.random.random_range(-1.5..1.5),
        }
    }

    fn give(&mut self, event: ControlEvent) {
        let effect = self.core.on_event(event, self.now);
        assert!(!(effect.accepted && effect.refused.is_some()), "taken and refused");
        while self.core.take_spent().is_some() {}
    }

    fn step(&mut self) {
        self.now = self.now + self.period;
        self.tick += 1;
        if self.tick >= self.silent_until {
            self.state_sequence += 1;
            let joints = self.limits.len();
            let position = self.commands.last().copied().unwrap_or(JointVec::zeros(joints));
            let velocity = JointVec::zeros(joints);
            let stamp = self.now;
            let sequence = self.state_sequence;
            self.give(ControlEvent::State(JointState { stamp, sequence, position, velocity }));
            if self.chance(0.01) {
                self.silent_until = self.tick + self.random.random_range(2..20);
            }
        }
        self.people();
        let due: Vec<_> = {
            let tick = self.tick;
            let (due, later) = self.coming.drain(..).partition(|c| c.0 <= tick);
            self.coming = later;
            due
        };
        for (_, event) in due {
            self.give(event);
        }
        let before = self.core.authority();
        let cycle = self.core.tick(self.now);
        while self.core.take_spent().is_some() {}
        self.check(before, &cycle);
        if let Some(order) = cycle.order {
            self.answer(&order);
        }
    }

    /// Requests of the run and of people, and their teleop samples.
    fn people(&mut self) {
        use AuthorityRequest as Ask;
        let someone = Source::literal(["ann", "bob"][self.random.random_range(0..2)]);
        if self.tick == 2 || self.chance(0.04) {
            self.give(ControlEvent::Authority(Ask::Policy));
        }
        if self.chance(0.06) {
            let mode = if self.chance(0.5) { LeaseMode::Teleop } else { LeaseMode::Shared };
            let duration = self.period * self.random.random_range(1..30);
            let priority = self.random.random_range(0..3);
            let request = match self.random.random_range(0..10) {
                0 => Ask::Stop,
                1 | 2 => Ask::Reset,
                3 => Ask::Hold,
                4 => Ask::Policy,
                5 => Ask::Release { to_policy: true },
                6 => Ask::PolicyLost,
                _ => Ask::Take(Claim { mode, priority, duration }),
            };
            let asked = OperatorRequest { ticket: 1, by: someone, request };
            self.give(ControlEvent::Operator(asked));
        }
        if self.chance(0.3) {
            let mut target = JointVec::zeros(self.limits.len());
            for joint in 0..target.len() {
                target[joint] = self.value();
            }
            let target = if self.chance(0.7) {
                TeleopTarget::Position(target)
            } else {
                TeleopTarget::Velocity(target)
            };
            self.sample_sequence += self.random.random_range(0..3);
            let (stamp, sequence, arrived) = (self.now, self.sample_sequence, self.now);
            let sample = TeleopSample { source: someone, stamp, sequence, arrived, target };
            self.give(ControlEvent::Teleop(sample));
        }
        if self.chance(0.01) {
            let values = (0..self.limits.len() * 4).map(|_| self.value()).collect();
            if let Ok(motion) = ActionChunk::new(0, self.now, self.dt, self.limits.len(), values) {
                self.give(ControlEvent::Motion(motion));
            }
        }
    }

    /// What comes for an order: a chunk in time or late, twice, broken, or nothing but a failure.
    fn answer(&mut self, order: &ChunkOrder) {
        let when = self.tick + self.random.random_range(0..25);
        let joints = self.limits.len();
        let (dim, horizon) = match self.random.random_range(0..40) {
            0 => (joints + 1, self.horizon),
            1 => (joints, MAX_HORIZON + 1),
            2 => (joints, 1),
            _ => (joints, self.horizon),
        };
        let age = self.period * self.random.random_range(0..6);
        let level: Vec<f64> = (0..dim).map(|_| self.random.random_range(-1.0..1.0)).collect();
        let slope = self.random.random_range(-0.1..0.1);
        let mut values: Vec<f64> =
            (0..horizon).flat_map(|k| level.iter().map(move |l| l + slope * k as f64)).collect();
        if self.chance(0.3) {
            values.fill_with(|| self.random.random_range(-2.0..2.0));
        }
        if self.chance(0.05) {
            let at = self.random.random_range(0..values.len());
            values[at] = f64::NAN;
        }
        let dt = if self.chance(0.02) { Duration::ZERO } else { self.dt };
        // A wrong number, as after a change of authority.
        let request = order.request + u64::from(self.chance(0.02));
        let chunk = ActionChunk::new(request, order.at - age, dt, dim, values).expect("whole rows");
        let event = match self.random.random_range(0..20) {
            0 => ControlEvent::ChunkFailed(order.request),
            1 => {
                self.coming.push((when + 3, ControlEvent::Chunk(chunk.clone())));
                ControlEvent::Chunk(chunk)
            }
            _ => ControlEvent::Chunk(chunk),
        };
        self.coming.push((when, event));
    }

    fn check(&mut self, before: Authority, cycle: &Cycle) {
        assert_eq!(cycle.standing.authority, cycle.authority, "one authority");
        match cycle.change {
            Some(change) => assert_eq!((change.from, change.to), (before, cycle.authority)),
            None => assert_eq!(before, cycle.authority, "authority changed without saying so"),
        }
        let asks = matches!(cycle.authority, Authority::Policy | Authority::Shared);
        assert!(cycle.order.is_none() || asks, "{:?} asked the policy", cycle.authority);
        let step = cycle.played - self.played;
        // A new start counts from zero.
        let longest = self.period.as_secs_f64() + 1e-9;
        assert!(cycle.played <= longest || (-1e-12..=longest).contains(&step), "played {step} s");
        self.played = cycle.played;
        let Some(command) = cycle.command else { return };
        assert!(command.position.is_finite() && command.velocity.is_finite());
        if self.commands.len() == 4 {
            self.commands.remove(0);
        }
        self.commands.push(command.position);
        self.limits_hold();
    }

    fn limits_hold(&self) {
        let t = self.period.as_secs_f64();
        for (joint, limit) in self.limits.iter().enumerate() {
            let at: Vec<f64> = self.commands.iter().map(|c| c[joint]).collect();
            let v: Vec<f64> = at.windows(2).map(|w| (w[1] - w[0]) / t).collect();
            let a: Vec<f64> = v.windows(2).map(|w| (w[1] - w[0]) / t).collect();
            let j: Vec<f64> = a.windows(2).map(|w| (w[1] - w[0]) / t).collect();
            let within = |what: &str, values: &[f64], limit: f64, rounding: f64| {
                for value in values {
                    assert!(
                        value.abs() <= limit * (1.0 + 1e-6) + rounding,
                        "{what} {value} of {limit}"
                    );
                }
            };
            within("position", &at, limit.upper, 1e-9);
            // Positions are rounded to 1e-16; differences magnify that.
            within("velocity", &v, limit.velocity, 1e-15 / t);
            within("acceleration", &a, limit.acceleration, 4e-15 / (t * t));
            within("jerk", &j, limit.jerk, 1e-14 / (t * t * t));
        }
    }
}

#[test]
fn no_storm_moves_the_arm_outside_its_limits() {
    let (mut ticks, mut orders) = (0u64, 0u64);
    for (which, strategy) in StrategyConfig::ALL.into_iter().enumerate() {
        for k in 0..sequences() {
            let seed = (which as u64) << 40 | k;
            let run = std::panic::catch_unwind(|| {
                let mut storm = Storm::new(strategy, seed);
                for _ in 0..TICKS {
                    storm.step();
                }
                storm.coming.len() as u64
            });
            match run {
                Ok(n) => orders += n,
                Err(panic) => {
                    eprintln!("strategy {}, sequence {seed}", strategy.name());
                    std::panic::resume_unwind(panic);
                }
            }
            ticks += u64::from(TICKS);
        }
    }
    println!("{} sequences, {ticks} control periods", sequences() * 9);
    assert!(orders > 0, "the policy was asked");
}
