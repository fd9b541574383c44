//! π0, π0.5 and π0-FAST: the same numbers as LeRobot 0.6.1? Every recorded intermediate, and the chunk.
//!
//! Tolerances (absolute, values of order one): 1e-4 for an intermediate, 5e-5 for the chunk.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Case, Worst, heads_apart, max_difference, reference, valid};
use sinew_models::heads::flow::{FlowTime, NoiseAtOne, Sampler, Solver};
use sinew_models::kernels::{Matrix, Planes, add_scaled};
use sinew_models::pi::{Pi, PiPolicy, Preparer};
use sinew_models::processors::resize::{Padding, resize_padded, to_planes};
use sinew_models::processors::{Pipeline, StatePrompt};
use sinew_models::{Checkpoint, LoadOptions};
use sinew_runtime::{ChunkRequest, MaskSchedule, Policy, Prefix, PrefixUse, Progress, inference};

const INTERMEDIATE: f32 = 1e-4;
const CHUNK: f32 = 5e-5;

fn options() -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), missing_cameras: 1, ..LoadOptions::default() }
}

fn cases(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("cases.json")).expect("every directory has one");
    let cases: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    cases["cases"].as_array().expect("a list of cases").clone()
}

fn file(dir: &Path, entry: &serde_json::Value) -> Case {
    Case::open(&dir.join(entry["file"].as_str().expect("a file")))
}

/// Inputs and prefix of one row: ids, images, and the prefix's embeddings.
fn check_prefix(
    encode: impl Fn(&Planes) -> sinew_models::pi::ImageFeatures,
    embed: impl Fn(&[Arc<Matrix>], &[u32]) -> Matrix,
    preparer: &mut Preparer,
    (case, row): (&Case, usize),
    task: &str,
    worst: &mut Worst,
) -> (sinew_models::pi::Inputs, Matrix) {
    let inputs = preparer.prepare(&case.observation(row, task)).expect("the observation fits");
    let mask = case.row("input.observation.language.attention_mask", 0, row);
    let ids = valid(&case.row("input.observation.language.tokens", 0, row), &mask);
    let ours: Vec<f32> = inputs.tokens.iter().map(|t| *t as f32).collect();
    worst.check("ids", &ours, &ids, 0.0);
    worst.check("state", &inputs.state, &case.row("input.observation.state", 0, row), 1e-5);
    let mut tokens = Vec::new();
    for (i, pixels) in inputs.pixels.iter().enumerate() {
        let name = |part: &str| format!("vision.{i}.{part}");
        let theirs = case.row(&name("pixels"), 0, row);
        worst.check("pixels", pixels.values.values(), &theirs, 1e-5);
        let features = encode(pixels);
        for (part, ours) in [("last_hidden", &features.last_hidden), ("tokens", &features.tokens)] {
            if case.has(&name(part)) {
                let theirs = case.row(&name(part), 0, row);
                worst.check(part, ours.values(), &theirs, INTERMEDIATE);
            }
        }
        tokens.push(Arc::new(features.tokens));
    }
    let embeddings = embed(&tokens, &inputs.tokens);
    let mask = case.row("prefix.pad_mask", 0, row);
    let theirs = valid(&case.row("prefix.embeddings", 0, row), &mask);
    worst.check("prefix", embeddings.values(), &theirs, INTERMEDIATE);
    (inputs, embeddings)
}

