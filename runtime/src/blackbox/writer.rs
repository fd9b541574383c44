//! The writer: empties the queues and writes the file.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{Seek, SeekFrom, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mcap::records::{MessageHeader, Metadata};
use mcap::{Compression, McapResult, WriteOptions};
use rtrb::Consumer;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::record::{ControlRecord, EventRecord, Gap, GapKind, Header};
use super::recorder::{Inbox, Item, Received, RecordingFigures};
use super::schema::{CHUNK, Own, Ros};
use crate::transport::{Keys, encode_chunk, encode_command, encode_frame, encode_state};
use crate::{CameraFrame, Clock, Stamp};

/// How long the writer sleeps when nothing waits.
const POLL: Duration = Duration::from_millis(10);
/// What came in longer ago is on the disk.
const FLUSH: Duration = Duration::from_secs(1);
/// Control records taken over at once.
const BATCH: usize = 1024;
/// Frames of a camera whose numbers are remembered, so that none is written twice.
const REMEMBERED: usize = 64;
/// The metadata record of the header, and of its sums.
pub(super) const HEADER_NAME: &str = "sinew";
pub(super) const SUMS_NAME: &str = "sinew.sha256";

/// SHA-256 (hex) of `text`.
pub(super) fn sum(text: &str) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

/// `error` with what is behind it: MCAP's own words do not say that a disk is full.
pub(super) fn whole_reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// An MCAP file being written: topics, encodings and numbers.
pub(super) struct Log<W: Write + Seek> {
    mcap: mcap::Writer<W>,
    keys: Keys,
    joints: Vec<String>,
    channels: HashMap<String, (u16, u32)>,
    counts: BTreeMap<String, u64>,
    written: HashMap<String, VecDeque<u64>>,
}

impl<W: Write + Seek> Log<W> {
    /// A file that begins with `header`.
    pub fn create(sink: W, header: &Header) -> McapResult<Self> {
        let options = WriteOptions::new()
            .profile("ros2")
            .library(format!("sinew {}", header.version))
            .compression(Some(Compression::Zstd))
            .compression_level(1)
            .compression_threads(0)
            // Whole chunks only reach the file, so that a torn one can be read.
            .disable_seeking(true);
        let mut mcap = options.create(sink)?;
        let mut metadata = BTreeMap::new();
        // The header is a struct, so its JSON is an object.
        if let Ok(serde_json::Value::Object(map)) = serde_json::to_value(header) {
            metadata = map.into_iter().map(|(k, v)| (k, v.to_string())).collect();
        }
        let sums = metadata.iter().map(|(k, v)| (k.clone(), sum(v))).collect();
        mcap.write_metadata(&Metadata { name: HEADER_NAME.into(), metadata })?;
        mcap.write_metadata(&Metadata { name: SUMS_NAME.into(), metadata: sums })?;
        mcap.flush()?;
        Ok(Self {
            mcap,
            keys: Keys::new(&header.robot),
            joints: header.joints.clone(),
            channels: HashMap::new(),
            counts: BTreeMap::new(),
            written: HashMap::new(),
        })
    }

