//! The arm driver's own watchdog: an arm that gets no commands stops by itself.

use std::time::Duration;

use sinew_runtime::{Command, JointVec, Stamp};

/// Settings of the watchdog.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WatchdogConfig {
    /// No command for this long: hold.
    pub timeout: Duration,
    /// After a hold, a command may be this far (rad) from the measured position and no further.
    pub rejoin_tolerance: f64,
}

/// What the driver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchdogState {
    /// No command has come yet, or none for too long: the arm holds where it is.
    Holding,
    /// Commands come and are followed.
    Following,
}

/// Decides whether commands are followed. A pure state machine; starts in [`WatchdogState::Holding`].
#[derive(Debug)]
pub struct Watchdog {
    config: WatchdogConfig,
    state: WatchdogState,
    last: Stamp,
    /// Times that commands stopped coming.
    pub trips: u64,
    /// Commands refused because they began too far from where the arm holds.
    pub refused: u64,
}

impl Watchdog {
    /// A watchdog that holds.
    pub fn new(config: WatchdogConfig) -> Self {
        let last = Stamp::default();
        Self { config, state: WatchdogState::Holding, last, trips: 0, refused: 0 }
    }

    /// What the driver does now.
    pub fn state(&self) -> WatchdogState {
        self.state
    }

    /// A command arrived at `now` while the arm is at `measured` (rad): true when it is to be followed.
    pub fn on_command(&mut self, command: &Command, measured: &JointVec, now: Stamp) -> bool {
        let pairs = command.position.as_slice().iter().zip(measured.as_slice());
        let far = pairs.into_iter().any(|(c, m)| (c - m).abs() > self.config.rejoin_tolerance);
        if self.state == WatchdogState::Holding && far {
            self.refused += 1;
            return false;
        }
        self.state = WatchdogState::Following;
        self.last = now;
        true
    }

    /// Time passes: true at the moment when the arm must be brought to a hold.
    pub fn on_time(&mut self, now: Stamp) -> bool {
        let late =
            self.state == WatchdogState::Following && now.since(self.last) > self.config.timeout;
        if late {
            self.state = WatchdogState::Holding;
            self.trips += 1;
        }
        late
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(position: f64) -> Command {
        let position = JointVec::from_slice(&[position]).expect("one joint");
        Command { stamp: Stamp(0), sequence: 1, position, velocity: JointVec::zeros(1) }
    }

    #[test]
    fn silence_brings_a_hold_once_and_rejoining_needs_to_be_near() {
        let timeout = Duration::from_millis(100);
        let mut dog = Watchdog::new(WatchdogConfig { timeout, rejoin_tolerance: 0.2 });
        let measured = JointVec::zeros(1);
        assert!(!dog.on_command(&command(0.5), &measured, Stamp(0)), "deny by default");
        assert!(dog.on_command(&command(0.1), &measured, Stamp(0)));
        assert!(
            dog.on_command(&command(0.5), &measured, Stamp(0)),
            "while following, the servo lags"
        );
        assert!(!dog.on_time(Stamp(0) + timeout));
        assert!(dog.on_time(Stamp(1) + timeout));
        assert!(!dog.on_time(Stamp(2) + timeout), "one trip for one silence");
        assert_eq!((dog.trips, dog.refused, dog.state()), (1, 1, WatchdogState::Holding));
    }
}
