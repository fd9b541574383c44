//! The command stream measured where it matters: at the driver's side.

use std::time::Duration;

use sinew_runtime::Stamp;
use sinew_runtime::telemetry::{Latencies, Quantiles};

/// The command stream as it arrived.
#[derive(Debug, Default)]
pub struct CommandStats {
    period: Duration,
    first: Option<Stamp>,
    last: Option<Stamp>,
    last_sequence: u64,
    commands: u64,
    lost: u64,
    reordered: u64,
    invalid: u64,
    refused: u64,
    missed_periods: u64,
    jitter: Latencies,
    one_way: Latencies,
}

/// Figures of [`CommandStats`]; jitter is how far an interval was from the period (µs).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize, Default)]
pub struct StreamFigures {
    /// Commands received.
    pub commands: u64,
    /// From the first to the last (s).
    pub seconds: f64,
    /// Intervals a second.
    pub achieved_rate_hz: f64,
    /// Numbers that never came.
    pub lost: u64,
    /// Commands that came after a newer one.
    pub reordered: u64,
    /// Messages that were no command.
    pub invalid: u64,
    /// Commands refused at the driver's gate: from a second source, too old, stamped in the future, or before the
    /// driver was seen.
    pub refused: u64,
    /// Periods without a command: the sum over all intervals of whole periods beyond one.
    pub missed_periods: u64,
    /// Distance of an interval from the period (µs).
    pub jitter_us: Quantiles,
    /// From the control thread's stamp to arrival (µs).
    pub one_way_us: Quantiles,
}

impl CommandStats {
    /// Counts commands that are expected every `period`.
    pub fn new(period: Duration) -> Self {
        Self { period, ..Self::default() }
    }

    /// Counts a message that was no command.
    pub fn on_invalid(&mut self) {
        self.invalid += 1;
    }

    /// Counts a command that the driver's gate refused.
    pub fn on_refused(&mut self) {
        self.refused += 1;
    }

    /// Counts a command whose number is not above the last one's.
    pub fn on_out_of_order(&mut self) {
        self.reordered += 1;
    }

    /// Counts a command numbered `sequence`, stamped `stamp`, arriving at `now`; false when it is out of order.
    pub fn on_command(&mut self, sequence: u64, stamp: Stamp, now: Stamp) -> bool {
        if sequence <= self.last_sequence {
            self.reordered += 1;
            return false;
        }
        if let Some(last) = self.last {
            self.lost += sequence - self.last_sequence - 1;
            let interval = now.since(last);
            self.jitter.record(interval.abs_diff(self.period));
            let periods = interval.as_secs_f64() / self.period.as_secs_f64();
            self.missed_periods += (periods.round() as u64).saturating_sub(1);
        }
        self.one_way.record(now.since(stamp));
        self.first.get_or_insert(now);
        (self.last, self.last_sequence) = (Some(now), sequence);
        self.commands += 1;
        true
    }

    /// The figures so far.
    pub fn figures(&self) -> StreamFigures {
        let seconds = match (self.first, self.last) {
            (Some(first), Some(last)) => last.since(first).as_secs_f64(),
            _ => 0.0,
        };
        let intervals = self.commands.saturating_sub(1) as f64;
        StreamFigures {
            commands: self.commands,
            seconds,
            achieved_rate_hz: if seconds > 0.0 { intervals / seconds } else { 0.0 },
            lost: self.lost,
            reordered: self.reordered,
            invalid: self.invalid,
            refused: self.refused,
            missed_periods: self.missed_periods,
            jitter_us: self.jitter.quantiles(),
            one_way_us: self.one_way.quantiles(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_order_and_rate_are_counted() {
        let period = Duration::from_millis(10);
        let mut stats = CommandStats::new(period);
        let at = |k: u32| Stamp(1_000_000) + period * k;
        for k in [0u32, 1, 2, 5, 6] {
            assert!(stats.on_command(u64::from(k) + 1, at(k), at(k)));
        }
        assert!(!stats.on_command(3, at(7), at(7)), "an older number is not followed");
        let figures = stats.figures();
        assert_eq!((figures.commands, figures.lost, figures.reordered), (5, 2, 1));
        assert_eq!(figures.missed_periods, 2);
        assert!((figures.achieved_rate_hz - 4.0 / 0.06).abs() < 1e-6);
    }
}
