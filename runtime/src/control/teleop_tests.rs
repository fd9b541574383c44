//! Take-over, hand-back and correction through the whole control cycle.

use super::tests::{PERIOD, ask, chunk, core, state};
use super::*;
use crate::arbiter::{Claim, LeaseMode, Resume};

const DEVICE: Source = Source::literal("leader");
const ACCELERATION: f64 = 20.0;

/// A core whose state is kept fresh, and the commands that came out.
struct Rig {
    core: ControlCore,
    k: u32,
    sequence: u64,
    /// Stamps of the device are this far from ours.
    skew: i64,
    commands: Vec<f64>,
    interventions: u32,
}

impl Rig {
    fn new(config: AuthorityConfig) -> Self {
        let limit = JointLimits {
            lower: -1.0,
            upper: 1.0,
            velocity: 2.0,
            acceleration: ACCELERATION,
            jerk: 1000.0,
        };
        let core = core().with_authority(&config, &[limit]);
        let mut rig =
            Self { core, k: 0, sequence: 0, skew: 0, commands: Vec::new(), interventions: 0 };
        rig.tick();
        rig
    }

    fn now(&self) -> Stamp {
        Stamp(1_000_000_000) + PERIOD * self.k
    }

    fn tick(&mut self) -> Cycle {
        self.k += 1;
        let now = self.now();
        let position = self.core.guard.position()[0];
        self.core.on_event(state(now, position), now);
        let cycle = self.core.tick(now);
        self.interventions += u32::from(!cycle.interventions.is_empty());
        self.commands.push(cycle.command.expect("the state is known").position[0]);
        cycle
    }

    /// A tick that answers the scheduler's order with `values` at once.
    fn play(&mut self, values: &[f64]) {
        if let Some(order) = self.tick().order {
            let now = self.now();
            let answer = chunk(order.request, now, values.to_vec());
            assert!(self.core.on_event(ControlEvent::Chunk(answer), now).accepted);
        }
    }

    fn start_policy(&mut self) {
        let now = self.now();
        ask(&mut self.core, AuthorityRequest::Policy, now);
    }

    fn take(&mut self, mode: LeaseMode) {
        let claim = Claim { mode, priority: 1, duration: Duration::from_millis(300) };
        assert_eq!(self.request(AuthorityRequest::Take(claim)), Ok(()));
    }

    fn request(&mut self, request: AuthorityRequest) -> Result<(), Denied> {
        let request = OperatorRequest { ticket: 9, by: DEVICE, request };
        let effect = self.core.on_event(ControlEvent::Operator(request), self.now());
        effect.answer.expect("a ticket is answered").result
    }

    fn sample(&mut self, target: TeleopTarget) -> Option<SampleRefusal> {
        self.sequence += 1;
        let arrived = self.now();
        let (stamp, sequence) = (Stamp(arrived.0 + self.skew), self.sequence);
        let sample = TeleopSample { source: DEVICE, stamp, sequence, arrived, target };
        self.core.on_event(ControlEvent::Teleop(sample), arrived).sample_refused
    }

    fn pose(&mut self, position: f64) -> Option<SampleRefusal> {
        self.sample(TeleopTarget::Position(vec(position)))
    }

    /// Neither position nor velocity jumps: no step is further from the one before than the limit allows.
    fn assert_smooth(&self) {
        let t = PERIOD.as_secs_f64();
        for w in self.commands.windows(3) {
            let change = ((w[2] - w[1]) - (w[1] - w[0])).abs() / (t * t);
            assert!(change <= ACCELERATION * (1.0 + 1e-6), "{change} rad/s2: {w:?}");
        }
    }
}

fn vec(value: f64) -> JointVec {
    JointVec::from_slice(&[value]).expect("one joint")
}

/// A ramp of 0.5 rad/s from where the arm is.
fn ramp(from: f64) -> Vec<f64> {
    (1..=16).map(|k| from + 0.05 * f64::from(k)).collect()
}

