//! One sampling, from noise to actions.

use candle_core::{Result, bail};

use super::schedule::Schedule;
use crate::kernels::Matrix;

/// A plan that the clean sample is drawn to at every step.
///
/// Inpainting: where the weight is 1 the estimate is replaced by the plan, so that the rest is denoised in its
/// company and the result is the plan there; between 0 and 1 it moves that part of the way.
#[derive(Debug, Clone)]
pub struct Inpainting {
    /// `[H, A]`, zero where the weight is.
    target: Matrix,
    /// One for each row.
    weights: Vec<f32>,
}

impl Inpainting {
    /// Draws to `target` (`[H, A]`) with a weight from 0 to 1 for each row.
    ///
    /// # Errors
    /// When there are not as many weights as rows.
    pub fn new(target: Matrix, weights: &[f64]) -> Result<Self> {
        if weights.len() != target.rows() {
            bail!("{} weights for a plan of {} rows", weights.len(), target.rows());
        }
        Ok(Self { target, weights: weights.iter().map(|w| *w as f32).collect() })
    }

    /// The value `clean` at `place` of the sample, drawn.
    fn draw(&self, place: usize, clean: f32) -> f32 {
        clean + (self.target.values()[place] - clean) * self.weights[place / self.target.width()]
    }
}

/// One sampling, a step at a time.
///
/// The caller asks for [`Self::sample`] and [`Self::timestep`], computes the network's output, and gives it to
/// [`Self::step`].
#[derive(Debug, Clone)]
pub struct Sampler {
    schedule: Schedule,
    x: Matrix,
    /// Training steps below this one are left to do.
    end: usize,
    timesteps: Vec<usize>,
    done: usize,
    inpainting: Option<Inpainting>,
    /// The newest estimate of the clean sample.
    clean: Option<Matrix>,
}

impl Sampler {
    /// Starts at `noise` (`[H, A]`) with `steps` steps.
    pub fn new(schedule: Schedule, noise: Matrix, steps: usize) -> Self {
        let end = schedule.training_steps();
        let timesteps = schedule.timesteps(steps);
        Self { schedule, x: noise, end, timesteps, done: 0, inpainting: None, clean: None }
    }

    /// Starts at `guess` (row by row), noised with `noise` (`[H, A]`) to the part `time` (above 0, at most 1) of the
    /// training steps.
    ///
    /// # Errors
    /// When `guess` has another number of values than `noise`.
    pub fn warm(
        schedule: Schedule,
        guess: &[f32],
        noise: Matrix,
        steps: usize,
        time: f64,
    ) -> Result<Self> {
        let mut x = noise;
        if guess.len() != x.values().len() {
            bail!("a guess of {} values does not fit {:?}", guess.len(), x.dims());
        }
        let all = schedule.training_steps();
        let end = ((time * all as f64).round() as usize).clamp(1, all);
        let timesteps = schedule.timesteps_below(end, steps);
        let alpha = schedule.alpha(timesteps.first().copied());
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        for (x, guess) in x.values_mut().iter_mut().zip(guess) {
            *x = (f64::from(*guess) * signal + f64::from(*x) * spread) as f32;
        }
        Ok(Self { schedule, x, end, timesteps, done: 0, inpainting: None, clean: None })
    }

    /// The same, drawn to a plan.
    ///
    /// # Errors
    /// When the plan has another shape than the sample.
    pub fn inpainting(self, plan: Inpainting) -> Result<Self> {
        if plan.target.dims() != self.x.dims() {
            bail!("a plan of {:?} does not fit {:?}", plan.target.dims(), self.x.dims());
        }
        Ok(Self { inpainting: Some(plan), ..self })
    }

    /// The sample as it is now, `[H, A]`.
    pub fn sample(&self) -> &Matrix {
        &self.x
    }

    /// The training step that the network is asked about; 0 when all are done.
    pub fn timestep(&self) -> usize {
        self.timesteps().first().copied().unwrap_or(0)
    }

    /// The same as a list of one, or none when all are done.
    pub fn timesteps(&self) -> &[usize] {
        let left = &self.timesteps[self.done.min(self.timesteps.len())..];
        &left[..left.len().min(1)]
    }

    /// Moves on by the network's `output` for the current sample. `noise` is asked for standard-normal values of the
    /// sample's shape where they are added (DDPM, every step but those at training step 0).
    ///
    /// # Errors
    /// When `output` or the noise has another shape.
    pub fn step(&mut self, output: &Matrix, noise: impl FnOnce() -> Result<Matrix>) -> Result<()> {
        let t = self.timestep();
        let previous = self.timesteps.get(self.done + 1).copied();
        let noise = if self.schedule.adds_noise(t) { Some(noise()?) } else { None };
        let shape = self.x.dims();
        for given in std::iter::once(output).chain(&noise) {
            if given.dims() != shape {
                bail!("{:?} does not fit a sample of {shape:?}", given.dims());
            }
        }
        let mut clean = Matrix::unwritten(shape.0, shape.1);
        let (known, plan) = (clean.values_mut(), &self.inpainting);
        let draw = |place: usize, value| {
            known[place] = plan.as_ref().map_or(value, |plan| plan.draw(place, value));
            known[place]
        };
        let noise = noise.as_ref().map_or(&[][..], Matrix::values);
        self.schedule.step(self.x.values_mut(), output.values(), (t, previous), noise, draw)?;
        self.clean = Some(clean);
        self.done += 1;
        Ok(())
    }

