use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use sinew_runtime::{
    ActionChunk, ActionKind, CameraFrame, ChunkRequest, Image, Observation, ObservedImage, Policy,
    PolicyError, PolicySpec, Prefix, PrefixSupport, PrefixUse, Progress, Stamp,
};

use super::*;

const DT: Duration = Duration::from_millis(100);
const HORIZON: usize = 4;
const STEPS: usize = 3;

/// A head whose chunk is a straight line; its start and slope follow from the seed alone. Of a warm start it makes
/// the prefix plus the flow time.
struct Sampler {
    spec: PolicySpec,
    run: Option<(ChunkRequest, Stamp, usize)>,
    /// What it was asked, and whether it sampled again.
    asked: std::sync::Arc<std::sync::Mutex<Vec<(ChunkRequest, bool)>>>,
    resamples: bool,
}

fn line(seed: u64) -> Vec<f64> {
    let (start, slope) = ((seed % 17) as f64 * 0.1, (seed % 5) as f64 * 0.05);
    (0..HORIZON).flat_map(|k| [start + slope * k as f64, 0.5]).collect()
}

impl Sampler {
    fn new(resamples: bool) -> Self {
        let spec = PolicySpec {
            cameras: vec!["front".into()],
            optional_cameras: 0,
            state_dim: 2,
            action_dim: 2,
            action_names: Vec::new(),
            action_horizon: HORIZON,
            action_rate_hz: Some(10.0),
            denoise_steps: STEPS,
            prefix: PrefixSupport { guided: true, trained: None, warm_start: true },
        };
        Self { spec, run: None, asked: Default::default(), resamples }
    }
}

impl Policy for Sampler {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, request: &ChunkRequest) -> Result<(), PolicyError> {
        self.run = Some((request.clone(), seen.instant, 0));
        self.asked.lock().expect("nobody died").push((request.clone(), false));
        Ok(())
    }

    fn resample(&mut self, request: &ChunkRequest) -> Result<bool, PolicyError> {
        if let (true, Some(run)) = (self.resamples, &mut self.run) {
            (run.0, run.2) = (request.clone(), 0);
            self.asked.lock().expect("nobody died").push((request.clone(), true));
            return Ok(true);
        }
        Ok(false)
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let (request, _, done) = self.run.as_mut().ok_or(PolicyError::OutOfTurn("begin"))?;
        *done += 1;
        let total = request.denoise_steps.unwrap_or(STEPS);
        if *done >= total {
            return Ok(Progress::Done);
        }
        let (stage, done) = ("denoise", *done);
        Ok(Progress::Step { stage, done, total, denoised: true, next_denoises: true })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let (request, instant, done) = self.run.as_ref().ok_or(PolicyError::OutOfTurn("begin"))?;
        let values = match &request.prefix {
            Some(Prefix { actions, usage: PrefixUse::WarmStart { time }, .. }) => {
                actions.iter().map(|a| a + time).collect()
            }
            _ => line(request.seed),
        };
        let mut chunk = ActionChunk::new(request.id, *instant, DT, 2, values)
            .map_err(|e| PolicyError::Compute(e.to_string()))?;
        chunk.report.denoise_steps = *done;
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let Some(run) = self.run.as_mut().filter(|r| r.2 == 0) else { return Ok(false) };
        run.0.denoise_steps = Some(steps);
        Ok(true)
    }
}

fn seen(ms: i64, grey: u8, task: &str) -> Observation {
    let data: Vec<u8> = (0..16 * 16 * 3).map(|i| grey.wrapping_add((i % 97) as u8)).collect();
    let image = Image::new(16, 16, data.into()).expect("its size");
    let stamp = Stamp(ms * 1_000_000);
    let frame = CameraFrame { stamp, sequence: 1, image };
    Observation {
        instant: stamp,
        images: vec![ObservedImage { camera: "front".into(), frame, age: Duration::ZERO }],
        proprioception: vec![0.1, 0.2],
        proprioception_age: Duration::ZERO,
        instruction: task.into(),
    }
}

fn request(seed: u64) -> ChunkRequest {
    ChunkRequest { id: 1, seed, ..ChunkRequest::default() }
}

/// Likes the chunk that starts nearest to a value; counts those it was shown.
struct Near {
    value: f64,
    shown: std::sync::Arc<std::sync::Mutex<Vec<f64>>>,
}

