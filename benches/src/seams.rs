//! Smoothness under delay: every strategy in the demo's closed loop, with latency injected.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;
use sinew_drivers::sim::ArmDescription;
use sinew_runtime::guard::Cause;
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{ActionKind, JointLimits, Policy, PolicyError};

use crate::closed_loop::{LoopCase, PERIOD, Step, play};

/// After a splice a seam is this long.
const SEAM: Duration = Duration::from_millis(300);

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct SeamPlan {
    /// The strategies.
    pub strategies: Vec<StrategyConfig>,
    /// Injected latencies.
    pub latencies: Vec<Duration>,
    /// Episodes of each.
    pub episodes: u64,
    /// Seed of the first scene.
    pub seed: u64,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// Threads, each with a policy of its own.
    pub threads: usize,
}

/// One row: a strategy under one latency.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SeamRow {
    /// Its name.
    pub strategy: &'static str,
    /// Injected latency (ms).
    pub latency_ms: u64,
    /// Episodes played.
    pub episodes: u64,
    /// Of these: done as told.
    pub successes: u64,
    /// Median time to success (s); `None` without one.
    pub seconds: Option<f64>,
    /// Largest jerk of an arm joint's command within 300 ms after a splice, as a share of the joint's limit.
    pub seam_jerk: f64,
    /// Largest change of an arm joint's commanded velocity within one control period there (rad/s).
    pub seam_velocity_step: f64,
    /// Root mean square jerk of the arm joints' commands over everything, as a share of the limit.
    pub rms_jerk: f64,
    /// The same for the jaws, which are thrown open and shut.
    pub jaw_jerk: f64,
    /// Share of the control periods in which the guard limited an arm joint's velocity, acceleration or jerk.
    pub guarded: f64,
    /// Share of the control periods in which nothing was left to play.
    pub starved: f64,
}

/// Running figures of a command stream.
struct Stream {
    limits: Vec<JointLimits>,
    kinds: Vec<ActionKind>,
    /// The newest positions, oldest first.
    window: Vec<Vec<f64>>,
    since_splice: Option<Duration>,
    jerk: f64,
    velocity_step: f64,
    /// Sums of squares and numbers of samples: arm joints, jaws.
    squares: [(f64, u64); 2],
    periods: u64,
    guarded: u64,
    starved: u64,
}

impl Stream {
    fn new(limits: Vec<JointLimits>, kinds: Vec<ActionKind>) -> Self {
        let window = Vec::with_capacity(4);
        Self {
            limits,
            kinds,
            window,
            since_splice: None,
            jerk: 0.0,
            velocity_step: 0.0,
            squares: [(0.0, 0); 2],
            periods: 0,
            guarded: 0,
            starved: 0,
        }
    }

    fn take(&mut self, step: &Step<'_>) {
        let Some(command) = &step.cycle.command else { return };
        self.periods += 1;
        let arm = |joint: &usize| self.kinds[*joint].blends();
        let changed = |cause| {
            let mut joints = (0..self.limits.len()).filter(arm);
            joints.any(|joint| step.cycle.interventions.contains(joint, cause))
        };
        let rates = [Cause::Velocity, Cause::Acceleration, Cause::Jerk];
        self.guarded += u64::from(rates.into_iter().any(changed));
        self.starved += u64::from(step.cycle.mode == sinew_runtime::scheduler::Mode::Starved);
        if step.spliced {
            self.since_splice = Some(Duration::ZERO);
        }
        if self.window.len() == 4 {
            self.window.remove(0);
        }
        self.window.push(command.position.as_slice().to_vec());
        let seam = self.since_splice.is_some_and(|t| t <= SEAM);
        self.since_splice = self.since_splice.map(|t| t + PERIOD);
        let [a, b, c, d] = &self.window[..] else { return };
        let t = PERIOD.as_secs_f64();
        for (joint, limit) in self.limits.iter().enumerate() {
            let velocities = [(b[joint] - a[joint]), (c[joint] - b[joint]), (d[joint] - c[joint])];
            let [v0, v1, v2] = velocities.map(|v| v / t);
            let jerk = ((v2 - v1) - (v1 - v0)).abs() / (t * t * limit.jerk);
            let arm = self.kinds[joint].blends();
            let (sum, samples) = &mut self.squares[usize::from(!arm)];
            *sum += jerk * jerk;
            *samples += 1;
            if seam && arm {
                self.jerk = self.jerk.max(jerk);
                self.velocity_step = self.velocity_step.max((v2 - v1).abs());
            }
        }
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum SeamError<E> {
    /// The policy was not loaded.
    #[error(transparent)]
    Load(E),
    /// The policy failed.
    #[error(transparent)]
    Run(PolicyError),
}

/// Measures all of `plan`; `progress` is told how many cells of the table are done.
///
/// # Errors
/// What loading or a policy gave.
pub fn measure<E: Send>(
    plan: &SeamPlan,
    load: &(dyn Fn() -> Result<Box<dyn Policy>, E> + Sync),
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Vec<SeamRow>, SeamError<E>> {
    let cells: Vec<LoopCase> = plan
        .latencies
        .iter()
        .flat_map(|latency| {
            plan.strategies.iter().map(|strategy| LoopCase {
                strategy: *strategy,
                execution_horizon: plan.execution_horizon,
                latency: *latency,
            })
        })
        .collect();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || -> Result<Vec<(usize, SeamRow)>, SeamError<E>> {
        let mut policy = load().map_err(SeamError::Load)?;
        let mut rows = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(cell) = cells.get(index) else { return Ok(rows) };
            rows.push((index, row(policy.as_mut(), cell, plan).map_err(SeamError::Run)?));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, cells.len());
        }
    };
    let mut rows = Vec::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(result) => rows.extend(result?),
                // The worker's panic goes on here: it is a defect, not a result.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })?;
    rows.sort_by_key(|r: &(usize, SeamRow)| r.0);
    Ok(rows.into_iter().map(|r| r.1).collect())
}

fn row(policy: &mut dyn Policy, case: &LoopCase, plan: &SeamPlan) -> Result<SeamRow, PolicyError> {
    let arm = ArmDescription::desk_arm();
    let mut stream = Stream::new(arm.limits(), arm.kinds());
    let mut times = Vec::new();
    for seed in plan.seed..plan.seed + plan.episodes {
        stream.window.clear();
        stream.since_splice = None;
        let ending = play(policy, case, seed, None, &mut |step| stream.take(step))?;
        let truth = &ending.truth;
        if truth.success && !truth.wrong_object && !truth.wrong_bin {
            times.push(ending.seconds);
        }
    }
    times.sort_by(f64::total_cmp);
    let rms = |(sum, samples): (f64, u64)| (sum / samples.max(1) as f64).sqrt();
    let share = |n: u64| n as f64 / stream.periods.max(1) as f64;
    Ok(SeamRow {
        strategy: case.strategy.name(),
        latency_ms: case.latency.as_millis() as u64,
        episodes: plan.episodes,
        successes: times.len() as u64,
        seconds: times.get(times.len() / 2).copied(),
        seam_jerk: stream.jerk,
        seam_velocity_step: stream.velocity_step,
        rms_jerk: rms(stream.squares[0]),
        jaw_jerk: rms(stream.squares[1]),
        guarded: share(stream.guarded),
        starved: share(stream.starved),
    })
}
