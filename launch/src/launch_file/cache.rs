//! The caches in a launch file's `[policy]`: what of an inference need not be computed again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sinew_models::caches::{CacheOptions, CompareConfig, DenoiserCache, VisionConfig};
use sinew_models::exits::EarlyExit;
use sinew_runtime::ActionKind;
use toml::Spanned;

use super::checker::Checker;
use super::schema;

/// Caches of the policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CacheSettings {
    /// The schedule of the denoiser's cache; `None`: every step computes all.
    pub denoiser: Option<PathBuf>,
    /// Whether chunks start from the one before.
    #[serde(default)]
    pub warm_start: bool,
    /// Patches of a picture whose pixels are at least so alike are kept; `None`: all are computed.
    #[serde(default)]
    pub vision: Option<f64>,
    /// Inferences from one whole picture to the next; `None` for the default.
    #[serde(default)]
    pub vision_refresh: Option<u32>,
    /// Whether tokens of the prefix are kept, too.
    #[serde(default)]
    pub prefix: bool,
    /// Caches are used only when an inference without them would come too late.
    #[serde(default)]
    pub when_short: bool,
    /// The early exits' file; `None`: every inference goes through all layers.
    #[serde(default)]
    pub early_exit: Option<PathBuf>,
    /// Share of the reuses that are compared with what they stand for; `None` for the default.
    pub check: Option<f64>,
    /// Errors above so many times what calibration measured close a cache; `None` for the default.
    pub tolerance: Option<f64>,
    /// Every so many chunks one is made without caches, too, and compared; `None`: none is.
    #[serde(default)]
    pub compare: Option<u32>,
    /// Error of a chunk above which all caches close; `None` for the default.
    #[serde(default)]
    pub compare_limit: Option<f64>,
}

/// Error of a compared chunk (in the network's units, of which actions are about one) above which caches close.
const COMPARE_LIMIT: f64 = 0.25;

impl CacheSettings {
    /// For loading a policy whose actions are of `kinds`.
    pub fn options(&self, kinds: &[ActionKind]) -> CacheOptions {
        let denoiser = self.denoiser.clone().map_or(DenoiserCache::Off, DenoiserCache::File);
        let default = VisionConfig::default();
        let refresh = self.vision_refresh.unwrap_or(default.refresh);
        let prefix = self.prefix;
        let config = |similarity| VisionConfig { similarity, refresh, prefix, ..default };
        let vision = self.vision.map(config);
        let warm_start = self.warm_start.then(|| kinds.to_vec());
        let Self { check, tolerance, .. } = *self;
        let limit = self.compare_limit.unwrap_or(COMPARE_LIMIT);
        let compare = self.compare.map(|every| CompareConfig { every, limit });
        let early_exit = self.early_exit.clone().map_or(EarlyExit::Off, EarlyExit::File);
        CacheOptions { denoiser, warm_start, vision, early_exit, check, tolerance, compare }
    }
}

pub(super) fn resolve(
    check: &mut Checker<'_>,
    policy: &schema::Policy,
    folder: &Path,
    policy_here: bool,
) -> CacheSettings {
    let denoiser = policy.cache_denoiser.as_ref().map(|at| {
        let file = folder.join(at.get_ref());
        if policy_here && !file.is_file() {
            let remedy = "make it with `sinew calibrate cache`";
            check.report("policy.cache_denoiser", at, "there is no such file", remedy);
        }
        file
    });
    let early_exit = policy.early_exit.as_ref().map(|at| {
        check.note("policy.early_exit", at);
        folder.join(at.get_ref())
    });
    let mut within = |key: &str, at: &Option<Spanned<f64>>, least: f64, most: f64, remedy: &str| {
        let at = at.as_ref()?;
        if !(least..=most).contains(at.get_ref()) {
            check.report(key, at, format!("must be {least} to {most}"), remedy);
        }
        Some(*at.get_ref())
    };
    let remedy = "0.02 compares one reuse in fifty";
    let share = within("policy.cache_check", &policy.cache_check, 0.0, 1.0, remedy);
    let remedy = "2.0 allows twice the error of the calibration";
    let tolerance = within("policy.cache_tolerance", &policy.cache_tolerance, 0.1, 100.0, remedy);
    let remedy = "0.996 is what is published; nearer to 1 keeps less";
    let vision = within("policy.cache_vision", &policy.cache_vision, 0.5, 1.0, remedy);
    let remedy = "0.25 is a quarter of what actions vary by";
    let limit = &policy.cache_compare_limit;
    let compare_limit = within("policy.cache_compare_limit", limit, 1e-4, 10.0, remedy);
    let compare = policy.cache_compare.as_ref().map(|at| {
        let count = u32::try_from(*at.get_ref()).unwrap_or(u32::MAX);
        if !(1..=100_000).contains(&count) {
            let remedy = "50 compares one chunk in fifty";
            check.report("policy.cache_compare", at, "must be 1 to 100000", remedy);
        }
        count
    });
    let vision_refresh = policy.cache_vision_refresh.as_ref().map(|at| {
        let count = u32::try_from(*at.get_ref()).unwrap_or(u32::MAX);
        if !(1..=1000).contains(&count) {
            let remedy = "1 computes every picture whole";
            check.report("policy.cache_vision_refresh", at, "must be 1 to 1000", remedy);
        }
        count
    });
    let when_short = policy.cache_when.as_ref().is_some_and(|at| {
        check.one_of("policy.cache_when", at, &["always", "short-of-time"]);
        at.get_ref() == "short-of-time"
    });
    let warm_start = policy.cache_warm_start;
    let prefix = policy.cache_prefix.as_ref().filter(|at| *at.get_ref());
    // A key that changes nothing is a mistake.
    if denoiser.is_none() {
        idle(check, "cache_check", &policy.cache_check, "cache_denoiser");
        idle(check, "cache_tolerance", &policy.cache_tolerance, "cache_denoiser");
    }
    if vision.is_none() {
        idle(check, "cache_vision_refresh", &policy.cache_vision_refresh, "cache_vision");
        idle(check, "cache_prefix", &prefix, "cache_vision");
    }
    if compare.is_none() {
        idle(check, "cache_compare_limit", limit, "cache_compare");
    }
    if denoiser.is_none() && vision.is_none() && early_exit.is_none() && !warm_start {
        let what = "cache that it is about";
        idle(check, "cache_compare", &policy.cache_compare, what);
        let when = policy.cache_when.as_ref().filter(|_| when_short);
        idle(check, "cache_when", &when, what);
    }
    CacheSettings {
        denoiser,
        warm_start,
        vision,
        vision_refresh,
        prefix: prefix.is_some(),
        early_exit,
        when_short,
        check: share,
        tolerance,
        compare,
        compare_limit,
    }
}

/// Reports `key`, if it is there, as one that needs `needed`.
fn idle<T, A: std::borrow::Borrow<Spanned<T>>>(
    check: &mut Checker<'_>,
    key: &str,
    at: &Option<A>,
    needed: &str,
) {
    if let Some(at) = at {
        let problem = format!("changes nothing: there is no {needed}");
        let remedy = "set that, or leave this out";
        check.report(&format!("policy.{key}"), at.borrow(), problem, remedy);
    }
}
