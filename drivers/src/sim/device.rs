//! The simulation as devices: one world on its own thread in real time, behind the runtime's traits.
//!
//! The physics thread follows the monotonic clock in steps of 2 ms and holds a lock for one step at a
//! time; an arm's `write` and `read` and a camera's snapshot take that lock briefly, and pictures are
//! rendered outside of it. The world ends with the last handle, arm or camera.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sinew_runtime::{
    ArmDriver, Camera, CameraFrame, Clock, Command, DeviceError, Image, JointState, JointVec, Stamp,
};

use super::description::{ArmDescription, JOINTS};
use super::ground_truth::{GroundTruth, Judge};
use super::render::{CameraKind, Renderer};
use super::scene::Scene;
use super::task::Task;
use super::world::{PHYSICS_STEP, STEPS_PER_COMMAND, Snapshot, World};

/// A host that sleeps longer than this is not caught up with; the world skips the time instead.
const MOST_BACKLOG: Duration = Duration::from_millis(100);

/// What a simulated robot starts with.
#[derive(Debug, Clone, PartialEq)]
pub struct SimConfig {
    /// The arm.
    pub arm: ArmDescription,
    /// Seed of the scene.
    pub seed: u64,
    /// The instruction that the judge goes by; `None` for the seed's own task in its canonical words.
    pub instruction: Option<String>,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self { arm: ArmDescription::desk_arm(), seed: 0, instruction: None }
    }
}

/// The world and what is true of it, under one lock.
struct Live {
    world: World,
    scene: Arc<Scene>,
    judge: Judge,
    steps: usize,
}

struct Shared {
    arm: ArmDescription,
    live: Mutex<Live>,
    stop: AtomicBool,
    skipped: AtomicU64,
}

/// Stops the physics thread when the last handle goes.
struct Owner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the physics thread has been printed; there is nothing left to save.
            let _ = thread.join();
        }
    }
}

/// A handle on a running world; clones share it.
#[derive(Clone)]
pub struct SimHandle {
    owner: Arc<Owner>,
}

/// The judge of `instruction`: of the seed's task without one, of no task when it names none.
fn judge(arm: &ArmDescription, scene: &Scene, world: &World, instruction: Option<&str>) -> Judge {
    let (task, text) = match instruction {
        Some(text) => (Task::from_instruction(text), text.to_owned()),
        None => (Some(scene.task), scene.task.instruction(0)),
    };
    Judge::new(task, text, arm, scene, &world.snapshot())
}

impl Live {
    fn new(arm: &ArmDescription, seed: u64, instruction: Option<&str>) -> Self {
        let scene = Scene::from_seed(arm, seed);
        let world = World::new(arm, scene.clone());
        let judge = judge(arm, &scene, &world, instruction);
        Self { world, scene: Arc::new(scene), judge, steps: 0 }
    }

    fn step(&mut self) {
        self.world.step();
        self.steps += 1;
        if self.steps.is_multiple_of(STEPS_PER_COMMAND) {
            let snapshot = self.world.snapshot();
            self.judge.update(self.world.arm(), &self.scene, &snapshot);
        }
    }
}

impl Shared {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The physics thread: as many steps as the clock says, then sleep to the next one.
    fn run(&self) {
        let period = Duration::from_secs_f64(PHYSICS_STEP);
        let mut next = Instant::now() + period;
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if let Some(early) = next.checked_duration_since(now) {
                std::thread::sleep(early);
                continue;
            }
            let backlog = now.duration_since(next);
            if backlog > MOST_BACKLOG {
                let steps = (backlog.as_secs_f64() / PHYSICS_STEP) as u32;
                self.skipped.fetch_add(u64::from(steps), Ordering::Relaxed);
                next += period * steps;
            }
            self.live().step();
            next += period;
        }
    }
}

