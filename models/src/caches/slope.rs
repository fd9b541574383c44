//! Schedules whose evaluations between updates go on from the newest two outputs, instead of holding the newest.
//!
//! What a block gives at `t`, with `a < b` its newest updates, is taken to be `x_b + c·(x_b − x_a)`. The `c` that is best for
//! the calibrated denoisings follows from the inner products of their outputs, and so does the error that is left; so the
//! updates whose sum of squared errors is smallest can be found without running the network.
//!
//! Extrapolation of cached features as in TaylorSeer (arXiv 2503.06923), of first order; fitted, not taken from the
//! positions, because the outputs of real networks turn back.

use super::plan::Updates;

/// Most evaluations that such a schedule is made for: the search goes through triples of them.
pub const MOST: usize = 128;
/// Slopes are not steeper than this.
pub const STEEPEST: f64 = 2.0;

/// What evaluation `at` loses, squared, and the `c` that is best for it, when evaluation `newest`, and before it `before`,
/// computed; `product(i, j)` is the inner product of the outputs.
fn fit(
    product: &impl Fn(usize, usize) -> f64,
    positions: &[f64],
    (before, newest): (Option<usize>, usize),
    at: usize,
) -> (f64, f64) {
    let p = |i, j| product(i, j);
    let held = (p(at, at) - 2.0 * p(at, newest) + p(newest, newest)).max(0.0);
    let Some(before) = before else { return (held, 0.0) };
    let moved = p(newest, newest) - 2.0 * p(newest, before) + p(before, before);
    let along = p(at, newest) - p(at, before) - p(newest, newest) + p(newest, before);
    let part = ratio(positions, (before, newest), at);
    if moved <= 0.0 || part <= 0.0 {
        return (held, 0.0);
    }
    let slope = (along / moved / part).clamp(-STEEPEST, STEEPEST);
    let c = slope * part;
    ((held - 2.0 * c * along + c * c * moved).max(0.0), slope)
}

/// The way from `newest` to `at` over that from `before` to `newest`.
fn ratio(positions: &[f64], (before, newest): (usize, usize), at: usize) -> f64 {
    let way = positions[newest] - positions[before];
    if way > 0.0 { (positions[at] - positions[newest]) / way } else { 0.0 }
}

/// What evaluation `at` of a block with these products loses, squared.
pub fn loss(
    product: &impl Fn(usize, usize) -> f64,
    positions: &[f64],
    kept: (Option<usize>, usize),
    at: usize,
) -> f64 {
    fit(product, positions, kept, at).0
}

/// The best `1..=most` updates of `evaluations` evaluations, by `loss((before, newest), at)`: entry `n − 1` has `n` of them.
/// The first evaluation is always among them; the last, which always computes, is not counted and not chosen.
///
/// Dynamic programme over the number of updates and the last two of them, `O(most·K³)`.
pub fn schedules(
    loss: impl Fn((Option<usize>, usize), usize) -> f64,
    evaluations: usize,
    most: usize,
) -> Vec<Updates> {
    let end = evaluations.max(2) - 1;
    let most = most.clamp(1, end);
    // State (a, b) as a + 1 (0: there is none) and b; best[m] of it: the least sum up to b with m + 1 updates.
    let state = |before: Option<usize>, newest: usize| before.map_or(0, |a| a + 1) * end + newest;
    let states = (end + 1) * end;
    let mut best = vec![vec![f64::INFINITY; states]; most];
    let mut from = vec![vec![usize::MAX; states]; most];
    let mut done = vec![(f64::INFINITY, usize::MAX); most];
    best[0][state(None, 0)] = 0.0;
    for newest in 0..end {
        for before in (0..=newest).map(|a| a.checked_sub(1)) {
            let here = state(before, newest);
            let mut sum = 0.0;
            for next in newest + 1..=end {
                for count in 0..most {
                    let value = best[count][here] + sum;
                    if next == end {
                        if value < done[count].0 {
                            done[count] = (value, here);
                        }
                    } else if count + 1 < most && value < best[count + 1][state(Some(newest), next)]
                    {
                        let there = state(Some(newest), next);
                        (best[count + 1][there], from[count + 1][there]) = (value, here);
                    }
                }
                if next < end {
                    sum += loss((before, newest), next);
                }
            }
        }
    }
    (0..most)
        .map(|count| {
            let (mut here, mut chosen) = (done[count].1, Updates::from([0]));
            let mut left = count;
            while here != usize::MAX {
                chosen.insert(here % end);
                here = from[left][here];
                left = left.saturating_sub(1);
            }
            chosen
        })
        .collect()
}

