//! Exits of a loaded policy, and of one inference.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sinew_runtime::{CacheUse, ChunkRequest, Unused};

use super::file::{ExitPlan, fit};
use super::options::{EarlyExit, ExitTuning, SeenExits};
use super::rule::ends;
use crate::ModelError;
use crate::checkpoint::Checkpoint;

enum Source {
    Plan(Arc<ExitPlan>),
    Tuned(ExitTuning),
}

/// Early exits of a loaded policy.
pub(crate) struct Exits {
    source: Source,
    /// Flow steps of the whole network.
    whole_steps: usize,
    /// Newest time of each exit: its layers and its flow steps.
    costs: Vec<Duration>,
}

impl Exits {
    /// What `options` say for `checkpoint`, whose network has `depth` layers and makes chunks in `whole_steps` flow steps,
    /// and was trained with exits after the layers `trained`, if it says so.
    ///
    /// # Errors
    /// [`ModelError`] for a file that cannot be read or belongs to another policy, or layers that are none of the network's.
    pub fn of(
        options: &EarlyExit,
        checkpoint: &Checkpoint,
        trained: Option<&[usize]>,
        (depth, whole_steps): (usize, usize),
    ) -> Result<Option<Self>, ModelError> {
        check_trained(&checkpoint.config_path(), trained, depth)?;
        let source = match options {
            EarlyExit::Off => return Ok(None),
            EarlyExit::File(path) => {
                Source::Plan(Arc::new(ExitPlan::read(path, depth, &checkpoint.weights_sha256())?))
            }
            EarlyExit::Tuned(tuning) => {
                let weights_sha256 = checkpoint.weights_sha256();
                let mut tuned = tuning.lock();
                (tuned.depth, tuned.weights_sha256) = (depth, weights_sha256);
                tuned.trained = trained.map(<[usize]>::to_vec);
                Source::Tuned(tuning.clone())
            }
        };
        Ok(Some(Self { source, whole_steps, costs: Vec::new() }))
    }

    /// Exits, and with them the denoise steps of a chunk: what one takes grows with the exit's depth.
    pub fn count(&self) -> usize {
        match &self.source {
            Source::Plan(plan) => plan.layers.len(),
            Source::Tuned(_) => self.whole_steps,
        }
    }

    /// Flow steps of the whole network.
    pub fn whole_steps(&self) -> usize {
        self.whole_steps
    }

    /// Flow steps that are done in one step of an inference, at an exit or without exits.
    pub fn together(&self) -> usize {
        match &self.source {
            Source::Plan(plan) => plan.steps,
            Source::Tuned(tuning) => tuning.lock().plan.as_ref().map_or(1, |plan| plan.steps),
        }
    }

    /// Whether what an inference takes is measured, so that it must use nothing of the one before.
    pub fn measured(&self) -> bool {
        matches!(self.source, Source::Tuned(_))
    }

    /// The exits of an inference that answers `request` with at most `most` of them; none when it is to be exact.
    pub fn begin(&self, request: &ChunkRequest, most: usize) -> Option<Exiting> {
        let plan = match &self.source {
            Source::Plan(plan) => plan.clone(),
            Source::Tuned(tuning) => Arc::new(tuning.lock().plan.clone()?),
        };
        let limit = most.clamp(1, plan.layers.len().max(1));
        let (whole, recorded) = (request.whole, self.measured());
        let (done, ended, before, seen) = (0, false, Vec::new(), SeenExits::default());
        (!request.exact).then_some(Exiting {
            plan,
            limit,
            whole,
            recorded,
            done,
            ended,
            before,
            seen,
        })
    }

    /// The inference became a chunk: how early it ended.
    pub fn end(&mut self, exiting: Option<&mut Exiting>) -> Option<CacheUse> {
        let count = u32::try_from(self.count()).unwrap_or(u32::MAX);
        let Some(exiting) = exiting else {
            let exact =
                CacheUse { lookups: count, unused: Some(Unused::Exact), ..CacheUse::default() };
            return (!self.measured()).then_some(exact);
        };
        let mut before = Duration::ZERO;
        self.costs.resize(exiting.plan.layers.len(), Duration::ZERO);
        for (cost, until) in self.costs.iter_mut().zip(&exiting.seen.times) {
            (*cost, before) = (until.saturating_sub(before), *until);
        }
        if let Source::Tuned(tuning) = &self.source {
            tuning.lock().seen.push(std::mem::take(&mut exiting.seen));
            return None;
        }
        let hits = count.saturating_sub(u32::try_from(exiting.done).unwrap_or(u32::MAX));
        Some(CacheUse {
            lookups: count,
            hits,
            error: (hits > 0).then_some(exiting.plan.measured.p99),
            saved: self.costs.iter().skip(exiting.done).sum(),
            ..CacheUse::default()
        })
    }
}

fn check_trained(path: &Path, trained: Option<&[usize]>, depth: usize) -> Result<(), ModelError> {
    let Some(layers) = trained else { return Ok(()) };
    fit(layers, depth).map_err(|expected| {
        let reason = format!("is {layers:?}, expected {expected}");
        ModelError::config(path, "early_exit_layers", reason)
    })
}

/// One inference on its way from exit to exit.
pub(crate) struct Exiting {
    plan: Arc<ExitPlan>,
    /// Exits that there is time for.
    limit: usize,
    /// It ends at the last exit.
    whole: bool,
    recorded: bool,
    done: usize,
    ended: bool,
    /// Actions at the newest exit, in the network's units.
    before: Vec<f32>,
    seen: SeenExits,
}

impl Exiting {
    /// Layers before the next exit.
    pub fn depth(&self) -> usize {
        // Plans have at least three exits, and no exit comes after the last.
        self.plan.layers.get(self.done).or(self.plan.layers.last()).copied().unwrap_or(0)
    }

    /// Flow steps at each exit.
    pub fn steps(&self) -> usize {
        self.plan.steps
    }

    /// Exits that are behind.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Exits, at most.
    pub fn most(&self) -> usize {
        self.limit
    }

    /// Whether the newest exit was the one where it ended.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether the actions at each exit are wanted in physical units.
    pub fn recorded(&self) -> bool {
        self.recorded
    }

    /// An exit was reached with `actions` (`[H, D]` row by row, in the network's units; where they are recorded also in
    /// `physical` ones), `time` after the prefix began: whether the inference ends there.
    pub fn reached(&mut self, actions: Vec<f32>, physical: Option<Vec<f64>>, time: Duration) {
        let gap = self.plan.gap.between(&actions, &self.before);
        let exits = self.plan.layers.len();
        let calm = !self.whole && ends(&self.plan.thresholds, exits, self.done, gap);
        if self.done > 0 {
            self.seen.gaps.push(gap);
        }
        self.seen.times.push(time);
        self.seen.actions.extend(physical);
        self.before = actions;
        self.done += 1;
        self.ended = calm || self.done >= self.limit;
    }

    /// Ends at the newest exit; false before the first.
    pub fn finish(&mut self) -> bool {
        self.ended = self.done > 0;
        self.ended
    }

    /// There is time for `most` exits; false when more are behind.
    pub fn set_limit(&mut self, most: usize) -> bool {
        let may = most > self.done;
        if may {
            self.limit = most.min(self.plan.layers.len());
        }
        may
    }
}
