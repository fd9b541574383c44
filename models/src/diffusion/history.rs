//! The last few observations, as the network sees them.
//!
//! A policy trained on `n` observations one action apart (`dt`) finds them here by instant. A place `j` steps back
//! takes the observation nearest to `now − j·dt`, if one lies within half a step of it. Otherwise it repeats the one
//! after it, as the reference does at the start of a run: the network then sees an arm at rest, which it knows.
//!
//! Runs are not mixed: everything is forgotten when the instruction changes, when time goes back, and when more
//! than [`GAP`] steps passed without an observation (the arm was handed over, or the policy stood still).

use std::collections::VecDeque;
use std::time::Duration;

use sinew_runtime::Stamp;

/// Steps without an observation after which a new run begins.
const GAP: f64 = 4.0;

/// Observations kept for each one that the network sees: what a caller faster than the policy gives, or a
/// delayed one catches up with.
const KEPT: usize = 8;

/// Bounded memory of observations; `T` is what an observation became.
#[derive(Debug, Clone)]
pub struct History<T> {
    steps: usize,
    dt: Duration,
    instruction: String,
    /// Rising instants.
    entries: VecDeque<(Stamp, T)>,
}

impl<T: Clone> History<T> {
    /// Memory for a network that sees `steps` observations, `dt` apart.
    pub fn new(steps: usize, dt: Duration) -> Self {
        Self { steps, dt, instruction: String::new(), entries: VecDeque::new() }
    }

    /// What the observation of `instant` became, if it is here.
    pub fn find(&self, instant: Stamp, instruction: &str) -> Option<&T> {
        let known = self.entries.iter().rev().find(|(stamp, _)| *stamp == instant);
        known.filter(|_| self.instruction == instruction).map(|(_, value)| value)
    }

    /// Adds the observation of `instant`. One of the same instant is replaced.
    pub fn push(&mut self, instant: Stamp, instruction: &str, value: T) {
        if self.instruction != instruction {
            self.instruction = instruction.to_owned();
            self.entries.clear();
        }
        if let Some((newest, _)) = self.entries.back() {
            let gap = signed_seconds(instant, *newest);
            if gap < 0.0 || gap > GAP * self.dt.as_secs_f64() {
                self.entries.clear();
            } else if gap == 0.0 {
                self.entries.pop_back();
            }
        }
        self.entries.push_back((instant, value));
        while self.entries.len() > KEPT * self.steps {
            self.entries.pop_front();
        }
    }

    /// What the network sees at the newest instant, oldest first: always as many as it was made for, none before
    /// the first [`Self::push`].
    pub fn window(&self) -> Vec<T> {
        let Some((now, newest)) = self.entries.back() else { return Vec::new() };
        let step = self.dt.as_secs_f64();
        let mut window = vec![newest.clone()];
        for back in 1..self.steps {
            let offset = |stamp: Stamp| (signed_seconds(*now, stamp) - back as f64 * step).abs();
            let nearest = self.entries.iter().min_by(|a, b| offset(a.0).total_cmp(&offset(b.0)));
            let found = nearest.filter(|(stamp, _)| offset(*stamp) <= 0.5 * step);
            let value = found.map_or_else(|| window[back - 1].clone(), |(_, value)| value.clone());
            window.push(value);
        }
        window.reverse();
        window
    }
}

/// `a − b` (s).
fn signed_seconds(a: Stamp, b: Stamp) -> f64 {
    match a >= b {
        true => a.since(b).as_secs_f64(),
        false => -b.since(a).as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DT: Duration = Duration::from_millis(100);

    fn at(ms: u64) -> Stamp {
        Stamp(0) + Duration::from_millis(ms)
    }

    fn fed(instants: &[u64]) -> History<u64> {
        let mut history = History::new(3, DT);
        for ms in instants {
            history.push(at(*ms), "pick", *ms);
        }
        history
    }

    #[test]
    fn the_first_observation_fills_the_window() {
        assert_eq!(fed(&[]).window(), Vec::<u64>::new());
        assert_eq!(fed(&[1000]).window(), [1000, 1000, 1000]);
        assert_eq!(fed(&[1000, 1100]).window(), [1000, 1000, 1100]);
        assert_eq!(fed(&[1000, 1100, 1200]).window(), [1000, 1100, 1200]);
    }

    #[test]
    fn a_repeated_observation_is_replaced() {
        let mut history = fed(&[1000, 1100]);
        history.push(at(1100), "pick", 7);
        assert_eq!(history.window(), [1000, 1000, 7]);
        assert_eq!(history.find(at(1100), "pick"), Some(&7));
        assert_eq!(history.find(at(1100), "place"), None);
    }

    #[test]
    fn a_skipped_observation_is_stood_in_for_by_the_next() {
        assert_eq!(fed(&[1000, 1200]).window(), [1000, 1200, 1200]);
        assert_eq!(fed(&[1000, 1300]).window(), [1300, 1300, 1300]);
    }

    #[test]
    fn a_faster_caller_is_thinned_out() {
        let every_20_ms: Vec<u64> = (0..40).map(|i| 1000 + 20 * i).collect();
        assert_eq!(fed(&every_20_ms).window(), [1580, 1680, 1780]);
        assert!(fed(&every_20_ms).entries.len() <= 3 * KEPT);
    }

    #[test]
    fn runs_are_not_mixed() {
        assert_eq!(fed(&[1000, 1100, 1600]).window(), [1600; 3], "a gap");
        assert_eq!(fed(&[1000, 1100, 900]).window(), [900; 3], "time went back");
        let mut history = fed(&[1000, 1100]);
        history.push(at(1200), "place", 1200);
        assert_eq!(history.window(), [1200; 3], "another instruction");
        history.push(at(1300), "place", 1300);
        assert_eq!(history.window(), [1200, 1200, 1300]);
    }
}
