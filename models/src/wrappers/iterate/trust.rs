//! How wrong the last chunk is as a guess of the next, and where denoising begins because of that. Pure.

use sinew_runtime::Unused;

/// How much noise a head expects in a sample.
#[derive(Debug, Clone, PartialEq)]
pub enum NoiseLaw {
    /// A sample at flow time `t` is `t` parts noise and `1 − t` parts actions.
    Flow,
    /// Noise over signal after each training step, rising.
    Diffusion(Vec<f64>),
}

impl NoiseLaw {
    /// The flow time whose noise over signal is `ratio`; 1: none is so large.
    pub fn time(&self, ratio: f64) -> f64 {
        match self {
            Self::Flow => ratio / (1.0 + ratio),
            Self::Diffusion(ratios) => {
                let step = ratios.partition_point(|r| *r < ratio);
                (step + 1).min(ratios.len()) as f64 / ratios.len().max(1) as f64
            }
        }
    }
}

/// Settings of [`super::Iterate`].
#[derive(Debug, Clone, PartialEq)]
pub struct IterateConfig {
    /// Chunks from noise whose guesses are measured before the first is used.
    pub learn: usize,
    /// After so many warm starts one chunk is made from noise, and the guess measured again.
    pub renew: usize,
    /// Noise over the measured error of the guess.
    pub margin: f64,
    /// Flow times below and above which no warm start begins: the least is always denoised, and above the most there
    /// is nothing to gain.
    pub times: (f64, f64),
    /// What the guess of a discrete dimension is divided by, about the middle of its range: a switch that has to flip is
    /// too far away otherwise.
    pub discrete_factor: f64,
}

impl Default for IterateConfig {
    fn default() -> Self {
        Self { learn: 4, renew: 12, margin: 1.5, times: (0.15, 0.8), discrete_factor: 10.0 }
    }
}

/// Measured errors that the guess's error is the root mean square of.
const MEASURED: usize = 8;

/// How wrong guesses are, and what follows from it. Pure.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Trust {
    pub config: IterateConfig,
    pub law: NoiseLaw,
    errors: Vec<f64>,
    /// Warm starts since a guess was measured.
    pub warm: usize,
}

impl Trust {
    pub fn new(config: IterateConfig, law: NoiseLaw) -> Self {
        Self { config, law, errors: Vec::new(), warm: 0 }
    }

    /// A guess was so far (RMS, the network's units) from the chunk that was made without it.
    pub fn measured(&mut self, error: f64) {
        if self.errors.len() == MEASURED {
            self.errors.remove(0);
        }
        self.errors.push(if error.is_finite() { error } else { 1.0 });
        self.warm = 0;
    }

    /// Root mean square of the guesses' errors; `None` while too few are known.
    pub fn error(&self) -> Option<f64> {
        let squares: f64 = self.errors.iter().map(|e| e * e).sum();
        let count = self.errors.len();
        (count >= self.config.learn.clamp(1, MEASURED)).then(|| (squares / count as f64).sqrt())
    }

    /// The flow time to start at, or why the next chunk is made from noise.
    pub fn start(&self) -> Result<f64, Unused> {
        let error = self.error().ok_or(Unused::Fresh)?;
        if self.warm >= self.config.renew {
            return Err(Unused::Refresh);
        }
        let time = self.law.time(self.config.margin * error).max(self.config.times.0);
        if time > self.config.times.1 { Err(Unused::Changed) } else { Ok(time) }
    }
}
