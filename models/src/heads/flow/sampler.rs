//! Integration from noise to actions.

use std::marker::PhantomData;

use candle_core::Result;

use super::{Convention, FlowTime, NoiseAtOne};
use crate::kernels::{Matrix, add_scaled};

/// `count` standard-normal values of `seed`; see [`fill_with_noise`].
pub fn gaussian_noise(seed: u64, count: usize) -> Vec<f32> {
    let mut out = vec![0.0; count];
    fill_with_noise(seed, &mut out);
    out
}

/// Writes standard-normal values of `seed`: Box-Muller on SplitMix64, the same on every machine.
pub fn fill_with_noise(seed: u64, out: &mut [f32]) {
    let mut random = crate::random::SplitMix64::new(seed);
    for pair in out.chunks_mut(2) {
        let radius = (-2.0 * random.open_unit().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * random.open_unit()).sin_cos();
        let both = [(radius * cos) as f32, (radius * sin) as f32];
        pair.iter_mut().zip(both).for_each(|(to, value)| *to = value);
    }
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
    x: Matrix,
    /// Noise level at the start.
    start: f64,
    steps: usize,
    done: usize,
    solver: Solver,
    /// The newest velocity: where it leads is the best estimate so far.
    velocity: Option<Matrix>,
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
        let x = Matrix::new(&x, shape)?;
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
        let by = (-C::SIGN * self.flow_time().level()) as f32;
        add_scaled(&mut self.x, &velocity, by)?;
        self.steps = self.done;
        Ok(true)
    }

    /// Begins again at noise level 1, taking the sample as it is for noise.
    pub fn restart(&mut self) {
        (self.start, self.done, self.velocity) = (1.0, 0, None);
    }

    /// The sample, to be changed in place.
    pub fn sample_mut(&mut self) -> &mut Matrix {
        &mut self.x
    }

    /// The sample as it is now, `[H, M]`.
    pub fn sample(&self) -> &Matrix {
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
        mut field: impl FnMut(&Matrix, FlowTime<C>) -> Result<Matrix>,
    ) -> Result<()> {
        let velocity = field(&self.x, self.flow_time())?;
        match self.solver {
            Solver::Euler => self.step(velocity),
            Solver::Midpoint => {
                let half = self.start / self.steps as f64 / 2.0;
                let mut middle = self.x.clone();
                add_scaled(&mut middle, &velocity, (-C::SIGN * half) as f32)?;
                let velocity = field(&middle, FlowTime::of_level(self.level() - half))?;
                self.step(velocity)
            }
        }
    }

    /// Moves on by `velocity`.
    ///
    /// # Errors
    /// When `velocity` has another shape.
    pub fn step(&mut self, velocity: Matrix) -> Result<()> {
        let size = self.start / self.steps as f64;
        add_scaled(&mut self.x, &velocity, (-C::SIGN * size) as f32)?;
        self.velocity = Some(velocity);
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

    /// Every value of `x` by `f`.
    fn map(x: &Matrix, f: impl Fn(f32) -> f32) -> Matrix {
        let values: Vec<f32> = x.values().iter().map(|v| f(*v)).collect();
        Matrix::new(&values, x.dims()).expect("as many")
    }

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
            let t = sampler.time() as f32;
            let v = map(sampler.sample(), |x| (x - 3.0) / t);
            sampler.step(v).expect("the shapes are equal");
        }
        assert_eq!(sampler.finish().ok(), Some(true));
        assert!(sampler.is_done());
        let x = sampler.sample().values();
        assert!(x.iter().all(|v| (v - 3.0).abs() < 1e-5), "{x:?}");
    }

    #[test]
    fn a_warm_start_ends_at_time_zero_too() {
        let mut sampler =
            EulerSampler::from_level(vec![0.0; 2], (1, 2), 4, 0.6).expect("the shape fits");
        assert!(sampler.set_steps(3) && (sampler.time() - 0.6).abs() < 1e-6);
        while !sampler.is_done() {
            let v = map(sampler.sample(), |_| 1.0);
            sampler.step(v).expect("the shapes are equal");
            assert!(!sampler.set_steps(9), "too late");
        }
        assert!(sampler.time().abs() < 1e-6);
        assert!((sampler.sample().values()[0] + 0.6).abs() < 1e-6);
    }

    #[test]
    fn what_a_perfect_denoiser_gave_is_a_fixed_point_of_a_restart() {
        // v = (x - 3) / t, whose path from any noise to the constant 3 is a straight line.
        let mut sampler = EulerSampler::new(vec![1.0, -2.0], (1, 2), 2).expect("the shape fits");
        for _ in 0..3 {
            while !sampler.is_done() {
                let field = |x: &Matrix, t: FlowTime<NoiseAtOne>| {
                    Ok(map(x, |x| (x - 3.0) / t.value() as f32))
                };
                sampler.advance(field).expect("the shapes are equal");
            }
            assert_eq!(sampler.sample().values(), [3.0, 3.0]);
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
            let velocity = map(sampler.sample(), |_| 1.0);
            sampler.step(velocity).expect("the shapes are equal");
        }
        assert_eq!(times, [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(sampler.sample().values(), [0.0, 0.0]);
    }

    /// One value from noise level 1 to 0 along `dx/dt = x` (t the time of [`NoiseAtOne`]): exactly `x·e^-1`.
    fn end<C: Convention>(solver: Solver, steps: usize) -> f64 {
        let mut sampler =
            Sampler::<C>::new(vec![1.0], (1, 1), steps).expect("one value").with_solver(solver);
        while !sampler.is_done() {
            let field = |x: &Matrix, _| Ok(x.clone().scaled(C::SIGN as f32));
            sampler.advance(field).expect("the shapes are equal");
        }
        f64::from(sampler.sample().values()[0])
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
                Ok(map(x, |_| 0.0))
            });
            seen.expect("the shapes are equal");
        }
        assert_eq!(times, [0.0, 0.25, 0.5, 0.75]);
    }
}
