//! Makes a cache schedule from observations, and measures what it costs.

use std::sync::Arc;

use serde::Serialize;
use sinew_runtime::{ActionChunk, ChunkRequest, Observation, Policy, PolicyError, Progress};

use super::branches::{TunedMode, Tuning};
use super::errors::{Errors, quantile};
use super::monitor::MonitorConfig;
use super::plan::{Updates, bubble, schedule};
use super::schedule::{BlockPlan, Form, Measured, Schedule};
use super::slope;
use super::{Likeness, Tuned};

/// Observations that the similarities are the mean of, at least; as many more are measured on.
pub const LEAST_OBSERVATIONS: usize = 8;
/// Share of the reuses that are compared while block errors are measured.
const COMPARED: f64 = 0.2;

/// How a schedule is made.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationPlan {
    /// Forms that are tried.
    pub forms: Vec<Form>,
    /// Updates of each block that are tried. What computes least, of all with an error that is small enough, is taken.
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

/// One schedule that was tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tried {
    /// Its form.
    pub form: Form,
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
    /// The schedule that computes least, of those whose error is small enough.
    pub schedule: Option<Schedule>,
    /// All that were tried: form by form, in the order of the budgets.
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
    let schedules = schedules_of(&tuning.lock(), plan)?;
    let mut sums: Vec<Errors> = schedules.iter().map(|_| Errors::default()).collect();
    let mut exact = Errors::default();
    let measured: Vec<&Observation> = observations.iter().skip(1).step_by(2).collect();
    for (i, seen) in measured.iter().enumerate() {
        said(&format!("measuring: observation {} of {}", i + 1, measured.len()));
        // Seeds that were not learnt from.
        for seed in 0..plan.seeds.max(1) {
            let request = request(plan, i, plan.seeds + 1 + seed);
            tuning.lock().mode = TunedMode::Off;
            add(&mut exact, &make(policy, seen, &request, seed == 0)?);
            for (schedule, sum) in schedules.iter().zip(&mut sums) {
                tuning.lock().mode = reuse(schedule, 0.0);
                add(sum, &make(policy, seen, &request, false)?);
            }
        }
    }
    let dim = policy.spec().action_dim;
    let tried: Vec<Tried> = schedules
        .iter()
        .zip(sums)
        .map(|(schedule, sum)| {
            let measured = Measured { computed: schedule.share(), ..sum.against(&exact, dim) };
            let unstable = schedule.blocks.iter().filter(|b| b.updates.is_none()).count();
            let unstable = if schedule.whole.is_some() { 0 } else { unstable };
            Tried { form: schedule.form, budget: schedule.budget, measured, unstable }
        })
        .collect();
    let good =
        tried.iter().zip(&schedules).filter(|(t, _)| t.measured.mean_relative <= plan.max_error);
    let least = good.min_by(|(a, _), (b, _)| {
        let (a, b) = (a.measured, b.measured);
        a.computed.total_cmp(&b.computed).then(a.mean_relative.total_cmp(&b.mean_relative))
    });
    let mut chosen = None;
    if let Some((tried, schedule)) = least {
        let mut found = schedule.as_ref().clone();
        found.measured = tried.measured;
        said("comparing what it reuses");
        tuning.lock().errors.clear();
        tuning.lock().mode = reuse(schedule, COMPARED);
        for (i, seen) in measured.iter().enumerate() {
            for seed in 0..plan.seeds.max(1) {
                make(policy, seen, &request(plan, i, plan.seeds + 1 + seed), seed == 0)?;
            }
        }
        found.reuse_error = quantile(&mut std::mem::take(&mut tuning.lock().errors), 0.95);
        chosen = Some(found);
    }
    tuning.lock().mode = TunedMode::Off;
    Ok(Calibration { schedule: chosen, tried })
}

/// Adds `chunk`, and the time of its denoising.
fn add(errors: &mut Errors, chunk: &ActionChunk) {
    let denoising = chunk.report.stages.iter().filter(|s| s.stage == "denoise");
    errors.add(chunk.values(), denoising.map(|s| s.time).sum());
}

