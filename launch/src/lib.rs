//! Sinew: launch.
