//! The noise of training, step by step, and which of its steps are run backwards.

use candle_core::{Result, bail};
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
    clip: Option<f32>,
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
        Self { clip: Some(bound.abs() as f32), ..self }
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

    /// Whether the step from training step `t` adds noise.
    pub(super) fn adds_noise(&self, t: usize) -> bool {
        self.kind == Kind::Ddpm && t != 0
    }

    /// One step from training step `t` to `previous` (none: to the end), for values of any sample of that level: `x`
    /// becomes what it is after it. `draw` is given each value's place and the clean one that `output` says is in it, and
    /// says what that is taken to be. `noise` is standard-normal, as many values as `x` where it is added.
    ///
    /// # Errors
    /// When the numbers of values differ.
    pub(super) fn step(
        &self,
        x: &mut [f32],
        output: &[f32],
        (t, previous): (usize, Option<usize>),
        noise: &[f32],
        mut draw: impl FnMut(usize, f32) -> f32,
    ) -> Result<()> {
        let noise = self.adds_noise(t).then_some(noise);
        if output.len() != x.len() || noise.is_some_and(|noise| noise.len() != x.len()) {
            let (values, drawn) = (output.len(), noise.map(<[f32]>::len));
            bail!("{values} outputs and {drawn:?} of noise do not fit {} values", x.len());
        }
        let (alpha, alpha_previous) = (self.alpha(Some(t)), self.alpha(previous));
        let current = alpha / alpha_previous;
        // What becomes of the clean sample and of what is left beside it: the noise (DDIM), or the sample (DDPM).
        let (of_clean, of_rest) = match self.kind {
            Kind::Ddim => (alpha_previous.sqrt(), (1.0 - alpha_previous).sqrt()),
            Kind::Ddpm => (
                alpha_previous.sqrt() * (1.0 - current) / (1.0 - alpha),
                current.sqrt() * (1.0 - alpha_previous) / (1.0 - alpha),
            ),
        };
        let variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - current);
        let (of_clean, of_rest) = (of_clean as f32, of_rest as f32);
        let of_noise = variance.max(1e-20).sqrt() as f32;
        let estimate = self.estimate(alpha);
        for (place, (x, output)) in x.iter_mut().zip(output).enumerate() {
            let (clean, epsilon) = estimate(*x, *output);
            let clean = draw(place, self.clip.map_or(clean, |bound| clean.clamp(-bound, bound)));
            let rest = match self.kind {
                Kind::Ddim => epsilon,
                Kind::Ddpm => *x,
            };
            *x = clean * of_clean + rest * of_rest;
            if let Some(noise) = noise {
                *x += noise[place] * of_noise;
            }
        }
        Ok(())
    }

    /// What finds the clean sample and the noise that an output says are in a value.
    fn estimate(&self, alpha: f64) -> impl Fn(f32, f32) -> (f32, f32) + use<> {
        let prediction = self.prediction;
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let (by_signal, by_spread) = ((1.0 / signal) as f32, (1.0 / spread) as f32);
        let (signal, spread) = (signal as f32, spread as f32);
        move |x, output| match prediction {
            Prediction::Epsilon => ((x - output * spread) * by_signal, output),
            Prediction::Sample => (output, (x - output * signal) * by_spread),
            Prediction::VPrediction => (x * signal - output * spread, output * signal + x * spread),
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
