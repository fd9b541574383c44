//! Real-time iteration: a chunk begins at the one before it, shifted, and is denoised for the rest of the way only.
//!
//! Source: RTI-DP (arXiv 2508.05396), which takes the guess for a sample of low noise level by hand-chosen steps. Here
//! the level is measured: it is the one whose noise is as large as the guess is wrong, and the guess is noised to it, so
//! that flow-matching heads know what they are given, too.

mod trust;

#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::diffusion::DiffusionConfig;
use crate::processors::Boundary;
use sinew_runtime::{
    ActionChunk, ActionKind, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec,
    Prefix, PrefixUse, Progress, Stamp, Unused,
};

use trust::Trust;
pub use trust::{IterateConfig, NoiseLaw};

/// Name of this cache in reports.
const WARM_START: &str = "warm_start";

/// One dimension of the actions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Unit {
    /// Physical value that the network has as 0.
    pub middle: f64,
    /// Physical size of 1 of the network.
    pub size: f64,
}

/// An arm no farther than this from its plan (the network's units) has not been moved.
const LEAST_OFF: f64 = 0.05;
/// A chunk that was made, and what it was made of.
struct Made {
    chunk: ActionChunk,
    instruction: String,
    proprioception: Vec<f64>,
}

impl Made {
    /// Rows of this chunk at the instants of one of the observation at `now`; how many of them lie within it. `None` when
    /// less than half of them do. Past its end its last row goes on.
    fn shifted(&self, now: Stamp, kinds: &[ActionKind]) -> Option<(Vec<f64>, usize)> {
        let (dim, horizon) = (self.chunk.dim(), self.chunk.horizon());
        let shift = now.seconds_from(self.chunk.instant) / self.chunk.dt.as_secs_f64();
        if !(0.0..=horizon as f64 / 2.0).contains(&shift) {
            return None;
        }
        let last = horizon - 1;
        let mut rows = Vec::with_capacity(horizon * dim);
        for k in 0..horizon {
            let at = (k as f64 + shift).min(last as f64);
            let (before, part) = (at.floor() as usize, at.fract());
            let after = (before + 1).min(last);
            let nearest = if part < 0.5 { before } else { after };
            let (before, after) = (self.chunk.action(before)?, self.chunk.action(after)?);
            let nearest = self.chunk.action(nearest)?;
            rows.extend((0..dim).map(|d| match kinds[d].blends() {
                true => before[d] + part * (after[d] - before[d]),
                false => nearest[d],
            }));
        }
        let inside = horizon - shift.ceil() as usize;
        Some((rows, inside))
    }
}

struct Run {
    instruction: String,
    proprioception: Vec<f64>,
    /// The guess, and how many of its rows the chunk before has.
    guess: Option<(Vec<f64>, usize)>,
    started: Result<f64, Unused>,
    /// Steps that a chunk from noise would have.
    steps: usize,
    /// The request brought a plan of its own.
    planned: bool,
}

/// A policy that starts from its own last chunk.
///
/// It starts from noise (a full denoising) at first, after a change of the instruction, when the last chunk is too old,
/// when the arm is not where that chunk had it by more than the usual lag and the guess's error (a person, or the guard,
/// has moved it elsewhere), and now and then to measure how wrong the guess is. A request that brings a plan of its own is
/// passed on unchanged.
pub struct Iterate {
    policy: Box<dyn Policy>,
    units: Vec<Unit>,
    kinds: Vec<ActionKind>,
    trust: Trust,
    last: Option<Made>,
    /// Usual distance of the arm from the plan (RMS, the network's units).
    lag: Option<f64>,
    run: Option<Run>,
}

impl Iterate {
    /// `policy`, whose actions are of `units` and `kinds`.
    ///
    /// # Errors
    /// [`PolicyError::Unsupported`] when the head cannot start from a guess, or `units` and `kinds` are not the actions'.
    pub fn new(
        policy: Box<dyn Policy>,
        units: Vec<Unit>,
        kinds: Vec<ActionKind>,
        law: NoiseLaw,
        config: IterateConfig,
    ) -> Result<Self, PolicyError> {
        let spec = policy.spec();
        if !spec.prefix.warm_start {
            return Err(PolicyError::Unsupported("a start from the chunk before"));
        }
        if units.len() != spec.action_dim || kinds.len() != spec.action_dim {
            return Err(PolicyError::Unsupported("actions of another width"));
        }
        let trust = Trust::new(config, law);
        Ok(Self { policy, units, kinds, trust, last: None, lag: None, run: None })
    }

