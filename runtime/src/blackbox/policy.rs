//! A policy whose inferences are recorded.

use super::record::{ChunkHead, InferenceRecord, InferenceResult, ObservationRecord, Steering};
use crate::{
    ActionChunk, CameraFrame, ChunkRequest, Clock, Observation, Policy, PolicyError, PolicySpec,
    Progress, Stamp,
};

/// Takes an inference and the frames that it saw; it must not wait.
type Sink = dyn Fn(InferenceRecord, Vec<(String, CameraFrame)>) + Send;

/// Hands every call on to the policy and records what it was asked, saw and made.
pub struct RecordedPolicy {
    policy: Box<dyn Policy>,
    sink: Box<Sink>,
    open: Option<Open>,
}

/// An inference under way.
struct Open {
    begun: Stamp,
    request: ChunkRequest,
    observation: ObservationRecord,
    frames: Vec<(String, CameraFrame)>,
    steering: Vec<Steering>,
    /// Steps done.
    steps: usize,
}

impl RecordedPolicy {
    /// `policy`, whose inferences go to `sink` with the frames that they saw.
    pub fn new(
        policy: Box<dyn Policy>,
        sink: impl Fn(InferenceRecord, Vec<(String, CameraFrame)>) + Send + 'static,
    ) -> Self {
        Self { policy, sink: Box::new(sink), open: None }
    }

    fn end(&mut self, result: InferenceResult) {
        if let Some(Open { begun, request, observation, frames, steering, .. }) = self.open.take() {
            let ended = Clock::now();
            let record = InferenceRecord { begun, ended, request, observation, steering, result };
            (self.sink)(record, frames);
        }
    }

    fn failed(&mut self, error: PolicyError) -> PolicyError {
        self.end(InferenceResult::Failed(error.to_string()));
        error
    }
}

impl Policy for RecordedPolicy {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.end(InferenceResult::Dropped);
        // Frames share their bytes, so this copies names and numbers only.
        let frame = |i: &crate::ObservedImage| (i.camera.clone(), i.frame.clone());
        self.open = Some(Open {
            begun: Clock::now(),
            request: request.clone(),
            observation: ObservationRecord::of(observation),
            frames: observation.images.iter().map(frame).collect(),
            steering: Vec::new(),
            steps: 0,
        });
        self.policy.begin(observation, request).map_err(|e| self.failed(e))
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        if let Some(open) = &mut self.open {
            open.steps += 1;
        }
        self.policy.advance().map_err(|e| self.failed(e))
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let chunk = self.policy.take_chunk().map_err(|e| self.failed(e))?;
        let report = &chunk.report;
        self.end(InferenceResult::Chunk {
            head: ChunkHead::of(&chunk),
            stages: report.stages.iter().map(|s| (s.stage.to_owned(), s.time)).collect(),
            denoise_steps: report.denoise_steps,
            reach: report.reach,
            caches: report.caches.iter().map(|(name, used)| ((*name).to_owned(), *used)).collect(),
        });
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        if let Some(open) = &mut self.open {
            open.steering.push(Steering::Steps { after: open.steps, steps });
        }
        self.policy.set_denoise_steps(steps)
    }

    fn forget(&mut self) {
        self.policy.forget();
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        if let Some(open) = &mut self.open {
            open.steering.push(Steering::Finish { after: open.steps });
        }
        self.policy.finish_early()
    }
}
