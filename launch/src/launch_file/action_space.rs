//! What the policy's actions are, and the arm's kinematic model, in a launch file's `[policy]`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use sinew_runtime::action_space::{
    DeltaFrom, Frame, GripperKind, RotationKind, SpaceKeys, SpaceKind, StateKind, Tolerance,
};
use sinew_runtime::kinematics::ArmModel;
use sinew_runtime::units::{UnitError, parse_angle, parse_length};

use super::checker::Checker;
use super::schema::{self, Text};

/// The keys about actions; those that are left out the checkpoint may say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ActionSettings {
    /// What the values mean.
    pub keys: SpaceKeys,
    /// The kinematic model.
    pub urdf: Option<PathBuf>,
    /// The link that poses are written in; `None` for the model's root.
    pub base: Option<String>,
    /// The link that poses are of.
    pub tip: Option<String>,
    /// How far the nearest reachable pose may be.
    pub tolerance: Tolerance,
    /// A rotation error of one radian counts like a position error of this length (m).
    pub rotation_lever: f64,
}

pub(super) fn resolve(
    check: &mut Checker<'_>,
    policy: &schema::Policy,
    folder: &Path,
) -> ActionSettings {
    let keys = SpaceKeys {
        kind: named(check, "policy.action_space", &policy.action_space, &SpaceKind::ALL),
        frame: named(check, "policy.frame", &policy.frame, &Frame::ALL),
        rotation: named(check, "policy.rotation", &policy.rotation, &RotationKind::ALL),
        delta_from: named(check, "policy.delta_from", &policy.delta_from, &DeltaFrom::ALL),
        gripper: named(check, "policy.gripper", &policy.gripper, &GripperKind::ALL),
        gripper_range: policy.gripper_range.as_ref().map(|at| {
            check.note("policy.gripper_range", at);
            *at.get_ref()
        }),
        state: named(check, "policy.state", &policy.state, &StateKind::ALL),
    };
    let urdf = policy.urdf.as_ref().map(|at| {
        check.note("policy.urdf", at);
        folder.join(at.get_ref())
    });
    if let (Some(at), Some(path)) = (&policy.urdf, &urdf)
        && !path.is_file()
    {
        let remedy = "paths are relative to the launch file";
        check.report("policy.urdf", at, "there is no such file", remedy);
    }
    if let (Some(at), None) = (&policy.urdf, &policy.tip) {
        let remedy = "name the link that the policy's poses are of";
        check.report("policy.urdf", at, "has no `tip` beside it", remedy);
    }
    if let Some(at) = &policy.tip {
        check.note("policy.tip", at);
    }
    let standard = Tolerance::default();
    let tolerance = Tolerance {
        position: positive(check, "policy.refuse_distance", &policy.refuse_distance, parse_length)
            .unwrap_or(standard.position),
        rotation: positive(check, "policy.refuse_angle", &policy.refuse_angle, parse_angle)
            .unwrap_or(standard.rotation),
    };
    let lever = positive(check, "policy.rotation_lever", &policy.rotation_lever, parse_length);
    ActionSettings {
        keys,
        urdf,
        base: policy.base.as_ref().map(|b| b.get_ref().clone()),
        tip: policy.tip.as_ref().map(|t| t.get_ref().clone()),
        tolerance,
        rotation_lever: lever.unwrap_or(ArmModel::LEVER),
    }
}

/// The value that `at` names among `all`.
fn named<T: Copy>(
    check: &mut Checker<'_>,
    key: &'static str,
    at: &Option<Text>,
    all: &[(&'static str, T)],
) -> Option<T> {
    let at = at.as_ref()?;
    check.note(key, at);
    let names: Vec<&str> = all.iter().map(|a| a.0).collect();
    check.one_of(key, at, &names);
    all.iter().find(|a| a.0 == at.get_ref()).map(|a| a.1)
}

fn positive(
    check: &mut Checker<'_>,
    key: &str,
    at: &Option<Text>,
    parse: fn(&str) -> Result<f64, UnitError>,
) -> Option<f64> {
    let at = at.as_ref()?;
    match parse(at.get_ref()) {
        Ok(value) if value > 0.0 => return Some(value),
        Ok(_) => check.report(key, at, "must be above zero", ""),
        Err(problem) => check.report(key, at, problem, ""),
    }
    None
}
