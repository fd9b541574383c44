//! One sampling, from noise to actions.

use candle_core::{Device, Result, Tensor};

use super::schedule::Schedule;

/// A plan that the clean sample is drawn to at every step.
///
/// Inpainting: where the weight is 1 the estimate is replaced by the plan, so that the rest is denoised in its
/// company and the result is the plan there; between 0 and 1 it moves that part of the way.
#[derive(Debug, Clone)]
pub struct Inpainting {
    /// `[H, A]`, zero where the weight is.
    target: Tensor,
    /// `[H, 1]`
    weights: Tensor,
}

impl Inpainting {
    /// Draws to `target` (`[H, A]` row by row) with a weight from 0 to 1 for each row.
    ///
    /// # Errors
    /// When the numbers of values do not fit `shape`.
    pub fn new(target: Vec<f32>, weights: &[f64], shape: (usize, usize)) -> Result<Self> {
        let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
        Ok(Self {
            target: Tensor::from_vec(target, shape, &Device::Cpu)?,
            weights: Tensor::from_vec(weights, (shape.0, 1), &Device::Cpu)?,
        })
    }

    fn draw(&self, clean: &Tensor) -> Result<Tensor> {
        clean + (&self.target - clean)?.broadcast_mul(&self.weights)?
    }
}

/// One sampling, a step at a time.
///
/// The caller asks for [`Self::sample`] and [`Self::timestep`], computes the network's output, and gives it to
/// [`Self::step`].
#[derive(Debug, Clone)]
pub struct Sampler {
    schedule: Schedule,
    x: Tensor,
    /// Training steps below this one are left to do.
    end: usize,
    timesteps: Vec<usize>,
    done: usize,
    inpainting: Option<Inpainting>,
    /// The newest estimate of the clean sample.
    clean: Option<Tensor>,
}

impl Sampler {
    /// Starts at `noise` (`[H, A]` row by row) with `steps` steps.
    ///
    /// # Errors
    /// When `noise` has another number of values.
    pub fn new(
        schedule: Schedule,
        noise: Vec<f32>,
        shape: (usize, usize),
        steps: usize,
    ) -> Result<Self> {
        let x = Tensor::from_vec(noise, shape, &Device::Cpu)?;
        let end = schedule.training_steps();
        let timesteps = schedule.timesteps(steps);
        Ok(Self { schedule, x, end, timesteps, done: 0, inpainting: None, clean: None })
    }

    /// Starts at `guess` (`[H, A]`), noised to the part `time` (above 0, at most 1) of the training steps.
    ///
    /// # Errors
    /// When `noise` or `guess` has another number of values.
    pub fn warm(
        schedule: Schedule,
        guess: &[f32],
        noise: Vec<f32>,
        shape: (usize, usize),
        steps: usize,
        time: f64,
    ) -> Result<Self> {
        let all = schedule.training_steps();
        let end = ((time * all as f64).round() as usize).clamp(1, all);
        let timesteps = schedule.timesteps_below(end, steps);
        let alpha = schedule.alpha(timesteps.first().copied());
        let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let mixed = guess
            .iter()
            .zip(&noise)
            .map(|(a, n)| (f64::from(*a) * signal + f64::from(*n) * spread) as f32);
        let x = Tensor::from_vec(mixed.collect::<Vec<_>>(), shape, &Device::Cpu)?;
        Ok(Self { schedule, x, end, timesteps, done: 0, inpainting: None, clean: None })
    }

    /// The same, drawn to a plan.
    #[must_use]
    pub fn inpainting(self, plan: Inpainting) -> Self {
        Self { inpainting: Some(plan), ..self }
    }

    /// The sample as it is now, `[H, A]`.
    pub fn sample(&self) -> &Tensor {
        &self.x
    }

    /// The training step that the network is asked about; 0 when all are done.
    pub fn timestep(&self) -> usize {
        self.timesteps.get(self.done).copied().unwrap_or(0)
    }

