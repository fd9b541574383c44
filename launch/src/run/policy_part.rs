//! The policy as a part: ingest, the inference thread and, in a process of its own, the link to the control side.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rtrb::RingBuffer;
use sinew_runtime::blackbox::RecordedPolicy;
use sinew_runtime::inference::{
    self, Anytime, AnytimeConfig, InferenceConfig, InferenceInputs, InferenceThread,
};
use sinew_runtime::ingest::Ingest;
use sinew_runtime::scheduler::starvation::{self, StepLatency};
use sinew_runtime::transport::{Bus, Keys, PolicyIntroduction, Subscription, encode_policy};
use sinew_runtime::{ChunkRequest, Clock, Observation, Policy};

use super::assembly::Plan;
use super::intake;
use super::parts::Part;
use super::recording::Inputs;
use super::remote::{InferenceEnds, PolicySide, policy_side};
use super::robot::RunError;
use super::status::{PartStatus, StatusPeer};
use super::views::Renamed;
use super::waiting::PATIENCE;
use crate::report::SensorFigures;

/// Inferences that may wait for their answer to be sent.
const INFERENCES: usize = 16;
/// How often an inference that seems too slow is timed, at most.
const MEASUREMENTS: usize = 4;
/// Inferences that are timed at once, and how long that may take.
const MEASURED_RUNS: u32 = 8;
const MEASURED_TIME: Duration = Duration::from_secs(3);

/// `policy` with the robot's cameras under its own names, and instructions as its prompt has them.
pub(super) fn renamed(policy: Box<dyn Policy>, plan: &Plan) -> Box<dyn Policy> {
    Box::new(Renamed::new(policy, plan.views.clone()).with_prompt(plan.prompt.clone()))
}

/// Settings of the inference thread.
pub(super) fn inference_config(plan: &Plan) -> InferenceConfig {
    InferenceConfig {
        denoise_steps: plan.denoise_steps,
        seed: plan.seed,
        kinds: plan.kinds.clone(),
        anytime: AnytimeConfig {
            least_steps: plan.least_denoise_steps.unwrap_or(usize::MAX),
            margin: plan.period * 2,
            exact_in_time: plan.exact_in_time,
        },
    }
}

/// What a thread's refusal to start means for the run.
pub(super) fn started(
    thread: std::io::Result<InferenceThread>,
) -> Result<InferenceThread, RunError> {
    thread.map_err(|e| RunError::System {
        what: "starting the inference thread",
        reason: e.to_string(),
    })
}

