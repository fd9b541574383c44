//! The exact replay: the same events and stamps through a core of the same configuration.

use std::collections::HashMap;
use std::io::Read;

use serde::Serialize;
use sinew_runtime::blackbox::{
    CycleRecord, EffectRecord, Entry, EventRecord, GapKind, InferenceRecord, InferenceResult,
    Recording, RecordingEnd,
};
use sinew_runtime::control::ControlCore;
use sinew_runtime::inference::InferenceOrder;
use sinew_runtime::{ActionChunk, Stamp};

use super::PolicyIdentity;
use super::again::{Again, Frames};
use super::compare::{self, Difference, Found};

/// Inferences that may wait for their chunk's event: one is open at a time, and few are dropped.
const WAITING: usize = 16;

/// What a replay found.
#[derive(Debug, Clone, Serialize)]
pub struct Exact {
    /// Control cycles compared.
    pub cycles: u64,
    /// Of these, how many came out otherwise.
    pub cycles_different: u64,
    /// Events that the core was given.
    pub events: u64,
    /// Decisions on events and orders that came out otherwise.
    pub decisions_different: u64,
    /// Chunks that were inferred again and given to the core.
    pub chunks: u64,
    /// Of these, how many came out otherwise.
    pub chunks_different: u64,
    /// Chunks given to the core as recorded, because they could not be inferred again, by reason.
    pub chunks_recorded: HashMap<String, u64>,
    /// The first difference.
    pub difference: Option<Difference>,
    /// Records of the control thread are missing after this cycle; nothing after it was compared.
    pub gap_after: Option<u64>,
    /// Why the file ends early; what came before was compared.
    pub torn: Option<String>,
    /// The policy, when it was run again.
    pub policy: Option<PolicyIdentity>,
}

impl Exact {
    /// True when all that was recorded came out again, bit for bit, from the recorded policy.
    pub fn identical(&self) -> bool {
        let same_policy = self.policy.as_ref().is_none_or(|p| p.different.is_empty());
        let all_inferred = self.policy.is_none() || self.chunks_recorded.is_empty();
        self.difference.is_none() && self.gap_after.is_none() && same_policy && all_inferred
    }
}

/// Replays `recording`, and `again` in it, unless only control is to be replayed.
///
/// # Errors
/// Limits in the recorded configuration that cannot protect.
pub(super) fn replay<R: Read>(
    mut recording: Recording<R>,
    again: Option<&mut Again>,
) -> Result<Exact, String> {
    let header = recording.header();
    let mut replay = Replay {
        core: super::core(header, &header.control)?,
        joints: header.joints.clone(),
        again,
        frames: Frames::default(),
        orders: Vec::new(),
        inferences: Vec::new(),
        effect: None,
        cycle: 0,
        now: Stamp::default(),
        result: Exact {
            cycles: 0,
            cycles_different: 0,
            events: 0,
            decisions_different: 0,
            chunks: 0,
            chunks_different: 0,
            chunks_recorded: HashMap::new(),
            difference: None,
            gap_after: None,
            torn: None,
            policy: None,
        },
    };
    for entry in recording.by_ref() {
        replay.entry(entry);
        if replay.result.gap_after.is_some() {
            break;
        }
    }
    if let Some(RecordingEnd::Torn(why)) = recording.end() {
        replay.result.torn = Some(why.clone());
    }
    Ok(replay.result)
}

struct Replay<'a> {
    core: ControlCore,
    joints: Vec<String>,
    again: Option<&'a mut Again>,
    frames: Frames,
    /// The orders made, newest last.
    orders: Vec<InferenceOrder>,
    /// Inferences whose chunk has not come to the core.
    inferences: Vec<InferenceRecord>,
    /// What the event before led to, until the recording says what it did.
    effect: Option<EffectRecord>,
    cycle: u64,
    now: Stamp,
    result: Exact,
}

