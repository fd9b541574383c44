//! The inference thread: observations in, chunks out, one bounded step of the policy at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use rtrb::{Consumer, Producer};

use crate::control::ControlEvent;
use crate::ingest::Ingest;
use crate::scheduler::ChunkOrder;
use crate::{ActionChunk, ChunkRequest, Clock, Policy, PolicyError, Progress, StageTime};

/// How often the thread looks for orders: well under a control period.
const POLL: Duration = Duration::from_millis(1);
/// After a failed attempt the thread lets others run before it tries again.
const RETRY: Duration = Duration::from_millis(5);

/// What the thread says of one inference.
#[derive(Debug, Clone)]
pub enum InferenceReport {
    /// A chunk was made.
    Chunk {
        /// From order to hand-over.
        latency: Duration,
        /// What each stage took.
        stages: Vec<StageTime>,
        /// Age of the observation's parts when the order came: name and age.
        ages: Vec<(String, Duration)>,
    },
    /// No observation could be made.
    NotObserved(String),
    /// The policy failed.
    Failed(String),
}

/// Settings of the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InferenceConfig {
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// Seed of the first chunk's noise; each further chunk counts up.
    pub seed: u64,
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
    orders: Consumer<ChunkOrder>,
    chunks: Producer<ControlEvent>,
    freed: Consumer<ActionChunk>,
) -> std::io::Result<InferenceThread> {
    // When nobody reads the reports they are dropped, and the policy does not wait.
    let (reports, received) = crossbeam_channel::bounded(256);
    let mut worker = Worker { policy, config, inputs, chunks, reports, made: 0 };
    let mut ends = (orders, freed);
    let thread = std::thread::Builder::new().name("sinew-inference".into()).spawn(move || {
        let (orders, freed) = (&mut ends.0, &mut ends.1);
        while !orders.is_abandoned() {
            while freed.pop().is_ok() {}
            match orders.pop() {
                Ok(order) => worker.answer(order),
                Err(_) => std::thread::sleep(POLL),
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
    made: u64,
}

impl Worker {
    fn answer(&mut self, order: ChunkOrder) {
        let (report, event) = match self.infer(order) {
            Ok((report, chunk)) => (report, ControlEvent::Chunk(chunk)),
            Err(report) => {
                std::thread::sleep(RETRY);
                (report, ControlEvent::ChunkFailed(order.request))
            }
        };
        // One order is open at a time, so there is room.
        let _ = self.chunks.push(event);
        let _ = self.reports.try_send(report);
    }

    fn infer(
        &mut self,
        order: ChunkOrder,
    ) -> Result<(InferenceReport, ActionChunk), InferenceReport> {
        // A poisoned lock only means that another thread died between two whole updates.
        let instruction =
            self.inputs.instruction.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let seen = self
            .inputs
            .ingest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .observe(&instruction, Clock::now())
            .map_err(|e| InferenceReport::NotObserved(e.to_string()))?;
        let mut ages: Vec<_> = seen.images.iter().map(|i| (i.camera.clone(), i.age)).collect();
        ages.push(("state".to_owned(), seen.proprioception_age));
        let request = ChunkRequest {
            id: order.request,
            denoise_steps: self.config.denoise_steps,
            seed: self.config.seed.wrapping_add(self.made),
        };
        self.made += 1;
        let mut chunk = run(self.policy.as_mut(), &seen, &request)
            .map_err(|e| InferenceReport::Failed(e.to_string()))?;
        let stages = std::mem::take(&mut chunk.stages);
        let latency = Clock::now().since(order.at);
        Ok((InferenceReport::Chunk { latency, stages, ages }, chunk))
    }
}

/// One whole inference.
///
/// # Errors
/// What the policy gave.
pub fn run(
    policy: &mut dyn Policy,
    observation: &crate::Observation,
    request: &ChunkRequest,
) -> Result<ActionChunk, PolicyError> {
    policy.begin(observation, request)?;
    while policy.advance()? != Progress::Done {}
    policy.take_chunk()
}
