//! A camera as a peer: one thread that captures on an absolute clock and publishes.

use std::sync::atomic::Ordering;

use sinew_runtime::transport::{Bus, BusError, Keys, Priority, encode_frame};
use sinew_runtime::{Camera, Clock, DeviceError, rt};

use super::Worker;

/// A camera on the bus; dropping it ends its thread.
pub struct CameraPeer {
    _worker: Worker,
}

impl CameraPeer {
    /// Puts `camera` on the bus as `name`.
    ///
    /// # Errors
    /// [`BusError`] when the key cannot be declared or no thread can be started.
    pub fn spawn(
        mut camera: Box<dyn Camera>,
        name: &str,
        keys: &Keys,
        bus: &Bus,
    ) -> Result<Self, BusError> {
        let key = keys.camera(name);
        let publisher = bus.publisher(&key, Priority::Data)?;
        let name = name.to_owned();
        let worker = Worker::spawn(&format!("camera-{name}"), move |quit| {
            let period = camera.frame_period();
            let mut next = Clock::now();
            let mut failing = false;
            while !quit.load(Ordering::Relaxed) {
                match camera.capture() {
                    Ok(frame) => {
                        let stamp = frame.stamp;
                        publisher.put(encode_frame(&name, &frame), stamp);
                        failing = false;
                    }
                    Err(DeviceError { device, reason }) => {
                        // Said once; ingest reports how stale the camera is.
                        if !std::mem::replace(&mut failing, true) {
                            tracing::warn!(camera = %device, %reason, "no frame");
                        }
                    }
                }
                next = (next + period).max(Clock::now());
                rt::sleep_until(next);
            }
        })
        .map_err(|e| BusError::Refused { key, reason: e.to_string() })?;
        Ok(Self { _worker: worker })
    }
}
