//! `sinew calibrate …`: what is measured once and used from then on.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use sinew_benches::observed;
use sinew_models::caches::{
    CacheOptions, Calibration, CalibrationPlan, DenoiserCache, Form, LEAST_OBSERVATIONS, Tuning,
    calibrate,
};
use sinew_models::kernels::Compute;
use sinew_models::{LoadOptions, load_policy};

use crate::cli::{Failure, print_json, say};
use crate::recorded::{self, Recorded};
use crate::run::RunError;

/// Observations taken from one episode of the demo.
const EACH: usize = 6;

/// `sinew calibrate …`.
#[derive(Debug, Clone, Subcommand)]
pub enum CalibrateVerb {
    /// Find out which blocks of a policy's denoiser need not be computed at every step, and what leaving them out costs.
    ///
    /// Half of the observations is learnt from, the other half measured on. The schedule is a JSON file that goes into
    /// the launch file under cache_denoiser.
    Cache(CacheArgs),
}

/// `sinew calibrate cache`.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// Checkpoint folder or bundle.
    model: PathBuf,
    /// Take the observations from these recordings of this policy.
    #[arg(long, value_name = "FILE.mcap", num_args = 1.., required_unless_present = "demo", conflicts_with = "demo")]
    recordings: Vec<PathBuf>,
    /// Cameras, separated by commas, as the policy's name = that of the recorded robot; without it as recorded.
    #[arg(long, value_name = "POLICY=ROBOT", value_delimiter = ',', value_parser = recorded::camera,
          conflicts_with = "demo")]
    cameras: Vec<(String, String)>,
    /// Take so many observations from the simulated desk arm, played by the policy.
    #[arg(long, value_name = "COUNT")]
    demo: Option<usize>,
    /// Seed of the demo's first scene.
    #[arg(long, default_value_t = 5_000_001)]
    seed: u64,
    /// Use at most so many observations of the recordings, spread over them.
    #[arg(long, value_name = "COUNT", default_value_t = 48)]
    observations: usize,
    /// Noise seeds for each observation.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Denoise steps; without it the checkpoint's own.
    #[arg(long)]
    denoise_steps: Option<usize>,
    /// Updates of each block that are tried, separated by commas; without it from a fifth of the steps up.
    #[arg(long, value_delimiter = ',')]
    updates: Vec<usize>,
    /// Forms that are tried, separated by commas: every block by its own plan, held or going on between updates (held,
    /// each), all blocks by one plan (together), the network as a whole (whole); all of them without it.
    #[arg(long, value_delimiter = ',')]
    forms: Vec<Form>,
    /// How its layers compute: `exact`, or `w8a8` (8-bit weights and activations).
    #[arg(long, default_value = "exact")]
    compute: Compute,
    /// Most volatile blocks that update whenever a later feed-forward block does.
    #[arg(long, default_value_t = 5)]
    bubbled: usize,
    /// Take what computes least of all whose mean action error is at most this share of the action range.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    max_error: f64,
    /// Blocks whose similarities vary more between observations and seeds (standard deviation) are never reused.
    #[arg(long, value_name = "DEVIATION", default_value_t = 0.15)]
    max_spread: f64,
    /// The schedule's file; without it MODEL.cache.json beside the model.
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Print what was tried as JSON.
    #[arg(long)]
    json: bool,
}

/// Does what `verb` says.
///
/// # Errors
/// [`Failure`] of loading or running; [`Failure::Result`] when no schedule is good enough.
pub fn run(verb: &CalibrateVerb) -> Result<(), Failure> {
    let CalibrateVerb::Cache(args) = verb;
    let tuning = Tuning::default();
    let denoiser = DenoiserCache::Tuned(tuning.clone());
    let caches = CacheOptions { denoiser, ..CacheOptions::default() };
    let mut policy = load_policy(
        &args.model,
        &LoadOptions { caches, compute: args.compute, ..LoadOptions::default() },
    )?;
    let (seen, mut policy) = match args.demo {
        Some(count) => {
            let count = count.max(2 * LEAST_OBSERVATIONS);
            let seen = observed::observations(policy.as_mut(), count, EACH, args.seed);
            (seen.map_err(RunError::Policy)?, policy)
        }
        None => {
            let recorded = Recorded::read(&args.recordings, &args.cameras)?;
            (recorded.spread(args.observations), recorded.seen_by(policy))
        }
    };
    let steps = args.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    let plan = CalibrationPlan {
        forms: if args.forms.is_empty() { Form::ALL.into() } else { args.forms.clone() },
        budgets: budgets(&args.updates, steps),
        bubbled: args.bubbled,
        seeds: args.seeds,
        max_error: args.max_error,
        max_spread: args.max_spread,
        denoise_steps: args.denoise_steps,
    };
    let mut progress = |what: &str| eprint!("\r{what}    ");
    let found = calibrate(policy.as_mut(), &tuning, &seen, &plan, &mut progress);
    eprintln!();
    let found = found.map_err(|e| Failure::Result(format!("{}: {e}", args.model.display())))?;
    match args.json {
        true => print_json(&found.tried)?,
        false => table(&found),
    }
    let Some(schedule) = found.schedule else {
        return Err(Failure::Result(format!(
            "no schedule has a mean action error of at most {} of the range; allow more with --max-error, or run \
             without this cache",
            args.max_error
        )));
    };
    let path = args.output.clone().unwrap_or_else(|| beside(&args.model));
    schedule.write(&path)?;
    if !args.json {
        say!(
            "{}: {}, {} updates; 95 % of the reuses are off by at most {:.4}",
            path.display(),
            schedule.form.name(),
            schedule.budget,
            schedule.reuse_error
        );
    }
    Ok(())
}

/// The updates to try for a denoiser of so many `steps`.
fn budgets(asked: &[usize], steps: usize) -> Vec<usize> {
    let mut all: Vec<usize> = match asked.is_empty() {
        false => asked.iter().map(|n| (*n).clamp(1, steps.max(1))).collect(),
        true => [10, 15, 20, 30, 40, 50, 60, 80].map(|p| (p * steps).div_ceil(100).max(2)).into(),
    };
    all.sort_unstable();
    all.dedup();
    all
}

/// Where the schedule of `model` lies unless it is said otherwise.
fn beside(model: &Path) -> PathBuf {
    match model.is_dir() {
        true => model.join("cache.json"),
        false => model.with_extension("cache.json"),
    }
}

fn table(found: &Calibration) {
    say!(
        "| form | updates | computed | time of denoising | mean error | p99 | max | mean of range | never reused |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in &found.tried {
        let m = &row.measured;
        say!(
            "| {} | {} | {:.0} % | {:.2} | {:.5} | {:.5} | {:.5} | {:.2} % | {} |",
            row.form.name(),
            row.budget,
            100.0 * m.computed,
            m.time,
            m.mean,
            m.p99,
            m.max,
            100.0 * m.mean_relative,
            row.unstable
        );
    }
}
