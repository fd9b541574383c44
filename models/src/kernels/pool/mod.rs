//! The worker threads of the kernels: fixed, fed from one caller at a time, and never waiting for a thread that has
//! not begun.
//!
//! A job is a number of units, which threads take one by one: what a preempted worker would have taken, the others
//! take. The caller works along, closes the job when no unit is left and waits only for workers inside one. Workers
//! spin for a moment between jobs, since the next product of a network follows in microseconds, nap and then sleep.
//! Nobody spins for long: a core must be idle to be given a thread of ours that another process has pushed aside.
//!
//! Results are written through [`Pool::chunks`] and [`Pool::grid`], which give every unit a part of its own.

mod grid;
mod workers;

use std::sync::{Mutex, OnceLock};

pub use grid::{Cell, Edges, Grid};
use workers::Workers;

use crate::ModelError;

/// How many threads the kernels use, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Threads {
    /// Threads, the caller's included; none: one for each core that this process may use.
    pub count: Option<usize>,
    /// Cores for the workers, one after the other; none: wherever the system puts them.
    pub cores: Vec<usize>,
}

static CHOSEN: Mutex<Option<Threads>> = Mutex::new(None);
static POOL: OnceLock<Pool> = OnceLock::new();

/// Chooses the threads, before any kernel has run.
///
/// # Errors
/// [`ModelError::Threads`] when the workers run already with another choice, for no thread at all, or for a core that
/// this process may not use.
pub fn choose_threads(threads: Threads) -> Result<(), ModelError> {
    let wrong = |reason: String| Err(ModelError::Threads { reason });
    if threads.count == Some(0) {
        return wrong("0 were asked for; expected at least 1".to_owned());
    }
    if let Some(core) = threads.cores.iter().find(|core| !workers::may_use(**core)) {
        return wrong(format!("core {core} is none that this process may use"));
    }
    // A poisoned lock holds a whole choice all the same.
    let mut chosen = CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if POOL.get().is_some() && chosen.clone().unwrap_or_default() != threads {
        return wrong("they run already with another choice".to_owned());
    }
    *chosen = Some(threads);
    Ok(())
}

/// The threads of the kernels, started when they are first needed.
pub fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let chosen = CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let Threads { count, cores } = chosen.unwrap_or_default();
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        Pool { workers: Workers::start(count.unwrap_or_else(all) - 1, &cores) }
    })
}

/// Runs `work` on this thread alone: kernels inside it ask no worker for help.
pub fn alone<T>(work: impl FnOnce() -> T) -> T {
    workers::alone(work)
}

/// Worker threads.
#[derive(Debug)]
pub struct Pool {
    workers: Workers,
}

impl Pool {
    /// A pool of its own, for tests: `threads` counts the caller.
    #[cfg(test)]
    fn with_threads(threads: usize) -> Self {
        Self { workers: Workers::start(threads - 1, &[]) }
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.count() + 1
    }

    /// Runs `work` once for each unit below `units` and returns when all are done. Inside a unit, and while another
    /// thread's job runs, the caller does it all by itself.
    ///
    /// # Panics
    /// When `work` does.
    pub fn run(&self, units: usize, work: impl Fn(usize) + Sync) {
        self.workers.run(units, &work);
    }

    /// Runs `work` once for each piece of `values`, `size` long but for the last.
    pub fn chunks<T: Send>(
        &self,
        values: &mut [T],
        size: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        grid::chunks(&self.workers, values, size.max(1), &work);
    }

    /// Runs `work` once for each cell of `grid`, over the matrix `values`.
    ///
    /// # Panics
    /// When the grid is larger than the matrix.
    pub fn grid(&self, values: &mut [f32], grid: &Grid<'_>, work: impl Fn(Cell<'_>) + Sync) {
        grid::cells(&self.workers, values, grid, &work);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_unit_runs_once_however_often_jobs_follow() {
        let pool = Pool::with_threads(4);
        for round in 0..2000 {
            let units = round % 37;
            let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
            pool.run(units, |unit| {
                counts[unit].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "round {round}");
        }
    }

    #[test]
    fn jobs_inside_jobs_and_beside_each_other_are_done() {
        let pool = Pool::with_threads(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(5, |_| {
                            pool.run(4, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 3 * 100 * 20);
    }

    #[test]
    fn work_alone_stays_on_its_thread() {
        let pool = Pool::with_threads(3);
        let here = std::thread::current().id();
        let elsewhere = AtomicUsize::new(0);
        let run = || {
            for _ in 0..200 {
                pool.run(16, |_| {
                    let away = std::thread::current().id() != here;
                    elsewhere.fetch_add(usize::from(away), Ordering::Relaxed);
                    std::thread::sleep(std::time::Duration::from_micros(20));
                });
            }
        };
        alone(run);
        assert_eq!(elsewhere.load(Ordering::Relaxed), 0);
        // A panic gives the thread back to the pool, and a job inside leaves it alone.
        assert!(std::panic::catch_unwind(|| alone(|| panic!("inside"))).is_err());
        run();
        assert!(elsewhere.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_caller_that_naps_sees_the_last_unit_end() {
        let pool = Pool::with_threads(3);
        let caller = std::thread::current().id();
        for round in 0..20 {
            let done = AtomicUsize::new(0);
            pool.run(6, |_| {
                // Workers take longer than the caller spins.
                if std::thread::current().id() != caller {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 6, "round {round}");
        }
    }

    #[test]
    fn a_unit_that_panics_ends_the_job_and_not_the_pool() {
        let pool = Pool::with_threads(3);
        for bad in 0..8 {
            let job = std::panic::AssertUnwindSafe(|| pool.run(8, |unit| assert!(unit != bad)));
            assert!(std::panic::catch_unwind(job).is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(8, |unit| {
            sum.fetch_add(unit, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }

    #[test]
    fn chunks_and_cells_cover_everything_once() {
        let pool = Pool::with_threads(3);
        let mut values = vec![0u32; 101];
        pool.chunks(&mut values, 10, |unit, part| {
            part.iter_mut().for_each(|v| *v += unit as u32 + 1);
        });
        assert!(values.iter().enumerate().all(|(i, v)| *v as usize == i / 10 + 1));
        let mut matrix = vec![0f32; 7 * 5];
        let grid = Grid { width: 5, rows: &[0, 3, 7], columns: &[0, 1, 4] };
        pool.grid(&mut matrix, &grid, |mut cell| {
            for row in cell.rows() {
                let value = (cell.unit + 1) as f32;
                cell.row(row).iter_mut().for_each(|v| *v += value);
            }
        });
        let expected = |r: usize, c: usize| match (r < 3, c) {
            (_, 4) => 0.0,
            (true, 0) => 1.0,
            (false, 0) => 2.0,
            (true, _) => 3.0,
            (false, _) => 4.0,
        };
        for (i, v) in matrix.iter().enumerate() {
            assert_eq!(*v, expected(i / 5, i % 5), "{i}");
        }
    }

    #[test]
    fn choices_that_make_no_sense_are_refused() {
        let none = Threads { count: Some(0), cores: Vec::new() };
        assert!(choose_threads(none).is_err_and(|e| e.to_string().contains("at least 1")));
        let nowhere = Threads { count: None, cores: vec![100_000] };
        assert!(choose_threads(nowhere).is_err_and(|e| e.to_string().contains("core 100000")));
    }
}
