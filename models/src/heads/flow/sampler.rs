//! Integration from noise to actions.

use std::marker::PhantomData;

use candle_core::{Device, Result, Tensor};

use super::{Convention, FlowTime, NoiseAtOne};

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

/// How one denoise step follows the velocity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solver {
    /// By the velocity at the step's start: one evaluation a step, error of first order.
    #[default]
    Euler,
    /// By the velocity at the step's middle: two evaluations a step, error of second order.
    Midpoint,
}

impl Solver {
    /// Evaluations of the network in one step.
    pub fn evaluations(self) -> usize {
        match self {
            Self::Euler => 1,
            Self::Midpoint => 2,
        }
    }
}

/// Integration from noise to actions in convention `C`, one step at a time.
///
/// Either the caller gives a velocity field to [`Self::advance`]; or it asks for [`Self::sample`] and
/// [`Self::time`], computes a velocity, and gives it to [`Self::step`], which is an Euler step.
#[derive(Debug, Clone)]
pub struct Sampler<C> {
    x: Tensor,
    /// Noise level at the start.
    start: f64,
    steps: usize,
    done: usize,
    solver: Solver,
    /// The newest velocity: where it leads is the best estimate so far.
    velocity: Option<Tensor>,
    convention: PhantomData<C>,
}

/// The sampler of openpi's and LeRobot's policies.
pub type EulerSampler = Sampler<NoiseAtOne>;

impl<C: Convention> Sampler<C> {
    /// Starts at `noise` (`[H, M]` row by row); `steps` must be at least 1.
    ///
    /// # Errors
    /// When `noise` has another number of values.
    pub fn new(noise: Vec<f32>, shape: (usize, usize), steps: usize) -> Result<Self> {
        Self::from_level(noise, shape, steps, 1.0)
    }

    /// Starts at `x`, a sample of noise level `start` (above 0, at most 1).
    ///
    /// # Errors
    /// When `x` has another number of values.
    pub fn from_level(
        x: Vec<f32>,
        shape: (usize, usize),
        steps: usize,
        start: f64,
    ) -> Result<Self> {
        let x = Tensor::from_vec(x, shape, &Device::Cpu)?;
        let (solver, convention) = (Solver::default(), PhantomData);
        Ok(Self { x, start, steps, done: 0, solver, velocity: None, convention })
    }

    /// Uses `solver` from the next step on.
    pub fn with_solver(mut self, solver: Solver) -> Self {
        self.solver = solver;
        self
    }

    /// Changes the number of steps; false once the first is done.
    pub fn set_steps(&mut self, steps: usize) -> bool {
        let may = self.done == 0 && steps > 0;
        if may {
            self.steps = steps;
        }
        may
    }

    /// Ends where the newest velocity leads; false before the first step.
    ///
    /// # Errors
    /// Never with the shapes of [`Self::step`].
    pub fn finish(&mut self) -> Result<bool> {
        let Some(velocity) = self.velocity.take() else { return Ok(false) };
        self.x = (&self.x + (velocity * (-C::SIGN * self.flow_time().level()))?)?;
        self.steps = self.done;
        Ok(true)
    }

    /// Begins again at noise level 1, taking the sample as it is for noise.
    pub fn restart(&mut self) {
        (self.start, self.done, self.velocity) = (1.0, 0, None);
    }

    /// Replaces the sample by `x` of the same shape.
    pub fn overwrite(&mut self, x: Tensor) {
        self.x = x;
    }

    /// The sample as it is now, `[H, M]`.
    pub fn sample(&self) -> &Tensor {
        &self.x
    }

    fn level(&self) -> f64 {
        self.start + self.done as f64 * (-self.start / self.steps as f64)
    }

    /// Its flow time.
    pub fn flow_time(&self) -> FlowTime<C> {
        FlowTime::of_level(self.level())
    }

    /// The number of its flow time, in convention `C`.
    pub fn time(&self) -> f64 {
        self.flow_time().value()
    }

