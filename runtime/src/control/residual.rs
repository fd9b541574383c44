//! A residual policy's correction of the plan, at control rate.
//!
//! A small network beside the control thread looks at the newest measured state and the planned action, and sends
//! offsets (`algorithms`: ResiP 2407.16677, KORR 2509.12562, A2C2 2509.23224: `a = a_base + Δ`, Δ bounded).
//! [`ResidualTrack`] is the control thread's side: a pure state machine that moves the correction towards the newest
//! offset with bounded speed and acceleration, so nothing steps when offsets come, go or jump. An offset
//! that is too old counts no more: the correction goes back to zero the same way, and the plan is executed as it
//! is. What the sum may be is the guard's decision, as ever.

use std::time::Duration;

use crate::{JointLimits, JointVec, MAX_JOINTS, Stamp};

/// A correction uses this share of a joint's speed and acceleration limits; the rest is for the plan.
const MOTION_SHARE: f64 = 0.5;

/// Settings of the residual stage.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ResidualConfig {
    /// Largest correction of each joint (rad).
    pub limit: f64,
    /// An offset whose observation is older than this counts no more.
    pub timeout: Duration,
}

/// What the network is shown: made by the control thread in every cycle in which the plan is executed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResidualInput {
    /// When the state was measured; the offset carries it back.
    pub stamp: Stamp,
    /// Measured positions (rad).
    pub position: JointVec,
    /// Measured velocities (rad/s).
    pub velocity: JointVec,
    /// The plan's position (rad) for this cycle, without a correction.
    pub planned: JointVec,
}

/// The network's answer to one [`ResidualInput`].
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ResidualSample {
    /// Stamp of the state that it was made from.
    pub stamp: Stamp,
    /// Offset of each joint (rad).
    pub offset: JointVec,
}

/// Why a [`ResidualSample`] was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidualRefusal {
    /// The core has no residual stage.
    NotConfigured,
    /// It has not one finite value per joint.
    Invalid,
    /// Its state is not newer than that of the last.
    OutOfOrder,
    /// Its state is older than [`ResidualConfig::timeout`].
    Stale,
}

/// The correction in one control period.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Correction {
    /// Offset (rad).
    pub position: JointVec,
    /// Its velocity (rad/s).
    pub velocity: JointVec,
}

/// Moves the correction towards the newest offset.
///
/// Real time: neither allocates nor fails.
#[derive(Debug, Clone)]
pub struct ResidualTrack {
    config: ResidualConfig,
    speed: [f64; MAX_JOINTS],
    acceleration: [f64; MAX_JOINTS],
    newest: Option<ResidualSample>,
    now: Correction,
}

impl ResidualTrack {
    /// No correction yet; one joint for each of `limits`.
    pub fn new(config: ResidualConfig, limits: &[JointLimits]) -> Self {
        let (mut speed, mut acceleration) = ([0.0; MAX_JOINTS], [0.0; MAX_JOINTS]);
        for (joint, limit) in limits.iter().enumerate().take(MAX_JOINTS) {
            speed[joint] = MOTION_SHARE * limit.velocity;
            acceleration[joint] = MOTION_SHARE * limit.acceleration;
        }
        let zero = JointVec::zeros(limits.len());
        let now = Correction { position: zero, velocity: zero };
        Self { config, speed, acceleration, newest: None, now }
    }

    /// The correction of the last cycle.
    pub fn correction(&self) -> &Correction {
        &self.now
    }

    /// No correction any more, at once: for when the command no longer contains it.
    pub fn reset(&mut self) {
        let zero = JointVec::zeros(self.now.position.len());
        self.now = Correction { position: zero, velocity: zero };
        self.newest = None;
    }

    /// Takes `sample`, which arrived at `now`.
    ///
    /// # Errors
    /// [`ResidualRefusal`]; the correction goes on as if it had not come.
    pub fn on_sample(
        &mut self,
        sample: &ResidualSample,
        now: Stamp,
    ) -> Result<(), ResidualRefusal> {
        if sample.offset.len() != self.now.position.len() || !sample.offset.is_finite() {
            return Err(ResidualRefusal::Invalid);
        }
        if self.newest.is_some_and(|newest| sample.stamp <= newest.stamp) {
            return Err(ResidualRefusal::OutOfOrder);
        }
        if self.is_stale(sample, now) {
            return Err(ResidualRefusal::Stale);
        }
        self.newest = Some(*sample);
        Ok(())
    }

    /// One control period of `period` seconds at `now`. Unless the plan `plays`, the correction goes to zero.
    pub fn tick(&mut self, now: Stamp, period: f64, plays: bool) -> Correction {
        let target = self.newest.filter(|sample| plays && !self.is_stale(sample, now));
        for joint in 0..self.now.position.len() {
            let limit = self.config.limit;
            let target = target.map_or(0.0, |sample| sample.offset[joint].clamp(-limit, limit));
            let (speed, most) = (self.speed[joint], self.acceleration[joint]);
            let (before, velocity) = (self.now.position[joint], self.now.velocity[joint]);
            let gap = target - before;
            let step = most * period;
            // The speed from which braking by `most` ends at the target: v²/2a + v·period = |gap|. As the target
            // lies within the limit, so does every way to it, also when a nearer one comes meanwhile.
            let braking = most * ((period * period + 2.0 * gap.abs() / most).sqrt() - period);
            let wanted = braking.min(speed).copysign(gap);
            let velocity = wanted.clamp(velocity - step, velocity + step);
            self.now.velocity[joint] = velocity;
            self.now.position[joint] = before + velocity * period;
        }
        self.now
    }

