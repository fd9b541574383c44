//! What is kept of camera pictures, prefix and last chunk from inference to inference, in whole policies.

mod common;

use common::{Case, fixtures};
use sinew_models::caches::{CacheOptions, FRAMES, VISION, VisionConfig};
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{
    ActionChunk, ActionKind, CacheUse, ChunkRequest, Image, Observation, Policy, Stamp, Unused,
    inference,
};

const PREFIX: &str = "prefix_kv";
const CAMERAS: u32 = 2;

fn load(caches: CacheOptions) -> Box<dyn Policy> {
    let options = LoadOptions { caches, ..LoadOptions::default() };
    load_policy(&fixtures().join("smolvla_tiny"), &options).unwrap_or_else(|e| panic!("{e}"))
}

fn exact() -> Box<dyn Policy> {
    load(CacheOptions::default())
}

fn seeing(vision: VisionConfig) -> Box<dyn Policy> {
    load(CacheOptions { vision: Some(vision), ..CacheOptions::default() })
}

/// Nothing is ever computed whole without need.
fn patient() -> VisionConfig {
    VisionConfig { refresh: 100, most: 1.0, prefix: true, ..VisionConfig::default() }
}

fn observation() -> Observation {
    let task = "Pick up the red cube and place it in the bin.";
    Case::open(&fixtures().join("smolvla_tiny/case.safetensors")).observation(0, task)
}

/// `seen` with a square of the first camera's picture changed by `by` grey levels.
fn touched(seen: &Observation, by: u8) -> Observation {
    let mut seen = seen.clone();
    let image = &mut seen.images[0].frame.image;
    let (width, height) = (image.width(), image.height());
    let mut data = image.data().to_vec();
    for y in 0..height / 4 {
        data[3 * y * width..][..3 * (width / 4)].iter_mut().for_each(|v| *v = v.wrapping_add(by));
    }
    *image = Image::new(width, height, data.into()).expect("the same size");
    seen
}

/// `seen` with the arm elsewhere.
fn moved(seen: &Observation) -> Observation {
    let mut seen = seen.clone();
    seen.proprioception.iter_mut().for_each(|q| *q += 0.05);
    seen
}

fn chunk(policy: &mut dyn Policy, seen: &Observation) -> ActionChunk {
    let request = ChunkRequest { seed: 3, ..ChunkRequest::default() };
    inference::run(policy, seen, &request).unwrap_or_else(|e| panic!("{e}"))
}

fn used(chunk: &ActionChunk, cache: &str) -> Option<CacheUse> {
    chunk.report.caches.iter().find(|c| c.0 == cache).map(|c| c.1)
}

fn hits(chunk: &ActionChunk, cache: &str) -> Option<u32> {
    used(chunk, cache).map(|used| used.hits)
}

