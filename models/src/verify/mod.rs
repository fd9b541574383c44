//! How far two forms of one policy differ, and where that begins.
//!
//! Both get the same random but plausible observations and the same starting noise. Besides the actions, the
//! outputs of the stages are compared in the order of the computation, for the families that give them.

mod errors;
mod inputs;
mod sensitivity;
mod trace;

use std::path::Path;

use serde::Serialize;

pub use errors::{QuantizationError, quantization_errors};
use inputs::draw;
pub use sensitivity::{LayerSensitivity, sensitivity};
use trace::Subject;

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::kernels::Compute;
use crate::processors::Boundary;

/// Relative error (RMS) from which a stage counts as differing.
pub const STAGE_THRESHOLD: f64 = 0.05;

/// How two forms of one policy differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Inputs that were compared.
    pub cases: usize,
    /// Mean action error as a share of the action range.
    pub mean_relative: f64,
    /// 99th percentile of the action error as a share of the action range.
    pub p99_relative: f64,
    /// Largest action error as a share of the action range.
    pub max_relative: f64,
    /// Mean action error, in the action's own unit.
    pub mean_absolute: f64,
    /// 99th percentile of the action error, in the action's own unit.
    pub p99_absolute: f64,
    /// Largest action error, in the action's own unit.
    pub max_absolute: f64,
    /// The same for each dimension of the action.
    pub dimensions: Vec<DimensionError>,
    /// Relative error (RMS over all cases) of each stage, in the order of the computation.
    pub stages: Vec<StageError>,
    /// The first stage whose error is above [`STAGE_THRESHOLD`].
    pub first_differing: Option<String>,
}

/// Error of one dimension of the action.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DimensionError {
    /// Joint name, or the index.
    pub name: String,
    /// Range of the dimension: by the statistics, or as the first policy used it.
    pub range: f64,
    /// Mean error.
    pub mean: f64,
    /// Largest error.
    pub max: f64,
}

/// Error of one stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageError {
    /// Stage, such as `vision`, `prefix layer 3 keys`, `denoise step 2`.
    pub stage: String,
    /// RMS of the difference over RMS of the first policy's values.
    pub relative: f64,
}

/// Squared difference and squared size of one stage, summed over the cases.
struct StageSum {
    stage: String,
    difference: f64,
    size: f64,
}

/// Compares the policies at `a`, whose layers compute as `compute` says, and `b`, computed exactly (folders or
/// bundles), on `cases` inputs of `seed`.
///
/// # Errors
/// [`ModelError::NotComparable`] when they are not forms of one policy; what loading or running gives.
pub fn verify(
    a: &Path,
    compute: Compute,
    b: &Path,
    cases: usize,
    seed: u64,
) -> Result<VerifyReport, ModelError> {
    let (one, other) = (Checkpoint::open(a, true)?.computing(compute), Checkpoint::open(b, true)?);
    comparable(&one, &other)?;
    let (mut first, mut second) = (Subject::load(&one)?, Subject::load(&other)?);
    compare(&one, &mut first, &mut second, cases, seed)
}

