//! Retrieve-then-steer (arXiv 2605.10094): denoising starts near what worked in like situations.
//!
//! The chunks of remembered successes whose observations are most like this one, and which agree with each other,
//! are averaged; the flow starts from that chunk, noised to an intermediate time, and the frozen head does the rest.
//! The surer the memory, the nearer to it. Where nothing like it is remembered the head samples as ever.
//!
//! Where the paper leaves open how similarity and spread become a confidence and a time, the formulas here are our
//! own ([`RecallConfig::time`]).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sinew_runtime::{
    ActionChunk, ActionKind, CacheUse, ChunkRequest, Image, Observation, Policy, PolicyError,
    PolicySpec, Prefix, PrefixUse, Progress,
};

use super::memory::{Memory, MemoryError, Record};

/// Weights of remembered chunks fall by `e` when their similarity falls by this much.
const TEMPERATURE: f64 = 0.05;
/// Records of one episode, at most.
const EPISODE: usize = 4096;

/// Turns an observation into features whose cosine says how alike two of them are.
pub trait Encoder: Send {
    /// Its name; another name's features are never compared with these.
    fn name(&self) -> String;

    /// Number of features.
    fn width(&self) -> usize;

    /// The features of `observation`.
    ///
    /// # Errors
    /// [`PolicyError`] when it lacks something.
    fn encode(&mut self, observation: &Observation) -> Result<Vec<f32>, PolicyError>;
}

/// A glance: every camera's picture in 8 x 8 squares of mean colour, less the mean of all, and the joints.
///
/// It tells poses of arm and objects apart, not kinds of objects, and needs no network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glance {
    cameras: Vec<String>,
    joints: usize,
}

impl Glance {
    const SIDE: usize = 8;

    /// The encoder for these cameras and that many joints.
    pub fn new(cameras: Vec<String>, joints: usize) -> Self {
        Self { cameras, joints }
    }
}

impl Encoder for Glance {
    fn name(&self) -> String {
        format!("glance-1 {}", self.cameras.join(","))
    }

    fn width(&self) -> usize {
        self.cameras.len() * Self::SIDE * Self::SIDE * 3 + self.joints
    }

    fn encode(&mut self, observation: &Observation) -> Result<Vec<f32>, PolicyError> {
        let mut features = Vec::with_capacity(self.width());
        for camera in &self.cameras {
            let image = observation.images.iter().find(|i| i.camera == *camera);
            let image =
                image.ok_or_else(|| PolicyError::MissingCamera { camera: camera.clone() })?;
            squares(&image.frame.image, Self::SIDE, &mut features);
        }
        let count = features.len().max(1) as f32;
        let mean = features.iter().sum::<f32>() / count;
        features.iter_mut().for_each(|v| *v -= mean);
        let found = observation.proprioception.len();
        if found != self.joints {
            return Err(PolicyError::StateWidth { expected: self.joints, found });
        }
        // A radian counts like a full change of colour of a few squares.
        features.extend(observation.proprioception.iter().map(|v| *v as f32));
        if features.iter().any(|v| !v.is_finite()) {
            return Err(PolicyError::NotFinite { what: "state" });
        }
        let size = features.iter().map(|v| v * v).sum::<f32>().sqrt();
        if size > 0.0 {
            features.iter_mut().for_each(|v| *v /= size);
        }
        Ok(features)
    }
}

/// Mean colours (0 to 1) of `side` x `side` squares of `image`, appended to `out`.
fn squares(image: &Image, side: usize, out: &mut Vec<f32>) {
    let (width, height) = (image.width(), image.height());
    for row in 0..side {
        for column in 0..side {
            let mut sums = [0u64; 3];
            let mut count = 0u64;
            for y in row * height / side..(row + 1) * height / side {
                for x in column * width / side..(column + 1) * width / side {
                    let at = (y * width + x) * 3;
                    for (sum, value) in sums.iter_mut().zip(image.data()[at..].iter()) {
                        *sum += u64::from(*value);
                    }
                    count += 1;
                }
            }
            out.extend(sums.map(|s| s as f32 / (255 * count.max(1)) as f32));
        }
    }
}

/// How far a memory is followed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecallConfig {
    /// Observations less alike than this (cosine) are another situation; it belongs to the encoder.
    pub similarity: f64,
    /// Remembered chunks that are looked at, at most.
    pub most: usize,
    /// Chunks farther apart than this (mean distance, the action's units) contradict each other.
    pub spread: f64,
    /// Flow times that denoising starts at: with the surest memory, and with the least sure one.
    pub times: (f64, f64),
}

