//! The wire: zenoh peers, ROS 2 standard messages in CDR, keys and schemas in one place.
//!
//! Keys are `sinew/<robot>/{state,command,camera/<name>,teleop,authority,stop,reset,status,alive/<part>,
//! order,chunk,policy,report/<part>,part/<part>/<process>}` and, in
//! simulation, `sim/ground_truth` and `sim/reset`. Every message carries a sequence number and a source stamp in its attachment, laid out as ROS 2's
//! zenoh middleware does (`rmw_zenoh`: i64 sequence, i64 ns, 16-byte publisher id).

mod ask;
mod authority;
mod bus;
mod gate;
mod messages;
mod policy;

pub use ask::{Question, Reply};
pub use authority::{
    AuthorityAsk, AuthorityMessage, AuthorityStatus, RUNTIME, StopAck, StopMessage,
};
pub use bus::{Attachment, Bus, BusError, Endpoint, Priority, Publisher, Subscription};
pub use gate::{Gate, Rejected};
pub use messages::{
    DecodeError, decode_chunk, decode_command, decode_frame, decode_state, decode_teleop,
    encode_chunk, encode_command, encode_frame, encode_state, encode_teleop,
};
pub use policy::{
    AnswerMessage, OrderMessage, POLICY_PROTOCOL, PolicyIntroduction, decode_policy, encode_policy,
};

/// Keys of one robot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    robot: String,
}

impl Keys {
    /// Keys of the robot named `robot`.
    pub fn new(robot: &str) -> Self {
        Self { robot: robot.to_owned() }
    }

    /// The robot's name.
    pub fn robot(&self) -> &str {
        &self.robot
    }

    /// Measured joint states (`sensor_msgs/JointState`).
    pub fn state(&self) -> String {
        format!("sinew/{}/state", self.robot)
    }

    /// Commands (`trajectory_msgs/JointTrajectory` of one point).
    pub fn command(&self) -> String {
        format!("sinew/{}/command", self.robot)
    }

    /// Frames of one camera (`sensor_msgs/Image`, `rgb8`).
    pub fn camera(&self, name: &str) -> String {
        format!("sinew/{}/camera/{name}", self.robot)
    }

    /// Samples of teleop devices (`sensor_msgs/JointState`: positions, or velocities alone for a jog; `frame_id`
    /// names the device).
    pub fn teleop(&self) -> String {
        format!("sinew/{}/teleop", self.robot)
    }

    /// Requests for authority (JSON query or message).
    pub fn authority(&self) -> String {
        format!("sinew/{}/authority", self.robot)
    }

    /// What the robot is told to do while it runs (JSON query).
    pub fn instruction(&self) -> String {
        format!("sinew/{}/instruction", self.robot)
    }

    /// Stops the robot (query or message): every driver and the runtime latch and answer.
    pub fn stop(&self) -> String {
        format!("sinew/{}/stop", self.robot)
    }

    /// Unlatches a stop (JSON query or message of an operator).
    pub fn reset(&self) -> String {
        format!("sinew/{}/reset", self.robot)
    }

    /// Who holds authority (JSON).
    pub fn status(&self) -> String {
        format!("sinew/{}/status", self.robot)
    }

    /// What one driver does (JSON).
    pub fn driver_status(&self, driver: &str) -> String {
        format!("sinew/{}/status/{driver}", self.robot)
    }

    /// Liveliness token of [`RUNTIME`] or of a driver.
    pub fn alive(&self, part: &str) -> String {
        format!("sinew/{}/alive/{part}", self.robot)
    }

    /// Demands for chunks, to a policy in another process (CBOR).
    pub fn order(&self) -> String {
        format!("sinew/{}/order", self.robot)
    }

    /// Chunks of a policy in another process (CBOR).
    pub fn chunk(&self) -> String {
        format!("sinew/{}/chunk", self.robot)
    }

    /// Asks a policy in another process what it is (CBOR query).
    pub fn policy(&self) -> String {
        format!("sinew/{}/policy", self.robot)
    }

    /// What `part` of a launch says of itself, several times a second (JSON).
    pub fn report(&self, part: &str) -> String {
        format!("sinew/{}/report/{part}", self.robot)
    }

    /// Liveliness token of `part` of a launch as it runs in `process`.
    pub fn part(&self, part: &str, process: u32) -> String {
        format!("sinew/{}/part/{part}/{process}", self.robot)
    }

    /// Liveliness tokens of all parts.
    pub fn all_parts(&self) -> String {
        format!("sinew/{}/part/**", self.robot)
    }

    /// The part and the process of a liveliness token; `None` for another key.
    pub fn part_of(&self, token: &str) -> Option<(String, u32)> {
        let rest = token.strip_prefix(&format!("sinew/{}/part/", self.robot))?;
        let (part, process) = rest.rsplit_once('/')?;
        Some((part.to_owned(), process.parse().ok()?))
    }

    /// What the simulator knows and the policy must not see (JSON).
    pub fn ground_truth(&self) -> String {
        format!("sinew/{}/sim/ground_truth", self.robot)
    }

    /// Asks the simulator for a new scene (JSON query).
    pub fn sim_reset(&self) -> String {
        format!("sinew/{}/sim/reset", self.robot)
    }
}
