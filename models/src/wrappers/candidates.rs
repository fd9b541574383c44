//! Several candidates for a chunk, and a verifier that chooses one.

use std::collections::VecDeque;

use sinew_runtime::{
    ActionChunk, CacheUse, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, PrefixUse,
    Progress, StageTime, Stamp,
};

use super::verifiers::{Context, Verifier};
use crate::anytime::{NOT_DONE, NOTHING_BEGUN, compute};
use crate::random::SplitMix64;

/// Measured states that are kept for the verifier.
const OBSERVED: usize = 64;

/// Samples up to `count` chunks and gives the one that the verifier likes best.
///
/// For the planner of the inference every candidate is so many more denoise steps: it asks for fewer in all when time
/// is short, which means fewer candidates, and when it ends an inference early the best candidate so far is
/// the chunk. So the number of candidates is bounded, and follows from the request alone: a replay makes the same
/// choice. Where the head can, it samples again without looking at the images again ([`Policy::resample`]).
pub struct BestOf {
    policy: Box<dyn Policy>,
    verifier: Box<dyn Verifier>,
    count: usize,
    /// Actions at the start of a chunk that lie before its observation.
    past: usize,
    spec: PolicySpec,
    observed: VecDeque<(Stamp, Vec<f64>)>,
    previous: Option<ActionChunk>,
    run: Option<Run>,
}

struct Run {
    observation: Observation,
    request: ChunkRequest,
    /// Denoise steps of one candidate.
    steps: usize,
    /// Candidates wanted.
    wanted: usize,
    /// Candidates made.
    made: usize,
    /// The best so far and its score.
    best: Option<(f64, ActionChunk)>,
    stages: Vec<StageTime>,
    denoised: usize,
}

impl BestOf {
    /// `policy`, sampled up to `count` times a chunk; the first `past` actions of its chunks lie in the past.
    ///
    /// # Errors
    /// [`PolicyError::Unsupported`] for no candidates, or past actions that are the whole chunk or not of the states' kind.
    pub fn new(
        policy: Box<dyn Policy>,
        verifier: Box<dyn Verifier>,
        count: usize,
        past: usize,
    ) -> Result<Self, PolicyError> {
        let inner = policy.spec();
        if count == 0 {
            return Err(PolicyError::Unsupported("zero candidates"));
        }
        if past >= inner.action_horizon {
            return Err(PolicyError::Unsupported("a chunk of past actions alone"));
        }
        if past > 0 && inner.state_dim != inner.action_dim {
            return Err(PolicyError::Unsupported("past actions that are not what is measured"));
        }
        let spec = PolicySpec {
            denoise_steps: inner.denoise_steps.saturating_mul(count),
            action_horizon: inner.action_horizon - past,
            ..inner.clone()
        };
        let (observed, previous) = (VecDeque::with_capacity(OBSERVED), None);
        Ok(Self { policy, verifier, count, past, spec, observed, previous, run: None })
    }

    /// Takes the finished candidate and keeps it if it is better.
    fn judge(&mut self) -> Result<(), PolicyError> {
        let Some(run) = &mut self.run else {
            return Err(NOTHING_BEGUN);
        };
        let mut candidate = self.policy.take_chunk()?;
        run.made += 1;
        let report = std::mem::take(&mut candidate.report);
        run.denoised += report.denoise_steps;
        for stage in &report.stages {
            match run.stages.iter_mut().find(|s| s.stage == stage.stage) {
                Some(sum) => sum.time += stage.time,
                None => run.stages.push(stage.clone()),
            }
        }
        let context = Context {
            observation: &run.observation,
            request: &run.request,
            previous: self.previous.as_ref(),
            observed: &self.observed,
        };
        let score = self.verifier.score(&candidate, &context)?;
        candidate.report = report;
        if score.is_finite() && run.best.as_ref().is_none_or(|b| score < b.0) {
            run.best = Some((score, candidate));
        }
        Ok(())
    }

    /// Begins the next candidate, from what the last one saw where the head can.
    fn next(&mut self) -> Result<(), PolicyError> {
        let Some(run) = &self.run else {
            return Err(NOTHING_BEGUN);
        };
        let request = run.candidate();
        if !self.policy.resample(&request)? {
            self.policy.begin(&run.observation, &request)?;
        }
        Ok(())
    }
}