impl SimHandle {
    /// Starts a world in real time.
    ///
    /// # Errors
    /// [`DeviceError`] when the physics thread cannot be started.
    pub fn start(config: &SimConfig) -> Result<Self, DeviceError> {
        let live = Live::new(&config.arm, config.seed, config.instruction.as_deref());
        let shared = Arc::new(Shared {
            arm: config.arm.clone(),
            live: Mutex::new(live),
            stop: AtomicBool::new(false),
            skipped: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new().name("sim-physics".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        });
        let thread = thread.map_err(|error| DeviceError {
            device: config.arm.name.clone(),
            reason: format!("its physics thread cannot be started: {error}"),
        })?;
        Ok(Self { owner: Arc::new(Owner { shared, thread: Some(thread) }) })
    }

    fn shared(&self) -> &Shared {
        &self.owner.shared
    }

    /// The arm's description.
    pub fn description(&self) -> &ArmDescription {
        &self.shared().arm
    }

    /// Starts over with the scene of `seed`; the arm jumps to that scene's start, at rest.
    ///
    /// The judge goes by `instruction`, or by the seed's own task without one.
    pub fn reset(&self, seed: u64, instruction: Option<&str>) {
        // The new world is built outside the lock, so that the arm does not wait for it.
        let live = Live::new(&self.shared().arm, seed, instruction);
        *self.shared().live() = live;
    }

    /// Gives the judge a new instruction in the present scene, and clears its verdicts.
    pub fn set_instruction(&self, instruction: &str) {
        let mut live = self.shared().live();
        live.judge = judge(&self.shared().arm, &live.scene, &live.world, Some(instruction));
    }

    /// What is true now.
    pub fn ground_truth(&self) -> GroundTruth {
        self.shared().live().judge.truth().clone()
    }

    /// The scene, and all poses of the present instant.
    pub fn snapshot(&self) -> (Arc<Scene>, Snapshot) {
        let live = self.shared().live();
        (Arc::clone(&live.scene), live.world.snapshot())
    }

    /// Physics steps that were skipped because the host slept too long.
    pub fn skipped_steps(&self) -> u64 {
        self.shared().skipped.load(Ordering::Relaxed)
    }

    /// The arm as a device.
    pub fn arm(&self) -> SimArm {
        let names = self.description().joints.iter().map(|j| j.name.clone()).collect();
        SimArm { handle: self.clone(), names }
    }

    /// A camera as a device, called `name` in its errors.
    pub fn camera(
        &self,
        name: &str,
        kind: CameraKind,
        width: usize,
        height: usize,
        frame_period: Duration,
    ) -> SimCamera {
        SimCamera {
            handle: self.clone(),
            name: name.to_owned(),
            kind,
            width,
            height,
            frame_period,
            renderer: Renderer::new(width, height),
        }
    }
}

/// The simulated arm.
pub struct SimArm {
    handle: SimHandle,
    names: Vec<String>,
}

impl ArmDriver for SimArm {
    fn joint_names(&self) -> &[String] {
        &self.names
    }

    /// The servos take the command's positions after their latency; its velocities are not used.
    fn write(&mut self, command: &Command) -> Result<(), DeviceError> {
        let fail = |reason| DeviceError { device: self.handle.description().name.clone(), reason };
        let found = command.position.len();
        let target =
            command.position.as_slice().try_into().map_err(|_| {
                fail(format!("a command of {found} joints came, the arm has {JOINTS}"))
            })?;
        if !command.position.is_finite() {
            return Err(fail("a command came with a position that is no number".to_owned()));
        }
        self.handle.shared().live().world.set_command(target);
        Ok(())
    }

    fn read(&mut self, now: Stamp) -> Result<JointState, DeviceError> {
        let live = self.handle.shared().live();
        let (joints, velocities) = (live.world.joints(), live.world.velocities());
        drop(live);
        let values = |values: &[f64; JOINTS]| {
            let mut out = JointVec::zeros(JOINTS);
            out.as_mut_slice().copy_from_slice(values);
            out
        };
        Ok(JointState {
            stamp: now,
            sequence: 0,
            position: values(&joints),
            velocity: values(&velocities),
        })
    }

    /// Freezes the targets at the present positions; a closed gripper keeps its grip.
    fn hold(&mut self) -> Result<(), DeviceError> {
        self.handle.shared().live().world.hold();
        Ok(())
    }

    /// The joints coast to rest; friction keeps them there, because gravity is not modelled.
    fn torque_off(&mut self) -> Result<(), DeviceError> {
        self.handle.shared().live().world.torque_off();
        Ok(())
    }

