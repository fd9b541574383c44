//! What a teleop device's samples want of the arm: the clutch, the line between two samples, staleness.
//!
//! A pure state machine on the control thread. At take-over the device's pose is aligned with the present
//! command (the clutch), so nothing jumps, and a motion that was under way glides out. Between two samples the
//! wish moves on a line that takes one sample interval. Silence stops the arm; after silence the clutch closes
//! anew, because the device may have moved meanwhile.

use std::time::Duration;

use crate::arbiter::Source;
use crate::{JointLimits, JointVec, MAX_JOINTS, Stamp};

/// A glide uses this share of a joint's acceleration limit; the rest is for the device's own motion.
const GLIDE_SHARE: f64 = 0.5;

/// Settings of teleoperation.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TeleopConfig {
    /// A sample older than this moves nothing.
    pub timeout: Duration,
    /// The offset of the clutch shrinks at this speed (rad/s) until device and arm agree; zero: it stays.
    pub align_speed: f64,
    /// Largest correction (rad) of the policy's wish in `Shared`.
    pub correction: f64,
}

impl Default for TeleopConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_millis(150), align_speed: 0.0, correction: 0.15 }
    }
}

/// What a sample asks for, one value per joint.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeleopTarget {
    /// The device's joint positions (rad); the arm follows their changes.
    Position(JointVec),
    /// Joint velocities (rad/s): jog.
    Velocity(JointVec),
}

/// One sample of a teleop device.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TeleopSample {
    /// The device.
    pub source: Source,
    /// When it was measured (clock of the device's host).
    pub stamp: Stamp,
    /// Counts the device's samples, from 1.
    pub sequence: u64,
    /// When it reached the runtime.
    pub arrived: Stamp,
    /// What it asks for.
    pub target: TeleopTarget,
}

/// Why a sample moved nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SampleRefusal {
    /// Its device holds no lease.
    NoLease,
    /// It has not one finite value per joint.
    Invalid,
    /// It is not newer than the last.
    OutOfOrder,
    /// It was under way for too long.
    Stale,
}

/// What the device wants in one control period.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Follow {
    /// Teleop: position (rad). Shared: correction (rad).
    pub position: JointVec,
    /// Its velocity (rad/s).
    pub velocity: JointVec,
}

/// Follows one device from take-over to the end of its lease.
#[derive(Debug, Clone)]
pub(super) struct TeleopTrack {
    config: TeleopConfig,
    joints: usize,
    acceleration: [f64; MAX_JOINTS],
    /// The wish is a correction around zero, bounded; otherwise a position.
    shared: bool,
    sequence: u64,
    /// Smallest (arrival - stamp) so far: the two clocks' difference plus the fastest way.
    least_delay: Option<i64>,
    /// When the newest sample was fresh, by our clock.
    newest: Option<Stamp>,
    /// Arrival of a sample that no cycle has followed yet.
    arrived: Option<Stamp>,
    clutch: Option<Clutch>,
    wish: Follow,
}

/// Device and arm are coupled.
#[derive(Debug, Clone, Copy)]
struct Clutch {
    target: TeleopTarget,
    /// Command minus the device's position (rad).
    offset: JointVec,
    /// Seconds until the wish should be at the target.
    left: f64,
    /// What is left of the motion at take-over (rad/s).
    glide: JointVec,
    /// Stamp of the sample, for the interval to the next.
    stamp: Stamp,
}

impl TeleopTrack {
    pub fn new(config: TeleopConfig, limits: &[JointLimits]) -> Self {
        let mut acceleration = [0.0; MAX_JOINTS];
        for (stored, limit) in acceleration.iter_mut().zip(limits) {
            *stored = limit.acceleration;
        }
        let zero = JointVec::zeros(limits.len());
        Self {
            config,
            joints: limits.len(),
            acceleration,
            shared: false,
            sequence: 0,
            least_delay: None,
            newest: None,
            arrived: None,
            clutch: None,
            wish: Follow { position: zero, velocity: zero },
        }
    }

    /// A new lease: nothing is followed until its first sample.
    pub fn begin(&mut self, shared: bool) {
        let zero = JointVec::zeros(self.joints);
        self.shared = shared;
        (self.sequence, self.least_delay, self.newest) = (0, None, None);
        (self.arrived, self.clutch) = (None, None);
        self.wish = Follow { position: zero, velocity: zero };
    }

    /// The present correction (rad, rad/s) in `Shared`; zero otherwise.
    pub fn correction(&self) -> Follow {
        if self.shared {
            return self.wish;
        }
        let zero = JointVec::zeros(self.joints);
        Follow { position: zero, velocity: zero }
    }

