//! Sinew's drivers: arms, cameras and the peers that put them on the bus.

pub mod pattern;
pub mod peer;
pub mod sim;
