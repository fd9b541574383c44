//! A whole robot on loopback with probe arms: runtime, drivers and the bus between them, each in a session of its
//! own, with the threads that a launch has.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sinew_drivers::peer::{ArmPeer, ArmPeerConfig, StopCategory, WatchdogConfig};
use sinew_runtime::arbiter::{AuthorityRequest, Source};
use sinew_runtime::blackbox::ControlTap;
use sinew_runtime::control::{AuthorityConfig, ControlConfig, ControlCore, ControlEvent};
use sinew_runtime::guard::GuardError;
use sinew_runtime::operator::{Desk, DeskConfig};
use sinew_runtime::rt::{RealtimeDenied, RealtimeMode};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::stream::{self, Stream, StreamConfig, StreamPorts, StreamReport};
use sinew_runtime::transport::{
    Bus, BusError, Endpoint, Keys, Priority, Subscription, decode_state, encode_command,
};
use sinew_runtime::{
    ArmDriver, Clock, Command, DeviceError, JointLimits, JointState, JointVec, Stamp,
};

/// How long the parts may take to find each other.
const PATIENCE: Duration = Duration::from_secs(10);
const STATE_PERIOD: Duration = Duration::from_millis(10);
/// `SCHED_FIFO` priority of the control thread; the publisher has one less, desk and drivers two.
const PRIORITY: i32 = 50;

/// Why a rig does not run.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The guard's limits.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Real-time scheduling.
    #[error(transparent)]
    Realtime(#[from] RealtimeDenied),
    /// Something did not happen in time.
    #[error("{0} did not happen within 10 s")]
    Silent(&'static str),
    /// The operating system gives no port.
    #[error("no free port on loopback: {0}")]
    Port(#[from] std::io::Error),
}

/// What a rig is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RigConfig {
    /// Control period.
    pub period: Duration,
    /// Drivers, named `arm-0`, `arm-1`, …
    pub drivers: usize,
    /// Real time of the control thread.
    pub realtime: RealtimeMode,
    /// Who may move the arm.
    pub authority: AuthorityConfig,
    /// How a driver stops when it is stopped.
    pub on_stop: StopCategory,
}

impl Default for RigConfig {
    fn default() -> Self {
        Self {
            period: Duration::from_millis(10),
            drivers: 2,
            realtime: RealtimeMode::BestEffort,
            authority: AuthorityConfig::default(),
            on_stop: StopCategory::Hold,
        }
    }
}

/// What a probe arm was told.
#[derive(Debug, Default)]
pub struct Told {
    /// Where it is (rad).
    pub position: f64,
    /// Commands written.
    pub writes: u64,
    /// Holds.
    pub holds: u64,
    /// Times that its torque was taken off.
    pub torque_offs: u64,
    /// When a command first differed from the one before, since it was last cleared.
    pub moved: Option<Stamp>,
    /// It refuses to hold.
    pub broken: bool,
}

/// An arm of one joint that moves at once and writes down what it was told, and when.
struct Probe {
    names: Vec<String>,
    told: Arc<Mutex<Told>>,
}

impl ArmDriver for Probe {
    fn joint_names(&self) -> &[String] {
        &self.names
    }

    fn write(&mut self, command: &Command) -> Result<(), DeviceError> {
        let mut told = lock(&self.told);
        let position = command.position[0];
        if position != told.position {
            told.moved.get_or_insert(Clock::now());
        }
        (told.position, told.writes) = (position, told.writes + 1);
        Ok(())
    }

    fn read(&mut self, now: Stamp) -> Result<JointState, DeviceError> {
        let mut position = JointVec::zeros(1);
        position[0] = lock(&self.told).position;
        Ok(JointState { stamp: now, sequence: 0, position, velocity: JointVec::zeros(1) })
    }

    fn hold(&mut self) -> Result<(), DeviceError> {
        let mut told = lock(&self.told);
        told.holds += 1;
        if told.broken {
            let (device, reason) = ("probe".to_owned(), "its motor does not answer".to_owned());
            return Err(DeviceError { device, reason });
        }
        Ok(())
    }

    fn torque_off(&mut self) -> Result<(), DeviceError> {
        lock(&self.told).torque_offs += 1;
        Ok(())
    }
}

/// A driver of the rig.
pub struct Driver {
    /// Its name among the robot's parts.
    pub name: Source,
    /// Where it listens by itself.
    pub endpoint: String,
    told: Arc<Mutex<Told>>,
    bus: Bus,
    _peer: ArmPeer,
}

impl Driver {
    /// What its arm was told.
    pub fn told(&self) -> MutexGuard<'_, Told> {
        lock(&self.told)
    }

    /// Its session.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }
}

/// The runtime of the rig.
pub struct Runtime {
    // Fields drop in order: the desk before the thread that answers it.
    _desk: Desk,
    _stream: Stream,
    _states: Subscription,
    requests: rtrb::Producer<ControlEvent>,
    reports: rtrb::Consumer<StreamReport>,
    bus: Bus,
}

/// A robot on loopback.
pub struct Rig {
    /// The robot's keys.
    pub keys: Keys,
    /// Where the runtime listens.
    pub endpoint: String,
    /// The arm's joints.
    pub joints: Vec<String>,
    /// The drivers.
    pub drivers: Vec<Driver>,
    /// The runtime, until it is taken away.
    pub runtime: Option<Runtime>,
    config: RigConfig,
}

