//! One joint's filter: position, velocity, acceleration and jerk of the command stream stay within limits.
//!
//! The invariant is that the brake law ([`super::brake`]), started from the last command, stays inside all
//! limits. A command is accepted only if that holds for it too, tried in this order: the exact wish, a step of
//! the tracking law towards it, a tracking step towards the position limit in the way, and the brake law's own
//! step, which the invariant always admits.
//!
//! The tracking law looks at the wish's course (position, velocity, and the acceleration that two velocities
//! in a row tell) and takes the largest step from which the brake law, relative to that course, does
//! not pass it. Once that step is the brake law's own, the law lands on the course exactly.

use super::brake::{Bounds, BrakePath, brake_acceleration, run_down_inverse};
use super::causes::Cause;
use crate::JointLimits;

/// Rounding that a position limit forgives (rad).
const POSITION_ROUNDING: f64 = 1e-11;
/// Rounding that the other limits forgive, of the limit.
const ROUNDING: f64 = 1e-9;
/// How near to the course the tracking law's stop is computed (rad).
const TRACKING_ACCURACY: f64 = 1e-13;
/// A joint slower than this stands still (rad/s).
const STILL: f64 = 1e-9;
/// Share of the acceleration limit that the tracking law leaves to the course's own acceleration.
const COURSE_SHARE: f64 = 0.5;

/// Position (rad), velocity (rad/s) and acceleration (rad/s²) of a command: finite differences of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Motion {
    pub position: f64,
    pub velocity: f64,
    pub acceleration: f64,
}

/// What a joint should do: a position now, and how it goes on.
#[derive(Debug, Clone, Copy)]
struct Course {
    position: f64,
    velocity: f64,
    acceleration: f64,
}

/// The next command of a joint, and why it is not the wish.
pub(super) struct Step {
    pub motion: Motion,
    /// The wish was outside the position limits, or braking would have led there.
    pub position_held: bool,
    /// The outermost other limit that the exact wish would have broken.
    pub broken: Option<Cause>,
}

/// Limits and last command of one joint.
#[derive(Debug, Clone)]
pub(super) struct JointFilter {
    limits: JointLimits,
    /// The position limits, widened to a start outside them until the joint is back inside.
    range: (f64, f64),
    period: f64,
    /// What the brake law's units are: `J·T`, `J·T²`, `J·T³`.
    unit: Motion,
    motion: Motion,
    /// Velocity of the wish before.
    feed: Option<f64>,
}

impl JointFilter {
    /// A filter at rest at zero; `limits` are sound.
    pub fn new(limits: JointLimits, period: f64) -> Self {
        let acceleration = limits.jerk * period;
        let unit = Motion {
            acceleration,
            velocity: acceleration * period,
            position: acceleration * period * period,
        };
        let mut new =
            Self { limits, range: (0.0, 0.0), period, unit, motion: Motion::default(), feed: None };
        new.rest_at(0.0);
        new
    }

    /// At rest at `position`, wherever that is.
    pub fn rest_at(&mut self, position: f64) {
        self.motion = Motion { position, ..Motion::default() };
        self.range = (self.limits.lower.min(position), self.limits.upper.max(position));
        self.feed = None;
    }

    /// The last command.
    pub fn motion(&self) -> &Motion {
        &self.motion
    }

    /// True when the last command stood still and braking would change nothing.
    pub fn at_rest(&self) -> bool {
        self.motion.velocity.abs() < STILL && self.motion.acceleration.abs() * self.period < STILL
    }

    /// Makes `next`, which came from [`Self::step`] or [`Self::braked`], the last command.
    pub fn accept(&mut self, next: Motion, feed: Option<f64>) {
        self.motion = next;
        self.feed = feed;
        let JointLimits { lower, upper, .. } = self.limits;
        if self.range != (lower, upper) && self.stays_within(&next, (lower, upper)) {
            self.range = (lower, upper);
        }
    }

    /// The brake law's step.
    pub fn braked(&self) -> Motion {
        let a = brake_acceleration(
            self.motion.velocity / self.unit.velocity,
            self.motion.acceleration / self.unit.acceleration,
            self.bounds(0.0),
        );
        self.after(a * self.unit.acceleration)
    }

