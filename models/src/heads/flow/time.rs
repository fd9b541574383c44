//! Flow time, with its direction in the type.

use std::marker::PhantomData;

mod sealed {
    pub trait Sealed {}
}

/// Which end of flow time the noise is at.
pub trait Convention: sealed::Sealed + std::fmt::Debug + Clone + Copy + PartialEq {
    /// The time of pure noise: 0 or 1. The actions are at the other end.
    const NOISE: f64;
    /// How `x` changes with the noise level per velocity: `dx = SIGN · v · d(level)`.
    const SIGN: f64;
}

/// Noise at 1, actions at 0; velocities point from actions to noise (openpi, LeRobot, SmolVLA).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseAtOne;

/// Noise at 0, actions at 1; velocities point from noise to actions (the papers, GR00T).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseAtZero;

impl sealed::Sealed for NoiseAtOne {}
impl sealed::Sealed for NoiseAtZero {}

impl Convention for NoiseAtOne {
    const NOISE: f64 = 1.0;
    const SIGN: f64 = 1.0;
}

impl Convention for NoiseAtZero {
    const NOISE: f64 = 0.0;
    const SIGN: f64 = -1.0;
}

/// A time between noise and actions, in convention `C`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowTime<C>(f64, PhantomData<C>);

impl<C: Convention> FlowTime<C> {
    /// The time of pure noise.
    pub const NOISE: Self = Self(C::NOISE, PhantomData);
    /// The time of clean actions.
    pub const ACTIONS: Self = Self(1.0 - C::NOISE, PhantomData);

    /// The time at which the sample is `level` parts noise and `1 - level` parts actions; rounded to
    /// single precision, as in training.
    pub fn of_level(level: f64) -> Self {
        let time = if C::NOISE == 1.0 { level } else { 1.0 - level };
        Self(f64::from(time as f32), PhantomData)
    }

    /// The number that a network of this convention takes.
    pub fn value(self) -> f64 {
        self.0
    }

    /// How much of the sample is noise: 1 to 0.
    pub fn level(self) -> f64 {
        if C::NOISE == 1.0 { self.0 } else { 1.0 - self.0 }
    }
}

impl From<FlowTime<NoiseAtOne>> for FlowTime<NoiseAtZero> {
    fn from(time: FlowTime<NoiseAtOne>) -> Self {
        Self::of_level(time.level())
    }
}

impl From<FlowTime<NoiseAtZero>> for FlowTime<NoiseAtOne> {
    fn from(time: FlowTime<NoiseAtZero>) -> Self {
        Self::of_level(time.level())
    }
}

/// Embedding of time `t`, written to `row`: sines, then as many cosines, of periods from `periods.0` to `periods.1`. A width
/// that is odd ends in a zero.
///
/// Angles in double precision: 2π/0.004 is large, and single precision gives visible errors.
pub fn time_embedding(t: f64, periods: (f64, f64), row: &mut [f32]) {
    let half = row.len() / 2;
    let last = half.saturating_sub(1).max(1) as f64;
    let (sines, cosines) = row.split_at_mut(half);
    cosines.fill(0.0);
    for (i, (sine, cosine)) in sines.iter_mut().zip(cosines).enumerate() {
        let period = periods.0 * (periods.1 / periods.0).powf(i as f64 / last);
        let angle = std::f64::consts::TAU * t / period;
        (*sine, *cosine) = (angle.sin() as f32, angle.cos() as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_conventions_meet_at_the_same_noise_level() {
        let openpi = FlowTime::<NoiseAtOne>::of_level(0.75);
        let paper = FlowTime::<NoiseAtZero>::from(openpi);
        assert_eq!((openpi.value(), paper.value()), (0.75, 0.25));
        assert_eq!(openpi.level(), paper.level());
        assert_eq!(FlowTime::<NoiseAtOne>::from(paper), openpi);
        assert_eq!(FlowTime::<NoiseAtOne>::NOISE.value(), 1.0);
        assert_eq!(FlowTime::<NoiseAtZero>::ACTIONS.value(), 1.0);
    }
}
