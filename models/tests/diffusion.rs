//! Diffusion Policy: same numbers as LeRobot 0.6.1?

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Case, Worst, cases, max_difference, reference};
use sinew_models::diffusion::{Condition, DiffusionConfig, DiffusionModel, DiffusionPolicy};
use sinew_models::heads::ddpm::{BetaSchedule, Kind, Prediction, Sampler, Schedule};
use sinew_models::kernels::{Matrix, Planes};
use sinew_models::{Checkpoint, LoadOptions, QuantType, quantize};
use sinew_runtime::{ChunkRequest, Observation, Policy, Stamp, inference};

const INTERMEDIATE: f32 = 1e-4;
const CHUNK: f32 = 5e-5;

fn checkpoint(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, true).unwrap_or_else(|e| panic!("{e}"))
}

/// The rows of tensor `name` that belong to batch row `row`, one for each observation.
fn observed(case: &Case, name: &str, row: usize) -> Vec<Vec<f32>> {
    let tensor = case.get(name);
    let steps = tensor.shape[1];
    let values = case.row(name, 0, row);
    values.chunks_exact(values.len() / steps).map(<[f32]>::to_vec).collect()
}

/// The condition of batch row `row`, each part of it compared on the way.
fn condition(
    model: &DiffusionModel,
    checkpoint: &Checkpoint,
    case: &Case,
    row: usize,
    worst: &mut Worst,
) -> Condition {
    let states = observed(case, "input.observation.state", row);
    let mut rows = Vec::new();
    for (step, state) in states.iter().enumerate() {
        // The recorded vision tensors have batch and observation step in one dimension.
        let place = row * states.len() + step;
        let mut features = Vec::new();
        for (camera, (key, _)) in checkpoint.features.cameras().enumerate() {
            let name = format!("input.{key}");
            let shape = case.get(&name).shape.clone();
            let planes = observed(case, &name, row).swap_remove(step);
            let planes = Planes::new(&planes, (shape[3], shape[4])).expect("it fits its shape");
            let pixels = model.prepare(planes).expect("the image fits");
            let seen = model.encode_image(camera, &pixels).expect("the image fits");
            if camera == 0 {
                let map = case.row("vision.feature_map_first", 0, place);
                let ours = seen.map.to_planes();
                worst.check("feature_map", ours.values.values(), &map, INTERMEDIATE);
                let keypoints = case.row("vision.keypoints_first", 0, place);
                worst.check("keypoints", seen.keypoints.values(), &keypoints, INTERMEDIATE);
            }
            let theirs = case.row(&format!("vision.{camera}.features"), 0, place);
            worst.check("features", seen.features.values(), &theirs, INTERMEDIATE);
            features.push(Arc::new(seen.features));
        }
        rows.push(model.observation(state, &features, None).expect("the parts fit"));
    }
    let rows = Matrix::stacked(rows.iter(), rows[0].width()).expect("equal widths");
    let condition = Condition::new(rows);
    let theirs = case.row("global_cond", 0, row);
    worst.check("global_cond", condition.flat().values(), &theirs, INTERMEDIATE);
    condition
}