    /// The channel of `topic`, made when it is new, and the message's number on it.
    fn channel(
        &mut self,
        topic: &str,
        encoding: &str,
        schema: impl FnOnce() -> (String, &'static str, String),
    ) -> McapResult<(u16, u32)> {
        if let Some((id, count)) = self.channels.get_mut(topic) {
            *count = count.wrapping_add(1);
            return Ok((*id, *count));
        }
        let (name, form, text) = schema();
        let schema = self.mcap.add_schema(&name, form, text.as_bytes())?;
        let id = self.mcap.add_channel(schema, topic, encoding, &BTreeMap::new())?;
        self.channels.insert(topic.to_owned(), (id, 1));
        Ok((id, 1))
    }

    fn put(
        &mut self,
        topic: &str,
        (channel_id, sequence): (u16, u32),
        (at, published): (Stamp, Stamp),
        data: &[u8],
    ) -> McapResult<()> {
        let nanos = |s: Stamp| u64::try_from(s.0).unwrap_or(0);
        let (log_time, publish_time) = (nanos(at), nanos(published));
        let header = MessageHeader { channel_id, sequence, log_time, publish_time };
        self.mcap.write_to_known_channel(&header, data)?;
        match self.counts.get_mut(topic) {
            Some(count) => *count += 1,
            None => drop(self.counts.insert(topic.to_owned(), 1)),
        }
        Ok(())
    }

    /// A ROS 2 message; `sequence` stands for the number on the topic, where the message has one of its own.
    fn ros(
        &mut self,
        topic: &str,
        kind: Ros,
        sequence: Option<u64>,
        times: (Stamp, Stamp),
        data: &[u8],
    ) -> McapResult<()> {
        let schema = || (kind.name().to_owned(), "ros2msg", kind.text());
        let (id, count) = self.channel(topic, "cdr", schema)?;
        // MCAP's numbers have 32 bits; they wrap after two years at 50 Hz.
        let sequence = sequence.map_or(count, |s| s as u32);
        self.put(topic, (id, sequence), times, data)
    }

    /// One of our own records.
    fn own<T: Serialize>(&mut self, kind: Own, at: Stamp, record: &T) -> McapResult<()> {
        let schema = || (kind.name().to_owned(), "jsonschema", kind.schema().to_string());
        let channel = self.channel(kind.topic(), "json", schema)?;
        // Plain structs with string keys always have a JSON form.
        let data = serde_json::to_vec(record).unwrap_or_default();
        self.put(kind.topic(), channel, (at, at), &data)
    }

    fn frame(&mut self, camera: &str, frame: &CameraFrame, at: Stamp) -> McapResult<()> {
        let written = self.written.entry(camera.to_owned()).or_default();
        if written.contains(&frame.sequence) {
            return Ok(());
        }
        if written.len() == REMEMBERED {
            written.pop_front();
        }
        written.push_back(frame.sequence);
        let (topic, data) = (self.keys.camera(camera), encode_frame(camera, frame));
        self.ros(&topic, Ros::Image, Some(frame.sequence), (at, frame.stamp), &data)
    }

    fn item(&mut self, item: &Item) -> McapResult<()> {
        match item {
            Item::State { state, received } => {
                let (topic, data) = (self.keys.state(), encode_state(&self.joints, state));
                let times = (*received, state.stamp);
                self.ros(&topic, Ros::State, Some(state.sequence), times, &data)
            }
            Item::Inference { record, frames } => {
                for (camera, frame) in frames {
                    self.frame(camera, frame, record.begun)?;
                }
                self.own(Own::Inference, record.ended, record)
            }
            Item::Note { note, at } => self.own(Own::Note, *at, note),
        }
    }

    /// An event, the values of its chunk before it.
    fn event(
        &mut self,
        cycle: u64,
        now: Stamp,
        event: &EventRecord,
        values: &[f64],
    ) -> McapResult<()> {
        // Values that are not whole come from a gap; the reader then finds none.
        if let Some(chunk) = event.head().and_then(|head| head.with(values.to_vec())) {
            let (topic, data) = (CHUNK, encode_chunk(&self.joints, &chunk));
            self.ros(topic, Ros::Trajectory, None, (now, chunk.instant), &data)?;
        }
        let record = serde_json::json!({ "cycle": cycle, "now": now, "event": event });
        self.own(Own::Event, now, &record)
    }

    fn control(&mut self, record: ControlRecord, at: Stamp) -> McapResult<()> {
        match record {
            // `Writer` gathers these two.
            ControlRecord::Event { .. } | ControlRecord::Values(_) => Ok(()),
            ControlRecord::Effect(effect) => {
                if let Some(change) = effect.change {
                    self.own(Own::Authority, change.at, &change)?;
                }
                self.own(Own::Effect, at, &effect)
            }
            ControlRecord::Cycle(mut record) => {
                if let Some(change) = record.cycle.change {
                    self.own(Own::Authority, change.at, &change)?;
                }
                if let Some(command) = record.cycle.command.take() {
                    let (topic, data) =
                        (self.keys.command(), encode_command(&self.joints, &command));
                    let times = (record.now, command.stamp);
                    self.ros(&topic, Ros::Trajectory, Some(command.sequence), times, &data)?;
                }
                self.own(Own::Cycle, record.now, &record)
            }
            ControlRecord::Lost(lost) => {
                self.own(Own::Gap, at, &Gap { kind: GapKind::Control, lost })
            }
        }
    }
}

/// An event whose values have not all come.
struct Open {
    cycle: u64,
    now: Stamp,
    event: EventRecord,
    missing: usize,
    values: Vec<f64>,
}

/// The thread that empties the queues.
pub(super) struct Writer<W: Write + Seek> {
    /// None after a write has failed.
    log: Option<Log<W>>,
    ring: Consumer<ControlRecord>,
    inbox: Inbox,
    open: Option<Open>,
    last: Stamp,
    figures: RecordingFigures,
}

impl<W: Write + Seek> Writer<W> {
    pub fn new(log: Log<W>, ring: Consumer<ControlRecord>, inbox: Inbox) -> Self {
        let (last, figures) = (Clock::now(), RecordingFigures::default());
        Self { log: Some(log), ring, inbox, open: None, last, figures }
    }

