//! The running robot as the run sees it: the threads' ends, the counters, the simulator's referee.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use rtrb::{Consumer, Producer};
use sinew_runtime::blackbox::Note;
use sinew_runtime::control::ControlEvent;
use sinew_runtime::inference::InferenceReport;
use sinew_runtime::ingest::Ingest;
use sinew_runtime::stream::{BareCycle, StreamReport};
use sinew_runtime::transport::{Bus, BusError, Keys, Publisher};
use sinew_runtime::{Clock, DeviceError, JointLimits, PolicyError};

use super::agenda::Agenda;
use super::episode::{Outcome, SceneReply, SceneRequest};
use super::monitor::Monitor;
use super::recording::Inputs;
use super::roster::Roster;
use super::status::ControlStatus;
use crate::supervise::Exit;

/// Why a run did not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The policy.
    #[error("the policy cannot run: {0}")]
    Policy(#[from] PolicyError),
    /// Real-time scheduling was demanded and denied.
    #[error(transparent)]
    Realtime(#[from] sinew_runtime::rt::RealtimeDenied),
    /// The guard's limits.
    #[error("the guard cannot protect this arm: {0}")]
    Guard(#[from] sinew_runtime::guard::GuardError),
    /// The guard's space.
    #[error("the guard cannot keep this arm in its space: {0}")]
    Space(#[from] sinew_runtime::guard::SpaceError),
    /// The arm would run out of actions.
    #[error("this configuration cannot hold: {0}; {remedy}", remedy = .0.nearest.remedy())]
    Starves(#[from] sinew_runtime::scheduler::starvation::Starves),
    /// Something did not happen in time.
    #[error("{what} did not come within {seconds} s; {remedy}")]
    Silent {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// A message of the simulator's referee that is none.
    #[error("the simulator answered with something else than expected: {0}")]
    Referee(String),
    /// The control thread takes no more requests.
    #[error(
        "the control thread does not take requests any more; see the log above for why it ended"
    )]
    ControlGone,
    /// A child process failed in a way that a restart does not mend.
    #[error("the part `{part}` cannot run ({}); its own message is above", ended(exit))]
    PartFailed {
        /// The part.
        part: String,
        /// How it ended.
        exit: Option<Exit>,
    },
    /// It was told to end before it had begun.
    #[error("ended before everything was there")]
    Ended,
    /// The recording cannot be begun.
    #[error("{}: the recording cannot be written: {reason}; choose another --record", file.display())]
    Recording {
        /// The file.
        file: std::path::PathBuf,
        /// The system's word.
        reason: String,
    },
    /// The operating system refused something.
    #[error("{what}: {reason}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's word.
        reason: String,
    },
}

fn ended(exit: &Option<Exit>) -> String {
    match exit {
        Some(Exit::Code(code)) => format!("exit code {code}"),
        Some(Exit::Signal(signal)) => format!("signal {signal}"),
        Some(Exit::NotStarted) | None => "it could not be started".to_owned(),
    }
}

/// Longest time between two statuses of the control process.
const STATUS_PERIOD: Duration = Duration::from_millis(250);

/// What the simulator's referee last said.
#[derive(Default)]
pub(super) struct Referee {
    pub outcome: Option<Outcome>,
}

/// The running robot.
pub(super) struct Robot {
    pub monitor: Monitor,
    /// Limits that the guard enforces, one per joint.
    pub limits: Vec<JointLimits>,
    /// Where episodes begin (rad).
    pub ready: Vec<f64>,
    /// Of the slowest camera.
    pub frame_period: Duration,
    pub status: Publisher,
    pub status_said: Option<(Instant, ControlStatus)>,
    /// Parts in other processes that the run cannot do without, and how often each had been lost when authority was
    /// last given to the policy.
    pub needed: Vec<(String, u64)>,
    pub roster: Roster,
    /// Set when authority is given to the policy.
    pub granted: Arc<AtomicBool>,
    /// Why the run waits for people; empty while it does not.
    pub held: String,
    /// When the run last asked for authority after an interruption.
    pub asked: Option<Instant>,
    pub ingest: Arc<Mutex<Ingest>>,
    pub instruction: Arc<Mutex<String>>,
    /// What people say meanwhile.
    pub agenda: Agenda,
    /// What they said in this episode, as far as the run follows it.
    pub said: Vec<String>,
    pub recorder: Inputs,
    pub referee: Arc<Mutex<Referee>>,
    pub requests: Producer<ControlEvent>,
    pub stream_reports: Consumer<StreamReport>,
    pub bare_reports: Consumer<BareCycle>,
    pub inference_reports: Receiver<InferenceReport>,
    pub bus: Bus,
    pub keys: Keys,
}

impl Robot {
    /// Reads what the threads reported.
    pub fn drain(&mut self) {
        let (joints, grants) = (self.limits.len(), self.monitor.grants);
        let (stream, bare) = (&mut self.stream_reports, &mut self.bare_reports);
        self.monitor.drain(stream, bare, &self.inference_reports, joints);
        if self.monitor.grants != grants {
            self.granted.store(true, Ordering::Relaxed);
            for (part, lost) in &mut self.needed {
                *lost = self.roster.lost(part);
            }
        }
        if let Some(instruction) = self.agenda.take() {
            self.set_instruction(&instruction);
            self.said.push(instruction);
        }
        self.say_status();
    }

    /// Publishes the run's status when it has changed, and now and then all the same.
    fn say_status(&mut self) {
        let status = ControlStatus {
            process: std::process::id(),
            authority: self.monitor.authority.map_or("-", |a| a.name()).to_owned(),
            mode: self.monitor.mode.map(|m| format!("{m:?}").to_lowercase()).unwrap_or_default(),
            instruction: self.instruction(),
            chunks: self.monitor.accepted,
            held: self.held.clone(),
        };
        let due = |said: &(Instant, ControlStatus)| {
            let calm = ControlStatus { chunks: said.1.chunks, ..status.clone() } == said.1;
            !calm || said.0.elapsed() >= STATUS_PERIOD
        };
        if self.status_said.as_ref().is_none_or(due) {
            // Plain numbers and names always have a JSON form.
            if let Ok(text) = serde_json::to_vec(&status) {
                self.status.put(text, Clock::now());
            }
            self.status_said = Some((Instant::now(), status));
        }
    }

    /// A part in another process that was lost since authority was last given, if any, whether or not it has come
    /// back.
    pub fn lost_part(&self) -> Option<&str> {
        let lost = |p: &&(String, u64)| self.roster.lost(&p.0) > p.1;
        self.needed.iter().find(lost).map(|p| p.0.as_str())
    }

    /// Whether every part that the run cannot do without is there.
    pub fn complete(&self) -> bool {
        self.needed.iter().all(|p| self.roster.is_there(&p.0))
    }

    /// Hands `event` to the control thread.
    pub fn request(&mut self, event: ControlEvent) -> Result<(), RunError> {
        let mut event = Some(event);
        let end = Instant::now() + Duration::from_secs(2);
        while let Some(given) = event.take() {
            match self.requests.push(given) {
                Ok(()) => return Ok(()),
                Err(rtrb::PushError::Full(back)) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                    event = Some(back);
                }
                Err(_) => {}
            }
        }
        Err(RunError::ControlGone)
    }

    /// The newest measured joint positions (rad).
    pub fn measured(&self) -> Result<Vec<f64>, RunError> {
        let ingest = self.ingest.lock().unwrap_or_else(PoisonError::into_inner);
        let state = ingest.newest_state().ok_or(RunError::Silent {
            what: "the arm's measured state".into(),
            seconds: 0,
            remedy: "check the arm's driver",
        })?;
        Ok(state.position.as_slice().to_vec())
    }

    pub fn set_instruction(&self, instruction: &str) {
        self.recorder.note(Note::Instruction(instruction.to_owned()));
        self.agenda.follow(instruction);
        *self.instruction.lock().unwrap_or_else(PoisonError::into_inner) = instruction.to_owned();
    }

    /// The instruction that is followed.
    pub fn instruction(&self) -> String {
        self.instruction.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the simulator for a scene.
    pub fn new_scene(&self, request: &SceneRequest) -> Result<SceneReply, RunError> {
        let fail = |e: serde_json::Error| RunError::Referee(e.to_string());
        let asked = serde_json::to_vec(request).map_err(fail)?;
        let answer = self.bus.query(&self.keys.sim_reset(), asked, Duration::from_secs(10))?;
        // The arm may stand elsewhere in the new scene: that is no jump of a sensor.
        self.ingest.lock().unwrap_or_else(PoisonError::into_inner).forget_states();
        serde_json::from_slice(&answer).map_err(fail)
    }

    pub fn forget_outcome(&self) {
        self.referee.lock().unwrap_or_else(PoisonError::into_inner).outcome = None;
    }

    /// How the episode ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.referee.lock().unwrap_or_else(PoisonError::into_inner).outcome
    }
}