    /// The path that the brake law takes from `motion`, in units of `J·T³`.
    pub fn brake_path(&self, motion: &Motion) -> BrakePath {
        BrakePath::new(
            motion.velocity / self.unit.velocity,
            motion.acceleration / self.unit.acceleration,
            self.bounds(0.0),
        )
    }

    /// Unit of position of the brake path (rad).
    pub fn position_unit(&self) -> f64 {
        self.unit.position
    }

    /// The limits.
    pub fn limits(&self) -> &JointLimits {
        &self.limits
    }

    /// The next command on the way to moving at `velocity` (rad/s), as fast as the limits allow.
    pub fn velocity_step(&self, velocity: f64) -> Motion {
        let a = brake_acceleration(
            (self.motion.velocity - velocity) / self.unit.velocity,
            self.motion.acceleration / self.unit.acceleration,
            self.bounds(0.0),
        );
        let motion = self.after(a * self.unit.acceleration);
        if self.stays_within(&motion, self.range) { motion } else { self.braked() }
    }

    /// The next command that moves at `velocity` (rad/s) exactly, if the limits allow it.
    pub fn moving_at(&self, velocity: f64) -> Option<Motion> {
        let acceleration = (velocity - self.motion.velocity) / self.period;
        let jerk = (acceleration - self.motion.acceleration) / self.unit.acceleration;
        let motion = self.after(acceleration);
        (acceleration.abs() <= self.limits.acceleration
            && jerk.abs() <= 1.0
            && self.stays_within(&motion, self.range))
        .then_some(motion)
    }

    /// The next command towards `wish` (rad), which goes on at `feed` (rad/s); both are finite.
    pub fn step(&self, wish: f64, feed: f64) -> Step {
        let JointLimits { lower, upper, velocity, .. } = self.limits;
        let mut course = Course {
            position: wish,
            velocity: feed.clamp(-velocity, velocity),
            acceleration: self.course_acceleration(feed),
        };
        // A wish outside must not pull a joint that already stands outside further out.
        let mut position_held = wish < lower || wish > upper;
        if position_held {
            let position = wish.clamp(lower, upper);
            course = Course { position, velocity: 0.0, acceleration: 0.0 };
        }
        let exact = self.reaching(course.position);
        let broken = self.first_broken(&exact, &course);
        if broken.is_none() && self.stays_within(&exact, self.range) {
            return Step { motion: exact, position_held, broken };
        }
        position_held |= broken.is_none();
        let mut motion = self.towards(&course);
        if !self.stays_within(&motion, self.range) {
            position_held = true;
            let up = self.brake_path(&motion).end() > 0.0;
            let position = if up { self.range.1 } else { self.range.0 };
            motion = self.towards(&Course { position, velocity: 0.0, acceleration: 0.0 });
            if !self.stays_within(&motion, self.range) {
                motion = self.braked();
            }
        }
        if motion.position == wish {
            return Step { motion, position_held: false, broken: None }; // reached all the same
        }
        Step { motion, position_held, broken }
    }

    /// The command `position`, one period on.
    fn reaching(&self, position: f64) -> Motion {
        let velocity = (position - self.motion.position) / self.period;
        let acceleration = (velocity - self.motion.velocity) / self.period;
        Motion { position, velocity, acceleration }
    }

    /// The command after one period at `acceleration`.
    fn after(&self, acceleration: f64) -> Motion {
        let velocity = self.motion.velocity + acceleration * self.period;
        Motion { position: self.motion.position + velocity * self.period, velocity, acceleration }
    }

    /// Acceleration limits in the brake law's units, relative to a course's acceleration.
    fn bounds(&self, course: f64) -> Bounds {
        let limit = self.limits.acceleration / self.unit.acceleration;
        Bounds { down: limit + course, up: limit - course }
    }

    /// What two velocities of the wish in a row tell; a jump between them tells nothing.
    fn course_acceleration(&self, feed: f64) -> f64 {
        let limit = self.limits.acceleration;
        let change = self.feed.map_or(0.0, |before| (feed - before) / self.period);
        if change.abs() > limit {
            return 0.0;
        }
        change
    }

    /// Velocity of the course as the command stream's finite difference shows it.
    fn course_velocity(&self, course: &Course) -> f64 {
        course.velocity - 0.5 * course.acceleration * self.period
    }