    /// Changes the number of steps; false once the first is done, or for more than there are training steps.
    pub fn set_steps(&mut self, steps: usize) -> bool {
        let may = self.done == 0 && steps > 0 && steps <= self.end;
        // The level of a warm start's noise is that of its first step, which the number of steps moves.
        let may = may && self.end == self.schedule.training_steps();
        if may {
            self.timesteps = self.schedule.timesteps(steps);
        }
        may
    }

    /// Ends at the newest estimate of the clean sample; false before the first step.
    pub fn finish(&mut self) -> bool {
        let Some(clean) = self.clean.take() else { return false };
        self.x = clean;
        self.timesteps.truncate(self.done);
        true
    }

    /// Steps in all.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// Steps done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// True after the last step.
    pub fn is_done(&self) -> bool {
        self.done >= self.timesteps.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BetaSchedule, Kind, Prediction, Spacing};
    use super::*;

    const T: usize = 100;

    fn schedule(kind: Kind, prediction: Prediction) -> Schedule {
        Schedule::new(kind, BetaSchedule::SquaredcosCapV2, T, (1e-4, 0.02), prediction)
    }

    fn matrix(values: &[f32], shape: (usize, usize)) -> Matrix {
        Matrix::new(values, shape).expect("as many values")
    }

    /// Whether every value of `x` is nearer to 0.25 than `distance`.
    fn arrived(x: &Matrix, distance: f32) -> bool {
        x.values().iter().all(|v| (v - 0.25).abs() < distance)
    }

    /// What a network that knows the clean sample to be 0.25 everywhere says of `sampler`'s sample.
    fn perfect(sampler: &Sampler, prediction: Prediction) -> Matrix {
        let alpha = sampler.schedule.alphas()[sampler.timestep()];
        let (clean, signal, spread) = (0.25, alpha.sqrt(), (1.0 - alpha).sqrt());
        let mut output = sampler.sample().clone();
        for x in output.values_mut() {
            let noise = (*x - clean * signal) / spread;
            *x = match prediction {
                Prediction::Epsilon => noise,
                Prediction::Sample => clean,
                Prediction::VPrediction => noise * signal - clean * spread,
            };
        }
        output
    }

    fn still(x: &Matrix) -> impl FnOnce() -> Result<Matrix> + use<> {
        let (rows, width) = x.dims();
        move || Ok(Matrix::zeros(rows, width))
    }

