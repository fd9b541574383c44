//! Ingest: the newest sample of each sensor, and observations of one instant made from them.
//!
//! Pure. It never waits for a slow camera: when a part is older than the tolerance, no observation can be
//! made and the reason is named. The observation's instant is that of its *oldest* camera frame (of the
//! newest joint state without cameras); the proprioception is the measured state nearest to that instant,
//! so that images and state belong together.
//!
//! What cannot be is refused and counted, not believed: a joint state that is no number or that jumps farther
//! than the joint can move, and a camera that sends the same picture again and again while the arm moves.

use std::time::Duration;

use crate::{CameraFrame, JointLimits, JointState, JointVec, Observation, ObservedImage, Stamp};

/// Joint states remembered: more than a second at 100 Hz.
const STATES: usize = 128;
/// A camera that repeats its picture for longer than this, while the arm moves, is frozen.
const FROZEN_AFTER: Duration = Duration::from_millis(400);
/// The arm has moved when a joint went this far (rad): a picture of a still arm may stay the same.
const MOVED: f64 = 0.1;
/// A joint state may show this many times the joint's speed limit, and this much (rad) of noise and lag, between
/// two samples.
const JUMP: (f64, f64) = (2.0, 0.1);

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
    /// A camera sends the same picture while the arm moves.
    #[error("camera `{camera}` is frozen: the same picture for {same_ms} ms while the arm moved")]
    FrozenCamera {
        /// The camera.
        camera: String,
        /// How long it has been the same.
        same_ms: u128,
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
    /// Joint states left out because a value was no finite number.
    pub not_finite: u64,
    /// Joint states left out because a joint was farther away than it can have moved.
    pub jumps: u64,
    /// Frames of a camera that was frozen.
    pub frozen: u64,
    last: u64,
}

/// Why a joint state was left out.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum StateRefusal {
    /// A value is no finite number.
    #[error("a position or velocity is no finite number")]
    NotFinite,
    /// Older than one already here, by sequence number or stamp.
    #[error("it is older than the newest")]
    Old,
    /// A joint is farther away than it can have moved.
    #[error("joint {joint} jumped by {jump} rad in {ms} ms")]
    Jump {
        /// Index of the joint.
        joint: usize,
        /// How far (rad).
        jump: f64,
        /// Since the newest state (ms).
        ms: u128,
    },
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
    /// Highest speeds (rad/s); none known, no jump known.
    velocities: Vec<f64>,
    cameras: Vec<CameraIntake>,
    states: std::collections::VecDeque<JointState>,
    state_intake: Intake,
}

/// What is known of one camera.
#[derive(Debug)]
struct CameraIntake {
    name: String,
    newest: Option<CameraFrame>,
    intake: Intake,
    /// When the newest picture was first seen, and where the arm was then.
    since: Stamp,
    arm: Option<JointVec>,
    frozen: bool,
}

impl CameraIntake {
    /// Takes in a frame that came while the arm was at `arm`.
    fn on_frame(&mut self, frame: CameraFrame, arm: Option<JointVec>) {
        if !self.intake.count(frame.sequence) {
            return;
        }
        // Comparing ends at the first byte that differs: cheaper than a hash, and never wrong.
        let same = self.newest.as_ref().is_some_and(|newest| newest.image == frame.image);
        if same {
            let moved = match (&self.arm, &arm) {
                (Some(then), Some(now)) => distance(then, now).1 > MOVED,
                _ => false,
            };
            self.frozen |= moved && frame.stamp.since(self.since) > FROZEN_AFTER;
            self.intake.frozen += u64::from(self.frozen);
        } else {
            (self.since, self.arm, self.frozen) = (frame.stamp, arm, false);
        }
        self.newest = Some(frame);
    }
}

/// The joint that differs most between two positions, and by how much (rad).
fn distance(a: &JointVec, b: &JointVec) -> (usize, f64) {
    let differences = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b).abs());
    differences.enumerate().fold((0, 0.0), |most, d| if d.1 > most.1 { d } else { most })
}

