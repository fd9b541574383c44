//! The physics: arm, gripper, cubes, bins and table on a virtual clock.
//!
//! The links and the palm with its fixed finger are kinematic and follow the servos. The moving jaw is
//! a dynamic body on a prismatic joint with a force-limited motor, so the squeezing force is bounded
//! and the gripper's measured position is the jaw's true one. The arm does not feel the cubes; at the
//! table its servos stall.

use nalgebra::{Isometry3, Point3, Quaternion, Translation3, UnitQuaternion};
use rapier3d::prelude::*;

use super::description::{ArmDescription, JOINTS};
use super::kinematics::{ArmFrames, Joints, forward};
use super::scene::{BIN_HALF, BIN_WALL, BIN_WALL_HEIGHT, CUBE_HALF, Scene};
use super::servo::Servo;
use super::task::Colour;

/// Length of one physics step (s).
pub const PHYSICS_STEP: f64 = 0.002;
/// Physics steps from one command to the next: 100 commands a second.
pub const STEPS_PER_COMMAND: usize = 5;
/// Half sizes (m) of a finger: across, thickness, length.
pub const FINGER_HALF: [f64; 3] = [0.009, 0.005, 0.031];
/// The fingertips stay this far above the table (m).
const TABLE_MARGIN: f64 = 0.0015;
/// Friction of the finger pads.
const PAD_FRICTION: f32 = 1.6;
/// Friction of cubes, table and bins.
const FRICTION: f32 = 0.6;
/// Density of the cubes (kg/m³): 20 g a cube.
const CUBE_DENSITY: f32 = 1280.0;
/// Stiffness (N/m) and damping (N s/m) of the jaw's motor.
const JAW_MOTOR: (f32, f32) = (2500.0, 25.0);
/// Mass of the jaw (kg).
const JAW_MASS: f32 = 0.05;

const GROUP_FIXED: Group = Group::GROUP_1;
const GROUP_CUBE: Group = Group::GROUP_2;
const GROUP_ARM: Group = Group::GROUP_3;

/// A cube's present state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CubeState {
    /// Its colour.
    pub colour: Colour,
    /// Its pose (base frame).
    pub pose: Isometry3<f64>,
    /// Its speed (m/s).
    pub speed: f64,
    /// The fixed finger touches it.
    pub at_finger: bool,
    /// The moving jaw touches it.
    pub at_jaw: bool,
}

impl CubeState {
    /// Its centre (m, base frame).
    pub fn centre(&self) -> Point3<f64> {
        self.pose.translation.vector.into()
    }

    /// Whether the gripper holds it: both fingers touch it.
    pub fn held(&self) -> bool {
        self.at_finger && self.at_jaw
    }
}

/// All poses of one instant: what cameras and judges see.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Virtual time since the start (s).
    pub time: f64,
    /// Measured joint positions (rad); the gripper's is the jaw's true one.
    pub joints: Joints,
    /// Measured joint velocities (rad/s).
    pub velocities: Joints,
    /// The last command (rad).
    pub command: Joints,
    /// The links' poses.
    pub frames: ArmFrames,
    /// The jaw's pose: its inner face at the fingertips.
    pub jaw: Isometry3<f64>,
    /// The cubes.
    pub cubes: Vec<CubeState>,
}

impl Snapshot {
    /// The point midway between the two fingertips (m, base frame).
    pub fn fingertips(&self, arm: &ArmDescription) -> Point3<f64> {
        let offset = -arm.geometry.finger_offset
            + 0.5 * self.joints[JOINTS - 1] * arm.geometry.pinion_radius;
        self.frames.hand * Point3::new(0.0, offset, 0.0)
    }

    /// The cube of `colour`, when present.
    pub fn cube(&self, colour: Colour) -> Option<&CubeState> {
        self.cubes.iter().find(|c| c.colour == colour)
    }
}

/// The simulated world of one scene.
pub struct World {
    arm: ArmDescription,
    scene: Scene,
    time_steps: u64,
    servos: Vec<Servo>,
    torque: bool,
    command: Joints,
    gripper: (f64, f64),
    physics: Physics,
}

