//! Real-time scheduling of the calling thread. The crate's only unsafe code: three system calls.

use crate::Stamp;

/// How much of real time is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RealtimeMode {
    /// Ordinary scheduling.
    Off,
    /// Ask for `SCHED_FIFO`; go on without it.
    BestEffort,
    /// Refuse to start without `SCHED_FIFO`.
    Enforce,
}

/// The operating system denied real-time scheduling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "SCHED_FIFO priority {priority} was denied ({reason}); run as root, or give the user an `rtprio` limit \
     (e.g. a line `@robot - rtprio 90` in /etc/security/limits.d/) and log in again"
)]
pub struct RealtimeDenied {
    priority: i32,
    reason: String,
}

/// Gives the calling thread `SCHED_FIFO` with `priority` (1..=99).
///
/// # Errors
/// [`RealtimeDenied`] with the fix.
#[allow(unsafe_code)]
pub fn set_fifo(priority: i32) -> Result<(), RealtimeDenied> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: `param` is a valid sched_param that outlives the call; 0 names the calling thread.
    let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
    if rc == 0 {
        Ok(())
    } else {
        Err(RealtimeDenied { priority, reason: std::io::Error::last_os_error().to_string() })
    }
}

/// What `start` gives, run on a thread under `SCHED_FIFO` at `priority` where that is permitted: the threads that it
/// starts inherit the scheduling. `None` runs it here.
///
/// A bus session opened so does not let a command wait behind ordinary threads on its way; the first session of a
/// process decides for all of them, because they share zenoh's threads.
pub fn with_fifo_threads<T: Send>(priority: Option<i32>, start: impl FnOnce() -> T + Send) -> T {
    let Some(priority) = priority else { return start() };
    let run = || {
        // Without the permission its threads are ordinary ones.
        let _ = set_fifo(priority.max(1));
        start()
    };
    match std::thread::scope(|scope| scope.spawn(run).join()) {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Number of processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Keeps the calling thread on processor `cpu` (from 0).
///
/// # Errors
/// The operating system's refusal.
pub fn pin(cpu: usize) -> Result<(), std::io::Error> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if cpu >= CpuSet::MAX_CPU {
        return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(Into::into)
}

/// Asks for wake-ups as exact as an ordinary thread can have (timer slack 1 ns).
#[allow(unsafe_code)]
pub fn set_timer_slack() {
    // SAFETY: PR_SET_TIMERSLACK takes one integer and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
}

/// Locks the process's present and future memory, so that no page fault delays a cycle.
///
/// # Errors
/// The operating system's refusal.
pub fn lock_memory() -> Result<(), std::io::Error> {
    use rustix::mm::{MlockAllFlags, mlockall};
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).map_err(Into::into)
}

/// Sleeps until `deadline` on the monotonic clock; returns at once when it has passed.
pub fn sleep_until(deadline: Stamp) {
    use rustix::thread::{ClockId, clock_nanosleep_absolute};
    use rustix::time::{Timespec, clock_gettime};
    let left = deadline.0.saturating_sub(crate::Clock::now().0);
    if left <= 0 {
        return;
    }
    let now = clock_gettime(rustix::time::ClockId::Monotonic);
    let nanos = now.tv_nsec as i64 + left;
    let wake =
        Timespec { tv_sec: now.tv_sec + nanos / 1_000_000_000, tv_nsec: nanos % 1_000_000_000 };
    // An interrupted sleep goes on; any other failure cannot happen with a valid time.
    while clock_nanosleep_absolute(ClockId::Monotonic, &wake) == Err(rustix::io::Errno::INTR) {}
}
