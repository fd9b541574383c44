//! Time: one monotonic clock schedules; stamps are that clock plus the host's UNIX offset.
//!
//! A [`Stamp`] is nanoseconds since the UNIX epoch, read as `CLOCK_MONOTONIC` plus an offset that is
//! taken once per process. So stamps never step backwards when the wall clock is set, and recordings
//! of several hosts still line up. A supervised process takes over its supervisor's offset, so that one
//! that is started again after the wall clock was set stamps as the others do.

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

    /// The offset (ns) of this process's stamps from the host's monotonic clock.
    pub fn offset() -> i64 {
        Self::now().0 - monotonic()
    }

    /// Takes over `offset` (ns), another process's [`Clock::offset`] on this host; false when this process has
    /// stamped already.
    pub fn adopt(offset: i64) -> bool {
        ORIGIN.set((Instant::now(), monotonic().saturating_add(offset))).is_ok()
    }

    fn origin() -> &'static (Instant, i64) {
        ORIGIN.get_or_init(|| {
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            (Instant::now(), unix.as_nanos() as i64)
        })
    }
}

static ORIGIN: OnceLock<(Instant, i64)> = OnceLock::new();

/// The host's monotonic clock (ns), which all of its processes share.
fn monotonic() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as i64 * 1_000_000_000 + now.tv_nsec as i64
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
    fn the_offset_leads_from_the_monotonic_clock_to_stamps() {
        let offset = Clock::offset();
        let apart = Clock::now().0 - (monotonic() + offset);
        assert!(apart.abs() < 1_000_000_000, "{apart}");
        assert!(!Clock::adopt(offset), "this process has stamped already");
    }

    #[test]
    fn since_is_zero_for_a_later_stamp() {
        let a = Stamp(100);
        assert_eq!((a + Duration::from_nanos(5)).since(a), Duration::from_nanos(5));
        assert_eq!(a.since(a + Duration::from_nanos(5)), Duration::ZERO);
    }
}