impl Verifier for Near {
    fn name(&self) -> &'static str {
        "near"
    }

    fn score(&mut self, candidate: &ActionChunk, _: &Context<'_>) -> Result<f64, PolicyError> {
        self.shown.lock().expect("nobody died").push(candidate.values()[0]);
        Ok((candidate.values()[0] - self.value).abs())
    }
}

fn near(value: f64) -> (Box<Near>, std::sync::Arc<std::sync::Mutex<Vec<f64>>>) {
    let shown = std::sync::Arc::default();
    (Box::new(Near { value, shown: std::sync::Arc::clone(&shown) }), shown)
}

fn run(policy: &mut dyn Policy, seen: &Observation, request: &ChunkRequest) -> ActionChunk {
    sinew_runtime::inference::run(policy, seen, request).expect("a chunk")
}

#[test]
fn the_verifiers_choice_is_given_and_every_candidate_is_shown() {
    for resamples in [false, true] {
        let inner = Sampler::new(resamples);
        let asked = inner.asked.clone();
        let (verifier, shown) = near(0.8);
        let mut policy = BestOf::new(Box::new(inner), verifier, 5, 0).expect("five candidates");
        assert_eq!(policy.spec().denoise_steps, 5 * STEPS);
        let chunk = run(&mut policy, &seen(0, 0, ""), &request(7));
        let shown = shown.lock().expect("nobody died").clone();
        assert_eq!(shown.len(), 5);
        let best = shown.iter().copied().min_by(|a, b| (a - 0.8).abs().total_cmp(&(b - 0.8).abs()));
        assert_eq!(Some(chunk.values()[0]), best);
        assert!(shown.iter().any(|v| *v != shown[0]), "they differ: {shown:?}");
        let asked = asked.lock().expect("nobody died").clone();
        assert_eq!(asked[0].0.seed, 7, "the first one's noise is the request's");
        assert_eq!(asked.iter().filter(|a| a.1).count(), if resamples { 4 } else { 0 });
        assert_eq!(chunk.report.denoise_steps, 5 * STEPS);
        let (name, used) = chunk.report.caches[0];
        assert_eq!((name, used.lookups, used.hits), ("candidates", 5, 5));
        // The same request gives the same chunk.
        assert_eq!(run(&mut policy, &seen(0, 0, ""), &request(7)).values(), chunk.values());
    }
}

#[test]
fn one_candidate_is_the_plain_policy() {
    let (verifier, _) = near(0.0);
    let mut policy = BestOf::new(Box::new(Sampler::new(true)), verifier, 1, 0).expect("one");
    assert_eq!(run(&mut policy, &seen(0, 0, ""), &request(9)).values(), line(9));
    let (verifier, _) = near(0.0);
    assert!(BestOf::new(Box::new(Sampler::new(true)), verifier, 0, 0).is_err());
}

#[test]
fn short_of_time_there_are_fewer_candidates() {
    let make = |count| {
        let (verifier, shown) = near(0.8);
        let policy = BestOf::new(Box::new(Sampler::new(true)), verifier, count, 0).expect("some");
        (policy, shown)
    };
    // The planner asks for fewer steps in all.
    for (steps, candidates) in [(15, 5), (11, 3), (3, 1), (2, 1)] {
        let (mut policy, shown) = make(5);
        let asked = ChunkRequest { denoise_steps: Some(steps), ..request(7) };
        let chunk = run(&mut policy, &seen(0, 0, ""), &asked);
        assert_eq!(shown.lock().expect("nobody died").len(), candidates);
        assert_eq!(chunk.report.denoise_steps, candidates * steps.min(STEPS));
    }
    // It plans again after the prefix.
    let (mut policy, shown) = make(5);
    policy.begin(&seen(0, 0, ""), &request(7)).expect("an observation");
    assert_eq!(policy.set_denoise_steps(7), Ok(true));
    while policy.advance().expect("a step") != Progress::Done {}
    assert_eq!(shown.lock().expect("nobody died").len(), 2);
    assert!(policy.take_chunk().is_ok() && policy.take_chunk().is_err());
    // It ends early with the best so far; not before there is one.
    let (mut policy, shown) = make(5);
    policy.begin(&seen(0, 0, ""), &request(7)).expect("an observation");
    assert_eq!(policy.finish_early(), Ok(false));
    for _ in 0..STEPS + 1 {
        assert_ne!(policy.advance().expect("a step"), Progress::Done);
    }
    assert_eq!(policy.finish_early(), Ok(true));
    assert_eq!(policy.take_chunk().map(|c| c.values().to_vec()), Ok(line(7)));
    assert_eq!(shown.lock().expect("nobody died").len(), 1);
}

