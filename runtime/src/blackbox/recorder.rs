//! The recorder: its handles for the threads that record, and what is said of it at the end.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use serde::Serialize;

use super::ControlTap;
use super::record::{GapKind, Header, Images, InferenceRecord, Note};
use super::writer::{Log, Writer, whole_reason};
use crate::{CameraFrame, Clock, JointState, Stamp};

/// Frames that may wait for the writer: half a second of two cameras.
const FRAMES: usize = 32;
/// Other records that may wait: half a second of states at 1 kHz.
const RECORDS: usize = 512;

/// A running recording.
pub struct Recorder {
    input: RecorderInput,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<RecordingFigures>,
}

/// What was recorded and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct RecordingFigures {
    /// Bytes written.
    pub bytes: u64,
    /// Messages written, by topic.
    pub messages: BTreeMap<String, u64>,
    /// Records that found no room in a queue, by kind.
    pub lost: BTreeMap<GapKind, u64>,
    /// Why the file ends early.
    pub stopped: Option<String>,
    /// Records that came after it.
    pub unwritten: u64,
}

/// What waits for the writer.
// The most frequent variant is the largest: boxing it would save nothing.
#[allow(clippy::large_enum_variant)]
pub(super) enum Item {
    State {
        state: JointState,
        received: Stamp,
    },
    /// The frames go ahead of the record, unless they are in the file already.
    Inference {
        record: Box<InferenceRecord>,
        frames: Vec<(String, CameraFrame)>,
    },
    Note {
        note: Note,
        at: Stamp,
    },
}

/// A camera's name, its frame and when that came.
pub(super) type Received = (Arc<str>, CameraFrame, Stamp);

/// Hands records of ordinary threads to the writer. Never waits: what finds no room is counted.
#[derive(Clone)]
pub struct RecorderInput {
    images: Images,
    frames: Sender<Received>,
    records: Sender<Item>,
    lost: Arc<[AtomicU64; GapKind::ALL.len()]>,
}

/// The writer's ends.
pub(super) struct Inbox {
    pub frames: Receiver<Received>,
    pub records: Receiver<Item>,
    pub lost: Arc<[AtomicU64; GapKind::ALL.len()]>,
    pub stop: Arc<AtomicBool>,
}

impl Recorder {
    /// Writes `header` to `sink` and starts the writer.
    ///
    /// # Errors
    /// What writing the header gave, or the system's refusal to start a thread.
    pub fn start<W: Write + Seek + Send + 'static>(
        sink: W,
        header: &Header,
    ) -> std::io::Result<(Self, ControlTap)> {
        let log = Log::create(sink, header).map_err(|e| std::io::Error::other(whole_reason(&e)))?;
        let (tap, ring) = ControlTap::new();
        let (frames, frames_in) = bounded(FRAMES);
        let (records, records_in) = bounded(RECORDS);
        let lost: Arc<[AtomicU64; GapKind::ALL.len()]> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let input = RecorderInput { images: header.images, frames, records, lost: lost.clone() };
        let inbox = Inbox { frames: frames_in, records: records_in, lost, stop: stop.clone() };
        let thread = std::thread::Builder::new()
            .name("sinew-blackbox".into())
            .spawn(move || Writer::new(log, ring, inbox).run())?;
        Ok((Self { input, stop, thread }, tap))
    }

    /// A handle for the threads that record.
    pub fn input(&self) -> RecorderInput {
        self.input.clone()
    }

    /// Writes what still waits and ends the file. The control thread must have ended before.
    pub fn finish(self) -> RecordingFigures {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| RecordingFigures {
            stopped: Some("the writer's thread ended by itself; see the log".to_owned()),
            ..RecordingFigures::default()
        })
    }
}

impl RecorderInput {
    /// A frame of the robot's camera `camera`, as it came in.
    pub fn frame(&self, camera: &Arc<str>, frame: &CameraFrame) {
        if self.images == Images::All {
            let sent = self.frames.try_send((camera.clone(), frame.clone(), Clock::now()));
            self.count(GapKind::Frames, sent);
        }
    }

    /// A measured state, as it came in.
    pub fn state(&self, state: &JointState) {
        let sent = self.records.try_send(Item::State { state: *state, received: Clock::now() });
        self.count(GapKind::States, sent);
    }

    /// Something said of the run.
    pub fn note(&self, note: Note) {
        let sent = self.records.try_send(Item::Note { note, at: Clock::now() });
        self.count(GapKind::Notes, sent);
    }

    /// An inference and the frames that it saw.
    pub fn inference(&self, record: InferenceRecord, frames: Vec<(String, CameraFrame)>) {
        let frames = if self.images == Images::None { Vec::new() } else { frames };
        let sent = self.records.try_send(Item::Inference { record: Box::new(record), frames });
        self.count(GapKind::Inferences, sent);
    }

    fn count<T>(&self, kind: GapKind, sent: Result<(), TrySendError<T>>) {
        if sent.is_err() {
            self.lost[kind as usize].fetch_add(1, Ordering::Relaxed);
        }
    }
}
