//! The stream: the control thread, the publisher beside it, and a bare clock loop to compare with.
//!
//! The control thread wakes on an absolute clock (`next += period`), drains its inputs, runs one
//! [`ControlCore::tick`] and hands the command to the publisher through a wait-free ring. It allocates,
//! locks, logs and waits on nothing but its clock. The publisher wakes shortly after each control period,
//! so the control thread never has to wake it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rtrb::{Consumer, Producer, RingBuffer};

use crate::arbiter::{AuthorityChange, AuthorityRequest, Source};
use crate::blackbox::ControlTap;
use crate::control::{
    ControlCore, ControlEvent, CycleReport, OperatorAnswer, OperatorRequest, ResidualInput,
    ResidualRefusal, ResidualSample, SampleRefusal,
};
use crate::inference::InferenceOrder;
use crate::rt::{self, RealtimeDenied, RealtimeMode};
use crate::scheduler::Refusal;
use crate::{ActionChunk, Clock, Command, Stamp};

/// The publisher looks for the command this long after the control thread was due.
const PUBLISH_DELAY: Duration = Duration::from_micros(60);
/// How often the publisher looks again while the command is late.
const PUBLISH_RETRY: Duration = Duration::from_micros(100);
/// Commands that may wait for the publisher.
const COMMAND_RING: usize = 16;
/// Operators' events that may wait: a fast teleop device sends several samples in a slow control period.
const OPERATOR_RING: usize = 128;
/// Residual inputs and offsets that may wait: the newest counts, the others are there because their reader slept.
const RESIDUAL_RING: usize = 8;
/// Reports that may wait for the telemetry reader: two seconds at 1 kHz.
const REPORT_RING: usize = 2048;

/// Settings of the stream's threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StreamConfig {
    /// Control period.
    pub period: Duration,
    /// How much of real time is demanded.
    pub realtime: RealtimeMode,
    /// `SCHED_FIFO` priority of the control thread; the publisher has one less.
    pub priority: i32,
    /// The processor that the control thread stays on; `None`: any.
    pub cpu: Option<usize>,
    /// Run a bare clock loop of the same period and priority beside it, to compare with.
    pub bare_clock: bool,
}

/// What the control thread says of itself.
#[derive(Debug, Clone, Copy)]
pub enum StreamReport {
    /// One cycle.
    Cycle(CycleReport),
    /// Authority changed.
    Authority(AuthorityChange),
    /// A chunk plays.
    ChunkAccepted,
    /// A chunk was refused.
    ChunkRefused(Refusal),
    /// A teleop sample was left out.
    SampleRefused(SampleRefusal),
    /// A residual policy's offset was left out.
    ResidualRefused(ResidualRefusal),
}

/// The operators' ends of the control thread: requests and teleop samples in, answers and changes out.
pub struct OperatorPort {
    /// [`ControlEvent::Operator`] and [`ControlEvent::Teleop`].
    pub events: Producer<ControlEvent>,
    /// Answers to requests with a ticket.
    pub answers: Consumer<OperatorAnswer>,
    /// Every change of authority, for those who watch.
    pub changes: Consumer<AuthorityChange>,
    /// Raised when a stop found no room in `events`: it is never lost.
    pub stop: Arc<AtomicBool>,
}

/// A residual policy's ends of the control thread.
pub struct ResidualPort {
    /// What is to be answered, once for each cycle in which the plan is executed; the newest counts.
    pub inputs: Consumer<ResidualInput>,
    /// The answers.
    pub offsets: Producer<ResidualSample>,
}

/// One wake-up of the bare clock loop.
#[derive(Debug, Clone, Copy)]
pub struct BareCycle {
    /// From due to wake-up.
    pub lateness: Duration,
    /// Whole periods that were slept through before.
    pub missed: u32,
}

/// The ends of the control thread's rings. Each input is a single producer.
pub struct StreamPorts {
    /// Measured states, chunks, failures: from ingest and inference.
    pub states: Producer<crate::JointState>,
    /// Chunks and failures from the inference thread.
    pub chunks: Producer<ControlEvent>,
    /// Requests from the operator's side.
    pub requests: Producer<ControlEvent>,
    /// Requests and samples of people, from the bus.
    pub operator: OperatorPort,
    /// A residual policy's inputs and offsets.
    pub residual: ResidualPort,
    /// Demands for chunks.
    pub orders: Consumer<InferenceOrder>,
    /// Chunks to be freed.
    pub freed: Consumer<ActionChunk>,
    /// Reports.
    pub reports: Consumer<StreamReport>,
    /// Wake-ups of the bare clock loop; empty when it does not run.
    pub bare: Consumer<BareCycle>,
}