/// The slope of every evaluation between `updates`; 0 for those that compute.
pub fn slopes(
    product: &impl Fn(usize, usize) -> f64,
    positions: &[f64],
    updates: &Updates,
) -> Vec<f64> {
    let slope = |at: usize| {
        let mut earlier = updates.range(..at).rev();
        match (updates.contains(&at), earlier.next(), earlier.next()) {
            (false, Some(newest), before) => {
                fit(product, positions, (before.copied(), *newest), at).1
            }
            _ => 0.0,
        }
    };
    (0..positions.len()).map(slope).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn positions(count: usize) -> Vec<f64> {
        (0..count).map(|k| k as f64 / count as f64).collect()
    }

    /// Products of outputs of two values each.
    fn product(outputs: &[[f64; 2]]) -> impl Fn(usize, usize) -> f64 {
        move |i, j| outputs[i][0] * outputs[j][0] + outputs[i][1] * outputs[j][1]
    }

    fn total(outputs: &[[f64; 2]], updates: &Updates) -> f64 {
        let (product, positions) = (product(outputs), positions(outputs.len()));
        (1..outputs.len() - 1)
            .filter(|at| !updates.contains(at))
            .map(|at| {
                let mut earlier = updates.range(..at).rev().copied();
                let newest = earlier.next().expect("the first is one");
                loss(&product, &positions, (earlier.next(), newest), at)
            })
            .sum()
    }

    fn subsets(count: usize, chosen: usize) -> Vec<Updates> {
        (0u32..1 << count)
            .filter(|bits| bits & 1 == 1 && bits.count_ones() as usize == chosen)
            .map(|bits| (0..count).filter(|k| bits >> k & 1 == 1).collect())
            .collect()
    }

    proptest! {
        #[test]
        fn no_choice_loses_less(
            outputs in prop::collection::vec(prop::array::uniform2(-1.0..1.0f64), 3..10)
        ) {
            let (product, positions) = (product(&outputs), positions(outputs.len()));
            let loss = |kept, at| loss(&product, &positions, kept, at);
            let end = outputs.len() - 1;
            for (n, updates) in schedules(loss, outputs.len(), end).iter().enumerate() {
                prop_assert!(updates.len() == n + 1 && updates.contains(&0));
                let found = total(&outputs, updates);
                let all = subsets(end, n + 1);
                let least = all.iter().map(|u| total(&outputs, u)).fold(f64::INFINITY, f64::min);
                prop_assert!(found <= least + 1e-9, "{found} {least} {updates:?}");
            }
        }

        #[test]
        fn fits_lose_no_more_than_holding(
            outputs in prop::collection::vec(prop::array::uniform2(-1.0..1.0f64), 4)
        ) {
            let (product, positions) = (product(&outputs), positions(4));
            let held = loss(&product, &positions, (None, 2), 3);
            prop_assert!(loss(&product, &positions, (Some(0), 2), 3) <= held + 1e-12);
        }
    }

    #[test]
    fn what_moves_evenly_is_found_from_two_updates() {
        let outputs: Vec<[f64; 2]> = (0..8).map(|k| [1.0 + 0.5 * f64::from(k), 2.0]).collect();
        let (product, positions) = (product(&outputs), positions(8));
        let loss = |kept, at| loss(&product, &positions, kept, at);
        let two = &schedules(loss, 8, 4)[1];
        assert_eq!(*two, Updates::from([0, 1]));
        assert!(total(&outputs, two) < 1e-12);
        let slopes = slopes(&product, &positions, two);
        assert_eq!(slopes[..2], [0.0, 0.0]);
        assert!(slopes[2..].iter().all(|s| (s - 1.0).abs() < 1e-9), "{slopes:?}");
        // What stands still has no slope, and nothing is divided by nothing.
        assert_eq!(super::slopes(&|_, _| 1.0, &positions, two), [0.0; 8]);
    }
}
