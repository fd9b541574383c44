//! Diffusion Policy against the repository's own fixtures (`tests/reference/diffusion.py`): the transformer, every
//! sampler setting, and the policy as the runtime calls it.

mod common;

use std::path::PathBuf;

use common::{Case, Worst, fixtures, max_difference};
use sinew_models::diffusion::{Condition, DiffusionConfig, DiffusionModel, DiffusionPolicy};
use sinew_models::heads::ddpm::{BetaSchedule, Kind, Prediction, Sampler, Schedule, Spacing};
use sinew_models::kernels::Matrix;
use sinew_models::{Checkpoint, LoadOptions, QuantType, load_policy, quantize};
use sinew_runtime::{
    ActionChunk, ChunkRequest, MaskSchedule, Observation, Policy, PolicyError, Prefix, PrefixUse,
    Progress, Stamp, inference,
};

fn options() -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), ..LoadOptions::default() }
}

const DIM: usize = 3;
/// Observations that the network sees.
const OBSERVED: usize = 3;

fn folder(name: &str) -> PathBuf {
    fixtures().join("diffusion_transformer").join(name)
}

fn case(name: &str) -> Case {
    Case::open(&folder(name).join("case.safetensors"))
}

fn policy(name: &str) -> DiffusionPolicy {
    let checkpoint = Checkpoint::open(&folder(name), true).unwrap_or_else(|e| panic!("{e}"));
    DiffusionPolicy::load(&checkpoint, &options()).unwrap_or_else(|e| panic!("{e}"))
}

/// The recorded observation `step`, at action `at` of a run.
fn observation(case: &Case, step: usize, at: i64) -> Observation {
    let seen = case.observation_at(&format!("raw.{step}."), "");
    Observation { instant: Stamp(at * 100_000_000), ..seen }
}

/// The recorded noise: where sampling starts, and what each step adds.
fn noise(case: &Case) -> Vec<Vec<f32>> {
    let start = case.get("noise").values.clone();
    let added = case.get("steps.scheduler_noise").values.chunks_exact(start.len());
    let added: Vec<_> = added.map(<[f32]>::to_vec).collect();
    std::iter::once(start).chain(added).collect()
}

fn numbers(chunk: &ActionChunk) -> Vec<f32> {
    chunk.values().iter().map(|v| *v as f32).collect()
}

#[test]
fn every_stage_of_the_transformer_matches_pytorch() {
    for name in ["causal", "encoded"] {
        let (case, mut worst) = (case(name), Worst::default());
        let checkpoint = Checkpoint::open(&folder(name), true).unwrap_or_else(|e| panic!("{e}"));
        let config = DiffusionConfig::of(&checkpoint).expect("it was opened");
        let model = DiffusionModel::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
        let theirs = case.get("condition");
        let rows = Matrix::new(&theirs.values, (theirs.shape[0], theirs.shape[1]));
        let condition = Condition::new(rows.expect("it fits its shape"));
        let timesteps = &case.get("steps.timestep").values;
        let (shape, added) = (model.sample_shape(), noise(&case));
        let start = Matrix::new(&added[0], shape).expect("the noise fits");
        let mut sampler = Sampler::new(config.schedule(), start, timesteps.len());
        let size = shape.0 * shape.1;
        while !sampler.is_done() {
            let step = sampler.done();
            assert_eq!(sampler.timestep() as f32, timesteps[step]);
            let recorded = |what: &str| &case.get(what).values[step * size..(step + 1) * size];
            let x = sampler.sample();
            worst.check("x_in", x.values(), recorded("steps.x_in"), 1e-4);
            let output = model.predict(x, sampler.timestep(), &condition).expect("it fits");
            worst.check("output", output.values(), recorded("steps.model_output"), 1e-4);
            let noise = || Matrix::new(&added[step + 1], shape);
            sampler.step(&output, noise).expect("it fits");
        }
        worst.check("horizon", sampler.sample().values(), &case.get("horizon").values, 5e-5);
        // The policy: raw observations in, from the second of the horizon on actions out.
        let mut policy = policy(name);
        policy.set_noise(noise(&case));
        for step in 0..OBSERVED - 1 {
            policy.remember(&observation(&case, step, step as i64)).expect("it fits");
        }
        let now = observation(&case, OBSERVED - 1, OBSERVED as i64 - 1);
        let chunk = inference::run(&mut policy, &now, &ChunkRequest::default()).expect("it runs");
        worst.check("actions", &numbers(&chunk), &case.get("actions").values, 5e-5);
        worst.print(name);
    }
}