fn check_row(
    model: &Pi,
    preparer: &mut Preparer,
    case: &Case,
    row: usize,
    task: &str,
    worst: &mut Worst,
) {
    let (inputs, embeddings) = check_prefix(
        |pixels| model.encode_image(pixels).expect("the image fits"),
        |images, ids| model.embed_prefix(images, ids).expect("the prefix fits"),
        preparer,
        (case, row),
        task,
        worst,
    );
    let mask = case.row("prefix.pad_mask", 0, row);
    let prefix = model.prefill(embeddings).expect("the prefix fits");
    for (name, second) in [("kv_keys", false), ("kv_values", true)] {
        // [layers, b, K, P, hd]: one row of the batch is [layers, K, P, hd], and ours of each layer [P, K·hd].
        let name_there = format!("prefix.{name}");
        let (recorded, shape) = (case.row(&name_there, 1, row), &case.get(&name_there).shape);
        let size = shape[4];
        let theirs = recorded.chunks_exact(mask.len() * size).flat_map(|head| valid(head, &mask));
        let theirs: Vec<f32> = theirs.collect();
        let sides = prefix.layers.iter().map(|kv| if second { &kv.values } else { &kv.keys });
        let ours: Vec<f32> = sides.flat_map(|side| heads_apart(side, size)).collect();
        worst.check(name, &ours, &theirs, INTERMEDIATE);
    }
    let cache = model.prepare(prefix, &inputs.state).expect("the state fits");
    let steps = case.get("steps.time").values.len();
    let noise = case.row("noise", 0, row);
    let mut sampler =
        Sampler::<NoiseAtOne>::new(noise, model.sample_shape(), steps).expect("the noise fits");
    let (x_in, v_all) = (case.row("steps.x_in", 1, row), case.row("steps.v", 1, row));
    let conditions = case.has("steps.adarms_cond").then(|| case.row("steps.adarms_cond", 1, row));
    let size = x_in.len() / steps;
    while !sampler.is_done() {
        let (step, time) = (sampler.done(), sampler.flow_time());
        let theirs = &case.get("steps.time").values[step..=step];
        worst.check("time", &[time.value() as f32], theirs, 0.0);
        if step == 0 {
            let actions = model.embed_actions(sampler.sample(), &[time]).expect("x fits");
            let state = model.embed_state(&inputs.state).expect("the state fits");
            let mut suffix = state.map_or_else(Vec::new, |t| t.values().to_vec());
            suffix.extend(actions.values());
            let theirs = case.row("steps.suffix_embeddings_first", 0, row);
            worst.check("suffix", &suffix, &theirs, INTERMEDIATE);
        }
        if let Some(conditions) = &conditions {
            let ours = model.condition(&[time]).expect("one time");
            let width = conditions.len() / steps;
            let theirs = &conditions[step * width..][..width];
            worst.check("condition", ours.values(), theirs, INTERMEDIATE);
        }
        let v = model.velocity(&cache, sampler.sample(), &[time]).expect("x fits");
        let range = step * size..(step + 1) * size;
        worst.check("x_in", sampler.sample().values(), &x_in[range.clone()], INTERMEDIATE);
        worst.check("v", v.values(), &v_all[range], INTERMEDIATE);
        // One time for each action is the same as one for all.
        if step == 1 {
            let times = vec![time; model.sample_shape().0];
            let each = model.velocity(&cache, sampler.sample(), &times).expect("x fits");
            let difference = max_difference(each.values(), v.values());
            assert!(difference < 1e-5, "a time for each action: {difference:e}");
        }
        sampler.step(v).expect("v fits");
    }
    let theirs = case.row("actions.padded", 0, row);
    worst.check("chunk", sampler.sample().values(), &theirs, CHUNK);
}

fn check_policy(dir: &Path, case: &Case, row: usize, task: &str, worst: &mut Worst) {
    let checkpoint = Checkpoint::open(dir, true).expect("the fixture is whole");
    let mut policy = PiPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
    policy.set_noise(case.row("noise", 0, row));
    let request = ChunkRequest { id: 3, ..ChunkRequest::default() };
    let chunk =
        inference::run(&mut policy, &case.observation(row, task), &request).expect("it runs");
    let ours: Vec<f32> = chunk.values().iter().map(|v| *v as f32).collect();
    let theirs = case.row("actions.final", 0, row);
    let largest = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
    worst.check("final", &ours, &theirs, CHUNK * largest);
    assert_eq!((chunk.request, chunk.dt.as_millis(), chunk.report.stages.len()), (3, 100, 4));
}

