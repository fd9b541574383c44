//! ONNX policies: same numbers as the PyTorch that exported them, by both engines; contradictions are named.
//!
//! `tests/reference/onnx_policies.py` made the files. ONNX Runtime takes part where its library is found
//! (`ORT_DYLIB_PATH`); the built-in engine always does.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Case, fixtures, max_difference};
use sinew_models::families::FAMILIES;
use sinew_models::onnx::{
    Engine, OnnxOptions, OnnxPolicy, ResidualNet, library::Library, template,
};
use sinew_models::{Checkpoint, LoadOptions, ModelError, load_policy};
use sinew_runtime::control::ResidualInput;
use sinew_runtime::{
    ChunkRequest, JointVec, MaskSchedule, Policy, PolicyError, Prefix, PrefixUse, Stamp, inference,
};

const TOLERANCE: f32 = 1e-4;

fn folder(name: &str) -> PathBuf {
    fixtures().join("onnx").join(name)
}

fn options(engine: Engine) -> LoadOptions {
    LoadOptions { onnx: OnnxOptions { engine, ..OnnxOptions::default() }, ..LoadOptions::default() }
}

/// The engines of this computer.
fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::BuiltIn];
    match Library::find(None) {
        Library::At(path) => {
            println!("ONNX Runtime: {}", path.display());
            engines.push(Engine::OnnxRuntime);
        }
        absent => println!("skipped with ONNX Runtime: {}", absent.remedy()),
    }
    engines
}

fn load(folder: &Path, engine: Engine) -> OnnxPolicy {
    let manifest = folder.join("manifest.toml");
    OnnxPolicy::load(&manifest, &options(engine)).unwrap_or_else(|e| panic!("{e}"))
}

fn floats(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

fn case(folder: &Path) -> Case {
    Case::open(&folder.join("case.safetensors"))
}

#[test]
fn an_exported_act_gives_the_actions_of_lerobot() {
    let folder = folder("act");
    let case = case(&folder);
    for engine in engines() {
        let mut policy = load(&folder, engine);
        let spec = policy.spec().clone();
        assert_eq!(spec.cameras, ["front", "wrist"]);
        assert_eq!((spec.state_dim, spec.action_dim, spec.action_horizon), (5, 5, 8));
        assert_eq!(spec.action_rate_hz, Some(25.0));
        let observation = case.observation(0, "");
        let chunk = inference::run(&mut policy, &observation, &ChunkRequest::default());
        let chunk = chunk.unwrap_or_else(|e| panic!("{e}"));
        let difference = max_difference(&floats(chunk.values()), &case.get("actions.final").values);
        println!("act by {}: {difference:e}", policy.engine());
        assert!(difference <= TOLERANCE, "{engine:?} differs by {difference:e}");
        assert_eq!(chunk.dt, Duration::from_millis(40));
        let stages: Vec<_> = chunk.report.stages.iter().map(|s| s.stage).collect();
        assert_eq!(stages, ["preprocess", "network"]);
    }
}

/// The folder with changes to its manifest: (from, to).
fn changed(name: &str, changes: &[(&str, &str)]) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder");
    for entry in std::fs::read_dir(folder(name)).expect("the fixture is committed").flatten() {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("it can be copied");
    }
    let path = copy.path().join("manifest.toml");
    let mut text = std::fs::read_to_string(&path).expect("the fixture has one");
    for (from, to) in changes {
        assert!(text.contains(from), "no {from}");
        text = text.replace(from, to);
    }
    std::fs::write(&path, text).expect("it can be written");
    copy
}

#[test]
fn a_head_in_two_graphs_is_looped_in_both_flow_times() {
    let case = case(&folder("flow"));
    for engine in engines() {
        for noise_at in [1, 0] {
            let copy = changed("flow", &[("noise_at = 1", &format!("noise_at = {noise_at}"))]);
            let mut policy = load(copy.path(), engine);
            assert_eq!((policy.spec().action_horizon, policy.spec().denoise_steps), (6, 4));
            policy.set_noise(case.get("noise").values.clone());
            let request = ChunkRequest::default();
            let chunk = inference::run(&mut policy, &case.observation(0, ""), &request);
            let chunk = chunk.unwrap_or_else(|e| panic!("{e}"));
            let theirs = &case.get(&format!("actions.noise_at_{noise_at}")).values;
            let difference = max_difference(&floats(chunk.values()), theirs);
            println!("flow, noise at {noise_at}, by {}: {difference:e}", policy.engine());
            assert!(difference <= TOLERANCE, "{engine:?} differs by {difference:e}");
            assert_eq!(chunk.report.denoise_steps, 4);
        }
    }
}

