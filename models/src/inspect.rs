//! What a checkpoint or a bundle holds, without running it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::checkpoint::map::MappedFile;
use crate::checkpoint::{ActionInfo, KeptLayer};
use crate::families::{FAMILIES, Family};
use crate::gguf::QuantType;
use crate::processors::{Boundary, NormMode, Normalizer};
use crate::{Checkpoint, ModelError};

/// What a checkpoint or a bundle holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Architecture.
    pub architecture: String,
    /// `safetensors` or `gguf`.
    pub format: String,
    /// Type that a bundle was quantised to.
    pub quantization: Option<String>,
    /// What wrote a bundle.
    pub written_by: Option<String>,
    /// SHA-256 of the original weights file.
    pub source_sha256: Option<String>,
    /// Backbone and head.
    pub kind: String,
    /// Sizes of the network.
    pub sizes: serde_json::Value,
    /// Parts of the network.
    pub parts: Vec<Part>,
    /// Values in all parts.
    pub parameters: usize,
    /// Bytes of all tensors.
    pub bytes: usize,
    /// Layers that a bundle keeps in higher precision, by reason.
    pub kept: Vec<KeptGroup>,
    /// Camera inputs, in order.
    pub cameras: Vec<String>,
    /// How many cameras may be missing.
    pub optional_cameras: usize,
    /// Normalisation of the state.
    pub state: Normalization,
    /// Normalisation of the action.
    pub action: Normalization,
    /// What the action's values are.
    pub actions: ActionInfo,
}

/// One line of the table of what can be run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Supported {
    /// `type` in `config.json`.
    pub architecture: &'static str,
    /// What sees and reads.
    pub backbone: &'static str,
    /// What makes actions.
    pub head: &'static str,
    /// Types of a bundle's large matrices.
    pub quantization: Vec<&'static str>,
    /// Scheduler strategies beyond those that every policy can be run with.
    pub strategies: Vec<&'static str>,
    /// What of the last chunk is used again.
    pub caches: Vec<&'static str>,
    /// What its numbers are compared with.
    pub proof: &'static str,
}

/// What can be run: one line a family. Some of it a checkpoint must have been trained for.
pub fn supported() -> Vec<Supported> {
    let trained = ActionInfo { trained_prefix: Some(1), ..ActionInfo::default() };
    let line = |family: &&'static Family| {
        let planned = (family.planned)(&trained);
        let named = |list: [(bool, &'static str); 2]| {
            list.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect()
        };
        Supported {
            architecture: family.name,
            backbone: family.backbone,
            head: family.head,
            quantization: QuantType::ALL.iter().map(|kind| kind.name()).collect(),
            strategies: named([
                (planned.guided, "rtc-guided"),
                (planned.trained.is_some(), "rtc-trained"),
            ]),
            caches: named([
                (planned.warm_start, "warm_start"),
                (planned.guided || planned.trained.is_some(), "frozen_prefix"),
            ]),
            proof: family.proof,
        }
    };
    FAMILIES.iter().map(line).collect()
}

/// One part of a network.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Tensors in it.
    pub tensors: usize,
    /// Values in it.
    pub parameters: usize,
    /// Bytes of it.
    pub bytes: usize,
    /// Values by stored type.
    pub types: BTreeMap<String, usize>,
    /// Tensors whose rows are filled up with zeros to whole blocks, by what is added to how many values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub filled: BTreeMap<String, usize>,
}

/// Layers kept in higher precision for one reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeptGroup {
    /// Why.
    pub reason: String,
    /// How they are stored.
    pub dtype: String,
    /// Their names.
    pub tensors: Vec<String>,
}

/// Normalisation of one feature.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Normalization {
    /// Values of the feature.
    pub width: usize,
    /// Mode, after leaving out features without statistics.
    pub mode: NormMode,
    /// Means, or the values that become −1.
    pub low: Vec<f32>,
    /// Standard deviations, or the values that become 1.
    pub high: Vec<f32>,
}

impl Normalization {
    fn new(normalizer: &Normalizer, width: usize) -> Self {
        let (low, high) = normalizer.statistics();
        Self { width, mode: normalizer.mode(), low: low.to_vec(), high: high.to_vec() }
    }
}

/// Reads the headers of the checkpoint folder or bundle `path`.
///
/// The tensor data are read once, for their hash.
///
/// # Errors
/// [`ModelError`] when it cannot be loaded.
pub fn inspect(path: &Path) -> Result<Inspection, ModelError> {
    let checkpoint = Checkpoint::open(path, true)?;
    let family = checkpoint.family;
    let boundary = Boundary::new(&checkpoint, 0)?;
    let parts = parts(&checkpoint);
    let source_sha256 = match &checkpoint.origin.source_sha256 {
        Some(hash) => Some(hash.clone()),
        None => Some(MappedFile::open(checkpoint.store.path())?.sha256(0)),
    };
    let (state, action) = boundary.normalizers();
    Ok(Inspection {
        architecture: family.name.to_owned(),
        format: checkpoint.origin.format.to_owned(),
        quantization: checkpoint.origin.quantization.clone(),
        written_by: checkpoint.origin.written_by.clone(),
        source_sha256,
        kind: format!("{}, {}", family.backbone, family.head),
        sizes: (family.sizes)(&checkpoint)?,
        parameters: parts.iter().map(|p| p.parameters).sum(),
        bytes: parts.iter().map(|p| p.bytes).sum(),
        parts,
        kept: grouped(&checkpoint.origin.kept),
        cameras: boundary.cameras(),
        optional_cameras: boundary.optional_cameras(),
        state: Normalization::new(state, boundary.state_dim()),
        action: Normalization::new(action, boundary.action_dim()),
        actions: checkpoint.actions.clone(),
    })
}

fn parts(checkpoint: &Checkpoint) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for (name, tensor) in checkpoint.store.iter() {
        // What stands at the top level are the projections between the parts.
        let first = match name.split_once('.') {
            Some((part, rest)) if rest.contains('.') || part == "connector" => part,
            _ => "projections",
        };
        let index = parts.iter().position(|p| p.name == first).unwrap_or_else(|| {
            parts.push(Part { name: first.to_owned(), ..Part::default() });
            parts.len() - 1
        });
        let part = &mut parts[index];
        part.tensors += 1;
        part.parameters += tensor.values();
        part.bytes += tensor.bytes().len();
        *part.types.entry(tensor.dtype.name().to_owned()).or_default() += tensor.values();
        let (width, filled) = tensor.widths();
        if width != filled {
            *part.filled.entry(format!("{width} + {}", filled - width)).or_default() += 1;
        }
    }
    parts
}

fn grouped(kept: &[KeptLayer]) -> Vec<KeptGroup> {
    let mut groups: Vec<KeptGroup> = Vec::new();
    for layer in kept {
        let found = groups.iter_mut().find(|g| g.reason == layer.reason && g.dtype == layer.dtype);
        match found {
            Some(group) => group.tensors.push(layer.tensor.clone()),
            None => groups.push(KeptGroup {
                reason: layer.reason.clone(),
                dtype: layer.dtype.clone(),
                tensors: vec![layer.tensor.clone()],
            }),
        }
    }
    groups
}