impl Default for RecallConfig {
    fn default() -> Self {
        Self { similarity: 0.98, most: 10, spread: 0.3, times: (0.4, 0.9) }
    }
}

impl RecallConfig {
    /// The flow time to start at when the best memory has `similarity` and those followed are `spread` apart.
    ///
    /// `c = 4 u − 2 − 2 spread / most spread`, with `u` from 0 at the least similarity to 1; the time falls with
    /// the logistic function of `c`.
    pub fn time(&self, similarity: f64, spread: f64) -> f64 {
        let alike = (similarity - self.similarity) / (1.0 - self.similarity).max(1e-9);
        let sure = 4.0 * alike.clamp(0.0, 1.0) - 2.0 - 2.0 * spread / self.spread.max(1e-9);
        let (near, far) = self.times;
        near + (far - near) / (1.0 + sure.exp())
    }
}

/// What is remembered of a situation.
#[derive(Debug, Clone, PartialEq)]
struct Elite {
    chunk: Vec<f64>,
    time: f64,
    looked_at: usize,
    used: usize,
}

/// The records of the episode under way, and what becomes of them.
#[derive(Debug, Clone)]
pub struct Episode(Arc<Mutex<Log>>);

#[derive(Debug)]
struct Log {
    open: Vec<Record>,
    kept: Memory,
}

impl Episode {
    /// A log that keeps successes in `memory`.
    pub fn new(memory: Memory) -> Self {
        Self(Arc::new(Mutex::new(Log { open: Vec::new(), kept: memory })))
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        // Every change is whole: a poisoned lock only says that somebody else died.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, record: Record) {
        let mut log = self.log();
        if log.open.len() < EPISODE {
            log.open.push(record);
        }
    }

    /// The episode is over: its chunks are kept after a success and forgotten else. How many were kept.
    pub fn end(&self, success: bool) -> usize {
        let mut log = self.log();
        let open = std::mem::take(&mut log.open);
        if !success {
            return 0;
        }
        open.into_iter().map(|record| usize::from(log.kept.push(record))).sum()
    }

    /// Writes what is kept to `path`.
    ///
    /// # Errors
    /// [`MemoryError::File`].
    pub fn save(&self, path: &Path) -> Result<(), MemoryError> {
        self.log().kept.save(path)
    }

    /// Number of records that are kept.
    pub fn kept(&self) -> usize {
        self.log().kept.records().len()
    }
}

/// A policy that starts from what it remembers.
///
/// Remembered is what the memory held when the wrapper was made: the same observations and requests give the same
/// chunks for the whole run. Successes of the run go to the [`Episode`], for the next one. A request that brings a
/// plan of its own is passed on unchanged: the plan comes first.
pub struct Recall {
    policy: Box<dyn Policy>,
    memory: Memory,
    encoder: Box<dyn Encoder>,
    kinds: Vec<ActionKind>,
    config: RecallConfig,
    episode: Option<Episode>,
    run: Option<Run>,
}

struct Run {
    task: String,
    features: Vec<f32>,
    looked_at: usize,
    used: usize,
}

impl Recall {
    /// `policy`, whose actions are of `kinds`, with `memory`; what it makes goes to `episode`.
    ///
    /// # Errors
    /// [`PolicyError::Unsupported`] when the head cannot start from a guess, or the parts do not fit each other.
    pub fn new(
        policy: Box<dyn Policy>,
        memory: Memory,
        encoder: Box<dyn Encoder>,
        kinds: Vec<ActionKind>,
        config: RecallConfig,
        episode: Option<Episode>,
    ) -> Result<Self, PolicyError> {
        let (spec, shape) = (policy.spec(), memory.shape());
        if !spec.prefix.warm_start {
            return Err(PolicyError::Unsupported("a start from what is remembered"));
        }
        let fits = shape.dim == spec.action_dim
            && shape.horizon == spec.action_horizon
            && shape.features == encoder.width()
            && kinds.len() == spec.action_dim;
        if !fits {
            return Err(PolicyError::Unsupported("a memory of another shape"));
        }
        let (near, far) = config.times;
        if !(near > 0.0 && near <= far && far < 1.0 && config.similarity < 1.0) {
            return Err(PolicyError::Unsupported("flow times that are not between 0 and 1"));
        }
        Ok(Self { policy, memory, encoder, kinds, config, episode, run: None })
    }

