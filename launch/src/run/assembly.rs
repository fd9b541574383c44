//! From a checked launch file to running threads: the process that holds the control thread.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use sinew_drivers::peer::StreamFigures;
use sinew_models::onnx::ResidualNet;
use sinew_runtime::action_space::JointMap;
use sinew_runtime::control::{ControlConfig, ControlCore, ResidualConfig};
use sinew_runtime::guard::SpaceConfig;
use sinew_runtime::inference::{self, InferenceInputs};
use sinew_runtime::ingest::Ingest;
use sinew_runtime::operator::Desk;
use sinew_runtime::rt::{self, RealtimeMode};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::scheduler::starvation::{self, Demand, Holds, StepLatency};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::stream::{self, Stream, StreamConfig};
use sinew_runtime::transport::{Bus, Endpoint, Keys, Priority, Subscription, encode_command};
use sinew_runtime::{ActionKind, CameraFrame, JointLimits, Policy, PolicySpec};

use super::agenda::Agenda;
use super::devices::{Devices, RunningDevices};
use super::monitor::Monitor;
use super::parts::{Part, Placement};
use super::recording::{Recording, RecordingReport};
use super::residual::ResidualThread;
use super::robot::{Robot, RunError};
use super::roster::Roster;
use super::status::Heard;
use super::waiting::{Waiting, World};
use super::{intake, operator, policy_part, referee, remote};
use crate::launch_file::AuthoritySettings;

/// What a launch needs to know, all of it checked.
pub struct Plan {
    /// Which parts run in this process, and which in its children.
    pub placement: Placement,
    /// The robot's name on the bus.
    pub robot: String,
    /// Where the control process listens.
    pub endpoint: String,
    /// The arm's joints, in order.
    pub joints: Vec<String>,
    /// Limits that the guard enforces, one per joint, in the arm's order.
    pub limits: Vec<JointLimits>,
    /// Where the guard keeps the arm.
    pub space: SpaceConfig,
    /// Where episodes begin (rad).
    pub ready: Vec<f64>,
    /// The robot's cameras that the policy sees, in the order of the policy's inputs: (policy's name, robot's name).
    pub views: Vec<(String, String)>,
    /// Time between two frames of the slowest camera.
    pub frame_period: Duration,
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
    /// Older parts make no observation.
    pub max_observation_age: Duration,
    /// How much of real time is demanded.
    pub realtime: RealtimeMode,
    /// `SCHED_FIFO` priority of the control thread.
    pub priority: i32,
    /// How the actions of each joint are played.
    pub kinds: Vec<ActionKind>,
    /// How the policy's actions become joint positions; `None` when they are.
    pub actions: Option<JointMap>,
    /// The processor that the control thread stays on; `None`: any.
    pub cpu: Option<usize>,
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
    /// Actions executed before the next chunk takes over; `None` for half the chunk.
    pub execution_horizon: Option<usize>,
    /// Never fewer denoise steps than this; `None`: never fewer than wanted.
    pub least_denoise_steps: Option<usize>,
    /// Caches are left out when there is time.
    pub exact_in_time: bool,
    /// Inferences may end before the network's last layer.
    pub early_exit: bool,
    /// The text that instructions stand in; `None`: they stand alone.
    pub prompt: Option<String>,
    /// The policy's bundle or checkpoint folder.
    pub policy_file: String,
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Seed of the policy's noise.
    pub seed: u64,
    /// The residual stage's bounds.
    pub residual: Option<ResidualConfig>,
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
    arm: Heard,
    policy: Heard,
    // The fields below drop in order: the control thread first, so that the arm's own watchdog and
    // the peers' holds are the last to act.
    desk: Option<Desk>,
    stream: Option<Stream>,
    residual: Option<ResidualThread>,
    inference: Option<Inference>,
    recording: Recording,
    _subscriptions: Vec<Subscription>,
    devices: RunningDevices,
}

/// The thread that answers the orders: with the policy itself, or by way of the bus.
enum Inference {
    Here(JoinHandle<Box<dyn Policy>>),
    Elsewhere(JoinHandle<()>),
}

impl Plan {
    /// `SCHED_FIFO` priority of what a command passes on its way; right after the control thread and its publisher.
    pub(super) fn beside(&self) -> Option<i32> {
        (self.realtime != RealtimeMode::Off).then_some((self.priority - 2).max(1))
    }
}

