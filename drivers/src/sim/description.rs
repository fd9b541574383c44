//! The simulated arm's description: a TOML file with every unit written out.
//!
//! Joints stand in bus order; inside, everything is in rad, m, N m and s.

use super::body::{PlaneText, SphereText};
use serde::Deserialize;
use sinew_runtime::guard::{Plane, SpaceConfig};
use sinew_runtime::kinematics::Sphere;
use sinew_runtime::units::{UnitError, parse_angle, parse_duration, parse_frequency};
use sinew_runtime::{ActionKind, JointLimits};

/// Joints of the arm, the gripper last.
pub const JOINTS: usize = 6;

/// Names that the joints must have, in bus order: kinematics are written for them.
pub const JOINT_NAMES: [&str; JOINTS] =
    ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"];

/// The arm that is used when the launch file names no other.
const DESK_ARM: &str = include_str!("../../sim/desk_arm.toml");

/// Why a description cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptionError {
    /// Not TOML, or a key missing, unknown or of the wrong type.
    #[error("arm description: {0}")]
    Syntax(String),
    /// A value without a unit, or with a wrong one.
    #[error("arm description, `{key}`: {reason}")]
    Value {
        /// The key, with its joint or section.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The joints are not those that the kinematics are written for.
    #[error("arm description: joints are {found:?}, expected {JOINT_NAMES:?} in this order")]
    Joints {
        /// Names found.
        found: Vec<String>,
    },
    /// The file cannot be read.
    #[error("arm description {path}: {reason}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
}

/// One joint and its servo.
#[derive(Debug, Clone, PartialEq)]
pub struct JointDescription {
    /// Name on the bus.
    pub name: String,
    /// How its actions are played.
    pub kind: ActionKind,
    /// Position (rad), velocity (rad/s), acceleration (rad/s²) and jerk (rad/s³) limits.
    pub limits: JointLimits,
    /// Stall torque (N m).
    pub torque: f64,
    /// Inertia that the servo moves (kg m²).
    pub inertia: f64,
    /// Natural frequency of the position servo (rad/s).
    pub bandwidth: f64,
    /// Time from a command to the servo's new target (s).
    pub latency: f64,
}

/// Dimensions of the arm (m).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmGeometry {
    /// Table to the shoulder_lift axis.
    pub shoulder_height: f64,
    /// Shoulder_lift axis to the elbow_flex axis.
    pub upper_arm: f64,
    /// Elbow_flex axis to the wrist_flex axis.
    pub forearm: f64,
    /// Wrist_flex axis to the fingertips.
    pub hand: f64,
    /// Hand axis to the inner face of the fixed finger.
    pub finger_offset: f64,
    /// Jaw travel per radian of the gripper (m/rad).
    pub pinion_radius: f64,
}

