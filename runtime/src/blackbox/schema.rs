//! Topics of a recording, and the schemas that tell a viewer what is on them.

use serde_json::{Value, json};

/// Stands between the message types of a definition.
const SEPARATOR: &str =
    "================================================================================";

const HEADER: &str = "MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n";
const TIME: &str = "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n";
const DURATION: &str = "MSG: builtin_interfaces/Duration\nint32 sec\nuint32 nanosec\n";
const POINT: &str = "MSG: trajectory_msgs/JointTrajectoryPoint\nfloat64[] positions\n\
    float64[] velocities\nfloat64[] accelerations\nfloat64[] effort\n\
    builtin_interfaces/Duration time_from_start\n";
const STATE: &str = "std_msgs/Header header\nstring[] name\nfloat64[] position\n\
    float64[] velocity\nfloat64[] effort\n";
const TRAJECTORY: &str = "std_msgs/Header header\nstring[] joint_names\n\
    trajectory_msgs/JointTrajectoryPoint[] points\n";
const IMAGE: &str = "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\n\
    uint8 is_bigendian\nuint32 step\nuint8[] data\n";

/// Chunks as the control core was given them (`trajectory_msgs/JointTrajectory`).
pub(super) const CHUNK: &str = "blackbox/chunk";

/// A ROS 2 message type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ros {
    State,
    Trajectory,
    Image,
}

impl Ros {
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "sensor_msgs/msg/JointState",
            Self::Trajectory => "trajectory_msgs/msg/JointTrajectory",
            Self::Image => "sensor_msgs/msg/Image",
        }
    }

    /// Its definition and those that it needs, in the form `ros2msg`.
    pub fn text(self) -> String {
        let (own, nested): (_, &[&str]) = match self {
            Self::State => (STATE, &[HEADER, TIME]),
            Self::Trajectory => (TRAJECTORY, &[HEADER, POINT, TIME, DURATION]),
            Self::Image => (IMAGE, &[HEADER, TIME]),
        };
        let mut out = own.to_owned();
        for text in nested {
            out += &format!("{SEPARATOR}\n{text}");
        }
        out
    }
}

/// The topics of our own records, in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Own {
    Event,
    Effect,
    Cycle,
    Authority,
    Inference,
    Note,
    Gap,
}

impl Own {
    pub const ALL: [Own; 7] =
        [Own::Event, Own::Effect, Own::Cycle, Own::Authority, Own::Inference, Own::Note, Own::Gap];

    pub fn topic(self) -> &'static str {
        match self {
            Self::Event => "blackbox/event",
            Self::Effect => "blackbox/effect",
            Self::Cycle => "blackbox/cycle",
            Self::Authority => "blackbox/authority",
            Self::Inference => "blackbox/inference",
            Self::Note => "blackbox/note",
            Self::Gap => "blackbox/gap",
        }
    }

    pub fn from_topic(topic: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|own| own.topic() == topic)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Event => "sinew.ControlEvent",
            Self::Effect => "sinew.ControlEffect",
            Self::Cycle => "sinew.ControlCycle",
            Self::Authority => "sinew.AuthorityChange",
            Self::Inference => "sinew.Inference",
            Self::Note => "sinew.Note",
            Self::Gap => "sinew.Gap",
        }
    }

    /// Its JSON schema: the keys and what they mean; stamps are ns since the UNIX epoch.
    pub fn schema(self) -> Value {
        let stamp =
            |what: &str| json!({ "type": "integer", "description": format!("{what} (ns)") });
        let any = |what: &str| json!({ "description": what });
        let count = |what: &str| json!({ "type": "integer", "description": what });
        let properties = match self {
            Self::Event => json!({
                "cycle": count("the control cycle that it belongs to"),
                "now": stamp("the time that the control core was given it with"),
                "event": any("the event; a chunk's values are the message before it on the chunk topic"),
            }),
            Self::Effect => json!({
                "accepted": { "type": "boolean", "description": "the event's chunk plays" },
                "refused": any("why it was not taken"),
                "change": any("authority changed"),
                "answer": any("what an operator was answered"),
                "sample_refused": any("why a teleop sample was left out"),
                "residual_refused": any("why a residual policy's offset was left out"),
            }),
            Self::Cycle => json!({
                "number": count("counts the cycles, from 1"),
                "now": stamp("the time that the cycle was given"),
                "due": stamp("when it was due"),
                "missed": count("whole periods slept through before it"),
                "last_work": any("time of the work of the cycle before"),
                "cycle": any("its result; the command is the message before it on the command topic"),
            }),
            Self::Authority => json!({
                "at": stamp("when"),
                "from": any("who held it before"),
                "to": any("who holds it now"),
                "reason": any("why"),
            }),
            Self::Inference => json!({
                "begun": stamp("when the policy began"),
                "ended": stamp("when it ended"),
                "request": any("the request, as asked"),
                "observation": any("what it saw; frames by number"),
                "result": any("the chunk's head and its stages, or why there is none"),
            }),
            Self::Note => json!({
                "instruction": any("the instruction from now on"),
                "episode": any("an episode ended so"),
            }),
            Self::Gap => json!({
                "kind": any("which records are missing"),
                "lost": count("how many"),
            }),
        };
        json!({ "type": "object", "title": self.name(), "properties": properties })
    }
}
