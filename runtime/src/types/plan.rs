//! What the scheduler tells the policy about the plan that its chunk will have to join.

use std::time::Duration;

use super::{JointVec, MAX_JOINTS};
use crate::Stamp;

/// The most rows of a [`PlannedBlock`].
pub const MAX_PLAN: usize = 64;

/// How a joint's (or a tool's) values are meant, played and blended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionKind {
    /// A joint position (rad): a curve continuous in acceleration runs through the actions.
    #[default]
    Position,
    /// A displacement (rad) from the measured position *at the observation's instant*; made absolute
    /// before the chunk reaches the scheduler, then played as a position.
    Delta,
    /// A jaw (rad): runs from action to action without passing either, and is never averaged between
    /// chunks: half open is not a compromise between open and closed.
    Gripper,
    /// A switch: every action holds its value until the next, without values between.
    Switch,
}

impl ActionKind {
    /// True where a mean of two values is a value between them that makes sense.
    pub fn blends(self) -> bool {
        matches!(self, ActionKind::Position | ActionKind::Delta)
    }
}

/// The plan from an instant on: what was and will be executed if no other chunk comes.
///
/// Rows are `dt` apart; stored in place, so that the control thread can hand it over without a heap.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(into = "Rows", try_from = "Rows")]
pub struct PlannedBlock {
    /// Instant of row 0.
    pub instant: Stamp,
    /// Time between two rows.
    pub dt: Duration,
    dim: usize,
    rows: usize,
    values: [f64; MAX_PLAN * MAX_JOINTS],
}

/// A block as it is written down: only the rows that it has.
#[derive(serde::Serialize, serde::Deserialize)]
struct Rows {
    instant: Stamp,
    dt: Duration,
    dim: usize,
    values: Vec<f64>,
}

impl From<PlannedBlock> for Rows {
    fn from(block: PlannedBlock) -> Self {
        let PlannedBlock { instant, dt, dim, rows, values } = block;
        Self { instant, dt, dim, values: values[..rows * dim].to_vec() }
    }
}

impl TryFrom<Rows> for PlannedBlock {
    type Error = String;

    fn try_from(Rows { instant, dt, dim, values }: Rows) -> Result<Self, String> {
        let fail = || format!("a plan of {} values by {dim}", values.len());
        if !(1..=MAX_JOINTS).contains(&dim) || !values.len().is_multiple_of(dim) {
            return Err(fail());
        }
        let mut block = Self::empty(instant, dt, dim);
        let whole = values
            .chunks_exact(dim)
            .all(|row| JointVec::from_slice(row).is_some_and(|row| block.push(&row)));
        if whole { Ok(block) } else { Err(fail()) }
    }
}

impl PlannedBlock {
    /// A block without rows for `dim` joints.
    pub fn empty(instant: Stamp, dt: Duration, dim: usize) -> Self {
        let dim = dim.min(MAX_JOINTS);
        Self { instant, dt, dim, rows: 0, values: [0.0; MAX_PLAN * MAX_JOINTS] }
    }

    /// Appends `row` (rad); false when the block is full or the row has another width.
    pub fn push(&mut self, row: &JointVec) -> bool {
        let room = self.rows < MAX_PLAN && row.len() == self.dim;
        if room {
            let start = self.rows * self.dim;
            self.values[start..start + self.dim].copy_from_slice(row.as_slice());
            self.rows += 1;
        }
        room
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `k`; `None` past the last.
    pub fn row(&self, k: usize) -> Option<&[f64]> {
        (k < self.rows).then(|| &self.values[k * self.dim..(k + 1) * self.dim])
    }

    /// The plan at `instant` (rad): cubic between the rows (Catmull and Rom 1974); `None` outside them.
    pub fn sample(&self, instant: Stamp) -> Option<JointVec> {
        let last = self.rows.checked_sub(1)? as f64;
        let x = instant.seconds_from(self.instant) / self.dt.as_secs_f64();
        // A stamp is whole nanoseconds: a hair outside is on the edge.
        if !(-1e-6..=last + 1e-6).contains(&x) {
            return None;
        }
        let x = x.clamp(0.0, last);
        let i = (x.floor() as usize).min(self.rows.saturating_sub(2));
        let f = x - i as f64;
        let mut out = JointVec::zeros(self.dim);
        for joint in 0..self.dim {
            let at = |k: usize| self.values[k.min(self.rows - 1) * self.dim + joint];
            let (p1, p2) = (at(i), at(i + 1));
            // At the ends the outer neighbour lies on the line through the inner two.
            let p0 = if i == 0 { 2.0 * p1 - p2 } else { at(i - 1) };
            let p3 = if i + 2 < self.rows { at(i + 2) } else { 2.0 * p2 - p1 };
            let (m1, m2) = ((p2 - p0) / 2.0, (p3 - p1) / 2.0);
            let (f2, f3) = (f * f, f * f * f);
            out[joint] = p1 * (2.0 * f3 - 3.0 * f2 + 1.0)
                + m1 * (f3 - 2.0 * f2 + f)
                + p2 * (3.0 * f2 - 2.0 * f3)
                + m2 * (f3 - f2);
        }
        Some(out)
    }
}

/// How guidance fades over the planned actions that are not frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskSchedule {
    /// Only the frozen actions count.
    Zeros,
    /// All planned actions count alike.
    Ones,
    /// Falls on a line.
    Linear,
    /// Falls like `c·(eᶜ − 1)/(e − 1)` of the line's `c`: the soft mask of real-time chunking.
    #[default]
    Exponential,
}

