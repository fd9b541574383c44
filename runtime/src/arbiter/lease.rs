//! Leases: authority lent to a person at a teleop device, for as long as the device keeps saying so.

use std::time::Duration;

use super::{Authority, Source};
use crate::Stamp;

/// What a teleop device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Claim {
    /// The person moves the arm alone, or corrects what the policy does.
    pub mode: LeaseMode,
    /// A higher one takes the arm from a lower one; equals do not.
    pub priority: u8,
    /// Silence longer than this ends the lease; the configuration's longest lease bounds it.
    pub duration: Duration,
}

/// How much of the arm a lease gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseMode {
    /// The person alone: [`Authority::Teleop`].
    Teleop,
    /// The policy with the person's bounded correction: [`Authority::Shared`].
    Shared,
}

impl LeaseMode {
    /// The authority that the lease gives.
    pub fn authority(self) -> Authority {
        match self {
            LeaseMode::Teleop => Authority::Teleop,
            LeaseMode::Shared => Authority::Shared,
        }
    }
}

/// Authority that is lent out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// To whom.
    pub source: Source,
    /// Its priority.
    pub priority: u8,
    /// How long it lasts without a sign of life.
    pub duration: Duration,
    /// When it ends if none comes.
    pub expires: Stamp,
    /// The policy held authority when it began.
    pub policy_before: bool,
}

impl Lease {
    pub(super) fn renew(&mut self, now: Stamp) {
        self.expires = now + self.duration;
    }

    pub(super) fn expired(&self, now: Stamp) -> bool {
        now > self.expires
    }
}
