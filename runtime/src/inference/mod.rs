//! The inference thread: observations in, chunks out, one bounded step of the policy at a time.

mod anytime;
mod prefix;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use rtrb::{Consumer, Producer};

use crate::control::ControlEvent;
use crate::ingest::{Ingest, IngestError};
use crate::scheduler::ChunkOrder;
use crate::scheduler::strategy::Guide;
use crate::{
    ActionChunk, ActionKind, ChunkReport, ChunkRequest, Clock, Observation, PlannedBlock, Policy,
    PolicyError, Progress, Stamp,
};

pub use anytime::{Anytime, AnytimeConfig, Choice, Decision, Why};
pub use prefix::prefix_of;

/// How often the thread looks for orders: well under a control period.
const POLL: Duration = Duration::from_millis(1);
/// After a failed attempt the thread lets others run before it tries again.
const RETRY: Duration = Duration::from_millis(5);

/// An order with the plan that its chunk has to join.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct InferenceOrder {
    /// The order.
    pub order: ChunkOrder,
    /// The plan; `None` when the order's guide is [`Guide::Free`].
    pub plan: Option<PlannedBlock>,
}

/// What the thread says of one inference.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub enum InferenceReport {
    /// A chunk was made.
    Chunk {
        /// The instruction that it follows.
        instruction: String,
        /// From order to hand-over.
        latency: Duration,
        /// What each stage took, what the caches did.
        report: ChunkReport,
        /// How many denoise steps, and why.
        decision: Option<Decision>,
        /// Age of the observation's parts when the order came: name and age.
        ages: Vec<(String, Duration)>,
    },
    /// No observation could be made.
    NotObserved(String),
    /// The policy failed.
    Failed(String),
    /// A newer order came: the inference was dropped between two steps.
    Dropped,
    /// The instruction changed: the inference for the old one was dropped between two steps.
    Redirected,
}

/// Settings of the thread.
#[derive(Debug, Clone, PartialEq)]
pub struct InferenceConfig {
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Seed of the first chunk's noise; each further chunk counts up.
    pub seed: u64,
    /// What the policy's actions mean, joint by joint.
    pub kinds: Vec<ActionKind>,
    /// Limits of the anytime planning.
    pub anytime: AnytimeConfig,
}

/// The thread's shared inputs.
#[derive(Clone)]
pub struct InferenceInputs {
    /// The newest sensor samples. Never touched by the control thread.
    pub ingest: Arc<Mutex<Ingest>>,
    /// The instruction to follow.
    pub instruction: Arc<Mutex<String>>,
}

/// The running thread, which gives the policy back when it ends, and its reports.
pub type InferenceThread = (JoinHandle<Box<dyn Policy>>, Receiver<InferenceReport>);

/// Starts the thread; it ends when `orders` loses its producer.
///
/// # Errors
/// The operating system's refusal to start a thread.
pub fn spawn(
    policy: Box<dyn Policy>,
    config: InferenceConfig,
    inputs: InferenceInputs,
    orders: Consumer<InferenceOrder>,
    chunks: Producer<ControlEvent>,
    freed: Consumer<ActionChunk>,
) -> std::io::Result<InferenceThread> {
    // When nobody reads the reports they are dropped, and the policy does not wait.
    let (reports, received) = crossbeam_channel::bounded(256);
    let anytime = Anytime::new(config.anytime);
    let mut worker =
        Worker { policy, config, inputs, chunks, reports, anytime, made: 0, shown: None };
    let mut ends = (orders, freed);
    let thread = std::thread::Builder::new().name("sinew-inference".into()).spawn(move || {
        let (orders, freed) = (&mut ends.0, &mut ends.1);
        while !orders.is_abandoned() {
            while freed.pop().is_ok() {}
            match orders.pop() {
                Ok(order) => worker.answer(&order, || orders.peek().is_ok()),
                Err(_) => {
                    worker.show(Clock::now());
                    std::thread::sleep(POLL);
                }
            }
        }
        worker.policy
    })?;
    Ok((thread, received))
}

struct Worker {
    policy: Box<dyn Policy>,
    config: InferenceConfig,
    inputs: InferenceInputs,
    chunks: Producer<ControlEvent>,
    reports: Sender<InferenceReport>,
    anytime: Anytime,
    made: u64,
    /// When the policy was last shown an observation that no chunk was made of.
    shown: Option<Stamp>,
}

impl Worker {
    /// Shows the policy what is seen at `now`, when it remembers observations and the last was long enough ago.
    fn show(&mut self, now: Stamp) {
        let Some(period) = self.policy.history_period() else { return };
        if self.shown.is_some_and(|last| now.since(last) < period) {
            return;
        }
        self.shown = Some(now);
        // What cannot be observed, or does not fit, is said when a chunk is asked for.
        if let Ok(seen) = self.observe(now) {
            let _ = self.policy.remember(&seen);
        }
    }

    /// The newest observation, with the instruction to follow.
    fn observe(&self, now: Stamp) -> Result<Observation, IngestError> {
        // A poisoned lock only means that another thread died between two whole updates.
        let instruction =
            self.inputs.instruction.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ingest = self.inputs.ingest.lock().unwrap_or_else(PoisonError::into_inner);
        ingest.observe(&instruction, now)
    }

