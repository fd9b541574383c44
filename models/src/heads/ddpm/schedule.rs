//! The noise of training, step by step, and which of its steps are run backwards.

use candle_core::{Result, Tensor};
use serde::Deserialize;

/// Which of the two samplers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Kind {
    /// Noise is added after every step but the last.
    #[serde(rename = "DDPM")]
    Ddpm,
    /// Deterministic after the first noise.
    #[serde(rename = "DDIM")]
    Ddim,
}

/// How the training noise grew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// `ᾱ` falls as a squared cosine, `β` at most 0.999 (Nichol and Dhariwal 2021, arXiv 2102.09672).
    SquaredcosCapV2,
    /// `β` on a line.
    Linear,
    /// `√β` on a line.
    ScaledLinear,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise in the sample.
    Epsilon,
    /// The clean sample.
    Sample,
    /// `√ᾱ·noise − √(1 − ᾱ)·x0` (Salimans and Ho 2022, arXiv 2202.00512).
    VPrediction,
}

/// How the steps taken are picked among the training steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    /// `0, T/n, 2·T/n, …`, with whole steps: what LeRobot uses.
    Leading,
    /// `T − 1` and every `T/n`-th before it, rounded to the nearest.
    Trailing,
}

/// A training noise schedule and how it is run backwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    kind: Kind,
    prediction: Prediction,
    spacing: Spacing,
    /// Bound of the estimated clean sample.
    clip: Option<f64>,
    betas: Vec<f32>,
    alphas: Vec<f32>,
}

impl Schedule {
    /// The schedule of `steps` training steps (`T`), `β` from `range.0` to `range.1` where it lies on a line.
    pub fn new(
        kind: Kind,
        shape: BetaSchedule,
        steps: usize,
        range: (f64, f64),
        prediction: Prediction,
    ) -> Self {
        let betas = betas(shape, steps, range);
        let mut product = 1.0;
        // A product in double precision of single-precision factors, as in training.
        let alphas = betas.iter().map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        });
        let alphas = alphas.collect();
        Self { kind, prediction, spacing: Spacing::Leading, clip: None, betas, alphas }
    }

    /// The same, with the estimated clean sample cut to ±`bound`.
    #[must_use]
    pub fn clipped(self, bound: f64) -> Self {
        Self { clip: Some(bound), ..self }
    }

    /// The same, with other steps.
    #[must_use]
    pub fn spaced(self, spacing: Spacing) -> Self {
        Self { spacing, ..self }
    }

    /// Training steps `T`.
    pub fn training_steps(&self) -> usize {
        self.betas.len()
    }

    /// `β` of each training step.
    pub fn betas(&self) -> &[f32] {
        &self.betas
    }

    /// `ᾱ` of each training step.
    pub fn alphas(&self) -> &[f32] {
        &self.alphas
    }

    /// The `n` training steps taken, falling; `n` is at least 1 and at most `T`.
    pub fn timesteps(&self, n: usize) -> Vec<usize> {
        self.timesteps_below(self.training_steps(), n)
    }

    /// The same among the first `end` training steps.
    pub(super) fn timesteps_below(&self, end: usize, n: usize) -> Vec<usize> {
        let n = n.clamp(1, end);
        match self.spacing {
            Spacing::Leading => (0..n).rev().map(|i| i * (end / n)).collect(),
            Spacing::Trailing => {
                let place = |i: usize| end as f64 - i as f64 * end as f64 / n as f64;
                (0..n).map(|i| (place(i).round_ties_even() as usize).saturating_sub(1)).collect()
            }
        }
    }

    /// `ᾱ` at training step `t`: 1 past the end.
    pub(super) fn alpha(&self, t: Option<usize>) -> f64 {
        t.and_then(|t| self.alphas.get(t)).map_or(1.0, |a| f64::from(*a))
    }

    /// One step from training step `t` to `previous` (none: to the end), for rows of any sample of that level: the sample
    /// after it, and the clean one that `output` says is in `x`, after `draw`. `noise` is asked for a standard-normal tensor
    /// of the shape of `x` where one is added.
    ///
    /// # Errors
    /// When a shape differs.
    pub(super) fn step(
        &self,
        x: &Tensor,
        output: &Tensor,
        (t, previous): (usize, Option<usize>),
        draw: impl FnOnce(Tensor) -> Result<Tensor>,
        noise: impl FnOnce() -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let alpha = self.alpha(Some(t));
        let alpha_previous = self.alpha(previous);
        let (clean, epsilon) = self.estimate(x, output, alpha)?;
        let clean = match self.clip {
            Some(bound) => clean.clamp(-bound, bound)?,
            None => clean,
        };
        let clean = draw(clean)?;
        let x = match self.kind {
            Kind::Ddim => {
                ((&clean * alpha_previous.sqrt())? + (epsilon * (1.0 - alpha_previous).sqrt())?)?
            }
            Kind::Ddpm => {
                let current = alpha / alpha_previous;
                let of_clean = alpha_previous.sqrt() * (1.0 - current) / (1.0 - alpha);
                let of_x = current.sqrt() * (1.0 - alpha_previous) / (1.0 - alpha);
                let mean = ((&clean * of_clean)? + (x * of_x)?)?;
                if t == 0 {
                    mean
                } else {
                    let variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - current);
                    (mean + (noise()? * variance.max(1e-20).sqrt())?)?
                }
            }
        };
        Ok((x, clean))
    }

    /// Clean sample and noise that `output` says are in `x`.
    fn estimate(&self, x: &Tensor, output: &Tensor, alpha: f64) -> Result<(Tensor, Tensor)> {
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        match self.prediction {
            Prediction::Epsilon => Ok((((x - (output * spread)?)? / signal)?, output.clone())),
            Prediction::Sample => Ok((output.clone(), ((x - (output * signal)?)? / spread)?)),
            Prediction::VPrediction => {
                Ok((((x * signal)? - (output * spread)?)?, ((output * signal)? + (x * spread)?)?))
            }
        }
    }
}

fn betas(shape: BetaSchedule, steps: usize, (start, end): (f64, f64)) -> Vec<f32> {
    let line =
        |from: f64, to: f64, i: usize| from + (to - from) * i as f64 / (steps.max(2) - 1) as f64;
    let signal = |u: f64| ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..steps)
        .map(|i| match shape {
            BetaSchedule::SquaredcosCapV2 => {
                let place = |i: usize| i as f64 / steps as f64;
                (1.0 - signal(place(i + 1)) / signal(place(i))).min(0.999) as f32
            }
            BetaSchedule::Linear => line(start, end, i) as f32,
            BetaSchedule::ScaledLinear => (line(start.sqrt(), end.sqrt(), i) as f32).powi(2),
        })
        .collect()
}
