//! The guard: the last stage before the wire. No command reaches a driver without passing it.
//!
//! It gets the position that the scheduler wants next and returns the nearest command that keeps every
//! joint inside its limits of position (rad), velocity (rad/s) and acceleration (rad/s²), given the
//! command of the period before. A wish inside all limits passes unchanged, bit for bit; every change is
//! counted per joint and cause. Room to a position limit bounds the speed towards it: the fastest
//! speed from which braking at full deceleration still stops in time, in discrete time.

use std::time::Duration;

use crate::{JointLimits, JointVec, MAX_JOINTS};

/// Why the guard changed a joint's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The wish lay outside the position limits, or could not stop before them.
    Position,
    /// The wish was faster than the joint may move.
    Velocity,
    /// The wish changed speed faster than the joint may.
    Acceleration,
    /// The wish was no finite number: the joint is braked to rest.
    NotFinite,
}

impl Cause {
    /// All causes, in the order of their counters.
    pub const ALL: [Cause; 4] =
        [Cause::Position, Cause::Velocity, Cause::Acceleration, Cause::NotFinite];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Position => "position",
            Cause::Velocity => "velocity",
            Cause::Acceleration => "acceleration",
            Cause::NotFinite => "not finite",
        }
    }
}

/// What the guard changed in one period: a bit per joint, for each cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interventions {
    joints: [u16; Cause::ALL.len()],
}

impl Interventions {
    /// True when `joint` was changed because of `cause`.
    pub fn contains(&self, joint: usize, cause: Cause) -> bool {
        joint < MAX_JOINTS && self.joints[cause as usize] & (1 << joint) != 0
    }

    /// True when nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.joints.iter().all(|bits| *bits == 0)
    }

    fn add(&mut self, joint: usize, cause: Cause) {
        self.joints[cause as usize] |= 1 << joint;
    }
}

/// The guard's setting cannot protect anything.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GuardError {
    /// More joints than [`MAX_JOINTS`], or none.
    #[error("an arm has 1 to {MAX_JOINTS} joints, found {0}")]
    JointCount(usize),
    /// A limit that is not finite, not positive, or an empty range.
    #[error(
        "joint {joint}: {what} is {value}; position limits must be finite with lower < upper, \
         velocity and acceleration limits finite and above zero"
    )]
    Limit {
        /// Index of the joint.
        joint: usize,
        /// Which limit.
        what: &'static str,
        /// Its value.
        value: f64,
    },
}

/// The guard of one arm: limits and the last command.
///
/// Real time: [`Guard::filter`] and [`Guard::brake`] neither allocate nor lock.
#[derive(Debug, Clone)]
pub struct Guard {
    joints: usize,
    limits: [JointLimits; MAX_JOINTS],
    period: f64,
    position: JointVec,
    velocity: JointVec,
}

impl Guard {
    /// A guard for joints with `limits`, called once every `period`, at rest at `position` (rad).
    ///
    /// # Errors
    /// [`GuardError`] for limits that cannot protect.
    pub fn new(limits: &[JointLimits], period: Duration) -> Result<Self, GuardError> {
        if limits.is_empty() || limits.len() > MAX_JOINTS {
            return Err(GuardError::JointCount(limits.len()));
        }
        let mut stored = [limits[0]; MAX_JOINTS];
        for (joint, limit) in limits.iter().enumerate() {
            let bad = |what, value| Err(GuardError::Limit { joint, what, value });
            if !limit.lower.is_finite() {
                return bad("lower position", limit.lower);
            }
            if !limit.upper.is_finite() || limit.upper <= limit.lower {
                return bad("upper position", limit.upper);
            }
            if !limit.velocity.is_finite() || limit.velocity <= 0.0 {
                return bad("velocity", limit.velocity);
            }
            if !limit.acceleration.is_finite() || limit.acceleration <= 0.0 {
                return bad("acceleration", limit.acceleration);
            }
            stored[joint] = *limit;
        }
        let middle = JointVec::zeros(limits.len());
        Ok(Self {
            joints: limits.len(),
            limits: stored,
            period: period.as_secs_f64(),
            position: middle,
            velocity: middle,
        })
    }

