//! What a policy takes and gives: `input_features` and `output_features` of `config.json`.

use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::ModelError;

/// The largest size that any one key may have; far above every model, far below an overflow.
const SIZE_LIMIT: usize = 1 << 20;

/// One input or output of the policy.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Feature {
    /// `VISUAL`, `STATE`, `ENV` or `ACTION`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Shape of one sample.
    #[serde(default)]
    pub shape: Vec<usize>,
}

/// The features, in the file's order, which is the order of the cameras.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Features {
    /// Inputs, in the model's order.
    #[serde(deserialize_with = "in_order", rename = "input_features")]
    pub inputs: Vec<(String, Feature)>,
    /// Outputs; `action` is the one used.
    #[serde(deserialize_with = "in_order", rename = "output_features")]
    pub outputs: Vec<(String, Feature)>,
}

fn in_order<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<(String, Feature)>, D::Error> {
    struct Ordered;
    impl<'de> Visitor<'de> for Ordered {
        type Value = Vec<(String, Feature)>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("features by name")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut features = Vec::new();
            while let Some(entry) = map.next_entry()? {
                features.push(entry);
            }
            Ok(features)
        }
    }
    deserializer.deserialize_map(Ordered)
}

impl Features {
    /// The features in `text`, a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] when they cannot be read.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        serde_json::from_str(text)
            .map_err(|e| ModelError::config(path, "the file", format!("cannot be read: {e}")))
    }

    /// Keys and shapes of the image inputs, in order.
    pub fn cameras(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let visual = self.inputs.iter().filter(|(_, f)| f.kind == "VISUAL");
        visual.map(|(key, feature)| (key.as_str(), feature.shape.as_slice()))
    }

    fn width(path: &Path, features: &[(String, Feature)], key: &str) -> Result<usize, ModelError> {
        let feature = features.iter().find(|(k, _)| k == key).map(|(_, f)| f);
        match feature.map(|f| f.shape.as_slice()) {
            Some([width]) if (1..=SIZE_LIMIT).contains(width) => Ok(*width),
            found => Err(ModelError::config(
                path,
                key,
                format!("has shape {found:?}, expected one width such as [6]"),
            )),
        }
    }

    /// Width of the input vector `key`; `None` when the policy takes none of that name.
    ///
    /// # Errors
    /// [`ModelError::Config`] when it is no vector.
    pub fn input_dim(&self, path: &Path, key: &str) -> Result<Option<usize>, ModelError> {
        match self.inputs.iter().any(|(k, _)| k == key) {
            true => Self::width(path, &self.inputs, key).map(Some),
            false => Ok(None),
        }
    }

    /// Width of the proprioception.
    ///
    /// # Errors
    /// [`ModelError::Config`] when `observation.state` is missing or no vector.
    pub fn state_dim(&self, path: &Path) -> Result<usize, ModelError> {
        Self::width(path, &self.inputs, "observation.state")
    }

    /// Action dimension `D`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when `action` is missing or no vector.
    pub fn action_dim(&self, path: &Path) -> Result<usize, ModelError> {
        Self::width(path, &self.outputs, "action")
    }
}

/// Refuses a size of zero, or one that no model has.
///
/// # Errors
/// [`ModelError::Config`] naming `key`.
pub fn check_size(path: &Path, key: &str, value: usize) -> Result<(), ModelError> {
    if value == 0 || value > SIZE_LIMIT {
        return Err(ModelError::config(
            path,
            key,
            format!("is {value}, expected 1 to {SIZE_LIMIT}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cameras_keep_the_order_of_the_file() {
        let features = Features::parse(
            Path::new("config.json"),
            r#"{"some_new_key": {"a": 1},
                "input_features": {
                  "observation.state": {"type": "STATE", "shape": [6]},
                  "observation.images.z": {"type": "VISUAL", "shape": [3, 8, 8]},
                  "observation.images.a": {"type": "VISUAL", "shape": [3, 8, 8]}},
                "output_features": {"action": {"type": "ACTION", "shape": [6]}}}"#,
        );
        let features = features.expect("these are features");
        let cameras: Vec<_> = features.cameras().map(|(key, _)| key).collect();
        assert_eq!(cameras, ["observation.images.z", "observation.images.a"]);
        assert_eq!(features.action_dim(Path::new("c")).ok(), Some(6));
        assert!(Features::default().state_dim(Path::new("c")).is_err());
    }
}
