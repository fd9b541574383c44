//! Damaged, hostile and unsuitable files: each is an error that names what is wrong, never a panic.

mod common;

use std::path::{Path, PathBuf};

use common::{copy_folder, fixtures};
use proptest::prelude::*;
use sinew_models::caches::{CacheOptions, DenoiserCache, VisionConfig};
use sinew_models::heads::flow::Solver;
use sinew_models::{Checkpoint, LoadOptions, ModelError, QuantType, load_policy, quantize};
use sinew_runtime::ActionKind;
use tempfile::TempDir;

/// A copy of the tiny checkpoint that may be damaged.
fn copy() -> TempDir {
    copy_of("smolvla_tiny")
}

/// A copy of the fixture `name` that may be damaged.
fn copy_of(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&fixtures().join(name), dir.path());
    dir
}

fn bundle() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("tiny.gguf");
    // Both forms of blocks are in it.
    quantize(&fixtures().join("smolvla_tiny"), QuantType::Q4K, &path)
        .expect("the fixture is whole");
    (dir, path)
}

fn failure(path: &Path) -> ModelError {
    match load_policy(path, &LoadOptions::default()) {
        Ok(_) => panic!("{} loads", path.display()),
        Err(e) => e,
    }
}

/// The error names every one of `words`.
fn says(error: &ModelError, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "`{text}` does not say `{word}`");
    }
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).expect("the file is text");
    assert!(text.contains(from), "{} has no {from}", path.display());
    std::fs::write(path, text.replace(from, to)).expect("a temporary folder can be written");
}

/// Changes the safetensors header of `path`, keeping its length.
fn replace_in_header(path: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(path).expect("it is there");
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
    let at = at.unwrap_or_else(|| panic!("no {from}"));
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    std::fs::write(path, bytes).expect("a temporary folder can be written");
}

#[test]
fn missing_files_say_what_to_do() {
    says(&failure(Path::new("/nowhere/at/all")), &["/nowhere/at/all", "not found", "folder"]);
    for (file, word) in [
        ("config.json", "pretrained_model"),
        ("model.safetensors", "copy"),
        ("policy_preprocessor.json", "migrate_policy_normalization"),
        ("vlm/tokenizer.json", "tokenizer.json"),
        ("vlm/config.json", "config.json"),
        ("policy_postprocessor_step_0_unnormalizer_processor.safetensors", "whole checkpoint"),
    ] {
        let dir = copy();
        std::fs::remove_file(dir.path().join(file)).expect("the fixture has it");
        let error = failure(dir.path());
        assert!(matches!(error, ModelError::FileMissing { .. }), "{file}: {error}");
        says(&error, &[word]);
    }
}

#[test]
fn other_architectures_are_named() {
    let dir = copy();
    replace(&dir.path().join("config.json"), "\"type\": \"smolvla\"", "\"type\": \"groot\"");
    says(&failure(dir.path()), &["config.json", "`groot`", "smolvla"]);
}

#[test]
fn configuration_keys_are_named() {
    for (from, to, words) in [
        ("\"num_vlm_layers\": 2", "\"num_vlm_layers\": 9", ["num_vlm_layers", "9"]),
        ("\"chunk_size\": 8", "\"chunk_size\": 99999999999", ["chunk_size", "99999999999"]),
        ("\"chunk_size\": 8", "\"chunk_size\": \"many\"", ["config.json", "many"]),
        (
            "\"attention_mode\": \"cross_attn\"",
            "\"attention_mode\": \"fancy\"",
            ["config.json", "fancy"],
        ),
        (
            "\"expert_width_multiplier\": 0.75",
            "\"expert_width_multiplier\": -1",
            ["expert_width_multiplier", "-1"],
        ),
        (
            "\"num_expert_layers\": 0",
            "\"num_expert_layers\": 1",
            ["num_expert_layers", "cross_attn"],
        ),
        ("\"min_period\": 0.004", "\"min_period\": 0", ["min_period", "0"]),
        (
            "\"adapt_to_pi_aloha\": false",
            "\"adapt_to_pi_aloha\": true",
            ["adapt_to_pi_aloha", "not supported"],
        ),
        ("\"max_state_dim\": 32", "\"max_state_dim\": 3", ["observation.state", "max_state_dim"]),
    ] {
        let dir = copy();
        replace(&dir.path().join("config.json"), from, to);
        says(&failure(dir.path()), &words);
    }
    let dir = copy();
    replace(&dir.path().join("sinew.json"), "\"gripper\"", "\"gripper\", \"tail\"");
    says(&failure(dir.path()), &["action_names", "7", "6"]);
}

