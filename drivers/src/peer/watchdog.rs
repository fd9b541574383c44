//! The arm driver's own watchdog: an arm that gets no commands, or a stop, comes to rest by itself.

use std::time::Duration;

use sinew_runtime::{Command, JointVec, Stamp};

/// A controlled stop that has not come to rest by then loses its torque all the same.
const LONGEST_STOP: Duration = Duration::from_secs(2);
/// Measured states in a row without motion that count as standstill.
const STILL_STATES: u32 = 2;

/// How an arm is stopped, after the stop categories of IEC 60204-1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopCategory {
    /// Category 2: a controlled stop, then held with torque on.
    #[default]
    Hold,
    /// Category 1: a controlled stop, then the torque is taken off.
    StopThenTorqueOff,
    /// Category 0: the torque is taken off at once.
    TorqueOff,
}

impl StopCategory {
    /// Names in launch files.
    pub const NAMES: [&str; 3] = ["hold", "stop-then-torque-off", "torque-off"];

    /// The category called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [Self::Hold, Self::StopThenTorqueOff, Self::TorqueOff];
        all.into_iter().zip(Self::NAMES).find(|(_, n)| *n == name).map(|(c, _)| c)
    }
}

/// Settings of the watchdog.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WatchdogConfig {
    /// No command for this long: stop.
    pub timeout: Duration,
    /// After a hold, a command may be this far (rad) from the measured position and no further.
    pub rejoin_tolerance: f64,
    /// How the arm stops when commands stay away.
    pub on_silence: StopCategory,
    /// How it stops when somebody stops it.
    pub on_stop: StopCategory,
}

/// What the driver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchdogState {
    /// No command has come yet, none for too long, or a stop: the arm holds where it is.
    Holding,
    /// Commands come and are followed.
    Following,
    /// Coming to rest; the torque goes off then.
    Stopping,
    /// The torque is off.
    Released,
}

impl WatchdogState {
    /// Name in statuses.
    pub fn name(self) -> &'static str {
        match self {
            WatchdogState::Holding => "holding",
            WatchdogState::Following => "following",
            WatchdogState::Stopping => "stopping",
            WatchdogState::Released => "torque off",
        }
    }
}

/// What the device must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Come to rest and hold, with torque on.
    Hold,
    /// Take the torque off.
    TorqueOff,
}

/// Decides whether commands are followed. A pure state machine; starts in [`WatchdogState::Holding`].
///
/// A stop latches, and so does every loss of torque: only a reset leaves them.
#[derive(Debug)]
pub struct Watchdog {
    config: WatchdogConfig,
    state: WatchdogState,
    latched: bool,
    last: Stamp,
    stopping_since: Stamp,
    still: u32,
    /// Times that commands stopped coming.
    pub trips: u64,
    /// Commands refused because they began too far from where the arm holds, or while a stop was latched.
    pub refused: u64,
}

impl Watchdog {
    /// A watchdog that holds.
    pub fn new(config: WatchdogConfig) -> Self {
        let never = Stamp::default();
        Self {
            config,
            state: WatchdogState::Holding,
            latched: false,
            last: never,
            stopping_since: never,
            still: 0,
            trips: 0,
            refused: 0,
        }
    }

    /// What the driver does now.
    pub fn state(&self) -> WatchdogState {
        self.state
    }

    /// A stop is latched: no command is followed until a reset.
    pub fn latched(&self) -> bool {
        self.latched
    }

    /// A command arrived at `now`; the arm was last seen at `measured` (rad): true when it is to be followed.
    pub fn on_command(
        &mut self,
        command: &Command,
        measured: Option<&JointVec>,
        now: Stamp,
    ) -> bool {
        // While following the servos lag; only a start is compared with where the arm is.
        let near = self.state == WatchdogState::Following
            || measured.is_some_and(|measured| {
                let pairs = command.position.as_slice().iter().zip(measured.as_slice());
                pairs.into_iter().all(|(c, m)| (c - m).abs() <= self.config.rejoin_tolerance)
            });
        if self.latched || !near {
            self.refused += 1;
            return false;
        }
        self.state = WatchdogState::Following;
        self.last = now;
        true
    }

