//! Sinew: drivers.
