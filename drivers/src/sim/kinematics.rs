//! Forward and inverse kinematics of the desk arm.
//!
//! Link frames have their z axis along the link. Angles in the arm's plane count from the vertical,
//! forward positive: upper arm `lift`, forearm `lift + elbow + 90 deg`, hand `forearm + wrist`.
//! The hand points straight down at 180 degrees; then the hand's y axis is tangential (left at
//! pan 0), its x axis points back to the base, and `wrist_roll` turns it against the pan.

use std::f64::consts::{FRAC_PI_2, PI};

use nalgebra::{Isometry3, Point3, Translation3, Unit, UnitQuaternion, Vector3};
use sinew_runtime::kinematics::{Chain, ChainJoint};

use super::description::{ArmGeometry, JOINTS};

/// Values of all six joints (rad).
pub type Joints = [f64; JOINTS];

/// Poses of the links in the base frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmFrames {
    /// Turning base, at the table.
    pub base: Isometry3<f64>,
    /// Upper arm, at the shoulder_lift axis.
    pub upper_arm: Isometry3<f64>,
    /// Forearm, at the elbow_flex axis.
    pub forearm: Isometry3<f64>,
    /// Wrist, at the wrist_flex axis, before the roll.
    pub wrist: Isometry3<f64>,
    /// Hand, at the fingertips, between the open fingers.
    pub hand: Isometry3<f64>,
}

fn turn_y(angle: f64) -> UnitQuaternion<f64> {
    UnitQuaternion::from_axis_angle(&Vector3::y_axis(), angle)
}

fn turn_z(angle: f64) -> UnitQuaternion<f64> {
    UnitQuaternion::from_axis_angle(&Vector3::z_axis(), angle)
}

/// A step of `length` along z, then a turn.
fn link(length: f64, rotation: UnitQuaternion<f64>) -> Isometry3<f64> {
    Isometry3::from_parts(Translation3::new(0.0, 0.0, length), rotation)
}

/// Poses of the links at `joints`.
pub fn forward(geometry: &ArmGeometry, joints: &Joints) -> ArmFrames {
    let base = link(0.0, turn_z(joints[0]));
    let upper_arm = base * link(geometry.shoulder_height, turn_y(joints[1]));
    let forearm = upper_arm * link(geometry.upper_arm, turn_y(joints[2] + FRAC_PI_2));
    let wrist = forearm * link(geometry.forearm, turn_y(joints[3]));
    let hand = wrist * link(0.0, turn_z(joints[4])) * link(geometry.hand, turn_z(0.0));
    ArmFrames { base, upper_arm, forearm, wrist, hand }
}

/// The arm's joints as the guard knows them; link 5 is the hand, its frame at the wrist. The gripper is none of them.
///
/// # Panics
/// Never: five joints make a chain.
pub fn chain(geometry: &ArmGeometry) -> Chain {
    let (y, z) = (Vector3::y_axis(), Vector3::z_axis());
    let joint = |index, origin, axis: Unit<Vector3<f64>>| ChainJoint { origin, axis, index };
    let straight = turn_z(0.0);
    let joints = vec![
        joint(0, link(0.0, straight), z),
        joint(1, link(geometry.shoulder_height, straight), y),
        joint(2, link(geometry.upper_arm, turn_y(FRAC_PI_2)), y),
        joint(3, link(geometry.forearm, straight), y),
        joint(4, link(0.0, straight), z),
    ];
    #[allow(clippy::expect_used)]
    Chain::new(joints).expect("five joints make a chain")
}

