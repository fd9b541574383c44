//! Gathers what the threads say of themselves, for the status line and the final report.

use std::collections::BTreeMap;
use std::time::Duration;

use crossbeam_channel::Receiver;
use rtrb::Consumer;
use sinew_runtime::arbiter::{Authority, AuthorityChange, Reason};
use sinew_runtime::guard::Cause;
use sinew_runtime::inference::InferenceReport;
use sinew_runtime::scheduler::Mode;
use sinew_runtime::stream::{BareCycle, StreamReport};
use sinew_runtime::telemetry::Latencies;
use sinew_runtime::{Opening, Reach};

use crate::report::CacheFigures;

/// Everything counted since the start.
#[derive(Default)]
pub(super) struct Monitor {
    pub cycles: u64,
    /// Periods slept through.
    pub missed: u64,
    /// Commands that the publisher's ring had no room for.
    pub dropped: u64,
    pub lateness: Latencies,
    pub work: Latencies,
    /// From due to hand-over.
    pub handover: Latencies,
    pub bare_cycles: u64,
    pub bare_missed: u64,
    pub bare_lateness: Latencies,
    pub authority: Option<Authority>,
    /// Times that authority was given to the policy.
    pub grants: u64,
    /// An operator must agree before the policy moves again.
    pub awaits_consent: bool,
    /// Why authority changed last, and who brought it about.
    pub last_change: Option<AuthorityChange>,
    /// A residual policy's offsets that were left out, by reason.
    pub residual_refused: BTreeMap<String, u64>,
    /// Teleop samples that moved nothing, by reason.
    pub samples_refused: BTreeMap<String, u64>,
    pub mode: Option<Mode>,
    pub buffer_left: Duration,
    /// Times that a chunk ran out before the next came, and control periods spent so.
    pub starvations: u64,
    pub starved_cycles: u64,
    pub accepted: u64,
    /// Chunks refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Periods in which the guard changed a joint, by joint and cause.
    pub interventions: BTreeMap<(usize, &'static str), u64>,
    pub stale_stops: u64,
    pub chunk_latency: Latencies,
    pub stages: BTreeMap<&'static str, Latencies>,
    pub ages: BTreeMap<String, Latencies>,
    /// Inferences by reason and number of denoise steps.
    pub decisions: BTreeMap<(&'static str, usize), u64>,
    /// What the caches did, by name.
    pub caches: BTreeMap<&'static str, CacheFigures>,
    /// How well the joints met the policy's poses.
    pub reach: Option<Reach>,
    /// Chunks made for each instruction.
    pub instructions: BTreeMap<String, u64>,
    /// Orders that made no chunk, by reason.
    pub failures: BTreeMap<String, u64>,
}

impl Monitor {
    /// Reads all that has come since the last call.
    pub fn drain(
        &mut self,
        stream: &mut Consumer<StreamReport>,
        bare: &mut Consumer<BareCycle>,
        inference: &Receiver<InferenceReport>,
        joints: usize,
    ) {
        while let Ok(report) = stream.pop() {
            self.on_stream(report, joints);
        }
        while let Ok(cycle) = bare.pop() {
            self.bare_cycles += 1;
            self.bare_missed += u64::from(cycle.missed);
            self.bare_lateness.record(cycle.lateness);
        }
        for report in inference.try_iter() {
            self.on_inference(report);
        }
    }

    fn on_stream(&mut self, report: StreamReport, joints: usize) {
        match report {
            StreamReport::Cycle(cycle) => {
                self.cycles += 1;
                self.missed += u64::from(cycle.missed);
                self.dropped += u64::from(cycle.dropped);
                self.lateness.record(cycle.lateness);
                self.work.record(cycle.work);
                self.handover.record(cycle.lateness + cycle.work);
                self.authority = Some(cycle.authority);
                self.awaits_consent = cycle.awaits_consent;
                self.buffer_left = cycle.buffer_left;
                let starved = cycle.mode == Mode::Starved && cycle.authority == Authority::Policy;
                if starved {
                    self.starved_cycles += 1;
                    self.starvations += u64::from(self.mode != Some(Mode::Starved));
                }
                self.mode = Some(cycle.mode);
                if !cycle.interventions.is_empty() {
                    for joint in 0..joints {
                        for cause in Cause::ALL {
                            if cycle.interventions.contains(joint, cause) {
                                *self.interventions.entry((joint, cause.name())).or_default() += 1;
                            }
                        }
                    }
                }
            }
            StreamReport::Authority(change) => {
                self.stale_stops += u64::from(change.reason == Reason::StateStale);
                let (from, to) = (change.from.name(), change.to.name());
                tracing::debug!(from, to, reason = ?change.reason, by = %change.by, "authority");
                self.grants += u64::from(change.to == Authority::Policy);
                self.last_change = Some(change);
            }
            StreamReport::ChunkAccepted => self.accepted += 1,
            StreamReport::ChunkRefused(why) => count(&mut self.refused, &why),
            StreamReport::SampleRefused(why) => count(&mut self.samples_refused, &why),
            StreamReport::ResidualRefused(why) => count(&mut self.residual_refused, &why),
        }
    }

    fn on_inference(&mut self, report: InferenceReport) {
        match report {
            InferenceReport::Chunk { instruction, latency, report, decision, ages } => {
                *self.instructions.entry(instruction).or_default() += 1;
                self.chunk_latency.record(latency);
                if let Some(decision) = decision {
                    *self.decisions.entry((decision.why.name(), decision.done)).or_default() += 1;
                }
                for (cache, used) in report.caches {
                    let sum = self.caches.entry(cache).or_default();
                    sum.chunks += 1;
                    sum.lookups += u64::from(used.lookups);
                    sum.hits += u64::from(used.hits);
                    sum.largest_error = sum.largest_error.max(used.error.unwrap_or(0.0));
                    sum.saved_ms += used.saved.as_secs_f64() * 1e3;
                    sum.bound = used.bound.or(sum.bound);
                    sum.opening = used.opening;
                    sum.not_open += u64::from(used.opening != Opening::Open);
                    sum.unused += u64::from(used.unused.is_some());
                }
                if let Some(reach) = &report.reach {
                    self.reach.get_or_insert_default().merge(reach);
                }
                for stage in report.stages {
                    self.stages.entry(stage.stage).or_default().record(stage.time);
                }
                for (part, age) in ages {
                    self.ages.entry(part).or_default().record(age);
                }
            }
            InferenceReport::NotObserved(why) | InferenceReport::Failed(why) => {
                *self.failures.entry(why).or_default() += 1;
            }
            InferenceReport::Redirected => {
                *self.failures.entry("the instruction changed".to_owned()).or_default() += 1;
            }
            InferenceReport::Dropped => {
                *self.failures.entry("overtaken by a newer order".to_owned()).or_default() += 1;
            }
        }
    }
}

/// Counts `why` under its serialised name, which is its name in the report.
fn count(counts: &mut BTreeMap<String, u64>, why: &impl serde::Serialize) {
    let name = serde_json::to_value(why).ok();
    let name = name.and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    *counts.entry(name).or_default() += 1;
}
