//! Messages about authority: requests, stops, resets, and what is answered. JSON, so that any peer can send them.

use serde::{Deserialize, Serialize};

use crate::arbiter::{Authority, LeaseMode, Reason, Source};

/// A request for authority, on [`Keys::authority`](super::Keys::authority), as a query or as a message.
///
/// ```json
/// {"source": "leader", "request": "take", "mode": "teleop", "priority": 1, "lease_ms": 300}
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityMessage {
    /// Who asks.
    #[serde(default = "unnamed")]
    pub source: Source,
    /// What for.
    #[serde(flatten)]
    pub request: AuthorityAsk,
}

/// What an [`AuthorityMessage`] asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum AuthorityAsk {
    /// The arm is the policy's: an operator's consent.
    Policy,
    /// Nobody's: the arm is held until an operator says otherwise.
    Hold,
    /// A teleop device takes the arm.
    Take {
        /// Alone, or as a correction of the policy.
        mode: LeaseMode,
        /// A higher one takes the arm from a lower one.
        #[serde(default)]
        priority: u8,
        /// Silence longer than this (ms) ends the lease.
        lease_ms: u64,
    },
    /// The holder of the lease is still there; its samples say so too.
    Renew,
    /// The holder gives the arm back.
    Release {
        /// To the policy, which is an operator's consent.
        #[serde(default)]
        to_policy: bool,
    },
    /// Only asks who holds the arm.
    Status,
}

/// Who holds the arm: the answer to an [`AuthorityMessage`], and what is published on
/// [`Keys::status`](super::Keys::status).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityStatus {
    /// Who moves the arm.
    pub authority: Authority,
    /// Who brought that about; the lease's holder while the arm is lent.
    pub holder: Source,
    /// An operator must agree before the policy moves again.
    pub awaits_consent: bool,
    /// Why authority changed last; none before the first change.
    pub reason: Option<Reason>,
    /// When it did (ns since the UNIX epoch).
    pub since_ns: i64,
    /// The drivers that a stop must reach.
    pub drivers: Vec<String>,
}

/// A stop or a reset, on [`Keys::stop`](super::Keys::stop) and [`Keys::reset`](super::Keys::reset), as a query or
/// as a message. A stop with any other payload, or none, stops too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopMessage {
    /// Who asks.
    #[serde(default = "unnamed")]
    pub source: Source,
}

impl StopMessage {
    /// What `payload` says, or a stop by nobody in particular.
    pub fn from_bytes(payload: &[u8]) -> Self {
        serde_json::from_slice(payload).unwrap_or(Self { source: Source::UNNAMED })
    }
}

/// A part's word that it has latched a stop, or left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAck {
    /// The robot.
    pub robot: String,
    /// [`RUNTIME`] or a driver's name.
    pub part: String,
    /// A stop is latched.
    pub latched: bool,
    /// What the part does now, in a word.
    pub state: String,
    /// What went wrong although it latched: the device did not take it.
    #[serde(default)]
    pub fault: Option<String>,
    /// The drivers that the runtime knows of; empty from a driver.
    #[serde(default)]
    pub drivers: Vec<String>,
}

/// The runtime's name among the parts.
pub const RUNTIME: &str = "runtime";

fn unnamed() -> Source {
    Source::UNNAMED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_documented_form_and_a_stop_is_never_misread() {
        let text =
            r#"{"source":"leader","request":"take","mode":"teleop","priority":1,"lease_ms":300}"#;
        let message: AuthorityMessage = serde_json::from_str(text).expect("as documented");
        let request = AuthorityAsk::Take { mode: LeaseMode::Teleop, priority: 1, lease_ms: 300 };
        assert_eq!(message, AuthorityMessage { source: Source::literal("leader"), request });
        assert_eq!(serde_json::to_string(&message).expect("plain"), text);
        let bare: AuthorityMessage = serde_json::from_str(r#"{"request":"hold"}"#).expect("short");
        assert_eq!(bare.source, Source::UNNAMED);
        assert!(serde_json::from_str::<AuthorityMessage>(r#"{"request":"explode"}"#).is_err());
        for payload in [&b""[..], b"{", b"{\"source\": 7}", &[0xff; 40]] {
            assert_eq!(StopMessage::from_bytes(payload).source, Source::UNNAMED);
        }
    }
}
