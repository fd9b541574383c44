//! Position servos: second order, with velocity, acceleration and torque limits and a latency.
//!
//! Pure functions of time steps; no clock is read here.

use std::collections::VecDeque;

use super::description::JointDescription;

/// Friction of the gears without torque, as a share of the acceleration limit. It is what keeps the arm up then:
/// gravity is not modelled.
const FRICTION: f64 = 0.25;

/// One servo: position (rad), velocity (rad/s), and the targets still under way.
#[derive(Debug, Clone)]
pub struct Servo {
    lower: f64,
    upper: f64,
    velocity_limit: f64,
    acceleration_limit: f64,
    bandwidth: f64,
    torque: bool,
    position: f64,
    velocity: f64,
    /// Targets in the order of their effect; the front one is in effect next.
    pending: VecDeque<f64>,
}

impl Servo {
    /// A servo at rest at `position`, to be stepped every `dt` seconds.
    pub fn new(joint: &JointDescription, position: f64, dt: f64) -> Self {
        let limits = &joint.limits;
        let position = position.clamp(limits.lower, limits.upper);
        let delay = (joint.latency / dt).round() as usize;
        Self {
            lower: limits.lower,
            upper: limits.upper,
            velocity_limit: limits.velocity,
            acceleration_limit: limits.acceleration.min(joint.torque / joint.inertia),
            bandwidth: joint.bandwidth,
            torque: true,
            position,
            velocity: 0.0,
            pending: std::iter::repeat_n(position, delay).collect(),
        }
    }

    /// Moves the servo by `dt` seconds towards `target` (rad), which takes effect after the latency.
    ///
    /// A target that is no number is dropped: the one before stays.
    pub fn step(&mut self, target: f64, dt: f64) {
        if !self.torque {
            self.coast(dt);
            return;
        }
        let last = self.pending.back().copied().unwrap_or(self.position);
        self.pending.push_back(if target.is_finite() { target } else { last });
        let target = self.pending.pop_front().unwrap_or(last).clamp(self.lower, self.upper);
        // Critically damped; the speed that still allows braking before the target bounds overshoot.
        let error = target - self.position;
        let wish = self.bandwidth * (self.bandwidth * error - 2.0 * self.velocity);
        let change = wish.clamp(-self.acceleration_limit, self.acceleration_limit) * dt;
        let braking =
            (2.0 * self.acceleration_limit * error.abs()).sqrt() + self.acceleration_limit * dt;
        let limit = self
            .velocity_limit
            .min(braking.max(self.velocity.abs() - self.acceleration_limit * dt));
        self.velocity = (self.velocity + change).clamp(-limit, limit);
        self.advance(dt);
    }

    /// Takes the torque off or puts it on again; targets from before are forgotten.
    pub fn set_torque(&mut self, on: bool) {
        self.torque = on;
        let here = self.position;
        self.pending.iter_mut().for_each(|target| *target = here);
    }

    fn coast(&mut self, dt: f64) {
        let slower = FRICTION * self.acceleration_limit * dt;
        self.velocity -= self.velocity.clamp(-slower, slower);
        self.advance(dt);
        self.set_torque(false);
    }

    fn advance(&mut self, dt: f64) {
        let next = self.position + self.velocity * dt;
        self.position = next.clamp(self.lower, self.upper);
        if self.position != next {
            self.velocity = 0.0;
        }
    }

    /// Stops where it is: what a blocked joint does.
    pub fn stall(&mut self, position: f64) {
        self.position = position;
        self.velocity = 0.0;
    }

    /// Position (rad).
    pub fn position(&self) -> f64 {
        self.position
    }

    /// Velocity (rad/s).
    pub fn velocity(&self) -> f64 {
        self.velocity
    }
}

#[cfg(test)]
mod tests {
    use super::super::description::ArmDescription;
    use super::*;
    use proptest::prelude::*;

    const DT: f64 = 0.002;

    proptest! {
        #[test]
        fn never_leaves_its_limits(targets in prop::collection::vec(-20.0..20.0f64, 1..40), joint in 0usize..6) {
            let arm = ArmDescription::desk_arm();
            let joint = &arm.joints[joint];
            let mut servo = Servo::new(joint, 0.1, DT);
            for target in targets {
                for _ in 0..20 {
                    let (position, velocity) = (servo.position(), servo.velocity());
                    servo.step(target, DT);
                    let l = &joint.limits;
                    prop_assert!(servo.position() >= l.lower && servo.position() <= l.upper);
                    prop_assert!(servo.velocity().abs() <= l.velocity + 1e-12);
                    prop_assert!((servo.position() - position).abs() <= l.velocity * DT + 1e-12);
                    let at_stop = servo.position() == l.lower || servo.position() == l.upper;
                    let change = (servo.velocity() - velocity).abs() / DT;
                    prop_assert!(at_stop || change <= l.acceleration + 1e-6, "{change}");
                }
            }
        }
    }

    #[test]
    fn without_torque_it_coasts_to_rest_and_stays_there_when_the_torque_returns() {
        let arm = ArmDescription::desk_arm();
        let mut servo = Servo::new(&arm.joints[0], 0.0, DT);
        for _ in 0..100 {
            servo.step(1.0, DT);
        }
        let (position, velocity) = (servo.position(), servo.velocity());
        assert!(velocity > 0.5);
        servo.set_torque(false);
        for _ in 0..1000 {
            servo.step(1.0, DT);
        }
        let rest = servo.position();
        let way = velocity * velocity / (2.0 * FRICTION * servo.acceleration_limit);
        assert!(servo.velocity() == 0.0 && (rest - position - way).abs() < 0.01, "{rest} {way}");
        servo.set_torque(true);
        for _ in 0..100 {
            servo.step(rest, DT);
        }
        assert!((servo.position() - rest).abs() < 1e-9);
    }

    #[test]
    fn reaches_its_target_after_the_latency() {
        let arm = ArmDescription::desk_arm();
        let mut servo = Servo::new(&arm.joints[0], 0.0, DT);
        for step in 0..500 {
            servo.step(0.5, DT);
            assert!(step >= 5 || servo.position() == 0.0);
            assert!(servo.position() < 0.52, "{}", servo.position());
        }
        assert!((servo.position() - 0.5).abs() < 1e-3);
        servo.step(f64::NAN, DT);
        assert!((servo.position() - 0.5).abs() < 1e-3);
    }
}