    /// The jaw trembles a little while it squeezes.
    fn standstill_speed(&self) -> f64 {
        0.05
    }
}

/// A simulated camera.
pub struct SimCamera {
    handle: SimHandle,
    name: String,
    kind: CameraKind,
    width: usize,
    height: usize,
    frame_period: Duration,
    renderer: Renderer,
}

impl Camera for SimCamera {
    fn frame_period(&self) -> Duration {
        self.frame_period
    }

    fn capture(&mut self) -> Result<CameraFrame, DeviceError> {
        let (scene, snapshot) = self.handle.snapshot();
        let stamp = Clock::now();
        let mut data = vec![0; self.renderer.image_bytes()];
        let arm = self.handle.description();
        self.renderer.render(arm, &scene, &snapshot, self.kind, &mut data);
        let image = Image::new(self.width, self.height, data.into()).map_err(|error| {
            DeviceError { device: self.name.clone(), reason: error.to_string() }
        })?;
        Ok(CameraFrame { stamp, sequence: 0, image })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn command(position: JointVec) -> Command {
        Command {
            stamp: Stamp(0),
            sequence: 1,
            position,
            velocity: JointVec::zeros(position.len()),
        }
    }

    #[test]
    fn an_arm_follows_and_holds() {
        let sim = SimHandle::start(&SimConfig::default()).unwrap();
        let mut arm = sim.arm();
        let start = arm.read(Stamp(7)).unwrap();
        assert_eq!(start.stamp, Stamp(7));
        assert_eq!(arm.joint_names().len(), start.position.len());
        let mut target = start.position;
        target[0] += 0.3;
        arm.write(&command(target)).unwrap();
        // Waits for what must come; how long it takes is the host's affair.
        while (arm.read(Stamp(8)).unwrap().position[0] - target[0]).abs() > 0.01 {
            std::thread::sleep(Duration::from_millis(2));
        }
        arm.hold().unwrap();
        let (_, snapshot) = sim.snapshot();
        assert!((snapshot.command[0] - target[0]).abs() < 0.02);
    }

    #[test]
    fn without_torque_commands_move_nothing_until_a_hold() {
        let sim = SimHandle::start(&SimConfig::default()).unwrap();
        let mut arm = sim.arm();
        let start = arm.read(Stamp(0)).unwrap().position;
        arm.torque_off().unwrap();
        let mut target = start;
        target[0] += 0.3;
        arm.write(&command(target)).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!((arm.read(Stamp(1)).unwrap().position[0] - start[0]).abs() < 1e-6);
        arm.hold().unwrap();
        arm.write(&command(target)).unwrap();
        while (arm.read(Stamp(2)).unwrap().position[0] - target[0]).abs() > 0.01 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn commands_that_do_not_fit_are_refused() {
        let sim = SimHandle::start(&SimConfig::default()).unwrap();
        let mut arm = sim.arm();
        assert!(arm.write(&command(JointVec::zeros(5))).unwrap_err().reason.contains("5 joints"));
        let mut broken = JointVec::zeros(6);
        broken[2] = f64::NAN;
        assert!(arm.write(&command(broken)).is_err());
    }

    #[test]
    fn a_reset_brings_the_scene_of_its_seed_and_the_judge_of_its_words() {
        let sim = SimHandle::start(&SimConfig::default()).unwrap();
        sim.reset(5, None);
        let scene = Scene::from_seed(sim.description(), 5);
        let truth = sim.ground_truth();
        assert_eq!((truth.seed, truth.task), (5, Some(scene.task)));
        assert_eq!(truth.instruction, scene.task.instruction(0));
        sim.set_instruction("sing a song");
        assert_eq!(sim.ground_truth().task, None);
    }

    #[test]
    fn a_camera_gives_frames_of_its_size() {
        let sim = SimHandle::start(&SimConfig::default()).unwrap();
        let period = Duration::from_millis(33);
        let mut camera = sim.camera("front", CameraKind::Front, 64, 48, period);
        let before = Clock::now();
        let frame = camera.capture().unwrap();
        assert_eq!((frame.image.width(), frame.image.height()), (64, 48));
        assert!(frame.stamp >= before && frame.stamp <= Clock::now());
        assert_eq!(camera.frame_period(), period);
    }
}
