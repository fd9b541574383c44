//! Planned actions inside a flow-matching sampler: guidance, clean prefixes, warm starts.
//!
//! Sources: real-time chunking (arXiv 2506.07339) in the Jacobian-free form of LeRobot 0.6.1, training-time real-time
//! chunking (2512.05964). Model space: normalised actions, padded to the network's width with zeros.

use candle_core::Result;

use super::{Convention, FlowTime};
use crate::kernels::Matrix;

/// Guidance towards planned actions.
#[derive(Debug, Clone)]
pub struct Guidance {
    /// `[H, M]`: the plan, zero where there is none.
    target: Matrix,
    /// One for each action.
    weights: Vec<f32>,
    max_weight: f64,
}

impl Guidance {
    /// Guidance towards `target` (`[H, M]` row by row) with a weight for each of the `H` actions.
    ///
    /// # Errors
    /// When the numbers of values do not fit `shape`.
    pub fn new(
        target: &[f32],
        weights: &[f64],
        shape: (usize, usize),
        max_weight: f64,
    ) -> Result<Self> {
        if weights.len() != shape.0 {
            candle_core::bail!("{} weights for {} actions", weights.len(), shape.0);
        }
        let weights = weights.iter().map(|w| *w as f32).collect();
        Ok(Self { target: Matrix::new(target, shape)?, weights, max_weight })
    }

    /// The velocity of `x` at `time`, corrected: `v ∓ g·W·(target - clean)`, `clean` being where `v` leads.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn correct<C: Convention>(
        &self,
        mut velocity: Matrix,
        x: &Matrix,
        time: FlowTime<C>,
    ) -> Result<Matrix> {
        if velocity.dims() != self.target.dims() || x.dims() != self.target.dims() {
            let (found, expected) = (velocity.dims(), self.target.dims());
            candle_core::bail!("a velocity of {found:?} meets a plan of {expected:?}");
        }
        let level = time.level();
        let ahead = (C::SIGN * level) as f32;
        let strength = (C::SIGN * guidance_weight(level, self.max_weight)) as f32;
        for (row, weight) in self.weights.iter().enumerate() {
            let places = x.row(row).iter().zip(self.target.row(row));
            for (v, (x, target)) in velocity.row_mut(row).iter_mut().zip(places) {
                let clean = x - *v * ahead;
                *v -= (target - clean) * weight * strength;
            }
        }
        Ok(velocity)
    }
}

/// Guidance weight at noise level `t`: `((1-t)² + t²) / (t·(1-t))`, at most `max`, which it is at the noise.
pub fn guidance_weight(t: f64, max: f64) -> f64 {
    let tau = 1.0 - t;
    if tau <= 0.0 || t <= 0.0 {
        return max;
    }
    ((tau * tau + t * t) / (tau * t)).min(max)
}

/// Replaces the first `frozen` rows of `x` by those of `clean`.
///
/// # Errors
/// When the shapes differ.
pub fn freeze(x: &mut Matrix, clean: &Matrix, frozen: usize) -> Result<()> {
    if x.dims() != clean.dims() {
        candle_core::bail!("a plan of {:?} meets a sample of {:?}", clean.dims(), x.dims());
    }
    let values = frozen.min(x.rows()) * x.width();
    x.values_mut()[..values].copy_from_slice(&clean.values()[..values]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{NoiseAtOne, NoiseAtZero};
    use super::*;

    fn at(level: f64) -> FlowTime<NoiseAtOne> {
        FlowTime::of_level(level)
    }

    #[test]
    fn weights_match_their_golden_values() {
        // Clipping far away: the paper's table by tau = 1 - t.
        let golden = [(0.1, 9.1111), (0.2, 4.25), (0.4, 2.1667), (0.6, 2.1667), (0.9, 9.1111)];
        for (tau, weight) in golden {
            assert!((guidance_weight(1.0 - tau, 1e9) - weight).abs() < 1e-4, "{tau}");
        }
        assert_eq!(guidance_weight(1.0, 5.0), 5.0);
        assert_eq!(guidance_weight(0.5, 1.5), 1.5);
    }

    #[test]
    fn without_weight_the_velocity_stays_bit_for_bit() -> Result<()> {
        let shape = (2, 2);
        let x = Matrix::new(&[0.3, -1.0, 2.0, 0.1], shape)?;
        let v = Matrix::new(&[1.3, 0.7, -2.0, 0.4], shape)?;
        let guidance = Guidance::new(&[5.0; 4], &[0.0, 0.0], shape, 10.0)?;
        assert_eq!(guidance.correct(v.clone(), &x, at(0.3))?.values(), v.values());
        assert!(guidance.correct(v, &Matrix::zeros(3, 2), at(0.3)).is_err());
        assert!(Guidance::new(&[5.0; 4], &[0.0], shape, 10.0).is_err());
        Ok(())
    }

    #[test]
    fn the_jacobian_free_form_pulls_a_perfect_denoiser_towards_the_plan() -> Result<()> {
        // v leads to 1 exactly; the plan says 2; weight 1 at t = 0.5: v' = v - 2·(2 - 1).
        let one = |v: f32| Matrix::of_row(&[v]);
        let guidance = Guidance::new(&[2.0], &[1.0], (1, 1), 10.0)?;
        let (x, v) = (one(1.5), one(1.0));
        let corrected = guidance.correct(v, &x, at(0.5))?.values()[0];
        assert!((corrected + 1.0).abs() < 1e-6, "{corrected}");
        // The other way round, the same velocity points the other way.
        let time = FlowTime::<NoiseAtZero>::from(at(0.5));
        let mirrored = guidance.correct(one(-1.0), &x, time)?.values()[0];
        assert_eq!(mirrored, -corrected);
        Ok(())
    }

    #[test]
    fn a_clean_prefix_replaces_whole_rows() -> Result<()> {
        let clean = Matrix::new(&[1., 1., 2., 2., 3., 3.], (3, 2))?;
        let rows = |n| {
            let mut x = Matrix::zeros(3, 2);
            freeze(&mut x, &clean, n).map(|()| x.values().to_vec())
        };
        assert_eq!(rows(0)?, [0.0; 6]);
        assert_eq!(rows(1)?, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(rows(7)?, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
        assert!(freeze(&mut Matrix::zeros(2, 2), &clean, 1).is_err());
        Ok(())
    }
}