impl Rig {
    /// Starts a robot of its own on free ports; returns when its arm is seen and held.
    ///
    /// # Errors
    /// [`RigError`]; what was started by then is ended.
    pub fn start(config: RigConfig) -> Result<Self, RigError> {
        let keys = Keys::new("rig");
        let endpoint = free_endpoint()?;
        let joints = vec!["pan".to_owned()];
        let mut rig = Self { keys, endpoint, joints, drivers: Vec::new(), runtime: None, config };
        let bus = Bus::open(&Endpoint::Listen(rig.endpoint.clone()))?;
        for k in 0..config.drivers {
            let driver = rig.driver(k)?;
            rig.drivers.push(driver);
        }
        rig.runtime = Some(rig.runtime(bus)?);
        rig.wait_for("the first command", |rig| rig.drivers.iter().all(|d| d.told().writes > 0))?;
        Ok(rig)
    }

    /// Starts a runtime at the same place, after the first was taken away.
    ///
    /// # Errors
    /// [`RigError`].
    pub fn restart(&mut self) -> Result<(), RigError> {
        let bus = Bus::open(&Endpoint::Listen(self.endpoint.clone()))?;
        self.runtime = Some(self.runtime(bus)?);
        Ok(())
    }

    /// A session of somebody else, who knows where the runtime is.
    ///
    /// # Errors
    /// [`RigError::Bus`].
    pub fn visitor(&self) -> Result<Bus, RigError> {
        Ok(Bus::open(&Endpoint::Connect(self.endpoint.clone()))?)
    }

    /// Waits until `done`, at most 10 s.
    ///
    /// # Errors
    /// [`RigError::Silent`] with `what`.
    pub fn wait_for(
        &self,
        what: &'static str,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Result<(), RigError> {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > end {
                return Err(RigError::Silent(what));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Priority of desk and drivers, as a launch gives it.
    fn beside(&self) -> Option<i32> {
        (self.config.realtime != RealtimeMode::Off).then_some(PRIORITY - 2)
    }

    fn driver(&self, k: usize) -> Result<Driver, RigError> {
        let endpoint = free_endpoint()?;
        let here = std::slice::from_ref(&endpoint);
        let bus = Bus::join(here, std::slice::from_ref(&self.endpoint))?;
        let told = Arc::new(Mutex::new(Told { position: 0.1, ..Told::default() }));
        let arm = Probe { names: self.joints.clone(), told: told.clone() };
        let name = Source::literal(&format!("arm-{k}"));
        let config = ArmPeerConfig {
            name,
            state_period: STATE_PERIOD,
            command_period: self.config.period,
            watchdog: WatchdogConfig {
                timeout: Duration::from_millis(500),
                rejoin_tolerance: 0.3,
                on_silence: StopCategory::Hold,
                on_stop: self.config.on_stop,
            },
            operators: self.config.authority.arbiter.operators,
            priority: self.beside(),
        };
        let peer = ArmPeer::spawn(Box::new(arm), config, &self.keys, &bus)?;
        Ok(Driver { name, endpoint, told, bus, _peer: peer })
    }

    fn runtime(&self, bus: Bus) -> Result<Runtime, RigError> {
        let period = self.config.period;
        let limit = JointLimits {
            lower: -3.0,
            upper: 3.0,
            velocity: 2.0,
            acceleration: 20.0,
            jerk: 1000.0,
        };
        let core = ControlCore::new(&ControlConfig {
            limits: vec![limit],
            period,
            state_timeout: Duration::from_millis(500),
            scheduler: SchedulerConfig::new(&[limit], period, 8),
        })?
        .with_authority(&self.config.authority, &[limit]);
        let publisher = bus.publisher(&self.keys.command(), Priority::RealTime)?;
        if !bus.wait_for_subscriber(&publisher, PATIENCE) {
            return Err(RigError::Silent("a driver that listens"));
        }
        let stream = StreamConfig {
            period,
            realtime: self.config.realtime,
            priority: PRIORITY,
            cpu: None,
            bare_clock: false,
        };
        let names = self.joints.clone();
        let (threads, ports) = stream::spawn(core, stream, ControlTap::off(), move |command| {
            publisher.put(encode_command(&names, command), command.stamp);
        })?;
        let StreamPorts { states, requests, operator, reports, .. } = ports;
        let (names, states) = (self.joints.clone(), Mutex::new(states));
        let heard = bus.subscribe(&self.keys.state(), move |attachment, bytes| {
            let sequence = attachment.map_or(0, |a| a.sequence);
            if let Ok(state) = decode_state(&names, bytes, sequence) {
                // A full ring means that the control thread has newer ones to read first.
                let _ = lock(&states).push(state);
            }
        })?;
        let drivers = self.drivers.iter().map(|d| d.name.name().to_owned()).collect();
        let robot = self.keys.robot().to_owned();
        let config =
            DeskConfig { robot, joints: self.joints.clone(), drivers, priority: self.beside() };
        let desk = Desk::open(&bus, &self.keys, config, operator)?;
        Ok(Runtime { _desk: desk, _stream: threads, _states: heard, requests, reports, bus })
    }
}

impl Runtime {
    /// The run asks for authority.
    pub fn ask(&mut self, request: AuthorityRequest) {
        // The ring is drained every control period; the tests and the bench ask now and then.
        let _ = self.requests.push(ControlEvent::Authority(request));
    }

    /// The next report of the control thread.
    pub fn report(&mut self) -> Option<StreamReport> {
        self.reports.pop().ok()
    }

    /// Its session.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }
}

fn free_endpoint() -> Result<String, RigError> {
    let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("tcp/{}", socket.local_addr()?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock only means that another thread died between two whole updates.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
