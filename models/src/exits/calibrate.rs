//! Finds thresholds from observations, and measures what ending early costs.

use std::time::Duration;

use serde::Serialize;
use sinew_runtime::inference::run;
use sinew_runtime::{ChunkRequest, Observation, Policy, PolicyError};

use super::file::{ExitPlan, MOST_STEPS, fit};
use super::options::{ExitTuning, SeenExits};
use super::rule::{Gap, LEAST_EXITS, shares, taken, thresholds};
use crate::caches::{Errors, Measured};

/// Observations that thresholds are made of, at least; as many more are measured on.
pub const LEAST_OBSERVATIONS: usize = 8;

/// How exits are calibrated.
#[derive(Debug, Clone, PartialEq)]
pub struct ExitCalibrationPlan {
    /// Layers from exit to exit, in a network whose checkpoint does not say where its exits are.
    pub every: usize,
    /// Flow steps at each exit.
    pub steps: usize,
    /// What is compared.
    pub gap: Gap,
    /// Ratios of the exit shares that are tried; what computes least, of all with an error that is small enough, is taken.
    pub ratios: Vec<f64>,
    /// Noise seeds for each observation.
    pub seeds: u64,
    /// Largest mean action error, as a share of the action range, against the whole network.
    pub max_error: f64,
}

/// Thresholds that were tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TriedExits {
    /// Ratio of the shares; none: every inference ended at the last exit.
    pub ratio: Option<f64>,
    /// One for each exit but the first and the last.
    pub thresholds: Vec<f64>,
    /// Share of the measured inferences that ended at each exit.
    pub taken: Vec<f64>,
    /// What that costs.
    pub measured: Measured,
}

/// What a calibration found.
#[derive(Debug, Clone, PartialEq)]
pub struct ExitCalibration {
    /// The thresholds that compute least, of those whose error is small enough.
    pub plan: Option<ExitPlan>,
    /// Layers before each exit.
    pub layers: Vec<usize>,
    /// All that were tried, after what ending at the last exit costs.
    pub tried: Vec<TriedExits>,
}

/// Why there is no calibration.
#[derive(Debug, thiserror::Error)]
pub enum ExitCalibrationError {
    /// The policy failed.
    #[error("{0}")]
    Policy(#[from] PolicyError),
    /// Its network has too few layers.
    #[error(
        "exits after every {every} of {depth} layers are too few: at least {LEAST_EXITS} are needed; exit more often, or run \
         without early exits"
    )]
    TooShallow {
        /// Layers.
        depth: usize,
        /// Layers from exit to exit.
        every: usize,
    },
    /// There is too little to learn from.
    #[error("there are {found} observations, at least {} are needed: half to learn from, half to measure on", 2 * LEAST_OBSERVATIONS)]
    TooFew {
        /// Observations there are.
        found: usize,
    },
    /// A setting that makes no sense.
    #[error("{0}")]
    Setting(String),
    /// The actions were no numbers, or an inference did not go through all exits.
    #[error(
        "the actions at the exits could not be compared: they are no numbers, or an exit is missing"
    )]
    Unusable,
}

/// One observation with one noise: what it was at its exits, and what the whole network made of it.
struct Sample {
    seen: SeenExits,
    exact: Vec<f64>,
    exact_time: Duration,
}

