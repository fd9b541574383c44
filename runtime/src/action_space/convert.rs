//! From a policy's actions to joint positions, and back.

use std::time::Duration;

use nalgebra::{Isometry3, Translation3, UnitQuaternion, Vector3};
use serde::{Deserialize, Serialize};

use super::config::{ActionSpace, DeltaFrom, Frame, GripperKind, SpaceKind, StateKind};
use crate::kinematics::{ArmModel, Pose};
use crate::{ActionKind, JointLimits, JointVec, MAX_JOINTS, Reach};

/// Poses nearer than this (m, rad) to the wanted ones are reached.
pub(super) const REACHED: (f64, f64) = (1e-3, 0.02);
/// From one action to the next a joint may move by so many times what its speed limit allows: policies are a
/// little hasty, and the guard slows them down. No more, so a solution never jumps to another branch.
const HASTE: f64 = 2.0;
/// How far (rad) the first action may be from the measured state beyond that: commands run ahead of the arm.
const LAG: f64 = 0.3;

/// How far the nearest reachable pose may be from the wanted one before a chunk is refused.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// Distance (m).
    pub position: f64,
    /// Angle (rad).
    pub rotation: f64,
}

impl Default for Tolerance {
    /// 2 cm and 15 degrees.
    fn default() -> Self {
        Self { position: 0.02, rotation: 15f64.to_radians() }
    }
}

/// Why a space does not fit an arm, or a chunk cannot be played.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ActionSpaceError {
    /// Poses need a kinematic model.
    #[error("poses of the tool need a kinematic model of the arm")]
    NoModel,
    /// A joint that neither moves the tip nor is a gripper.
    #[error("joint `{joint}` is neither between base and tip nor a gripper")]
    Joint {
        /// Its name.
        joint: String,
    },
    /// A gripper between base and tip.
    #[error("joint `{joint}` is a gripper, yet stands between base and tip")]
    GripperInChain {
        /// Its name.
        joint: String,
    },
    /// Limits, kinds and names of another arm.
    #[error("the arm has {joints} joints, with limits of {limits} and kinds of {kinds}")]
    Arm {
        /// Names.
        joints: usize,
        /// Limits.
        limits: usize,
        /// Kinds.
        kinds: usize,
    },
    /// Actions or states of another width.
    #[error("the policy's {what} have {found} values, {space} of this arm has {expected}")]
    Width {
        /// `actions` or `states`.
        what: &'static str,
        /// The space.
        space: &'static str,
        /// Width of the space.
        expected: usize,
        /// Width of the policy's.
        found: usize,
    },
    /// A value that is no number.
    #[error("action {row} holds a value that is not finite")]
    NotFinite {
        /// The action, from 0.
        row: usize,
    },
    /// Values that are no rotation.
    #[error("action {row} says no rotation: {reason}")]
    Rotation {
        /// The action, from 0.
        row: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// A pose far outside what the arm reaches from the action before.
    #[error(
        "action {row} is out of reach: the nearest pose is {:.1} mm and {:.1} deg away, allowed are {:.1} mm and \
         {:.1} deg", position * 1e3, rotation.to_degrees(), allowed.position * 1e3, allowed.rotation.to_degrees()
    )]
    OutOfReach {
        /// The action, from 0.
        row: usize,
        /// Distance (m).
        position: f64,
        /// Angle (rad).
        rotation: f64,
        /// What is allowed.
        allowed: Tolerance,
    },
}

impl ActionSpaceError {
    /// What it is about, without particulars.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoModel => "no kinematic model",
            Self::Joint { .. } | Self::GripperInChain { .. } | Self::Arm { .. } => "another arm",
            Self::Width { .. } => "another width",
            Self::NotFinite { .. } => "a value that is not finite",
            Self::Rotation { .. } => "values that are no rotation",
            Self::OutOfReach { .. } => "a pose out of reach",
        }
    }
}

/// Converts between the actions of a policy and the joint positions of one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JointMap {
    space: ActionSpace,
    arm: Option<ArmModel>,
    joints: Vec<String>,
    limits: Vec<JointLimits>,
    /// Indices of the grippers among the joints.
    grippers: Vec<usize>,
    tolerance: Tolerance,
}

