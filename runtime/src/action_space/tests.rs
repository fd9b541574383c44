use std::time::Duration;

use nalgebra::{Isometry3, Matrix6, Translation3, Unit, UnitQuaternion, Vector3};
use proptest::prelude::*;

use super::convert::REACHED;
use super::*;
use crate::kinematics::{ArmModel, Chain, ChainJoint, Pose};
use crate::{
    ActionChunk, ActionKind, ChunkRequest, JointLimits, Observation, Policy, PolicyError,
    PolicySpec, Prefix, PrefixSupport, PrefixUse, Progress, Stamp,
};

const DT: Duration = Duration::from_millis(100);

/// An arm with six joints and a spherical wrist, and a gripper as the seventh.
fn arm() -> ArmModel {
    let joint = |index, z: f64, axis: Vector3<f64>| ChainJoint {
        origin: Isometry3::translation(0.0, 0.0, z),
        axis: Unit::new_normalize(axis),
        index,
    };
    let (y, z) = (Vector3::y(), Vector3::z());
    let joints = vec![
        joint(0, 0.0, z),
        joint(1, 0.12, y),
        joint(2, 0.2, y),
        joint(3, 0.1, z),
        joint(4, 0.1, y),
        joint(5, 0.05, z),
    ];
    ArmModel {
        chain: Chain::new(joints).expect("six joints"),
        tip: Isometry3::from_parts(
            Translation3::new(0.01, 0.0, 0.08),
            UnitQuaternion::from_axis_angle(&Vector3::x_axis(), 0.2),
        ),
        limits: vec![(-2.8, 2.8); 7],
        lever: ArmModel::LEVER,
    }
}

fn names() -> Vec<String> {
    (0..7).map(|k| format!("j{k}")).collect()
}

fn keys(kind: SpaceKind) -> SpaceKeys {
    SpaceKeys {
        kind: Some(kind),
        rotation: Some(RotationKind::SixD),
        delta_from: kind.is_delta().then_some(DeltaFrom::Previous),
        frame: Some(Frame::Base),
        gripper: Some(GripperKind::Continuous),
        ..SpaceKeys::default()
    }
}

fn map(keys: SpaceKeys) -> JointMap {
    let space = keys.resolve().expect("sound keys").expect("a space");
    let limit =
        JointLimits { lower: -2.8, upper: 2.8, velocity: 3.0, acceleration: 20.0, jerk: 400.0 };
    let mut limits = vec![limit; 7];
    limits[6] = JointLimits { lower: 0.0, upper: 1.0, ..limit };
    let mut kinds = vec![ActionKind::Position; 7];
    kinds[6] = ActionKind::Gripper;
    JointMap::new(space, Some(arm()), &names(), &limits, &kinds, Tolerance::default())
        .expect("an arm of its own")
}

/// A walk of `rows` small steps from `start`.
fn walk(start: [f64; 6], step: [f64; 6], rows: usize) -> (Vec<f64>, Vec<f64>) {
    let at = |k: f64| {
        let arm = start.iter().zip(step).map(move |(q, d)| q + d * k);
        arm.chain([0.5 + 0.02 * k]).collect::<Vec<f64>>()
    };
    let observed = at(0.0);
    (observed, (1..=rows).flat_map(|k| at(k as f64)).collect())
}

fn tip(joints: &[f64]) -> Isometry3<f64> {
    arm().tip_at(joints, &mut Pose::default())
}

fn apart(a: &Isometry3<f64>, b: &Isometry3<f64>) -> (f64, f64) {
    ((a.translation.vector - b.translation.vector).norm(), a.rotation.angle_to(&b.rotation))
}

/// How far from a singular pose: the least that the tip moves (m, and rotation times lever, per rad).
fn clearance(joints: &[f64]) -> f64 {
    let mut pose = Pose::default();
    let tip = arm().tip_at(joints, &mut pose);
    let columns = arm().jacobian(&pose, &tip);
    let mut matrix = Matrix6::from_columns(&columns[..6]);
    matrix.fixed_rows_mut::<3>(3).scale_mut(ArmModel::LEVER);
    matrix.singular_values().min()
}