/// How a head makes its chunk agree with the planned actions.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixUse {
    /// Real-time chunking by guidance: every denoise step is pulled towards the plan.
    Guided {
        /// How the pull fades.
        schedule: MaskSchedule,
        /// Largest guidance weight.
        max_weight: f64,
    },
    /// Real-time chunking as trained: the frozen actions are given to the head as clean.
    Trained,
    /// An initial guess: denoising starts from the plan, noised to this flow time (1 is noise alone).
    WarmStart {
        /// Flow time that denoising starts at, above 0 and below 1.
        time: f64,
    },
}

/// Planned actions on the instants of the chunk to come: row `k` belongs to `observation + (k + 1)·dt`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Prefix {
    /// Rows of `dim` values (physical units, the policy's action kinds), row-major; not padded.
    pub actions: Vec<f64>,
    /// Action dimension.
    pub dim: usize,
    /// So many first rows will be executed before the chunk arrives.
    pub frozen: usize,
    /// Rows from here on carry no weight.
    pub horizon: usize,
    /// What the head does with them.
    pub usage: PrefixUse,
}

impl Prefix {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.actions.len() / self.dim.max(1)
    }

    /// The guidance weight of each action of a chunk of `horizon` actions.
    ///
    /// Source: real-time chunking (arXiv 2506.07339) in LeRobot's form: one below `frozen`, the schedule's
    /// fall up to the prefix's horizon, zero from there on.
    pub fn weights(&self, schedule: MaskSchedule, horizon: usize) -> Vec<f64> {
        let end = self.horizon.min(self.rows()).min(horizon);
        let start = self.frozen.min(end);
        let steps = (end - start) as f64;
        (0..horizon)
            .map(|i| match (i < start, i < end, schedule) {
                (true, ..) => 1.0,
                (_, false, _) | (.., MaskSchedule::Zeros) => 0.0,
                (.., MaskSchedule::Ones) => 1.0,
                _ => {
                    let line = 1.0 - (i - start + 1) as f64 / (steps + 1.0);
                    match schedule {
                        MaskSchedule::Exponential => {
                            line * line.exp_m1() / (std::f64::consts::E - 1.0)
                        }
                        _ => line,
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(rows: usize, frozen: usize, horizon: usize) -> Prefix {
        let usage = PrefixUse::Guided { schedule: MaskSchedule::Linear, max_weight: 10.0 };
        Prefix { actions: vec![0.0; rows], dim: 1, frozen, horizon, usage }
    }

    #[test]
    fn the_soft_mask_matches_its_golden_values() {
        let prefix = prefix(6, 2, 6);
        let close = |ours: Vec<f64>, golden: [f64; 10]| {
            assert_eq!(ours.len(), 10);
            for (a, b) in ours.iter().zip(golden) {
                assert!((a - b).abs() < 5e-5, "{ours:?}");
            }
        };
        let line = [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0];
        close(prefix.weights(MaskSchedule::Linear, 10), line);
        let soft = [1.0, 1.0, 0.5706, 0.2871, 0.1145, 0.0258, 0.0, 0.0, 0.0, 0.0];
        close(prefix.weights(MaskSchedule::Exponential, 10), soft);
    }

    #[test]
    fn rows_that_do_not_exist_carry_no_weight() {
        let weights = prefix(3, 5, 8).weights(MaskSchedule::Ones, 8);
        assert_eq!(weights, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_block_is_exact_on_its_rows_and_smooth_between() {
        let dt = Duration::from_millis(100);
        let mut block = PlannedBlock::empty(Stamp(0), dt, 1);
        for k in 0..5 {
            let x = f64::from(k);
            assert!(block.push(&JointVec::from_slice(&[x * x]).expect("one joint")));
        }
        for k in 0..5u32 {
            let seen = block.sample(Stamp(0) + dt * k).expect("on a row");
            assert!((seen[0] - f64::from(k * k)).abs() < 1e-9);
        }
        let between = block.sample(Stamp(150_000_000)).expect("inside");
        assert!((between[0] - 2.25).abs() < 1e-9, "a parabola is met exactly inside");
        assert!(block.sample(Stamp(-1_000_000)).is_none());
        assert!(block.sample(Stamp(401_000_000)).is_none());
        assert!(PlannedBlock::empty(Stamp(0), dt, 1).sample(Stamp(0)).is_none());
    }
}
