//! Joint-space values. Revolute joints in radians; velocities, accelerations, jerks per second, s², s³.

use std::ops::{Index, IndexMut};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Stamp;

/// The most joints one arm may have (fixed, so that the control thread never allocates).
pub const MAX_JOINTS: usize = 16;

/// One value per joint, stored in place: `Copy`, no heap.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointVec {
    len: usize,
    values: [f64; MAX_JOINTS],
}

impl JointVec {
    /// `len` zeros; `len` is cut to [`MAX_JOINTS`].
    pub fn zeros(len: usize) -> Self {
        Self { len: len.min(MAX_JOINTS), values: [0.0; MAX_JOINTS] }
    }

    /// The values of `slice`, or `None` when it holds more than [`MAX_JOINTS`].
    pub fn from_slice(slice: &[f64]) -> Option<Self> {
        let mut out = Self::zeros(slice.len());
        (slice.len() <= MAX_JOINTS).then(|| {
            out.values[..slice.len()].copy_from_slice(slice);
            out
        })
    }

    /// The values, one per joint.
    pub fn as_slice(&self) -> &[f64] {
        &self.values[..self.len]
    }

    /// The values, one per joint.
    pub fn as_mut_slice(&mut self) -> &mut [f64] {
        &mut self.values[..self.len]
    }

    /// Number of joints.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without joints.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True when every value is finite.
    pub fn is_finite(&self) -> bool {
        self.as_slice().iter().all(|v| v.is_finite())
    }
}

impl Index<usize> for JointVec {
    type Output = f64;
    fn index(&self, index: usize) -> &f64 {
        &self.as_slice()[index]
    }
}

impl IndexMut<usize> for JointVec {
    fn index_mut(&mut self, index: usize) -> &mut f64 {
        &mut self.as_mut_slice()[index]
    }
}

/// An array of numbers; `null` stands for a value that is not finite.
impl Serialize for JointVec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.as_slice().iter().map(|v| v.is_finite().then_some(*v)))
    }
}

impl<'de> Deserialize<'de> for JointVec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values: Vec<Option<f64>> = Vec::deserialize(deserializer)?;
        let values: Vec<f64> = values.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect();
        Self::from_slice(&values).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "{} values, an arm has at most {MAX_JOINTS} joints",
                values.len()
            ))
        })
    }
}

/// Limits of one joint, as the guard enforces them.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JointLimits {
    /// Lowest position (rad).
    pub lower: f64,
    /// Highest position (rad).
    pub upper: f64,
    /// Highest speed (rad/s).
    pub velocity: f64,
    /// Highest acceleration (rad/s²).
    pub acceleration: f64,
    /// Highest jerk (rad/s³).
    pub jerk: f64,
}

/// Measured state of all joints at one instant.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JointState {
    /// When it was measured (clock of the driver's host).
    pub stamp: Stamp,
    /// Counts the driver's messages, from 1.
    pub sequence: u64,
    /// Joint positions (rad).
    pub position: JointVec,
    /// Joint velocities (rad/s).
    pub velocity: JointVec,
}
