//! The residual policy's thread: the newest state and planned action in, an offset out, at its own rate.
//!
//! It shares two wait-free rings with the control thread, and nobody waits: what comes late or not at all is left
//! out there by name, and the plan is executed as it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use sinew_models::onnx::ResidualNet;
use sinew_runtime::control::ResidualSample;
use sinew_runtime::stream::ResidualPort;
use sinew_runtime::{Clock, Stamp, rt};

/// Time between two complaints.
const COMPLAINT: Duration = Duration::from_secs(1);

/// The running thread; dropping it ends it.
pub(super) struct ResidualThread {
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ResidualThread {
    /// Starts answering with `net`.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub fn start(net: ResidualNet, port: ResidualPort) -> std::io::Result<Self> {
        let quit = Arc::new(AtomicBool::new(false));
        let ends = quit.clone();
        let thread = std::thread::Builder::new()
            .name("sinew-residual".to_owned())
            .spawn(move || answer(net, port, &ends))?;
        Ok(Self { quit, thread: Some(thread) })
    }
}

impl Drop for ResidualThread {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        // A panic in it has been printed; the control thread goes on with the plan.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn answer(mut net: ResidualNet, mut port: ResidualPort, quit: &AtomicBool) {
    let period = Duration::from_secs_f64(1.0 / net.rate_hz());
    let mut next = Clock::now();
    let (mut complained, mut failures): (Option<Stamp>, u64) = (None, 0);
    while !quit.load(Ordering::Relaxed) {
        // After a long run of the network the next is due at once, but none is made up for.
        next = (next + period).max(Clock::now());
        rt::sleep_until(next);
        let mut newest = None;
        while let Ok(input) = port.inputs.pop() {
            newest = Some(input);
        }
        let Some(input) = newest else { continue };
        match net.correct(&input) {
            // A full ring means that the control thread does not run: it has enough to read.
            Ok(offset) => drop(port.offsets.push(ResidualSample { stamp: input.stamp, offset })),
            Err(why) => {
                failures += 1;
                let now = Clock::now();
                if complained.is_none_or(|at| now.since(at) >= COMPLAINT) {
                    tracing::warn!(failures, %why, "the residual policy gave no offset");
                    (complained, failures) = (Some(now), 0);
                }
            }
        }
    }
}
