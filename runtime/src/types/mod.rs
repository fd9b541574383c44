//! The messages of the system, named after what they carry.

mod action;
mod joint;
mod observation;
mod plan;
mod wire;

pub use action::{
    ActionChunk, CacheUse, ChunkReport, ChunkRequest, ChunkShapeError, Command, Opening, Reach,
    StageTime, Unused,
};
pub use joint::{JointLimits, JointState, JointVec, MAX_JOINTS};
pub use observation::{CameraFrame, Image, ImageShapeError, Observation, ObservedImage};
pub use plan::{ActionKind, MAX_PLAN, MaskSchedule, PlannedBlock, Prefix, PrefixUse};
