use super::*;
use crate::{ChunkReport, JointState, JointVec, PolicySpec, PrefixSupport, Stamp};

/// A policy of four steps; while it does `at`, somebody says `say`.
struct Interrupted {
    spec: PolicySpec,
    words: Arc<Mutex<String>>,
    at: usize,
    say: &'static str,
    done: usize,
    heard: Vec<String>,
}

impl Policy for Interrupted {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, _: &ChunkRequest) -> Result<(), PolicyError> {
        self.done = 0;
        self.heard.push(seen.instruction.clone());
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        self.done += 1;
        if self.done == self.at && self.heard.len() == 1 {
            self.say.clone_into(&mut self.words.lock().expect("nobody died"));
        }
        if self.done == 4 {
            return Ok(Progress::Done);
        }
        let (stage, done) = ("denoise", self.done);
        Ok(Progress::Step { stage, done, total: 4, denoised: true, next_denoises: true })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        ActionChunk::new(1, Stamp(0), self.spec.dt(), 1, vec![0.0; 4])
            .map_err(|e| PolicyError::Compute(e.to_string()))
    }
}

/// What comes of two orders when `say` is said during step `at` of the first.
// As `Worker::infer`.
#[allow(clippy::result_large_err)]
fn told(at: usize, say: &'static str) -> [Result<InferenceReport, InferenceReport>; 2] {
    let words = Arc::new(Mutex::new("first".to_owned()));
    let spec = PolicySpec {
        cameras: Vec::new(),
        optional_cameras: 0,
        state_dim: 1,
        action_dim: 1,
        action_names: Vec::new(),
        action_horizon: 4,
        action_rate_hz: Some(10.0),
        denoise_steps: 4,
        prefix: PrefixSupport::default(),
    };
    let policy = Interrupted { spec, words: words.clone(), at, say, done: 0, heard: Vec::new() };
    let mut ingest = Ingest::new(&[], Duration::from_secs(3600));
    let (position, velocity) = (JointVec::zeros(1), JointVec::zeros(1));
    let state = JointState { stamp: Clock::now(), sequence: 1, position, velocity };
    ingest.on_state(state).expect("the first state");
    let anytime =
        AnytimeConfig { least_steps: usize::MAX, margin: Duration::ZERO, exact_in_time: false };
    let mut worker = Worker {
        policy: Box::new(policy),
        config: InferenceConfig { denoise_steps: None, seed: 1, kinds: Vec::new(), anytime },
        inputs: InferenceInputs { ingest: Arc::new(Mutex::new(ingest)), instruction: words },
        chunks: rtrb::RingBuffer::new(1).0,
        reports: crossbeam_channel::bounded(1).0,
        anytime: Anytime::new(anytime),
        made: 0,
        shown: None,
    };
    [1, 2].map(|request| {
        let at = Clock::now();
        let order = ChunkOrder { request, at, expected: at, deadline: None, guide: Guide::Free };
        worker.infer(&InferenceOrder { order, plan: None }, || false).map(|made| made.0)
    })
}

#[test]
fn a_chunk_for_an_old_instruction_is_dropped_whenever_the_new_one_comes() {
    for at in 1..=4 {
        let [first, second] = told(at, "second");
        assert!(matches!(first, Err(InferenceReport::Redirected)), "step {at}: {first:?}");
        assert!(
            matches!(second, Ok(InferenceReport::Chunk { .. })),
            "the next follows it: {second:?}"
        );
    }
    // The same words again are nothing new.
    let [first, _] = told(2, "first");
    let Ok(InferenceReport::Chunk { report, .. }) = first else { panic!("{first:?}") };
    assert_eq!(report, ChunkReport::default());
}

/// A policy that remembers observations 100 ms apart.
struct Remembering {
    spec: PolicySpec,
    seen: Sender<Stamp>,
}

impl Policy for Remembering {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, _: &Observation, _: &ChunkRequest) -> Result<(), PolicyError> {
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        Ok(Progress::Done)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        Err(PolicyError::OutOfTurn("it makes none"))
    }

    fn history_period(&self) -> Option<Duration> {
        Some(Duration::from_millis(100))
    }

    fn remember(&mut self, observation: &Observation) -> Result<(), PolicyError> {
        self.seen.try_send(observation.instant).expect("there is room");
        Ok(())
    }
}

#[test]
fn a_policy_with_a_history_is_shown_observations_in_its_rhythm() {
    let at = |ms: u64| Stamp(0) + Duration::from_millis(ms);
    let (seen, shown) = crossbeam_channel::bounded(8);
    let spec = PolicySpec {
        cameras: Vec::new(),
        optional_cameras: 0,
        state_dim: 1,
        action_dim: 1,
        action_names: Vec::new(),
        action_horizon: 1,
        action_rate_hz: Some(10.0),
        denoise_steps: 1,
        prefix: PrefixSupport::default(),
    };
    let ingest = Arc::new(Mutex::new(Ingest::new(&[], Duration::from_secs(1))));
    let anytime = AnytimeConfig { least_steps: 1, margin: Duration::ZERO, exact_in_time: false };
    let config = InferenceConfig { denoise_steps: None, seed: 0, kinds: Vec::new(), anytime };
    let mut worker = Worker {
        policy: Box::new(Remembering { spec, seen }),
        config,
        inputs: InferenceInputs { ingest: ingest.clone(), instruction: Arc::default() },
        chunks: rtrb::RingBuffer::new(1).0,
        reports: crossbeam_channel::bounded(1).0,
        anytime: Anytime::new(anytime),
        made: 0,
        shown: None,
    };
    worker.show(at(0));
    assert!(shown.try_recv().is_err(), "nothing is seen yet");
    for ms in (100..=400).step_by(20) {
        let still = JointVec::zeros(1);
        let state = JointState { stamp: at(ms), sequence: ms, position: still, velocity: still };
        ingest.lock().expect("nobody panicked").on_state(state).expect("it is newer");
        worker.show(at(ms));
    }
    let shown: Vec<Stamp> = shown.try_iter().collect();
    assert_eq!(shown, [at(100), at(200), at(300), at(400)]);
}
