//! When to stop, and how thresholds are found. Pure: numbers in, numbers out.

use serde::{Deserialize, Serialize};

/// How far the actions of one exit are from those of the exit before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gap {
    /// Mean of the absolute differences.
    #[default]
    MeanAbs,
    /// Root of the mean of their squares.
    Rms,
    /// The largest.
    Max,
}

impl Gap {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::MeanAbs, Self::Rms, Self::Max];

    /// Name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::MeanAbs => "mean_abs",
            Self::Rms => "rms",
            Self::Max => "max",
        }
    }

    /// The gap between `a` and `b`, which have as many values; not a number when one of them is none, or there are none.
    pub fn between(self, a: &[f32], b: &[f32]) -> f64 {
        let count = a.len().min(b.len());
        if count == 0 {
            return f64::NAN;
        }
        let apart = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
        match self {
            Self::MeanAbs => apart.sum::<f64>() / count as f64,
            Self::Rms => (apart.map(|d| d * d).sum::<f64>() / count as f64).sqrt(),
            Self::Max => apart.fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most }),
        }
    }
}

impl std::str::FromStr for Gap {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|gap| gap.name() == name);
        let known = Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("`{name}` is none of {known}"))
    }
}

/// Exits that there must be: the first has nothing to be compared with, and the last needs no threshold.
pub const LEAST_EXITS: usize = 3;

/// Whether the inference ends at exit `exit` of `exits` (from 0 on), whose actions are `gap` from those before: when that
/// is below its threshold, or it is the last. `thresholds[0]` belongs to the second exit; the first is never tested.
pub fn ends(thresholds: &[f64], exits: usize, exit: usize, gap: f64) -> bool {
    let threshold = exit.checked_sub(1).and_then(|k| thresholds.get(k));
    exit + 1 >= exits || threshold.is_some_and(|most| gap < *most)
}

/// The exit (from 0 on) of an inference with these `gaps`, the first of which is the second exit's.
pub fn taken(thresholds: &[f64], gaps: &[f64]) -> usize {
    let exits = gaps.len() + 1;
    let tested = gaps.iter().enumerate().map(|(k, gap)| (k + 1, *gap));
    let found = tested.into_iter().find(|(exit, gap)| ends(thresholds, exits, *exit, *gap));
    found.map_or(exits - 1, |(exit, _)| exit)
}

/// The share of the inferences that each of `tested` exits is to have: the k-th, from 1 on, in proportion to `ratio^k`.
pub fn shares(ratio: f64, tested: usize) -> Vec<f64> {
    // Divided by the largest, so that no power is out of range.
    let top = if ratio > 1.0 { tested as f64 - 1.0 } else { 0.0 };
    let parts: Vec<f64> = (0..tested).map(|k| ratio.powf(k as f64 - top)).collect();
    let sum: f64 = parts.iter().sum();
    parts.iter().map(|part| part / sum).collect()
}