#[test]
fn a_looped_head_is_an_anytime_task_and_can_be_guided() {
    let case = case(&folder("flow"));
    let mut policy = load(&folder("flow"), Engine::BuiltIn);
    let observation = case.observation(0, "");
    let free = ChunkRequest { seed: 5, ..ChunkRequest::default() };
    policy.begin(&observation, &free).expect("the observation fits");
    assert!(matches!(policy.finish_early(), Ok(false)), "nothing is known yet");
    assert!(policy.set_denoise_steps(3).expect("begun"));
    policy.advance().expect("the first graph");
    policy.advance().expect("a denoise step");
    assert!(!policy.set_denoise_steps(9).expect("begun"), "too late");
    assert!(policy.finish_early().expect("begun"));
    let early = policy.take_chunk().expect("it is done");
    assert_eq!(early.report.denoise_steps, 1);
    let again = |policy: &mut OnnxPolicy, request: &ChunkRequest| {
        inference::run(policy, &observation, request).unwrap_or_else(|e| panic!("{e}"))
    };
    let full = again(&mut policy, &free);
    assert_eq!(full.values(), again(&mut policy, &free).values(), "one seed, one chunk");
    let plan = vec![0.3; 2 * 3];
    let usage = PrefixUse::Guided { schedule: MaskSchedule::Exponential, max_weight: 10.0 };
    let prefix = Prefix { actions: plan.clone(), dim: 3, frozen: 2, horizon: 2, usage };
    let guided = again(&mut policy, &ChunkRequest { prefix: Some(prefix), ..free.clone() });
    let distance = |values: &[f64]| max_difference(&floats(&values[..6]), &floats(&plan));
    assert!(
        distance(guided.values()) < 0.2 * distance(full.values()),
        "guidance: {} against {}",
        distance(guided.values()),
        distance(full.values())
    );
}

#[test]
fn the_networks_own_state_goes_on_with_the_chunks_that_were_taken() {
    let folder = folder("recurrent");
    let case = case(&folder);
    let states: Vec<Vec<f64>> = case
        .get("states")
        .values
        .chunks(2)
        .map(|s| s.iter().map(|v| f64::from(*v)).collect())
        .collect();
    let theirs: Vec<&[f32]> = case.get("actions").values.chunks(2).collect();
    for engine in engines() {
        let mut policy = load(&folder, engine);
        let act = |policy: &mut OnnxPolicy, step: usize, at: Duration| {
            let mut observation = case.observation(0, "push the red cube");
            observation.instant = observation.instant + at;
            observation.proprioception = states[step].clone();
            // One that is dropped moves nothing.
            policy.begin(&observation, &ChunkRequest::default()).expect("it fits");
            policy.advance().expect("it runs");
            let chunk = inference::run(policy, &observation, &ChunkRequest::default());
            floats(chunk.unwrap_or_else(|e| panic!("{e}")).values())
        };
        let tick = Duration::from_millis(100);
        for (step, theirs) in theirs.iter().enumerate() {
            let difference = max_difference(&act(&mut policy, step, tick * step as u32), theirs);
            println!("recurrent step {step} by {}: {difference:e}", policy.engine());
            assert!(difference <= TOLERANCE, "{engine:?}, step {step}, differs by {difference:e}");
        }
        // After a pause it begins anew.
        let anew = act(&mut policy, 0, Duration::from_secs(2));
        assert!(max_difference(&anew, theirs[0]) <= TOLERANCE, "{engine:?}");
    }
}

#[test]
fn words_move_an_instructed_policy() {
    let case = case(&folder("recurrent"));
    let mut policy = load(&folder("recurrent"), Engine::BuiltIn);
    let mut at = Duration::ZERO;
    let mut act = |words: &str| {
        // So long after the last one that nothing of it is left.
        at += Duration::from_secs(9);
        let mut observation = case.observation(0, words);
        observation.instant = observation.instant + at;
        let chunk = inference::run(&mut policy, &observation, &ChunkRequest::default());
        floats(chunk.unwrap_or_else(|e| panic!("{e}")).values())
    };
    let red = act("push the red cube");
    assert_eq!(red, act("push the red cube"));
    assert!(max_difference(&red, &act("push the blue cube")) > 1e-3);
    assert_eq!(act("push the red cube push the red cube").len(), 2, "longer ones are cut");
}