#[test]
fn every_sampler_setting_matches_diffusers() {
    let case = Case::open(&fixtures().join("diffusion_transformer/samplers.safetensors"));
    let mut worst = Worst::default();
    for (kind, kind_name) in [(Kind::Ddpm, "DDPM"), (Kind::Ddim, "DDIM")] {
        for (prediction, name) in [
            (Prediction::Epsilon, "epsilon"),
            (Prediction::Sample, "sample"),
            (Prediction::VPrediction, "v_prediction"),
        ] {
            for (clip, steps) in [(0, 7), (0, 20), (1, 7), (1, 20)] {
                let schedule = Schedule::new(
                    kind,
                    BetaSchedule::SquaredcosCapV2,
                    20,
                    (1e-4, 0.02),
                    prediction,
                );
                let schedule = if clip == 1 { schedule.clipped(0.8) } else { schedule };
                let rows = |what: &str| {
                    let tensor = case.get(&format!("{kind_name}.{name}.{clip}.{steps}.{what}"));
                    tensor.values.chunks_exact(8).map(<[f32]>::to_vec).collect::<Vec<_>>()
                };
                let (x, outputs, noise) = (rows("x"), rows("output"), rows("noise"));
                let matrix = |values: &[f32]| Matrix::new(values, (4, 2));
                let mut sampler =
                    Sampler::new(schedule, matrix(&x[0]).expect("the noise fits"), steps);
                for step in 0..steps {
                    let output = matrix(&outputs[step]).expect("it fits");
                    sampler.step(&output, || matrix(&noise[step])).expect("it fits");
                    // Without clipping the first steps divide by a signal of 1e-3 and less.
                    let largest = x[step + 1].iter().fold(1f32, |m, v| m.max(v.abs()));
                    let ours: Vec<f32> =
                        sampler.sample().values().iter().map(|v| v / largest).collect();
                    let theirs: Vec<f32> = x[step + 1].iter().map(|v| v / largest).collect();
                    worst.check(kind_name, &ours, &theirs, 2e-5);
                }
                assert!(sampler.is_done());
            }
        }
    }
    worst.print("samplers, relative");
    let schedule = Schedule::new(
        Kind::Ddim,
        BetaSchedule::SquaredcosCapV2,
        100,
        (1e-4, 0.02),
        Prediction::Epsilon,
    );
    let trailing = schedule.spaced(Spacing::Trailing);
    for n in [1, 3, 7, 20, 100] {
        let ours: Vec<f32> = trailing.timesteps(n).iter().map(|t| *t as f32).collect();
        assert_eq!(ours, case.get(&format!("trailing.{n}")).values, "{n} steps");
    }
}

/// One inference at action `at` with `prefix`.
fn ask(
    policy: &mut dyn Policy,
    case: &Case,
    at: i64,
    prefix: Option<Prefix>,
) -> Result<ActionChunk, PolicyError> {
    let request = ChunkRequest { seed: 5, prefix, ..ChunkRequest::default() };
    inference::run(policy, &observation(case, 0, at), &request)
}

fn plan(actions: &[f32], frozen: usize, usage: PrefixUse) -> Option<Prefix> {
    let actions: Vec<f64> = actions.iter().map(|v| f64::from(*v)).collect();
    let horizon = actions.len() / DIM;
    Some(Prefix { actions, dim: DIM, frozen, horizon, usage })
}

#[test]
fn a_seed_gives_the_same_chunk_and_another_seed_another() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let first = ask(&mut policy, &case, 0, None).expect("it runs");
    let again = ask(&mut policy, &case, 100, None).expect("it runs");
    assert_eq!(first.values(), again.values(), "a run of its own each time");
    let request = ChunkRequest { seed: 6, ..ChunkRequest::default() };
    let other = inference::run(&mut policy, &observation(&case, 0, 200), &request);
    assert_ne!(first.values(), other.expect("it runs").values());
}

#[test]
fn the_history_counts_and_is_forgotten_after_a_gap() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let alone = ask(&mut policy, &case, 100, None).expect("it runs");
    // The same observation with others before it.
    policy.remember(&observation(&case, 1, 200)).expect("it fits");
    policy.remember(&observation(&case, 2, 201)).expect("it fits");
    let after = ask(&mut policy, &case, 202, None).expect("it runs");
    assert_ne!(alone.values(), after.values(), "what was seen before matters");
    let later = ask(&mut policy, &case, 300, None).expect("it runs");
    assert_eq!(alone.values(), later.values(), "a gap begins a new run");
    policy.remember(&observation(&case, 1, 400)).expect("it fits");
    let told = Observation { instruction: "other".into(), ..observation(&case, 0, 401) };
    let request = ChunkRequest { seed: 5, ..ChunkRequest::default() };
    let told = inference::run(&mut policy, &told, &request).expect("it runs");
    assert_eq!(alone.values(), told.values(), "another instruction begins a new run");
}

