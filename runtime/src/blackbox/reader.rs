//! Reads a recording from its beginning, as far as it is whole.

use std::io::Read;

use mcap::records::Record;
use mcap::sans_io::linear_reader::{LinearReadEvent, LinearReader, LinearReaderOptions};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::record::{CycleRecord, EffectRecord, EventRecord, Gap, Header, InferenceRecord, Note};
use super::schema::{CHUNK, Own};
use super::writer::{HEADER_NAME, SUMS_NAME, sum};
use crate::transport::{Keys, decode_chunk, decode_command, decode_frame, decode_state};
use crate::{ActionChunk, CameraFrame, Command, JointState, Stamp};

/// No record of ours comes near this length (bytes).
const LONGEST: usize = 1 << 30;

/// Why a file is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// It is no MCAP file, or not one of ours.
    #[error("is no recording of Sinew: {0}")]
    Foreign(String),
    /// A part of the header is not as it was written.
    #[error(
        "the header's `{key}` is damaged: its SHA-256 is {found}, {recorded} was recorded; \
         take the file from where it was made"
    )]
    Damaged {
        /// Which part.
        key: String,
        /// Its sum.
        found: String,
        /// What it was.
        recorded: String,
    },
}

/// One thing recorded.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // read one at a time
pub enum Entry {
    /// A frame that came in.
    Frame {
        /// The robot's name of the camera.
        camera: String,
        /// The frame; its number has 32 bits.
        frame: CameraFrame,
        /// When it came.
        received: Stamp,
    },
    /// A measured state that came in; its number has 32 bits.
    State {
        /// The state.
        state: JointState,
        /// When it came.
        received: Stamp,
    },
    /// The core was given an event.
    Event {
        /// The cycle that it belongs to.
        cycle: u64,
        /// The time that it was given with.
        now: Stamp,
        /// The event.
        event: EventRecord,
        /// The chunk that it carries.
        chunk: Option<ActionChunk>,
    },
    /// The event before led to something.
    Effect(EffectRecord),
    /// The core made a cycle.
    Cycle(CycleRecord),
    /// The policy made an inference.
    Inference(InferenceRecord),
    /// Something was said of the run.
    Note(Note, Stamp),
    /// Records are missing.
    Gap(Gap),
}

/// How the file ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordingEnd {
    /// As it should.
    Whole,
    /// Torn or damaged: what came before is whole.
    Torn(String),
}

/// A recording being read; an iterator over its entries, in order.
pub struct Recording<R> {
    source: R,
    reader: LinearReader,
    header: Header,
    keys: Keys,
    channels: Vec<(u16, String)>,
    command: Option<Command>,
    values: Option<Vec<f64>>,
    end: Option<RecordingEnd>,
}

#[derive(Deserialize)]
struct Event {
    cycle: u64,
    now: Stamp,
    event: EventRecord,
}

/// What one record of the file was.
enum Step {
    Entry(Box<Entry>),
    Nothing,
    End,
}