    /// Somebody stopped the arm at `now`: what to do, if that is not done already. It is latched.
    pub fn on_stop(&mut self, now: Stamp) -> Option<Act> {
        let first = !std::mem::replace(&mut self.latched, true);
        let off = self.config.on_stop == StopCategory::TorqueOff;
        match self.state {
            WatchdogState::Released => None,
            WatchdogState::Stopping if !off => None,
            _ if !first && !off => None,
            _ => Some(self.enter(self.config.on_stop, now)),
        }
    }

    /// An operator unlatched the stop: the arm holds until commands come, with its torque on again.
    pub fn on_reset(&mut self) -> Option<Act> {
        let was = std::mem::replace(&mut self.latched, false);
        if !was {
            return None;
        }
        self.state = WatchdogState::Holding;
        Some(Act::Hold)
    }

    /// Time passes; `still`: the newest measured state stands still. What to do at this moment, if anything.
    pub fn on_time(&mut self, now: Stamp, still: bool) -> Option<Act> {
        match self.state {
            WatchdogState::Following if now.since(self.last) > self.config.timeout => {
                self.trips += 1;
                self.latched = self.config.on_silence != StopCategory::Hold;
                Some(self.enter(self.config.on_silence, now))
            }
            WatchdogState::Stopping => {
                self.still = if still { self.still + 1 } else { 0 };
                let long = now.since(self.stopping_since) > LONGEST_STOP;
                (self.still >= STILL_STATES || long).then(|| {
                    self.state = WatchdogState::Released;
                    Act::TorqueOff
                })
            }
            _ => None,
        }
    }

