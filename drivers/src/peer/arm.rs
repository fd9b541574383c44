//! An arm as a peer: follows commands from the bus under its own watchdog, publishes measured state,
//! and measures the command stream where it matters: at the driver's side.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sinew_runtime::telemetry::{Latencies, Quantiles};
use sinew_runtime::transport::{
    Attachment, Bus, BusError, Keys, Priority, Subscription, decode_command, encode_state,
};
use sinew_runtime::{ArmDriver, Clock, Command, Stamp};

use super::{Watchdog, WatchdogConfig, Worker};

/// Commands that may wait for the arm; the oldest is dropped when it is full.
const QUEUE: usize = 64;

/// Settings of an arm's peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmPeerConfig {
    /// Time between two measured states.
    pub state_period: Duration,
    /// The period that commands are expected at.
    pub command_period: Duration,
    /// The watchdog's settings.
    pub watchdog: WatchdogConfig,
}

/// The command stream as it arrived.
#[derive(Debug, Default)]
pub struct CommandStats {
    period: Duration,
    first: Option<Stamp>,
    last: Option<Stamp>,
    last_sequence: u64,
    commands: u64,
    lost: u64,
    reordered: u64,
    invalid: u64,
    missed_periods: u64,
    jitter: Latencies,
    one_way: Latencies,
}

/// Figures of [`CommandStats`]; jitter is how far an interval was from the period (µs).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize, Default)]
pub struct StreamFigures {
    /// Commands received.
    pub commands: u64,
    /// From the first to the last (s).
    pub seconds: f64,
    /// Intervals a second.
    pub achieved_rate_hz: f64,
    /// Numbers that never came.
    pub lost: u64,
    /// Commands that came after a newer one.
    pub reordered: u64,
    /// Messages that were no command.
    pub invalid: u64,
    /// Periods without a command: the sum over all intervals of whole periods beyond one.
    pub missed_periods: u64,
    /// Distance of an interval from the period (µs).
    pub jitter_us: Quantiles,
    /// From the control thread's stamp to arrival (µs).
    pub one_way_us: Quantiles,
}

impl CommandStats {
    /// Figures of a stream that is expected every `period`.
    pub fn new(period: Duration) -> Self {
        Self { period, ..Self::default() }
    }

    /// Counts a message that was no command.
    pub fn on_invalid(&mut self) {
        self.invalid += 1;
    }

    /// Counts a command numbered `sequence`, stamped `stamp`, arriving at `now`; false when it is out of order.
    pub fn on_command(&mut self, sequence: u64, stamp: Stamp, now: Stamp) -> bool {
        if sequence <= self.last_sequence {
            self.reordered += 1;
            return false;
        }
        if let Some(last) = self.last {
            self.lost += sequence - self.last_sequence - 1;
            let interval = now.since(last);
            self.jitter.record(interval.abs_diff(self.period));
            let periods = interval.as_secs_f64() / self.period.as_secs_f64();
            self.missed_periods += (periods.round() as u64).saturating_sub(1);
        }
        self.one_way.record(now.since(stamp));
        self.first.get_or_insert(now);
        (self.last, self.last_sequence) = (Some(now), sequence);
        self.commands += 1;
        true
    }

    /// The figures so far.
    pub fn figures(&self) -> StreamFigures {
        let seconds = match (self.first, self.last) {
            (Some(first), Some(last)) => last.since(first).as_secs_f64(),
            _ => 0.0,
        };
        let intervals = self.commands.saturating_sub(1) as f64;
        StreamFigures {
            commands: self.commands,
            seconds,
            achieved_rate_hz: if seconds > 0.0 { intervals / seconds } else { 0.0 },
            lost: self.lost,
            reordered: self.reordered,
            invalid: self.invalid,
            missed_periods: self.missed_periods,
            jitter_us: self.jitter.quantiles(),
            one_way_us: self.one_way.quantiles(),
        }
    }
}

/// An arm on the bus; dropping it brings the arm to a hold and ends its thread.
pub struct ArmPeer {
    stats: Arc<Mutex<CommandStats>>,
    // Fields drop in order: no more commands, then the thread.
    _subscription: Subscription,
    _worker: Worker,
}