fn compare(
    checkpoint: &Checkpoint,
    first: &mut Subject,
    second: &mut Subject,
    cases: usize,
    seed: u64,
) -> Result<VerifyReport, ModelError> {
    let boundary = Boundary::new(checkpoint, 0)?;
    let cases = cases.max(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut sums: Vec<StageSum> = Vec::new();
    for input in draw(checkpoint, &boundary, cases, seed) {
        let (observation, seed) = input?;
        let (actions_a, stages_a) = first.run(&observation, seed)?;
        let (actions_b, stages_b) = second.run(&observation, seed)?;
        ours.extend(actions_a);
        theirs.extend(actions_b);
        for (index, ((stage, x), (_, y))) in stages_a.into_iter().zip(stages_b).enumerate() {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let pairs = x.values().iter().zip(y.values());
            let difference: f64 = pairs.map(|(x, y)| square(x - y)).sum();
            let size: f64 = x.values().iter().map(|x| square(*x)).sum();
            if sums.len() <= index {
                sums.push(StageSum { stage, difference: 0.0, size: 0.0 });
            }
            sums[index].difference += difference;
            sums[index].size += size;
        }
    }
    let ranges = ranges(checkpoint, boundary.action_dim(), &ours);
    let stages: Vec<StageError> = sums
        .into_iter()
        .map(|s| StageError {
            stage: s.stage,
            relative: (s.difference / s.size.max(f64::MIN_POSITIVE)).sqrt(),
        })
        .collect();
    let names = &checkpoint.actions.action_names;
    Ok(report(cases, names, &ranges, &ours, &theirs, stages))
}

fn report(
    cases: usize,
    names: &[String],
    ranges: &[f64],
    ours: &[f64],
    theirs: &[f64],
    stages: Vec<StageError>,
) -> VerifyReport {
    let dim = ranges.len();
    let first_differing =
        stages.iter().find(|s| s.relative > STAGE_THRESHOLD).map(|s| s.stage.clone());
    let errors = || ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    let shares = errors().enumerate().map(|(i, error)| error / ranges[i % dim]).collect();
    let dimensions: Vec<DimensionError> = ranges
        .iter()
        .enumerate()
        .map(|(d, range)| {
            let errors = ours.iter().zip(theirs).skip(d).step_by(dim).map(|(a, b)| (a - b).abs());
            let count = (ours.len() / dim).max(1) as f64;
            DimensionError {
                name: names.get(d).cloned().unwrap_or_else(|| d.to_string()),
                range: *range,
                mean: errors.clone().sum::<f64>() / count,
                max: errors.fold(0.0, f64::max),
            }
        })
        .collect();
    let mean = |f: fn(&DimensionError) -> f64| dimensions.iter().map(f).sum::<f64>() / dim as f64;
    let max = |f: fn(&DimensionError) -> f64| dimensions.iter().map(f).fold(0.0, f64::max);
    VerifyReport {
        cases,
        mean_relative: mean(|d| d.mean / d.range),
        p99_relative: p99(shares),
        max_relative: max(|d| d.max / d.range),
        mean_absolute: mean(|d| d.mean),
        p99_absolute: p99(errors().collect()),
        max_absolute: max(|d| d.max),
        dimensions,
        stages,
        first_differing,
    }
}

/// The value that 99 of 100 do not exceed (nearest rank).
fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * 99).div_ceil(100);
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

fn comparable(a: &Checkpoint, b: &Checkpoint) -> Result<(), ModelError> {
    let differ = |what: &'static str, a: String, b: String| {
        if a == b { Ok(()) } else { Err(ModelError::NotComparable { what, a, b }) }
    };
    differ("type", a.family.name.to_owned(), b.family.name.to_owned())?;
    let cameras =
        |c: &Checkpoint| c.features.cameras().map(|(key, _)| key).collect::<Vec<_>>().join(", ");
    differ("cameras", cameras(a), cameras(b))?;
    let dims = |c: &Checkpoint| {
        Ok::<_, ModelError>((c.features.state_dim(&c.path)?, c.features.action_dim(&c.path)?))
    };
    let ((state_a, action_a), (state_b, action_b)) = (dims(a)?, dims(b)?);
    differ("state width", state_a.to_string(), state_b.to_string())?;
    differ("action width", action_a.to_string(), action_b.to_string())?;
    let sizes = |c: &Checkpoint| (c.family.sizes)(c).map(|s| s.to_string());
    differ("sizes", sizes(a)?, sizes(b)?)
}

/// Range of each action dimension: by the statistics, else as `actions` spread.
fn ranges(checkpoint: &Checkpoint, dim: usize, actions: &[f64]) -> Vec<f64> {
    let statistics = &checkpoint.postprocessor.statistics;
    let known = |stat: &str, d: usize| {
        statistics.get(&format!("action.{stat}")).and_then(|v| v.get(d)).map(|v| f64::from(*v))
    };
    let unit = |d: usize| {
        let degrees = checkpoint.actions.action_units.get(d).is_some_and(|u| u == "deg");
        if degrees { std::f64::consts::PI / 180.0 } else { 1.0 }
    };
    (0..dim)
        .map(|d| {
            let spread = actions.iter().skip(d).step_by(dim);
            let low = spread.clone().fold(f64::INFINITY, |m, v| m.min(*v));
            let high = spread.fold(f64::NEG_INFINITY, |m, v| m.max(*v));
            let stated =
                known("max", d).zip(known("min", d)).map(|(max, min)| (max - min) * unit(d));
            stated.filter(|r| *r > 1e-9 && r.is_finite()).unwrap_or((high - low).max(1e-9))
        })
        .collect()
}
