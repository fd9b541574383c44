//! How a policy's network computes and where, in a launch file's `[policy]`.

use serde::Serialize;
use sinew_models::kernels::Compute;
use sinew_models::kernels::pool::Threads;

use super::checker::Checker;
use super::schema;

/// The most kernel threads that make sense to ask for.
const MOST_THREADS: usize = 256;

/// Arithmetic and threads of a policy's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KernelSettings {
    /// How layers compute.
    pub compute: Compute,
    /// Threads, the policy's own included; `None`: one for each core.
    pub threads: Option<usize>,
    /// Cores of the worker threads; empty: all but the control thread's, or any where that has none of its own.
    pub cores: Vec<usize>,
}

impl KernelSettings {
    /// The threads to choose, with the control thread on core `control`.
    pub fn threads(&self, control: Option<usize>) -> Threads {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = match control {
            Some(core) if self.cores.is_empty() && all > 1 => {
                (0..all).filter(|c| *c != core).collect()
            }
            _ => self.cores.clone(),
        };
        Threads { count: self.threads, cores }
    }
}

pub(super) fn resolve(check: &mut Checker, policy: &schema::Policy) -> KernelSettings {
    let mut settings = KernelSettings::default();
    if let Some(at) = &policy.compute {
        check.one_of("policy.compute", at, &[Compute::Exact, Compute::Int8].map(Compute::name));
        settings.compute = at.get_ref().parse().unwrap_or_default();
    }
    if let Some(at) = &policy.threads {
        if !(1..=MOST_THREADS).contains(at.get_ref()) {
            let remedy = "leave it out for one on each core";
            check.report("policy.threads", at, format!("must be 1 to {MOST_THREADS}"), remedy);
        }
        settings.threads = Some(*at.get_ref());
    }
    if let Some(at) = &policy.cores {
        settings.cores.clone_from(at.get_ref());
    }
    settings
}
