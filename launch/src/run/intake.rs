//! What comes in from the devices: frames and measured states, each behind its gate, into the ingest.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rtrb::Producer;
use sinew_runtime::ingest::Ingest;
use sinew_runtime::transport::{
    Attachment, Bus, Gate, Keys, Subscription, decode_frame, decode_state,
};
use sinew_runtime::{Clock, JointState, Stamp};

use super::recording::Inputs;
use super::robot::RunError;

/// A camera that is silent for this long may be replaced by another.
const SILENCE: Duration = Duration::from_millis(200);
/// An arm is replaced by another only after the control thread must have missed the first one's states.
const BEYOND_STALE: Duration = Duration::from_millis(50);
/// Time between two complaints about one stream.
const COMPLAINT: Duration = Duration::from_secs(1);

/// Lets the messages of one key in, and complains about the others: once a second, with their number.
struct Door {
    key: String,
    gate: Gate,
    complained: Option<Stamp>,
    unsaid: u64,
}

impl Door {
    fn new(key: &str, silence: Duration, max_age: Duration) -> Mutex<Self> {
        let gate = Gate::new(silence, max_age);
        Mutex::new(Self { key: key.to_owned(), gate, complained: None, unsaid: 0 })
    }

    /// The number of the message, stamped `stamp`; `None` when it is refused.
    fn admit(&mut self, attachment: Option<Attachment>, stamp: Stamp) -> Option<u64> {
        let admitted = self.gate.admit(attachment, stamp, Clock::now());
        admitted.map_err(|why| self.complain(&why)).ok()
    }

    fn complain(&mut self, why: &dyn std::fmt::Display) {
        self.unsaid += 1;
        let now = Clock::now();
        if self.complained.is_none_or(|at| now.since(at) >= COMPLAINT) {
            let refused = std::mem::take(&mut self.unsaid);
            tracing::warn!(key = %self.key, refused, %why, "messages were refused");
            self.complained = Some(now);
        }
    }
}

/// Takes the frames of `cameras` into `ingest`; those older than `max_age` are left out.
pub(super) fn frames(
    bus: &Bus,
    keys: &Keys,
    cameras: &[String],
    max_age: Duration,
    ingest: &Arc<Mutex<Ingest>>,
    recorder: &Inputs,
) -> Result<Vec<Subscription>, RunError> {
    let subscribe = |(index, camera): (usize, &String)| {
        let (ingest, key) = (ingest.clone(), keys.camera(camera));
        let (name, recorder) = (Arc::from(camera.as_str()), recorder.clone());
        let door = Door::new(&key, SILENCE, max_age);
        let subscription = bus.subscribe(&key, move |attachment, payload| {
            let mut door = door.lock().unwrap_or_else(PoisonError::into_inner);
            match decode_frame(payload, 0) {
                Ok(mut frame) => {
                    if let Some(sequence) = door.admit(attachment, frame.stamp) {
                        frame.sequence = sequence;
                        recorder.frame(&name, &frame);
                        ingest
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .on_frame(index, frame);
                    }
                }
                Err(error) => door.complain(&error),
            }
        })?;
        Ok(subscription)
    };
    cameras.iter().enumerate().map(subscribe).collect()
}

/// The measured states' way in, and from there to the control thread once it runs.
pub(super) struct StatesIn {
    pub subscription: Subscription,
    pub to_control: Arc<Mutex<Option<Producer<JointState>>>>,
}

/// Takes the measured states of the joints `names` into `ingest`; those older than `max_age` are left out.
pub(super) fn states(
    bus: &Bus,
    keys: &Keys,
    names: &[String],
    max_age: Duration,
    ingest: &Arc<Mutex<Ingest>>,
    recorder: &Inputs,
) -> Result<StatesIn, RunError> {
    let to_control: Arc<Mutex<Option<Producer<_>>>> = Arc::default();
    let (names, control, ingest) = (names.to_vec(), to_control.clone(), ingest.clone());
    let recorder = recorder.clone();
    let door = Door::new(&keys.state(), max_age + BEYOND_STALE, max_age);
    let subscription = bus.subscribe(&keys.state(), move |attachment, payload| {
        let mut door = door.lock().unwrap_or_else(PoisonError::into_inner);
        match decode_state(&names, payload, 0) {
            Ok(mut state) => {
                let Some(sequence) = door.admit(attachment, state.stamp) else { return };
                state.sequence = sequence;
                recorder.state(&state);
                let taken = ingest.lock().unwrap_or_else(PoisonError::into_inner).on_state(state);
                if let Err(why) = taken {
                    tracing::debug!(%why, "a joint state was left out");
                    return; // counted there; the control thread must not see it either
                }
                if let Some(ring) = &mut *control.lock().unwrap_or_else(PoisonError::into_inner) {
                    // A full ring means that the control thread has newer ones to read first.
                    let _ = ring.push(state);
                }
            }
            Err(error) => door.complain(&error),
        }
    })?;
    Ok(StatesIn { subscription, to_control })
}
