//! What every policy's inference carries, whatever its network: whom it answers, how long its stages took, and what
//! is said when it is called out of turn.

use std::time::{Duration, Instant};

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, PolicyError, PolicySpec, StageTime, Stamp,
};

/// The most denoise steps that one request may ask for.
pub(crate) const STEP_LIMIT: usize = 1000;

/// `advance` without `begin`.
pub(crate) const NOT_BEGUN: PolicyError = PolicyError::OutOfTurn("advance was called before begin");
/// A change to an inference that there is not.
pub(crate) const NOTHING_BEGUN: PolicyError = PolicyError::OutOfTurn("nothing was begun");
/// `take_chunk` before the inference is done.
pub(crate) const NOT_DONE: PolicyError =
    PolicyError::OutOfTurn("take_chunk was called before the chunk was done");

/// A failure of the computation.
pub(crate) fn compute(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Compute(error.to_string())
}

/// The denoise steps of `request`, or those of `spec` when it leaves them to the policy.
///
/// # Errors
/// [`PolicyError::Compute`] unless they are 1 to `most`.
pub(crate) fn steps(
    request: &ChunkRequest,
    spec: &PolicySpec,
    most: usize,
) -> Result<usize, PolicyError> {
    let steps = request.denoise_steps.unwrap_or(spec.denoise_steps);
    match steps {
        1.. if steps <= most => Ok(steps),
        _ => Err(compute(format!("{steps} denoise steps were asked for; use 1 to {most}"))),
    }
}

/// An inference: the request it answers, the instant of what it saw, the time of each of its `N` stages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket<const N: usize> {
    request: u64,
    instant: Stamp,
    stages: &'static [&'static str; N],
    times: [Duration; N],
}

impl<const N: usize> Ticket<N> {
    /// The inference of `request` from `observation`; its first stage, the preparation, began at `start`.
    pub fn prepared(
        request: &ChunkRequest,
        observation: &Observation,
        stages: &'static [&'static str; N],
        start: Instant,
    ) -> Self {
        let (request, instant) = (request.id, observation.instant);
        let mut ticket = Self { request, instant, stages, times: [Duration::ZERO; N] };
        ticket.add(0, start);
        ticket
    }

    /// Another inference from what this one saw.
    pub fn again(&self, request: &ChunkRequest) -> Self {
        Self { request: request.id, times: [Duration::ZERO; N], ..*self }
    }

    /// Instant of the observation.
    pub fn instant(&self) -> Stamp {
        self.instant
    }

    /// Counts the time since `start` to `stage`.
    pub fn add(&mut self, stage: usize, start: Instant) {
        self.times[stage] += start.elapsed();
    }

    /// Time counted to `stage` so far.
    pub fn time(&self, stage: usize) -> Duration {
        self.times[stage]
    }

    /// The chunk of `actions` (`[H, D]` row by row, physical units), which took `denoise_steps`.
    ///
    /// # Errors
    /// [`PolicyError::Compute`] for values that are no whole rows.
    pub fn chunk(
        &self,
        spec: &PolicySpec,
        actions: Vec<f64>,
        denoise_steps: usize,
    ) -> Result<ActionChunk, PolicyError> {
        let (request, dt, dim) = (self.request, spec.dt(), spec.action_dim);
        let mut chunk =
            ActionChunk::new(request, self.instant, dt, dim, actions).map_err(compute)?;
        let times = self.stages.iter().zip(self.times);
        chunk.report.stages = times.map(|(stage, time)| StageTime { stage, time }).collect();
        chunk.report.denoise_steps = denoise_steps;
        Ok(chunk)
    }
}
