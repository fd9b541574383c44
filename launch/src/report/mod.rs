//! What a run was like: plain data, and its text.

mod machine;
mod text;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sinew_drivers::peer::StreamFigures;
use sinew_runtime::ingest::Intake;
use sinew_runtime::scheduler::starvation::{Holds, StepLatency};
use sinew_runtime::telemetry::Quantiles;
use sinew_runtime::{Opening, Reach};

use crate::run::{EpisodeResult, Outcome, Presence, RecordingReport};
use crate::supervise::ChildFigures;

pub use machine::Machine;
pub use text::StatusLine;

/// A whole run: the content of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The computer.
    pub machine: Machine,
    /// The policy's file.
    pub policy: String,
    /// Arguments of the launch.
    pub arguments: BTreeMap<String, String>,
    /// Real-time scheduling, or why there is none.
    pub realtime: String,
    /// Simulated time skipped because the host slept too long (ms); otherwise the simulator's clock is the wall's.
    pub simulation_skipped_ms: Option<f64>,
    /// Why the arm was held until a person decides; empty when it was not.
    pub held: String,
    /// The parts that were seen on the bus.
    pub parts: BTreeMap<String, Presence>,
    /// The supervised processes.
    pub children: Vec<ChildFigures>,
    /// The episodes, in order.
    pub episodes: Vec<EpisodeResult>,
    /// Commands a second that were set.
    pub set_rate_hz: f64,
    /// The command stream at the driver's side of the bus.
    pub stream: StreamFigures,
    /// The control thread.
    pub control: LoopFigures,
    /// A bare clock loop of the same period and priority, run beside it.
    pub bare_clock: LoopFigures,
    /// Time of the control thread's work in a cycle (µs).
    pub cycle_work_us: Quantiles,
    /// From due to the command's hand-over to the publisher (µs).
    pub handover_us: Quantiles,
    /// Commands that the publisher's ring had no room for.
    pub dropped_commands: u64,
    /// From the order of a chunk to its hand-over (µs).
    pub chunk_latency_us: Quantiles,
    /// Its stages (µs).
    pub stages_us: BTreeMap<String, Quantiles>,
    /// Age of the observations' parts when a chunk was ordered (µs).
    pub ages_us: BTreeMap<String, Quantiles>,
    /// How chunks followed each other.
    pub strategy: String,
    /// Whether that can hold, by the latency measured before the start.
    pub margins: Holds,
    /// The policy's tail latency before the start.
    pub latency: StepLatency,
    /// What became of the chunks.
    pub chunks: ChunkFigures,
    /// Chunks made for each instruction.
    pub instructions: BTreeMap<String, u64>,
    /// Denoise steps and why, in inferences.
    pub denoise_steps: BTreeMap<String, u64>,
    /// What the caches did.
    pub caches: BTreeMap<String, CacheFigures>,
    /// How well the joints met the policy's poses; `None` when it speaks of joints.
    pub reach: Option<Reach>,
    /// Guard interventions, `joint: cause`, in control periods.
    pub interventions: BTreeMap<String, u64>,
    /// Messages from each sensor.
    pub sensors: BTreeMap<String, SensorFigures>,
    /// The recording, when there is one.
    pub recording: Option<RecordingReport>,
}

/// A periodic loop.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LoopFigures {
    /// Periods that were run.
    pub cycles: u64,
    /// Periods slept through.
    pub missed: u64,
    /// From due to wake-up (µs).
    pub lateness_us: Quantiles,
}

/// What became of the chunks.
#[derive(Debug, Clone, Serialize)]
pub struct ChunkFigures {
    /// Made by the policy.
    pub made: u64,
    /// Played.
    pub accepted: u64,
    /// Refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Orders that made none, by reason.
    pub failed: BTreeMap<String, u64>,
    /// A residual policy's offsets that were left out, by reason.
    pub residual_refused: BTreeMap<String, u64>,
    /// Times that a chunk ran out before the next came.
    pub starvations: u64,
    /// Control periods spent so.
    pub starved_cycles: u64,
    /// Times that stale state took authority away.
    pub stale_state_holds: u64,
}

