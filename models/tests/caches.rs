//! The denoiser's cache in whole policies: exact where nothing is left out, reported where something is.

mod common;

use std::path::{Path, PathBuf};

use common::{Case, copy_folder, fixtures, reference};
use sinew_models::caches::{
    CacheOptions, Calibration, CalibrationError, CalibrationPlan, DENOISER, DenoiserCache, Form,
    MonitorConfig, Schedule, TunedMode, Tuning, calibrate,
};
use sinew_models::{LoadOptions, RandomSize, load_policy, random};
use sinew_runtime::{
    ActionChunk, CacheUse, CameraFrame, ChunkRequest, Image, MaskSchedule, Observation,
    ObservedImage, Opening, Policy, Prefix, PrefixUse, Stamp, Unused, inference,
};

const BUDGETS: [usize; 2] = [2, 99];

fn options(caches: CacheOptions) -> LoadOptions {
    LoadOptions { action_rate_hz: Some(10.0), missing_cameras: 1, caches, ..LoadOptions::default() }
}

fn load(path: &Path, denoiser: DenoiserCache) -> Box<dyn Policy> {
    let caches = CacheOptions { denoiser, check: Some(0.0), ..CacheOptions::default() };
    load_policy(path, &options(caches)).unwrap_or_else(|e| panic!("{e}"))
}

/// Checkpoints of every kind of denoiser, and an observation for each.
fn policies(scratch: &Path) -> Vec<(PathBuf, Observation)> {
    let smolvla = fixtures().join("smolvla_tiny");
    let task = "Pick up the red cube and place it in the bin.";
    let seen = Case::open(&smolvla.join("case.safetensors")).observation(0, task);
    let mut all = vec![(smolvla, seen)];
    for name in ["pi0", "pi05"] {
        let folder = scratch.join(name);
        random(name, RandomSize::Tiny, 3, &folder).unwrap_or_else(|e| panic!("{e}"));
        all.push((folder, noise_images(64, 48, &["camera1", "camera2"], 6)));
    }
    let folder = fixtures().join("diffusion_transformer/causal");
    let case = Case::open(&folder.join("case.safetensors"));
    all.push((folder, case.observation_at("raw.0.", "")));
    let folder = fixtures().join("reference/xvla");
    let case = Case::open(&folder.join("case_0.safetensors"));
    all.push((folder, case.observation(0, "push it")));
    if let Some(folder) = reference("diffusion_ddim") {
        let case = Case::open(&folder.join("case_basic.safetensors"));
        all.push((folder, case.observation_at("raw.0.1.", "")));
    }
    all
}

fn noise_images(width: usize, height: usize, cameras: &[&str], state: usize) -> Observation {
    let images = cameras.iter().enumerate().map(|(shift, camera)| {
        let data: Vec<u8> =
            (0..width * height * 3).map(|i| (i * 7 / 5 + shift * (i / 192)) as u8).collect();
        let image = Image::new(width, height, data.into()).expect("the shape fits");
        let frame = CameraFrame { stamp: Stamp(0), sequence: 1, image };
        ObservedImage { camera: (*camera).to_owned(), frame, age: Default::default() }
    });
    Observation {
        instant: Stamp(5),
        images: images.collect(),
        proprioception: (0..state).map(|i| 0.1 * i as f64 - 0.2).collect(),
        proprioception_age: Default::default(),
        instruction: "pick up the red cube".to_owned(),
    }
}

/// `seen`, and as many like it as a calibration needs.
fn observations(seen: &Observation) -> Vec<Observation> {
    (0..16)
        .map(|k| {
            let mut seen = seen.clone();
            seen.instant = Stamp(1_000_000_000 * (k + 1));
            seen.proprioception.iter_mut().for_each(|q| *q += 0.01 * k as f64);
            seen
        })
        .collect()
}

