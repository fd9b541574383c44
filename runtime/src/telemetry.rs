//! Histograms of latencies. Made before the loop; recording on one does not allocate.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Durations from 100 ns to 10 s with three digits; longer ones count as 10 s.
#[derive(Debug, Clone)]
pub struct Latencies {
    histogram: Histogram<u64>,
}

/// Quantiles of a set of durations (µs).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize, Default)]
pub struct Quantiles {
    /// How many.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

const LOWEST_NS: u64 = 100;
const HIGHEST_NS: u64 = 10_000_000_000;

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants that the histogram accepts.
        #[allow(clippy::expect_used)]
        let histogram = Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, 3)
            .expect("constant bounds with lowest * 2 <= highest and 3 digits");
        Self { histogram }
    }
}

impl Latencies {
    /// Adds one duration.
    pub fn record(&mut self, duration: Duration) {
        self.histogram.saturating_record(duration.as_nanos().min(HIGHEST_NS as u128) as u64);
    }

    /// The quantiles so far; zeros when nothing was recorded.
    pub fn quantiles(&self) -> Quantiles {
        let at = |q| self.histogram.value_at_quantile(q) as f64 / 1e3;
        Quantiles {
            count: self.histogram.len(),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: self.histogram.max() as f64 / 1e3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_in_microseconds() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantiles(), Quantiles::default());
        for k in 1..=1000 {
            latencies.record(Duration::from_micros(k));
        }
        latencies.record(Duration::from_secs(100));
        let q = latencies.quantiles();
        assert_eq!(q.count, 1001);
        assert!((q.p50 - 501.0).abs() < 2.0 && (q.p99 - 991.0).abs() < 2.0, "{q:?}");
        assert!(q.max > 9.9e6);
    }
}
