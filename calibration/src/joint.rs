//! Joint calibration: encoder ticks to radians, and to LeRobot's normalised values, and back.
//!
//! Ticks are *present* positions: as the servo reports them, after its own homing offset. Radians count
//! from the middle of the joint's measured range; positive is the direction of increasing ticks.
//! `drive_mode` is not applied to radians and degrees, as in LeRobot's `DEGREES` mode, so that policies
//! trained on LeRobot data keep their sign.
//!
//! Source: huggingface/lerobot `src/lerobot/motors/motors_bus.py` (`_normalize`, `_unnormalize`) and
//! `motors/feetech/feetech.py`, `motors/dynamixel/dynamixel.py` (`_get_half_turn_homings`).

use std::f64::consts::TAU;

/// Positions that the encoder tells apart in one turn (Feetech STS3215, Dynamixel X).
pub const RESOLUTION: i32 = 4096;

/// The reading that a joint in the middle of its range is homed to.
pub const HALF_TURN: i32 = (RESOLUTION - 1) / 2;

/// Ticks in one turn, as LeRobot counts them.
///
/// 4095 and not 4096: LeRobot divides by `resolution - 1`, and a policy trained on its data expects
/// that scale.
const TICKS_PER_TURN: f64 = (RESOLUTION - 1) as f64;

/// What a servo does with its homing offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServoFamily {
    /// Present = actual − offset.
    Feetech,
    /// Present = actual + offset.
    Dynamixel,
}

impl ServoFamily {
    /// The present position (ticks) that a servo at `actual` reports with `homing_offset`.
    pub fn present(self, actual: i32, homing_offset: i32) -> i32 {
        match self {
            ServoFamily::Feetech => actual - homing_offset,
            ServoFamily::Dynamixel => actual + homing_offset,
        }
    }

    /// The homing offset that makes a servo at `actual` (ticks) report [`HALF_TURN`].
    pub fn homing_offset(self, actual: i32) -> i32 {
        match self {
            ServoFamily::Feetech => actual - HALF_TURN,
            ServoFamily::Dynamixel => HALF_TURN - actual,
        }
    }
}

/// LeRobot's normalisation modes. A dataset or checkpoint was made with one of them; they do not mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalization {
    /// −100 at the lower end of the range, 100 at the upper; the other way round with `drive_mode`.
    RangeM100To100,
    /// 0 at the lower end of the range, 100 at the upper; the other way round with `drive_mode`.
    Range0To100,
    /// Degrees from the middle of the range; no clamping, no `drive_mode`.
    Degrees,
}

impl Normalization {
    /// All modes.
    pub const ALL: [Normalization; 3] =
        [Normalization::RangeM100To100, Normalization::Range0To100, Normalization::Degrees];

    /// LeRobot's name of the mode.
    pub fn name(self) -> &'static str {
        match self {
            Normalization::RangeM100To100 => "RANGE_M100_100",
            Normalization::Range0To100 => "RANGE_0_100",
            Normalization::Degrees => "DEGREES",
        }
    }
}

/// Why a value cannot be turned into ticks.
///
/// `Copy` and free of strings: a driver's loop carries it without allocating.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ConvertError {
    /// The position is outside the measured range, or not finite.
    #[error(
        "position {position} rad is tick {ticks}, outside the measured range {min} to {max}; \
         keep commands inside the joint's limits, or calibrate the joint again"
    )]
    OutOfRange {
        /// The position (rad).
        position: f64,
        /// Its ticks, rounded.
        ticks: f64,
        /// Lowest tick of the joint.
        min: i32,
        /// Highest tick of the joint.
        max: i32,
    },
    /// The normalised value is not finite.
    #[error("normalised value {value} is not finite; check what produced it")]
    NotFinite {
        /// The value.
        value: f64,
    },
}

