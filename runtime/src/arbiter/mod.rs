//! The arbiter: who holds authority over the arm, and why it changed.
//!
//! Deny by default. The run itself may ask for the policy and for its own motions as long as nobody took them
//! away; a person at a teleop device borrows authority on a lease; anybody may stop. A stop is latched: only a
//! reset by an operator leaves it, to a hold, and the policy moves again only when an operator agrees.

mod lease;
mod rules;
mod source;
#[cfg(test)]
mod tests;

pub use lease::{Claim, Lease, LeaseMode};
pub use rules::{
    ArbiterConfig, Authority, AuthorityChange, AuthorityRequest, Denied, MAX_OPERATORS, Operators,
    Reason, Resume, Standing,
};
pub use source::{MAX_SOURCE, Source, SourceError};

use crate::Stamp;

/// Decides who holds authority. Starts in [`Authority::Hold`].
///
/// A pure state machine. Real time: no call allocates, locks or waits.
#[derive(Debug, Clone, Default)]
pub struct Arbiter {
    config: ArbiterConfig,
    now: Standing,
    lease: Option<Lease>,
    state_fresh: bool,
}

type Answer = Result<Option<AuthorityChange>, Denied>;

impl Arbiter {
    /// An arbiter that holds.
    pub fn new(config: ArbiterConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Who holds authority.
    pub fn authority(&self) -> Authority {
        self.now.authority
    }

    /// Who holds authority, and what the policy waits for.
    pub fn standing(&self) -> Standing {
        self.now
    }

    /// The lease, while authority is lent.
    pub fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }

    /// A request of `who` at `now`; the change that it made, if any.
    ///
    /// # Errors
    /// [`Denied`]; nothing has changed then. A stop is never denied.
    pub fn on_request(&mut self, request: AuthorityRequest, who: Source, now: Stamp) -> Answer {
        use AuthorityRequest as Ask;
        match request {
            Ask::Stop => return Ok(self.stop(Reason::StopPressed, who, now)),
            Ask::DriverStopped => return Ok(self.stop(Reason::DriverStopped, who, now)),
            Ask::Reset => return self.reset(who, now),
            Ask::Status => return Ok(None),
            _ if self.now.authority == Authority::Stop => return Err(Denied::Stopped),
            Ask::PolicyLost => return Ok(self.policy_lost(who, now)),
            Ask::Hold => return self.hold(who, now),
            Ask::Renew => return self.of_holder(who).map(|lease| lease.renew(now)).map(|()| None),
            Ask::Release { to_policy: false } => {
                self.of_holder(who)?;
                return Ok(self.end_lease(Reason::Released, now));
            }
            Ask::Policy | Ask::Motion | Ask::Take(_) | Ask::Release { to_policy: true } => {}
        }
        if !self.state_fresh {
            return Err(Denied::StateStale);
        }
        match request {
            Ask::Take(claim) => self.take(claim, who, now),
            Ask::Motion => {
                self.run_may_move(who)?;
                Ok(self.change(Authority::Motion, Reason::Requested, who, now))
            }
            Ask::Release { to_policy: true } => {
                self.of_holder(who)?;
                self.consent(who, now)
            }
            _ if who == Source::RUN => {
                self.run_may_move(who)?;
                Ok(self.change(Authority::Policy, Reason::Requested, who, now))
            }
            _ => self.consent(who, now),
        }
    }

    /// A sample of the teleop device `who` came at `now`: true when it holds the lease, which this renews.
    pub fn on_sample(&mut self, who: Source, now: Stamp) -> bool {
        self.of_holder(who).map(|lease| lease.renew(now)).is_ok()
    }

    /// Whether the measured state is fresh at `now`; losing it ends every motion in a hold.
    ///
    /// It does not come back by itself: authority must be asked for again.
    pub fn on_state(&mut self, fresh: bool, now: Stamp) -> Option<AuthorityChange> {
        self.state_fresh = fresh;
        if fresh || !self.now.authority.moves() {
            return None;
        }
        self.interrupted();
        self.change(Authority::Hold, Reason::StateStale, self.now.holder, now)
    }

    /// Time passes: a lease whose holder fell silent ends.
    pub fn on_time(&mut self, now: Stamp) -> Option<AuthorityChange> {
        self.lease.filter(|l| l.expired(now))?;
        self.end_lease(Reason::LeaseExpired, now)
    }

