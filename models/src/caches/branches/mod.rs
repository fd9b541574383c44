//! A denoiser's residual branches, computed or reused.

mod kept;
mod tuning;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Result;
use sinew_runtime::{CacheUse, Opening, Unused};

use super::monitor::{Monitor, MonitorConfig, Verdict};
use super::schedule::Schedule;
use crate::kernels::{Matrix, add, sum};
use crate::random::SplitMix64;
use kept::{Kept, relative};
use tuning::Recorded;

pub use tuning::{Tuned, TunedMode, Tuning};

struct Reuse {
    schedule: Arc<Schedule>,
    monitor: Monitor,
    random: SplitMix64,
    exact: bool,
}

enum Mode {
    Off,
    Record(Recorded),
    Reuse(Box<Reuse>),
}

#[derive(Default)]
struct Used {
    lookups: u32,
    hits: u32,
    saved: f64,
    errors: Vec<f64>,
}

/// Where in a denoising the running evaluation is.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Its number, from 1 on.
    evaluation: usize,
    /// How much of the denoising lies behind it.
    position: f64,
    /// Its place, and that of the evaluation before it, in the schedule.
    step: usize,
    before: Option<usize>,
    last: bool,
}

/// The residual branches of one policy's denoiser, and its output as a whole.
///
/// A policy asks [`Self::evaluate`] for the network's output, and the network [`Self::add`] for `x + branch(x)`. With a
/// schedule what was computed before stands in for either in the evaluations that the schedule leaves out, under the
/// eyes of a [`Monitor`]. What is kept lives as long as one denoising.
pub struct Branches {
    mode: Mode,
    tuning: Option<Tuning>,
    blocks: Vec<Kept>,
    whole: Kept,
    place: Place,
    used: Used,
}

impl Branches {
    /// Nothing is ever reused.
    pub fn off() -> Self {
        Self::new(Mode::Off, None, 0)
    }

    /// What `schedule` says, under a monitor of `config`.
    pub fn scheduled(schedule: Schedule, config: MonitorConfig) -> Self {
        let blocks = schedule.blocks.len();
        Self::new(Mode::reuse(Arc::new(schedule), config), None, blocks)
    }

    /// What `tuning` says from denoising to denoising, for a denoiser of `blocks`.
    pub fn tuned(tuning: Tuning, blocks: usize) -> Self {
        Self::new(Mode::Off, Some(tuning), blocks)
    }

    fn new(mode: Mode, tuning: Option<Tuning>, blocks: usize) -> Self {
        Self {
            mode,
            tuning,
            blocks: (0..blocks).map(|_| Kept::default()).collect(),
            whole: Kept::default(),
            place: Place::default(),
            used: Used::default(),
        }
    }

    /// A denoising begins, whose comparisons are drawn by `seed`; `exact`: nothing is to be reused in it.
    pub fn begin(&mut self, seed: u64, exact: bool) {
        if let Some(tuning) = &self.tuning {
            self.mode = match &tuning.lock().mode {
                TunedMode::Off => Mode::Off,
                TunedMode::Record => Mode::Record(Recorded {
                    blocks: vec![Vec::new(); self.blocks.len()],
                    ..Recorded::default()
                }),
                TunedMode::Reuse(schedule, config) => Mode::reuse(schedule.clone(), *config),
            };
        }
        self.blocks.iter_mut().for_each(Kept::clear);
        self.whole.clear();
        (self.place, self.used) = (Place::default(), Used::default());
        if let Mode::Reuse(reuse) = &mut self.mode {
            reuse.random = SplitMix64::new(seed);
            reuse.exact = exact;
        }
    }

    /// The network's output in the next evaluation, which finds the part `position` of the denoising behind it: what
    /// `compute` gives, or what it gave before. `last`: no evaluation comes after it.
    ///
    /// # Errors
    /// Those of `compute`.
    pub fn evaluate(
        &mut self,
        position: f64,
        last: bool,
        compute: impl FnOnce(&mut Self) -> Result<Matrix>,
    ) -> Result<Matrix> {
        let place = &mut self.place;
        place.evaluation += 1;
        (place.position, place.last) = (position, last);
        let now = *place;
        let reuse = match &mut self.mode {
            Mode::Off => return compute(self),
            Mode::Record(recorded) => {
                recorded.positions.push(position);
                let output = compute(self)?;
                if let Mode::Record(recorded) = &mut self.mode {
                    recorded.whole.push(output.values().to_vec());
                }
                return Ok(output);
            }
            Mode::Reuse(reuse) => reuse,
        };
        place.before = (now.evaluation > 1).then_some(now.step);
        place.step = reuse.schedule.step(position);
        let now = *place;
        let Some(plan) = &reuse.schedule.whole else { return compute(self) };
        let due = now.last || reuse.exact || plan.due(now.before, now.step);
        let slope = plan.slope(now.step);
        let verdict = reuse.decide(&self.whole, due, now.evaluation);
        let guess = match verdict {
            Verdict::Compute => None,
            _ => self.whole.at(position, slope)?,
        };
        let blocks = u32::try_from(self.blocks.len()).unwrap_or(u32::MAX);
        let guess = match (verdict, guess) {
            (Verdict::Reuse, Some(guess)) => {
                // All of its blocks at once.
                self.used.lookups += blocks;
                self.used.hits += blocks;
                self.used.saved += self.whole.cost();
                return Ok(guess);
            }
            (_, guess) => guess,
        };
        let start = Instant::now();
        let output = compute(self)?;
        let took = start.elapsed().as_secs_f64();
        if let (Some(guess), Mode::Reuse(reuse)) = (&guess, &mut self.mode) {
            let error = relative(guess, &output, &output);
            reuse.monitor.checked(error);
            self.used.errors.push(error);
        }
        self.whole.keep(output.clone(), now.evaluation, position, took);
        Ok(output)
    }

