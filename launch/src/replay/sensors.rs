//! The recorded sensors as they came in: what could be observed at an instant.

use sinew_runtime::blackbox::{Entry, Header, Note};
use sinew_runtime::ingest::{Ingest, IngestError};
use sinew_runtime::{Observation, Stamp};

use super::Reader;

/// Entries may lie this much out of order in the file (ns): the writer's round and its slowest flush.
const DISORDER: i64 = 5_000_000_000;

/// Reads a recording's sensors up to an instant.
pub(super) struct Sensors {
    reader: Reader,
    ingest: Ingest,
    cameras: Vec<String>,
    instruction: String,
    /// Read, but later than the last instant asked for.
    ahead: Vec<(Stamp, Entry)>,
    newest: Stamp,
    ended: bool,
}

impl Sensors {
    pub fn new(reader: Reader, header: &Header) -> Self {
        let cameras: Vec<String> = header.views.iter().map(|v| v.1.clone()).collect();
        let ingest =
            Ingest::new(&cameras, header.max_observation_age).with_limits(&header.control.limits);
        let (ahead, instruction) = (Vec::new(), String::new());
        Self { reader, ingest, cameras, instruction, ahead, newest: Stamp(0), ended: false }
    }

    /// The observation that could be made at `now`; instants must not go back.
    ///
    /// # Errors
    /// [`IngestError`] names the part that is missing or stale.
    pub fn observe(&mut self, now: Stamp) -> Result<Observation, IngestError> {
        while !self.ended && self.newest.0 < now.0.saturating_add(DISORDER) {
            match self.reader.next() {
                None => self.ended = true,
                Some(entry) => {
                    let at = match &entry {
                        Entry::Frame { received, .. } | Entry::State { received, .. } => *received,
                        Entry::Note(Note::Instruction(_), at) => *at,
                        _ => continue,
                    };
                    self.newest = self.newest.max(at);
                    self.ahead.push((at, entry));
                }
            }
        }
        // Stable: what came at the same instant stays in the file's order.
        self.ahead.sort_by_key(|(at, _)| *at);
        let due = self.ahead.partition_point(|(at, _)| *at <= now);
        for (_, entry) in self.ahead.drain(..due) {
            match entry {
                Entry::Frame { camera, frame, .. } => {
                    if let Some(index) = self.cameras.iter().position(|c| *c == camera) {
                        self.ingest.on_frame(index, frame);
                    }
                }
                // What the run refused is refused here as well.
                Entry::State { state, .. } => drop(self.ingest.on_state(state)),
                Entry::Note(Note::Instruction(text), _) => self.instruction = text,
                _ => {}
            }
        }
        self.ingest.observe(&self.instruction, now)
    }
}
