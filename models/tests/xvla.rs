//! X-VLA: same numbers as LeRobot 0.6.1? Every recorded intermediate, and the chunk.
//!
//! Tolerances (absolute, values of order one): 1e-4 for an intermediate, 5e-5 for the chunk.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Case, Worst, fixtures, reference};
use sinew_models::kernels::{Compute, Matrix};
use sinew_models::xvla::{CleanSampler, Preparer, Xvla, XvlaConfig, XvlaPolicy};
use sinew_models::{Checkpoint, LoadOptions, QuantType};
use sinew_runtime::{
    ChunkRequest, MaskSchedule, Observation, Policy, PolicyError, Prefix, PrefixUse, Progress,
    inference,
};

const INTERMEDIATE: f32 = 1e-4;
const CHUNK: f32 = 5e-5;

fn options() -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), missing_cameras: 1, ..LoadOptions::default() }
}

fn check_row(
    dir: &Path,
    model: &Xvla,
    preparer: &mut Preparer,
    case: &Case,
    (row, task): (usize, &str),
    worst: &mut Worst,
) {
    let inputs = preparer.prepare(&case.observation(row, task)).expect("the observation fits");
    let ours: Vec<f32> = inputs.tokens.iter().map(|t| *t as f32).collect();
    let ids = case.row("input.observation.language.tokens", 0, row);
    worst.check("ids", &ours, &ids, 0.0);
    worst.check("state", &inputs.state, &case.row("input.observation.state", 0, row), 1e-6);
    let images: Vec<Arc<Matrix>> = inputs
        .pixels
        .iter()
        .map(|pixels| Arc::new(model.encode_image(pixels).expect("the image fits").tokens))
        .collect();
    // `[rows of the batch, valid views, tokens, D]`
    let recorded = &case.get("vision.tokens").values;
    let batch = case.get("noise").shape[0];
    let theirs = &recorded[recorded.len() / batch * row..][..recorded.len() / batch];
    let ours: Vec<f32> = images.iter().flat_map(|tokens| tokens.values().to_vec()).collect();
    worst.check("vision.tokens", &ours, theirs, INTERMEDIATE);
    let features = model.encode(&images, &inputs.tokens).expect("the tokens fit");
    let encoded = features.encoded.values();
    worst.check("vlm.features", encoded, &case.row("vlm.features", 0, row), INTERMEDIATE);
    let views = features.views.as_ref().expect("there are three views").values();
    worst.check("vlm.aux", views, &case.row("vlm.aux", 0, row), INTERMEDIATE);
    let cache = model.prepare(&features).expect("the sequence fits");
    let (state, times) = (model.pad_state(&inputs.state), &case.get("steps.time").values);
    let noise = case.row("noise", 0, row);
    let mut sampler = CleanSampler::new(noise, model.sample_shape(), times.len()).expect("it fits");
    let (x_in, pred) = (case.row("steps.x_in", 1, row), case.row("steps.pred", 1, row));
    let size = x_in.len() / times.len();
    while !sampler.is_done() {
        let (step, time) = (sampler.done(), sampler.time());
        let range = step * size..(step + 1) * size;
        worst.check("time", &[time as f32], &times[step..=step], 0.0);
        let x = sampler.sample().expect("same shapes");
        // Recorded where the transformer begins, behind the hiding of the grippers.
        let seen = model.space().seen();
        let shown =
            x.values().iter().zip(seen.iter().cycle()).map(|(x, s)| x * s).collect::<Vec<_>>();
        worst.check("x_in", &shown, &x_in[range.clone()], INTERMEDIATE);
        let clean = model.predict(&cache, &x, &state, time).expect("x fits");
        worst.check("pred", clean.values(), &pred[range], INTERMEDIATE);
        sampler.step(clean);
    }
    check_policy(dir, case, (row, task), worst);
}

