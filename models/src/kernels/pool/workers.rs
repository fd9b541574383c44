//! The threads themselves.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Set in [`Shared::gate`] while a job takes workers in; the job's number above, the workers inside below.
const OPEN: u64 = 1 << 16;
/// One in the job's number.
const NUMBER: u64 = OPEN << 1;
/// The workers inside.
const INSIDE: u64 = OPEN - 1;

/// Turns of a spinning worker before it naps: some tens of microseconds, up to two hundred.
const SPINS: u32 = 3000;
/// How long the caller spins for workers in their last unit. Who takes longer has most likely been pushed off its core.
const PATIENCE: Duration = Duration::from_micros(600);
/// The caller's naps. Whoever waits for a thread that another process has pushed aside must leave its own core idle,
/// again and again: only an idle core is given that thread, and not before it has been off its own for a while (half a
/// millisecond in Linux). A core that is spun or yielded on is never idle.
const NAP: Duration = Duration::from_micros(200);
/// A worker's naps: the caller, too, may be waiting for a core.
const WORKER_NAP: Duration = Duration::from_micros(500);
/// Naps of a worker before it sleeps until it is woken.
const NAPS: u32 = 8;

type Work<'a> = dyn Fn(usize) + Sync + 'a;

#[derive(Clone, Copy)]
struct Job {
    work: *const Work<'static>,
    units: usize,
}

struct Shared {
    gate: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// The next unit that nobody has taken.
    next: AtomicUsize,
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
    /// True while the caller naps until the last worker leaves.
    waits: AtomicBool,
    /// Who that is.
    waiter: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written while the gate is closed and nobody is inside, and read by threads inside only; what it
// points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

thread_local! {
    /// True while this thread is inside a unit.
    static WORKING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` as if this thread were inside a unit.
pub(super) fn alone<T>(work: impl FnOnce() -> T) -> T {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            WORKING.set(self.0);
        }
    }
    let _back = Back(WORKING.replace(true));
    work()
}

/// Worker threads and the one job that they share.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    /// Held by the thread whose job runs.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("count", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `count` threads, on `cores` in turn. Where the system refuses a thread there are fewer.
    pub fn start(count: usize, cores: &[usize]) -> Self {
        let count = count.min(INSIDE as usize);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            asleep: (0..count).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            waiter: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let threads = (0..count).map_while(|index| {
            let (shared, core) = (shared.clone(), cores.get(index % cores.len().max(1)).copied());
            let name = format!("sinew-kernel-{index}");
            let body = move || {
                if let Some(core) = core {
                    pin(core);
                }
                shared.serve(index);
            };
            let spawned = std::thread::Builder::new().name(name).spawn(body).ok()?;
            Some(spawned.thread().clone())
        });
        let threads = threads.collect();
        Self { shared, threads, turn: Mutex::new(()) }
    }

    pub fn count(&self) -> usize {
        self.threads.len()
    }

    pub fn run(&self, units: usize, work: &Work<'_>) {
        let alone = || (0..units).for_each(work);
        if units < 2 || self.threads.is_empty() || WORKING.get() {
            return alone();
        }
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(std::sync::TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return alone(),
        };
        // SAFETY: only the lifetime changes. The pointer is followed by threads inside the gate only, and this
        // function does not return before the gate is closed and everybody has left.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let shared = &*self.shared;
        // SAFETY: the gate is closed with nobody inside: the last job ended so, and `turn` keeps others out.
        unsafe { *shared.job.get() = Some(Job { work, units }) };
        shared.next.store(0, Ordering::Relaxed);
        let number = shared.gate.load(Ordering::Relaxed) & !INSIDE;
        shared.gate.store(number.wrapping_add(NUMBER) | OPEN, Ordering::SeqCst);
        for (asleep, thread) in shared.asleep.iter().zip(&self.threads).take(units - 1) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        shared.take_units(Job { work, units });
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        shared.wait_for_the_last();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
    }
}

impl Shared {
    /// Takes units until none is left. A unit that panics ends the job; the first one's panic is kept.
    fn take_units(&self, job: Job) {
        WORKING.set(true);
        // SAFETY: this thread is inside the job, so what `work` points to lives.
        let work = unsafe { &*job.work };
        let taken = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let unit = self.next.fetch_add(1, Ordering::Relaxed);
                if unit >= job.units {
                    return;
                }
                work(unit);
            }
        }));
        WORKING.set(false);
        if let Err(panic) = taken {
            self.next.store(job.units, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// A worker's life.
    fn serve(&self, index: usize) {
        let mut served = 0;
        let (mut spins, mut naps) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let gate = self.gate.load(Ordering::Acquire);
            let number = gate & !INSIDE & !OPEN;
            if gate & OPEN == 0 || number == served {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    self.sleep(index, served, (naps < NAPS).then_some(WORKER_NAP));
                    (spins, naps) = (SPINS - SPINS / 8, naps + 1);
                }
                continue;
            }
            let entered =
                self.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
            if entered.is_err() {
                continue;
            }
            (served, spins, naps) = (number, 0, 0);
            // SAFETY: inside the gate; the job was written before it opened.
            if let Some(job) = unsafe { *self.job.get() } {
                self.take_units(job);
            }
            let before = self.gate.fetch_sub(1, Ordering::SeqCst);
            if before & INSIDE == 1 && self.waits.load(Ordering::SeqCst) {
                let waiter = self.waiter.lock().unwrap_or_else(PoisonError::into_inner);
                waiter.iter().for_each(Thread::unpark);
            }
        }
    }

    /// Waits for the workers that are inside their last unit.
    fn wait_for_the_last(&self) {
        let done = || self.gate.load(Ordering::SeqCst) & INSIDE == 0;
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            for _ in 0..SPINS / 32 {
                if done() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        *self.waiter.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        self.waits.store(true, Ordering::SeqCst);
        while !done() {
            std::thread::park_timeout(NAP);
        }
        self.waits.store(false, Ordering::SeqCst);
    }

    /// Sleeps until a job comes, at most for `nap`.
    fn sleep(&self, index: usize, served: u64, nap: Option<Duration>) {
        self.asleep[index].store(true, Ordering::SeqCst);
        // A job that was opened before the flag was seen wakes nobody: look once more.
        let gate = self.gate.load(Ordering::SeqCst);
        let fresh = gate & OPEN != 0 && gate & !INSIDE & !OPEN != served;
        if !fresh && !self.stop.load(Ordering::SeqCst) {
            match nap {
                Some(nap) => std::thread::park_timeout(nap),
                None => std::thread::park(),
            }
        }
        self.asleep[index].store(false, Ordering::Relaxed);
    }
}

/// True when this thread may run on `core`.
pub(super) fn may_use(core: usize) -> bool {
    core < rustix::thread::CpuSet::MAX_CPU
        && rustix::thread::sched_getaffinity(None).is_ok_and(|cores| cores.is_set(core))
}

/// Puts this thread on `core`. Where the system refuses, it stays where it is: slower and not wrong.
fn pin(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    if core < rustix::thread::CpuSet::MAX_CPU {
        cores.set(core);
        let _ = rustix::thread::sched_setaffinity(None, &cores);
    }
}
