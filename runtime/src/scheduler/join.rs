//! The join between two chunks: the rest of the step at a splice decays within bounds.
//!
//! At a splice the command differs from the new curve in position, velocity and acceleration. Each of
//! the three differences decays on a quintic of its own to zero value, rate and curvature. The times are
//! the shortest ones that keep what each part adds within its share of the joint's [`JoinBounds`]; a rate
//! with a time of its own cannot carry the arm far past both curves. A difference of acceleration would
//! swing the arm out if it were carried long: only as much of it is carried as fades in a moment,
//! and the guard's jerk limit smooths the rest at the joint's full ability.

use crate::{JointLimits, JointVec};

/// What a join may add to the motion of one joint.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JoinBounds {
    /// Speed (rad/s).
    pub velocity: f64,
    /// Acceleration (rad/s²).
    pub acceleration: f64,
    /// Jerk (rad/s³).
    pub jerk: f64,
}

impl JoinBounds {
    /// Three quarters of what the joint can do: the rest is left to the chunk itself.
    pub fn of(limits: &JointLimits) -> Self {
        Self {
            velocity: 0.75 * limits.velocity,
            acceleration: 0.75 * limits.acceleration,
            jerk: 0.75 * limits.jerk,
        }
    }
}

/// Value, rate and acceleration of a joint's motion, or of a difference between two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommandState {
    /// Position (rad).
    pub position: JointVec,
    /// Velocity (rad/s).
    pub velocity: JointVec,
    /// Acceleration (rad/s²).
    pub acceleration: JointVec,
}

impl CommandState {
    /// At rest at `position` (rad).
    pub fn at_rest(position: &JointVec) -> Self {
        let still = JointVec::zeros(position.len());
        Self { position: *position, velocity: still, acceleration: still }
    }
}

/// Shortest decay (s): a join that is shorter than a few control periods is a jump again.
const SHORTEST: f64 = 0.04;
/// Longest decay (s) of an acceleration.
const LONGEST_CURVATURE: f64 = 0.15;

/// Shares of the bounds that offset, rate and curvature may use: acceleration, then jerk.
const SHARES: [(f64, f64); 3] = [(0.45, 0.4), (0.45, 0.4), (0.1, 0.2)];

/// Largest derivatives of the three unit quintics below, over their whole time.
mod peak {
    /// Of `1 - 10 s³ + 15 s⁴ - 6 s⁵`.
    pub const OFFSET: [f64; 3] = [1.875, 5.7736, 60.0];
    /// Second and third, of `s - 6 s³ + 8 s⁴ - 3 s⁵`; the first is 1 where it begins.
    pub const RATE: [f64; 2] = [3.9405, 36.0];
    /// Third, of `s²/2 - 3/2 s³ + 3/2 s⁴ - s⁵/2`; the second is 1 where it begins.
    pub const CURVATURE: f64 = 9.0;
}

/// A running join.
#[derive(Debug, Clone, Copy)]
pub(super) struct Join {
    difference: CommandState,
    /// Decay times (s) of offset, rate and curvature.
    times: [JointVec; 3],
    elapsed: f64,
}

impl Join {
    /// The join that takes `difference` (command minus curve) to zero within `bounds`.
    pub fn new(mut difference: CommandState, bounds: impl Iterator<Item = JoinBounds>) -> Self {
        let empty = JointVec::zeros(difference.position.len());
        let mut times = [empty; 3];
        for (joint, bound) in (0..empty.len()).zip(bounds) {
            let [offset_share, rate_share, curvature_share] =
                SHARES.map(|(a, j)| (a * bound.acceleration, j * bound.jerk));
            let offset = difference.position[joint].abs();
            let rate = difference.velocity[joint].abs();
            let (a, j) = offset_share;
            times[0][joint] = SHORTEST
                .max(peak::OFFSET[0] * offset / (bound.velocity / 2.0))
                .max((peak::OFFSET[1] * offset / a).sqrt())
                .max((peak::OFFSET[2] * offset / j).cbrt());
            let (a, j) = rate_share;
            times[1][joint] =
                SHORTEST.max(peak::RATE[0] * rate / a).max((peak::RATE[1] * rate / j).sqrt());
            let (a, j) = curvature_share;
            let most = a.min(j * LONGEST_CURVATURE / peak::CURVATURE);
            difference.acceleration[joint] = difference.acceleration[joint].clamp(-most, most);
            times[2][joint] =
                SHORTEST.max(peak::CURVATURE * difference.acceleration[joint].abs() / j);
        }
        Self { difference, times, elapsed: 0.0 }
    }

