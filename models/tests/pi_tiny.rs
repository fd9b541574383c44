//! π policies from tiny random checkpoints: folders and bundles, guidance, and files that do not fit.

mod common;

use std::path::Path;

use common::max_difference;
use sinew_models::{LoadOptions, QuantType, RandomSize, inspect, load_policy, quantize, random};
use sinew_runtime::{
    ActionChunk, CameraFrame, ChunkRequest, Image, MaskSchedule, Observation, ObservedImage,
    Policy, PolicyError, Prefix, PrefixUse, Stamp, inference,
};

const DIM: usize = 6;
const HORIZON: usize = 8;

fn observation() -> Observation {
    let image = |shift: usize| {
        let data: Vec<u8> =
            (0..48 * 64 * 3).map(|i| (i * 7 / 5 + shift * (i / 192)) as u8).collect();
        Image::new(64, 48, data.into()).expect("the shape fits")
    };
    let images = ["camera2", "camera1"].into_iter().enumerate().map(|(i, camera)| {
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image: image(i + 1) };
        ObservedImage { camera: camera.to_owned(), frame, age: Default::default() }
    });
    Observation {
        instant: Stamp(5),
        images: images.collect(),
        proprioception: vec![0.1, -0.4, 0.3, 0.0, -0.2, 0.25],
        proprioception_age: Default::default(),
        instruction: "pick up the red cube".to_owned(),
    }
}

