//! What a run was like: plain data, and its text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use sinew_drivers::peer::StreamFigures;
use sinew_runtime::Reach;
use sinew_runtime::ingest::Intake;
use sinew_runtime::scheduler::starvation::{Holds, StepLatency};
use sinew_runtime::telemetry::Quantiles;

use crate::run::{EpisodeResult, Outcome, Presence, RecordingReport};
use crate::supervise::{ChildFigures, ChildState};

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

/// The computer that a run was made on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processor.
    pub cpu: String,
    /// Its cores.
    pub cores: usize,
    /// Operating system's kernel.
    pub kernel: String,
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

impl Machine {
    /// This computer.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let model = info.lines().find(|l| l.starts_with("model name"));
        let cpu = model.and_then(|l| l.split_once(':')).map_or("unknown", |(_, name)| name.trim());
        Self {
            cpu: cpu.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
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

/// One line on what is going on, once a second.
pub struct StatusLine<'a> {
    /// The instruction followed.
    pub instruction: &'a str,
    /// Who holds authority.
    pub authority: &'a str,
    /// Control periods a second.
    pub rate_hz: f64,
    /// Periods slept through.
    pub overruns: u64,
    /// Chunk latency (µs).
    pub chunk: Quantiles,
    /// Time until the executing chunk is played out (ms).
    pub buffer_ms: u128,
    /// Successes and episodes so far.
    pub successes: (usize, usize),
    /// The supervised processes.
    pub parts: &'a [ChildFigures],
}

impl std::fmt::Display for StatusLine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (won, of) = self.successes;
        write!(
            f,
            "{:<42} {:<6} {:7.2} Hz  overruns {}  chunk p50/p99 {:.0}/{:.0} ms  buffer {:4} ms  {won} of {of} done",
            self.instruction,
            self.authority,
            self.rate_hz,
            self.overruns,
            self.chunk.p50 / 1e3,
            self.chunk.p99 / 1e3,
            self.buffer_ms,
        )?;
        for child in self.parts {
            match child.state {
                ChildState::Running => write!(f, "  {}", child.part)?,
                _ => write!(f, "  {} down", child.part)?,
            }
            if child.restarts > 0 {
                write!(f, " ({} restarts)", child.restarts)?;
            }
        }
        Ok(())
    }
}

impl RunReport {
    /// The report as aligned text.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpu, cores, kernel } = &self.machine;
        writeln!(out, "\nMachine    {cpu}, {cores} cores, Linux {kernel}")?;
        writeln!(out, "Policy     {}", self.policy)?;
        writeln!(out, "Real time  {}", self.realtime)?;
        if let Some(skipped) = self.simulation_skipped_ms {
            writeln!(out, "Simulator  on the wall clock; {skipped:.0} ms skipped in all")?;
        }
        for child in &self.children {
            let process =
                child.process.map_or("not running".to_owned(), |p| format!("process {p}"));
            writeln!(out, "Part       {}: {process}, {} restarts", child.part, child.restarts)?;
        }
        for (part, seen) in self.parts.iter().filter(|p| p.1.lost > 0) {
            writeln!(
                out,
                "Part       {part}: lost {} times, came {} times",
                seen.lost, seen.appeared
            )?;
        }
        if !self.held.is_empty() {
            writeln!(out, "Held       {}", self.held)?;
        }
        self.write_episodes(out)?;

        let s = &self.stream;
        let off = 100.0 * (s.achieved_rate_hz - self.set_rate_hz) / self.set_rate_hz;
        writeln!(out, "\nCommand stream at the driver's side of the bus")?;
        writeln!(
            out,
            "  {} commands in {:.1} s: {:.3} Hz, set {:.3} Hz ({off:+.3} %); lost {}, out of order {}, refused {}, missed periods {}",
            s.commands,
            s.seconds,
            s.achieved_rate_hz,
            self.set_rate_hz,
            s.lost,
            s.reordered,
            s.refused + s.invalid,
            s.missed_periods
        )?;
        writeln!(
            out,
            "\n  {:<34} {:>9} {:>9} {:>9} {:>9} {:>8}",
            "µs", "p50", "p99", "p99.9", "max", "missed"
        )?;
        let row = |out: &mut String, name: &str, q: &Quantiles, missed: Option<u64>| {
            let missed = missed.map(|m| m.to_string()).unwrap_or_default();
            writeln!(
                out,
                "  {name:<34} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {missed:>8}",
                q.p50, q.p99, q.p999, q.max
            )
        };
        row(
            out,
            "control thread: late to wake",
            &self.control.lateness_us,
            Some(self.control.missed),
        )?;
        row(
            out,
            "bare clock loop: late to wake",
            &self.bare_clock.lateness_us,
            Some(self.bare_clock.missed),
        )?;
        row(out, "control thread: work in a cycle", &self.cycle_work_us, None)?;
        row(out, "control thread: due to hand-over", &self.handover_us, None)?;
        row(out, "driver: jitter of the interval", &s.jitter_us, Some(s.missed_periods))?;
        row(out, "driver: control thread to arrival", &s.one_way_us, None)?;

        writeln!(out, "\n  {:<34} {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p99", "max", "n")?;
        let row = |out: &mut String, name: &str, q: &Quantiles| {
            let (p50, p99, max) = (q.p50 / 1e3, q.p99 / 1e3, q.max / 1e3);
            writeln!(out, "  {name:<34} {p50:>9.1} {p99:>9.1} {max:>9.1} {:>9}", q.count)
        };
        row(out, "chunk: order to hand-over", &self.chunk_latency_us)?;
        for (stage, q) in &self.stages_us {
            row(out, &format!("chunk: {stage}"), q)?;
        }
        for (part, q) in &self.ages_us {
            row(out, &format!("observation: age of {part}"), q)?;
        }

