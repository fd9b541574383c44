//! `sinew bench stream`: the control stream's process and its subscriber's, and the table of both.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use sinew_benches::stream::{self, ROBOT, StreamPlan, StreamRow};
use sinew_drivers::peer::{CommandStats, StreamFigures};
use sinew_drivers::sim::ArmDescription;
use sinew_models::LoadOptions;
use sinew_runtime::rt::{self, RealtimeMode};
use sinew_runtime::telemetry::Quantiles;
use sinew_runtime::transport::{Bus, Endpoint, Keys, decode_command};
use sinew_runtime::{Clock, Policy};

use crate::bench_verbs::{print_found, print_machine};
use crate::cli::{Failure, Scheduling, print_json, say};
use crate::run::RunError;

/// The demo's policy: the load computes its chunks.
const POLICY: &str = "models/demo/demo.q8_0.gguf";

/// One kind of scheduling, at both ends.
#[derive(Debug, Clone, Serialize)]
struct Measured {
    scheduling: &'static str,
    seconds: f64,
    rate_hz: f64,
    runtime: StreamRow,
    subscriber: StreamFigures,
}

/// What is asked of the bench.
pub struct Wanted {
    /// Commands a second.
    pub rate: f64,
    /// How long, each.
    pub time: Duration,
    /// Which scheduling.
    pub scheduling: Vec<Scheduling>,
    /// `SCHED_FIFO` priority.
    pub priority: i32,
    /// Processor of the control thread.
    pub cpu: Option<usize>,
    /// No load.
    pub idle: bool,
    /// JSON instead of a table.
    pub json: bool,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] of starting.
pub fn run(wanted: &Wanted) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for kind in &wanted.scheduling {
        let (scheduling, realtime) = match kind {
            Scheduling::Fifo => ("SCHED_FIFO", RealtimeMode::Enforce),
            Scheduling::Other => ("SCHED_OTHER", RealtimeMode::Off),
        };
        if realtime != RealtimeMode::Off
            && let Err(error) = rt::lock_memory()
        {
            eprintln!("sinew: memory is not locked: {error}");
        }
        let plan = StreamPlan {
            period: Duration::from_secs_f64(1.0 / wanted.rate),
            time: wanted.time,
            realtime,
            priority: wanted.priority,
            cpu: wanted.cpu,
            load: !wanted.idle,
            endpoint: endpoint()?,
        };
        eprintln!("{scheduling}: {} s", wanted.time.as_secs_f64());
        let policy = load()?;
        let mut child = Err(Failure::Result("the subscriber was not started".to_owned()));
        let row = stream::measure(&plan, policy, || child = subscriber(&plan));
        let figures = finish(child?)?;
        let row = row.map_err(|e| Failure::Result(e.to_string()))?;
        rows.push(Measured {
            scheduling,
            seconds: wanted.time.as_secs_f64(),
            rate_hz: wanted.rate,
            runtime: row,
            subscriber: figures,
        });
    }
    if wanted.json {
        return print_found("stream", &rows);
    }
    print(&rows);
    Ok(())
}

fn load() -> Result<Box<dyn Policy>, Failure> {
    Ok(sinew_models::load_policy(POLICY.as_ref(), &LoadOptions::default())?)
}

/// An endpoint on loopback that nobody listens at.
fn endpoint() -> Result<String, Failure> {
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
    let fail =
        |e: std::io::Error| RunError::System { what: "finding a free port", reason: e.to_string() };
    Ok(format!("tcp/127.0.0.1:{}", port.map_err(fail)?.port()))
}

fn subscriber(plan: &StreamPlan) -> Result<Child, Failure> {
    let fail = |e: std::io::Error| RunError::System {
        what: "starting the subscriber",
        reason: e.to_string(),
    };
    let mut command = Command::new(std::env::current_exe().map_err(fail)?);
    command.args(["bench", "stream-subscriber", &plan.endpoint]);
    command.arg(plan.period.as_nanos().to_string());
    if plan.realtime != RealtimeMode::Off {
        command.arg("--priority").arg((plan.priority - 2).to_string());
    }
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    Ok(child.map_err(fail)?)
}

