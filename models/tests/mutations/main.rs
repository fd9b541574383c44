//! Damaged and hostile checkpoints: 200 seeded mutations of each family in each format. Each one either loads
//! and runs, or is an error that names the file; nothing panics, and loading never takes more memory than a
//! few times the files' size.
//!
//! The unsafe code here: the allocator's pass-through to the system's.
#![allow(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;
mod damage;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{copy_folder, fixtures, reference};
use damage::{Damaged, Random};
use sinew_models::{
    Checkpoint, LoadOptions, QuantType, RANDOM_ARCHITECTURES, RandomSize, families, load_policy,
    quantize, random,
};
use sinew_runtime::{
    CameraFrame, ChunkRequest, Image, Observation, ObservedImage, Policy, PolicyError, Stamp,
    inference,
};
use tempfile::TempDir;

/// Mutations of one family in one format.
const MUTATIONS: u64 = 200;

/// Bytes that one allocation may have; a larger one fails at once, instead of taking the machine with it.
const REFUSED: usize = 1 << 30;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Counts the bytes in use by the whole process.
struct Counting;

// SAFETY: every call goes to `System`, which upholds the contract; a refused one returns null, as it may.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > REFUSED {
            return std::ptr::null_mut();
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One measurement at a time: the counters are the whole process's.
static TURN: Mutex<()> = Mutex::new(());

/// What `load` gives, and the most bytes that it had in use.
fn measured<T>(load: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = load();
    (result, PEAK.load(Ordering::Relaxed).saturating_sub(before))
}

/// Whole checkpoints, one a family: the repository's own, else random ones, else LeRobot's recorded ones.
fn checkpoints() -> Vec<(String, PathBuf, Option<TempDir>)> {
    let mut found = Vec::new();
    for name in families::FAMILIES.iter().map(|family| family.name) {
        // Some have more than one recorded checkpoint, which differ in what follows their name.
        let recorded = [name.to_owned(), format!("{name}_ddpm")];
        let own = [format!("{name}_tiny"), format!("reference/{name}")];
        let own = own.iter().map(|folder| fixtures().join(folder)).find(|path| path.is_dir());
        if own.is_none() && RANDOM_ARCHITECTURES.contains(&name) {
            let folder = tempfile::tempdir().expect("there is room");
            random(name, RandomSize::Tiny, 1, folder.path()).unwrap_or_else(|e| panic!("{e}"));
            found.push((name.to_owned(), folder.path().to_owned(), Some(folder)));
            continue;
        }
        let path = own.or_else(|| recorded.iter().find_map(|folder| reference(folder)));
        found.extend(path.map(|path| (name.to_owned(), path, None)));
    }
    found
}

fn options(skip_hash: bool) -> LoadOptions {
    LoadOptions {
        action_rate_hz: Some(10.0),
        denoise_steps: Some(1),
        skip_hash,
        ..LoadOptions::default()
    }
}

/// Width and height of the images that the whole checkpoint is made for.
fn image_size(path: &Path) -> (usize, usize) {
    let checkpoint = Checkpoint::open(path, false).unwrap_or_else(|e| panic!("{e}"));
    match checkpoint.features.cameras().next() {
        Some((_, &[_, height, width])) => (width, height),
        _ => (64, 48),
    }
}

fn observation(policy: &dyn Policy, (width, height): (usize, usize)) -> Observation {
    let spec = policy.spec();
    let images = spec.cameras.iter().map(|camera| {
        let data: Vec<u8> = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect();
        let image = Image::new(width, height, data.into()).expect("it fits its shape");
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        ObservedImage { camera: camera.clone(), frame, age: Default::default() }
    });
    Observation {
        instant: Stamp(0),
        images: images.collect(),
        proprioception: vec![0.1; spec.state_dim],
        proprioception_age: Default::default(),
        instruction: "push the button".to_owned(),
    }
}

fn run(policy: &mut dyn Policy, images: (usize, usize)) -> Result<(), PolicyError> {
    let observation = observation(policy, images);
    let request = ChunkRequest { denoise_steps: Some(1), ..ChunkRequest::default() };
    let chunk = inference::run(policy, &observation, &request)?;
    assert!(chunk.values().iter().all(|v| v.is_finite()), "a chunk of what is no number");
    Ok(())
}

