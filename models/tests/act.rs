//! ACT: same numbers as LeRobot 0.6.1?

mod common;

use std::path::Path;

use common::{Case, Worst, cases, fixtures, max_difference, reference};
use sinew_models::act::{Act, ActPolicy, sine_positions};
use sinew_models::kernels::{Planes, buffers_taken};
use sinew_models::{Checkpoint, LoadOptions, QuantType, load_policy, quantize};
use sinew_runtime::{ChunkRequest, Policy, PolicyError, Prefix, PrefixUse, Progress, inference};

const INTERMEDIATE: f32 = 1e-4;
const CHUNK: f32 = 5e-5;

fn checkpoint(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, true).unwrap_or_else(|e| panic!("{e}"))
}

fn check_row(model: &Act, checkpoint: &Checkpoint, case: &Case, row: usize, worst: &mut Worst) {
    let mut maps = Vec::new();
    for (i, (key, _)) in checkpoint.features.cameras().enumerate() {
        let name = format!("input.{key}");
        let shape = &case.get(&name).shape;
        let pixels = Planes::new(&case.row(&name, 0, row), (shape[2], shape[3]));
        let map = model.encode_image(&pixels.expect("it fits its shape")).expect("the image fits");
        let theirs = case.row(&format!("vision.{i}.feature_map"), 0, row);
        worst.check("feature_map", map.to_planes().values.values(), &theirs, INTERMEDIATE);
        maps.push(map);
    }
    let state = case.row("input.observation.state", 0, row);
    let encoded = model.encode(Some(&state), None, &maps).expect("the inputs fit");
    let theirs = |name: &str| case.row(name, 1, row);
    worst.check("tokens_in", encoded.inputs.values(), &theirs("encoder.tokens_in"), INTERMEDIATE);
    let positions = &case.get("encoder.pos_embed").values;
    worst.check("positions", encoded.positions.values(), positions, 1e-5);
    worst.check("encoder", encoded.tokens.values(), &theirs("encoder.out"), INTERMEDIATE);
    let decoded = model.decode(&encoded).expect("the tokens fit");
    worst.check("decoder", decoded.values(), &theirs("decoder.out"), INTERMEDIATE);
    let chunk = model.actions(&decoded).expect("it fits");
    worst.check("chunk", chunk.values(), &case.row("actions.normalized", 0, row), CHUNK);
}

fn options() -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), ..LoadOptions::default() }
}

/// The policy as the runtime calls it: a raw observation in, physical actions out.
fn check_policy(checkpoint: &Checkpoint, case: &Case, row: usize, worst: &mut Worst) {
    let mut policy = ActPolicy::load(checkpoint, &options()).expect("the fixture is whole");
    let request = ChunkRequest { id: 3, ..ChunkRequest::default() };
    let seen = case.observation(row, "");
    let chunk = inference::run(&mut policy, &seen, &request).expect("it runs");
    let ours: Vec<f32> = chunk.values().iter().map(|v| *v as f32).collect();
    let theirs = case.row("actions.final", 0, row);
    let largest = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
    worst.check("final", &ours, &theirs, CHUNK * largest);
    assert_eq!((chunk.request, chunk.dt.as_millis(), chunk.report.stages.len()), (3, 100, 4));
}

#[test]
fn it_advances_by_bounded_steps_and_knows_nothing_of_plans() {
    let dir = fixtures().join("onnx/act");
    let mut policy = ActPolicy::load(&checkpoint(&dir), &options()).expect("the fixture is whole");
    let seen = Case::open(&dir.join("case.safetensors")).observation(0, "");
    assert!(matches!(policy.advance(), Err(PolicyError::OutOfTurn(_))));
    policy.begin(&seen, &ChunkRequest::default()).expect("it fits");
    assert!(matches!(policy.take_chunk(), Err(PolicyError::OutOfTurn(_))), "not done yet");
    policy.begin(&seen, &ChunkRequest::default()).expect("it fits");
    let mut stages = Vec::new();
    while let Progress::Step { stage, done, total, .. } = policy.advance().expect("it runs") {
        stages.push((stage, done, total));
    }
    assert_eq!(stages, [("vision", 1, 4), ("vision", 2, 4), ("encode", 3, 4)]);
    assert_eq!(policy.take_chunk().map(|c| c.horizon()), Ok(8));
    let usage = PrefixUse::WarmStart { time: 0.5 };
    let prefix = Prefix { actions: vec![0.0; 5], dim: 5, frozen: 1, horizon: 1, usage };
    let request = ChunkRequest { prefix: Some(prefix), ..ChunkRequest::default() };
    assert!(matches!(policy.begin(&seen, &request), Err(PolicyError::Unsupported(_))));
    let mut blind = seen.clone();
    blind.images.pop();
    let refused = policy.begin(&blind, &ChunkRequest::default());
    assert!(matches!(refused, Err(PolicyError::MissingCamera { .. })), "{refused:?}");
}

