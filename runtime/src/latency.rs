//! The policy's latency as it was measured, and the tail quantile that plans are made on.

use std::time::Duration;

/// Chunks remembered.
const CAPACITY: usize = 64;

/// The newest latencies.
#[derive(Debug, Clone)]
pub(crate) struct LatencyWindow {
    nanos: [u64; CAPACITY],
    seen: usize,
}

impl LatencyWindow {
    pub fn new() -> Self {
        Self { nanos: [0; CAPACITY], seen: 0 }
    }

    pub fn push(&mut self, latency: Duration) {
        self.nanos[self.seen % CAPACITY] = latency.as_nanos() as u64;
        self.seen += 1;
    }

    /// The 95 % quantile of the window (with few samples: the largest); `None` before the first.
    pub fn tail(&self) -> Option<Duration> {
        let n = self.seen.min(CAPACITY);
        if n == 0 {
            return None;
        }
        let mut sorted = self.nanos;
        sorted[..n].sort_unstable();
        Some(Duration::from_nanos(sorted[(n * 95 / 100).min(n - 1)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_on_the_tail_and_forgets_the_old() {
        let mut window = LatencyWindow::new();
        assert_eq!(window.tail(), None);
        for k in 1..=10 {
            window.push(Duration::from_millis(k));
        }
        assert_eq!(window.tail(), Some(Duration::from_millis(10)));
        for _ in 0..CAPACITY {
            window.push(Duration::from_millis(3));
        }
        assert_eq!(window.tail(), Some(Duration::from_millis(3)));
    }
}
