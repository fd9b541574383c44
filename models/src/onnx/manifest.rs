//! `manifest.toml`, written by hand beside an ONNX file: what its inputs and outputs mean.
//!
//! ```toml
//! model = "policy.onnx"            # the ONNX file, beside this one
//! action_rate = "30 Hz"            # actions a second that it was trained at
//!
//! [state]                          # left out: the network does not see the joints
//! input = "observation.state"      # [1, D] or [D]
//! names = ["base", "elbow"]        # what each value is, in the arm's joint order
//! units = "deg"                    # rad | deg | anything else, which passes unchanged; or one for each value
//! normalization = { mode = "mean_std", mean = [0.0, 0.0], std = [1.0, 1.0] }
//!                                  # none | mean_std (mean, std) | min_max (min, max) | quantiles (q01, q99)
//!                                  # | quantile10 (q10, q90); left out: none
//!
//! [images.front]                   # a table each, under the policy's name of the camera
//! input = "observation.images.front"
//! layout = "nchw"                  # nchw | nhwc
//! size = [96, 64]                  # width, height; may be left out where the file fixes it
//! colors = "rgb"                   # rgb | bgr
//! range = "0..1"                   # 0..1 | -1..1 | 0..255, before the normalisation
//! fit = "stretch"                  # how another size becomes this one: stretch | pad-left-top | exact (an error)
//! normalization = { mode = "mean_std", mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }
//!
//! [instruction]                    # left out: the network takes none
//! input = "tokens"                 # token ids, [1, T]
//! mask = "attention_mask"          # 1 on real tokens; may be left out
//! tokenizer = "tokenizer.json"     # beside this file
//! length = 48                      # longest instruction; may be left out where the file fixes it
//! pad_token = 0                    # fills up to `length`; left out: not padded
//! append_newline = false
//!
//! [noise]                          # starting noise of a head whose sampling is inside the graph
//! input = "noise"
//! shape = [16, 32]                 # may be left out where the file fixes it
//! scale = 1.0                      # standard deviation
//!
//! [[recurrent]]                    # a state that goes from one inference to the next, zero at first
//! input = "h"
//! output = "h_next"
//! reset_after = "1 s"              # zero again after so long a pause
//!
//! [action]
//! output = "actions"               # [1, H, W], [H, W] or [W]
//! names = ["base", "elbow"]
//! units = "deg"
//! width = 32                       # of the network, where more than the names (the rest is padding)
//! horizon = 16                     # actions in a chunk; may be left out where the file fixes it
//! normalization = { mode = "none" }
//!
//! [flow]                           # a head in two files: `model` runs once, this one in every denoise step
//! model = "denoise.onnx"           # takes what the manifest names and `model` lacks, too
//! sample = "x"                     # its input for the sample, [1, H, W]
//! time = "t"                       # its input for the flow time, [1] or []
//! velocity = "v"                   # its output; [action] output is then left out
//! noise_at = 1                     # flow time of the noise: 1 (openpi, LeRobot) | 0 (GR00T)
//! steps = 10
//! context = { prefix = "features" }    # its input = output of `model`
//! noise_scale = 1.0
//! ```
//!
//! The file is read as it stands: an unknown key is an error, and so is everything that the ONNX file
//! contradicts (`binding`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sinew_runtime::units;

use crate::ModelError;
use crate::processors::{NormMode, Normalizer, Statistics};

/// Name of the manifest in a policy's folder.
pub const MANIFEST: &str = "manifest.toml";

/// No manifest is larger.
const SIZE_LIMIT: u64 = 1 << 20;

/// What the inputs and outputs of an ONNX policy mean.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The ONNX file, relative to the manifest.
    pub model: PathBuf,
    /// Actions a second, as text.
    pub action_rate: Option<String>,
    /// The joint positions' input.
    pub state: Option<StateInput>,
    /// The cameras' inputs, by the policy's name of the camera.
    #[serde(default)]
    pub images: BTreeMap<String, ImageInput>,
    /// The instruction's input.
    pub instruction: Option<InstructionInput>,
    /// The starting noise's input.
    pub noise: Option<NoiseInput>,
    /// States that go from one inference to the next.
    #[serde(default)]
    pub recurrent: Vec<Recurrent>,
    /// The actions.
    pub action: ActionOutput,
    /// The second graph of a head that is looped here.
    pub flow: Option<Flow>,
}

/// One unit for all values, or one for each.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Units {
    /// For all.
    One(String),
    /// For each.
    Each(Vec<String>),
}

/// How values are normalised.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Normalization {
    /// `none`, `mean_std`, `min_max`, `quantiles` or `quantile10`.
    pub mode: String,
    /// The mode's statistics, by name.
    #[serde(flatten)]
    pub statistics: BTreeMap<String, Vec<f32>>,
}

/// The joint positions' input.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateInput {
    /// Input of the graph.
    pub input: String,
    /// What each value is.
    pub names: Vec<String>,
    /// Units of the values.
    pub units: Units,
    /// Normalisation, in those units.
    pub normalization: Option<Normalization>,
}