/// Denoises from the recorded noise; `part` names the chunk in a rollout.
fn denoise(
    model: &DiffusionModel,
    config: &DiffusionConfig,
    case: &Case,
    (part, row): (&str, usize),
    condition: &Condition,
    worst: &mut Worst,
) -> Matrix {
    let get = |name: &str, axis| case.row(&format!("{part}{name}"), axis, row);
    let timesteps = &case.get(&format!("{part}steps.timestep")).values;
    let shape = model.sample_shape();
    let noise = Matrix::new(&get("noise", 0), shape).expect("the noise fits");
    let mut sampler = Sampler::new(config.schedule(), noise, timesteps.len());
    let (x_in, outputs) = (get("steps.x_in", 1), get("steps.model_output", 1));
    let added = format!("{part}steps.scheduler_noise");
    let added = if case.has(&added) { case.row(&added, 1, row) } else { Vec::new() };
    let size = shape.0 * shape.1;
    while !sampler.is_done() {
        let step = sampler.done();
        assert_eq!(sampler.timestep() as f32, timesteps[step]);
        let range = step * size..(step + 1) * size;
        worst.check("x_in", sampler.sample().values(), &x_in[range.clone()], INTERMEDIATE);
        let output = model.predict(sampler.sample(), sampler.timestep(), condition);
        let output = output.expect("the shapes fit");
        worst.check("output", output.values(), &outputs[range.clone()], INTERMEDIATE);
        let noise = || Matrix::new(&added[range], shape);
        sampler.step(&output, noise).expect("the shapes fit");
    }
    sampler.sample().clone()
}

fn check_directory(name: &str) {
    let Some(dir) = reference(name) else { return };
    let checkpoint = checkpoint(&dir);
    let config = DiffusionConfig::of(&checkpoint).expect("it was opened");
    let model = DiffusionModel::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
    let mut seen = 0;
    for entry in cases(&dir).iter().filter(|c| c["kind"] == "chunk") {
        let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
        let mut worst = Worst::default();
        for row in 0..entry["batch"].as_u64().expect("a number") as usize {
            let condition = condition(&model, &checkpoint, &case, row, &mut worst);
            let x = denoise(&model, &config, &case, ("", row), &condition, &mut worst);
            let theirs = case.row("actions.horizon_normalized", 0, row);
            worst.check("horizon", x.values(), &theirs, CHUNK);
            check_policy(&checkpoint, &case, row, &mut worst);
            seen += 1;
        }
        worst.print(&format!("{name}/{}", entry["name"]));
    }
    assert_eq!(seen, 3, "rows in {name}");
}

#[test]
fn ddpm_with_group_norms_matches_lerobot() {
    check_directory("diffusion_ddpm");
}

#[test]
fn ddim_with_batch_norms_and_a_crop_matches_lerobot() {
    check_directory("diffusion_ddim");
}

fn options() -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), ..LoadOptions::default() }
}

/// The observation under `prefix`, at action `step` of a run.
fn observation(case: &Case, prefix: &str, step: usize) -> Observation {
    Observation { instant: Stamp(step as i64 * 100_000_000), ..case.observation_at(prefix, "") }
}

/// The policy as the runtime calls it: raw observations in, physical actions out.
fn check_policy(checkpoint: &Checkpoint, case: &Case, row: usize, worst: &mut Worst) {
    let mut policy = DiffusionPolicy::load(checkpoint, &options()).expect("the fixture is whole");
    let added = match case.has("steps.scheduler_noise") {
        true => case.row("steps.scheduler_noise", 1, row),
        false => Vec::new(),
    };
    let noise = case.row("noise", 0, row);
    let added = added.chunks_exact(noise.len()).map(<[f32]>::to_vec).collect::<Vec<_>>();
    policy.set_noise(std::iter::once(noise).chain(added));
    policy.remember(&observation(case, &format!("raw.{row}.0."), 0)).expect("it fits");
    let now = observation(case, &format!("raw.{row}.1."), 1);
    let request = ChunkRequest { id: 3, ..ChunkRequest::default() };
    let chunk = inference::run(&mut policy, &now, &request).expect("it runs");
    let ours: Vec<f32> = chunk.values().iter().map(|v| *v as f32).collect();
    let theirs = case.row("actions.final", 0, row);
    let largest = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
    worst.check("final", &ours, &theirs, CHUNK * largest);
    assert_eq!((chunk.request, chunk.dt.as_millis(), chunk.report.denoise_steps), (3, 100, 10));
}

