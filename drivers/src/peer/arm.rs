//! An arm as a peer: follows commands from the bus under its own watchdog, latches stops that it hears itself,
//! and publishes measured state.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, select_biased};
use sinew_runtime::arbiter::{Operators, Source};
use sinew_runtime::operator::DriverStatus;
use sinew_runtime::transport::{
    Bus, BusError, Gate, Keys, Priority, Publisher, Rejected, StopAck, Subscription,
    decode_command, encode_state,
};
use sinew_runtime::{ArmDriver, Clock, Command, DeviceError, JointState, Stamp, rt};

use super::stats::{CommandStats, StreamFigures};
use super::stop_line::{Order, StopLine};
use super::{Act, Watchdog, WatchdogConfig, Worker};

/// Commands that may wait for the arm; the oldest is dropped when it is full.
const QUEUE: usize = 64;
/// Time between two statuses while nothing changes.
const STATUS_PERIOD: Duration = Duration::from_millis(200);

/// Settings of an arm's peer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmPeerConfig {
    /// The driver's name among the robot's parts.
    pub name: Source,
    /// Time between two measured states.
    pub state_period: Duration,
    /// The period that commands are expected at.
    pub command_period: Duration,
    /// The watchdog's settings.
    pub watchdog: WatchdogConfig,
    /// Who may unlatch a stop.
    pub operators: Operators,
    /// `SCHED_FIFO` priority of the driver's thread where permitted; `None`: ordinary.
    pub priority: Option<i32>,
}

/// An arm on the bus; dropping it brings the arm to a hold and ends its thread.
pub struct ArmPeer {
    stats: Arc<Mutex<CommandStats>>,
    // Fields drop in order: no more commands and stops, then the thread.
    _subscriptions: Vec<Subscription>,
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
        // A command as old as the watchdog's patience is one that was held up: the arm has stopped by then.
        let patience = config.watchdog.timeout;
        let gate = Mutex::new(Gate::new(patience, patience));
        // What is commanded before the runtime can have seen this arm's first states is meant for one that stood
        // elsewhere: the arm that this driver was restarted for.
        let born = Clock::now();
        let subscription = bus.subscribe(&keys.command(), move |attachment, payload| {
            let now = Clock::now();
            // A poisoned lock only means that another thread died between two whole updates.
            let mut stats = counted.lock().unwrap_or_else(PoisonError::into_inner);
            let mut gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
            let Ok(command) = decode_command(&names, payload, 0) else {
                stats.on_invalid();
                return;
            };
            if now.since(born) < patience {
                stats.on_refused();
                return;
            }
            match gate.admit(attachment, command.stamp, now) {
                Ok(sequence) if stats.on_command(sequence, command.stamp, now) => {
                    drop((stats, gate));
                    let command = Command { sequence, ..command };
                    if let Err(full) = commands.try_send((command, now)) {
                        let _ = overflow.try_recv();
                        let _ = commands.try_send(full.into_inner());
                    }
                }
                Ok(_) => {}
                Err(Rejected::OutOfOrder) => stats.on_out_of_order(),
                Err(_) => stats.on_refused(),
            }
        })?;
        let mut subscriptions = vec![subscription];
        let line = StopLine::open(keys, bus, &mut subscriptions)?;
        let name = config.name.name();
        let mut follower = Follower {
            names: arm.joint_names().to_vec(),
            arm,
            dog: Watchdog::new(config.watchdog),
            state: None,
            failing: false,
            fault: None,
            robot: keys.robot().to_owned(),
            config,
            states: bus.publisher(&keys.state(), Priority::RealTime)?,
            statuses: bus.publisher(&keys.driver_status(name), Priority::Data)?,
            told: (String::new(), Stamp::default()),
        };
        let worker = Worker::spawn("arm", move |quit| {
            rt::set_timer_slack();
            // Without the right to it the driver only acts a little later.
            let _ = config.priority.map(rt::set_fifo);
            let mut next = Clock::now();
            while !quit.load(Ordering::Relaxed) {
                follower.turn(&line, &received, &mut next);
            }
            follower.end();
        })
        .map_err(|e| BusError::Refused { key: keys.state(), reason: e.to_string() })?;
        // Said last: who finds the driver can stop it.
        subscriptions.push(bus.announce(&keys.alive(name))?);
        Ok(Self { stats, _subscriptions: subscriptions, _worker: worker })
    }

    /// The command stream as it arrived so far.
    pub fn figures(&self) -> StreamFigures {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).figures()
    }
}

