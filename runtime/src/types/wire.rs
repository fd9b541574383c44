//! Chunks and their reports as they come from another process: shapes are checked, names are those that we know.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{ActionChunk, CacheUse, ChunkReport, ChunkShapeError, Reach, StageTime};
use crate::Stamp;

/// Names of stages and caches; one that is not among them comes back as `other`.
const NAMES: [&str; 15] = [
    "preprocess",
    "vision",
    "prefix",
    "denoise",
    "warm_start",
    "frozen_prefix",
    "guidance",
    "denoiser",
    "prefix_kv",
    "frames",
    "observation_features",
    "candidates",
    "success_memory",
    "early_exit",
    "rolling_buffer",
];

fn known(name: &str) -> &'static str {
    NAMES.into_iter().find(|n| *n == name).unwrap_or("other")
}

/// A chunk before its shape is checked.
#[derive(Deserialize)]
pub(super) struct RawChunk {
    request: u64,
    instant: Stamp,
    dt: Duration,
    dim: usize,
    actions: Vec<f64>,
    report: ChunkReport,
}

impl TryFrom<RawChunk> for ActionChunk {
    type Error = ChunkShapeError;

    fn try_from(raw: RawChunk) -> Result<Self, ChunkShapeError> {
        let RawChunk { request, instant, dt, dim, actions, report } = raw;
        let mut chunk = Self::new(request, instant, dt, dim, actions)?;
        chunk.report = report;
        Ok(chunk)
    }
}

// The two below by hand: what is derived would want names that live as long as the bytes.

impl<'de> Deserialize<'de> for StageTime {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            stage: String,
            time: Duration,
        }
        let Raw { stage, time } = Raw::deserialize(from)?;
        Ok(Self { stage: known(&stage), time })
    }
}

impl<'de> Deserialize<'de> for ChunkReport {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            stages: Vec<StageTime>,
            denoise_steps: usize,
            caches: Vec<(String, CacheUse)>,
            #[serde(default)]
            reach: Option<Reach>,
        }
        let Raw { stages, denoise_steps, caches, reach } = Raw::deserialize(from)?;
        let caches = caches.into_iter().map(|(name, used)| (known(&name), used)).collect();
        Ok(Self { stages, denoise_steps, caches, reach })
    }
}
