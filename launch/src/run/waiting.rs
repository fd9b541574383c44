//! Waiting for the parts that run elsewhere: in any order, patiently, and saying who is missing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sinew_runtime::ingest::Ingest;
use sinew_runtime::transport::{Bus, Keys, PolicyIntroduction, Publisher, decode_policy};

use super::assembly::Plan;
use super::parts::Part;
use super::robot::RunError;
use crate::supervise::{ChildState, Supervision};

/// How long the parts may take to find each other before that is said.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How a start waits for the parts that run elsewhere.
pub struct Waiting<'a> {
    /// The launch file, for the command that starts a missing part.
    pub file: &'a std::path::Path,
    /// Somebody wants the run to end.
    pub quit: &'a AtomicBool,
    /// The children.
    pub supervision: Option<&'a Supervision>,
    /// All parts run in this process: what is missing after [`PATIENCE`] is an error.
    pub alone: bool,
}

/// What a start waits with.
pub(super) struct World<'a> {
    pub bus: &'a Bus,
    pub keys: &'a Keys,
    pub publisher: &'a Publisher,
    pub ingest: &'a Mutex<Ingest>,
}

impl Waiting<'_> {
    pub(super) fn patient(&self) -> bool {
        !self.alone
    }

    /// Waits until the arm takes commands and sends states and, where `remote_policy`, the policy is ready.
    pub(super) fn wait(
        &self,
        plan: &Plan,
        world: &World,
        remote_policy: bool,
    ) -> Result<Option<PolicyIntroduction>, RunError> {
        let mut end = Instant::now() + PATIENCE;
        let mut introduced = None;
        loop {
            let mut missing = Vec::new();
            let reached = world.bus.wait_for_subscriber(world.publisher, Duration::from_millis(10));
            let seen = world.ingest.lock().unwrap_or_else(PoisonError::into_inner);
            if !reached || seen.newest_state().is_none() {
                missing.push(Part::Arm);
            }
            drop(seen);
            if remote_policy && introduced.is_none() {
                introduced = self.introduction(world);
                if introduced.is_none() {
                    missing.push(Part::Policy);
                }
            }
            if missing.is_empty() {
                return Ok(introduced);
            }
            if self.quit.load(Ordering::Relaxed) {
                return Err(RunError::Ended);
            }
            self.given_up()?;
            if Instant::now() > end {
                self.complain(plan, &missing)?;
                end = Instant::now() + PATIENCE;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn introduction(&self, world: &World) -> Option<PolicyIntroduction> {
        let patience = Duration::from_millis(500);
        let reply = world.bus.query(&world.keys.policy(), Vec::new(), patience).ok()?;
        decode_policy(&reply).map_err(|error| tracing::warn!(%error, "the policy's answer")).ok()
    }

    /// A child that will not come any more ends the wait.
    fn given_up(&self) -> Result<(), RunError> {
        let figures = self.supervision.map(Supervision::figures).unwrap_or_default();
        match figures.into_iter().find(|f| f.state == ChildState::GivenUp) {
            Some(child) => Err(RunError::PartFailed { part: child.part, exit: child.last_exit }),
            None => Ok(()),
        }
    }

    fn complain(&self, plan: &Plan, missing: &[Part]) -> Result<(), RunError> {
        let names = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if self.alone {
            let what = format!("the first word of {names}");
            let (seconds, remedy) = (PATIENCE.as_secs(), "check its driver in the log above");
            return Err(RunError::Silent { what, seconds, remedy });
        }
        let start =
            |part: &&Part| !plan.placement.here(part) && !plan.placement.children.contains(part);
        let elsewhere: Vec<_> = missing.iter().filter(start).map(ToString::to_string).collect();
        let how = match elsewhere.is_empty() {
            true => "it is being started".to_owned(),
            false => format!(
                "start it with `sinew launch {} --only {}`, or check that it reaches {}",
                self.file.display(),
                elsewhere.join(","),
                plan.endpoint
            ),
        };
        eprintln!("sinew: waiting for {names}; {how}");
        Ok(())
    }
}
