//! The tail of a policy's latency while a control thread runs and foreign processes want the same cores, beside bare
//! products under the same load.
//!
//! All take turns in one run (A B C A B C): a chunk of the policy; as many products as take about as long, every
//! thread with a fixed share of its own and nothing shared; and the same products one after another on the
//! kernels' worker pool. What disturbs the machine disturbs all of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use sinew_drivers::sim::ArmDescription;
use sinew_models::kernels::gemm::{Dense, multiply};
use sinew_models::kernels::pool::{alone, pool};
use sinew_models::kernels::{Compute, Epilogue, Isa, Packed};
use sinew_runtime::blackbox::ControlTap;
use sinew_runtime::guard::GuardError;
use sinew_runtime::inference;
use sinew_runtime::rt::{RealtimeDenied, RealtimeMode};
use sinew_runtime::stream::{self, StreamConfig, StreamPorts};
use sinew_runtime::telemetry::{Latencies, Quantiles};
use sinew_runtime::{ChunkRequest, Clock, Policy, PolicyError, Stamp};

use crate::Spread;
use crate::policy::{PolicyCase, observation};
use crate::stream::{Feeder, core};

/// The bare product: rows, inputs, outputs, as in SmolVLA's action expert.
pub const PRODUCT: [usize; 3] = [50, 960, 2560];
/// Calls of each kind before those that are timed.
const WARMUP: usize = 7;

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct TailPlan {
    /// Calls of each kind.
    pub calls: usize,
    /// Control period.
    pub period: Duration,
    /// `SCHED_FIFO` priority of the control thread, where it is permitted.
    pub priority: i32,
    /// The processor that the control thread stays on; `None`: any.
    pub cpu: Option<usize>,
    /// What the policy is given; its `iterations` and `warmup` are not used.
    pub case: PolicyCase,
}

/// One kind of call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TailRow {
    /// What ran.
    pub what: &'static str,
    /// One call (ms).
    pub call_ms: Spread,
    /// The 99th percentile over the median.
    pub tail: f64,
    /// The 90th percentile over the median.
    pub shoulder: f64,
    /// Due to wake-up of the control thread while it ran (µs).
    pub control_us: Quantiles,
    /// Control periods slept through while it ran.
    pub missed: u64,
}

/// All kinds of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TailProfile {
    /// Calls of each kind.
    pub calls: usize,
    /// Control period (ms).
    pub period_ms: f64,
    /// Scheduling that the control thread got.
    pub scheduling: &'static str,
    /// How the policy's layers compute.
    pub compute: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of the kernels.
    pub threads: usize,
    /// Rows, inputs, outputs of the bare product.
    pub product: [usize; 3],
    /// Products in a bare call.
    pub products: usize,
    /// The policy first, then the bare loops.
    pub rows: Vec<TailRow>,
}

