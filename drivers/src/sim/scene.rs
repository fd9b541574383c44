//! What a seed decides: where cubes and bins lie, how the arm starts, light and camera jitter.

use nalgebra::{Isometry3, Point3, Translation3, UnitQuaternion, Vector3};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::description::ArmDescription;
use super::kinematics::{Joints, inverse_down};
use super::task::{BinSide, Colour, Task};

/// Half the edge of a cube (m).
pub const CUBE_HALF: f64 = 0.0125;
/// Half the inner width of a bin (m).
pub const BIN_HALF: f64 = 0.045;
/// Height of a bin's walls (m).
pub const BIN_WALL_HEIGHT: f64 = 0.03;
/// Thickness of a bin's walls (m).
pub const BIN_WALL: f64 = 0.004;
/// The gripper's value when it is open (rad): the fingers are 6 cm apart.
pub const GRIPPER_OPEN: f64 = 1.05;
/// The gripper's value when it is told to close (rad).
pub const GRIPPER_CLOSED: f64 = 0.0;

/// Cubes lie at least this far apart (m), so that the open fingers fit between them.
const CUBE_DISTANCE: f64 = 0.07;
/// Tip of the hand at the home pose (m): behind the cubes, so that the front camera sees them all.
const HOME_TIP: [f64; 3] = [0.15, 0.0, 0.14];

/// A cube as it lies at the start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CubeStart {
    /// Its colour.
    pub colour: Colour,
    /// Its pose (base frame).
    pub pose: Isometry3<f64>,
}

/// Light, tints and camera errors of one seed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// Direction to the light, a unit vector (base frame).
    pub light: Vector3<f64>,
    /// Share of the ambient light, 0 to 1.
    pub ambient: f64,
    /// Overall brightness, about 1.
    pub brightness: f64,
    /// The table's colour, 0 to 255.
    pub table: [f64; 3],
    /// Error of each camera's pose, in its own frame.
    pub camera: [Isometry3<f64>; 2],
}

/// Everything that a seed decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// The seed.
    pub seed: u64,
    /// The cubes, three of different colours.
    pub cubes: Vec<CubeStart>,
    /// The bins, left and right: centre on the table and yaw.
    pub bins: [Isometry3<f64>; 2],
    /// The joints at the start (rad).
    pub start: Joints,
    /// Light and cameras.
    pub look: Look,
    /// The seed's own task.
    pub task: Task,
    /// The seed's own phrase index.
    pub phrase: usize,
}

/// The home pose (rad): hand down above the table's near edge, gripper open.
pub fn home(arm: &ArmDescription) -> Joints {
    let [x, y, z] = HOME_TIP;
    inverse_down(&arm.geometry, &Point3::new(x, y, z), 0.0, GRIPPER_OPEN).unwrap_or([0.0; 6])
}

fn on_table(x: f64, y: f64, z: f64, yaw: f64) -> Isometry3<f64> {
    Isometry3::from_parts(
        Translation3::new(x, y, z),
        UnitQuaternion::from_axis_angle(&Vector3::z_axis(), yaw),
    )
}

fn cube_positions(random: &mut Pcg64) -> Vec<(f64, f64)> {
    let mut found: Vec<(f64, f64)> = Vec::new();
    while found.len() < 3 {
        // Three discs of 7 cm do not fit from every start, so a try is bounded.
        found.clear();
        for _ in 0..60 {
            let (x, y): (f64, f64) =
                (random.random_range(0.15..0.26), random.random_range(-0.09..0.09));
            let reachable = x.hypot(y) < 0.265;
            if reachable && found.iter().all(|c| (c.0 - x).hypot(c.1 - y) >= CUBE_DISTANCE) {
                found.push((x, y));
            }
            if found.len() == 3 {
                break;
            }
        }
    }
    found
}

fn look(random: &mut Pcg64) -> Look {
    let mut around = |spread: f64| random.random_range(-spread..spread);
    let light = Vector3::new(0.35 + around(0.25), around(0.45), 1.0).normalize();
    let ambient = 0.5 + around(0.06);
    let brightness = 1.0 + around(0.08);
    let tint = around(8.0);
    let table =
        [214.0 + tint + around(5.0), 208.0 + tint + around(5.0), 198.0 + tint + around(5.0)];
    let camera = [(); 2].map(|()| {
        Isometry3::new(
            Vector3::new(around(0.003), around(0.003), around(0.003)),
            Vector3::new(around(0.5), around(0.5), around(0.5)) * 1f64.to_radians(),
        )
    });
    Look { light, ambient, brightness, table, camera }
}

impl Scene {
    /// The scene of `seed`: the same one every time.
    pub fn from_seed(arm: &ArmDescription, seed: u64) -> Self {
        let mut random = Pcg64::seed_from_u64(seed);
        let absent = random.random_range(0..4usize);
        let positions = cube_positions(&mut random);
        let mut colours: Vec<Colour> =
            Colour::ALL.into_iter().filter(|c| c.index() != absent).collect();
        for last in (1..colours.len()).rev() {
            colours.swap(last, random.random_range(0..=last));
        }
        let cubes = colours.iter().zip(positions).map(|(&colour, (x, y))| {
            let yaw =
                random.random_range(-std::f64::consts::FRAC_PI_4..std::f64::consts::FRAC_PI_4);
            CubeStart { colour, pose: on_table(x, y, CUBE_HALF, yaw) }
        });
        let cubes: Vec<CubeStart> = cubes.collect();
        let bins = BinSide::ALL.map(|side| {
            let sign = if side == BinSide::Left { 1.0 } else { -1.0 };
            let angle = sign * random.random_range(60.0..70.0f64).to_radians();
            let radius = random.random_range(0.195..0.21);
            let yaw = random.random_range(-8.0..8.0f64).to_radians();
            on_table(radius * angle.cos(), radius * angle.sin(), 0.0, yaw)
        });
        let mut start = home(arm);
        for (value, joint) in start.iter_mut().zip(&arm.joints) {
            *value += random.random_range(-4.0..4.0f64).to_radians();
            *value = value.clamp(joint.limits.lower, joint.limits.upper);
        }
        let look = look(&mut random);
        let present: Vec<Colour> = cubes.iter().map(|c| c.colour).collect();
        let task = Task::draw(&mut random, &present, false, None, None);
        let phrase = random.random_range(0..8usize);
        Self { seed, cubes, bins, start, look, task, phrase }
    }

    /// Colours of the cubes that are present.
    pub fn colours(&self) -> Vec<Colour> {
        self.cubes.iter().map(|c| c.colour).collect()
    }
}

/// Whether `point` is inside the walls of the bin at `bin`, seen from above.
pub fn in_bin(bin: &Isometry3<f64>, point: &Point3<f64>) -> bool {
    let local = bin.inverse_transform_point(point);
    local.x.abs() < BIN_HALF && local.y.abs() < BIN_HALF
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubes_are_apart_reachable_and_of_different_colours() {
        let arm = ArmDescription::desk_arm();
        for seed in 0..200 {
            let scene = Scene::from_seed(&arm, seed);
            assert_eq!(scene, Scene::from_seed(&arm, seed));
            assert!(scene.colours().contains(&scene.task.colour()));
            for (i, a) in scene.cubes.iter().enumerate() {
                let at = a.pose.translation.vector;
                assert!(inverse_down(&arm.geometry, &at.into(), 0.0, 0.0).is_some());
                for b in &scene.cubes[..i] {
                    assert!(a.colour != b.colour);
                    assert!((at - b.pose.translation.vector).norm() >= CUBE_DISTANCE);
                }
            }
        }
    }
}
