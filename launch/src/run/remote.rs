//! A policy in another process: the control side's desk for its orders, and the threads on both sides.
//!
//! An order is sent again until it is answered, so neither a lost message nor a policy that starts late or anew
//! leaves it open. The policy side makes each chunk once and repeats its last answer when it is asked for
//! the same again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, TrySendError};
use rtrb::{Consumer, Producer};
use sinew_runtime::blackbox::InferenceRecord;
use sinew_runtime::control::ControlEvent;
use sinew_runtime::inference::{InferenceOrder, InferenceReport};
use sinew_runtime::transport::{
    AnswerMessage, Bus, Keys, OrderMessage, Priority, Publisher, Subscription, decode_policy,
    encode_policy,
};
use sinew_runtime::{ActionChunk, Clock, Stamp};

use super::recording::Inputs;
use super::robot::RunError;
use super::roster::Roster;

/// How often the threads look for work: well under a control period.
const POLL: Duration = Duration::from_millis(1);
/// An order that is not answered is sent again after this long.
const AGAIN: Duration = Duration::from_millis(200);
/// Messages that may wait for a thread.
const QUEUE: usize = 16;

/// The open order of the control side. A pure state machine.
#[derive(Debug, Default)]
struct Desk {
    open: Option<(InferenceOrder, Stamp)>,
    there: bool,
    /// The policy was lost: nothing is asked of it and nothing taken before authority is given anew.
    closed: bool,
}

impl Desk {
    /// A new order; it takes the place of one that the scheduler has forgotten.
    fn on_order(&mut self, order: InferenceOrder, now: Stamp) {
        self.open = Some((order, now));
    }

    /// The order to be sent at `now` again, if any.
    fn again(&mut self, now: Stamp) -> Option<&InferenceOrder> {
        let (order, sent) = self.open.as_mut()?;
        if self.closed || now.since(*sent) < AGAIN {
            return None;
        }
        *sent = now;
        Some(order)
    }

    /// Whether an answer to `request` is the awaited one; when it was ordered.
    fn on_answer(&mut self, request: u64) -> Option<Stamp> {
        if self.closed {
            return None;
        }
        self.open.take_if(|o| o.0.order.request == request).map(|o| o.0.order.at)
    }

    /// The policy is there, or not: a loss closes the desk. When the policy comes, an open order is too old to learn a
    /// latency from: the request that is to be taken back then.
    fn on_presence(&mut self, there: bool) -> Option<u64> {
        let before = std::mem::replace(&mut self.there, there);
        self.closed |= before && !there;
        if there && !before && !self.closed {
            self.open.take().map(|o| o.0.order.request)
        } else {
            None
        }
    }
}

/// The control side: what the inference thread is with the policy in this process.
pub(super) struct RemotePolicy {
    /// Ends with the orders' producer.
    pub thread: JoinHandle<()>,
    /// What the policy's side reports.
    pub reports: Receiver<InferenceReport>,
    /// Keeps the answers coming.
    pub subscription: Subscription,
}

