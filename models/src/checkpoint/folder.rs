//! LeRobot's checkpoint folder.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{
    ActionInfo, Checkpoint, Features, Origin, Processor, StoredType, TensorStore, TextFile,
    open_safetensors,
};
use crate::ModelError;
use crate::families::{self, Extra};
use crate::gguf::blocks;
use crate::processors::{Pipeline, Statistics};

/// No configuration, statistics or tokenizer file is larger.
const TEXT_LIMIT: u64 = 256 << 20;

fn read(path: &Path, remedy: &str) -> Result<Vec<u8>, ModelError> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(ModelError::FileMissing { path: path.to_owned(), remedy: remedy.to_owned() })
        }
        Err(e) => Err(ModelError::io(path, e)),
        Ok(m) if m.len() > TEXT_LIMIT => {
            Err(ModelError::malformed(path, "the file's size", m.len(), "at most 256 MiB"))
        }
        Ok(_) => std::fs::read(path).map_err(|e| ModelError::io(path, e)),
    }
}

fn read_text(path: &Path, remedy: &str) -> Result<String, ModelError> {
    String::from_utf8(read(path, remedy)?)
        .map_err(|e| ModelError::malformed(path, "the text", e, "UTF-8"))
}

/// Opens the folder `dir`.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, ModelError> {
    let mut checkpoint = open_without_weights(dir)?;
    let weights = dir.join("model.safetensors");
    if !weights.is_file() {
        return Err(ModelError::FileMissing {
            path: weights,
            remedy: "copy the checkpoint's model.safetensors beside config.json".into(),
        });
    }
    checkpoint.store = open_safetensors(&weights, checkpoint.family)?;
    Ok(checkpoint)
}

/// Opens all of the folder `dir` but its weights.
pub(crate) fn open_without_weights(dir: &Path) -> Result<Checkpoint, ModelError> {
    let config_path = dir.join("config.json");
    let config_text =
        read_text(&config_path, "give the folder that LeRobot saved (`pretrained_model`)")?;
    let config: Value = serde_json::from_str(&config_text)
        .map_err(|e| ModelError::config(&config_path, "the file", format!("is no JSON: {e}")))?;
    let family = families::of_config(&config_path, &config)?;
    let features = Features::parse(&config_path, &config_text)?;
    let extras = family.extras.iter().filter_map(|e| extra(dir, e, &config).transpose());
    let extras = extras.collect::<Result<_, _>>()?;
    let preprocessor = processor(dir, "policy_preprocessor.json")?;
    let postprocessor = processor(dir, "policy_postprocessor.json")?;
    let info_path = dir.join("sinew.json");
    let actions = if info_path.is_file() {
        serde_json::from_str(&read_text(&info_path, "")?).map_err(|e| {
            ModelError::config(&info_path, "the file", format!("cannot be read: {e}"))
        })?
    } else {
        ActionInfo::default()
    };
    Ok(Checkpoint {
        path: dir.to_owned(),
        family,
        config_text,
        features,
        extras,
        preprocessor,
        postprocessor,
        actions,
        store: TensorStore::new(&dir.join("model.safetensors"), Some(family)),
        origin: Origin { format: "safetensors", ..Origin::default() },
    })
}

/// The text file that `wanted` describes, with its role; none when it may be missing and is.
fn extra(
    dir: &Path,
    wanted: &Extra,
    config: &Value,
) -> Result<Option<(&'static str, TextFile)>, ModelError> {
    let candidates: Vec<PathBuf> =
        (wanted.candidates)(config).iter().map(|file| dir.join(file)).collect();
    if let Some(path) = candidates.iter().find(|p| p.is_file()) {
        let text = read_text(path, "")?;
        return Ok(Some((wanted.role, TextFile { path: path.clone(), text })));
    }
    if let Some(text) = (wanted.built_in)(config) {
        let path = PathBuf::from(format!("built-in {}", wanted.role));
        return Ok(Some((wanted.role, TextFile { path, text: text.to_owned() })));
    }
    match (wanted.remedy, candidates.last()) {
        (Some(remedy), Some(path)) => {
            Err(ModelError::FileMissing { path: path.clone(), remedy: remedy.to_owned() })
        }
        _ => Ok(None),
    }
}

fn processor(dir: &Path, name: &str) -> Result<Processor, ModelError> {
    let path = dir.join(name);
    let text = read_text(
        &path,
        "a checkpoint older than LeRobot 0.4 keeps its statistics in the weights: convert it with \
         LeRobot's `lerobot.processor.migrate_policy_normalization`",
    )?;
    let pipeline = Pipeline::parse(&path, &text)?;
    let (statistics_path, statistics) = match &pipeline.state_file {
        Some(file) => {
            let path = dir.join(file);
            let statistics = read_statistics(&path)?;
            (path, statistics)
        }
        None => (path, Statistics::new()),
    };
    Ok(Processor { text, pipeline, statistics, statistics_path })
}

fn read_statistics(path: &Path) -> Result<Statistics, ModelError> {
    let bytes =
        read(path, "the pipeline file beside it names it; copy the whole checkpoint folder")?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
        ModelError::malformed(path, "the safetensors header", e, "one that fits the file's length")
    })?;
    let mut statistics = Statistics::new();
    for (key, view) in tensors.tensors() {
        let stored = match view.dtype() {
            Dtype::F32 => StoredType::F32,
            Dtype::F16 => StoredType::F16,
            Dtype::BF16 => StoredType::Bf16,
            Dtype::F64 => {
                let wide = view.data().chunks_exact(8).filter_map(|b| b.try_into().ok());
                statistics.insert(key, wide.map(|b| f64::from_le_bytes(b) as f32).collect());
                continue;
            }
            // Counts and the like; what normalisation needs is a float.
            _ => continue,
        };
        let mut values = vec![0.0; view.data().len() / stored.block_bytes()];
        blocks::decode(stored, view.data(), &mut values);
        statistics.insert(key, values);
    }
    Ok(statistics)
}
