//! `sinew calibrate …`: what is measured once and used from then on.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use sinew_benches::observed;
use sinew_models::caches::{
    CacheOptions, Calibration, CalibrationPlan, DenoiserCache, Form, LEAST_OBSERVATIONS, Tuning,
    calibrate,
};
use sinew_models::kernels::Compute;
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{Observation, Policy};

use crate::calibrate_exit::{ExitArgs, exit};
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
    /// Find out after which layers an inference may end, and what ending there costs.
    ///
    /// Every exit's actions are compared with those of the exit before, and with those of the whole network. Half of the
    /// observations is learnt from, the other half measured on. The thresholds are a JSON file that goes into the launch
    /// file under early_exit.
    Exit(ExitArgs),
}

/// The policy that is calibrated, and what it is shown.
#[derive(Debug, Clone, Args)]
pub(crate) struct Shown {
    /// Checkpoint folder or bundle.
    pub model: PathBuf,
    /// Take the observations from these recordings of this policy.
    #[arg(long, value_name = "FILE.mcap", num_args = 1.., required_unless_present = "demo", conflicts_with = "demo")]
    pub recordings: Vec<PathBuf>,
    /// Cameras, separated by commas, as the policy's name = that of the recorded robot; without it as recorded.
    #[arg(long, value_name = "POLICY=ROBOT", value_delimiter = ',', value_parser = recorded::camera,
          conflicts_with = "demo")]
    pub cameras: Vec<(String, String)>,
    /// Take so many observations from the simulated desk arm, played by the policy.
    #[arg(long, value_name = "COUNT")]
    pub demo: Option<usize>,
    /// Seed of the demo's first scene.
    #[arg(long, default_value_t = 5_000_001)]
    pub seed: u64,
    /// Use at most so many observations of the recordings, spread over them.
    #[arg(long, value_name = "COUNT", default_value_t = 48)]
    pub observations: usize,
    /// Noise seeds for each observation.
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// How its layers compute: `exact`, or `w8a8` (8-bit weights and activations).
    #[arg(long, default_value = "exact")]
    pub compute: Compute,
    /// The file to write; without it MODEL.cache.json or MODEL.exit.json beside the model.
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Print what was tried as JSON.
    #[arg(long)]
    pub json: bool,
}

impl Shown {
    /// The policy with `caches`, and at least `least` observations.
    pub fn load(
        &self,
        caches: CacheOptions,
        least: usize,
    ) -> Result<(Vec<Observation>, Box<dyn Policy>), Failure> {
        let options = LoadOptions { caches, compute: self.compute, ..LoadOptions::default() };
        let mut policy = load_policy(&self.model, &options)?;
        match self.demo {
            Some(count) => {
                let seen =
                    observed::observations(policy.as_mut(), count.max(least), EACH, self.seed);
                Ok((seen.map_err(RunError::Policy)?, policy))
            }
            None => {
                let recorded = Recorded::read(&self.recordings, &self.cameras)?;
                Ok((recorded.spread(self.observations), recorded.seen_by(policy)))
            }
        }
    }

    /// What `work` finds, which says how far it is.
    ///
    /// # Errors
    /// [`Failure::Result`] with what went wrong.
    pub fn watched<T, E: std::fmt::Display>(
        &self,
        work: impl FnOnce(&mut dyn FnMut(&str)) -> Result<T, E>,
    ) -> Result<T, Failure> {
        let found = work(&mut |what| eprint!("\r{what}    "));
        eprintln!();
        found.map_err(|e| Failure::Result(format!("{}: {e}", self.model.display())))
    }

    /// Where what is found is written: beside the model with the ending `name`.json, unless it is said otherwise.
    pub fn file(&self, name: &str) -> PathBuf {
        let beside = || match self.model.is_dir() {
            true => self.model.join(format!("{name}.json")),
            false => self.model.with_extension(format!("{name}.json")),
        };
        self.output.clone().unwrap_or_else(beside)
    }
}

/// `sinew calibrate cache`.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    #[command(flatten)]
    shown: Shown,
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
    /// Most volatile blocks that update whenever a later feed-forward block does.
    #[arg(long, default_value_t = 5)]
    bubbled: usize,
    /// Take what computes least of all whose mean action error is at most this share of the action range.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    max_error: f64,
    /// Blocks whose similarities vary more between observations and seeds (standard deviation) are never reused.
    #[arg(long, value_name = "DEVIATION", default_value_t = 0.15)]
    max_spread: f64,
}

/// Does what `verb` says.
///
/// # Errors
/// [`Failure`] of loading or running; [`Failure::Result`] when no schedule is good enough.
pub fn run(verb: &CalibrateVerb) -> Result<(), Failure> {
    match verb {
        CalibrateVerb::Cache(args) => cache(args),
        CalibrateVerb::Exit(args) => exit(args),
    }
}

fn cache(args: &CacheArgs) -> Result<(), Failure> {
    let shown = &args.shown;
    let tuning = Tuning::default();
    let denoiser = DenoiserCache::Tuned(tuning.clone());
    let caches = CacheOptions { denoiser, ..CacheOptions::default() };
    let (seen, mut policy) = shown.load(caches, 2 * LEAST_OBSERVATIONS)?;
    let steps = args.denoise_steps.unwrap_or(policy.spec().denoise_steps);
    let plan = CalibrationPlan {
        forms: if args.forms.is_empty() { Form::ALL.into() } else { args.forms.clone() },
        budgets: budgets(&args.updates, steps),
        bubbled: args.bubbled,
        seeds: shown.seeds,
        max_error: args.max_error,
        max_spread: args.max_spread,
        denoise_steps: args.denoise_steps,
    };
    let found =
        shown.watched(|progress| calibrate(policy.as_mut(), &tuning, &seen, &plan, progress))?;
    match shown.json {
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
    let path = shown.file("cache");
    schedule.write(&path)?;
    if !shown.json {
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
