//! Watches what all caches of a policy cost together: now and then a chunk is made a second time without them.

use std::time::Duration;

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Opening, Policy, PolicyError, PolicySpec,
    Progress, StageTime,
};

use super::Unit;
use crate::anytime::NOTHING_BEGUN;
use crate::caches::{COMPARISON, CompareConfig, Monitor, MonitorConfig};

/// A chunk that is compared has so large an error at most in this share of its values.
const QUANTILE: f64 = 0.99;
/// Chunks from one comparison to the next while little is known, or the caches are not wholly open.
const OFTEN: u32 = 3;

/// A policy with caches, compared with itself without them.
///
/// One chunk in [`CompareConfig::every`] is made twice, from the same observation and noise: with the caches, then without
/// them ([`ChunkRequest::exact`]); the second is the chunk. The 99th percentile of the differences between the two goes into a
/// [`Monitor`], whose bound, once there are nine comparisons, nine of ten chunks are within as long as chunks come as
/// they did. When it is above the limit all chunks are made without the caches, but for those that are compared; after two
/// calm comparisons every second one is; after two more all are made with them again.
///
/// A comparison takes as long as both inferences. The planner of the inference may end it early: then the chunk that was
/// made with the caches counts, and nothing is learnt.
pub struct Compared {
    policy: Box<dyn Policy>,
    units: Vec<Unit>,
    config: CompareConfig,
    monitor: Monitor,
    /// Chunks since the last that was compared.
    since: u32,
    run: Option<Run>,
}

struct Run {
    observation: Observation,
    request: ChunkRequest,
    compared: bool,
    /// What the caches made of it, while it is made without them.
    cached: Option<ActionChunk>,
    /// The comparison was ended early.
    ended: bool,
    /// Steps of the first inference.
    steps: usize,
}

impl Compared {
    /// `policy`, whose actions are of `units`.
    ///
    /// # Errors
    /// [`PolicyError::Unsupported`] when `units` are not the actions'.
    pub fn new(
        policy: Box<dyn Policy>,
        units: Vec<Unit>,
        config: CompareConfig,
    ) -> Result<Self, PolicyError> {
        if units.len() != policy.spec().action_dim {
            return Err(PolicyError::Unsupported("actions of another width"));
        }
        let monitor = monitor(&config);
        Ok(Self { policy, units, config, monitor, since: u32::MAX, run: None })
    }

    /// The differences of two chunks in the network's units, rising, and the largest in the actions' own.
    fn differences(&self, a: &ActionChunk, b: &ActionChunk) -> (Vec<f64>, f64) {
        let pairs = || a.values().iter().zip(b.values()).zip(self.units.iter().cycle());
        let mut shares: Vec<f64> = pairs().map(|((a, b), u)| (a - b).abs() / u.size).collect();
        shares.sort_by(f64::total_cmp);
        (shares, pairs().map(|((a, b), _)| (a - b).abs()).fold(0.0, f64::max))
    }
}

fn monitor(config: &CompareConfig) -> Monitor {
    let limit = config.limit;
    Monitor::new(MonitorConfig { share: 0.0, exceeded: 0.1, window: 39, limit, calm: 2 })
}

