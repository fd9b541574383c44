//! Which evaluations of a denoising compute a block, and which reuse its last output.
//!
//! Source: block-wise adaptive caching (arXiv 2506.13456): the adaptive caching scheduler (ACS) in the pairwise form of
//! its released code, and the bubbling union (BUA). Where code and paper differ, what is done here is said below.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// What a residual branch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockKind {
    /// Attention among the actions, and to the observation where both are one.
    Attention,
    /// Attention to the observation.
    CrossAttention,
    /// Feed-forward.
    FeedForward,
    /// A convolutional residual block; it also plays the part of a feed-forward one.
    Convolution,
}

/// A residual branch of a denoiser.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Its name: `layers.3.attention`.
    pub name: String,
    /// What it does.
    pub kind: BlockKind,
    /// Which layer it is in, counted in the order in which they run.
    pub layer: usize,
}

impl Block {
    /// The block of `kind` in layer `layer`.
    pub fn new(kind: BlockKind, layer: usize) -> Self {
        let part = match kind {
            BlockKind::Attention => "attention",
            BlockKind::CrossAttention => "cross_attention",
            BlockKind::FeedForward => "feed_forward",
            BlockKind::Convolution => "convolution",
        };
        Self { name: format!("layers.{layer}.{part}"), kind, layer }
    }

    /// Whether its cache bakes in the error of what comes before it.
    fn feeds_forward(&self) -> bool {
        matches!(self.kind, BlockKind::FeedForward | BlockKind::Convolution)
    }
}

/// Evaluations that compute a block, ascending, the first among them.
pub type Updates = BTreeSet<usize>;

/// The best `updates` of `evaluations` evaluations to compute a block at, and the sum of similarities that each
/// evaluation then has with what it uses. The first evaluation is always among them; both counts are cut to what is
/// possible.
///
/// Dynamic programme over the number of updates and the last of them, `O(M·K²)`.
pub fn schedule(
    similarity: impl Fn(usize, usize) -> f64,
    evaluations: usize,
    updates: usize,
) -> (Updates, f64) {
    let count = evaluations.max(1);
    let updates = updates.clamp(1, count);
    // gain[a][b]: what evaluations a..b have of the output computed at a.
    let gain: Vec<Vec<f64>> = (0..count)
        .map(|a| {
            let mut sum = 0.0;
            (0..=count)
                .map(|b| {
                    sum += if b > a { similarity(a, b - 1) } else { 0.0 };
                    sum
                })
                .collect()
        })
        .collect();
    let mut best: Vec<f64> = gain[0].clone();
    let mut back = vec![vec![0; count + 1]; updates];
    for (step, back) in back.iter_mut().enumerate().skip(1) {
        let mut next = vec![f64::NEG_INFINITY; count + 1];
        for end in step + 1..=count {
            for last in step..end {
                let value = best[last] + gain[last][end];
                if value > next[end] {
                    (next[end], back[end]) = (value, last);
                }
            }
        }
        best = next;
    }
    let mut chosen = Updates::from([0]);
    let mut end = count;
    for step in (1..updates).rev() {
        end = back[step][end];
        chosen.insert(end);
    }
    (chosen, best[count])
}