impl Launched {
    /// Starts what runs here and waits for the rest; the arm is held until authority is given.
    ///
    /// `film`: the cameras' frames are wanted even when the policy runs elsewhere.
    ///
    /// # Errors
    /// [`RunError`]; what was started by then is ended.
    pub fn start(
        plan: &Plan,
        devices: Devices,
        policy: Option<Box<dyn Policy>>,
        residual: Option<ResidualNet>,
        film: bool,
        waiting: &Waiting,
        mut recording: Recording,
    ) -> Result<Self, RunError> {
        let keys = Keys::new(&plan.robot);
        let listen = Endpoint::Listen(plan.endpoint.clone());
        let bus = rt::with_fifo_threads(plan.beside(), || Bus::open(&listen))?;
        // A session of their own: within one, a subscriber's callback runs inside the publisher's call.
        let device_bus = operator::device_bus(plan)?;
        let (roster, tokens) = Roster::follow(&bus, &keys)?;
        let control = Part::Control.to_string();
        let mut subscriptions =
            vec![tokens, bus.announce(&keys.part(&control, std::process::id()))?];

        let inputs = recording.inputs();
        let mut camera_names: Vec<String> = plan.views.iter().map(|v| v.1.clone()).collect();
        if policy.is_none() && !film && !recording.wants_frames() {
            camera_names.clear();
        }
        let age = plan.max_observation_age;
        let ingest =
            Arc::new(Mutex::new(Ingest::new(&camera_names, age).with_limits(&plan.limits)));
        subscriptions.extend(intake::frames(&bus, &keys, &camera_names, age, &ingest, &inputs)?);
        let (joints, age) = (&plan.joints, plan.state_timeout);
        let states = intake::states(&bus, &keys, joints, age, &ingest, &inputs)?;
        subscriptions.push(states.subscription);
        let referee_state = Arc::default();
        subscriptions.push(referee::listen(&bus, &keys, &referee_state)?);
        let publisher = bus.publisher(&keys.command(), Priority::RealTime)?;
        let devices = RunningDevices::start(devices, plan, &keys, &device_bus)?;

        // Wait for the world, and pay the policy's first-use costs before anything moves.
        let world = World { bus: &bus, keys: &keys, publisher: &publisher, ingest: &ingest };
        let introduced = waiting.wait(plan, &world, policy.is_none())?;
        let mut policy = policy.map(|p| policy_part::renamed(p, plan));
        let (spec, latency) = match (&mut policy, introduced) {
            (Some(policy), _) => {
                let patient = waiting.patient();
                let latency =
                    policy_part::measure(policy.as_mut(), plan, &ingest, patient, waiting.quit)?;
                (policy.spec().clone(), latency)
            }
            (None, Some(introduced)) => (introduced.spec, introduced.latency),
            // The wait above ends with an introduction or an error.
            (None, None) => return Err(RunError::Ended),
        };
        let margins = starvation::check(&plan.demand(&spec, latency))?;
        let config = ControlConfig {
            limits: plan.limits.clone(),
            period: plan.period,
            state_timeout: plan.state_timeout,
            scheduler: plan.scheduler(&spec, latency),
        };
        let core = ControlCore::new(&config)?
            .with_authority(&operator::control(plan), &plan.limits)
            .with_space(plan.space.clone())?;
        let core = match plan.residual {
            Some(config) => core.with_residual(config, &plan.limits),
            None => core,
        };
        // Everything after this is in the recording.
        let tap = recording.start(plan, &config)?;
        let policy = policy.map(|p| inputs.policy(p));

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
        let names = plan.joints.clone();
        let (stream, ports) = stream::spawn(core, stream_config, tap, move |command| {
            publisher.put(encode_command(&names, command), command.stamp);
        })?;
        *states.to_control.lock().unwrap_or_else(PoisonError::into_inner) = Some(ports.states);

        let desk = operator::desk(plan, plan.joints.clone(), &bus, &keys, ports.operator)?;

        let residual = residual.map(|net| ResidualThread::start(net, ports.residual));
        let residual = residual.transpose().map_err(|e| RunError::System {
            what: "starting the residual policy's thread",
            reason: e.to_string(),
        })?;
        let instruction = Arc::new(Mutex::new(String::new()));
        let agenda = Agenda::default();
        subscriptions.push(agenda.serve(&bus, &keys, operator::operators(plan))?);
        let granted = Arc::new(AtomicBool::new(false));
        let (inference, inference_reports) = match policy {
            Some(policy) => {
                let observed =
                    InferenceInputs { ingest: ingest.clone(), instruction: instruction.clone() };
                let (thread, reports) = policy_part::started(inference::spawn(
                    policy,
                    policy_part::inference_config(plan),
                    observed,
                    ports.orders,
                    ports.chunks,
                    ports.freed,
                ))?;
                (Inference::Here(thread), reports)
            }
            None => {
                let rings = (ports.orders, ports.chunks, ports.freed);
                let (words, there) = (instruction.clone(), roster.clone());
                let (granted, inputs) = (granted.clone(), inputs.clone());
                let link = remote::control_side(&bus, &keys, words, there, granted, rings, inputs)?;
                subscriptions.push(link.subscription);
                (Inference::Elsewhere(link.thread), link.reports)
            }
        };
        let remote_policy = matches!(inference, Inference::Elsewhere(_));

        Ok(Self {
            realtime_denied: stream.denied.as_ref().map(ToString::to_string),
            margins,
            latency,
            memory_locked,
            arm: Heard::of(&bus, &keys, &Part::Arm.to_string())?,
            policy: Heard::of(&bus, &keys, &Part::Policy.to_string())?,
            robot: Robot {
                monitor: Monitor::default(),
                limits: plan.limits.clone(),
                ready: plan.ready.clone(),
                frame_period: plan.frame_period,
                status: bus.publisher(&keys.report(&control), Priority::Data)?,
                status_said: None,
                needed: needed(plan, remote_policy, &roster),
                roster,
                granted,
                held: String::new(),
                asked: None,
                ingest,
                instruction,
                agenda,
                said: Vec::new(),
                recorder: inputs,
                referee: referee_state,
                requests: ports.requests,
                stream_reports: ports.reports,
                bare_reports: ports.bare,
                inference_reports,
                bus,
                keys,
            },
            desk: Some(desk),
            stream: Some(stream),
            residual,
            inference: Some(inference),
            recording,
            _subscriptions: subscriptions,
            devices,
        })
    }

