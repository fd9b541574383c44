//! What the planned actions of a request do to the sampling.

use candle_core::Result;
use sinew_runtime::{ActionChunk, CacheUse, PolicyError, Prefix, PrefixUse};

use super::{Convention, FlowTime, Guidance, Sampler, Solver, freeze};
use crate::anytime::compute;
use crate::kernels::Matrix;

/// The planned actions' part in one sampling.
pub(crate) enum Planned {
    /// None.
    Free,
    /// Every velocity is corrected.
    Guided(Guidance),
    /// The first `frozen` rows are clean at every step.
    Clean { rows: Matrix, frozen: usize },
}

/// The sampling that is asked for.
pub(crate) struct Start {
    /// `[H, M]` row by row.
    pub noise: Vec<f32>,
    /// `(H, M)`.
    pub shape: (usize, usize),
    /// Denoise steps.
    pub steps: usize,
    /// How a step follows the velocity.
    pub solver: Solver,
}

impl Planned {
    /// The sampling that `prefix` asks for. `to_model` gives planned actions (physical units, row by row) as
    /// the network has them: normalised, `[rows, M]`.
    ///
    /// # Errors
    /// Those of `to_model`; [`PolicyError::Compute`] for a flow time that is no place to start from.
    pub fn start<C: Convention>(
        prefix: Option<&Prefix>,
        to_model: impl FnOnce(&[f64], usize) -> std::result::Result<Vec<f32>, PolicyError>,
        start: Start,
    ) -> std::result::Result<(Self, Sampler<C>), PolicyError> {
        let Start { noise, shape, steps, solver } = start;
        let from = |x, level| {
            let sampler = Sampler::from_level(x, shape, steps, level).map_err(compute)?;
            Ok::<_, PolicyError>(sampler.with_solver(solver))
        };
        let Some(prefix) = prefix.filter(|p| p.rows() > 0) else {
            return Ok((Self::Free, from(noise, 1.0)?));
        };
        let (horizon, width) = shape;
        let mut rows = to_model(&prefix.actions, width)?;
        rows.truncate(horizon * width);
        match prefix.usage {
            PrefixUse::Guided { schedule, max_weight } => {
                rows.resize(horizon * width, 0.0);
                let weights = prefix.weights(schedule, horizon);
                let guidance = Guidance::new(&rows, &weights, shape, max_weight);
                let guidance = guidance.map_err(compute)?;
                Ok((Self::Guided(guidance), from(noise, 1.0)?))
            }
            PrefixUse::Trained => {
                let frozen = prefix.frozen.min(rows.len() / width);
                rows.resize(horizon * width, 0.0);
                let rows = Matrix::new(&rows, shape).map_err(compute)?;
                Ok((Self::Clean { rows, frozen }, from(noise, 1.0)?))
            }
            PrefixUse::WarmStart { time } => {
                if !(time > 0.0 && time < 1.0) {
                    return Err(PolicyError::Compute(format!(
                        "a warm start at flow time {time} was asked for; use a value between 0 and 1"
                    )));
                }
                // Past the plan's end the last planned action goes on.
                while rows.len() < horizon * width {
                    rows.extend_from_within(rows.len() - width..);
                }
                let mixed = rows
                    .iter()
                    .zip(&noise)
                    .map(|(a, n)| (f64::from(*a) * (1.0 - time) + f64::from(*n) * time) as f32);
                Ok((Self::Free, from(mixed.collect(), time)?))
            }
        }
    }

    /// One denoise step with the network's `velocity(x, times)`: one time for all actions, or one for each.
    pub fn step<C: Convention>(
        &self,
        sampler: &mut Sampler<C>,
        mut velocity: impl FnMut(&Matrix, &[FlowTime<C>]) -> Result<Matrix>,
    ) -> Result<()> {
        match self {
            Self::Free => sampler.advance(|x, time| velocity(x, &[time])),
            Self::Guided(guidance) => sampler.advance(|x, time| {
                let v = velocity(x, &[time])?;
                guidance.correct(v, x, time)
            }),
            Self::Clean { rows, frozen } => {
                freeze(sampler.sample_mut(), rows, *frozen)?;
                sampler.advance(|x, time| {
                    let mut x = x.clone();
                    freeze(&mut x, rows, *frozen)?;
                    let mut times = vec![time; x.rows()];
                    times.iter_mut().take(*frozen).for_each(|t| *t = FlowTime::ACTIONS);
                    velocity(&x, &times)
                })?;
                freeze(sampler.sample_mut(), rows, *frozen)
            }
        }
    }
}

/// How well `chunk` kept the planned actions: the largest difference on the frozen ones (physical units).
pub(crate) fn reuse(prefix: &Prefix, chunk: &ActionChunk) -> (&'static str, CacheUse) {
    let rows = prefix.rows().min(chunk.horizon());
    let (name, kept) = match prefix.usage {
        PrefixUse::WarmStart { .. } => ("warm_start", rows),
        PrefixUse::Guided { .. } | PrefixUse::Trained => ("frozen_prefix", prefix.frozen.min(rows)),
    };
    let pairs = prefix.actions.iter().zip(chunk.values()).take(kept * prefix.dim);
    let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (lookups, hits) = (count(chunk.horizon()), count(kept));
    (name, CacheUse { lookups, hits, error: Some(error), ..CacheUse::default() })
}
