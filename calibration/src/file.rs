//! LeRobot's calibration file: JSON, one entry per joint, in the order of the servos on the bus.
//!
//! ```json
//! { "shoulder_pan": { "id": 1, "drive_mode": 0, "homing_offset": -1470, "range_min": 758, "range_max": 3292 } }
//! ```
//!
//! Source: huggingface/lerobot `src/lerobot/motors/motors_bus.py` (`MotorCalibration`).

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde_json::Value;

use crate::{ConvertError, JointCalibration};

/// Keys of one joint.
const KEYS: [&str; 5] = ["id", "drive_mode", "homing_offset", "range_min", "range_max"];

/// Why a calibration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The file cannot be read or written.
    #[error("{}: {source}; check the path, or calibrate the arm first", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is no JSON object.
    #[error("{}: is no calibration file: {reason}; calibrate the arm again", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's word, with line and column.
        reason: String,
    },
    /// A value of a joint is missing or cannot be.
    #[error("{}: joint `{joint}`: `{key}` is {value}; {remedy}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The joint.
        joint: String,
        /// The key.
        key: String,
        /// What stands there.
        value: String,
        /// What may stand there.
        remedy: String,
    },
    /// The number of values is not the number of joints.
    #[error("{}: has {expected} joints, got {found} values; give one value per joint", path.display())]
    Width {
        /// The file.
        path: PathBuf,
        /// Joints in the file.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A value cannot be converted.
    #[error("{}: joint `{joint}`: {source}", path.display())]
    Convert {
        /// The file.
        path: PathBuf,
        /// The joint.
        joint: String,
        /// Why.
        source: ConvertError,
    },
}

/// Calibration of an arm: its joints in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArmCalibration {
    path: PathBuf,
    joints: Vec<(String, JointCalibration)>,
}

impl ArmCalibration {
    /// A calibration of `joints` that belongs to the file `path` (which is not touched).
    ///
    /// # Errors
    /// [`CalibrationError::Value`] for an empty range, or for a name or an id that comes twice.
    pub fn new(
        path: &Path,
        joints: Vec<(String, JointCalibration)>,
    ) -> Result<Self, CalibrationError> {
        for (index, (joint, calibration)) in joints.iter().enumerate() {
            let wrong = |key: &str, value: String, remedy: String| {
                Err(value_error(path, joint, key, value, remedy))
            };
            let (min, max) = (calibration.range_min, calibration.range_max);
            if min >= max {
                let remedy = format!(
                    "it must be above `range_min` = {min}: move the joint through its whole range"
                );
                return wrong("range_max", max.to_string(), remedy);
            }
            if let Some((other, _)) = joints[..index].iter().find(|j| j.1.id == calibration.id) {
                let remedy =
                    format!("joint `{other}` has the same: give every servo an id of its own");
                return wrong("id", calibration.id.to_string(), remedy);
            }
            if joints[..index].iter().any(|j| j.0 == *joint) {
                let remedy = "joints have names of their own: remove one".to_owned();
                return wrong("name", "there twice".to_owned(), remedy);
            }
        }
        Ok(Self { path: path.to_owned(), joints })
    }

