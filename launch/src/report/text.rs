//! The report, and the line once a second, as text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sinew_runtime::telemetry::Quantiles;
use sinew_runtime::{Opening, Reach};

use super::{CacheFigures, RunReport, Tally};
use crate::run::{EpisodeResult, Outcome, RecordingReport};
use crate::supervise::{ChildFigures, ChildState};

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
        writeln!(out, "\nMachine    {}", self.machine)?;
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
        if self.instructions.len() > 1 {
            write_counts(out, "  made for", &self.instructions)?;
        }
        write_counts(out, "  denoise steps", &self.denoise_steps)?;
        for (cache, used) in &self.caches {
            if cache == "candidates" {
                let CacheFigures { chunks, hits, lookups, .. } = used;
                writeln!(out, "  candidates: {hits} of {lookups} made for {chunks} chunks")?;
                continue;
            }
            if cache == "anchors" {
                let CacheFigures { chunks, hits, lookups, largest_error, .. } = used;
                writeln!(
                    out,
                    "  anchors: {hits} values moved and {lookups} passes made anew in {chunks} chunks, {largest_error:.4} left"
                )?;
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
            if cache == "comparison" {
                let CacheFigures { chunks, hits, largest_error, not_open, .. } = used;
                write!(out, "  comparison: {hits} of {chunks} chunks made without caches, too, ")?;
                write!(out, "off by up to {largest_error:.4}")?;
                if let Some(bound) = used.bound {
                    write!(out, "; 99 % of the values within {bound:.3} (network's units)")?;
                }
                writeln!(
                    out,
                    "; caches {} now, not wholly open for {not_open}",
                    used.opening.name()
                )?;
                continue;
            }
            let what = match cache.as_str() {
                "frozen_prefix" => "actions",
                "warm_start" => "steps",
                "vision" => "patches",
                "denoiser" => "blocks",
                "prefix_kv" => "prefixes or tokens",
                _ => "frames",
            };
            let CacheFigures { chunks, hits, lookups, saved_ms, not_open, unused, .. } = used;
            write!(out, "  {cache}: {chunks} chunks, {hits} of {lookups} {what} reused")?;
            write!(out, ", {saved_ms:.0} ms saved, error up to {:.4}", used.largest_error)?;
            if let Some(bound) = used.bound {
                write!(out, ", bound {bound:.3}")?;
            }
            write!(out, "; not used for {unused}, not wholly open for {not_open}")?;
            match used.opening {
                Opening::Open => writeln!(out)?,
                now => writeln!(out, ", {} now: its errors were above the limit", now.name())?,
            }
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