/// Makes volatile blocks update whenever a later feed-forward block does, so that this one does not keep an output that
/// was made of stale input. Gives the blocks that were chosen, most volatile first.
///
/// `plans[b]` is `None` for a block that is never reused: it can neither be stale nor keep an error, so it is neither
/// chosen nor followed. Chosen freely here: all kinds of blocks can be chosen (as the released code does); a feed-forward
/// block of the same layer counts as later (it comes after the attention); chosen blocks are widened from the last to
/// the first, so that a chosen feed-forward block's own additions reach those before it.
pub fn bubble(
    blocks: &[Block],
    volatility: &[f64],
    plans: &mut [Option<Updates>],
    chosen: usize,
) -> Vec<usize> {
    let mut order: Vec<usize> = (0..blocks.len()).filter(|b| plans[*b].is_some()).collect();
    order.sort_by(|a, b| volatility[*b].total_cmp(&volatility[*a]).then(a.cmp(b)));
    order.truncate(chosen);
    let mut backwards = order.clone();
    backwards.sort_unstable();
    for up in backwards.into_iter().rev() {
        let later = (0..blocks.len())
            .filter(|v| blocks[*v].feeds_forward() && blocks[*v].layer >= blocks[up].layer);
        let added: Updates = later.filter_map(|v| plans[v].clone()).flatten().collect();
        if let Some(plan) = &mut plans[up] {
            plan.extend(added);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THETA: [f64; 10] = [0.0, 0.05, 0.1, 0.3, 0.8, 1.0, 1.1, 1.12, 1.13, 1.6];

    fn golden(updates: usize) -> (Vec<usize>, f64) {
        let (chosen, value) = schedule(|i, j| (THETA[i] - THETA[j]).cos(), THETA.len(), updates);
        (chosen.into_iter().collect(), value)
    }

    #[test]
    fn schedules_match_their_golden_values() {
        for (updates, chosen, value) in [
            (2, vec![0, 4], 9.476_478),
            (3, vec![0, 4, 6], 9.806_090),
            (4, vec![0, 4, 6, 9], 9.928_508),
        ] {
            let (found, sum) = golden(updates);
            assert_eq!(found, chosen);
            assert!((sum - value).abs() < 1e-6, "{sum}");
        }
        assert_eq!(golden(10).0, (0..10).collect::<Vec<_>>());
        assert_eq!(golden(99), golden(10));
        assert_eq!(golden(0), golden(1));
    }

    /// The value of computing at `chosen` only.
    fn value(similarity: &[Vec<f64>], chosen: &[usize]) -> f64 {
        let mut last = 0;
        let mut sum = 0.0;
        for t in 0..similarity.len() {
            last = if chosen.contains(&t) { t } else { last };
            let reused = &similarity[last];
            sum += reused[t];
        }
        sum
    }

    /// The best value of all choices of so many updates with the first among them.
    fn brute_force(similarity: &[Vec<f64>], updates: usize) -> f64 {
        let count = similarity.len();
        (0..1u32 << (count - 1))
            .filter(|bits| bits.count_ones() as usize == updates - 1)
            .map(|bits| {
                let chosen: Vec<usize> = std::iter::once(0)
                    .chain((1..count).filter(|t| bits >> (t - 1) & 1 == 1))
                    .collect();
                value(similarity, &chosen)
            })
            .fold(f64::NEG_INFINITY, f64::max)
    }

    fn matrices() -> impl Strategy<Value = Vec<Vec<f64>>> {
        (2usize..=9)
            .prop_flat_map(|n| prop::collection::vec(prop::collection::vec(-1.0..1.0f64, n), n))
    }

    proptest! {
        #[test]
        fn no_choice_is_better(similarity in matrices(), updates in 1usize..9) {
            let count = similarity.len();
            let updates = updates.min(count);
            let (chosen, sum) = schedule(|i, j| similarity[i][j], count, updates);
            prop_assert_eq!(chosen.len(), updates);
            prop_assert!(chosen.contains(&0));
            let chosen: Vec<usize> = chosen.into_iter().collect();
            prop_assert!((value(&similarity, &chosen) - sum).abs() < 1e-9);
            prop_assert!((brute_force(&similarity, updates) - sum).abs() < 1e-9);
        }

        #[test]
        fn more_updates_are_never_worse(angles in prop::collection::vec(-2.0..2.0f64, 2..12)) {
            let alike = |i: usize, j: usize| (angles[i] - angles[j]).cos();
            let values = (1..=angles.len()).map(|m| schedule(alike, angles.len(), m).1);
            let values: Vec<f64> = values.collect();
            prop_assert!(values.windows(2).all(|w| w[1] >= w[0] - 1e-12), "{:?}", values);
        }

        #[test]
        fn after_the_union_no_later_feed_forward_block_updates_alone(
            seeds in prop::collection::vec((0usize..4, 0.0..1.0f64, any::<u16>(), any::<bool>()), 1..20),
            chosen in 0usize..8
        ) {
            let kinds = [BlockKind::Attention, BlockKind::CrossAttention, BlockKind::FeedForward,
                BlockKind::Convolution];
            let blocks: Vec<Block> = seeds.iter().enumerate()
                .map(|(i, (kind, ..))| Block::new(kinds[*kind], i / 2)).collect();
            let volatility: Vec<f64> = seeds.iter().map(|s| s.1).collect();
            let before: Vec<Option<Updates>> = seeds.iter().map(|(_, _, bits, used)| {
                used.then(|| (0..16).filter(|t| *t == 0 || bits >> t & 1 == 1).collect())
            }).collect();
            let mut plans = before.clone();
            let picked = bubble(&blocks, &volatility, &mut plans, chosen);
            prop_assert_eq!(picked.len(), chosen.min(before.iter().flatten().count()));
            for (b, plan) in plans.iter().enumerate() {
                match (plan, &before[b]) {
                    (Some(after), Some(before)) => {
                        prop_assert!(after.is_superset(before));
                        prop_assert!(picked.contains(&b) || after == before);
                    }
                    (after, before) => prop_assert_eq!(after, before),
                }
            }
            for up in picked {
                let own = plans[up].as_ref().expect("only such are chosen");
                for (v, later) in plans.iter().enumerate() {
                    let Some(later) = later else { continue };
                    if blocks[v].feeds_forward() && blocks[v].layer >= blocks[up].layer {
                        prop_assert!(later.is_subset(own));
                    }
                }
            }
        }
    }
}
