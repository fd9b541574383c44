//! What a policy's actions are, as checkpoints and launch files say it.

use serde::{Deserialize, Serialize};

use super::RotationKind;

/// What an action's values mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpaceKind {
    /// One position a joint (rad).
    #[default]
    JointPosition,
    /// One displacement a joint (rad).
    JointDelta,
    /// Position (m) and rotation of the tip in the base frame, then the grippers.
    EePose,
    /// Displacement (m) and turn of the tip, then the grippers.
    EeDelta,
}

impl SpaceKind {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 4] = [
        ("joint_position", Self::JointPosition),
        ("joint_delta", Self::JointDelta),
        ("ee_pose", Self::EePose),
        ("ee_delta", Self::EeDelta),
    ];

    /// True for poses of the tip: they need a kinematic model.
    pub fn is_pose(self) -> bool {
        matches!(self, Self::EePose | Self::EeDelta)
    }

    /// True for displacements.
    pub fn is_delta(self) -> bool {
        matches!(self, Self::JointDelta | Self::EeDelta)
    }
}

/// The frame that a displacement of the tip is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frame {
    /// The base's axes: `p + Δp`, `ΔR · R`.
    #[default]
    Base,
    /// The tip's own axes: `p + R · Δp`, `R · ΔR`.
    Tool,
}

impl Frame {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 2] = [("base", Self::Base), ("tool", Self::Tool)];
}

/// What a displacement counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeltaFrom {
    /// The measured state at the observation's instant, for every action of the chunk.
    Observation,
    /// The target of the action before; the first counts from the observation's measured state.
    Previous,
}

impl DeltaFrom {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 2] =
        [("observation", Self::Observation), ("previous", Self::Previous)];
}

/// How the grippers' values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GripperKind {
    /// The jaw's angle (rad).
    #[default]
    Joint,
    /// From the range's first value, closed, to its second, open.
    Continuous,
    /// From the range's first value, open, to its second, closed.
    Inverted,
    /// Open above the middle of the range, else closed.
    Switch,
    /// Closed above the middle of the range, else open.
    SwitchInverted,
}

impl GripperKind {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 5] = [
        ("joint", Self::Joint),
        ("continuous", Self::Continuous),
        ("inverted", Self::Inverted),
        ("switch", Self::Switch),
        ("switch_inverted", Self::SwitchInverted),
    ];

    /// The jaw's angle (rad) in `jaw` (closed, open) that `value` of `range` asks for.
    pub fn angle(self, value: f64, range: [f64; 2], jaw: (f64, f64)) -> f64 {
        let share = ((value - range[0]) / (range[1] - range[0])).clamp(0.0, 1.0);
        let open = match self {
            Self::Joint => return value,
            Self::Continuous => share,
            Self::Inverted => 1.0 - share,
            Self::Switch => f64::from(share > 0.5),
            Self::SwitchInverted => f64::from(share <= 0.5),
        };
        jaw.0 + (jaw.1 - jaw.0) * open
    }

    /// The value in `range` that asks for the jaw's `angle` (rad); a switch's is one of the range's ends.
    pub fn value(self, angle: f64, range: [f64; 2], jaw: (f64, f64)) -> f64 {
        let open = ((angle - jaw.0) / (jaw.1 - jaw.0)).clamp(0.0, 1.0);
        let share = match self {
            Self::Joint => return angle,
            Self::Continuous => open,
            Self::Inverted => 1.0 - open,
            Self::Switch => f64::from(open > 0.5),
            Self::SwitchInverted => f64::from(open <= 0.5),
        };
        range[0] + (range[1] - range[0]) * share
    }
}

/// What the policy's proprioception is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    /// One position a joint (rad), in the arm's order.
    #[default]
    Joints,
    /// Position (m) and rotation of the tip, then the grippers, written like the actions.
    Pose,
}

impl StateKind {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 2] = [("joints", Self::Joints), ("pose", Self::Pose)];
}

/// What is said of a policy's actions, every key on its own: a checkpoint says some, a launch file may say others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpaceKeys {
    /// What the values mean.
    pub kind: Option<SpaceKind>,
    /// The frame of the tip's displacements.
    pub frame: Option<Frame>,
    /// How rotations are written.
    pub rotation: Option<RotationKind>,
    /// What displacements count from.
    pub delta_from: Option<DeltaFrom>,
    /// How grippers are written.
    pub gripper: Option<GripperKind>,
    /// The values of a closed and an open gripper (inverted: open, closed).
    pub gripper_range: Option<[f64; 2]>,
    /// What the proprioception is.
    pub state: Option<StateKind>,
}

/// A key that makes no action space, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{key} {problem}")]
pub struct SpaceKeyError {
    /// The key.
    pub key: &'static str,
    /// What is wrong.
    pub problem: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

/// What a policy's actions and states are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ActionSpace {
    /// What the values mean.
    pub kind: SpaceKind,
    /// The frame of the tip's displacements.
    pub frame: Frame,
    /// How rotations are written.
    pub rotation: RotationKind,
    /// What displacements count from; absolute spaces do not ask.
    pub delta_from: DeltaFrom,
    /// How grippers are written.
    pub gripper: GripperKind,
    /// The values of a closed and an open gripper (inverted: open, closed).
    pub gripper_range: [f64; 2],
    /// What the proprioception is.
    pub state: StateKind,
}