fn plan() -> CalibrationPlan {
    CalibrationPlan {
        forms: vec![Form::Held],
        budgets: BUDGETS.to_vec(),
        bubbled: 2,
        seeds: 1,
        max_error: 1.0,
        max_spread: 1.0,
        denoise_steps: None,
    }
}

fn calibrated(path: &Path, seen: &Observation, plan: &CalibrationPlan) -> Calibration {
    let tuning = Tuning::default();
    let mut policy = load(path, DenoiserCache::Tuned(tuning.clone()));
    calibrate(policy.as_mut(), &tuning, &observations(seen), plan, &mut |_| {})
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn chunk(policy: &mut dyn Policy, seen: &Observation, steps: Option<usize>) -> ActionChunk {
    let request = ChunkRequest { seed: 3, denoise_steps: steps, ..ChunkRequest::default() };
    inference::run(policy, seen, &request).unwrap_or_else(|e| panic!("{e}"))
}

fn denoiser(chunk: &ActionChunk) -> Option<CacheUse> {
    chunk.report.caches.iter().find(|c| c.0 == DENOISER).map(|c| c.1)
}

#[test]
fn every_denoiser_can_be_calibrated_and_a_full_budget_is_exact() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let all = policies(scratch.path());
    assert!(all.len() >= 5);
    for ((path, seen), form) in all.iter().flat_map(|p| Form::ALL.map(|form| (p, form))) {
        // One update: the shortest of these denoisings has three evaluations, of which the last computes, too.
        let plan = CalibrationPlan { forms: vec![form], budgets: vec![1, 99], ..plan() };
        let found = calibrated(path, seen, &plan);
        let [few, full] = &found.tried[..] else { panic!("two budgets") };
        assert_eq!((full.measured.computed, full.measured.max), (1.0, 0.0), "{}", path.display());
        assert!(few.measured.computed < 1.0 && few.measured.max > 0.0, "{few:?}");
        let schedule = found.schedule.expect("every error is allowed");
        assert_eq!((schedule.budget, schedule.samples), (1, 8));
        let file = scratch.path().join("cache.json");
        schedule.write(&file).expect("it can be written");

        let plain = chunk(load(path, DenoiserCache::Off).as_mut(), seen, None);
        assert_eq!(denoiser(&plain), None);
        let mut policy = load(path, DenoiserCache::File(file.clone()));
        let cached = chunk(policy.as_mut(), seen, None);
        let used = denoiser(&cached).expect("it has a cache");
        let asked = schedule.blocks.len() * schedule.evaluations();
        let reused = asked - (schedule.share() * asked as f64).round() as usize;
        assert_eq!((used.lookups, used.hits), (asked as u32, reused as u32));
        assert_eq!((used.opening, used.unused), (Opening::Open, None));
        assert_eq!(used.error, Some(schedule.measured.p99));
        assert!(used.saved.as_nanos() > 0 && used.bound.is_none());
        assert_ne!(cached.values(), plain.values());

        let short = chunk(policy.as_mut(), seen, Some(2));
        assert_eq!(denoiser(&short).map(|u| (u.hits, u.unused)), Some((0, Some(Unused::FewSteps))));
        let exact = chunk(load(path, DenoiserCache::Off).as_mut(), seen, Some(2));
        assert_eq!(short.values(), exact.values(), "the first and the last step compute all");
    }
}

#[test]
fn comparing_every_reuse_is_exact_and_gives_a_bound() {
    let folder = fixtures().join("smolvla_tiny");
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let (_, seen) = policies(scratch.path()).remove(0);
    let schedule = calibrated(&folder, &seen, &plan()).schedule.expect("every error is allowed");
    let tuning = Tuning::default();
    let mut policy = load(&folder, DenoiserCache::Tuned(tuning.clone()));
    let plain = chunk(policy.as_mut(), &seen, None);
    let compared = MonitorConfig { share: 1.0, exceeded: 0.5, ..MonitorConfig::default() };
    let config = MonitorConfig { limit: f64::MAX, ..compared };
    tuning.lock().mode = TunedMode::Reuse(schedule.into(), config);
    let checked = chunk(policy.as_mut(), &seen, None);
    assert_eq!(checked.values(), plain.values());
    let used = denoiser(&checked).expect("it has a cache");
    assert_eq!((used.hits, used.error), (0, None));
    assert!(used.bound.is_some_and(|b| b > 0.0 && b < 2.0), "{used:?}");
    assert!(!tuning.lock().errors.is_empty());
}

