//! What `sinew bench` measures: how long a policy's stages and a control cycle take, and how smooth and how
//! good the demo is under injected latency.
//!
//! Every profile says what is inside the interval and gives medians and tails; none of them judges.

pub mod authority;
pub mod cache;
pub mod closed_loop;
pub mod control;
pub mod cost;
pub mod kernels;
pub mod observed;
pub mod plot;
pub mod policy;
pub mod seams;
pub mod stream;
pub mod tail;

/// Spread of a set of durations (ms).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of `samples` (ms); `None` when there is none.
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let last = samples.len().checked_sub(1)?;
        let at = |q: f64| samples[(q * last as f64).round() as usize];
        Some(Self { min: at(0.0), p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_a_hundred() {
        let spread = Spread::of((0..=100).rev().map(f64::from).collect()).expect("not empty");
        assert_eq!((spread.min, spread.p50, spread.p99, spread.max), (0.0, 50.0, 99.0, 100.0));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