#[test]
fn load_policy_takes_the_folder_and_the_manifest() {
    let built_in = options(Engine::BuiltIn);
    for path in [folder("recurrent"), folder("recurrent").join("manifest.toml")] {
        let policy = load_policy(&path, &built_in).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(policy.spec().action_names, ["a", "b"]);
    }
    let faster = LoadOptions { action_rate_hz: Some(50.0), ..built_in };
    let policy = load_policy(&folder("act"), &faster).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(policy.spec().dt(), Duration::from_millis(20));
}

#[test]
fn contradictions_between_manifest_and_model_are_named() {
    for (name, changes, words) in [
        (
            "act",
            vec![("\"observation.state\"", "\"state\"")],
            vec!["state.input", "`state`", "`observation.state` ("],
        ),
        (
            "act",
            vec![(
                "\"gripper\"]\nunits = \"rad\"\nnormalization = { mode = \"mean_std\", mean = [0.336690366",
                "\"gripper\", \"x\"]\nunits = \"rad\"\nnormalization = { mode = \"mean_std\", mean = [0.336690366",
            )],
            vec!["state.input", "[1, 5]", "[6]"],
        ),
        (
            "act",
            vec![("layout = \"nchw\"", "layout = \"nhwc\"")],
            vec!["images.front.input", "[1, 3, 48, 64]"],
        ),
        (
            "act",
            vec![("fit = \"stretch\"", "fit = \"stretch\"\nsize = [32, 32]")],
            vec!["images.front.input", "[3, 32, 32]"],
        ),
        (
            "act",
            vec![(
                "[images.wrist]\ninput = \"observation.images.wrist\"",
                "[images.wrist]\ninput = \"observation.images.front\"",
            )],
            vec!["images.wrist.input", "feeds already"],
        ),
        (
            "act",
            vec![("output = \"actions\"", "output = \"action\"")],
            vec!["action.output", "`actions` ("],
        ),
        (
            "act",
            vec![("output = \"actions\"", "output = \"actions\"\nhorizon = 9")],
            vec!["action.output", "[9, 5]"],
        ),
        (
            "act",
            vec![("output = \"actions\"", "output = \"actions\"\nwidth = 4")],
            vec!["action.width", "5 names"],
        ),
        ("act", vec![("action_rate = \"25 Hz\"", "")], vec!["action_rate", "30 Hz"]),
        (
            "act",
            vec![("action_rate = \"25 Hz\"", "action_rate = \"25\"")],
            vec!["action_rate", "100 Hz"],
        ),
        (
            "act",
            vec![("model = \"act.onnx\"", "model = \"other.onnx\"")],
            vec!["other.onnx", "not found"],
        ),
        (
            "act",
            vec![("model = \"act.onnx\"", "model = \"case.safetensors\"")],
            vec!["case.safetensors"],
        ),
        ("act", vec![("model = ", "modell = ")], vec!["modell", "template"]),
        ("recurrent", vec![("mask = \"mask\"\n", "")], vec!["feeds nothing", "`mask`"]),
        ("recurrent", vec![("pad_token = 63\n", "")], vec!["instruction.pad_token", "6 tokens"]),
        (
            "recurrent",
            vec![("range = \"0..255\"", "range = \"0..1\"")],
            vec!["images.eye", "0..255"],
        ),
        (
            "recurrent",
            vec![("pad_token = 63", "pad_token = 63\nlength = 7")],
            vec!["instruction.input", "[7]"],
        ),
        (
            "recurrent",
            vec![("output = \"h_next\"", "output = \"action\"")],
            vec!["recurrent.output", "[1, 2]"],
        ),
        ("recurrent", vec![("\"500 ms\"", "\"soon\"")], vec!["recurrent.reset_after", "soon"]),
        (
            "recurrent",
            vec![("tokenizer.json", "words.json")],
            vec!["words.json", "tokenizer.json there"],
        ),
        ("recurrent", vec![("[\"rad\", \"m\"]", "[\"rad\"]")], vec!["state.units", "1 entries"]),
        (
            "flow",
            vec![("width = 4", "width = 5")],
            vec!["flow.sample", "[?, 6, 4]", "sizes differ"],
        ),
        (
            "flow",
            vec![("velocity = \"velocity\"", "velocity = \"v\"")],
            vec!["flow.velocity", "`velocity`"],
        ),
        (
            "flow",
            vec![("features = \"features\"", "features = \"f\"")],
            vec!["flow.context.features", "`f`"],
        ),
        (
            "flow",
            vec![("context = { features = \"features\" }", "")],
            vec!["feeds nothing", "`features`"],
        ),
        ("flow", vec![("steps = 4", "steps = 0")], vec!["flow.steps", "1 to 1000"]),
        ("flow", vec![("noise_at = 1", "noise_at = 2")], vec!["flow.noise_at", "0 or 1"]),
        (
            "flow",
            vec![("[action]", "[action]\noutput = \"features\"")],
            vec!["action.output", "leave it out"],
        ),
    ] {
        let copy = changed(name, &changes);
        let Err(error) = load_policy(copy.path(), &options(Engine::BuiltIn)) else {
            panic!("{name} with {changes:?} was taken");
        };
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{changes:?}: no `{word}` in: {text}");
        }
    }
}

