//! Wrappers that work on any sampling head: several candidates with a verifier, a memory of successes, a start from the
//! last chunk, and a comparison of what caches make with what is made without them.
//!
//! Each is a [`sinew_runtime::Policy`] around another one, so they stack. They use nothing but the trait: the head
//! inside may be any that makes different chunks of different seeds ([`BestOf`]), or that starts from a noised guess
//! ([`Recall`]).

mod candidates;
mod compared;
mod iterate;
mod memory;
mod recall;
mod verifiers;

#[cfg(test)]
mod tests;

pub use candidates::BestOf;
pub use compared::Compared;
pub use iterate::{Iterate, IterateConfig, NoiseLaw, Unit};
pub(crate) use iterate::{iterate, units};
pub use memory::{Memory, MemoryError, Record, Shape};
pub use recall::{Encoder, Episode, Glance, Recall, RecallConfig};
pub use verifiers::{Coherence, Context, PastActions, Verifier};