#[test]
fn takeover_jump() {
    let mut rig = Rig::new(AuthorityConfig::default());
    rig.start_policy();
    for _ in 0..40 {
        rig.play(&ramp(0.0));
    }
    let (before, speed) = (rig.core.guard.position()[0], rig.core.guard.velocity()[0]);
    assert!(speed > 0.4, "the arm moves when it is taken over: {speed}");

    // The device stands at quite another pose and does not move.
    rig.take(LeaseMode::Teleop);
    assert_eq!(rig.pose(-0.8), None);
    rig.interventions = 0;
    let first = rig.tick();
    assert_eq!(first.authority, Authority::Teleop);
    assert!(first.teleop_delay.is_some_and(|d| d <= PERIOD), "{:?}", first.teleop_delay);
    for _ in 0..20 {
        assert_eq!(rig.pose(-0.8), None);
        rig.tick();
    }
    let rest = rig.core.guard.position()[0];
    let braking = speed * speed / (2.0 * 0.5 * ACCELERATION) + speed * PERIOD.as_secs_f64();
    assert!(rest >= before && rest - before <= braking, "it glides out: {before} to {rest}");
    assert!(rig.core.guard.at_rest());
    // Now it moves by 0.1 rad, and so does the arm.
    for k in 1..=50 {
        let f = f64::from(k) / 50.0;
        assert_eq!(rig.pose(-0.8 + 0.1 * f * f * (3.0 - 2.0 * f)), None);
        rig.tick();
    }
    for _ in 0..20 {
        assert_eq!(rig.pose(-0.7), None);
        rig.tick();
    }
    let moved = rig.core.guard.position()[0] - rest;
    assert!((moved - 0.1).abs() < 1e-9, "{moved}");
    assert_eq!(rig.interventions, 0, "the guard has nothing to mend");

    // And back in the middle of a motion: leftovers are refused, a fresh chunk is asked for.
    for k in 1..=5 {
        assert_eq!(rig.pose(-0.7 + 0.004 * f64::from(k)), None);
        rig.tick();
    }
    let old = rig.core.on_event(ControlEvent::Chunk(chunk(1, rig.now(), ramp(0.9))), rig.now());
    assert_eq!(old.refused, Some(Refusal::NotAsked));
    assert_eq!(rig.request(AuthorityRequest::Release { to_policy: true }), Ok(()));
    let cycle = rig.tick();
    assert_eq!((cycle.authority, cycle.mode), (Authority::Policy, Mode::Waiting));
    let order = cycle.order.expect("a fresh chunk is asked for at once");
    for _ in 0..10 {
        rig.tick();
    }
    let start = rig.core.guard.position()[0];
    let answer = chunk(order.request, rig.now(), ramp(start + 0.1));
    assert!(rig.core.on_event(ControlEvent::Chunk(answer), rig.now()).accepted);
    for _ in 0..40 {
        rig.tick();
    }
    rig.assert_smooth();
}

#[test]
fn silence_stops_the_arm_and_the_clutch_closes_anew() {
    let mut rig = Rig::new(AuthorityConfig::default());
    rig.take(LeaseMode::Teleop);
    for k in 0..20 {
        assert_eq!(rig.pose(0.01 * f64::from(k)), None);
        rig.tick();
    }
    for _ in 0..40 {
        // The link carries heartbeats but no samples.
        assert_eq!(rig.request(AuthorityRequest::Renew), Ok(()));
        assert_eq!(rig.tick().authority, Authority::Teleop);
    }
    let rest = rig.core.guard.position()[0];
    assert!(rig.core.guard.at_rest());
    assert_eq!(rig.pose(0.9), None, "the device was moved meanwhile");
    for _ in 0..10 {
        rig.tick();
    }
    assert!((rig.core.guard.position()[0] - rest).abs() < 1e-9);
    rig.assert_smooth();
    // Without heartbeats the lease ends, and samples are nobody's.
    for _ in 0..40 {
        rig.tick();
    }
    assert_eq!(rig.core.authority(), Authority::Hold);
    assert_eq!(rig.pose(0.9), Some(SampleRefusal::NoLease));
}

