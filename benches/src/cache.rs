//! What caches save and cost on the demo's camera streams: chunk by chunk beside the exact policy, and closed-loop.

use std::collections::BTreeMap;
use std::time::Duration;

use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, inference,
};

use crate::closed_loop::{LoopCase, play};
use crate::observed;

/// Loads the policy with one choice of caches; `E` is why it may fail.
pub type Load<'a, E> = dyn Fn() -> Result<Box<dyn Policy>, E> + 'a;

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct CachePlan {
    /// Episodes whose observations are streamed.
    pub streams: u64,
    /// Episodes that are played.
    pub episodes: u64,
    /// Seed of the first scene.
    pub seed: u64,
    /// From an order to its chunk, in the episodes played.
    pub latency: Duration,
}

/// What one choice of caches saves and costs.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CacheRow {
    /// Its name.
    pub name: String,
    /// Chunks compared.
    pub chunks: usize,
    /// Time of all stages against that of the exact policy, chunk beside chunk in one run.
    pub time: f64,
    /// The same for each stage.
    pub stages: BTreeMap<String, f64>,
    /// Share of the blocks that were reused, by cache.
    pub reused: BTreeMap<String, f64>,
    /// Mean error of the actions (their own units).
    pub mean: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Mean error of each action dimension as a share of its range, averaged.
    pub mean_relative: f64,
    /// Episodes done as told, of those played.
    pub successes: u64,
    /// Episodes played.
    pub episodes: u64,
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

/// Measures every one of `choices` beside the policy of `exact`; `said` hears what is going on.
///
/// # Errors
/// [`CacheError`].
pub fn measure<E>(
    plan: &CachePlan,
    exact: &Load<'_, E>,
    choices: &[(String, Box<Load<'_, E>>)],
    said: &mut dyn FnMut(&str),
) -> Result<Vec<CacheRow>, CacheError<E>> {
    let mut reference = exact().map_err(CacheError::Load)?;
    let mut streams = Vec::new();
    for number in 0..plan.streams {
        streams.push(observed::episode(reference.as_mut(), plan.seed.wrapping_add(number))?);
    }
    let mut rows = Vec::new();
    for (name, load) in choices {
        said(name);
        let mut policy = load().map_err(CacheError::Load)?;
        let (mut ours, mut theirs) = (Sum::default(), Sum::default());
        for stream in &streams {
            // The exact policy keeps nothing from frame to frame either way.
            policy.forget();
            for (k, seen) in stream.iter().enumerate() {
                theirs.add(one(reference.as_mut(), seen, k as u64)?);
                ours.add(one(policy.as_mut(), seen, k as u64)?);
            }
        }
        let dim = policy.spec().action_dim;
        let mut row = ours.beside(&theirs, name, dim);
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

#[derive(Default)]
struct Sum {
    actions: Vec<f64>,
    chunks: usize,
    stages: BTreeMap<&'static str, Duration>,
    caches: BTreeMap<&'static str, (u64, u64)>,
}

impl Sum {
    fn add(&mut self, chunk: ActionChunk) {
        self.actions.extend_from_slice(chunk.values());
        self.chunks += 1;
        for stage in chunk.report.stages {
            *self.stages.entry(stage.stage).or_default() += stage.time;
        }
        for (name, CacheUse { lookups, hits, .. }) in chunk.report.caches {
            let sum = self.caches.entry(name).or_default();
            *sum = (sum.0 + u64::from(lookups), sum.1 + u64::from(hits));
        }
    }

    fn beside(self, exact: &Self, name: &str, dim: usize) -> CacheRow {
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64().max(1e-12);
        let mut errors: Vec<f64> =
            self.actions.iter().zip(&exact.actions).map(|(a, b)| (a - b).abs()).collect();
        let count = errors.len().max(1) as f64;
        let shares = (0..dim).map(|d| {
            let column = || exact.actions.iter().copied().skip(d).step_by(dim);
            let range =
                column().fold(f64::NEG_INFINITY, f64::max) - column().fold(f64::INFINITY, f64::min);
            let mean = errors.iter().skip(d).step_by(dim).sum::<f64>() / (count / dim as f64);
            if range > 0.0 { mean / range } else { 0.0 }
        });
        let mean_relative = shares.sum::<f64>() / dim.max(1) as f64;
        let mean = errors.iter().sum::<f64>() / count;
        errors.sort_by(f64::total_cmp);
        let rank = ((0.99 * count).ceil() as usize).saturating_sub(1);
        let stages = self.stages.iter().map(|(stage, time)| {
            let other = exact.stages.get(stage).copied().unwrap_or_default();
            ((*stage).to_owned(), ratio(*time, other))
        });
        let reused = self.caches.iter().filter(|(_, (lookups, _))| *lookups > 0);
        CacheRow {
            name: name.to_owned(),
            chunks: self.chunks,
            time: ratio(self.stages.values().sum(), exact.stages.values().sum()),
            stages: stages.collect(),
            reused: reused
                .map(|(name, (all, hits))| ((*name).to_owned(), *hits as f64 / *all as f64))
                .collect(),
            mean,
            p99: errors.get(rank).copied().unwrap_or(0.0),
            max: errors.last().copied().unwrap_or(0.0),
            mean_relative,
            successes: 0,
            episodes: 0,
        }
    }
}