/// Starts the control side on the control thread's rings; `granted` is set when authority is given to the policy.
pub(super) fn control_side(
    bus: &Bus,
    keys: &Keys,
    instruction: Arc<Mutex<String>>,
    roster: Roster,
    granted: Arc<AtomicBool>,
    rings: (Consumer<InferenceOrder>, Producer<ControlEvent>, Consumer<ActionChunk>),
    recorder: Inputs,
) -> Result<RemotePolicy, RunError> {
    let publisher = bus.publisher(&keys.order(), Priority::RealTime)?;
    let session = u64::from(std::process::id()) << 32 ^ Clock::now().0.unsigned_abs();
    let (sender, answers) = crossbeam_channel::bounded::<AnswerMessage>(QUEUE);
    let subscription = bus.subscribe(&keys.chunk(), move |_, payload| {
        match decode_policy::<AnswerMessage>(payload) {
            // A full queue means that the thread is gone.
            Ok(answer) if answer.session == session => drop(sender.try_send(answer)),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "an answer of the policy was left out"),
        }
    })?;
    let (reporter, reports) = crossbeam_channel::bounded(256);
    let (mut orders, mut chunks, mut freed) = rings;
    let send = move |order: &InferenceOrder| {
        let instruction = instruction.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let message = OrderMessage { session, order: *order, instruction };
        publisher.put(encode_policy(&message), Clock::now());
    };
    let thread = thread("sinew-orders", move || {
        let mut desk = Desk::default();
        while !orders.is_abandoned() {
            while freed.pop().is_ok() {}
            if granted.swap(false, Ordering::Relaxed) {
                desk.closed = false;
            }
            while let Ok(order) = orders.pop() {
                if !desk.closed {
                    send(&order);
                }
                desk.on_order(order, Clock::now());
            }
            if let Some(request) = desk.on_presence(roster.is_there("policy")) {
                let _ = chunks.push(ControlEvent::ChunkFailed(request));
            }
            if let Some(order) = desk.again(Clock::now()) {
                send(order);
            }
            for answer in answers.try_iter() {
                let Some(at) = desk.on_answer(answer.request) else { continue };
                for record in answer.records {
                    recorder.inference(record);
                }
                for mut report in answer.reports {
                    if let InferenceReport::Chunk { latency, .. } = &mut report {
                        *latency = Clock::now().since(at);
                    }
                    let _ = reporter.try_send(report);
                }
                // One order is open at a time, so there is room.
                let _ = chunks.push(match answer.chunk {
                    Some(chunk) => ControlEvent::Chunk(chunk),
                    None => ControlEvent::ChunkFailed(answer.request),
                });
            }
            std::thread::sleep(POLL);
        }
    })?;
    Ok(RemotePolicy { thread, reports, subscription })
}

/// What the policy side does with an order.
#[derive(Debug, PartialEq, Eq)]
enum Duty {
    /// Make a chunk.
    Make,
    /// It is being made.
    Wait,
    /// It was made: say it again.
    Repeat,
}

/// The policy side's memory of the newest order: its session and number, and whether it was answered.
#[derive(Debug, Default)]
struct Bench {
    newest: Option<(u64, u64)>,
    answered: bool,
}

impl Bench {
    fn on_order(&mut self, session: u64, request: u64) -> Duty {
        match self.newest {
            Some(newest) if newest == (session, request) && self.answered => Duty::Repeat,
            Some(newest) if newest == (session, request) => Duty::Wait,
            Some((same, number)) if same == session && request < number => Duty::Wait,
            _ => {
                (self.newest, self.answered) = (Some((session, request)), false);
                Duty::Make
            }
        }
    }

    /// The session that an answer to `request` is for; none when a newer order has come since.
    fn on_answer(&mut self, request: u64) -> Option<u64> {
        let (session, _) = self.newest.filter(|n| n.1 == request)?;
        self.answered = true;
        Some(session)
    }
}

/// The rings of the inference thread in the policy's process.
pub(super) struct InferenceEnds {
    pub orders: Producer<InferenceOrder>,
    pub chunks: Consumer<ControlEvent>,
    pub reports: Receiver<InferenceReport>,
    pub records: Receiver<InferenceRecord>,
    pub instruction: Arc<Mutex<String>>,
}

/// The policy side; dropping it ends its thread and with it the inference thread's orders.
pub(super) struct PolicySide {
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _subscription: Subscription,
}