fn largest_difference(a: &ActionChunk, b: &ActionChunk) -> f64 {
    a.values().iter().zip(b.values()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn frames_that_did_not_change_are_not_computed_again_and_nothing_differs() {
    let mut policy = exact();
    let seen = observation();
    let first = chunk(policy.as_mut(), &seen);
    assert_eq!((hits(&first, FRAMES), hits(&first, PREFIX)), (Some(0), Some(0)));
    for (now, frames, prefix) in [
        (seen.clone(), CAMERAS, 1),
        (moved(&seen), CAMERAS, 0),
        (touched(&moved(&seen), 9), CAMERAS - 1, 0),
        (touched(&moved(&seen), 9), CAMERAS, 1),
        (seen.clone(), CAMERAS - 1, 0),
    ] {
        let again = chunk(policy.as_mut(), &now);
        assert_eq!((hits(&again, FRAMES), hits(&again, PREFIX)), (Some(frames), Some(prefix)));
        assert_eq!(again.values(), chunk(exact().as_mut(), &now).values());
    }
    let mut told = seen.clone();
    told.instruction.push_str(" Slowly.");
    let again = chunk(policy.as_mut(), &told);
    assert_eq!((hits(&again, FRAMES), hits(&again, PREFIX)), (Some(CAMERAS), Some(0)));
    assert_eq!(again.values(), chunk(exact().as_mut(), &told).values());
    policy.forget();
    assert_eq!(hits(&chunk(policy.as_mut(), &told), FRAMES), Some(0));
}

#[test]
fn a_dropped_inference_and_another_sample_spoil_nothing() {
    let mut policy = exact();
    let (seen, other) = (observation(), touched(&observation(), 40));
    chunk(policy.as_mut(), &seen);
    let request = ChunkRequest { seed: 8, ..ChunkRequest::default() };
    policy.begin(&other, &request).expect("it fits");
    assert_eq!(policy.resample(&request), Ok(false), "another inference is under way");
    policy.advance().expect("the first camera");
    let again = chunk(policy.as_mut(), &seen);
    assert_eq!(again.values(), chunk(exact().as_mut(), &seen).values());
    assert_eq!(policy.resample(&request), Ok(true));
    while policy.advance().expect("it goes on") != sinew_runtime::Progress::Done {}
    let sample = policy.take_chunk().expect("it is done");
    let alone = inference::run(exact().as_mut(), &seen, &request).expect("it runs");
    assert_eq!(sample.values(), alone.values());
}

#[test]
fn when_every_patch_counts_as_changed_the_numbers_are_those_of_the_whole_picture() {
    let mut policy = seeing(VisionConfig { similarity: 2.0, prefix: false, ..patient() });
    let seen = observation();
    chunk(policy.as_mut(), &seen);
    // All patches of both cameras have another brightness.
    let mut now = seen.clone();
    for image in &mut now.images {
        let (width, height) = (image.frame.image.width(), image.frame.image.height());
        let data: Vec<u8> = image.frame.image.data().iter().map(|v| v / 2 + 3).collect();
        image.frame.image = Image::new(width, height, data.into()).expect("the same size");
    }
    let again = chunk(policy.as_mut(), &now);
    let vision = used(&again, VISION).expect("both were computed");
    assert_eq!(vision.unused, None, "row by row, not whole");
    assert_eq!(vision.hits, 0);
    let off = largest_difference(&again, &chunk(exact().as_mut(), &now));
    assert!(off < 1e-5, "{off}");
}

#[test]
fn another_state_alone_leaves_the_prefix_and_changes_nothing() {
    let mut policy = seeing(patient());
    let seen = observation();
    let first = chunk(policy.as_mut(), &seen);
    assert_eq!(used(&first, VISION).and_then(|u| u.unused), Some(Unused::Fresh));
    let now = moved(&seen);
    let again = chunk(policy.as_mut(), &now);
    let vision = used(&again, VISION).expect("it says");
    assert_eq!(vision.hits, vision.lookups, "no patch was computed");
    let prefix = used(&again, PREFIX).expect("it says");
    assert_eq!(prefix.hits, prefix.lookups - 1, "all but the state");
    // No other token sees the state, so what is kept is what would be computed.
    assert!(largest_difference(&again, &chunk(exact().as_mut(), &now)) < 1e-5);
}

#[test]
fn patches_that_did_not_change_are_kept_and_a_whole_picture_is_exact_again() {
    let mut policy = seeing(VisionConfig { refresh: 3, ..patient() });
    let seen = observation();
    chunk(policy.as_mut(), &seen);
    for k in 1..=3u8 {
        let now = touched(&seen, 60 * k);
        let again = chunk(policy.as_mut(), &now);
        let whole = chunk(exact().as_mut(), &now);
        let vision = used(&again, VISION).expect("it says");
        let off = largest_difference(&again, &whole);
        if k < 3 {
            assert!(vision.hits > 0 && vision.hits < vision.lookups, "{vision:?}");
            assert!(off > 0.0, "attention mixes patches, so something must differ");
            let changed = largest_difference(&whole, &chunk(exact().as_mut(), &seen));
            assert!(off < changed, "{off} is no better than not looking ({changed})");
        } else {
            assert_eq!((vision.hits, vision.unused), (0, Some(Unused::Refresh)));
        }
    }
    policy.forget();
    let now = touched(&seen, 90);
    let fresh = chunk(policy.as_mut(), &now);
    assert_eq!(used(&fresh, VISION).and_then(|u| u.unused), Some(Unused::Fresh));
    assert_eq!(fresh.values(), chunk(exact().as_mut(), &now).values());
    // One that was dropped is not built on.
    policy.begin(&touched(&seen, 5), &ChunkRequest::default()).expect("it fits");
    policy.advance().expect("the first camera");
    let next = chunk(policy.as_mut(), &now);
    assert_eq!(hits(&next, VISION).unwrap_or(0), 0);
    assert_eq!(next.values(), fresh.values());
}

#[test]
fn a_start_from_the_last_chunk_takes_fewer_steps_and_tells_how_many() {
    let mut policy = load(CacheOptions {
        warm_start: Some(vec![ActionKind::Position; 6]),
        ..CacheOptions::default()
    });
    let mut seen = observation();
    let steps = policy.spec().denoise_steps;
    let mut warm = 0;
    for k in 0..12 {
        seen.instant = Stamp(k * 50_000_000);
        let made = chunk(policy.as_mut(), &seen);
        let said = used(&made, "warm_start").expect("it says");
        assert_eq!(said.lookups as usize, steps);
        match said.unused {
            None => {
                warm += 1;
                assert!(said.hits > 0 && made.report.denoise_steps + said.hits as usize == steps);
            }
            Some(_) => assert_eq!((said.hits, made.report.denoise_steps), (0, steps)),
        }
        assert_eq!(made.report.caches.iter().filter(|c| c.0 == "warm_start").count(), 1);
    }
    println!("{warm} of 12 began at the chunk before");
    let other = load_policy(
        &fixtures().join("smolvla_tiny"),
        &LoadOptions {
            caches: CacheOptions {
                warm_start: Some(vec![ActionKind::Position; 3]),
                ..CacheOptions::default()
            },
            ..LoadOptions::default()
        },
    );
    let error = other.err().expect("three kinds for six actions").to_string();
    assert!(error.contains("another width"), "{error}");
}