/// Closes the subscriber's input: it then prints what it saw.
fn finish(mut child: Child) -> Result<StreamFigures, Failure> {
    drop(child.stdin.take());
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        let read = out.read_to_string(&mut text);
        read.map_err(|e| Failure::Result(format!("the subscriber's figures: {e}")))?;
    }
    // It has said all that it had to say.
    let _ = child.wait();
    serde_json::from_str(&text)
        .map_err(|e| Failure::Result(format!("the subscriber said {text:?}: {e}")))
}

/// The subscriber's process: counts commands until its input is closed.
///
/// # Errors
/// [`Failure`] of joining the bus.
pub fn subscribe(endpoint: &str, period: Duration, priority: Option<i32>) -> Result<(), Failure> {
    let endpoint = Endpoint::Connect(endpoint.to_owned());
    let bus = rt::with_fifo_threads(priority, || Bus::open(&endpoint)).map_err(RunError::Bus)?;
    let arm = ArmDescription::desk_arm();
    let names: Vec<String> = arm.joints.iter().map(|j| j.name.clone()).collect();
    let stats = Arc::new(Mutex::new(CommandStats::new(period)));
    let counted = stats.clone();
    let _subscription = bus
        .subscribe(&Keys::new(ROBOT).command(), move |attachment, payload| {
            let now = Clock::now();
            let sequence = attachment.map_or(0, |a| a.sequence);
            let mut stats = counted.lock().unwrap_or_else(PoisonError::into_inner);
            match decode_command(&names, payload, sequence) {
                Ok(command) => {
                    stats.on_command(sequence, command.stamp, now);
                }
                Err(_) => stats.on_invalid(),
            }
        })
        .map_err(RunError::Bus)?;
    // Ends when the other side closes the pipe, or dies.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    print_json(&stats.lock().unwrap_or_else(PoisonError::into_inner).figures())
}

fn print(rows: &[Measured]) {
    print_machine();
    for row in rows {
        let r = &row.runtime;
        say!(
            "\n{} at {:.0} Hz for {:.0} s; load: {} chunks, {} simulator steps",
            row.scheduling,
            row.rate_hz,
            row.seconds,
            r.load_chunks,
            r.load_steps
        );
        say!(
            "  {:<36} {:>9} {:>9} {:>9} {:>9} {:>8}",
            "us",
            "p50",
            "p99",
            "p99.9",
            "max",
            "missed"
        );
        let line = |name: &str, q: &Quantiles, missed: u64| {
            say!(
                "  {name:<36} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {missed:>8}",
                q.p50,
                q.p99,
                q.p999,
                q.max
            );
        };
        line("control thread: due to wake-up", &r.control.wake, r.control.missed);
        line("control thread: due to hand-over", &r.control.handover, r.control.missed);
        line("bare clock loop: due to wake-up", &r.bare.wake, r.bare.missed);
        let s = &row.subscriber;
        line("subscriber: interval off the period", &s.jitter_us, s.missed_periods);
        line("subscriber: control thread to arrival", &s.one_way_us, s.missed_periods);
        let ratio = |a: f64, b: f64| a / b.max(1e-9);
        let (c, b) = (&r.control.handover, &r.bare.wake);
        say!(
            "  hand-over against the bare loop: p50 {:.2} x, p99 {:.2} x, p99.9 {:.2} x",
            ratio(c.p50, b.p50),
            ratio(c.p99, b.p99),
            ratio(c.p999, b.p999)
        );
        say!(
            "  {} cycles, {} published ({} late), {} dropped; {} received, {} lost, {} out of order",
            r.control.cycles,
            r.published,
            r.published_late,
            r.dropped,
            s.commands,
            s.lost,
            s.reordered
        );
    }
}
