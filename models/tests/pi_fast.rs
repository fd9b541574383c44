//! π0-FAST: the same tokens as LeRobot 0.6.1, for the same reasons? And FAST's own decoding.
//!
//! `tests/fixtures/fast` is a small action tokenizer with what the `tokenizers` package and scipy decode from
//! it; `tests/reference/fast.py` makes it.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Case, Worst, fixtures, max_difference, reference, valid};
use sinew_models::heads::fast::{FastTokenizer, inverse_dct};
use sinew_models::pi::{PiFast, PiFastPolicy, Preparer};
use sinew_models::{Checkpoint, LoadOptions, ModelError};
use sinew_runtime::{
    ChunkRequest, Observation, Policy, PolicyError, Prefix, PrefixUse, Progress, inference,
};

const INTERMEDIATE: f32 = 1e-4;

fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("it is JSON")
}

fn fast(name: &str) -> std::path::PathBuf {
    fixtures().join("fast").join(name)
}

fn tokenizer() -> FastTokenizer {
    let read = |name: &str| std::fs::read_to_string(fast(name)).expect("it is committed");
    let (tokens, settings) = (read("tokenizer.json"), read("processor_config.json"));
    FastTokenizer::new((Path::new("t"), &tokens), (Path::new("s"), &settings)).expect("it is whole")
}

#[test]
fn action_tokens_become_the_chunk_that_they_were_made_from() {
    let (tokenizer, cases) = (tokenizer(), json(&fast("cases.json")));
    let size = |key: &str| cases[key].as_u64().expect("a size") as usize;
    let (horizon, dim) = (size("horizon"), size("dim"));
    let list = cases["cases"].as_array().expect("a list of cases");
    assert!(list.len() >= 2);
    for case in list {
        let numbers = |key: &str| case[key].as_array().expect("a list").clone();
        let mut so_far = tokenizer.begin(horizon, dim);
        for id in numbers("ids") {
            let id = id.as_u64().expect("an id") as usize;
            assert!(!so_far.is_complete() && tokenizer.push(&mut so_far, id), "token {id}");
        }
        assert!(so_far.is_complete() && so_far.may_end());
        let coefficients: Vec<i64> = so_far.values().iter().map(|c| i64::from(*c)).collect();
        let expected: Vec<i64> =
            numbers("coefficients").iter().filter_map(|c| c.as_i64()).collect();
        assert_eq!(coefficients, expected);
        let expected: Vec<f32> =
            numbers("actions").iter().filter_map(|a| a.as_f64()).map(|a| a as f32).collect();
        let difference = max_difference(&tokenizer.actions(&so_far, dim), &expected);
        assert!(difference < 1e-5, "{difference:e}");
        assert!((0..tokenizer.vocabulary()).all(|id| !tokenizer.fits(&so_far, id)), "it is full");
    }
}

#[test]
fn the_inverse_transform_matches_lerobot() {
    let Some(dir) = reference("pi0_fast") else { return };
    let case = Case::open(&dir.join("case_inverse_dct.safetensors"));
    let (coefficients, scale) = (case.get("coefficients"), case.get("scale").values[0]);
    let scaled: Vec<f64> =
        coefficients.values.iter().map(|c| f64::from(*c) / f64::from(scale)).collect();
    let (horizon, dim) = (coefficients.shape[0], coefficients.shape[1]);
    let difference =
        max_difference(&inverse_dct(&scaled, horizon, dim), &case.get("actions").values);
    println!("inverse DCT: {difference:.1e}");
    assert!(difference < 1e-6, "{difference:e}");
}

#[test]
fn greedy_tokens_and_their_logits_match_lerobot() {
    let Some(dir) = reference("pi0_fast") else { return };
    let checkpoint = Checkpoint::open(&dir, true).unwrap_or_else(|e| panic!("{e}"));
    let model = PiFast::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
    let mut preparer = Preparer::new(&checkpoint, 0).unwrap_or_else(|e| panic!("{e}"));
    let all = json(&dir.join("cases.json"));
    let start = all["bos_token_id"].as_u64().expect("an id") as u32;
    let list = all["cases"].as_array().expect("a list of cases").iter();
    let mut seen = 0;
    for entry in list.filter(|entry| entry["kind"] == "tokens") {
        let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
        let mut worst = Worst::default();
        for (row, task) in entry["tasks"].as_array().expect("tasks").iter().enumerate() {
            let observation = case.observation(row, task.as_str().expect("a text"));
            let inputs = preparer.prepare(&observation).expect("the observation fits");
            let mask = case.row("input.observation.language.attention_mask", 0, row);
            let ids = valid(&case.row("input.observation.language.tokens", 0, row), &mask);
            let ours: Vec<f32> = inputs.tokens.iter().map(|t| *t as f32).collect();
            worst.check("ids", &ours, &ids, 0.0);
            let pixels = case.row("vision.0.pixels", 0, row);
            worst.check("pixels", inputs.pixels[0].values.values(), &pixels, 1e-5);
            let image = Arc::new(model.encode_image(&inputs.pixels[0]).expect("it fits").tokens);
            let prefix = model.embed_prefix(&[image], &inputs.tokens, start).expect("it fits");
            let mask = case.row("prefix.pad_mask", 0, row);
            let theirs = valid(&case.row("prefix.embeddings", 0, row), &mask);
            worst.check("prefix", prefix.values(), &theirs, INTERMEDIATE);
            let mut reading = model.prefill(prefix).expect("it fits");
            let tokens = case.row("generated_tokens", 0, row);
            let logits = case.row("step_logits", 0, row);
            for (token, theirs) in tokens.iter().zip(logits.chunks(model.vocabulary())) {
                let ours = model.logits(&reading, 0..model.vocabulary()).expect("all tokens");
                let ours = ours.values();
                worst.check("logits", ours, theirs, INTERMEDIATE);
                let best = (0..ours.len()).max_by(|a, b| ours[*a].total_cmp(&ours[*b]));
                let best = best.expect("there are tokens") as u32;
                worst.check("token", &[best as f32], &[*token], 0.0);
                reading = model.read(&reading, &[best]).expect("it is in the table");
            }
        }
        worst.print(&format!("pi0_fast/{}", entry["name"].as_str().expect("a name")));
        seen += 1;
    }
    assert_eq!(seen, 2);
}