impl Drop for PolicySide {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

/// Starts the policy side.
pub(super) fn policy_side(
    bus: &Bus,
    keys: &Keys,
    mut ends: InferenceEnds,
) -> Result<PolicySide, RunError> {
    let publisher = bus.publisher(&keys.chunk(), Priority::RealTime)?;
    let (sender, orders) = crossbeam_channel::bounded::<OrderMessage>(QUEUE);
    let overflow = orders.clone();
    let subscription = bus.subscribe(&keys.order(), move |_, payload| {
        match decode_policy::<OrderMessage>(payload) {
            Ok(message) => {
                if let Err(TrySendError::Full(message)) = sender.try_send(message) {
                    // The oldest is of no use to anybody any more.
                    let _ = overflow.try_recv();
                    let _ = sender.try_send(message);
                }
            }
            Err(error) => tracing::warn!(%error, "an order was left out"),
        }
    })?;
    let quit = Arc::new(AtomicBool::new(false));
    let seen = quit.clone();
    let thread = thread("sinew-answers", move || {
        let (mut bench, mut last) = (Bench::default(), Vec::new());
        while !seen.load(Ordering::Relaxed) {
            // After a pause only the newest order counts.
            if let Some(message) = orders.try_iter().last() {
                // Also of an order that is being answered: a new instruction ends that inference.
                let say = |instruction| {
                    *ends.instruction.lock().unwrap_or_else(PoisonError::into_inner) = instruction;
                };
                let own = (message.session, message.order.order.request);
                match bench.on_order(own.0, own.1) {
                    Duty::Make => {
                        say(message.instruction);
                        // A full ring: the thread has older ones to answer; this one is sent again.
                        if ends.orders.push(message.order).is_err() {
                            bench = Bench::default();
                        }
                    }
                    Duty::Repeat => put(&publisher, &last),
                    Duty::Wait if bench.newest == Some(own) => say(message.instruction),
                    Duty::Wait => {}
                }
            }
            while let Ok(event) = ends.chunks.pop() {
                let (request, chunk) = match event {
                    ControlEvent::Chunk(chunk) => (chunk.request, Some(chunk)),
                    ControlEvent::ChunkFailed(request) => (request, None),
                    _ => continue,
                };
                let Some(session) = bench.on_answer(request) else { continue };
                let reports = reports_of(&ends.reports);
                let records = ends.records.try_iter().collect();
                let answer = AnswerMessage { session, request, chunk, reports, records };
                last = encode_policy(&answer);
                put(&publisher, &last);
            }
            std::thread::sleep(POLL);
        }
    })?;
    Ok(PolicySide { quit, thread: Some(thread), _subscription: subscription })
}

/// The reports that belong to an answer: the thread hands them over right after the chunk.
fn reports_of(reports: &Receiver<InferenceReport>) -> Vec<InferenceReport> {
    let first = reports.recv_timeout(Duration::from_millis(20)).ok();
    first.into_iter().chain(reports.try_iter()).collect()
}

fn put(publisher: &Publisher, answer: &[u8]) {
    publisher.put(answer.to_vec(), Clock::now());
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, RunError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|e| RunError::System {
        what: "starting a thread of the policy's link",
        reason: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sinew_runtime::scheduler::ChunkOrder;
    use sinew_runtime::scheduler::strategy::Guide;

    fn at(ms: i64) -> Stamp {
        Stamp(ms * 1_000_000)
    }

    fn order(request: u64) -> InferenceOrder {
        let (at, guide) = (at(0), Guide::Free);
        let order = ChunkOrder { request, at, expected: at, deadline: None, guide };
        InferenceOrder { order, plan: None }
    }

    #[test]
    fn an_order_is_sent_again_until_its_answer_comes() {
        let mut desk = Desk::default();
        desk.on_order(order(3), at(0));
        assert!(desk.again(at(199)).is_none());
        assert!(desk.again(at(200)).is_some());
        assert!(desk.again(at(399)).is_none());
        assert_eq!(desk.on_answer(2), None, "an answer to a forgotten order");
        assert_eq!(desk.on_answer(3), Some(at(0)));
        assert!(desk.again(at(900)).is_none() && desk.on_answer(3).is_none());
    }

    #[test]
    fn a_policy_that_comes_gets_a_fresh_order_and_one_that_was_lost_none_without_authority() {
        let mut desk = Desk::default();
        desk.on_order(order(3), at(0));
        assert_eq!(desk.on_presence(true), Some(3), "it came");
        assert_eq!(desk.on_presence(true), None);
        desk.on_order(order(4), at(0));
        assert_eq!(desk.on_presence(false), None);
        assert_eq!(desk.on_presence(true), None, "nobody has given it authority since");
        assert!(desk.again(at(500)).is_none() && desk.on_answer(4).is_none());
        desk.closed = false;
        assert!(desk.again(at(501)).is_some() && desk.on_answer(4).is_some());
    }

    #[test]
    fn a_chunk_is_made_once_and_repeated_on_demand() {
        let mut bench = Bench::default();
        assert_eq!(bench.on_order(1, 5), Duty::Make);
        assert_eq!(bench.on_order(1, 5), Duty::Wait);
        assert_eq!(bench.on_answer(5), Some(1));
        assert_eq!(bench.on_order(1, 5), Duty::Repeat);
        assert_eq!(bench.on_order(1, 4), Duty::Wait, "an older one, overtaken");
        assert_eq!(bench.on_order(2, 1), Duty::Make, "another control process counts anew");
    }
}
