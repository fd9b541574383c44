//! What a chunk costs: its time, and that of its stages, against cameras, denoise steps and chunk length, beside a
//! linear model.
//!
//! The model is `t = a + b·cameras + steps·(c + d·cameras + e·chunk)`, fitted by least squares of relative errors: each
//! picture passes the vision tower once and lengthens the prefix, and each denoise step passes the chunk's tokens,
//! which look at the prefix.

use std::collections::BTreeMap;
use std::time::Instant;

use nalgebra::{DMatrix, DVector};
use serde::Serialize;
use sinew_models::kernels::pool::pool;
use sinew_models::kernels::{Compute, Isa};
use sinew_runtime::inference::run;
use sinew_runtime::{ChunkRequest, Policy, PolicyError};

use crate::Spread;
use crate::plot::{Plot, Point};
use crate::policy::{PolicyCase, observation};

/// Name of the whole chunk among the stages.
pub const WHOLE: &str = "chunk";
/// Coefficients of the model.
const TERMS: usize = 5;
/// A singular value below this share of the largest is none.
const RANK: f64 = 1e-9;

/// What a chunk is asked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct CostPoint {
    /// Cameras.
    pub cameras: usize,
    /// Denoise steps.
    pub steps: usize,
    /// Actions in the chunk.
    pub chunk: usize,
}

impl CostPoint {
    /// What the model's coefficients are multiplied with.
    fn terms(self) -> [f64; TERMS] {
        let [cameras, steps, chunk] = [self.cameras, self.steps, self.chunk].map(|v| v as f64);
        [1.0, cameras, steps, steps * cameras, steps * chunk]
    }
}

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct CostPlan {
    /// Numbers of cameras.
    pub cameras: Vec<usize>,
    /// Numbers of denoise steps.
    pub steps: Vec<usize>,
    /// Chunk lengths.
    pub chunks: Vec<usize>,
    /// One is varied at a time from here.
    pub base: CostPoint,
    /// Times that each point is measured.
    pub rounds: usize,
    /// Size of the cameras' images (width, height).
    pub image: [usize; 2],
    /// The instruction.
    pub instruction: String,
}

impl CostPlan {
    /// One varied at a time, and all corners, each once, sorted by what a policy is loaded for.
    pub fn points(&self) -> Vec<CostPoint> {
        let base = self.base;
        let mut all = vec![base];
        all.extend(self.cameras.iter().map(|&cameras| CostPoint { cameras, ..base }));
        all.extend(self.steps.iter().map(|&steps| CostPoint { steps, ..base }));
        all.extend(self.chunks.iter().map(|&chunk| CostPoint { chunk, ..base }));
        let ends = |values: &[usize]| [values.iter().min().copied(), values.iter().max().copied()];
        for cameras in ends(&self.cameras).into_iter().flatten() {
            for steps in ends(&self.steps).into_iter().flatten() {
                for chunk in ends(&self.chunks).into_iter().flatten() {
                    all.push(CostPoint { cameras, steps, chunk });
                }
            }
        }
        all.sort_by_key(|p| (p.chunk, p.cameras, p.steps));
        all.dedup();
        all
    }
}

/// One point's times.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostRow {
    /// What was asked.
    #[serde(flatten)]
    pub point: CostPoint,
    /// The whole chunk and its stages (ms).
    pub times_ms: BTreeMap<String, Spread>,
    /// The whole chunk by the model (ms).
    pub model_ms: f64,
    /// Shortest time against the model, as a share of the model.
    pub residual: f64,
}

/// The model of a stage or of the whole chunk.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostModel {
    /// Once a chunk (ms).
    pub fixed: f64,
    /// For each camera (ms).
    pub camera: f64,
    /// For each denoise step (ms).
    pub step: f64,
    /// For each denoise step and camera (ms).
    pub step_camera: f64,
    /// For each denoise step and action (ms).
    pub step_action: f64,
    /// Mean of the residuals' sizes, as a share of the model.
    pub mean_residual: f64,
    /// The largest.
    pub worst_residual: f64,
}

impl CostModel {
    /// Time of `point` (ms).
    pub fn at(&self, point: CostPoint) -> f64 {
        let factors = [self.fixed, self.camera, self.step, self.step_camera, self.step_action];
        factors.into_iter().zip(point.terms()).map(|(factor, term)| factor * term).sum()
    }