impl SpaceKeys {
    /// These keys, and those of `others` where none is here.
    pub fn or(self, others: Self) -> Self {
        Self {
            kind: self.kind.or(others.kind),
            frame: self.frame.or(others.frame),
            rotation: self.rotation.or(others.rotation),
            delta_from: self.delta_from.or(others.delta_from),
            gripper: self.gripper.or(others.gripper),
            gripper_range: self.gripper_range.or(others.gripper_range),
            state: self.state.or(others.state),
        }
    }

    /// The action space that the keys say; `None` when they say nothing: joint positions, as the robot has them.
    ///
    /// What cannot be guessed must be said: a frame and what displacements count from.
    ///
    /// # Errors
    /// [`SpaceKeyError`] for a key that is missing or contradicts another.
    pub fn resolve(self) -> Result<Option<ActionSpace>, SpaceKeyError> {
        if self == Self::default() {
            return Ok(None);
        }
        let error = |key, problem, remedy| Err(SpaceKeyError { key, problem, remedy });
        let kind = self.kind.unwrap_or_default();
        let range = self.gripper_range.unwrap_or([0.0, 1.0]);
        if kind == SpaceKind::EeDelta && self.frame.is_none() {
            return error("frame", "is missing", "say base or tool: the axes of the displacements");
        }
        if kind == SpaceKind::EePose && self.frame == Some(Frame::Tool) {
            let remedy = "a pose relative to the tool at the observation is ee_delta with \
                          delta_from = \"observation\"";
            return error("frame", "of an absolute pose is the base", remedy);
        }
        if kind.is_delta() && self.delta_from.is_none() {
            let remedy =
                "say observation (all from the state seen) or previous (each from the one before)";
            return error("delta_from", "is missing", remedy);
        }
        if kind.is_pose() && self.rotation.is_none() {
            let remedy = "say axis_angle, 6d, quaternion, quaternion_wxyz, rpy or none";
            return error("rotation", "is missing", remedy);
        }
        let apart = (range[1] - range[0]).abs();
        if !(apart > 1e-6 && apart < 1e6 && range[0].is_finite()) {
            return error("gripper_range", "has no two ends", "write it like [0.0, 1.0]");
        }
        Ok(Some(ActionSpace {
            kind,
            frame: self.frame.unwrap_or_default(),
            rotation: self.rotation.unwrap_or_default(),
            delta_from: self.delta_from.unwrap_or(DeltaFrom::Observation),
            gripper: self.gripper.unwrap_or_default(),
            gripper_range: range,
            state: self.state.unwrap_or_default(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_guessed_must_be_said() {
        let keys = |kind| SpaceKeys { kind: Some(kind), ..SpaceKeys::default() };
        let missing = |keys: SpaceKeys| keys.resolve().expect_err("a key is missing").key;
        assert_eq!(SpaceKeys::default().resolve(), Ok(None));
        assert!(keys(SpaceKind::JointPosition).resolve().is_ok());
        assert_eq!(missing(keys(SpaceKind::EeDelta)), "frame");
        assert_eq!(missing(keys(SpaceKind::JointDelta)), "delta_from");
        assert_eq!(missing(keys(SpaceKind::EePose)), "rotation");
        let tool = SpaceKeys { frame: Some(Frame::Tool), ..keys(SpaceKind::EePose) };
        assert_eq!(missing(tool), "frame");
        for range in [[1.0, 1.0], [f64::NAN, 1.0], [0.0, f64::INFINITY]] {
            let keys = SpaceKeys { gripper_range: Some(range), ..SpaceKeys::default() };
            assert_eq!(missing(keys), "gripper_range");
        }
        // The launch file's word comes before the checkpoint's.
        let own = SpaceKeys { frame: Some(Frame::Tool), ..SpaceKeys::default() };
        let theirs = SpaceKeys {
            frame: Some(Frame::Base),
            delta_from: Some(DeltaFrom::Previous),
            rotation: Some(RotationKind::Rpy),
            ..keys(SpaceKind::EeDelta)
        };
        let space = own.or(theirs).resolve().expect("all is said").expect("a space");
        assert_eq!((space.frame, space.delta_from), (Frame::Tool, DeltaFrom::Previous));
    }

    #[test]
    fn names_are_those_that_serde_reads() {
        fn check<T: Serialize>(all: &[(&str, T)]) {
            for (name, value) in all {
                let written = serde_json::to_string(value).expect("a name");
                assert_eq!(written, format!("\"{name}\""));
            }
        }
        check(&SpaceKind::ALL);
        check(&Frame::ALL);
        check(&DeltaFrom::ALL);
        check(&GripperKind::ALL);
        check(&StateKind::ALL);
        check(&RotationKind::ALL);
    }

    #[test]
    fn grippers_open_and_close_whichever_way_they_are_written() {
        let (jaw, range) = ((-0.1, 1.1), [-1.0, 1.0]);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(GripperKind::Continuous.angle(0.0, range, jaw), 0.5);
        close(GripperKind::Continuous.angle(7.0, range, jaw), 1.1);
        close(GripperKind::Inverted.angle(1.0, range, jaw), -0.1);
        close(GripperKind::Switch.angle(0.1, range, jaw), 1.1);
        close(GripperKind::SwitchInverted.angle(0.1, range, jaw), -0.1);
        close(GripperKind::Joint.angle(0.3, range, jaw), 0.3);
        for (_, kind) in GripperKind::ALL {
            for angle in [-0.1, 1.1] {
                close(kind.angle(kind.value(angle, range, jaw), range, jaw), angle);
            }
        }
    }
}