/// The fixture's checkpoint with our action tokenizer, and a text tokenizer that has an end mark.
fn whole(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: Vec<u8>| {
        std::fs::write(copy.path().join(name), bytes).expect("it can be written");
    };
    for entry in std::fs::read_dir(dir).expect("it is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        if path.is_file() && !name.starts_with("case") {
            write(&name, std::fs::read(&path).expect("it can be read"));
        }
    }
    let mut text = json(&dir.join("tokenizer/tokenizer.json"));
    let vocabulary = text["model"]["vocab"].as_object_mut().expect("a vocabulary");
    if !vocabulary.contains_key("|") {
        let next = vocabulary.values().filter_map(|id| id.as_u64()).max().expect("ids") + 1;
        vocabulary.insert("|".into(), next.into());
    }
    write("tokenizer.json", text.to_string().into_bytes());
    std::fs::create_dir(copy.path().join("action_tokenizer")).expect("it can be written");
    for name in ["tokenizer.json", "processor_config.json"] {
        let bytes = std::fs::read(fast(name)).expect("it is committed");
        write(&format!("action_tokenizer/{name}"), bytes);
    }
    let mut config = json(&dir.join("config.json"));
    config["max_decoding_steps"] = 64.into();
    config["fast_skip_tokens"] = 8.into();
    write("config.json", config.to_string().into_bytes());
    copy
}

fn observation(dir: &Path) -> Observation {
    let case = Case::open(&dir.join("case_basic.safetensors"));
    case.observation(0, "Pick up the red cube and place it in the bin.")
}

fn policy(dir: &Path) -> Result<PiFastPolicy, ModelError> {
    let options = LoadOptions { action_rate_hz: Some(10.0), ..LoadOptions::default() };
    PiFastPolicy::load(&Checkpoint::open(dir, true)?, &options)
}

#[test]
fn a_policy_says_valid_chunks_token_by_token() {
    let Some(dir) = reference("pi0_fast") else { return };
    let missing = policy(&dir).map(drop).expect_err("it has no action tokenizer").to_string();
    assert!(missing.contains("action_tokenizer"), "{missing}");
    let copy = whole(&dir);
    let mut policy = policy(copy.path()).unwrap_or_else(|e| panic!("{e}"));
    let observation = observation(&dir);
    policy.begin(&observation, &ChunkRequest::default()).expect("it fits");
    assert_eq!(policy.set_denoise_steps(3), Ok(false), "it has none");
    let mut stages = Vec::new();
    while let Progress::Step { stage, done, total, denoised, .. } =
        policy.advance().expect("it runs")
    {
        stages.push(stage);
        assert!(done == stages.len() && done <= total && !denoised);
    }
    assert_eq!(stages[..3], ["vision", "prefix", "tokens"]);
    let chunk = policy.take_chunk().expect("every sequence is a chunk");
    assert_eq!((chunk.horizon(), chunk.values().len()), (8, 48));
    let again = inference::run(&mut policy, &observation, &ChunkRequest::default());
    assert_eq!(again.expect("it runs").values(), chunk.values(), "nothing is drawn");
    // Another observation, another chunk.
    let mut moved = observation.clone();
    moved.proprioception[0] += 1.0;
    let other = inference::run(&mut policy, &moved, &ChunkRequest::default()).expect("it runs");
    assert_ne!(other.values(), chunk.values());
    // Ended early it keeps the low frequencies.
    policy.begin(&observation, &ChunkRequest::default()).expect("it fits");
    assert_eq!(policy.finish_early(), Ok(false), "nothing is said yet");
    while policy.finish_early() == Ok(false) {
        policy.advance().expect("it runs");
    }
    let early = policy.take_chunk().expect("every dimension has its mean");
    assert_eq!(early.values().len(), 48);
}

#[test]
fn planned_actions_are_refused() {
    let Some(dir) = reference("pi0_fast") else { return };
    let copy = whole(&dir);
    let mut policy = policy(copy.path()).unwrap_or_else(|e| panic!("{e}"));
    let usage = PrefixUse::WarmStart { time: 0.5 };
    let prefix = Prefix { actions: vec![0.0; 6], dim: 6, frozen: 1, horizon: 1, usage };
    let request = ChunkRequest { prefix: Some(prefix), ..ChunkRequest::default() };
    let refused = policy.begin(&observation(&dir), &request);
    assert!(matches!(refused, Err(PolicyError::Unsupported(_))));
}
