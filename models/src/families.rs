//! The policy families that can be loaded: one line each.
//!
//! A family is a backbone, a head and the processors around them. Its folder holds the network and the
//! [`Policy`]; what the checkpoint's reader must know of it stands in its [`Family`].

use std::path::{Path, PathBuf};

use serde_json::Value;
use sinew_runtime::{Policy, PrefixSupport};

use crate::caches::Reusable;
use crate::checkpoint::{ActionInfo, Checkpoint, StoredType};
use crate::{LoadOptions, ModelError, act, diffusion, masked, oft, pi, smolvla, xvla};

/// Every family, in the order in which they are listed.
pub static FAMILIES: &[&Family] = &[
    &smolvla::FAMILY,
    &pi::PI0,
    &pi::PI05,
    &pi::PI0_FAST,
    &xvla::FAMILY,
    &masked::FAMILY,
    &oft::FAMILY,
    &act::FAMILY,
    &diffusion::FAMILY,
];

/// A text file that a family needs beside `config.json`; a bundle carries it under `sinew.ROLE`.
pub struct Extra {
    /// What it is: `vlm_config`, `tokenizer`.
    pub role: &'static str,
    /// Where it may lie in the checkpoint folder, the first that exists counts; by `config.json`.
    pub candidates: fn(&Value) -> Vec<PathBuf>,
    /// What stands in for a missing file; by `config.json`.
    pub built_in: fn(&Value) -> Option<&'static str>,
    /// What to do when it is missing; none: it may be.
    pub remedy: Option<&'static str>,
}

/// How a bundle stores a tensor that is not simply quantised, and why.
pub type Keep = Option<(StoredType, &'static str)>;

/// Builds a policy.
pub type Load = fn(&Checkpoint, &LoadOptions) -> Result<Box<dyn Policy>, ModelError>;

/// A policy family.
pub struct Family {
    /// `type` in `config.json`.
    pub name: &'static str,
    /// What sees and reads.
    pub backbone: &'static str,
    /// What makes actions.
    pub head: &'static str,
    /// Reference that its numbers are compared with, and how close they are.
    pub proof: &'static str,
    /// The checkpoint's name prefixes and ours; the longest that fits counts. Ours are short: readers of
    /// bundles cut names at 64 bytes.
    pub names: &'static [(&'static str, &'static str)],
    /// Whether inference leaves out the tensor of our name.
    pub unused: fn(&str) -> bool,
    /// Text files beside `config.json`.
    pub extras: &'static [Extra],
    /// How a bundle keeps the tensor of our name; none: as asked for.
    pub keep: fn(&str) -> Keep,
    /// What the head can do with planned actions, in a checkpoint that says this of its training.
    pub planned: fn(&ActionInfo) -> PrefixSupport,
    /// Whether a denoise step follows a velocity, which [`LoadOptions::solver`] says how.
    pub follows_velocity: bool,
    /// Whether some of its checkpoints can go on from what is left of the last chunk ([`LoadOptions::streaming`]).
    pub streams: bool,
    /// What of it can be kept in caches.
    pub caches: Reusable,
    /// Sizes of the network, for people.
    pub sizes: fn(&Checkpoint) -> Result<Value, ModelError>,
    /// Builds the policy.
    pub load: Load,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// The family called `name`; `path` is for the message.
///
/// # Errors
/// [`ModelError::UnknownArchitecture`], naming those there are.
pub fn find(name: &str, path: &Path) -> Result<&'static Family, ModelError> {
    FAMILIES.iter().copied().find(|family| family.name == name).ok_or_else(|| {
        let (path, found) = (path.to_owned(), name.to_owned());
        ModelError::UnknownArchitecture { path, found }
    })
}

/// The family that `config`, the text of a `config.json`, names.
///
/// # Errors
/// [`ModelError::Config`] when it names none, [`ModelError::UnknownArchitecture`].
pub fn of_config(path: &Path, config: &Value) -> Result<&'static Family, ModelError> {
    let kind = config.get("type").and_then(Value::as_str).ok_or_else(|| {
        ModelError::config(path, "type", "is missing; it names the policy, such as `smolvla`")
    })?;
    find(kind, path)
}

impl Family {
    /// Our name of the tensor that a checkpoint calls `name`.
    ///
    /// `_orig_mod` (weights saved while compiled) is cut out, and a missing leading `model.` is supplied.
    pub fn short_name(&self, name: &str) -> String {
        let mut name = name.replace("._orig_mod", "");
        if !name.starts_with("model.") {
            name.insert_str(0, "model.");
        }
        let fits = self.names.iter().filter(|(long, _)| name.starts_with(long));
        match fits.max_by_key(|(long, _)| long.len()) {
            Some((long, short)) => format!("{short}{}", &name[long.len()..]),
            None => name.strip_prefix("model.").unwrap_or(&name).to_owned(),
        }
    }

    /// The checkpoint's name of our tensor `name`.
    pub fn long_name(&self, name: &str) -> String {
        let fits = self.names.iter().filter(|(_, short)| name.starts_with(short));
        match fits.max_by_key(|(_, short)| short.len()) {
            Some((long, short)) => format!("{long}{}", &name[short.len()..]),
            None => format!("model.{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for long in [
            "model.vlm_with_expert.vlm.model.vision_model.encoder.layers.0.mlp.fc1.weight",
            "model.vlm_with_expert.vlm.model.vision_model.post_layernorm.bias",
            "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight",
            "model.vlm_with_expert.vlm.model.text_model.layers.15.mlp.up_proj.weight",
            "model.vlm_with_expert.lm_expert.norm.weight",
            "model.action_in_proj.bias",
        ] {
            let short = smolvla::FAMILY.short_name(long);
            assert!(short.len() < 64, "{short}");
            assert_eq!(smolvla::FAMILY.long_name(&short), long);
        }
        let short = smolvla::FAMILY.short_name("model._orig_mod.state_proj.bias");
        assert_eq!(short, "state_proj.bias");
        assert_eq!(smolvla::FAMILY.short_name("state_proj.bias"), "state_proj.bias");
    }

    #[test]
    fn unknown_families_are_named() {
        let path = Path::new("config.json");
        let error = find("groot", path).expect_err("there is none").to_string();
        assert!(error.contains("`groot` is not supported") && error.contains("smolvla"), "{error}");
        assert!(of_config(path, &Value::Null).is_err());
    }
}
