//! The black box: everything that decided a run, recorded so that the run can be computed again.
//!
//! The control thread pushes plain [`ControlRecord`]s into a bounded ring ([`ControlTap`]); sensors and
//! policy hand theirs to a bounded queue ([`RecorderInput`]). A writer thread of normal priority turns both
//! into an MCAP file ([`Recorder`]). Recording never disturbs control: what does not fit is counted and the
//! gap is written down; a file that cannot be written ends the recording, not the run.
//!
//! Samples, commands and chunks are ROS 2 messages in CDR, so that MCAP viewers show them; our own records are JSON
//! with a schema. The header is the metadata record `sinew`. Every chunk of the file stands for itself, so a
//! torn file is readable up to its last whole chunk ([`Recording`]).

mod policy;
mod reader;
mod record;
mod recorder;
mod schema;
mod tap;
#[cfg(test)]
mod tests;
mod writer;

pub use policy::RecordedPolicy;
pub use reader::{Entry, Recording, RecordingEnd, RecordingError};
pub use record::{
    ChunkHead, ControlRecord, CycleRecord, EffectRecord, EventRecord, Gap, GapKind, Header,
    ImageRef, Images, InferenceRecord, InferenceResult, Note, ObservationRecord, Steering,
};
pub use recorder::{Recorder, RecorderInput, RecordingFigures};
pub use tap::ControlTap;
