//! Makes a cache schedule from observations, and measures what it costs.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use sinew_runtime::{ActionChunk, ChunkRequest, Observation, Policy, PolicyError, Progress};

use super::branches::{TunedMode, Tuning};
use super::monitor::MonitorConfig;
use super::plan::{bubble, schedule};
use super::schedule::{BlockPlan, Measured, Schedule};

/// Observations that the similarities are the mean of, at least; as many more are measured on.
pub const LEAST_OBSERVATIONS: usize = 8;
/// Share of the reuses that are compared while block errors are measured.
const COMPARED: f64 = 0.2;

/// How a schedule is made.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationPlan {
    /// Updates of each block that are tried; the first whose error is small enough is taken.
    pub budgets: Vec<usize>,
    /// Most volatile blocks that update whenever a later feed-forward block does.
    pub bubbled: usize,
    /// Noise seeds for each observation.
    pub seeds: u64,
    /// Largest mean action error, as a share of the action range.
    pub max_error: f64,
    /// Blocks whose similarities vary more (standard deviation) are never reused.
    pub max_spread: f64,
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
}

/// One budget that was tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tried {
    /// Updates of each block.
    pub budget: usize,
    /// What that costs.
    pub measured: Measured,
    /// Blocks that are never reused, because they vary too much.
    pub unstable: usize,
}

/// What a calibration found.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// The schedule of the smallest budget whose error is small enough.
    pub schedule: Option<Schedule>,
    /// All budgets, in the order in which they were given.
    pub tried: Vec<Tried>,
}

/// Why there is no calibration.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The policy failed.
    #[error("{0}")]
    Policy(#[from] PolicyError),
    /// Its denoiser has no blocks to keep.
    #[error(
        "this policy's head has no denoiser whose blocks could be kept; there is nothing to calibrate"
    )]
    NoBlocks,
    /// There is too little to learn from.
    #[error("there are {found} observations, at least {} are needed: half to learn from, half to measure on", 2 * LEAST_OBSERVATIONS)]
    TooFew {
        /// Observations there are.
        found: usize,
    },
    /// The outputs were no numbers, or their count changed from chunk to chunk.
    #[error(
        "the denoiser's outputs could not be compared: they are no numbers, or their count changed"
    )]
    Unusable,
}

/// Calibrates the denoiser of `policy`, which was loaded with `tuning`, on `observations`: of every two, one is learnt
/// from and one measured on. `said` hears what is going on.
///
/// # Errors
/// [`CalibrationError`].
pub fn calibrate(
    policy: &mut dyn Policy,
    tuning: &Tuning,
    observations: &[Observation],
    plan: &CalibrationPlan,
    said: &mut dyn FnMut(&str),
) -> Result<Calibration, CalibrationError> {
    if tuning.lock().blocks.is_empty() {
        return Err(CalibrationError::NoBlocks);
    }
    if observations.len() < 2 * LEAST_OBSERVATIONS {
        return Err(CalibrationError::TooFew { found: observations.len() });
    }
    tuning.lock().mode = TunedMode::Record;
    let learnt = observations.iter().step_by(2);
    for (i, seen) in learnt.enumerate() {
        said(&format!("recording: observation {} of {}", i + 1, observations.len().div_ceil(2)));
        for seed in 0..plan.seeds.max(1) {
            make(policy, seen, &request(plan, i, seed), seed == 0)?;
        }
    }
    let mut schedules = Vec::with_capacity(plan.budgets.len());
    for budget in &plan.budgets {
        schedules.push(Arc::new(schedule_of(tuning, *budget, plan)?));
    }
    let mut sums: Vec<Sum> = schedules.iter().map(|_| Sum::default()).collect();
    let mut exact = Sum::default();
    let measured: Vec<&Observation> = observations.iter().skip(1).step_by(2).collect();
    for (i, seen) in measured.iter().enumerate() {
        said(&format!("measuring: observation {} of {}", i + 1, measured.len()));
        // Seeds that were not learnt from.
        for seed in 0..plan.seeds.max(1) {
            let request = request(plan, i, plan.seeds + 1 + seed);
            tuning.lock().mode = TunedMode::Off;
            exact.add(&make(policy, seen, &request, seed == 0)?);
            for (schedule, sum) in schedules.iter().zip(&mut sums) {
                let reuse = |share| {
                    let config = MonitorConfig { share, limit: f64::MAX, ..Default::default() };
                    TunedMode::Reuse(schedule.clone(), config)
                };
                tuning.lock().mode = reuse(0.0);
                sum.add(&make(policy, seen, &request, false)?);
                tuning.lock().mode = reuse(COMPARED);
                tuning.lock().errors.clear();
                make(policy, seen, &request, false)?;
                sum.errors.append(&mut tuning.lock().errors);
            }
        }
    }
    tuning.lock().mode = TunedMode::Off;
    let dim = policy.spec().action_dim;
    let mut calibration = Calibration { schedule: None, tried: Vec::new() };
    for (schedule, mut sum) in schedules.into_iter().zip(sums) {
        let measured = Measured { computed: schedule.share(), ..sum.against(&exact, dim) };
        let unstable = schedule.blocks.iter().filter(|b| b.updates.is_none()).count();
        calibration.tried.push(Tried { budget: schedule.budget, measured, unstable });
        if calibration.schedule.is_none() && measured.mean_relative <= plan.max_error {
            let mut chosen = schedule.as_ref().clone();
            chosen.measured = measured;
            calibration.schedule = Some(chosen);
        }
    }
    Ok(calibration)
}