#[test]
fn keys_of_masked_diffusion_are_named() {
    let after = |key: &str, value: &str| format!("\"temperature\": 0.0, \"{key}\": {value}");
    let (bins, cold) = ("\"num_bins\": 256", "\"temperature\": 0.0");
    for (from, to, words) in [
        (bins, "\"num_bins\": 1".to_owned(), ["`num_bins`", "2 to 65536"]),
        (bins, "\"num_bins\": 99999999".to_owned(), ["`num_bins`", "99999999"]),
        (bins, "\"num_bins\": -3".to_owned(), ["config.json", "-3"]),
        // A number that is no other tensor's size is the checkpoint's mistake, and the tensor is named.
        (bins, "\"num_bins\": 255".to_owned(), ["action_tokens", "256"]),
        ("\"cosine\"", "\"sine\"".to_owned(), ["config.json", "sine"]),
        ("\"confidence\": \"max\"", "\"confidence\": \"sum\"".to_owned(), ["config.json", "sum"]),
        ("\"num_steps\": 5", "\"num_steps\": 0".to_owned(), ["num_steps", "0"]),
        (cold, "\"temperature\": -0.5".to_owned(), ["`temperature`", "-0.5"]),
        (cold, after("commit_threshold", "1e9"), ["`commit_threshold`", "0 to 100"]),
        (cold, after("remask_threshold", "-1"), ["`remask_threshold`", "0 to 100"]),
        (cold, after("remask_drop", "\"much\""), ["config.json", "much"]),
        (cold, after("smoothing", "[1, 2]"), ["`smoothing`", "3 numbers"]),
        (cold, after("smoothing", "[1, 2, 1000]"), ["`smoothing`", "1000"]),
        (
            cold,
            after("action_limits", "{\"lower\": [0, 0], \"upper\": [1, 1]}"),
            ["`action_limits`", "the action has 3"],
        ),
        (
            cold,
            after("action_limits", "{\"lower\": [-9, 2, -9], \"upper\": [9, 1, 9]}"),
            ["`action_limits`", "no bin of dimension 1"],
        ),
        (cold, after("action_limits", "{\"lower\": [0, 0, 0]}"), ["config.json", "upper"]),
        (cold, after("step_limits", "[1, 1]"), ["`step_limits`", "3 numbers above 0"]),
        (cold, after("step_limits", "[1, 0, 1]"), ["`step_limits`", "3 numbers above 0"]),
        (cold, after("anchor_reach", "0"), ["`anchor_reach`", "1 to"]),
        (cold, after("anchor_passes", "5000"), ["`anchor_passes`", "5000"]),
        (cold, after("anchor_rounds", "-1"), ["config.json", "-1"]),
    ] {
        let dir = copy_of("reference/masked");
        replace(&dir.path().join("config.json"), from, &to);
        says(&failure(dir.path()), &words);
    }
}

