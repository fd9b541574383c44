//! A scripted expert: a function of the true state that says where the joints should go next.
//!
//! It keeps one phase as its memory and derives all else from the state, so it can take over anywhere:
//! a wrong cube is put down, a dropped or missed one is tried again. One advice is the joint target of
//! the next action period of 0.1 s.

use nalgebra::{Point3, Vector3};

use super::description::{ArmDescription, JOINTS};
use super::kinematics::{Joints, forward, highest_tip, inverse_down};
use super::scene::{CUBE_HALF, GRIPPER_CLOSED, GRIPPER_OPEN, Scene, home, in_bin};
use super::task::Task;
use super::world::{CubeState, Snapshot};

/// Time that one advice covers (s).
pub const ACTION_PERIOD: f64 = 0.1;
/// Farthest horizontal and vertical steps of the tip in one period (m).
const STEP: (f64, f64) = (0.023, 0.018);
/// Height of the tip above a cube's centre before it descends (m).
const HOVER: f64 = 0.075;
/// Height of the tip while a cube is carried (m).
const CARRY: f64 = 0.135;
/// Height of the tip when the cube is let go above a bin (m).
const RELEASE: f64 = 0.06;
/// Height of the tip in a grasp (m).
const GRASP: f64 = 0.008;

/// What the expert is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Goes above the cube.
    Approach,
    /// Goes down to it.
    Descend,
    /// Closes the fingers.
    Close,
    /// Lifts the cube.
    Lift,
    /// Carries it to the bin.
    Carry,
    /// Lowers it into the bin.
    Lower,
    /// Opens the fingers.
    Release,
    /// Goes home.
    Retreat,
    /// Puts a wrong cube back on the table.
    PutDown,
}

/// The expert's memory.
#[derive(Debug, Clone)]
pub struct Expert {
    phase: Phase,
    periods: u32,
}

/// Where the tip should go.
struct Goal {
    tip: Point3<f64>,
    gripper: f64,
}

impl Default for Expert {
    fn default() -> Self {
        Self { phase: Phase::Approach, periods: 0 }
    }
}

/// The expert's view of one instant.
struct View<'a> {
    arm: &'a ArmDescription,
    scene: &'a Scene,
    snapshot: &'a Snapshot,
    /// The tip that the last command leads to.
    tip: Point3<f64>,
}

fn horizontal(a: &Point3<f64>, b: &Point3<f64>) -> f64 {
    (a.x - b.x).hypot(a.y - b.y)
}

impl View<'_> {
    fn gripper(&self) -> f64 {
        self.snapshot.joints[JOINTS - 1]
    }

    /// The cube's centre in the hand's frame.
    fn in_hand(&self, cube: &CubeState) -> Point3<f64> {
        self.snapshot.frames.hand.inverse_transform_point(&cube.centre())
    }

    /// Whether the cube is between the fingers.
    fn between(&self, cube: &CubeState) -> bool {
        let p = self.in_hand(cube);
        let jaw = self.gripper() * self.arm.geometry.pinion_radius;
        let y = p.y + self.arm.geometry.finger_offset;
        p.x.abs() < 0.018 && y > 0.0 && y < jaw && p.z > -0.03 && p.z < 0.012
    }

    /// The tip from which the hand's point at `offset` along its opening is above `target`.
    fn tip_for(&self, target: &Point3<f64>, offset: [f64; 2]) -> Point3<f64> {
        let mut tip = *target;
        for _ in 0..6 {
            let (sin, cos) = tip.y.atan2(tip.x).sin_cos();
            let [x, y] = offset;
            tip = target - Vector3::new(cos * x - sin * y, sin * x + cos * y, 0.0);
        }
        tip
    }

    /// Where `point` is from the tip, along and across the arm's plane.
    fn offset_of(&self, point: &Point3<f64>) -> [f64; 2] {
        let tip = self.snapshot.frames.hand.translation.vector;
        let (sin, cos) = tip.y.atan2(tip.x).sin_cos();
        let d = point.coords - tip;
        [cos * d.x + sin * d.y, cos * d.y - sin * d.x]
    }

    /// Whether a cube may be put down at `place`.
    fn free(&self, place: &Point3<f64>, own: &CubeState) -> bool {
        let radius = place.x.hypot(place.y);
        let others = self.snapshot.cubes.iter().filter(|c| c.colour != own.colour);
        let bins = self.scene.bins.iter();
        (0.15..0.265).contains(&radius)
            && place.x > 0.12
            && place.y.abs() < 0.12
            && others.map(|c| c.centre()).all(|c| horizontal(&c, place) > 0.055)
            && bins.map(|b| b.translation.vector.into()).all(|b| horizontal(&b, place) > 0.085)
    }

    /// The nearest free place for a wrongly held cube.
    fn place_for(&self, own: &CubeState) -> Point3<f64> {
        let here = own.centre();
        if self.free(&here, own) {
            return here;
        }
        let places = (0..7).flat_map(|i| (0..9).map(move |j| (i, j)));
        let places = places
            .map(|(i, j)| Point3::new(0.14 + 0.02 * f64::from(i), 0.025 * f64::from(j - 4), 0.0));
        places
            .filter(|place| self.free(place, own))
            .min_by(|a, b| horizontal(a, &here).total_cmp(&horizontal(b, &here)))
            .unwrap_or(Point3::new(0.2, 0.0, 0.0))
    }
}