    pub fn run(mut self) -> RecordingFigures {
        let mut flushed = Instant::now();
        loop {
            let stop = self.inbox.stop.load(Ordering::Relaxed);
            let taken = self.round();
            if flushed.elapsed() >= FLUSH {
                flushed = Instant::now();
                self.write(0, |log| log.mcap.flush());
            }
            if taken == 0 {
                if stop {
                    return self.finish();
                }
                std::thread::sleep(POLL);
            }
        }
    }

    /// Takes what waits and writes it: frames before the records that need them, inferences before the
    /// control thread's events that they led to. So the queues are read in the other order.
    fn round(&mut self) -> usize {
        let control: Vec<_> = std::iter::from_fn(|| self.ring.pop().ok()).take(BATCH).collect();
        let items: Vec<_> = self.inbox.records.try_iter().take(BATCH).collect();
        let frames: Vec<Received> = self.inbox.frames.try_iter().take(BATCH).collect();
        for (camera, frame, received) in &frames {
            self.write(1, |log| log.frame(camera, frame, *received));
        }
        for item in &items {
            self.write(1, |log| log.item(item));
        }
        for record in &control {
            self.control(*record);
        }
        self.gaps();
        control.len() + items.len() + frames.len()
    }

    fn control(&mut self, record: ControlRecord) {
        match record {
            ControlRecord::Event { cycle, now, event } => {
                self.last = now;
                let missing = event.head().map_or(0, |h| h.dim * h.horizon);
                let values = Vec::with_capacity(missing);
                self.open = Some(Open { cycle, now, event, missing, values });
            }
            ControlRecord::Values(values) => {
                if let Some(open) = &mut self.open {
                    open.values.extend(values.as_slice());
                }
            }
            ControlRecord::Cycle(cycle) => self.last = cycle.now,
            ControlRecord::Lost(lost) => {
                *self.figures.lost.entry(GapKind::Control).or_default() += lost
            }
            ControlRecord::Effect(_) => {}
        }
        if let Some(Open { cycle, now, event, values, .. }) =
            self.open.take_if(|open| open.values.len() >= open.missing)
        {
            self.write(1, |log| log.event(cycle, now, &event, &values));
        }
        if !matches!(record, ControlRecord::Event { .. } | ControlRecord::Values(_)) {
            let at = self.last;
            self.write(1, |log| log.control(record, at));
        }
    }

    /// Writes down what the queues had no room for since the last time.
    fn gaps(&mut self) {
        for kind in GapKind::ALL {
            let lost = self.inbox.lost[kind as usize].swap(0, Ordering::Relaxed);
            if lost > 0 {
                *self.figures.lost.entry(kind).or_default() += lost;
                self.write(1, |log| log.own(Own::Gap, Clock::now(), &Gap { kind, lost }));
            }
        }
    }

    /// Does `work` on the file; after the first failure nothing is written any more.
    fn write(&mut self, records: u64, work: impl FnOnce(&mut Log<W>) -> McapResult<()>) {
        let Some(log) = &mut self.log else {
            self.figures.unwritten += records;
            return;
        };
        if let Err(error) = work(log) {
            tracing::error!(%error, "the recording ends here; the run goes on");
            self.figures.stopped = Some(whole_reason(&error));
            self.figures.unwritten += records;
            self.close();
        }
    }

    /// Takes the figures of the file and lets go of it.
    fn close(&mut self) {
        if let Some(log) = self.log.take() {
            self.figures.messages = log.counts;
            // Where the file ends; a file that does not even say that counts as empty.
            let mut sink = log.mcap.into_inner();
            self.figures.bytes = sink.seek(SeekFrom::End(0)).unwrap_or_default();
        }
    }

    fn finish(mut self) -> RecordingFigures {
        self.write(0, |log| log.mcap.finish().map(|_| ()));
        self.close();
        self.figures
    }
}