    /// Root mean square of `a − b` in the network's units, over as many values as both have.
    fn distance(&self, a: &[f64], b: &[f64]) -> f64 {
        let units = self.units.iter().cycle();
        let squares = a.iter().zip(b).zip(units).map(|((a, b), u)| ((a - b) / u.size).powi(2));
        let count = a.len().min(b.len()).max(1);
        (squares.filter(|s| s.is_finite()).sum::<f64>() / count as f64).sqrt()
    }

    /// The guess for `observation`, or why there is none.
    fn guess(&mut self, observation: &Observation) -> Result<(Vec<f64>, usize), Unused> {
        let last = self.last.as_ref().ok_or(Unused::Fresh)?;
        if last.instruction != observation.instruction {
            return Err(Unused::Changed);
        }
        let shifted = last.shifted(observation.instant, &self.kinds).ok_or(Unused::Fresh)?;
        let (mut rows, inside) = shifted;
        // Displacements count from this observation's position.
        for row in rows.chunks_exact_mut(self.kinds.len()) {
            for (d, value) in row.iter_mut().enumerate() {
                let (then, now) = (last.proprioception.get(d), observation.proprioception.get(d));
                if let (ActionKind::Delta, Some(then), Some(now)) = (self.kinds[d], then, now) {
                    *value -= now - then;
                }
            }
        }
        // Where the plan has the arm now is its first row, nearly; displacements say it by themselves.
        let comparable = self.kinds.iter().all(|k| *k != ActionKind::Delta)
            && observation.proprioception.len() == self.kinds.len();
        if comparable {
            let off = self.distance(&rows[..self.kinds.len()], &observation.proprioception);
            let usual = self.lag.unwrap_or(off);
            let most = usual + self.trust.error().unwrap_or(f64::INFINITY).max(LEAST_OFF);
            if off > most.max(2.0 * usual) {
                return Err(Unused::Changed);
            }
            self.lag = Some(usual + 0.1 * (off - usual));
        }
        Ok((rows, inside))
    }

    /// The guess as the head is given it.
    fn shrunk(&self, mut rows: Vec<f64>) -> Vec<f64> {
        for row in rows.chunks_exact_mut(self.kinds.len()) {
            for ((value, kind), unit) in row.iter_mut().zip(&self.kinds).zip(&self.units) {
                if matches!(kind, ActionKind::Switch | ActionKind::Gripper) {
                    let factor = self.trust.config.discrete_factor;
                    *value = unit.middle + (*value - unit.middle) / factor;
                }
            }
        }
        rows
    }
}