struct Physics {
    world: PhysicsWorld,
    links: [RigidBodyHandle; 3],
    jaw: RigidBodyHandle,
    jaw_joint: ImpulseJointHandle,
    finger_collider: ColliderHandle,
    jaw_collider: ColliderHandle,
    cubes: Vec<(Colour, RigidBodyHandle, ColliderHandle)>,
}

fn to_pose(from: &Isometry3<f64>) -> Pose {
    let (t, r) = (from.translation.vector, from.rotation.quaternion());
    Pose::from_parts(
        Vector::new(t.x as f32, t.y as f32, t.z as f32),
        Rotation::from_xyzw(r.i as f32, r.j as f32, r.k as f32, r.w as f32),
    )
}

fn from_pose(from: &Pose) -> Isometry3<f64> {
    let (t, r) = (from.translation, from.rotation);
    Isometry3::from_parts(
        Translation3::new(f64::from(t.x), f64::from(t.y), f64::from(t.z)),
        UnitQuaternion::from_quaternion(Quaternion::new(
            f64::from(r.w),
            f64::from(r.x),
            f64::from(r.y),
            f64::from(r.z),
        )),
    )
}

fn cuboid(half: [f64; 3]) -> ColliderBuilder {
    ColliderBuilder::cuboid(half[0] as f32, half[1] as f32, half[2] as f32)
}

fn groups(own: Group, others: Group) -> InteractionGroups {
    InteractionGroups::new(own, others, InteractionTestMode::And)
}

/// Half sizes and centres (m, in the bin's frame) of a bin's four walls.
pub fn bin_walls() -> [([f64; 3], [f64; 3]); 4] {
    let (outer, half, height) = (BIN_HALF + BIN_WALL, BIN_WALL / 2.0, BIN_WALL_HEIGHT / 2.0);
    let at = BIN_HALF + half;
    [
        ([half, outer, height], [at, 0.0, height]),
        ([half, outer, height], [-at, 0.0, height]),
        ([BIN_HALF, half, height], [0.0, at, height]),
        ([BIN_HALF, half, height], [0.0, -at, height]),
    ]
}

