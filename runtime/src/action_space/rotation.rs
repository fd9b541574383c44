//! Rotations as policies write them.

use nalgebra::{Matrix3, Quaternion, Rotation3, UnitQuaternion, Vector3};
use serde::{Deserialize, Serialize};

/// Vectors shorter than this have no direction.
const SHORTEST: f64 = 1e-3;
/// Larger values are no part of a rotation.
const LARGEST: f64 = 1e6;

/// How a rotation is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotationKind {
    /// Three values: the axis times the angle (rad).
    #[default]
    AxisAngle,
    /// Six values: the first two columns of the rotation matrix, one after the other, made orthonormal when they
    /// are read (Zhou and others 2019, arXiv 1812.07035).
    #[serde(rename = "6d")]
    SixD,
    /// Four values `x y z w`, normalized when they are read.
    Quaternion,
    /// Four values `w x y z`.
    QuaternionWxyz,
    /// Three angles (rad) about the fixed axes x, then y, then z: roll, pitch, yaw, as in a URDF.
    Rpy,
    /// No values: the tool keeps the rotation that it had at the observation.
    None,
}

impl RotationKind {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 6] = [
        ("axis_angle", Self::AxisAngle),
        ("6d", Self::SixD),
        ("quaternion", Self::Quaternion),
        ("quaternion_wxyz", Self::QuaternionWxyz),
        ("rpy", Self::Rpy),
        ("none", Self::None),
    ];

    /// Number of values.
    pub fn width(self) -> usize {
        match self {
            Self::AxisAngle | Self::Rpy => 3,
            Self::SixD => 6,
            Self::Quaternion | Self::QuaternionWxyz => 4,
            Self::None => 0,
        }
    }

    /// The rotation that `values` say; the identity for [`RotationKind::None`].
    ///
    /// # Errors
    /// What is wrong with values that are no rotation.
    pub fn read(self, values: &[f64]) -> Result<UnitQuaternion<f64>, &'static str> {
        if values.iter().any(|v| !v.is_finite()) {
            return Err("a value is not finite");
        }
        if values.iter().any(|v| v.abs() > LARGEST) {
            return Err("a value is beyond all sense");
        }
        match (self, values) {
            (Self::AxisAngle, &[x, y, z]) => {
                Ok(UnitQuaternion::from_scaled_axis(Vector3::new(x, y, z)))
            }
            (Self::Rpy, &[roll, pitch, yaw]) => {
                Ok(UnitQuaternion::from_euler_angles(roll, pitch, yaw))
            }
            (Self::Quaternion, &[x, y, z, w]) | (Self::QuaternionWxyz, &[w, x, y, z]) => {
                UnitQuaternion::try_new(Quaternion::new(w, x, y, z), SHORTEST)
                    .ok_or("its quaternion is zero")
            }
            (Self::SixD, &[a, b, c, d, e, f]) => {
                six_d(Vector3::new(a, b, c), Vector3::new(d, e, f))
            }
            (Self::None, []) => Ok(UnitQuaternion::identity()),
            _ => Err("it has another number of values"),
        }
    }

    /// Appends the values of `rotation` to `out`.
    pub fn write(self, rotation: &UnitQuaternion<f64>, out: &mut Vec<f64>) {
        match self {
            Self::AxisAngle => out.extend(rotation.scaled_axis().iter()),
            Self::Rpy => out.extend(<[f64; 3]>::from(rotation.euler_angles())),
            Self::SixD => {
                let matrix = rotation.to_rotation_matrix();
                out.extend(matrix.matrix().fixed_columns::<2>(0).iter());
            }
            Self::Quaternion | Self::QuaternionWxyz => {
                let Quaternion { coords } = *rotation.quaternion();
                // q and -q are one rotation: the one with w >= 0 is written.
                let coords = if coords.w < 0.0 { -coords } else { coords };
                let [x, y, z, w] = [coords.x, coords.y, coords.z, coords.w];
                out.extend(if self == Self::Quaternion { [x, y, z, w] } else { [w, x, y, z] });
            }
            Self::None => {}
        }
    }
}

