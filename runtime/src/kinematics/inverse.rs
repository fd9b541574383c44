//! Inverse kinematics: joint angles for a pose of the tip, near given ones and within limits.
//!
//! Damped least squares (Nakamura and Hanafusa 1986; Wampler 1986) with Levenberg and Marquardt's choice of the
//! damping: each step solves `(J Jᵀ + λ I) y = e`, `Δq = Jᵀ y` for the weighted pose error `e`, and is kept only
//! when it comes nearer. Near singular poses the damping grows instead of the step, so angles never jump; and
//! every angle stays in the box that it was given, so neither can they jump between two calls. A pose that
//! cannot be reached from there ends at the nearest one that the descent finds.

use nalgebra::{Isometry3, Matrix6, Vector6};

use super::{Chain, Pose};
use crate::{JointVec, MAX_JOINTS};

/// Most steps of one call: bounded, whatever the pose.
const STEPS: usize = 200;
/// Longest step (rad).
const LONGEST: f64 = 0.3;
/// The error (m, rotation times lever) from which on a pose counts as met exactly.
const EXACT: f64 = 1e-9;

/// A chain with a tool and the range of each joint.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ArmModel {
    /// The joints from the base to the tool.
    pub chain: Chain,
    /// From the chain's last link to the tip.
    pub tip: Isometry3<f64>,
    /// Lowest and highest angle (rad), by the joints' indices; those of joints outside the chain are not looked at.
    #[serde(with = "ranges")]
    pub limits: Vec<(f64, f64)>,
    /// A rotation error of one radian counts like a position error of this length (m).
    pub lever: f64,
}

/// What [`ArmModel::solve`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Solution {
    /// Joint angles (rad), by the joints' indices.
    pub angles: JointVec,
    /// Distance (m) from the wanted position.
    pub position_error: f64,
    /// Angle (rad) from the wanted rotation.
    pub rotation_error: f64,
}

impl ArmModel {
    /// A usual [`ArmModel::lever`] (m): about the length of a desk arm's hand, so that turning it costs what it moves.
    pub const LEVER: f64 = 0.1;

    /// Pose of the tip at `angles` (rad); `pose` is where the links are written to.
    pub fn tip_at(&self, angles: &[f64], pose: &mut Pose) -> Isometry3<f64> {
        self.chain.forward(angles, pose);
        pose.link(self.chain.last_link()) * self.tip
    }

    /// What the tip does (m and rad per rad/s, base frame) for each of the chain's joints in turn.
    pub fn jacobian(&self, pose: &Pose, tip: &Isometry3<f64>) -> [Vector6<f64>; MAX_JOINTS] {
        let mut columns = [Vector6::zeros(); MAX_JOINTS];
        let at = tip.translation.vector.into();
        let last = self.chain.last_link();
        for (k, column) in columns.iter_mut().enumerate().take(last) {
            let moved = self.chain.point_velocity(pose, last, k, &at);
            let (turn, _) = pose.twist(k);
            *column = Vector6::new(moved.x, moved.y, moved.z, turn.x, turn.y, turn.z);
        }
        columns
    }

    /// Angles that bring the tip to `target` or as near as possible, starting at `from`, each joint within
    /// the model's limits and at most `reach` (rad, by index) from where it is in `from`.
    ///
    /// Joints outside the chain keep their values. Deterministic; at most a fixed number of steps.
    pub fn solve(&self, target: &Isometry3<f64>, from: &JointVec, reach: &JointVec) -> Solution {
        let mut pose = Pose::default();
        let (mut angles, boxes) = self.start(from, reach);
        let mut tip = self.tip_at(angles.as_slice(), &mut pose);
        let mut error = self.difference(target, &tip);
        let mut damping = 1e-6;
        for _ in 0..STEPS {
            if error.norm() < EXACT {
                break;
            }
            let columns = self.jacobian(&pose, &tip);
            let Some(step) = self.step(&columns, &error, damping, &angles, &boxes) else { break };
            let mut next = angles;
            for (joint, delta) in self.chain.joints().iter().zip(step) {
                let (lower, upper) = boxes[joint.index];
                next[joint.index] = (next[joint.index] + delta).clamp(lower, upper);
            }
            let there = self.tip_at(next.as_slice(), &mut pose);
            let left = self.difference(target, &there);
            let gained = error.norm() - left.norm();
            if gained > 0.0 {
                (angles, tip, error) = (next, there, left);
                damping = (damping * 0.2).max(1e-12);
                if gained < EXACT * 1e-3 {
                    break;
                }
            } else {
                // Not nearer: a shorter step, more along the slope. The links' poses are those of `angles`.
                damping *= 10.0;
                if damping > 1e6 {
                    break;
                }
                self.chain.forward(angles.as_slice(), &mut pose);
            }
        }
        let error = self.difference(target, &tip);
        Solution {
            angles,
            position_error: error.fixed_rows::<3>(0).norm(),
            rotation_error: error.fixed_rows::<3>(3).norm() / self.lever,
        }
    }

