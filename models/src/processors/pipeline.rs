//! LeRobot's saved pipelines: `policy_preprocessor.json` and `policy_postprocessor.json`.
//!
//! A step that would change the numbers and is not known here stops the loading: running without it
//! would give other actions than in training.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::normalize::{NormMode, Normalizer, Statistics};
use super::prompt::StatePrompt;
use crate::ModelError;

/// No instruction is longer (tokens).
const LENGTH_LIMIT: usize = 1 << 20;

#[derive(Deserialize)]
struct PipelineFile {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    registry_name: String,
    #[serde(default)]
    config: serde_json::Value,
    state_file: Option<String>,
}

/// What one pipeline file asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pipeline {
    /// Old observation key to new one.
    pub rename: BTreeMap<String, String>,
    /// A newline is appended to the instruction.
    pub append_newline: bool,
    /// Longest instruction (tokens), when a tokenizer step says so.
    pub max_length: Option<usize>,
    /// The tokens are filled up to the longest instruction.
    pub pads: bool,
    /// The filling comes first.
    pub pads_left: bool,
    /// Pixels are normalised by ImageNet's mean and deviation.
    pub imagenet: bool,
    /// Which of a checkpoint's robots this one is.
    pub domain: Option<u32>,
    /// Mode by feature type.
    pub modes: BTreeMap<String, NormMode>,
    /// Name of the statistics file.
    pub state_file: Option<String>,
    /// The state is written into the prompt.
    pub state_prompt: Option<StatePrompt>,
    /// Actions are relative to the state: which ones, before the model.
    pub relative: Option<Relative>,
    /// Relative actions are made absolute after the model.
    pub absolute: bool,
}

/// Which actions are relative to the state.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Relative {
    enabled: bool,
    /// Actions whose name contains one of these stay absolute.
    exclude_joints: Vec<String>,
    action_names: Option<Vec<String>>,
}

impl Relative {
    /// Per action dimension of `width`, whether it is relative. Dimensions without a name are.
    ///
    /// Source: LeRobot `src/lerobot/processor/relative_action_processor.py`, `_build_mask`.
    pub fn dimensions(&self, width: usize) -> Vec<bool> {
        let excluded: Vec<String> = self
            .exclude_joints
            .iter()
            .map(|n| n.to_lowercase())
            .filter(|n| !n.is_empty())
            .collect();
        let names = self.action_names.iter().flatten().take(width).map(|n| n.to_lowercase());
        let mut mask: Vec<bool> =
            names.map(|name| !excluded.iter().any(|part| name.contains(part))).collect();
        mask.resize(width, true);
        mask
    }
}

