//! Why the guard changed commands, in plain bits.

use crate::MAX_JOINTS;

/// Why the guard changed a joint's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The wish lay outside the position limits, or could not stop before them.
    Position,
    /// The wish was faster than the joint may move.
    Velocity,
    /// The wish changed speed faster than the joint may.
    Acceleration,
    /// The wish changed acceleration faster than the joint may, or could not be followed further.
    Jerk,
    /// The wish was no finite number: the joint is braked to rest.
    NotFinite,
    /// The arm would have left its workspace, or passed a plane.
    Workspace,
    /// Two parts of the arm would have come too near to each other.
    SelfCollision,
}

impl Cause {
    /// All causes, in the order of their counters.
    pub const ALL: [Cause; 7] = [
        Cause::Position,
        Cause::Velocity,
        Cause::Acceleration,
        Cause::Jerk,
        Cause::NotFinite,
        Cause::Workspace,
        Cause::SelfCollision,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Position => "position",
            Cause::Velocity => "velocity",
            Cause::Acceleration => "acceleration",
            Cause::Jerk => "jerk",
            Cause::NotFinite => "not finite",
            Cause::Workspace => "workspace",
            Cause::SelfCollision => "self-collision",
        }
    }
}

/// What the guard changed in one period: a bit per joint, for each cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Interventions {
    joints: [u16; Cause::ALL.len()],
}

impl Interventions {
    /// True when `joint` was changed because of `cause`.
    pub fn contains(&self, joint: usize, cause: Cause) -> bool {
        joint < MAX_JOINTS && self.joints[cause as usize] & (1 << joint) != 0
    }

    /// True when nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.joints.iter().all(|bits| *bits == 0)
    }

    pub(super) fn add(&mut self, joint: usize, cause: Cause) {
        self.joints[cause as usize] |= 1 << joint;
    }
}
