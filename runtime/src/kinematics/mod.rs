//! A serial chain of revolute joints: where its links are, and how points on them move. Lengths in m, angles in rad.
//!
//! Link 0 is the base; link `k` is what joint `k` (from 1) moves. A link's frame stands on its joint's axis:
//! `frame(k) = frame(k - 1) · origin(k) · turn(axis(k), angle)`, as in a URDF, which [`urdf`] reads. Nothing here
//! allocates after the chain is made.

mod inverse;
pub mod urdf;

pub use inverse::{ArmModel, Solution};

use nalgebra::{Isometry3, Point3, Unit, UnitQuaternion, Vector3};

use crate::MAX_JOINTS;

/// One joint of a chain.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ChainJoint {
    /// From the link before to this joint's frame, at angle zero.
    pub origin: Isometry3<f64>,
    /// The axis, in this joint's frame.
    pub axis: Unit<Vector3<f64>>,
    /// Which of the arm's joints it is: the index of its angle.
    pub index: usize,
}

/// A ball fixed to a link: a piece of the arm's body, or a point of it when the radius is zero.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sphere {
    /// What it stands for.
    pub name: String,
    /// The link that it is fixed to; 0 is the base.
    pub link: usize,
    /// Its centre in the link's frame (m).
    pub centre: Point3<f64>,
    /// Its radius (m).
    pub radius: f64,
}

/// Why joints make no chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a chain has 1 to {MAX_JOINTS} joints with indices below {MAX_JOINTS}, found {0} joints")]
pub struct ChainError(usize);

/// A serial chain.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Chain {
    joints: Vec<ChainJoint>,
}

/// Poses of a chain's links, in the base's frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pose {
    links: [Isometry3<f64>; MAX_JOINTS + 1],
    /// Direction of each joint's axis.
    axes: [Vector3<f64>; MAX_JOINTS],
}

impl Default for Pose {
    fn default() -> Self {
        Self {
            links: [Isometry3::identity(); MAX_JOINTS + 1],
            axes: [Vector3::zeros(); MAX_JOINTS],
        }
    }
}

impl Chain {
    /// A chain of `joints`, from the base outwards.
    ///
    /// # Errors
    /// [`ChainError`] for no joints, or more than an arm may have.
    pub fn new(joints: Vec<ChainJoint>) -> Result<Self, ChainError> {
        let sound =
            (1..=MAX_JOINTS).contains(&joints.len()) && joints.iter().all(|j| j.index < MAX_JOINTS);
        if sound { Ok(Self { joints }) } else { Err(ChainError(joints.len())) }
    }

    /// The joints, from the base outwards.
    pub fn joints(&self) -> &[ChainJoint] {
        &self.joints
    }

    /// Number of the last link.
    pub fn last_link(&self) -> usize {
        self.joints.len()
    }

    /// Writes the links' poses at `angles` (rad, by the joints' indices) to `pose`. A missing angle counts as zero.
    pub fn forward(&self, angles: &[f64], pose: &mut Pose) {
        let mut frame = Isometry3::identity();
        for (k, joint) in self.joints.iter().enumerate() {
            frame *= joint.origin;
            pose.axes[k] = frame.rotation * joint.axis.into_inner();
            let angle = angles.get(joint.index).copied().unwrap_or(0.0);
            frame.rotation *= UnitQuaternion::from_axis_angle(&joint.axis, angle);
            pose.links[k + 1] = frame;
        }
    }

    /// Velocity (m per rad/s) of the point `at` (base frame), fixed to `link`, for the chain's joint `joint` (from 0).
    pub fn point_velocity(
        &self,
        pose: &Pose,
        link: usize,
        joint: usize,
        at: &Point3<f64>,
    ) -> Vector3<f64> {
        if joint >= link {
            return Vector3::zeros();
        }
        pose.axes[joint].cross(&(at.coords - pose.links[joint + 1].translation.vector))
    }

