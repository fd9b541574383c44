//! Sinew's calibration: what turns raw readings into meaning, and the files that hold it.
//!
//! [`JointCalibration`] turns a servo's ticks into radians or into LeRobot's normalised values and back;
//! [`ArmCalibration`] reads and writes LeRobot's calibration file, one entry per joint.

mod file;
mod joint;

pub use file::{ArmCalibration, CalibrationError};
pub use joint::{
    ConvertError, HALF_TURN, JointCalibration, Normalization, RESOLUTION, ServoFamily,
};