/// Gram and Schmidt on the two columns; the third is their cross product.
fn six_d(a: Vector3<f64>, b: Vector3<f64>) -> Result<UnitQuaternion<f64>, &'static str> {
    let first = a.try_normalize(SHORTEST).ok_or("its first column is zero")?;
    let second = (b - first * first.dot(&b))
        .try_normalize(SHORTEST)
        .ok_or("its second column is zero or along the first")?;
    let matrix = Matrix3::from_columns(&[first, second, first.cross(&second)]);
    Ok(UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(matrix)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rotations_come_back_as_they_were_written(
            axis in prop::array::uniform3(-1.0..1.0f64), angle in -3.1..3.1f64, scale in 0.5..2.0f64
        ) {
            let axis = Vector3::from(axis);
            prop_assume!(axis.norm() > 0.1);
            let rotation = UnitQuaternion::from_scaled_axis(axis.normalize() * angle);
            for (name, kind) in RotationKind::ALL {
                let mut values = Vec::new();
                kind.write(&rotation, &mut values);
                prop_assert_eq!(values.len(), kind.width());
                let back = kind.read(&values).expect("a rotation");
                let expected = if kind == RotationKind::None { UnitQuaternion::identity() } else { rotation };
                prop_assert!(back.angle_to(&expected) < 1e-6, "{name}: {values:?}");
                // Networks give neither unit quaternions nor orthonormal columns.
                if matches!(kind, RotationKind::SixD | RotationKind::Quaternion | RotationKind::QuaternionWxyz) {
                    let grown: Vec<f64> = values.iter().map(|v| v * scale).collect();
                    prop_assert!(kind.read(&grown).expect("a rotation").angle_to(&rotation) < 1e-6, "{name}");
                }
            }
        }

        #[test]
        fn anything_is_a_rotation_or_an_error(values in prop::collection::vec(prop::num::f64::ANY, 0..8)) {
            for (name, kind) in RotationKind::ALL {
                if let Ok(rotation) = kind.read(&values) {
                    let norm = rotation.quaternion().norm();
                    prop_assert!((norm - 1.0).abs() < 1e-6, "{name}: {values:?} gave {rotation}");
                }
            }
        }
    }

    #[test]
    fn columns_and_orders_are_the_documented_ones() {
        // A quarter turn about z takes x to y and y to -x.
        let quarter =
            UnitQuaternion::from_axis_angle(&Vector3::z_axis(), std::f64::consts::FRAC_PI_2);
        let mut values = Vec::new();
        for kind in [RotationKind::SixD, RotationKind::Quaternion, RotationKind::QuaternionWxyz] {
            kind.write(&quarter, &mut values);
        }
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let expected = [0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, half, half, half, 0.0, 0.0, half];
        assert!(values.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{values:?}");
    }

    #[test]
    fn what_is_no_rotation_is_named() {
        let nan = f64::NAN;
        let cases: [(RotationKind, &[f64], &str); 6] = [
            (RotationKind::AxisAngle, &[nan, 0.0, 0.0], "finite"),
            (RotationKind::Quaternion, &[0.0; 4], "zero"),
            (RotationKind::SixD, &[0.0, 0.0, 0.0, 1.0, 0.0, 0.0], "first column"),
            (RotationKind::SixD, &[1.0, 0.0, 0.0, -2.0, 0.0, 0.0], "along the first"),
            (RotationKind::SixD, &[1.0, 0.0, 0.0], "number of values"),
            (RotationKind::None, &[1.0], "number of values"),
        ];
        for (kind, values, named) in cases {
            let error = kind.read(values).expect_err(named);
            assert!(error.contains(named), "{error}");
        }
    }
}