    /// Moves on by the solver's rule along the velocities of `field(x, time)`.
    ///
    /// # Errors
    /// Those of `field`, and a velocity of another shape.
    pub fn advance(
        &mut self,
        mut field: impl FnMut(&Tensor, FlowTime<C>) -> Result<Tensor>,
    ) -> Result<()> {
        let velocity = field(&self.x, self.flow_time())?;
        match self.solver {
            Solver::Euler => self.step(&velocity),
            Solver::Midpoint => {
                let half = self.start / self.steps as f64 / 2.0;
                let middle = (&self.x + (velocity * (-C::SIGN * half))?)?;
                let velocity = field(&middle, FlowTime::of_level(self.level() - half))?;
                self.step(&velocity)
            }
        }
    }

    /// Moves on by `velocity`.
    ///
    /// # Errors
    /// When `velocity` has another shape.
    pub fn step(&mut self, velocity: &Tensor) -> Result<()> {
        let size = self.start / self.steps as f64;
        self.x = (&self.x + (velocity * (-C::SIGN * size))?)?;
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
    use super::super::NoiseAtZero;
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
            EulerSampler::from_level(vec![0.0; 2], (1, 2), 4, 0.6).expect("the shape fits");
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
    fn what_a_perfect_denoiser_gave_is_a_fixed_point_of_a_restart() {
        // v = (x - 3) / t, whose path from any noise to the constant 3 is a straight line.
        let mut sampler = EulerSampler::new(vec![1.0, -2.0], (1, 2), 2).expect("the shape fits");
        for _ in 0..3 {
            while !sampler.is_done() {
                sampler.advance(|x, t| (x - 3.0)? / t.value()).expect("the shapes are equal");
            }
            let x = sampler.sample().flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
            assert_eq!(x, [3.0, 3.0]);
            sampler.restart();
            assert_eq!((sampler.done(), sampler.time()), (0, 1.0));
        }
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

    /// One value from noise level 1 to 0 along `dx/dt = x` (t the time of [`NoiseAtOne`]): exactly `x·e^-1`.
    fn end<C: Convention>(solver: Solver, steps: usize) -> f64 {
        let mut sampler =
            Sampler::<C>::new(vec![1.0], (1, 1), steps).expect("one value").with_solver(solver);
        while !sampler.is_done() {
            sampler.advance(|x, _| x * C::SIGN).expect("the shapes are equal");
        }
        let x = sampler.sample().flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        f64::from(x[0])
    }

    #[test]
    fn the_midpoint_rule_is_of_second_order_and_euler_of_first() {
        let error = |solver, steps| (end::<NoiseAtOne>(solver, steps) - (-1f64).exp()).abs();
        let order = |solver| (error(solver, 8) / error(solver, 16)).log2();
        assert!((order(Solver::Euler) - 1.0).abs() < 0.1, "{}", order(Solver::Euler));
        assert!((order(Solver::Midpoint) - 2.0).abs() < 0.1, "{}", order(Solver::Midpoint));
        assert!(error(Solver::Midpoint, 8) < error(Solver::Euler, 16));
    }

    #[test]
    fn both_conventions_end_at_the_same_actions() {
        for solver in [Solver::Euler, Solver::Midpoint] {
            let (one, zero) = (end::<NoiseAtOne>(solver, 5), end::<NoiseAtZero>(solver, 5));
            assert!((one - zero).abs() < 1e-7, "{solver:?} {one} {zero}");
        }
    }

    #[test]
    fn the_midpoint_rule_looks_at_the_middle_of_the_step() {
        let mut times = Vec::new();
        let sampler = Sampler::<NoiseAtZero>::new(vec![1.0], (1, 1), 2).expect("one value");
        let mut sampler = sampler.with_solver(Solver::Midpoint);
        while !sampler.is_done() {
            let seen = sampler.advance(|x, t| {
                times.push(t.value());
                x.zeros_like()
            });
            seen.expect("the shapes are equal");
        }
        assert_eq!(times, [0.0, 0.25, 0.5, 0.75]);
    }
}