#[test]
fn late_reordered_and_senseless_samples_are_left_out_whatever_the_devices_clock_says() {
    let mut rig = Rig::new(AuthorityConfig::default());
    rig.skew = -3_600_000_000_000;
    rig.take(LeaseMode::Teleop);
    assert_eq!(rig.pose(0.0), None, "an hour apart, but the first sets the difference");
    rig.tick();
    rig.skew -= 200_000_000;
    assert_eq!(rig.pose(0.5), Some(SampleRefusal::Stale), "200 ms longer under way");
    rig.skew += 200_000_000;
    rig.sequence -= 2;
    assert_eq!(rig.pose(0.5), Some(SampleRefusal::OutOfOrder));
    rig.sequence = 50;
    assert_eq!(rig.pose(f64::NAN), Some(SampleRefusal::Invalid));
    let three = TeleopTarget::Velocity(JointVec::zeros(3));
    assert_eq!(rig.sample(three), Some(SampleRefusal::Invalid));
    for _ in 0..5 {
        rig.tick();
    }
    assert_eq!(rig.core.guard.position()[0], 0.0);
}

#[test]
fn a_jog_moves_at_its_speed_and_an_alignment_closes_the_offset() {
    let mut rig = Rig::new(AuthorityConfig::default());
    rig.take(LeaseMode::Teleop);
    for _ in 0..100 {
        assert_eq!(rig.sample(TeleopTarget::Velocity(vec(0.2))), None);
        rig.tick();
    }
    let jogged = rig.core.guard.position()[0];
    assert!((jogged - 0.2).abs() < 0.005, "0.2 rad/s for 1 s: {jogged}");
    rig.assert_smooth();

    let teleop = TeleopConfig { align_speed: 0.5, ..TeleopConfig::default() };
    let mut rig = Rig::new(AuthorityConfig { teleop, ..AuthorityConfig::default() });
    rig.take(LeaseMode::Teleop);
    for _ in 0..100 {
        assert_eq!(rig.pose(0.3), None);
        rig.tick();
    }
    assert!((rig.core.guard.position()[0] - 0.3).abs() < 1e-9, "device and arm agree");
    let steps = rig.commands.windows(2).map(|w| w[1] - w[0]);
    // The guard starts the motion and then makes up for its start.
    assert!(steps.fold(0.0, f64::max) <= 0.8 * PERIOD.as_secs_f64(), "slowly");
}

#[test]
fn a_correction_is_bounded_and_does_not_add_up_over_chunks() {
    let mut rig = Rig::new(AuthorityConfig::default());
    rig.start_policy();
    for _ in 0..100 {
        rig.play(&[0.3; 16]);
    }
    rig.take(LeaseMode::Shared);
    for k in 0..400u32 {
        assert_eq!(rig.pose(0.005 * f64::from(k.min(100))), None);
        rig.play(&[0.3; 16]);
    }
    let there = rig.core.guard.position()[0];
    assert!((there - 0.45).abs() < 1e-6, "0.3 and a correction of 0.15 at most: {there}");
    rig.assert_smooth();
}

#[test]
fn a_lost_lease_gives_the_arm_back_to_the_policy_only_where_configured() {
    for (resume, after) in [(Resume::Ask, Authority::Hold), (Resume::Auto, Authority::Policy)] {
        let mut config = AuthorityConfig::default();
        config.arbiter.resume = resume;
        let mut rig = Rig::new(config);
        rig.start_policy();
        for _ in 0..20 {
            rig.play(&ramp(0.0));
        }
        rig.take(LeaseMode::Teleop);
        assert_eq!(rig.pose(0.0), None);
        let change = (0..60).find_map(|_| rig.tick().change).expect("the lease ends");
        assert_eq!((change.to, change.reason), (after, crate::arbiter::Reason::LeaseExpired));
        rig.assert_smooth();
    }
}