#[test]
fn a_known_observation_is_not_encoded_again() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let stages = |policy: &mut DiffusionPolicy| {
        let request = ChunkRequest { seed: 5, ..ChunkRequest::default() };
        policy.begin(&observation(&case, 0, 0), &request).expect("it fits");
        let mut vision = 0;
        while let Progress::Step { stage, .. } = policy.advance().expect("it runs") {
            vision += usize::from(stage == "vision");
        }
        (vision, policy.take_chunk().expect("it is done"))
    };
    let (first, a) = stages(&mut policy);
    let (second, b) = stages(&mut policy);
    assert_eq!((first, second), (2, 0), "two cameras");
    assert_eq!(a.values(), b.values());
    assert_eq!(b.report.caches[0].1.hits, 1);
}

const GUIDED: PrefixUse = PrefixUse::Guided { schedule: MaskSchedule::Linear, max_weight: 10.0 };

#[test]
fn frozen_actions_come_out_as_planned_and_the_rest_follows() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let plain = numbers(&ask(&mut policy, &case, 0, None).expect("it runs"));
    let wanted: Vec<f32> = plain.iter().map(|v| v + 0.2).collect();
    let chunk = ask(&mut policy, &case, 100, plan(&wanted, 2, GUIDED)).expect("it runs");
    let chunk = numbers(&chunk);
    let kept = max_difference(&chunk[..2 * DIM], &wanted[..2 * DIM]);
    assert!(kept < 1e-5, "frozen actions moved by {kept:e}");
    let last = 5 * DIM..6 * DIM;
    let pulled = max_difference(&chunk[last.clone()], &wanted[last]);
    assert!(pulled > kept, "what is free is pulled less");
    let none = PrefixUse::Guided { schedule: MaskSchedule::Zeros, max_weight: 10.0 };
    let free = ask(&mut policy, &case, 200, plan(&wanted, 0, none)).expect("it runs");
    assert_eq!(numbers(&free), plain, "without weight: plain sampling, bit for bit");
}

#[test]
fn a_warm_start_begins_at_its_guess() {
    let (case, mut policy) = (case("encoded"), policy("encoded"));
    let mut start = |at, value: f32, time| {
        let prefix = plan(&[value; 2 * DIM], 0, PrefixUse::WarmStart { time });
        let chunk = ask(&mut policy, &case, at, prefix).expect("it runs");
        (numbers(&chunk), chunk.report.denoise_steps)
    };
    // The weights are random, so nothing can be said of where it ends, but that the guess matters.
    let (low, steps) = start(100, -0.5, 0.4);
    let (high, _) = start(200, 0.5, 0.4);
    assert_eq!(steps, 8, "as many steps, on a shorter way");
    assert!(max_difference(&low, &high) > 1e-3, "the guess matters");
    assert_eq!(start(300, 0.5, 0.4).0, high);
    assert_eq!(start(400, 0.5, 0.02).1, 1, "one training step is left");
    let wrong = plan(&[0.0; DIM], 0, PrefixUse::WarmStart { time: 1.5 });
    assert!(matches!(ask(&mut policy, &case, 500, wrong), Err(PolicyError::Compute(_))));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let trained = plan(&[0.0; 6], 1, PrefixUse::Trained);
    let refused = ask(&mut policy, &case, 0, trained);
    assert!(matches!(refused, Err(PolicyError::Unsupported(_))), "{refused:?}");
    let narrow = Prefix { actions: vec![0.0; 4], dim: 2, frozen: 1, horizon: 2, usage: GUIDED };
    let refused = ask(&mut policy, &case, 0, Some(narrow));
    assert_eq!(refused, Err(PolicyError::PrefixWidth { expected: DIM, found: 2 }));
    let broken = plan(&[f32::NAN; DIM], 1, GUIDED);
    let refused = ask(&mut policy, &case, 0, broken);
    assert_eq!(refused, Err(PolicyError::NotFinite { what: "planned prefix" }));
    let request = ChunkRequest { denoise_steps: Some(51), ..ChunkRequest::default() };
    let refused = inference::run(&mut policy, &observation(&case, 0, 0), &request);
    assert!(matches!(refused, Err(PolicyError::Compute(_))), "50 training steps");
    let mut small = observation(&case, 0, 0);
    small.proprioception.pop();
    let refused = inference::run(&mut policy, &small, &ChunkRequest::default());
    assert_eq!(refused, Err(PolicyError::StateWidth { expected: 4, found: 3 }));
}

