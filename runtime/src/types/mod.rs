//! The messages of the system, named after what they carry.

mod action;
mod joint;
mod observation;

pub use action::{ActionChunk, ChunkRequest, ChunkShapeError, Command, StageTime};
pub use joint::{JointLimits, JointState, JointVec, MAX_JOINTS};
pub use observation::{CameraFrame, Image, ImageShapeError, Observation, ObservedImage};
