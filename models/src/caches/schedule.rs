//! The file beside a policy that says which evaluations compute which blocks of its denoiser.

use std::ops::Bound;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::plan::{Block, Updates};
use super::slope::STEEPEST;
use crate::ModelError;
use crate::beside;

/// What stands first in the file.
const FORMAT: &str = "sinew denoiser cache 2";
/// The largest file that is read (bytes), and the most blocks and evaluations in it.
const LARGEST: u64 = 16 << 20;
const MOST_BLOCKS: usize = 1 << 12;
const MOST_EVALUATIONS: usize = 1000;
/// Two positions this near are the same.
const SAME: f64 = 1e-4;

/// How a schedule saves evaluations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Every block by its own plan holds its output (block-wise adaptive caching as it is published).
    Held,
    /// Every block by its own plan; between updates its output goes on.
    Each,
    /// All blocks by one plan; between updates their outputs go on.
    Together,
    /// The network's output by one plan, so that nothing of it is computed between updates; it goes on.
    Whole,
}

impl Form {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Held, Self::Each, Self::Together, Self::Whole];

    /// Name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Each => "each",
            Self::Together => "together",
            Self::Whole => "whole",
        }
    }
}

impl std::str::FromStr for Form {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|form| form.name() == name);
        let known = Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("`{name}` is none of {known}"))
    }
}

/// One block's part, or that of the network as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockPlan {
    /// Its name.
    pub name: String,
    /// Evaluations that compute it; none: every one does.
    pub updates: Option<Updates>,
    /// How far its output goes on at each evaluation, as a share of how far it went between the two updates before, in
    /// proportion to the positions; none: it is held.
    pub slopes: Vec<f64>,
    /// Mean cosine similarity of two evaluations next to each other.
    pub similarity: f64,
    /// Standard deviation of the similarities between observations and seeds.
    pub spread: f64,
    /// Mean absolute difference of its outputs.
    pub volatility: f64,
}

impl BlockPlan {
    /// Whether it is to be computed by an evaluation in the place of `step`, `before` being that of the evaluation before
    /// it: when an update lies between them. With the calibrated steps this is the plan; with others it is the nearest one
    /// that never uses an output longer than was calibrated.
    pub fn due(&self, before: Option<usize>, step: usize) -> bool {
        match (&self.updates, before) {
            (None, _) | (_, None) => true,
            // Another denoising has begun.
            (_, Some(before)) if step < before => true,
            (Some(plan), Some(before)) => {
                plan.range((Bound::Excluded(before), Bound::Included(step))).next().is_some()
            }
        }
    }

    /// How far its output goes on in an evaluation in the place of `step`.
    pub fn slope(&self, step: usize) -> f64 {
        self.slopes.get(step).copied().unwrap_or(0.0)
    }
}

/// What the schedule costs and saves, measured when it was made.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Share of the blocks' evaluations that are computed.
    pub computed: f64,
    /// Time of the denoise steps against that without the cache, both in one run.
    pub time: f64,
    /// Chunks compared.
    pub chunks: usize,
    /// Mean error of the actions (their own units).
    pub mean: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Mean error of each action dimension as a share of its range, averaged.
    pub mean_relative: f64,
}

/// A cache schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    format: String,
    /// SHA-256 of the weights that it was made for.
    pub weights_sha256: String,
    /// How much of the denoising lies behind at each of the calibrated evaluations: 0 is noise, 1 actions.
    pub positions: Vec<f64>,
    /// How it saves them.
    pub form: Form,
    /// Updates that each block was given, before the union and the last evaluation.
    pub budget: usize,
    /// Blocks that update whenever a later feed-forward block does.
    pub bubbled: Vec<String>,
    /// Samples that the similarities are the mean of.
    pub samples: u32,
    /// What it costs.
    pub measured: Measured,
    /// 95th percentile of a reuse's error, relative to the stream that the block is added to or to the whole output.
    pub reuse_error: f64,
    /// The network's output, when it is reused as a whole.
    pub whole: Option<BlockPlan>,
    /// The blocks, in the order in which they run.
    pub blocks: Vec<BlockPlan>,
}