/// The running threads; dropping it stops and joins them.
pub struct Stream {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Why real-time scheduling is off although it was asked for.
    pub denied: Option<RealtimeDenied>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panicked thread has already been reported; the others must still be joined.
            let _ = thread.join();
        }
    }
}

/// Starts the control thread and the publisher; `publish` is called on the publisher's thread.
///
/// `tap` is shown everything that the core is given and gives.
///
/// # Errors
/// [`RealtimeDenied`] in [`RealtimeMode::Enforce`].
pub fn spawn(
    mut core: ControlCore,
    config: StreamConfig,
    mut tap: ControlTap,
    mut publish: impl FnMut(&Command) + Send + 'static,
) -> Result<(Stream, StreamPorts), RealtimeDenied> {
    let denied = permitted(config)?;
    let config = if denied.is_some() {
        StreamConfig { realtime: RealtimeMode::Off, ..config }
    } else {
        config
    };
    let (states, mut states_in) = RingBuffer::new(64);
    let (chunks, mut chunks_in) = RingBuffer::<ControlEvent>::new(4);
    let (requests, mut requests_in) = RingBuffer::<ControlEvent>::new(16);
    let (events, mut events_in) = RingBuffer::<ControlEvent>::new(OPERATOR_RING);
    let (mut answers_out, answers) = RingBuffer::new(OPERATOR_RING);
    let (mut changes_out, changes) = RingBuffer::new(OPERATOR_RING);
    let pressed = Arc::new(AtomicBool::new(false));
    let operator = OperatorPort { events, answers, changes, stop: pressed.clone() };
    let (mut residual_out, inputs) = RingBuffer::new(RESIDUAL_RING);
    let (offsets, mut offsets_in) = RingBuffer::new(RESIDUAL_RING);
    let residual = ResidualPort { inputs, offsets };
    let (orders_out, orders) = RingBuffer::new(4);
    let (mut freed_out, freed) = RingBuffer::new(16);
    let (mut reports_out, reports) = RingBuffer::new(REPORT_RING);
    let (mut bare_out, bare) = RingBuffer::new(REPORT_RING);
    let (mut commands, mut commands_in) = RingBuffer::<Command>::new(COMMAND_RING);
    let stop = Arc::new(AtomicBool::new(false));
    let start = Clock::now() + Duration::from_millis(20);
    let mut threads = Vec::new();

    let (quit, mut orders_out) = (stop.clone(), orders_out);
    threads.push(thread("sinew-control", config, 0, move || {
        let mut clock = Metronome::new(start, config.period);
        while !quit.load(Ordering::Relaxed) {
            let beat = clock.wait();
            let woke = Clock::now();
            let mut free = |chunk| {
                // The ring holds more chunks than can be under way; a full one would leak, not free here.
                if let Err(rtrb::PushError::Full(chunk)) = freed_out.push(chunk) {
                    std::mem::forget(chunk);
                }
            };
            let mut handle = |event| {
                tap.event(&event, woke);
                let effect = core.on_event(event, woke);
                tap.effect(&effect);
                effect.freed.into_iter().for_each(&mut free);
                while let Some(chunk) = core.take_spent() {
                    free(chunk);
                }
                if let Some(change) = effect.change {
                    let _ = reports_out.push(StreamReport::Authority(change));
                    let _ = changes_out.push(change);
                }
                let _ = effect.answer.map(|a| answers_out.push(a));
                let refused = effect.sample_refused.map(StreamReport::SampleRefused);
                let _ = refused.map(|r| reports_out.push(r));
                let refused = effect.residual_refused.map(StreamReport::ResidualRefused);
                let _ = refused.map(|r| reports_out.push(r));
                let _ = effect.refused.map(|r| reports_out.push(StreamReport::ChunkRefused(r)));
                if effect.accepted {
                    let _ = reports_out.push(StreamReport::ChunkAccepted);
                }
            };
            while let Ok(state) = states_in.pop() {
                handle(ControlEvent::State(state));
            }
            if pressed.load(Ordering::Relaxed) && pressed.swap(false, Ordering::Relaxed) {
                let request = AuthorityRequest::Stop;
                let by = Source::UNNAMED;
                handle(ControlEvent::Operator(OperatorRequest { ticket: 0, by, request }));
            }
            // No more than were there: a device that floods the ring must not hold up the cycle.
            for _ in 0..events_in.slots() {
                let _ = events_in.pop().map(&mut handle);
            }
            while let Ok(event) = requests_in.pop() {
                handle(event);
            }
            while let Ok(event) = chunks_in.pop() {
                handle(event);
            }
            for _ in 0..offsets_in.slots() {
                let _ = offsets_in.pop().map(ControlEvent::Residual).map(&mut handle);
            }
            let cycle = core.tick(woke);
            // A full ring means that the residual policy has newer ones to read than it can.
            if let Some(input) = core.take_residual_input() {
                let _ = residual_out.push(input);
            }
            while let Some(chunk) = core.take_spent() {
                free(chunk);
            }
            let dropped = cycle.command.is_some_and(|c| commands.push(c).is_err());
            if let Some(order) = cycle.order {
                // The ring has room: one order is open at a time.
                let _ = orders_out.push(InferenceOrder { order, plan: core.plan().copied() });
            }
            if let Some(change) = cycle.change {
                let _ = reports_out.push(StreamReport::Authority(change));
                let _ = changes_out.push(change);
            }
            tap.cycle(&cycle, woke, beat.due, beat.missed);
            let work = Clock::now().since(woke);
            tap.worked(work);
            let report = CycleReport {
                sequence: cycle.command.map_or(0, |c| c.sequence),
                due: beat.due,
                lateness: woke.since(beat.due),
                work,
                missed: beat.missed,
                authority: cycle.authority,
                awaits_consent: cycle.standing.awaits_consent,
                mode: cycle.mode,
                buffer_left: cycle.buffer_left,
                state_age: cycle.state_age,
                interventions: cycle.interventions,
                teleop_delay: cycle.teleop_delay,
                dropped,
            };
            let _ = reports_out.push(StreamReport::Cycle(report));
        }
    }));

    let quit = stop.clone();
    threads.push(thread("sinew-publish", config, 1, move || {
        let mut clock = Metronome::new(start + PUBLISH_DELAY, config.period);
        while !quit.load(Ordering::Relaxed) {
            let beat = clock.wait();
            let give_up = beat.due + config.period.mul_f64(0.9);
            let mut seen = false;
            while !seen && Clock::now() < give_up {
                while let Ok(command) = commands_in.pop() {
                    publish(&command);
                    seen = true;
                }
                if !seen {
                    rt::sleep_until(Clock::now() + PUBLISH_RETRY);
                }
            }
        }
    }));

    if config.bare_clock {
        let quit = stop.clone();
        threads.push(thread("sinew-bare-clock", config, 0, move || {
            // Half a period apart, so that the two loops do not queue for the same processor.
            let mut clock = Metronome::new(start + config.period / 2, config.period);
            while !quit.load(Ordering::Relaxed) {
                let beat = clock.wait();
                let lateness = Clock::now().since(beat.due);
                let _ = bare_out.push(BareCycle { lateness, missed: beat.missed });
            }
        }));
    }
    let ports =
        StreamPorts { states, chunks, requests, operator, residual, orders, freed, reports, bare };
    Ok((Stream { stop, threads, denied }, ports))
}