impl Physics {
    fn new(arm: &ArmDescription, scene: &Scene, frames: &ArmFrames) -> Self {
        let mut world = PhysicsWorld::new();
        world.gravity = Vector::new(0.0, 0.0, -9.81);
        let parameters = &mut world.integration_parameters;
        parameters.dt = PHYSICS_STEP as f32;
        // Lengths that the engine takes for small are those of a cube, not of a metre.
        parameters.length_unit = 0.05;
        parameters.num_solver_iterations = 4;
        // The engine's contacts are springs scaled by the bodies' mass. At its own 30 Hz the jaw would
        // press a cube of 20 g flat: 4 N into it give 6 mm.
        parameters.contact_softness.natural_frequency = 200.0;

        let fixed = groups(GROUP_FIXED, GROUP_CUBE);
        let ground = world.insert_body(RigidBodyBuilder::fixed());
        let table = cuboid([0.6, 0.6, 0.05]).translation(Vector::new(0.2, 0.0, -0.05));
        world.insert_collider(table.friction(FRICTION).collision_groups(fixed), Some(ground));
        for bin in &scene.bins {
            let body = world.insert_body(RigidBodyBuilder::fixed().pose(to_pose(bin)));
            for (half, [x, y, z]) in bin_walls() {
                let wall = cuboid(half).translation(Vector::new(x as f32, y as f32, z as f32));
                world.insert_collider(wall.friction(FRICTION).collision_groups(fixed), Some(body));
            }
        }

        let cubes = scene.cubes.iter().map(|cube| {
            let body = RigidBodyBuilder::dynamic()
                .pose(to_pose(&cube.pose))
                .additional_solver_iterations(4)
                .can_sleep(false);
            let body = world.insert_body(body);
            let shape = cuboid([CUBE_HALF; 3])
                .density(CUBE_DENSITY)
                .friction(FRICTION)
                .collision_groups(groups(GROUP_CUBE, Group::ALL));
            (cube.colour, body, world.insert_collider(shape, Some(body)))
        });
        let cubes: Vec<_> = cubes.collect();

        let touching = groups(GROUP_ARM, GROUP_CUBE);
        let mut kinematic = |frame: &Isometry3<f64>| {
            world.insert_body(RigidBodyBuilder::kinematic_position_based().pose(to_pose(frame)))
        };
        let links =
            [kinematic(&frames.upper_arm), kinematic(&frames.forearm), kinematic(&frames.hand)];
        let g = &arm.geometry;
        for (body, length) in [(links[0], g.upper_arm), (links[1], g.forearm)] {
            let shape = cuboid([0.015, 0.018, length / 2.0]).translation(Vector::new(
                0.0,
                0.0,
                length as f32 / 2.0,
            ));
            world.insert_collider(shape.collision_groups(touching), Some(body));
        }
        let palm = cuboid([0.018, 0.045, 0.014]).translation(Vector::new(0.0, 0.0, -0.075));
        world.insert_collider(palm.collision_groups(touching), Some(links[2]));
        let pad = |y: f64| {
            cuboid(FINGER_HALF)
                .translation(Vector::new(0.0, y as f32, 0.001 - FINGER_HALF[2] as f32))
                .friction(PAD_FRICTION)
                .friction_combine_rule(CoefficientCombineRule::Max)
                .collision_groups(touching)
        };
        let finger_y = -g.finger_offset - FINGER_HALF[1];
        let finger_collider = world.insert_collider(pad(finger_y), Some(links[2]));

        let opening = scene.start[JOINTS - 1] * g.pinion_radius;
        let jaw_pose = frames.hand * Translation3::new(0.0, opening - g.finger_offset, 0.0);
        let jaw = RigidBodyBuilder::dynamic()
            .pose(to_pose(&jaw_pose))
            .gravity_scale(0.0)
            .additional_solver_iterations(4)
            .can_sleep(false);
        let jaw = world.insert_body(jaw);
        let jaw_collider = world.insert_collider(pad(FINGER_HALF[1]).mass(JAW_MASS), Some(jaw));
        let travel = (arm.joints[JOINTS - 1].limits.upper * g.pinion_radius) as f32;
        let joint = PrismaticJointBuilder::new(Vector::Y)
            .local_anchor1(Vector::new(0.0, -g.finger_offset as f32, 0.0))
            .local_anchor2(Vector::ZERO)
            .limits([0.0, travel])
            .motor_model(MotorModel::ForceBased)
            .motor_position(opening as f32, JAW_MOTOR.0, JAW_MOTOR.1)
            .motor_max_force((arm.joints[JOINTS - 1].torque / g.pinion_radius) as f32)
            .contacts_enabled(false);
        let jaw_joint = world.insert_impulse_joint(links[2], jaw, joint);
        Self { world, links, jaw, jaw_joint, finger_collider, jaw_collider, cubes }
    }

    fn touches(&self, a: ColliderHandle, b: ColliderHandle) -> bool {
        let pair = self.world.narrow_phase.contact_pair(a, b);
        pair.is_some_and(|pair| pair.has_any_active_contact())
    }

    fn pose(&self, body: RigidBodyHandle) -> Isometry3<f64> {
        from_pose(self.world.bodies[body].position())
    }
}

impl World {
    /// The world of `scene` at time zero.
    pub fn new(arm: &ArmDescription, scene: Scene) -> Self {
        let servos = arm.joints.iter().zip(scene.start);
        let servos = servos.map(|(joint, start)| Servo::new(joint, start, PHYSICS_STEP)).collect();
        let frames = forward(&arm.geometry, &scene.start);
        let physics = Physics::new(arm, &scene, &frames);
        let (command, gripper) = (scene.start, (scene.start[JOINTS - 1], 0.0));
        Self {
            arm: arm.clone(),
            scene,
            time_steps: 0,
            servos,
            torque: true,
            command,
            gripper,
            physics,
        }
    }

    /// The arm.
    pub fn arm(&self) -> &ArmDescription {
        &self.arm
    }

    /// The scene that it started from.
    pub fn scene(&self) -> &Scene {
        &self.scene
    }

    /// Virtual time since the start (s).
    pub fn time(&self) -> f64 {
        self.time_steps as f64 * PHYSICS_STEP
    }

    /// The last command (rad).
    pub fn command(&self) -> &Joints {
        &self.command
    }