/// A whole run: the policy sees every observation, and is asked for a chunk when the last is used up.
#[test]
fn a_rollout_matches_lerobot() {
    let Some(dir) = reference("diffusion_ddim") else { return };
    let checkpoint = checkpoint(&dir);
    let list = cases(&dir);
    let entry = list.iter().find(|c| c["kind"] == "rollout").expect("there is one");
    let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
    let mut policy = DiffusionPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
    let steps = entry["steps"].as_u64().expect("a number") as usize;
    let starts: Vec<u64> = entry["chunk_starts"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|s| s.as_u64())
        .collect();
    let mut actions = Vec::new();
    let mut chunks = 0;
    for step in 0..steps {
        let now = observation(&case, &format!("raw.{step}."), step);
        if actions.len() == step * 3 {
            assert_eq!(starts[chunks], step as u64, "a chunk is due where the reference makes one");
            policy.set_noise([case.row(&format!("chunk.{chunks}.noise"), 0, 0)]);
            let chunk = inference::run(&mut policy, &now, &ChunkRequest::default());
            actions.extend(chunk.expect("it runs").values().iter().map(|v| *v as f32));
            chunks += 1;
        } else {
            policy.remember(&now).expect("it fits");
        }
    }
    assert_eq!(chunks, starts.len());
    actions.truncate(steps * 3);
    let theirs = &case.get("episode.actions_final").values;
    let largest = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
    let difference = max_difference(&actions, theirs);
    println!("rollout: {difference:.1e}");
    assert!(difference <= CHUNK * largest, "differs by {difference:e}");
}

#[test]
fn schedules_match_diffusers() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_diffusion_schedules.safetensors"));
    let shapes = [
        (BetaSchedule::SquaredcosCapV2, 100),
        (BetaSchedule::Linear, 100),
        (BetaSchedule::ScaledLinear, 50),
    ];
    for (index, (shape, steps)) in shapes.into_iter().enumerate() {
        for (kind, name) in [(Kind::Ddpm, "ddpm"), (Kind::Ddim, "ddim")] {
            let schedule = Schedule::new(kind, shape, steps, (1e-4, 0.02), Prediction::Epsilon);
            let table = |what: &str| &case.get(&format!("{index}.{what}")).values;
            let betas = max_difference(schedule.betas(), table("betas"));
            let alphas = max_difference(schedule.alphas(), table("alphas_cumprod"));
            println!("schedule {index} {name}: betas {betas:.1e}, alphas {alphas:.1e}");
            assert!(betas <= 1e-7 && alphas <= 2e-7, "{index}: {betas:e} {alphas:e}");
            for n in [5, 10, steps] {
                let ours: Vec<f32> = schedule.timesteps(n).iter().map(|t| *t as f32).collect();
                assert_eq!(&ours, table(&format!("{name}_timesteps.{n}")), "{index} {name} {n}");
            }
        }
    }
}

#[test]
fn a_half_precision_bundle_stays_near() {
    for name in ["diffusion_ddpm", "diffusion_ddim"] {
        let Some(dir) = reference(name) else { return };
        let case = Case::open(&dir.join("case_basic.safetensors"));
        let scratch = tempfile::tempdir().expect("a folder");
        let out = scratch.path().join("bundle.gguf");
        quantize(&dir, QuantType::F16, &out).unwrap_or_else(|e| panic!("{e}"));
        let run = |path: &Path| {
            let mut policy =
                DiffusionPolicy::load(&checkpoint(path), &options()).expect("it is whole");
            let now = observation(&case, "raw.0.1.", 1);
            let chunk = inference::run(&mut policy, &now, &ChunkRequest::default());
            chunk.expect("it runs").values().iter().map(|v| *v as f32).collect::<Vec<_>>()
        };
        let (whole, half) = (run(&dir), run(&out));
        let largest = whole.iter().fold(1f32, |m, v| m.max(v.abs()));
        let error = max_difference(&half, &whole) / largest;
        println!("{name}: {error:.1e}");
        assert!(error > 0.0 && error < 0.02, "{name} is {error} off");
    }
}
