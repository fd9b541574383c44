//! Early exits in whole policies: each is the network truncated there, and only as much of it is computed.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Case, copy_folder};
use safetensors::tensor::{Dtype, TensorView, serialize};
use sinew_models::caches::{CacheOptions, VisionConfig};
use sinew_models::exits::{
    EARLY_EXIT, EarlyExit, ExitCalibration, ExitCalibrationError, ExitCalibrationPlan, ExitPlan,
    ExitTuning, Gap, calibrate,
};
use sinew_models::heads::flow::{EulerSampler, gaussian_noise};
use sinew_models::kernels::tally;
use sinew_models::smolvla::{Preparer, SmolVla};
use sinew_models::{Checkpoint, LoadOptions, ModelError, RandomSize, load_policy, random};
use sinew_runtime::{
    ActionChunk, ActionKind, CacheUse, CameraFrame, ChunkRequest, Image, MaskSchedule, Observation,
    ObservedImage, Policy, PolicyError, Prefix, PrefixUse, Progress, Stamp, Unused, inference,
};

const DEPTH: usize = 4;
/// Flow steps at each exit, and of the whole network.
const STEPS: usize = 2;
const WHOLE_STEPS: usize = 4;
const SEED: u64 = 3;

/// A checkpoint of four layers, truncated to `depth` of them.
fn checkpoint(folder: &Path, depth: usize) {
    random("smolvla", RandomSize::Tiny, 3, folder).unwrap_or_else(|e| panic!("{e}"));
    let file = folder.join("model.safetensors");
    let all = Case::open(&file).0;
    let mut tensors = HashMap::new();
    for (name, tensor) in &all {
        tensors.insert(name.clone(), (tensor.shape.clone(), tensor.values.clone()));
        // Layers 2 and 3 are 0 and 1 with other values: every second one is of a kind.
        for (from, to) in [(".layers.0.", ".layers.2."), (".layers.1.", ".layers.3.")] {
            let stack = name.contains("text_model") || name.contains("lm_expert");
            if stack && name.contains(from) {
                let other = tensor.values.iter().enumerate();
                let other = other.map(|(i, v)| if i % 3 == 0 { -v } else { 0.9 * v }).collect();
                tensors.insert(name.replace(from, to), (tensor.shape.clone(), other));
            }
        }
    }
    // The last text layer's second half is not in a checkpoint of two layers.
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, v))| (name, shape, v.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), data).expect("the shape fits"))
    });
    std::fs::write(&file, serialize(views, None).expect("they fit")).expect("there is room");
    edit(&folder.join("config.json"), |config| config["num_vlm_layers"] = depth.into());
    edit(&folder.join("vlm/config.json"), |config| {
        config["text_config"]["num_hidden_layers"] = DEPTH.into();
    });
}

fn edit(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let text = std::fs::read_to_string(path).expect("it is there");
    let mut value = serde_json::from_str(&text).expect("it is JSON");
    change(&mut value);
    std::fs::write(path, value.to_string()).expect("there is room");
}

fn observation() -> Observation {
    let images = ["camera1", "camera2"].iter().enumerate().map(|(shift, camera)| {
        let data: Vec<u8> =
            (0..64 * 48 * 3).map(|i| (i * 7 / 5 + shift * (i / 192)) as u8).collect();
        let image = Image::new(64, 48, data.into()).expect("the shape fits");
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        ObservedImage { camera: (*camera).to_owned(), frame, age: Default::default() }
    });
    Observation {
        instant: Stamp(5),
        images: images.collect(),
        proprioception: (0..6).map(|i| 0.1 * f64::from(i) - 0.2).collect(),
        proprioception_age: Default::default(),
        instruction: "pick up the red cube".to_owned(),
    }
}

fn load(path: &Path, early_exit: EarlyExit) -> Result<Box<dyn Policy>, ModelError> {
    let caches = CacheOptions { early_exit, ..CacheOptions::default() };
    load_policy(path, &LoadOptions { caches, ..LoadOptions::default() })
}

