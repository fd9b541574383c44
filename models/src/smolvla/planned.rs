//! What the planned actions of a request do to the sampling.

use candle_core::{Device, Result, Tensor};
use sinew_runtime::{PolicyError, Prefix, PrefixUse};

use super::EulerSampler;
use crate::guidance::{Guidance, with_prefix};
use crate::processors::Boundary;

/// The planned actions' part in one sampling.
pub(super) enum Planned {
    /// None.
    Free,
    /// Every velocity is corrected.
    Guided(Guidance),
    /// The first `frozen` rows are clean at every step.
    Clean { rows: Tensor, frozen: usize },
}

impl Planned {
    /// The sampling that `prefix` asks for, from `noise`.
    ///
    /// # Errors
    /// [`PolicyError::NotFinite`] for a planned value that is none; [`PolicyError::Compute`] for a flow time
    /// that is no place to start from.
    pub fn start(
        prefix: Option<&Prefix>,
        boundary: &Boundary,
        noise: Vec<f32>,
        shape: (usize, usize),
        steps: usize,
    ) -> std::result::Result<(Self, EulerSampler), PolicyError> {
        let compute = |e: candle_core::Error| PolicyError::Compute(e.to_string());
        let fresh = |noise| EulerSampler::new(noise, shape, steps).map_err(compute);
        let Some(prefix) = prefix.filter(|p| p.rows() > 0) else {
            return Ok((Self::Free, fresh(noise)?));
        };
        let (horizon, width) = shape;
        let mut rows = boundary.model_actions(&prefix.actions, width)?;
        rows.truncate(horizon * width);
        match prefix.usage {
            PrefixUse::Guided { schedule, max_weight } => {
                rows.resize(horizon * width, 0.0);
                let weights = prefix.weights(schedule, horizon);
                let guidance = Guidance::new(rows, &weights, shape, max_weight).map_err(compute)?;
                Ok((Self::Guided(guidance), fresh(noise)?))
            }
            PrefixUse::Trained => {
                let frozen = prefix.frozen.min(rows.len() / width);
                rows.resize(horizon * width, 0.0);
                let rows = Tensor::from_vec(rows, shape, &Device::Cpu).map_err(compute)?;
                Ok((Self::Clean { rows, frozen }, fresh(noise)?))
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
                let sampler = EulerSampler::from_time(mixed.collect(), shape, steps, time);
                Ok((Self::Free, sampler.map_err(compute)?))
            }
        }
    }

    /// One denoise step with the network's `velocity(x, times)`.
    pub fn step(
        &self,
        sampler: &mut EulerSampler,
        velocity: impl Fn(&Tensor, &[f64]) -> Result<Tensor>,
    ) -> Result<()> {
        let time = sampler.time();
        match self {
            Self::Free => {
                let v = velocity(sampler.sample(), &[time])?;
                sampler.step(&v)
            }
            Self::Guided(guidance) => {
                let v = velocity(sampler.sample(), &[time])?;
                let v = guidance.correct(&v, sampler.sample(), time)?;
                sampler.step(&v)
            }
            Self::Clean { rows, frozen } => {
                let x = with_prefix(rows, sampler.sample(), *frozen)?;
                let mut times = vec![time; x.dim(0)?];
                times.iter_mut().take(*frozen).for_each(|t| *t = 0.0);
                let v = velocity(&x, &times)?;
                sampler.overwrite(x);
                sampler.step(&v)?;
                let x = with_prefix(rows, sampler.sample(), *frozen)?;
                sampler.overwrite(x);
                Ok(())
            }
        }
    }
}