#[test]
fn an_inference_may_end_early_or_with_fewer_steps() {
    let (case, mut policy) = (case("causal"), policy("causal"));
    let request = ChunkRequest { seed: 5, ..ChunkRequest::default() };
    policy.begin(&observation(&case, 0, 0), &request).expect("it fits");
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
    assert_eq!((early.report.denoise_steps, early.horizon()), (4, 6));
    let whole = ask(&mut policy, &case, 100, None).expect("it runs");
    assert_eq!(whole.report.denoise_steps, 8);
    assert_ne!(early.values(), whole.values(), "an estimate, not the same");
}

#[test]
fn quantized_bundles_stay_near() {
    let case = case("causal");
    let whole = numbers(&ask(&mut policy("causal"), &case, 0, None).expect("it runs"));
    let scratch = tempfile::tempdir().expect("a folder");
    let mut errors = Vec::new();
    for (kind, tolerance) in [(QuantType::F16, 0.0), (QuantType::Q8_0, 0.2), (QuantType::Q4_0, 2.0)]
    {
        let out = scratch.path().join("bundle.gguf");
        quantize(&folder("causal"), kind, &out).unwrap_or_else(|e| panic!("{e}"));
        let stored = Checkpoint::open(&out, true).unwrap_or_else(|e| panic!("{e}"));
        let matrix = "transformer.decoder.layers.0.self_attn.in_proj_weight";
        let matrix = stored.store.find(matrix).expect("it is there").dtype.name();
        assert_eq!(matrix, format!("{kind:?}"), "attention is quantised");
        let mut policy = load_policy(&out, &options()).unwrap_or_else(|e| panic!("{e}"));
        let ours = numbers(&ask(policy.as_mut(), &case, 0, None).expect("it runs"));
        let error = max_difference(&ours, &whole);
        println!("{kind:?}: {error:.1e}");
        assert!(error <= tolerance, "{kind:?} is {error} off");
        errors.push(error);
    }
    // The fixture's weights are half precision. So narrow a network has large errors: 32 values a row are one block.
    assert!(errors[1] > 0.0 && errors[2] > errors[1], "{errors:?}");
}

/// The fixture's weights with `change` made to them, in a folder of their own.
fn changed(change: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(folder("encoded")).expect("it is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_name().expect("a file").to_owned();
        std::fs::copy(&path, scratch.path().join(name)).expect("it can be copied");
    }
    let bytes = std::fs::read(folder("encoded").join("model.safetensors")).expect("it is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("it is whole");
    let views = file.tensors().into_iter().filter_map(|(name, view)| {
        let shape = change(&name, view.shape().to_vec())?;
        let view = safetensors::tensor::TensorView::new(view.dtype(), shape, view.data());
        Some((name, view.expect("as many values")))
    });
    let out = scratch.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &out).expect("it can be written");
    scratch
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let bytes = std::fs::read(folder("encoded").join("model.safetensors")).expect("it is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("it is whole");
    let mut checked = 0;
    for (name, view) in file.tensors() {
        let missing = changed(|n, shape| (n != name).then_some(shape));
        let error = load_policy(missing.path(), &options()).err().map(|e| e.to_string());
        // A stage of the ResNet ends where its next block is missing: then the next stage does not fit.
        let open_end = name.contains("backbone.") && name.ends_with(".1.conv1.weight");
        match error {
            Some(error) => assert!(open_end || error.contains(&name), "{name}: {error}"),
            None => assert!(open_end, "{name} is not used"),
        }
        let flat = changed(|n, shape| {
            Some(match n == name {
                true if shape.len() == 1 => vec![1, shape[0]],
                true => vec![shape.iter().product()],
                false => shape,
            })
        });
        let error = load_policy(flat.path(), &options()).err().map(|e| e.to_string());
        let error = error.unwrap_or_else(|| panic!("{name} of shape {:?} flat", view.shape()));
        assert!(error.contains("tensor `"), "{name}: {error}");
        checked += 1;
    }
    assert!(checked > 100, "{checked} tensors");
}