#[test]
fn keys_of_parallel_decoding_are_named() {
    for name in ["oft", "oft_film"] {
        let text =
            std::fs::read_to_string(fixtures().join("reference").join(name).join("config.json"));
        let config: serde_json::Value =
            serde_json::from_str(&text.expect("it is committed")).expect("it is JSON");
        for (key, value, words) in [
            ("head_width", "0", ["`head_width`", "0"]),
            ("head_width", "99999999999", ["`head_width`", "99999999999"]),
            ("head_width", "-1", ["config.json", "-1"]),
            ("head_width", "25", ["action_head", "25"]),
            ("head_blocks", "99999999999", ["`head_blocks`", "99999999999"]),
            ("head_blocks", "9", ["action_head.blocks", "not"]),
            ("use_film", "\"yes\"", ["config.json", "yes"]),
            ("use_film", "7", ["config.json", "7"]),
        ] {
            let dir = copy_of(&format!("reference/{name}"));
            let mut config = config.clone();
            assert!(config.get(key).is_some(), "{name} has {key}");
            config[key] = serde_json::from_str(value).expect("it is JSON");
            std::fs::write(dir.path().join("config.json"), config.to_string()).expect("writable");
            says(&failure(dir.path()), &words);
        }
    }
    // Without its own weights FiLM cannot be: the tensor is named.
    let dir = copy_of("reference/oft");
    replace(&dir.path().join("config.json"), "\"use_film\": false", "\"use_film\": true");
    says(&failure(dir.path()), &["model.safetensors", "film"]);
}

#[test]
fn a_solver_is_refused_where_no_velocity_is_followed() {
    let options = LoadOptions { solver: Some(Solver::Midpoint), ..LoadOptions::default() };
    for (name, head) in [
        ("reference/masked", "masked diffusion"),
        ("reference/oft", "parallel decoding"),
        ("onnx/flow", "ONNX"),
    ] {
        let error = load_policy(&fixtures().join(name), &options).err().expect("it is refused");
        assert!(matches!(error, ModelError::NoSolver { .. }), "{error}");
        says(&error, &[name, head, "leave `solver` out"]);
    }
    assert!(load_policy(&fixtures().join("smolvla_tiny"), &options).is_ok());
}

#[test]
fn caches_are_refused_where_there_is_nothing_to_keep() {
    let denoiser = DenoiserCache::File("policy.cache.json".into());
    let denoiser = CacheOptions { denoiser, ..CacheOptions::default() };
    let vision = CacheOptions { vision: Some(VisionConfig::default()), ..CacheOptions::default() };
    let warm_start = Some(vec![ActionKind::Position; 6]);
    let warm_start = CacheOptions { warm_start, ..CacheOptions::default() };
    for (name, caches, words) in [
        ("reference/masked", &denoiser, ["masked diffusion", "no denoiser", "`cache_denoiser`"]),
        ("reference/oft", &denoiser, ["parallel decoding", "no denoiser", "`cache_denoiser`"]),
        ("onnx/flow", &denoiser, ["ONNX", "no denoiser", "`cache_denoiser`"]),
        ("reference/xvla", &vision, ["flow", "no vision tower", "`cache_vision`"]),
        ("onnx/flow", &vision, ["ONNX", "no vision tower", "`cache_vision`"]),
        ("onnx/flow", &warm_start, ["ONNX", "cannot start from a chunk", "`cache_warm_start`"]),
    ] {
        let options = LoadOptions { caches: caches.clone(), ..LoadOptions::default() };
        let error = load_policy(&fixtures().join(name), &options).err().expect("it is refused");
        assert!(matches!(error, ModelError::NoCache { .. }), "{error}");
        says(&error, &words);
    }
    let options = LoadOptions { caches: vision, ..LoadOptions::default() };
    assert!(load_policy(&fixtures().join("smolvla_tiny"), &options).is_ok());
}

#[test]
fn hidden_sizes_that_do_not_fit_the_weights_name_a_tensor() {
    let dir = copy();
    replace(
        &dir.path().join("vlm/config.json"),
        "\"intermediate_size\": 128",
        "\"intermediate_size\": 96",
    );
    let error = failure(dir.path());
    assert!(matches!(error, ModelError::TensorShape { .. }), "{error}");
    says(&error, &["mlp.gate_proj.weight", "[128, 64]", "[96, 64]"]);
}