    /// A sample of the lease's holder, while the arm is commanded to `command` (rad) at `rate` (rad/s).
    pub fn on_sample(
        &mut self,
        sample: &TeleopSample,
        command: &JointVec,
        rate: &JointVec,
    ) -> Result<(), SampleRefusal> {
        let (TeleopTarget::Position(values) | TeleopTarget::Velocity(values)) = &sample.target;
        if values.len() != self.joints || !values.is_finite() {
            return Err(SampleRefusal::Invalid);
        }
        if sample.sequence <= self.sequence {
            return Err(SampleRefusal::OutOfOrder);
        }
        self.sequence = sample.sequence;
        // Two hosts' clocks may differ; a sample is late by how much longer it took than the fastest did.
        let delay = sample.arrived.0.saturating_sub(sample.stamp.0);
        let least = self.least_delay.map_or(delay, |l| l.min(delay));
        self.least_delay = Some(least);
        let fresh = sample.arrived - Duration::from_nanos(delay.saturating_sub(least) as u64);
        if sample.arrived.since(fresh) > self.config.timeout {
            return Err(SampleRefusal::Stale);
        }
        let silent = self.newest.is_none_or(|n| sample.arrived.since(n) > self.config.timeout);
        self.newest = Some(fresh);
        self.arrived.get_or_insert(sample.arrived);
        match &mut self.clutch {
            Some(clutch) if !silent && same_kind(&clutch.target, &sample.target) => {
                let interval = sample.stamp.since(clutch.stamp).min(self.config.timeout);
                clutch.left = interval.as_secs_f64();
                (clutch.target, clutch.stamp) = (sample.target, sample.stamp);
            }
            _ => self.engage(sample, command, rate),
        }
        Ok(())
    }

    /// Closes the clutch: the device's pose now means the present wish.
    fn engage(&mut self, sample: &TeleopSample, command: &JointVec, rate: &JointVec) {
        let zero = JointVec::zeros(self.joints);
        let mut glide = zero;
        if !self.shared {
            self.wish = Follow { position: *command, velocity: *rate };
            glide = *rate;
        }
        let mut offset = zero;
        if let TeleopTarget::Position(position) = &sample.target {
            for joint in 0..self.joints {
                offset[joint] = self.wish.position[joint] - position[joint];
            }
        }
        let (target, stamp) = (sample.target, sample.stamp);
        self.clutch = Some(Clutch { target, offset, left: 0.0, glide, stamp });
    }

    /// One control period of `period` seconds at `now`; none while nothing fresh is there to follow.
    pub fn tick(&mut self, now: Stamp, period: f64) -> Option<Follow> {
        let fresh = self.newest.is_some_and(|n| now.since(n) <= self.config.timeout);
        let Some(clutch) = self.clutch.as_mut().filter(|_| fresh) else {
            self.clutch = None;
            self.wish.velocity = JointVec::zeros(self.joints);
            // A correction that stands still stays; a position is left to the brake.
            return self.shared.then_some(self.wish);
        };
        let bound = if self.shared { self.config.correction } else { f64::INFINITY };
        for joint in 0..self.joints {
            let before = self.wish.position[joint];
            let glide = clutch.glide[joint];
            let slower = GLIDE_SHARE * self.acceleration[joint] * period;
            let glide = glide - glide.clamp(-slower, slower);
            clutch.glide[joint] = glide;
            let own = match &clutch.target {
                TeleopTarget::Velocity(velocity) => velocity[joint] * period,
                TeleopTarget::Position(position) => {
                    let step = self.config.align_speed * period;
                    let offset = clutch.offset[joint];
                    clutch.offset[joint] = offset - offset.clamp(-step, step) + glide * period;
                    let gap = position[joint] + offset - before;
                    if clutch.left > period { gap * period / clutch.left } else { gap }
                }
            };
            let position = (before + own + glide * period).clamp(-bound, bound);
            self.wish.velocity[joint] = (position - before) / period;
            self.wish.position[joint] = position;
        }
        clutch.left = (clutch.left - period).max(0.0);
        Some(self.wish)
    }

    /// Arrival of the first sample that this cycle is the first to follow.
    pub fn take_arrival(&mut self) -> Option<Stamp> {
        self.arrived.take()
    }

    /// The guard went to `position` (rad) instead: a jog goes on from there.
    pub fn on_command(&mut self, position: &JointVec) {
        let jog = self.clutch.is_some_and(|c| matches!(c.target, TeleopTarget::Velocity(_)));
        if jog && !self.shared {
            self.wish.position = *position;
        }
    }
}

fn same_kind(a: &TeleopTarget, b: &TeleopTarget) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}
