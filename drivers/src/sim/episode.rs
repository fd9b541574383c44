//! A world with a task, its judge and the expert's advice, advanced by actions of 0.1 s.

use super::description::{ArmDescription, JOINTS};
use super::expert::{Expert, Phase};
use super::ground_truth::{GroundTruth, Judge};
use super::kinematics::Joints;
use super::scene::Scene;
use super::task::Task;
use super::world::{PHYSICS_STEP, STEPS_PER_COMMAND, Snapshot, World};

/// Commands in one action period.
pub const COMMANDS_PER_ACTION: usize = 10;

/// One attempt at one task.
pub struct Episode {
    world: World,
    task: Task,
    judge: Judge,
    expert: Expert,
    snapshot: Snapshot,
    advice: Joints,
    /// The stream's last command: where the next interpolation starts.
    stream: Joints,
}

impl Episode {
    /// An episode of `scene` with `task`, told in `instruction`.
    pub fn new(arm: &ArmDescription, scene: Scene, task: Task, instruction: String) -> Self {
        let stream = scene.start;
        let world = World::new(arm, scene);
        let snapshot = world.snapshot();
        let judge = Judge::new(Some(task), instruction, arm, world.scene(), &snapshot);
        let mut episode = Self {
            world,
            task,
            judge,
            expert: Expert::default(),
            snapshot,
            advice: stream,
            stream,
        };
        episode.renew();
        episode
    }

    /// The episode of a seed, with the seed's own task and phrase.
    pub fn from_seed(arm: &ArmDescription, seed: u64) -> Self {
        let scene = Scene::from_seed(arm, seed);
        let (task, phrase) = (scene.task, scene.phrase);
        Self::new(arm, scene, task, task.instruction(phrase))
    }

    fn renew(&mut self) {
        self.snapshot = self.world.snapshot();
        let done = self.judge.truth().success;
        let (arm, scene) = (self.world.arm(), self.world.scene());
        self.advice = self.expert.advise(arm, scene, &self.snapshot, self.task, done);
    }

    /// Advances by one action period towards `target` (rad), as the runtime's stream would: 100
    /// commands a second, interpolated from the last one and clamped to the joints' limits.
    pub fn act(&mut self, target: &Joints) {
        let from = self.stream;
        for k in 1..=COMMANDS_PER_ACTION {
            let share = k as f64 / COMMANDS_PER_ACTION as f64;
            for joint in 0..JOINTS {
                let limits = &self.world.arm().joints[joint].limits;
                let wish = from[joint] + share * (target[joint] - from[joint]);
                let most = limits.velocity * PHYSICS_STEP * STEPS_PER_COMMAND as f64;
                let last = self.stream[joint];
                if wish.is_finite() {
                    self.stream[joint] =
                        (last + (wish - last).clamp(-most, most)).clamp(limits.lower, limits.upper);
                }
            }
            self.world.set_command(&self.stream);
            for _ in 0..STEPS_PER_COMMAND {
                self.world.step();
            }
            let snapshot = self.world.snapshot();
            self.judge.update(self.world.arm(), self.world.scene(), &snapshot);
        }
        self.renew();
    }

    /// The world.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The task.
    pub fn task(&self) -> Task {
        self.task
    }

    /// The state after the last action.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// What is true.
    pub fn truth(&self) -> &GroundTruth {
        self.judge.truth()
    }

    /// The expert's joint targets (rad) for the next action.
    pub fn advice(&self) -> &Joints {
        &self.advice
    }

    /// What the expert is doing.
    pub fn phase(&self) -> Phase {
        self.expert.phase()
    }
}