    fn answer(&mut self, order: &InferenceOrder, overtaken: impl Fn() -> bool) {
        let (report, event) = match self.infer(order, overtaken) {
            Ok((report, chunk)) => (report, ControlEvent::Chunk(chunk)),
            Err(report) => {
                if !matches!(report, InferenceReport::Dropped | InferenceReport::Redirected) {
                    std::thread::sleep(RETRY);
                }
                (report, ControlEvent::ChunkFailed(order.order.request))
            }
        };
        // One order is open at a time, so there is room.
        let _ = self.chunks.push(event);
        let _ = self.reports.try_send(report);
    }

    // The report is sent on in either case.
    #[allow(clippy::result_large_err)]
    fn infer(
        &mut self,
        InferenceOrder { order, plan }: &InferenceOrder,
        overtaken: impl Fn() -> bool,
    ) -> Result<(InferenceReport, ActionChunk), InferenceReport> {
        let mut seen =
            self.observe(Clock::now()).map_err(|e| InferenceReport::NotObserved(e.to_string()))?;
        let mut ages: Vec<_> = seen.images.iter().map(|i| (i.camera.clone(), i.age)).collect();
        ages.push(("state".to_owned(), seen.proprioception_age));
        let seed = self.config.seed.wrapping_add(self.made);
        let wanted = self.config.denoise_steps.unwrap_or(self.policy.spec().denoise_steps);
        let begun = Clock::now();
        let exact = self.anytime.exact(order.deadline, begun);
        let steps = self.anytime.begin(wanted, order.deadline, begun);
        let request =
            prepare(order, plan.as_ref(), &mut seen, self.policy.spec().dt(), &self.config.kinds);
        let request = ChunkRequest { denoise_steps: Some(steps), seed, exact, ..request };
        self.made += 1;
        let said = &self.inputs.instruction;
        let redirected =
            || *said.lock().unwrap_or_else(PoisonError::into_inner) != seen.instruction;
        let over = || overtaken() || redirected();
        let made = advance(self.policy.as_mut(), &seen, &request, &mut self.anytime, over);
        let decision = self.anytime.end();
        let dropped =
            || if redirected() { InferenceReport::Redirected } else { InferenceReport::Dropped };
        let mut chunk =
            made.map_err(|e| InferenceReport::Failed(e.to_string()))?.ok_or_else(dropped)?;
        if exact {
            self.anytime.exact_took(Clock::now().since(begun));
        }
        // The last step may have been under way when the instruction changed.
        if redirected() {
            return Err(InferenceReport::Redirected);
        }
        chunk.make_absolute(&self.config.kinds, &seen.proprioception);
        let report = std::mem::take(&mut chunk.report);
        let (latency, instruction) = (Clock::now().since(order.at), seen.instruction);
        Ok((InferenceReport::Chunk { instruction, latency, report, decision, ages }, chunk))
    }
}

/// The request that answers `order` from `seen`, which sees the future state when the order rolls forward.
pub fn prepare(
    order: &ChunkOrder,
    plan: Option<&PlannedBlock>,
    seen: &mut Observation,
    dt: Duration,
    kinds: &[ActionKind],
) -> ChunkRequest {
    if let (Guide::RollForward, Some(row)) = (order.guide, plan.and_then(|p| p.row(0))) {
        seen.proprioception.clear();
        seen.proprioception.extend_from_slice(row);
    }
    let prefix = prefix_of(order, plan, seen, dt, kinds);
    ChunkRequest { id: order.request, prefix, ..ChunkRequest::default() }
}

/// One inference under the planner's eyes; `None` when it was overtaken by a newer order.
fn advance(
    policy: &mut dyn Policy,
    observation: &Observation,
    request: &ChunkRequest,
    anytime: &mut Anytime,
    overtaken: impl Fn() -> bool,
) -> Result<Option<ActionChunk>, PolicyError> {
    policy.begin(observation, request)?;
    loop {
        let progress = policy.advance()?;
        let (denoised, next) = match progress {
            Progress::Step { denoised, next_denoises, .. } => (denoised, next_denoises),
            Progress::Done => (true, false),
        };
        let choice = anytime.on_step(denoised, next, Clock::now());
        if progress == Progress::Done {
            return policy.take_chunk().map(Some);
        }
        match choice {
            Choice::Finish if policy.finish_early()? => return policy.take_chunk().map(Some),
            Choice::Steps(steps) => {
                policy.set_denoise_steps(steps)?;
            }
            _ => {}
        }
        if overtaken() {
            return Ok(None);
        }
    }
}

/// One whole inference, its stages timed into `anytime`.
///
/// # Errors
/// What the policy gave.
pub fn timed(
    policy: &mut dyn Policy,
    observation: &Observation,
    request: &ChunkRequest,
    anytime: &mut Anytime,
) -> Result<ActionChunk, PolicyError> {
    let steps = request.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    anytime.begin(steps, None, Clock::now());
    let made = advance(policy, observation, request, anytime, || false);
    anytime.end();
    // Nothing overtakes it.
    made.and_then(|chunk| chunk.ok_or(PolicyError::OutOfTurn("the inference was dropped")))
}

/// One whole inference.
///
/// # Errors
/// What the policy gave.
pub fn run(
    policy: &mut dyn Policy,
    observation: &Observation,
    request: &ChunkRequest,
) -> Result<ActionChunk, PolicyError> {
    policy.begin(observation, request)?;
    while policy.advance()? != Progress::Done {}
    policy.take_chunk()
}
