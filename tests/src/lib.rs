//! Sinew: tests.