/// Order of an image's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Channels, rows, columns.
    Nchw,
    /// Rows, columns, channels.
    Nhwc,
}

/// Order of the colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Colors {
    /// Red first.
    Rgb,
    /// Blue first.
    Bgr,
}

/// Values of black and white.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Range {
    /// 0 and 1.
    #[serde(rename = "0..1")]
    Unit,
    /// −1 and 1.
    #[serde(rename = "-1..1")]
    Signed,
    /// 0 and 255.
    #[serde(rename = "0..255")]
    Byte,
}

/// How a frame becomes the input's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// Both sides are stretched, bilinear.
    Stretch,
    /// The aspect is kept; black at the left and the top.
    PadLeftTop,
    /// It must have that size.
    Exact,
}

/// One camera's input.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageInput {
    /// Input of the graph.
    pub input: String,
    /// Order of the dimensions.
    pub layout: Layout,
    /// Width and height; left out where the graph fixes them.
    pub size: Option<[usize; 2]>,
    /// Order of the colours.
    pub colors: Colors,
    /// Values of black and white.
    pub range: Range,
    /// How a frame becomes the input's size.
    pub fit: Fit,
    /// Normalisation by colour, in the network's order, after `range`.
    pub normalization: Option<Normalization>,
}

/// The instruction's input.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstructionInput {
    /// Input of the graph for the token ids.
    pub input: String,
    /// Input of the graph that is 1 on real tokens.
    pub mask: Option<String>,
    /// `tokenizer.json`, relative to the manifest.
    pub tokenizer: PathBuf,
    /// Longest instruction (tokens); left out where the graph fixes it.
    pub length: Option<usize>,
    /// Fills up to the length; left out: not padded.
    pub pad_token: Option<i64>,
    /// The text ends with a new line.
    #[serde(default)]
    pub append_newline: bool,
}

/// The starting noise's input.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseInput {
    /// Input of the graph.
    pub input: String,
    /// Its sizes without the leading ones; left out where the graph fixes them.
    pub shape: Option<Vec<usize>>,
    /// Standard deviation.
    #[serde(default = "one")]
    pub scale: f32,
}

/// A state that goes from one inference to the next.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recurrent {
    /// Input of the graph.
    pub input: String,
    /// Output that is the next inference's input.
    pub output: String,
    /// Longest pause between two observations that keeps it, as text.
    #[serde(default = "one_second")]
    pub reset_after: String,
}

/// The actions.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionOutput {
    /// Output of the graph; left out with [`Flow`].
    pub output: Option<String>,
    /// What each value is: the joints' names.
    pub names: Vec<String>,
    /// Units of the values.
    pub units: Units,
    /// Width of the network's actions, where it is more than the names.
    pub width: Option<usize>,
    /// Actions in a chunk; left out where the graph fixes it.
    pub horizon: Option<usize>,
    /// Normalisation, in those units.
    pub normalization: Option<Normalization>,
}

/// The graph that is run in every denoise step.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// The ONNX file, relative to the manifest.
    pub model: PathBuf,
    /// Its input for the sample.
    pub sample: String,
    /// Its input for the flow time.
    pub time: String,
    /// Its output: the velocity.
    pub velocity: String,
    /// Flow time of the noise: 0 or 1.
    pub noise_at: u8,
    /// Denoise steps.
    pub steps: usize,
    /// Its inputs that are outputs of the first graph.
    #[serde(default)]
    pub context: BTreeMap<String, String>,
    /// Standard deviation of the noise.
    #[serde(default = "one")]
    pub noise_scale: f32,
}

fn one() -> f32 {
    1.0
}

fn one_second() -> String {
    "1 s".to_owned()
}

impl Manifest {
    /// Reads `path`.
    ///
    /// # Errors
    /// [`ModelError`] naming the key or the line.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        Self::parse(path, &read_manifest(path)?)
    }

    /// The manifest in `text`; `path` is for messages.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ModelError> {
        parse_toml(path, text).map_err(|mut error| {
            if let ModelError::Config { reason, .. } = &mut error {
                reason.push_str("; `sinew model inspect FILE.onnx` prints a template");
            }
            error
        })
    }

    /// Actions a second.
    ///
    /// # Errors
    /// [`ModelError::Config`] when it is no frequency.
    pub fn action_rate_hz(&self, path: &Path) -> Result<Option<f64>, ModelError> {
        let read = |text: &String| {
            units::parse_frequency(text)
                .map_err(|e| ModelError::config(path, "action_rate", e.to_string()))
        };
        self.action_rate.as_ref().map(read).transpose()
    }
}

/// The text of the manifest `path`.
pub(super) fn read_manifest(path: &Path) -> Result<String, ModelError> {
    let size = std::fs::metadata(path).map_err(|e| ModelError::io(path, e))?.len();
    if size > SIZE_LIMIT {
        return Err(ModelError::malformed(path, "the file's size", size, "at most 1 MiB"));
    }
    std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))
}

