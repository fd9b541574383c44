//! Which layers quantisation hurts: the action error when one group of layers alone is quantised.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::inputs::draw;
use super::{Subject, compare};
use crate::checkpoint::{Checkpoint, layer_group};
use crate::kernels::Compute;
use crate::processors::Boundary;
use crate::{ModelError, QuantType, quantize};

/// Action error of a policy in which one group of layers is quantised, and computes so, and all others are exact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSensitivity {
    /// The group: a numbered layer of a stack, or what stands alone; `all` for all of them.
    pub layers: String,
    /// Its share of the weights.
    pub weights: f64,
    /// Mean action error as a share of the action range.
    pub mean_relative: f64,
    /// 99th percentile.
    pub p99_relative: f64,
    /// Largest.
    pub max_relative: f64,
}

/// Quantises the checkpoint `folder` to `kind` and compares the actions on `cases` inputs of `seed`, group by group, with
/// the group's layers computing as `compute` says: those that hurt most first, after all together.
///
/// The bundle is written into `scratch` and removed. `progress` is told each group, its number and how many there are.
///
/// # Errors
/// [`ModelError`] of reading, quantising or running.
pub fn sensitivity(
    folder: &Path,
    kind: QuantType,
    compute: Compute,
    scratch: &Path,
    (cases, seed): (usize, u64),
    progress: &mut dyn FnMut(&str, usize, usize),
) -> Result<Vec<LayerSensitivity>, ModelError> {
    let bundle = scratch.join(format!("sinew-sensitivity-{}.gguf", std::process::id()));
    let rows = quantize(folder, kind, &bundle).and_then(|()| {
        let exact = Checkpoint::open(folder, true)?;
        let quantized = Checkpoint::open(&bundle, true)?.computing(compute);
        rows(&exact, &quantized, compute, (cases.max(1), seed), progress)
    });
    // Missing when writing it failed, which `rows` says.
    let _ = std::fs::remove_file(&bundle);
    rows
}

fn rows(
    exact: &Checkpoint,
    quantized: &Checkpoint,
    compute: Compute,
    (cases, seed): (usize, u64),
    progress: &mut dyn FnMut(&str, usize, usize),
) -> Result<Vec<LayerSensitivity>, ModelError> {
    let weights = |group: Option<&str>| -> usize {
        let all = quantized.store.iter().filter(|(_, tensor)| tensor.shape.len() > 1);
        let ours = all.filter(|(name, _)| group.is_none_or(|group| layer_group(name) == group));
        ours.map(|(_, tensor)| tensor.values()).sum()
    };
    let matrices = quantized.store.iter().filter(|(_, tensor)| tensor.shape.len() > 1);
    let groups: BTreeSet<&str> = matrices.map(|(name, _)| layer_group(name)).collect();
    let reference = reference(exact, cases, seed)?;
    let one = |name: &str, policy: &Checkpoint, group| {
        let (mut first, mut second) =
            (Subject::recorded(reference.clone()), Subject::whole(policy)?);
        let report = compare(exact, &mut first, &mut second, cases, seed)?;
        Ok::<_, ModelError>(LayerSensitivity {
            layers: name.to_owned(),
            weights: weights(group) as f64 / weights(None).max(1) as f64,
            mean_relative: report.mean_relative,
            p99_relative: report.p99_relative,
            max_relative: report.max_relative,
        })
    };
    progress("all", 0, groups.len());
    let all = one("all", quantized, None)?;
    let mut rows = Vec::with_capacity(groups.len() + 1);
    for (index, group) in groups.iter().enumerate() {
        progress(group, index + 1, groups.len());
        let mut policy = exact.clone();
        policy.store = exact.store.with_group(group, &quantized.store, compute);
        rows.push(one(group, &policy, Some(*group))?);
    }
    // A group that changes nothing (a table that is looked up, one that is kept exact) says nothing.
    rows.retain(|row| row.max_relative > 0.0);
    rows.sort_by(|a, b| b.mean_relative.total_cmp(&a.mean_relative));
    rows.insert(0, all);
    Ok(rows)
}

/// The exact policy's actions, on the inputs that [`compare`] will draw.
fn reference(exact: &Checkpoint, cases: usize, seed: u64) -> Result<Vec<Vec<f64>>, ModelError> {
    let mut policy = Subject::whole(exact)?;
    let boundary = Boundary::new(exact, 0)?;
    let drawn = draw(exact, &boundary, cases, seed);
    drawn.map(|input| input.and_then(|(seen, seed)| Ok(policy.run(&seen, seed)?.0))).collect()
}
