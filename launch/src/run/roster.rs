//! Who is there: the parts on the bus by their liveliness tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use sinew_runtime::transport::{Bus, Keys, Subscription};

use super::robot::RunError;

/// A part as the bus sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Presence {
    /// The processes that run it; normally one.
    pub processes: BTreeSet<u32>,
    /// Times that it came.
    pub appeared: u64,
    /// Times that its last process went.
    pub lost: u64,
}

/// The parts that have been seen on the bus.
#[derive(Clone, Default)]
pub(super) struct Roster {
    parts: Arc<Mutex<BTreeMap<String, Presence>>>,
}

impl Roster {
    /// Follows the tokens of the robot's parts.
    pub fn follow(bus: &Bus, keys: &Keys) -> Result<(Self, Subscription), RunError> {
        let roster = Self::default();
        let (seen, own) = (roster.clone(), keys.clone());
        let subscription = bus.watch(&keys.all_parts(), move |token, alive| {
            if let Some((part, process)) = own.part_of(token) {
                seen.on_token(&part, process, alive);
            }
        })?;
        Ok((roster, subscription))
    }

    fn on_token(&self, part: &str, process: u32, alive: bool) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let presence = parts.entry(part.to_owned()).or_default();
        let changed = match alive {
            true => presence.processes.insert(process),
            false => presence.processes.remove(&process),
        };
        if changed && alive {
            presence.appeared += 1;
            tracing::info!(part, process, "a part is there");
        } else if changed && presence.processes.is_empty() {
            presence.lost += 1;
            tracing::warn!(part, process, "a part is gone");
        }
    }

    /// Whether `part` is there.
    pub fn is_there(&self, part: &str) -> bool {
        self.presence(part).is_some_and(|p| !p.processes.is_empty())
    }

    /// Times that `part` was lost.
    pub fn lost(&self, part: &str) -> u64 {
        self.presence(part).map_or(0, |p| p.lost)
    }

    fn presence(&self, part: &str) -> Option<Presence> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).get(part).cloned()
    }

    /// All parts that have been seen.
    pub fn all(&self) -> BTreeMap<String, Presence> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_there_while_one_of_its_processes_is() {
        let roster = Roster::default();
        roster.on_token("policy", 10, true);
        roster.on_token("policy", 11, true);
        roster.on_token("policy", 10, false);
        assert!(roster.is_there("policy"));
        assert_eq!(roster.lost("policy"), 0);
        roster.on_token("policy", 11, false);
        roster.on_token("policy", 11, false);
        assert!(!roster.is_there("policy"));
        assert_eq!((roster.lost("policy"), roster.lost("arm")), (1, 0));
    }
}
