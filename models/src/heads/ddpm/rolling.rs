//! Rolling buffers: every action at a noise level of its own, the next ones nearly clean, later ones nearly noise.
//!
//! Source: Streaming Diffusion Policy (arXiv 2406.04806). Each call denoises the whole buffer just until the next actions
//! are clean, instead of making them from noise. Its network must have been trained with a timestep for each action.

use candle_core::{Result, bail};

use super::schedule::Schedule;
use crate::kernels::Matrix;

/// How noisy each row of a buffer is before a call.
///
/// Levels count the denoise steps that are left, so 0 is clean; a level `l` is the training step number `l - 1` of those
/// that are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Rows `H`.
    pub horizon: usize,
    /// Rows that lie before the current action.
    pub past: usize,
    /// Actions that a call gives.
    pub taken: usize,
    /// Denoise steps of a row from noise to clean.
    pub steps: usize,
}

impl Profile {
    /// Whole parts of the rows ahead that are as long as what a call gives.
    pub fn parts(&self) -> usize {
        (self.horizon.saturating_sub(self.past)) / self.taken.max(1)
    }

    /// Rows after the last whole part.
    pub fn rest(&self) -> usize {
        (self.horizon.saturating_sub(self.past)) % self.taken.max(1)
    }

    /// Level of row `row`.
    pub fn level(&self, row: usize) -> usize {
        let parts = self.parts().max(1);
        let part = (row.saturating_sub(self.past) / self.taken.max(1)).min(parts - 1);
        self.steps * (part + 1) / parts
    }

    /// Denoise steps of a call, at most.
    pub fn steps_each(&self) -> usize {
        self.steps.div_ceil(self.parts().max(1))
    }
}

/// A buffer of actions, each at a level of its own.
#[derive(Debug, Clone)]
pub struct Buffer {
    schedule: Schedule,
    profile: Profile,
    /// Training steps that are taken, rising.
    taken: Vec<usize>,
    x: Matrix,
    levels: Vec<usize>,
    /// The training step of each row's level.
    timesteps: Vec<usize>,
    done: usize,
}

impl Buffer {
    /// A buffer whose rows are those of `clean` (`[H, A]`), which were just denoised.
    pub fn clean(schedule: Schedule, profile: Profile, clean: Matrix) -> Self {
        let mut taken = schedule.timesteps(profile.steps);
        taken.reverse();
        let (levels, timesteps) = (vec![0; clean.rows()], vec![0; clean.rows()]);
        let mut new = Self { schedule, profile, taken, x: clean, levels, timesteps, done: 0 };
        new.ask();
        new
    }

    /// The actions, `[H, A]`.
    pub fn sample(&self) -> &Matrix {
        &self.x
    }

    /// Level of each row.
    pub fn levels(&self) -> &[usize] {
        &self.levels
    }

    /// What it was made for.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// Time moves on by `rows` actions, at most those that a call gives: what is past goes, noise comes, and what is cleaner
    /// than the profile has it there is noised up to that, the rows before the current action too. `noise` gives as many
    /// standard-normal values as it is asked for.
    ///
    /// # Errors
    /// When the noise is of another count.
    pub fn shift(&mut self, rows: usize, mut noise: impl FnMut(usize) -> Vec<f32>) -> Result<()> {
        let (horizon, width) = self.x.dims();
        let rows = rows.min(horizon);
        let fresh = (rows + self.profile.rest()).min(horizon);
        let kept = horizon - fresh;
        let (new, added) = (noise(fresh * width), noise(horizon * width));
        if (new.len(), added.len()) != (fresh * width, horizon * width) {
            let drawn = (new.len(), added.len());
            bail!("{drawn:?} values of noise do not fit {horizon} rows of {width}");
        }
        let x = self.x.values_mut();
        x.copy_within(rows * width..(rows + kept) * width, 0);
        x[kept * width..].copy_from_slice(&new);
        self.levels.copy_within(rows..rows + kept, 0);
        self.levels[kept..].fill(self.profile.steps);
        for (row, level) in self.levels.iter_mut().enumerate() {
            let wanted = self.profile.level(row).max(*level);
            // What is left of the signal of one level at the next.
            let left = self.schedule.alpha(step_of(&self.taken, wanted))
                / self.schedule.alpha(step_of(&self.taken, *level));
            let left = if wanted == *level { 1.0 } else { left };
            let (signal, spread) = (left.sqrt() as f32, (1.0 - left).max(0.0).sqrt() as f32);
            let values = self.x.row_mut(row).iter_mut().zip(&added[row * width..]);
            values.for_each(|(x, added)| *x = *x * signal + added * spread);
            *level = wanted;
        }
        self.done = 0;
        self.ask();
        Ok(())
    }

