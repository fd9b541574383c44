//! From what launch file and checkpoint say of a policy's actions to a map to the arm's joints.

use sinew_drivers::sim::ArmDescription;
use sinew_models::action_keys;
use sinew_runtime::action_space::{InJoints, JointMap, SpaceKind, StateKind};
use sinew_runtime::kinematics::urdf;
use sinew_runtime::{ActionKind, Policy};

use crate::launch_file::{Finding, LaunchConfig};

/// The map of the launch's policy; `None` when its actions are the arm's own.
///
/// # Errors
/// What contradicts itself or does not fit the arm.
pub(crate) fn joint_map(
    config: &LaunchConfig,
    description: &ArmDescription,
) -> Result<Option<JointMap>, Box<Finding>> {
    let settings = &config.policy.actions;
    // Where the policy runs on another computer, the launch file alone can say it.
    let keys = settings.keys.or(action_keys(&config.policy.file));
    let wrong = |key, value: String, problem: String, remedy: &str| {
        Box::new(config.finding(key, value, problem, remedy))
    };
    let space = match keys.resolve() {
        Ok(None) => return Ok(None),
        Ok(Some(space)) => space,
        Err(e) => {
            let name = keys.kind.map_or("", name_of);
            return Err(wrong(
                "policy.action_space",
                format!("\"{name}\""),
                e.to_string(),
                e.remedy,
            ));
        }
    };
    let value = format!("\"{}\"", name_of(space.kind));
    let joints: Vec<String> = description.joints.iter().map(|j| j.name.clone()).collect();
    if description.kinds().contains(&ActionKind::Delta) && space.kind != SpaceKind::JointPosition {
        let problem =
            "the arm's description calls joints' actions displacements already".to_owned();
        return Err(wrong("policy.action_space", value, problem, "leave one of them out"));
    }
    let mut arm = None;
    if let (Some(path), Some(tip)) = (&settings.urdf, &settings.tip) {
        let model = urdf::read(path, &joints, settings.base.as_deref(), tip).map_err(|e| {
            let value = format!("\"{}\"", path.display());
            wrong("policy.urdf", value, e.to_string(), "mend the file, or name other links")
        })?;
        arm = Some(sinew_runtime::kinematics::ArmModel { lever: settings.rotation_lever, ..model });
    } else if space.kind.is_pose() || space.state == StateKind::Pose {
        let problem = "poses of the tool need a kinematic model of the arm".to_owned();
        return Err(wrong("policy.action_space", value, problem, "name it with urdf and tip"));
    }
    let (limits, kinds) = (description.limits(), description.kinds());
    JointMap::new(space, arm, &joints, &limits, &kinds, settings.tolerance).map(Some).map_err(|e| {
        wrong("policy.action_space", value, e.to_string(), "see launch/reference.toml")
    })
}

/// `policy`, its actions turned into joint positions by `map`.
///
/// # Errors
/// What does not fit.
pub(crate) fn in_joints(
    policy: Box<dyn Policy>,
    map: Option<&JointMap>,
    config: &LaunchConfig,
) -> Result<Box<dyn Policy>, Box<Finding>> {
    let Some(map) = map else { return Ok(policy) };
    match InJoints::new(policy, map.clone()) {
        Ok(policy) => Ok(Box::new(policy)),
        Err(e) => {
            let value = format!("\"{}\"", map.space_name());
            let remedy = "say what its actions are with action_space, rotation and gripper, or choose a policy that \
                          was trained for this arm";
            Err(Box::new(config.finding("policy.action_space", value, e, remedy)))
        }
    }
}

fn name_of(kind: SpaceKind) -> &'static str {
    SpaceKind::ALL.into_iter().find(|s| s.1 == kind).map_or("", |s| s.0)
}