    /// Reads LeRobot's calibration file `path`.
    ///
    /// # Errors
    /// [`CalibrationError`] with file, joint, key and value.
    pub fn read(path: &Path) -> Result<Self, CalibrationError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CalibrationError::Io { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Reads the calibration in `text`; `path` is for messages.
    ///
    /// # Errors
    /// [`CalibrationError`] with file, joint, key and value.
    pub fn parse(path: &Path, text: &str) -> Result<Self, CalibrationError> {
        let entries = entries(text).map_err(|e| CalibrationError::Syntax {
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
        let joints = entries.into_iter().map(|(joint, value)| {
            let calibration = entry(path, &joint, &value)?;
            Ok((joint, calibration))
        });
        Self::new(path, joints.collect::<Result<_, _>>()?)
    }

    /// The calibration as LeRobot writes it.
    pub fn to_json(&self) -> String {
        let mut out = Vec::new();
        let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut out, indent);
        // Keys are strings and values integers, and memory takes every write.
        #[allow(clippy::expect_used)]
        self.serialize(&mut serializer).expect("a map of integers is JSON");
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Writes the calibration to its file, whole or not at all.
    ///
    /// # Errors
    /// [`CalibrationError::Io`].
    pub fn write(&self) -> Result<(), CalibrationError> {
        let fail = |source| CalibrationError::Io { path: self.path.clone(), source };
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        std::fs::write(&beside, self.to_json()).map_err(fail)?;
        std::fs::rename(&beside, &self.path).map_err(fail)
    }

    /// The joints with their names, in the order of the file.
    pub fn joints(&self) -> &[(String, JointCalibration)] {
        &self.joints
    }

    /// Joint positions (rad) at the present positions `ticks`, in the order of the file.
    ///
    /// # Errors
    /// [`CalibrationError::Width`].
    pub fn to_radians(&self, ticks: &[i32]) -> Result<Vec<f64>, CalibrationError> {
        self.check_width(ticks.len())?;
        Ok(self.joints.iter().zip(ticks).map(|(j, t)| j.1.to_radians(*t)).collect())
    }

    /// Present positions (ticks) at joint `positions` (rad), in the order of the file.
    ///
    /// # Errors
    /// [`CalibrationError::Width`]; [`CalibrationError::Convert`] with the joint.
    pub fn to_ticks(&self, positions: &[f64]) -> Result<Vec<i32>, CalibrationError> {
        self.check_width(positions.len())?;
        let each = self.joints.iter().zip(positions).map(|((joint, calibration), position)| {
            calibration.to_ticks(*position).map_err(|source| CalibrationError::Convert {
                path: self.path.clone(),
                joint: joint.clone(),
                source,
            })
        });
        each.collect()
    }

    fn check_width(&self, found: usize) -> Result<(), CalibrationError> {
        let expected = self.joints.len();
        if expected == found {
            Ok(())
        } else {
            Err(CalibrationError::Width { path: self.path.clone(), expected, found })
        }
    }
}

impl Serialize for ArmCalibration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.joints.len()))?;
        for (joint, calibration) in &self.joints {
            map.serialize_entry(joint, calibration)?;
        }
        map.end()
    }
}

fn value_error(
    path: &Path,
    joint: &str,
    key: &str,
    value: String,
    remedy: String,
) -> CalibrationError {
    let (joint, key) = (joint.to_owned(), key.to_owned());
    CalibrationError::Value { path: path.to_owned(), joint, key, value, remedy }
}