/// The arm: dimensions and joints.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmDescription {
    /// The arm's name.
    pub name: String,
    /// Its dimensions.
    pub geometry: ArmGeometry,
    /// Its joints, in bus order.
    pub joints: Vec<JointDescription>,
    /// Balls that cover it, on the links of [`super::kinematics::chain`].
    pub spheres: Vec<Sphere>,
    /// What it always stays clear of.
    pub planes: Vec<Plane>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    name: String,
    geometry: GeometryText,
    joint: Vec<JointText>,
    #[serde(default)]
    sphere: Vec<SphereText>,
    #[serde(default)]
    plane: Vec<PlaneText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GeometryText {
    shoulder_height: String,
    upper_arm: String,
    forearm: String,
    hand: String,
    finger_offset: String,
    pinion_radius: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JointText {
    name: String,
    #[serde(default)]
    kind: ActionKind,
    lower: String,
    upper: String,
    velocity: String,
    acceleration: String,
    jerk: String,
    torque: String,
    inertia: String,
    bandwidth: String,
    latency: String,
}

pub(super) fn value_error(key: &str, reason: impl Into<String>) -> DescriptionError {
    DescriptionError::Value { key: key.to_owned(), reason: reason.into() }
}

pub(super) fn with_key<T>(key: &str, result: Result<T, UnitError>) -> Result<T, DescriptionError> {
    result.map_err(|e| value_error(key, e.to_string()))
}

/// A positive number before one of `units`, times the unit's factor.
fn quantity(key: &str, text: &str, units: &[(&str, f64)]) -> Result<f64, DescriptionError> {
    let found = units.iter().find_map(|(unit, factor)| {
        let number = text.trim().strip_suffix(unit)?.trim().parse::<f64>().ok()?;
        (number.is_finite() && number > 0.0).then_some(number * factor)
    });
    found.ok_or_else(|| {
        value_error(key, format!("`{text}` is not a positive quantity in `{}`", units[0].0))
    })
}

fn length(key: &str, text: &str) -> Result<f64, DescriptionError> {
    quantity(key, text, &[("mm", 1e-3), ("cm", 1e-2), ("m", 1.0)])
}

impl JointText {
    fn read(&self) -> Result<JointDescription, DescriptionError> {
        let key = |field: &str| format!("{}.{field}", self.name);
        let angle = |field: &str, text: &str| with_key(&key(field), parse_angle(text));
        let positive = |field: &str, text: &str| {
            let value = angle(field, text)?;
            if value > 0.0 {
                Ok(value)
            } else {
                Err(value_error(&key(field), format!("`{text}` is not above zero")))
            }
        };
        let limits = JointLimits {
            lower: angle("lower", &self.lower)?,
            upper: angle("upper", &self.upper)?,
            velocity: positive("velocity", &self.velocity)?,
            acceleration: positive("acceleration", &self.acceleration)?,
            jerk: positive("jerk", &self.jerk)?,
        };
        if limits.lower >= limits.upper {
            let reason = format!("`{}` is not above lower = `{}`", self.upper, self.lower);
            return Err(value_error(&key("upper"), reason));
        }
        Ok(JointDescription {
            name: self.name.clone(),
            kind: self.kind,
            limits,
            torque: quantity(&key("torque"), &self.torque, &[("N m", 1.0)])?,
            inertia: quantity(&key("inertia"), &self.inertia, &[("kg m2", 1.0)])?,
            bandwidth: with_key(&key("bandwidth"), parse_frequency(&self.bandwidth))?
                * std::f64::consts::TAU,
            latency: with_key(&key("latency"), parse_duration(&self.latency))?.as_secs_f64(),
        })
    }
}

impl ArmDescription {
    /// Reads a description from TOML text.
    ///
    /// # Errors
    /// [`DescriptionError`], naming the key.
    pub fn from_toml(text: &str) -> Result<Self, DescriptionError> {
        let file: FileText =
            toml::from_str(text).map_err(|e| DescriptionError::Syntax(e.to_string()))?;
        let found: Vec<String> = file.joint.iter().map(|j| j.name.clone()).collect();
        if found != JOINT_NAMES {
            return Err(DescriptionError::Joints { found });
        }
        let g = &file.geometry;
        let geometry = ArmGeometry {
            shoulder_height: length("geometry.shoulder_height", &g.shoulder_height)?,
            upper_arm: length("geometry.upper_arm", &g.upper_arm)?,
            forearm: length("geometry.forearm", &g.forearm)?,
            hand: length("geometry.hand", &g.hand)?,
            finger_offset: length("geometry.finger_offset", &g.finger_offset)?,
            pinion_radius: length("geometry.pinion_radius", &g.pinion_radius)?,
        };
        let joints = file.joint.iter().map(JointText::read).collect::<Result<_, _>>()?;
        let last = super::kinematics::chain(&geometry).last_link();
        let spheres = file.sphere.iter().map(|s| s.read(last)).collect::<Result<_, _>>()?;
        let planes = file.plane.iter().map(PlaneText::read).collect::<Result<_, _>>()?;
        Ok(Self { name: file.name, geometry, joints, spheres, planes })
    }

    /// Reads a description from a file.
    ///
    /// # Errors
    /// [`DescriptionError`], naming the path or the key.
    pub fn from_file(path: &std::path::Path) -> Result<Self, DescriptionError> {
        let text = std::fs::read_to_string(path).map_err(|e| DescriptionError::File {
            path: path.display().to_string(),
            reason: e.to_string(),
        })?;
        Self::from_toml(&text)
    }

    /// The built-in desk arm.
    ///
    /// # Panics
    /// Never: the text is part of the program, and a test reads it.
    pub fn desk_arm() -> Self {
        Self::from_toml(DESK_ARM).expect("the built-in description is valid: a test reads it")
    }

    /// How the actions of all joints are played, in bus order.
    pub fn kinds(&self) -> Vec<ActionKind> {
        self.joints.iter().map(|j| j.kind).collect()
    }

    /// Where the guard keeps the arm: off its planes and off itself.
    pub fn space(&self) -> SpaceConfig {
        SpaceConfig {
            chain: super::kinematics::chain(&self.geometry),
            spheres: self.spheres.clone(),
            planes: self.planes.clone(),
            self_collision: true,
            rate: SpaceConfig::RATE,
        }
    }

    /// The limits of all joints, in bus order.
    pub fn limits(&self) -> Vec<JointLimits> {
        self.joints.iter().map(|j| j.limits).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_arm_reads() {
        let arm = ArmDescription::desk_arm();
        assert_eq!(arm.joints.len(), JOINTS);
        assert!((arm.geometry.upper_arm - 0.15).abs() < 1e-12);
        assert!((arm.joints[0].limits.velocity - std::f64::consts::PI).abs() < 1e-9);
    }

    #[test]
    fn errors_name_the_key() {
        for (from, to, key) in [
            ("torque = \"0.25 N m\"", "torque = \"0.25\"", "gripper.torque"),
            ("lower = \"0 deg\"", "lower = \"0\"", "gripper.lower"),
            ("forearm = \"150 mm\"", "forearm = \"-1 mm\"", "geometry.forearm"),
            ("upper = \"65 deg\"", "upper = \"-65 deg\"", "gripper.upper"),
            ("name = \"gripper\"", "name = \"gripper\"\nmass = 1", "mass"),
            ("name = \"elbow_flex\"", "name = \"elbow\"", "elbow"),
            ("radius = \"45 mm\"", "radius = \"-45 mm\"", "palm.radius"),
            ("link = 3", "link = 6", "elbow.link"),
            ("[0.0, 0.0, 1.0]", "[0.0, 0.0, 0.0]", "table.normal"),
        ] {
            let text = DESK_ARM.replacen(from, to, 1);
            assert_ne!(text, DESK_ARM, "{from}");
            let error = ArmDescription::from_toml(&text).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
