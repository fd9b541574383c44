//! Supervised processes: parts of a launch that run beside the launching `sinew` and end with it.
//!
//! What is decided is in [`core`]; here is the thread that starts, watches and ends processes.

pub mod core;

pub use core::{ChildState, Exit, Restart};

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde::Serialize;
use sinew_runtime::Clock;

use self::core::{Action, Event, Supervisor};

/// How often the children are looked at.
const POLL: Duration = Duration::from_millis(20);

/// A process to be supervised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildSpec {
    /// The part that it runs.
    pub part: String,
    /// Arguments of the `sinew` command.
    pub arguments: Vec<std::ffi::OsString>,
    /// What happens when it fails.
    pub restart: Restart,
}

/// What is known of a child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChildFigures {
    /// The part that it runs.
    pub part: String,
    /// Its process; none while it does not run.
    pub process: Option<u32>,
    /// What it is doing.
    pub state: ChildState,
    /// Times that it was started again.
    pub restarts: u64,
    /// How it last ended by itself.
    pub last_exit: Option<Exit>,
}

/// The running supervisor; dropping it ends all children.
pub struct Supervision {
    quit: Arc<AtomicBool>,
    figures: Arc<Mutex<Vec<ChildFigures>>>,
    thread: Option<JoinHandle<()>>,
}

impl Supervision {
    /// Starts `children` and watches them.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread or to name this program.
    pub fn start(children: Vec<ChildSpec>) -> std::io::Result<Self> {
        let program = std::env::current_exe()?;
        let quit = Arc::new(AtomicBool::new(false));
        let figures: Arc<Mutex<Vec<ChildFigures>>> = Arc::default();
        let (seen, told) = (quit.clone(), figures.clone());
        // The children end with the thread that started them, so all are started by this one.
        let thread = std::thread::Builder::new().name("supervisor".into()).spawn(move || {
            let restarts: Vec<_> = children.iter().map(|c| c.restart).collect();
            let mut core = Supervisor::new(&restarts, Clock::now());
            let running = children.iter().map(|_| None).collect();
            let mut shell = Shell { program, children, running };
            let mut event = Event::Time;
            while !core.done() {
                shell.feed(&mut core, event);
                *told.lock().unwrap_or_else(PoisonError::into_inner) = shell.figures(&core);
                std::thread::sleep(POLL);
                event = if seen.load(Ordering::Relaxed) { Event::Stop } else { Event::Time };
            }
            *told.lock().unwrap_or_else(PoisonError::into_inner) = shell.figures(&core);
        })?;
        Ok(Self { quit, figures, thread: Some(thread) })
    }

    /// What is known of every child now.
    pub fn figures(&self) -> Vec<ChildFigures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Supervision {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed; the kernel then ends the children.
            let _ = thread.join();
        }
    }
}

struct Shell {
    program: std::path::PathBuf,
    children: Vec<ChildSpec>,
    running: Vec<Option<Child>>,
}

impl Shell {
    /// Gives `event` and every end of a child to `core`, and does what it says.
    fn feed(&mut self, core: &mut Supervisor, event: Event) {
        let mut events = vec![event];
        for (index, slot) in self.running.iter_mut().enumerate() {
            let ended = slot.as_mut().and_then(|c| c.try_wait().ok().flatten());
            if let Some(status) = ended {
                *slot = None;
                let exit = match (status.code(), status.signal()) {
                    (Some(code), _) => Exit::Code(code),
                    (None, signal) => Exit::Signal(signal.unwrap_or_default()),
                };
                if exit != Exit::Code(0) && event != Event::Stop {
                    tracing::warn!(part = %self.children[index].part, %status, "a part ended");
                }
                events.push(Event::Ended(index, exit));
            }
        }
        while let Some(event) = events.pop() {
            let mut actions = Vec::new();
            core.on_event(event, Clock::now(), |action| actions.push(action));
            for action in actions {
                if let Some(failed) = self.act(action) {
                    events.push(Event::Ended(failed, Exit::NotStarted));
                }
            }
        }
    }

    /// Does `action`; the child that could not be started, if so.
    fn act(&mut self, action: Action) -> Option<usize> {
        match action {
            Action::Start(index) => {
                let started = Command::new(&self.program)
                    .args(&self.children[index].arguments)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    // Ctrl-C is for the launching process, which ends the others in order.
                    .process_group(0)
                    .spawn();
                match started {
                    Ok(child) => self.running[index] = Some(child),
                    Err(error) => {
                        tracing::error!(part = %self.children[index].part, %error, "not started");
                        return Some(index);
                    }
                }
            }
            Action::Terminate(index) => self.signal(index, Signal::TERM),
            Action::Kill(index) => self.signal(index, Signal::KILL),
        }
        None
    }

    fn signal(&self, index: usize, signal: Signal) {
        let process = self.running[index].as_ref().and_then(|c| Pid::from_raw(c.id() as i32));
        if let Some(process) = process {
            // It has ended if this fails; the next look says so.
            let _ = rustix::process::kill_process(process, signal);
        }
    }

    fn figures(&self, core: &Supervisor) -> Vec<ChildFigures> {
        let child = |(index, spec): (usize, &ChildSpec)| ChildFigures {
            part: spec.part.clone(),
            process: self.running[index].as_ref().map(Child::id),
            state: core.state(index),
            restarts: core.restarts(index),
            last_exit: core.last_exit(index),
        };
        self.children.iter().enumerate().map(child).collect()
    }
}

/// Makes this process end with `parent`, its supervisor; false when that has ended already.
pub fn end_with(parent: u32) -> bool {
    // SIGTERM, as for an orderly end: an arm is brought to a hold on it.
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
        tracing::warn!(%error, "this part does not end with its supervisor");
    }
    rustix::process::getppid().is_some_and(|p| p.as_raw_nonzero().get() as u32 == parent)
}
