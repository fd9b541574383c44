//! The person's side: a confirmed stop, a reset, requests for authority, a teleop device.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::arbiter::{LeaseMode, Source};
use crate::control::TeleopTarget;
use crate::transport::{
    AuthorityAsk, AuthorityMessage, AuthorityStatus, Bus, BusError, Keys, Priority, Publisher,
    RUNTIME, StopAck, StopMessage, encode_teleop,
};
use crate::{Clock, JointVec, Stamp};

/// Whoever has not answered by then is asked again: he may only just have been found.
const ROUND: Duration = Duration::from_millis(250);

/// In place of a robot's name: every robot that can be reached.
pub const EVERY_ROBOT: &str = "*";

/// One part's word, and how long it took from the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmed {
    /// What it said.
    pub ack: StopAck,
    /// From the question to its answer.
    pub after: Duration,
}

/// Who confirmed a stop or a reset.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Confirmation {
    /// Those who did, in the order of their answers.
    pub parts: Vec<Confirmed>,
    /// Those who should have.
    pub missing: Vec<String>,
    /// Reasons of those who refused.
    pub refused: Vec<String>,
    /// From the question to the last answer that was needed; with `missing`: how long was waited.
    pub took: Duration,
}

impl Confirmation {
    /// True when everybody did it, without a fault.
    pub fn complete(&self) -> bool {
        self.missing.is_empty()
            && self.refused.is_empty()
            && self.parts.iter().all(|p| p.ack.fault.is_none())
    }

    fn has(&self, robot: &str, part: &str) -> bool {
        self.parts.iter().any(|p| p.ack.robot == robot && p.ack.part == part)
    }

    /// Who has not answered, as `robot/part`: of each robot its runtime, the drivers that this names, and those
    /// that the caller knows of.
    fn lacking(&self, robot: &str, expected: &[String]) -> Vec<String> {
        let mut robots: Vec<&str> = self.parts.iter().map(|p| p.ack.robot.as_str()).collect();
        if robot != EVERY_ROBOT || robots.is_empty() {
            robots.push(robot);
        }
        robots.sort_unstable();
        robots.dedup();
        let mut lacking = Vec::new();
        for robot in robots {
            let own = self.parts.iter().filter(|p| p.ack.robot == robot);
            let named = own.flat_map(|p| &p.ack.drivers).chain(expected).map(String::as_str);
            let needed = std::iter::once(RUNTIME).chain(named);
            lacking.extend(
                needed.filter(|part| !self.has(robot, part)).map(|part| format!("{robot}/{part}")),
            );
        }
        lacking.sort();
        lacking.dedup();
        lacking
    }
}

/// Stops the robot of `keys` and waits until the runtime, every driver that it names and `expected` have latched.
///
/// # Errors
/// [`BusError`] when the bus cannot be asked; who did not answer is in the confirmation.
pub fn stop(
    bus: &Bus,
    keys: &Keys,
    source: Source,
    expected: &[String],
    timeout: Duration,
) -> Result<Confirmation, BusError> {
    confirm(bus, &keys.stop(), keys.robot(), source, expected, timeout)
}

/// Unlatches a stop, as [`stop`] latches it; authority is `hold` afterwards.
///
/// # Errors
/// As [`stop`].
pub fn reset(
    bus: &Bus,
    keys: &Keys,
    source: Source,
    expected: &[String],
    timeout: Duration,
) -> Result<Confirmation, BusError> {
    confirm(bus, &keys.reset(), keys.robot(), source, expected, timeout)
}

