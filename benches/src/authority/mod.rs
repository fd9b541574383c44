//! How long a confirmed stop and a take-over by a person take: on loopback, with real zenoh sessions and threads.
//!
//! A stop lasts from the question of a third session until the runtime's arbiter and every driver have said that
//! they latched it. The round trip beside it, in the same run, is the same question to the same sessions with
//! nothing behind it. A take-over lasts from the arrival of a device's sample to the first command that follows it.

mod rig;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use sinew_runtime::arbiter::{LeaseMode, Source};
use sinew_runtime::operator::{self, TeleopDevice};
use sinew_runtime::stream::StreamReport;
use sinew_runtime::transport::Subscription;
use sinew_runtime::{Clock, JointVec};

pub use rig::{Driver, Rig, RigConfig, RigError, Runtime, Told};

use crate::Spread;

const PATIENCE: Duration = Duration::from_secs(5);

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AuthorityCase {
    /// The robot.
    pub rig: RigConfig,
    /// Stops.
    pub stops: usize,
    /// Take-overs.
    pub takeovers: usize,
}

/// Times of stops and take-overs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuthorityProfile {
    /// Control period (ms).
    pub period_ms: f64,
    /// Drivers that confirm a stop, beside the runtime.
    pub drivers: usize,
    /// Stops made.
    pub stops: usize,
    /// Stops that not everybody confirmed in time.
    pub unconfirmed: usize,
    /// From the question to the last confirmation (ms).
    pub stop_ms: Spread,
    /// To the slowest driver's confirmation (ms).
    pub stop_drivers_ms: Spread,
    /// The same question with nothing behind it (ms).
    pub round_trip_ms: Spread,
    /// One control period and the round trip's 99 % (ms): what the stop's 99 % is held against.
    pub stop_bound_ms: f64,
    /// Take-overs made.
    pub takeovers: usize,
    /// From a sample's arrival to the first command that follows it (control periods).
    pub takeover_periods: Spread,
    /// From the device's request to the first command of the arm that follows it (ms).
    pub takeover_end_to_end_ms: Spread,
    /// How late the control thread woke up in this run (ms).
    pub lateness_ms: Spread,
}

impl AuthorityProfile {
    /// Every stop was confirmed, and the 99 % within one control period and the round trip.
    pub fn stops_in_time(&self) -> bool {
        self.unconfirmed == 0 && self.stop_ms.p99 <= self.stop_bound_ms
    }
}

