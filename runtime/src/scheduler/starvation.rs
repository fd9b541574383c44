//! Can this configuration hold? Proven before any motion, from chunk length, rates and measured latency.
//!
//! Times in actions of `dt`: a chunk whose observation is `age` old and whose inference takes `L` begins at
//! phase `o = (L + age)/dt`, for its first actions are past. The next one is asked for at phase
//! `max(o, s - L/dt)`, with `s` the execution horizon, and takes over `L/dt` later. The arm never runs out of
//! actions when that is no later than the chunk's end `H`. A chunk made for the take-over instant
//! (roll-forward) loses nothing: `o` is 0.

use std::time::Duration;

use serde::Serialize;

use super::strategy::StrategyConfig;

/// A policy's tail latency, in its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct StepLatency {
    /// All that does not depend on the number of denoise steps.
    pub fixed: Duration,
    /// One denoise step.
    pub step: Duration,
    /// Number of denoise steps.
    pub steps: usize,
}

impl StepLatency {
    /// The whole inference with `steps` denoise steps.
    pub fn total(&self, steps: usize) -> Duration {
        self.fixed + self.step * u32::try_from(steps).unwrap_or(u32::MAX)
    }
}

/// What a launch wants to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    /// Action horizon `H`.
    pub horizon: usize,
    /// Time between two actions.
    pub dt: Duration,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// Control period: a chunk is taken over at its end at the latest.
    pub control_period: Duration,
    /// Age of an observation when its order is made.
    pub age: Duration,
    /// Tail latency, as measured.
    pub latency: StepLatency,
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
}

/// It holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Holds {
    /// Time from the expected take-over to the chunk's end; how much later a chunk may come.
    pub slack: Duration,
    /// Share of the time that the arm stands still to think; 0 for asynchronous strategies.
    pub standstill: f64,
    /// Inference runs back to back: the take-over comes later than the execution horizon asks for.
    pub back_to_back: bool,
}

/// A change that makes a configuration hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Nearest {
    /// This execution horizon (actions).
    ExecutionHorizon(usize),
    /// So many denoise steps.
    DenoiseSteps(usize),
    /// The synchronous strategy: nothing else is fast enough.
    Synchronous,
}

/// It does not hold: the arm would run out of actions again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the next chunk would take over {:.0} ms after its predecessor's instant, which is played out after {:.0} ms \
     (one inference takes {:.0} ms here)",
    needed.as_secs_f64() * 1e3, available.as_secs_f64() * 1e3, latency.as_secs_f64() * 1e3
)]
pub struct Starves {
    /// From a chunk's instant to the take-over of the next one.
    pub needed: Duration,
    /// Length of a chunk.
    pub available: Duration,
    /// Tail latency.
    pub latency: Duration,
    /// The smallest change that helps.
    pub nearest: Nearest,
}

impl Nearest {
    /// What to write into the launch file.
    pub fn remedy(self) -> String {
        match self {
            Nearest::ExecutionHorizon(n) => format!("set [scheduler] execution_horizon = {n}"),
            Nearest::DenoiseSteps(n) => format!("set [policy] denoise_steps = {n}"),
            Nearest::Synchronous => "set [scheduler] strategy = \"synchronous\" (the arm stands still while \
                                     the policy thinks), or use a faster machine or a smaller policy"
                .to_owned(),
        }
    }
}

