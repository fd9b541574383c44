//! Flow matching: noise becomes actions by following a velocity.
//!
//! `H` action horizon, `M` width that the network denoises at. Papers and code disagree on the direction of
//! flow time, so every time carries its convention ([`FlowTime`]) and a sampler takes only velocities of
//! its own.

mod guidance;
mod model;
mod planned;
mod policy;
mod sampler;
mod time;

pub use guidance::{Guidance, freeze, guidance_weight};
pub use model::FlowModel;
pub(crate) use planned::{Planned, Start, reuse};
pub use policy::{FlowPolicy, Sampling};
pub use sampler::{EulerSampler, Sampler, Solver, fill_with_noise, gaussian_noise};
pub use time::{Convention, FlowTime, NoiseAtOne, NoiseAtZero, time_embedding};
