//! The runtime's desk: hands what arrives to the control thread, and its answers back.
//!
//! Events go into the control thread's ring on the session's own thread, in the order in which they came. The
//! desk's thread only waits for answers: the control thread never wakes anybody, so while a question is open the
//! desk looks for its answer every [`POLL`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use serde::{Deserialize, Serialize};

use crate::arbiter::{AuthorityRequest, Claim, Reason, Source, Standing};
use crate::control::{ControlEvent, OperatorRequest};
use crate::stream::OperatorPort;
use crate::transport::{
    AuthorityAsk, AuthorityMessage, AuthorityStatus, Bus, BusError, Keys, Priority, Publisher,
    Question, RUNTIME, StopAck, StopMessage, Subscription, decode_teleop,
};
use crate::{Clock, Stamp, rt};

/// How often an open question's answer is looked for: well under a control period.
const POLL: Duration = Duration::from_micros(100);
/// How often the desk looks for changes of authority while nobody asks.
const WATCH: Duration = Duration::from_millis(20);
/// Time between two statuses while nothing changes.
const STATUS_PERIOD: Duration = Duration::from_millis(500);
/// A control thread that does not answer for this long is gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// Questions that may be open at once.
const QUESTIONS: usize = 64;

/// What the desk must know of the robot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeskConfig {
    /// The robot's name.
    pub robot: String,
    /// The arm's joints, in command order.
    pub joints: Vec<String>,
    /// The drivers that a stop must reach.
    pub drivers: Vec<String>,
    /// `SCHED_FIFO` priority of the desk's thread where permitted, below the control thread's; `None`: ordinary.
    pub priority: Option<i32>,
}

/// What a driver says of itself on its status key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverStatus {
    /// Its name.
    pub driver: String,
    /// A stop is latched: it follows no command.
    pub latched: bool,
    /// What it does, in a word.
    pub state: String,
}

