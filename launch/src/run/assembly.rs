//! From a checked launch file to running threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sinew_drivers::peer::{ArmPeer, CameraPeer, StreamFigures};
use sinew_runtime::control::{ControlConfig, ControlCore};
use sinew_runtime::guard::SpaceConfig;
use sinew_runtime::inference::{self, Anytime, AnytimeConfig, InferenceConfig, InferenceInputs};
use sinew_runtime::ingest::{Ingest, Intake};
use sinew_runtime::operator::Desk;
use sinew_runtime::rt::{self, RealtimeMode};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::scheduler::starvation::{self, Demand, Holds, StepLatency};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::stream::{self, Stream, StreamConfig};
use sinew_runtime::transport::{
    Bus, Endpoint, Keys, Priority, Subscription, decode_frame, decode_state, encode_command,
};
use sinew_runtime::{
    ActionKind, ArmDriver, Camera, CameraFrame, ChunkRequest, Clock, JointLimits, Policy,
    PolicySpec,
};

use crate::launch_file::AuthoritySettings;

use super::monitor::Monitor;
use super::operator;
use super::referee::{self, RefereePeer};
use super::robot::{Robot, RunError};

/// How long the parts may take to find each other.
const PATIENCE: Duration = Duration::from_secs(10);
/// Inferences that are timed before the start, and how long that may take.
const MEASURED_RUNS: u32 = 8;
const MEASURED_TIME: Duration = Duration::from_secs(3);

/// A camera of the robot: its name, and what captures.
pub type NamedCamera = (String, Box<dyn Camera>);

/// The devices of a launch, before they are put on the bus.
pub struct Devices {
    /// The arm.
    pub arm: Box<dyn ArmDriver>,
    /// The cameras.
    pub cameras: Vec<NamedCamera>,
    /// The simulator, when the devices are simulated: it judges the episodes.
    pub sim: Option<sinew_drivers::sim::SimHandle>,
}

/// What a launch needs to know, all of it checked.
pub struct Plan {
    /// The robot's name on the bus.
    pub robot: String,
    /// Where the runtime listens.
    pub endpoint: String,
    /// Limits that the guard enforces, one per joint, in the arm's order.
    pub limits: Vec<JointLimits>,
    /// Where the guard keeps the arm.
    pub space: SpaceConfig,
    /// Where episodes begin (rad).
    pub ready: Vec<f64>,
    /// The robot's cameras that the policy sees, in the order of the policy's inputs: (policy's name, robot's name).
    pub views: Vec<(String, String)>,
    /// Control period.
    pub period: Duration,
    /// Time between two measured states.
    pub state_period: Duration,
    /// Measured state older than this is stale.
    pub state_timeout: Duration,
    /// Without a command for this long the arm holds by itself.
    pub watchdog: Duration,
    /// Authority, teleoperation and stops.
    pub authority: AuthoritySettings,
    /// Time between two frames of the slowest camera.
    pub frame_period: Duration,
    /// Older parts make no observation.
    pub max_observation_age: Duration,
    /// How much of real time is demanded.
    pub realtime: RealtimeMode,
    /// `SCHED_FIFO` priority of the control thread.
    pub priority: i32,
    /// How the actions of each joint are played.
    pub kinds: Vec<ActionKind>,
    /// The processor that the control thread stays on; `None`: any.
    pub cpu: Option<usize>,
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// Never fewer denoise steps than this; `None`: never fewer than wanted.
    pub least_denoise_steps: Option<usize>,
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Seed of the policy's noise.
    pub seed: u64,
}

/// A running launch; dropping it holds the arm and ends every thread.
pub struct Launched {
    pub(super) robot: Robot,
    /// Why there is no real-time scheduling although it was asked for.
    pub realtime_denied: Option<String>,
    /// What the starvation calculator found.
    pub margins: Holds,
    /// The policy's tail latency before the start.
    pub latency: StepLatency,
    /// Memory is locked; or why not.
    pub memory_locked: Result<(), String>,
    pub(super) arm: ArmPeer,
    // The fields below drop in order: the control thread first, so that the arm's own watchdog and
    // the peers' holds are the last to act.
    desk: Option<Desk>,
    stream: Option<Stream>,
    inference: Option<JoinHandle<Box<dyn Policy>>>,
    _subscriptions: Vec<Subscription>,
    _cameras: Vec<CameraPeer>,
    referee: Option<RefereePeer>,
}

