//! A denoiser's residual branches, computed or reused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Result, Tensor};
use sinew_runtime::{CacheUse, Opening, Unused};

use super::likeness::Likeness;
use super::monitor::{Monitor, MonitorConfig, Verdict};
use super::plan::Block;
use super::schedule::Schedule;
use crate::kernels::add;
use crate::random::SplitMix64;

/// Newest computing time's share in a block's running mean.
const NEWEST: f64 = 0.1;

/// What is done with the branches, set from outside while a policy is loaded: calibration's handle.
#[derive(Debug, Clone, Default)]
pub struct Tuning(Arc<Mutex<Tuned>>);

impl PartialEq for Tuning {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// See [`Tuning`].
#[derive(Debug, Default)]
pub struct Tuned {
    /// What the next denoising does.
    pub mode: TunedMode,
    /// The policy's blocks, once it was loaded.
    pub blocks: Vec<Block>,
    /// SHA-256 of its weights.
    pub weights_sha256: String,
    /// Positions of the newest recorded denoising's evaluations.
    pub positions: Vec<f64>,
    /// What was recorded, block by block.
    pub likeness: Vec<Likeness>,
    /// Errors of the reuses that were compared.
    pub errors: Vec<f64>,
}

/// What a tuned denoiser does.
#[derive(Debug, Clone, Default)]
pub enum TunedMode {
    /// It computes everything.
    #[default]
    Off,
    /// It computes everything and records it.
    Record,
    /// It follows a schedule, comparing as the monitor's settings say.
    Reuse(Arc<Schedule>, MonitorConfig),
}

impl Tuning {
    /// What is set and was found.
    pub fn lock(&self) -> MutexGuard<'_, Tuned> {
        // Whole values only: whoever panicked while holding it left it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a block's newest output is worth.
struct Kept {
    output: Tensor,
    /// The evaluation that computed it.
    computed: usize,
}

struct Reuse {
    schedule: Arc<Schedule>,
    monitor: Monitor,
    random: SplitMix64,
    exact: bool,
}

enum Mode {
    Off,
    Record(Vec<Vec<Vec<f32>>>, Vec<f64>),
    Reuse(Box<Reuse>),
}

#[derive(Default)]
struct Used {
    lookups: u32,
    hits: u32,
    saved: f64,
    errors: Vec<f64>,
}

/// The residual branches of one policy's denoiser.
///
/// A network asks [`Self::add`] for `x + branch(x)`. With a schedule the branch's last output stands in for it in the
/// evaluations that the schedule leaves out, under the eyes of a [`Monitor`]. What is kept lives as long as one
/// denoising.
pub struct Branches {
    mode: Mode,
    tuning: Option<Tuning>,
    kept: Vec<Option<Kept>>,
    /// Running mean of each block's computing time (s).
    cost: Vec<f64>,
    evaluations: usize,
    /// Place of the evaluation before and of the running one in the schedule.
    before: Option<usize>,
    step: usize,
    last: bool,
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
            kept: (0..blocks).map(|_| None).collect(),
            cost: vec![0.0; blocks],
            evaluations: 0,
            before: None,
            step: 0,
            last: false,
            used: Used::default(),
        }
    }

    /// A denoising begins, whose comparisons are drawn by `seed`; `exact`: nothing is to be reused in it.
    pub fn begin(&mut self, seed: u64, exact: bool) {
        if let Some(tuning) = &self.tuning {
            self.mode = match &tuning.lock().mode {
                TunedMode::Off => Mode::Off,
                TunedMode::Record => {
                    Mode::Record(self.kept.iter().map(|_| Vec::new()).collect(), Vec::new())
                }
                TunedMode::Reuse(schedule, config) => Mode::reuse(schedule.clone(), *config),
            };
        }
        self.kept.iter_mut().for_each(|kept| *kept = None);
        (self.evaluations, self.before, self.used) = (0, None, Used::default());
        if let Mode::Reuse(reuse) = &mut self.mode {
            reuse.random = SplitMix64::new(seed);
            reuse.exact = exact;
        }
    }

