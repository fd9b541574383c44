//! The stream's threads, two zenoh sessions and an arm's peer together: commands arrive at the set rate, in
//! order, and the arm holds by itself when they stop.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sinew_drivers::peer::{ArmPeer, ArmPeerConfig, StopCategory, WatchdogConfig};
use sinew_runtime::arbiter::{Operators, Source};
use sinew_runtime::blackbox::ControlTap;
use sinew_runtime::control::{ControlConfig, ControlCore};
use sinew_runtime::rt::RealtimeMode;
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::stream::{self, StreamConfig};
use sinew_runtime::transport::{
    Bus, BusError, Endpoint, Keys, Priority, decode_state, encode_command,
};
use sinew_runtime::{ArmDriver, Command, DeviceError, JointLimits, JointState, JointVec, Stamp};

/// An arm that moves at once, and writes down what it was told.
#[derive(Clone)]
struct Recorder {
    names: Vec<String>,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    position: f64,
    writes: u64,
    holds: u64,
}

impl ArmDriver for Recorder {
    fn joint_names(&self) -> &[String] {
        &self.names
    }
    fn write(&mut self, command: &Command) -> Result<(), DeviceError> {
        let mut told = self.told.lock().expect("no thread panics while it holds this");
        (told.position, told.writes) = (command.position[0], told.writes + 1);
        Ok(())
    }
    fn read(&mut self, now: Stamp) -> Result<JointState, DeviceError> {
        let told = self.told.lock().expect("no thread panics while it holds this");
        let position = JointVec::from_slice(&[told.position]).expect("one joint");
        Ok(JointState { stamp: now, sequence: 0, position, velocity: JointVec::zeros(1) })
    }
    fn hold(&mut self) -> Result<(), DeviceError> {
        self.told.lock().expect("no thread panics while it holds this").holds += 1;
        Ok(())
    }
}

fn free_endpoint() -> String {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    format!("tcp/{}", socket.local_addr().expect("it is bound"))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen in 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn commands_cross_the_bus_in_order_and_silence_brings_a_hold() {
    let endpoint = free_endpoint();
    let keys = Keys::new("test");
    let names = vec!["pan".to_owned()];
    let runtime = Bus::open(&Endpoint::Listen(endpoint.clone())).expect("the port is free");
    let device = Bus::open(&Endpoint::Connect(endpoint)).expect("the runtime listens");
    let arm = Recorder {
        names: names.clone(),
        told: Arc::new(Mutex::new(Told { position: 0.25, ..Told::default() })),
    };
    let period = Duration::from_millis(5);
    let config = ArmPeerConfig {
        state_period: Duration::from_millis(10),
        command_period: period,
        watchdog: WatchdogConfig {
            timeout: Duration::from_millis(200),
            rejoin_tolerance: 0.3,
            on_silence: StopCategory::Hold,
            on_stop: StopCategory::Hold,
        },
        name: Source::literal("arm"),
        operators: Operators::default(),
        priority: None,
    };
    let peer = ArmPeer::spawn(Box::new(arm.clone()), config, &keys, &device).expect("declared");

    let limit =
        JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 20.0, jerk: 1000.0 };
    let core = ControlCore::new(&ControlConfig {
        limits: vec![limit],
        period,
        state_timeout: Duration::from_millis(500),
        scheduler: SchedulerConfig::new(&[limit], period, 8),
    })
    .expect("the limits are sound");
    let publisher = runtime.publisher(&keys.command(), Priority::RealTime).expect("declared");
    assert!(runtime.wait_for_subscriber(&publisher, Duration::from_secs(10)));
    let sent_names = names.clone();
    let stream = StreamConfig {
        period,
        realtime: RealtimeMode::BestEffort,
        priority: 50,
        bare_clock: true,
        cpu: None,
    };
    let (threads, mut ports) = stream::spawn(core, stream, ControlTap::off(), move |command| {
        publisher.put(encode_command(&sent_names, command), command.stamp);
    })
    .expect("best effort never refuses");
    let states = Mutex::new(ports.states);
    let heard = names.clone();
    let subscription = runtime
        .subscribe(&keys.state(), move |attachment, bytes| {
            let sequence = attachment.map_or(0, |a| a.sequence);
            let state = decode_state(&heard, bytes, sequence).expect("our own peer sends it");
            let _ = states.lock().expect("no panic while held").push(state);
        })
        .expect("declared");

    wait_until("300 commands", || peer.figures().commands >= 300);
    // A busy machine may lose commands on the way and miss periods; what came is in order, whole, and counted.
    let figures = peer.figures();
    assert_eq!(figures.invalid + figures.reordered, 0, "{figures:?}");
    let sent = (figures.seconds / period.as_secs_f64()).round() as u64;
    assert!(figures.commands + figures.lost <= sent + 2 + sent / 20, "{figures:?}");
    {
        let told = arm.told.lock().expect("no panic while held");
        assert_eq!(told.position, 0.25, "a held arm is commanded to where it is");
        assert!(told.writes > 0, "{figures:?}");
    }
    let mut cycles = 0;
    while ports.reports.pop().is_ok() {
        cycles += 1;
    }
    assert!(cycles > 0, "the cycles are reported");
    assert!(ports.bare.pop().is_ok(), "the bare clock loop runs beside it");

    drop(threads); // the control thread ends: no more commands
    wait_until("the arm's own hold", || arm.told.lock().expect("no panic while held").holds >= 1);
    drop(subscription);
}

#[test]
fn a_taken_port_is_a_clear_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let endpoint = format!("tcp/{}", taken.local_addr().expect("it is bound"));
    let error = Bus::open(&Endpoint::Listen(endpoint.clone())).err().expect("the port is taken");
    assert!(matches!(error, BusError::Listen { .. }), "{error}");
    assert!(error.to_string().contains(&endpoint), "{error}");
}

#[test]
fn an_absent_peer_is_a_clear_error() {
    let error = Bus::open(&Endpoint::Connect(free_endpoint())).err().expect("nobody listens");
    assert!(matches!(error, BusError::Connect { .. }), "{error}");
}

#[test]
fn a_query_is_answered_or_refused_with_the_reason() {
    let endpoint = free_endpoint();
    let here = Bus::open(&Endpoint::Listen(endpoint.clone())).expect("the port is free");
    let there = Bus::open(&Endpoint::Connect(endpoint)).expect("the other listens");
    let service = there
        .serve("sinew/test/double", |asked| match asked {
            [n] => Ok(vec![n * 2]),
            other => Err(format!("{} bytes came, one is doubled", other.len())),
        })
        .expect("declared");
    drop(there); // the service keeps its session
    let ask = |payload| here.query("sinew/test/double", payload, Duration::from_secs(5));
    wait_until("an answer", || ask(vec![21]) == Ok(vec![42]));
    let refused = ask(vec![]).expect_err("nothing to double");
    assert!(refused.to_string().contains("0 bytes came"), "{refused}");
    drop(service);
    wait_until("silence", || ask(vec![21]).is_err());
}
