//! What a policy sees while it plays the demo: observations to calibrate and to measure on.

use std::time::Duration;

use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Progress,
};

use crate::closed_loop::{LoopCase, play};

/// From an order to its chunk.
const LATENCY: Duration = Duration::from_millis(100);

/// Keeps the observations that the policy is given.
struct Watched<'a> {
    policy: &'a mut dyn Policy,
    seen: Vec<Observation>,
}

impl Policy for Watched<'_> {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.seen.push(observation.clone());
        self.policy.begin(observation, request)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        self.policy.take_chunk()
    }
}

/// The observations of chunk after chunk of the demo's scene of `seed`, played by `policy`, which executes half of each
/// chunk.
///
/// # Errors
/// What the policy gave.
pub fn episode(policy: &mut dyn Policy, seed: u64) -> Result<Vec<Observation>, PolicyError> {
    let execution_horizon = (policy.spec().action_horizon / 2).max(1);
    let case =
        LoopCase { strategy: StrategyConfig::default(), execution_horizon, latency: LATENCY };
    let mut watched = Watched { policy, seen: Vec::new() };
    play(&mut watched, &case, seed, None, &mut |_| {})?;
    Ok(watched.seen)
}

/// `count` observations from as many episodes as it takes, the first of them the scene of `seed`: at most `each` of one
/// episode, spread over it.
///
/// # Errors
/// What the policy gave.
pub fn observations(
    policy: &mut dyn Policy,
    count: usize,
    each: usize,
    seed: u64,
) -> Result<Vec<Observation>, PolicyError> {
    let mut all = Vec::with_capacity(count);
    for number in 0.. {
        let seen = episode(policy, seed.wrapping_add(number))?;
        let step = seen.len().div_ceil(each.max(1)).max(1);
        all.extend(seen.into_iter().step_by(step));
        if all.len() >= count {
            break;
        }
    }
    all.truncate(count);
    Ok(all)
}