fn check_directory(name: &str, expected: usize) {
    let Some(dir) = reference(name) else { return };
    let checkpoint = Checkpoint::open(&dir, true).unwrap_or_else(|e| panic!("{e}"));
    let model = Pi::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
    let mut preparer = Preparer::new(&checkpoint, 1).unwrap_or_else(|e| panic!("{e}"));
    let mut seen = 0;
    for entry in cases(&dir).iter().filter(|entry| entry["kind"] == "chunk") {
        let case = file(&dir, entry);
        let mut worst = Worst::default();
        for (row, task) in entry["tasks"].as_array().expect("tasks").iter().enumerate() {
            let task = task.as_str().expect("a text");
            check_row(&model, &mut preparer, &case, row, task, &mut worst);
            check_policy(&dir, &case, row, task, &mut worst);
        }
        worst.print(&format!("{name}/{}", entry["name"].as_str().expect("a name")));
        seen += 1;
    }
    assert_eq!(seen, expected, "cases of {name}");
}

#[test]
fn pi0_matches_lerobot() {
    check_directory("pi0", 3);
}

#[test]
fn pi05_matches_lerobot() {
    check_directory("pi05", 2);
}

/// Real-time chunking cases: weights, every guided velocity's effect, the chunk.
fn check_guided(name: &str, expected: usize) {
    let Some(dir) = reference(name) else { return };
    let checkpoint = Checkpoint::open(&dir, true).unwrap_or_else(|e| panic!("{e}"));
    let list = cases(&dir);
    let mut seen = 0;
    for entry in list.iter().filter(|c| c["kind"] == "rtc") {
        let base = list.iter().find(|c| c["name"] == entry["inputs_from"]).expect("named");
        let task = base["tasks"][0].as_str().expect("a text");
        let observation = file(&dir, base).observation(0, task);
        let case = file(&dir, entry);
        let mut policy = PiPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
        let preparer = Preparer::new(&checkpoint, 1).expect("the fixture is whole");
        policy.set_noise(case.row("noise", 0, 0));
        let number = |key: &str| entry[key].as_u64().map(|n| n as usize);
        let rows = case.row("rtc.prev_chunk_left_over", 0, 0);
        let dim = preparer.boundary().action_dim();
        let (_, action) = preparer.boundary().normalizers();
        let physical = rows.iter().enumerate();
        let actions = physical.map(|(i, v)| action.unnormalize(i % dim, f64::from(*v))).collect();
        let schedule = match entry["schedule"].as_str().expect("a name") {
            "LINEAR" => MaskSchedule::Linear,
            "EXP" => MaskSchedule::Exponential,
            other => panic!("{other} is not among the cases"),
        };
        let max_weight = entry["max_guidance_weight"].as_f64().expect("a weight");
        let horizon = number("execution_horizon").or(number("config_execution_horizon"));
        let prefix = Prefix {
            actions,
            dim,
            frozen: number("inference_delay").expect("a delay"),
            horizon: horizon.expect("a horizon"),
            usage: PrefixUse::Guided { schedule, max_weight },
        };
        let recorded = &case.get("rtc.weights").values;
        let weights = prefix.weights(schedule, recorded.len());
        let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
        let mut worst = Worst::default();
        worst.check("weights", &weights, recorded, 1e-6);
        let request = ChunkRequest { id: 3, prefix: Some(prefix), ..ChunkRequest::default() };
        let chunk = inference::run(&mut policy, &observation, &request).expect("it runs");
        let ours: Vec<f32> = chunk.values().iter().map(|v| *v as f32).collect();
        let theirs = case.row("actions.final", 0, 0);
        let largest = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
        worst.check("final", &ours, &theirs, CHUNK * largest);
        worst.print(&format!("{name}/{}", entry["name"].as_str().expect("a name")));
        seen += 1;
    }
    assert_eq!(seen, expected, "cases of {name}");
}

#[test]
fn guided_chunks_match_lerobot() {
    check_guided("pi0", 2);
    check_guided("pi05", 1);
}