/// Thresholds that give the tested exits these `shares` of the inferences whose gaps are the rows of `gaps` (one for each
/// tested exit), one for each but the last.
///
/// Exit by exit, the threshold lies just above so many of the gaps of the inferences that no exit before has taken. How many
/// is counted by the sum of the shares so far, so that no exit, nor the last, is off by a whole inference; the published code
/// rounds every share down by itself. Equal gaps go together. A share of nothing gives 0, which nothing is below.
pub fn thresholds(gaps: &[Vec<f64>], shares: &[f64]) -> Vec<f64> {
    let mut left: Vec<&Vec<f64>> = gaps.iter().collect();
    let (mut sum, mut taken) = (0.0, 0usize);
    let mut found = Vec::with_capacity(shares.len().saturating_sub(1));
    for (exit, share) in shares.iter().enumerate().take(shares.len().saturating_sub(1)) {
        sum += share;
        // A hair more: sums of shares are not exact.
        let wanted = ((gaps.len() as f64 * sum + 1e-9).floor() as usize).saturating_sub(taken);
        let mut own: Vec<f64> =
            left.iter().filter_map(|row| row.get(exit).copied()).filter(|g| !g.is_nan()).collect();
        own.sort_by(f64::total_cmp);
        let last = wanted.checked_sub(1).map(|last| last.min(own.len().saturating_sub(1)));
        let threshold = last.and_then(|last| own.get(last)).map_or(0.0, |gap| gap.next_up());
        let before = left.len();
        left.retain(|row| row.get(exit).is_none_or(|gap| *gap >= threshold || gap.is_nan()));
        taken += before - left.len();
        found.push(threshold);
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn gaps_are_what_their_names_say() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 3.0, 3.0]);
        assert_eq!(Gap::MeanAbs.between(&a, &b), 0.75);
        assert_eq!(Gap::Rms.between(&a, &b), (5.0f64 / 4.0).sqrt());
        assert_eq!(Gap::Max.between(&a, &b), 2.0);
        for gap in Gap::ALL {
            assert_eq!(gap.between(&a, &a), 0.0);
            assert!(gap.between(&a, &[f32::NAN; 4]).is_nan() && gap.between(&[], &[]).is_nan());
            assert_eq!(gap.name().parse(), Ok(gap));
        }
        assert!("cosine".parse::<Gap>().is_err_and(|e| e.contains("mean_abs, rms, max")));
    }

    #[test]
    fn shares_are_in_proportion_to_powers() {
        let found = shares(0.5, 3);
        for (share, wanted) in found.iter().zip([4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0]) {
            assert!((share - wanted).abs() < 1e-12, "{found:?}");
        }
        assert_eq!(shares(1.0, 4), [0.25; 4]);
        assert!(shares(1e9, 100)[99] > 0.999 && shares(1e-9, 100)[0] > 0.999);
    }

    #[test]
    fn a_gap_that_is_no_number_never_ends_early() {
        assert_eq!(taken(&[f64::INFINITY], &[f64::NAN, f64::NAN]), 2);
        assert_eq!(
            thresholds(&[vec![f64::NAN, 1.0], vec![0.5, 1.0]], &[0.9, 0.1]),
            [0.5f64.next_up()]
        );
    }

    fn rows(exits: usize) -> impl Strategy<Value = Vec<Vec<f64>>> {
        prop::collection::vec(prop::collection::vec(0.0..2.0f64, exits), 1..200)
    }

    proptest! {
        #[test]
        fn thresholds_of_zero_never_exit_and_of_infinity_at_the_first_tested(rows in rows(6)) {
            for gaps in &rows {
                prop_assert_eq!(taken(&[0.0; 5], gaps), 6);
                prop_assert_eq!(taken(&[f64::INFINITY; 5], gaps), 1);
            }
            prop_assert!(!ends(&[f64::INFINITY; 5], 7, 0, 0.0), "the first is not tested");
            prop_assert!(!ends(&[0.0; 5], 7, 3, 0.0), "no gap is below nothing");
        }

        #[test]
        fn thresholds_reproduce_the_shares(rows in rows(6), ratio in 0.1..3.0f64) {
            let wanted = shares(ratio, 6);
            let found = thresholds(&rows, &wanted);
            prop_assert_eq!(found.len(), 5);
            let mut counts = [0.0; 6];
            rows.iter().for_each(|gaps| counts[taken(&found, gaps) - 1] += 1.0);
            for (count, share) in counts.iter().zip(&wanted) {
                let off = (count / rows.len() as f64 - share).abs();
                prop_assert!(off <= 1.0 / rows.len() as f64 + 1e-9, "{:?} {:?}", counts, wanted);
            }
        }

        #[test]
        fn higher_thresholds_never_exit_later(rows in rows(4), low in 0.0..2.0f64, more in 0.0..1.0f64) {
            for gaps in &rows {
                prop_assert!(taken(&[low + more; 3], gaps) <= taken(&[low; 3], gaps));
            }
        }
    }
}
