//! A policy that speaks of tool poses moves the simulated arm: URDF, conversion, scheduler, guard and physics.

use std::path::Path;
use std::time::Duration;

use nalgebra::{Isometry3, Translation3};
use sinew_benches::closed_loop::{LoopCase, play};
use sinew_drivers::sim::ArmDescription;
use sinew_runtime::action_space::{
    DeltaFrom, Frame, InJoints, JointMap, RotationKind, SpaceKeys, SpaceKind, StateKind, Tolerance,
};
use sinew_runtime::kinematics::{ArmModel, Pose, urdf};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, PrefixSupport,
    Progress, Stamp,
};

const HORIZON: usize = 16;
const DT: Duration = Duration::from_millis(50);
/// Time that the scripted way takes (s).
const LENGTH: f64 = 3.0;

fn model() -> ArmModel {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../launch/desk_arm.urdf");
    let joints: Vec<String> =
        ArmDescription::desk_arm().joints.into_iter().map(|j| j.name).collect();
    urdf::read(&file, &joints, None, "tip").expect("the shipped URDF is sound")
}

fn map(keys: SpaceKeys) -> JointMap {
    let arm = ArmDescription::desk_arm();
    let space = keys.resolve().expect("sound keys").expect("a space");
    let joints: Vec<String> = arm.joints.iter().map(|j| j.name.clone()).collect();
    let (limits, kinds) = (arm.limits(), arm.kinds());
    JointMap::new(space, Some(model()), &joints, &limits, &kinds, Tolerance::default())
        .expect("the URDF is of the desk arm")
}

fn keys(kind: SpaceKind, rotation: RotationKind) -> SpaceKeys {
    SpaceKeys {
        kind: Some(kind),
        rotation: Some(rotation),
        frame: Some(Frame::Base),
        delta_from: kind.is_delta().then_some(DeltaFrom::Observation),
        state: Some(StateKind::Pose),
        ..SpaceKeys::default()
    }
}

/// Leads the tip on a straight line from where it first sees it to a pose, and stays there.
struct Scripted {
    spec: PolicySpec,
    keys: SpaceKeys,
    goal: Isometry3<f64>,
    begin: Option<(Stamp, Isometry3<f64>)>,
    chunk: Option<ActionChunk>,
}

impl Scripted {
    fn new(map: &JointMap, keys: SpaceKeys, goal: Isometry3<f64>) -> Self {
        let spec = PolicySpec {
            cameras: Vec::new(),
            optional_cameras: 0,
            state_dim: map.state_dim(),
            action_dim: map.action_dim(),
            action_names: Vec::new(),
            action_horizon: HORIZON,
            action_rate_hz: Some(1.0 / DT.as_secs_f64()),
            denoise_steps: 1,
            prefix: PrefixSupport::default(),
        };
        Self { spec, keys, goal, begin: None, chunk: None }
    }

    fn rotation(&self) -> RotationKind {
        self.keys.rotation.expect("the keys say it")
    }
}

impl Policy for Scripted {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, request: &ChunkRequest) -> Result<(), PolicyError> {
        // Its state is a pose: position, rotation, gripper.
        let state = &seen.proprioception;
        let width = 3 + self.rotation().width();
        let turn = self.rotation().read(&state[3..width]).expect("the state has a rotation");
        let here = Isometry3::from_parts(Translation3::new(state[0], state[1], state[2]), turn);
        let (begun, from) = *self.begin.get_or_insert((seen.instant, here));
        let mut actions = Vec::new();
        for k in 0..HORIZON {
            let time = seen.instant.seconds_from(begun) + k as f64 * DT.as_secs_f64();
            let x = (time / LENGTH).clamp(0.0, 1.0);
            // Gently off and on: no jerk at either end.
            let at = from.lerp_slerp(&self.goal, x * x * x * (10.0 - 15.0 * x + 6.0 * x * x));
            let written = match self.keys.kind {
                Some(SpaceKind::EeDelta) => Isometry3::from_parts(
                    (at.translation.vector - here.translation.vector).into(),
                    at.rotation * here.rotation.inverse(),
                ),
                _ => at,
            };
            actions.extend(written.translation.vector.iter());
            self.rotation().write(&written.rotation, &mut actions);
            actions.push(state[width]);
        }
        let dim = self.spec.action_dim;
        self.chunk = ActionChunk::new(request.id, seen.instant, DT, dim, actions).ok();
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        Ok(Progress::Done)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        self.chunk.take().ok_or(PolicyError::OutOfTurn("nothing was begun"))
    }
}

#[test]
fn the_shipped_urdf_is_the_simulated_arm() {
    let (model, arm) = (model(), ArmDescription::desk_arm());
    for k in 0..50 {
        let joints = std::array::from_fn(|j| ((k * 7 + j * 3) as f64 * 0.37).sin());
        let hand = sinew_drivers::sim::kinematics::forward(&arm.geometry, &joints).hand;
        let tip = model.tip_at(&joints, &mut Pose::default());
        assert!((tip.to_homogeneous() - hand.to_homogeneous()).norm() < 1e-9);
    }
    for (joint, (lower, upper)) in arm.joints.iter().zip(&model.limits).take(5) {
        let limits = joint.limits;
        assert!((limits.lower - lower).abs() < 1e-5 && (limits.upper - upper).abs() < 1e-5);
    }
}

#[test]
fn a_scripted_pose_is_reached_within_a_millimetre() {
    // Above the table, to the left, the hand tilted and turned.
    let joints = [0.5, 0.0, 0.0, 0.9, 0.4, 0.5];
    let goal = model().tip_at(&joints, &mut Pose::default());
    assert!(goal.translation.vector.z > 0.1, "clear of the cubes: {}", goal.translation.vector);
    for (kind, rotation) in [
        (SpaceKind::EePose, RotationKind::SixD),
        (SpaceKind::EePose, RotationKind::Quaternion),
        (SpaceKind::EeDelta, RotationKind::AxisAngle),
    ] {
        let keys = keys(kind, rotation);
        let map = map(keys);
        let policy = Scripted::new(&map, keys, goal);
        let mut policy = InJoints::new(Box::new(policy), map).expect("its widths are the map's");
        let case = LoopCase {
            strategy: StrategyConfig::from_name("latest-only").expect("a known name"),
            execution_horizon: 8,
            latency: Duration::from_millis(60),
        };
        let mut commanded = Vec::new();
        let mut fastest = 0.0f64;
        let ending = play(&mut policy, &case, 3_000_000, None, &mut |step| {
            if let Some(command) = &step.cycle.command {
                let velocity = command.velocity.as_slice();
                fastest = velocity.iter().fold(fastest, |a, v| a.max(v.abs()));
                commanded = command.position.as_slice().to_vec();
            }
        })
        .expect("every pose is within reach");
        let apart = |joints: &[f64]| {
            let tip = model().tip_at(joints, &mut Pose::default());
            let turn: f64 = tip.rotation.angle_to(&goal.rotation);
            ((tip.translation.vector - goal.translation.vector).norm() * 1e3, turn.to_degrees())
        };
        let ((commanded, turned), (measured, _)) = (apart(&commanded), apart(&ending.joints));
        println!(
            "{kind:?} {rotation:?}: command {commanded:.3} mm, {turned:.3} deg; arm {measured:.3} mm"
        );
        assert!(commanded < 1.0 && turned < 0.5, "{kind:?}: {commanded} mm, {turned} deg");
        assert!(measured < 1.0, "{kind:?}: the arm stands {measured} mm away");
        assert!(fastest < 3.0, "no joint jumps: {fastest} rad/s");
    }
}
