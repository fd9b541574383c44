//! The wrappers around the policy: candidates and memory.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use sinew_models::wrappers::{
    BestOf, Coherence, Encoder, Episode, Glance, Memory, PastActions, Recall, RecallConfig, Shape,
    Verifier,
};
use sinew_runtime::{ActionKind, Policy, PolicyError};

use crate::launch_file::{CandidateSettings, Finding, LaunchConfig, MemorySettings, VerifierKind};
use crate::run::sums;

/// `policy`, sampled as often as `settings` say.
///
/// # Errors
/// What the head cannot do.
pub(crate) fn with_candidates(
    policy: Box<dyn Policy>,
    settings: Option<&CandidateSettings>,
) -> Result<Box<dyn Policy>, PolicyError> {
    let Some(CandidateSettings { count, verifier, past }) = settings.copied() else {
        return Ok(policy);
    };
    let verifier: Box<dyn Verifier> = match verifier {
        VerifierKind::Coherence => Box::new(Coherence::default()),
        VerifierKind::PastActions => Box::new(PastActions { rows: past }),
    };
    Ok(Box::new(BestOf::new(policy, verifier, count, past)?))
}

/// What the run adds to its memory, and where it is kept.
#[derive(Debug, Clone)]
pub struct Successes {
    /// The episode under way, and what is kept.
    pub episode: Episode,
    /// The memory's file.
    pub file: PathBuf,
}

/// A policy with its memory, and what the run adds to that.
type Remembering = (Box<dyn Policy>, Option<Successes>);

/// `policy` with its memory, when it has one; what the run adds to it.
///
/// # Errors
/// A file that cannot be used, or a head that cannot start from a guess.
pub(crate) fn with_memory(
    policy: Box<dyn Policy>,
    config: &LaunchConfig,
    kinds: &[ActionKind],
) -> Result<Remembering, Box<Finding>> {
    let Some(settings) = &config.policy.sampling.memory else { return Ok((policy, None)) };
    let MemorySettings { file, records, similarity } = settings;
    let wrong = |problem: String, remedy: &str| {
        Box::new(config.finding("policy.memory", file.display(), problem, remedy))
    };
    let spec = policy.spec();
    let encoder = Glance::new(spec.cameras.clone(), spec.state_dim);
    let shape = Shape {
        policy: identity(&config.policy.file).map_err(|e| wrong(e, "check the policy's files"))?,
        encoder: encoder.name(),
        features: encoder.width(),
        horizon: spec.action_horizon,
        dim: spec.action_dim,
    };
    let memory = Memory::open(file, shape, *records)
        .map_err(|e| wrong(e.to_string(), "name a file of its own for every policy"))?;
    let episode = Episode::new(memory.clone());
    let config = RecallConfig { similarity: *similarity, ..RecallConfig::default() };
    let wrapped = Recall::new(
        policy,
        memory,
        Box::new(encoder),
        kinds.to_vec(),
        config,
        Some(episode.clone()),
    )
    .map_err(|e| wrong(e.to_string(), "leave it out"))?;
    Ok((Box::new(wrapped), Some(Successes { episode, file: file.clone() })))
}

/// What changes with the policy: the SHA-256 of its files' sums.
fn identity(policy: &Path) -> Result<String, String> {
    let sums = sums(policy).map_err(|e| format!("{}: {e}", policy.display()))?;
    let mut all = Sha256::new();
    sums.values().for_each(|sum| all.update(sum));
    Ok(all.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
}
