//! Candidates and memory around real networks: the committed tiny checkpoint and the demo's bundle.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Case, fixtures};
use sinew_models::wrappers::{
    BestOf, Coherence, Encoder, Episode, Glance, Memory, Recall, RecallConfig, Shape,
};
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{
    ActionChunk, ActionKind, CameraFrame, ChunkRequest, Image, Observation, ObservedImage, Policy,
    PolicyError, Progress, Stamp, inference,
};

fn tiny() -> Box<dyn Policy> {
    load_policy(&fixtures().join("smolvla_tiny"), &LoadOptions::default()).expect("committed")
}

fn demo() -> Box<dyn Policy> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/demo.q8_0.gguf");
    load_policy(&file, &LoadOptions::default()).expect("committed")
}

fn observed() -> Observation {
    let case = Case::open(&fixtures().join("smolvla_tiny/case.safetensors"));
    case.observation(0, "Pick up the red cube and place it in the bin.")
}

/// What the demo's policy may see: a pattern on both cameras, its bits flipped by `flip`.
fn scene(flip: u8) -> Observation {
    let image = |camera: &str| {
        let data: Vec<u8> = (0..96 * 96 * 3).map(|i| ((i / 300) as u8) ^ flip).collect();
        let image = Image::new(96, 96, data.into()).expect("its size");
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        ObservedImage { camera: camera.into(), frame, age: Duration::ZERO }
    };
    Observation {
        instant: Stamp(0),
        images: vec![image("front"), image("wrist")],
        proprioception: vec![0.0, 0.2, -0.1, 1.2, 0.0, 1.0],
        proprioception_age: Duration::ZERO,
        instruction: "put the red cube in the left bin".into(),
    }
}

fn seeded(seed: u64) -> ChunkRequest {
    ChunkRequest { id: 1, seed, ..ChunkRequest::default() }
}

fn run(policy: &mut dyn Policy, seen: &Observation, seed: u64) -> ActionChunk {
    inference::run(policy, seen, &seeded(seed)).expect("the observation fits")
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

#[test]
fn sampling_again_gives_what_a_new_inference_gives_without_its_prefix() {
    let (mut policy, seen) = (tiny(), observed());
    assert_eq!(policy.resample(&seeded(1)), Ok(false), "nothing was seen");
    let second = run(policy.as_mut(), &seen, 2);
    let first = run(policy.as_mut(), &seen, 1);
    assert_eq!(policy.resample(&seeded(2)), Ok(true));
    let mut stages = Vec::new();
    while let Progress::Step { stage, .. } = policy.advance().expect("it runs") {
        stages.push(stage);
    }
    assert!(stages.iter().all(|s| *s == "denoise"), "{stages:?}");
    let again = policy.take_chunk().expect("it is done");
    assert_eq!(again.values(), second.values());
    assert_ne!(again.values(), first.values());
    assert!(matches!(policy.take_chunk(), Err(PolicyError::OutOfTurn(_))));
}

#[test]
fn the_candidate_that_goes_on_with_the_last_choice_wins() {
    let seen = observed();
    let mut policy =
        BestOf::new(tiny(), Box::new(Coherence::default()), 4, 0).expect("four candidates");
    let before = run(&mut policy, &seen, 5);
    let later = Observation { instant: seen.instant + before.dt, ..seen };
    let chosen = run(&mut policy, &later, 6);
    let made = chosen.report.caches.iter().find(|c| c.0 == "candidates");
    assert_eq!(made.map(|m| m.1.hits), Some(4));
    // The first candidate is the plain policy's chunk: the chosen one is at least as near to what was decided.
    let plain = run(tiny().as_mut(), &later, 6);
    let rest = &before.values()[before.dim()..];
    let weighted = |chunk: &ActionChunk| -> f64 {
        let rows = chunk.values().chunks(chunk.dim()).zip(rest.chunks(chunk.dim()));
        rows.enumerate().map(|(k, (a, b))| 0.5f64.powi(k as i32) * distance(a, b)).sum()
    };
    println!("chosen {:.4}, first {:.4}", weighted(&chosen), weighted(&plain));
    assert!(weighted(&chosen) <= weighted(&plain) + 1e-9);
}

#[test]
fn a_remembered_success_draws_the_demo_policy_towards_it() {
    let seen = scene(0);
    let plain = run(demo().as_mut(), &seen, 9);
    let encoder = || Glance::new(vec!["front".into(), "wrist".into()], 6);
    let spec = demo().spec().clone();
    let shape = Shape {
        policy: "demo".into(),
        encoder: encoder().name(),
        features: encoder().width(),
        horizon: spec.action_horizon,
        dim: spec.action_dim,
    };
    let mut kinds = vec![ActionKind::Position; 5];
    kinds.push(ActionKind::Gripper);
    let recall = |memory: Memory, episode: Option<Episode>| {
        let (encoder, config) = (Box::new(encoder()), RecallConfig::default());
        Recall::new(demo(), memory, encoder, kinds.clone(), config, episode).expect("it fits")
    };
    // One success with other noise, through the file.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("memory.bin");
    let episode = Episode::new(Memory::new(shape.clone(), 8));
    let remembered =
        run(&mut recall(Memory::new(shape.clone(), 8), Some(episode.clone())), &seen, 2);
    assert_eq!(episode.end(true), 1);
    episode.save(&path).expect("it can be written");
    let memory = Memory::open(&path, shape, 8).expect("its own file");

    let mut policy = recall(memory, None);
    let steered = run(&mut policy, &seen, 9);
    let apart = |chunk: &ActionChunk| distance(chunk.values(), remembered.values());
    println!("plain {:.4}, steered {:.4}", apart(&plain), apart(&steered));
    assert!(apart(&steered) < 0.8 * apart(&plain), "{} {}", apart(&steered), apart(&plain));
    assert!(steered.report.denoise_steps < plain.report.denoise_steps);
    let used = steered.report.caches.iter().find(|c| c.0 == "success_memory");
    assert_eq!(used.map(|u| (u.1.lookups, u.1.hits)), Some((1, 1)));
    // Another picture is another situation: the plain policy's chunk comes out, to the bit.
    let other = run(&mut policy, &scene(255), 9);
    assert_eq!(other.values(), run(demo().as_mut(), &scene(255), 9).values());
}