    /// Where the search starts and the box of every joint.
    fn start(&self, from: &JointVec, reach: &JointVec) -> (JointVec, [(f64, f64); MAX_JOINTS]) {
        let mut angles = *from;
        let mut boxes = [(0.0, 0.0); MAX_JOINTS];
        for joint in self.chain.joints() {
            let i = joint.index;
            let (lower, upper) =
                self.limits.get(i).copied().unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
            // A measured angle may lie a little outside its limits.
            let at = from.as_slice().get(i).copied().unwrap_or(0.0).clamp(lower, upper);
            let far = reach.as_slice().get(i).copied().unwrap_or(0.0).max(0.0);
            boxes[i] = ((at - far).max(lower), (at + far).min(upper));
            if i < angles.len() {
                angles[i] = at;
            }
        }
        (angles, boxes)
    }

    /// The damped step; joints that it would push out of their box are left out and it is solved again.
    fn step(
        &self,
        columns: &[Vector6<f64>; MAX_JOINTS],
        error: &Vector6<f64>,
        damping: f64,
        angles: &JointVec,
        boxes: &[(f64, f64); MAX_JOINTS],
    ) -> Option<[f64; MAX_JOINTS]> {
        let joints = self.chain.joints();
        let mut free = [true; MAX_JOINTS];
        let mut step = [0.0; MAX_JOINTS];
        loop {
            let mut normal = Matrix6::identity() * damping;
            for (k, column) in columns.iter().enumerate().take(joints.len()) {
                if free[k] {
                    let column = self.weighted(column);
                    normal += column * column.transpose();
                }
            }
            let y = normal.cholesky()?.solve(error);
            let mut cut = false;
            for (k, joint) in joints.iter().enumerate() {
                step[k] = if free[k] { self.weighted(&columns[k]).dot(&y) } else { 0.0 };
                let (lower, upper) = boxes[joint.index];
                let at = angles[joint.index];
                if free[k] && ((at <= lower && step[k] < 0.0) || (at >= upper && step[k] > 0.0)) {
                    free[k] = false;
                    cut = true;
                }
            }
            if !cut {
                break;
            }
        }
        let longest = step.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        if longest > LONGEST {
            step.iter_mut().for_each(|s| *s *= LONGEST / longest);
        }
        step.iter().all(|s| s.is_finite()).then_some(step)
    }

    /// From `found` to `target`: translation, then rotation times the lever (m; base frame).
    fn difference(&self, target: &Isometry3<f64>, found: &Isometry3<f64>) -> Vector6<f64> {
        let shift = target.translation.vector - found.translation.vector;
        let turn = (target.rotation * found.rotation.inverse()).scaled_axis() * self.lever;
        Vector6::new(shift.x, shift.y, shift.z, turn.x, turn.y, turn.z)
    }

    fn weighted(&self, column: &Vector6<f64>) -> Vector6<f64> {
        let mut column = *column;
        column.fixed_rows_mut::<3>(3).scale_mut(self.lever);
        column
    }
}

/// Ranges as they are written down: `null` for a side without an end.
mod ranges {
    use serde::{Deserialize, Deserializer, Serializer};

    type Written = Vec<(Option<f64>, Option<f64>)>;

    pub fn serialize<S: Serializer>(ranges: &[(f64, f64)], to: S) -> Result<S::Ok, S::Error> {
        let finite = |v: f64| v.is_finite().then_some(v);
        to.collect_seq(ranges.iter().map(|(a, b)| (finite(*a), finite(*b))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(f64, f64)>, D::Error> {
        let ranges = Written::deserialize(from)?.into_iter();
        let open = |(a, b): (Option<f64>, Option<f64>)| {
            (a.unwrap_or(f64::NEG_INFINITY), b.unwrap_or(f64::INFINITY))
        };
        Ok(ranges.map(open).collect())
    }
}
