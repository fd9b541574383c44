//! The curve through a chunk's actions, joint by joint after its [`ActionKind`].
//!
//! Phase counts actions: phase 0 is the observation's instant; action `k` is reached at phase `k + 1`,
//! because it is the target *at the end* of its period, as in the training data. Before the first action
//! the curve comes from where the first two point back to: a chunk that begins far from the arm then is
//! an offset for the join to take away, not a sprint to the first action. Between two knots runs a
//! cubic given by the slopes at them:
//! - positions: the slopes of the cubic spline, continuous in acceleration (de Boor 1978);
//! - grippers: slopes limited so that the curve stays between the actions (Fritsch and Carlson 1980,
//!   harmonic-mean form);
//! - switches: no curve; each action holds its value for its period.
//!
//! The slope at the last action is zero, so a chunk that is played out ends at rest.

use crate::{ActionChunk, ActionKind, JointVec, MAX_JOINTS};

/// The longest chunk that can be played (actions).
pub const MAX_HORIZON: usize = 128;

/// Position (the chunk's units) and its first two derivatives by phase.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub position: JointVec,
    pub slope: JointVec,
    pub curvature: JointVec,
}

/// Knot slopes of one chunk. Room for the longest is made once; fitting does not allocate.
#[derive(Debug)]
pub(super) struct Curve {
    kinds: Vec<ActionKind>,
    origin: JointVec,
    last: usize,
    /// `[MAX_HORIZON + 1, joints]`
    slopes: Vec<f64>,
}

impl Curve {
    pub fn new(kinds: Vec<ActionKind>) -> Self {
        let joints = kinds.len().min(MAX_JOINTS);
        let slopes = vec![0.0; (MAX_HORIZON + 1) * joints];
        Self { kinds, origin: JointVec::zeros(joints), last: 1, slopes }
    }

    /// Lays the curve through the first `last` actions of `chunk` (1 to its horizon), from `origin` or from where
    /// they point back to.
    pub fn fit(&mut self, chunk: &ActionChunk, origin: Option<&JointVec>, last: usize) {
        self.last = last.clamp(1, chunk.horizon().min(MAX_HORIZON));
        for joint in 0..self.kinds.len() {
            let first = chunk.values()[joint];
            let second = chunk.values().get(chunk.dim() + joint).copied().unwrap_or(first);
            self.origin[joint] = match (origin, self.kinds[joint].blends()) {
                (Some(origin), _) => origin[joint],
                (None, true) => 2.0 * first - second,
                (None, false) => first,
            };
        }
        for joint in 0..self.kinds.len() {
            match self.kinds[joint] {
                ActionKind::Position | ActionKind::Delta => self.fit_spline(chunk, joint),
                ActionKind::Gripper => self.fit_monotone(chunk, joint),
                ActionKind::Switch => {}
            }
        }
    }

    /// Slopes that make the second derivative continuous: none at the first knot, rest at the last.
    fn fit_spline(&mut self, chunk: &ActionChunk, joint: usize) {
        let (n, dim) = (self.last, self.kinds.len());
        let knot = |i: usize| knot(chunk, &self.origin, joint, i);
        // Thomas's elimination of m[i-1] + 4 m[i] + m[i+1] = 3 (p[i+1] - p[i-1]), 2 m0 + m1 = 3 (p1 - p0).
        let mut ratio = [0.0; MAX_HORIZON + 1];
        ratio[0] = 0.5;
        let first = 1.5 * (knot(1) - knot(0));
        self.slopes[joint] = first;
        for i in 1..n {
            let pivot = 4.0 - ratio[i - 1];
            ratio[i] = 1.0 / pivot;
            let right = 3.0 * (knot(i + 1) - knot(i - 1));
            self.slopes[i * dim + joint] = (right - self.slopes[(i - 1) * dim + joint]) / pivot;
        }
        self.slopes[n * dim + joint] = 0.0;
        for i in (0..n).rev() {
            let after = self.slopes[(i + 1) * dim + joint];
            self.slopes[i * dim + joint] -= ratio[i] * after;
        }
    }

    fn fit_monotone(&mut self, chunk: &ActionChunk, joint: usize) {
        let (n, dim) = (self.last, self.kinds.len());
        let knot = |i: usize| knot(chunk, &self.origin, joint, i);
        for i in 0..=n {
            self.slopes[i * dim + joint] = match i {
                i if i == n => 0.0,
                0 => knot(1) - knot(0),
                i => limited_slope(knot(i) - knot(i - 1), knot(i + 1) - knot(i)),
            };
        }
    }

    /// How `joint` is played.
    pub fn kind(&self, joint: usize) -> ActionKind {
        self.kinds[joint]
    }

    /// Number of actions that are played.
    pub fn last(&self) -> usize {
        self.last
    }