impl TailProfile {
    /// The policy's tail over that of bare row `index`.
    pub fn against(&self, index: usize) -> Option<f64> {
        Some(self.rows.first()?.tail / self.rows.get(index)?.tail)
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// The policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Real-time scheduling.
    #[error(transparent)]
    Realtime(#[from] RealtimeDenied),
    /// The control core.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// A thread of the bare loop ended early.
    #[error("a thread of the bare loop ended before the others; look for its message above")]
    Share,
}

/// Times chunks of `policy`, whose layers compute as `compute` says, and bare products in turn.
///
/// # Errors
/// [`TailError`].
pub fn measure(
    policy: &mut dyn Policy,
    plan: &TailPlan,
    compute: Compute,
) -> Result<TailProfile, TailError> {
    let control = Control::start(plan)?;
    let shares = Shares::start(pool().threads());
    let whole = Share::new(PRODUCT[2]);
    let mut out = whole.out();
    let mut turn = 0;
    let mut chunk = || {
        let seen = observation(policy, &plan.case, turn);
        let request = ChunkRequest {
            id: u64::from(turn),
            seed: u64::from(turn),
            denoise_steps: plan.case.denoise_steps,
            ..ChunkRequest::default()
        };
        turn += 1;
        timed(|| inference::run(policy, &seen, &request).map(drop))
    };
    let mut pooled = |products| timed(|| (0..products).for_each(|_| whole.multiply(&mut out)));
    // As many products as take about as long as a chunk, under this very load.
    let (mut chunks, mut products) = (Vec::new(), Vec::new());
    for _ in 0..WARMUP {
        let (time, done) = chunk();
        done?;
        chunks.push(length(time));
        products.push(length(pooled(8).0) / 8.0);
    }
    let middle = |times| Spread::of(times).map_or(1.0, |s| s.p50);
    let count = (middle(chunks) / middle(products)).round().max(1.0) as usize;
    let mut times: [Vec<(Stamp, Stamp)>; 3] = Default::default();
    for _ in 0..plan.calls {
        let (time, done) = chunk();
        done?;
        times[0].push(time);
        let (time, done) = timed(|| shares.run(count));
        done?;
        times[1].push(time);
        times[2].push(pooled(count).0);
    }
    let scheduling = control.scheduling;
    let cycles = control.join();
    let names = ["policy", "products, threads of their own", "products, worker pool"];
    let rows = names.into_iter().zip(&times).filter_map(|(what, times)| row(what, times, &cycles));
    Ok(TailProfile {
        calls: plan.calls,
        period_ms: plan.period.as_secs_f64() * 1e3,
        scheduling,
        compute: compute.name(),
        isa: Isa::current().name(),
        threads: pool().threads(),
        product: PRODUCT,
        products: count,
        rows: rows.collect(),
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> ((Stamp, Stamp), T) {
    let start = Clock::now();
    let done = work();
    ((start, Clock::now()), done)
}

/// In milliseconds.
fn length((start, end): (Stamp, Stamp)) -> f64 {
    end.since(start).as_secs_f64() * 1e3
}

/// A control period: when it was due, how late the thread woke, how many periods it slept through.
type Cycle = (Stamp, Duration, u32);

/// The figures of one kind of call; `None` when there was none.
fn row(what: &'static str, times: &[(Stamp, Stamp)], cycles: &[Cycle]) -> Option<TailRow> {
    let call_ms = Spread::of(times.iter().copied().map(length).collect())?;
    let (mut late, mut missed) = (Latencies::default(), 0);
    for (start, end) in times {
        let from = cycles.partition_point(|(due, ..)| due < start);
        for (_, lateness, slept) in cycles[from..].iter().take_while(|(due, ..)| due < end) {
            late.record(*lateness);
            missed += u64::from(*slept);
        }
    }
    Some(TailRow {
        what,
        call_ms,
        tail: call_ms.p99 / call_ms.p50,
        shoulder: call_ms.p90 / call_ms.p50,
        control_us: late.quantiles(),
        missed,
    })
}

/// A control thread and the thread that feeds it, until it is joined or dropped.
struct Control {
    quit: SyncSender<()>,
    cycles: Option<JoinHandle<Vec<Cycle>>>,
    scheduling: &'static str,
}

impl Control {
    fn start(plan: &TailPlan) -> Result<Self, TailError> {
        let config = StreamConfig {
            period: plan.period,
            realtime: RealtimeMode::BestEffort,
            priority: plan.priority,
            cpu: plan.cpu,
            bare_clock: false,
        };
        let core = core(&ArmDescription::desk_arm(), plan.period)?;
        let (running, mut ports) = stream::spawn(core, config, ControlTap::off(), |_| {})?;
        let scheduling = if running.denied.is_none() { "SCHED_FIFO" } else { "SCHED_OTHER" };
        let (quit, until) = sync_channel(0);
        let cycles = std::thread::spawn(move || {
            let cycles = gather(&mut ports, &until);
            drop(running);
            cycles
        });
        Ok(Self { quit, cycles: Some(cycles), scheduling })
    }

    /// Ends the threads; all periods, in order.
    fn join(mut self) -> Vec<Cycle> {
        self.end()
    }

    fn end(&mut self) -> Vec<Cycle> {
        let _ = self.quit.send(());
        // A feeder that panicked has printed it; there are no figures of it then.
        self.cycles.take().and_then(|c| c.join().ok()).unwrap_or_default()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
    }
}

fn gather(ports: &mut StreamPorts, until: &Receiver<()>) -> Vec<Cycle> {
    let mut cycles = Vec::new();
    let mut feeder = Feeder::default();
    while until.recv_timeout(Feeder::TURN).is_err() {
        feeder.turn(ports, |c| cycles.push((c.due, c.lateness, c.missed)));
    }
    cycles
}

/// One thread's part of the bare product.
struct Share {
    x: Vec<f32>,
    weights: Packed,
}

impl Share {
    fn new(outputs: usize) -> Self {
        let [rows, inputs, _] = PRODUCT;
        let values = |count: usize, seed: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 7919 + seed) % 1009) as f32 / 504.0 - 1.0).collect()
        };
        let weights = Packed::from_values(&values(outputs * inputs, 2), inputs, Compute::Exact);
        Self { x: values(rows * inputs, 1), weights }
    }

    fn out(&self) -> Vec<f32> {
        vec![0.0; PRODUCT[0] * self.weights.outputs()]
    }

    fn multiply(&self, out: &mut [f32]) {
        let x = Dense { values: &self.x, width: PRODUCT[1] };
        multiply(&x, &self.weights, &Epilogue::default(), out);
        std::hint::black_box(out);
    }
}

/// Threads that each compute a fixed share of every product.
struct Shares {
    orders: Vec<SyncSender<usize>>,
    done: Receiver<()>,
}

impl Shares {
    fn start(threads: usize) -> Self {
        let (finished, done) = sync_channel(threads);
        let orders = (0..threads).map(|index| {
            let (order, orders) = sync_channel(1);
            let finished = finished.clone();
            let outputs = PRODUCT[2] * (index + 1) / threads - PRODUCT[2] * index / threads;
            // It ends when the orders' other end does.
            std::thread::spawn(move || {
                let share = Share::new(outputs);
                let mut out = share.out();
                for products in orders {
                    alone(|| (0..products).for_each(|_| share.multiply(&mut out)));
                    if finished.send(()).is_err() {
                        return;
                    }
                }
            });
            order
        });
        Self { orders: orders.collect(), done }
    }