impl Launched {
    /// Starts everything; the arm is held until authority is given.
    ///
    /// # Errors
    /// [`RunError`]; what was started by then is ended.
    pub fn start(plan: &Plan, devices: Devices, policy: Box<dyn Policy>) -> Result<Self, RunError> {
        let keys = Keys::new(&plan.robot);
        let bus = Bus::open(&Endpoint::Listen(plan.endpoint.clone()))?;
        let device_bus = operator::device_bus(plan)?;
        let names = devices.arm.joint_names().to_vec();

        let camera_names: Vec<String> = plan.views.iter().map(|v| v.1.clone()).collect();
        let ingest = Arc::new(Mutex::new(
            Ingest::new(&camera_names, plan.max_observation_age).with_limits(&plan.limits),
        ));
        let mut subscriptions = Vec::new();
        for (index, camera) in camera_names.iter().enumerate() {
            let (ingest, camera_key) = (ingest.clone(), keys.camera(camera));
            subscriptions.push(bus.subscribe(&camera_key, move |attachment, payload| {
                let sequence = attachment.map_or(0, |a| a.sequence);
                match decode_frame(payload, sequence) {
                    Ok(frame) => {
                        ingest
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .on_frame(index, frame);
                    }
                    Err(error) => tracing::warn!(%error, "a camera's message was left out"),
                }
            })?);
        }
        let referee_state = Arc::default();
        let referee =
            devices.sim.map(|sim| RefereePeer::spawn(sim, &keys, &device_bus)).transpose()?;
        if referee.is_some() {
            subscriptions.push(referee::listen(&bus, &keys, &referee_state)?);
        }

        let publisher = bus.publisher(&keys.command(), Priority::RealTime)?;
        let arm = ArmPeer::spawn(devices.arm, operator::arm(plan), &keys, &device_bus)?;
        let mut cameras = Vec::new();
        for (name, camera) in devices.cameras {
            cameras.push(CameraPeer::spawn(camera, &name, &keys, &device_bus)?);
        }
        if !bus.wait_for_subscriber(&publisher, PATIENCE) {
            return Err(silent(
                "the arm's driver",
                "check that it runs and reaches the same endpoint",
            ));
        }

        // Wait for the world, and pay the policy's first-use costs before anything moves.
        let states = subscribe_states(&bus, &keys, &names, ingest.clone())?;
        subscriptions.push(states.subscription);
        let mut policy = Box::new(Renamed { policy, views: plan.views.clone() });
        let latency = measure(policy.as_mut(), plan, &ingest)?;
        let margins = starvation::check(&plan.demand(policy.spec(), latency))?;
        let core = ControlCore::new(&ControlConfig {
            limits: plan.limits.clone(),
            period: plan.period,
            state_timeout: plan.state_timeout,
            scheduler: plan.scheduler(latency),
        })?
        .with_authority(&operator::control(plan), &plan.limits)
        .with_space(plan.space.clone())?;

        let memory_locked = match plan.realtime {
            RealtimeMode::Off => Err("real time is off".to_owned()),
            _ => rt::lock_memory().map_err(|e| e.to_string()),
        };
        let stream_config = StreamConfig {
            period: plan.period,
            realtime: plan.realtime,
            priority: plan.priority,
            cpu: plan.cpu,
            bare_clock: true,
        };
        let joints = names.clone();
        let (stream, ports) = stream::spawn(core, stream_config, move |command| {
            publisher.put(encode_command(&names, command), command.stamp);
        })?;
        *states.to_control.lock().unwrap_or_else(PoisonError::into_inner) = Some(ports.states);

        let desk = operator::desk(plan, joints, &bus, &keys, ports.operator)?;

        let instruction = Arc::new(Mutex::new(String::new()));
        let inference_config = InferenceConfig {
            denoise_steps: plan.denoise_steps,
            seed: plan.seed,
            kinds: plan.kinds.clone(),
            anytime: AnytimeConfig {
                least_steps: plan.least_denoise_steps.unwrap_or(usize::MAX),
                margin: plan.period * 2,
            },
        };
        let inputs = InferenceInputs { ingest: ingest.clone(), instruction: instruction.clone() };
        let (thread, inference_reports) = inference::spawn(
            policy,
            inference_config,
            inputs,
            ports.orders,
            ports.chunks,
            ports.freed,
        )
        .map_err(|e| RunError::System {
            what: "starting the inference thread",
            reason: e.to_string(),
        })?;

        Ok(Self {
            realtime_denied: stream.denied.as_ref().map(ToString::to_string),
            margins,
            latency,
            memory_locked,
            robot: Robot {
                monitor: Monitor::default(),
                limits: plan.limits.clone(),
                ready: plan.ready.clone(),
                frame_period: plan.frame_period,
                ingest,
                instruction,
                referee: referee_state,
                requests: ports.requests,
                stream_reports: ports.reports,
                bare_reports: ports.bare,
                inference_reports,
                bus,
                keys,
            },
            arm,
            desk: Some(desk),
            stream: Some(stream),
            inference: Some(thread),
            _subscriptions: subscriptions,
            _cameras: cameras,
            referee,
        })
    }

    /// The command stream as the arm's driver received it.
    pub fn figures(&self) -> StreamFigures {
        self.arm.figures()
    }

    /// Simulated time that was skipped because the host slept too long; `None` without a simulator.
    pub fn simulation_skipped(&self) -> Option<Duration> {
        self.referee.as_ref().map(RefereePeer::skipped)
    }

    /// What came in from each sensor.
    pub fn intakes(&self) -> Vec<(String, Intake)> {
        self.robot.ingest.lock().unwrap_or_else(PoisonError::into_inner).intakes()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        drop(self.desk.take());
        drop(self.stream.take());
        if let Some(thread) = self.inference.take() {
            // A panic in it has been printed; the others still have to end.
            let _ = thread.join();
        }
    }
}

