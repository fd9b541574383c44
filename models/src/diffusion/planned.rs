//! What the planned actions of a request do to the sampling.

use sinew_runtime::{PolicyError, Prefix, PrefixUse};

use crate::anytime::compute;
use crate::heads::ddpm::{Inpainting, Sampler, Schedule};
use crate::kernels::Matrix;
use crate::processors::Boundary;

/// The sampling that `prefix` asks for, from `noise` (`[H, A]`). The first `past` of the rows denoised lie before the plan's.
///
/// # Errors
/// [`PolicyError::PrefixWidth`]; [`PolicyError::Unsupported`] for clean prefixes, which this head was not trained for;
/// [`PolicyError::NotFinite`] for a planned value that is none; [`PolicyError::Compute`] for a flow time that is
/// no place to start from.
pub(super) fn start(
    schedule: Schedule,
    prefix: Option<&Prefix>,
    boundary: &Boundary,
    past: usize,
    noise: Matrix,
    steps: usize,
) -> Result<Sampler, PolicyError> {
    let Some(prefix) = prefix else { return Ok(Sampler::new(schedule, noise, steps)) };
    let (horizon, width) = noise.dims();
    if prefix.dim != width {
        return Err(PolicyError::PrefixWidth { expected: width, found: prefix.dim });
    }
    let ahead = horizon - past;
    let mut plan = boundary.model_actions(&prefix.actions, width)?;
    plan.truncate(ahead * width);
    if plan.len() < width {
        return Ok(Sampler::new(schedule, noise, steps));
    }
    match prefix.usage {
        PrefixUse::WarmStart { time } => {
            if !(time > 0.0 && time < 1.0) {
                return Err(PolicyError::Compute(format!(
                    "a warm start at flow time {time} was asked for; use a value between 0 and 1"
                )));
            }
            // Before the plan its first action stands, past its end the last one.
            let mut guess = plan[..width].repeat(past);
            guess.extend_from_slice(&plan);
            while guess.len() < horizon * width {
                guess.extend_from_within(guess.len() - width..);
            }
            Sampler::warm(schedule, &guess, noise, steps, time).map_err(compute)
        }
        PrefixUse::Guided { schedule: fall, max_weight } => {
            let mut target = Matrix::zeros(horizon, width);
            target.values_mut()[past * width..][..plan.len()].copy_from_slice(&plan);
            let mut weights = vec![0.0; past];
            let strongest = max_weight.clamp(0.0, 1.0);
            weights.extend(prefix.weights(fall, ahead).iter().map(|w| w.min(strongest)));
            let plan = Inpainting::new(target, &weights).map_err(compute)?;
            Sampler::new(schedule, noise, steps).inpainting(plan).map_err(compute)
        }
        PrefixUse::Trained => Err(PolicyError::Unsupported("clean prefixes")),
    }
}