/// Runs `case`.
///
/// # Errors
/// [`RigError`] when the robot does not run, or nobody answers.
pub fn measure(case: &AuthorityCase) -> Result<AuthorityProfile, RigError> {
    let mut rig = Rig::start(case.rig)?;
    let person = rig.visitor()?;
    let who = Source::literal("person");
    let _echoes = echoes(&rig)?;
    // The first round lets the sessions find each other.
    operator::stop(&person, &rig.keys, who, &[], PATIENCE)?;
    operator::reset(&person, &rig.keys, who, &[], PATIENCE)?;
    let parts = case.rig.drivers + 1;
    rig.wait_for("an echo of every part", |_| echo(&person, parts).is_ok_and(|t| t.is_some()))?;

    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let mut lateness = Vec::new();
    let (mut stops, mut drivers, mut trips) = (Vec::new(), Vec::new(), Vec::new());
    let mut unconfirmed = 0;
    for _ in 0..case.stops {
        std::thread::sleep(case.rig.period.mul_f64(1.0 + dice.share()));
        trips.extend(echo(&person, parts)?.map(ms));
        std::thread::sleep(case.rig.period.mul_f64(dice.share()));
        let found = operator::stop(&person, &rig.keys, who, &[], PATIENCE)?;
        unconfirmed += usize::from(!found.complete() || found.parts.len() != parts);
        stops.push(ms(found.took));
        let of_drivers = found.parts.iter().filter(|p| p.ack.drivers.is_empty());
        drivers.extend(of_drivers.map(|p| ms(p.after)).reduce(f64::max));
        operator::reset(&person, &rig.keys, who, &[], PATIENCE)?;
        drain(&mut rig, &mut lateness);
    }

    let device = TeleopDevice::new(&person, &rig.keys, Source::literal("device"), &rig.joints)?;
    if !device.wait_for_runtime(&person, PATIENCE) {
        return Err(RigError::Silent("a runtime that listens for samples"));
    }
    let mut jog = JointVec::zeros(1);
    let (mut periods, mut end_to_end) = (Vec::new(), Vec::new());
    for k in 0..case.takeovers {
        std::thread::sleep(case.rig.period.mul_f64(1.0 + dice.share()));
        rig.drivers.iter().for_each(|d| d.told().moved = None);
        drain(&mut rig, &mut lateness);
        // To and fro, so that the arm stays where it is.
        jog[0] = if k % 2 == 0 { 0.2 } else { -0.2 };
        let start = Clock::now();
        device.take(LeaseMode::Teleop, 1, Duration::from_millis(300));
        device.jog(&jog);
        rig.wait_for("a motion of every arm", |rig| {
            rig.drivers.iter().all(|d| d.told().moved.is_some())
        })?;
        let moved = rig.drivers.iter().filter_map(|d| d.told().moved).max();
        end_to_end.extend(moved.map(|m| ms(m.since(start))));
        device.release(false);
        rest(&rig)?;
        for delay in drain(&mut rig, &mut lateness) {
            periods.push(delay.as_secs_f64() / case.rig.period.as_secs_f64());
        }
    }
    let spread = |samples| Spread::of(samples).ok_or(RigError::Silent("a single measurement"));
    let round_trip_ms = spread(trips)?;
    Ok(AuthorityProfile {
        period_ms: ms(case.rig.period),
        drivers: case.rig.drivers,
        stops: stops.len(),
        unconfirmed,
        stop_ms: spread(stops)?,
        stop_drivers_ms: spread(drivers)?,
        round_trip_ms,
        stop_bound_ms: ms(case.rig.period) + round_trip_ms.p99,
        takeovers: periods.len(),
        takeover_periods: spread(periods)?,
        takeover_end_to_end_ms: spread(end_to_end)?,
        lateness_ms: spread(lateness)?,
    })
}

/// Waits until every arm has been told the same place four times: commands may come late on a busy host.
fn rest(rig: &Rig) -> Result<(), RigError> {
    let look = |rig: &Rig| -> Vec<(u64, f64)> {
        rig.drivers.iter().map(|d| (d.told().writes, d.told().position)).collect()
    };
    let mut since = look(rig);
    rig.wait_for("the arms' rest", |rig| {
        let now = look(rig);
        if now.iter().zip(&since).any(|(n, s)| n.1 != s.1) {
            since = now;
            return false;
        }
        now.iter().zip(&since).all(|(n, s)| n.0 >= s.0 + 4)
    })
}

/// Reads the control thread's reports: its lateness, and the delays of samples that it began to follow.
fn drain(rig: &mut Rig, lateness: &mut Vec<f64>) -> Vec<Duration> {
    let mut delays = Vec::new();
    while let Some(report) = rig.runtime.as_mut().and_then(Runtime::report) {
        if let StreamReport::Cycle(cycle) = report {
            lateness.push(ms(cycle.lateness));
            delays.extend(cycle.teleop_delay);
        }
    }
    delays
}

/// An answering service in every session that confirms a stop.
fn echoes(rig: &Rig) -> Result<Vec<Subscription>, RigError> {
    let runtime = rig.runtime.iter().map(Runtime::bus);
    let sessions = rig.drivers.iter().map(Driver::bus).chain(runtime);
    sessions.map(|bus| Ok(bus.serve(ECHO, |asked| Ok(asked.to_vec()))?)).collect()
}

const ECHO: &str = "rig/echo";

/// Time until all `parts` have echoed; none when some did not.
fn echo(bus: &sinew_runtime::transport::Bus, parts: usize) -> Result<Option<Duration>, RigError> {
    let (start, mut heard) = (Instant::now(), 0);
    bus.ask_all(ECHO, vec![7; 24], Duration::from_millis(250), |_| {
        heard += 1;
        if heard == parts { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok((heard == parts).then(|| start.elapsed()))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Random phases, so that events fall anywhere in a control period.
struct Dice(u64);

impl Dice {
    fn share(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}
