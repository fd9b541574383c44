//! Ingest: the newest sample of each sensor, and observations of one instant made from them.
//!
//! Pure. It never waits for a slow camera: when a part is older than the tolerance, no observation can be
//! made and the reason is named. The observation's instant is that of its *oldest* camera frame (of the
//! newest joint state without cameras); the proprioception is the measured state nearest to that instant,
//! so that images and state belong together.

use std::time::Duration;

use crate::{CameraFrame, JointState, Observation, ObservedImage, Stamp};

/// Joint states remembered: more than a second at 100 Hz.
const STATES: usize = 128;

/// Why no observation can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IngestError {
    /// A camera has sent nothing yet.
    #[error("camera `{0}` has sent no frame yet")]
    NoFrame(String),
    /// A camera's newest frame is too old.
    #[error(
        "camera `{camera}` is stale: its newest frame is {age_ms} ms old, {limit_ms} ms are allowed"
    )]
    StaleFrame {
        /// The camera.
        camera: String,
        /// Age of its newest frame.
        age_ms: u128,
        /// The tolerance.
        limit_ms: u128,
    },
    /// No joint state has come yet.
    #[error("the arm has sent no joint state yet")]
    NoState,
    /// The newest joint state is too old.
    #[error("the joint state is stale: {age_ms} ms old, {limit_ms} ms are allowed")]
    StaleState {
        /// Its age.
        age_ms: u128,
        /// The tolerance.
        limit_ms: u128,
    },
}

/// One sensor's intake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Intake {
    /// Messages taken in.
    pub received: u64,
    /// Messages that never came, by sequence number.
    pub lost: u64,
    /// Messages older than one already here.
    pub reordered: u64,
    last: u64,
}

impl Intake {
    /// Counts a message; false when it is older than the newest.
    fn count(&mut self, sequence: u64) -> bool {
        self.received += 1;
        if sequence <= self.last {
            self.reordered += 1;
            return false;
        }
        if self.last > 0 {
            self.lost += sequence - self.last - 1;
        }
        self.last = sequence;
        true
    }
}

/// The newest samples of one robot's sensors.
#[derive(Debug)]
pub struct Ingest {
    tolerance: Duration,
    cameras: Vec<(String, Option<CameraFrame>, Intake)>,
    states: std::collections::VecDeque<JointState>,
    state_intake: Intake,
}

impl Ingest {
    /// Ingest of `cameras`; parts older than `tolerance` make no observation.
    pub fn new(cameras: &[String], tolerance: Duration) -> Self {
        Self {
            tolerance,
            cameras: cameras.iter().map(|n| (n.clone(), None, Intake::default())).collect(),
            states: std::collections::VecDeque::with_capacity(STATES),
            state_intake: Intake::default(),
        }
    }

    /// Takes in a frame of camera `index` (in the order given to [`Ingest::new`]).
    pub fn on_frame(&mut self, index: usize, frame: CameraFrame) {
        if let Some((_, newest, intake)) = self.cameras.get_mut(index)
            && intake.count(frame.sequence)
        {
            *newest = Some(frame);
        }
    }

    /// Takes in a measured state.
    pub fn on_state(&mut self, state: JointState) {
        if self.state_intake.count(state.sequence) {
            if self.states.len() == STATES {
                self.states.pop_front();
            }
            self.states.push_back(state);
        }
    }

    /// The newest measured state.
    pub fn newest_state(&self) -> Option<&JointState> {
        self.states.back()
    }

    /// The newest frame of every camera that has sent one, with the camera's name.
    pub fn frames(&self) -> impl Iterator<Item = (&str, &CameraFrame)> {
        self.cameras.iter().filter_map(|(name, frame, _)| Some((name.as_str(), frame.as_ref()?)))
    }

    /// Counters: of each camera by name, then of the joint state as `state`.
    pub fn intakes(&self) -> Vec<(String, Intake)> {
        let cameras = self.cameras.iter().map(|(name, _, intake)| (name.clone(), *intake));
        cameras.chain([("state".to_owned(), self.state_intake)]).collect()
    }

