//! The arbiter: who holds authority over the arm, and why it changed.

use crate::Stamp;

/// Who moves the arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Authority {
    /// Nobody: the arm is held where it is.
    Hold,
    /// The policy's chunks.
    Policy,
    /// A motion of the runtime's own (to the ready pose), fed through scheduler and guard like a chunk.
    Motion,
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
            Authority::Stop => "stop",
        }
    }
}

/// Why authority changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// An operator or the run asked for it.
    Requested,
    /// The measured state is too old to move by.
    StateStale,
    /// Stop was pressed.
    StopPressed,
}

/// What is asked of the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthorityRequest {
    /// Give authority to the policy.
    Policy,
    /// Give authority to a motion of the runtime.
    Motion,
    /// Take authority away: hold.
    Hold,
    /// Stop and latch.
    Stop,
    /// Unlatch a stop (a person's decision); authority is `Hold` afterwards.
    Reset,
}

/// One change of authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthorityChange {
    /// When.
    pub at: Stamp,
    /// Who held it before.
    pub from: Authority,
    /// Who holds it now.
    pub to: Authority,
    /// Why.
    pub reason: Reason,
}

/// Decides who holds authority. Starts in [`Authority::Hold`]: deny by default.
#[derive(Debug, Clone)]
pub struct Arbiter {
    authority: Authority,
    state_fresh: bool,
}

impl Default for Arbiter {
    fn default() -> Self {
        Self { authority: Authority::Hold, state_fresh: false }
    }
}

impl Arbiter {
    /// Who holds authority.
    pub fn authority(&self) -> Authority {
        self.authority
    }

    /// A request at `now`; the change that it made, if any.
    ///
    /// `Stop` is latched: only [`AuthorityRequest::Reset`] leaves it. Nobody gets to move the arm while the measured
    /// state is stale.
    pub fn on_request(&mut self, request: AuthorityRequest, now: Stamp) -> Option<AuthorityChange> {
        let stopped = self.authority == Authority::Stop;
        let to = match request {
            AuthorityRequest::Stop => {
                return self.change(Authority::Stop, Reason::StopPressed, now);
            }
            AuthorityRequest::Reset if stopped => Authority::Hold,
            AuthorityRequest::Policy if !stopped && self.state_fresh => Authority::Policy,
            AuthorityRequest::Motion if !stopped && self.state_fresh => Authority::Motion,
            AuthorityRequest::Hold if !stopped => Authority::Hold,
            _ => return None,
        };
        self.change(to, Reason::Requested, now)
    }

    /// Whether the measured state is fresh at `now`; losing it ends every motion in a hold.
    ///
    /// It does not come back by itself: authority must be asked for again.
    pub fn on_state(&mut self, fresh: bool, now: Stamp) -> Option<AuthorityChange> {
        self.state_fresh = fresh;
        let moving = matches!(self.authority, Authority::Policy | Authority::Motion);
        if moving && !fresh { self.change(Authority::Hold, Reason::StateStale, now) } else { None }
    }

    fn change(&mut self, to: Authority, reason: Reason, at: Stamp) -> Option<AuthorityChange> {
        let from = std::mem::replace(&mut self.authority, to);
        (from != to).then_some(AuthorityChange { at, from, to, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Stamp = Stamp(1);

    #[test]
    fn nobody_moves_an_arm_whose_state_is_unknown() {
        let mut arbiter = Arbiter::default();
        assert_eq!(arbiter.on_request(AuthorityRequest::Policy, NOW), None);
        arbiter.on_state(true, NOW);
        assert!(arbiter.on_request(AuthorityRequest::Policy, NOW).is_some());
        let change = arbiter.on_state(false, NOW);
        assert_eq!(change.map(|c| (c.to, c.reason)), Some((Authority::Hold, Reason::StateStale)));
        arbiter.on_state(true, NOW);
        assert_eq!(arbiter.authority(), Authority::Hold, "authority does not return by itself");
    }

    #[test]
    fn stop_is_latched_until_reset() {
        let mut arbiter = Arbiter::default();
        arbiter.on_state(true, NOW);
        arbiter.on_request(AuthorityRequest::Stop, NOW);
        for request in [AuthorityRequest::Policy, AuthorityRequest::Motion, AuthorityRequest::Hold]
        {
            assert_eq!(arbiter.on_request(request, NOW), None);
            assert_eq!(arbiter.authority(), Authority::Stop);
        }
        arbiter.on_request(AuthorityRequest::Reset, NOW);
        assert_eq!(arbiter.authority(), Authority::Hold);
    }
}