/// The policy, seeing the robot's cameras under the names that it was trained with.
struct Renamed {
    policy: Box<dyn Policy>,
    views: Vec<(String, String)>,
}

impl Policy for Renamed {
    fn spec(&self) -> &sinew_runtime::PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &sinew_runtime::Observation,
        request: &ChunkRequest,
    ) -> Result<(), sinew_runtime::PolicyError> {
        let mut seen = observation.clone();
        for image in &mut seen.images {
            if let Some((name, _)) = self.views.iter().find(|v| v.1 == image.camera) {
                image.camera.clone_from(name);
            }
        }
        self.policy.begin(&seen, request)
    }

    fn advance(&mut self) -> Result<sinew_runtime::Progress, sinew_runtime::PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<sinew_runtime::ActionChunk, sinew_runtime::PolicyError> {
        self.policy.take_chunk()
    }
}

/// The measured states' way in, and from there to the control thread once it runs.
struct StatesIn {
    subscription: Subscription,
    to_control: Arc<Mutex<Option<rtrb::Producer<sinew_runtime::JointState>>>>,
}

fn subscribe_states(
    bus: &Bus,
    keys: &Keys,
    names: &[String],
    ingest: Arc<Mutex<Ingest>>,
) -> Result<StatesIn, RunError> {
    let to_control: Arc<Mutex<Option<rtrb::Producer<_>>>> = Arc::default();
    let (names, control) = (names.to_vec(), to_control.clone());
    let subscription = bus.subscribe(&keys.state(), move |attachment, payload| {
        let sequence = attachment.map_or(0, |a| a.sequence);
        match decode_state(&names, payload, sequence) {
            Ok(state) => {
                let taken = ingest.lock().unwrap_or_else(PoisonError::into_inner).on_state(state);
                if let Err(why) = taken {
                    tracing::debug!(%why, "a joint state was left out");
                    return; // counted there; the control thread must not see it either
                }
                if let Some(ring) = &mut *control.lock().unwrap_or_else(PoisonError::into_inner) {
                    // A full ring means that the control thread has newer ones to read first.
                    let _ = ring.push(state);
                }
            }
            Err(error) => tracing::warn!(%error, "a joint state was left out"),
        }
    })?;
    Ok(StatesIn { subscription, to_control })
}

/// Waits for the first whole observation and runs the policy on it, for nobody: how long it takes.
///
/// The first run pays the first-use costs and is not counted.
fn measure(
    policy: &mut dyn Policy,
    plan: &Plan,
    ingest: &Mutex<Ingest>,
) -> Result<StepLatency, RunError> {
    let end = Instant::now() + PATIENCE;
    let seen = loop {
        let tried =
            ingest.lock().unwrap_or_else(PoisonError::into_inner).observe("warm up", Clock::now());
        match tried {
            Ok(seen) => break seen,
            Err(why) if Instant::now() > end => {
                return Err(silent(
                    &format!("a whole observation ({why})"),
                    "check the named sensor",
                ));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let steps = plan.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    let request = ChunkRequest { denoise_steps: Some(steps), ..ChunkRequest::default() };
    inference::run(policy, &seen, &request)?;
    let mut anytime =
        Anytime::new(AnytimeConfig { least_steps: usize::MAX, margin: Duration::ZERO });
    let begun = Instant::now();
    let mut runs = 0;
    while runs == 0 || (runs < MEASURED_RUNS && begun.elapsed() < MEASURED_TIME) {
        inference::timed(policy, &seen, &request, &mut anytime)?;
        runs += 1;
    }
    // A run was just timed, so there is something to tell.
    Ok(anytime.latency(steps).unwrap_or(StepLatency {
        fixed: begun.elapsed() / runs,
        step: Duration::ZERO,
        steps,
    }))
}

impl Plan {
    /// The demand that the starvation calculator judges.
    fn demand(&self, spec: &PolicySpec, latency: StepLatency) -> Demand {
        Demand {
            horizon: spec.action_horizon,
            dt: spec.dt(),
            execution_horizon: self.execution_horizon,
            control_period: self.period,
            age: self.frame_period + self.state_period,
            latency,
            strategy: self.strategy,
        }
    }

    fn scheduler(&self, latency: StepLatency) -> SchedulerConfig {
        let mut config = SchedulerConfig::new(&self.limits, self.period, self.execution_horizon);
        for (joint, kind) in config.joints.iter_mut().zip(&self.kinds) {
            joint.kind = *kind;
        }
        config.strategy = self.strategy;
        config.latency = Some(latency.total(latency.steps));
        config
    }
}

fn silent(what: &str, remedy: &'static str) -> RunError {
    RunError::Silent { what: what.to_owned(), seconds: PATIENCE.as_secs(), remedy }
}

/// The newest frame of every camera, for a picture of the run.
pub(super) fn frames(robot: &Robot) -> Vec<CameraFrame> {
    let ingest = robot.ingest.lock().unwrap_or_else(PoisonError::into_inner);
    ingest.frames().map(|(_, frame)| frame.clone()).collect()
}