#[test]
fn prompts_and_relative_actions_match_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let list = cases(&dir);
    let entry = list.iter().find(|c| c["name"] == "pi05_prompt_and_relative").expect("it is there");
    let case = file(&dir, entry);
    let states = case.get("state");
    let rows = states.values.chunks_exact(states.shape[1]);
    let texts = |key: &str| entry[key].as_array().expect("a list").clone();
    assert_eq!(rows.len(), texts("tasks").len());
    for ((state, task), prompt) in rows.zip(texts("tasks")).zip(texts("prompts")) {
        let ours = StatePrompt::TaskStateAction.text(task.as_str().expect("a text"), state);
        assert_eq!(ours, prompt.as_str().expect("a text"));
    }
    let pipeline = serde_json::json!({ "steps": [{
        "registry_name": "relative_actions_processor",
        "config": { "enabled": true, "exclude_joints": entry["exclude_joints"],
                    "action_names": entry["action_names"] }
    }] });
    let pipeline = Pipeline::parse(Path::new("p"), &pipeline.to_string()).expect("it is whole");
    let mask: Vec<f32> = pipeline
        .relative
        .expect("it is enabled")
        .dimensions(case.get("relative.mask").values.len())
        .iter()
        .map(|r| f32::from(u8::from(*r)))
        .collect();
    assert_eq!(mask, case.get("relative.mask").values);
}

/// With relative actions enabled, the chunk is the network's plus the state of its own observation.
#[test]
fn relative_actions_start_from_the_observations_own_state() {
    let Some(dir) = reference("pi0") else { return };
    let copy = tempfile::tempdir().expect("a temporary folder");
    for entry in std::fs::read_dir(&dir).expect("it is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_name().expect("a file has a name").to_owned();
        if path.is_file() && !name.to_string_lossy().starts_with("case") {
            std::fs::copy(&path, copy.path().join(&name)).expect("it can be written");
        }
    }
    std::fs::copy(dir.join("tokenizer/tokenizer.json"), copy.path().join("tokenizer.json"))
        .expect("it can be written");
    let names = ["a", "b", "c", "d", "e", "my_gripper"];
    for file in ["policy_preprocessor.json", "policy_postprocessor.json"] {
        let path = copy.path().join(file);
        let text = std::fs::read_to_string(&path).expect("it is there");
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        for step in json["steps"].as_array_mut().expect("a list of steps") {
            if step["registry_name"].as_str().is_some_and(|n| n.contains("_actions_processor")) {
                step["config"]["enabled"] = true.into();
                step["config"]["action_names"] = serde_json::json!(names);
            }
        }
        // Copies of read-only files are read-only.
        std::fs::remove_file(&path).expect("it can be replaced");
        std::fs::write(&path, json.to_string()).expect("it can be written");
    }
    let list = cases(&dir);
    let case = file(&dir, &list[0]);
    let task = list[0]["tasks"][0].as_str().expect("a text");
    let load = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir, true).unwrap_or_else(|e| panic!("{e}"));
        PiPolicy::load(&checkpoint, &options()).unwrap_or_else(|e| panic!("{e}"))
    };
    let (mut plain, mut relative) = (load(&dir), load(copy.path()));
    let observation = case.observation(0, task);
    let run = |policy: &mut PiPolicy, prefix| {
        let request = ChunkRequest { seed: 4, prefix, ..ChunkRequest::default() };
        inference::run(policy, &observation, &request).expect("it runs")
    };
    let (p, r) = (run(&mut plain, None), run(&mut relative, None));
    let dim = names.len();
    for (i, (p, r)) in p.values().iter().zip(r.values()).enumerate() {
        let offset = if i % dim < 5 { observation.proprioception[i % dim] } else { 0.0 };
        assert!((p + offset - r).abs() < 1e-9, "value {i}");
    }
    // Planned actions come back to where they were: relative to the same state.
    let usage = PrefixUse::WarmStart { time: 1e-6 };
    let plan = Prefix { actions: r.values().to_vec(), dim, frozen: 0, horizon: 16, usage };
    let kept = run(&mut relative, Some(plan));
    let pairs = kept.values().iter().zip(r.values());
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn centered_resizing_matches_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_resize.safetensors"));
    for index in 0..7 {
        let image = case.get(&format!("{index}.image_u8"));
        let expected = case.get(&format!("{index}.centered"));
        let from = (image.shape[1], image.shape[0]);
        let to = (expected.shape[3], expected.shape[2]);
        let ours = resize_padded(to_planes(&image.bytes, from), to, Padding::Centered);
        let difference = max_difference(ours.values.values(), &expected.values);
        assert!(difference < 1e-5, "case {index} differs by {difference:e}");
    }
}

