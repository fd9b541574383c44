//! Watches what a cache costs while it is used: now and then something that would be reused is computed instead, and
//! the error goes into a running bound. Pure: draws and errors come from outside.

use std::collections::VecDeque;

use sinew_runtime::Opening;

/// Settings of a [`Monitor`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MonitorConfig {
    /// Share of the reuses that are computed and compared, 0 to 1; 0: none ever is, and the cache stays open.
    pub share: f64,
    /// How often a reuse may be worse than the bound, above 0 and below 1.
    pub exceeded: f64,
    /// Comparisons that the bound is made of; the oldest are forgotten.
    pub window: usize,
    /// Relative error above which the cache closes.
    pub limit: f64,
    /// Chunks in a row with the bound below the limit before the cache opens by one step.
    pub calm: u32,
}

impl Default for MonitorConfig {
    fn default() -> Self {
        Self { share: 0.02, exceeded: 0.05, window: 99, limit: 0.1, calm: 5 }
    }
}

/// What to do with something that could be reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Reuse it.
    Reuse,
    /// Compute it and say how far off the reuse would have been ([`Monitor::checked`]).
    Check,
    /// Compute it.
    Compute,
}

/// A cache's opening as a state machine.
///
/// The bound is the `⌊exceeded·(n + 1)⌋`-th largest of the last `n` errors: as long as errors come as those before did
/// (exchangeable, in any distribution), the next one exceeds it with a probability of at most `exceeded` (split
/// conformal prediction, Vovk et al. 2005). With fewer than `1/exceeded − 1` comparisons there is no such bound.
///
/// Open: everything may be reused. When the bound, or without one the second-largest error, exceeds the limit, the cache
/// closes at once: everything is computed, and what a reuse would have cost is compared each time, which is free
/// then. After [`MonitorConfig::calm`] calm chunks it is narrow: only what was computed in the evaluation just before is
/// reused; after as many more it is open. Each closing doubles the calm asked for, up to 32 times; an open time of that
/// length forgets it. Every step begins with no comparisons.
#[derive(Debug, Clone, PartialEq)]
pub struct Monitor {
    config: MonitorConfig,
    opening: Opening,
    errors: VecDeque<f64>,
    calm: u32,
    needed: u32,
}

/// Most that the calm asked for grows by.
const PATIENCE: u32 = 32;

impl Monitor {
    /// An open cache that nothing is known of.
    pub fn new(config: MonitorConfig) -> Self {
        let (errors, needed) = (VecDeque::new(), config.calm.max(1));
        Self { config, opening: Opening::Open, errors, calm: 0, needed }
    }

    /// Its settings.
    pub fn config(&self) -> MonitorConfig {
        self.config
    }

    /// How far the cache is open.
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// What to do with something kept for `age` evaluations (1: since the one before); `draw` is uniform in 0..1.
    pub fn decide(&self, age: usize, draw: f64) -> Verdict {
        match self.opening {
            Opening::Closed => Verdict::Check,
            Opening::Narrow if age > 1 => Verdict::Compute,
            _ if draw < self.config.share => Verdict::Check,
            _ => Verdict::Reuse,
        }
    }

    /// A reuse would have had this relative error.
    pub fn checked(&mut self, error: f64) {
        // What is no number is as bad as can be.
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if self.errors.len() >= self.config.window.max(1) {
            self.errors.pop_front();
        }
        self.errors.push_back(error);
        if self.opening != Opening::Closed && self.too_large() {
            self.needed = self.needed.saturating_mul(2).min(self.config.calm.max(1) * PATIENCE);
            self.go(Opening::Closed);
        }
    }

    /// A chunk has been made.
    pub fn chunk_made(&mut self) {
        let calm = self.bound().is_some_and(|bound| bound <= self.config.limit);
        self.calm = if calm { self.calm + 1 } else { 0 };
        if self.calm >= self.needed {
            match self.opening {
                Opening::Closed => self.go(Opening::Narrow),
                Opening::Narrow => self.go(Opening::Open),
                Opening::Open => self.needed = self.config.calm.max(1),
            }
        }
    }

    /// The relative error that a reuse exceeds at most as often as [`MonitorConfig::exceeded`] says; `None` while too
    /// little is known.
    pub fn bound(&self) -> Option<f64> {
        let rank = (self.config.exceeded * (self.errors.len() + 1) as f64 + 1e-9) as usize;
        self.largest(rank.checked_sub(1)?)
    }

    /// Comparisons that the bound is made of.
    pub fn comparisons(&self) -> usize {
        self.errors.len()
    }

    /// The error that so many others are not below.
    fn largest(&self, rank: usize) -> Option<f64> {
        let mut sorted: Vec<f64> = self.errors.iter().copied().collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.get(rank).copied()
    }

    fn too_large(&self) -> bool {
        let seen = self.bound().or_else(|| self.largest(1));
        seen.is_some_and(|error| error > self.config.limit)
    }

