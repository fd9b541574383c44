//! What caches save and cost on camera streams: chunk by chunk beside the policy without them, and closed-loop.

mod row;

use std::time::Duration;

use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{ActionChunk, ChunkRequest, Observation, Policy, PolicyError, inference};

use crate::closed_loop::{LoopCase, play};
use row::Sum;

pub use row::{CacheRow, csv, plot};

/// Loads the policy with one choice of caches; `E` is why it may fail.
pub type Load<'a, E> = dyn Fn() -> Result<Box<dyn Policy>, E> + 'a;

/// One choice of caches.
pub struct Choice<'a, E> {
    /// Its name.
    pub name: String,
    /// Choices of one series differ in one setting.
    pub series: String,
    /// Loads the policy with it.
    pub load: Box<Load<'a, E>>,
}

/// What to measure on.
#[derive(Debug, Clone, PartialEq)]
pub struct CachePlan {
    /// Observations, stream by stream, in the order in which they were made.
    pub streams: Vec<Vec<Observation>>,
    /// Every so many chunks the error is taken to be known; what it was in those states the bound for the others.
    pub compared: usize,
    /// Episodes of the demo that are played.
    pub episodes: u64,
    /// Seed of the first scene.
    pub seed: u64,
    /// From an order to its chunk, in the episodes played.
    pub latency: Duration,
}

/// Why there are no figures.
#[derive(Debug)]
pub enum CacheError<E> {
    /// The policy cannot be loaded.
    Load(E),
    /// The policy failed.
    Run(PolicyError),
}

impl<E> From<PolicyError> for CacheError<E> {
    fn from(error: PolicyError) -> Self {
        Self::Run(error)
    }
}

/// Measures every one of `choices` beside the first, without whose caches nothing is approximated: all of them make each
/// chunk, in turn, in a turn that begins with another one each time. `said` hears what is going on.
///
/// # Errors
/// [`CacheError`].
pub fn measure<E>(
    plan: &CachePlan,
    choices: &[Choice<'_, E>],
    said: &mut dyn FnMut(&str),
) -> Result<Vec<CacheRow>, CacheError<E>> {
    let mut policies = Vec::with_capacity(choices.len());
    for choice in choices {
        said(&format!("loading: {}", choice.name));
        policies.push((choice.load)().map_err(CacheError::Load)?);
    }
    let mut sums: Vec<Sum> = choices.iter().map(|_| Sum::default()).collect();
    let all: usize = plan.streams.iter().map(Vec::len).sum();
    let mut made = 0u64;
    for stream in &plan.streams {
        policies.iter_mut().for_each(|policy| policy.forget());
        for seen in stream {
            said(&format!("chunk {} of {all}", made + 1));
            for turn in 0..choices.len() {
                let which = (turn + made as usize) % choices.len();
                sums[which].add(one(policies[which].as_mut(), seen, made)?);
            }
            made += 1;
        }
    }
    let dim = policies.first().map_or(1, |policy| policy.spec().action_dim);
    let mut rows = Vec::with_capacity(choices.len());
    for ((choice, sum), policy) in choices.iter().zip(&sums).zip(&mut policies) {
        let Some(exact) = sums.first() else { break };
        let mut row = sum.beside(exact, choice, dim, plan.compared);
        if plan.episodes > 0 {
            said(&format!("playing: {}", choice.name));
        }
        for number in 0..plan.episodes {
            policy.forget();
            let execution_horizon = (policy.spec().action_horizon / 2).max(1);
            let strategy = StrategyConfig::default();
            let case = LoopCase { strategy, execution_horizon, latency: plan.latency };
            // Other scenes than those that were streamed.
            let seed = plan.seed.wrapping_add(1_000_000 + number);
            let end = play(policy.as_mut(), &case, seed, None, &mut |_| {})?;
            row.successes += u64::from(end.truth.done());
            row.episodes += 1;
        }
        rows.push(row);
    }
    Ok(rows)
}

fn one(policy: &mut dyn Policy, seen: &Observation, k: u64) -> Result<ActionChunk, PolicyError> {
    let request = ChunkRequest { id: k, seed: k, ..ChunkRequest::default() };
    inference::run(policy, seen, &request)
}