proptest! {
    #[test]
    fn plans_go_to_the_policy_and_come_back(
        start in prop::array::uniform6(-1.2..1.2f64), step in prop::array::uniform6(-0.05..0.05f64),
        kind in 0..4usize, rotation in 0..5usize, frame in 0..2usize, from in 0..2usize
    ) {
        let (kind, delta) = (SpaceKind::ALL[kind].1, DeltaFrom::ALL[from].1);
        let frame = if kind == SpaceKind::EeDelta { Frame::ALL[frame].1 } else { Frame::Base };
        let map = map(SpaceKeys {
            rotation: Some(RotationKind::ALL[rotation].1),
            frame: Some(frame),
            delta_from: kind.is_delta().then_some(delta),
            ..keys(kind)
        });
        let (observed, plan) = walk(start, step, 5);
        let actions = map.to_actions(&plan, &observed).expect("finite");
        prop_assert_eq!(actions.len(), 5 * map.action_dim());
        let (back, reach) = map.to_joints(&actions, &observed, DT).expect("it came from joints");
        // Beside a stretched elbow another branch may be as near, and its wrist may then have to turn further than
        // it may: such rows come as near as they can, and those beyond what counts as reached are counted.
        let mut before = observed.clone();
        let (mut missed, mut held_once) = (0, false);
        for (k, (row, planned)) in back.chunks_exact(7).zip(plan.chunks_exact(7)).enumerate() {
            let range = map.range(k, DT);
            let held = (0..6).any(|joint| {
                let moved = (row[joint] - before[joint]).abs();
                moved > range[joint] - 1e-6 || row[joint].abs() > 2.8 - 1e-6
            });
            let (position, rotation) = apart(&tip(row), &tip(planned));
            prop_assert!(held || position < 1e-4 && rotation < 2e-3, "{position} m, {rotation} rad");
            held_once |= held;
            missed += usize::from(position > REACHED.0 || rotation > REACHED.1);
            prop_assert!((row[6] - planned[6]).abs() < 1e-9, "the gripper");
            before = row.to_vec();
        }
        prop_assert_eq!(reach.is_some(), kind.is_pose());
        prop_assert!(reach.is_none_or(|r| r.missed as usize == missed && r.poses == 5));
        prop_assert!(held_once || reach.is_none_or(|r| r.path_error < 5e-3));
    }

    #[test]
    fn steps_add_up_to_the_poses(
        start in prop::array::uniform6(-1.2..1.2f64), step in prop::array::uniform6(-0.05..0.05f64),
        frame in 0..2usize
    ) {
        // The same walk as poses, as steps and as displacements from the start gives the same joints, unless it
        // passes a singular pose: two branches are equally near there.
        let (observed, plan) = walk(start, step, 4);
        prop_assume!(observed.chunks(7).chain(plan.chunks(7)).all(|row| clearance(row) > 3e-3));
        let delta = |from| SpaceKeys { delta_from: Some(from), frame: Some(Frame::ALL[frame].1), ..keys(SpaceKind::EeDelta) };
        let all = [keys(SpaceKind::EePose), delta(DeltaFrom::Previous), delta(DeltaFrom::Observation)];
        let joints = all.map(|keys| {
            let map = map(keys);
            let actions = map.to_actions(&plan, &observed).expect("finite");
            map.to_joints(&actions, &observed, DT).expect("reachable").0
        });
        for other in &joints[1..] {
            for (a, b) in joints[0].iter().zip(other) {
                prop_assert!((a - b).abs() < 1e-4, "{a} {b}");
            }
        }
    }

    #[test]
    fn hostile_actions_are_refused_or_stay_near(
        values in prop::collection::vec(prop_oneof![prop::num::f64::ANY, -0.5..0.5f64], 10..31), kind in 0..4usize
    ) {
        let map = map(keys(SpaceKind::ALL[kind].1));
        let observed = [0.1, 0.3, 0.8, 0.0, 0.6, 0.0, 0.5];
        let width = map.action_dim();
        let values = &values[..values.len() / width * width];
        if let Ok((joints, _)) = map.to_joints(values, &observed, DT) {
            prop_assert!(joints.iter().all(|v| v.is_finite()));
            if map.space().kind.is_pose() {
                let rows = observed.chunks(7).chain(joints.chunks_exact(7));
                let rows: Vec<&[f64]> = rows.collect();
                for (k, pair) in rows.windows(2).enumerate() {
                    let most = 0.6 + if k == 0 { 0.3 } else { 0.0 } + 1e-9;
                    for (from, to) in pair[0].iter().zip(pair[1]).take(6) {
                        prop_assert!((to - from).abs() <= most);
                        prop_assert!(to.abs() <= 2.8);
                    }
                }
            }
        }
    }
}