fn check_policy(dir: &Path, case: &Case, (row, task): (usize, &str), worst: &mut Worst) {
    let checkpoint = Checkpoint::open(dir, true).expect("the fixture is whole");
    let mut policy = XvlaPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
    policy.set_noise(case.row("noise", 0, row));
    let request = ChunkRequest { id: 3, ..ChunkRequest::default() };
    let chunk =
        inference::run(&mut policy, &case.observation(row, task), &request).expect("it runs");
    let ours: Vec<f32> = chunk.values().iter().map(|v| *v as f32).collect();
    worst.check("final", &ours, &case.row("actions.final", 0, row), CHUNK);
    assert_eq!((chunk.request, chunk.dt.as_millis(), chunk.report.stages.len()), (3, 100, 4));
}

fn check_directory(dir: &Path) {
    let text = std::fs::read_to_string(dir.join("cases.json")).expect("every directory has one");
    let cases: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let checkpoint = Checkpoint::open(dir, true).unwrap_or_else(|e| panic!("{e}"));
    let config = XvlaConfig::of(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
    let model = Xvla::load(&checkpoint, &config).unwrap_or_else(|e| panic!("{e}"));
    let mut preparer = Preparer::new(&checkpoint, &config, 1).unwrap_or_else(|e| panic!("{e}"));
    for entry in cases["cases"].as_array().expect("a list of cases") {
        let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
        let mut worst = Worst::default();
        for (row, task) in entry["tasks"].as_array().expect("tasks").iter().enumerate() {
            let task = task.as_str().expect("a text");
            check_row(dir, &model, &mut preparer, &case, (row, task), &mut worst);
        }
        worst.print(&format!("xvla/{}", entry["name"]));
    }
}

#[test]
fn every_intermediate_matches_lerobot() {
    if let Some(dir) = reference("xvla") {
        check_directory(&dir);
    }
}

/// Hidden grippers, projections of the domain, scaled embeddings, padding on the left, sizes in the older
/// spelling, images in their own size; `tests/reference/xvla.py`.
#[test]
fn the_end_effector_space_and_projections_of_the_domain_match_lerobot() {
    check_directory(&own());
}

fn own() -> PathBuf {
    fixtures().join("reference/xvla")
}

/// The fixture's policy and an observation for it.
fn policy() -> (XvlaPolicy, Observation) {
    let dir = own();
    let checkpoint = Checkpoint::open(&dir, true).expect("the fixture is whole");
    let policy = XvlaPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
    let observation = Case::open(&dir.join("case_0.safetensors")).observation(0, "push it");
    (policy, observation)
}

fn chunk(policy: &mut XvlaPolicy, observation: &Observation, request: &ChunkRequest) -> Vec<f64> {
    inference::run(policy, observation, request).expect("it runs").values().to_vec()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn stages_are_bounded_and_steps_can_be_changed_before_the_first() {
    let (mut policy, observation) = policy();
    assert!(matches!(policy.advance(), Err(PolicyError::OutOfTurn(_))));
    let request = ChunkRequest { denoise_steps: Some(5), seed: 4, ..ChunkRequest::default() };
    let whole = chunk(&mut policy, &observation, &request);
    let other = ChunkRequest { denoise_steps: Some(9), ..request.clone() };
    policy.begin(&observation, &other).expect("it fits");
    assert!(policy.set_denoise_steps(5).expect("it was begun"));
    assert!(!policy.finish_early().expect("it was begun"), "there is no estimate yet");
    let mut stages = Vec::new();
    while let Progress::Step { stage, done, total, denoised, .. } =
        policy.advance().expect("it runs")
    {
        stages.push(stage);
        assert_eq!((done, total, denoised), (stages.len(), 8, stage == "denoise"));
        let may = policy.set_denoise_steps(5).expect("it was begun");
        assert_eq!(may, stage != "denoise");
    }
    assert_eq!(stages, ["vision", "vision", "prefix", "denoise", "denoise", "denoise", "denoise"]);
    let changed = policy.take_chunk().expect("it is done");
    assert_eq!(changed.values(), whole, "the changed number of steps gives that number's chunk");
}

#[test]
fn an_early_end_gives_the_newest_clean_estimate() {
    let (mut policy, observation) = policy();
    // The first estimate of six steps is the whole of one: both see pure noise.
    let one = ChunkRequest { denoise_steps: Some(1), seed: 4, ..ChunkRequest::default() };
    let first = chunk(&mut policy, &observation, &one);
    let six = ChunkRequest { denoise_steps: Some(6), ..one };
    policy.begin(&observation, &six).expect("it fits");
    for _ in 0..4 {
        policy.advance().expect("two cameras, the encoder, one denoise step");
    }
    assert!(policy.finish_early().expect("it was begun"));
    assert_eq!(policy.advance().expect("it is done"), Progress::Done);
    let early = policy.take_chunk().expect("it was ended");
    assert_eq!((early.values(), early.report.denoise_steps), (first.as_slice(), 1));
}

#[test]
fn a_warm_start_keeps_to_the_plan_the_more_the_later_it_starts() {
    let (mut policy, observation) = policy();
    let free = ChunkRequest { seed: 4, ..ChunkRequest::default() };
    let unplanned = chunk(&mut policy, &observation, &free);
    let plan: Vec<f64> = unplanned.iter().map(|v| v + 0.4).collect();
    let mut from = |time: f64| {
        let usage = PrefixUse::WarmStart { time };
        let actions = plan.clone();
        let prefix = Prefix { actions, dim: 20, frozen: 0, horizon: 4, usage };
        let request = ChunkRequest { prefix: Some(prefix), ..free.clone() };
        chunk(&mut policy, &observation, &request)
    };
    // Next to time 1 the sample is the noise, whatever is planned.
    let early = from(1.0 - 1e-6);
    assert!(largest_difference(&early, &unplanned) < 1e-3);
    let middle = from(0.5);
    assert!(largest_difference(&middle, &unplanned) > 1e-3, "the plan counts");
}

#[test]
fn what_the_head_does_not_know_is_refused() {
    let (mut policy, observation) = policy();
    let mut refused = |usage, dim: usize| {
        let prefix = Prefix { actions: vec![0.1; 2 * dim], dim, frozen: 1, horizon: 2, usage };
        let request = ChunkRequest { prefix: Some(prefix), ..ChunkRequest::default() };
        policy.begin(&observation, &request).expect_err("the head does not know it")
    };
    let guided = PrefixUse::Guided { schedule: MaskSchedule::Linear, max_weight: 5.0 };
    assert!(matches!(refused(guided, 20), PolicyError::Unsupported("guidance")));
    assert!(matches!(refused(PrefixUse::Trained, 20), PolicyError::Unsupported(_)));
    let warm = |time| PrefixUse::WarmStart { time };
    assert!(matches!(refused(warm(0.5), 5), PolicyError::PrefixWidth { expected: 20, found: 5 }));
    assert!(matches!(refused(warm(f64::NAN), 20), PolicyError::Compute(_)));
    let none = ChunkRequest { denoise_steps: Some(0), ..ChunkRequest::default() };
    assert!(matches!(policy.begin(&observation, &none), Err(PolicyError::Compute(_))));
}

#[test]
fn a_missing_further_camera_leaves_zeros_and_a_missing_all_is_refused() {
    let (mut policy, mut observation) = policy();
    let request = ChunkRequest { seed: 4, ..ChunkRequest::default() };
    let both = chunk(&mut policy, &observation, &request);
    observation.images.retain(|image| image.camera == "front");
    let one = chunk(&mut policy, &observation, &request);
    assert!(largest_difference(&both, &one) > 1e-3, "the further camera counts");
    observation.images.clear();
    let error = policy.begin(&observation, &request).expect_err("there is no image");
    assert!(matches!(error, PolicyError::MissingCamera { .. }), "{error}");
}

#[test]
fn bundles_give_nearly_the_same_chunk() {
    let dir = own();
    let (mut exact, observation) = policy();
    let request = ChunkRequest { seed: 4, ..ChunkRequest::default() };
    let whole = chunk(&mut exact, &observation, &request);
    let folder = tempfile::tempdir().expect("there is room");
    for (kind, most) in [(QuantType::F16, 0.01), (QuantType::Q8_0, 0.05), (QuantType::Q4_0, 0.6)] {
        let out = folder.path().join("bundle.gguf");
        sinew_models::quantize(&dir, kind, &out).unwrap_or_else(|e| panic!("{e}"));
        let checkpoint = Checkpoint::open(&out, true).unwrap_or_else(|e| panic!("{e}"));
        let mut policy =
            XvlaPolicy::load(&checkpoint, &options()).unwrap_or_else(|e| panic!("{e}"));
        let difference = largest_difference(&whole, &chunk(&mut policy, &observation, &request));
        println!("{kind:?}: {difference:.1e}");
        let report = sinew_models::verify(&dir, Compute::Exact, &out, 2, 1)
            .unwrap_or_else(|e| panic!("{e}"));
        let stages: Vec<_> = report.stages.iter().map(|s| s.stage.as_str()).collect();
        // Two cameras with two stages each, the encoder, three denoise steps.
        assert_eq!((stages.len(), stages[4], stages[7]), (8, "encoder", "denoise step 3"));
        assert!(report.p99_absolute > 0.0 && report.p99_absolute <= report.max_absolute);
        assert!(difference > 0.0 && difference < most, "{kind:?} differs by {difference}");
    }
}

/// Weights saved with the older code: other names, and the projection the other way round.
#[test]
fn the_older_layout_gives_the_same_chunk() {
    let dir = own();
    let (mut policy, observation) = policy();
    let folder = tempfile::tempdir().expect("there is room");
    common::copy_folder(&dir, folder.path());
    let bytes = std::fs::read(dir.join("model.safetensors")).expect("it is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("it is whole");
    let mut old = Vec::new();
    for (name, view) in file.tensors() {
        let (name, shape, data) = older(&name, view.shape(), view.data());
        old.push((name, safetensors::Dtype::F32, shape, data));
    }
    let views = old.iter().map(|(name, dtype, shape, data)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name.clone(), view.expect("it fits its shape"))
    });
    let out = safetensors::serialize(views, None).expect("it can be written");
    std::fs::write(folder.path().join("model.safetensors"), out).expect("there is room");
    let checkpoint = Checkpoint::open(folder.path(), true).unwrap_or_else(|e| panic!("{e}"));
    let mut theirs = XvlaPolicy::load(&checkpoint, &options()).unwrap_or_else(|e| panic!("{e}"));
    let request = ChunkRequest { seed: 4, ..ChunkRequest::default() };
    assert_eq!(
        chunk(&mut theirs, &observation, &request),
        chunk(&mut policy, &observation, &request)
    );
}

fn older(name: &str, shape: &[usize], data: &[u8]) -> (String, Vec<usize>, Vec<u8>) {
    let keep = |name: String| (name, shape.to_vec(), data.to_vec());
    let Some(rest) = name.strip_prefix("model.vlm.") else { return keep(name.to_owned()) };
    if rest == "multi_modal_projector.image_projection.weight" {
        let (rows, columns) = (shape[0], shape[1]);
        let value = |r: usize, c: usize| &data[4 * (r * columns + c)..][..4];
        let turned = (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c)));
        let data = turned.flat_map(|(r, c)| value(r, c).to_vec()).collect();
        return ("model.vlm.image_projection".to_owned(), vec![columns, rows], data);
    }
    let mut name = rest
        .replace("multi_modal_projector.image_position_embed.", "image_pos_embed.")
        .replace("multi_modal_projector.", "")
        .replace("language_model.", "language_model.model.");
    if name.starts_with("vision_tower.convs.") {
        name = name.replace(".conv.", ".proj.");
    } else if name.starts_with("vision_tower.") {
        let attention = if name.contains("spatial") { "window_attn" } else { "channel_attn" };
        name = name
            .replace(".conv1.", ".conv1.fn.dw.")
            .replace(".conv2.", ".conv2.fn.dw.")
            .replace(&format!(".{attention}."), &format!(".{attention}.fn."))
            .replace(".norm1.", &format!(".{attention}.norm."))
            .replace(".ffn.", ".ffn.fn.net.")
            .replace(".norm2.", ".ffn.norm.");
    }
    keep(format!("model.vlm.{name}"))
}