impl Run {
    /// The request of the next candidate: noise of its own, and its share of the steps.
    fn candidate(&self) -> ChunkRequest {
        // The first one's noise is the request's, so one candidate is the plain policy.
        let seed = match self.made {
            0 => self.request.seed,
            n => SplitMix64::new(self.request.seed ^ ((n as u64) << 32)).next_u64(),
        };
        ChunkRequest { denoise_steps: Some(self.steps), seed, ..self.request.clone() }
    }
}

impl Policy for BestOf {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let own = self.policy.spec().denoise_steps.max(1);
        // A warm start needs its share of the steps only.
        let share = match request.prefix.as_ref().map(|p| p.usage) {
            Some(PrefixUse::WarmStart { time }) => time.clamp(0.0, 1.0),
            _ => 1.0,
        };
        let each = ((own as f64 * share).ceil() as usize).max(1);
        let total = request.denoise_steps.unwrap_or(each.saturating_mul(self.count));
        let wanted = (total / each).clamp(1, self.count);
        let run = Run {
            observation: observation.clone(),
            request: request.clone(),
            steps: each.min(total),
            wanted,
            made: 0,
            best: None,
            stages: Vec::new(),
            denoised: 0,
        };
        // A time that goes back is another run's.
        if self.observed.back().is_some_and(|o| o.0 >= observation.instant) {
            self.observed.clear();
            self.previous = None;
        }
        if self.observed.len() == OBSERVED {
            self.observed.pop_front();
        }
        self.observed.push_back((observation.instant, observation.proprioception.clone()));
        let first = run.candidate();
        self.run = Some(run);
        self.policy.begin(observation, &first)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if run.made >= run.wanted {
            return Ok(Progress::Done);
        }
        let (wanted, steps) = (run.wanted, run.steps);
        match self.policy.advance()? {
            Progress::Step { stage, done, total, denoised, next_denoises } => {
                let done = done + run.made * steps;
                let total = total + (wanted - 1) * steps;
                // Later candidates may look at the images again; for the planner that is part of their steps.
                let next_denoises = next_denoises || run.made > 0;
                Ok(Progress::Step { stage, done, total, denoised, next_denoises })
            }
            Progress::Done => {
                self.judge()?;
                let made = self.run.as_ref().map_or(wanted, |r| r.made);
                if made >= wanted {
                    return Ok(Progress::Done);
                }
                self.next()?;
                let (done, total) = (made * steps, wanted * steps);
                let (denoised, next_denoises) = (true, true);
                Ok(Progress::Step { stage: "candidate", done, total, denoised, next_denoises })
            }
        }
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|r| r.made >= r.wanted).ok_or(NOT_DONE)?;
        let Some((score, best)) = run.best else {
            return Err(PolicyError::NotFinite { what: "verifier's score" });
        };
        let dim = best.dim();
        let rest = best.values().get(self.past * dim..).unwrap_or_default().to_vec();
        let mut chunk =
            ActionChunk::new(run.request.id, best.instant, best.dt, dim, rest).map_err(compute)?;
        chunk.report = best.report;
        chunk.report.stages = run.stages;
        chunk.report.denoise_steps = run.denoised;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let made = CacheUse {
            lookups: count(self.count),
            hits: count(run.made),
            error: Some(score),
            ..CacheUse::default()
        };
        chunk.report.caches.push(("candidates", made));
        self.previous = Some(chunk.clone());
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if run.made > 0 || steps == 0 {
            return Ok(false);
        }
        if steps < run.steps {
            if !self.policy.set_denoise_steps(steps)? {
                return Ok(false);
            }
            run.steps = steps;
        }
        run.wanted = (steps / run.steps).clamp(1, self.count);
        Ok(true)
    }

    fn forget(&mut self) {
        self.policy.forget();
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        if run.best.is_some() {
            run.wanted = run.made;
            return Ok(true);
        }
        if run.made > 0 || !self.policy.finish_early()? {
            return Ok(false);
        }
        run.wanted = 1;
        self.judge()?;
        Ok(true)
    }
}
