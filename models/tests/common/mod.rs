//! Reading fixtures, shared by the tests.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use sinew_models::kernels::Matrix;
use sinew_models::processors::{NormMode, Normalizer};
use sinew_runtime::{CameraFrame, Image, Observation, ObservedImage, Stamp};

/// Where LeRobot's recorded results lie, when they are there.
pub fn reference(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("SINEW_REFERENCE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/reference"),
        PathBuf::from,
    );
    let path = root.join(name);
    if path.is_dir() {
        return Some(path);
    }
    println!("skipped: {} is not there; SINEW_REFERENCE names its parent folder", path.display());
    None
}

/// The repository's own fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

#[derive(Debug, Clone)]
pub struct Recorded {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    pub bytes: Vec<u8>,
}

/// The tensors of one file.
pub struct Case(pub HashMap<String, Recorded>);

impl Case {
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).expect("fixtures are whole");
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => words(data).map(f32::from_le_bytes).collect(),
                Dtype::U8 => data.iter().map(|v| f32::from(*v)).collect(),
                Dtype::I64 => words(data).map(|b| i64::from_le_bytes(b) as f32).collect(),
                Dtype::F16 => words(data).map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
                Dtype::BF16 => words(data)
                    .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, Recorded { shape: view.shape().to_vec(), values, bytes: data.to_vec() })
        });
        Self(tensors.collect())
    }

    pub fn get(&self, name: &str) -> &Recorded {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name} in the case"))
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Row `row` of a tensor whose dimension `axis` is the batch.
    pub fn row(&self, name: &str, axis: usize, row: usize) -> Vec<f32> {
        let tensor = self.get(name);
        let inner: usize = tensor.shape[axis + 1..].iter().product();
        let batch = tensor.shape[axis];
        let outer = tensor.values.chunks_exact(inner * batch);
        outer.flat_map(|block| block[row * inner..(row + 1) * inner].to_vec()).collect()
    }

    /// The observation of batch row `row`, before any processing.
    pub fn observation(&self, row: usize, instruction: &str) -> Observation {
        self.observation_at(&format!("raw.{row}."), instruction)
    }

    /// The observation whose tensors begin with `prefix`.
    pub fn observation_at(&self, prefix: &str, instruction: &str) -> Observation {
        let images = format!("{prefix}observation.images.");
        let mut images: Vec<_> = self
            .0
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix(&images)?.to_owned(), t)))
            .map(|(camera, t)| {
                let image = Image::new(t.shape[1], t.shape[0], t.bytes.clone().into());
                let image = image.expect("the recorded image fits its shape");
                let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
                ObservedImage { camera, frame, age: Default::default() }
            })
            .collect();
        // The order of the robot's cameras must not matter.
        images.sort_by(|a, b| b.camera.cmp(&a.camera));
        let state = self.get(&format!("{prefix}observation.state"));
        Observation {
            instant: Stamp(5),
            images,
            proprioception: state.values.iter().map(|v| f64::from(*v)).collect(),
            proprioception_age: Default::default(),
            instruction: instruction.to_owned(),
        }
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.chunks_exact(N).map(|c| c.try_into().expect("chunks have N bytes"))
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "numbers of values");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    worst.fold(0.0, |m: f32, d| if d > m || d.is_nan() { d } else { m })
}

/// The entries of a directory's `cases.json`.
pub fn cases(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("cases.json")).expect("every directory has one");
    let list: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    list["cases"].as_array().expect("a list of cases").clone()
}

/// Heads of `size` that lie side by side in each row (`[L, K·size]`) one after the other, as the references have them:
/// `[K, L, size]`.
pub fn heads_apart(x: &Matrix, size: usize) -> Vec<f32> {
    let heads = (0..x.width()).step_by(size);
    heads
        .flat_map(|start| x.iter().flat_map(move |row| &row[start..start + size]))
        .copied()
        .collect()
}

/// The worst differences seen, by name.
#[derive(Default)]
pub struct Worst(Vec<(String, f32)>);

impl Worst {
    pub fn check(&mut self, name: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
        let difference = max_difference(ours, theirs);
        assert!(difference <= tolerance, "{name} differs by {difference:e}");
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, worst)) => *worst = worst.max(difference),
            None => self.0.push((name.to_owned(), difference)),
        }
    }

    pub fn print(&self, title: &str) {
        let text: Vec<_> = self.0.iter().map(|(n, d)| format!("{n} {d:.1e}")).collect();
        println!("{title}: {}", text.join(", "));
    }
}

/// A normaliser from `stats.KEY.STAT` tensors.
pub fn normalizer(case: &Case, mode: NormMode, key: &str, width: usize) -> Normalizer {
    let statistics = case
        .0
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("stats.")?.to_owned(), t.values.clone())))
        .collect();
    Normalizer::new(mode, key, width, &statistics, Path::new("fixture"))
        .expect("the fixture's statistics are whole")
}

/// Rows of `theirs` (`[P, width]`) where `mask` is set.
pub fn valid(theirs: &[f32], mask: &[f32]) -> Vec<f32> {
    let width = theirs.len() / mask.len();
    let rows = theirs.chunks_exact(width).zip(mask).filter(|(_, m)| **m > 0.0);
    rows.flat_map(|(row, _)| row.to_vec()).collect()
}

/// Copies `from` with everything in it into the folder `to`.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("there is room");
    for entry in std::fs::read_dir(from).expect("it is a folder") {
        let entry = entry.expect("it can be listed");
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            // By contents: the original may be read-only.
            let bytes = std::fs::read(&path).expect("it can be read");
            std::fs::write(&target, bytes).expect("there is room");
        }
    }
}