/// `text` as `T`; an error says the line.
pub(super) fn parse_toml<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: &str,
) -> Result<T, ModelError> {
    toml::from_str(text).map_err(|e: toml::de::Error| {
        let reason = format!("cannot be read: {}", e.to_string().trim_end());
        ModelError::config(path, "the file", reason)
    })
}

/// The first TOML example in the module documentation of `source`.
#[cfg(test)]
pub(super) fn documented(source: &str) -> String {
    let lines = source.lines().skip_while(|line| *line != "//! ```toml").skip(1);
    let lines = lines.take_while(|line| *line != "//! ```");
    lines.map(|line| format!("{}\n", line.trim_start_matches("//!"))).collect()
}

impl Recurrent {
    /// Longest pause between two observations that keeps the state.
    ///
    /// # Errors
    /// [`ModelError::Config`] when it is no duration.
    pub fn pause(&self, path: &Path) -> Result<Duration, ModelError> {
        units::parse_duration(&self.reset_after)
            .map_err(|e| ModelError::config(path, "recurrent.reset_after", e.to_string()))
    }
}

impl Units {
    /// Which of `width` values are degrees.
    ///
    /// # Errors
    /// [`ModelError::Config`] for another number of units.
    pub fn degrees(&self, path: &Path, key: &str, width: usize) -> Result<Vec<bool>, ModelError> {
        match self {
            Self::One(unit) => Ok(vec![unit == "deg"; width]),
            Self::Each(units) if units.len() == width => {
                Ok(units.iter().map(|unit| unit == "deg").collect())
            }
            Self::Each(units) => {
                let reason = format!("has {} entries, there are {width} names", units.len());
                Err(ModelError::config(path, &format!("{key}.units"), reason))
            }
        }
    }
}

/// The normaliser of `key`, `width` values wide.
///
/// # Errors
/// [`ModelError::Config`] for an unknown mode or statistic, a missing one, or one of another width.
pub fn normalizer(
    path: &Path,
    key: &str,
    width: usize,
    normalization: Option<&Normalization>,
) -> Result<Normalizer, ModelError> {
    let Some(normalization) = normalization else { return Ok(Normalizer::identity()) };
    let fail = |reason: String| ModelError::config(path, &format!("{key}.normalization"), reason);
    let mode = match normalization.mode.as_str() {
        "none" => NormMode::Identity,
        other => NormMode::from_name(&other.to_uppercase())
            .filter(|mode| *mode != NormMode::Identity && other == other.to_lowercase())
            .ok_or_else(|| {
                let known = "none, mean_std, min_max, quantiles, quantile10";
                fail(format!("has mode `{other}`, expected one of {known}"))
            })?,
    };
    let needed: Vec<_> = mode.statistics().map_or(Vec::new(), |(low, high)| vec![low, high]);
    if let Some(name) =
        normalization.statistics.keys().find(|name| !needed.contains(&name.as_str()))
    {
        return Err(fail(format!(
            "has `{name}`, which mode `{}` does not use",
            normalization.mode
        )));
    }
    if let Some(name) = needed.iter().find(|name| !normalization.statistics.contains_key(**name)) {
        return Err(fail(format!("lacks `{name}`, which mode `{}` needs", normalization.mode)));
    }
    let named = |(name, values): (&String, &Vec<f32>)| (format!("{key}.{name}"), values.clone());
    let statistics: Statistics = normalization.statistics.iter().map(named).collect();
    Normalizer::new(mode, key, width, &statistics, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalization(text: &str) -> Result<Normalizer, ModelError> {
        let read = toml::from_str(text).expect("it has the form");
        normalizer(Path::new(MANIFEST), "state", 2, Some(&read))
    }

    #[test]
    fn the_manifest_in_the_documentation_is_read() {
        let text = documented(include_str!("manifest.rs"));
        let manifest =
            Manifest::parse(Path::new(MANIFEST), &text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(manifest.action_rate_hz(Path::new(MANIFEST)).ok(), Some(Some(30.0)));
        assert_eq!(manifest.flow.map(|flow| flow.steps), Some(10));
    }

    #[test]
    fn normalisation_needs_just_its_own_statistics() {
        assert!(normalization("mode = 'none'").is_ok());
        assert!(normalization("mode = 'min_max'\nmin = [0.0, 1.0]\nmax = [1.0, 2.0]").is_ok());
        for (text, words) in [
            ("mode = 'MEAN_STD'", "expected one of none, mean_std"),
            ("mode = 'mean_std'\nmean = [0.0, 0.0]", "lacks `std`"),
            ("mode = 'none'\nmean = [0.0, 0.0]", "does not use"),
            ("mode = 'min_max'\nmin = [0.0]\nmax = [1.0, 2.0]", "have 1 values, the feature has 2"),
            ("mode = 'min_max'\nmin = [0.0, nan]\nmax = [1.0, 2.0]", "NaN"),
        ] {
            let error = normalization(text).expect_err(text).to_string();
            assert!(error.contains(words) && error.contains("state"), "{error}");
        }
    }
}