/// How the mutations ended.
#[derive(Debug, Default)]
struct Ends {
    images: (usize, usize),
    refused: usize,
    failed_later: usize,
    ran: usize,
    failures: Vec<String>,
    /// Most bytes in use beyond what the whole checkpoint takes.
    most: usize,
}

impl Ends {
    /// Loads what `damaged` left at `path`, and runs it where that cannot take forever.
    fn try_one(&mut self, path: &Path, damaged: &Damaged, skip_hash: bool, most: usize) {
        let attempt =
            || {
                let (policy, bytes) = measured(|| load_policy(path, &options(skip_hash)));
                let policy = policy.map_err(|e| e.to_string());
                let ran = policy.map(|mut policy| {
                    if damaged.sizes { Ok(()) } else { run(policy.as_mut(), self.images) }
                });
                (ran, bytes)
            };
        let what = &damaged.what;
        let Ok((ran, bytes)) = catch_unwind(AssertUnwindSafe(attempt)) else {
            self.failures.push(format!("panics: {what}"));
            return;
        };
        self.most = self.most.max(bytes);
        if bytes > most {
            self.failures.push(format!("takes {bytes} bytes of {most}: {what}"));
        }
        match ran {
            Ok(Ok(())) => self.ran += 1,
            Ok(Err(_)) => self.failed_later += 1,
            Err(text) if text.contains(&*path.to_string_lossy()) => self.refused += 1,
            Err(text) => self.failures.push(format!("does not name the file: {text}: {what}")),
        }
    }

    fn finish(self, name: &str) {
        let (refused, later, ran, most) = (self.refused, self.failed_later, self.ran, self.most);
        println!(
            "{name}: {refused} refused, {later} failed in use, {ran} ran, at most {most} bytes"
        );
        let failures = self.failures.join("\n");
        assert!(failures.is_empty(), "{name}:\n{failures}");
        assert!(refused as u64 > MUTATIONS / 4, "{name}: hardly anything was noticed");
    }
}

fn size(path: &Path) -> usize {
    damage::files(path).values().map(Vec::len).sum()
}

/// Bytes that loading may take: what the whole checkpoint takes, and three times its size.
fn limit(path: &Path, images: (usize, usize)) -> usize {
    // The first load also fills what the process keeps.
    for _ in 0..2 {
        load_policy(path, &options(false)).unwrap_or_else(|e| panic!("{e}"));
    }
    let (policy, bytes) = measured(|| load_policy(path, &options(false)));
    let mut policy = policy.unwrap_or_else(|e| panic!("{e}"));
    run(policy.as_mut(), images).unwrap_or_else(|e| panic!("{e}"));
    bytes + 3 * size(path)
}

#[test]
fn damaged_folders_run_or_are_named() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for (name, source, _folder) in checkpoints() {
        let folder = tempfile::tempdir().expect("there is room");
        copy_folder(&source, folder.path());
        let files = damage::files(folder.path());
        let images = image_size(&source);
        let most = limit(folder.path(), images);
        let mut ends = Ends { images, ..Ends::default() };
        for seed in 0..MUTATIONS {
            let damaged = damage::folder(&files, seed);
            let path = folder.path().join(&damaged.file);
            std::fs::write(&path, &damaged.bytes).expect("there is room");
            ends.try_one(folder.path(), &damaged, false, most);
            std::fs::write(&path, &files[&damaged.file]).expect("there is room");
        }
        ends.finish(&format!("{name}, folder"));
    }
}

#[test]
fn damaged_bundles_run_or_are_named() {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for (name, source, _folder) in checkpoints() {
        let folder = tempfile::tempdir().expect("there is room");
        let path = folder.path().join("damaged.gguf");
        quantize(&source, QuantType::Q8_0, &path).unwrap_or_else(|e| panic!("{e}"));
        let whole = std::fs::read(&path).expect("it was written");
        let images = image_size(&source);
        let most = limit(&path, images);
        let mut ends = Ends { images, ..Ends::default() };
        for seed in 0..MUTATIONS {
            let damaged = damage::bundle(&whole, seed);
            std::fs::write(&path, &damaged.bytes).expect("there is room");
            // Mostly without the hash, which would notice every change of the data by itself.
            let skip_hash = Random::new(seed).below(4) != 0;
            ends.try_one(&path, &damaged, skip_hash, most);
        }
        ends.finish(&format!("{name}, bundle"));
    }
}