fn chunk_at(ms: i64, values: Vec<f64>) -> ActionChunk {
    ActionChunk::new(1, Stamp(ms * 1_000_000), DT, 1, values).expect("one value an action")
}

#[test]
fn coherence_goes_on_with_what_was_decided() {
    let observation = seen(200, 0, "");
    let previous = chunk_at(0, vec![0.0, 1.0, 2.0, 3.0]);
    let (asked, observed) = (request(1), VecDeque::new());
    let mut context = Context {
        observation: &observation,
        request: &asked,
        previous: Some(&previous),
        observed: &observed,
    };
    let score = |chunk: Vec<f64>, context: &Context<'_>| {
        Coherence::default().score(&chunk_at(200, chunk), context).expect("numbers")
    };
    // It was to be at 2 and 3 then; what comes after is free.
    assert!(score(vec![2.0, 3.0, 9.0, -9.0], &context).abs() < 1e-9);
    assert!((score(vec![3.0, 3.0, 0.0, 0.0], &context) - 2.0 / 3.0).abs() < 1e-9);
    assert!((score(vec![2.0, 4.0, 0.0, 0.0], &context) - 1.0 / 3.0).abs() < 1e-9);
    // The scheduler's plan comes before the last choice.
    let planned = Prefix {
        actions: vec![5.0, 6.0],
        dim: 1,
        frozen: 1,
        horizon: 2,
        usage: PrefixUse::Trained,
    };
    let asked = ChunkRequest { prefix: Some(planned), ..request(1) };
    context.request = &asked;
    assert!(score(vec![5.0, 6.0, 0.0, 0.0], &context).abs() < 1e-9);
    let nothing = Context { previous: None, request: &request(1), ..context };
    assert_eq!(score(vec![7.0; 4], &nothing), 0.0);
}

proptest! {
    #[test]
    fn the_true_past_wins_whatever_the_future_says(
        past in prop::collection::vec(-1.0..1.0f64, 3), wrong in 0.01..1.0f64, at in 0..3usize,
        futures in prop::collection::vec(-5.0..5.0f64, 4)
    ) {
        // Observations every 50 ms, actions every 100: states are found between.
        let state = |ms: i64| {
            let x = ms as f64 / 100.0;
            let (k, share) = (x.floor() as usize, x.fract());
            let end = past.get(k + 1).copied().unwrap_or(past[2]);
            past[k] + (end - past[k]) * share
        };
        let observed: VecDeque<(Stamp, Vec<f64>)> =
            (0..=6).map(|k| (Stamp(k * 50_000_000), vec![state((k * 50).min(200))])).collect();
        let observation = seen(300, 0, "");
        let asked = request(1);
        let context = Context { observation: &observation, request: &asked, previous: None, observed: &observed };
        let mut verifier = PastActions { rows: 3 };
        let truth = [past.clone(), futures[..2].to_vec()].concat();
        let mut lie = [past.clone(), futures[2..].to_vec()].concat();
        lie[at] += wrong;
        let truth = verifier.score(&chunk_at(300, truth), &context).expect("numbers");
        let lie = verifier.score(&chunk_at(300, lie), &context).expect("numbers");
        prop_assert!(truth < 1e-9 && (lie - wrong).abs() < 1e-9, "{truth} {lie}");
    }
}

#[test]
fn past_actions_are_cut_off_the_chunk() {
    let verifier = Box::new(PastActions { rows: 1 });
    let mut policy = BestOf::new(Box::new(Sampler::new(true)), verifier, 2, 1).expect("one past");
    assert_eq!(policy.spec().action_horizon, HORIZON - 1);
    let chunk = run(&mut policy, &seen(0, 0, ""), &request(9));
    assert_eq!(chunk.values(), &line(9)[2..]);
    let verifier = Box::new(PastActions { rows: HORIZON });
    assert!(BestOf::new(Box::new(Sampler::new(true)), verifier, 2, HORIZON).is_err());
}

struct Broken;

impl Verifier for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn score(&mut self, _: &ActionChunk, _: &Context<'_>) -> Result<f64, PolicyError> {
        Ok(f64::NAN)
    }
}

