//! What the arbiter decides about: kinds of authority, requests, reasons, and the rules of the configuration.

use std::time::Duration;

use super::{Claim, Source};
use crate::Stamp;

/// The most operators that a configuration may name.
pub const MAX_OPERATORS: usize = 8;

/// Who moves the arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Authority {
    /// Nobody: the arm is held where it is.
    Hold,
    /// The policy's chunks.
    Policy,
    /// A motion of the runtime's own (to the ready pose), fed through scheduler and guard like a chunk.
    Motion,
    /// A person at a teleop device.
    Teleop,
    /// The policy, with a person's bounded correction on top.
    Shared,
    /// Stopped; latched until reset by a person.
    Stop,
}

impl Authority {
    /// Name in status lines.
    pub fn name(self) -> &'static str {
        match self {
            Authority::Hold => "hold",
            Authority::Policy => "policy",
            Authority::Motion => "motion",
            Authority::Teleop => "teleop",
            Authority::Shared => "shared",
            Authority::Stop => "stop",
        }
    }

    /// True when the arm may be moved under it.
    pub fn moves(self) -> bool {
        !matches!(self, Authority::Hold | Authority::Stop)
    }
}

/// Why authority changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The run, or a person who takes authority away, asked for it.
    Requested,
    /// An operator agreed that the policy moves the arm.
    Consented,
    /// A teleop device took authority on a lease.
    Taken,
    /// The lease's holder gave it back.
    Released,
    /// The lease's holder fell silent.
    LeaseExpired,
    /// The measured state is too old to move by.
    StateStale,
    /// The policy's process is gone.
    PolicyLost,
    /// Stop was pressed.
    StopPressed,
    /// An arm's driver stopped by itself.
    DriverStopped,
    /// An operator unlatched a stop.
    Reset,
}

/// What is asked of the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthorityRequest {
    /// Give authority to the policy; from an operator this is the consent to go on.
    Policy,
    /// Give authority to a motion of the runtime.
    Motion,
    /// Take authority away: hold.
    Hold,
    /// Lend authority to a teleop device.
    Take(Claim),
    /// The lease's holder is still there.
    Renew,
    /// The lease's holder gives authority back.
    Release {
        /// To the policy, which is an operator's consent; otherwise to a hold.
        to_policy: bool,
    },
    /// Nothing: only the answer counts, which says who holds authority.
    Status,
    /// The policy's process is gone.
    PolicyLost,
    /// An arm's driver stopped by itself: the runtime stops too.
    DriverStopped,
    /// Stop and latch.
    Stop,
    /// Unlatch a stop (an operator's decision); authority is `Hold` afterwards.
    Reset,
}

/// Why a request was not granted.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Denied {
    /// A stop is latched.
    #[error("a stop is latched; `sinew reset` unlatches it")]
    Stopped,
    /// The measured state is stale or has not come.
    #[error("the arm's measured state is stale; check its driver")]
    StateStale,
    /// The policy was interrupted and nobody has agreed that it goes on.
    #[error("the policy was interrupted; `sinew authority policy` lets it go on")]
    ConsentMissing,
    /// Only operators may ask for this.
    #[error("this is an operator's decision; `operators` under [control] names them")]
    NotAnOperator,
    /// Another device holds the lease.
    #[error("another device holds the arm with the same or a higher priority")]
    Held,
    /// The lease has ended, or was never given.
    #[error("the arm is not lent to you; take it first")]
    NoLease,
    /// There is nothing to correct.
    #[error(
        "the policy does not move the arm, so there is nothing to correct; take it as `teleop`"
    )]
    NoPolicy,
}

/// One change of authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AuthorityChange {
    /// When.
    pub at: Stamp,
    /// Who held it before.
    pub from: Authority,
    /// Who holds it now.
    pub to: Authority,
    /// Why.
    pub reason: Reason,
    /// Who brought it about: who asked, or whose lease ended.
    pub by: Source,
    /// An operator must agree before the policy moves again.
    pub awaits_consent: bool,
}

/// How the policy gets authority back after an interruption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resume {
    /// An operator must agree.
    #[default]
    Ask,
    /// By itself after a lease, a stale state or a lost policy; after a stop or a person's hold an operator
    /// must agree all the same.
    Auto,
}

/// The names that count as operators; without any, everybody on the bus but the run itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Operators {
    names: [Option<Source>; MAX_OPERATORS],
}

impl Operators {
    /// The operators `names`; those beyond [`MAX_OPERATORS`] are left out.
    pub fn new(names: impl IntoIterator<Item = Source>) -> Self {
        let mut out = Self::default();
        for (slot, name) in out.names.iter_mut().zip(names) {
            *slot = Some(name);
        }
        out
    }

    /// Whether `who` is one of them.
    pub fn contains(&self, who: Source) -> bool {
        who != Source::RUN && (self.names[0].is_none() || self.names.contains(&Some(who)))
    }
}

/// Settings of the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ArbiterConfig {
    /// How the policy gets authority back.
    pub resume: Resume,
    /// Who may agree and reset.
    pub operators: Operators,
    /// No lease lasts longer without a sign of life.
    pub longest_lease: Duration,
}

impl Default for ArbiterConfig {
    fn default() -> Self {
        Self {
            resume: Resume::Ask,
            operators: Operators::default(),
            longest_lease: Duration::from_millis(500),
        }
    }
}

/// Who holds authority, and what the policy waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Standing {
    /// Who moves the arm.
    pub authority: Authority,
    /// Who brought that about; in `Teleop` and `Shared` the lease's holder.
    pub holder: Source,
    /// An operator must agree before the policy moves again.
    pub awaits_consent: bool,
}

impl Default for Standing {
    fn default() -> Self {
        // Starting the run was a person's consent.
        Self { authority: Authority::Hold, holder: Source::RUN, awaits_consent: false }
    }
}