    /// The farthest (m) that a point at `centre` of `link` can be from the axis of the chain's joint `joint` (from 0).
    pub fn lever(&self, joint: usize, link: usize, centre: &Point3<f64>) -> f64 {
        if joint >= link {
            return 0.0;
        }
        let between = &self.joints[joint + 1..link.min(self.joints.len())];
        between.iter().map(|j| j.origin.translation.vector.norm()).sum::<f64>()
            + centre.coords.norm()
    }
}

impl Pose {
    /// What the chain's joint `k` (from 0) does to the links beyond it, per rad/s: a point at `p` moves at `turn × p + shift`.
    pub fn twist(&self, k: usize) -> (Vector3<f64>, Vector3<f64>) {
        let (turn, at) = (self.axes[k], self.links[k + 1].translation.vector);
        (turn, at.cross(&turn))
    }

    /// Pose of `link`; the base for a link that is not there.
    pub fn link(&self, link: usize) -> &Isometry3<f64> {
        self.links.get(link).unwrap_or(&self.links[0])
    }

    /// The centre of `sphere`.
    pub fn centre(&self, sphere: &Sphere) -> Point3<f64> {
        self.link(sphere.link) * sphere.centre
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::Translation3;
    use proptest::prelude::*;

    fn chain() -> Chain {
        let axes = [Vector3::z(), Vector3::y(), Vector3::new(0.3, 0.8, -0.1), Vector3::x()];
        let joints = axes.iter().enumerate().map(|(k, axis)| ChainJoint {
            origin: Isometry3::from_parts(
                Translation3::new(0.02 * k as f64, 0.01, 0.1),
                UnitQuaternion::from_euler_angles(0.1 * k as f64, -0.2, 0.3),
            ),
            axis: Unit::new_normalize(*axis),
            index: k,
        });
        Chain::new(joints.collect()).expect("four joints")
    }

    #[test]
    fn a_planar_arm_reaches_where_trigonometry_says() {
        let along = |x: f64| Isometry3::translation(x, 0.0, 0.0);
        let joint = |x: f64, index| ChainJoint { origin: along(x), axis: Vector3::z_axis(), index };
        let chain = Chain::new(vec![joint(0.0, 0), joint(0.5, 1)]).expect("two joints");
        let mut pose = Pose::default();
        chain.forward(&[0.3, 0.9], &mut pose);
        let tip = pose.link(2) * Point3::new(0.25, 0.0, 0.0);
        let expected =
            (0.5 * 0.3f64.cos() + 0.25 * 1.2f64.cos(), 0.5 * 0.3f64.sin() + 0.25 * 1.2f64.sin());
        assert!((tip.x - expected.0).abs() < 1e-12 && (tip.y - expected.1).abs() < 1e-12);
    }

    #[test]
    fn a_chain_without_joints_is_refused() {
        assert_eq!(Chain::new(Vec::new()), Err(ChainError(0)));
    }

    proptest! {
        #[test]
        fn point_velocities_are_the_derivatives_and_never_beat_the_lever(
            angles in prop::array::uniform4(-3.0..3.0f64), link in 0..5usize, x in -0.2..0.2f64
        ) {
            let (chain, centre) = (chain(), Point3::new(x, 0.03, -0.05));
            let mut pose = Pose::default();
            chain.forward(&angles, &mut pose);
            let at = pose.link(link) * centre;
            for joint in 0..4 {
                let found = chain.point_velocity(&pose, link, joint, &at);
                let mut moved = [Point3::origin(); 2];
                for (side, point) in moved.iter_mut().enumerate() {
                    let mut angles = angles;
                    angles[joint] += if side == 0 { -1e-6 } else { 1e-6 };
                    let mut pose = Pose::default();
                    chain.forward(&angles, &mut pose);
                    *point = pose.link(link) * centre;
                }
                let expected = (moved[1] - moved[0]) / 2e-6;
                prop_assert!((found - expected).norm() < 1e-8, "{found} {expected}");
                let (turn, shift) = pose.twist(joint);
                let twisted = turn.cross(&at.coords) + shift;
                prop_assert!(joint >= link || (twisted - found).norm() < 1e-12);
                prop_assert!(found.norm() <= chain.lever(joint, link, &centre) + 1e-12);
            }
        }
    }
}
