//! The supervisor's decisions: who is started when, who is given up. A pure state machine with time as an argument.

use std::time::Duration;

use serde::Serialize;
use sinew_runtime::Stamp;

/// Wait before the first restart; it doubles with every failure in a row.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Longest wait before a restart.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// A child that ran this long has recovered: the next failure is a first one.
const RECOVERED: Duration = Duration::from_secs(30);
/// A child that was asked to end is killed after this long.
const GRACE: Duration = Duration::from_secs(3);
/// Exit codes of mistakes that a restart does not mend: the command line, the launch file, the model.
const PERMANENT: [i32; 3] = [2, 3, 4];

/// What is done when a child fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It is started again, after a wait that grows with every failure in a row.
    OnFailure,
    /// It stays away.
    Never,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It could not be started.
    NotStarted,
}

/// What happened. Children are named by their place in the list given to [`Supervisor::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A child ended.
    Ended(usize, Exit),
    /// All children are to end.
    Stop,
    /// Nothing but time.
    Time,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start this child.
    Start(usize),
    /// Ask it to end.
    Terminate(usize),
    /// End it.
    Kill(usize),
}

/// What a child is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildState {
    /// It runs.
    Running,
    /// It failed and is started again soon.
    Waiting,
    /// It ended and is not started again.
    Ended,
    /// It is not started again, although it is needed.
    GivenUp,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Running { since: Stamp },
    Waiting { until: Stamp },
    Stopping { kill_at: Stamp, killed: bool },
    Ended,
    GivenUp,
}

#[derive(Debug, Clone, Copy)]
struct Child {
    restart: Restart,
    phase: Phase,
    /// Failures since it last ran for long.
    failures: u32,
    restarts: u64,
    last: Option<Exit>,
}

/// The supervisor of a launch's processes.
#[derive(Debug, Clone)]
pub struct Supervisor {
    children: Vec<Child>,
    stopping: bool,
}

impl Supervisor {
    /// A supervisor of one child per entry of `restarts`; all are started by the first event.
    pub fn new(restarts: &[Restart], now: Stamp) -> Self {
        let child = |restart: &Restart| Child {
            restart: *restart,
            phase: Phase::Waiting { until: now },
            failures: 0,
            restarts: 0,
            last: None,
        };
        Self { children: restarts.iter().map(child).collect(), stopping: false }
    }

    /// Takes in `event` at `now`; what is to be done is given to `act`, in order.
    pub fn on_event(&mut self, event: Event, now: Stamp, mut act: impl FnMut(Action)) {
        match event {
            Event::Ended(index, exit) => self.on_end(index, exit, now),
            Event::Stop if !self.stopping => {
                self.stopping = true;
                for (index, child) in self.children.iter_mut().enumerate() {
                    match child.phase {
                        Phase::Running { .. } => {
                            child.phase = Phase::Stopping { kill_at: now + GRACE, killed: false };
                            act(Action::Terminate(index));
                        }
                        Phase::Waiting { .. } => child.phase = Phase::Ended,
                        _ => {}
                    }
                }
            }
            Event::Stop | Event::Time => {}
        }
        for (index, child) in self.children.iter_mut().enumerate() {
            match child.phase {
                Phase::Waiting { until } if until <= now && !self.stopping => {
                    child.restarts += u64::from(child.last.is_some());
                    child.phase = Phase::Running { since: now };
                    act(Action::Start(index));
                }
                Phase::Stopping { kill_at, killed: false } if kill_at <= now => {
                    child.phase = Phase::Stopping { kill_at, killed: true };
                    act(Action::Kill(index));
                }
                _ => {}
            }
        }
    }

    fn on_end(&mut self, index: usize, exit: Exit, now: Stamp) {
        let Some(child) = self.children.get_mut(index) else { return };
        let Phase::Running { since } = child.phase else {
            child.phase = Phase::Ended;
            return;
        };
        child.last = Some(exit);
        child.phase = match (exit, child.restart) {
            (Exit::Code(0), _) => Phase::Ended,
            (Exit::Code(code), _) if PERMANENT.contains(&code) => Phase::GivenUp,
            (_, Restart::Never) => Phase::GivenUp,
            _ => {
                if now.since(since) >= RECOVERED {
                    child.failures = 0;
                }
                let wait = FIRST_WAIT.saturating_mul(1 << child.failures.min(16)).min(LONGEST_WAIT);
                child.failures += 1;
                Phase::Waiting { until: now + wait }
            }
        };
    }

    /// What child `index` is doing.
    pub fn state(&self, index: usize) -> ChildState {
        match self.children.get(index).map(|c| c.phase) {
            Some(Phase::Running { .. } | Phase::Stopping { .. }) => ChildState::Running,
            Some(Phase::Waiting { .. }) => ChildState::Waiting,
            Some(Phase::GivenUp) => ChildState::GivenUp,
            Some(Phase::Ended) | None => ChildState::Ended,
        }
    }