    /// The outermost limit that `exact` breaks, or that following `course` from there would break.
    fn first_broken(&self, exact: &Motion, course: &Course) -> Option<Cause> {
        let limits = &self.limits;
        if exact.velocity.abs() > limits.velocity {
            return Some(Cause::Velocity);
        }
        if exact.acceleration.abs() > limits.acceleration {
            return Some(Cause::Acceleration);
        }
        let jerk = (exact.acceleration - self.motion.acceleration) / self.unit.acceleration;
        // Two periods suffice to take the course's own velocity and acceleration on.
        let v = (exact.velocity - self.course_velocity(course)) / self.unit.velocity;
        let a = (exact.acceleration - course.acceleration) / self.unit.acceleration;
        let follows = (v + a).abs() <= 1.0 && v.abs() <= 1.0;
        (jerk.abs() > 1.0 || !follows).then_some(Cause::Jerk)
    }

    /// The brake law from `motion` keeps the velocity limit and `range`.
    fn stays_within(&self, motion: &Motion, range: (f64, f64)) -> bool {
        let path = self.brake_path(motion);
        let (low, high) = path.reach();
        let (slow, fast) = path.speeds();
        let fastest = self.limits.velocity * (1.0 + ROUNDING);
        motion.position + low * self.unit.position >= range.0 - POSITION_ROUNDING
            && motion.position + high * self.unit.position <= range.1 + POSITION_ROUNDING
            && fast * self.unit.velocity <= fastest
            && slow * self.unit.velocity >= -fastest
    }

    /// The tracking law's step.
    fn towards(&self, course: &Course) -> Motion {
        let unit = &self.unit;
        let (v, a) =
            (self.motion.velocity / unit.velocity, self.motion.acceleration / unit.acceleration);
        let limit = self.limits.acceleration / unit.acceleration;
        let fastest = self.limits.velocity / unit.velocity;
        let high = (a + 1.0).min(limit).min(run_down_inverse((fastest - v).max(0.0)));
        let low = (a - 1.0).max(-limit).max(-run_down_inverse((fastest + v).max(0.0)));
        if low >= high {
            return self.braked();
        }
        // Everything below is relative to the course, which is at zero when the step is done.
        let share = COURSE_SHARE * self.limits.acceleration;
        let course_a = course.acceleration.clamp(-share, share) / unit.acceleration;
        let v = v - self.course_velocity(course) / unit.velocity;
        let gap = (self.motion.position - course.position) / unit.position
            + self.motion.velocity / unit.velocity;
        let bounds = self.bounds(course_a);
        let stop = |a: f64| {
            let a_relative = (a - course_a).clamp(-bounds.down, bounds.up);
            gap + a + BrakePath::new(v + a, a_relative, bounds).end()
        };
        // The brake law's own step, taken by the periods before, usually is the answer already.
        let own = course_a + brake_acceleration(v + course_a, a - course_a, bounds);
        let accuracy = TRACKING_ACCURACY / unit.position;
        let a = largest_below(stop, low, high, own, accuracy);
        self.after(a * unit.acceleration)
    }
}

/// The largest argument in `low..=high` at which the rising function `f` is not above zero; `low` if there is none.
fn largest_below(f: impl Fn(f64) -> f64, low: f64, high: f64, guess: f64, accuracy: f64) -> f64 {
    let f_high = f(high);
    if f_high <= 0.0 {
        return high;
    }
    let f_low = f(low);
    if f_low >= 0.0 {
        return low;
    }
    let (mut below, mut above) = ((low, f_low), (high, f_high));
    let mut next = guess;
    let mut side = 0;
    // Illinois' regula falsi: the function is smooth but for small kinks.
    for _ in 0..40 {
        if next <= below.0 || next >= above.0 {
            next = 0.5 * (below.0 + above.0);
        }
        let value = f(next);
        if value.abs() <= accuracy {
            return next;
        }
        if value > 0.0 {
            above = (next, value);
            if side == 1 {
                below.1 *= 0.5;
            }
            side = 1;
        } else {
            below = (next, value);
            if side == -1 {
                above.1 *= 0.5;
            }
            side = -1;
        }
        next = below.0 - below.1 * (above.0 - below.0) / (above.1 - below.1);
    }
    below.0
}