    /// An evaluation begins that finds the part `position` of the denoising behind it; `last`: none comes after it.
    pub fn evaluate(&mut self, position: f64, last: bool) {
        match &mut self.mode {
            Mode::Off => return,
            Mode::Record(_, positions) => positions.push(position),
            Mode::Reuse(reuse) => {
                self.before = (self.evaluations > 0).then_some(self.step);
                self.step = reuse.schedule.step(position);
            }
        }
        self.last = last;
        self.evaluations += 1;
    }

    /// `x + compute()`, or `x` plus what block `block` gave before.
    ///
    /// # Errors
    /// Those of `compute`, and an output of another shape than `x`.
    pub fn add(
        &mut self,
        block: usize,
        x: &Tensor,
        compute: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(kept) = self.kept.get_mut(block) else { return add(compute()?, x) };
        let reuse = match &mut self.mode {
            Mode::Off => return add(compute()?, x),
            Mode::Record(outputs, _) => {
                let output = compute()?;
                outputs[block].push(output.flatten_all()?.to_vec1()?);
                return add(output, x);
            }
            Mode::Reuse(reuse) => reuse,
        };
        self.used.lookups += 1;
        let due = self.last || reuse.exact || reuse.schedule.due(block, self.before, self.step);
        let verdict = match kept.as_ref().filter(|_| !due) {
            None => Verdict::Compute,
            Some(kept) => {
                let age = self.evaluations - kept.computed;
                reuse.monitor.decide(age, reuse.random.open_unit())
            }
        };
        if let (Verdict::Reuse, Some(kept)) = (verdict, kept.as_ref()) {
            self.used.hits += 1;
            self.used.saved += self.cost[block];
            return &kept.output + x;
        }
        let start = Instant::now();
        let output = compute()?;
        let took = start.elapsed().as_secs_f64();
        let cost = &mut self.cost[block];
        *cost = if *cost == 0.0 { took } else { *cost + NEWEST * (took - *cost) };
        let sum = (&output + x)?;
        if let (Verdict::Check, Some(kept)) = (verdict, kept.as_ref()) {
            let error = relative(&kept.output, &output, &sum)?;
            reuse.monitor.checked(error);
            self.used.errors.push(error);
        }
        *kept = Some(Kept { output, computed: self.evaluations });
        Ok(sum)
    }

