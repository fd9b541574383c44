//! What a checkpoint or a bundle holds, without running it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::checkpoint::map::MappedFile;
use crate::checkpoint::{ActionInfo, AttentionMode, KeptLayer};
use crate::gguf::hex;
use crate::processors::{NormMode, Normalizer};
use crate::smolvla::Preparer;
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
    /// Sizes of the network.
    pub sizes: Sizes,
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
    /// Tokens that the tokenizer knows.
    pub tokenizer_tokens: usize,
    /// Longest instruction (tokens).
    pub instruction_tokens: usize,
}

/// Sizes of a SmolVLA network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sizes {
    /// Width and height of the images it sees; `None` for the camera's own.
    pub image: Option<(usize, usize)>,
    /// Side of a patch (pixels).
    pub patch: usize,
    /// Layers of the vision tower.
    pub vision_layers: usize,
    /// Width of the vision tower.
    pub vision_width: usize,
    /// Text layers used.
    pub text_layers: usize,
    /// Width of the text model.
    pub text_width: usize,
    /// Query heads, and key and value heads.
    pub heads: (usize, usize),
    /// Rows of the token table.
    pub vocabulary: usize,
    /// Width of the expert.
    pub expert_width: usize,
    /// How the expert attends.
    pub attention: AttentionMode,
    /// Action horizon.
    pub action_horizon: usize,
    /// Denoise steps.
    pub denoise_steps: usize,
}

/// One part of a network.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
    let preparer = Preparer::new(&checkpoint, 0)?;
    let parts = parts(&checkpoint);
    let (config, vlm) = (&checkpoint.config, &checkpoint.vlm);
    let (text, vision) = (&vlm.text_config, &vlm.vision_config);
    let source_sha256 = match &checkpoint.origin.source_sha256 {
        Some(hash) => Some(hash.clone()),
        None => Some(hex(&Sha256::digest(MappedFile::open(checkpoint.store.path())?.bytes()))),
    };
    let (state, action) = preparer.normalizers();
    Ok(Inspection {
        architecture: config.kind.clone(),
        format: checkpoint.origin.format.to_owned(),
        quantization: checkpoint.origin.quantization.clone(),
        written_by: checkpoint.origin.written_by.clone(),
        source_sha256,
        sizes: Sizes {
            image: config.resize_imgs_with_padding,
            patch: vision.patch_size,
            vision_layers: vision.num_hidden_layers,
            vision_width: vision.hidden_size,
            text_layers: match usize::try_from(config.num_vlm_layers) {
                Ok(n) if n > 0 => n,
                _ => text.num_hidden_layers,
            },
            text_width: text.hidden_size,
            heads: (text.num_attention_heads, text.num_key_value_heads),
            vocabulary: text.vocab_size,
            expert_width: (text.hidden_size as f64 * config.expert_width_multiplier) as usize,
            attention: config.attention_mode,
            action_horizon: config.chunk_size,
            denoise_steps: config.num_steps,
        },
        parameters: parts.iter().map(|p| p.parameters).sum(),
        bytes: parts.iter().map(|p| p.bytes).sum(),
        parts,
        kept: grouped(&checkpoint.origin.kept),
        cameras: preparer.cameras(),
        optional_cameras: preparer.optional_cameras(),
        state: Normalization::new(state, preparer.state_dim()),
        action: Normalization::new(action, preparer.action_dim()),
        actions: checkpoint.actions.clone(),
        tokenizer_tokens: preparer.vocabulary(),
        instruction_tokens: checkpoint
            .preprocessor
            .pipeline
            .max_length
            .unwrap_or(config.tokenizer_max_length),
    })
}

fn parts(checkpoint: &Checkpoint) -> Vec<Part> {
    let mut parts: Vec<Part> = ["vision", "connector", "text", "expert", "projections"]
        .iter()
        .map(|name| Part {
            name: (*name).to_owned(),
            tensors: 0,
            parameters: 0,
            bytes: 0,
            types: BTreeMap::new(),
        })
        .collect();
    let last = parts.len() - 1;
    for (name, tensor) in checkpoint.store.iter() {
        let first = name.split('.').next().unwrap_or(name);
        let index = parts.iter().position(|p| p.name == first).unwrap_or(last);
        let part = &mut parts[index];
        part.tensors += 1;
        part.parameters += tensor.values();
        part.bytes += tensor.bytes().len();
        *part.types.entry(tensor.dtype.name().to_owned()).or_default() += tensor.values();
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
