//! What the parts say of themselves on the bus: JSON, several times a second, under `report/<part>`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sinew_drivers::peer::StreamFigures;
use sinew_runtime::Clock;
use sinew_runtime::transport::{Bus, Keys, Priority, Subscription};

use super::robot::RunError;
use crate::report::SensorFigures;

/// Time between two messages of a part.
const PERIOD: Duration = Duration::from_millis(250);

/// What a part of devices or a policy says of itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PartStatus {
    /// Its process.
    pub process: u32,
    /// An arm: the command stream as it arrived.
    pub stream: Option<StreamFigures>,
    /// A simulated arm: simulated time that was skipped because the host slept too long (ms).
    pub simulation_skipped_ms: Option<f64>,
    /// A policy: what came in from each sensor.
    pub sensors: BTreeMap<String, SensorFigures>,
}

/// What the control process says of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ControlStatus {
    /// Its process.
    pub process: u32,
    /// Who holds authority.
    pub authority: String,
    /// What is followed.
    pub mode: String,
    /// The instruction.
    pub instruction: String,
    /// Chunks played so far.
    pub chunks: u64,
    /// Why the arm is held until a person decides; empty while it is not.
    pub held: String,
}

/// A thread that publishes what a part says of itself.
pub(super) struct StatusPeer {
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StatusPeer {
    /// Publishes what `look` gives as the status of `part`.
    pub fn spawn(
        bus: &Bus,
        keys: &Keys,
        part: &str,
        look: impl Fn() -> PartStatus + Send + 'static,
    ) -> Result<Self, RunError> {
        let publisher = bus.publisher(&keys.report(part), Priority::Data)?;
        let quit = Arc::new(AtomicBool::new(false));
        let seen = quit.clone();
        let body = move || {
            while !seen.load(Ordering::Relaxed) {
                // Plain numbers and names always have a JSON form.
                if let Ok(text) = serde_json::to_vec(&look()) {
                    publisher.put(text, Clock::now());
                }
                std::thread::sleep(PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("status".into()).spawn(body);
        let thread = thread.map_err(|e| RunError::System {
            what: "starting the status thread",
            reason: e.to_string(),
        })?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for StatusPeer {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// The newest word of a part in another process.
pub(super) struct Heard {
    newest: Arc<Mutex<PartStatus>>,
    _subscription: Subscription,
}

impl Heard {
    /// Listens to `part`.
    pub fn of(bus: &Bus, keys: &Keys, part: &str) -> Result<Self, RunError> {
        let newest: Arc<Mutex<PartStatus>> = Arc::default();
        let heard = newest.clone();
        let subscription = bus.subscribe(&keys.report(part), move |_, payload| {
            match serde_json::from_slice(payload) {
                Ok(status) => *heard.lock().unwrap_or_else(PoisonError::into_inner) = status,
                Err(error) => tracing::warn!(%error, "a part's status was left out"),
            }
        })?;
        Ok(Self { newest, _subscription: subscription })
    }

    /// What it last said.
    pub fn newest(&self) -> PartStatus {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