/// Whether `demand` holds.
///
/// # Errors
/// [`Starves`] with the nearest configuration that does.
pub fn check(demand: &Demand) -> Result<Holds, Starves> {
    let (needed, available) = (takeover(demand), demand.dt * demand.horizon as u32);
    let latency = demand.latency.total(demand.latency.steps);
    if demand.strategy == StrategyConfig::Synchronous {
        let played = demand.dt.mul_f64(demand.execution_horizon.min(demand.horizon) as f64);
        let cycle = played + latency + demand.control_period;
        let standstill = 1.0 - played.as_secs_f64() / cycle.as_secs_f64();
        return Ok(Holds { slack: Duration::MAX, standstill, back_to_back: false });
    }
    if needed <= available {
        let wanted = demand.dt * demand.execution_horizon as u32;
        let back_to_back = needed > wanted + demand.control_period;
        return Ok(Holds { slack: available - needed, standstill: 0.0, back_to_back });
    }
    let holds = |changed: Demand| takeover(&changed) <= available;
    let horizon = Demand { execution_horizon: demand.horizon, ..*demand };
    let nearest = if demand.execution_horizon > demand.horizon && holds(horizon) {
        Nearest::ExecutionHorizon(demand.horizon)
    } else {
        let with = |steps| Demand { latency: StepLatency { steps, ..demand.latency }, ..*demand };
        let fewer = (1..demand.latency.steps).rev().find(|n| holds(with(*n)));
        fewer.map_or(Nearest::Synchronous, Nearest::DenoiseSteps)
    };
    Err(Starves { needed, available, latency, nearest })
}

/// From a chunk's instant to the take-over of the next one.
fn takeover(demand: &Demand) -> Duration {
    let latency = demand.latency.total(demand.latency.steps) + demand.control_period;
    let lost = match demand.strategy {
        StrategyConfig::RollForward => Duration::ZERO,
        _ => latency + demand.age,
    };
    let horizon = match demand.strategy {
        StrategyConfig::Ensemble { .. } => 1,
        _ => demand.execution_horizon,
    };
    (lost + latency).max(demand.dt * horizon as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(step_ms: u64, strategy: StrategyConfig) -> Demand {
        let millis = Duration::from_millis;
        Demand {
            horizon: 16,
            dt: millis(100),
            execution_horizon: 8,
            control_period: millis(10),
            age: millis(40),
            latency: StepLatency { fixed: millis(50), step: millis(step_ms), steps: 10 },
            strategy,
        }
    }

    #[test]
    fn a_fast_policy_holds_with_slack() {
        let holds = check(&demand(5, StrategyConfig::default())).expect("100 ms of 1.6 s");
        assert_eq!(holds.slack, Duration::from_millis(800));
        assert!(!holds.back_to_back && holds.standstill == 0.0);
        // 2 · 460 + 40 ms: later than 8 actions, sooner than 16.
        let holds = check(&demand(40, StrategyConfig::default())).expect("it still holds");
        assert!(holds.back_to_back);
        assert_eq!(holds.slack, Duration::from_millis(640));
    }

    #[test]
    fn a_slow_policy_is_refused_with_the_nearest_that_holds() {
        let starves = check(&demand(100, StrategyConfig::default())).expect_err("2.16 s of 1.6 s");
        // 2 · (50 + 100 n + 10) + 40 <= 1600: n = 7.
        assert_eq!(starves.nearest, Nearest::DenoiseSteps(7));
        let fewer = Demand {
            latency: StepLatency { steps: 7, ..demand(100, StrategyConfig::default()).latency },
            ..demand(100, StrategyConfig::default())
        };
        assert!(check(&fewer).is_ok());
        assert!(starves.to_string().contains("1050 ms"), "{starves}");
    }

    #[test]
    fn what_nothing_helps_is_told_to_stop_and_think() {
        let hopeless = demand(5000, StrategyConfig::default());
        assert_eq!(check(&hopeless).expect_err("far too slow").nearest, Nearest::Synchronous);
        let thinking = check(&demand(5000, StrategyConfig::Synchronous)).expect("it waits");
        assert!(thinking.standstill > 0.9);
    }

    #[test]
    fn roll_forward_loses_no_actions() {
        // 1.06 s a chunk: too slow for two in a row, fast enough for one.
        assert!(check(&demand(100, StrategyConfig::RollForward)).is_ok());
    }

    #[test]
    fn a_horizon_beyond_the_chunk_is_named() {
        let long = Demand { execution_horizon: 20, ..demand(5, StrategyConfig::default()) };
        assert_eq!(check(&long).expect_err("20 of 16").nearest, Nearest::ExecutionHorizon(16));
    }
}