/// The checkpoint, and its policy with exits after every layer and these thresholds.
struct Bench {
    _scratch: tempfile::TempDir,
    folder: PathBuf,
    file: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let (folder, file) = (scratch.path().join("whole"), scratch.path().join("exit.json"));
        checkpoint(&folder, DEPTH);
        Self { _scratch: scratch, folder, file }
    }

    fn policy(&self, thresholds: [f64; DEPTH - 2]) -> Box<dyn Policy> {
        let weights = Checkpoint::open(&self.folder, true).expect("it was made").weights_sha256();
        let layers = (1..=DEPTH).collect();
        ExitPlan::new(weights, layers, (STEPS, Gap::MeanAbs), thresholds.to_vec())
            .write(&self.file)
            .expect("there is room");
        load(&self.folder, EarlyExit::File(self.file.clone())).unwrap_or_else(|e| panic!("{e}"))
    }

    fn plain(&self) -> Box<dyn Policy> {
        load(&self.folder, EarlyExit::Off).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Thresholds that end every inference at exit `exit` (from 0 on; the first is never tested).
fn ending_at(exit: usize) -> [f64; DEPTH - 2] {
    std::array::from_fn(|k| if k + 1 == exit { 1e30 } else { 0.0 })
}

fn request() -> ChunkRequest {
    ChunkRequest { seed: SEED, ..ChunkRequest::default() }
}

fn chunk(policy: &mut dyn Policy, seen: &Observation, request: &ChunkRequest) -> ActionChunk {
    inference::run(policy, seen, request).unwrap_or_else(|e| panic!("{e}"))
}

fn early(chunk: &ActionChunk) -> CacheUse {
    let used = chunk.report.caches.iter().find(|c| c.0 == EARLY_EXIT);
    used.expect("it has exits").1
}

/// The actions at every exit, by networks that have no more layers than that.
fn truncated(seen: &Observation) -> Vec<Vec<f64>> {
    let mut noise: Option<Vec<f32>> = None;
    (1..=DEPTH)
        .map(|depth| {
            let scratch = tempfile::tempdir().expect("a temporary folder");
            checkpoint(scratch.path(), depth);
            let checkpoint = Checkpoint::open(scratch.path(), true).expect("it was made");
            let model = SmolVla::load(&checkpoint).unwrap_or_else(|e| panic!("{e}"));
            let mut preparer = Preparer::new(&checkpoint, 0).expect("it was made");
            let inputs = preparer.prepare(seen).expect("it fits");
            let images: Vec<_> = inputs
                .pixels
                .iter()
                .map(|pixels| Arc::new(model.encode_image(pixels).expect("it fits").tokens))
                .collect();
            let embeddings = model
                .embed_prefix(&images, inputs.dummies, &inputs.tokens, &inputs.state)
                .expect("it fits");
            let prefix = model.prefill(embeddings).expect("it fits");
            assert_eq!(prefix.layers.len(), depth);
            let cache = model.prepare(&prefix).expect("it fits");
            let (horizon, width) = model.sample_shape();
            let start = noise.take().unwrap_or_else(|| gaussian_noise(SEED, horizon * width));
            let mut sampler =
                EulerSampler::new(start, (horizon, width), STEPS).expect("the shape fits");
            while !sampler.is_done() {
                let velocity = model.velocity(&cache, sampler.sample(), &[sampler.flow_time()]);
                sampler.step(velocity.expect("it fits")).expect("it fits");
            }
            noise = Some(sampler.sample().values().to_vec());
            preparer.actions(sampler.sample()).expect("they are numbers")
        })
        .collect()
}

#[test]
fn an_exit_is_the_network_truncated_there() {
    let (bench, seen) = (Bench::new(), observation());
    let expected = truncated(&seen);
    let mut products = Vec::new();
    for exit in 1..DEPTH {
        let mut policy = bench.policy(ending_at(exit));
        assert_eq!(policy.spec().denoise_steps, DEPTH, "an exit counts as a denoise step");
        tally::take();
        let made = chunk(policy.as_mut(), &seen, &request());
        let done = tally::take();
        products.push((done.layers.products, done.attention.products));
        assert_eq!(made.values(), expected[exit], "exit {exit}");
        assert_eq!(made.report.denoise_steps, exit + 1);
        let used = early(&made);
        assert_eq!((used.lookups, used.hits), (DEPTH as u32, (DEPTH - exit - 1) as u32));
        assert_eq!((used.unused, used.error.is_some()), (None, exit + 1 < DEPTH));

        // The rest has never been computed, and is not when it is in no time.
        let whole = chunk(policy.as_mut(), &seen, &ChunkRequest { whole: true, ..request() });
        assert_eq!(whole.values(), expected[DEPTH - 1]);
        let again = chunk(policy.as_mut(), &seen, &request());
        assert_eq!(again.values(), expected[exit], "a deeper prefix of before changes nothing");
        assert_eq!(early(&again).saved.is_zero(), exit + 1 == DEPTH, "costs were seen by now");
    }
    let rising = |pair: &[(u64, u64)]| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1;
    assert!(products.windows(2).all(rising), "layers behind an exit cost nothing: {products:?}");
    let different = expected.windows(2).all(|w| w[0] != w[1]);
    assert!(different, "or nothing was compared");
}

#[test]
fn exact_chunks_are_those_of_a_policy_without_exits() {
    let (bench, seen) = (Bench::new(), observation());
    let exact = ChunkRequest { exact: true, ..request() };
    let plain = chunk(bench.plain().as_mut(), &seen, &request());
    let mut policy = bench.policy(ending_at(1));
    // On a prefix that goes through two layers only, as another sample of it, and afresh.
    let ended = chunk(policy.as_mut(), &seen, &request());
    assert_ne!(ended.values(), plain.values());
    let made = chunk(policy.as_mut(), &seen, &exact);
    assert_eq!(made.values(), plain.values());
    assert_eq!((made.report.denoise_steps, early(&made).hits), (WHOLE_STEPS, 0));
    assert_eq!(early(&made).unused, Some(Unused::Exact));
    for (request, expected) in [(request(), &ended), (exact.clone(), &plain)] {
        assert_eq!(policy.resample(&request), Ok(true));
        while policy.advance().expect("it runs") != Progress::Done {}
        assert_eq!(policy.take_chunk().expect("it is done").values(), expected.values());
    }
    policy.forget();
    assert_eq!(chunk(policy.as_mut(), &seen, &exact).values(), plain.values());
}

#[test]
fn an_exit_may_be_the_last_that_there_is_time_for() {
    let (bench, seen) = (Bench::new(), observation());
    let expected = truncated(&seen);
    let mut policy = bench.policy([0.0; 2]);
    let asked = ChunkRequest { denoise_steps: Some(2), ..request() };
    let two = chunk(policy.as_mut(), &seen, &asked);
    assert_eq!((two.values(), early(&two).hits), (&expected[1][..], 2));

    policy.begin(&seen, &request()).expect("it fits");
    assert_eq!(policy.finish_early(), Ok(false), "there is nothing yet");
    let mut exits = 0;
    while exits < 3 {
        let Ok(Progress::Step { denoised, done, total, .. }) = policy.advance() else {
            panic!("it runs, and is not done");
        };
        exits += usize::from(denoised);
        assert_eq!((done, total), (done.min(3 + exits), 3 + DEPTH), "two pictures and a prefix");
    }
    assert_eq!(policy.set_denoise_steps(2), Ok(false), "too late");
    assert_eq!(policy.finish_early(), Ok(true));
    assert_eq!(policy.take_chunk().expect("it was ended").values(), &expected[2][..]);

    policy.begin(&seen, &request()).expect("it fits");
    assert_eq!(policy.set_denoise_steps(3), Ok(true));
    while policy.advance().expect("it runs") != Progress::Done {}
    assert_eq!(policy.take_chunk().expect("it is done").values(), &expected[2][..]);
}

#[test]
fn planned_actions_guide_every_exit_and_guesses_are_refused() {
    let (bench, seen) = (Bench::new(), observation());
    let mut policy = bench.policy(ending_at(2));
    let free = chunk(policy.as_mut(), &seen, &request());
    let dim = free.dim();
    let actions: Vec<f64> = free.values()[..3 * dim].iter().map(|v| v + 0.1).collect();
    let planned = |usage| {
        let prefix = Prefix { actions: actions.clone(), dim, frozen: 3, horizon: 3, usage };
        ChunkRequest { prefix: Some(prefix), ..request() }
    };
    let usage = PrefixUse::Guided { schedule: MaskSchedule::Ones, max_weight: 10.0 };
    let guided = chunk(policy.as_mut(), &seen, &planned(usage));
    let off = |chunk: &ActionChunk| {
        let pairs = chunk.values().iter().zip(&actions);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(off(&guided) < 0.6 * off(&free), "{} {}", off(&guided), off(&free));
    assert!(!policy.spec().prefix.warm_start);
    let error = policy.begin(&seen, &planned(PrefixUse::WarmStart { time: 0.5 }));
    assert!(matches!(error, Err(PolicyError::Unsupported(_))), "{error:?}");
}

fn observations() -> Vec<Observation> {
    let moved = |k: u32| {
        let mut seen = observation();
        seen.instant = Stamp(1_000_000_000 * i64::from(k + 1));
        seen.proprioception.iter_mut().for_each(|q| *q += 0.01 * f64::from(k));
        seen
    };
    (0..16).map(moved).collect()
}

fn plan() -> ExitCalibrationPlan {
    let ratios = vec![0.2, 1.0];
    let (every, steps, gap) = (1, STEPS, Gap::MeanAbs);
    ExitCalibrationPlan { every, steps, gap, ratios, seeds: 2, max_error: 100.0 }
}

fn calibrated(
    folder: &Path,
    seen: &[Observation],
    plan: &ExitCalibrationPlan,
) -> Result<ExitCalibration, ExitCalibrationError> {
    let tuning = ExitTuning::default();
    let mut policy = load(folder, EarlyExit::Tuned(tuning.clone())).expect("it was made");
    calibrate(policy.as_mut(), &tuning, seen, plan, &mut |_| {})
}

#[test]
fn calibration_gives_the_thresholds_that_the_policy_then_follows() {
    let (bench, seen) = (Bench::new(), observations());
    let found = calibrated(&bench.folder, &seen, &plan()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((found.layers, found.tried.len()), (vec![1, 2, 3, 4], 3));
    let [never, steep, even] = &found.tried[..] else { panic!("two ratios") };
    assert_eq!((never.ratio, &never.taken), (None, &vec![0.0, 0.0, 0.0, 1.0]));
    assert_eq!(never.measured.computed, 1.0);
    assert!(steep.measured.computed < even.measured.computed, "{steep:?} {even:?}");
    let made = found.plan.expect("every error is allowed");
    assert_eq!((made.ratio, &made.thresholds), (0.2, &steep.thresholds));
    made.write(&bench.file).expect("there is room");
    let early_exit = EarlyExit::File(bench.file.clone());
    let mut policy = load(&bench.folder, early_exit).unwrap_or_else(|e| panic!("{e}"));
    let mut plain = bench.plain();
    let (mut counts, mut errors, mut size) = ([0.0; DEPTH], 0.0, 0.0);
    for (i, seen) in seen.iter().enumerate().filter(|(i, _)| i % 2 == 1) {
        for seed in 0..2 {
            let seed = (seed << 20) + i as u64;
            let request = ChunkRequest { seed, ..ChunkRequest::default() };
            let ended = chunk(policy.as_mut(), seen, &request);
            let exact = chunk(plain.as_mut(), seen, &request);
            counts[DEPTH - 1 - early(&ended).hits as usize] += 1.0 / 16.0;
            assert!(early(&ended).error.is_none_or(|e| e == made.measured.p99));
            let pairs = ended.values().iter().zip(exact.values());
            errors += pairs.map(|(a, b)| (a - b).abs()).sum::<f64>();
            size += exact.values().len() as f64;
        }
    }
    assert_eq!(counts.to_vec(), made.taken, "it ends where it was measured to");
    assert!((errors / size - made.measured.mean).abs() < 1e-9, "{} {made:?}", errors / size);
}

#[test]
fn what_costs_more_than_is_allowed_gets_no_thresholds() {
    let (bench, seen) = (Bench::new(), observations());
    let strict = ExitCalibrationPlan { max_error: 0.01, ..plan() };
    let found = calibrated(&bench.folder, &seen, &strict).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(found.plan, None, "a network that was not trained to end early");
    assert!(found.tried.iter().all(|t| t.measured.mean_relative > 0.01), "{:?}", found.tried);
    let fails = |seen: &[Observation], plan: ExitCalibrationPlan| {
        calibrated(&bench.folder, seen, &plan).expect_err("it cannot be done").to_string()
    };
    let shallow = fails(&seen, ExitCalibrationPlan { every: 2, ..plan() });
    assert!(shallow.contains("after every 2 of 4 layers are too few"), "{shallow}");
    assert!(fails(&seen[..15], plan()).contains("15 observations"));
    let ratio = fails(&seen, ExitCalibrationPlan { ratios: vec![0.0], ..plan() });
    assert!(ratio.contains("ratio of 0"), "{ratio}");
    let steps = fails(&seen, ExitCalibrationPlan { steps: 0, ..plan() });
    assert!(steps.contains("0 flow steps"), "{steps}");
}

#[test]
fn a_checkpoint_may_say_where_it_was_trained_to_end() {
    let (bench, seen) = (Bench::new(), observations());
    let config = bench.folder.join("config.json");
    edit(&config, |config| config["early_exit_layers"] = serde_json::json!([1, 3, 4]));
    let found = calibrated(&bench.folder, &seen, &plan()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(found.layers, [1, 3, 4]);
    for wrong in [serde_json::json!([1, 3]), serde_json::json!([3, 2, 4])] {
        edit(&config, |config| config["early_exit_layers"] = wrong);
        let error = load(&bench.folder, EarlyExit::Off).err().expect("it is refused").to_string();
        let (key, depth) = ("`early_exit_layers`", "the last of them 4");
        assert!(error.contains(key) && error.contains(depth), "{error}");
    }
}

#[test]
fn exits_are_refused_where_they_do_not_fit() {
    let bench = Bench::new();
    bench.policy([0.0; 2]);
    let early_exit = EarlyExit::File(bench.file.clone());
    let said = |path: &Path, caches: CacheOptions| {
        let caches = CacheOptions { early_exit: early_exit.clone(), ..caches };
        let options = LoadOptions { caches, ..LoadOptions::default() };
        load_policy(path, &options).err().expect("it is refused").to_string()
    };
    let vision = Some(VisionConfig { prefix: true, ..VisionConfig::default() });
    let warm_start = Some(vec![ActionKind::Position; 6]);
    let denoiser = sinew_models::caches::DenoiserCache::File("policy.cache.json".into());
    for (caches, key) in [
        (CacheOptions { vision, ..CacheOptions::default() }, "`cache_prefix`"),
        (CacheOptions { warm_start, ..CacheOptions::default() }, "`cache_warm_start`"),
        (CacheOptions { denoiser, ..CacheOptions::default() }, "`cache_denoiser`"),
    ] {
        let error = said(&bench.folder, caches);
        assert!(error.contains("with `early_exit`") && error.contains(key), "{error}");
    }
    let other = common::fixtures().join("reference/oft");
    assert!(said(&other, CacheOptions::default()).contains("leave `early_exit` out"));
    let changed = bench.folder.with_extension("changed");
    copy_folder(&bench.folder, &changed);
    let weights = changed.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("it was copied");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    std::fs::write(&weights, bytes).expect("there is room");
    let error = said(&changed, CacheOptions::default());
    assert!(error.contains("another policy") && error.contains("sinew calibrate exit"), "{error}");
}