    /// Sets the servos' targets (rad); values that are no numbers leave theirs as they are.
    pub fn set_command(&mut self, command: &Joints) {
        for ((target, new), joint) in self.command.iter_mut().zip(command).zip(&self.arm.joints) {
            if new.is_finite() {
                *target = new.clamp(joint.limits.lower, joint.limits.upper);
            }
        }
    }

    /// Takes the torque off every servo: the joints coast to rest.
    pub fn torque_off(&mut self) {
        self.servos.iter_mut().for_each(|servo| servo.set_torque(false));
        self.torque = false;
    }

    /// Holds the arm where it is, with torque: the targets become the present positions.
    pub fn hold(&mut self) {
        if !std::mem::replace(&mut self.torque, true) {
            self.servos.iter_mut().for_each(|servo| servo.set_torque(true));
        }
        let mut present: Joints = self.servo_positions();
        // The gripper keeps squeezing: its target is behind its position while it holds a cube.
        present[JOINTS - 1] = self.command[JOINTS - 1];
        self.set_command(&present);
    }

    fn servo_positions(&self) -> Joints {
        let mut out = [0.0; JOINTS];
        for (value, servo) in out.iter_mut().zip(&self.servos) {
            *value = servo.position();
        }
        out
    }

    /// Measured joint positions (rad).
    pub fn joints(&self) -> Joints {
        let mut out = self.servo_positions();
        out[JOINTS - 1] = self.gripper.0;
        out
    }

    /// Measured joint velocities (rad/s).
    pub fn velocities(&self) -> Joints {
        let mut out = [0.0; JOINTS];
        for (value, servo) in out.iter_mut().zip(&self.servos) {
            *value = servo.velocity();
        }
        out[JOINTS - 1] = self.gripper.1;
        out
    }

    /// Advances by [`PHYSICS_STEP`].
    pub fn step(&mut self) {
        let before = self.servo_positions();
        for (servo, target) in self.servos.iter_mut().zip(self.command) {
            servo.step(target, PHYSICS_STEP);
        }
        let mut frames = forward(&self.arm.geometry, &self.servo_positions());
        let tip = frames.hand.translation.z;
        let old = forward(&self.arm.geometry, &before);
        if tip < TABLE_MARGIN && tip < old.hand.translation.z {
            for (servo, position) in self.servos.iter_mut().zip(before).take(JOINTS - 1) {
                servo.stall(position);
            }
            frames = old;
        }
        let physics = &mut self.physics;
        let [upper_arm, forearm, hand] = physics.links;
        for (body, frame) in
            [(upper_arm, &frames.upper_arm), (forearm, &frames.forearm), (hand, &frames.hand)]
        {
            physics.world.bodies[body].set_next_kinematic_position(to_pose(frame));
        }
        let opening = self.servos[JOINTS - 1].position() * self.arm.geometry.pinion_radius;
        if let Some(joint) = physics.world.impulse_joints.get_mut(physics.jaw_joint, true) {
            let (stiffness, damping) = JAW_MOTOR;
            joint.data.set_motor_position(JointAxis::LinX, opening as f32, stiffness, damping);
        }
        physics.world.step();
        let local = frames.hand.inv_mul(&physics.pose(physics.jaw)).translation.y;
        let gripper = (local + self.arm.geometry.finger_offset) / self.arm.geometry.pinion_radius;
        self.gripper = (gripper, (gripper - self.gripper.0) / PHYSICS_STEP);
        self.time_steps += 1;
    }

    /// All poses of the present instant.
    pub fn snapshot(&self) -> Snapshot {
        let physics = &self.physics;
        let cubes = physics.cubes.iter().map(|&(colour, body, collider)| CubeState {
            colour,
            pose: physics.pose(body),
            speed: f64::from(physics.world.bodies[body].linvel().length()),
            at_finger: physics.touches(collider, physics.finger_collider),
            at_jaw: physics.touches(collider, physics.jaw_collider),
        });
        Snapshot {
            time: self.time(),
            joints: self.joints(),
            velocities: self.velocities(),
            command: self.command,
            frames: forward(&self.arm.geometry, &self.servo_positions()),
            jaw: physics.pose(physics.jaw),
            cubes: cubes.collect(),
        }
    }
}
