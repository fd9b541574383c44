//! What worked before: observations' features and the chunks that were played from them, in one bounded file.
//!
//! The file: `SINEWMEM`, version and header length (u32, little-endian), a JSON header, the features and then the
//! chunks of all records (f32, little-endian), and the SHA-256 of everything before it.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 8] = b"SINEWMEM";
const VERSION: u32 = 1;
const SUM: usize = 32;
/// Largest file that is read (bytes).
const MOST_BYTES: u64 = 1 << 30;
/// Largest width of features, and of a chunk.
const WIDEST: usize = 1 << 16;

/// Why a memory cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The file cannot be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's word.
        reason: String,
    },
    /// It is no memory, or torn.
    #[error("{}: it is no memory of successes: {reason}; delete it to begin anew", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It belongs to something else.
    #[error(
        "{}: it was made with the {what} `{found}`, this is `{expected}`; name another file", path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
}

/// What a memory's records are of; two memories of different shape never mix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The policy: the sum of its files, or another name that changes with it.
    pub policy: String,
    /// The encoder of the features.
    pub encoder: String,
    /// Width of the features.
    pub features: usize,
    /// Action horizon.
    pub horizon: usize,
    /// Action dimension.
    pub dim: usize,
}

/// One chunk that was part of a success.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The instruction that was followed.
    pub task: String,
    /// The observation, of length one.
    pub features: Vec<f32>,
    /// The chunk, row by row (physical units).
    pub chunk: Vec<f32>,
}

/// Records of successes, the oldest forgotten first.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    shape: Shape,
    capacity: usize,
    records: VecDeque<Record>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    shape: Shape,
    tasks: Vec<String>,
    /// The task of each record.
    records: Vec<usize>,
}

impl Memory {
    /// An empty memory for at most `capacity` records.
    pub fn new(shape: Shape, capacity: usize) -> Self {
        Self { shape, capacity, records: VecDeque::new() }
    }

    /// The memory in `path`, or an empty one where there is no such file.
    ///
    /// # Errors
    /// [`MemoryError`] for a file that is torn, or of another policy, encoder or shape.
    pub fn open(path: &Path, shape: Shape, capacity: usize) -> Result<Self, MemoryError> {
        let mut memory = Self::new(shape, capacity);
        let file =
            |e: std::io::Error| MemoryError::File { path: path.to_owned(), reason: e.to_string() };
        let size = match std::fs::metadata(path) {
            Ok(found) => found.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(memory),
            Err(e) => return Err(file(e)),
        };
        let wrong =
            |reason: &str| MemoryError::Format { path: path.to_owned(), reason: reason.to_owned() };
        if size > MOST_BYTES {
            return Err(wrong("it is larger than a memory can be"));
        }
        let bytes = std::fs::read(path).map_err(file)?;
        let (header, values) = parse(&bytes).map_err(|e| wrong(&e))?;
        memory.check(path, &header.shape)?;
        let (features, chunk) = (memory.shape.features, memory.shape.horizon * memory.shape.dim);
        let split = header.records.len() * features;
        if values.len() != header.records.len() * (features + chunk) {
            return Err(wrong("its records do not fill it"));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(wrong("it holds a value that is not finite"));
        }
        let parts = values[..split].chunks_exact(features).zip(values[split..].chunks_exact(chunk));
        for (task, (features, chunk)) in header.records.iter().zip(parts) {
            let task = header.tasks.get(*task).ok_or_else(|| wrong("a record has no task"))?;
            let (features, chunk) = (features.to_vec(), chunk.to_vec());
            memory.push(Record { task: task.clone(), features, chunk });
        }
        Ok(memory)
    }

    fn check(&self, path: &Path, found: &Shape) -> Result<(), MemoryError> {
        let size = |s: &Shape| format!("{} features, {} x {}", s.features, s.horizon, s.dim);
        for (what, expected, found) in [
            ("policy", self.shape.policy.clone(), found.policy.clone()),
            ("encoder", self.shape.encoder.clone(), found.encoder.clone()),
            ("shape", size(&self.shape), size(found)),
        ] {
            if expected != found {
                return Err(MemoryError::Foreign { path: path.to_owned(), what, expected, found });
            }
        }
        Ok(())
    }