impl Expert {
    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The joint targets (rad) for the next action period.
    ///
    /// `done` tells that the task has succeeded: then it goes home.
    pub fn advise(
        &mut self,
        arm: &ArmDescription,
        scene: &Scene,
        snapshot: &Snapshot,
        task: Task,
        done: bool,
    ) -> Joints {
        let tip = forward(&arm.geometry, &snapshot.command).hand.translation.vector.into();
        let view = View { arm, scene, snapshot, tip };
        let before = self.phase;
        let goal = self.decide(&view, task, done);
        self.periods = if self.phase == before { self.periods + 1 } else { 0 };
        step_to(&view, &goal)
    }

    fn decide(&mut self, view: &View, task: Task, done: bool) -> Goal {
        let other = view.snapshot.cubes.iter().find(|c| {
            c.held() && (c.colour != task.colour() || matches!(task, Task::Touch { .. }))
        });
        if let Some(other) = other {
            return self.put_down(view, other);
        }
        if self.phase == Phase::PutDown && view.gripper() < 0.6 * GRIPPER_OPEN {
            return Goal { tip: view.tip, gripper: GRIPPER_OPEN };
        }
        let cube = view.snapshot.cube(task.colour()).filter(|c| c.centre().z > -0.02 && !done);
        match (task, cube) {
            (Task::PickPlace { bin, .. }, Some(cube)) => {
                self.pick_place(view, cube, &view.scene.bins[bin.index()])
            }
            (Task::Touch { .. }, Some(cube)) => self.touch(view, cube),
            (_, None) => self.retreat(view, task),
        }
    }

    fn put_down(&mut self, view: &View, cube: &CubeState) -> Goal {
        self.phase = Phase::PutDown;
        let place = view.place_for(cube);
        let mut tip = view.tip_for(&place, view.offset_of(&cube.centre()));
        let away = horizontal(&place, &cube.centre());
        tip.z = if away > 0.02 { 0.1 } else { GRASP + 0.004 };
        let low = away <= 0.02 && cube.centre().z < CUBE_HALF + 0.006;
        Goal { tip, gripper: if low { GRIPPER_OPEN } else { GRIPPER_CLOSED } }
    }

    fn retreat(&mut self, view: &View, task: Task) -> Goal {
        if self.phase == Phase::Release && view.gripper() < 0.75 * GRIPPER_OPEN {
            return Goal { tip: view.tip, gripper: GRIPPER_OPEN };
        }
        self.phase = Phase::Retreat;
        let home = forward(&view.arm.geometry, &home(view.arm)).hand.translation.vector.into();
        let touch = matches!(task, Task::Touch { .. });
        Goal { tip: home, gripper: if touch { GRIPPER_CLOSED } else { GRIPPER_OPEN } }
    }

    fn pick_place(
        &mut self,
        view: &View,
        cube: &CubeState,
        bin: &nalgebra::Isometry3<f64>,
    ) -> Goal {
        let carrying = matches!(self.phase, Phase::Lift | Phase::Carry | Phase::Lower);
        let touched = cube.at_finger || cube.at_jaw;
        let narrow = view.gripper() * view.arm.geometry.pinion_radius < 0.039;
        let held = narrow && view.between(cube) && (cube.held() || (carrying && touched));
        if held && !(self.phase == Phase::Close && self.periods < 2) {
            return self.carry(view, cube, bin);
        }
        if in_bin(bin, &cube.centre()) && !held {
            return self.retreat(
                view,
                Task::PickPlace { colour: cube.colour, bin: super::task::BinSide::Left },
            );
        }
        self.grasp(view, cube)
    }