fn load(path: &Path) -> Box<dyn Policy> {
    load_policy(path, &LoadOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn run(policy: &mut dyn Policy, prefix: Option<Prefix>) -> Result<ActionChunk, PolicyError> {
    let request = ChunkRequest { id: 1, seed: 5, prefix, ..ChunkRequest::default() };
    inference::run(policy, &observation(), &request)
}

fn values(chunk: &ActionChunk) -> Vec<f32> {
    chunk.values().iter().map(|v| *v as f32).collect()
}

fn folder(architecture: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    random(architecture, RandomSize::Tiny, 3, dir.path()).unwrap_or_else(|e| panic!("{e}"));
    dir
}

#[test]
fn folders_and_bundles_give_nearly_the_same_chunk() {
    for architecture in ["pi0", "pi05"] {
        let dir = folder(architecture);
        let plain = run(load(dir.path()).as_mut(), None).expect("it runs");
        assert_eq!((plain.horizon(), plain.values().len()), (HORIZON, HORIZON * DIM));
        let sizes = inspect(dir.path()).unwrap_or_else(|e| panic!("{e}"));
        for (kind, most) in
            [(QuantType::F16, 2e-3), (QuantType::Q8_0, 0.05), (QuantType::Q4_0, 1.0)]
        {
            let bundle = dir.path().join("bundle.gguf");
            quantize(dir.path(), kind, &bundle).unwrap_or_else(|e| panic!("{e}"));
            let chunk = run(load(&bundle).as_mut(), None).expect("it runs");
            let difference = max_difference(&values(&chunk), &values(&plain));
            println!("{architecture} {kind:?}: {difference:.1e}");
            assert!(difference < most && difference > 0.0, "{architecture} {kind:?} {difference}");
            let bundle = inspect(&bundle).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((bundle.parameters, &bundle.sizes), (sizes.parameters, &sizes.sizes));
        }
    }
}

#[test]
fn a_bundle_written_at_once_is_like_one_made_from_a_folder() {
    let dir = folder("pi0");
    let (made, at_once) = (dir.path().join("made.gguf"), dir.path().join("at_once.gguf"));
    quantize(dir.path(), QuantType::Q8_0, &made).unwrap_or_else(|e| panic!("{e}"));
    random("pi0", RandomSize::Tiny, 3, &at_once).unwrap_or_else(|e| panic!("{e}"));
    let left = std::fs::read_dir(dir.path()).expect("it can be listed").flatten();
    assert!(left.map(|e| e.path()).all(|p| p.extension().is_none_or(|e| e != "folder")));
    let of = |path: &Path| inspect(path).unwrap_or_else(|e| panic!("{e}"));
    let (made, inspected) = (of(&made), of(&at_once));
    assert_eq!((made.parameters, made.bytes), (inspected.parameters, inspected.bytes));
    let chunk = run(load(&at_once).as_mut(), None).expect("it runs");
    assert!(chunk.values().iter().all(|v| v.abs() < 10.0));
}

#[test]
fn a_token_table_that_is_tied_is_found() {
    let dir = folder("pi0");
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).expect("it was written");
    let own = "paligemma.model.language_model.embed_tokens.weight";
    let rename = |bytes: &[u8], from: &str, to: &str| -> Vec<u8> {
        assert_eq!(from.len(), to.len(), "the header keeps its length");
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("a name");
        [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()
    };
    let missing = rename(&bytes, own, "paligemma.model.language_model.elsewhere_xx.weight");
    std::fs::write(&path, missing).expect("it can be written");
    let tied = run(load(dir.path()).as_mut(), None).expect("it runs");
    std::fs::write(&path, &bytes).expect("it can be written");
    let plain = run(load(dir.path()).as_mut(), None).expect("it runs");
    assert_ne!(tied.values(), plain.values(), "another table is read");
}

#[test]
fn guidance_pulls_the_frozen_actions_to_the_plan() {
    for architecture in ["pi0", "pi05"] {
        let dir = folder(architecture);
        let mut policy = load(dir.path());
        let plain = run(policy.as_mut(), None).expect("it runs");
        let plan: Vec<f64> = plain.values().iter().map(|v| v + 0.2).collect();
        let schedule = MaskSchedule::Exponential;
        let usage = PrefixUse::Guided { schedule, max_weight: 10.0 };
        let prefix = Prefix { actions: plan.clone(), dim: DIM, frozen: 3, horizon: HORIZON, usage };
        let guided = run(policy.as_mut(), Some(prefix)).expect("it runs");
        let off = |k: usize| {
            let rows = k * DIM..(k + 1) * DIM;
            let pairs = guided.values()[rows.clone()].iter().zip(&plan[rows]);
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        assert!((0..3).all(|k| off(k) < 0.05), "{architecture}: {}", off(0));
        assert!(off(7) > off(0), "{architecture}: what is free is pulled less");
        let clean = Prefix {
            actions: plan,
            dim: DIM,
            frozen: 1,
            horizon: HORIZON,
            usage: PrefixUse::Trained,
        };
        assert!(matches!(run(policy.as_mut(), Some(clean)), Err(PolicyError::Unsupported(_))));
    }
}

#[test]
fn a_clean_prefix_comes_out_as_it_went_in() {
    for architecture in ["pi0", "pi05"] {
        let dir = folder(architecture);
        let path = dir.path().join("sinew.json");
        let text = std::fs::read_to_string(&path).expect("it was written");
        let mut info: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        info["trained_prefix"] = 4.into();
        std::fs::write(&path, info.to_string()).expect("it can be written");
        let mut policy = load(dir.path());
        let plain = run(policy.as_mut(), None).expect("it runs");
        let plan: Vec<f64> = plain.values().iter().map(|v| v + 0.1).collect();
        let usage = PrefixUse::Trained;
        let prefix = Prefix { actions: plan.clone(), dim: DIM, frozen: 4, horizon: HORIZON, usage };
        let chunk = run(policy.as_mut(), Some(prefix)).expect("it runs");
        let plan: Vec<f32> = plan.iter().map(|v| *v as f32).collect();
        let kept = max_difference(&values(&chunk)[..4 * DIM], &plan[..4 * DIM]);
        assert!(kept < 1e-5, "{architecture}: {kept:e}");
        assert_ne!(values(&chunk)[4 * DIM..], values(&plain)[4 * DIM..], "the rest follows it");
    }
}

#[test]
fn files_that_do_not_fit_are_named() {
    for (file, key, value, words) in [
        ("config.json", "image_resolution", "[56, 42]", vec!["image_resolution", "square"]),
        ("config.json", "image_resolution", "[60, 60]", vec!["image_resolution", "14"]),
        ("config.json", "max_action_dim", "4", vec!["action", "max_action_dim is 4"]),
        ("config.json", "chunk_size", "9999", vec!["chunk_size", "4096"]),
        ("config.json", "num_inference_steps", "0", vec!["num_inference_steps"]),
        ("config.json", "min_period", "0", vec!["min_period"]),
        ("dims.json", "expert", "null", vec!["expert", "no sizes"]),
        ("dims.json", "vision", "3", vec!["dims.json"]),
    ] {
        let dir = folder("pi0");
        let path = dir.path().join(file);
        let text = std::fs::read_to_string(&path).expect("it was written");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        json[key] = serde_json::from_str(value).expect("it is JSON");
        std::fs::write(&path, json.to_string()).expect("it can be written");
        let error = load_policy(dir.path(), &LoadOptions::default()).map(drop);
        let text = error.expect_err("it does not fit").to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{key}: {text}");
    }
    // Sizes that the weights do not have name the tensor; without dims.json they are the published ones.
    let dir = folder("pi05");
    std::fs::remove_file(dir.path().join("dims.json")).expect("it was written");
    let error = load_policy(dir.path(), &LoadOptions::default()).map(drop);
    let text = error.expect_err("it is smaller").to_string();
    assert!(text.contains("vision_tower") && text.contains("1152"), "{text}");
}

#[test]
fn relative_actions_on_one_side_only_are_refused() {
    let dir = folder("pi0");
    let path = dir.path().join("policy_preprocessor.json");
    let text = std::fs::read_to_string(&path).expect("it was written");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let step = serde_json::json!({
        "registry_name": "relative_actions_processor", "config": { "enabled": true }
    });
    json["steps"].as_array_mut().expect("a list of steps").push(step);
    std::fs::write(&path, json.to_string()).expect("it can be written");
    let error = load_policy(dir.path(), &LoadOptions::default()).map(drop);
    let text = error.expect_err("the actions would stay relative").to_string();
    assert!(text.contains("absolute_actions_processor"), "{text}");
}

#[test]
fn action_tokens_make_a_chunk() {
    let dir = folder("pi0_fast");
    let plain = run(load(dir.path()).as_mut(), None).expect("it runs");
    assert_eq!((plain.horizon(), plain.values().len()), (HORIZON, HORIZON * DIM));
    let bundle = dir.path().join("bundle.gguf");
    quantize(dir.path(), QuantType::Q8_0, &bundle).unwrap_or_else(|e| panic!("{e}"));
    let mut policy = load(&bundle);
    assert!(!policy.spec().prefix.guided);
    assert_eq!(run(policy.as_mut(), None).expect("it runs").horizon(), HORIZON);
    std::fs::remove_file(dir.path().join("action_tokenizer/tokenizer.json")).expect("it was there");
    let error = load_policy(dir.path(), &LoadOptions::default()).map(drop);
    assert!(error.expect_err("it cannot speak").to_string().contains("action_tokenizer"));
}