#[test]
fn a_template_is_a_manifest_that_loads() {
    for (name, file, completed) in [
        ("act", "act.onnx", vec![]),
        ("recurrent", "recurrent.onnx", vec![("pad_token = 0", "pad_token = 63")]),
    ] {
        let copy = changed(name, &[]);
        let onnx = OnnxOptions { engine: Engine::BuiltIn, ..OnnxOptions::default() };
        let text = template(&copy.path().join(file), &onnx).unwrap_or_else(|e| panic!("{e}"));
        let text = completed.iter().fold(text, |text, (from, to)| text.replace(from, to));
        let path = copy.path().join("manifest.toml");
        std::fs::write(&path, &text).expect("it can be written");
        let policy = OnnxPolicy::load(&path, &LoadOptions { onnx, ..LoadOptions::default() });
        let policy = policy.unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(policy.spec().cameras.len(), if name == "act" { 2 } else { 1 });
        assert_eq!(policy.spec().action_rate_hz, Some(30.0));
    }
}

#[test]
fn observations_that_do_not_fit_are_refused() {
    let case = case(&folder("recurrent"));
    let mut policy = load(&folder("recurrent"), Engine::BuiltIn);
    let good = case.observation(0, "push");
    let request = ChunkRequest::default();
    let mut bad = good.clone();
    bad.proprioception.push(0.0);
    assert_eq!(
        policy.begin(&bad, &request),
        Err(PolicyError::StateWidth { expected: 2, found: 3 })
    );
    bad = good.clone();
    bad.proprioception[1] = f64::NAN;
    assert_eq!(policy.begin(&bad, &request), Err(PolicyError::NotFinite { what: "state" }));
    bad = good.clone();
    bad.images.clear();
    assert_eq!(
        policy.begin(&bad, &request),
        Err(PolicyError::MissingCamera { camera: "eye".into() })
    );
    let usage = PrefixUse::Trained;
    let prefix = Prefix { actions: vec![0.0; 2], dim: 2, frozen: 1, horizon: 1, usage };
    let planned = ChunkRequest { prefix: Some(prefix), ..request.clone() };
    assert!(matches!(policy.begin(&good, &planned), Err(PolicyError::Unsupported(_))));
    assert!(matches!(policy.advance(), Err(PolicyError::OutOfTurn(_))));
    policy.begin(&good, &request).expect("it fits");
    assert!(matches!(policy.take_chunk(), Err(PolicyError::OutOfTurn(_))));
}

#[test]
fn a_library_that_is_named_must_be_one() {
    let copy = changed("recurrent", &[]);
    let text = copy.path().join("manifest.toml");
    for (library, engine) in [(text, Engine::Auto), (copy.path().to_owned(), Engine::OnnxRuntime)] {
        let onnx = OnnxOptions { engine, library: Some(library), threads: None };
        let loaded = load_policy(copy.path(), &LoadOptions { onnx, ..LoadOptions::default() });
        let Err(ModelError::Onnx { reason, .. }) = loaded else { panic!("{engine:?} was taken") };
        assert!(reason.contains("ONNX Runtime") && reason.contains("1.24"), "{reason}");
    }
}

