//! The curve through a chunk's actions: continuous in velocity, never past an action.
//!
//! Phase counts actions: phase 0 is the observation's instant, where the command was `origin`; action
//! `k` is reached at phase `k + 1`, because it is the target *at the end* of its period, as in the
//! training data. Between two knots runs a cubic whose slopes are limited so that it stays between them
//! (Fritsch and Carlson 1980, harmonic-mean form): a gripper that goes from open to closed never
//! overshoots. The slope at the last action is zero, so a chunk that is played out ends at rest.

use crate::{ActionChunk, JointVec};

/// Position (the chunk's units) and slope (units per action) of `chunk` at `phase`, joint by joint.
///
/// Phases outside `0..=H` are clamped. Real time: no allocation.
pub(super) fn sample(chunk: &ActionChunk, origin: &JointVec, phase: f64) -> (JointVec, JointVec) {
    let last = chunk.horizon();
    let phase = phase.clamp(0.0, last as f64);
    let segment = (phase.floor() as usize).min(last - 1);
    let f = phase - segment as f64;
    let mut position = JointVec::zeros(chunk.dim());
    let mut slope = JointVec::zeros(chunk.dim());
    for joint in 0..position.len() {
        let knot = |i: usize| match i {
            0 => origin[joint],
            i => chunk.values()[(i - 1) * chunk.dim() + joint],
        };
        let slope_at = |i: usize| match i {
            i if i == last => 0.0,
            0 => knot(1) - knot(0),
            i => limited_slope(knot(i) - knot(i - 1), knot(i + 1) - knot(i)),
        };
        let (p0, p1) = (knot(segment), knot(segment + 1));
        let (m0, m1) = (slope_at(segment), slope_at(segment + 1));
        let (f2, f3) = (f * f, f * f * f);
        position[joint] = p0 * (2.0 * f3 - 3.0 * f2 + 1.0)
            + m0 * (f3 - 2.0 * f2 + f)
            + p1 * (3.0 * f2 - 2.0 * f3)
            + m1 * (f3 - f2);
        slope[joint] = (p0 - p1) * (6.0 * f2 - 6.0 * f)
            + m0 * (3.0 * f2 - 4.0 * f + 1.0)
            + m1 * (3.0 * f2 - 2.0 * f);
    }
    (position, slope)
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

    #[test]
    fn passes_through_every_action_and_ends_at_rest() {
        let chunk = chunk(vec![0.1, 0.3, 0.2, 0.2]);
        let origin = JointVec::zeros(1);
        for (k, action) in [0.0, 0.1, 0.3, 0.2, 0.2].iter().enumerate() {
            let (p, _) = sample(&chunk, &origin, k as f64);
            assert!((p[0] - action).abs() < 1e-12);
        }
        assert_eq!(sample(&chunk, &origin, 4.0).1[0], 0.0);
        assert_eq!(sample(&chunk, &origin, 9.0).0[0], 0.2, "past the end it stays");
    }

    proptest! {
        #[test]
        fn stays_between_neighbouring_actions_with_continuous_slope(
            actions in prop::collection::vec(-2.0..2.0f64, 1..12), phase in 0.0..12.0f64
        ) {
            let (chunk, origin) = (chunk(actions.clone()), JointVec::zeros(1));
            let phase = phase.min(actions.len() as f64);
            let i = (phase.floor() as usize).min(actions.len() - 1);
            let (a, b) = (if i == 0 { 0.0 } else { actions[i - 1] }, actions[i]);
            let (p, _) = sample(&chunk, &origin, phase);
            prop_assert!(p[0] >= a.min(b) - 1e-9 && p[0] <= a.max(b) + 1e-9);
            let knot = phase.round().min(actions.len() as f64 - 0.5);
            let slope = |x| sample(&chunk, &origin, x).1[0];
            prop_assert!((slope(knot - 1e-7) - slope(knot + 1e-7)).abs() < 1e-4 || knot < 1.0);
        }
    }
}