#[test]
fn the_midpoint_rule_follows_the_velocity_at_the_middle_of_each_step() {
    let Some(dir) = reference("pi0") else { return };
    let list = cases(&dir);
    let case = file(&dir, &list[0]);
    let observation = case.observation(0, list[0]["tasks"][0].as_str().expect("a text"));
    let checkpoint = Checkpoint::open(&dir, true).expect("the fixture is whole");
    let options =
        LoadOptions { solver: Some(Solver::Midpoint), denoise_steps: Some(2), ..options() };
    let mut policy = PiPolicy::load(&checkpoint, &options).expect("the fixture is whole");
    policy.set_noise(case.row("noise", 0, 0));
    let chunk = inference::run(&mut policy, &observation, &ChunkRequest::default());
    let ours = chunk.expect("it runs");
    // The same by hand: two steps of 1/2.
    let model = Pi::load(&checkpoint).expect("the fixture is whole");
    let mut preparer = Preparer::new(&checkpoint, 1).expect("the fixture is whole");
    let mut by_hand = || -> candle_core::Result<Matrix> {
        let inputs = preparer.prepare(&observation).expect("the observation fits");
        let images = inputs.pixels.iter().map(|p| Ok(Arc::new(model.encode_image(p)?.tokens)));
        let images: Vec<Arc<Matrix>> = images.collect::<candle_core::Result<_>>()?;
        let prefix = model.prefill(model.embed_prefix(&images, &inputs.tokens)?)?;
        let cache = model.prepare(prefix, &inputs.state)?;
        let mut x = Matrix::new(&case.row("noise", 0, 0), model.sample_shape())?;
        for t in [1.0, 0.5] {
            let velocity =
                |x: &Matrix, t| model.velocity(&cache, x, &[FlowTime::<NoiseAtOne>::of_level(t)]);
            let mut middle = x.clone();
            add_scaled(&mut middle, &velocity(&x, t)?, -0.25)?;
            add_scaled(&mut x, &velocity(&middle, t - 0.25)?, -0.5)?;
        }
        Ok(x)
    };
    let sample = by_hand().expect("the network runs");
    let expected = preparer.actions(&sample, &Default::default()).expect("all are finite");
    let worst = ours.values().iter().zip(&expected).map(|(a, b)| (a - b).abs());
    assert!(worst.fold(0.0, f64::max) < 1e-6);
}

#[test]
fn an_inference_is_made_of_bounded_steps() {
    let Some(dir) = reference("pi05") else { return };
    let list = cases(&dir);
    let case = file(&dir, &list[0]);
    let observation = case.observation(0, list[0]["tasks"][0].as_str().expect("a text"));
    let checkpoint = Checkpoint::open(&dir, true).expect("the fixture is whole");
    let mut policy = PiPolicy::load(&checkpoint, &options()).expect("the fixture is whole");
    policy.begin(&observation, &ChunkRequest::default()).expect("it fits");
    let mut stages = Vec::new();
    while let Progress::Step { stage, done, next_denoises, .. } = policy.advance().expect("it runs")
    {
        stages.push(stage);
        assert_eq!(done, stages.len());
        if next_denoises && stages.len() == 3 {
            assert_eq!(policy.set_denoise_steps(4), Ok(true));
        }
        if stages.len() == 5 {
            assert_eq!(policy.finish_early(), Ok(true));
        }
    }
    assert_eq!(stages, ["vision", "vision", "prefix", "denoise", "denoise"]);
    assert_eq!(policy.take_chunk().expect("it is done").report.denoise_steps, 2);
}