    /// The observation that can be made at `now`, to follow `instruction`.
    ///
    /// # Errors
    /// [`IngestError`] names the part that is missing or stale.
    pub fn observe(&self, instruction: &str, now: Stamp) -> Result<Observation, IngestError> {
        let newest = self.states.back().ok_or(IngestError::NoState)?;
        let limit_ms = self.tolerance.as_millis();
        let state_age = now.since(newest.stamp);
        if state_age > self.tolerance {
            return Err(IngestError::StaleState { age_ms: state_age.as_millis(), limit_ms });
        }
        let mut images = Vec::with_capacity(self.cameras.len());
        for (name, frame, _) in &self.cameras {
            let frame = frame.clone().ok_or_else(|| IngestError::NoFrame(name.clone()))?;
            let age = now.since(frame.stamp);
            if age > self.tolerance {
                let age_ms = age.as_millis();
                return Err(IngestError::StaleFrame { camera: name.clone(), age_ms, limit_ms });
            }
            images.push(ObservedImage { camera: name.clone(), frame, age });
        }
        let instant = images.iter().map(|i| i.frame.stamp).min().unwrap_or(newest.stamp);
        let distance = |s: &&JointState| (s.stamp.0 - instant.0).abs();
        let state = self.states.iter().min_by_key(distance).unwrap_or(newest);
        Ok(Observation {
            instant,
            images,
            proprioception: state.position.as_slice().to_vec(),
            proprioception_age: now.since(state.stamp),
            instruction: instruction.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Image, JointVec};

    const MS: i64 = 1_000_000;

    fn frame(at_ms: i64, sequence: u64) -> CameraFrame {
        let image = Image::new(1, 1, vec![0u8; 3].into()).expect("one pixel");
        CameraFrame { stamp: Stamp(at_ms * MS), sequence, image }
    }

    fn state(at_ms: i64, sequence: u64) -> JointState {
        let position = JointVec::from_slice(&[at_ms as f64]).expect("one joint");
        JointState { stamp: Stamp(at_ms * MS), sequence, position, velocity: JointVec::zeros(1) }
    }

    fn ingest() -> Ingest {
        Ingest::new(&["front".into(), "wrist".into()], Duration::from_millis(100))
    }

    #[test]
    fn images_and_state_belong_to_one_instant() {
        let mut ingest = ingest();
        for k in 0..20 {
            ingest.on_state(state(k * 10, k as u64 + 1));
        }
        ingest.on_frame(0, frame(150, 1));
        ingest.on_frame(1, frame(182, 1));
        let seen = ingest.observe("go", Stamp(195 * MS)).expect("all is fresh");
        assert_eq!(seen.instant, Stamp(150 * MS));
        assert_eq!(seen.proprioception, [150.0]);
        assert_eq!(seen.images[0].age, Duration::from_millis(45));
        assert_eq!(seen.proprioception_age, Duration::from_millis(45));
    }

    #[test]
    fn a_missing_or_stale_part_is_named() {
        let mut ingest = ingest();
        assert_eq!(ingest.observe("go", Stamp(0)), Err(IngestError::NoState));
        ingest.on_state(state(0, 1));
        ingest.on_frame(0, frame(0, 1));
        assert_eq!(ingest.observe("go", Stamp(0)), Err(IngestError::NoFrame("wrist".into())));
        ingest.on_frame(1, frame(150, 1));
        ingest.on_state(state(150, 2));
        let error = ingest.observe("go", Stamp(150 * MS)).expect_err("front is stale");
        assert!(error.to_string().contains("`front` is stale"), "{error}");
        let error = ingest.observe("go", Stamp(300 * MS)).expect_err("the state is stale");
        assert!(matches!(error, IngestError::StaleState { age_ms: 150, .. }));
    }

    #[test]
    fn gaps_are_counted_and_old_frames_are_dropped() {
        let mut ingest = ingest();
        ingest.on_frame(0, frame(10, 1));
        ingest.on_frame(0, frame(40, 4));
        ingest.on_frame(0, frame(20, 2));
        let intake = ingest.intakes()[0].1;
        assert_eq!((intake.received, intake.lost, intake.reordered), (3, 2, 1));
    }
}
