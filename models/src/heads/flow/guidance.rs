//! Planned actions inside a flow-matching sampler: guidance, clean prefixes, warm starts.
//!
//! Sources: real-time chunking (arXiv 2506.07339) in the Jacobian-free form of LeRobot 0.6.1, training-time real-time
//! chunking (2512.05964). Model space: normalised actions, padded to the network's width with zeros.

use candle_core::{Device, Result, Tensor};

use super::{Convention, FlowTime};

/// Guidance towards planned actions.
#[derive(Debug, Clone)]
pub struct Guidance {
    /// `[H, M]`: the plan, zero where there is none.
    target: Tensor,
    /// `[H, 1]`
    weights: Tensor,
    max_weight: f64,
}

impl Guidance {
    /// Guidance towards `target` (`[H, M]` row by row) with a weight for each of the `H` actions.
    ///
    /// # Errors
    /// When the numbers of values do not fit `shape`.
    pub fn new(
        target: Vec<f32>,
        weights: &[f64],
        shape: (usize, usize),
        max_weight: f64,
    ) -> Result<Self> {
        let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
        Ok(Self {
            target: Tensor::from_vec(target, shape, &Device::Cpu)?,
            weights: Tensor::from_vec(weights, (shape.0, 1), &Device::Cpu)?,
            max_weight,
        })
    }

    /// The velocity of `x` at `time`, corrected: `v ∓ g·W·(target - clean)`, `clean` being where `v` leads.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn correct<C: Convention>(
        &self,
        velocity: &Tensor,
        x: &Tensor,
        time: FlowTime<C>,
    ) -> Result<Tensor> {
        let level = time.level();
        let clean = (x - (velocity * (C::SIGN * level))?)?;
        let error = (&self.target - clean)?.broadcast_mul(&self.weights)?;
        velocity - (error * (C::SIGN * guidance_weight(level, self.max_weight)))?
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

/// Row by row: the first `frozen` rows of `clean`, then those of `x`.
///
/// # Errors
/// When the shapes differ.
pub fn with_prefix(clean: &Tensor, x: &Tensor, frozen: usize) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let frozen = frozen.min(rows);
    match frozen {
        0 => Ok(x.clone()),
        n if n == rows => Ok(clean.clone()),
        n => Tensor::cat(&[&clean.narrow(0, 0, n)?, &x.narrow(0, n, rows - n)?], 0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NoiseAtOne, NoiseAtZero};
    use super::*;

    fn at(level: f64) -> FlowTime<NoiseAtOne> {
        FlowTime::of_level(level)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().and_then(|t| t.to_vec1()).expect("a CPU tensor of f32")
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
    fn without_weight_the_velocity_stays_bit_for_bit() {
        let shape = (2, 2);
        let x = Tensor::from_vec(vec![0.3f32, -1.0, 2.0, 0.1], shape, &Device::Cpu).expect("fits");
        let v = Tensor::from_vec(vec![1.3f32, 0.7, -2.0, 0.4], shape, &Device::Cpu).expect("fits");
        let guidance = Guidance::new(vec![5.0; 4], &[0.0, 0.0], shape, 10.0).expect("fits");
        let corrected = guidance.correct(&v, &x, at(0.3)).expect("same shapes");
        assert_eq!(values(&corrected), values(&v));
    }

    #[test]
    fn the_jacobian_free_form_pulls_a_perfect_denoiser_towards_the_plan() {
        // v leads to 1 exactly; the plan says 2; weight 1 at t = 0.5: v' = v - 2·(2 - 1).
        let one = |v: f32| Tensor::from_vec(vec![v], (1, 1), &Device::Cpu).expect("one value");
        let guidance = Guidance::new(vec![2.0], &[1.0], (1, 1), 10.0).expect("fits");
        let (x, v) = (one(1.5), one(1.0));
        let corrected = values(&guidance.correct(&v, &x, at(0.5)).expect("same shapes"));
        assert!((corrected[0] + 1.0).abs() < 1e-6, "{corrected:?}");
        // The other way round, the same velocity points the other way.
        let time = FlowTime::<NoiseAtZero>::from(at(0.5));
        let mirrored = values(&guidance.correct(&one(-1.0), &x, time).expect("same shapes"));
        assert_eq!(mirrored[0], -corrected[0]);
    }

    #[test]
    fn a_clean_prefix_replaces_whole_rows() {
        let clean = Tensor::from_vec(vec![1f32, 1., 2., 2., 3., 3.], (3, 2), &Device::Cpu);
        let (clean, x) =
            (clean.expect("fits"), Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu));
        let x = x.expect("fits");
        let rows = |n| values(&with_prefix(&clean, &x, n).expect("same shapes"));
        assert_eq!(rows(0), [0.0; 6]);
        assert_eq!(rows(1), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(rows(7), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    }
}
