//! Assembles the parts of a launch and runs it: threads joined by bounded channels, zenoh between the
//! runtime and the devices.

mod assembly;
mod episode;
mod monitor;
mod motion;
mod referee;
mod robot;

pub use assembly::Launched;
pub use episode::{EpisodeResult, Outcome, SceneReply, SceneRequest};
pub use robot::RunError;