impl Ingest {
    /// Ingest of `cameras`; parts older than `tolerance` make no observation.
    pub fn new(cameras: &[String], tolerance: Duration) -> Self {
        let camera = |name: &String| CameraIntake {
            name: name.clone(),
            newest: None,
            intake: Intake::default(),
            since: Stamp(0),
            arm: None,
            frozen: false,
        };
        Self {
            tolerance,
            velocities: Vec::new(),
            cameras: cameras.iter().map(camera).collect(),
            states: std::collections::VecDeque::with_capacity(STATES),
            state_intake: Intake::default(),
        }
    }

    /// The same, which also knows how fast the arm's joints can move, and so which states cannot be.
    pub fn with_limits(mut self, limits: &[JointLimits]) -> Self {
        self.velocities = limits.iter().map(|l| l.velocity).collect();
        self
    }

    /// Takes in a frame of camera `index` (in the order given to [`Ingest::new`]).
    pub fn on_frame(&mut self, index: usize, frame: CameraFrame) {
        let arm = self.states.back().map(|s| s.position);
        if let Some(camera) = self.cameras.get_mut(index) {
            camera.on_frame(frame, arm);
        }
    }

    /// Takes in a measured state.
    ///
    /// # Errors
    /// [`StateRefusal`] for a state that cannot be; it is counted and left out, here and by whoever asked.
    pub fn on_state(&mut self, state: JointState) -> Result<(), StateRefusal> {
        if !self.state_intake.count(state.sequence) {
            return Err(StateRefusal::Old);
        }
        if !(state.position.is_finite() && state.velocity.is_finite()) {
            self.state_intake.not_finite += 1;
            return Err(StateRefusal::NotFinite);
        }
        if let Some(newest) = self.states.back() {
            if state.stamp < newest.stamp {
                self.state_intake.reordered += 1;
                return Err(StateRefusal::Old);
            }
            let age = state.stamp.since(newest.stamp);
            let moves = state.position.as_slice().iter().zip(newest.position.as_slice());
            for ((joint, (now, then)), fastest) in moves.enumerate().zip(&self.velocities) {
                let jump = (now - then).abs();
                // Whoever has been silent may have moved: a state that stays there is believed in the end.
                if jump > JUMP.0 * fastest * age.as_secs_f64() + JUMP.1 {
                    self.state_intake.jumps += 1;
                    return Err(StateRefusal::Jump { joint, jump, ms: age.as_millis() });
                }
            }
        }
        if self.states.len() == STATES {
            self.states.pop_front();
        }
        self.states.push_back(state);
        Ok(())
    }

    /// The arm was put elsewhere, as a simulator does between scenes: the next state is believed wherever it is.
    pub fn forget_states(&mut self) {
        self.states.clear();
    }

    /// The newest measured state.
    pub fn newest_state(&self) -> Option<&JointState> {
        self.states.back()
    }

    /// The newest frame of every camera that has sent one, with the camera's name.
    pub fn frames(&self) -> impl Iterator<Item = (&str, &CameraFrame)> {
        self.cameras.iter().filter_map(|c| Some((c.name.as_str(), c.newest.as_ref()?)))
    }