impl Schedule {
    /// A schedule of `blocks`, or of the network as a `whole`, for evaluations at `positions`; the last evaluation computes
    /// all.
    pub fn new(
        weights_sha256: String,
        positions: Vec<f64>,
        (form, budget): (Form, usize),
        mut whole: Option<BlockPlan>,
        mut blocks: Vec<BlockPlan>,
    ) -> Self {
        let last = positions.len().saturating_sub(1);
        for plan in blocks.iter_mut().chain(&mut whole) {
            if let Some(updates) = &mut plan.updates {
                updates.extend([0, last]);
            }
        }
        Self {
            format: FORMAT.to_owned(),
            weights_sha256,
            positions,
            form,
            budget,
            bubbled: Vec::new(),
            samples: 0,
            measured: Measured::default(),
            reuse_error: 0.0,
            whole,
            blocks,
        }
    }

    /// Evaluations of the calibrated denoising.
    pub fn evaluations(&self) -> usize {
        self.positions.len()
    }

    /// The calibrated evaluation that one at `position` is in the place of: the last that is not after it.
    pub fn step(&self, position: f64) -> usize {
        self.positions.partition_point(|p| *p <= position + SAME).saturating_sub(1)
    }

    /// Share of the blocks' evaluations that the schedule computes.
    pub fn share(&self) -> f64 {
        let all = self.evaluations();
        let of = |b: &BlockPlan| b.updates.as_ref().map_or(all, Updates::len);
        if let Some(whole) = &self.whole {
            return of(whole) as f64 / all.max(1) as f64;
        }
        let computed: usize = self.blocks.iter().map(of).sum();
        computed as f64 / (all * self.blocks.len()).max(1) as f64
    }

    /// Reads the schedule at `path` for a denoiser of `blocks` with weights of `weights_sha256`.
    ///
    /// # Errors
    /// [`ModelError`] for a file that is none, is damaged, or belongs to other weights.
    pub fn read(path: &Path, blocks: &[Block], weights_sha256: &str) -> Result<Self, ModelError> {
        let schedule: Self = beside::read(path, LARGEST, "sinew calibrate cache")?;
        schedule.check(path, blocks, weights_sha256)?;
        Ok(schedule)
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), ModelError> {
        beside::write(path, self)
    }