#[test]
fn it_takes_no_memory_after_its_first_chunk() {
    let dir = fixtures().join("onnx/act");
    let mut policy = ActPolicy::load(&checkpoint(&dir), &options()).expect("the fixture is whole");
    let seen = Case::open(&dir.join("case.safetensors")).observation(0, "");
    let mut chunk = || {
        inference::run(&mut policy, &seen, &ChunkRequest::default()).expect("it runs");
        buffers_taken()
    };
    let before = buffers_taken();
    let first = chunk();
    assert!(first > before, "its results are held there");
    assert_eq!([chunk(), chunk()], [first; 2]);
}

/// The fixture that comes with the repository: checkpoint and results of LeRobot's ACT.
#[test]
fn the_repositorys_own_act_matches_lerobot() {
    let dir = fixtures().join("onnx/act");
    let mut worst = Worst::default();
    let case = Case::open(&dir.join("case.safetensors"));
    check_policy(&checkpoint(&dir), &case, 0, &mut worst);
    worst.print("onnx/act");
}

#[test]
fn every_stage_matches_lerobot() {
    for name in ["act", "act_ensemble"] {
        let Some(dir) = reference(name) else { return };
        let checkpoint = checkpoint(&dir);
        let model = Act::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
        let mut seen = 0;
        for entry in cases(&dir).iter().filter(|c| c["kind"] == "chunk") {
            let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
            let mut worst = Worst::default();
            for row in 0..entry["batch"].as_u64().expect("a number") as usize {
                check_row(&model, &checkpoint, &case, row, &mut worst);
                check_policy(&checkpoint, &case, row, &mut worst);
                seen += 1;
            }
            worst.print(&format!("{name}/{}", entry["name"]));
        }
        assert_eq!(seen, 3, "rows in {name}");
    }
}

#[test]
fn image_positions_match_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_act_tables.safetensors"));
    for (rows, columns) in [(2, 3), (15, 20)] {
        let theirs = case.get(&format!("act_pos2d.{rows}x{columns}"));
        let ours = sine_positions(rows, columns, theirs.shape[1]).transposed();
        let difference = max_difference(ours.values(), &theirs.values);
        println!("act_pos2d.{rows}x{columns}: {difference:.1e}");
        assert!(difference < 2e-6, "{rows}x{columns} differs by {difference:e}");
    }
}

#[test]
fn quantized_bundles_stay_near() {
    let Some(dir) = reference("act") else { return };
    let seen = Case::open(&dir.join("case_basic.safetensors")).observation(0, "");
    let run = |path: &Path| {
        let mut policy = load_policy(path, &options()).unwrap_or_else(|e| panic!("{e}"));
        let chunk = inference::run(policy.as_mut(), &seen, &ChunkRequest::default());
        chunk.expect("it runs").values().iter().map(|v| *v as f32).collect::<Vec<_>>()
    };
    let whole = run(&dir);
    let scratch = tempfile::tempdir().expect("a folder");
    let out = scratch.path().join("bundle.gguf");
    for (kind, tolerance) in [(QuantType::Q8_0, 0.02), (QuantType::Q4_0, 0.3)] {
        quantize(&dir, kind, &out).unwrap_or_else(|e| panic!("{e}"));
        let stored = Checkpoint::open(&out, true).unwrap_or_else(|e| panic!("{e}"));
        let matrix = stored.store.find("encoder.layers.0.self_attn.in_proj_weight");
        assert_eq!(matrix.expect("it is there").dtype.name(), format!("{kind:?}"));
        let error = max_difference(&run(&out), &whole);
        println!("{kind:?}: {error:.1e}");
        assert!(error > 0.0 && error <= tolerance, "{kind:?} is {error} off");
    }
}
