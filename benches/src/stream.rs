//! The command stream under full load: the control thread beside a bare clock loop of the same period and priority,
//! and a subscriber in another process.
//!
//! While it runs, one thread computes chunks without a pause and one steps and draws the simulator, so that both
//! cores of a small computer are busy. The control core plays chunks of a slow sine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use sinew_drivers::sim::{ArmDescription, CameraKind, JOINTS, Renderer, Scene, World};
use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::blackbox::ControlTap;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent, CycleReport};
use sinew_runtime::guard::GuardError;
use sinew_runtime::inference;
use sinew_runtime::rt::{self, RealtimeMode};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::stream::{self, StreamConfig, StreamPorts, StreamReport};
use sinew_runtime::telemetry::{Latencies, Quantiles};
use sinew_runtime::transport::{Bus, Endpoint, Keys, Priority, encode_command};
use sinew_runtime::{
    ActionChunk, CameraFrame, ChunkRequest, Clock, Image, JointState, JointVec, Observation,
    ObservedImage, Policy, Stamp,
};

/// Name of the robot on the bus while measuring.
pub const ROBOT: &str = "bench";
/// Side of the load's images (pixels).
const SIZE: usize = 96;
const DT: Duration = Duration::from_millis(100);
const HORIZON: usize = 16;

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamPlan {
    /// Control period.
    pub period: Duration,
    /// How long.
    pub time: Duration,
    /// How much of real time is demanded.
    pub realtime: RealtimeMode,
    /// `SCHED_FIFO` priority of the control thread.
    pub priority: i32,
    /// The processor that the control thread stays on; `None`: any.
    pub cpu: Option<usize>,
    /// Load both cores.
    pub load: bool,
    /// Where the runtime listens.
    pub endpoint: String,
}

/// A periodic loop's figures (µs).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LoopRow {
    /// Periods run.
    pub cycles: u64,
    /// Periods slept through.
    pub missed: u64,
    /// From due to wake-up.
    pub wake: Quantiles,
    /// From due to hand-over; for the bare loop, which hands nothing over, the wake-up again.
    pub handover: Quantiles,
}

