//! The gate of a numbered stream: one source at a time, in order, of this time.
//!
//! A pure state machine. A key on the bus is open to everybody, a source may be replaced by a restarted
//! one, and what was held up on the way arrives all the same. The gate follows one publisher; another takes over only
//! once the first has been silent for long enough, so that a second source cannot pull the arm to and fro. Its
//! numbers go on where the last one's ended: a restart is no reordering.

use std::time::Duration;

use crate::Stamp;

use super::Attachment;

/// Clocks of two hosts may differ by this much.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(100);

/// Why a message was not let in.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, thiserror::Error,
)]
#[serde(rename_all = "snake_case")]
pub enum Rejected {
    /// It carries no number.
    #[error("it has no sequence number")]
    Unnumbered,
    /// Its number is not above the last one's: repeated, or overtaken.
    #[error("its number is not above the last one's")]
    OutOfOrder,
    /// It is from another publisher than the one that is followed.
    #[error("another publisher is being followed")]
    Foreign,
    /// Its stamp is in the future.
    #[error("its stamp is in the future; set the hosts' clocks and restart the part")]
    Future,
    /// It is too old.
    #[error("it is too old; it was held up, or the hosts' clocks differ")]
    Late,
}

/// Lets in one publisher's messages, in order.
#[derive(Debug, Clone)]
pub struct Gate {
    /// A publisher silent for this long may be replaced.
    silence: Duration,
    /// Older messages are refused.
    max_age: Duration,
    /// The followed publisher and its last number.
    source: Option<([u8; 16], u64)>,
    /// Number of the last message that was let in.
    number: u64,
    arrived: Stamp,
    counts: [u64; 5],
}

impl Gate {
    /// A gate that follows nobody yet.
    ///
    /// A publisher silent for `silence` may be replaced; messages older than `max_age` are refused.
    pub fn new(silence: Duration, max_age: Duration) -> Self {
        Self {
            silence,
            max_age,
            source: None,
            number: 0,
            arrived: Stamp::default(),
            counts: [0; 5],
        }
    }

    /// The number under which a message that arrives at `now`, stamped `stamp`, is let in.
    ///
    /// Numbers only grow, over all publishers; a gap is a loss.
    ///
    /// # Errors
    /// [`Rejected`], which is counted.
    pub fn admit(
        &mut self,
        attachment: Option<Attachment>,
        stamp: Stamp,
        now: Stamp,
    ) -> Result<u64, Rejected> {
        let admitted = self.judge(attachment, stamp, now);
        if let Err(why) = admitted {
            self.counts[why as usize] += 1;
        }
        admitted
    }

    fn judge(
        &mut self,
        attachment: Option<Attachment>,
        stamp: Stamp,
        now: Stamp,
    ) -> Result<u64, Rejected> {
        let Some(message) = attachment.filter(|a| a.sequence > 0) else {
            return Err(Rejected::Unnumbered);
        };
        if stamp > now + CLOCK_TOLERANCE {
            return Err(Rejected::Future);
        }
        let late = now.since(stamp) > self.max_age;
        let step = match self.source {
            Some((source, last)) if source == message.publisher => {
                message.sequence.checked_sub(last).filter(|step| *step > 0)
            }
            Some(_) if now.since(self.arrived) < self.silence => return Err(Rejected::Foreign),
            _ if late => return Err(Rejected::Late),
            _ => Some(1),
        };
        let step = step.ok_or(Rejected::OutOfOrder)?;
        // What is late still shows that its source lives, and is not lost.
        self.source = Some((message.publisher, message.sequence));
        self.arrived = now;
        if late {
            return Err(Rejected::Late);
        }
        self.number = self.number.saturating_add(step);
        Ok(self.number)
    }

    /// Messages refused so far, by reason; those that never happened are left out.
    pub fn rejected(&self) -> impl Iterator<Item = (Rejected, u64)> {
        use Rejected::{Foreign, Future, Late, OutOfOrder, Unnumbered};
        let all = [Unnumbered, OutOfOrder, Foreign, Future, Late];
        all.into_iter().map(|why| (why, self.counts[why as usize])).filter(|c| c.1 > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: i64 = 1_000_000;

    fn gate() -> Gate {
        Gate::new(Duration::from_millis(200), Duration::from_millis(250))
    }

    fn from(publisher: u8, sequence: u64) -> Option<Attachment> {
        Some(Attachment { sequence, stamp: Stamp(0), publisher: [publisher; 16] })
    }

    #[test]
    fn a_restarted_source_goes_on_and_a_second_one_is_kept_out() {
        let mut gate = gate();
        let at = |ms: i64| Stamp(ms * MS);
        assert_eq!(gate.admit(from(1, 70), at(0), at(0)), Ok(1));
        assert_eq!(gate.admit(from(1, 73), at(10), at(10)), Ok(4), "two were lost");
        assert_eq!(gate.admit(from(2, 1), at(20), at(20)), Err(Rejected::Foreign));
        assert_eq!(gate.admit(from(1, 73), at(30), at(30)), Err(Rejected::OutOfOrder));
        assert_eq!(gate.admit(from(2, 2), at(211), at(211)), Ok(5), "the first one is silent");
        assert_eq!(gate.admit(from(1, 74), at(220), at(220)), Err(Rejected::Foreign));
        let counts: Vec<_> = gate.rejected().collect();
        assert_eq!(counts, [(Rejected::OutOfOrder, 1), (Rejected::Foreign, 2)]);
    }

    #[test]
    fn what_was_held_up_and_what_comes_from_the_future_is_refused() {
        let mut gate = gate();
        let at = |ms: i64| Stamp(ms * MS);
        assert_eq!(gate.admit(from(1, 1), at(0), at(300)), Err(Rejected::Late));
        assert_eq!(gate.admit(from(1, 2), at(900), at(310)), Err(Rejected::Future));
        assert_eq!(gate.admit(None, at(310), at(310)), Err(Rejected::Unnumbered));
        assert_eq!(gate.admit(from(1, 3), at(310), at(312)), Ok(1));
        // Its process was stopped for a second: what waited in the socket comes in one go.
        for k in 4..8 {
            assert_eq!(gate.admit(from(1, k), at(320), at(1300)), Err(Rejected::Late));
        }
        assert_eq!(gate.admit(from(1, 8), at(1300), at(1301)), Ok(2), "late ones are not lost");
    }

    proptest! {
        #[test]
        fn numbers_only_grow_and_one_source_is_followed_at_a_time(
            messages in prop::collection::vec((0u8..3, 0u64..40, 0i64..60, -300i64..200), 1..200)
        ) {
            let mut gate = gate();
            let (mut now, mut number) = (0i64, 0);
            let mut followed: Option<(u8, i64)> = None;
            for (publisher, sequence, step, shift) in messages {
                now += step;
                let admitted = gate.admit(from(publisher, sequence), Stamp((now + shift) * MS), Stamp(now * MS));
                if let Ok(n) = admitted {
                    prop_assert!(n > number);
                    prop_assert!((-250..=100).contains(&shift) && sequence > 0);
                    if let Some((before, at)) = followed {
                        prop_assert!(before == publisher || now - at >= 200);
                    }
                    (number, followed) = (n, Some((publisher, now)));
                }
            }
        }
    }
}
