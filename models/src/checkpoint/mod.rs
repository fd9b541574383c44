//! Checkpoints: what a policy needs to run, from a LeRobot folder or from a bundle.

mod features;
mod folder;
pub mod map;
pub mod store;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use features::{Feature, Features, check_size};
pub(crate) use folder::open_without_weights;
pub(crate) use store::layer_group;
pub use store::{StoredTensor, StoredType, TensorStore};
pub use weights::open_safetensors;

use sinew_runtime::Policy;
use sinew_runtime::action_space::SpaceKeys;

use crate::families::Family;
use crate::kernels::Compute;
use crate::processors::{Pipeline, Statistics};
use crate::{LoadOptions, ModelError, gguf};

/// What the action's values are; `sinew.json` beside `config.json`.
///
/// LeRobot's checkpoints do not say it. Units `deg` are converted to radians (and the state's radians
/// to degrees) at the policy's boundary; all others pass unchanged.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActionInfo {
    /// Joint names, in order.
    pub action_names: Vec<String>,
    /// Units, in order: `rad`, `deg`, or any other, which is only shown.
    pub action_units: Vec<String>,
    /// Actions a second.
    pub action_rate_hz: Option<f64>,
    /// Scale of the starting noise; 1 (LeRobot's) when left out. Less noise samples nearer to the
    /// most likely chunk.
    pub noise_scale: Option<f64>,
    /// The head was trained on clean prefixes of up to so many actions (training-time real-time chunking).
    pub trained_prefix: Option<usize>,
    /// What the values mean; nothing said: joint positions, as the robot has them.
    pub action_space: SpaceKeys,
}

impl ActionInfo {
    fn check(&self, path: &Path, action_dim: usize) -> Result<(), ModelError> {
        for (key, list) in
            [("action_names", &self.action_names), ("action_units", &self.action_units)]
        {
            if !list.is_empty() && list.len() != action_dim {
                let found = list.len();
                let reason = format!("has {found} entries, the policy's actions have {action_dim}");
                return Err(ModelError::config(path, key, reason));
            }
        }
        if let Some(scale) = self.noise_scale
            && !(0.0..=1.0).contains(&scale)
        {
            let reason = format!("is {scale}, expected 0 to 1");
            return Err(ModelError::config(path, "noise_scale", reason));
        }
        match self.action_rate_hz {
            Some(rate) if !(rate > 0.0 && rate <= 100_000.0) => {
                let reason = format!("is {rate}, expected actions a second, above 0");
                Err(ModelError::config(path, "action_rate_hz", reason))
            }
            _ => Ok(()),
        }
    }
}

/// A layer that a bundle keeps in higher precision than the rest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeptLayer {
    /// Tensor name.
    pub tensor: String,
    /// How it is stored.
    pub dtype: String,
    /// Why.
    pub reason: String,
}

/// Where the weights come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Origin {
    /// `safetensors` or `gguf`.
    pub format: &'static str,
    /// Type that a bundle was quantised to.
    pub quantization: Option<String>,
    /// SHA-256 of a bundle's tensor data.
    pub data_sha256: Option<String>,
    /// SHA-256 of the weights file that a bundle was made from.
    pub source_sha256: Option<String>,
    /// Version of the runtime that wrote a bundle.
    pub written_by: Option<String>,
    /// Layers kept in higher precision.
    pub kept: Vec<KeptLayer>,
}

/// One pipeline with its statistics.
#[derive(Debug, Clone, Default)]
pub struct Processor {
    /// The file's text.
    pub text: String,
    /// What it asks for.
    pub pipeline: Pipeline,
    /// Statistics by `FEATURE.STAT`.
    pub statistics: Statistics,
    /// Where the statistics lie, for messages.
    pub statistics_path: PathBuf,
}

/// A text file of a checkpoint.
#[derive(Debug, Clone)]
pub struct TextFile {
    /// Where it lies, for messages.
    pub path: PathBuf,
    /// What it holds.
    pub text: String,
}

/// Everything that a policy is built from. The weights are mapped, not read.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The folder or the bundle.
    pub path: PathBuf,
    /// What kind of policy it is.
    pub family: &'static Family,
    /// `config.json`.
    pub config_text: String,
    /// Its inputs and outputs.
    pub features: Features,
    /// The family's other text files, by role.
    pub extras: BTreeMap<&'static str, TextFile>,
    /// Before the model.
    pub preprocessor: Processor,
    /// After the model.
    pub postprocessor: Processor,
    /// What the action's values are.
    pub actions: ActionInfo,
    /// The weights.
    pub store: TensorStore,
    /// Where they come from.
    pub origin: Origin,
}

impl Checkpoint {
    /// Opens the LeRobot folder or `.gguf` bundle `path`.
    ///
    /// `verify_hash` makes a bundle's tensor data be read and compared with its stored SHA-256.
    ///
    /// # Errors
    /// [`ModelError`] naming file, key, what was found and what is expected.
    pub fn open(path: &Path, verify_hash: bool) -> Result<Self, ModelError> {
        let checkpoint = if path.is_dir() {
            folder::open(path)?
        } else if path.exists() {
            gguf::open(path, verify_hash)?
        } else {
            return Err(ModelError::FileMissing {
                path: path.to_owned(),
                remedy: "give a LeRobot checkpoint folder or a .gguf bundle".into(),
            });
        };
        let action_dim = checkpoint.features.action_dim(&checkpoint.config_path())?;
        checkpoint.actions.check(path, action_dim)?;
        Ok(checkpoint)
    }

    /// The policy.
    ///
    /// # Errors
    /// [`ModelError`] naming the tensor or key that does not fit.
    pub fn policy(&self, options: &LoadOptions) -> Result<Box<dyn Policy>, ModelError> {
        (self.family.load)(&self.computing(options.compute), options)
    }

    /// The same, whose layers compute as `compute` says; those that a bundle keeps in higher precision stay exact.
    #[must_use]
    pub fn computing(&self, compute: Compute) -> Self {
        let mut checkpoint = self.clone();
        checkpoint.store.set_compute(compute, self.family.keep);
        checkpoint
    }

    /// The family's text file `role`.
    ///
    /// # Errors
    /// [`ModelError::FileMissing`] when the checkpoint has none.
    pub fn extra(&self, role: &'static str) -> Result<&TextFile, ModelError> {
        self.extras.get(role).ok_or_else(|| ModelError::FileMissing {
            path: self.path.join(role),
            remedy: format!("a {} policy needs it; copy it from the original", self.family.name),
        })
    }

    /// What names the weights: the SHA-256 that a bundle has of its data, or that of all tensors.
    pub fn weights_sha256(&self) -> String {
        self.origin.data_sha256.clone().unwrap_or_else(|| self.store.sha256())
    }

    /// The file with the configuration, for messages.
    pub(crate) fn config_path(&self) -> PathBuf {
        if self.origin.format == "gguf" { self.path.clone() } else { self.path.join("config.json") }
    }
}