impl Policy for Compared {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let opening = self.monitor.opening();
        let settled = opening == Opening::Open && self.monitor.bound().is_some();
        let every = if settled { self.config.every } else { OFTEN.min(self.config.every) };
        let compared = !request.exact && self.since.saturating_add(1) >= every;
        self.since = if compared { 0 } else { self.since.saturating_add(1) };
        let mut request = request.clone();
        request.exact |= !compared
            && match opening {
                Opening::Closed => true,
                Opening::Narrow => self.since.is_multiple_of(2),
                Opening::Open => false,
            };
        self.policy.begin(observation, &request)?;
        let observation = observation.clone();
        self.run =
            Some(Run { observation, request, compared, cached: None, ended: false, steps: 0 });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if run.ended {
            return Ok(Progress::Done);
        }
        match self.policy.advance()? {
            Progress::Step { stage, done, total, denoised, next_denoises } => {
                // For the planner what comes after the first inference is part of its steps.
                let second = run.cached.is_some();
                run.steps = if second { run.steps } else { total };
                let before = if second { run.steps } else { 0 };
                Ok(Progress::Step {
                    stage,
                    done: done + before,
                    total: total + before,
                    denoised,
                    next_denoises: next_denoises || second,
                })
            }
            Progress::Done if run.compared && run.cached.is_none() => {
                run.cached = Some(self.policy.take_chunk()?);
                run.request.exact = true;
                self.policy.begin(&run.observation, &run.request)?;
                let (done, total) = (run.steps, 2 * run.steps);
                let (denoised, next_denoises) = (true, true);
                Ok(Progress::Step { stage: COMPARISON, done, total, denoised, next_denoises })
            }
            Progress::Done => Ok(Progress::Done),
        }
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        // Asked too early it says so, and goes on.
        let exact = match &self.run {
            Some(run) if run.ended => None,
            _ => Some(self.policy.take_chunk()?),
        };
        let run = self.run.take().ok_or(NOTHING_BEGUN)?;
        let mut used = CacheUse { lookups: 1, ..CacheUse::default() };
        // How the caches stood while the chunk was made.
        used.opening = self.monitor.opening();
        let mut chunk = match (exact, run.cached) {
            (Some(mut exact), Some(cached)) => {
                let (shares, largest) = self.differences(&cached, &exact);
                let rank = (QUANTILE * shares.len() as f64).ceil() as usize;
                let error = shares.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN);
                self.monitor.checked(error);
                self.monitor.chunk_made();
                (used.hits, used.error) = (1, Some(largest));
                let time: Duration = exact.report.stages.iter().map(|stage| stage.time).sum();
                // What the caches did is told, and the time that the comparison cost.
                let ActionChunk { report, .. } = cached;
                exact.report.caches = report.caches;
                exact.report.stages = report.stages;
                exact.report.stages.push(StageTime { stage: COMPARISON, time });
                exact
            }
            (None, Some(cached)) => cached,
            (Some(chunk), None) => chunk,
            (None, None) => return Err(NOTHING_BEGUN),
        };
        used.bound = self.monitor.bound();
        chunk.report.caches.push((COMPARISON, used));
        Ok(chunk)
    }

    fn history_period(&self) -> Option<Duration> {
        self.policy.history_period()
    }

    fn remember(&mut self, observation: &Observation) -> Result<(), PolicyError> {
        self.policy.remember(observation)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        // Both inferences have the same steps, or there is nothing to compare.
        if run.cached.is_some() || !self.policy.set_denoise_steps(steps)? {
            return Ok(false);
        }
        run.request.denoise_steps = Some(steps);
        Ok(true)
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if run.cached.is_some() {
            run.ended = true;
            return Ok(true);
        }
        let finished = self.policy.finish_early()?;
        // A chunk that was cut short is not what the other would be.
        run.compared &= !finished;
        Ok(finished)
    }

    fn forget(&mut self) {
        (self.run, self.since) = (None, u32::MAX);
        self.monitor = monitor(&self.config);
        self.policy.forget();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use sinew_runtime::{PrefixSupport, Stamp, inference};

    use super::*;

    const DT: Duration = Duration::from_millis(100);

    /// Ones without caches; with them off by what is set. It takes two steps.
    struct Head {
        spec: PolicySpec,
        off: Arc<Mutex<f64>>,
        run: Option<(ChunkRequest, usize)>,
    }

    impl Policy for Head {
        fn spec(&self) -> &PolicySpec {
            &self.spec
        }

        fn begin(&mut self, _: &Observation, asked: &ChunkRequest) -> Result<(), PolicyError> {
            self.run = Some((asked.clone(), 0));
            Ok(())
        }

        fn advance(&mut self) -> Result<Progress, PolicyError> {
            let (_, done) = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
            *done += 1;
            Ok(match *done {
                1 => Progress::Step {
                    stage: "denoise",
                    done: 1,
                    total: 2,
                    denoised: true,
                    next_denoises: true,
                },
                _ => Progress::Done,
            })
        }

        fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
            let (asked, _) = self.run.take().ok_or(NOTHING_BEGUN)?;
            let off = if asked.exact { 0.0 } else { *self.off.lock().expect("nobody died") };
            let values = vec![1.0 + off; 4];
            ActionChunk::new(asked.id, Stamp(0), DT, 2, values)
                .map_err(|e| PolicyError::Compute(e.to_string()))
        }
    }

    fn compared(every: u32) -> (Compared, Arc<Mutex<f64>>) {
        let spec = PolicySpec {
            cameras: Vec::new(),
            optional_cameras: 0,
            state_dim: 2,
            action_dim: 2,
            action_names: Vec::new(),
            action_horizon: 2,
            action_rate_hz: Some(10.0),
            denoise_steps: 2,
            prefix: PrefixSupport::default(),
        };
        let off = Arc::new(Mutex::new(0.0));
        let head = Head { spec, off: off.clone(), run: None };
        let units = vec![Unit { middle: 0.0, size: 2.0 }; 2];
        let config = CompareConfig { every, limit: 0.1 };
        (Compared::new(Box::new(head), units, config).expect("two dimensions"), off)
    }

    fn seen() -> Observation {
        Observation {
            instant: Stamp(0),
            images: Vec::new(),
            proprioception: vec![0.0; 2],
            proprioception_age: Duration::ZERO,
            instruction: String::new(),
        }
    }

    fn one(policy: &mut Compared, request: &ChunkRequest) -> (f64, CacheUse) {
        let chunk = inference::run(policy, &seen(), request).expect("it runs");
        let used = chunk.report.caches.iter().find(|c| c.0 == COMPARISON).expect("it says").1;
        (chunk.values()[0], used)
    }

    #[test]
    fn errors_close_the_caches_and_calm_opens_them_step_by_step() {
        let (mut policy, off) = compared(10);
        let set = |value: f64| *off.lock().expect("nobody died") = value;
        let plain = ChunkRequest::default();
        let mut run =
            |count: usize| (0..count).map(|_| one(&mut policy, &plain)).collect::<Vec<_>>();
        set(0.1);
        let calm = run(60);
        // Every third chunk until nine are known, then every tenth; the exact one is what is compared.
        let hits: Vec<usize> = (0..60).filter(|k| calm[*k].1.hits == 1).collect();
        assert_eq!(hits, [0, 3, 6, 9, 12, 15, 18, 21, 24, 34, 44, 54]);
        assert!(calm.iter().all(|(v, used)| (*v == 1.0) == (used.hits == 1)), "{calm:?}");
        let last = calm[59].1;
        assert_eq!((last.opening, last.lookups), (Opening::Open, 1));
        assert!(last.bound.is_some_and(|b| (b - 0.05).abs() < 1e-9), "half of 0.1: {last:?}");
        assert!(calm[54].1.error.is_some_and(|e| (e - 0.1).abs() < 1e-9));
        // A surge: what counts is the bound, the largest but three of forty at most.
        set(0.8);
        let surge = run(100);
        let closed = surge.iter().position(|(_, used)| used.opening == Opening::Closed);
        let closed = closed.expect("it closes");
        assert!(closed <= 41, "{closed}");
        assert!(surge[closed..].iter().all(|(value, _)| *value == 1.0), "exact from then on");
        set(0.02);
        let calm = run(400);
        let mut order: Vec<Opening> = calm.iter().map(|(_, used)| used.opening).collect();
        order.dedup();
        assert_eq!(order, [Opening::Closed, Opening::Narrow, Opening::Open]);
        let narrow: Vec<f64> =
            calm.iter().filter(|(_, u)| u.opening == Opening::Narrow).map(|c| c.0).collect();
        let cached = narrow.iter().filter(|value| **value > 1.0).count();
        assert!(cached > 0 && 2 * cached <= narrow.len() + 1, "{narrow:?}");
    }

    #[test]
    fn a_comparison_that_is_ended_early_gives_the_chunk_that_is_there() {
        let (mut policy, off) = compared(1);
        *off.lock().expect("nobody died") = 0.5;
        let plain = ChunkRequest::default();
        policy.begin(&seen(), &plain).expect("it begins");
        let mut steps = 0;
        while let Progress::Step { stage, done, total, .. } = policy.advance().expect("it goes on")
        {
            steps += 1;
            assert!(done <= total && total <= 4, "{done} of {total}");
            if stage == COMPARISON {
                assert!(!policy.set_denoise_steps(1).expect("it answers"), "too late");
                assert!(policy.finish_early().expect("there is a chunk"));
            }
        }
        assert_eq!(steps, 2);
        let chunk = policy.take_chunk().expect("it is done");
        assert_eq!(chunk.values()[0], 1.5);
        assert_eq!(chunk.report.caches.last().map(|c| (c.0, c.1.hits)), Some((COMPARISON, 0)));
        assert!(policy.take_chunk().is_err(), "it was taken");
        // Whole, it is the exact one; one that is asked for without caches is not compared.
        assert_eq!(one(&mut policy, &plain).0, 1.0);
        let exact = ChunkRequest { exact: true, ..plain };
        assert_eq!((one(&mut policy, &exact).0, one(&mut policy, &exact).1.hits), (1.0, 0));
    }
}