#[test]
fn a_verifier_without_a_number_chooses_nothing() {
    let mut policy =
        BestOf::new(Box::new(Sampler::new(true)), Box::new(Broken), 2, 0).expect("two");
    let made = sinew_runtime::inference::run(&mut policy, &seen(0, 0, ""), &request(1));
    assert_eq!(made, Err(PolicyError::NotFinite { what: "verifier's score" }));
}

fn encoder() -> Glance {
    Glance::new(vec!["front".into()], 2)
}

fn shape() -> Shape {
    Shape {
        policy: "abc".into(),
        encoder: encoder().name(),
        features: encoder().width(),
        horizon: HORIZON,
        dim: 2,
    }
}

fn record(grey: u8, task: &str, value: f32) -> Record {
    let features = encoder().encode(&seen(0, grey, task)).expect("its camera is there");
    let chunk = (0..HORIZON).flat_map(|_| [value, if value > 0.35 { 1.0 } else { 0.0 }]).collect();
    Record { task: task.into(), features, chunk }
}

fn recall(memory: Memory, episode: Option<Episode>) -> Recall {
    let kinds = vec![ActionKind::Position, ActionKind::Gripper];
    let inner = Box::new(Sampler::new(true));
    Recall::new(inner, memory, Box::new(encoder()), kinds, RecallConfig::default(), episode)
        .expect("it fits")
}

#[test]
fn an_empty_memory_changes_nothing_and_a_like_situation_is_where_the_flow_starts() {
    let used = |chunk: &ActionChunk| {
        let (name, used) = chunk.report.caches[0];
        assert_eq!(name, "success_memory");
        (used.lookups, used.hits)
    };
    let mut policy = recall(Memory::new(shape(), 10), None);
    let plain = run(&mut policy, &seen(0, 40, "put"), &request(3));
    assert_eq!((plain.values(), used(&plain)), (&line(3)[..], (0, 0)));

    let mut memory = Memory::new(shape(), 10);
    assert!(memory.push(record(40, "put", 0.4)) && memory.push(record(40, "put", 0.42)));
    assert!(memory.push(record(40, "put", 3.0)), "one that contradicts them");
    assert!(memory.push(record(40, "take", -1.0)), "another task");
    let mut policy = recall(memory, None);
    let chunk = run(&mut policy, &seen(0, 40, "put"), &request(3));
    assert_eq!(used(&chunk), (3, 2));
    // Same picture: as sure as two chunks that differ a little can be.
    let time = RecallConfig::default().time(1.0, 0.01);
    assert!((chunk.values()[0] - 0.41 - time).abs() < 0.01, "{:?} {time}", chunk.values());
    // The gripper's values are not averaged with anything, only displaced by the flow time here.
    assert!((chunk.values()[1] - 1.0 - time).abs() < 0.01);
    let fewer = (STEPS as f64 * time).ceil() as usize;
    assert_eq!(chunk.report.denoise_steps, fewer);
    let other = run(&mut policy, &seen(0, 40, "stack"), &request(3));
    assert_eq!(used(&other), (0, 0), "no success of this task is known");
    // The scheduler's plan comes first.
    let prefix = Prefix {
        actions: vec![0.0; 8],
        dim: 2,
        frozen: 0,
        horizon: 4,
        usage: PrefixUse::WarmStart { time: 0.25 },
    };
    let asked = ChunkRequest { prefix: Some(prefix), ..request(3) };
    let planned = run(&mut policy, &seen(0, 40, "put"), &asked);
    assert_eq!((planned.values()[0], used(&planned)), (0.25, (0, 0)));
}

#[test]
fn the_surer_the_nearer() {
    let config = RecallConfig::default();
    let times =
        [(1.0, 0.0), (0.995, 0.0), (0.98, 0.0), (0.98, 0.3)].map(|(s, d)| config.time(s, d));
    assert!(times.is_sorted_by(|a, b| a < b), "{times:?}");
    assert!(times.iter().all(|t| (config.times.0..=config.times.1).contains(t)));
}