    /// Counters: of each camera by name, then of the joint state as `state`.
    pub fn intakes(&self) -> Vec<(String, Intake)> {
        let cameras = self.cameras.iter().map(|c| (c.name.clone(), c.intake));
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
        for CameraIntake { name, newest, since, frozen, .. } in &self.cameras {
            let frame = newest.clone().ok_or_else(|| IngestError::NoFrame(name.clone()))?;
            let age = now.since(frame.stamp);
            if age > self.tolerance {
                let age_ms = age.as_millis();
                return Err(IngestError::StaleFrame { camera: name.clone(), age_ms, limit_ms });
            }
            if *frozen {
                let same_ms = frame.stamp.since(*since).as_millis();
                return Err(IngestError::FrozenCamera { camera: name.clone(), same_ms });
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
        picture(at_ms, sequence, sequence as u8)
    }

    fn picture(at_ms: i64, sequence: u64, grey: u8) -> CameraFrame {
        let image = Image::new(1, 1, vec![grey; 3].into()).expect("one pixel");
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
            ingest.on_state(state(k * 10, k as u64 + 1)).expect("sound");
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
        ingest.on_state(state(0, 1)).expect("sound");
        ingest.on_frame(0, frame(0, 1));
        assert_eq!(ingest.observe("go", Stamp(0)), Err(IngestError::NoFrame("wrist".into())));
        ingest.on_frame(1, frame(150, 1));
        ingest.on_state(state(150, 2)).expect("sound");
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

    /// States whose one joint is at `at`, every 10 ms.
    fn arm_at(at_ms: i64, sequence: u64, at: f64) -> JointState {
        JointState {
            position: JointVec::from_slice(&[at]).expect("one joint"),
            ..state(at_ms, sequence)
        }
    }

    #[test]
    fn a_frozen_camera_is_named_while_the_arm_moves_and_forgiven_when_the_picture_changes() {
        let mut ingest = Ingest::new(&["front".into()], Duration::from_millis(100));
        for k in 0..80u64 {
            let at = k as i64 * 10;
            // The arm moves at 0.5 rad/s; the picture stays after 100 ms.
            ingest.on_state(arm_at(at, k + 1, 0.005 * k as f64)).expect("sound");
            ingest.on_frame(0, picture(at, k + 1, k.min(10) as u8));
            let seen = ingest.observe("go", Stamp(at * MS));
            match k {
                0..=50 => assert!(seen.is_ok(), "{k}: {seen:?}"),
                _ => assert_eq!(
                    seen,
                    Err(IngestError::FrozenCamera {
                        camera: "front".into(),
                        same_ms: (k as u128 - 10) * 10
                    })
                ),
            }
        }
        assert_eq!(ingest.intakes()[0].1.frozen, 29);
        ingest.on_frame(0, picture(800, 81, 99));
        assert!(ingest.observe("go", Stamp(800 * MS)).is_ok());
    }

    #[test]
    fn a_still_arm_may_send_the_same_picture_for_ever() {
        let mut ingest = Ingest::new(&["front".into()], Duration::from_millis(100));
        for k in 0..300u64 {
            ingest
                .on_state(arm_at(k as i64 * 10, k + 1, 0.3 + 1e-3 * (k % 2) as f64))
                .expect("sound");
            ingest.on_frame(0, picture(k as i64 * 10, k + 1, 7));
        }
        assert!(ingest.observe("go", Stamp(2990 * MS)).is_ok());
    }

    #[test]
    fn states_that_cannot_be_are_refused_counted_and_named() {
        let limit =
            JointLimits { lower: -2.0, upper: 2.0, velocity: 3.0, acceleration: 20.0, jerk: 400.0 };
        let mut ingest = ingest().with_limits(&[limit]);
        ingest.on_state(arm_at(0, 1, 0.5)).expect("the first is believed");
        let jump = ingest.on_state(arm_at(10, 2, 1.5)).expect_err("1 rad in 10 ms");
        assert!(matches!(jump, StateRefusal::Jump { joint: 0, ms: 10, .. }), "{jump}");
        assert_eq!(ingest.on_state(arm_at(20, 3, f64::NAN)), Err(StateRefusal::NotFinite));
        assert_eq!(ingest.on_state(arm_at(-5, 4, 0.5)), Err(StateRefusal::Old));
        ingest.on_state(arm_at(30, 5, 0.52)).expect("back where it was");
        assert_eq!(ingest.newest_state().map(|s| s.sequence), Some(5));
        ingest.on_state(arm_at(400, 6, 1.5)).expect("time enough to move there");
        ingest.forget_states();
        ingest.on_state(arm_at(410, 7, -1.5)).expect("the arm was put there");
        let intake = ingest.intakes()[2].1;
        assert_eq!(
            (intake.received, intake.jumps, intake.not_finite, intake.reordered),
            (7, 1, 1, 1)
        );
    }
}