impl Policy for Iterate {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let mut request = request.clone();
        let steps = request.denoise_steps.unwrap_or(self.policy.spec().denoise_steps);
        let mut run = Run {
            instruction: observation.instruction.clone(),
            proprioception: observation.proprioception.clone(),
            guess: None,
            started: Err(Unused::Fresh),
            steps,
            planned: request.prefix.is_some(),
        };
        if !run.planned {
            match self.guess(observation) {
                Ok(guess) => {
                    run.started = match request.exact {
                        true => Err(Unused::Exact),
                        false => self.trust.start(),
                    };
                    run.guess = Some(guess);
                }
                Err(why) => run.started = Err(why),
            }
        }
        if let (Ok(time), Some((rows, inside))) = (run.started, &run.guess) {
            let dim = self.kinds.len();
            request.denoise_steps = Some(part(steps, time));
            request.prefix = Some(Prefix {
                actions: self.shrunk(rows.clone()),
                dim,
                frozen: 0,
                horizon: *inside,
                usage: PrefixUse::WarmStart { time },
            });
        }
        self.run = Some(run);
        self.policy.begin(observation, &request)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let mut chunk = self.policy.take_chunk()?;
        let Some(run) = self.run.take() else { return Ok(chunk) };
        if !run.planned {
            let dim = self.kinds.len();
            let off = run.guess.as_ref().map(|(rows, inside)| {
                self.distance(&rows[..inside * dim], &chunk.values()[..inside * dim])
            });
            match (run.started, off) {
                (Ok(_), _) => self.trust.warm += 1,
                (Err(_), Some(off)) => self.trust.measured(off),
                (Err(_), None) => {}
            }
            let warm = run.started.is_ok();
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let done = chunk.report.denoise_steps.max(1);
            let denoising = chunk.report.stages.iter().filter(|s| s.stage == "denoise");
            let denoising: Duration = denoising.map(|s| s.time).sum();
            let left_out = count(run.steps.saturating_sub(done));
            let used = CacheUse {
                lookups: count(run.steps),
                hits: if warm { left_out } else { 0 },
                error: None,
                saved: if warm { denoising / count(done) * left_out } else { Duration::ZERO },
                bound: self.trust.error(),
                unused: run.started.err(),
                ..CacheUse::default()
            };
            chunk.report.caches.retain(|(name, _)| *name != WARM_START);
            chunk.report.caches.push((WARM_START, used));
        }
        self.last = Some(Made {
            chunk: chunk.clone(),
            instruction: run.instruction,
            proprioception: run.proprioception,
        });
        Ok(chunk)
    }

    fn history_period(&self) -> Option<Duration> {
        self.policy.history_period()
    }

    fn remember(&mut self, observation: &Observation) -> Result<(), PolicyError> {
        self.policy.remember(observation)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        match self.run.as_ref().map(|run| run.started) {
            Some(Ok(time)) => self.policy.set_denoise_steps(part(steps, time)),
            _ => self.policy.set_denoise_steps(steps),
        }
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        self.policy.finish_early()
    }

    fn forget(&mut self) {
        (self.last, self.lag, self.run) = (None, None, None);
        self.trust = Trust::new(self.trust.config.clone(), self.trust.law.clone());
        self.policy.forget();
    }
}

/// The units of the actions of `checkpoint`.
///
/// # Errors
/// [`ModelError`] when they cannot be read.
pub(crate) fn units(checkpoint: &Checkpoint) -> Result<Vec<Unit>, ModelError> {
    let boundary = Boundary::new(checkpoint, 0)?;
    let physical = |value: f32| {
        let row = vec![value; boundary.action_dim()];
        boundary.actions([row.as_slice()]).map_err(|e| {
            let reason = format!("gives actions of no known size: {e}");
            ModelError::config(&checkpoint.config_path(), "output_features", reason)
        })
    };
    let (zero, one) = (physical(0.0)?, physical(1.0)?);
    let pairs = zero.iter().zip(&one);
    Ok(pairs
        .map(|(zero, one)| Unit { middle: *zero, size: (one - zero).abs().max(f64::MIN_POSITIVE) })
        .collect())
}

/// `policy` of `checkpoint` starting from its last chunk; its actions are of `kinds`.
///
/// # Errors
/// [`ModelError`] when its head cannot, or its actions cannot be read.
pub(crate) fn iterate(
    policy: Box<dyn Policy>,
    checkpoint: &Checkpoint,
    kinds: Vec<ActionKind>,
) -> Result<Box<dyn Policy>, ModelError> {
    let units = units(checkpoint)?;
    let law = match checkpoint.family.name {
        "diffusion" => {
            let schedule = DiffusionConfig::of(checkpoint)?.schedule();
            let alphas = schedule.alphas().iter().map(|a| f64::from(*a));
            NoiseLaw::Diffusion(alphas.map(|a| ((1.0 - a) / a).sqrt()).collect())
        }
        _ => NoiseLaw::Flow,
    };
    let made = Iterate::new(policy, units, kinds, law, IterateConfig::default());
    Ok(Box::new(made.map_err(|e| {
        let reason = format!("names a policy without this cache: {e}");
        ModelError::config(&checkpoint.config_path(), "type", reason)
    })?))
}

/// The steps from flow time `time` on, of `steps` for the whole way.
fn part(steps: usize, time: f64) -> usize {
    ((steps as f64 * time).ceil() as usize).max(1)
}
