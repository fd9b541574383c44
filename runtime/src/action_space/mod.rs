//! Action spaces: what a policy's actions mean, and how they become joint positions and back.
//!
//! The scheduler, the guard and the driver know joint positions (rad) only. A policy that speaks of anything else
//! is wrapped in [`InJoints`], so its chunk is converted in the inference thread, right after it is made, and
//! counts from the state in the very observation that it was made from, however old that is by then. What is
//! planned goes to the policy the other way.
//!
//! Between converted waypoints the stream plays its usual spline in joint space; how far the tip then is from
//! the straight way between two waypoints is part of the report ([`crate::Reach`]).

mod config;
mod convert;
mod policy;
mod rotation;
#[cfg(test)]
mod tests;

pub use config::{
    ActionSpace, DeltaFrom, Frame, GripperKind, SpaceKeyError, SpaceKeys, SpaceKind, StateKind,
};
pub use convert::{ActionSpaceError, JointMap, Tolerance};
pub use policy::InJoints;
pub use rotation::RotationKind;