    /// What is remembered of `features`; `None` without anything like it.
    fn recall(&self, task: &str, features: &[f32]) -> Option<Elite> {
        let RecallConfig { similarity, most, spread, .. } = self.config;
        let found = self.memory.nearest(task, features, most, similarity);
        let dim = self.memory.shape().dim;
        // The largest set around one of them that agrees with it; the most alike of equals.
        let (members, apart) = (0..found.len())
            .map(|centre| {
                let near: Vec<(usize, f64)> = (0..found.len())
                    .map(|other| {
                        (other, warped(&found[centre].1.chunk, &found[other].1.chunk, dim))
                    })
                    .filter(|(_, distance)| *distance <= spread)
                    .collect();
                let apart = near.iter().map(|n| n.1).sum::<f64>() / near.len().max(1) as f64;
                (near.into_iter().map(|n| n.0).collect::<Vec<_>>(), apart)
            })
            .reduce(|best, next| if next.0.len() > best.0.len() { next } else { best })?;
        let best = members.iter().map(|m| found[*m].0).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> =
            members.iter().map(|m| ((found[*m].0 - best) / TEMPERATURE).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chunks: Vec<&[f32]> = members.iter().map(|m| found[*m].1.chunk.as_slice()).collect();
        let chunk = (0..chunks.first()?.len())
            .map(|at| {
                if self.kinds[at % dim].blends() {
                    let sum = chunks.iter().zip(&weights).map(|(c, w)| f64::from(c[at]) * w);
                    sum.sum::<f64>() / total
                } else {
                    // Half open is not a compromise: the most alike decides.
                    f64::from(chunks[0][at])
                }
            })
            .collect();
        let time = self.config.time(best, apart);
        Some(Elite { chunk, time, looked_at: found.len(), used: members.len() })
    }
}

/// Mean distance along the best alignment of two chunks (dynamic time warping, steps of one action).
fn warped(a: &[f32], b: &[f32], dim: usize) -> f64 {
    let distance = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum::<f64>().sqrt()
    };
    let columns = b.len() / dim;
    // Cost and length of the best way to each action of `b`.
    let mut last = vec![(f64::INFINITY, 0u32); columns + 1];
    last[0] = (0.0, 0);
    for action in a.chunks_exact(dim) {
        let mut row = vec![(f64::INFINITY, 0u32); columns + 1];
        for (k, other) in b.chunks_exact(dim).enumerate() {
            let ways = [last[k], last[k + 1], row[k]];
            let best = ways.into_iter().min_by(|x, y| x.0.total_cmp(&y.0)).unwrap_or(last[k]);
            row[k + 1] = (best.0 + distance(action, other), best.1 + 1);
        }
        last = row;
    }
    last.last().map_or(0.0, |(cost, length)| cost / f64::from((*length).max(1)))
}

impl Policy for Recall {
    fn spec(&self) -> &PolicySpec {
        self.policy.spec()
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        let features = self.encoder.encode(observation)?;
        let task = observation.instruction.clone();
        let mut run = Run { task, features, looked_at: 0, used: 0 };
        let mut request = request.clone();
        if request.prefix.is_none()
            && let Some(elite) = self.recall(&run.task, &run.features)
        {
            (run.looked_at, run.used) = (elite.looked_at, elite.used);
            let dim = self.memory.shape().dim;
            // The rest of the way takes its share of the steps.
            let steps = request.denoise_steps.unwrap_or(self.policy.spec().denoise_steps);
            request.denoise_steps = Some(((steps as f64 * elite.time).ceil() as usize).max(1));
            request.prefix = Some(Prefix {
                horizon: elite.chunk.len() / dim,
                actions: elite.chunk,
                dim,
                frozen: 0,
                usage: PrefixUse::WarmStart { time: elite.time },
            });
        }
        self.run = Some(run);
        self.policy.begin(observation, &request)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.policy.advance()
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let mut chunk = self.policy.take_chunk()?;
        if let Some(Run { task, features, looked_at, used }) = self.run.take() {
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let (lookups, hits) = (count(looked_at), count(used));
            let found = CacheUse { lookups, hits, ..CacheUse::default() };
            chunk.report.caches.push(("success_memory", found));
            if let Some(episode) = &self.episode {
                let values = chunk.values().iter().map(|v| *v as f32).collect();
                episode.add(Record { task, features, chunk: values });
            }
        }
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        self.policy.set_denoise_steps(steps)
    }

    fn forget(&mut self) {
        self.policy.forget();
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        self.policy.finish_early()
    }
}
