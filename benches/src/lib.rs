//! Sinew: benches.
