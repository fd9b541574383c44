//! People at the robot: the runtime's desk on the bus, where stops, requests for authority and teleop samples
//! arrive, and the other side, with which a person's tool speaks to it and to the drivers.
//!
//! A stop does not depend on the desk: every driver listens for it by itself.

mod client;
mod desk;

pub use client::{Confirmation, Confirmed, EVERY_ROBOT, TeleopDevice, ask, reset, stop};
pub use desk::{Desk, DeskConfig, DriverStatus};