/// Calibration of one joint, as LeRobot's calibration file holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct JointCalibration {
    /// The servo's address on its bus.
    pub id: u8,
    /// Direction flag of the two range modes: 0 or 1.
    #[serde(serialize_with = "as_number")]
    pub drive_mode: bool,
    /// The zero shift that is stored in the servo (ticks).
    pub homing_offset: i32,
    /// Lowest present position of the measured range (ticks).
    pub range_min: i32,
    /// Highest present position of the measured range (ticks), above `range_min`.
    pub range_max: i32,
}

fn as_number<S: serde::Serializer>(flag: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u8(u8::from(*flag))
}

impl JointCalibration {
    /// Middle of the measured range (ticks); half-way between two of them when the range is odd.
    pub fn middle(&self) -> f64 {
        (f64::from(self.range_min) + f64::from(self.range_max)) / 2.0
    }

    /// Joint position (rad) at the present position `ticks`.
    pub fn to_radians(&self, ticks: i32) -> f64 {
        (f64::from(ticks) - self.middle()) * TAU / TICKS_PER_TURN
    }

    /// Present position (ticks) at joint `position` (rad), rounded to the nearest.
    ///
    /// # Errors
    /// [`ConvertError::OutOfRange`] outside the measured range. Nothing is clamped here: clamping is the
    /// guard's decision, and it is counted there.
    pub fn to_ticks(&self, position: f64) -> Result<i32, ConvertError> {
        let ticks = (position * TICKS_PER_TURN / TAU + self.middle()).round();
        let (min, max) = (self.range_min, self.range_max);
        if ticks >= f64::from(min) && ticks <= f64::from(max) {
            // Between two i32, so it is one.
            Ok(ticks as i32)
        } else {
            Err(ConvertError::OutOfRange { position, ticks, min, max }) // NaN lands here too
        }
    }

    /// LeRobot's normalised value of the present position `ticks`; the two range modes clamp.
    pub fn normalize(&self, ticks: i32, mode: Normalization) -> f64 {
        let (low, high) = (f64::from(self.range_min), f64::from(self.range_max));
        let share = (f64::from(ticks).clamp(low, high) - low) / (high - low);
        match (mode, self.drive_mode) {
            (Normalization::RangeM100To100, false) => share * 200.0 - 100.0,
            (Normalization::RangeM100To100, true) => -(share * 200.0 - 100.0),
            (Normalization::Range0To100, false) => share * 100.0,
            (Normalization::Range0To100, true) => 100.0 - share * 100.0,
            (Normalization::Degrees, _) => {
                (f64::from(ticks) - self.middle()) * 360.0 / TICKS_PER_TURN
            }
        }
    }