    /// Starts from rest at `position` (rad), the measured one. Values that are not finite are left out.
    pub fn rebase(&mut self, position: &JointVec) {
        for joint in 0..self.joints.min(position.len()) {
            if position[joint].is_finite() {
                self.position[joint] = position[joint];
                self.velocity[joint] = 0.0;
            }
        }
    }

    /// Position (rad) of the last command.
    pub fn position(&self) -> &JointVec {
        &self.position
    }

    /// Velocity (rad/s) of the last command.
    pub fn velocity(&self) -> &JointVec {
        &self.velocity
    }

    /// True when the last command stood still.
    pub fn at_rest(&self) -> bool {
        self.velocity.as_slice().iter().all(|v| v.abs() < 1e-9)
    }

    /// The nearest safe command to `wish` (rad), moving at `wish_velocity` (rad/s), one period on.
    pub fn filter(&mut self, wish: &JointVec, wish_velocity: &JointVec) -> Interventions {
        let mut changed = Interventions::default();
        for joint in 0..self.joints {
            let (target, feed) =
                match (wish.as_slice().get(joint), wish_velocity.as_slice().get(joint)) {
                    (Some(p), Some(v)) if p.is_finite() && v.is_finite() => (*p, *v),
                    _ => {
                        changed.add(joint, Cause::NotFinite);
                        self.brake_joint(joint);
                        continue;
                    }
                };
            self.filter_joint(joint, target, feed, &mut changed);
        }
        changed
    }

    /// Brakes every joint towards rest at its full deceleration.
    pub fn brake(&mut self) {
        for joint in 0..self.joints {
            self.brake_joint(joint);
        }
    }

    fn filter_joint(&mut self, joint: usize, wish: f64, feed: f64, changed: &mut Interventions) {
        let (limit, t) = (self.limits[joint], self.period);
        let (position, velocity) = (self.position[joint], self.velocity[joint]);
        let (mut target, mut feed) = (wish, feed.clamp(-limit.velocity, limit.velocity));
        if target < limit.lower || target > limit.upper {
            changed.add(joint, Cause::Position);
            // A wish outside must not pull a joint that already stands outside further out.
            (target, feed) = (target.clamp(limit.lower, limit.upper), 0.0);
        }
        let exact = (target - position) / t;
        let reach = limit.acceleration * t;
        // Arriving must leave a speed that one period can turn into the wish's own.
        let fits = |v: f64| {
            v.abs() <= limit.velocity
                && (v - velocity).abs() <= reach
                && (v - feed).abs() <= reach
                && self.stops_in_room(joint, v)
        };
        if fits(exact) {
            self.position[joint] = target;
            self.velocity[joint] = exact;
            return;
        }
        // Out of reach in one period: close the gap no faster than it can be braked away again.
        let gap = target - feed * t - position;
        let mut v = feed
            + gap.signum() * (gap.abs() / t).min(braking_speed(limit.acceleration, t, gap.abs()));
        if v.abs() > limit.velocity {
            changed.add(joint, Cause::Velocity);
            v = v.clamp(-limit.velocity, limit.velocity);
        }
        if (v - velocity).abs() > reach {
            changed.add(joint, Cause::Acceleration);
            v = v.clamp(velocity - reach, velocity + reach);
        }
        let (down, up) = self.room_speeds(joint);
        if v > up || v < -down {
            changed.add(joint, Cause::Position);
            // Never brake harder than the joint can: the room was kept by the periods before.
            v = v.clamp(-down, up).clamp(velocity - reach, velocity + reach);
        }
        self.position[joint] = position + v * t;
        self.velocity[joint] = v;
    }

    fn brake_joint(&mut self, joint: usize) {
        let reach = self.limits[joint].acceleration * self.period;
        let velocity = self.velocity[joint];
        let v = velocity - velocity.clamp(-reach, reach);
        self.position[joint] += v * self.period;
        self.velocity[joint] = v;
    }

    /// Fastest speeds (rad/s) towards the lower and the upper limit that can still stop in time.
    fn room_speeds(&self, joint: usize) -> (f64, f64) {
        let (limit, position) = (self.limits[joint], self.position[joint]);
        let speed = |room: f64| braking_speed(limit.acceleration, self.period, room.max(0.0));
        (speed(position - limit.lower), speed(limit.upper - position))
    }