    /// Writes the memory to `path`, whole or not at all.
    ///
    /// # Errors
    /// [`MemoryError::File`].
    pub fn save(&self, path: &Path) -> Result<(), MemoryError> {
        let mut tasks: Vec<String> = Vec::new();
        let index =
            |task: &String, tasks: &mut Vec<String>| match tasks.iter().position(|t| t == task) {
                Some(index) => index,
                None => {
                    tasks.push(task.clone());
                    tasks.len() - 1
                }
            };
        let records = self.records.iter().map(|r| index(&r.task, &mut tasks)).collect();
        let header = Header { shape: self.shape.clone(), tasks, records };
        let fail = |reason: String| MemoryError::File { path: path.to_owned(), reason };
        let header = serde_json::to_vec(&header).map_err(|e| fail(e.to_string()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(header.len()).map_err(|e| fail(e.to_string()))?.to_le_bytes());
        bytes.extend(header);
        let features = self.records.iter().flat_map(|r| &r.features);
        let chunks = self.records.iter().flat_map(|r| &r.chunk);
        bytes.extend(features.chain(chunks).flat_map(|v| v.to_le_bytes()));
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        let mut draft = path.as_os_str().to_owned();
        draft.push(".part");
        let draft = PathBuf::from(draft);
        let written = std::fs::File::create(&draft)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&draft, path));
        written.map_err(|e| fail(e.to_string()))
    }

    /// Adds `record`, forgetting the oldest when it is full; false for one of another shape or not finite.
    pub fn push(&mut self, record: Record) -> bool {
        let Shape { features, horizon, dim, .. } = self.shape;
        let fits = record.features.len() == features && record.chunk.len() == horizon * dim;
        let finite = record.features.iter().chain(&record.chunk).all(|v| v.is_finite());
        if !(fits && finite && self.capacity > 0) {
            return false;
        }
        while self.records.len() >= self.capacity {
            self.records.pop_front();
        }
        self.records.push_back(record);
        true
    }

    /// What its records are of.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Its records, oldest first.
    pub fn records(&self) -> impl ExactSizeIterator<Item = &Record> {
        self.records.iter()
    }

    /// The `most` records of `task` that are most like `features`, at least by `similarity`, best first, with their
    /// cosines.
    pub fn nearest(
        &self,
        task: &str,
        features: &[f32],
        most: usize,
        similarity: f64,
    ) -> Vec<(f64, &Record)> {
        let mut found: Vec<(f64, &Record)> = (self.records.iter())
            .filter(|r| r.task == task)
            .map(|r| (cosine(&r.features, features), r))
            .filter(|(s, _)| *s >= similarity)
            .collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        found.truncate(most);
        found
    }
}

/// Cosine of the angle between `a` and `b`; 0 where one has no direction.
pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let size = (dot(a, a) * dot(b, b)).sqrt();
    if size > 0.0 { dot(a, b) / size } else { 0.0 }
}

/// Header and values of a file's bytes.
fn parse(bytes: &[u8]) -> Result<(Header, Vec<f32>), String> {
    let (body, sum) = bytes
        .len()
        .checked_sub(SUM)
        .map(|at| bytes.split_at(at))
        .ok_or("it is too short to be one")?;
    let rest = body.strip_prefix(MAGIC).ok_or("it does not begin with SINEWMEM")?;
    if Sha256::digest(body).as_slice() != sum {
        return Err("its SHA-256 is not that of its content".to_owned());
    }
    let (version, rest) = number(rest)?;
    if version != VERSION {
        return Err(format!("its version is {version}, this Sinew reads {VERSION}"));
    }
    let (length, rest) = number(rest)?;
    let (header, values) = usize::try_from(length)
        .ok()
        .and_then(|at| rest.split_at_checked(at))
        .ok_or("its header is longer than the file")?;
    let header: Header = serde_json::from_slice(header).map_err(|e| e.to_string())?;
    let Shape { features, horizon, dim, .. } = header.shape;
    let chunk = horizon.saturating_mul(dim);
    if !(1..=WIDEST).contains(&features) || !(1..=WIDEST).contains(&chunk) {
        return Err(format!("its shape is out of range: {features}, {horizon} x {dim}"));
    }
    if !values.len().is_multiple_of(4) {
        return Err("its values are cut off".to_owned());
    }
    let (whole, _) = values.as_chunks::<4>();
    Ok((header, whole.iter().map(|v| f32::from_le_bytes(*v)).collect()))
}

fn number(bytes: &[u8]) -> Result<(u32, &[u8]), String> {
    let (number, rest) = bytes.split_first_chunk::<4>().ok_or("it ends in its head")?;
    Ok((u32::from_le_bytes(*number), rest))
}
