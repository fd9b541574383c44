//! `sinew calibrate exit`: after which layers an inference may end.

use clap::Args;
use sinew_models::caches::CacheOptions;
use sinew_models::exits::{
    EarlyExit, ExitCalibration, ExitCalibrationPlan, ExitTuning, Gap, LEAST_OBSERVATIONS,
    TriedExits, calibrate,
};

use crate::calibrate_verbs::Shown;
use crate::cli::{Failure, print_json, say};

/// `sinew calibrate exit`.
#[derive(Debug, Clone, Args)]
pub struct ExitArgs {
    #[command(flatten)]
    shown: Shown,
    /// Layers from exit to exit, unless the checkpoint says where it was trained to end (`early_exit_layers` in its
    /// config.json).
    #[arg(long, value_name = "LAYERS", default_value_t = 2)]
    every: usize,
    /// Flow steps at each exit, which start from the actions of the exit before.
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// How the actions of two exits are compared: mean_abs, rms or max of the differences, in the network's units.
    #[arg(long, default_value = "mean_abs")]
    gap: Gap,
    /// Ratios that are tried, separated by commas: so many times as many inferences are to end at one exit as at that
    /// before it.
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])]
    ratios: Vec<f64>,
    /// Take what computes least of all whose mean action error, against the whole network, is at most this share of the
    /// action range; when there is none nothing is written.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    max_error: f64,
}

/// Calibrates and prints.
///
/// # Errors
/// [`Failure`] of loading or running; [`Failure::Result`] when ending early costs more than is allowed.
pub(crate) fn exit(args: &ExitArgs) -> Result<(), Failure> {
    let shown = &args.shown;
    let tuning = ExitTuning::default();
    let early_exit = EarlyExit::Tuned(tuning.clone());
    let caches = CacheOptions { early_exit, ..CacheOptions::default() };
    let (seen, mut policy) = shown.load(caches, 2 * LEAST_OBSERVATIONS)?;
    let plan = ExitCalibrationPlan {
        every: args.every,
        steps: args.steps,
        gap: args.gap,
        ratios: args.ratios.clone(),
        seeds: shown.seeds,
        max_error: args.max_error,
    };
    let found =
        shown.watched(|progress| calibrate(policy.as_mut(), &tuning, &seen, &plan, progress))?;
    match shown.json {
        true => print_json(&found.tried)?,
        false => table(&found),
    }
    let Some(plan) = &found.plan else { return Err(refused(args, &found)) };
    let path = shown.file("exit");
    plan.write(&path)?;
    if !shown.json {
        let errors = 100.0 * plan.measured.mean_relative;
        let (computed, path) = (100.0 * plan.measured.computed, path.display());
        say!(
            "{path}: {computed:.0} % of the exits computed, mean action error {errors:.2} % of the range"
        );
    }
    Ok(())
}

/// What was measured instead of what is allowed.
fn refused(args: &ExitArgs, found: &ExitCalibration) -> Failure {
    let error = |tried: &&TriedExits| tried.measured.mean_relative;
    let early = found.tried.iter().filter(|tried| tried.ratio.is_some());
    let least = early.min_by(|a, b| error(a).total_cmp(&error(b))).map_or(f64::NAN, |t| error(&t));
    let last =
        found.tried.iter().find(|tried| tried.ratio.is_none()).map_or(f64::NAN, |t| error(&t));
    Failure::Result(format!(
        "{}: no thresholds written: ending early has a mean action error of at least {:.2} % of the range ({:.2} % at the last \
         exit), allowed are {:.2} %; use a checkpoint that was trained with exits, allow more with --max-error, or run \
         without early_exit",
        args.shown.model.display(),
        100.0 * least,
        100.0 * last,
        100.0 * args.max_error
    ))
}

fn table(found: &ExitCalibration) {
    let layers: Vec<String> = found.layers.iter().map(usize::to_string).collect();
    say!("exits after layers {}", layers.join(", "));
    say!(
        "| ratio | ends at each exit | computed | time of prefix and denoising | mean error | p99 | max | mean of range |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in &found.tried {
        let m = &row.measured;
        let taken: Vec<String> =
            row.taken.iter().map(|share| format!("{:.0} %", 100.0 * share)).collect();
        say!(
            "| {} | {} | {:.0} % | {:.2} | {:.5} | {:.5} | {:.5} | {:.2} % |",
            row.ratio.map_or("last exit".to_owned(), |ratio| ratio.to_string()),
            taken.join(", "),
            100.0 * m.computed,
            m.time,
            m.mean,
            m.p99,
            m.max,
            100.0 * m.mean_relative
        );
    }
}
