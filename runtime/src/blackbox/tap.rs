//! The control thread's end of the black box.

use std::time::Duration;

use rtrb::{Consumer, Producer, RingBuffer};

use super::record::{ControlRecord, CycleRecord, EffectRecord, EventRecord};
use crate::control::{ControlEvent, Cycle, Effect};
use crate::{JointVec, MAX_JOINTS, Stamp};

/// Records that may wait for the writer: more than a second at 1 kHz.
const RING: usize = 4096;

/// Takes the control thread's records to the writer, or nowhere.
///
/// Real time: no method allocates, frees, locks or waits. What finds no room is counted, and the count goes
/// ahead of the next record that does.
#[derive(Debug)]
pub struct ControlTap {
    ring: Option<Producer<ControlRecord>>,
    cycles: u64,
    lost: u64,
    last_work: Duration,
}

impl ControlTap {
    /// A tap that records nothing.
    pub fn off() -> Self {
        Self { ring: None, cycles: 0, lost: 0, last_work: Duration::ZERO }
    }

    /// A tap and the writer's end of its ring.
    pub(super) fn new() -> (Self, Consumer<ControlRecord>) {
        Self::with_room(RING)
    }

    fn with_room(records: usize) -> (Self, Consumer<ControlRecord>) {
        let (mut ring, mut out) = RingBuffer::new(records);
        // Touch every page now, so that the control thread faults on none of them.
        while ring.push(ControlRecord::Lost(0)).is_ok() {}
        while out.pop().is_ok() {}
        (Self { ring: Some(ring), ..Self::off() }, out)
    }

    /// The core is about to be given `event` at `now`.
    pub fn event(&mut self, event: &ControlEvent, now: Stamp) {
        if self.ring.is_none() {
            return;
        }
        let (record, chunk) = EventRecord::split(event);
        let values = chunk.map_or(&[][..], |c| c.values());
        let blocks = values.chunks(MAX_JOINTS);
        let cycle = self.cycles + 1;
        let event = ControlRecord::Event { cycle, now, event: record };
        // A block is never longer than a `JointVec` holds.
        let values = blocks.filter_map(JointVec::from_slice).map(ControlRecord::Values);
        let count = 1 + chunk.map_or(0, |c| c.values().len().div_ceil(MAX_JOINTS));
        self.push(std::iter::once(event).chain(values), count);
    }

    /// The event that was given led to `effect`.
    pub fn effect(&mut self, effect: &Effect) {
        let record = EffectRecord::of(effect);
        if self.ring.is_some() && record != EffectRecord::default() {
            self.push(std::iter::once(ControlRecord::Effect(record)), 1);
        }
    }

    /// The core made `cycle` at `now`; it was due at `due`, after `missed` periods slept through.
    pub fn cycle(&mut self, cycle: &Cycle, now: Stamp, due: Stamp, missed: u32) {
        self.cycles += 1;
        if self.ring.is_some() {
            let (number, last_work) = (self.cycles, self.last_work);
            let record = CycleRecord { number, now, due, missed, last_work, cycle: *cycle };
            self.push(std::iter::once(ControlRecord::Cycle(record)), 1);
        }
    }

    /// The cycle's work took `work`; it is recorded with the next one.
    pub fn worked(&mut self, work: Duration) {
        self.last_work = work;
    }

    /// Pushes all `count` of `records`, or none.
    fn push(&mut self, records: impl Iterator<Item = ControlRecord>, count: usize) {
        let Some(ring) = &mut self.ring else { return };
        let before = usize::from(self.lost > 0);
        if ring.slots() < count + before {
            self.lost += count as u64;
            return;
        }
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            // There is room: this thread alone fills the ring.
            let _ = ring.push(ControlRecord::Lost(lost));
        }
        for record in records {
            let _ = ring.push(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ActionChunk;

    #[test]
    fn a_full_ring_loses_whole_events_and_says_how_many_records() {
        let (mut tap, mut out) = ControlTap::with_room(4);
        let event = |n| ControlEvent::ChunkFailed(n);
        for n in 0..3 {
            tap.event(&event(n), Stamp(0));
        }
        // One record and three blocks of values: no room for all four, so none goes.
        let chunk = ActionChunk::new(7, Stamp(0), Duration::from_millis(50), 6, vec![0.5; 48]);
        tap.event(&ControlEvent::Chunk(chunk.expect("whole rows")), Stamp(0));
        let mut seen = Vec::new();
        while let Ok(record) = out.pop() {
            seen.push(record);
        }
        assert_eq!(seen.len(), 3);
        tap.event(&event(9), Stamp(5));
        assert_eq!(out.pop(), Ok(ControlRecord::Lost(4)));
        let expected =
            ControlRecord::Event { cycle: 1, now: Stamp(5), event: EventRecord::ChunkFailed(9) };
        assert_eq!(out.pop(), Ok(expected));
    }
}
