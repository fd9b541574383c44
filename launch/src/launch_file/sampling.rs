//! Candidates and memory in a launch file's `[policy]`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sinew_models::heads::flow::Solver;
use toml::Spanned;

use super::checker::Checker;
use super::schema;

/// Who chooses among candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifierKind {
    /// The one that goes on with what was decided before.
    Coherence,
    /// The one whose past actions are what was measured.
    PastActions,
}

const VERIFIERS: [(&str, VerifierKind); 2] =
    [("coherence", VerifierKind::Coherence), ("past_actions", VerifierKind::PastActions)];

/// Names of what `policy.solver` may be.
const SOLVERS: [(&str, Solver); 2] = [("euler", Solver::Euler), ("midpoint", Solver::Midpoint)];

/// Several candidates a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateSettings {
    /// Candidates, at most.
    pub count: usize,
    /// Who chooses.
    pub verifier: VerifierKind,
    /// Actions at the start of the head's chunks that lie before the observation.
    pub past: usize,
}

/// A memory of successes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemorySettings {
    /// Its file.
    pub file: PathBuf,
    /// Records in it, at most.
    pub records: usize,
    /// Observations less alike than this (cosine) are another situation.
    pub similarity: f64,
}

/// How chunks are sampled beside the head's own way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplingSettings {
    /// How a denoise step follows the velocity, in flow-matching policies; `None`: as the policy does by itself.
    pub solver: Option<Solver>,
    /// Chunks go on from what is left of the one before.
    pub streaming: bool,
    /// `None`: one sample is the chunk.
    pub candidates: Option<CandidateSettings>,
    /// `None`: nothing is remembered.
    pub memory: Option<MemorySettings>,
}

pub(super) fn resolve(
    check: &mut Checker<'_>,
    policy: &schema::Policy,
    folder: &Path,
) -> SamplingSettings {
    let mut bounded = |key: &'static str, at: &Option<Spanned<usize>>, most: usize| {
        let at = at.as_ref()?;
        check.note(key, at);
        if !(1..=most).contains(at.get_ref()) {
            check.report(key, at, format!("must be 1 to {most}"), "leave it out for none");
        }
        Some(*at.get_ref())
    };
    let count = bounded("policy.candidates", &policy.candidates, 64);
    let past = bounded("policy.past_actions", &policy.past_actions, 64).unwrap_or(0);
    let records = bounded("policy.memory_records", &policy.memory_records, 100_000);
    if let Some(at) = policy.candidates.as_ref().filter(|at| policy.streaming && *at.get_ref() > 1)
    {
        let problem = "do not go with streaming: its buffer goes on from one chunk";
        check.report("policy.candidates", at, problem, "leave one of them out");
    }
    let mut verifier = VerifierKind::Coherence;
    if let Some(at) = &policy.verifier {
        check.note("policy.verifier", at);
        check.one_of("policy.verifier", at, &VERIFIERS.map(|v| v.0));
        verifier = VERIFIERS.iter().find(|v| v.0 == at.get_ref()).map_or(verifier, |v| v.1);
        if verifier == VerifierKind::PastActions && past == 0 {
            let remedy =
                "say with past_actions how many actions of a chunk lie before the observation";
            check.report("policy.verifier", at, "needs past actions", remedy);
        }
    }
    let solver = policy.solver.as_ref().and_then(|at| {
        check.one_of("policy.solver", at, &SOLVERS.map(|s| s.0));
        SOLVERS.iter().find(|s| s.0 == at.get_ref()).map(|s| s.1)
    });
    let similarity = policy.memory_similarity.as_ref().map_or(0.98, |at| {
        if !(0.0..1.0).contains(at.get_ref()) {
            let remedy = "0.98 is a start; nearer to 1 is more alike";
            check.report("policy.memory_similarity", at, "must be 0 to below 1", remedy);
        }
        *at.get_ref()
    });
    let memory = policy.memory.as_ref().map(|at| {
        check.note("policy.memory", at);
        let (file, records) = (folder.join(at.get_ref()), records.unwrap_or(5000));
        MemorySettings { file, records, similarity }
    });
    // Another verifier's heads have no past to cut off.
    let past = if verifier == VerifierKind::PastActions { past } else { 0 };
    let candidates =
        count.or((past > 0).then_some(1)).map(|count| CandidateSettings { count, verifier, past });
    SamplingSettings { solver, streaming: policy.streaming, candidates, memory }
}
