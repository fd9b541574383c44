//! Who says which candidate is best.

use std::collections::VecDeque;

use sinew_runtime::{ActionChunk, ChunkRequest, Observation, PolicyError, Stamp};

/// What a verifier may look at beside the candidate.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// What the candidates were made from.
    pub observation: &'a Observation,
    /// What was asked for, the plan included where the strategy gives one.
    pub request: &'a ChunkRequest,
    /// The chunk that was chosen last time.
    pub previous: Option<&'a ActionChunk>,
    /// The newest measured states, oldest first: instant and values as the policy sees them.
    pub observed: &'a VecDeque<(Stamp, Vec<f64>)>,
}

/// Scores candidates. A user's own, such as a learned critic, is one more implementation.
pub trait Verifier: Send {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// How bad `candidate` is: the lowest score wins, the first of equals; one that is not finite never does.
    ///
    /// # Errors
    /// Its own failure ends the inference.
    fn score(&mut self, candidate: &ActionChunk, context: &Context<'_>)
    -> Result<f64, PolicyError>;
}

/// Chooses the candidate that goes on with what was decided before: the backward coherence of bidirectional
/// decoding (arXiv 2408.17355), `Σ wᵢ |aᵢ − priorᵢ|` with weights falling like `decayⁱ`.
///
/// The prior is the plan, where the scheduler's strategy gives it to the policy, else the chunk chosen last on the
/// instants that both cover. Without either every candidate scores zero, so the first wins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coherence {
    /// Weight of an action against the one before, above 0 and at most 1.
    pub decay: f64,
}

impl Default for Coherence {
    /// 0.5, as the reference's run scripts have it.
    fn default() -> Self {
        Self { decay: 0.5 }
    }
}

impl Verifier for Coherence {
    fn name(&self) -> &'static str {
        "coherence"
    }

    fn score(
        &mut self,
        candidate: &ActionChunk,
        context: &Context<'_>,
    ) -> Result<f64, PolicyError> {
        let dim = candidate.dim();
        let planned = context.request.prefix.as_ref().filter(|p| p.dim == dim);
        let mut sum = 0.0;
        let mut weights = 0.0;
        let mut weight = 1.0;
        for (k, action) in candidate.values().chunks_exact(dim).enumerate() {
            let prior = match planned {
                Some(plan) => plan.actions.chunks_exact(dim).nth(k).map(<[f64]>::to_vec),
                None => {
                    let at =
                        candidate.instant + candidate.dt * u32::try_from(k).unwrap_or(u32::MAX);
                    context.previous.filter(|p| p.dim() == dim).and_then(|p| between(p, at))
                }
            };
            let Some(prior) = prior else { break };
            sum += weight * distance(action, &prior);
            weights += weight;
            weight *= self.decay;
        }
        Ok(if weights > 0.0 { sum / weights } else { 0.0 })
    }
}

/// Self-verification of heads that predict past actions too (arXiv 2505.09561): the first `rows` actions of a chunk
/// lie before the observation, and the candidate wins whose past is what happened.
///
/// What happened is what was measured, so states and actions must be of one kind. Between two observations, which
/// are as far apart as two inferences, it is interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PastActions {
    /// Past actions in a chunk; [`super::BestOf`] cuts them off the chunk that it gives.
    pub rows: usize,
}

impl Verifier for PastActions {
    fn name(&self) -> &'static str {
        "past actions"
    }

    fn score(
        &mut self,
        candidate: &ActionChunk,
        context: &Context<'_>,
    ) -> Result<f64, PolicyError> {
        let dim = candidate.dim();
        let mut sum = 0.0;
        for (k, action) in candidate.values().chunks_exact(dim).take(self.rows).enumerate() {
            let before = candidate.dt * u32::try_from(self.rows - k).unwrap_or(u32::MAX);
            if let Some(done) = measured(context.observed, candidate.instant - before, dim) {
                sum += distance(action, &done);
            }
        }
        Ok(sum)
    }
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn mix(a: &[f64], b: &[f64], share: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + (b - a) * share).collect()
}

/// The action of `chunk` at `at`, on the line between two of them; `None` outside.
fn between(chunk: &ActionChunk, at: Stamp) -> Option<Vec<f64>> {
    let x = at.seconds_from(chunk.instant) / chunk.dt.as_secs_f64();
    let last = chunk.horizon().checked_sub(1)? as f64;
    // A stamp is whole nanoseconds: a hair outside is on the edge.
    if !(-1e-6..=last + 1e-6).contains(&x) {
        return None;
    }
    let x = x.clamp(0.0, last);
    let (a, b) = (chunk.action(x.floor() as usize)?, chunk.action(x.ceil() as usize)?);
    Some(mix(a, b, x.fract()))
}

/// The measured state at `at`, on the line between two observations; `None` outside or of another width.
fn measured(observed: &VecDeque<(Stamp, Vec<f64>)>, at: Stamp, dim: usize) -> Option<Vec<f64>> {
    let after = observed.iter().position(|o| o.0 >= at)?;
    let (end, b) = &observed[after];
    if *end == at {
        return (b.len() == dim).then(|| b.clone());
    }
    let (start, a) = observed.get(after.checked_sub(1)?)?;
    let share = at.seconds_from(*start) / end.seconds_from(*start);
    (a.len() == dim && b.len() == dim).then(|| mix(a, b, share))
}
