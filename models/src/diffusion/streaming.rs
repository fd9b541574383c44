//! The rolling buffer of a Diffusion Policy from chunk to chunk.

use candle_core::Result;
use sinew_runtime::{CacheUse, Observation, Stamp, Unused};

use super::DiffusionConfig;
use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::heads::ddpm::{Buffer, Profile, Sampler, Schedule};
use crate::kernels::Matrix;

/// Name of the rolling buffer in reports.
pub(super) const ROLLING: &str = "rolling_buffer";

/// How the sample of one chunk is made.
pub(super) enum Sampling {
    /// From noise, all actions alike.
    Whole(Sampler),
    /// What is left of the buffer of the chunk before.
    Rolling(Buffer),
}

impl Sampling {
    /// The sample as it is now, `[H, A]`.
    pub fn sample(&self) -> &Matrix {
        match self {
            Self::Whole(sampler) => sampler.sample(),
            Self::Rolling(buffer) => buffer.sample(),
        }
    }

    /// The training steps that the network is asked about: one, or one for each action.
    pub fn timesteps(&self) -> &[usize] {
        match self {
            Self::Whole(sampler) => sampler.timesteps(),
            Self::Rolling(buffer) => buffer.timesteps(),
        }
    }

    /// Moves on by the network's `output`; `noise` gives standard-normal values of the sample's shape.
    pub fn step(&mut self, output: &Matrix, noise: impl FnOnce() -> Result<Matrix>) -> Result<()> {
        match self {
            Self::Whole(sampler) => sampler.step(output, noise),
            Self::Rolling(buffer) => buffer.step(output, &noise()?),
        }
    }

    /// Denoise steps done.
    pub fn done(&self) -> usize {
        match self {
            Self::Whole(sampler) => sampler.done(),
            Self::Rolling(buffer) => buffer.done(),
        }
    }

    /// Denoise steps in all.
    pub fn steps(&self) -> usize {
        match self {
            Self::Whole(sampler) => sampler.steps(),
            Self::Rolling(buffer) => buffer.done() + buffer.left(),
        }
    }

    /// True after the last step.
    pub fn is_done(&self) -> bool {
        self.done() >= self.steps()
    }
}

/// A buffer, and what it was made of.
struct Kept {
    buffer: Buffer,
    /// Instant of the current action's row, and the instruction.
    instant: Stamp,
    instruction: String,
}

/// The rolling buffer of a policy.
///
/// It is cleared when the instruction changes, when more time has passed than the actions that a chunk gives, or less than
/// none, and when the policy forgets; the chunk after that is denoised from noise as a whole, and becomes the buffer
/// ("denoise" initialisation: what is played first is as good as any chunk).
pub(super) struct Streaming {
    profile: Profile,
    dt: f64,
    kept: Option<Kept>,
}

impl Streaming {
    /// The buffer of `checkpoint` of `config`, whose chunks take `steps` denoise steps from noise, `dt` seconds between two
    /// actions.
    ///
    /// # Errors
    /// [`ModelError`] for a network with one timestep for all actions, or too few steps.
    pub fn new(
        checkpoint: &Checkpoint,
        config: &DiffusionConfig,
        steps: usize,
        dt: f64,
    ) -> std::result::Result<Self, ModelError> {
        if !config.per_element_timesteps {
            let (path, head) = (checkpoint.path.clone(), checkpoint.family.head.to_owned());
            let why = "was not trained with a timestep for each action (`per_element_timesteps`)";
            return Err(ModelError::NoCache { path, head, cache: "streaming", why });
        }
        let (horizon, past) = (config.horizon, config.n_obs_steps - 1);
        let profile = Profile { horizon, past, taken: config.n_action_steps, steps };
        if steps < profile.parts() {
            let reason = format!(
                "is {steps}, less than the {} chunks in the horizon; a rolling buffer needs a step for each",
                profile.parts()
            );
            return Err(ModelError::config(
                &checkpoint.config_path(),
                "num_inference_steps",
                reason,
            ));
        }
        Ok(Self { profile, dt, kept: None })
    }

    /// Denoise steps of a chunk while the buffer rolls.
    pub fn steps(&self) -> usize {
        self.profile.steps_each()
    }

    /// Denoise steps from noise when a rolling chunk is to take `each` of at most `most`.
    pub fn whole_steps(&self, each: usize, most: usize) -> usize {
        match each == self.steps() {
            true => self.profile.steps,
            false => (each * self.profile.parts()).min(most),
        }
    }

    /// The buffer for `observation`, when chunks take `steps` from noise; why there is none. `noise` gives as many
    /// standard-normal values as it is asked for. What is kept stays, so that an inference may be dropped.
    pub fn rolled(
        &self,
        observation: &Observation,
        steps: usize,
        noise: impl FnMut(usize) -> Vec<f32>,
    ) -> std::result::Result<Result<Buffer>, Unused> {
        let kept = self.kept.as_ref().ok_or(Unused::Fresh)?;
        if kept.instruction != observation.instruction {
            return Err(Unused::Changed);
        }
        let rows = self.rows(kept, observation.instant).ok_or(Unused::Fresh)?;
        let mut buffer = kept.buffer.clone();
        if buffer.profile().steps != steps {
            return Err(Unused::Fresh);
        }
        Ok(buffer.shift(rows, noise).map(|()| buffer))
    }

    /// Actions from the instant of `kept` to `now`; none when these are more than a chunk has, or it lies ahead.
    fn rows(&self, kept: &Kept, now: Stamp) -> Option<usize> {
        let rows = (now.seconds_from(kept.instant) / self.dt).round();
        (0.0..=self.profile.taken as f64).contains(&rows).then_some(rows as usize)
    }

    /// A chunk was made of the observation at `instant`.
    pub fn made(
        &mut self,
        sampling: &Sampling,
        schedule: &Schedule,
        (instant, instruction): (Stamp, &str),
    ) {
        let buffer = match sampling {
            Sampling::Rolling(buffer) => buffer.clone(),
            Sampling::Whole(sampler) => {
                let profile = Profile { steps: sampler.steps(), ..self.profile };
                Buffer::clean(schedule.clone(), profile, sampler.sample().clone())
            }
        };
        // The rows stay on their own grid, so that what is rounded away does not add up.
        let on = match (&self.kept, sampling) {
            (Some(kept), Sampling::Rolling(_)) => {
                self.rows(kept, instant).map(|rows| (kept.instant, rows))
            }
            _ => None,
        };
        let instant = on.map_or(instant, |(from, rows)| {
            from + std::time::Duration::from_secs_f64(rows as f64 * self.dt)
        });
        self.kept = Some(Kept { buffer, instant, instruction: instruction.to_owned() });
    }

    /// Nothing is kept any more.
    pub fn forget(&mut self) {
        self.kept = None;
    }

    /// What the buffer saved the inference with `sampling`, whose denoising took `time`; `unused`: why it was not used.
    pub fn used(
        &self,
        sampling: &Sampling,
        time: std::time::Duration,
        unused: Option<Unused>,
    ) -> CacheUse {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (steps, done) = match sampling {
            Sampling::Whole(sampler) => (sampler.steps(), sampler.steps()),
            Sampling::Rolling(buffer) => (buffer.profile().steps, buffer.done()),
        };
        let (lookups, hits) = (count(steps), count(steps.saturating_sub(done)));
        let saved = time / count(done.max(1)) * hits;
        CacheUse { lookups, hits, saved, unused, ..CacheUse::default() }
    }
}