/// Following `schedule` whatever it costs, with so large a `share` of the reuses compared.
fn reuse(schedule: &Arc<Schedule>, share: f64) -> TunedMode {
    let config = MonitorConfig { share, limit: f64::MAX, ..MonitorConfig::default() };
    TunedMode::Reuse(schedule.clone(), config)
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

/// The schedules of what was recorded: form by form, with every budget.
fn schedules_of(
    tuned: &Tuned,
    plan: &CalibrationPlan,
) -> Result<Vec<Arc<Schedule>>, CalibrationError> {
    let (count, seen) = (tuned.positions.len(), &tuned.likeness);
    let Some(whole) = &tuned.whole else { return Err(CalibrationError::Unusable) };
    let empty = seen.iter().chain([whole]).any(|s| s.samples() == 0);
    if count == 0 || seen.len() != tuned.blocks.len() || empty {
        return Err(CalibrationError::Unusable);
    }
    let most = plan.budgets.iter().copied().max().unwrap_or(1);
    let extrapolated = |kept: &[&Likeness]| {
        let loss = |at, t| {
            let loss =
                |s: &&Likeness| slope::loss(&|i, j| s.product(i, j), &tuned.positions, at, t);
            kept.iter().map(loss).sum()
        };
        slope::schedules(loss, count, most)
    };
    let stable: Vec<&Likeness> = seen.iter().filter(|s| s.spread() <= plan.max_spread).collect();
    let mut all = Vec::new();
    for form in &plan.forms {
        if *form != Form::Held && count > slope::MOST {
            continue;
        }
        // Entry n - 1 of each: the plan with n updates.
        let plans: Vec<Vec<Updates>> = match form {
            Form::Held => Vec::new(),
            Form::Each => seen.iter().map(|s| extrapolated(&[s])).collect(),
            Form::Together => vec![extrapolated(&stable); seen.len()],
            Form::Whole => vec![extrapolated(&[whole])],
        };
        for budget in &plan.budgets {
            let at = |plans: &Vec<Updates>| {
                plans.get((*budget).clamp(1, plans.len().max(1)) - 1).cloned().unwrap_or_default()
            };
            let held = |s: &Likeness| schedule(|i, j| s.similarity(i, j), count, *budget).0;
            let updates: Vec<Updates> = match form {
                Form::Held => seen.iter().map(held).collect(),
                _ => plans.iter().map(at).collect(),
            };
            all.push(Arc::new(schedule_of(tuned, whole, plan, (*form, *budget), updates)));
        }
    }
    Ok(all)
}

/// The schedule of `form` with `updates`: of each block, or of the `whole`.
fn schedule_of(
    tuned: &Tuned,
    whole: &Likeness,
    plan: &CalibrationPlan,
    (form, budget): (Form, usize),
    updates: Vec<Updates>,
) -> Schedule {
    let (seen, last) = (&tuned.likeness, tuned.positions.len() - 1);
    let block_plan = |name: &str, s: &Likeness, updates: Option<Updates>| {
        let updates = updates.map(|mut updates| {
            updates.extend([0, last]);
            updates
        });
        let slopes = match &updates {
            Some(u) if form != Form::Held => {
                slope::slopes(&|i, j| s.product(i, j), &tuned.positions, u)
            }
            _ => Vec::new(),
        };
        let name = name.to_owned();
        BlockPlan {
            name,
            updates,
            slopes,
            similarity: s.near(),
            spread: s.spread(),
            volatility: s.volatility(),
        }
    };
    let mut own: Vec<Option<Updates>> = match form {
        Form::Whole => vec![None; seen.len()],
        _ => updates
            .iter()
            .zip(seen)
            .map(|(u, s)| (s.spread() <= plan.max_spread).then(|| u.clone()))
            .collect(),
    };
    let mut bubbled = Vec::new();
    if matches!(form, Form::Held | Form::Each) {
        let volatility: Vec<f64> = seen.iter().map(Likeness::volatility).collect();
        bubbled = bubble(&tuned.blocks, &volatility, &mut own, plan.bubbled);
    }
    let whole =
        (form == Form::Whole).then(|| block_plan("whole", whole, updates.into_iter().next()));
    let blocks = tuned.blocks.iter().zip(seen).zip(own);
    let blocks = blocks.map(|((block, s), updates)| block_plan(&block.name, s, updates)).collect();
    let (weights, positions) = (tuned.weights_sha256.clone(), tuned.positions.clone());
    let mut made = Schedule::new(weights, positions, (form, budget), whole, blocks);
    made.bubbled = bubbled.into_iter().map(|b| tuned.blocks[b].name.clone()).collect();
    made.samples = seen.iter().map(Likeness::samples).min().unwrap_or(0);
    made
}
