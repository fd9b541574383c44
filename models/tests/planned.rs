//! Planned actions inside the sampling, and inference as an anytime task, on the committed tiny checkpoint.

mod common;

use common::{Case, fixtures, max_difference};
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{
    ActionChunk, ChunkRequest, MaskSchedule, Policy, PolicyError, Prefix, PrefixUse, Progress,
    inference,
};

const TASK: &str = "Pick up the red cube and place it in the bin.";
const DIM: usize = 6;
const HORIZON: usize = 8;

/// The committed checkpoint; with `trained`, declared as trained on clean prefixes of up to so many actions.
fn policy(trained: Option<usize>) -> Box<dyn Policy> {
    let from = fixtures().join("smolvla_tiny");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = |of: &std::path::Path, to: &std::path::Path| {
        std::fs::copy(of, to).expect("the fixture can be copied");
    };
    std::fs::create_dir(folder.path().join("vlm")).expect("it can be written");
    for part in ["", "vlm"] {
        for entry in std::fs::read_dir(from.join(part)).expect("the fixture is there") {
            let entry = entry.expect("it can be read").path();
            if entry.is_file() {
                let name = entry.file_name().expect("a file has a name");
                copy(&entry, &folder.path().join(part).join(name));
            }
        }
    }
    if let Some(most) = trained {
        let path = folder.path().join("sinew.json");
        let text = std::fs::read_to_string(&path).expect("the fixture has one");
        let mut info: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        info["trained_prefix"] = most.into();
        std::fs::write(&path, info.to_string()).expect("it can be written");
    }
    load_policy(folder.path(), &LoadOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn observation() -> sinew_runtime::Observation {
    Case::open(&fixtures().join("smolvla_tiny/case.safetensors")).observation(0, TASK)
}

fn run(policy: &mut dyn Policy, prefix: Option<Prefix>) -> Result<ActionChunk, PolicyError> {
    let request = ChunkRequest { id: 1, seed: 5, prefix, ..ChunkRequest::default() };
    inference::run(policy, &observation(), &request)
}

fn values(chunk: &ActionChunk) -> Vec<f32> {
    chunk.values().iter().map(|v| *v as f32).collect()
}

fn prefix(actions: &[f64], frozen: usize, usage: PrefixUse) -> Option<Prefix> {
    let horizon = actions.len() / DIM;
    Some(Prefix { actions: actions.to_vec(), dim: DIM, frozen, horizon, usage })
}

const GUIDED: PrefixUse =
    PrefixUse::Guided { schedule: MaskSchedule::Exponential, max_weight: 10.0 };

#[test]
fn guidance_pulls_the_frozen_actions_to_the_plan() {
    let mut policy = policy(None);
    let plain = run(policy.as_mut(), None).expect("it runs");
    // A plan that is off by 0.2 everywhere.
    let plan: Vec<f64> = plain.values().iter().map(|v| v + 0.2).collect();
    let guided = run(policy.as_mut(), prefix(&plan, 3, GUIDED)).expect("it runs");
    let off = |k: usize| {
        let rows = k * DIM..(k + 1) * DIM;
        let pairs = guided.values()[rows.clone()].iter().zip(&plan[rows]);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    for k in 0..3 {
        assert!(off(k) < 0.05, "frozen action {k} is {} off", off(k));
    }
    assert!(off(7) > off(0), "what is free is pulled less");
    let (name, used) = &guided.report.caches[0];
    assert_eq!((*name, used.hits, used.lookups), ("frozen_prefix", 3, 8));
    assert!(used.error.is_some_and(|e| e < 0.05), "{used:?}");
}

#[test]
fn without_weight_guidance_is_plain_sampling_bit_for_bit() {
    let mut policy = policy(None);
    let plain = run(policy.as_mut(), None).expect("it runs");
    let plan = vec![0.3; HORIZON * DIM];
    let zeros = PrefixUse::Guided { schedule: MaskSchedule::Zeros, max_weight: 10.0 };
    let guided = run(policy.as_mut(), prefix(&plan, 0, zeros)).expect("it runs");
    assert_eq!(guided.values(), plain.values());
}

#[test]
fn a_clean_prefix_comes_out_as_it_went_in() {
    let mut trained = policy(Some(4));
    assert_eq!(trained.spec().prefix.trained, Some(4));
    let plain = run(trained.as_mut(), None).expect("it runs");
    let none = run(trained.as_mut(), prefix(plain.values(), 0, PrefixUse::Trained));
    assert_eq!(none.expect("it runs").values(), plain.values(), "no delay: plain sampling");
    let plan: Vec<f64> = plain.values().iter().map(|v| v + 0.1).collect();
    let chunk = run(trained.as_mut(), prefix(&plan, 4, PrefixUse::Trained)).expect("it runs");
    let plan: Vec<f32> = plan.iter().map(|v| *v as f32).collect();
    let kept = max_difference(&values(&chunk)[..4 * DIM], &plan[..4 * DIM]);
    assert!(kept < 1e-5, "{kept:e}");
    assert_ne!(values(&chunk)[4 * DIM..], values(&plain)[4 * DIM..], "the rest follows it");
    let long = run(trained.as_mut(), prefix(plain.values(), 5, PrefixUse::Trained));
    assert_eq!(long, Err(PolicyError::PrefixTooLong { frozen: 5, most: 4 }));
    let mut other = policy(None);
    let refused = run(other.as_mut(), prefix(plain.values(), 1, PrefixUse::Trained));
    assert!(matches!(refused, Err(PolicyError::Unsupported(_))));
}

#[test]
fn a_warm_start_stays_near_its_guess() {
    let mut policy = policy(None);
    let plain = run(policy.as_mut(), None).expect("it runs");
    let guess: Vec<f64> = plain.values().iter().map(|v| v + 0.1).collect();
    let start = |policy: &mut dyn Policy, time| {
        run(policy, prefix(&guess[..4 * DIM], 0, PrefixUse::WarmStart { time }))
    };
    let near = start(policy.as_mut(), 0.05).expect("it runs");
    let far = start(policy.as_mut(), 0.9).expect("it runs");
    let distance = |chunk: &ActionChunk| {
        let pairs = chunk.values()[..4 * DIM].iter().zip(&guess);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(distance(&near) < distance(&far), "{} {}", distance(&near), distance(&far));
    assert_eq!(near.report.caches[0].0, "warm_start");
    assert!(matches!(start(policy.as_mut(), 1.5), Err(PolicyError::Compute(_))));
}

#[test]
fn planned_actions_that_do_not_fit_are_refused() {
    let mut policy = policy(None);
    let narrow = Prefix { actions: vec![0.0; 8], dim: 2, frozen: 1, horizon: 4, usage: GUIDED };
    let width = PolicyError::PrefixWidth { expected: DIM, found: 2 };
    assert_eq!(run(policy.as_mut(), Some(narrow)), Err(width));
    let broken = prefix(&[f64::NAN; DIM], 1, GUIDED);
    let finite = PolicyError::NotFinite { what: "planned prefix" };
    assert_eq!(run(policy.as_mut(), broken), Err(finite));
}

#[test]
fn an_inference_may_end_early_or_with_fewer_steps() {
    let mut policy = policy(None);
    let request = ChunkRequest { denoise_steps: Some(10), seed: 5, ..ChunkRequest::default() };
    policy.begin(&observation(), &request).expect("it fits");
    assert_eq!(policy.finish_early(), Ok(false), "nothing is known yet");
    let mut denoised = 0;
    while let Progress::Step { denoised: step, next_denoises, .. } =
        policy.advance().expect("it runs")
    {
        if next_denoises && !step {
            assert_eq!(policy.set_denoise_steps(6), Ok(true));
        }
        denoised += usize::from(step);
        if denoised == 4 {
            assert_eq!(policy.set_denoise_steps(9), Ok(false), "too late");
            assert_eq!(policy.finish_early(), Ok(true));
        }
    }
    let early = policy.take_chunk().expect("it is done");
    assert_eq!(early.report.denoise_steps, 4);
    let whole = run(policy.as_mut(), None).expect("it runs");
    let difference = max_difference(&values(&early), &values(&whole));
    assert!(difference > 0.0 && difference < 1.0, "an estimate, not the same: {difference}");
}