impl Pipeline {
    /// The pipeline in `text`; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] naming the step.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        let file: PipelineFile = serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "steps", format!("cannot be read: {e}")))?;
        let mut pipeline = Self::default();
        for step in file.steps {
            pipeline.add(path, step)?;
        }
        Ok(pipeline)
    }

    fn add(&mut self, path: &Path, step: Step) -> Result<(), ModelError> {
        let fail = |reason: String| Err(ModelError::config(path, &step.registry_name, reason));
        match step.registry_name.as_str() {
            "to_batch_processor" | "device_processor" => {}
            // Between [0, 1] and [0, 255] and back: pixels here are in [0, 1] from the start.
            "xvla_image_to_float" | "xvla_image_scale" => {}
            "xvla_imagenet_normalize" => self.imagenet = true,
            "xvla_add_domain_id" => {
                let id = step.config.get("domain_id").and_then(serde_json::Value::as_u64);
                let Some(id) = id.and_then(|id| u32::try_from(id).ok()) else {
                    return fail("has no domain_id, expected a whole number such as 0".into());
                };
                self.domain = Some(id);
            }
            "rename_observations_processor" => {
                if let Some(map) = step.config.get("rename_map").and_then(|m| m.as_object()) {
                    let pairs =
                        map.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
                    self.rename.extend(pairs);
                }
            }
            "smolvla_new_line_processor" | "pi0_new_line_processor" => self.append_newline = true,
            "tokenizer_processor" => {
                let is = |key: &str, value: &str| {
                    step.config.get(key).and_then(serde_json::Value::as_str) == Some(value)
                };
                self.pads = is("padding", "max_length");
                self.pads_left = is("padding_side", "left");
                let length = step.config.get("max_length").and_then(serde_json::Value::as_u64);
                self.max_length = length.and_then(|n| usize::try_from(n).ok());
                if let Some(found) = self.max_length.filter(|n| !(1..=LENGTH_LIMIT).contains(n)) {
                    return fail(format!("has max_length {found}, expected 1 to {LENGTH_LIMIT}"));
                }
            }
            "normalizer_processor" | "unnormalizer_processor" => {
                if let Some(map) = step.config.get("norm_map").and_then(|m| m.as_object()) {
                    for (kind, mode) in map {
                        let Some(known) = mode.as_str().and_then(NormMode::from_name) else {
                            return fail(format!("has the unknown mode {mode} for {kind}"));
                        };
                        self.modes.insert(kind.clone(), known);
                    }
                }
                if let Some(name) = step.state_file {
                    if Path::new(&name).components().count() != 1 || name.starts_with('.') {
                        return Err(ModelError::config(
                            path,
                            "state_file",
                            format!(
                                "is `{name}`, expected the plain name of a file in the same folder"
                            ),
                        ));
                    }
                    self.state_file = Some(name);
                }
            }
            "relative_actions_processor" => {
                let relative = match step.config.clone() {
                    serde_json::Value::Null => Ok(Relative::default()),
                    config => serde_json::from_value::<Relative>(config),
                };
                match relative {
                    Ok(relative) => self.relative = relative.enabled.then_some(relative),
                    Err(e) => return fail(format!("cannot be read: {e}")),
                }
            }
            "absolute_actions_processor" => {
                let enabled = step.config.get("enabled").and_then(serde_json::Value::as_bool);
                self.absolute = enabled == Some(true);
            }
            "pi05_prepare_state_tokenizer_processor_step" => {
                self.state_prompt = Some(StatePrompt::TaskStateAction);
            }
            "pi0_fast_prepare_state_tokenizer_processor_step" => {
                self.state_prompt = Some(StatePrompt::TaskState);
            }
            // Makes tokens of actions, which an observation does not have.
            "action_tokenizer_processor" => {}
            _ => return fail("is a processing step that this runtime does not know".into()),
        }
        Ok(())
    }

    /// Normalisation of feature `key` of type `kind`.
    ///
    /// # Errors
    /// As [`Normalizer::new`].
    pub fn normalizer(
        &self,
        kind: &str,
        key: &str,
        width: usize,
        statistics: &Statistics,
        path: &Path,
    ) -> Result<Normalizer, ModelError> {
        match self.modes.get(kind) {
            Some(mode) => Normalizer::new(*mode, key, width, statistics, path),
            None => Ok(Normalizer::identity()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_steps_are_refused_by_name() {
        let text = r#"{"steps": [{"registry_name": "mystery_processor", "config": {}}]}"#;
        let e = Pipeline::parse(Path::new("p.json"), text).expect_err("the step is unknown");
        assert!(e.to_string().contains("mystery_processor"), "{e}");
    }

    #[test]
    fn relative_actions_are_chosen_by_name() {
        let text = r#"{"steps": [{"registry_name": "relative_actions_processor", "config": {
            "enabled": true, "exclude_joints": ["gripper", ""],
            "action_names": ["Arm", "left_Gripper.pos"]}}]}"#;
        let pipeline = Pipeline::parse(Path::new("p.json"), text).expect("it is whole");
        let relative = pipeline.relative.expect("it is enabled");
        assert_eq!(relative.dimensions(3), [true, false, true]);
        let off = text.replace("true", "false");
        let pipeline = Pipeline::parse(Path::new("p.json"), &off).expect("it is whole");
        assert_eq!(pipeline.relative, None);
    }

    #[test]
    fn statistics_stay_in_the_folder() {
        let text = r#"{"steps": [{"registry_name": "normalizer_processor",
            "config": {"norm_map": {}}, "state_file": "../secret"}]}"#;
        assert!(Pipeline::parse(Path::new("p.json"), text).is_err());
    }
}
