//! What the robot is told to do while it runs: `sinew say`.
//!
//! The rules: a new instruction counts from the next observation on. A chunk that is being made for the old one is
//! dropped at its next bounded step and asked for anew; what was committed before is played until the new chunk
//! takes over. Queued instructions come one by one: when an episode ends, by success or by its time limit, or when
//! somebody says `--next`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use sinew_runtime::arbiter::{Operators, Source};
use sinew_runtime::transport::{Bus, Keys, Subscription};

use super::robot::RunError;

/// Longest instruction (bytes), and the most that wait.
const LONGEST: usize = 1000;
const MOST: usize = 32;

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saying {
    /// From now on this.
    Now(String),
    /// This after all others that wait.
    Later(String),
    /// Go on with the next that waits.
    Next,
    /// Forget all that wait.
    Clear,
    /// Only say what is followed and what waits.
    Status,
}

/// A saying and who says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SayMessage {
    /// Who.
    pub source: Source,
    /// What.
    pub saying: Saying,
}

/// What is followed and what waits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Told {
    /// The instruction that is followed, or will be from the next observation on.
    pub instruction: String,
    /// Those that wait, the next one first.
    pub queue: Vec<String>,
}

/// Instructions, as they come in on a thread of the bus and are taken by the run.
#[derive(Debug, Clone, Default)]
pub(super) struct Agenda(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The instruction that the run follows.
    current: String,
    /// The one that it has not taken yet.
    now: Option<String>,
    queue: VecDeque<String>,
}

impl State {
    fn hear(&mut self, saying: Saying) -> Result<Told, String> {
        if let Saying::Now(text) | Saying::Later(text) = &saying
            && (text.trim().is_empty() || text.len() > LONGEST)
        {
            return Err(format!(
                "an instruction has 1 to {LONGEST} bytes, this one {}",
                text.len()
            ));
        }
        match saying {
            Saying::Now(text) => self.now = Some(text),
            Saying::Later(_) if self.queue.len() >= MOST => {
                return Err(format!("{MOST} instructions wait already"));
            }
            Saying::Later(text) => self.queue.push_back(text),
            Saying::Next => {
                self.now = Some(self.queue.pop_front().ok_or("no instruction waits")?);
            }
            Saying::Clear => self.queue.clear(),
            Saying::Status => {}
        }
        let instruction = self.now.as_ref().unwrap_or(&self.current).clone();
        Ok(Told { instruction, queue: self.queue.iter().cloned().collect() })
    }
}

impl Agenda {
    /// Answers on the bus; only `operators` may change anything.
    pub fn serve(
        &self,
        bus: &Bus,
        keys: &Keys,
        operators: Operators,
    ) -> Result<Subscription, RunError> {
        let agenda = self.clone();
        Ok(bus.serve(&keys.instruction(), move |asked| {
            let message: SayMessage = serde_json::from_slice(asked).map_err(|e| e.to_string())?;
            if message.saying != Saying::Status && !operators.contains(message.source) {
                return Err(format!("{} is no operator; see [control] operators", message.source));
            }
            let told = agenda.state().hear(message.saying)?;
            serde_json::to_vec(&told).map_err(|e| e.to_string())
        })?)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is whole: a poisoned lock only says that somebody else died.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The instruction that counts from now on, when somebody said a new one.
    pub fn take(&self) -> Option<String> {
        self.state().now.take()
    }

    /// The next that waits, at the end of an episode; what was said for the one before is over with it.
    pub fn next(&self) -> Option<String> {
        let mut state = self.state();
        state.now = None;
        state.queue.pop_front()
    }

    /// The run follows `instruction`.
    pub fn follow(&self, instruction: &str) {
        instruction.clone_into(&mut self.state().current);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(agenda: &Agenda, saying: Saying) -> Result<Told, String> {
        agenda.state().hear(saying)
    }

    #[test]
    fn the_newest_word_counts_and_the_others_wait_their_turn() {
        let agenda = Agenda::default();
        agenda.follow("a");
        assert_eq!(agenda.take(), None);
        hear(&agenda, Saying::Later("b".into())).expect("room");
        let told = hear(&agenda, Saying::Later("c".into())).expect("room");
        assert_eq!(told, Told { instruction: "a".into(), queue: vec!["b".into(), "c".into()] });
        hear(&agenda, Saying::Now("x".into())).expect("room");
        let told = hear(&agenda, Saying::Now("y".into())).expect("room");
        assert_eq!(told.instruction, "y", "before the run has taken it");
        assert_eq!(agenda.take(), Some("y".into()));
        assert_eq!(agenda.take(), None, "once");
        assert_eq!(hear(&agenda, Saying::Next).expect("b waits").instruction, "b");
        assert_eq!(agenda.take(), Some("b".into()));
        // An episode ends: the next one begins with c, whatever was said for the last.
        hear(&agenda, Saying::Now("late".into())).expect("room");
        assert_eq!((agenda.next(), agenda.take(), agenda.next()), (Some("c".into()), None, None));
        assert!(hear(&agenda, Saying::Next).is_err(), "none waits");
    }

    #[test]
    fn words_are_bounded() {
        let agenda = Agenda::default();
        for text in ["", "  ", &"x".repeat(LONGEST + 1)] {
            assert!(hear(&agenda, Saying::Now(text.to_owned())).is_err());
        }
        for _ in 0..MOST {
            hear(&agenda, Saying::Later("x".into())).expect("room");
        }
        assert!(hear(&agenda, Saying::Later("x".into())).is_err());
        assert!(hear(&agenda, Saying::Clear).is_ok_and(|told| told.queue.is_empty()));
    }
}