    /// The training step of each row that the network is asked about; clean ones count as those with the least noise.
    pub fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }

    fn ask(&mut self) {
        for (asked, level) in self.timesteps.iter_mut().zip(&self.levels) {
            *asked = step_of(&self.taken, *level).unwrap_or(0);
        }
    }

    /// Every row that is not clean moves on by one level, by the network's `output` (`[H, A]`). `noise` are standard-normal
    /// values of the sample's shape, of which each row is used where one is added.
    ///
    /// # Errors
    /// When a shape differs.
    pub fn step(&mut self, output: &Matrix, noise: &Matrix) -> Result<()> {
        let shape = self.x.dims();
        if output.dims() != shape || noise.dims() != shape {
            bail!("{:?} and {:?} do not fit a sample of {shape:?}", output.dims(), noise.dims());
        }
        let mut start = 0;
        // Rows of one level next to each other are one sample.
        for rows in self.levels.chunk_by(|a, b| a == b) {
            let values = start * shape.1..(start + rows.len()) * shape.1;
            start += rows.len();
            let Some(t) = step_of(&self.taken, rows[0]) else { continue };
            let steps = (t, step_of(&self.taken, rows[0] - 1));
            let x = &mut self.x.values_mut()[values.clone()];
            let (output, noise) = (&output.values()[values.clone()], &noise.values()[values]);
            self.schedule.step(x, output, steps, noise, |_, clean| clean)?;
        }
        self.levels.iter_mut().for_each(|level| *level = level.saturating_sub(1));
        self.ask();
        self.done += 1;
        Ok(())
    }

    /// Denoise steps that are left until what is given next is clean.
    pub fn left(&self) -> usize {
        let next = self.profile.past + self.profile.taken;
        self.levels.iter().take(next).copied().max().unwrap_or(0)
    }

    /// Denoise steps since the last shift.
    pub fn done(&self) -> usize {
        self.done
    }
}

/// The training step of `level`, of those `taken`; none when it is clean.
fn step_of(taken: &[usize], level: usize) -> Option<usize> {
    level.checked_sub(1).and_then(|l| taken.get(l)).copied()
}

#[cfg(test)]
mod tests {
    use super::super::{BetaSchedule, Kind, Prediction, Sampler};
    use super::*;
    use crate::heads::flow::gaussian_noise;

    const T: usize = 100;

    fn schedule() -> Schedule {
        Schedule::new(
            Kind::Ddpm,
            BetaSchedule::SquaredcosCapV2,
            T,
            (1e-4, 0.02),
            Prediction::Epsilon,
        )
        .clipped(1.0)
    }

    fn matrix(values: &[f32], rows: usize) -> Matrix {
        Matrix::new(values, (rows, values.len() / rows)).expect("it fits")
    }

    #[test]
    fn levels_are_those_of_the_published_configuration() {
        let profile = Profile { horizon: 20, past: 1, taken: 8, steps: T };
        assert_eq!((profile.parts(), profile.rest(), profile.steps_each()), (2, 3, 50));
        let levels: Vec<usize> = (0..20).map(|row| profile.level(row)).collect();
        assert_eq!((&levels[..9], &levels[9..]), (&[50; 9][..], &[100; 11][..]));
    }

