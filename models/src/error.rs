//! Why a checkpoint or bundle cannot be used: the file, the tensor or key, what was found, what to do.

use std::path::{Path, PathBuf};

/// Why a model could not be read, built or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// A file of the checkpoint is not there.
    #[error("{}: not found; {remedy}", path.display())]
    FileMissing {
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: String,
    },
    /// A solver was chosen for a head that follows no velocity.
    #[error("{}: its head ({head}) follows no velocity, so it has no solver; leave `solver` out", path.display())]
    NoSolver {
        /// The policy.
        path: PathBuf,
        /// Its head.
        head: String,
    },
    /// A cache was chosen for a policy that has nothing to keep in it.
    #[error("{}: this policy ({head}) {why}; leave `{cache}` out", path.display())]
    NoCache {
        /// The policy.
        path: PathBuf,
        /// Its head.
        head: String,
        /// The launch key of the cache.
        cache: &'static str,
        /// What is missing.
        why: &'static str,
    },
    /// The checkpoint is of a kind that this runtime does not have.
    #[error(
        "{}: architecture `{found}` is not supported; this build runs: {}",
        path.display(),
        crate::families::FAMILIES.iter().map(|f| f.name).collect::<Vec<_>>().join(", ")
    )]
    UnknownArchitecture {
        /// The file that names it.
        path: PathBuf,
        /// Its name.
        found: String,
    },
    /// A key of a configuration file has a value that cannot be used.
    #[error("{}: `{key}` {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// What was found and what is expected.
        reason: String,
    },
    /// The weights lack a tensor.
    #[error(
        "{}: tensor `{tensor}` is missing; the file does not belong to the sizes in config.json, \
         or was saved incompletely: export the checkpoint again",
        path.display()
    )]
    TensorMissing {
        /// The weights file.
        path: PathBuf,
        /// The tensor's name in it.
        tensor: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}, config.json asks for {expected:?}; \
         use the config.json that was saved with these weights",
        path.display()
    )]
    TensorShape {
        /// The weights file.
        path: PathBuf,
        /// The tensor's name in it.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration gives.
        expected: Vec<usize>,
    },
    /// A tensor has a type that is not read here.
    #[error(
        "{}: tensor `{tensor}` has type {found}, expected {expected}; convert the weights",
        path.display()
    )]
    TensorType {
        /// The weights file.
        path: PathBuf,
        /// The tensor's name in it.
        tensor: String,
        /// Type in the file.
        found: String,
        /// Types that are read.
        expected: &'static str,
    },
    /// The file's structure is damaged or hostile.
    #[error(
        "{}: {what} is {found}, expected {expected}; the file is damaged or cut off: \
         copy or download it again",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// What stands there.
        found: String,
        /// What may stand there.
        expected: String,
    },
    /// The tensor data is not what the bundle's writer wrote.
    #[error(
        "{}: the tensor data has SHA-256 {found}, the file says {expected}; \
         copy the bundle again, or make it again with `sinew model quantize`",
        path.display()
    )]
    HashMismatch {
        /// The bundle.
        path: PathBuf,
        /// Hash of the data.
        found: String,
        /// Hash in the metadata.
        expected: String,
    },
    /// Threads that the kernels cannot have.
    #[error("threads of the kernels: {reason}")]
    Threads {
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// Statistics that would turn every action into nonsense.
    #[error("{}: statistics `{key}` {reason}", path.display())]
    Statistics {
        /// The statistics file.
        path: PathBuf,
        /// `FEATURE.STAT`.
        key: String,
        /// What was found and what is expected.
        reason: String,
    },
    /// The tokenizer cannot be used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nobody says how far apart the actions are.
    #[error(
        "{}: the checkpoint does not say how many actions a second it was trained at; \
         write {{\"action_rate_hz\": 30}} to sinew.json beside config.json, or set the rate where \
         the policy is configured",
        path.display()
    )]
    RateUnknown {
        /// The checkpoint.
        path: PathBuf,
    },
    /// Two checkpoints cannot be compared.
    #[error(
        "the two checkpoints differ in {what}: {a} and {b}; compare versions of one checkpoint"
    )]
    NotComparable {
        /// What differs.
        what: &'static str,
        /// Its value in the first.
        a: String,
        /// Its value in the second.
        b: String,
    },
    /// An ONNX file that cannot be run.
    #[error("{}: {reason}", path.display())]
    Onnx {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Downloading failed.
    #[error("{0}")]
    Fetch(String),
    /// The computation failed.
    #[error("computation failed: {0}")]
    Compute(#[from] candle_core::Error),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn config(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }

    pub(crate) fn malformed(
        path: &Path,
        what: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what: what.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
