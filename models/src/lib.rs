//! Sinew's models: observations in, action chunks out.
//!
//! [`load_policy`] takes a LeRobot checkpoint folder or a `.gguf` bundle made by [`quantize`], and gives
//! a [`Policy`]. Both go through one code path: a bundle differs in how its weights are stored only.
//!
//! ```no_run
//! # fn main() -> Result<(), sinew_models::ModelError> {
//! let policy = sinew_models::load_policy("smolvla_base".as_ref(), &Default::default())?;
//! println!("{:?}", policy.spec());
//! # Ok(())
//! # }
//! ```

pub mod act;
mod anytime;
pub mod backbones;
mod beside;
pub mod caches;
pub mod checkpoint;
pub mod diffusion;
mod error;
pub mod exits;
pub mod families;
mod fetch;
pub mod gguf;
pub mod heads;
mod inspect;
pub mod kernels;
pub mod masked;
pub mod oft;
pub mod onnx;
pub mod pi;
pub mod processors;
mod random;
pub mod smolvla;
mod synthetic;
mod verify;
pub mod wrappers;
pub mod xvla;

use std::path::Path;

pub use checkpoint::Checkpoint;
pub use error::ModelError;
pub use fetch::fetch;
pub use gguf::{QuantType, quantize};
pub use inspect::{Inspection, KeptGroup, Normalization, Part, Supported, inspect, supported};
use sinew_runtime::Policy;
use sinew_runtime::action_space::SpaceKeys;
pub use synthetic::{RANDOM_ARCHITECTURES, RandomSize, random, random_smolvla};
pub use verify::{
    DimensionError, LayerSensitivity, QuantizationError, STAGE_THRESHOLD, StageError, VerifyReport,
    quantization_errors, sensitivity, verify,
};

/// What the user may set when loading a policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadOptions {
    /// Actions a second; overrides the checkpoint's.
    pub action_rate_hz: Option<f64>,
    /// Denoise steps; overrides the checkpoint's.
    pub denoise_steps: Option<usize>,
    /// How a denoise step follows the velocity, in flow-matching policies; `None`: by Euler's method.
    pub solver: Option<heads::flow::Solver>,
    /// How the network's layers compute.
    pub compute: kernels::Compute,
    /// Cameras that may be missing, beyond those that the checkpoint allows.
    pub missing_cameras: usize,
    /// Leaves out the check of a bundle's tensor data against its SHA-256.
    pub skip_hash: bool,
    /// How ONNX files are run.
    pub onnx: onnx::OnnxOptions,
    /// Go on from what is left of the last chunk (rolling buffers), in Diffusion Policies that were trained so.
    pub streaming: bool,
    /// What need not be computed again.
    pub caches: caches::CacheOptions,
}

impl LoadOptions {
    /// Actions a second of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError::RateUnknown`] when neither it nor the options give a usable one.
    pub fn rate(&self, checkpoint: &Checkpoint) -> Result<f64, ModelError> {
        let rate = self.action_rate_hz.or(checkpoint.actions.action_rate_hz);
        rate.filter(|rate| *rate > 0.0 && rate.is_finite())
            .ok_or_else(|| ModelError::RateUnknown { path: checkpoint.path.clone() })
    }
}

/// What the checkpoint at `path` says of its actions' space; nothing where it says nothing, or cannot be opened.
pub fn action_keys(path: &Path) -> SpaceKeys {
    Checkpoint::open(path, false).map(|c| c.actions.action_space).unwrap_or_default()
}

/// Loads the policy at `path`: a LeRobot checkpoint folder, a `.gguf` bundle, or a folder with an ONNX file and its
/// manifest (which counts where a checkpoint lies beside it).
///
/// # Errors
/// [`ModelError`] naming file, key or tensor, what was found and what to do; [`ModelError::NoSolver`] for a solver where
/// no velocity is followed.
pub fn load_policy(path: &Path, options: &LoadOptions) -> Result<Box<dyn Policy>, ModelError> {
    let no_solver = |head: &str| match options.solver {
        Some(_) => Err(ModelError::NoSolver { path: path.to_owned(), head: head.to_owned() }),
        None => Ok(()),
    };
    let no_buffer = |cache, head: &str, why| {
        let (path, head) = (path.to_owned(), head.to_owned());
        Err(ModelError::NoCache { path, head, cache, why })
    };
    if let Some(manifest) = onnx::manifest_of(path) {
        no_solver("an ONNX graph")?;
        if options.streaming {
            return no_buffer("streaming", "an ONNX graph", "has no rolling buffer");
        }
        let none = caches::Reusable { blocks: false, patches: false, exits: false };
        options.caches.check(path, "an ONNX graph", none)?;
        if options.caches.warm_start.is_some() {
            let (path, head) = (path.to_owned(), "an ONNX graph".to_owned());
            let why = "cannot start from a chunk";
            return Err(ModelError::NoCache { path, head, cache: "cache_warm_start", why });
        }
        return Ok(Box::new(onnx::OnnxPolicy::load(&manifest, options)?));
    }
    let checkpoint = Checkpoint::open(path, !options.skip_hash)?;
    if !checkpoint.family.follows_velocity {
        no_solver(checkpoint.family.head)?;
    }
    options.caches.check(path, checkpoint.family.head, checkpoint.family.caches)?;
    if options.streaming {
        let (head, caches) = (checkpoint.family.head, &options.caches);
        if !checkpoint.family.streams {
            return no_buffer("streaming", head, "has no rolling buffer");
        }
        if caches.denoiser != caches::DenoiserCache::Off {
            let why = "with `streaming` has actions of many noise levels in one evaluation";
            return no_buffer("cache_denoiser", head, why);
        }
        if caches.warm_start.is_some() {
            let why = "with `streaming` goes on from its buffer";
            return no_buffer("cache_warm_start", head, why);
        }
    }
    let policy = checkpoint.policy(options)?;
    let policy = match &options.caches.warm_start {
        Some(kinds) => wrappers::iterate(policy, &checkpoint, kinds.clone())?,
        None => policy,
    };
    let Some(config) = options.caches.compare else { return Ok(policy) };
    let units = wrappers::units(&checkpoint)?;
    let made = wrappers::Compared::new(policy, units, config);
    Ok(Box::new(made.map_err(|e| {
        ModelError::config(&checkpoint.config_path(), "output_features", format!("gives {e}"))
    })?))
}
