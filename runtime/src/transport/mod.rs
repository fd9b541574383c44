//! The wire: zenoh peers, ROS 2 standard messages in CDR, keys and schemas in one place.
//!
//! Keys are `sinew/<robot>/{state,command,camera/<name>}` and, in simulation, `sim/ground_truth` and
//! `sim/reset`. Every message carries a sequence number and a source stamp in its attachment, laid out as ROS 2's
//! zenoh middleware does (`rmw_zenoh`: i64 sequence, i64 ns, 16-byte publisher id).

mod bus;
mod messages;

pub use bus::{Attachment, Bus, BusError, Endpoint, Priority, Publisher, Subscription};
pub use messages::{
    DecodeError, decode_command, decode_frame, decode_state, encode_command, encode_frame,
    encode_state,
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

    /// What the simulator knows and the policy must not see (JSON).
    pub fn ground_truth(&self) -> String {
        format!("sinew/{}/sim/ground_truth", self.robot)
    }

    /// Asks the simulator for a new scene (JSON query).
    pub fn sim_reset(&self) -> String {
        format!("sinew/{}/sim/reset", self.robot)
    }
}
