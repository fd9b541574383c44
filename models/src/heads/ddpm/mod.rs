//! Denoising diffusion samplers: DDPM (Ho et al. 2020, arXiv 2006.11239) and DDIM (Song et al. 2021, 2010.02502).
//!
//! `ᾱ_t` is the share of the signal left after step `t` of `T` training steps: a sample at `t` is
//! `√ᾱ_t·x0 + √(1 − ᾱ_t)·noise`. Conventions are those of diffusers as LeRobot 0.6.1 sets it up
//! (`schedulers/scheduling_ddpm.py`, `scheduling_ddim.py`: variance `fixed_small`, `eta` 0, `ᾱ` 1 past the end).

mod rolling;
mod sampler;
mod schedule;

pub use rolling::{Buffer, Profile};
pub use sampler::{Inpainting, Sampler};
pub use schedule::{BetaSchedule, Kind, Prediction, Schedule, Spacing};
