//! `sinew calibrate …`: what is measured once and used from then on.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use sinew_benches::observed;
use sinew_models::caches::{
    CacheOptions, Calibration, CalibrationPlan, DenoiserCache, LEAST_OBSERVATIONS, Tuning,
    calibrate,
};
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{Observation, Policy};

use crate::cli::{Failure, print_json, say};
use crate::replay;
use crate::run::{Renamed, RunError};

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
    /// Most volatile blocks that update whenever a later feed-forward block does.
    #[arg(long, default_value_t = 5)]
    bubbled: usize,
    /// Take the fewest updates whose mean action error is at most this share of the action range.
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
    let mut policy = load_policy(&args.model, &LoadOptions { caches, ..LoadOptions::default() })?;
    let (seen, mut policy) = match args.demo {
        Some(count) => {
            let count = count.max(2 * LEAST_OBSERVATIONS);
            let seen = observed::observations(policy.as_mut(), count, EACH, args.seed);
            (seen.map_err(RunError::Policy)?, policy)
        }
        None => recorded(&args.recordings, args.observations, policy)?,
    };
    let steps = args.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    let plan = CalibrationPlan {
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
        say!("{}: {} updates of each block", path.display(), schedule.budget);
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

/// Cameras (policy's name, robot's name), and the prompt that instructions stood in.
type View = (Vec<(String, String)>, Option<String>);

/// At most `most` observations of the recordings `files`, and `policy` as it saw them.
fn recorded(
    files: &[PathBuf],
    most: usize,
    policy: Box<dyn Policy>,
) -> Result<(Vec<Observation>, Box<dyn Policy>), Failure> {
    let mut all = Vec::new();
    let mut view: Option<View> = None;
    for file in files {
        let (header, seen) = replay::observations(file)?;
        if header.actions.is_some() {
            return Err(Failure::Result(format!(
                "{}: its policy speaks of poses; calibrate on recordings in joint positions",
                file.display()
            )));
        }
        let own = (header.views.clone(), replay::prompt(&header));
        if view.get_or_insert_with(|| own.clone()) != &own {
            return Err(Failure::Result(format!(
                "{}: it was made with other cameras or another prompt than the recordings before it",
                file.display()
            )));
        }
        all.extend(seen);
    }
    let step = all.len().div_ceil(most.max(1)).max(1);
    let seen = all.into_iter().step_by(step).collect();
    let (views, prompt) = view.unwrap_or_default();
    Ok((seen, Box::new(Renamed::new(policy, views).with_prompt(prompt))))
}

fn table(found: &Calibration) {
    say!(
        "| updates | computed | time of denoising | mean error | p99 | max | mean of range | block error p95 | \
         never reused |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in &found.tried {
        let m = &row.measured;
        say!(
            "| {} | {:.0} % | {:.2} | {:.5} | {:.5} | {:.5} | {:.2} % | {:.4} | {} |",
            row.budget,
            100.0 * m.computed,
            m.time,
            m.mean,
            m.p99,
            m.max,
            100.0 * m.mean_relative,
            m.block_error,
            row.unstable
        );
    }
}