#[test]
fn guided_sampling_reuses_too() {
    // Guidance here needs no Jacobian of the network, so a branch that is not computed takes nothing from it.
    let folder = fixtures().join("smolvla_tiny");
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let (_, seen) = policies(scratch.path()).remove(0);
    let file = scratch.path().join("cache.json");
    let schedule = calibrated(&folder, &seen, &plan()).schedule.expect("every error is allowed");
    schedule.write(&file).expect("it can be written");
    let mut policy = load(&folder, DenoiserCache::File(file));
    let free = chunk(policy.as_mut(), &seen, None);
    let dim = free.dim();
    let usage = PrefixUse::Guided { schedule: MaskSchedule::Ones, max_weight: 10.0 };
    let actions: Vec<f64> = free.values()[..3 * dim].iter().map(|v| v + 0.1).collect();
    let prefix = Prefix { actions: actions.clone(), dim, frozen: 3, horizon: 3, usage };
    let request = ChunkRequest { seed: 3, prefix: Some(prefix), ..ChunkRequest::default() };
    let guided = inference::run(policy.as_mut(), &seen, &request).expect("it runs");
    assert!(denoiser(&guided).is_some_and(|used| used.hits > 0));
    let off = |chunk: &ActionChunk| {
        let pairs = chunk.values().iter().zip(&actions);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(off(&guided) < 0.6 * off(&free), "{} {}", off(&guided), off(&free));
}

#[test]
fn a_schedule_of_other_weights_is_refused() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let (path, seen) = policies(scratch.path()).remove(0);
    let schedule = calibrated(&path, &seen, &plan()).schedule.expect("every error is allowed");
    let file = scratch.path().join("cache.json");
    schedule.write(&file).expect("it can be written");
    let other = scratch.path().join("other");
    copy_folder(&path, &other);
    let weights = other.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("it was copied");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    std::fs::write(&weights, bytes).expect("there is room");
    let caches = CacheOptions { denoiser: DenoiserCache::File(file), ..CacheOptions::default() };
    let error = load_policy(&other, &options(caches)).err().expect("other weights").to_string();
    assert!(error.contains("another policy") && error.contains("sinew calibrate cache"), "{error}");
    let missing = DenoiserCache::File(scratch.path().join("none.json"));
    let caches = CacheOptions { denoiser: missing, ..CacheOptions::default() };
    let error = load_policy(&path, &options(caches)).err().expect("no file").to_string();
    assert!(error.contains("none.json"), "{error}");
    assert!(Schedule::read(Path::new("/dev/zero"), &[], "").is_err());
}

#[test]
fn too_few_observations_are_refused_and_no_budget_may_be_good_enough() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let (path, seen) = policies(scratch.path()).remove(0);
    let tuning = Tuning::default();
    let mut policy = load(&path, DenoiserCache::Tuned(tuning.clone()));
    let few = &observations(&seen)[..15];
    let error = calibrate(policy.as_mut(), &tuning, few, &plan(), &mut |_| {});
    assert!(matches!(error, Err(CalibrationError::TooFew { found: 15 })), "{error:?}");
    let strict = CalibrationPlan { budgets: vec![2], max_error: 0.0, ..plan() };
    assert_eq!(calibrated(&path, &seen, &strict).schedule, None);
    let unstable = CalibrationPlan { budgets: vec![2], max_spread: -1.0, ..plan() };
    let found = calibrated(&path, &seen, &unstable);
    assert_eq!((found.tried[0].measured.computed, found.tried[0].measured.max), (1.0, 0.0));
}