#[test]
fn through_a_stretched_elbow_it_comes_as_near_as_the_wrist_turns() {
    // The elbow passes zero: bent the other way is nearer to the start, and its wrist runs into a singular pose.
    let start = [0.0, 0.0, -0.0135, 0.0, -0.3117, 0.0];
    let (observed, plan) = walk(start, [0.0, 0.0, 0.0445, 0.0491, 0.0215, 0.0], 5);
    let map = map(keys(SpaceKind::EePose));
    let actions = map.to_actions(&plan, &observed).expect("finite");
    let (back, reach) = map.to_joints(&actions, &observed, DT).expect("near enough");
    let (last, before) = (&back[28..], &back[21..28]);
    assert!(((last[3] - before[3]).abs() - map.range(4, DT)[3]).abs() < 1e-6, "the wrist's range");
    let (position, rotation) = apart(&tip(last), &tip(&plan[28..]));
    assert!((1e-4..1e-3).contains(&position) && rotation < 0.02, "{position} m, {rotation} rad");
    assert_eq!(reach.map(|r| r.missed), Some(0));
}

#[test]
fn what_cannot_be_reached_is_counted_and_beyond_the_tolerance_refused() {
    let map = map(keys(SpaceKind::EePose));
    let observed = [0.0, 0.6, 0.8, 0.0, 0.6, 0.0, 0.5];
    let mut action = map.to_actions(&observed, &observed).expect("finite");
    // 5 mm in 100 ms are near; a wall of 30 cm is not.
    action[0] += 0.005;
    let (_, reach) = map.to_joints(&action, &observed, DT).expect("near");
    assert_eq!(reach.map(|r| (r.poses, r.missed)), Some((1, 0)));
    let mut far = action.clone();
    far[0] += 0.8;
    let error = map.to_joints(&far, &observed, DT).expect_err("it is outside the arm's reach");
    assert!(matches!(error, ActionSpaceError::OutOfReach { row: 0, .. }), "{error}");
    // At the edge of the tolerance it goes to the nearest pose, and says so.
    let straight = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5];
    let mut up = map.to_actions(&straight, &straight).expect("finite");
    up[2] += 0.01;
    let (joints, reach) = map.to_joints(&up, &straight, DT).expect("1 cm is tolerated");
    let reach = reach.expect("poses");
    assert_eq!((reach.poses, reach.missed), (1, 1));
    assert!((reach.position_error - 0.01).abs() < 1e-3, "{reach:?}");
    assert!(apart(&tip(&joints), &tip(&straight)).0 < 2e-3, "stretched out is the nearest");
}

#[test]
fn errors_name_the_action() {
    let map = map(keys(SpaceKind::EePose));
    let observed = [0.0, 0.6, 0.8, 0.0, 0.6, 0.0, 0.5];
    let good = map.to_actions(&observed, &observed).expect("finite");
    let with = |at: usize, value: f64| {
        let mut actions = [good.clone(), good.clone()].concat();
        actions[10 + at] = value;
        map.to_joints(&actions, &observed, DT).map(|_| ())
    };
    assert_eq!(with(0, f64::NAN), Err(ActionSpaceError::NotFinite { row: 1 }));
    assert_eq!(with(9, f64::INFINITY), Err(ActionSpaceError::NotFinite { row: 1 }));
    let mut flat = [good.clone(), good.clone()].concat();
    flat[13..19].fill(0.0);
    let error = map.to_joints(&flat, &observed, DT);
    assert!(matches!(error, Err(ActionSpaceError::Rotation { row: 1, .. })), "{error:?}");
    assert!(map.to_joints(&good[..7], &observed, DT).is_err(), "another width");
    assert!(map.to_joints(&good, &observed[..6], DT).is_err(), "another arm");
    assert!(map.to_joints(&good, &[f64::NAN; 7], DT).is_err());
    let mut plan = observed;
    plan[2] = f64::NAN;
    assert_eq!(map.to_actions(&plan, &observed), Err(ActionSpaceError::NotFinite { row: 0 }));
}