/// What one cache did in a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct CacheFigures {
    /// Chunks that it took part in.
    pub chunks: u64,
    /// Blocks asked for.
    pub lookups: u64,
    /// Blocks reused.
    pub hits: u64,
    /// Largest error that reuse cost (the actions' units).
    pub largest_error: f64,
    /// Computing time saved (ms).
    pub saved_ms: f64,
    /// Newest bound of a reuse's relative error.
    pub bound: Option<f64>,
    /// How far it was open last.
    pub opening: Opening,
    /// Chunks for which it was not wholly open.
    pub not_open: u64,
    /// Chunks for which it was open and nothing was reused.
    pub unused: u64,
}

/// One sensor's messages.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SensorFigures {
    /// Taken in.
    pub received: u64,
    /// Never came.
    pub lost: u64,
    /// Came after a newer one; left out.
    pub reordered: u64,
    /// Joint states that were no numbers; left out.
    pub not_finite: u64,
    /// Joint states farther away than the arm can move; left out.
    pub jumps: u64,
    /// Frames of a camera that repeated its picture while the arm moved.
    pub frozen: u64,
}

impl From<Intake> for SensorFigures {
    fn from(intake: Intake) -> Self {
        let Intake { received, lost, reordered, not_finite, jumps, frozen, .. } = intake;
        Self { received, lost, reordered, not_finite, jumps, frozen }
    }
}

impl SensorFigures {
    /// What was wrong with `name`'s messages, as counts for the text.
    fn faults(&self, name: &str) -> impl Iterator<Item = (String, u64)> {
        let counts = [
            ("lost", self.lost),
            ("out of order", self.reordered),
            ("not finite", self.not_finite),
            ("jumped", self.jumps),
            ("frozen", self.frozen),
        ];
        let name = name.to_owned();
        counts.into_iter().filter(|c| c.1 > 0).map(move |(what, n)| (format!("{name}: {what}"), n))
    }
}

/// Successes, and what went wrong, of some episodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Episodes.
    pub episodes: usize,
    /// Of these: done as told.
    pub success: usize,
    /// Another object or the other place.
    pub wrong: usize,
    /// Time ran out, or stopped.
    pub unfinished: usize,
}

impl Tally {
    /// Counts `episodes`.
    pub fn of<'a>(episodes: impl Iterator<Item = &'a EpisodeResult>) -> Self {
        let mut tally = Self::default();
        for episode in episodes {
            tally.episodes += 1;
            match episode.outcome {
                Outcome::Success => tally.success += 1,
                Outcome::WrongObject | Outcome::WrongPlace => tally.wrong += 1,
                Outcome::Timeout | Outcome::Stopped => tally.unfinished += 1,
            }
        }
        tally
    }

    fn row(&self, name: &str) -> String {
        let percent = |n: usize| 100.0 * n as f64 / self.episodes.max(1) as f64;
        format!(
            "  {name:<44} {:>4} {:>5} {:>5.1} % {:>5} {:>10}",
            self.episodes,
            self.success,
            percent(self.success),
            self.wrong,
            self.unfinished
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn episode(instruction: &str, swapped: bool, outcome: Outcome) -> EpisodeResult {
        let (instruction, said) = (instruction.to_owned(), Vec::new());
        EpisodeResult { seed: 1, instruction, said, swapped, outcome, seconds: 2.0 }
    }

    #[test]
    fn a_tally_separates_wrong_from_unfinished() {
        let all = [
            episode("a", false, Outcome::Success),
            episode("a", false, Outcome::WrongPlace),
            episode("a", false, Outcome::WrongObject),
            episode("a", false, Outcome::Timeout),
        ];
        let tally = Tally::of(all.iter());
        assert_eq!((tally.success, tally.wrong, tally.unfinished), (1, 2, 1));
        assert!(tally.row("a").contains("25.0 %"));
    }
}