impl JointMap {
    /// The map of `space` for the arm with `joints`, their `limits` and `kinds`; `arm` is its kinematic model.
    ///
    /// # Errors
    /// [`ActionSpaceError`] when the parts are not of one arm.
    pub fn new(
        space: ActionSpace,
        arm: Option<ArmModel>,
        joints: &[String],
        limits: &[JointLimits],
        kinds: &[ActionKind],
        tolerance: Tolerance,
    ) -> Result<Self, ActionSpaceError> {
        let count = joints.len();
        if count > MAX_JOINTS || limits.len() != count || kinds.len() != count {
            let (limits, kinds) = (limits.len(), kinds.len());
            return Err(ActionSpaceError::Arm { joints: count, limits, kinds });
        }
        let poses = space.kind.is_pose() || space.state == StateKind::Pose;
        if poses && arm.is_none() {
            return Err(ActionSpaceError::NoModel);
        }
        let grippers: Vec<usize> = (0..count).filter(|j| !kinds[*j].blends()).collect();
        if let (true, Some(arm)) = (poses, &arm) {
            for (index, name) in joints.iter().enumerate() {
                let joint = || name.clone();
                let moves = arm.chain.joints().iter().any(|j| j.index == index);
                match (moves, grippers.contains(&index)) {
                    (true, true) => {
                        return Err(ActionSpaceError::GripperInChain { joint: joint() });
                    }
                    (false, false) => return Err(ActionSpaceError::Joint { joint: joint() }),
                    _ => {}
                }
            }
        }
        // The description's limits are those that are kept.
        let arm = arm.map(|mut arm| {
            for (index, (lower, upper)) in arm.limits.iter_mut().enumerate().take(count) {
                *lower = lower.max(limits[index].lower);
                *upper = upper.min(limits[index].upper);
            }
            arm
        });
        let (joints, limits) = (joints.to_vec(), limits.to_vec());
        Ok(Self { space, arm, joints, limits, grippers, tolerance })
    }

    /// The action space.
    pub fn space(&self) -> &ActionSpace {
        &self.space
    }

    /// Names of the arm's joints.
    pub fn joints(&self) -> &[String] {
        &self.joints
    }

    /// Width of an action in the policy's space.
    pub fn action_dim(&self) -> usize {
        if self.space.kind.is_pose() { self.pose_dim() } else { self.joints.len() }
    }

    /// Width of the policy's proprioception.
    pub fn state_dim(&self) -> usize {
        match self.space.state {
            StateKind::Joints => self.joints.len(),
            StateKind::Pose => self.pose_dim(),
        }
    }

    fn pose_dim(&self) -> usize {
        3 + self.space.rotation.width() + self.grippers.len()
    }

    /// The policy's proprioception at the joint positions `observed` (rad).
    pub fn state(&self, observed: &[f64]) -> Vec<f64> {
        match (self.space.state, &self.arm) {
            (StateKind::Pose, Some(arm)) => {
                let mut out = Vec::with_capacity(self.pose_dim());
                self.write(&arm.tip_at(observed, &mut Pose::default()), observed, &mut out);
                out
            }
            _ => observed.to_vec(),
        }
    }

    /// Joint positions (rad, row by row) for `actions`, rows `dt` apart, of a chunk whose observation saw the
    /// joints at `observed`; how far they reach.
    ///
    /// Row by row each solution starts at the one before and stays within what the joints can do from there.
    ///
    /// # Errors
    /// [`ActionSpaceError`] naming the action.
    pub fn to_joints(
        &self,
        actions: &[f64],
        observed: &[f64],
        dt: Duration,
    ) -> Result<(Vec<f64>, Option<Reach>), ActionSpaceError> {
        let width = self.action_dim().max(1);
        if !actions.len().is_multiple_of(width) {
            return Err(self.width_error("actions", width, actions.len()));
        }
        let measured = self.measured(observed)?;
        let finite = |row: &[f64]| row.iter().all(|v| v.is_finite());
        if let Some(row) = actions.chunks_exact(width).position(|row| !finite(row)) {
            return Err(ActionSpaceError::NotFinite { row });
        }
        match (&self.arm, self.space.kind.is_pose()) {
            (Some(arm), true) => self.poses_to_joints(arm, actions, &measured, dt),
            (None, true) => Err(ActionSpaceError::NoModel),
            _ => Ok((self.displaced(actions, &measured, 1.0), None)),
        }
    }