    fn go(&mut self, opening: Opening) {
        self.opening = opening;
        self.errors.clear();
        self.calm = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random::SplitMix64;

    fn config() -> MonitorConfig {
        MonitorConfig { share: 0.5, limit: 1.0, calm: 2, ..MonitorConfig::default() }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Error(f64),
        Chunk,
        Ask(usize, f64),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            4 => (0.0..0.9f64).prop_map(Event::Error),
            1 => (1.1..9.0f64).prop_map(Event::Error),
            1 => Just(Event::Error(f64::NAN)),
            3 => Just(Event::Chunk),
            2 => (1usize..5, 0.0..1.0f64).prop_map(|(age, draw)| Event::Ask(age, draw)),
        ];
        prop::collection::vec(event, 0..400)
    }

    proptest! {
        #[test]
        fn it_closes_at_once_and_opens_step_by_step(events in events()) {
            let mut monitor = Monitor::new(config());
            let mut chunks = 0;
            for event in events {
                let before = monitor.opening();
                match event {
                    Event::Error(error) => {
                        monitor.checked(error);
                        if before == Opening::Closed {
                            prop_assert_eq!(monitor.opening(), Opening::Closed);
                        }
                        if monitor.bound().is_some_and(|b| b > 1.0) {
                            prop_assert_eq!(monitor.opening(), Opening::Closed);
                        }
                    }
                    Event::Chunk => {
                        chunks += 1;
                        monitor.chunk_made();
                    }
                    Event::Ask(age, draw) => {
                        let verdict = monitor.decide(age, draw);
                        match before {
                            Opening::Closed => prop_assert_eq!(verdict, Verdict::Check),
                            Opening::Narrow => prop_assert!(age == 1 || verdict != Verdict::Reuse),
                            Opening::Open => prop_assert_eq!(verdict == Verdict::Check, draw < 0.5),
                        }
                        prop_assert_eq!(monitor.opening(), before, "asking changes nothing");
                    }
                }
                let after = monitor.opening();
                let up = matches!(
                    (before, after),
                    (Opening::Closed, Opening::Narrow) | (Opening::Narrow, Opening::Open)
                );
                prop_assert!(after == before || up || after == Opening::Closed);
                if up {
                    prop_assert!(chunks >= 2, "calm chunks are needed for each step");
                    chunks = 0;
                }
                if after == Opening::Closed && before != after {
                    chunks = 0;
                }
                prop_assert!(monitor.comparisons() <= 99);
            }
        }

        #[test]
        fn small_errors_never_close_it(errors in prop::collection::vec(0.0..=1.0f64, 0..300)) {
            let mut monitor = Monitor::new(config());
            for error in errors {
                monitor.checked(error);
                monitor.chunk_made();
                prop_assert_eq!(monitor.opening(), Opening::Open);
            }
        }
    }

    #[test]
    fn the_bound_is_exceeded_as_seldom_as_it_says() {
        let mut monitor = Monitor::new(MonitorConfig { limit: f64::MAX, ..config() });
        let mut random = SplitMix64::new(3);
        let (mut over, mut of) = (0, 0);
        for _ in 0..20_000 {
            // Long-tailed errors.
            let error = -random.open_unit().ln() / random.open_unit();
            if let Some(bound) = monitor.bound() {
                of += 1;
                over += u32::from(error > bound);
            }
            monitor.checked(error);
        }
        let share = f64::from(over) / f64::from(of);
        assert!((0.03..=0.055).contains(&share), "{share}");
    }

    #[test]
    fn a_closed_cache_waits_longer_each_time() {
        let mut monitor = Monitor::new(config());
        let chunks_until = |monitor: &mut Monitor, wanted| {
            let mut chunks = 0;
            while monitor.opening() != wanted {
                (0..40).for_each(|_| monitor.checked(0.1));
                monitor.chunk_made();
                chunks += 1;
            }
            chunks
        };
        let mut waits = Vec::new();
        for _ in 0..7 {
            while monitor.opening() != Opening::Closed {
                monitor.checked(5.0);
            }
            waits.push(chunks_until(&mut monitor, Opening::Open));
        }
        assert_eq!(waits, [8, 16, 32, 64, 128, 128, 128]);
        for _ in 0..64 {
            (0..40).for_each(|_| monitor.checked(0.1));
            monitor.chunk_made();
        }
        while monitor.opening() != Opening::Closed {
            monitor.checked(5.0);
        }
        assert_eq!(chunks_until(&mut monitor, Opening::Open), 8, "a long calm forgets");
    }

    #[test]
    fn two_bad_errors_are_enough_while_little_is_known() {
        let mut monitor = Monitor::new(config());
        monitor.checked(3.0);
        assert_eq!((monitor.opening(), monitor.bound()), (Opening::Open, None));
        monitor.checked(3.0);
        assert_eq!(monitor.opening(), Opening::Closed);
    }
}