    /// The model that fits `times` (ms, above zero) best; `None` where there is none.
    fn fit(points: &[CostPoint], times: &[f64]) -> Option<Self> {
        if points.len() < TERMS || times.iter().any(|t| !t.is_finite() || *t <= 0.0) {
            return None;
        }
        // Relative errors: each row is divided by its time.
        let rows = DMatrix::from_fn(points.len(), TERMS, |r, c| points[r].terms()[c] / times[r]);
        // Columns of one size, so that a small factor is told from none.
        let sizes: Vec<f64> = rows.column_iter().map(|c| c.norm().max(f64::MIN_POSITIVE)).collect();
        let scaled = DMatrix::from_fn(points.len(), TERMS, |r, c| rows[(r, c)] / sizes[c]);
        let ones = DVector::from_element(points.len(), 1.0);
        let found = scaled.svd(true, true).solve(&ones, RANK).ok()?;
        let factor = |index: usize| found[index] / sizes[index];
        let mut model = Self {
            fixed: factor(0),
            camera: factor(1),
            step: factor(2),
            step_camera: factor(3),
            step_action: factor(4),
            mean_residual: 0.0,
            worst_residual: 0.0,
        };
        let residual = |(p, t): (&CostPoint, &f64)| (t / model.at(*p) - 1.0).abs();
        let residuals: Vec<f64> = points.iter().zip(times).map(residual).collect();
        model.mean_residual = residuals.iter().sum::<f64>() / residuals.len() as f64;
        model.worst_residual = residuals.into_iter().fold(0.0, f64::max);
        Some(model)
    }
}

/// All points of one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostProfile {
    /// How layers compute.
    pub compute: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of the kernels.
    pub threads: usize,
    /// Times that each point was measured.
    pub rounds: usize,
    /// Where one was varied at a time.
    pub base: CostPoint,
    /// Models of the whole chunk and its stages, fitted to the shortest times.
    pub models: BTreeMap<String, CostModel>,
    /// One row a point.
    pub rows: Vec<CostRow>,
}

/// Why there are no figures.
#[derive(Debug)]
pub enum CostError<E> {
    /// The policy cannot be loaded.
    Load(E),
    /// The policy failed.
    Run(PolicyError),
    /// A policy has other cameras, or another chunk length, than it was to have.
    Other {
        /// What was asked.
        wanted: CostPoint,
        /// Its cameras.
        cameras: usize,
        /// Its chunk length.
        chunk: usize,
    },
}

impl<E> From<PolicyError> for CostError<E> {
    fn from(error: PolicyError) -> Self {
        Self::Run(error)
    }
}

/// Measures; `load` gives the policy for a number of cameras and a chunk length, whose layers compute as `compute` says;
/// `said` hears what is going on.
///
/// All points take turns, round after round, so that what disturbs the machine disturbs all of them.
///
/// # Errors
/// [`CostError`].
pub fn measure<E>(
    plan: &CostPlan,
    compute: Compute,
    load: &dyn Fn(usize, usize) -> Result<Box<dyn Policy>, E>,
    said: &mut dyn FnMut(&str),
) -> Result<CostProfile, CostError<E>> {
    let points = plan.points();
    let mut times: Vec<BTreeMap<String, Vec<f64>>> = vec![BTreeMap::new(); points.len()];
    let mut turn = 0;
    for round in 1..=plan.rounds {
        let mut index = 0;
        for group in points.chunk_by(|a, b| (a.chunk, a.cameras) == (b.chunk, b.cameras)) {
            let CostPoint { cameras, chunk, .. } = group[0];
            said(&format!("round {round} of {}: {cameras} cameras, {chunk} actions", plan.rounds));
            let mut policy = load(cameras, chunk).map_err(CostError::Load)?;
            for (k, point) in group.iter().enumerate() {
                let (cameras, chunk) = (policy.spec().cameras.len(), policy.spec().action_horizon);
                if cameras != point.cameras || chunk != point.chunk {
                    return Err(CostError::Other { wanted: *point, cameras, chunk });
                }
                if k == 0 {
                    // What was loaded is touched once before it is timed.
                    one(policy.as_mut(), plan, *point, turn)?;
                    turn += 1;
                }
                for (stage, ms) in one(policy.as_mut(), plan, *point, turn)? {
                    times[index].entry(stage).or_default().push(ms);
                }
                (index, turn) = (index + 1, turn + 1);
            }
        }
    }
    let spreads = |times: BTreeMap<String, Vec<f64>>| {
        times.into_iter().filter_map(|(s, t)| Some((s, Spread::of(t)?))).collect()
    };
    let times: Vec<BTreeMap<String, Spread>> = times.into_iter().map(spreads).collect();
    let stages = times.first().into_iter().flat_map(BTreeMap::keys);
    let models: BTreeMap<String, CostModel> = stages
        .filter_map(|stage| {
            let least = times.iter().map(|t| t.get(stage).map(|s| s.min));
            Some((stage.clone(), CostModel::fit(&points, &least.collect::<Option<Vec<_>>>()?)?))
        })
        .collect();
    let whole = models.get(WHOLE);
    let rows = points.into_iter().zip(times).map(|(point, times_ms)| {
        let model_ms = whole.map_or(f64::NAN, |m| m.at(point));
        let least = times_ms.get(WHOLE).map_or(f64::NAN, |s| s.min);
        CostRow { point, times_ms, model_ms, residual: least / model_ms - 1.0 }
    });
    Ok(CostProfile {
        compute: compute.name(),
        isa: Isa::current().name(),
        threads: pool().threads(),
        rounds: plan.rounds,
        base: plan.base,
        rows: rows.collect(),
        models,
    })
}

