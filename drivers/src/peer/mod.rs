//! Devices as peers on the bus: the threads around an [`ArmDriver`](sinew_runtime::ArmDriver) and a
//! [`Camera`](sinew_runtime::Camera). Simulated and real devices run behind the same peers.

mod arm;
mod camera;
mod stats;
mod stop_line;
mod watchdog;

pub use arm::{ArmPeer, ArmPeerConfig};
pub use camera::CameraPeer;
pub use stats::{CommandStats, StreamFigures};
pub use watchdog::{Act, StopCategory, Watchdog, WatchdogConfig, WatchdogState};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A thread that is told to end and joined when dropped.
struct Worker {
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn spawn(name: &str, body: impl FnOnce(&AtomicBool) + Send + 'static) -> std::io::Result<Self> {
        let quit = Arc::new(AtomicBool::new(false));
        let seen = quit.clone();
        let thread =
            std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&seen))?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed; there is nothing left to undo here.
            let _ = thread.join();
        }
    }
}