/// Whether real-time scheduling will be given, tried on a thread of its own.
fn permitted(config: StreamConfig) -> Result<Option<RealtimeDenied>, RealtimeDenied> {
    if config.realtime == RealtimeMode::Off {
        return Ok(None);
    }
    let tried = std::thread::spawn(move || rt::set_fifo(config.priority)).join();
    match (tried, config.realtime) {
        (Ok(Ok(())), _) => Ok(None),
        (Ok(Err(denied)), RealtimeMode::Enforce) => Err(denied),
        (Ok(Err(denied)), _) => Ok(Some(denied)),
        // The closure only makes a system call; it does not panic.
        (Err(_), _) => Ok(None),
    }
}

fn thread(
    name: &str,
    config: StreamConfig,
    below: i32,
    body: impl FnOnce() + Send + 'static,
) -> JoinHandle<()> {
    let run = move || {
        rt::set_timer_slack();
        if config.realtime != RealtimeMode::Off {
            // Tried before with the same rights; if it fails now the thread goes on at normal priority.
            let _ = rt::set_fifo((config.priority - below).max(1));
        }
        // Checked at launch against the processors that there are; only the control thread is pinned.
        let _ = config.cpu.filter(|_| below == 0).map(rt::pin);
        body();
    };
    // A process that cannot start one more thread at launch cannot go on.
    #[allow(clippy::expect_used)]
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .expect("the system can start a thread")
}

/// An absolute clock: `next += period`, skipping whole periods that were slept through.
struct Metronome {
    next: Stamp,
    period: Duration,
}

/// One beat of the clock.
struct Beat {
    due: Stamp,
    missed: u32,
}

impl Metronome {
    fn new(start: Stamp, period: Duration) -> Self {
        Self { next: start, period }
    }

    fn wait(&mut self) -> Beat {
        let late = Clock::now().since(self.next).as_nanos() / self.period.as_nanos().max(1);
        let missed = u32::try_from(late).unwrap_or(u32::MAX);
        let due = self.next + self.period * missed;
        rt::sleep_until(due);
        self.next = due + self.period;
        Beat { due, missed }
    }
}