/// Waits for the first whole observation and runs the policy on it, for nobody: how long it takes.
///
/// The first run pays the first-use costs and is not counted. When something is missing for long, that is said and, where `patient`, waited for on.
pub(super) fn measure(
    policy: &mut dyn Policy,
    plan: &Plan,
    ingest: &Mutex<Ingest>,
    patient: bool,
    quit: &AtomicBool,
) -> Result<StepLatency, RunError> {
    let mut end = Instant::now() + PATIENCE;
    let seen = loop {
        let tried =
            ingest.lock().unwrap_or_else(PoisonError::into_inner).observe("warm up", Clock::now());
        match tried {
            Ok(seen) => break seen,
            Err(_) if quit.load(Ordering::Relaxed) => return Err(RunError::Ended),
            Err(why) if Instant::now() > end => {
                if !patient {
                    let what = format!("a whole observation ({why})");
                    let (seconds, remedy) = (PATIENCE.as_secs(), "check the named sensor");
                    return Err(RunError::Silent { what, seconds, remedy });
                }
                end = Instant::now() + PATIENCE;
                eprintln!("sinew: the policy waits for a whole observation: {why}");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let steps = plan.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    // Early exits would make it less than a chunk may take.
    let request =
        ChunkRequest { denoise_steps: Some(steps), whole: true, ..ChunkRequest::default() };
    inference::run(policy, &seen, &request)?;
    let mut latency = time(policy, plan, &seen, &request, steps)?;
    // A computer that was busy for a moment is no reason to refuse to run.
    for _ in 1..MEASUREMENTS {
        if starvation::check(&plan.demand(policy.spec(), latency)).is_ok() {
            break;
        }
        latency = time(policy, plan, &seen, &request, steps)?;
    }
    // What a run does must not depend on how often it was timed.
    policy.forget();
    Ok(latency)
}

/// How long an inference takes, by some of them.
fn time(
    policy: &mut dyn Policy,
    plan: &Plan,
    seen: &Observation,
    request: &ChunkRequest,
    steps: usize,
) -> Result<StepLatency, RunError> {
    let mut anytime = Anytime::new(AnytimeConfig {
        least_steps: usize::MAX,
        margin: Duration::ZERO,
        exact_in_time: false,
    });
    let begun = Instant::now();
    let (mut runs, mut slowest) = (0, Duration::ZERO);
    while runs == 0 || (runs < MEASURED_RUNS && begun.elapsed() < MEASURED_TIME) {
        let start = Instant::now();
        inference::timed(policy, seen, request, &mut anytime)?;
        slowest = slowest.max(start.elapsed());
        runs += 1;
    }
    // A run was just timed, so there is something to tell.
    let fixed = begun.elapsed() / runs;
    let mut latency =
        anytime.latency(steps).unwrap_or(StepLatency { fixed, step: Duration::ZERO, steps });
    if plan.early_exit {
        // Deeper exits take longer: all of them together take less than so many of the deepest.
        let count = u32::try_from(steps.max(1)).unwrap_or(u32::MAX);
        latency.step = slowest.saturating_sub(latency.fixed) / count;
    }
    Ok(latency)
}

/// What came in from each sensor.
pub(super) fn sensors(ingest: &Mutex<Ingest>) -> BTreeMap<String, SensorFigures> {
    let intakes = ingest.lock().unwrap_or_else(PoisonError::into_inner).intakes();
    intakes.into_iter().map(|(name, i)| (name, SensorFigures::from(i))).collect()
}

/// A policy that answers orders from the bus; dropping it ends its threads.
pub(super) struct RunningPolicy {
    _token: Subscription,
    _introduction: Subscription,
    _status: StatusPeer,
    link: Option<PolicySide>,
    inference: Option<JoinHandle<Box<dyn Policy>>>,
    _sensors: Vec<Subscription>,
}

impl RunningPolicy {
    /// Starts `policy`; it is announced once it has made its first chunk.
    pub fn start(
        policy: Box<dyn Policy>,
        plan: &Plan,
        keys: &Keys,
        bus: &Bus,
        quit: &AtomicBool,
    ) -> Result<Self, RunError> {
        let cameras: Vec<String> = plan.views.iter().map(|v| v.1.clone()).collect();
        let ingest = Arc::new(Mutex::new(
            Ingest::new(&cameras, plan.max_observation_age).with_limits(&plan.limits),
        ));
        let age = plan.max_observation_age;
        // The control side records the sensors; the inferences go there with their answers.
        let nowhere = Inputs::default();
        let mut subscriptions = intake::frames(bus, keys, &cameras, age, &ingest, &nowhere)?;
        let states = intake::states(bus, keys, &plan.joints, age, &ingest, &nowhere)?;
        subscriptions.push(states.subscription);
        let spec = policy.spec().clone();
        let mut policy = renamed(policy, plan);
        let latency = measure(policy.as_mut(), plan, &ingest, true, quit)?;
        let (made, records) = crossbeam_channel::bounded(INFERENCES);
        // Nobody waits for a full queue: what is lost there is missed at the replay by its number.
        let sink = move |record, _| drop(made.try_send(record));
        let policy = Box::new(RecordedPolicy::new(policy, sink));

        let instruction = Arc::new(Mutex::new(String::new()));
        let inputs = InferenceInputs { ingest: ingest.clone(), instruction: instruction.clone() };
        let (orders, orders_in) = RingBuffer::new(4);
        let (chunks_out, chunks) = RingBuffer::new(4);
        // Chunks leave this process as bytes; none comes back to be freed.
        let (_, freed) = RingBuffer::new(1);
        let config = inference_config(plan);
        let (inference, reports) =
            started(inference::spawn(policy, config, inputs, orders_in, chunks_out, freed))?;
        let link = policy_side(
            bus,
            keys,
            InferenceEnds { orders, chunks, reports, records, instruction },
        )?;

        let introduction =
            encode_policy(&PolicyIntroduction { file: plan.policy_file.clone(), spec, latency });
        let process = std::process::id();
        let look =
            move || PartStatus { process, sensors: sensors(&ingest), ..PartStatus::default() };
        let part = Part::Policy.to_string();
        Ok(Self {
            _introduction: bus.serve(&keys.policy(), move |_| Ok(introduction.clone()))?,
            _status: StatusPeer::spawn(bus, keys, &part, look)?,
            link: Some(link),
            inference: Some(inference),
            _sensors: subscriptions,
            _token: bus.announce(&keys.part(&part, process))?,
        })
    }
}

impl Drop for RunningPolicy {
    fn drop(&mut self) {
        drop(self.link.take());
        if let Some(thread) = self.inference.take() {
            // A panic in it has been printed; the others still have to end.
            let _ = thread.join();
        }
    }
}
