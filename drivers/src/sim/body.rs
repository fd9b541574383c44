//! The arm's body in its description: balls on its links, and planes that it stays clear of.

use nalgebra::{Point3, Unit, Vector3};
use serde::Deserialize;
use sinew_runtime::guard::Plane;
use sinew_runtime::kinematics::Sphere;
use sinew_runtime::units::parse_length;

use super::description::{DescriptionError, value_error, with_key};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SphereText {
    name: String,
    link: usize,
    centre: [String; 3],
    radius: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlaneText {
    name: String,
    normal: [f64; 3],
    offset: String,
}

impl SphereText {
    /// The ball, on one of the links up to `last`.
    pub(super) fn read(&self, last: usize) -> Result<Sphere, DescriptionError> {
        let key = |field: &str| format!("sphere {}.{field}", self.name);
        if self.link > last {
            let reason = format!("`{}` is no link; they are 0 to {last}", self.link);
            return Err(value_error(&key("link"), reason));
        }
        let mut centre = Point3::origin();
        for (value, text) in centre.iter_mut().zip(&self.centre) {
            *value = with_key(&key("centre"), parse_length(text))?;
        }
        let radius = with_key(&key("radius"), parse_length(&self.radius))?;
        if radius < 0.0 {
            return Err(value_error(&key("radius"), format!("`{}` is below zero", self.radius)));
        }
        Ok(Sphere { name: self.name.clone(), link: self.link, centre, radius })
    }
}

impl PlaneText {
    /// The plane.
    pub(super) fn read(&self) -> Result<Plane, DescriptionError> {
        let key = |field: &str| format!("plane {}.{field}", self.name);
        let normal = Unit::try_new(Vector3::from(self.normal), 1e-6);
        let normal = normal.filter(|n| n.iter().all(|v| v.is_finite())).ok_or_else(|| {
            value_error(&key("normal"), format!("{:?} is no direction", self.normal))
        })?;
        let offset = with_key(&key("offset"), parse_length(&self.offset))?;
        Ok(Plane { name: self.name.clone(), normal, offset })
    }
}