/// The running desk; dropping it ends its thread.
pub struct Desk {
    inlet: Arc<Inlet>,
    subscriptions: Vec<Subscription>,
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The way from the session's threads to the control thread.
struct Inlet {
    events: Mutex<rtrb::Producer<ControlEvent>>,
    stop: Arc<AtomicBool>,
    questions: Sender<Open>,
    tickets: AtomicU64,
    samples: AtomicU64,
    lost: AtomicU64,
}

/// A question that waits for the control thread.
struct Open {
    request: OperatorRequest,
    /// The ring was full: the desk's thread tries again.
    sent: bool,
    since: Instant,
    question: Option<Question>,
}

impl Desk {
    /// Opens the desk of the runtime behind `port`.
    ///
    /// # Errors
    /// [`BusError`] when a key cannot be declared or the thread cannot be started.
    pub fn open(
        bus: &Bus,
        keys: &Keys,
        config: DeskConfig,
        port: OperatorPort,
    ) -> Result<Self, BusError> {
        let (questions, asked) = crossbeam_channel::bounded(QUESTIONS);
        let inlet = Arc::new(Inlet {
            events: Mutex::new(port.events),
            stop: port.stop,
            questions,
            tickets: AtomicU64::new(1),
            samples: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let status = bus.publisher(&keys.status(), Priority::Data)?;
        let quit = Arc::new(AtomicBool::new(false));
        let (seen, way, names) = (quit.clone(), inlet.clone(), config.joints.clone());
        let (answers, changes) = (port.answers, port.changes);
        let mut clerk = Clerk {
            config,
            open: Vec::new(),
            standing: Standing::default(),
            reason: None,
            since: Clock::now(),
            status,
            next_status: Clock::now(),
        };
        let thread = std::thread::Builder::new()
            .name("sinew-desk".into())
            .spawn(move || {
                rt::set_timer_slack();
                // Without the right to it the desk answers a little later.
                let _ = clerk.config.priority.map(rt::set_fifo);
                clerk.work(&seen, &way, &asked, answers, changes);
            })
            .map_err(|e| BusError::Refused { key: keys.authority(), reason: e.to_string() })?;
        let mut desk = Self { inlet, subscriptions: Vec::new(), quit, thread: Some(thread) };
        desk.listen(bus, keys, names)?;
        desk.subscriptions.push(bus.announce(&keys.alive(RUNTIME))?);
        Ok(desk)
    }

    /// Teleop samples that came, and those that found no room.
    pub fn samples(&self) -> (u64, u64) {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (read(&self.inlet.samples), read(&self.inlet.lost))
    }

    fn listen(&mut self, bus: &Bus, keys: &Keys, names: Vec<String>) -> Result<(), BusError> {
        // Every request comes as a query, which is answered, or as a message, which is not.
        let inlet = self.inlet.clone();
        let stop = move |payload: &[u8], question| {
            let by = StopMessage::from_bytes(payload).source;
            inlet.ask(AuthorityRequest::Stop, by, question);
        };
        let inlet = self.inlet.clone();
        let reset = move |payload: &[u8], question| {
            let by = StopMessage::from_bytes(payload).source;
            inlet.ask(AuthorityRequest::Reset, by, question);
        };
        let inlet = self.inlet.clone();
        let authority = move |payload: &[u8], question: Option<Question>| match understand(payload)
        {
            Ok((request, by)) => inlet.ask(request, by, question),
            Err(reason) => match question {
                Some(question) => question.answer(Err(reason)),
                None => tracing::warn!(%reason, "a request for authority was left out"),
            },
        };
        self.both(bus, &keys.stop(), stop)?;
        self.both(bus, &keys.reset(), reset)?;
        self.both(bus, &keys.authority(), authority)?;

        let inlet = self.inlet.clone();
        self.subscriptions.push(bus.subscribe(&keys.teleop(), move |attachment, payload| {
            let sequence = attachment.map_or(0, |a| a.sequence);
            match decode_teleop(&names, payload, sequence, Clock::now()) {
                Ok(sample) => inlet.sample(ControlEvent::Teleop(sample)),
                Err(error) => tracing::warn!(%error, "a teleop sample was left out"),
            }
        })?);
        let (inlet, latched) = (self.inlet.clone(), Mutex::new(Vec::new()));
        self.subscriptions.push(bus.subscribe(&keys.driver_status("*"), move |_, payload| {
            let Ok(status) = serde_json::from_slice::<DriverStatus>(payload) else { return };
            let mut latched = latched.lock().unwrap_or_else(PoisonError::into_inner);
            let known = latched.contains(&status.driver);
            if status.latched && !known {
                let by = Source::new(&status.driver).unwrap_or(Source::UNNAMED);
                inlet.ask(AuthorityRequest::DriverStopped, by, None);
                latched.push(status.driver);
            } else if !status.latched {
                latched.retain(|d| *d != status.driver);
            }
        })?);
        Ok(())
    }

    /// Calls `take` with queries and with messages on `key`.
    fn both(
        &mut self,
        bus: &Bus,
        key: &str,
        take: impl Fn(&[u8], Option<Question>) + Send + Sync + 'static,
    ) -> Result<(), BusError> {
        let take = Arc::new(take);
        let asked = take.clone();
        self.subscriptions.push(bus.serve_later(key, move |question| {
            let payload = question.payload();
            asked(&payload, Some(question));
        })?);
        self.subscriptions.push(bus.subscribe(key, move |_, payload| take(payload, None))?);
        Ok(())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.subscriptions.clear();
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

impl Inlet {
    fn push(&self, event: ControlEvent) -> bool {
        // Only sessions' threads and the desk meet at this lock, never the control thread.
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event).is_ok()
    }

    fn sample(&self, event: ControlEvent) {
        self.samples.fetch_add(1, Ordering::Relaxed);
        self.lost.fetch_add(u64::from(!self.push(event)), Ordering::Relaxed);
    }

    fn ask(&self, request: AuthorityRequest, by: Source, question: Option<Question>) {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let request = OperatorRequest { ticket, by, request };
        let sent = self.push(ControlEvent::Operator(request));
        if !sent && request.request == AuthorityRequest::Stop {
            self.stop.store(true, Ordering::Relaxed);
        }
        if question.is_none() && !sent {
            tracing::warn!(?request, "the control thread has no room for a request");
        }
        if question.is_some() {
            let open = Open { request, sent, since: Instant::now(), question };
            if let Err(TrySendError::Full(open) | TrySendError::Disconnected(open)) =
                self.questions.try_send(open)
            {
                let reason = "too many questions are open; ask again".to_owned();
                let _ = open.question.map(|q| q.answer(Err(reason)));
            }
        }
    }
}

/// What an authority message asks of the arbiter; a status asks for nothing and is answered at once.
fn understand(payload: &[u8]) -> Result<(AuthorityRequest, Source), String> {
    let message: AuthorityMessage =
        serde_json::from_slice(payload).map_err(|e| format!("not a request for authority: {e}"))?;
    if message.source == Source::RUN {
        return Err(format!("`{}` is the run's own name; take another", Source::RUN));
    }
    let request = match message.request {
        AuthorityAsk::Policy => AuthorityRequest::Policy,
        AuthorityAsk::Hold => AuthorityRequest::Hold,
        AuthorityAsk::Take { mode, priority, lease_ms } => {
            let duration = Duration::from_millis(lease_ms);
            AuthorityRequest::Take(Claim { mode, priority, duration })
        }
        AuthorityAsk::Renew => AuthorityRequest::Renew,
        AuthorityAsk::Release { to_policy } => AuthorityRequest::Release { to_policy },
        AuthorityAsk::Status => AuthorityRequest::Status,
    };
    Ok((request, message.source))
}

/// The desk's thread.
struct Clerk {
    config: DeskConfig,
    open: Vec<Open>,
    standing: Standing,
    reason: Option<Reason>,
    since: Stamp,
    status: Publisher,
    next_status: Stamp,
}

impl Clerk {
    fn work(
        &mut self,
        quit: &AtomicBool,
        inlet: &Inlet,
        asked: &Receiver<Open>,
        mut answers: rtrb::Consumer<crate::control::OperatorAnswer>,
        mut changes: rtrb::Consumer<crate::arbiter::AuthorityChange>,
    ) {
        while !quit.load(Ordering::Relaxed) {
            if self.open.is_empty() {
                match asked.recv_timeout(WATCH) {
                    Ok(open) => self.open.push(open),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                std::thread::sleep(POLL);
                self.open.extend(asked.try_iter());
            }
            let mut news = false;
            while let Ok(change) = changes.pop() {
                (self.reason, self.since, news) = (Some(change.reason), change.at, true);
                self.standing = Standing {
                    authority: change.to,
                    holder: change.by,
                    awaits_consent: change.awaits_consent,
                };
                tracing::info!(to = change.to.name(), by = %change.by, reason = ?change.reason, "authority");
            }
            while let Ok(answer) = answers.pop() {
                self.standing = answer.standing;
                self.answer(answer.ticket, answer.result.map_err(|e| e.to_string()));
            }
            for open in self.open.iter_mut().filter(|o| !o.sent) {
                open.sent = inlet.push(ControlEvent::Operator(open.request));
            }
            let late = |o: &Open| o.since.elapsed() > PATIENCE;
            if let Some(ticket) = self.open.iter().find(|o| late(o)).map(|o| o.request.ticket) {
                self.answer(ticket, Err("the control thread does not answer".to_owned()));
            }
            let now = Clock::now();
            if news || now >= self.next_status {
                self.next_status = now + STATUS_PERIOD;
                // Names and numbers always have a JSON form.
                if let Ok(text) = serde_json::to_vec(&self.report()) {
                    self.status.put(text, now);
                }
            }
        }
    }

    fn report(&self) -> AuthorityStatus {
        AuthorityStatus {
            authority: self.standing.authority,
            holder: self.standing.holder,
            awaits_consent: self.standing.awaits_consent,
            reason: self.reason,
            since_ns: self.since.0,
            drivers: self.config.drivers.clone(),
        }
    }

    fn answer(&mut self, ticket: u64, result: Result<(), String>) {
        let Some(at) = self.open.iter().position(|o| o.request.ticket == ticket) else { return };
        let open = self.open.swap_remove(at);
        let Some(question) = open.question else { return };
        let stop = matches!(open.request.request, AuthorityRequest::Stop | AuthorityRequest::Reset);
        let text = |e: serde_json::Error| e.to_string();
        question.answer(result.and_then(|()| {
            if stop {
                let authority = self.standing.authority;
                let ack = StopAck {
                    robot: self.config.robot.clone(),
                    part: RUNTIME.to_owned(),
                    latched: authority == crate::arbiter::Authority::Stop,
                    state: authority.name().to_owned(),
                    fault: None,
                    drivers: self.config.drivers.clone(),
                };
                serde_json::to_vec(&ack).map_err(text)
            } else {
                serde_json::to_vec(&self.report()).map_err(text)
            }
        }));
    }
}