    /// `products` products; returns when the last share is done.
    fn run(&self, products: usize) -> Result<(), TailError> {
        for order in &self.orders {
            order.send(products).map_err(|_| TailError::Share)?;
        }
        self.orders.iter().try_for_each(|_| self.done.recv()).map_err(|_| TailError::Share)
    }
}

/// Keeps a core busy until `stop` is set; what it computed.
pub fn busy(stop: &AtomicBool) -> u64 {
    let mut word = 1u64;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..1 << 16 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        }
        std::hint::black_box(word);
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_period_counts_for_the_call_that_it_fell_into() {
        let ms = |t: u64| Stamp(0) + Duration::from_millis(t);
        let cycles: Vec<Cycle> =
            (0..100).map(|k| (ms(k), Duration::from_micros(k + 1), u32::from(k == 50))).collect();
        let times = [(ms(10), ms(20)), (ms(40), ms(60))];
        let row = row("x", &times, &cycles).expect("two calls");
        assert_eq!((row.control_us.count, row.missed), (30, 1));
        // The last one that counts was 60 µs late; the histogram keeps three digits.
        assert!((59.9..60.2).contains(&row.control_us.max), "{:?}", row.control_us);
        assert_eq!((row.call_ms.min, row.call_ms.max, row.tail), (10.0, 20.0, 1.0));
        assert!(super::row("x", &[], &cycles).is_none());
    }

    #[test]
    fn shares_are_done_when_run_returns() {
        let shares = Shares::start(3);
        for products in [0, 1, 2] {
            assert!(shares.run(products).is_ok());
        }
        // All threads wait for orders again, none is left over.
        assert!(shares.done.try_recv().is_err());
    }
}