impl<R: Read> Recording<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`RecordingError`].
    pub fn open(mut source: R) -> Result<Self, RecordingError> {
        let options = LinearReaderOptions::default()
            .with_prevalidate_chunk_crcs(true)
            .with_record_length_limit(LONGEST);
        let mut reader = LinearReader::new_with_options(options);
        let foreign = |reason: String| RecordingError::Foreign(reason);
        let mut parts = None;
        let header = loop {
            let Some(record) = advance(&mut reader, &mut source)? else {
                return Err(foreign("it has no header".to_owned()));
            };
            if let Record::Metadata(found) = record {
                match (found.name.as_str(), parts.take()) {
                    (HEADER_NAME, _) => parts = Some(found.metadata),
                    (SUMS_NAME, Some(parts)) => break (parts, found.metadata),
                    (_, before) => parts = before,
                }
            }
        };
        let (parts, sums) = header;
        let mut map = Map::new();
        for (key, text) in parts {
            let (found, recorded) = (sum(&text), sums.get(&key).cloned().unwrap_or_default());
            if found != recorded {
                return Err(RecordingError::Damaged { key, found, recorded });
            }
            let value = serde_json::from_str(&text);
            map.insert(key, value.map_err(|e: serde_json::Error| foreign(e.to_string()))?);
        }
        let header: Header = serde_json::from_value(Value::Object(map))
            .map_err(|e| foreign(format!("its header is of another version: {e}")))?;
        let (keys, channels) = (Keys::new(&header.robot), Vec::new());
        Ok(Self { source, reader, header, keys, channels, command: None, values: None, end: None })
    }

    /// What the run was made with.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the file ends, once the last entry was read.
    pub fn end(&self) -> Option<&RecordingEnd> {
        self.end.as_ref()
    }

    fn step(&mut self) -> Result<Step, String> {
        let record = advance(&mut self.reader, &mut self.source).map_err(|e| match e {
            RecordingError::Foreign(reason) => reason,
            other => other.to_string(),
        })?;
        match record {
            None | Some(Record::DataEnd(_) | Record::Footer(_)) => Ok(Step::End),
            Some(Record::Channel(channel)) => {
                if !self.channels.iter().any(|c| c.0 == channel.id) {
                    self.channels.push((channel.id, channel.topic));
                }
                Ok(Step::Nothing)
            }
            Some(Record::Message { header, data }) => {
                let topic = self.channels.iter().find(|c| c.0 == header.channel_id);
                let Some(topic) = topic.map(|c| c.1.clone()) else { return Ok(Step::Nothing) };
                let entry =
                    self.message(&topic, &header, &data).map_err(|e| format!("{topic}: {e}"))?;
                Ok(entry.map_or(Step::Nothing, |e| Step::Entry(Box::new(e))))
            }
            Some(_) => Ok(Step::Nothing),
        }
    }

    fn message(
        &mut self,
        topic: &str,
        header: &mcap::records::MessageHeader,
        data: &[u8],
    ) -> Result<Option<Entry>, String> {
        let words = |e: crate::transport::DecodeError| e.to_string();
        let at = Stamp(i64::try_from(header.log_time).unwrap_or(i64::MAX));
        let sequence = u64::from(header.sequence);
        let Some(own) = Own::from_topic(topic) else {
            let joints = &self.header.joints;
            if topic == self.keys.command() {
                self.command = Some(decode_command(joints, data, sequence).map_err(words)?);
            } else if topic == CHUNK {
                self.values = Some(decode_chunk(data).map_err(words)?);
            } else if topic == self.keys.state() {
                let state = decode_state(joints, data, sequence).map_err(words)?;
                return Ok(Some(Entry::State { state, received: at }));
            } else if let Some(camera) = topic.strip_prefix(&self.keys.camera("")) {
                let frame = decode_frame(data, sequence).map_err(words)?;
                return Ok(Some(Entry::Frame { camera: camera.to_owned(), frame, received: at }));
            }
            return Ok(None);
        };
        Ok(Some(match own {
            Own::Event => {
                let Event { cycle, now, event } = json(data)?;
                let values = self.values.take();
                let chunk = event.head().zip(values).and_then(|(head, v)| head.with(v));
                Entry::Event { cycle, now, event, chunk }
            }
            Own::Effect => Entry::Effect(json(data)?),
            Own::Cycle => {
                let mut record: CycleRecord = json(data)?;
                record.cycle.command = self.command.take();
                Entry::Cycle(record)
            }
            Own::Inference => Entry::Inference(json(data)?),
            Own::Note => Entry::Note(json(data)?, at),
            Own::Gap => Entry::Gap(json(data)?),
            // Stands in the effect or the cycle as well.
            Own::Authority => return Ok(None),
        }))
    }
}

impl<R: Read> Iterator for Recording<R> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        while self.end.is_none() {
            match self.step() {
                Ok(Step::Entry(entry)) => return Some(*entry),
                Ok(Step::Nothing) => {}
                Ok(Step::End) => self.end = Some(RecordingEnd::Whole),
                Err(reason) => self.end = Some(RecordingEnd::Torn(reason)),
            }
        }
        None
    }
}

fn json<T: DeserializeOwned>(data: &[u8]) -> Result<T, String> {
    serde_json::from_slice(data).map_err(|e| e.to_string())
}

/// The next record; none at the end.
fn advance<R: Read>(
    reader: &mut LinearReader,
    source: &mut R,
) -> Result<Option<Record<'static>>, RecordingError> {
    let foreign = |e: mcap::McapError| RecordingError::Foreign(e.to_string());
    loop {
        match reader.next_event() {
            None => return Ok(None),
            Some(Err(error)) => return Err(foreign(error)),
            Some(Ok(LinearReadEvent::ReadRequest(need))) => {
                let count = source.read(reader.insert(need))?;
                reader.notify_read(count);
            }
            Some(Ok(LinearReadEvent::Record { opcode, data })) => {
                return mcap::parse_record(opcode, data)
                    .map(|record| Some(record.into_owned()))
                    .map_err(foreign);
            }
        }
    }
}
