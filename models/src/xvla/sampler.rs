//! Sampling with a model that predicts clean actions.

use candle_core::Result;

use crate::kernels::{Matrix, add_scaled};

/// Denoising by renewed mixing: noise and the newest clean estimate are mixed by the flow time, the model
/// predicts the clean actions anew.
///
/// Flow time runs from 1 (noise) down to, but not including, 0 (actions): `n` steps take the times
/// `n/n, (n−1)/n, …, 1/n`. The caller asks for [`Self::sample`] and [`Self::time`], and gives the prediction to
/// [`Self::step`].
///
/// Source: LeRobot 0.6.1 `src/lerobot/policies/xvla/modeling_xvla.py`, `generate_actions`.
#[derive(Debug, Clone)]
pub struct CleanSampler {
    noise: Matrix,
    clean: Matrix,
    start: f64,
    steps: usize,
    done: usize,
}

impl CleanSampler {
    /// Starts at `noise` (`[H, M]` row by row); `steps` must be at least 1.
    ///
    /// # Errors
    /// When `noise` has another number of values.
    pub fn new(noise: Vec<f32>, shape: (usize, usize), steps: usize) -> Result<Self> {
        let noise = Matrix::new(&noise, shape)?;
        Ok(Self { clean: Matrix::zeros(shape.0, shape.1), noise, start: 1.0, steps, done: 0 })
    }

    /// Starts at time `start` (above 0, at most 1) from the clean estimate `clean` (`[H, M]` row by row).
    ///
    /// # Errors
    /// When `clean` or `noise` has another number of values.
    pub fn from_estimate(
        clean: Vec<f32>,
        noise: Vec<f32>,
        shape: (usize, usize),
        steps: usize,
        start: f64,
    ) -> Result<Self> {
        Ok(Self { clean: Matrix::new(&clean, shape)?, start, ..Self::new(noise, shape, steps)? })
    }

    /// Changes the number of steps; false once the first is done.
    pub fn set_steps(&mut self, steps: usize) -> bool {
        let may = self.done == 0 && steps > 0;
        if may {
            self.steps = steps;
        }
        may
    }

    /// Ends at the newest estimate; false before the first step.
    pub fn finish(&mut self) -> bool {
        let may = self.done > 0;
        if may {
            self.steps = self.done;
        }
        may
    }

    /// Its time; rounded to single precision, as in training.
    pub fn time(&self) -> f64 {
        let left = self.steps.saturating_sub(self.done) as f64;
        f64::from((self.start * left / self.steps as f64) as f32)
    }

    /// What the model is to see now, `[H, M]`: `noise·t + clean·(1 − t)`.
    ///
    /// # Errors
    /// Never with the shapes of [`Self::new`].
    pub fn sample(&self) -> Result<Matrix> {
        let t = self.time() as f32;
        let mut x = self.noise.clone().scaled(t);
        add_scaled(&mut x, &self.clean, 1.0 - t)?;
        Ok(x)
    }

    /// The newest estimate of the clean actions, `[H, M]`.
    pub fn clean(&self) -> &Matrix {
        &self.clean
    }

    /// Takes the model's prediction of the clean actions.
    pub fn step(&mut self, clean: Matrix) {
        self.clean = clean;
        self.done += 1;
    }

    /// Steps done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Steps in all.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Whether the estimate is the result.
    pub fn is_done(&self) -> bool {
        self.done >= self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOISE: [f32; 4] = [0.3, -1.2, 0.8, 2.0];

    /// A made-up model that depends on sample and time.
    fn predict(mut x: Matrix, t: f64) -> Matrix {
        let shrink = (1.0 - 0.4 * t) as f32;
        x.values_mut().iter_mut().for_each(|x| *x = x.sin() * shrink + 0.1);
        x
    }

    fn run(sampler: &mut CleanSampler, until: usize) {
        while sampler.done() < until {
            let clean = predict(sampler.sample().expect("same shapes"), sampler.time());
            sampler.step(clean);
        }
    }

    #[test]
    fn the_first_sample_is_the_noise_and_times_run_down() {
        let mut sampler = CleanSampler::new(NOISE.to_vec(), (2, 2), 4).expect("it fits");
        assert_eq!(sampler.sample().expect("same shapes").values(), NOISE);
        let mut times = Vec::new();
        while !sampler.is_done() {
            times.push(sampler.time());
            let next = sampler.done() + 1;
            run(&mut sampler, next);
        }
        assert_eq!(times, [1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn a_warm_start_goes_on_where_the_estimate_was_made() {
        let mut whole = CleanSampler::new(NOISE.to_vec(), (2, 2), 5).expect("it fits");
        run(&mut whole, 2);
        let estimate = whole.clean().values().to_vec();
        let mut rest =
            CleanSampler::from_estimate(estimate, NOISE.to_vec(), (2, 2), 3, 0.6).expect("it fits");
        run(&mut whole, 5);
        run(&mut rest, 3);
        assert_eq!(whole.clean().values(), rest.clean().values());
    }

    #[test]
    fn an_early_end_gives_the_newest_estimate() {
        let mut sampler = CleanSampler::new(NOISE.to_vec(), (2, 2), 5).expect("it fits");
        assert!(!sampler.finish(), "nothing is known before the first step");
        assert!(sampler.set_steps(7));
        run(&mut sampler, 2);
        assert!(!sampler.set_steps(9), "too late");
        let newest = sampler.clean().clone();
        assert!(sampler.finish() && sampler.is_done());
        assert_eq!(sampler.clean().values(), newest.values());
    }
}