    fn check(&self, path: &Path, blocks: &[Block], weights: &str) -> Result<(), ModelError> {
        let wrong = |what: String, found: String, expected: &str| {
            Err(ModelError::malformed(path, what, found, expected))
        };
        if self.format != FORMAT {
            return wrong("`format`".into(), format!("{:?}", self.format), FORMAT);
        }
        let count = self.evaluations();
        let rising = self.positions.windows(2).all(|w| w[0] <= w[1]);
        let inside = self.positions.iter().all(|p| (0.0..=1.0).contains(p));
        if !(1..=MOST_EVALUATIONS).contains(&count) || !rising || !inside {
            let expected = "1 to 1000 rising numbers from 0 to 1";
            return wrong("`positions`".into(), format!("{count} numbers"), expected);
        }
        if self.blocks.len() > MOST_BLOCKS {
            let found = format!("{} entries", self.blocks.len());
            return wrong("`blocks`".into(), found, "at most 4096");
        }
        for block in self.blocks.iter().chain(&self.whole) {
            let steep = |s: &f64| !(-STEEPEST..=STEEPEST).contains(s);
            if ![0, count].contains(&block.slopes.len()) || block.slopes.iter().any(steep) {
                let what = format!("`slopes` of block `{}`", block.name);
                let expected = "one number from -2 to 2 for each evaluation, or none";
                return wrong(what, format!("{:?}", block.slopes), expected);
            }
            let Some(updates) = &block.updates else { continue };
            let ends = updates.contains(&0) && updates.contains(&(count - 1));
            if !ends || updates.iter().any(|u| *u >= count) {
                let what = format!("`updates` of block `{}`", block.name);
                let expected = "numbers of evaluations, the first and the last among them";
                return wrong(what, format!("{updates:?}"), expected);
            }
        }
        let names = |a: &BlockPlan, b: &Block| a.name == b.name;
        let same = self.blocks.len() == blocks.len()
            && self.blocks.iter().zip(blocks).all(|(a, b)| names(a, b));
        if !same || self.weights_sha256 != weights {
            let reason = "was made for another policy; make one with `sinew calibrate cache`";
            return Err(ModelError::config(path, "weights_sha256", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::BlockKind;
    use super::*;

    fn blocks() -> [Block; 2] {
        [Block::new(BlockKind::Attention, 0), Block::new(BlockKind::FeedForward, 0)]
    }

    fn schedule() -> Schedule {
        let plan = |block: &Block, updates: Option<&[usize]>| BlockPlan {
            name: block.name.clone(),
            updates: updates.map(|u| u.iter().copied().collect()),
            slopes: Vec::new(),
            similarity: 0.9,
            spread: 0.01,
            volatility: 0.5,
        };
        let [a, b] = blocks();
        let positions = (0..10).map(|k| f64::from(k) / 10.0).collect();
        let plans = vec![plan(&a, Some(&[0, 3, 4])), plan(&b, None)];
        Schedule::new("ab".into(), positions, (Form::Held, 3), None, plans)
    }

    fn due(steps: &[f64]) -> Vec<usize> {
        let schedule = schedule();
        let mut before = None;
        let mut out = Vec::new();
        for (k, position) in steps.iter().enumerate() {
            let step = schedule.step(*position);
            let [planned, free] = &schedule.blocks[..] else { panic!("two blocks") };
            assert!(free.due(before, step), "a block without a plan is always computed");
            if planned.due(before, step) {
                out.push(k);
            }
            before = Some(step);
        }
        out
    }

    #[test]
    fn the_calibrated_steps_give_the_schedule_and_the_last_is_full() {
        let steps: Vec<f64> = (0..10).map(|k| f64::from(k as f32 / 10.0)).collect();
        assert_eq!(due(&steps), [0, 3, 4, 9]);
        assert!((schedule().share() - 14.0 / 20.0).abs() < 1e-12);
    }

    #[test]
    fn other_step_counts_update_when_an_update_lies_between() {
        assert_eq!(due(&[0.0, 0.25, 0.5, 0.75]), [0, 2]);
        assert_eq!(due(&[0.0, 0.2, 0.4, 0.6, 0.8]), [0, 2]);
        let fine: Vec<f64> = (0..20).map(|k| f64::from(k) / 20.0).collect();
        assert_eq!(due(&fine), [0, 6, 8, 18]);
        assert_eq!(due(&[0.5, 0.8, 0.9]), [0, 2], "a warm start computes its first");
        assert_eq!(due(&[0.5, 0.6, 0.0, 0.1]), [0, 2], "another denoising begins anew");
    }

    #[test]
    fn files_come_back_and_foreign_ones_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("cache.json");
        schedule().write(&path).expect("it can be written");
        let read = |weights: &str| Schedule::read(&path, &blocks(), weights);
        assert_eq!(read("ab").expect("it was written here"), schedule());
        let error = read("cd").expect_err("other weights").to_string();
        assert!(error.contains("another policy") && error.contains("sinew calibrate"), "{error}");
        assert!(Schedule::read(&path, &blocks()[..1], "ab").is_err(), "other blocks");
        let text = std::fs::read_to_string(&path).expect("it was written");
        for (from, to, named) in [
            (FORMAT, "sinew denoiser cache 9", "format"),
            ("0.9\n", "7.5\n", "positions"),
            ("      9\n", "      10\n", "layers.0.attention"),
            ("\"budget\"", "\"budgets\"", "budgets"),
            ("\"slopes\": []", "\"slopes\": [1.0]", "slopes"),
            ("\"held\"", "\"hold\"", "hold"),
        ] {
            let damaged = text.replacen(from, to, 1);
            assert_ne!(damaged, text, "{from}");
            std::fs::write(&path, damaged).expect("it can be written");
            let error = read("ab").expect_err(from).to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