    /// The joint positions `rows` (rad, row by row) as actions of the policy, for an observation that saw the
    /// joints at `observed`.
    ///
    /// # Errors
    /// [`ActionSpaceError`] for values that are not finite or of another width.
    pub fn to_actions(&self, rows: &[f64], observed: &[f64]) -> Result<Vec<f64>, ActionSpaceError> {
        let count = self.joints.len().max(1);
        if !rows.len().is_multiple_of(count) {
            return Err(self.width_error("actions", count, rows.len()));
        }
        let measured = self.measured(observed)?;
        if let Some(at) = rows.iter().position(|v| !v.is_finite()) {
            return Err(ActionSpaceError::NotFinite { row: at / count });
        }
        let Some(arm) = self.arm.as_ref().filter(|_| self.space.kind.is_pose()) else {
            return Ok(self.displaced(rows, &measured, -1.0));
        };
        let mut links = Pose::default();
        let mut out = Vec::with_capacity(rows.len() / count * self.pose_dim());
        let mut origin = arm.tip_at(measured.as_slice(), &mut links);
        for row in rows.chunks_exact(count) {
            let tip = arm.tip_at(row, &mut links);
            let written = match (self.space.kind, self.space.frame) {
                (SpaceKind::EeDelta, Frame::Base) => Isometry3::from_parts(
                    (tip.translation.vector - origin.translation.vector).into(),
                    tip.rotation * origin.rotation.inverse(),
                ),
                (SpaceKind::EeDelta, Frame::Tool) => origin.inverse() * tip,
                _ => tip,
            };
            self.write(&written, row, &mut out);
            if self.space.delta_from == DeltaFrom::Previous {
                origin = tip;
            }
        }
        Ok(out)
    }

    fn width_error(&self, what: &'static str, expected: usize, found: usize) -> ActionSpaceError {
        ActionSpaceError::Width { what, space: self.space_name(), expected, found }
    }

