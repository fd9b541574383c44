//! What a replay says, as text.

use std::fmt::Write as _;
use std::path::Path;

use super::{Exact, Figures, WhatIf};

impl Exact {
    /// The result as text.
    pub fn render(&self, file: &Path) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out, file);
        out
    }

    fn write(&self, out: &mut String, file: &Path) -> std::fmt::Result {
        writeln!(out, "{}", file.display())?;
        let row = |out: &mut String, what: &str, all: u64, different: u64| {
            let said = match different {
                0 => "bit-identical".to_owned(),
                n => format!("{n} different"),
            };
            writeln!(out, "  {what:<34} {all:>9}  {said}")
        };
        row(out, "control cycles (commands, authority)", self.cycles, self.cycles_different)?;
        row(out, "events and orders (decisions)", self.events, self.decisions_different)?;
        match &self.policy {
            Some(policy) => {
                row(out, "chunks inferred again", self.chunks, self.chunks_different)?;
                writeln!(out, "  policy {}", policy.path.display())?;
                for (name, before, now) in &policy.different {
                    let short = |sum: &str| sum.get(..16).unwrap_or(sum).to_owned();
                    let (before, now) = (short(before), short(now));
                    writeln!(
                        out,
                        "    {name} is another file: SHA-256 {now}…, recorded {before}…"
                    )?;
                }
            }
            None => writeln!(out, "  chunks as recorded: the policy was not run")?,
        }
        for (why, count) in &self.chunks_recorded {
            writeln!(out, "  chunks that could not be inferred again: {count} ({why})")?;
        }
        if let Some(found) = &self.difference {
            let at = found.stamp.0;
            writeln!(
                out,
                "\nFirst difference: cycle {}, stamp {at} ns, {}",
                found.cycle, found.field
            )?;
            writeln!(out, "  recorded {}\n  replayed {}", found.recorded, found.replayed)?;
        }
        if let Some(cycle) = self.gap_after {
            writeln!(
                out,
                "\nRecords of the control thread are missing after cycle {cycle}; nothing after it was compared."
            )?;
        }
        write_torn(out, self.torn.as_deref())?;
        writeln!(out, "\n{}", if self.identical() { "Identical." } else { "Not identical." })
    }
}

impl WhatIf {
    /// The answer as text.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "Recorded   {}", self.recorded_settings)?;
        writeln!(out, "Changed    {}", self.changed_settings)?;
        let count = |n: Option<u64>| n.map_or("none".to_owned(), |n| n.to_string());
        writeln!(out, "\nFirst cycle with another command: {}", count(self.first_difference))?;
        let period = self.control_period_s;
        match self.simulated_from {
            None => writeln!(
                out,
                "Exact: all inferences ({}) were made in the run as well, on the same observations.",
                self.exact_inferences
            )?,
            Some(cycle) => writeln!(
                out,
                "Exact up to cycle {cycle} ({:.1} s; inferences made in the run as well: {}). Simulated from there \
                 on: {} inferences on what the recorded sensors showed then, answered after the recorded \
                 latencies in turn.",
                cycle as f64 * period,
                self.exact_inferences,
                self.simulated_inferences
            )?,
        }
        writeln!(
            out,
            "The measured state is the recorded one: the arm does not follow the changed commands."
        )?;
        writeln!(out, "\n  {:<20} {:>12} {:>12}", "difference (rad)", "max", "RMS")?;
        for joint in &self.joints {
            writeln!(out, "  {:<20} {:>12.5} {:>12.5}", joint.joint, joint.max, joint.rms)?;
        }
        writeln!(
            out,
            "\n  {:<44} {:>12} {:>12}",
            "while the policy had authority", "recorded", "changed"
        )?;
        let (a, b) = (&self.recorded, &self.changed);
        type Count = fn(&Figures) -> u64;
        let counts: [(&str, Count); 6] = [
            ("control cycles", |f| f.cycles),
            ("chunks that took over", |f| f.chunks),
            ("chunks refused", |f| f.refused),
            ("starvations", |f| f.starvations),
            ("starved cycles", |f| f.starved_cycles),
            ("guard interventions", |f| f.interventions.values().sum()),
        ];
        for (name, of) in counts {
            writeln!(out, "  {name:<44} {:>12} {:>12}", of(a), of(b))?;
        }
        type Value = fn(&Figures) -> f64;
        let values: [(&str, Value); 3] = [
            ("seams: largest acceleration (rad/s²)", |f| f.seam_acceleration),
            ("seams: largest jerk (rad/s³)", |f| f.seam_jerk),
            ("elsewhere: largest jerk (rad/s³)", |f| f.other_jerk),
        ];
        for (name, of) in values {
            writeln!(out, "  {name:<44} {:>12.2} {:>12.2}", of(a), of(b))?;
        }
        for (why, count) in &self.failed {
            writeln!(out, "  inferences that could not be made: {count} ({why})")?;
        }
        if let Some(cycle) = self.gap_after {
            writeln!(
                out,
                "\nRecords of the control thread are missing after cycle {cycle}; it ends there."
            )?;
        }
        write_torn(out, self.torn.as_deref())
    }
}

fn write_torn(out: &mut String, torn: Option<&str>) -> std::fmt::Result {
    match torn {
        Some(why) => writeln!(out, "\nThe file ends early ({why}); what came before is whole."),
        None => Ok(()),
    }
}