#[test]
fn missing_tensors_and_wrong_types_are_named() {
    let dir = copy();
    let weights = dir.path().join("model.safetensors");
    replace_in_header(&weights, "lm_expert.norm.weight", "lm_expert.norm.weighs");
    let error = failure(dir.path());
    assert!(matches!(error, ModelError::TensorMissing { .. }), "{error}");
    says(&error, &["model.vlm_with_expert.lm_expert.norm.weight"]);

    let dir = copy();
    let weights = dir.path().join("model.safetensors");
    replace_in_header(&weights, "\"dtype\":\"F32\"", "\"dtype\":\"I32\"");
    let error = failure(dir.path());
    assert!(matches!(error, ModelError::TensorType { .. }), "{error}");
    says(&error, &["I32", "F32, F16 or BF16"]);
}

#[test]
fn cut_off_and_hostile_safetensors_are_refused() {
    let dir = copy();
    let weights = dir.path().join("model.safetensors");
    let whole = std::fs::read(&weights).expect("it is there");
    let huge_header = [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat();
    let past_end = [&(whole.len() as u64).to_le_bytes()[..], &whole[8..]].concat();
    for (name, bytes) in [
        ("half", &whole[..whole.len() / 2]),
        ("one byte less", &whole[..whole.len() - 1]),
        ("header only", &whole[..100]),
        ("seven bytes", &whole[..7]),
        ("empty", &[][..]),
        ("huge header", &huge_header),
        ("header past the end", &past_end),
    ] {
        std::fs::write(&weights, bytes).expect("a temporary folder can be written");
        let error = failure(dir.path());
        assert!(matches!(error, ModelError::Malformed { .. }), "{name}: {error}");
        says(&error, &["model.safetensors", "damaged"]);
    }
}

#[test]
fn statistics_that_are_no_numbers_are_named() {
    let dir = copy();
    let name = "policy_postprocessor_step_0_unnormalizer_processor.safetensors";
    let path = dir.path().join(name);
    let mut bytes = std::fs::read(&path).expect("it is there");
    // `action.mean` is the third tensor of six floats after the header.
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize + 8;
    let text = String::from_utf8_lossy(&bytes[8..header]).into_owned();
    let json: serde_json::Value = serde_json::from_str(&text).expect("our own header");
    let start = json["action.mean"]["data_offsets"][0].as_u64().expect("an offset") as usize;
    bytes[header + start + 8..header + start + 12].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).expect("a temporary folder can be written");
    let error = failure(dir.path());
    assert!(matches!(error, ModelError::Statistics { .. }), "{error}");
    says(&error, &[name, "action.mean", "NaN", "index 2"]);
}

#[test]
fn a_damaged_tokenizer_is_named() {
    let dir = copy();
    let path = dir.path().join("vlm/tokenizer.json");
    std::fs::write(&path, "{}").expect("a temporary folder can be written");
    let error = failure(dir.path());
    assert!(matches!(error, ModelError::Tokenizer { .. }), "{error}");
    says(&error, &["tokenizer.json"]);
}

#[test]
fn tampered_bundles_fail_their_hash_unless_it_is_skipped() {
    let (_dir, path) = bundle();
    let mut bytes = std::fs::read(&path).expect("it was written");
    // Well inside the tensor data, where every pattern of bits is a valid weight.
    let at = bytes.len() - bytes.len() / 4;
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).expect("a temporary folder can be written");
    let error = failure(&path);
    assert!(matches!(error, ModelError::HashMismatch { .. }), "{error}");
    says(&error, &["SHA-256", "quantize"]);
    let options = LoadOptions { skip_hash: true, ..LoadOptions::default() };
    assert!(load_policy(&path, &options).is_ok());
}

