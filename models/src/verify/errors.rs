//! What quantisation costs: action errors of bundles against their checkpoint.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Subject, compare};
use crate::checkpoint::Checkpoint;
use crate::kernels::Compute;
use crate::{ModelError, QuantType, quantize};

/// Action error of one checkpoint in one quantised form.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QuantizationError {
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Its architecture.
    pub architecture: String,
    /// Type of the large matrices.
    pub quantization: String,
    /// How its layers compute.
    pub compute: Compute,
    /// Size of the weights file over the bundle's.
    pub smaller: f64,
    /// Mean action error, in the action's own unit.
    pub mean: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Mean action error as a share of the action range.
    pub mean_relative: f64,
}

/// Quantises each of `folders` to `q8_0`, `q4_k` and `q4_0`, and compares the actions on `cases` inputs of `seed`: computed
/// exactly, and with activations of 8 bits.
///
/// The bundles are written into `scratch` one after the other, and removed.
///
/// # Errors
/// [`ModelError`] of reading, quantising or running.
pub fn quantization_errors(
    folders: &[PathBuf],
    scratch: &Path,
    cases: usize,
    seed: u64,
) -> Result<Vec<QuantizationError>, ModelError> {
    let mut rows = Vec::new();
    for folder in folders {
        for kind in [QuantType::Q8_0, QuantType::Q4K, QuantType::Q4_0] {
            let bundle = scratch.join(format!("sinew-errors-{}.gguf", std::process::id()));
            let pair = both(folder, kind, &bundle, cases, seed);
            // Missing when writing it failed, which `pair` says.
            let _ = std::fs::remove_file(&bundle);
            rows.extend(pair?);
        }
    }
    Ok(rows)
}

fn both(
    folder: &Path,
    kind: QuantType,
    bundle: &Path,
    cases: usize,
    seed: u64,
) -> Result<[QuantizationError; 2], ModelError> {
    quantize(folder, kind, bundle)?;
    let (exact, quantized) = (Checkpoint::open(folder, true)?, Checkpoint::open(bundle, true)?);
    let size = |path: &Path| {
        std::fs::metadata(path).map(|m| m.len() as f64).map_err(|e| ModelError::io(path, e))
    };
    let smaller = size(exact.store.path())? / size(bundle)?;
    let one = |compute: Compute| {
        let quantized = quantized.computing(compute);
        let (mut first, mut second) = (Subject::whole(&exact)?, Subject::whole(&quantized)?);
        let report = compare(&exact, &mut first, &mut second, cases, seed)?;
        Ok::<_, ModelError>(QuantizationError {
            checkpoint: folder.to_owned(),
            architecture: exact.family.name.to_owned(),
            quantization: quantized.origin.quantization.clone().unwrap_or_default(),
            compute,
            smaller,
            mean: report.mean_absolute,
            p99: report.p99_absolute,
            max: report.max_absolute,
            mean_relative: report.mean_relative,
        })
    };
    Ok([one(Compute::Exact)?, one(Compute::Int8)?])
}
