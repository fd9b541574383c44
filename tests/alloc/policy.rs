//! What a policy takes from the system for a chunk once it is warm, counted by this test's own global allocator.
//!
//! The unsafe code here: the allocator's pass-through to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sinew_models::kernels::Compute;
use sinew_models::{Checkpoint, LoadOptions, RandomSize, load_policy, random};
use sinew_runtime::{
    CameraFrame, ChunkRequest, Image, Observation, ObservedImage, Policy, Progress, Stamp,
};

static ON: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes unchanged to `System`, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Ordering::Relaxed) {
            CALLS.fetch_add(1, Ordering::Relaxed);
            BYTES.fetch_add(layout.size(), Ordering::Relaxed);
            LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        }
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What was taken from the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Taken {
    calls: usize,
    bytes: usize,
    /// Bytes of the largest piece.
    largest: usize,
}

/// What `run` takes, on all threads.
fn counted(run: impl FnOnce()) -> Taken {
    for counter in [&CALLS, &BYTES, &LARGEST] {
        counter.store(0, Ordering::Relaxed);
    }
    ON.store(true, Ordering::Relaxed);
    run();
    ON.store(false, Ordering::Relaxed);
    let [calls, bytes, largest] =
        [&CALLS, &BYTES, &LARGEST].map(|counter| counter.load(Ordering::Relaxed));
    Taken { calls, bytes, largest }
}

/// One policy of every kind that this repository has or can make, and of those that the recorded references have.
fn policies(scratch: &Path) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = [
        "smolvla_tiny",
        "diffusion_transformer/causal",
        "reference/xvla",
        "reference/masked",
        "reference/oft",
        "reference/oft_film",
    ];
    let own = own.map(|name| root.join("fixtures").join(name));
    let made = ["pi0", "pi05"].map(|name| {
        let folder = scratch.join(name);
        random(name, RandomSize::Tiny, 3, &folder).unwrap_or_else(|e| panic!("{e}"));
        folder
    });
    let references = std::env::var_os("SINEW_REFERENCE")
        .map_or_else(|| root.join("../../shared/fixtures/reference"), PathBuf::from);
    let recorded = ["act", "diffusion_ddim"].map(|name| references.join(name));
    let recorded = recorded.into_iter().filter(|path| {
        if !path.is_dir() {
            println!("skipped: {} is not there", path.display());
        }
        path.is_dir()
    });
    own.into_iter().chain(made).chain(recorded).collect()
}

/// What the policy at `path` may see.
fn observation(path: &Path) -> Observation {
    let checkpoint = Checkpoint::open(path, true).unwrap_or_else(|e| panic!("{e}"));
    let (features, config) = (&checkpoint.features, path.join("config.json"));
    // The X-VLA here has learned positions for small images only; others cut a part out of theirs.
    let (width, height) = if path.ends_with("xvla") { (48, 32) } else { (96, 72) };
    let images = features.cameras().map(|(key, _)| {
        let data: Vec<u8> = (0..width * height * 3).map(|i| (i * 7 / 5) as u8).collect();
        let image = Image::new(width, height, data.into()).expect("the shape fits");
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        let camera = key.strip_prefix("observation.images.").unwrap_or(key).to_owned();
        ObservedImage { camera, frame, age: Default::default() }
    });
    let state = features.state_dim(&config).expect("it has one");
    Observation {
        instant: Stamp(5),
        images: images.collect(),
        proprioception: vec![0.1; state],
        proprioception_age: Default::default(),
        instruction: "pick up the cube".to_owned(),
    }
}

/// What each step of a chunk takes, under its stage's name.
fn chunk(policy: &mut dyn Policy, seen: &mut Observation) -> Vec<(&'static str, Taken)> {
    // What was seen is forgotten or gets old, so that the same pictures are computed again.
    policy.forget();
    seen.instant = Stamp(seen.instant.0 + 1_000_000_000);
    let request = ChunkRequest::default();
    let begun = counted(|| policy.begin(seen, &request).expect("it fits"));
    let (mut steps, mut stage) = (vec![("preprocess", begun)], "preprocess");
    loop {
        let mut progress = None;
        let taken = counted(|| progress = Some(policy.advance()));
        match progress.expect("it ran").expect("it runs") {
            Progress::Step { stage: next, .. } => stage = next,
            Progress::Done => {
                // The last step ends the stage before it, or is one by itself.
                steps.push((stage, taken));
                break;
            }
        }
        steps.push((stage, taken));
    }
    steps.push(("chunk", counted(|| drop(policy.take_chunk().expect("it is done")))));
    steps
}

#[test]
fn a_warm_policy_takes_lists_from_the_system_and_never_a_result() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    for path in policies(scratch.path()) {
        let mut seen = observation(&path);
        for compute in [Compute::Exact, Compute::Int8] {
            let options =
                LoadOptions { action_rate_hz: Some(10.0), compute, ..LoadOptions::default() };
            let mut policy = load_policy(&path, &options).unwrap_or_else(|e| panic!("{e}"));
            let mut least = chunk(policy.as_mut(), &mut seen);
            // A thread that has not had such a piece of work before still takes its scratch.
            for _ in 0..7 {
                let again = chunk(policy.as_mut(), &mut seen);
                assert_eq!(again.len(), least.len());
                for (least, again) in least.iter_mut().zip(again) {
                    least.1 = least.1.min(again.1);
                }
            }
            let name = path.file_name().unwrap_or_default().display().to_string();
            let all: usize = least.iter().map(|(_, taken)| taken.calls).sum();
            println!("{name} {compute:?}: {all} calls, {least:?}");
            for (stage, Taken { largest, .. }) in &least {
                // Lists of tokens, cameras and layers, where an image is resized the places it is read at, and the
                // chunk itself. What most layers give is larger, even here.
                assert!(*largest < 2048, "{name} {compute:?} {stage}: {largest} bytes");
            }
            // The first may begin with what the observations become; masked decoding keeps lists of its tokens.
            let denoising = least.iter().filter(|(stage, _)| *stage == "denoise").skip(1);
            for (_, Taken { calls, .. }) in denoising.filter(|_| name != "masked") {
                assert_eq!(*calls, 0, "{name} {compute:?}");
            }
        }
    }
}