/// Joints (rad) that point the hand straight down with its tip at `tip` and `wrist_roll` at `roll`.
///
/// The gripper's value is copied to the result. `None` out of reach; joint limits are not looked at.
pub fn inverse_down(
    geometry: &ArmGeometry,
    tip: &Point3<f64>,
    roll: f64,
    gripper: f64,
) -> Option<Joints> {
    let (upper, fore) = (geometry.upper_arm, geometry.forearm);
    let radius = tip.x.hypot(tip.y);
    let height = tip.z + geometry.hand - geometry.shoulder_height;
    let distance = radius.hypot(height);
    if !(distance > 1e-9 && distance <= upper + fore && distance >= (upper - fore).abs()) {
        return None;
    }
    let direction = radius.atan2(height);
    let at_shoulder =
        (upper * upper + distance * distance - fore * fore) / (2.0 * upper * distance);
    let lift = direction - at_shoulder.clamp(-1.0, 1.0).acos();
    let forearm_angle = (radius - upper * lift.sin()).atan2(height - upper * lift.cos());
    Some([
        tip.y.atan2(tip.x),
        lift,
        forearm_angle - lift - FRAC_PI_2,
        PI - forearm_angle,
        roll,
        gripper,
    ])
}

/// Highest tip (m) that the hand reaches at `radius` when it points down, with a margin of 3 mm.
pub fn highest_tip(geometry: &ArmGeometry, radius: f64) -> f64 {
    let reach = geometry.upper_arm + geometry.forearm - 0.003;
    (reach * reach - radius * radius).max(0.0).sqrt() + geometry.shoulder_height - geometry.hand
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::description::ArmDescription;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn inverse_then_forward_gives_the_tip_and_points_down(
            radius in 0.14..0.26f64, angle in -1.8..1.8f64, height in 0.0..0.09f64, roll in -2.0..2.0f64,
        ) {
            let arm = ArmDescription::desk_arm();
            let tip = Point3::new(radius * angle.cos(), radius * angle.sin(), height);
            let joints = inverse_down(&arm.geometry, &tip, roll, 0.5).unwrap();
            for (joint, value) in arm.joints.iter().zip(joints) {
                prop_assert!(value >= joint.limits.lower && value <= joint.limits.upper, "{}", joint.name);
            }
            let hand = forward(&arm.geometry, &joints).hand;
            prop_assert!((hand.translation.vector - tip.coords).norm() < 1e-9);
            let pointing = hand.rotation * Vector3::z();
            prop_assert!((pointing + Vector3::z()).norm() < 1e-9);
            let opening = hand.rotation * Vector3::y();
            let expected = turn_z(angle - roll) * Vector3::y();
            prop_assert!((opening - expected).norm() < 1e-9);
        }
    }

    proptest! {
        #[test]
        fn the_chain_is_where_the_arm_is(joints in prop::array::uniform6(-2.0..2.0f64)) {
            let arm = ArmDescription::desk_arm();
            let frames = forward(&arm.geometry, &joints);
            let chain = chain(&arm.geometry);
            let mut pose = sinew_runtime::kinematics::Pose::default();
            chain.forward(&joints, &mut pose);
            let hand = pose.link(5) * Isometry3::translation(0.0, 0.0, arm.geometry.hand);
            let expected = [frames.base, frames.upper_arm, frames.forearm, frames.wrist, frames.hand];
            let found = [*pose.link(1), *pose.link(2), *pose.link(3), *pose.link(4), hand];
            for (found, expected) in found.iter().zip(expected) {
                prop_assert!((found.to_homogeneous() - expected.to_homogeneous()).norm() < 1e-9);
            }
            // The ball that stands for the tip is the hand's origin.
            let tip = arm.spheres.iter().find(|s| s.name == "tip").unwrap();
            prop_assert!((pose.centre(tip) - Point3::from(frames.hand.translation.vector)).norm() < 1e-9);
        }
    }

    #[test]
    fn out_of_reach_is_none() {
        let arm = ArmDescription::desk_arm();
        assert!(inverse_down(&arm.geometry, &Point3::new(0.5, 0.0, 0.0), 0.0, 0.0).is_none());
        assert!(inverse_down(&arm.geometry, &Point3::new(f64::NAN, 0.0, 0.0), 0.0, 0.0).is_none());
    }
}