    /// Lets `seconds` pass.
    pub fn advance(&mut self, seconds: f64) {
        self.elapsed += seconds;
    }

    /// What `joint` still differs by after `ahead` more seconds: value, rate, acceleration.
    pub fn sample(&self, joint: usize, ahead: f64) -> [f64; 3] {
        let now = self.elapsed + ahead;
        let [t0, t1, t2] = self.times.map(|t| t[joint]);
        let share = |time: f64| (now / time).min(1.0);
        let mut sum = [0.0; 3];
        let mut add = |scale: f64, time: f64, polynomial: [f64; 6]| {
            let s = share(time);
            let [value, first, second] = evaluate(&polynomial, s);
            sum[0] += scale * value;
            sum[1] += scale * first / time;
            sum[2] += scale * second / (time * time);
        };
        add(self.difference.position[joint], t0, [1.0, 0.0, 0.0, -10.0, 15.0, -6.0]);
        add(self.difference.velocity[joint] * t1, t1, [0.0, 1.0, 0.0, -6.0, 8.0, -3.0]);
        let curvature = self.difference.acceleration[joint] * t2 * t2;
        add(curvature, t2, [0.0, 0.0, 0.5, -1.5, 1.5, -0.5]);
        sum
    }
}

/// Value and first two derivatives of a polynomial, lowest power first.
fn evaluate(c: &[f64; 6], s: f64) -> [f64; 3] {
    let value = c.iter().rev().fold(0.0, |sum, k| sum * s + k);
    let first = (1..6).rev().fold(0.0, |sum, k| sum * s + k as f64 * c[k]);
    let second = (2..6).rev().fold(0.0, |sum, k| sum * s + (k * (k - 1)) as f64 * c[k]);
    [value, first, second]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: JoinBounds = JoinBounds { velocity: 1.5, acceleration: 12.0, jerk: 300.0 };

    fn join(offset: f64, rate: f64, acceleration: f64) -> Join {
        let one = |x: f64| JointVec::from_slice(&[x]).expect("one joint");
        let difference = CommandState {
            position: one(offset),
            velocity: one(rate),
            acceleration: one(acceleration),
        };
        Join::new(difference, std::iter::once(BOUNDS))
    }

    proptest! {
        #[test]
        fn a_join_begins_at_the_difference_ends_at_nothing_and_stays_in_its_bounds(
            offset in -1.0..1.0f64, rate in -0.7..0.7f64, acceleration in -30.0..30.0f64
        ) {
            let join = join(offset, rate, acceleration);
            let start = join.sample(0, 0.0);
            prop_assert!((start[0] - offset).abs() < 1e-9 && (start[1] - rate).abs() < 1e-9);
            prop_assert!(start[2].abs() <= acceleration.abs() + 1e-9);
            let mut before = start;
            for k in 1..5000 {
                let t = f64::from(k) * 1e-3;
                let now = join.sample(0, t);
                prop_assert!(now[1].abs() <= BOUNDS.velocity + 1e-9, "speed {}", now[1]);
                prop_assert!(now[2].abs() <= BOUNDS.acceleration + 1e-9, "acceleration {}", now[2]);
                let jerk = (now[2] - before[2]) / 1e-3;
                prop_assert!(jerk.abs() <= BOUNDS.jerk * 1.001, "jerk {jerk}");
                before = now;
            }
            prop_assert!(before.iter().all(|x| x.abs() < 1e-9), "{before:?}");
        }
    }
}
