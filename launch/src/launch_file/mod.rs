//! Launch files: TOML with arguments, units in the values, and every mistake found before anything moves.

mod action_space;
mod args;
mod authority;
mod cache;
mod checker;
mod finding;
mod kernels;
mod resolve;
mod sampling;
mod scheduling;
mod schema;
mod settings;
mod space;

pub use action_space::ActionSettings;
pub use args::{Argument, Override};
pub use authority::{Addresses, AuthoritySettings, addresses};
pub use cache::CacheSettings;
pub use finding::{Finding, Findings};
pub use kernels::KernelSettings;
pub use sampling::{CandidateSettings, MemorySettings, SamplingSettings, VerifierKind};
pub use scheduling::what_if_settings;
pub use schema::KEYS;
pub use settings::{
    CameraConfig, ControlSettings, LaunchConfig, PolicySettings, RecordSettings, ResidualSettings,
    RobotConfig, RunSettings,
};
pub use space::{HalfSpace, SpaceSettings};

use std::path::Path;

/// Reads `file` with `overrides` and resolves it: units read, paths made relative to the file's folder.
///
/// # Errors
/// All findings in one go; only a file that is no TOML, or has unknown keys, stops at the first.
pub fn load(file: &Path, overrides: &[Override]) -> Result<LaunchConfig, Findings> {
    load_part(file, overrides, true)
}

/// As [`load`], for a computer that only needs the policy's file when `policy_here`.
///
/// # Errors
/// As [`load`].
pub fn load_part(
    file: &Path,
    overrides: &[Override],
    policy_here: bool,
) -> Result<LaunchConfig, Findings> {
    let text = read(file)?;
    let (text, arguments) = args::apply(file, &text, overrides)?;
    let parsed = schema::parse(file, &text)?;
    resolve::resolve(file, &text, parsed, arguments, policy_here)
}

fn read(file: &Path) -> Result<String, Findings> {
    std::fs::read_to_string(file).map_err(|e| {
        Findings::one(Finding::of_file(file, format!("cannot be read: {e}"), "check the path"))
    })
}