fn request(plan: &CalibrationPlan, observation: usize, seed: u64) -> ChunkRequest {
    // Noise differs between observations, too.
    let seed = seed.wrapping_mul(1 << 20) + observation as u64;
    ChunkRequest { denoise_steps: plan.denoise_steps, seed, ..ChunkRequest::default() }
}

/// One chunk; of an observation that is not the `first` only what depends on the noise is computed, where it can be.
fn make(
    policy: &mut dyn Policy,
    seen: &Observation,
    request: &ChunkRequest,
    first: bool,
) -> Result<ActionChunk, PolicyError> {
    if first || !policy.resample(request)? {
        policy.begin(seen, request)?;
    }
    while policy.advance()? != Progress::Done {}
    policy.take_chunk()
}

/// The schedule of what `tuning` recorded, with `budget` updates of each block.
fn schedule_of(
    tuning: &Tuning,
    budget: usize,
    plan: &CalibrationPlan,
) -> Result<Schedule, CalibrationError> {
    let tuned = tuning.lock();
    let count = tuned.positions.len();
    let seen = &tuned.likeness;
    if count == 0 || seen.len() != tuned.blocks.len() || seen.iter().any(|s| s.samples() == 0) {
        return Err(CalibrationError::Unusable);
    }
    let mut updates: Vec<_> = seen
        .iter()
        .map(|s| {
            let stable = s.spread() <= plan.max_spread;
            stable.then(|| schedule(|i, j| s.similarity(i, j), count, budget).0)
        })
        .collect();
    let volatility: Vec<f64> = seen.iter().map(|s| s.volatility()).collect();
    let bubbled = bubble(&tuned.blocks, &volatility, &mut updates, plan.bubbled);
    let near = |s: &super::Likeness| {
        let sum: f64 = (1..count).map(|k| s.similarity(k - 1, k)).sum();
        if count > 1 { sum / (count - 1) as f64 } else { 1.0 }
    };
    let blocks =
        tuned.blocks.iter().zip(seen).zip(updates).map(|((block, s), updates)| BlockPlan {
            name: block.name.clone(),
            updates,
            similarity: near(s),
            spread: s.spread(),
            volatility: s.volatility(),
        });
    let blocks = blocks.collect();
    let (weights, positions) = (tuned.weights_sha256.clone(), tuned.positions.clone());
    let mut made = Schedule::new(weights, positions, budget, blocks);
    made.bubbled = bubbled.into_iter().map(|b| tuned.blocks[b].name.clone()).collect();
    made.samples = seen.iter().map(|s| s.samples()).min().unwrap_or(0);
    Ok(made)
}

/// Actions and times of some chunks.
#[derive(Default)]
struct Sum {
    actions: Vec<f64>,
    chunks: usize,
    denoising: Duration,
    errors: Vec<f64>,
}

impl Sum {
    fn add(&mut self, chunk: &ActionChunk) {
        self.actions.extend_from_slice(chunk.values());
        self.chunks += 1;
        let denoising = chunk.report.stages.iter().filter(|s| s.stage == "denoise");
        self.denoising += denoising.map(|s| s.time).sum();
    }

    /// What it costs against the `exact` chunks, of `dim` values an action.
    fn against(&mut self, exact: &Self, dim: usize) -> Measured {
        let mut errors: Vec<f64> =
            self.actions.iter().zip(&exact.actions).map(|(a, b)| (a - b).abs()).collect();
        let count = errors.len().max(1) as f64;
        let column = |d: usize| exact.actions.iter().skip(d).step_by(dim.max(1));
        let shares = (0..dim).map(|d| {
            let low = column(d).copied().fold(f64::INFINITY, f64::min);
            let high = column(d).copied().fold(f64::NEG_INFINITY, f64::max);
            let own = errors.iter().skip(d).step_by(dim);
            let mean = own.sum::<f64>() / (count / dim as f64);
            // A dimension that never moves has no range to be a share of.
            if high > low { mean / (high - low) } else { 0.0 }
        });
        let mean_relative = shares.sum::<f64>() / dim.max(1) as f64;
        let mean = errors.iter().sum::<f64>() / count;
        Measured {
            computed: 1.0,
            time: self.denoising.as_secs_f64() / exact.denoising.as_secs_f64().max(1e-12),
            chunks: self.chunks,
            mean,
            p99: quantile(&mut errors, 0.99),
            max: errors.iter().copied().fold(0.0, f64::max),
            mean_relative,
            block_error: quantile(&mut self.errors, 0.95),
        }
    }
}

/// The value that the share `q` of `values` is not above; 0 of none.
fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (q * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}
