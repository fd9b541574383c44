//! The judge: what really happened, from the physics' own state.

use serde::{Deserialize, Serialize};

use super::description::ArmDescription;
use super::scene::{BIN_WALL_HEIGHT, CUBE_HALF, Scene, in_bin};
use super::task::{BinSide, Colour, Task};
use super::world::{CubeState, Snapshot};

/// A cube must rest in its bin this long (s).
const REST_TIME: f64 = 0.3;
/// A touch must last this long (s).
const TOUCH_TIME: f64 = 0.2;
/// Slower than this (m/s) a cube rests.
const REST_SPEED: f64 = 0.05;
/// Farthest fingertips from the cube's top in a touch (m).
const TOUCH_DISTANCE: f64 = 0.015;
/// Farthest that a touched cube may have been pushed (m).
const TOUCH_PUSH: f64 = 0.015;
/// A held cube this far above the table is lifted (m).
const LIFTED: f64 = 0.02;
/// A wrong touch or lift counts when it lasts this long (s).
const WRONG_TIME: f64 = 0.1;

/// One cube as it really is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CubeTruth {
    /// Its colour.
    pub colour: Colour,
    /// Its centre (m, base frame).
    pub position: [f64; 3],
    /// The bin that it lies in.
    pub bin: Option<BinSide>,
}

/// What is true of an episode at one instant. Verdicts stay once they are reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroundTruth {
    /// Simulated time since the start (s).
    pub time: f64,
    /// The seed of the scene.
    pub seed: u64,
    /// The task, when there is one.
    pub task: Option<Task>,
    /// The task's instruction, or the empty text.
    pub instruction: String,
    /// The task was done.
    pub success: bool,
    /// Another cube was lifted, put in a bin or touched.
    pub wrong_object: bool,
    /// The named cube came to rest in the other bin.
    pub wrong_bin: bool,
    /// The named cube left the table.
    pub lost: bool,
    /// The cube in the gripper.
    pub held: Option<Colour>,
    /// The point between the fingertips (m, base frame).
    pub fingertips: [f64; 3],
    /// The cubes.
    pub cubes: Vec<CubeTruth>,
}

impl GroundTruth {
    /// Whether the episode is over: done, or no longer possible.
    pub fn done(&self) -> bool {
        self.success || self.lost
    }
}

/// Follows an episode and judges it.
#[derive(Debug, Clone)]
pub struct Judge {
    truth: GroundTruth,
    last: f64,
    in_place: f64,
    in_wrong_bin: f64,
    wrong: f64,
    touch: f64,
}

fn bin_of(scene: &Scene, cube: &CubeState) -> Option<BinSide> {
    let centre = cube.centre();
    let inside = |side: &BinSide| in_bin(&scene.bins[side.index()], &centre);
    let low = centre.z < BIN_WALL_HEIGHT + CUBE_HALF;
    BinSide::ALL.into_iter().find(|side| low && inside(side))
}

/// Whether the cube rests in a bin, released.
fn at_rest(cube: &CubeState) -> bool {
    !cube.held() && cube.speed < REST_SPEED
}

fn count(timer: &mut f64, condition: bool, dt: f64) -> f64 {
    *timer = if condition { *timer + dt } else { 0.0 };
    *timer
}

impl Judge {
    /// A judge of `task` from the state at `snapshot` on.
    pub fn new(
        task: Option<Task>,
        instruction: String,
        arm: &ArmDescription,
        scene: &Scene,
        snapshot: &Snapshot,
    ) -> Self {
        let truth = GroundTruth {
            time: snapshot.time,
            seed: scene.seed,
            task,
            instruction,
            success: false,
            wrong_object: false,
            wrong_bin: false,
            lost: false,
            held: None,
            fingertips: [0.0; 3],
            cubes: Vec::new(),
        };
        let last = snapshot.time;
        let mut judge =
            Self { truth, last, in_place: 0.0, in_wrong_bin: 0.0, wrong: 0.0, touch: 0.0 };
        judge.update(arm, scene, snapshot);
        judge
    }

    /// Looks at the present state; to be called every few simulated milliseconds.
    pub fn update(&mut self, arm: &ArmDescription, scene: &Scene, snapshot: &Snapshot) {
        let dt = snapshot.time - self.last;
        self.last = snapshot.time;
        self.truth.time = snapshot.time;
        self.truth.held = snapshot.cubes.iter().find(|c| c.held()).map(|c| c.colour);
        self.truth.fingertips = snapshot.fingertips(arm).coords.into();
        self.truth.cubes.clear();
        self.truth.cubes.extend(snapshot.cubes.iter().map(|cube| CubeTruth {
            colour: cube.colour,
            position: cube.centre().coords.into(),
            bin: bin_of(scene, cube),
        }));
        if let Some(task) = self.truth.task {
            self.judge(task, scene, snapshot, dt);
        }
    }

    fn judge(&mut self, task: Task, scene: &Scene, snapshot: &Snapshot, dt: f64) {
        let Some(cube) = snapshot.cube(task.colour()) else { return };
        self.truth.lost |= cube.centre().z < -0.02;
        let touching = matches!(task, Task::Touch { .. });
        let wrong = snapshot.cubes.iter().filter(|c| c.colour != task.colour()).any(|other| {
            let lifted = other.held() && other.centre().z > CUBE_HALF + LIFTED;
            let binned = bin_of(scene, other).is_some();
            lifted || binned || (touching && (other.at_finger || other.at_jaw))
        });
        self.truth.wrong_object |= count(&mut self.wrong, wrong, dt) >= WRONG_TIME;
        match task {
            Task::PickPlace { bin, .. } => {
                let found = bin_of(scene, cube).filter(|_| at_rest(cube));
                let placed = found == Some(bin);
                self.truth.success |= count(&mut self.in_place, placed, dt) >= REST_TIME;
                let misplaced = found.is_some() && !placed;
                self.truth.wrong_bin |= count(&mut self.in_wrong_bin, misplaced, dt) >= REST_TIME;
            }
            Task::Touch { colour } => {
                let start = scene.cubes.iter().find(|c| c.colour == colour);
                let mut top = cube.centre();
                let pushed = start.map_or(0.0, |s| (s.pose.translation.vector - top.coords).norm());
                top.z += CUBE_HALF;
                let distance = (nalgebra::Vector3::from(self.truth.fingertips) - top.coords).norm();
                let touched = distance < TOUCH_DISTANCE && pushed < TOUCH_PUSH;
                self.truth.success |= count(&mut self.touch, touched, dt) >= TOUCH_TIME;
            }
        }
    }

    /// What is true at the last update.
    pub fn truth(&self) -> &GroundTruth {
        &self.truth
    }
}