        let c = &self.chunks;
        writeln!(
            out,
            "\nChunks     {} made, {} played, {} starvations ({} control periods)",
            c.made, c.accepted, c.starvations, c.starved_cycles
        )?;
        let (slack, thinking) = (self.margins.slack.as_secs_f64() * 1e3, self.margins.standstill);
        if thinking > 0.0 {
            writeln!(
                out,
                "  {}: stands still {:.0} % of the time",
                self.strategy,
                100.0 * thinking
            )?;
        } else {
            let note = if self.margins.back_to_back { ", inference back to back" } else { "" };
            writeln!(
                out,
                "  {}: a chunk may come {slack:.0} ms later than usual{note}",
                self.strategy
            )?;
        }
        write_counts(out, "  denoise steps", &self.denoise_steps)?;
        for (cache, used) in &self.caches {
            if cache == "candidates" {
                let CacheFigures { chunks, hits, lookups, .. } = used;
                writeln!(out, "  candidates: {hits} of {lookups} made for {chunks} chunks")?;
                continue;
            }
            if cache == "success_memory" {
                let CacheFigures { chunks, hits, lookups, .. } = used;
                writeln!(
                    out,
                    "  success memory: {hits} of {lookups} records followed in {chunks} chunks"
                )?;
                continue;
            }
            writeln!(
                out,
                "  {cache}: {} chunks, {} of {} actions reused, error up to {:.4}",
                used.chunks, used.hits, used.lookups, used.largest_error
            )?;
        }
        if let Some(Reach { poses, missed, position_error, rotation_error, path_error }) =
            self.reach
        {
            writeln!(
                out,
                "  poses: {missed} of {poses} out of reach, off by up to {:.1} mm and {:.1} deg; between two the tip \
                 is up to {:.1} mm off the straight way",
                position_error * 1e3,
                rotation_error.to_degrees(),
                path_error * 1e3
            )?;
        }
        write_counts(out, "  refused", &c.refused)?;
        write_counts(out, "  not made", &c.failed)?;
        write_counts(out, "  residual left out", &c.residual_refused)?;
        write_counts(out, "Guard      changed (control periods)", &self.interventions)?;
        let lost: u64 = self.sensors.values().map(|s| s.lost).sum();
        let received: u64 = self.sensors.values().map(|s| s.received).sum();
        writeln!(out, "Sensors    {received} messages, {lost} lost")?;
        let faults = self.sensors.iter().flat_map(|(name, s)| s.faults(name)).collect();
        write_counts(out, "  faults", &faults)?;
        match &self.recording {
            Some(recording) => write_recording(out, recording),
            None => Ok(()),
        }
    }

    fn write_episodes(&self, out: &mut String) -> std::fmt::Result {
        if self.episodes.is_empty() {
            return Ok(());
        }
        for swapped in [false, true] {
            let of = |e: &&EpisodeResult| e.swapped == swapped;
            let group: Vec<_> = self.episodes.iter().filter(of).collect();
            if group.is_empty() {
                continue;
            }
            let title =
                if swapped { "Control: same scenes, another instruction" } else { "Episodes" };
            writeln!(out, "\n{title}")?;
            writeln!(
                out,
                "  {:<44} {:>4} {:>13} {:>5} {:>10}",
                "instruction", "n", "success", "wrong", "unfinished"
            )?;
            let mut names: Vec<_> = group.iter().map(|e| e.instruction.as_str()).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                let tally = Tally::of(group.iter().copied().filter(|e| e.instruction == name));
                writeln!(out, "{}", tally.row(name))?;
            }
            writeln!(out, "{}", Tally::of(group.iter().copied()).row("all"))?;
            let mut times: Vec<f64> =
                group.iter().filter(|e| e.outcome == Outcome::Success).map(|e| e.seconds).collect();
            times.sort_by(f64::total_cmp);
            if let Some(median) = times.get(times.len() / 2) {
                writeln!(out, "  median time to success {median:.1} s")?;
            }
        }
        Ok(())
    }
}

fn write_recording(out: &mut String, recording: &RecordingReport) -> std::fmt::Result {
    let figures = &recording.figures;
    let messages: u64 = figures.messages.values().sum();
    let megabytes = figures.bytes as f64 / 1e6;
    writeln!(
        out,
        "Recording  {}: {messages} messages, {megabytes:.1} MB",
        recording.file.display()
    )?;
    if let Some(why) = &figures.stopped {
        writeln!(
            out,
            "  ended early: {why}; {} records after it are not in the file",
            figures.unwritten
        )?;
    }
    let lost = figures.lost.iter().map(|(kind, n)| (kind.name().to_owned(), *n)).collect();
    write_counts(out, "  no room for", &lost)
}

fn write_counts(out: &mut String, name: &str, counts: &BTreeMap<String, u64>) -> std::fmt::Result {
    if counts.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = counts.iter().map(|(what, n)| format!("{what} {n}")).collect();
    writeln!(out, "{name}: {}", list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn episode(instruction: &str, swapped: bool, outcome: Outcome) -> EpisodeResult {
        EpisodeResult { seed: 1, instruction: instruction.into(), swapped, outcome, seconds: 2.0 }
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