/// The arm under its watchdog.
struct Follower {
    arm: Box<dyn ArmDriver>,
    names: Vec<String>,
    dog: Watchdog,
    /// The newest measured state.
    state: Option<JointState>,
    failing: bool,
    /// What the device said to the last stop; none when it took it.
    fault: Option<DeviceError>,
    robot: String,
    config: ArmPeerConfig,
    states: Publisher,
    statuses: Publisher,
    /// The status that was published last, and when.
    told: (String, Stamp),
}

impl Follower {
    /// Waits for what comes next and deals with it: stops before commands, commands before states.
    fn turn(&mut self, line: &StopLine, commands: &Receiver<(Command, Stamp)>, next: &mut Stamp) {
        if line.pressed.swap(false, Ordering::Relaxed) {
            self.stop();
        }
        if Clock::now() >= *next {
            self.measure();
            *next = (*next + self.config.state_period).max(Clock::now());
        }
        select_biased! {
            recv(line.orders) -> order => {
                let _ = order.map(|order| self.obey(order));
            }
            recv(commands) -> command => {
                // A stop that has been heard counts from then on, whatever still waits in the queue.
                if let Ok((command, arrived)) = command
                    && !line.pressed.load(Ordering::Relaxed)
                {
                    self.follow(&command, arrived);
                }
            }
            default(next.since(Clock::now())) => {}
        }
    }

    fn follow(&mut self, command: &Command, arrived: Stamp) {
        let measured = self.state.as_ref().map(|s| &s.position);
        if self.dog.on_command(command, measured, arrived) {
            let written = self.arm.write(command);
            self.check(written);
        }
    }

    /// Reads and publishes the state, and lets the watchdog look at the time.
    fn measure(&mut self) {
        let state = self.arm.read(Clock::now());
        let state = self.check(state);
        let still = state.is_some_and(|s| {
            let limit = self.arm.standstill_speed();
            s.velocity.as_slice().iter().all(|v| v.abs() < limit)
        });
        let trips = self.dog.trips;
        if let Some(act) = self.dog.on_time(Clock::now(), still) {
            if self.dog.trips > trips {
                tracing::warn!(trips = self.dog.trips, "no commands: the arm stops by itself");
            }
            self.act(act);
        }
        if let Some(state) = state {
            self.state = Some(state);
            self.states.put(encode_state(&self.names, &state), state.stamp);
        }
        self.tell();
    }

    fn obey(&mut self, order: Order) {
        let reply = match order.reset_by {
            None => {
                self.stop();
                Ok(())
            }
            Some(by) if self.config.operators.contains(by) => {
                if let Some(act) = self.dog.on_reset() {
                    self.act(act);
                }
                Ok(())
            }
            Some(by) => {
                Err(format!("`{by}` is no operator; `operators` under [control] names them"))
            }
        };
        let ack = StopAck {
            robot: self.robot.clone(),
            part: self.config.name.name().to_owned(),
            latched: self.dog.latched(),
            state: self.dog.state().name().to_owned(),
            fault: self.fault.as_ref().map(ToString::to_string),
            drivers: Vec::new(),
        };
        if let Some(question) = order.question {
            let text = |()| serde_json::to_vec(&ack).map_err(|e| e.to_string());
            question.answer(reply.and_then(text));
        }
        self.tell();
    }

    fn stop(&mut self) {
        match self.dog.on_stop(Clock::now()) {
            Some(act) => self.act(act),
            None if self.fault.is_some() => self.act(Act::Hold),
            None => {}
        }
    }

    fn act(&mut self, act: Act) {
        let done = match act {
            Act::Hold => self.arm.hold(),
            // A device that keeps its torque must at least not move.
            Act::TorqueOff => self.arm.torque_off().or_else(|e| self.arm.hold().and(Err(e))),
        };
        self.fault = done.clone().err();
        self.check(done);
    }

    /// Nobody commands any more: the arm holds, unless its torque was taken off on purpose.
    fn end(&mut self) {
        if !self.dog.latched() {
            self.act(Act::Hold);
        }
    }

    /// Publishes what the driver does, when that changes and now and then.
    fn tell(&mut self) {
        let now = Clock::now();
        let status = DriverStatus {
            driver: self.config.name.name().to_owned(),
            latched: self.dog.latched(),
            state: self.dog.state().name().to_owned(),
        };
        // Names always have a JSON form.
        let text = serde_json::to_string(&status).unwrap_or_default();
        if text != self.told.0 || now.since(self.told.1) >= STATUS_PERIOD {
            self.statuses.put(text.clone().into_bytes(), now);
            self.told = (text, now);
        }
    }

    /// Says a failure once, until the device answers again.
    fn check<T>(&mut self, result: Result<T, DeviceError>) -> Option<T> {
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
