//! What was executed when: the ring that turns an observation's instant into the time played by then.

use crate::{JointVec, Stamp};

/// Control periods remembered: two seconds at 1 kHz, twenty at 100 Hz.
const CAPACITY: usize = 2048;

/// One control period's progress.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub at: Stamp,
    /// Seconds played since the scheduler was started.
    pub played: f64,
    /// Position (rad) that was sent.
    pub position: JointVec,
}

/// A ring of the newest entries, oldest overwritten; stamps never fall.
#[derive(Debug)]
pub(super) struct History {
    entries: Vec<Entry>,
    next: usize,
}

impl History {
    pub fn new() -> Self {
        Self { entries: Vec::with_capacity(CAPACITY), next: 0 }
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.next = 0;
    }

    /// Appends `entry`; within the capacity reserved at start, so nothing is allocated.
    pub fn push(&mut self, entry: Entry) {
        if self.entries.len() < CAPACITY {
            self.entries.push(entry);
        } else {
            self.entries[self.next] = entry;
        }
        self.next = (self.next + 1) % CAPACITY;
    }

    /// The last entry at or before `instant`; the oldest one when `instant` lies before all.
    pub fn at(&self, instant: Stamp) -> Option<Entry> {
        let (newer, older) = self.entries.split_at(self.next.min(self.entries.len()));
        let after_in = |part: &[Entry]| part.partition_point(|e| e.at <= instant);
        // Oldest first is `older` then `newer`.
        let index = match after_in(newer) {
            0 => after_in(older).checked_sub(1).map(|i| older[i]),
            n => Some(newer[n - 1]),
        };
        index.or_else(|| older.first().or(newer.first()).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_entry_of_an_instant_across_the_wrap() {
        let mut history = History::new();
        assert!(history.at(Stamp(5)).is_none());
        for k in 0..(CAPACITY as i64 + 100) {
            let position = JointVec::zeros(1);
            history.push(Entry { at: Stamp(k * 10), played: k as f64, position });
        }
        let played = |t| history.at(Stamp(t)).map(|e| e.played);
        assert_eq!(played(15_005), Some(1500.0));
        assert_eq!(played(i64::MAX), Some(CAPACITY as f64 + 99.0));
        assert_eq!(played(0), Some(100.0), "forgotten instants give the oldest entry");
        assert_eq!(played(1_000), Some(100.0));
    }
}