/// One chunk: its stages and the whole (ms).
fn one(
    policy: &mut dyn Policy,
    plan: &CostPlan,
    point: CostPoint,
    turn: u32,
) -> Result<Vec<(String, f64)>, PolicyError> {
    let case = PolicyCase {
        iterations: 1,
        warmup: 0,
        cameras: point.cameras,
        image: plan.image,
        denoise_steps: Some(point.steps),
        instruction: plan.instruction.clone(),
    };
    let seen = observation(policy, &case, turn);
    let (id, denoise_steps) = (u64::from(turn), case.denoise_steps);
    let request = ChunkRequest { id, denoise_steps, seed: id, ..ChunkRequest::default() };
    let start = Instant::now();
    let chunk = run(policy, &seen, &request)?;
    let whole = start.elapsed().as_secs_f64() * 1e3;
    let stages = chunk.report.stages.iter();
    let stages = stages.map(|s| (s.stage.to_owned(), s.time.as_secs_f64() * 1e3));
    Ok(stages.chain([(WHOLE.to_owned(), whole)]).collect())
}

/// What is varied in a plot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Cameras.
    Cameras,
    /// Denoise steps.
    Steps,
    /// Chunk length.
    Chunk,
}

impl Axis {
    /// All.
    pub const ALL: [Self; 3] = [Self::Cameras, Self::Steps, Self::Chunk];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cameras => "cameras",
            Self::Steps => "steps",
            Self::Chunk => "chunk",
        }
    }

    fn of(self, point: CostPoint) -> usize {
        match self {
            Self::Cameras => point.cameras,
            Self::Steps => point.steps,
            Self::Chunk => point.chunk,
        }
    }
}

impl CostProfile {
    /// Chunk and stages against `axis`, the others at the base, with the model of the whole.
    pub fn plot(&self, axis: Axis, title: &str) -> Plot {
        let varied =
            |p: CostPoint| Axis::ALL.into_iter().all(|a| a == axis || a.of(p) == a.of(self.base));
        let mut rows: Vec<&CostRow> = self.rows.iter().filter(|r| varied(r.point)).collect();
        rows.sort_by_key(|r| axis.of(r.point));
        // Named where it ends; the model where it begins, since it ends beside the whole chunk.
        let series = |name: &str, named: usize, ms: &dyn Fn(&CostRow) -> f64| -> Vec<Point> {
            let point = |(k, row): (usize, &&CostRow)| {
                let x = axis.of(row.point) as f64;
                let name = if k == named { name.to_owned() } else { String::new() };
                Point { name, at: [x, ms(row)], up_to: x }
            };
            rows.iter().enumerate().map(point).collect()
        };
        let last = rows.len().saturating_sub(1);
        let mut all = vec![series("linear model", 0, &|row| row.model_ms)];
        for name in self.models.keys() {
            let least = |row: &CostRow| row.times_ms.get(name).map_or(f64::NAN, |s| s.min);
            all.push(series(name, last, &least));
        }
        let label = match axis {
            Axis::Cameras => "cameras",
            Axis::Steps => "denoise steps",
            Axis::Chunk => "actions in a chunk",
        };
        Plot {
            title: title.to_owned(),
            axes: [label.to_owned(), "ms (shortest)".to_owned()],
            series: all,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> CostPlan {
        CostPlan {
            cameras: vec![1, 2, 3, 4],
            steps: vec![1, 5, 10, 20],
            chunks: vec![10, 50, 100],
            base: CostPoint { cameras: 2, steps: 10, chunk: 50 },
            rounds: 1,
            image: [8, 8],
            instruction: String::new(),
        }
    }

    #[test]
    fn one_is_varied_at_a_time_and_the_corners_are_there() {
        let points = plan().points();
        // The base, three, three and two others, and eight corners.
        assert_eq!(points.len(), 17);
        assert!(points.is_sorted_by_key(|p| (p.chunk, p.cameras)));
        assert!(points.contains(&CostPoint { cameras: 4, steps: 20, chunk: 10 }));
    }

    #[test]
    fn a_linear_cost_is_found_again_and_another_leaves_residuals() {
        let points = plan().points();
        let truth = [3.0, 500.0, 7.0, 2.0, 0.4];
        let time = |p: &CostPoint| truth.iter().zip(p.terms()).map(|(f, t)| f * t).sum::<f64>();
        let times: Vec<f64> = points.iter().map(time).collect();
        let model = CostModel::fit(&points, &times).expect("enough points");
        let found = [model.fixed, model.camera, model.step, model.step_camera, model.step_action];
        for (found, wanted) in found.iter().zip(truth) {
            assert!((found / wanted - 1.0).abs() < 1e-6, "{found} {wanted}");
        }
        assert!(model.worst_residual < 1e-9);
        let bent: Vec<f64> =
            points.iter().zip(&times).map(|(p, t)| t + 0.05 * (p.chunk * p.chunk) as f64).collect();
        let model = CostModel::fit(&points, &bent).expect("enough points");
        assert!(model.worst_residual > 0.05, "{model:?}");
        assert!(CostModel::fit(&points[..4], &times[..4]).is_none());
        assert!(CostModel::fit(&points, &vec![0.0; points.len()]).is_none());
    }
}