    /// The space's name.
    pub fn space_name(&self) -> &'static str {
        let named = SpaceKind::ALL.into_iter().find(|s| s.1 == self.space.kind);
        named.map_or("the action space", |s| s.0)
    }

    fn measured(&self, observed: &[f64]) -> Result<JointVec, ActionSpaceError> {
        JointVec::from_slice(observed)
            .filter(|m| m.len() == self.joints.len() && m.is_finite())
            .ok_or(ActionSpaceError::Width {
                what: "observed joints",
                space: "the state",
                expected: self.joints.len(),
                found: observed.len(),
            })
    }

    /// Position, rotation and grippers of `pose` and `joints`, appended to `out`.
    fn write(&self, pose: &Isometry3<f64>, joints: &[f64], out: &mut Vec<f64>) {
        out.extend(pose.translation.vector.iter());
        self.space.rotation.write(&pose.rotation, out);
        out.extend(self.grippers.iter().map(|j| self.gripper(*j, joints[*j], GripperKind::value)));
    }

    fn gripper(
        &self,
        joint: usize,
        value: f64,
        convert: fn(GripperKind, f64, [f64; 2], (f64, f64)) -> f64,
    ) -> f64 {
        let jaw = (self.limits[joint].lower, self.limits[joint].upper);
        convert(self.space.gripper, value, self.space.gripper_range, jaw)
    }

    /// Joint spaces: rows with displacements added to (`sign` 1) or taken from (-1) where they count from.
    fn displaced(&self, rows: &[f64], measured: &JointVec, sign: f64) -> Vec<f64> {
        let mut origin = *measured;
        let mut out = Vec::with_capacity(rows.len());
        for row in rows.chunks_exact(self.joints.len().max(1)) {
            for (joint, value) in row.iter().enumerate() {
                let gripper = self.grippers.contains(&joint);
                let delta = self.space.kind == SpaceKind::JointDelta && !gripper;
                let to = match (gripper, sign > 0.0) {
                    (true, true) => self.gripper(joint, *value, GripperKind::angle),
                    (true, false) => self.gripper(joint, *value, GripperKind::value),
                    _ if delta => value + sign * origin[joint],
                    _ => *value,
                };
                out.push(to);
                if delta && self.space.delta_from == DeltaFrom::Previous {
                    origin[joint] = if sign > 0.0 { to } else { *value };
                }
            }
        }
        out
    }

    fn poses_to_joints(
        &self,
        arm: &ArmModel,
        actions: &[f64],
        measured: &JointVec,
        dt: Duration,
    ) -> Result<(Vec<f64>, Option<Reach>), ActionSpaceError> {
        let rotation_width = self.space.rotation.width();
        let mut links = Pose::default();
        let seen = arm.tip_at(measured.as_slice(), &mut links);
        let (mut origin, mut last) = (seen, *measured);
        let mut before = seen;
        let mut reach = Reach::default();
        let mut out = Vec::with_capacity(actions.len() / self.pose_dim() * self.joints.len());
        for (row, action) in actions.chunks_exact(self.pose_dim()).enumerate() {
            let (pose, grippers) = action.split_at(3 + rotation_width);
            let said = self
                .space
                .rotation
                .read(&pose[3..])
                .map_err(|reason| ActionSpaceError::Rotation { row, reason })?;
            let target = self.target(Vector3::new(pose[0], pose[1], pose[2]), said, &origin, &seen);
            if self.space.delta_from == DeltaFrom::Previous {
                origin = target;
            }
            let found = arm.solve(&target, &last, &self.range(row, dt));
            let (position, rotation) = (found.position_error, found.rotation_error);
            let allowed = self.tolerance;
            if !(position <= allowed.position && rotation <= allowed.rotation) {
                return Err(ActionSpaceError::OutOfReach { row, position, rotation, allowed });
            }
            reach.add(position, rotation, position <= REACHED.0 && rotation <= REACHED.1);
            let mut next = found.angles;
            for (joint, value) in self.grippers.iter().zip(grippers) {
                next[*joint] = self.gripper(*joint, *value, GripperKind::angle);
            }
            let there = arm.tip_at(next.as_slice(), &mut links);
            if row > 0 {
                reach.path_error =
                    reach.path_error.max(bulge(arm, (&last, &before), (&next, &there)));
            }
            out.extend_from_slice(next.as_slice());
            (last, before) = (next, there);
        }
        Ok((out, Some(reach)))
    }

    /// The pose that an action means.
    fn target(
        &self,
        at: Vector3<f64>,
        rotation: UnitQuaternion<f64>,
        origin: &Isometry3<f64>,
        seen: &Isometry3<f64>,
    ) -> Isometry3<f64> {
        let kept = self.space.rotation == super::RotationKind::None;
        match (self.space.kind, self.space.frame) {
            (SpaceKind::EeDelta, Frame::Base) => Isometry3::from_parts(
                Translation3::from(origin.translation.vector + at),
                rotation * origin.rotation,
            ),
            (SpaceKind::EeDelta, Frame::Tool) => {
                origin * Isometry3::from_parts(Translation3::from(at), rotation)
            }
            _ => {
                let rotation = if kept { seen.rotation } else { rotation };
                Isometry3::from_parts(Translation3::from(at), rotation)
            }
        }
    }

    /// How far every joint may be from the action before (rad).
    pub(super) fn range(&self, row: usize, dt: Duration) -> JointVec {
        let mut range = JointVec::zeros(self.joints.len());
        for (joint, limits) in self.limits.iter().enumerate() {
            let ahead = if row == 0 { LAG } else { 0.0 };
            range[joint] = HASTE * limits.velocity * dt.as_secs_f64() + ahead;
        }
        range
    }
}

/// How far (m) the tip is from the middle of the straight way when the joints are half-way.
fn bulge(
    arm: &ArmModel,
    from: (&JointVec, &Isometry3<f64>),
    to: (&JointVec, &Isometry3<f64>),
) -> f64 {
    let mut half = *from.0;
    for joint in 0..half.len() {
        half[joint] = (from.0[joint] + to.0[joint]) / 2.0;
    }
    let tip = arm.tip_at(half.as_slice(), &mut Pose::default()).translation.vector;
    let middle = (from.1.translation.vector + to.1.translation.vector) / 2.0;
    (tip - middle).norm()
}