    /// Present position (ticks) of LeRobot's normalised `value`; the two range modes clamp.
    ///
    /// Truncated towards zero, as LeRobot's `int()` does.
    ///
    /// # Errors
    /// [`ConvertError::NotFinite`] for NaN and infinities.
    pub fn unnormalize(&self, value: f64, mode: Normalization) -> Result<i32, ConvertError> {
        if !value.is_finite() {
            return Err(ConvertError::NotFinite { value });
        }
        let (low, high) = (f64::from(self.range_min), f64::from(self.range_max));
        let ticks = match mode {
            Normalization::RangeM100To100 => {
                let turned = if self.drive_mode { -value } else { value };
                (turned.clamp(-100.0, 100.0) + 100.0) / 200.0 * (high - low) + low
            }
            Normalization::Range0To100 => {
                let turned = if self.drive_mode { 100.0 - value } else { value };
                turned.clamp(0.0, 100.0) / 100.0 * (high - low) + low
            }
            Normalization::Degrees => value * TICKS_PER_TURN / 360.0 + self.middle(),
        };
        // `as` truncates towards zero and stops at the ends of i32.
        Ok(ticks as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const JOINT: JointCalibration = JointCalibration {
        id: 1,
        drive_mode: false,
        homing_offset: 0,
        range_min: 1000,
        range_max: 3000,
    };
    const TURNED: JointCalibration = JointCalibration { drive_mode: true, ..JOINT };

    #[test]
    fn golden_vectors_of_lerobot() {
        assert_eq!(JOINT.normalize(2500, Normalization::RangeM100To100), 50.0);
        assert_eq!(TURNED.normalize(2500, Normalization::RangeM100To100), -50.0);
        assert_eq!(JOINT.normalize(2500, Normalization::Range0To100), 75.0);
        assert_eq!(TURNED.normalize(2500, Normalization::Range0To100), 25.0);
        let degrees = JOINT.normalize(2500, Normalization::Degrees);
        assert!(
            (degrees - 500.0 * 360.0 / 4095.0).abs() < 1e-12 && (degrees - 43.956).abs() < 1e-3
        );
        assert_eq!(TURNED.normalize(2500, Normalization::Degrees), degrees);
    }

    #[test]
    fn range_modes_clamp_and_degrees_do_not() {
        assert_eq!(JOINT.normalize(5000, Normalization::RangeM100To100), 100.0);
        assert_eq!(JOINT.normalize(0, Normalization::Range0To100), 0.0);
        assert!(JOINT.normalize(5000, Normalization::Degrees) > 180.0);
        assert_eq!(JOINT.unnormalize(150.0, Normalization::RangeM100To100), Ok(3000));
        assert_eq!(JOINT.unnormalize(-1.0, Normalization::Range0To100), Ok(1000));
        assert_eq!(TURNED.unnormalize(-1.0, Normalization::Range0To100), Ok(3000));
    }

    #[test]
    fn ticks_are_truncated_towards_zero() {
        assert_eq!(JOINT.unnormalize(0.09, Normalization::RangeM100To100), Ok(2000));
        // 0.1 degrees are 1.1375 ticks; below zero the truncation goes up.
        assert_eq!(JOINT.unnormalize(0.1, Normalization::Degrees), Ok(2001));
        assert_eq!(JOINT.unnormalize(-200.0, Normalization::Degrees), Ok(-275));
    }

    #[test]
    fn values_that_are_no_numbers_are_refused() {
        for mode in Normalization::ALL {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert!(JOINT.unnormalize(value, mode).is_err(), "{} {value}", mode.name());
            }
        }
        assert!(JOINT.to_ticks(f64::NAN).is_err());
        let error = JOINT.to_ticks(2.0).expect_err("2 rad is past the range").to_string();
        assert!(error.contains("2 rad") && error.contains("1000 to 3000"), "{error}");
    }

    #[test]
    fn homing_makes_the_middle_read_half_a_turn() {
        assert_eq!(HALF_TURN, 2047);
        for family in [ServoFamily::Feetech, ServoFamily::Dynamixel] {
            for actual in 0..RESOLUTION {
                assert_eq!(family.present(actual, family.homing_offset(actual)), HALF_TURN);
            }
        }
        assert_eq!(ServoFamily::Feetech.homing_offset(3000), 953);
        assert_eq!(ServoFamily::Dynamixel.homing_offset(3000), -953);
    }

    #[test]
    fn ticks_round_trip_over_the_whole_range() {
        for ticks in JOINT.range_min..=JOINT.range_max {
            assert_eq!(JOINT.to_ticks(JOINT.to_radians(ticks)), Ok(ticks));
        }
    }

    proptest! {
        #[test]
        fn normalised_values_round_trip_within_a_tick(
            min in 0..2000i32, width in 1..2095i32, share in 0.0..=1.0f64, drive_mode: bool,
        ) {
            let joint = JointCalibration { drive_mode, range_min: min, range_max: min + width, ..JOINT };
            let ticks = min + (share * f64::from(width)) as i32;
            for mode in Normalization::ALL {
                let back = joint.unnormalize(joint.normalize(ticks, mode), mode)?;
                prop_assert!((back - ticks).abs() <= 1, "{}: {ticks} became {back}", mode.name());
            }
        }
    }
}