/// Truncated and bent files end in an error or in a graph, never in a panic.
#[test]
fn damaged_files_are_refused_or_run() {
    let original =
        std::fs::read(folder("recurrent").join("recurrent.onnx")).expect("it is committed");
    let copy = changed("recurrent", &[]);
    let case = case(&folder("recurrent"));
    let file = copy.path().join("recurrent.onnx");
    let mut seed = 1u64;
    let mut next = |below: usize| {
        // Knuth's MMIX generator: enough to choose places.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let (mut refused, mut ran) = (0, 0);
    for round in 0..200 {
        let mut bytes = original.clone();
        if round % 4 == 0 {
            bytes.truncate(next(bytes.len()));
        } else {
            for _ in 0..=round % 3 {
                let at = next(bytes.len());
                bytes[at] ^= 1 << next(8);
            }
        }
        std::fs::write(&file, &bytes).expect("it can be written");
        match load_policy(copy.path(), &options(Engine::BuiltIn)) {
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
            Ok(mut policy) => {
                let observation = case.observation(0, "push the red cube");
                // Whatever comes out: numbers or an error.
                let _ = inference::run(policy.as_mut(), &observation, &ChunkRequest::default());
                ran += 1;
            }
        }
    }
    println!("{refused} refused, {ran} loaded");
    assert!(refused > 50 && refused + ran == 200, "{refused} refused");
}

#[test]
fn a_residual_network_gives_the_offsets_of_its_pytorch() {
    let folder = folder("residual");
    let case = case(&folder);
    let joints = |name: &str, row: usize| {
        let values = &case.get(name).values[row * 3..][..3];
        let values: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        JointVec::from_slice(&values).expect("three joints")
    };
    for engine in engines() {
        let onnx = OnnxOptions { engine, threads: Some(1), ..OnnxOptions::default() };
        let mut net = ResidualNet::load(&folder, &onnx).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((net.names().len(), net.rate_hz()), (3, 100.0));
        for row in 0..4 {
            let input = ResidualInput {
                stamp: Stamp(1),
                position: joints("position", row),
                velocity: joints("velocity", row),
                planned: joints("planned", row),
            };
            let ours = net.correct(&input).unwrap_or_else(|e| panic!("{e}"));
            let theirs = &case.get("correction").values[row * 3..][..3];
            let difference = max_difference(&floats(ours.as_slice()), theirs);
            println!("residual row {row} by {}: {difference:e}", net.engine());
            assert!(difference <= TOLERANCE, "{engine:?} differs by {difference:e}");
            let mut wild = input;
            wild.position[0] = f64::NAN;
            assert_eq!(net.correct(&wild), Err(PolicyError::NotFinite { what: "state" }));
        }
    }
}

#[test]
fn contradictions_of_a_residual_network_are_named() {
    for (from, to, words) in [
        ("[velocity]\ninput = \"velocity\"\n", "", "`velocity`"),
        ("names = [\"a\", \"b\", \"c\"]", "names = [\"a\"]", "position.input"),
        ("rate = \"100 Hz\"", "rate = \"100\"", "`rate`"),
        ("deviation = [2.0, 2.0, 2.0]", "deviation = [2.0]", "correction.deviation"),
        ("output = \"correction\"", "output = \"delta\"", "correction.output"),
        ("scale = 0.1", "", "scale"),
    ] {
        let copy = tempfile::tempdir().expect("a temporary folder");
        let (source, target) = (folder("residual"), copy.path());
        std::fs::copy(source.join("residual.onnx"), target.join("residual.onnx")).expect("copied");
        let text = std::fs::read_to_string(source.join("residual.toml")).expect("committed");
        assert!(text.contains(from), "no {from}");
        std::fs::write(target.join("residual.toml"), text.replace(from, to)).expect("written");
        let onnx = OnnxOptions { engine: Engine::BuiltIn, ..OnnxOptions::default() };
        let error = ResidualNet::load(target, &onnx).err().expect(words).to_string();
        assert!(error.contains(words), "{from}: {error}");
    }
}

/// The exported file against our own implementation of the same checkpoint.
#[test]
fn the_exported_act_and_the_native_one_agree() {
    let folder = folder("act");
    if !FAMILIES.iter().any(|family| family.name == "act") {
        println!("skipped: this build has no native ACT");
        return;
    }
    let checkpoint = Checkpoint::open(&folder, true).unwrap_or_else(|e| panic!("{e}"));
    let options = LoadOptions::default();
    let native = (checkpoint.family.load)(&checkpoint, &options);
    let mut native = native.unwrap_or_else(|e| panic!("{e}"));
    let observation = case(&folder).observation(0, "");
    let request = ChunkRequest::default();
    let ours = inference::run(native.as_mut(), &observation, &request);
    let ours = floats(ours.unwrap_or_else(|e| panic!("{e}")).values());
    for engine in engines() {
        let mut policy = load(&folder, engine);
        let theirs = inference::run(&mut policy, &observation, &request);
        let theirs = floats(theirs.unwrap_or_else(|e| panic!("{e}")).values());
        let difference = max_difference(&ours, &theirs);
        println!("act by {} against the native one: {difference:e}", policy.engine());
        assert!(difference <= TOLERANCE, "{engine:?} differs by {difference:e}");
    }
}