    fn carry(&mut self, view: &View, cube: &CubeState, bin: &nalgebra::Isometry3<f64>) -> Goal {
        let centre: Point3<f64> = bin.translation.vector.into();
        let mut tip = view.tip_for(&centre, view.offset_of(&cube.centre()));
        let away = horizontal(&centre, &cube.centre());
        let lowering = matches!(self.phase, Phase::Lower | Phase::Release);
        if away < if lowering { 0.022 } else { 0.014 } {
            tip.z = RELEASE;
            let low = view.snapshot.frames.hand.translation.z < RELEASE + 0.012;
            self.phase = if low { Phase::Release } else { Phase::Lower };
            return Goal { tip, gripper: if low { GRIPPER_OPEN } else { GRIPPER_CLOSED } };
        }
        let risen = view.tip.z > 0.1 || (self.phase == Phase::Carry && view.tip.z > 0.08);
        self.phase = if risen { Phase::Carry } else { Phase::Lift };
        tip.z = CARRY;
        Goal { tip, gripper: GRIPPER_CLOSED }
    }

    fn grasp(&mut self, view: &View, cube: &CubeState) -> Goal {
        let centre = cube.centre();
        if self.phase == Phase::Close && self.periods < 9 && view.between(cube) {
            return Goal { tip: view.tip, gripper: GRIPPER_CLOSED };
        }
        let in_hand = view.in_hand(cube);
        let error = in_hand.x.hypot(in_hand.y);
        let grasp = GRASP.max(centre.z - 0.006);
        let open = view.gripper() > 0.85 * GRIPPER_OPEN;
        let descending = self.phase == Phase::Descend;
        if open && error < if descending { 0.011 } else { 0.006 } {
            let arrived = view.snapshot.frames.hand.translation.z < grasp + 0.004;
            self.phase = if arrived { Phase::Close } else { Phase::Descend };
            let tip = Point3::new(centre.x, centre.y, grasp);
            let gripper = if arrived { GRIPPER_CLOSED } else { GRIPPER_OPEN };
            return Goal { tip: if arrived { view.tip } else { tip }, gripper };
        }
        self.phase = Phase::Approach;
        let tip = Point3::new(centre.x, centre.y, centre.z + HOVER);
        Goal { tip, gripper: GRIPPER_OPEN }
    }

    fn touch(&mut self, view: &View, cube: &CubeState) -> Goal {
        let centre = cube.centre();
        let middle = view.snapshot.fingertips(view.arm);
        let mut tip = view.tip_for(&centre, view.offset_of(&middle));
        let error = horizontal(&middle, &centre);
        let closed = view.gripper() < 0.1;
        let descending = self.phase == Phase::Descend;
        if closed && error < if descending { 0.01 } else { 0.005 } {
            self.phase = Phase::Descend;
            tip.z = centre.z + CUBE_HALF + 0.003;
        } else {
            self.phase = Phase::Approach;
            tip.z = centre.z + CUBE_HALF + 0.06;
        }
        Goal { tip, gripper: GRIPPER_CLOSED }
    }
}

/// One step of at most `limit`, shortening towards the end.
fn shorten(distance: f64, limit: f64) -> f64 {
    (0.7 * distance).min(limit)
}

/// The joints one action period closer to the goal.
fn step_to(view: &View, goal: &Goal) -> Joints {
    let (tip, to) = (view.tip, goal.tip);
    let polar = |p: &Point3<f64>| (p.x.hypot(p.y), p.y.atan2(p.x));
    let ((radius, angle), (to_radius, to_angle)) = (polar(&tip), polar(&to));
    let along = to_radius - radius;
    let across = (to_angle - angle) * 0.5 * (radius + to_radius);
    let distance = along.hypot(across);
    // Near the table it goes straight up or down; sideways only as it gets clear of the cubes.
    let clear = if distance > 0.012 { ((tip.z - 0.035) / 0.03).clamp(0.0, 1.0) } else { 1.0 };
    let share = if distance > 1e-9 { shorten(distance, STEP.0 * clear) / distance } else { 0.0 };
    let rise = to.z - tip.z;
    let rise = shorten(rise.abs(), STEP.1).copysign(rise);
    let radius = (radius + share * along).max(0.12);
    let angle = angle + share * (to_angle - angle);
    let z = (tip.z + rise).min(highest_tip(&view.arm.geometry, radius)).max(0.004);
    let next = Point3::new(radius * angle.cos(), radius * angle.sin(), z);
    let command = &view.snapshot.command;
    let Some(mut target) = inverse_down(&view.arm.geometry, &next, 0.0, goal.gripper) else {
        return *command; // cannot be: radius and height are within reach
    };
    for ((value, last), joint) in
        target.iter_mut().zip(command).zip(&view.arm.joints).take(JOINTS - 1)
    {
        let limit = 0.8 * joint.limits.velocity * ACTION_PERIOD;
        *value = (last + (*value - last).clamp(-limit, limit))
            .clamp(joint.limits.lower, joint.limits.upper);
    }
    target
}