    fn stops_in_room(&self, joint: usize, v: f64) -> bool {
        let (down, up) = self.room_speeds(joint);
        v <= up && v >= -down
    }
}

/// Fastest speed from which `room` suffices to stop: `v·dt + v²/(2a) = room`.
///
/// One period passes at `v` before braking begins.
fn braking_speed(acceleration: f64, dt: f64, room: f64) -> f64 {
    acceleration * ((dt * dt + 2.0 * room / acceleration).sqrt() - dt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PERIOD: Duration = Duration::from_millis(10);
    const LIMIT: JointLimits =
        JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 8.0 };

    fn guard() -> Guard {
        Guard::new(&[LIMIT; 2], PERIOD).expect("the limits are sound")
    }

    fn vec(values: &[f64]) -> JointVec {
        JointVec::from_slice(values).expect("two joints fit")
    }

    #[test]
    fn braking_speed_matches_its_golden_values() {
        let golden =
            [(0.0, 0.0), (0.001, 0.05798), (0.01, 0.245657), (0.1, 0.855321), (0.5, 1.9604)];
        for (room, speed) in golden {
            assert!((braking_speed(4.0, 0.01, room) - speed).abs() < 1e-5, "{room}");
        }
    }

    #[test]
    fn a_wish_within_limits_passes_unchanged() {
        let mut guard = guard();
        let wish = vec(&[0.0005, -0.0003]);
        assert!(guard.filter(&wish, &vec(&[0.05, -0.03])).is_empty());
        assert_eq!(guard.position(), &wish);
    }

    #[test]
    fn nan_brakes_and_is_named() {
        let mut guard = guard();
        for k in 1..20 {
            guard.filter(&vec(&[0.0004 * f64::from(k * k), 0.0]), &vec(&[0.0, 0.0]));
        }
        let before = guard.velocity()[0];
        let changed = guard.filter(&vec(&[f64::NAN, 0.0]), &vec(&[0.0, 0.0]));
        assert!(changed.contains(0, Cause::NotFinite) && !changed.contains(1, Cause::NotFinite));
        assert!(guard.velocity()[0].abs() < before.abs() && guard.position().is_finite());
    }

    #[test]
    fn a_far_step_arrives_without_overshoot() {
        let mut guard = guard();
        let (wish, still) = (vec(&[0.7, -0.7]), JointVec::zeros(2));
        for _ in 0..300 {
            guard.filter(&wish, &still);
            assert!(guard.position()[0] <= 0.7 + 1e-9);
        }
        assert!((guard.position()[0] - 0.7).abs() < 1e-9 && guard.at_rest());
    }

    #[test]
    fn unsound_limits_are_refused() {
        let bad = JointLimits { velocity: f64::NAN, ..LIMIT };
        assert!(matches!(
            Guard::new(&[LIMIT, bad], PERIOD),
            Err(GuardError::Limit { joint: 1, what: "velocity", .. })
        ));
        assert!(Guard::new(&[], PERIOD).is_err());
    }

    proptest! {
        #[test]
        fn no_command_leaves_the_limits(wishes in prop::collection::vec(
            prop_oneof![4 => -3.0..3.0f64, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY)], 1..200)
        ) {
            let mut guard = guard();
            let (mut p, mut v) = (0.0, 0.0);
            for (k, wish) in wishes.iter().enumerate() {
                if k % 17 == 16 { guard.brake(); } else {
                    guard.filter(&vec(&[*wish, 0.0]), &vec(&[0.0, 0.0]));
                }
                let (np, nv) = (guard.position()[0], guard.velocity()[0]);
                prop_assert!(np.abs() <= 1.0 + 1e-9, "position {np}");
                prop_assert!(nv.abs() <= LIMIT.velocity + 1e-9, "velocity {nv}");
                prop_assert!((nv - v).abs() <= LIMIT.acceleration * 0.01 + 1e-9, "acceleration");
                prop_assert!((np - p - nv * 0.01).abs() < 1e-9, "position and velocity disagree");
                (p, v) = (np, nv);
            }
        }
    }
}
