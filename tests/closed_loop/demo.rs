//! The demo's closed loop on a virtual clock: simulator, quantised policy, scheduler and guard as they run in
//! real time, with a fixed inference delay instead of threads. Equal on every run.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use sinew_drivers::sim::ground_truth::Judge;
use sinew_drivers::sim::{
    ArmDescription, CameraKind, GroundTruth, JOINTS, Renderer, Scene, Task, World,
};
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::{
    ActionChunk, CameraFrame, ChunkRequest, Image, JointState, JointVec, Observation,
    ObservedImage, Policy, Stamp, inference,
};

const PERIOD: Duration = Duration::from_millis(10);
/// Physics steps of 2 ms in a control period.
const PHYSICS_STEPS: usize = 5;
/// From an observation to its chunk.
const LATENCY: Duration = Duration::from_millis(70);
const TIME_LIMIT: Duration = Duration::from_secs(20);
const SIZE: usize = 96;

struct Loop {
    arm: ArmDescription,
    scene: Scene,
    world: World,
    judge: Judge,
    core: ControlCore,
    now: Stamp,
    sequence: u64,
}

impl Loop {
    fn new(seed: u64, task: Option<Task>) -> Self {
        let arm = ArmDescription::desk_arm();
        let scene = Scene::from_seed(&arm, seed);
        let task = task.unwrap_or(scene.task);
        let world = World::new(&arm, scene.clone());
        let judge = Judge::new(Some(task), task.instruction(0), &arm, &scene, &world.snapshot());
        let scheduler = SchedulerConfig::new(&arm.limits(), PERIOD, 8);
        let core = ControlCore::new(&ControlConfig {
            limits: arm.limits(),
            period: PERIOD,
            state_timeout: Duration::from_millis(250),
            scheduler,
        })
        .expect("the description's limits are sound");
        Self { arm, scene, world, judge, core, now: Stamp(0), sequence: 0 }
    }

    /// One control period: state in, command out, physics.
    fn step(&mut self) -> Option<u64> {
        self.now = self.now + PERIOD;
        self.sequence += 1;
        let position = JointVec::from_slice(&self.world.joints()).expect("six joints");
        let velocity = JointVec::zeros(JOINTS);
        let state = JointState { stamp: self.now, sequence: self.sequence, position, velocity };
        self.core.on_event(ControlEvent::State(state), self.now);
        if self.sequence == 1 {
            let policy = ControlEvent::Authority(AuthorityRequest::Policy);
            self.core.tick(self.now);
            self.core.on_event(policy, self.now);
        }
        let cycle = self.core.tick(self.now);
        let command = cycle.command.expect("the state was given");
        let target = command.position.as_slice().try_into().expect("six joints");
        self.world.set_command(target);
        for _ in 0..PHYSICS_STEPS {
            self.world.step();
        }
        self.judge.update(&self.arm, &self.scene, &self.world.snapshot());
        cycle.order.map(|o| o.request)
    }

    fn observe(&self, renderer: &mut Renderer) -> Observation {
        let snapshot = self.world.snapshot();
        let images = CameraKind::ALL.map(|kind| {
            let mut data = vec![0; SIZE * SIZE * 3];
            renderer.render(&self.arm, &self.scene, &snapshot, kind, &mut data);
            let image = Image::new(SIZE, SIZE, data.into()).expect("made for this size");
            let frame = CameraFrame { stamp: self.now, sequence: self.sequence, image };
            ObservedImage { camera: kind.name().to_owned(), frame, age: Duration::ZERO }
        });
        Observation {
            instant: self.now,
            images: images.into(),
            proprioception: self.world.joints().to_vec(),
            proprioception_age: Duration::ZERO,
            instruction: self.judge.truth().instruction.clone(),
        }
    }
}

/// Plays one episode and gives what was true at its end, with every command's last position.
fn play(policy: &mut dyn Policy, seed: u64, task: Option<Task>) -> (GroundTruth, [f64; JOINTS]) {
    let mut renderer = Renderer::new(SIZE, SIZE);
    let mut episode = Loop::new(seed, task);
    let mut coming: Option<(Stamp, ActionChunk)> = None;
    while episode.now.since(Stamp(0)) < TIME_LIMIT {
        if let Some(request) = episode.step() {
            let seen = episode.observe(&mut renderer);
            let request =
                ChunkRequest { id: request, seed: seed ^ request, ..ChunkRequest::default() };
            let chunk = inference::run(policy, &seen, &request).expect("the observation fits");
            coming = Some((episode.now + LATENCY, chunk));
        }
        if let Some((_, chunk)) = coming.take_if(|c| episode.now >= c.0) {
            episode.core.on_event(ControlEvent::Chunk(chunk), episode.now);
        }
        let truth = episode.judge.truth();
        if truth.done() || truth.wrong_object || truth.wrong_bin {
            break;
        }
    }
    (episode.judge.truth().clone(), episode.world.joints())
}

fn policy() -> Box<dyn Policy> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/demo.q8_0.gguf");
    load_policy(&file, &LoadOptions::default()).expect("the demo's bundle is committed")
}

#[test]
fn the_demo_policy_follows_its_instructions() {
    let mut policy = policy();
    let mut tally: HashMap<&str, u32> = HashMap::new();
    for seed in 3_000_000..3_000_008 {
        let (truth, _) = play(policy.as_mut(), seed, None);
        let outcome = match &truth {
            t if t.wrong_object || t.wrong_bin => "wrong",
            t if t.success => "success",
            _ => "unfinished",
        };
        println!("{seed} {} {outcome} {:.1} s", truth.instruction, truth.time);
        *tally.entry(outcome).or_default() += 1;
    }
    assert!(tally.get("success").is_some_and(|n| *n >= 7), "{tally:?}");
}

#[test]
fn the_words_decide_and_the_loop_is_deterministic() {
    let mut policy = policy();
    let seed = 3_000_020;
    let scene = Scene::from_seed(&ArmDescription::desk_arm(), seed);
    let other = scene.colours().into_iter().find(|c| *c != scene.task.colour());
    let bin = scene.task.bin().expect("a scene's own task is to put a cube into a bin");
    let task = Task::PickPlace { colour: other.expect("three cubes"), bin };
    let first = play(policy.as_mut(), seed, Some(task));
    assert!(first.0.success && !first.0.wrong_object, "{:?}", first.0);
    assert_eq!(play(policy.as_mut(), seed, Some(task)), first);
}