    /// The curve at `phase`; phases outside `0..=last` are clamped.
    pub fn sample(&self, chunk: &ActionChunk, phase: f64) -> Sample {
        let (last, dim) = (self.last, self.kinds.len());
        let phase = phase.clamp(0.0, last as f64);
        let i = (phase.floor() as usize).min(last - 1);
        let f = phase - i as f64;
        // A hair past an action is rounding, not the next action's period.
        let switched = ((phase - 1e-6).ceil().max(0.0) as usize).min(last);
        let zeros = JointVec::zeros(dim);
        let mut out = Sample { position: zeros, slope: zeros, curvature: zeros };
        for joint in 0..dim {
            let (p0, p1) =
                (knot(chunk, &self.origin, joint, i), knot(chunk, &self.origin, joint, i + 1));
            if self.kinds[joint] == ActionKind::Switch {
                // At phase k + 1 the action k has had its whole period: the next begins after it.
                out.position[joint] = knot(chunk, &self.origin, joint, switched);
                continue;
            }
            let (m0, m1) = (self.slopes[i * dim + joint], self.slopes[(i + 1) * dim + joint]);
            let (f2, f3) = (f * f, f * f * f);
            out.position[joint] = p0 * (2.0 * f3 - 3.0 * f2 + 1.0)
                + m0 * (f3 - 2.0 * f2 + f)
                + p1 * (3.0 * f2 - 2.0 * f3)
                + m1 * (f3 - f2);
            out.slope[joint] = (p0 - p1) * (6.0 * f2 - 6.0 * f)
                + m0 * (3.0 * f2 - 4.0 * f + 1.0)
                + m1 * (3.0 * f2 - 2.0 * f);
            out.curvature[joint] =
                (p0 - p1) * (12.0 * f - 6.0) + m0 * (6.0 * f - 4.0) + m1 * (6.0 * f - 2.0);
        }
        out
    }
}

/// Knot `i` of `joint`: the origin, then the actions.
fn knot(chunk: &ActionChunk, origin: &JointVec, joint: usize, i: usize) -> f64 {
    match i {
        0 => origin[joint],
        i => chunk.values()[(i - 1) * chunk.dim() + joint],
    }
}

/// Harmonic mean of two neighbouring differences; zero where they differ in sign.
fn limited_slope(before: f64, after: f64) -> f64 {
    if before * after <= 0.0 { 0.0 } else { 2.0 * before * after / (before + after) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Stamp;
    use proptest::prelude::*;
    use std::time::Duration;

    fn chunk(actions: Vec<f64>) -> ActionChunk {
        ActionChunk::new(1, Stamp(0), Duration::from_millis(100), 1, actions).expect("one joint")
    }

    fn curve(kind: ActionKind, chunk: &ActionChunk) -> Curve {
        let mut curve = Curve::new(vec![kind]);
        curve.fit(chunk, Some(&JointVec::zeros(1)), chunk.horizon());
        curve
    }

    #[test]
    fn every_kind_passes_through_every_action_and_ends_at_rest() {
        let chunk = chunk(vec![0.1, 0.3, 0.2, 0.2]);
        for kind in [ActionKind::Position, ActionKind::Gripper, ActionKind::Switch] {
            let curve = curve(kind, &chunk);
            for (k, action) in [0.0, 0.1, 0.3, 0.2, 0.2].iter().enumerate() {
                let seen = curve.sample(&chunk, k as f64).position[0];
                assert!((seen - action).abs() < 1e-12, "{kind:?} {k}: {seen}");
            }
            assert_eq!(curve.sample(&chunk, 4.0).slope[0], 0.0);
            assert_eq!(curve.sample(&chunk, 9.0).position[0], 0.2, "past the end it stays");
        }
    }

    #[test]
    fn a_switch_has_no_values_between() {
        let chunk = chunk(vec![0.0, 1.0, 1.0, 0.0]);
        let curve = curve(ActionKind::Switch, &chunk);
        for k in 1..=400 {
            let value = curve.sample(&chunk, f64::from(k) / 100.0).position[0];
            assert!(value == 0.0 || value == 1.0, "{value}");
        }
        assert_eq!(curve.sample(&chunk, 1.01).position[0], 1.0);
    }

    proptest! {
        #[test]
        fn positions_are_continuous_up_to_the_acceleration(
            actions in prop::collection::vec(-2.0..2.0f64, 2..12), knot in 1usize..11
        ) {
            let chunk = chunk(actions.clone());
            let curve = curve(ActionKind::Position, &chunk);
            let knot = knot.min(actions.len() - 1) as f64;
            let (a, b) = (curve.sample(&chunk, knot - 1e-9), curve.sample(&chunk, knot + 1e-9));
            prop_assert!((a.position[0] - b.position[0]).abs() < 1e-6);
            prop_assert!((a.slope[0] - b.slope[0]).abs() < 1e-6);
            prop_assert!((a.curvature[0] - b.curvature[0]).abs() < 1e-6);
        }

        #[test]
        fn derivatives_are_those_of_the_position(
            actions in prop::collection::vec(-2.0..2.0f64, 1..12), phase in 0.01..11.99f64
        ) {
            let chunk = chunk(actions.clone());
            for kind in [ActionKind::Position, ActionKind::Gripper] {
                let curve = curve(kind, &chunk);
                let phase = phase.min(actions.len() as f64 - 0.01);
                // A step of the difference must not cross a knot, where the gripper's curvature jumps.
                prop_assume!((phase - phase.round()).abs() > 2e-4);
                let at = |x: f64| curve.sample(&chunk, x);
                let (l, m, r) = (at(phase - 1e-4), at(phase), at(phase + 1e-4));
                prop_assert!(((r.position[0] - l.position[0]) / 2e-4 - m.slope[0]).abs() < 1e-4);
                prop_assert!(((r.slope[0] - l.slope[0]) / 2e-4 - m.curvature[0]).abs() < 1e-4);
            }
        }

        #[test]
        fn a_gripper_stays_between_neighbouring_actions(
            actions in prop::collection::vec(-2.0..2.0f64, 1..12), phase in 0.0..12.0f64
        ) {
            let chunk = chunk(actions.clone());
            let curve = curve(ActionKind::Gripper, &chunk);
            let phase = phase.min(actions.len() as f64);
            let i = (phase.floor() as usize).min(actions.len() - 1);
            let (a, b) = (if i == 0 { 0.0 } else { actions[i - 1] }, actions[i]);
            let p = curve.sample(&chunk, phase).position[0];
            prop_assert!(p >= a.min(b) - 1e-9 && p <= a.max(b) + 1e-9);
        }
    }
}