impl Replay<'_> {
    fn entry(&mut self, entry: Entry) {
        match entry {
            Entry::Frame { camera, frame, .. } => self.frames.push(camera, frame),
            Entry::Inference(record) => keep(&mut self.inferences, record),
            Entry::Event { cycle, now, event, chunk } => {
                self.settle(EffectRecord::default());
                if cycle != self.cycle + 1 {
                    self.result.gap_after = Some(self.cycle);
                    return;
                }
                self.now = now;
                self.event(event, chunk);
            }
            Entry::Effect(effect) => self.settle(effect),
            Entry::Cycle(record) => {
                self.settle(EffectRecord::default());
                if record.number != self.cycle + 1 {
                    self.result.gap_after = Some(self.cycle);
                    return;
                }
                self.tick(&record);
            }
            Entry::Gap(gap) if gap.kind == GapKind::Control => {
                self.result.gap_after = Some(self.cycle);
            }
            Entry::State { .. } | Entry::Note(..) | Entry::Gap(_) => {}
        }
    }

    fn event(&mut self, event: EventRecord, chunk: Option<ActionChunk>) {
        self.result.events += 1;
        let chunk = match event {
            EventRecord::Chunk(head) => self.chunk(head.request, chunk),
            EventRecord::ChunkFailed(request) => {
                self.failed(request);
                None
            }
            _ => chunk,
        };
        let Some(event) = event.join(chunk) else {
            // Its values are not in the file: what follows cannot be the same.
            self.result.gap_after = Some(self.cycle);
            return;
        };
        let effect = self.core.on_event(event, self.now);
        while self.core.take_spent().is_some() {}
        self.effect = Some(EffectRecord::of(&effect));
    }

    /// The chunk of `request`, inferred again where that is possible.
    fn chunk(&mut self, request: u64, recorded: Option<ActionChunk>) -> Option<ActionChunk> {
        let Some(again) = self.again.as_mut() else { return recorded };
        let mut as_recorded =
            |why: String| *self.result.chunks_recorded.entry(why).or_default() += 1;
        let Some(record) = take(&mut self.inferences, request) else {
            as_recorded("its inference is not in the recording".to_owned());
            return recorded;
        };
        let order = self.orders.iter().rfind(|o| o.order.request == request);
        let made = match again.repeat(&record, order, &self.frames) {
            Ok(made) => made,
            Err(why) => {
                as_recorded(why);
                return recorded;
            }
        };
        self.result.chunks += 1;
        let mut found = compare::requests(&record.request, &made.request);
        let chunk = match made.chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                let field = format!("chunk {request}");
                found = found.or(Some((field, "made".to_owned(), error.to_string())));
                None
            }
        };
        if let (Some(before), Some(now)) = (&recorded, &chunk) {
            found = found.or_else(|| compare::chunks(before, now, &self.joints));
        }
        if let Some(found) = found {
            self.result.chunks_different += 1;
            self.differs(found);
        }
        chunk.or(recorded)
    }

    /// The policy fails again as it did.
    fn failed(&mut self, request: u64) {
        let Some(again) = self.again.as_mut() else { return };
        let Some(record) = take(&mut self.inferences, request) else { return };
        let before = match &record.result {
            InferenceResult::Failed(before) => before,
            other => {
                let made = matches!(other, InferenceResult::Chunk { .. });
                again.drop(&record, &self.frames, made);
                return;
            }
        };
        let order = self.orders.iter().rfind(|o| o.order.request == request);
        let now = match again.repeat(&record, order, &self.frames).map(|made| made.chunk) {
            Ok(Err(error)) => error.to_string(),
            Ok(Ok(_)) => "made".to_owned(),
            Err(_) => return,
        };
        if *before != now {
            let found = (format!("chunk {request}"), before.clone(), now);
            self.result.chunks_different += 1;
            self.differs(found);
        }
    }

    /// Compares what the event before led to with `recorded`.
    fn settle(&mut self, recorded: EffectRecord) {
        let Some(replayed) = self.effect.take() else { return };
        if replayed != recorded {
            self.result.decisions_different += 1;
            if let Some((field, before, now)) = compare::values(&recorded, &replayed) {
                self.differs((format!("event: {field}"), before, now));
            }
        }
    }

    fn tick(&mut self, record: &CycleRecord) {
        self.now = record.now;
        let cycle = self.core.tick(record.now);
        while self.core.take_spent().is_some() {}
        if let Some(order) = cycle.order {
            let plan = self.core.plan().copied();
            keep(&mut self.orders, InferenceOrder { order, plan });
        }
        self.result.cycles += 1;
        if cycle.order != record.cycle.order || cycle.change != record.cycle.change {
            self.result.decisions_different += 1;
        }
        if let Some(found) = compare::cycles(&record.cycle, &cycle, &self.joints) {
            self.result.cycles_different += 1;
            self.differs(found);
        }
        self.cycle = record.number;
    }

    fn differs(&mut self, (field, recorded, replayed): Found) {
        if self.result.difference.is_none() {
            let (cycle, stamp) = (self.cycle + 1, self.now);
            let difference = Difference { cycle, stamp, field, recorded, replayed };
            self.result.difference = Some(difference);
        }
    }
}

/// Appends `item`; the oldest goes when there are too many.
fn keep<T>(list: &mut Vec<T>, item: T) {
    if list.len() == WAITING {
        list.remove(0);
    }
    list.push(item);
}

/// Takes the inference of `request` out of `list`.
fn take(list: &mut Vec<InferenceRecord>, request: u64) -> Option<InferenceRecord> {
    let at = list.iter().position(|i| i.request.id == request)?;
    Some(list.remove(at))
}
