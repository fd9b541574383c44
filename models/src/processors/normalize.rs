//! Normalisation of state, images and actions.
//!
//! Source: LeRobot `src/lerobot/processor/normalize_processor.py`, `_apply_transform`. Nothing is
//! clipped, and a feature without statistics passes through unchanged: the published `smolvla_base` has
//! statistics under names that match no feature, and runs that way.

use std::collections::BTreeMap;
use std::path::Path;

use crate::ModelError;

/// Divides by zero become divides by this.
const EPS: f32 = 1e-8;

/// How one feature is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum NormMode {
    /// Unchanged.
    #[serde(rename = "IDENTITY")]
    Identity,
    /// By mean and standard deviation.
    #[serde(rename = "MEAN_STD")]
    MeanStd,
    /// Minimum and maximum to −1 and 1.
    #[serde(rename = "MIN_MAX")]
    MinMax,
    /// The 1st and 99th percentile to −1 and 1.
    #[serde(rename = "QUANTILES")]
    Quantiles,
    /// The 10th and 90th percentile to −1 and 1.
    #[serde(rename = "QUANTILE10")]
    Quantile10,
}

impl NormMode {
    /// The mode that LeRobot calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "IDENTITY" => Self::Identity,
            "MEAN_STD" => Self::MeanStd,
            "MIN_MAX" => Self::MinMax,
            "QUANTILES" => Self::Quantiles,
            "QUANTILE10" => Self::Quantile10,
            _ => return None,
        })
    }

    /// Names of the two statistics that it needs.
    pub fn statistics(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Identity => None,
            Self::MeanStd => Some(("mean", "std")),
            Self::MinMax => Some(("min", "max")),
            Self::Quantiles => Some(("q01", "q99")),
            Self::Quantile10 => Some(("q10", "q90")),
        }
    }
}

/// Statistics by `FEATURE.STAT`.
pub type Statistics = BTreeMap<String, Vec<f32>>;

/// Normalisation of one feature.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalizer {
    mode: NormMode,
    /// Mean, or the value that becomes −1.
    low: Vec<f32>,
    /// Standard deviation, or the value that becomes 1.
    high: Vec<f32>,
}

impl Normalizer {
    /// Leaves everything as it is.
    pub fn identity() -> Self {
        Self { mode: NormMode::Identity, low: Vec::new(), high: Vec::new() }
    }

    /// Normalisation of `feature` (`width` values or channels) by `mode`; the identity without statistics.
    ///
    /// # Errors
    /// [`ModelError::Statistics`] for a width that does not fit, a value that is not finite, or one
    /// half of a pair.
    pub fn new(
        mode: NormMode,
        feature: &str,
        width: usize,
        statistics: &Statistics,
        path: &Path,
    ) -> Result<Self, ModelError> {
        let Some((low_name, high_name)) = mode.statistics() else { return Ok(Self::identity()) };
        let prefix = format!("{feature}.");
        if !statistics
            .keys()
            .any(|k| k.strip_prefix(&prefix).is_some_and(|stat| !stat.contains('.')))
        {
            return Ok(Self::identity());
        }
        let read = |stat: &str| {
            let key = format!("{prefix}{stat}");
            let fail = |reason: String| ModelError::Statistics {
                path: path.to_owned(),
                key: key.clone(),
                reason,
            };
            let values = statistics.get(&key).ok_or_else(|| {
                fail(format!(
                    "are missing, and {mode:?} needs them; save the checkpoint's statistics again"
                ))
            })?;
            if values.len() != width {
                let found = values.len();
                return Err(fail(format!("have {found} values, the feature has {width}")));
            }
            match values.iter().position(|v| !v.is_finite()) {
                Some(at) => Err(fail(format!(
                    "hold {} at index {at}; recompute the data set's statistics",
                    values[at]
                ))),
                None => Ok(values.clone()),
            }
        };
        Ok(Self { mode, low: read(low_name)?, high: read(high_name)? })
    }

    /// The mode.
    pub fn mode(&self) -> NormMode {
        self.mode
    }

    /// The pair of statistics it uses (mean and deviation, or low and high), one value per dimension.
    pub fn statistics(&self) -> (&[f32], &[f32]) {
        (&self.low, &self.high)
    }

    /// `value` of dimension `dim`, normalised, in single precision as in training.
    pub fn normalize(&self, dim: usize, value: f32) -> f32 {
        match self.mode {
            NormMode::Identity => value,
            NormMode::MeanStd => (value - self.low[dim]) / (self.high[dim] + EPS),
            _ => {
                let d = self.high[dim] - self.low[dim];
                let d = if d == 0.0 { EPS } else { d };
                2.0 * (value - self.low[dim]) / d - 1.0
            }
        }
    }

    /// The inverse, in double precision.
    pub fn unnormalize(&self, dim: usize, value: f64) -> f64 {
        match self.mode {
            NormMode::Identity => value,
            NormMode::MeanStd => value * f64::from(self.high[dim]) + f64::from(self.low[dim]),
            _ => {
                let (low, high) = (f64::from(self.low[dim]), f64::from(self.high[dim]));
                let d = if high == low { f64::from(EPS) } else { high - low };
                (value + 1.0) / 2.0 * d + low
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(pairs: &[(&str, &[f32])]) -> Statistics {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), v.to_vec())).collect()
    }

    #[test]
    fn statistics_of_other_names_leave_the_feature_alone() {
        let other = statistics(&[("so100.buffer.action.mean", &[1.0]), ("action.x.mean", &[1.0])]);
        let n = Normalizer::new(NormMode::MeanStd, "action", 1, &other, Path::new("s"));
        assert_eq!(n.map(|n| n.mode()).ok(), Some(NormMode::Identity));
    }

    #[test]
    fn unusable_statistics_are_named() {
        let path = Path::new("stats.safetensors");
        for (stats, word) in [
            (statistics(&[("action.mean", &[0.0, f32::NAN]), ("action.std", &[1.0, 1.0])]), "NaN"),
            (statistics(&[("action.mean", &[0.0]), ("action.std", &[1.0, 1.0])]), "has 2"),
            (statistics(&[("action.mean", &[0.0, 0.0])]), "action.std"),
        ] {
            let e = Normalizer::new(NormMode::MeanStd, "action", 2, &stats, path).expect_err(word);
            assert!(e.to_string().contains(word), "{e}");
        }
    }

    #[test]
    fn every_mode_has_an_inverse() {
        let stats = statistics(&[
            ("a.mean", &[0.5]),
            ("a.std", &[2.0]),
            ("a.min", &[-1.0]),
            ("a.max", &[3.0]),
        ]);
        for mode in [NormMode::Identity, NormMode::MeanStd, NormMode::MinMax] {
            let n = Normalizer::new(mode, "a", 1, &stats, Path::new("s")).expect("all are there");
            let back = n.unnormalize(0, f64::from(n.normalize(0, 1.25)));
            assert!((back - 1.25).abs() < 1e-6, "{mode:?} {back}");
        }
    }
}