    fn enter(&mut self, category: StopCategory, now: Stamp) -> Act {
        (self.stopping_since, self.still) = (now, 0);
        let (state, act) = match category {
            StopCategory::Hold => (WatchdogState::Holding, Act::Hold),
            StopCategory::StopThenTorqueOff => (WatchdogState::Stopping, Act::Hold),
            StopCategory::TorqueOff => (WatchdogState::Released, Act::TorqueOff),
        };
        self.state = state;
        act
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIMEOUT: Duration = Duration::from_millis(100);

    fn command(position: f64) -> Command {
        let position = JointVec::from_slice(&[position]).expect("one joint");
        Command { stamp: Stamp(0), sequence: 1, position, velocity: JointVec::zeros(1) }
    }

    fn watchdog(on_silence: StopCategory, on_stop: StopCategory) -> Watchdog {
        Watchdog::new(WatchdogConfig {
            timeout: TIMEOUT,
            rejoin_tolerance: 0.2,
            on_silence,
            on_stop,
        })
    }

    fn hear(dog: &mut Watchdog, position: f64, now: Stamp) -> bool {
        dog.on_command(&command(position), Some(&JointVec::zeros(1)), now)
    }

    #[test]
    fn silence_brings_a_hold_once_and_rejoining_needs_to_be_near() {
        let mut dog = watchdog(StopCategory::Hold, StopCategory::Hold);
        assert!(!hear(&mut dog, 0.5, Stamp(0)), "deny by default");
        assert!(!dog.on_command(&command(0.1), None, Stamp(0)), "nobody knows where the arm is");
        assert!(hear(&mut dog, 0.1, Stamp(0)));
        assert!(hear(&mut dog, 0.5, Stamp(0)), "while following, the servo lags");
        assert_eq!(dog.on_time(Stamp(0) + TIMEOUT, true), None);
        assert_eq!(dog.on_time(Stamp(1) + TIMEOUT, true), Some(Act::Hold));
        assert_eq!(dog.on_time(Stamp(2) + TIMEOUT, true), None, "one trip for one silence");
        assert_eq!((dog.trips, dog.refused, dog.state()), (1, 2, WatchdogState::Holding));
        assert!(hear(&mut dog, 0.1, Stamp(3)), "a hold by silence is not latched");
    }

    #[test]
    fn a_stop_is_latched_until_a_reset() {
        let mut dog = watchdog(StopCategory::Hold, StopCategory::Hold);
        assert!(hear(&mut dog, 0.0, Stamp(0)));
        assert_eq!(dog.on_stop(Stamp(1)), Some(Act::Hold));
        assert_eq!(dog.on_stop(Stamp(2)), None, "it is held already");
        assert!(!hear(&mut dog, 0.0, Stamp(3)));
        assert_eq!(dog.on_reset(), Some(Act::Hold));
        assert_eq!(dog.on_reset(), None);
        assert!(hear(&mut dog, 0.0, Stamp(4)));
    }

    #[test]
    fn a_controlled_stop_waits_for_standstill_before_the_torque_goes() {
        let category = StopCategory::StopThenTorqueOff;
        let mut dog = watchdog(category, category);
        assert!(hear(&mut dog, 0.0, Stamp(0)));
        assert_eq!(dog.on_stop(Stamp(0)), Some(Act::Hold));
        assert_eq!(dog.on_time(Stamp(1), false), None);
        assert_eq!(dog.on_time(Stamp(2), true), None);
        assert_eq!(dog.on_time(Stamp(3), false), None, "it still swings");
        assert_eq!(dog.on_time(Stamp(4), true), None);
        assert_eq!(dog.on_time(Stamp(5), true), Some(Act::TorqueOff));
        assert_eq!(dog.on_stop(Stamp(6)), None);
        assert_eq!(dog.on_reset(), Some(Act::Hold), "the torque comes back where the arm is");

        assert!(hear(&mut dog, 0.0, Stamp(0)));
        assert_eq!(dog.on_time(Stamp(1) + TIMEOUT, false), Some(Act::Hold));
        assert!(dog.latched(), "losing the torque needs a reset, whatever caused it");
        let end = Stamp(2) + TIMEOUT + LONGEST_STOP;
        assert_eq!(dog.on_time(end, false), Some(Act::TorqueOff), "an arm that never rests");
    }

    #[test]
    fn torque_goes_at_once_where_configured() {
        let mut dog = watchdog(StopCategory::StopThenTorqueOff, StopCategory::TorqueOff);
        assert!(hear(&mut dog, 0.0, Stamp(0)));
        assert_eq!(dog.on_time(Stamp(1) + TIMEOUT, false), Some(Act::Hold));
        assert_eq!(dog.on_stop(Stamp(2) + TIMEOUT), Some(Act::TorqueOff), "a person may not wait");
        for (name, category) in StopCategory::NAMES.into_iter().zip([
            StopCategory::Hold,
            StopCategory::StopThenTorqueOff,
            StopCategory::TorqueOff,
        ]) {
            assert_eq!(StopCategory::from_name(name), Some(category));
        }
    }

    proptest! {
        #[test]
        fn nothing_but_a_reset_unlatches(events in prop::collection::vec(0u8..4, 1..60), on_stop in 0usize..3) {
            let category = StopCategory::from_name(StopCategory::NAMES[on_stop]).expect("named");
            let mut dog = watchdog(StopCategory::Hold, category);
            let mut latched = false;
            for (k, event) in events.iter().enumerate() {
                let now = Stamp(0) + TIMEOUT * k as u32 / 2;
                match event {
                    0 => { dog.on_stop(now); latched = true; }
                    1 => { dog.on_reset(); latched = false; }
                    2 => prop_assert_eq!(hear(&mut dog, 0.0, now), !latched),
                    _ => { dog.on_time(now, true); }
                }
                prop_assert_eq!(dog.latched(), latched);
                prop_assert!(!latched || dog.state() != WatchdogState::Following);
            }
        }
    }
}