    /// Calls of a buffer of `profile`, started at clean zeros: steps of each call, and how often each emitted row was
    /// denoised since it came in as noise.
    fn calls(profile: Profile, count: usize, shift: usize) -> (Vec<usize>, Vec<Vec<usize>>) {
        let zeros = Matrix::zeros(profile.horizon, 1);
        let mut buffer = Buffer::clean(schedule(), profile, zeros.clone());
        let mut ages = vec![0usize; profile.horizon];
        let (mut steps, mut emitted) = (Vec::new(), Vec::new());
        for call in 0..count {
            buffer.shift(shift, |n| gaussian_noise(call as u64, n)).expect("it fits");
            ages.drain(..shift);
            ages.truncate(profile.horizon - shift - profile.rest());
            ages.resize(profile.horizon, 0);
            let mut taken = 0;
            while buffer.left() > 0 {
                buffer.step(&zeros, &zeros).expect("it fits");
                ages.iter_mut().for_each(|age| *age += 1);
                taken += 1;
            }
            assert_eq!(taken, buffer.done());
            steps.push(taken);
            emitted.push(ages[profile.past..profile.past + profile.taken].to_vec());
        }
        (steps, emitted)
    }

    #[test]
    fn every_emitted_action_has_been_denoised_in_all_steps() {
        for (taken, steps) in [(8, T), (6, T), (4, T), (19, T), (6, 10)] {
            let profile = Profile { horizon: 20, past: 1, taken, steps };
            let parts = profile.parts();
            let (each, emitted) = calls(profile, 3 * parts + 1, taken);
            assert!(each.iter().all(|n| *n <= profile.steps_each() && n + 1 >= steps / parts));
            // What was there at the start is gone after as many calls as there are parts.
            for rows in &emitted[parts..] {
                assert!(rows.iter().all(|age| *age == steps), "{taken}: {rows:?}");
            }
        }
    }

    #[test]
    fn a_shorter_shift_noises_up_what_would_be_too_clean() {
        let profile = Profile { horizon: 20, past: 1, taken: 8, steps: T };
        let (each, _) = calls(profile, 9, 3);
        assert_eq!(each, [50; 9], "every call meets the profile");
        let mut buffer = Buffer::clean(schedule(), profile, matrix(&[0.5; 20], 20));
        buffer.shift(0, |n| vec![0.0; n]).expect("it fits");
        let alpha = |t: usize| schedule().alphas()[t].sqrt();
        let x = buffer.sample().values();
        assert!((x[0] - 0.5 * alpha(49)).abs() < 1e-6 && (x[16] - 0.5 * alpha(99)).abs() < 1e-6);
        assert_eq!(x[17..], [0.0; 3], "what is after the last whole part comes in as noise");
    }

    #[test]
    fn with_one_part_it_is_ordinary_denoising() {
        // A network that does not care for the level.
        let network = |x: &Matrix| x.clone().scaled(0.3);
        let profile = Profile { horizon: 6, past: 0, taken: 6, steps: 25 };
        let mut buffer = Buffer::clean(schedule(), profile, Matrix::zeros(6, 2));
        let noise = gaussian_noise(1, 12);
        let mut given = Some(noise.clone());
        buffer.shift(6, |n| given.take().unwrap_or_else(|| vec![0.0; n])).expect("it fits");
        let mut sampler = Sampler::new(schedule(), matrix(&noise, 6), 25);
        let mut seed = 5;
        while !sampler.is_done() {
            assert_eq!(buffer.timesteps(), [sampler.timestep(); 6]);
            let added = matrix(&gaussian_noise(seed, 12), 6);
            buffer.step(&network(buffer.sample()), &added).expect("it fits");
            sampler.step(&network(sampler.sample()), || Ok(added)).expect("it fits");
            seed += 1;
        }
        assert_eq!(buffer.left(), 0);
        assert_eq!(buffer.sample().values(), sampler.sample().values());
    }
}
