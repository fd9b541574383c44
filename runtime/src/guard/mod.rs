//! The guard: the last stage before the wire. No command reaches a driver without passing it.
//!
//! It gets the position that the scheduler wants next, and the velocity with which that goes on, and returns the
//! nearest command that keeps every joint inside its limits of position (rad), velocity (rad/s), acceleration
//! (rad/s²) and jerk (rad/s³). These are finite differences of the command stream: what the arm is told, not
//! what a model says of it. With a [`SpaceConfig`] it also keeps the arm's balls inside planes and apart. A wish inside all limits passes unchanged, bit for bit; every change is counted
//! per joint and cause. At any time the guard can brake every joint to rest inside all limits.

mod brake;
mod causes;
mod joint;
mod quadratic;
#[cfg(test)]
mod reference_tests;
mod space;
#[cfg(test)]
mod space_tests;
#[cfg(test)]
mod tests;

pub use causes::{Cause, Interventions};
pub use space::{Plane, SpaceConfig, SpaceError};

use std::time::Duration;

use crate::{JointLimits, JointVec, MAX_JOINTS};
use joint::{JointFilter, Motion};
use space::Space;

/// The guard's setting cannot protect anything.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GuardError {
    /// More joints than [`MAX_JOINTS`], or none.
    #[error("an arm has 1 to {MAX_JOINTS} joints, found {0}")]
    JointCount(usize),
    /// A limit that is not finite, not positive, or an empty range.
    #[error(
        "joint {joint}: {what} is {value}; position limits must be finite with lower < upper, \
         velocity, acceleration and jerk limits finite and above zero"
    )]
    Limit {
        /// Index of the joint.
        joint: usize,
        /// Which limit.
        what: &'static str,
        /// Its value.
        value: f64,
    },
}

/// The guard of one arm: limits and the last command.
///
/// Real time: [`Guard::filter`] and [`Guard::brake`] neither allocate nor lock.
#[derive(Debug, Clone)]
pub struct Guard {
    /// One per joint; those beyond the arm's joints are never looked at.
    filters: [JointFilter; MAX_JOINTS],
    position: JointVec,
    velocity: JointVec,
    space: Option<Box<Space>>,
}

impl Guard {
    /// A guard for joints with `limits`, called once every `period`, at rest at zero.
    ///
    /// # Errors
    /// [`GuardError`] for limits that cannot protect.
    pub fn new(limits: &[JointLimits], period: Duration) -> Result<Self, GuardError> {
        if limits.is_empty() || limits.len() > MAX_JOINTS {
            return Err(GuardError::JointCount(limits.len()));
        }
        for (joint, limit) in limits.iter().enumerate() {
            let bad = |what, value| Err(GuardError::Limit { joint, what, value });
            if !limit.lower.is_finite() {
                return bad("lower position", limit.lower);
            }
            if !limit.upper.is_finite() || limit.upper <= limit.lower {
                return bad("upper position", limit.upper);
            }
            let rates = [
                ("velocity", limit.velocity),
                ("acceleration", limit.acceleration),
                ("jerk", limit.jerk),
            ];
            for (what, value) in rates {
                if !value.is_finite() || value <= 0.0 {
                    return bad(what, value);
                }
            }
        }
        let period = period.as_secs_f64();
        let filter = |joint: usize| JointFilter::new(limits[joint.min(limits.len() - 1)], period);
        let zeros = JointVec::zeros(limits.len());
        Ok(Self {
            filters: std::array::from_fn(filter),
            position: zeros,
            velocity: zeros,
            space: None,
        })
    }

    /// The same guard, which also keeps the arm in `space`.
    ///
    /// # Errors
    /// [`SpaceError`] for a space that cannot be guarded.
    pub fn with_space(mut self, space: SpaceConfig) -> Result<Self, SpaceError> {
        self.space = Some(Box::new(Space::new(space, &self.position)?));
        Ok(self)
    }

    /// Starts from rest at `position` (rad), the measured one. Values that are not finite are left out.
    pub fn rebase(&mut self, position: &JointVec) {
        for (joint, value) in position.as_slice().iter().enumerate().take(self.position.len()) {
            if value.is_finite() {
                self.filters[joint].rest_at(*value);
                self.position[joint] = *value;
                self.velocity[joint] = 0.0;
            }
        }
        if let Some(space) = &mut self.space {
            space.rest_at(&self.position);
        }
    }

    /// Position (rad) of the last command.
    pub fn position(&self) -> &JointVec {
        &self.position
    }

    /// Velocity (rad/s) of the last command.
    pub fn velocity(&self) -> &JointVec {
        &self.velocity
    }

    /// Acceleration (rad/s²) of the last command.
    pub fn acceleration(&self) -> JointVec {
        let mut out = JointVec::zeros(self.position.len());
        for (value, filter) in out.as_mut_slice().iter_mut().zip(&self.filters) {
            *value = filter.motion().acceleration;
        }
        out
    }

    /// True when the last command stood still and nothing was under way.
    pub fn at_rest(&self) -> bool {
        self.filters[..self.position.len()].iter().all(JointFilter::at_rest)
    }

    /// The nearest safe command to `wish` (rad), moving at `wish_velocity` (rad/s), one period on.
    pub fn filter(&mut self, wish: &JointVec, wish_velocity: &JointVec) -> Interventions {
        let mut changed = Interventions::default();
        let joints = self.position.len();
        let mut next = [Motion::default(); MAX_JOINTS];
        let mut wishes = [None; MAX_JOINTS];
        for (joint, filter) in self.filters[..joints].iter().enumerate() {
            let wished =
                |of: &JointVec| of.as_slice().get(joint).copied().filter(|v| v.is_finite());
            let (Some(p), Some(v)) = (wished(wish), wished(wish_velocity)) else {
                changed.add(joint, Cause::NotFinite);
                next[joint] = filter.braked();
                continue;
            };
            let step = filter.step(p, v);
            if step.position_held {
                changed.add(joint, Cause::Position);
            }
            if let Some(cause) = step.broken {
                changed.add(joint, cause);
            }
            (next[joint], wishes[joint]) = (step.motion, Some((p, v)));
        }
        if let Some(space) = &mut self.space {
            space.shape(&self.filters[..joints], &wishes, &mut next, &mut changed);
        }
        self.accept(&next, &wishes);
        changed
    }

    /// Brakes every joint towards rest, as fast as its limits allow.
    pub fn brake(&mut self) {
        let next = std::array::from_fn(|joint| self.filters[joint].braked());
        self.accept(&next, &[None; MAX_JOINTS]);
    }

    fn accept(&mut self, next: &[Motion; MAX_JOINTS], wishes: &[Option<(f64, f64)>; MAX_JOINTS]) {
        for joint in 0..self.position.len() {
            self.filters[joint].accept(next[joint], wishes[joint].map(|w| w.1));
            self.position[joint] = next[joint].position;
            self.velocity[joint] = next[joint].velocity;
        }
        if let Some(space) = &mut self.space {
            space.moved(&self.position);
        }
    }
}
