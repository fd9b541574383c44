//! The demo's closed loop on a virtual clock: simulator, policy, scheduler and guard as they run in real time,
//! with a fixed inference latency instead of threads. The same figures on every run.

use std::time::Duration;

use sinew_drivers::sim::ground_truth::Judge;
use sinew_drivers::sim::{
    ArmDescription, CameraKind, GroundTruth, JOINTS, Renderer, Scene, Task, World,
};
use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent, Cycle};
use sinew_runtime::inference::{self, prepare};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::scheduler::{ChunkOrder, SchedulerConfig};
use sinew_runtime::{
    ActionChunk, CameraFrame, ChunkRequest, Image, JointState, JointVec, Observation,
    ObservedImage, Policy, PolicyError, Stamp,
};

/// Control period.
pub const PERIOD: Duration = Duration::from_millis(10);
/// Physics steps of 2 ms in a control period.
const PHYSICS_STEPS: usize = 5;
/// Control periods between two camera frames.
const FRAME_PERIODS: u64 = 5;
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Side of a camera's image (pixels).
const SIZE: usize = 96;

/// One way of playing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoopCase {
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
    /// Actions executed before the next chunk takes over.
    pub execution_horizon: usize,
    /// From an order to its chunk.
    pub latency: Duration,
}

/// What one control period did.
pub struct Step<'a> {
    /// The cycle's result.
    pub cycle: &'a Cycle,
    /// A chunk took over just before it.
    pub spliced: bool,
}

/// How an episode ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// What is true in the scene.
    pub truth: GroundTruth,
    /// Where the arm stands (rad).
    pub joints: [f64; JOINTS],
    /// Time from the first command (s).
    pub seconds: f64,
}

struct Loop {
    arm: ArmDescription,
    scene: Scene,
    world: World,
    judge: Judge,
    core: ControlCore,
    renderer: Renderer,
    seen: Option<Observation>,
    now: Stamp,
    sequence: u64,
}

impl Loop {
    fn new(case: &LoopCase, seed: u64, task: Option<Task>) -> Self {
        let arm = ArmDescription::desk_arm();
        let scene = Scene::from_seed(&arm, seed);
        let task = task.unwrap_or(scene.task);
        let world = World::new(&arm, scene.clone());
        let judge = Judge::new(Some(task), task.instruction(0), &arm, &scene, &world.snapshot());
        let mut scheduler = SchedulerConfig::new(&arm.limits(), PERIOD, case.execution_horizon);
        for (joint, kind) in scheduler.joints.iter_mut().zip(arm.kinds()) {
            joint.kind = kind;
        }
        scheduler.strategy = case.strategy;
        scheduler.latency = Some(case.latency);
        // The built-in description has been read, so its limits are sound.
        #[allow(clippy::expect_used)]
        let core = ControlCore::new(&ControlConfig {
            limits: arm.limits(),
            period: PERIOD,
            state_timeout: Duration::from_millis(250),
            scheduler,
        })
        .expect("the description's limits are sound")
        .with_space(arm.space())
        .expect("the description's body fits its chain");
        let renderer = Renderer::new(SIZE, SIZE);
        let (seen, now) = (None, Stamp(0));
        Self { arm, scene, world, judge, core, renderer, seen, now, sequence: 0 }
    }

    /// One control period: state in, command out, physics.
    fn step(&mut self) -> Cycle {
        self.now = self.now + PERIOD;
        self.sequence += 1;
        if self.sequence % FRAME_PERIODS == 1 {
            self.seen = Some(self.observe());
        }
        let position = joints(&self.world.joints());
        let velocity = joints(&self.world.velocities());
        let state = JointState { stamp: self.now, sequence: self.sequence, position, velocity };
        self.core.on_event(ControlEvent::State(state), self.now);
        if self.sequence == 1 {
            self.core.tick(self.now);
            let policy = ControlEvent::Authority(AuthorityRequest::Policy);
            self.core.on_event(policy, self.now);
        }
        let cycle = self.core.tick(self.now);
        if let Some(command) = cycle.command {
            let mut target = [0.0; JOINTS];
            target.copy_from_slice(command.position.as_slice());
            self.world.set_command(&target);
        }
        for _ in 0..PHYSICS_STEPS {
            self.world.step();
        }
        self.judge.update(&self.arm, &self.scene, &self.world.snapshot());
        cycle
    }

    fn observe(&mut self) -> Observation {
        let snapshot = self.world.snapshot();
        let images = CameraKind::ALL.map(|kind| {
            let mut data = vec![0; SIZE * SIZE * 3];
            self.renderer.render(&self.arm, &self.scene, &snapshot, kind, &mut data);
            // The buffer was made for this size.
            #[allow(clippy::expect_used)]
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

    fn infer(
        &self,
        policy: &mut dyn Policy,
        order: &ChunkOrder,
        seed: u64,
    ) -> Result<Option<ActionChunk>, PolicyError> {
        let Some(seen) = &self.seen else { return Ok(None) };
        let mut seen = seen.clone();
        let dt = policy.spec().dt();
        let request = prepare(order, self.core.plan(), &mut seen, dt, &self.arm.kinds());
        let request = ChunkRequest { seed: seed ^ order.request, ..request };
        inference::run(policy, &seen, &request).map(Some)
    }
}

fn joints(values: &[f64; JOINTS]) -> JointVec {
    let mut out = JointVec::zeros(JOINTS);
    out.as_mut_slice().copy_from_slice(values);
    out
}

/// Plays the scene of `seed` with its own task or `task`; `watch` sees every control period.
///
/// # Errors
/// What the policy gave.
pub fn play(
    policy: &mut dyn Policy,
    case: &LoopCase,
    seed: u64,
    task: Option<Task>,
    watch: &mut dyn FnMut(&Step<'_>),
) -> Result<Ending, PolicyError> {
    let mut episode = Loop::new(case, seed, task);
    let mut coming: Option<(Stamp, ActionChunk)> = None;
    let mut spliced = false;
    while episode.now.since(Stamp(0)) < TIME_LIMIT {
        let cycle = episode.step();
        watch(&Step { cycle: &cycle, spliced });
        spliced = false;
        if let Some(order) = &cycle.order {
            let chunk = episode.infer(policy, order, seed)?;
            coming = chunk.map(|c| (episode.now + case.latency, c));
        }
        if let Some((_, chunk)) = coming.take_if(|c| episode.now >= c.0) {
            spliced = episode.core.on_event(ControlEvent::Chunk(chunk), episode.now).accepted;
            while episode.core.take_spent().is_some() {}
        }
        let truth = episode.judge.truth();
        if truth.done() || truth.wrong_object || truth.wrong_bin {
            break;
        }
    }
    let seconds = episode.now.since(Stamp(0)).as_secs_f64();
    Ok(Ending { truth: episode.judge.truth().clone(), joints: episode.world.joints(), seconds })
}