/// Calibrates the exits of `policy`, which was loaded with `tuning`, on `observations`: of every two, one is learnt from and
/// one measured on. `said` hears what is going on.
///
/// # Errors
/// [`ExitCalibrationError`].
pub fn calibrate(
    policy: &mut dyn Policy,
    tuning: &ExitTuning,
    observations: &[Observation],
    plan: &ExitCalibrationPlan,
    said: &mut dyn FnMut(&str),
) -> Result<ExitCalibration, ExitCalibrationError> {
    check(plan)?;
    if observations.len() < 2 * LEAST_OBSERVATIONS {
        return Err(ExitCalibrationError::TooFew { found: observations.len() });
    }
    let (depth, trained, weights_sha256) = {
        let tuned = tuning.lock();
        (tuned.depth, tuned.trained.clone(), tuned.weights_sha256.clone())
    };
    let layers = trained.unwrap_or_else(|| exits(depth, plan.every));
    if fit(&layers, depth).is_err() {
        return Err(ExitCalibrationError::TooShallow { depth, every: plan.every });
    }
    let never = vec![0.0; layers.len() - 2];
    let through =
        ExitPlan::new(weights_sha256, layers.clone(), (plan.steps, plan.gap), never.clone());
    let mut halves = [Vec::new(), Vec::new()];
    for (i, seen) in observations.iter().enumerate() {
        said(&format!("observation {} of {}", i + 1, observations.len()));
        for seed in 0..plan.seeds.max(1) {
            // Noise differs between observations, too.
            let seed = seed.wrapping_mul(1 << 20) + i as u64;
            let request = ChunkRequest { seed, ..ChunkRequest::default() };
            halves[i % 2].push(sample(policy, tuning, seen, &request, &through)?);
        }
    }
    tuning.lock().plan = None;
    let [learnt, measured] = halves;
    let dim = policy.spec().action_dim;
    let gaps: Vec<Vec<f64>> = learnt.into_iter().map(|sample| sample.seen.gaps).collect();
    let mut tried = vec![tried_with(None, never, &measured, dim)];
    for ratio in &plan.ratios {
        let found = thresholds(&gaps, &shares(*ratio, layers.len() - 1));
        tried.push(tried_with(Some(*ratio), found, &measured, dim));
    }
    let good = tried
        .iter()
        .filter_map(|t| Some((t.ratio?, t)))
        .filter(|(_, t)| t.measured.mean_relative <= plan.max_error);
    let least = good.min_by(|(_, a), (_, b)| a.measured.computed.total_cmp(&b.measured.computed));
    let plan = least.map(|(ratio, tried)| {
        let mut found = through.clone();
        (found.ratio, found.measured) = (ratio, tried.measured);
        (found.thresholds, found.taken) = (tried.thresholds.clone(), tried.taken.clone());
        found
    });
    Ok(ExitCalibration { plan, layers, tried })
}

fn check(plan: &ExitCalibrationPlan) -> Result<(), ExitCalibrationError> {
    let wrong = |what: String| Err(ExitCalibrationError::Setting(what));
    if !(1..=MOST_STEPS).contains(&plan.steps) {
        return wrong(format!("{} flow steps at each exit; use 1 to {MOST_STEPS}", plan.steps));
    }
    if let Some(ratio) = plan.ratios.iter().find(|r| !(**r > 0.0 && r.is_finite())) {
        return wrong(format!("a ratio of {ratio}; use numbers above 0, below 1 to end early"));
    }
    Ok(())
}

/// After every `every` layers, and after the last.
fn exits(depth: usize, every: usize) -> Vec<usize> {
    (1..depth).filter(|layer| every > 0 && layer.is_multiple_of(every)).chain([depth]).collect()
}

fn sample(
    policy: &mut dyn Policy,
    tuning: &ExitTuning,
    seen: &Observation,
    request: &ChunkRequest,
    through: &ExitPlan,
) -> Result<Sample, ExitCalibrationError> {
    tuning.lock().plan = None;
    let exact = run(policy, seen, request)?;
    {
        let mut tuned = tuning.lock();
        tuned.plan = Some(through.clone());
        tuned.seen.clear();
    }
    run(policy, seen, request)?;
    let seen = tuning.lock().seen.pop().ok_or(ExitCalibrationError::Unusable)?;
    let exits = through.layers.len();
    let whole =
        seen.actions.len() == exits && seen.times.len() == exits && seen.gaps.len() + 1 == exits;
    if !whole || seen.gaps.iter().any(|gap| !gap.is_finite()) {
        return Err(ExitCalibrationError::Unusable);
    }
    let own = |stage: &str| stage == "prefix" || stage == "denoise";
    let times = exact.report.stages.iter().filter(|s| own(s.stage)).map(|s| s.time);
    Ok(Sample { seen, exact_time: times.sum(), exact: exact.values().to_vec() })
}

/// What `thresholds` make of `samples`, whose actions have `dim` values.
fn tried_with(
    ratio: Option<f64>,
    thresholds: Vec<f64>,
    samples: &[Sample],
    dim: usize,
) -> TriedExits {
    let (mut early, mut exact) = (Errors::default(), Errors::default());
    let exits = thresholds.len() + 2;
    let mut counts = vec![0.0; exits];
    let mut computed = 0.0;
    for sample in samples {
        let exit = taken(&thresholds, &sample.seen.gaps);
        early.add(&sample.seen.actions[exit], sample.seen.times[exit]);
        exact.add(&sample.exact, sample.exact_time);
        counts[exit] += 1.0 / samples.len() as f64;
        computed += (exit + 1) as f64 / (exits * samples.len()) as f64;
    }
    let measured = Measured { computed, ..early.against(&exact, dim) };
    TriedExits { ratio, thresholds, taken: counts, measured }
}
