//! Downloading checkpoints from the model hub; a build without the feature `hub` says how to get it.

use std::path::Path;

use crate::ModelError;

/// Downloads the checkpoint `repository` (such as `lerobot/smolvla_base`) into the folder `dir`.
///
/// # Errors
/// [`ModelError::Fetch`] with the remedy: offline, no such repository, or a build without the feature.
#[cfg(not(feature = "hub"))]
pub fn fetch(repository: &str, dir: &Path) -> Result<(), ModelError> {
    Err(ModelError::Fetch(format!(
        "cannot fetch `{repository}` into {}: this build cannot download; build it with \
         `cargo build --release --features hub`, or copy the folder there by hand",
        dir.display()
    )))
}

/// Downloads the checkpoint `repository` (such as `lerobot/smolvla_base`) into the folder `dir`.
///
/// # Errors
/// [`ModelError::Fetch`] with the remedy: offline, or no such repository.
#[cfg(feature = "hub")]
pub fn fetch(repository: &str, dir: &Path) -> Result<(), ModelError> {
    let fail = |e: &dyn std::fmt::Display| {
        ModelError::Fetch(format!(
            "cannot fetch `{repository}` into {}: {e}; check the repository's name and the network, \
             or copy the folder there by hand",
            dir.display()
        ))
    };
    let (owner, name) = repository
        .split_once('/')
        .ok_or_else(|| fail(&"a repository is written owner/name"))?;
    let client = hf_hub::HFClientSync::new().map_err(|e| fail(&e))?;
    client
        .model(owner, name)
        .snapshot_download()
        .local_dir(dir.to_owned())
        .send()
        .map(|_| ())
        .map_err(|e| fail(&e))
}