/// What the runtime's side saw.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StreamRow {
    /// The control thread.
    pub control: LoopRow,
    /// The bare clock loop beside it.
    pub bare: LoopRow,
    /// Commands that the publisher's ring had no room for.
    pub dropped: u64,
    /// Commands that the publisher put on the bus.
    pub published: u64,
    /// Of these, more than one period after they were made.
    pub published_late: u64,
    /// Chunks computed by the load.
    pub load_chunks: u64,
    /// Simulator steps done by the load.
    pub load_steps: u64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] sinew_runtime::transport::BusError),
    /// Real-time scheduling.
    #[error(transparent)]
    Realtime(#[from] sinew_runtime::rt::RealtimeDenied),
    /// The subscriber did not come.
    #[error("the subscriber's process did not come within {0} s")]
    NoSubscriber(u64),
    /// The guard's limits.
    #[error(transparent)]
    Guard(#[from] GuardError),
}

/// Measures while a subscriber listens; `join` starts it once the runtime listens.
///
/// # Errors
/// [`StreamError`].
pub fn measure(
    plan: &StreamPlan,
    policy: Box<dyn Policy>,
    join: impl FnOnce(),
) -> Result<StreamRow, StreamError> {
    let endpoint = Endpoint::Listen(plan.endpoint.clone());
    let beside = (plan.realtime != RealtimeMode::Off).then_some(plan.priority - 2);
    let bus = rt::with_fifo_threads(beside, || Bus::open(&endpoint))?;
    let keys = Keys::new(ROBOT);
    let publisher = bus.publisher(&keys.command(), Priority::RealTime)?;
    join();
    let patience = Duration::from_secs(10);
    if !bus.wait_for_subscriber(&publisher, patience) {
        return Err(StreamError::NoSubscriber(patience.as_secs()));
    }
    let arm = ArmDescription::desk_arm();
    let names: Vec<String> = arm.joints.iter().map(|j| j.name.clone()).collect();
    let core = core(&arm, plan.period)?;
    let config = StreamConfig {
        period: plan.period,
        realtime: plan.realtime,
        priority: plan.priority,
        cpu: plan.cpu,
        bare_clock: true,
    };
    let (late_after, mut published, mut late) = (plan.period, 0u64, 0u64);
    let counts = Arc::new(std::sync::Mutex::new((0, 0)));
    let counted = counts.clone();
    let (running, ports) = stream::spawn(core, config, ControlTap::off(), move |command| {
        publisher.put(encode_command(&names, command), command.stamp);
        published += 1;
        late += u64::from(Clock::now().since(command.stamp) > late_after);
        // Nobody else holds it for longer than a copy.
        if let Ok(mut counts) = counted.try_lock() {
            *counts = (published, late);
        }
    })?;
    let quit = Arc::new(AtomicBool::new(false));
    let load = plan.load.then(|| Load::start(policy, &arm, quit.clone()));
    let mut row = watch(plan, ports);
    quit.store(true, Ordering::Relaxed);
    if let Some(load) = load {
        (row.load_chunks, row.load_steps) = load.join();
    }
    drop(running);
    let counts = counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    (row.published, row.published_late) = *counts;
    Ok(row)
}

/// A control core for `arm` that plays chunks of a slow sine.
pub(crate) fn core(arm: &ArmDescription, period: Duration) -> Result<ControlCore, GuardError> {
    ControlCore::new(&ControlConfig {
        limits: arm.limits(),
        period,
        state_timeout: Duration::from_secs(1),
        scheduler: SchedulerConfig::new(&arm.limits(), period, HORIZON / 2),
    })
}

/// The far end of a control thread: an arm that stands still, and a policy that answers every order at once.
#[derive(Debug, Default)]
pub(crate) struct Feeder {
    sequence: u64,
    asked: bool,
}

impl Feeder {
    /// Time from one turn to the next.
    pub const TURN: Duration = Duration::from_millis(10);

    /// Feeds a state and the chunks that were ordered; `cycle` is given what the control thread said.
    pub fn turn(&mut self, ports: &mut StreamPorts, mut cycle: impl FnMut(&CycleReport)) {
        let still = JointVec::zeros(JOINTS);
        self.sequence += 1;
        let stamp = Clock::now();
        let state = JointState { stamp, sequence: self.sequence, position: still, velocity: still };
        let _ = ports.states.push(state);
        if !self.asked && self.sequence > 2 {
            let policy = ControlEvent::Authority(AuthorityRequest::Policy);
            self.asked = ports.requests.push(policy).is_ok();
        }
        while let Ok(order) = ports.orders.pop() {
            let _ = ports.chunks.push(sine(order.order.request, order.order.at));
        }
        while ports.freed.pop().is_ok() {}
        while let Ok(report) = ports.reports.pop() {
            if let StreamReport::Cycle(report) = report {
                cycle(&report);
            }
        }
    }
}

/// Feeds states and chunks, and gathers the reports until the time is over.
fn watch(plan: &StreamPlan, mut ports: StreamPorts) -> StreamRow {
    let (mut wake, mut handover, mut bare) =
        (Latencies::default(), Latencies::default(), Latencies::default());
    let [mut cycles, mut missed, mut dropped, mut bare_cycles, mut bare_missed] = [0u64; 5];
    let mut feeder = Feeder::default();
    let end = Instant::now() + plan.time;
    while Instant::now() < end {
        feeder.turn(&mut ports, |cycle| {
            cycles += 1;
            missed += u64::from(cycle.missed);
            dropped += u64::from(cycle.dropped);
            wake.record(cycle.lateness);
            handover.record(cycle.lateness + cycle.work);
        });
        while let Ok(cycle) = ports.bare.pop() {
            bare_cycles += 1;
            bare_missed += u64::from(cycle.missed);
            bare.record(cycle.lateness);
        }
        std::thread::sleep(Feeder::TURN);
    }
    let row = |cycles, missed, wake: &Latencies, handover: &Latencies| LoopRow {
        cycles,
        missed,
        wake: wake.quantiles(),
        handover: handover.quantiles(),
    };
    StreamRow {
        control: row(cycles, missed, &wake, &handover),
        bare: row(bare_cycles, bare_missed, &bare, &bare),
        dropped,
        published: 0,
        published_late: 0,
        load_chunks: 0,
        load_steps: 0,
    }
}

/// A chunk of a slow sine on every joint.
fn sine(request: u64, at: Stamp) -> ControlEvent {
    let values = (1..=HORIZON).flat_map(|k| {
        let angle = (at + DT * k as u32).as_nanos() as f64 * 1e-9;
        std::iter::repeat_n(0.2 * angle.sin(), JOINTS)
    });
    match ActionChunk::new(request, at, DT, JOINTS, values.collect()) {
        Ok(chunk) => ControlEvent::Chunk(chunk),
        Err(_) => ControlEvent::ChunkFailed(request),
    }
}

/// The threads that keep both cores busy.
struct Load {
    policy: std::thread::JoinHandle<u64>,
    simulator: std::thread::JoinHandle<u64>,
}

impl Load {
    fn start(mut policy: Box<dyn Policy>, arm: &ArmDescription, quit: Arc<AtomicBool>) -> Self {
        let (arm, seen, stop) = (arm.clone(), observation(policy.as_ref()), quit.clone());
        let policy = std::thread::spawn(move || {
            let mut chunks = 0;
            while !stop.load(Ordering::Relaxed) {
                let request = ChunkRequest { seed: chunks, ..ChunkRequest::default() };
                if inference::run(policy.as_mut(), &seen, &request).is_err() {
                    break;
                }
                chunks += 1;
            }
            chunks
        });
        let simulator = std::thread::spawn(move || {
            let scene = Scene::from_seed(&arm, 1);
            let mut world = World::new(&arm, scene.clone());
            let mut renderer = Renderer::new(SIZE, SIZE);
            let mut image = vec![0; SIZE * SIZE * 3];
            let mut steps = 0;
            while !quit.load(Ordering::Relaxed) {
                world.step();
                steps += 1;
                if steps % 10 == 0 {
                    let snapshot = world.snapshot();
                    renderer.render(&arm, &scene, &snapshot, CameraKind::ALL[0], &mut image);
                }
            }
            steps
        });
        Self { policy, simulator }
    }

    /// Chunks computed and simulator steps done.
    fn join(self) -> (u64, u64) {
        // A load thread that panicked has printed it and did no more work.
        (self.policy.join().unwrap_or(0), self.simulator.join().unwrap_or(0))
    }
}

fn observation(policy: &dyn Policy) -> Observation {
    let images = policy.spec().cameras.iter().filter_map(|camera| {
        let image = Image::new(SIZE, SIZE, vec![128; SIZE * SIZE * 3].into()).ok()?;
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        Some(ObservedImage { camera: camera.clone(), frame, age: Duration::ZERO })
    });
    Observation {
        instant: Stamp(0),
        images: images.collect(),
        proprioception: vec![0.0; policy.spec().state_dim],
        proprioception_age: Duration::ZERO,
        instruction: "put the red cube in the left bin".to_owned(),
    }
}
