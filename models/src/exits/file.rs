//! The file beside a policy that says after which layers an inference may end, and when it does.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::rule::{Gap, LEAST_EXITS};
use crate::ModelError;
use crate::beside;
use crate::caches::Measured;

/// What stands first in the file.
const FORMAT: &str = "sinew early exit 1";
/// The largest file that is read (bytes), and the most flow steps from exit to exit.
const LARGEST: u64 = 1 << 20;
/// The most flow steps from exit to exit.
pub(super) const MOST_STEPS: usize = 100;

/// Early exits of one policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitPlan {
    format: String,
    /// SHA-256 of the weights that it was made for.
    pub weights_sha256: String,
    /// Layers before each exit, rising; the last is the network's depth.
    pub layers: Vec<usize>,
    /// Flow steps at each exit.
    pub steps: usize,
    /// What the thresholds are compared with.
    pub gap: Gap,
    /// One for each exit but the first, which has nothing to be compared with, and the last, where every inference ends.
    pub thresholds: Vec<f64>,
    /// Exit shares that they were made for: the k-th tested exit in proportion to `ratio^k`.
    pub ratio: f64,
    /// Share of the measured inferences that ended at each exit.
    pub taken: Vec<f64>,
    /// What that costs, against the whole network with its own flow steps.
    pub measured: Measured,
}

impl ExitPlan {
    /// A plan of which nothing is measured yet.
    pub fn new(
        weights_sha256: String,
        layers: Vec<usize>,
        (steps, gap): (usize, Gap),
        thresholds: Vec<f64>,
    ) -> Self {
        Self {
            format: FORMAT.to_owned(),
            weights_sha256,
            layers,
            steps,
            gap,
            thresholds,
            ratio: 0.0,
            taken: Vec::new(),
            measured: Measured::default(),
        }
    }

    /// Reads the plan at `path` for a network of `depth` layers with weights of `weights_sha256`.
    ///
    /// # Errors
    /// [`ModelError`] for a file that is none, is damaged, or belongs to other weights.
    pub fn read(path: &Path, depth: usize, weights_sha256: &str) -> Result<Self, ModelError> {
        let plan: Self = beside::read(path, LARGEST, "sinew calibrate exit")?;
        plan.check(path, depth, weights_sha256)?;
        Ok(plan)
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), ModelError> {
        beside::write(path, self)
    }

    fn check(&self, path: &Path, depth: usize, weights: &str) -> Result<(), ModelError> {
        let wrong = |what: &str, found: String, expected: String| {
            Err(ModelError::malformed(path, what, found, expected))
        };
        if self.format != FORMAT {
            return wrong("`format`", format!("{:?}", self.format), FORMAT.to_owned());
        }
        if self.weights_sha256 != weights {
            let reason = "was made for another policy; make one with `sinew calibrate exit`";
            return Err(ModelError::config(path, "weights_sha256", reason));
        }
        if let Err(expected) = fit(&self.layers, depth) {
            return wrong("`layers`", format!("{:?}", self.layers), expected);
        }
        if !(1..=MOST_STEPS).contains(&self.steps) {
            return wrong("`steps`", self.steps.to_string(), format!("1 to {MOST_STEPS}"));
        }
        let usable = self.thresholds.iter().all(|t| *t >= 0.0 && t.is_finite());
        let count = self.layers.len() - 2;
        if self.thresholds.len() != count || !usable {
            let expected = format!("{count} numbers that are not negative");
            return wrong("`thresholds`", format!("{:?}", self.thresholds), expected);
        }
        Ok(())
    }
}

/// Whether `layers` are exits of a network of `depth` layers; if not, what such are.
pub(super) fn fit(layers: &[usize], depth: usize) -> Result<(), String> {
    let rising = layers.windows(2).all(|w| w[0] < w[1]) && layers.first() != Some(&0);
    if rising && layers.len() >= LEAST_EXITS && layers.last() == Some(&depth) {
        return Ok(());
    }
    Err(format!(
        "at least {LEAST_EXITS} rising numbers of layers, the last of them {depth}, the network's depth"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> ExitPlan {
        let mut plan = ExitPlan::new("ab".into(), vec![2, 4, 6], (2, Gap::Rms), vec![0.25]);
        plan.taken = vec![0.0, 0.5, 0.5];
        plan
    }

    #[test]
    fn files_come_back_and_foreign_or_damaged_ones_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("exit.json");
        plan().write(&path).expect("it can be written");
        assert_eq!(ExitPlan::read(&path, 6, "ab").expect("it was written here"), plan());
        let said = |depth, weights: &str| {
            ExitPlan::read(&path, depth, weights).expect_err("it does not fit").to_string()
        };
        assert!(said(6, "cd").contains("sinew calibrate exit"), "{}", said(6, "cd"));
        assert!(said(8, "ab").contains("`layers`"), "{}", said(8, "ab"));
        let text = std::fs::read_to_string(&path).expect("it was written");
        for (from, to, named) in [
            (FORMAT, "sinew early exit 9", "format"),
            ("    2,\n    4,", "    4,\n    4,", "layers"),
            ("    2,\n    4,", "    0,\n    4,", "layers"),
            ("    2,\n    4,\n", "    4,\n", "layers"),
            ("\"steps\": 2", "\"steps\": 0", "steps"),
            ("0.25", "-0.25", "thresholds"),
            ("0.25", "0.25, 0.5", "thresholds"),
            ("\"rms\"", "\"cosine\"", "cosine"),
            ("\"ratio\"", "\"ratios\"", "ratios"),
        ] {
            let damaged = text.replacen(from, to, 1);
            assert_ne!(damaged, text, "{from}");
            std::fs::write(&path, damaged).expect("it can be written");
            assert!(said(6, "ab").contains(named), "{}", said(6, "ab"));
        }
        assert!(ExitPlan::read(Path::new("/dev/zero"), 6, "ab").is_err());
    }
}