    #[test]
    fn a_perfect_network_is_followed_whatever_it_predicts() {
        for kind in [Kind::Ddpm, Kind::Ddim] {
            for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::VPrediction] {
                for steps in [1, 7, T] {
                    let schedule = schedule(kind, prediction).clipped(1.0);
                    let noise = Matrix::of_row(&[1.5, -0.5]);
                    let mut sampler = Sampler::new(schedule, noise, steps);
                    while !sampler.is_done() {
                        let output = perfect(&sampler, prediction);
                        let noise = still(sampler.sample());
                        sampler.step(&output, noise).expect("the shapes are equal");
                    }
                    let x = sampler.sample();
                    assert!(arrived(x, 2e-3), "{kind:?} {prediction:?} {steps}: {x:?}");
                }
            }
        }
    }

    #[test]
    fn trailing_steps_start_at_the_noise() {
        let leading = schedule(Kind::Ddim, Prediction::Epsilon);
        assert_eq!(leading.timesteps(4), [75, 50, 25, 0]);
        let trailing = leading.spaced(Spacing::Trailing);
        assert_eq!(trailing.timesteps(4), [99, 74, 49, 24]);
        assert_eq!(trailing.timesteps(1), [99]);
    }

    #[test]
    fn an_early_end_is_the_newest_estimate() {
        let schedule = schedule(Kind::Ddim, Prediction::Epsilon);
        let mut sampler = Sampler::new(schedule, Matrix::of_row(&[1.0, -2.0]), 10);
        assert!(!sampler.finish(), "nothing is known before the first step");
        assert!(sampler.set_steps(20) && sampler.steps() == 20);
        assert!(!sampler.set_steps(T + 1), "there are not so many");
        for _ in 0..3 {
            let output = perfect(&sampler, Prediction::Epsilon);
            sampler.step(&output, || unreachable!("DDIM adds none")).expect("it fits");
        }
        assert!(!sampler.set_steps(9), "too late");
        assert!(sampler.finish() && sampler.is_done());
        assert!(arrived(sampler.sample(), 1e-4));
    }

    #[test]
    fn planned_rows_come_out_as_planned() {
        for kind in [Kind::Ddpm, Kind::Ddim] {
            let schedule = schedule(kind, Prediction::Sample);
            let column = |values| matrix(values, (3, 1));
            let plan = Inpainting::new(column(&[0.8, 0.8, 0.0]), &[1.0, 0.5, 0.0]);
            let sampler = Sampler::new(schedule, column(&[1.0, 0.3, -1.0]), 10);
            let mut sampler = sampler.inpainting(plan.expect("it fits")).expect("it fits");
            while !sampler.is_done() {
                let output = perfect(&sampler, Prediction::Sample);
                let noise = still(sampler.sample());
                sampler.step(&output, noise).expect("the shapes are equal");
            }
            for (x, expected) in sampler.sample().values().iter().zip([0.8, 0.525, 0.25]) {
                assert!((x - expected).abs() < 1e-5, "{kind:?}: {x} is not {expected}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let schedule = schedule(Kind::Ddpm, Prediction::Epsilon);
        let row = || Matrix::of_row(&[0.5, 0.5]);
        assert!(Inpainting::new(row(), &[1.0, 1.0]).is_err());
        let warm = Sampler::warm(schedule.clone(), &[0.5], row(), 4, 0.5);
        assert!(warm.is_err(), "a shorter guess");
        let mut sampler = Sampler::new(schedule, row(), 10);
        let plan = Inpainting::new(matrix(&[0.5, 0.5], (2, 1)), &[1.0, 1.0]).expect("it fits");
        assert!(sampler.clone().inpainting(plan).is_err());
        assert!(sampler.step(&matrix(&[0.0; 2], (2, 1)), || Ok(row())).is_err());
        assert!(sampler.step(&row(), || Ok(Matrix::of_row(&[0.5]))).is_err());
        assert_eq!((sampler.done(), sampler.sample().values()), (0, [0.5, 0.5].as_slice()));
    }

    #[test]
    fn a_perfect_network_takes_any_warm_start_to_the_same_actions() {
        // The fixed point of real-time iteration (arXiv 2508.05396), also with noise that is added on the way.
        for (kind, time, steps) in [
            (Kind::Ddpm, 0.04, 3),
            (Kind::Ddpm, 0.25, 25),
            (Kind::Ddim, 0.04, 3),
            (Kind::Ddim, 0.3, 5),
        ] {
            for guess in [[0.25, 0.25], [1.0, -1.0], [-0.9, 0.4]] {
                let schedule = schedule(kind, Prediction::Epsilon).clipped(1.0);
                let noise = Matrix::of_row(&[0.7, -1.3]);
                let sampler = Sampler::warm(schedule, &guess, noise, steps, time);
                let mut sampler = sampler.expect("it fits");
                assert_eq!(sampler.steps(), steps);
                while !sampler.is_done() {
                    let output = perfect(&sampler, Prediction::Epsilon);
                    let noise = || Ok(Matrix::of_row(&[0.8, -0.6]));
                    sampler.step(&output, noise).expect("the shapes are equal");
                }
                let x = sampler.sample();
                assert!(arrived(x, 2e-3), "{kind:?} {time} {guess:?}: {x:?}");
            }
        }
    }

    #[test]
    fn a_warm_start_at_all_of_the_noise_is_an_ordinary_start() {
        let schedule = schedule(Kind::Ddim, Prediction::Epsilon);
        let noise = Matrix::of_row(&[1.5, -0.5]);
        let mut plain = Sampler::new(schedule.clone(), noise.clone(), T);
        let warm = Sampler::warm(schedule, &[0.3, 0.9], noise, T, 1.0);
        let mut warm = warm.expect("it fits");
        while !plain.is_done() {
            assert_eq!(plain.timestep(), warm.timestep());
            for sampler in [&mut plain, &mut warm] {
                // Some network that is not perfect.
                let output = sampler.sample().clone().scaled(0.4);
                sampler.step(&output, || unreachable!("DDIM adds none")).expect("it fits");
            }
        }
        assert!(warm.is_done());
        let (a, b) = (plain.sample().values(), warm.sample().values());
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3 * a.abs().max(1.0)),
            "{a:?} {b:?}"
        );
    }

    #[test]
    fn a_warm_start_is_noised_to_its_first_step() {
        let schedule = schedule(Kind::Ddim, Prediction::Sample);
        let zero = || Matrix::zeros(1, 1);
        let sampler = Sampler::warm(schedule.clone(), &[0.5], zero(), 4, 0.4).expect("it fits");
        assert_eq!(sampler.timesteps, [30, 20, 10, 0]);
        let expected = 0.5 * schedule.alphas()[30].sqrt();
        assert!((sampler.sample().values()[0] - expected).abs() < 1e-6);
        let few = Sampler::warm(schedule, &[0.5], zero(), 10, 0.01).expect("it fits");
        assert_eq!(few.timesteps, [0], "there are no more steps than training steps");
    }
}
