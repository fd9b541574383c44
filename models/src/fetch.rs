//! Downloading checkpoints from the model hub.

use std::path::Path;

use crate::ModelError;

/// Files of a checkpoint folder; training states and videos stay where they are.
#[cfg(feature = "hub")]
const PATTERNS: [&str; 3] = ["*.json", "*.safetensors", "vlm/*.json"];

/// Downloads the checkpoint `repository` (such as `lerobot/smolvla_base`) into the folder `out`.
///
/// A SmolVLA checkpoint does not hold its tokenizer: when none came with it, the tokenizer of the
/// vision-language model that its `config.json` names is downloaded beside it.
///
/// # Errors
/// [`ModelError::Fetch`] with the reason: no network, no such repository, or a build without `hub`.
#[cfg(feature = "hub")]
pub fn fetch(repository: &str, out: &Path) -> Result<(), ModelError> {
    use hf_hub::HFClientSync;
    let fail = |what: &str, e: &dyn std::fmt::Display| {
        ModelError::Fetch(format!(
            "{what} cannot be downloaded: {e}; check the name and the network, or copy the checkpoint \
             folder from a machine that has it"
        ))
    };
    let client = HFClientSync::new().map_err(|e| fail(repository, &e))?;
    let (owner, name) = split(repository)?;
    client
        .model(owner, name)
        .snapshot_download()
        .allow_patterns(PATTERNS.iter().map(|p| (*p).to_owned()).collect())
        .local_dir(out.to_owned())
        .send()
        .map_err(|e| fail(repository, &e))?;
    let config_path = out.join("config.json");
    let text =
        std::fs::read_to_string(&config_path).map_err(|e| ModelError::io(&config_path, e))?;
    let config: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| ModelError::config(&config_path, "the file", format!("is no JSON: {e}")))?;
    let Some(vlm) = config.get("vlm_model_name").and_then(serde_json::Value::as_str) else {
        return Ok(());
    };
    let has_tokenizer = ["tokenizer.json", "vlm/tokenizer.json", "tokenizer/tokenizer.json"]
        .iter()
        .any(|file| out.join(file).is_file());
    if !has_tokenizer {
        let (owner, name) = split(vlm)?;
        client
            .model(owner, name)
            .download_file()
            .filename("tokenizer.json")
            .local_dir(out.to_owned())
            .send()
            .map_err(|e| fail(&format!("{vlm}/tokenizer.json"), &e))?;
    }
    Ok(())
}

/// Downloads the checkpoint `repository` into the folder `out`; this build cannot.
///
/// # Errors
/// Always [`ModelError::Fetch`], which says how to build with downloading.
#[cfg(not(feature = "hub"))]
pub fn fetch(repository: &str, out: &Path) -> Result<(), ModelError> {
    split(repository)?;
    Err(ModelError::Fetch(format!(
        "this build cannot download {repository} into {}; build with `cargo build --release --features \
         hub`, or copy the checkpoint folder from a machine that has it",
        out.display()
    )))
}

fn split(repository: &str) -> Result<(&str, &str), ModelError> {
    repository
        .split_once('/')
        .filter(|(owner, name)| !owner.is_empty() && !name.is_empty() && !name.contains('/'))
        .ok_or_else(|| {
            ModelError::Fetch(format!(
                "`{repository}` is no repository name; write it like lerobot/smolvla_base"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names_have_two_parts() {
        assert!(split("lerobot/smolvla_base").is_ok());
        for bad in ["smolvla_base", "/x", "a/", "a/b/c"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_the_error_says_how_to_build() {
        let e = fetch("lerobot/smolvla_base", Path::new("x")).expect_err("it cannot").to_string();
        assert!(e.contains("--features hub"), "{e}");
    }
}