/// Says back, as its chunk, its own proprioception and then its prefix.
struct Echo {
    spec: PolicySpec,
    chunk: Option<ActionChunk>,
}

impl Echo {
    fn new(map: &JointMap) -> Self {
        let spec = PolicySpec {
            cameras: Vec::new(),
            optional_cameras: 0,
            state_dim: map.state_dim(),
            action_dim: map.action_dim(),
            action_names: Vec::new(),
            action_horizon: 3,
            action_rate_hz: Some(10.0),
            denoise_steps: 1,
            prefix: PrefixSupport { guided: true, trained: None, warm_start: true },
        };
        Self { spec, chunk: None }
    }
}

impl Policy for Echo {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, request: &ChunkRequest) -> Result<(), PolicyError> {
        let mut actions = seen.proprioception.clone();
        actions.extend(request.prefix.iter().flat_map(|p| p.actions.iter().copied()));
        let dim = self.spec.action_dim;
        self.chunk = ActionChunk::new(request.id, seen.instant, self.spec.dt(), dim, actions).ok();
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
fn a_wrapped_policy_hears_poses_and_its_poses_become_joints() {
    let map = map(SpaceKeys { state: Some(StateKind::Pose), ..keys(SpaceKind::EePose) });
    let mut policy =
        InJoints::new(Box::new(Echo::new(&map)), map.clone()).expect("its widths are the map's");
    assert_eq!((policy.spec().action_dim, policy.spec().state_dim), (7, 7));
    assert_eq!(policy.spec().action_names, names());
    let (observed, plan) = walk([0.1, 0.6, 0.8, 0.0, 0.6, 0.0], [0.02; 6], 2);
    let seen = Observation {
        instant: Stamp(5),
        images: Vec::new(),
        proprioception: observed.clone(),
        proprioception_age: Duration::ZERO,
        instruction: String::new(),
    };
    let prefix = Prefix {
        actions: plan.clone(),
        dim: 7,
        frozen: 1,
        horizon: 2,
        usage: PrefixUse::WarmStart { time: 0.5 },
    };
    let request = ChunkRequest { id: 3, prefix: Some(prefix), ..ChunkRequest::default() };
    let chunk = crate::inference::run(&mut policy, &seen, &request).expect("an echo");
    assert_eq!((chunk.request, chunk.instant, chunk.dim(), chunk.horizon()), (3, Stamp(5), 7, 3));
    assert!(chunk.report.reach.is_some_and(|r| r.poses == 3 && r.missed == 0));
    let expected = [observed, plan].concat();
    for (a, b) in chunk.values().iter().zip(&expected) {
        assert!((a - b).abs() < 1e-4, "{:?} {expected:?}", chunk.values());
    }
    // Another width than the arm's is refused, before anything is computed.
    let short = Observation { proprioception: vec![0.0; 3], ..seen };
    assert!(policy.begin(&short, &ChunkRequest::default()).is_err());
    let mut foreign = Echo::new(&map);
    foreign.spec.action_dim = 4;
    assert!(InJoints::new(Box::new(foreign), map).is_err());
}

#[test]
fn an_old_observation_is_where_its_displacements_count_from() {
    let map =
        map(SpaceKeys { delta_from: Some(DeltaFrom::Observation), ..keys(SpaceKind::JointDelta) });
    let mut policy = InJoints::new(Box::new(Echo::new(&map)), map).expect("seven joints");
    let seen = |value: f64| Observation {
        instant: Stamp(0),
        images: Vec::new(),
        proprioception: vec![value; 7],
        proprioception_age: Duration::from_secs(1),
        instruction: String::new(),
    };
    let first = crate::inference::run(&mut policy, &seen(0.2), &ChunkRequest::default());
    let second = crate::inference::run(&mut policy, &seen(0.3), &ChunkRequest::default());
    // The echo's action is the state itself: displaced from the state it is twice that.
    assert_eq!(first.expect("an echo").values()[..6], [0.4; 6]);
    assert_eq!(second.expect("an echo").values()[..6], [0.6; 6]);
}

#[test]
fn the_map_is_kept_with_a_recording() {
    let map = map(keys(SpaceKind::EeDelta));
    let text = serde_json::to_string(&map).expect("plain numbers");
    assert_eq!(serde_json::from_str::<JointMap>(&text).expect("its own text"), map);
}