#[test]
fn cut_off_and_hostile_bundles_are_refused() {
    let (_dir, path) = bundle();
    let whole = std::fs::read(&path).expect("it was written");
    let patched = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    for (name, bytes) in [
        ("no GGUF", patched(0, b"GGML")),
        ("version 2", patched(4, &2u32.to_le_bytes())),
        ("tensors without end", patched(8, &u64::MAX.to_le_bytes())),
        ("metadata without end", patched(16, &u64::MAX.to_le_bytes())),
        ("a key without end", patched(24, &(u64::MAX / 2).to_le_bytes())),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("header only", whole[..24].to_vec()),
        ("empty", Vec::new()),
    ] {
        std::fs::write(&path, bytes).expect("a temporary folder can be written");
        let error = failure(&path);
        assert!(matches!(error, ModelError::Malformed { .. }), "{name}: {error}");
        says(&error, &["tiny.gguf"]);
    }
}

#[test]
fn rows_that_were_not_filled_up_have_no_other_width() {
    let (_dir, path) = bundle();
    let whole = std::fs::read(&path).expect("it was written");
    const KEY: &[u8] = b"sinew.widths";
    let at = whole.windows(KEY.len()).position(|w| w == KEY).expect("every bundle has it");
    // After the key: array, of texts, none.
    let count = at + KEY.len() + 8;
    assert_eq!(whole[count..count + 8], [0; 8]);
    // Each with its length as long as the data's alignment, so that these stay where they are asked for.
    for line in ["action_in_proj.weight|31", "no.such.tensor.at.all|32", "action_in_proj.weight 32"]
    {
        assert_eq!(line.len() + 8, 32);
        let mut bytes = whole.clone();
        bytes[count] = 1;
        let text = (line.len() as u64).to_le_bytes().into_iter().chain(line.bytes());
        bytes.splice(count + 8..count + 8, text);
        std::fs::write(&path, bytes).expect("a temporary folder can be written");
        let error = failure(&path);
        assert!(matches!(error, ModelError::Malformed { .. }), "{line}: {error}");
        says(&error, &["sinew.widths", line, "tiny.gguf"]);
    }
}

/// Opens `path` and builds the policy; only a panic is a failure.
fn survive(path: &Path) {
    let options = LoadOptions { skip_hash: true, ..LoadOptions::default() };
    let _ = load_policy(path, &options).map(drop);
    let _ = Checkpoint::open(path, true).map(drop);
}

fn mutate(
    whole: &[u8],
    header: usize,
    flips: &[(prop::sample::Index, u8, bool)],
    keep: Option<f64>,
) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for (index, bit, in_header) in flips {
        // Most of the structure is in the header; damage there is what a parser must survive.
        let at = index.index(if *in_header { header } else { bytes.len() });
        bytes[at] ^= 1 << bit;
    }
    if let Some(keep) = keep {
        bytes.truncate((bytes.len() as f64 * keep) as usize);
    }
    bytes
}

fn mutations() -> impl Strategy<Value = (Vec<(prop::sample::Index, u8, bool)>, Option<f64>)> {
    let flip = (any::<prop::sample::Index>(), 0u8..8, prop::bool::weighted(0.8));
    (prop::collection::vec(flip, 1..6), prop::option::weighted(0.3, 0.0..1.0f64))
}

#[test]
fn random_damage_never_panics() {
    let (_bundle_dir, bundle_path) = bundle();
    let folder = copy();
    let weights = folder.path().join("model.safetensors");
    let whole_bundle = std::fs::read(&bundle_path).expect("it was written");
    let whole_weights = std::fs::read(&weights).expect("it is there");
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() },
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let result = runner.run(&mutations(), |(flips, keep)| {
        let damaged = mutate(&whole_bundle, 40_000.min(whole_bundle.len()), &flips, keep);
        std::fs::write(&bundle_path, damaged).expect("a temporary folder can be written");
        survive(&bundle_path);
        let damaged = mutate(&whole_weights, 12_000.min(whole_weights.len()), &flips, keep);
        std::fs::write(&weights, damaged).expect("a temporary folder can be written");
        survive(folder.path());
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
}