impl ArmPeer {
    /// Puts `arm` on the bus.
    ///
    /// # Errors
    /// [`BusError`] when a key cannot be declared or no thread can be started.
    pub fn spawn(
        arm: Box<dyn ArmDriver>,
        config: ArmPeerConfig,
        keys: &Keys,
        bus: &Bus,
    ) -> Result<Self, BusError> {
        let stats = Arc::new(Mutex::new(CommandStats::new(config.command_period)));
        let (commands, received) = crossbeam_channel::bounded::<(Command, Stamp)>(QUEUE);
        let (names, counted, overflow) =
            (arm.joint_names().to_vec(), stats.clone(), received.clone());
        let subscription = bus.subscribe(&keys.command(), move |attachment, payload| {
            let now = Clock::now();
            let sequence = attachment.map_or(0, |a: Attachment| a.sequence);
            // A poisoned lock only means that another thread died between two whole updates.
            let mut stats = counted.lock().unwrap_or_else(PoisonError::into_inner);
            match decode_command(&names, payload, sequence) {
                Ok(command) if stats.on_command(sequence, command.stamp, now) => {
                    drop(stats);
                    if let Err(full) = commands.try_send((command, now)) {
                        let _ = overflow.try_recv();
                        let _ = commands.try_send(full.into_inner());
                    }
                }
                Ok(_) => {}
                Err(_) => stats.on_invalid(),
            }
        })?;
        let publisher = bus.publisher(&keys.state(), Priority::RealTime)?;
        let worker = Worker::spawn("arm", move |quit| {
            let mut arm = Follower { arm, dog: Watchdog::new(config.watchdog), failing: false };
            let names = arm.arm.joint_names().to_vec();
            let mut next = Clock::now();
            while !quit.load(Ordering::Relaxed) {
                match received.recv_timeout(next.since(Clock::now())) {
                    Ok((command, arrived)) => arm.follow(&command, arrived),
                    Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                        arm.watch(Clock::now());
                        if let Some(state) = arm.read() {
                            publisher.put(encode_state(&names, &state), state.stamp);
                        }
                        next = (next + config.state_period).max(Clock::now());
                    }
                    Err(crossbeam_channel::RecvTimeoutError::Disconnected) => break,
                }
            }
            arm.stop();
        })
        .map_err(|e| BusError::Refused { key: keys.state(), reason: e.to_string() })?;
        Ok(Self { stats, _subscription: subscription, _worker: worker })
    }

    /// The command stream as it arrived so far.
    pub fn figures(&self) -> StreamFigures {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).figures()
    }
}

/// The arm under its watchdog.
struct Follower {
    arm: Box<dyn ArmDriver>,
    dog: Watchdog,
    failing: bool,
}

impl Follower {
    fn follow(&mut self, command: &Command, arrived: Stamp) {
        let Some(state) = self.read() else { return };
        if self.dog.on_command(command, &state.position, arrived) {
            let written = self.arm.write(command);
            self.check(written);
        }
    }

    fn watch(&mut self, now: Stamp) {
        if self.dog.on_time(now) {
            tracing::warn!(trips = self.dog.trips, "no commands: the arm holds by itself");
            let held = self.arm.hold();
            self.check(held);
        }
    }

    fn read(&mut self) -> Option<sinew_runtime::JointState> {
        let state = self.arm.read(Clock::now());
        self.check(state)
    }

    fn stop(&mut self) {
        let held = self.arm.hold();
        self.check(held);
    }

    /// Says a failure once, until the device answers again.
    fn check<T>(&mut self, result: Result<T, sinew_runtime::DeviceError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.failing = false;
                Some(value)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "the arm does not answer");
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_order_and_rate_are_counted() {
        let period = Duration::from_millis(10);
        let mut stats = CommandStats::new(period);
        let at = |k: u32| Stamp(1_000_000) + period * k;
        for k in [0u32, 1, 2, 5, 6] {
            assert!(stats.on_command(u64::from(k) + 1, at(k), at(k)));
        }
        assert!(!stats.on_command(3, at(7), at(7)), "an older number is not followed");
        let figures = stats.figures();
        assert_eq!((figures.commands, figures.lost, figures.reordered), (5, 2, 1));
        assert_eq!(figures.missed_periods, 2);
        assert!((figures.achieved_rate_hz - 4.0 / 0.06).abs() < 1e-6);
    }
}
