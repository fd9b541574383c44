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
    start: f64,
    steps: usize,
    done: usize,
    /// The newest velocity: where it leads is the best estimate so far.
    velocity: Option<Tensor>,
}

impl EulerSampler {
    /// Starts at `noise` (`[H, M]` row by row); `steps` must be at least 1.
    ///
    /// # Errors
    /// When `noise` has another number of values.
    pub fn new(noise: Vec<f32>, shape: (usize, usize), steps: usize) -> Result<Self> {
        Self::from_time(noise, shape, steps, 1.0)
    }

    /// Starts at `x`, a sample of time `start` (above 0, at most 1).
    ///
    /// # Errors
    /// When `x` has another number of values.
    pub fn from_time(x: Vec<f32>, shape: (usize, usize), steps: usize, start: f64) -> Result<Self> {
        let x = Tensor::from_vec(x, shape, &Device::Cpu)?;
        Ok(Self { x, start, steps, done: 0, velocity: None })
    }

    /// Changes the number of steps; false once the first is done.
    pub fn set_steps(&mut self, steps: usize) -> bool {
        let may = self.done == 0 && steps > 0;
        if may {
            self.steps = steps;
        }
        may
    }

    /// Ends at the estimate of the newest velocity, `x - t·v`; false before the first step.
    ///
    /// # Errors
    /// Never with the shapes of [`Self::step`].
    pub fn finish(&mut self) -> Result<bool> {
        let Some(velocity) = self.velocity.take() else { return Ok(false) };
        self.x = (&self.x + (velocity * -self.time())?)?;
        self.steps = self.done;
        Ok(true)
    }

    /// Replaces the sample by `x` of the same shape.
    pub fn overwrite(&mut self, x: Tensor) {
        self.x = x;
    }

    /// The sample as it is now, `[H, M]`.
    pub fn sample(&self) -> &Tensor {
        &self.x
    }

    /// Its time, from 1 (noise) to 0; rounded to single precision, as in training.
    pub fn time(&self) -> f64 {
        f64::from((self.start + self.done as f64 * (-self.start / self.steps as f64)) as f32)
    }

    /// Moves on by `velocity`.
    ///
    /// # Errors
    /// When `velocity` has another shape.
    pub fn step(&mut self, velocity: &Tensor) -> Result<()> {
        self.x = (&self.x + (velocity * (-self.start / self.steps as f64))?)?;
        self.velocity = Some(velocity.clone());
        self.done += 1;
        Ok(())
    }

    /// Steps in all.
    pub fn steps(&self) -> usize {
        self.steps
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
    fn an_early_end_is_where_the_newest_velocity_leads() {
        // A perfect denoiser of the constant 3: v = (x - 3) / t. Any early end is exact.
        let mut sampler = EulerSampler::new(vec![1.0, -2.0], (1, 2), 10).expect("the shape fits");
        assert_eq!(sampler.finish().ok(), Some(false), "nothing is known before the first step");
        for _ in 0..3 {
            let v = ((sampler.sample() - 3.0).expect("f32") / sampler.time()).expect("f32");
            sampler.step(&v).expect("the shapes are equal");
        }
        assert_eq!(sampler.finish().ok(), Some(true));
        assert!(sampler.is_done());
        let x = sampler.sample().flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        assert!(x.iter().all(|v| (v - 3.0).abs() < 1e-5), "{x:?}");
    }

    #[test]
    fn a_warm_start_ends_at_time_zero_too() {
        let mut sampler =
            EulerSampler::from_time(vec![0.0; 2], (1, 2), 4, 0.6).expect("the shape fits");
        assert!(sampler.set_steps(3) && (sampler.time() - 0.6).abs() < 1e-6);
        while !sampler.is_done() {
            let v = sampler.sample().ones_like().expect("it is on the CPU");
            sampler.step(&v).expect("the shapes are equal");
            assert!(!sampler.set_steps(9), "too late");
        }
        assert!(sampler.time().abs() < 1e-6);
        let x = sampler.sample().flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        assert!((x[0] + 0.6).abs() < 1e-6);
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