    /// The denoising ended, and became a chunk: what was reused in it. `None` when there is no cache.
    pub fn end(&mut self) -> Option<CacheUse> {
        if let (Some(tuning), Mode::Record(..)) = (&self.tuning, &self.mode) {
            if let Mode::Record(outputs, positions) = std::mem::replace(&mut self.mode, Mode::Off) {
                tuning.lock().recorded(&outputs, positions);
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
        let unused = match (reuse.exact, self.evaluations) {
            _ if opening == Opening::Closed || used.hits > 0 => None,
            _ if !used.errors.is_empty() => None,
            (true, _) => Some(Unused::Exact),
            _ => Some(Unused::FewSteps),
        };
        let measured = &reuse.schedule.measured;
        let bound = reuse.monitor.bound();
        // What was measured at calibration, in proportion where blocks are farther off than then.
        let worse = match bound {
            Some(bound) if measured.block_error > 0.0 => (bound / measured.block_error).max(1.0),
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

impl Tuned {
    /// Takes in the outputs of one denoising, block by block and evaluation by evaluation.
    fn recorded(&mut self, outputs: &[Vec<Vec<f32>>], positions: Vec<f64>) {
        let count = positions.len();
        self.likeness.retain(|seen| seen.evaluations() == count);
        if self.likeness.len() != outputs.len() {
            self.likeness = outputs.iter().map(|_| Likeness::new(count)).collect();
        }
        for (seen, outputs) in self.likeness.iter_mut().zip(outputs) {
            // One that is no number makes no sample; the chunk itself is refused then.
            let _ = seen.add(outputs);
        }
        self.positions = positions;
    }
}

/// The length of `kept − exact` relative to that of `sum`.
fn relative(kept: &Tensor, exact: &Tensor, sum: &Tensor) -> Result<f64> {
    let length = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
    let (off, whole) = (length(&(kept - exact)?)?, length(sum)?);
    Ok((f64::from(off) / f64::from(whole).max(f64::MIN_POSITIVE)).sqrt())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::plan::{BlockKind, Updates};
    use super::super::schedule::BlockPlan;
    use super::*;

    const STEPS: usize = 6;

    fn schedule(updates: &[usize]) -> Schedule {
        let plan = BlockPlan {
            name: Block::new(BlockKind::FeedForward, 0).name,
            updates: Some(updates.iter().copied().collect::<Updates>()),
            similarity: 1.0,
            spread: 0.0,
            volatility: 1.0,
        };
        let positions = (0..STEPS).map(|k| k as f64 / STEPS as f64).collect();
        Schedule::new(String::new(), positions, updates.len(), vec![plan])
    }

    /// The block gives the number of the evaluation; what is added to zero at each of `steps` evaluations.
    fn outputs(branches: &mut Branches, steps: usize) -> Vec<f32> {
        let zero = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).expect("one value");
        (0..steps)
            .map(|k| {
                branches.evaluate(k as f64 / steps as f64, k + 1 == steps);
                let compute = || Tensor::new(&[k as f32 + 1.0], &Device::Cpu);
                let sum = branches.add(0, &zero, compute).and_then(|t| t.to_vec1::<f32>());
                sum.expect("one value")[0]
            })
            .collect()
    }

    fn quiet() -> MonitorConfig {
        MonitorConfig { share: 0.0, ..MonitorConfig::default() }
    }

    #[test]
    fn outputs_are_reused_until_the_next_update() {
        let mut branches = Branches::scheduled(schedule(&[0, 2]), quiet());
        for seed in 0..2 {
            branches.begin(seed, false);
            assert_eq!(outputs(&mut branches, STEPS), [1.0, 1.0, 3.0, 3.0, 3.0, 6.0]);
            let used = branches.end().expect("there is a cache");
            assert_eq!((used.lookups, used.hits, used.unused), (6, 3, None));
        }
        branches.begin(2, true);
        assert_eq!(outputs(&mut branches, STEPS), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(branches.end().expect("a cache").unused, Some(Unused::Exact));
        branches.begin(3, false);
        assert_eq!(outputs(&mut branches, 2), [1.0, 2.0]);
        assert_eq!(branches.end().expect("a cache").unused, Some(Unused::FewSteps));
    }

    #[test]
    fn a_closed_cache_computes_everything_and_says_so() {
        // Every output is far from the one before: the second comparison closes the cache.
        let config = MonitorConfig { share: 1.0, limit: 0.01, ..MonitorConfig::default() };
        let mut branches = Branches::scheduled(schedule(&[0]), config);
        branches.begin(1, false);
        assert_eq!(outputs(&mut branches, STEPS), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let used = branches.end().expect("there is a cache");
        assert_eq!((used.hits, used.opening), (0, Opening::Closed));
        assert_eq!(used.error, None, "nothing was reused");
        branches.forget();
        branches.begin(1, false);
        assert_eq!(branches.end().expect("a cache").opening, Opening::Open);
    }

    #[test]
    fn recordings_become_similarities() {
        let tuning = Tuning::default();
        let mut branches = Branches::tuned(tuning.clone(), 1);
        tuning.lock().mode = TunedMode::Record;
        branches.begin(1, false);
        outputs(&mut branches, 3);
        assert_eq!(branches.end(), None);
        {
            let tuned = tuning.lock();
            assert_eq!(tuned.positions.len(), 3);
            assert_eq!(tuned.likeness[0].samples(), 1);
            assert_eq!(tuned.likeness[0].similarity(0, 2), 1.0);
            assert!((tuned.likeness[0].volatility() - 4.0 / 3.0).abs() < 1e-9);
        }
        tuning.lock().mode = TunedMode::Off;
        branches.begin(1, false);
        outputs(&mut branches, 3);
        assert_eq!((branches.end(), tuning.lock().likeness[0].samples()), (None, 1));
    }
}
