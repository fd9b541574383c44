//! Sinew's runtime: the types and traits of the whole system, and the pipeline that turns
//! action chunks into a safe command stream at a fixed control frequency.
//!
//! Data flows one way: [`ingest`] → a [`Policy`] ([`inference`]) → [`scheduler`] → [`arbiter`] → [`guard`]
//! ([`control`]) → [`stream`] → [`transport`]. The parts that decide are pure state machines driven by
//! `(event, now)`; threads, zenoh and the clock are thin shells around them.

pub mod action_space;
pub mod arbiter;
pub mod blackbox;
pub mod control;
pub mod guard;
pub mod inference;
pub mod ingest;
pub mod kinematics;
mod latency;
pub mod operator;
pub mod rt;
pub mod scheduler;
pub mod stream;
pub mod telemetry;
pub mod time;
pub mod traits;
pub mod transport;
pub mod types;
pub mod units;

pub use time::{Clock, Stamp};
pub use traits::{
    ArmDriver, Camera, DeviceError, Policy, PolicyError, PolicySpec, PrefixSupport, Progress,
};
pub use types::*;
