//! Flow matching: noise at time 1 becomes actions at time 0.

use candle_core::{Device, Result, Tensor};

/// Embedding of time `t`: `width / 2` sines, then as many cosines, of periods from `min_period` to `max_period`.
///
/// Angles in double precision: 2π/0.004 is large, and single precision gives visible errors.
pub fn time_embedding(t: f64, width: usize, min_period: f64, max_period: f64) -> Vec<f32> {
    let half = width / 2;
    let last = half.saturating_sub(1).max(1) as f64;
    let angles: Vec<f64> = (0..half)
        .map(|i| {
            let period = min_period * (max_period / min_period).powf(i as f64 / last);
            std::f64::consts::TAU * t / period
        })
        .collect();
    let sines = angles.iter().map(|a| a.sin() as f32);
    sines.chain(angles.iter().map(|a| a.cos() as f32)).collect()
}

/// `count` standard-normal values of `seed`: Box-Muller on SplitMix64, the same on every machine.
pub fn gaussian_noise(seed: u64, count: usize) -> Vec<f32> {
    let mut random = crate::random::SplitMix64::new(seed);
    let mut out = Vec::with_capacity(count + 1);
    while out.len() < count {
        let radius = (-2.0 * random.open_unit().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * random.open_unit()).sin_cos();
        out.push((radius * cos) as f32);
        out.push((radius * sin) as f32);
    }
    out.truncate(count);
    out
}

/// Euler integration from noise to actions, one step at a time.
///
/// The caller asks for [`Self::sample`] and [`Self::time`], computes a velocity, may correct it, and
/// gives it to [`Self::step`].
#[derive(Debug, Clone)]
pub struct EulerSampler {
    x: Tensor,
    steps: usize,
    done: usize,
}

impl EulerSampler {
    /// Starts at `noise` (`[H, M]` row by row); `steps` must be at least 1.
    ///
    /// # Errors
    /// When `noise` has another number of values.
    pub fn new(noise: Vec<f32>, shape: (usize, usize), steps: usize) -> Result<Self> {
        Ok(Self { x: Tensor::from_vec(noise, shape, &Device::Cpu)?, steps, done: 0 })
    }

    /// The sample as it is now, `[H, M]`.
    pub fn sample(&self) -> &Tensor {
        &self.x
    }

    /// Its time, from 1 (noise) to 0; rounded to single precision, as in training.
    pub fn time(&self) -> f64 {
        f64::from((1.0 + self.done as f64 * (-1.0 / self.steps as f64)) as f32)
    }

    /// Moves on by `velocity`.
    ///
    /// # Errors
    /// When `velocity` has another shape.
    pub fn step(&mut self, velocity: &Tensor) -> Result<()> {
        self.x = (&self.x + (velocity * (-1.0 / self.steps as f64))?)?;
        self.done += 1;
        Ok(())
    }

    /// Steps done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// True after the last step.
    pub fn is_done(&self) -> bool {
        self.done >= self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_normal_and_repeatable() {
        let a = gaussian_noise(7, 20_001);
        assert_eq!(a, gaussian_noise(7, 20_001));
        assert_ne!(a[..100], gaussian_noise(8, 100)[..]);
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let var = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.04, "{mean} {var}");
    }

    #[test]
    fn times_run_from_one_down() {
        let mut sampler = EulerSampler::new(vec![1.0; 2], (1, 2), 4).expect("the shape fits");
        let mut times = Vec::new();
        while !sampler.is_done() {
            times.push(sampler.time());
            let velocity = sampler.sample().ones_like().expect("it is on the CPU");
            sampler.step(&velocity).expect("the shapes are equal");
        }
        assert_eq!(times, [1.0, 0.75, 0.5, 0.25]);
        let x = sampler.sample().flatten_all().and_then(|t| t.to_vec1::<f32>());
        assert_eq!(x.ok(), Some(vec![0.0, 0.0]));
    }
}