#[test]
fn only_successes_are_kept_and_never_more_than_there_is_room_for() {
    let episode = Episode::new(Memory::new(shape(), 3));
    let mut policy = recall(Memory::new(shape(), 3), Some(episode.clone()));
    let mut play = |times| {
        for k in 0..times {
            run(&mut policy, &seen(k, 40, "put"), &request(3));
        }
    };
    play(2);
    assert_eq!((episode.end(false), episode.kept()), (0, 0));
    play(2);
    assert_eq!((episode.end(true), episode.kept()), (2, 2));
    play(2);
    assert_eq!((episode.end(true), episode.kept()), (2, 3));
    assert_eq!(episode.end(true), 0, "nothing was played since");
}

#[test]
fn a_memory_comes_back_from_its_file_and_a_damaged_one_does_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("memory.bin");
    let empty = Memory::open(&path, shape(), 5).expect("none is an empty one");
    assert_eq!(empty.records().len(), 0);
    let mut memory = Memory::new(shape(), 5);
    for k in 0..3 {
        assert!(memory.push(record(40 + k, if k == 1 { "take" } else { "put" }, 0.1)));
    }
    memory.save(&path).expect("it can be written");
    assert_eq!(Memory::open(&path, shape(), 5).expect("its own file"), memory);
    let two = Memory::open(&path, shape(), 2).expect("its own file");
    assert_eq!(two.records().map(|r| r.task.as_str()).collect::<Vec<_>>(), ["take", "put"]);

    let foreign = Shape { policy: "def".into(), ..shape() };
    let error = Memory::open(&path, foreign, 5).expect_err("another policy's").to_string();
    assert!(error.contains("`abc`") && error.contains("`def`"), "{error}");
    let bytes = std::fs::read(&path).expect("it is there");
    for at in (0..bytes.len()).step_by(bytes.len() / 150) {
        let mut torn = bytes.clone();
        torn[at] ^= 1 << (at % 8);
        std::fs::write(&path, &torn).expect("it can be written");
        assert!(matches!(Memory::open(&path, shape(), 5), Err(MemoryError::Format { .. })), "{at}");
        std::fs::write(&path, &bytes[..at]).expect("it can be written");
        assert!(matches!(Memory::open(&path, shape(), 5), Err(MemoryError::Format { .. })), "{at}");
    }
}

#[test]
fn hostile_headers_are_refused_though_their_sum_is_right() {
    use sha2::{Digest, Sha256};
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("memory.bin");
    let with = |version: u32, length: u32, header: &str, values: &[u8]| {
        let mut bytes = b"SINEWMEM".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(values);
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        std::fs::write(&path, bytes).expect("it can be written");
        Memory::open(&path, shape(), 5).map(|_| ()).expect_err("it is hostile").to_string()
    };
    let shape_text = |features: u64| {
        format!(
            r#"{{"shape":{{"policy":"abc","encoder":"{}","features":{features},"horizon":4,"dim":2}},"tasks":["a"],"records":[0]}}"#,
            encoder().name()
        )
    };
    let length = |text: &str| u32::try_from(text.len()).expect("short");
    assert!(with(2, 2, "{}", &[]).contains("version is 2"));
    assert!(with(1, u32::MAX, "{}", &[]).contains("longer than the file"));
    assert!(with(1, 2, "{}", &[]).contains("missing field"));
    let huge = shape_text(1 << 40);
    assert!(with(1, length(&huge), &huge, &[]).contains("out of range"));
    let sound = shape_text(encoder().width() as u64);
    assert!(with(1, length(&sound), &sound, &[0; 8]).contains("do not fill"));
    let values = vec![0xFF; (encoder().width() + 8) * 4];
    assert!(with(1, length(&sound), &sound, &values).contains("not finite"));
    let foreign = sound.replace("[0]", "[7]");
    let values = vec![0; (encoder().width() + 8) * 4];
    assert!(with(1, length(&foreign), &foreign, &values).contains("no task"));
}

#[test]
fn a_glance_tells_pictures_and_poses_apart() {
    let mut glance = encoder();
    let mut features = |grey: u8, pose: f64| {
        let observation = Observation { proprioception: vec![pose, 0.2], ..seen(0, grey, "") };
        glance.encode(&observation).expect("its camera is there")
    };
    let cosine = |a: &[f32], b: &[f32]| super::memory::cosine(a, b);
    let here = features(40, 0.1);
    assert!((cosine(&here, &here) - 1.0).abs() < 1e-6);
    assert!(cosine(&here, &features(40, 0.9)) < 0.95);
    let dark = Observation { images: Vec::new(), ..seen(0, 0, "") };
    assert!(encoder().encode(&dark).is_err(), "no camera");
}
