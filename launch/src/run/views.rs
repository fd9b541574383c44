//! The policy's view of the robot's cameras and of what it is told.

use std::time::Duration;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Progress,
};

/// Where the instruction stands in a prompt.
pub const PLACE: &str = "{instruction}";

/// The policy, seeing the robot's cameras under the names that it was trained with.
pub struct Renamed {
    policy: Box<dyn Policy>,
    views: Vec<(String, String)>,
    prompt: Option<String>,
}

impl Renamed {
    /// `policy`, given `views`: (policy's name, robot's name).
    pub fn new(policy: Box<dyn Policy>, views: Vec<(String, String)>) -> Self {
        Self { policy, views, prompt: None }
    }

    /// The same, its instructions put into `prompt` in place of `{instruction}`.
    pub fn with_prompt(self, prompt: Option<String>) -> Self {
        Self { prompt, ..self }
    }

    /// `observation` with the policy's names.
    fn renamed(&self, observation: &Observation) -> Observation {
        let mut seen = observation.clone();
        for image in &mut seen.images {
            if let Some((name, _)) = self.views.iter().find(|v| v.1 == image.camera) {
                image.camera.clone_from(name);
            }
        }
        seen
    }
}

impl Policy for Renamed {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let mut seen = self.renamed(observation);
        if let Some(prompt) = &self.prompt {
            seen.instruction = prompt.replace(PLACE, &observation.instruction);
        }
        self.policy.begin(&seen, request)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        self.policy.take_chunk()
    }

    fn history_period(&self) -> Option<Duration> {
        self.policy.history_period()
    }

    fn remember(&mut self, observation: &Observation) -> Result<(), PolicyError> {
        let seen = self.renamed(observation);
        self.policy.remember(&seen)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        self.policy.set_denoise_steps(steps)
    }

    fn forget(&mut self) {
        self.policy.forget();
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        self.policy.finish_early()
    }
}