    fn stop(&mut self, reason: Reason, who: Source, now: Stamp) -> Option<AuthorityChange> {
        self.lease = None;
        self.now.awaits_consent = true;
        if self.now.authority == Authority::Stop {
            return None; // the first stop's reason stays
        }
        self.change(Authority::Stop, reason, who, now)
    }

    fn reset(&mut self, who: Source, now: Stamp) -> Answer {
        if self.now.authority != Authority::Stop {
            return Ok(None);
        }
        self.operator(who)?;
        Ok(self.change(Authority::Hold, Reason::Reset, who, now))
    }

    /// A person's hold lasts until an operator agrees; the run's own ends nothing that is not the run's.
    fn hold(&mut self, who: Source, now: Stamp) -> Answer {
        if who == Source::RUN {
            if self.lease.is_some() {
                return Err(Denied::Held);
            }
        } else {
            self.lease = None;
            self.now.awaits_consent = true;
        }
        Ok(self.change(Authority::Hold, Reason::Requested, who, now))
    }

    fn policy_lost(&mut self, who: Source, now: Stamp) -> Option<AuthorityChange> {
        if !matches!(self.now.authority, Authority::Policy | Authority::Shared) {
            return None;
        }
        self.interrupted();
        self.change(Authority::Hold, Reason::PolicyLost, who, now)
    }

    fn consent(&mut self, who: Source, now: Stamp) -> Answer {
        self.operator(who)?;
        if self.lease.is_some_and(|l| l.source != who) {
            return Err(Denied::Held);
        }
        self.lease = None;
        self.now.awaits_consent = false;
        Ok(self.change(Authority::Policy, Reason::Consented, who, now))
    }

    fn take(&mut self, claim: Claim, who: Source, now: Stamp) -> Answer {
        if who == Source::RUN {
            return Err(Denied::NotAnOperator);
        }
        let before = self.lease;
        if before.is_some_and(|l| l.source != who && l.priority >= claim.priority) {
            return Err(Denied::Held);
        }
        let moves = matches!(self.now.authority, Authority::Policy | Authority::Shared);
        if claim.mode == LeaseMode::Shared && !moves {
            // From his own teleop the policy moves again: that is consent.
            if !before.is_some_and(|l| l.source == who && l.policy_before) {
                return Err(Denied::NoPolicy);
            }
            self.operator(who)?;
        }
        let duration = claim.duration.min(self.config.longest_lease);
        self.lease = Some(Lease {
            source: who,
            priority: claim.priority,
            duration,
            expires: now + duration,
            policy_before: moves || before.is_some_and(|l| l.policy_before),
        });
        Ok(self.change(claim.mode.authority(), Reason::Taken, who, now))
    }

    fn end_lease(&mut self, reason: Reason, now: Stamp) -> Option<AuthorityChange> {
        let lease = self.lease.take()?;
        let resumes = self.config.resume == Resume::Auto
            && lease.policy_before
            && self.state_fresh
            && !self.now.awaits_consent;
        let to = if resumes { Authority::Policy } else { Authority::Hold };
        self.interrupted();
        self.change(to, reason, lease.source, now)
    }

    /// What moved the arm was interrupted: whoever had it loses it, and the policy waits as configured.
    fn interrupted(&mut self) {
        self.lease = None;
        self.now.awaits_consent |= self.config.resume == Resume::Ask;
    }

    fn run_may_move(&self, who: Source) -> Result<(), Denied> {
        match self {
            _ if who != Source::RUN => Err(Denied::NotAnOperator),
            Self { lease: Some(_), .. } => Err(Denied::Held),
            Self { now: Standing { awaits_consent: true, .. }, .. } => Err(Denied::ConsentMissing),
            _ => Ok(()),
        }
    }

    fn operator(&self, who: Source) -> Result<(), Denied> {
        if self.config.operators.contains(who) { Ok(()) } else { Err(Denied::NotAnOperator) }
    }

    fn of_holder(&mut self, who: Source) -> Result<&mut Lease, Denied> {
        self.lease.as_mut().filter(|l| l.source == who).ok_or(Denied::NoLease)
    }

    fn change(
        &mut self,
        to: Authority,
        reason: Reason,
        by: Source,
        at: Stamp,
    ) -> Option<AuthorityChange> {
        let from = std::mem::replace(&mut self.now.authority, to);
        let holder = std::mem::replace(&mut self.now.holder, by);
        let lent = matches!(to, Authority::Teleop | Authority::Shared);
        let awaits_consent = self.now.awaits_consent;
        (from != to || (lent && holder != by)).then_some(AuthorityChange {
            at,
            from,
            to,
            reason,
            by,
            awaits_consent,
        })
    }
}