    /// Moves on by the network's `output` for the current sample. `noise` is asked for a standard-normal tensor of the
    /// sample's shape where one is added (DDPM, every step but those at training step 0).
    ///
    /// # Errors
    /// When `output` or the noise has another shape.
    pub fn step(&mut self, output: &Tensor, noise: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let t = self.timestep();
        let previous = self.timesteps.get(self.done + 1).copied();
        let draw = |clean| match &self.inpainting {
            Some(plan) => plan.draw(&clean),
            None => Ok(clean),
        };
        let (x, clean) = self.schedule.step(&self.x, output, (t, previous), draw, noise)?;
        self.x = x;
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

    fn vector(x: &Tensor) -> Vec<f32> {
        x.flatten_all().and_then(|t| t.to_vec1()).expect("a CPU tensor of f32")
    }

    /// What a network that knows the clean sample to be 0.25 everywhere says of `sampler`'s sample.
    fn perfect(sampler: &Sampler, prediction: Prediction) -> Tensor {
        let x = sampler.sample();
        let alpha = f64::from(sampler.schedule.alphas()[sampler.timestep()]);
        let clean = (x.ones_like().expect("f32") * 0.25).expect("f32");
        let noise = ((x - (&clean * alpha.sqrt()).expect("f32")).expect("f32")
            / (1.0 - alpha).sqrt())
        .expect("f32");
        match prediction {
            Prediction::Epsilon => noise,
            Prediction::Sample => clean,
            Prediction::VPrediction => ((noise * alpha.sqrt()).expect("f32")
                - (clean * (1.0 - alpha).sqrt()).expect("f32"))
            .expect("f32"),
        }
    }

    fn still(x: &Tensor) -> impl FnOnce() -> Result<Tensor> + use<> {
        let x = x.zeros_like();
        move || x
    }

    #[test]
    fn a_perfect_network_is_followed_whatever_it_predicts() {
        for kind in [Kind::Ddpm, Kind::Ddim] {
            for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::VPrediction] {
                for steps in [1, 7, T] {
                    let schedule = schedule(kind, prediction).clipped(1.0);
                    let mut sampler =
                        Sampler::new(schedule, vec![1.5, -0.5], (1, 2), steps).expect("it fits");
                    while !sampler.is_done() {
                        let output = perfect(&sampler, prediction);
                        let noise = still(sampler.sample());
                        sampler.step(&output, noise).expect("the shapes are equal");
                    }
                    let x = vector(sampler.sample());
                    let off = x.iter().map(|v| (v - 0.25).abs()).fold(0.0, f32::max);
                    assert!(off < 2e-3, "{kind:?} {prediction:?} {steps}: {x:?}");
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
        let mut sampler = Sampler::new(schedule, vec![1.0, -2.0], (1, 2), 10).expect("it fits");
        assert!(!sampler.finish(), "nothing is known before the first step");
        assert!(sampler.set_steps(20) && sampler.steps() == 20);
        assert!(!sampler.set_steps(T + 1), "there are not so many");
        for _ in 0..3 {
            let output = perfect(&sampler, Prediction::Epsilon);
            sampler.step(&output, || unreachable!("DDIM adds none")).expect("it fits");
        }
        assert!(!sampler.set_steps(9), "too late");
        assert!(sampler.finish() && sampler.is_done());
        assert!(vector(sampler.sample()).iter().all(|v| (v - 0.25).abs() < 1e-4));
    }

    #[test]
    fn planned_rows_come_out_as_planned() {
        for kind in [Kind::Ddpm, Kind::Ddim] {
            let schedule = schedule(kind, Prediction::Sample);
            let plan = Inpainting::new(vec![0.8, 0.8, 0.0], &[1.0, 0.5, 0.0], (3, 1));
            let mut sampler = Sampler::new(schedule, vec![1.0, 0.3, -1.0], (3, 1), 10)
                .expect("it fits")
                .inpainting(plan.expect("it fits"));
            while !sampler.is_done() {
                let output = perfect(&sampler, Prediction::Sample);
                let noise = still(sampler.sample());
                sampler.step(&output, noise).expect("the shapes are equal");
            }
            let x = vector(sampler.sample());
            for (x, expected) in x.iter().zip([0.8, 0.525, 0.25]) {
                assert!((x - expected).abs() < 1e-5, "{kind:?}: {x} is not {expected}");
            }
        }
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
                let sampler = Sampler::warm(schedule, &guess, vec![0.7, -1.3], (1, 2), steps, time);
                let mut sampler = sampler.expect("it fits");
                assert_eq!(sampler.steps(), steps);
                while !sampler.is_done() {
                    let output = perfect(&sampler, Prediction::Epsilon);
                    let noise = || Tensor::new(&[[0.8f32, -0.6]], &Device::Cpu);
                    sampler.step(&output, noise).expect("the shapes are equal");
                }
                let x = vector(sampler.sample());
                let off = x.iter().map(|v| (v - 0.25).abs()).fold(0.0, f32::max);
                assert!(off < 2e-3, "{kind:?} {time} {guess:?}: {x:?}");
            }
        }
    }

    #[test]
    fn a_warm_start_at_all_of_the_noise_is_an_ordinary_start() {
        let schedule = schedule(Kind::Ddim, Prediction::Epsilon);
        let noise = vec![1.5, -0.5];
        let mut plain = Sampler::new(schedule.clone(), noise.clone(), (1, 2), T).expect("it fits");
        let warm = Sampler::warm(schedule, &[0.3, 0.9], noise, (1, 2), T, 1.0);
        let mut warm = warm.expect("it fits");
        while !plain.is_done() {
            assert_eq!(plain.timestep(), warm.timestep());
            for sampler in [&mut plain, &mut warm] {
                // Some network that is not perfect.
                let output = (sampler.sample() * 0.4).expect("f32");
                sampler.step(&output, || unreachable!("DDIM adds none")).expect("it fits");
            }
        }
        assert!(warm.is_done());
        let (a, b) = (vector(plain.sample()), vector(warm.sample()));
        assert!(
            a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3 * a.abs().max(1.0)),
            "{a:?} {b:?}"
        );
    }

    #[test]
    fn a_warm_start_is_noised_to_its_first_step() {
        let schedule = schedule(Kind::Ddim, Prediction::Sample);
        let sampler =
            Sampler::warm(schedule.clone(), &[0.5], vec![0.0], (1, 1), 4, 0.4).expect("it fits");
        assert_eq!(sampler.timesteps, [30, 20, 10, 0]);
        let expected = 0.5 * schedule.alphas()[30].sqrt();
        assert!((vector(sampler.sample())[0] - expected).abs() < 1e-6);
        let few = Sampler::warm(schedule, &[0.5], vec![0.0], (1, 1), 10, 0.01).expect("it fits");
        assert_eq!(few.timesteps, [0], "there are no more steps than training steps");
    }
}