    /// Times that child `index` was started again.
    pub fn restarts(&self, index: usize) -> u64 {
        self.children.get(index).map_or(0, |c| c.restarts)
    }

    /// How child `index` last ended by itself.
    pub fn last_exit(&self, index: usize) -> Option<Exit> {
        self.children.get(index).and_then(|c| c.last)
    }

    /// Whether no child runs and none will.
    pub fn done(&self) -> bool {
        self.children.iter().all(|c| matches!(c.phase, Phase::Ended | Phase::GivenUp))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: u64) -> Stamp {
        Stamp(0) + Duration::from_millis(ms)
    }

    fn step(supervisor: &mut Supervisor, event: Event, ms: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        supervisor.on_event(event, at(ms), |a| actions.push(a));
        actions
    }

    #[test]
    fn a_failing_child_is_started_again_after_growing_waits() {
        let mut supervisor = Supervisor::new(&[Restart::OnFailure], at(0));
        let killed = Event::Ended(0, Exit::Signal(9));
        assert_eq!(step(&mut supervisor, Event::Time, 0), [Action::Start(0)]);
        assert_eq!(step(&mut supervisor, killed, 1000), []);
        assert_eq!(supervisor.state(0), ChildState::Waiting);
        assert_eq!(step(&mut supervisor, Event::Time, 1199), []);
        assert_eq!(step(&mut supervisor, Event::Time, 1200), [Action::Start(0)]);
        assert_eq!(step(&mut supervisor, killed, 1300), []);
        assert_eq!(step(&mut supervisor, Event::Time, 1699), []);
        assert_eq!(step(&mut supervisor, Event::Time, 1700), [Action::Start(0)]);
        // It ran for long: the next wait is the first one again.
        assert_eq!(step(&mut supervisor, killed, 60_000), []);
        assert_eq!(step(&mut supervisor, Event::Time, 60_200), [Action::Start(0)]);
        assert_eq!(supervisor.restarts(0), 3);
    }

    #[test]
    fn what_a_restart_does_not_mend_is_given_up() {
        let restarts = [Restart::OnFailure, Restart::Never, Restart::OnFailure];
        let mut supervisor = Supervisor::new(&restarts, at(0));
        step(&mut supervisor, Event::Time, 0);
        step(&mut supervisor, Event::Ended(0, Exit::Code(4)), 10);
        step(&mut supervisor, Event::Ended(1, Exit::Signal(9)), 10);
        step(&mut supervisor, Event::Ended(2, Exit::Code(0)), 10);
        assert_eq!(step(&mut supervisor, Event::Time, 100_000), []);
        let states = [0, 1, 2].map(|k| supervisor.state(k));
        assert_eq!(states, [ChildState::GivenUp, ChildState::GivenUp, ChildState::Ended]);
        assert!(supervisor.done());
    }

    #[test]
    fn a_stop_asks_first_and_kills_those_who_do_not_listen() {
        let mut supervisor = Supervisor::new(&[Restart::OnFailure; 2], at(0));
        step(&mut supervisor, Event::Time, 0);
        let asked = step(&mut supervisor, Event::Stop, 10);
        assert_eq!(asked, [Action::Terminate(0), Action::Terminate(1)]);
        step(&mut supervisor, Event::Ended(0, Exit::Signal(15)), 20);
        assert_eq!(step(&mut supervisor, Event::Time, 3010), [Action::Kill(1)]);
        assert_eq!(step(&mut supervisor, Event::Time, 4000), []);
        step(&mut supervisor, Event::Ended(1, Exit::Signal(9)), 4001);
        assert!(supervisor.done());
    }

    proptest! {
        #[test]
        fn no_child_is_started_twice_or_after_a_stop(
            events in prop::collection::vec((0u64..3000, 0usize..2, 0u8..6), 1..80)
        ) {
            let mut supervisor = Supervisor::new(&[Restart::OnFailure, Restart::Never], at(0));
            let (mut now, mut running, mut stopped) = (0, [false; 2], false);
            for (wait, index, kind) in events {
                now += wait;
                let event = match kind {
                    0 if running[index] => Event::Ended(index, Exit::Signal(9)),
                    1 if running[index] => Event::Ended(index, Exit::Code(1)),
                    2 if running[index] => Event::Ended(index, Exit::Code(0)),
                    3 if now > 20_000 => Event::Stop,
                    _ => Event::Time,
                };
                if let Event::Ended(index, _) = event {
                    running[index] = false;
                }
                stopped |= event == Event::Stop;
                for action in step(&mut supervisor, event, now) {
                    match action {
                        Action::Start(k) => {
                            prop_assert!(!running[k] && !stopped);
                            running[k] = true;
                        }
                        Action::Terminate(k) | Action::Kill(k) => prop_assert!(running[k] && stopped),
                    }
                }
                for (k, runs) in running.iter().enumerate() {
                    prop_assert_eq!(supervisor.state(k) == ChildState::Running, *runs);
                }
            }
        }
    }
}