/// The joints of the file in its order; a name that comes twice is kept twice.
fn entries(text: &str) -> Result<Vec<(String, Value)>, serde_json::Error> {
    struct Ordered;
    impl<'de> Visitor<'de> for Ordered {
        type Value = Vec<(String, Value)>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("joints by name")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let entries = deserializer.deserialize_map(Ordered)?;
    deserializer.end()?;
    Ok(entries)
}

fn entry(path: &Path, joint: &str, value: &Value) -> Result<JointCalibration, CalibrationError> {
    let expected = format!("a joint has the keys {}", KEYS.join(", "));
    let wrong = |key: &str, value: &str, remedy: String| {
        value_error(path, joint, key, value.to_owned(), remedy)
    };
    let Some(object) = value.as_object() else {
        return Err(wrong("entry", &value.to_string(), expected));
    };
    if let Some((key, value)) = object.iter().find(|(k, _)| !KEYS.contains(&k.as_str())) {
        return Err(wrong(key, &value.to_string(), format!("the key is not known: {expected}")));
    }
    let number = |key: &str, min: i64, max: i64| -> Result<i64, CalibrationError> {
        let value = object.get(key).ok_or_else(|| wrong(key, "missing", expected.clone()))?;
        let inside = value.as_i64().filter(|v| (min..=max).contains(v));
        inside.ok_or_else(|| {
            let remedy = format!("expected a whole number from {min} to {max}");
            wrong(key, &value.to_string(), remedy)
        })
    };
    let (least, most) = (i64::from(i32::MIN), i64::from(i32::MAX));
    // The bounds above keep every cast exact.
    Ok(JointCalibration {
        id: number("id", 0, 253)? as u8,
        drive_mode: number("drive_mode", 0, 1)? == 1,
        homing_offset: number("homing_offset", least, most)? as i32,
        range_min: number("range_min", least, most)? as i32,
        range_max: number("range_max", least, most)? as i32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
    "wrist": {
        "id": 2,
        "drive_mode": 1,
        "homing_offset": -1470,
        "range_min": 758,
        "range_max": 3292
    },
    "gripper": {
        "id": 1,
        "drive_mode": 0,
        "homing_offset": 12,
        "range_min": 1000,
        "range_max": 3000
    }
}"#;

    fn parse(text: &str) -> Result<ArmCalibration, CalibrationError> {
        ArmCalibration::parse(Path::new("arm.json"), text)
    }

    #[test]
    fn a_file_is_written_as_it_was_read() {
        let arm = parse(TEXT).expect("the text is valid");
        assert_eq!(arm.joints()[0].0, "wrist", "the order of the file is kept");
        assert!(arm.joints()[0].1.drive_mode && arm.joints()[0].1.homing_offset == -1470);
        assert_eq!(arm.to_json(), TEXT);

        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("arm.json");
        let arm = ArmCalibration::new(&path, arm.joints().to_vec()).expect("it was valid before");
        arm.write().expect("the folder can be written");
        assert_eq!(ArmCalibration::read(&path).expect("it was just written"), arm);
    }

    #[test]
    fn errors_name_file_joint_key_and_value() {
        for (from, to, expected) in [
            ("\"id\": 2", "\"id\": 300", ["wrist", "`id` is 300"]),
            ("\"id\": 2", "\"id\": 1", ["gripper", "`id` is 1"]),
            ("\"drive_mode\": 1", "\"drive_mode\": \"yes\"", ["wrist", "`drive_mode` is \"yes\""]),
            ("\"drive_mode\": 1", "\"drive_mode\": 2", ["wrist", "`drive_mode` is 2"]),
            ("\"range_max\": 3292", "\"range_max\": 700", ["wrist", "`range_max` is 700"]),
            ("\"range_min\": 758", "\"range_min\": 7.5", ["wrist", "`range_min` is 7.5"]),
            ("\"range_min\": 758,", "", ["wrist", "`range_min` is missing"]),
            ("\"id\": 2,", "\"id\": 2, \"speed\": 3,", ["wrist", "`speed` is 3"]),
            ("\"gripper\"", "\"wrist\"", ["wrist", "there twice"]),
            ("\"gripper\": {", "\"gripper\": 4, \"x\": {", ["gripper", "`entry` is 4"]),
            ("}\n}", "}", ["arm.json", "line"]),
        ] {
            let text = TEXT.replacen(from, to, 1);
            assert_ne!(text, TEXT, "{from}");
            let error = parse(&text).expect_err(to).to_string();
            let named = expected.iter().all(|e| error.contains(e)) && error.contains("arm.json");
            assert!(named, "{to}: {error}");
        }
        let error = ArmCalibration::read(Path::new("no/such.json")).expect_err("no file");
        assert!(error.to_string().contains("no/such.json"));
    }

    #[test]
    fn conversions_name_the_joint_that_cannot() {
        let arm = parse(TEXT).expect("the text is valid");
        let radians = arm.to_radians(&[2025, 2500]).expect("two values for two joints");
        assert_eq!(arm.to_ticks(&radians).expect("inside the range"), [2025, 2500]);
        let error =
            arm.to_ticks(&[0.0, 3.0]).expect_err("the gripper does not reach it").to_string();
        assert!(error.contains("arm.json") && error.contains("gripper") && error.contains("3 rad"));
        assert!(arm.to_radians(&[1]).is_err());
    }
}
