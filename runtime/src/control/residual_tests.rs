//! The residual stage within the control cycle.

use super::tests::{PERIOD, ask, chunk, core, state};
use super::*;

const CONFIG: ResidualConfig = ResidualConfig { limit: 0.1, timeout: Duration::from_millis(50) };

/// An arm that follows its commands, a policy that wants `plan`, and a residual policy that wants `offset`.
struct Rig {
    core: ControlCore,
    now: Stamp,
    command: JointVec,
}

impl Rig {
    fn new(residual: bool) -> Self {
        let (plain, now) = (core(), Stamp(1_000_000_000));
        let limit = JointLimits {
            lower: -1.0,
            upper: 1.0,
            velocity: 2.0,
            acceleration: 20.0,
            jerk: 1000.0,
        };
        let mut core = if residual { plain.with_residual(CONFIG, &[limit]) } else { plain };
        core.on_event(state(now, 0.0), now);
        core.tick(now);
        ask(&mut core, AuthorityRequest::Policy, now);
        Self { core, now, command: JointVec::zeros(1) }
    }

    /// One cycle; the residual policy answers the input at once.
    fn cycle(&mut self, offset: Option<f64>) -> Cycle {
        self.now = self.now + PERIOD;
        self.core.on_event(state(self.now, self.command[0]), self.now);
        let cycle = self.core.tick(self.now);
        if let Some(order) = cycle.order {
            let plan = chunk(order.request, self.now, vec![0.2; 16]);
            self.core.on_event(ControlEvent::Chunk(plan), self.now);
        }
        let input = self.core.take_residual_input();
        if let (Some(input), Some(offset)) = (input, offset) {
            let offset = JointVec::from_slice(&[offset]).expect("one joint");
            let sample = ResidualSample { stamp: input.stamp, offset };
            let effect = self.core.on_event(ControlEvent::Residual(sample), self.now);
            assert_eq!(effect.residual_refused.is_some(), !offset.is_finite());
        }
        self.command = cycle.command.expect("the arm was seen").position;
        cycle
    }
}

#[test]
fn the_command_is_the_plan_and_the_bounded_offset() {
    let mut rig = Rig::new(true);
    for _ in 0..300 {
        rig.cycle(Some(0.05));
    }
    assert!((rig.command[0] - 0.25).abs() < 1e-6, "{}", rig.command[0]);
    for _ in 0..300 {
        rig.cycle(Some(7.0));
    }
    assert!((rig.command[0] - 0.3).abs() < 1e-6, "at its limit: {}", rig.command[0]);
    // The network falls silent: the plan alone, without a step on the way.
    for _ in 0..300 {
        let before = rig.command[0];
        rig.cycle(None);
        assert!((rig.command[0] - before).abs() <= 2.0 * PERIOD.as_secs_f64());
    }
    assert!((rig.command[0] - 0.2).abs() < 1e-6, "{}", rig.command[0]);
    for _ in 0..50 {
        rig.cycle(Some(f64::NAN));
    }
    assert!((rig.command[0] - 0.2).abs() < 1e-6, "a value that is none moves nothing");
}

#[test]
fn an_offset_of_zero_is_the_policy_alone() {
    let (mut with, mut without) = (Rig::new(true), Rig::new(false));
    for _ in 0..200 {
        let (a, b) = (with.cycle(Some(0.0)), without.cycle(None));
        assert_eq!(a.command, b.command);
    }
}

#[test]
fn the_network_sees_the_plan_without_its_own_offset() {
    let mut rig = Rig::new(true);
    for _ in 0..300 {
        rig.cycle(Some(0.05));
    }
    rig.now = rig.now + PERIOD;
    rig.core.on_event(state(rig.now, rig.command[0]), rig.now);
    rig.core.tick(rig.now);
    let input = rig.core.take_residual_input().expect("the plan plays");
    assert!((input.planned[0] - 0.2).abs() < 1e-6 && (input.position[0] - 0.25).abs() < 1e-6);
    assert_eq!(input.stamp, rig.now);
    assert!(rig.core.take_residual_input().is_none(), "once a cycle");
}

#[test]
fn a_hold_keeps_the_command_where_it_is() {
    let mut rig = Rig::new(true);
    for _ in 0..300 {
        rig.cycle(Some(0.05));
    }
    ask(&mut rig.core, AuthorityRequest::Hold, rig.now);
    let at = rig.command[0];
    for _ in 0..50 {
        rig.cycle(Some(0.1));
        assert!((rig.command[0] - at).abs() < 1e-6, "held: {}", rig.command[0]);
    }
    assert!(rig.core.take_residual_input().is_none(), "nothing is to be corrected");
    let sample = ResidualSample { stamp: rig.now, offset: JointVec::zeros(1) };
    let plain = core().on_event(ControlEvent::Residual(sample), rig.now).residual_refused;
    assert_eq!(plain, Some(ResidualRefusal::NotConfigured));
}