    fn is_stale(&self, sample: &ResidualSample, now: Stamp) -> bool {
        // A state from the future is another clock's.
        now.since(sample.stamp) > self.config.timeout
            || sample.stamp.since(now) > self.config.timeout
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERIOD: Duration = Duration::from_millis(10);
    const CONFIG: ResidualConfig =
        ResidualConfig { limit: 0.1, timeout: Duration::from_millis(50) };
    const LIMITS: JointLimits =
        JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 10.0, jerk: 100.0 };

    fn track() -> ResidualTrack {
        ResidualTrack::new(CONFIG, &[LIMITS, LIMITS])
    }

    fn at(cycle: i64) -> Stamp {
        Stamp(1_000_000_000 + cycle * PERIOD.as_nanos() as i64)
    }

    fn sample(cycle: i64, offsets: [f64; 2]) -> ResidualSample {
        let offset = JointVec::from_slice(&offsets).expect("two joints");
        ResidualSample { stamp: at(cycle), offset }
    }

    fn tick(track: &mut ResidualTrack, cycle: i64, plays: bool) -> Correction {
        track.tick(at(cycle), PERIOD.as_secs_f64(), plays)
    }

    #[test]
    fn an_offset_is_reached_and_held_while_it_is_renewed() {
        let mut track = track();
        for cycle in 0..100 {
            track.on_sample(&sample(cycle, [0.05, -0.02]), at(cycle)).expect("fresh");
            tick(&mut track, cycle, true);
        }
        let now = track.correction();
        assert!((now.position[0] - 0.05).abs() < 1e-9 && (now.position[1] + 0.02).abs() < 1e-9);
        assert!(now.velocity[0].abs() < 1e-6);
    }

    #[test]
    fn an_offset_that_turns_stale_goes_to_zero_and_stays_there() {
        let mut track = track();
        for cycle in 0..100 {
            track.on_sample(&sample(cycle, [0.08, 0.0]), at(cycle)).expect("fresh");
            tick(&mut track, cycle, true);
        }
        // Five periods are within the timeout.
        for cycle in 100..105 {
            assert!((tick(&mut track, cycle, true).position[0] - 0.08).abs() < 1e-6);
        }
        for cycle in 105..200 {
            tick(&mut track, cycle, true);
        }
        assert!(track.correction().position[0].abs() < 1e-9);
    }

    #[test]
    fn without_a_playing_plan_the_correction_goes_to_zero() {
        let mut track = track();
        for cycle in 0..200 {
            track.on_sample(&sample(cycle, [0.08, 0.0]), at(cycle)).expect("fresh");
            tick(&mut track, cycle, cycle < 100);
        }
        assert!(track.correction().position[0].abs() < 1e-9);
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let mut track = track();
        let mut refused = |sample: ResidualSample, now| track.on_sample(&sample, now).err();
        assert_eq!(refused(sample(0, [f64::NAN, 0.0]), at(0)), Some(ResidualRefusal::Invalid));
        let short = ResidualSample { stamp: at(0), offset: JointVec::zeros(1) };
        assert_eq!(refused(short, at(0)), Some(ResidualRefusal::Invalid));
        assert_eq!(refused(sample(0, [0.0; 2]), at(6)), Some(ResidualRefusal::Stale));
        assert_eq!(
            refused(sample(9, [0.0; 2]), at(0)),
            Some(ResidualRefusal::Stale),
            "from the future"
        );
        assert_eq!(refused(sample(3, [0.0; 2]), at(4)), None);
        assert_eq!(refused(sample(3, [0.0; 2]), at(4)), Some(ResidualRefusal::OutOfOrder));
        assert_eq!(refused(sample(2, [0.0; 2]), at(4)), Some(ResidualRefusal::OutOfOrder));
    }

    proptest! {
        /// Whatever comes, whenever: bounded, with bounded speed and acceleration, so without a step.
        #[test]
        fn no_offsets_make_a_step(
            events in prop::collection::vec((0i64..9, any::<f64>(), -0.3f64..0.3, any::<bool>()), 1..400)
        ) {
            let mut track = track();
            let (speed, acceleration) = (MOTION_SHARE * LIMITS.velocity, MOTION_SHARE * LIMITS.acceleration);
            let period = PERIOD.as_secs_f64();
            let mut before = *track.correction();
            for (cycle, (age, wild, mild, plays)) in (0i64..).zip(events) {
                if age < 8 {
                    let _ = track.on_sample(&sample(cycle - age, [wild, mild]), at(cycle));
                }
                let now = tick(&mut track, cycle, plays);
                for joint in 0..2 {
                    let (step, change) = (
                        now.position[joint] - before.position[joint],
                        now.velocity[joint] - before.velocity[joint],
                    );
                    prop_assert!(now.position[joint].abs() <= CONFIG.limit + 1e-9);
                    prop_assert!(step.abs() <= speed * period + 1e-12);
                    prop_assert!(change.abs() <= acceleration * period + 1e-12);
                    prop_assert!((step - now.velocity[joint] * period).abs() < 1e-12);
                }
                before = now;
            }
            // And it ends at zero when nothing comes any more.
            for cycle in 1000..1200 {
                tick(&mut track, cycle, true);
            }
            prop_assert!(track.correction().position.as_slice().iter().all(|p| p.abs() < 1e-6));
        }
    }
}
