//! Bundles: one GGUF file with everything that a policy needs.

pub mod blocks;
mod format;
pub mod k_blocks;
mod quantize;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sinew_runtime::action_space::SpaceKeys;

pub use quantize::{QuantType, quantize};
pub(crate) use quantize::{Weights, write_bundle};

use crate::ModelError;
use crate::checkpoint::map::MappedFile;
use crate::checkpoint::{
    ActionInfo, Checkpoint, Features, KeptLayer, Origin, Processor, TensorStore, TextFile,
};
use crate::families;
use crate::processors::{Pipeline, Statistics};
use format::{Content, Value};

/// What `general.architecture` says in our bundles, before the family's name.
const ARCHITECTURE: &str = "sinew.";

/// Metadata keys, written by [`quantize`] and read by [`open`].
mod keys {
    pub const ARCHITECTURE: &str = "general.architecture";
    pub const ALIGNMENT: &str = "general.alignment";
    pub const WRITTEN_BY: &str = "sinew.written_by";
    pub const QUANTIZATION: &str = "sinew.quantization";
    pub const CONFIG: &str = "sinew.config";
    pub const PREPROCESSOR: &str = "sinew.preprocessor";
    pub const POSTPROCESSOR: &str = "sinew.postprocessor";
    pub const ACTION_NAMES: &str = "sinew.action.names";
    pub const ACTION_UNITS: &str = "sinew.action.units";
    pub const ACTION_RATE: &str = "sinew.action.rate_hz";
    pub const NOISE_SCALE: &str = "sinew.noise_scale";
    pub const TRAINED_PREFIX: &str = "sinew.trained_prefix";
    pub const ACTION_SPACE: &str = "sinew.action.space";
    pub const SOURCE_HASH: &str = "sinew.source.sha256";
    pub const DATA_HASH: &str = "sinew.data.sha256";
    pub const KEPT: &str = "sinew.kept";
    pub const WIDTHS: &str = "sinew.widths";

    /// A text file of the family, by its role.
    pub fn extra(role: &str) -> String {
        format!("sinew.{role}")
    }

    /// Prefix of a pipeline's statistics, one key per `FEATURE.STAT`.
    pub fn statistics(pipeline: &str) -> String {
        format!("{pipeline}.statistics.")
    }
}

/// Metadata with the file's name for messages.
struct Metadata<'a> {
    path: &'a Path,
    content: &'a Content,
}

impl Metadata<'_> {
    fn text(&self, key: &str) -> Result<&str, ModelError> {
        match self.content.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            found => {
                let found = if found.is_some() { "of another type" } else { "missing" };
                Err(ModelError::malformed(
                    self.path,
                    format!("metadata `{key}`"),
                    found,
                    "a text, as `sinew model quantize` writes it",
                ))
            }
        }
    }

    fn texts(&self, key: &str) -> Vec<String> {
        match self.content.metadata.get(key) {
            Some(Value::Texts(list)) => list.clone(),
            _ => Vec::new(),
        }
    }

    fn number(&self, key: &str) -> Option<f64> {
        match self.content.metadata.get(key) {
            Some(Value::F64(number)) => Some(*number),
            _ => None,
        }
    }

    fn processor(&self, key: &str) -> Result<Processor, ModelError> {
        let text = self.text(key)?.to_owned();
        let pipeline = Pipeline::parse(self.path, &text)?;
        let prefix = keys::statistics(key);
        let statistics: Statistics = self
            .content
            .metadata
            .iter()
            .filter_map(|(k, v)| match v {
                Value::Floats(list) => Some((k.strip_prefix(&prefix)?.to_owned(), list.clone())),
                _ => None,
            })
            .collect();
        Ok(Processor { text, pipeline, statistics, statistics_path: self.path.to_owned() })
    }
}

/// Opens the bundle `path`; with `verify_hash` its tensor data are read and compared with their hash.
pub(crate) fn open(path: &Path, verify_hash: bool) -> Result<Checkpoint, ModelError> {
    let file = Arc::new(MappedFile::open(path)?);
    let content = format::read(&file)?;
    let metadata = Metadata { path, content: &content };
    let found = metadata.text(keys::ARCHITECTURE)?;
    let family = families::find(found.strip_prefix(ARCHITECTURE).unwrap_or(found), path)?;
    if verify_hash {
        let expected = metadata.text(keys::DATA_HASH)?;
        let found = file.sha256(content.data);
        if found != expected {
            let (path, expected) = (path.to_owned(), expected.to_owned());
            return Err(ModelError::HashMismatch { path, found, expected });
        }
    }
    let config_text = metadata.text(keys::CONFIG)?.to_owned();
    let mut extras = BTreeMap::new();
    for extra in family.extras {
        match metadata.text(&keys::extra(extra.role)) {
            Ok(text) => {
                let file = TextFile { path: path.to_owned(), text: text.to_owned() };
                extras.insert(extra.role, file);
            }
            Err(error) if extra.remedy.is_some() => return Err(error),
            Err(_) => {}
        }
    }
    let kept = metadata.texts(keys::KEPT).into_iter().filter_map(|line| {
        let mut parts = line.splitn(3, '|').map(str::to_owned);
        Some(KeptLayer { tensor: parts.next()?, dtype: parts.next()?, reason: parts.next()? })
    });
    let own = |key| metadata.text(key).ok().map(str::to_owned);
    let origin = Origin {
        format: "gguf",
        quantization: own(keys::QUANTIZATION),
        data_sha256: own(keys::DATA_HASH),
        source_sha256: own(keys::SOURCE_HASH),
        written_by: own(keys::WRITTEN_BY),
        kept: kept.collect(),
    };
    let action_space = match own(keys::ACTION_SPACE) {
        Some(text) => serde_json::from_str(&text).map_err(|e| {
            ModelError::malformed(path, format!("metadata `{}`", keys::ACTION_SPACE), e, "its keys")
        })?,
        None => SpaceKeys::default(),
    };
    let actions = ActionInfo {
        action_space,
        action_names: metadata.texts(keys::ACTION_NAMES),
        action_units: metadata.texts(keys::ACTION_UNITS),
        action_rate_hz: metadata.number(keys::ACTION_RATE),
        noise_scale: metadata.number(keys::NOISE_SCALE),
        trained_prefix: metadata.number(keys::TRAINED_PREFIX).map(|n| n as usize),
    };
    let (preprocessor, postprocessor) =
        (metadata.processor(keys::PREPROCESSOR)?, metadata.processor(keys::POSTPROCESSOR)?);
    let widths = metadata.texts(keys::WIDTHS);
    let mut store = TensorStore::new(path, None);
    for tensor in content.tensors {
        store.insert(tensor.name.clone(), tensor);
    }
    for line in &widths {
        let narrowed = line
            .rsplit_once('|')
            .and_then(|(name, width)| store.find(name).ok()?.narrowed(width.parse().ok()?));
        let tensor = narrowed.ok_or_else(|| {
            let what = format!("metadata `{}`", keys::WIDTHS);
            ModelError::malformed(
                path,
                what,
                line,
                "`TENSOR|WIDTH`, a row without what fills it up",
            )
        })?;
        store.insert(tensor.name.clone(), tensor);
    }
    Ok(Checkpoint {
        path: path.to_owned(),
        family,
        features: Features::parse(path, &config_text)?,
        config_text,
        extras,
        preprocessor,
        postprocessor,
        actions,
        store,
        origin,
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