fn confirm(
    bus: &Bus,
    key: &str,
    robot: &str,
    source: Source,
    expected: &[String],
    timeout: Duration,
) -> Result<Confirmation, BusError> {
    let start = Instant::now();
    let payload = json(&StopMessage { source });
    let mut found = Confirmation::default();
    loop {
        let left = timeout.saturating_sub(start.elapsed()).min(ROUND);
        bus.ask_all(key, payload.clone(), left, |reply| {
            match reply.map(|bytes| serde_json::from_slice::<StopAck>(&bytes)) {
                Ok(Ok(ack)) if !found.has(&ack.robot, &ack.part) => {
                    found.parts.push(Confirmed { ack, after: start.elapsed() });
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => found.refuse(format!("an answer that is none: {error}")),
                Err(reason) => found.refuse(reason),
            }
            let done = found.lacking(robot, expected).is_empty();
            if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        found.took = start.elapsed();
        found.missing = found.lacking(robot, expected);
        if found.missing.is_empty() || found.took >= timeout {
            return Ok(found);
        }
        // Who refused may change his mind: too many questions were open, or the driver's device was away.
        found.refused.clear();
    }
}

impl Confirmation {
    fn refuse(&mut self, reason: String) {
        if !self.refused.contains(&reason) {
            self.refused.push(reason);
        }
    }
}

/// Asks the runtime for authority, or with [`AuthorityAsk::Status`] who holds it.
///
/// # Errors
/// [`BusError::Denied`] with the arbiter's reason; [`BusError::Refused`] when nobody answers.
pub fn ask(
    bus: &Bus,
    keys: &Keys,
    source: Source,
    request: AuthorityAsk,
    timeout: Duration,
) -> Result<AuthorityStatus, BusError> {
    let key = keys.authority();
    let answer = bus.query(&key, json(&AuthorityMessage { source, request }), timeout)?;
    serde_json::from_slice(&answer)
        .map_err(|e| BusError::Refused { key, reason: format!("an answer that is none: {e}") })
}

/// A teleop device's end of the bus.
pub struct TeleopDevice {
    source: Source,
    joints: Vec<String>,
    samples: Publisher,
    requests: Publisher,
}

impl TeleopDevice {
    /// The device `source`, for an arm with `joints`.
    ///
    /// # Errors
    /// [`BusError`] when a key cannot be declared.
    pub fn new(
        bus: &Bus,
        keys: &Keys,
        source: Source,
        joints: &[String],
    ) -> Result<Self, BusError> {
        Ok(Self {
            source,
            joints: joints.to_vec(),
            samples: bus.publisher(&keys.teleop(), Priority::RealTime)?,
            requests: bus.publisher(&keys.authority(), Priority::Urgent)?,
        })
    }

    /// Asks for the arm without waiting for the answer; samples may follow at once.
    pub fn take(&self, mode: LeaseMode, priority: u8, lease: Duration) {
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        self.request(AuthorityAsk::Take { mode, priority, lease_ms });
    }

    /// Says that the device is still there.
    pub fn renew(&self) {
        self.request(AuthorityAsk::Renew);
    }

    /// Gives the arm back.
    pub fn release(&self, to_policy: bool) {
        self.request(AuthorityAsk::Release { to_policy });
    }

    /// Sends the device's joint positions (rad).
    pub fn position(&self, position: &JointVec) -> Stamp {
        self.send(&TeleopTarget::Position(*position))
    }

    /// Sends joint velocities (rad/s).
    pub fn jog(&self, velocity: &JointVec) -> Stamp {
        self.send(&TeleopTarget::Velocity(*velocity))
    }

    /// Waits until a runtime listens for samples and requests, at most `timeout`.
    pub fn wait_for_runtime(&self, bus: &Bus, timeout: Duration) -> bool {
        bus.wait_for_subscriber(&self.samples, timeout)
            && bus.wait_for_subscriber(&self.requests, timeout)
    }

    fn send(&self, target: &TeleopTarget) -> Stamp {
        let now = Clock::now();
        self.samples.put(encode_teleop(&self.joints, self.source, target, now), now);
        now
    }

    fn request(&self, request: AuthorityAsk) {
        self.requests.put(json(&AuthorityMessage { source: self.source, request }), Clock::now());
    }
}

fn json<T: serde::Serialize>(message: &T) -> Vec<u8> {
    // Names and numbers always have a JSON form; an empty payload would be refused by the other side.
    serde_json::to_vec(message).unwrap_or_default()
}
