//! Time: one monotonic clock schedules; stamps are that clock plus the host's UNIX offset.
//!
//! A [`Stamp`] is nanoseconds since the UNIX epoch, read as `CLOCK_MONOTONIC` plus an offset that is
//! taken once per process. So stamps never step backwards when the wall clock is set, and recordings
//! of several hosts still line up.

use std::ops::{Add, Sub};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// An instant (ns since the UNIX epoch) on this process's monotonic clock.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Stamp(pub i64);

impl Stamp {
    /// The instant `nanos` nanoseconds after the epoch.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the epoch.
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    pub fn since(self, earlier: Stamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0).max(0) as u64)
    }

    /// Signed seconds from `other` to `self`.
    pub fn seconds_from(self, other: Stamp) -> f64 {
        self.0.saturating_sub(other.0) as f64 * 1e-9
    }
}

impl Add<Duration> for Stamp {
    type Output = Stamp;
    fn add(self, rhs: Duration) -> Stamp {
        Stamp(self.0.saturating_add(i64::try_from(rhs.as_nanos()).unwrap_or(i64::MAX)))
    }
}

impl Sub<Duration> for Stamp {
    type Output = Stamp;
    fn sub(self, rhs: Duration) -> Stamp {
        Stamp(self.0.saturating_sub(i64::try_from(rhs.as_nanos()).unwrap_or(i64::MAX)))
    }
}

/// The process's clock: where [`Stamp`]s come from.
///
/// Real time: [`Clock::now`] is one `clock_gettime`; it neither allocates nor locks after the first call.
pub struct Clock;

impl Clock {
    /// The present instant.
    pub fn now() -> Stamp {
        let (start, unix) = *Self::origin();
        Stamp(unix + start.elapsed().as_nanos() as i64)
    }

    fn origin() -> &'static (Instant, i64) {
        static ORIGIN: OnceLock<(Instant, i64)> = OnceLock::new();
        ORIGIN.get_or_init(|| {
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            (Instant::now(), unix.as_nanos() as i64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_do_not_go_back() {
        let mut last = Clock::now();
        for _ in 0..1000 {
            let now = Clock::now();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn since_is_zero_for_a_later_stamp() {
        let a = Stamp(100);
        assert_eq!((a + Duration::from_nanos(5)).since(a), Duration::from_nanos(5));
        assert_eq!(a.since(a + Duration::from_nanos(5)), Duration::ZERO);
    }
}