    /// The command stream as the arm's driver received it.
    pub fn figures(&self) -> StreamFigures {
        self.devices.stream().or(self.arm.newest().stream).unwrap_or_default()
    }

    /// Simulated time (ms) that was skipped because the host slept too long; `None` without a simulator.
    pub fn simulation_skipped_ms(&self) -> Option<f64> {
        let here = self.devices.simulation_skipped().map(|d| d.as_secs_f64() * 1e3);
        here.or(self.arm.newest().simulation_skipped_ms)
    }

    /// What came in from each sensor, where the policy runs.
    pub fn sensors(&self) -> std::collections::BTreeMap<String, crate::report::SensorFigures> {
        let mut all = self.policy.newest().sensors;
        all.extend(policy_part::sensors(&self.robot.ingest));
        all
    }
}

impl Launched {
    /// Ends the control thread and the policy, then the recording: what is in it.
    pub fn end(&mut self) -> Option<RecordingReport> {
        drop(self.desk.take());
        drop(self.stream.take());
        drop(self.residual.take());
        // A panic in either thread has been printed; the others still have to end.
        match self.inference.take() {
            Some(Inference::Here(thread)) => drop(thread.join()),
            Some(Inference::Elsewhere(thread)) => drop(thread.join()),
            None => {}
        }
        self.recording.finish()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.end();
    }
}

/// The parts in other processes that the run cannot do without, and how often each has been lost so far.
fn needed(plan: &Plan, remote_policy: bool, roster: &Roster) -> Vec<(String, u64)> {
    let mut parts = Vec::new();
    if remote_policy {
        parts.push(Part::Policy.to_string());
    }
    if !plan.placement.here(&Part::Arm) {
        parts.push(Part::Arm.to_string());
    }
    parts.into_iter().map(|p| (p.clone(), roster.lost(&p))).collect()
}

impl Plan {
    fn horizon(&self, spec: &PolicySpec) -> usize {
        self.execution_horizon.unwrap_or(spec.action_horizon.div_ceil(2))
    }

    /// The demand that the starvation calculator judges.
    pub(super) fn demand(&self, spec: &PolicySpec, latency: StepLatency) -> Demand {
        Demand {
            horizon: spec.action_horizon,
            dt: spec.dt(),
            execution_horizon: self.horizon(spec),
            control_period: self.period,
            age: self.frame_period + self.state_period,
            latency,
            strategy: self.strategy,
        }
    }

    fn scheduler(&self, spec: &PolicySpec, latency: StepLatency) -> SchedulerConfig {
        let mut config = SchedulerConfig::new(&self.limits, self.period, self.horizon(spec));
        for (joint, kind) in config.joints.iter_mut().zip(&self.kinds) {
            joint.kind = *kind;
        }
        config.strategy = self.strategy;
        let most = latency.total(latency.steps);
        config.latency = Some(most);
        if self.early_exit {
            config.least_latency = most;
        }
        config
    }
}

/// The newest frame of every camera, for a picture of the run.
pub(super) fn frames(robot: &Robot) -> Vec<CameraFrame> {
    let ingest = robot.ingest.lock().unwrap_or_else(PoisonError::into_inner);
    ingest.frames().map(|(_, frame)| frame.clone()).collect()
}
