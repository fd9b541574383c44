//! What the arm is kept from: its shape, the planes, and which of them meet.

use nalgebra::{Point3, Unit, Vector3};

use crate::guard::causes::Cause;
use crate::kinematics::{Chain, Sphere};

/// A half-space that the arm stays in: `normal · point >= offset`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plane {
    /// What it stands for.
    pub name: String,
    /// Its normal, pointing to where the arm may be (base frame).
    pub normal: Unit<Vector3<f64>>,
    /// Its distance from the base's origin along the normal (m).
    pub offset: f64,
}

/// The arm's shape and where it may be.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SpaceConfig {
    /// The arm's joints.
    pub chain: Chain,
    /// Balls that cover the arm, its tool tip among them.
    pub spheres: Vec<Sphere>,
    /// Half-spaces that every moving ball stays in.
    pub planes: Vec<Plane>,
    /// Keep balls of links that are not neighbours apart.
    pub self_collision: bool,
    /// How fast the speed towards a limit falls with the distance (1/s): `h' >= -rate·h`.
    pub rate: f64,
}

/// Why a space cannot be guarded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SpaceError {
    /// A ball on a link that the chain has not.
    #[error("ball `{name}` is on link {link}; the chain's links are 0 to {last}")]
    Link {
        /// The ball.
        name: String,
        /// Its link.
        link: usize,
        /// The chain's last link.
        last: usize,
    },
    /// A number that is not finite or out of range.
    #[error("{what} is {value}; it must be finite and {range}")]
    Value {
        /// What it is.
        what: String,
        /// Its value.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
}

/// A distance that is kept: of a ball to a plane, or of two balls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Barrier {
    Plane { sphere: usize, plane: usize },
    Pair { a: usize, b: usize },
}

impl Barrier {
    pub fn cause(self) -> Cause {
        match self {
            Barrier::Plane { .. } => Cause::Workspace,
            Barrier::Pair { .. } => Cause::SelfCollision,
        }
    }
}

impl SpaceConfig {
    /// A good rate (1/s) for small arms: from 10 cm away at 1 m/s, from 1 cm at 10 cm/s.
    pub const RATE: f64 = 10.0;

    /// The distance (m) of `barrier`, with the balls' `centres`.
    pub(super) fn distance(&self, barrier: Barrier, centres: &[Point3<f64>]) -> f64 {
        match barrier {
            Barrier::Plane { sphere, plane } => {
                let Plane { normal, offset, .. } = &self.planes[plane];
                normal.dot(&centres[sphere].coords) - offset - self.spheres[sphere].radius
            }
            Barrier::Pair { a, b } => {
                let apart = (centres[b] - centres[a]).norm();
                apart - self.spheres[a].radius - self.spheres[b].radius
            }
        }
    }
}