    /// `x + compute(x)`, or `x` plus what block `block` gave before.
    ///
    /// # Errors
    /// Those of `compute`, and an output of another shape than `x`.
    pub fn add(
        &mut self,
        block: usize,
        x: Matrix,
        compute: impl FnOnce(&Matrix) -> Result<Matrix>,
    ) -> Result<Matrix> {
        let Some(kept) = self.blocks.get_mut(block) else { return add(compute(&x)?, &x) };
        let reuse = match &mut self.mode {
            Mode::Off => return add(compute(&x)?, &x),
            Mode::Record(recorded) => {
                let output = compute(&x)?;
                recorded.blocks[block].push(output.values().to_vec());
                return add(output, &x);
            }
            Mode::Reuse(reuse) => reuse,
        };
        self.used.lookups += 1;
        let now = self.place;
        let plan = reuse.schedule.blocks.get(block);
        let due = now.last || reuse.exact || plan.is_none_or(|p| p.due(now.before, now.step));
        let slope = plan.map_or(0.0, |p| p.slope(now.step));
        let verdict = reuse.decide(kept, due, now.evaluation);
        let guess = match verdict {
            Verdict::Compute => None,
            _ => kept.at(now.position, slope)?,
        };
        let guess = match (verdict, guess) {
            (Verdict::Reuse, Some(guess)) => {
                self.used.hits += 1;
                self.used.saved += kept.cost();
                return add(guess, &x);
            }
            (_, guess) => guess,
        };
        let start = Instant::now();
        let output = compute(&x)?;
        let took = start.elapsed().as_secs_f64();
        let total = sum(&output, &x)?;
        if let Some(guess) = &guess {
            let error = relative(guess, &output, &total);
            reuse.monitor.checked(error);
            self.used.errors.push(error);
        }
        kept.keep(output, now.evaluation, now.position, took);
        Ok(total)
    }

    /// The denoising ended, and became a chunk: what was reused in it. `None` when there is no cache.
    pub fn end(&mut self) -> Option<CacheUse> {
        if let (Some(tuning), Mode::Record(_)) = (&self.tuning, &self.mode) {
            if let Mode::Record(recorded) = std::mem::replace(&mut self.mode, Mode::Off) {
                tuning.lock().recorded(recorded);
            }
            return None;
        }
        let Mode::Reuse(reuse) = &mut self.mode else { return None };
        let used = std::mem::take(&mut self.used);
        // The opening that the chunk was made with, before the machine goes on.
        let opening = reuse.monitor.opening();
        reuse.monitor.chunk_made();
        if let Some(tuning) = &self.tuning {
            tuning.lock().errors.extend(&used.errors);
        }
        let unused = match reuse.exact {
            _ if opening == Opening::Closed || used.hits > 0 => None,
            _ if !used.errors.is_empty() => None,
            true => Some(Unused::Exact),
            false => Some(Unused::FewSteps),
        };
        let Schedule { measured, reuse_error, .. } = reuse.schedule.as_ref();
        let bound = reuse.monitor.bound();
        // What was measured at calibration, in proportion where reuses are farther off than then.
        let worse = match bound {
            Some(bound) if *reuse_error > 0.0 => (bound / reuse_error).max(1.0),
            _ => 1.0,
        };
        Some(CacheUse {
            lookups: used.lookups,
            hits: used.hits,
            error: (used.hits > 0).then_some(measured.p99 * worse),
            saved: Duration::try_from_secs_f64(used.saved).unwrap_or_default(),
            bound,
            opening,
            unused,
        })
    }

    /// Forgets what other chunks taught.
    pub fn forget(&mut self) {
        if let Mode::Reuse(reuse) = &mut self.mode {
            reuse.monitor = Monitor::new(reuse.monitor.config());
        }
    }
}

impl Mode {
    fn reuse(schedule: Arc<Schedule>, config: MonitorConfig) -> Self {
        let (monitor, random) = (Monitor::new(config), SplitMix64::new(0));
        Self::Reuse(Box::new(Reuse { schedule, monitor, random, exact: false }))
    }
}

impl Reuse {
    /// What to do in evaluation `now` with what is kept, which is to be computed when it is `due`.
    fn decide(&mut self, kept: &Kept, due: bool, now: usize) -> Verdict {
        match kept.age(now).filter(|_| !due) {
            None => Verdict::Compute,
            Some(age) => self.monitor.decide(age, self.random.open_unit()),
        }
    }
}
