//! What another scheduler would have sent from the same inputs.
//!
//! Until its first order that the run did not make, everything is exact: recorded observations, recorded
//! arrival times, the policy run again. From there on an order is answered by the policy on what the recorded
//! sensors showed at that moment, and the answer arrives after a recorded latency, taken in turn. The measured
//! state stays the recorded one: the arm does not follow the other commands.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use sinew_runtime::arbiter::Authority;
use sinew_runtime::blackbox::{
    CycleRecord, Entry, EventRecord, GapKind, Header, Images, InferenceRecord, RecordingEnd,
};
use sinew_runtime::control::{ControlCore, ControlEvent, Cycle};
use sinew_runtime::inference::InferenceOrder;
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{ActionChunk, Stamp};

use super::again::{Again, Frames};
use super::figures::Figures;
use super::sensors::Sensors;
use super::{failure, open};
use crate::cli::Failure;
use crate::launch_file::what_if_settings;

/// A failed attempt is told to the core this much later, as the inference thread does.
const RETRY: Duration = Duration::from_millis(5);

/// How far the commands of one joint are apart.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JointDifference {
    /// The joint.
    pub joint: String,
    /// Largest difference (rad).
    pub max: f64,
    /// Root of the mean square (rad).
    pub rms: f64,
}

/// What came out.
#[derive(Debug, Clone, Serialize)]
pub struct WhatIf {
    /// The recorded strategy and execution horizon.
    pub recorded_settings: String,
    /// The changed ones.
    pub changed_settings: String,
    /// Control period (s).
    pub control_period_s: f64,
    /// How far the commands are apart while the policy had authority.
    pub joints: Vec<JointDifference>,
    /// The recorded stream.
    pub recorded: Figures,
    /// The other one.
    pub changed: Figures,
    /// First cycle with another command; `None`: the same commands.
    pub first_difference: Option<u64>,
    /// First cycle whose answer is simulated; `None`: everything is exact.
    pub simulated_from: Option<u64>,
    /// Inferences that the run made as well.
    pub exact_inferences: u64,
    /// Inferences that only this replay made.
    pub simulated_inferences: u64,
    /// Inferences that could not be made, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Records of the control thread are missing after this cycle; it ends there.
    pub gap_after: Option<u64>,
    /// Why the file ends early.
    pub torn: Option<String>,
}

/// What the run did about its orders.
#[derive(Default)]
struct Known {
    /// Orders, by the cycle that made them.
    orders: HashMap<u64, u64>,
    /// Inferences, by request.
    inferences: HashMap<u64, InferenceRecord>,
    /// When an answer came to the core, by request.
    arrivals: HashMap<u64, Stamp>,
    /// From order to begin and to arrival, in order.
    latencies: Vec<(Duration, Duration)>,
}

/// An order that is being answered.
struct Pending {
    order: InferenceOrder,
    begin: Stamp,
    arrive: Stamp,
    /// The run's own inference.
    exact: Option<InferenceRecord>,
    answer: Option<ControlEvent>,
}

/// Runs the recording in `file` with the scheduler changed by `changes` (`key=value`).
///
/// # Errors
/// [`Failure`] for keys that are none, or a recording without all frames.
pub(super) fn run(
    file: &Path,
    header: &Header,
    again: &mut Again,
    changes: &[String],
) -> Result<WhatIf, Failure> {
    if header.images != Images::All {
        let why = "was recorded without all camera frames, so nobody knows what another strategy \
                   would have seen; record with images = \"all\"";
        return Err(failure(file, why));
    }
    let before = &header.control.scheduler;
    let settings = what_if_settings(before.strategy, before.execution_horizon, changes)?;
    let mut control = header.control.clone();
    control.scheduler.strategy = settings.strategy;
    control.scheduler.execution_horizon =
        settings.execution_horizon.unwrap_or(before.execution_horizon);
    let said = |strategy: StrategyConfig, horizon: usize| {
        format!("{}, execution horizon {horizon}", strategy.name())
    };
    let core = super::core(header, &control).map_err(|e| failure(file, e))?;
    let mut simulation = Simulation {
        header,
        core,
        again,
        known: known(file)?,
        frames: Frames::default(),
        sensors: Sensors::new(open(file)?, header),
        pending: None,
        made: 0,
        cycle: 0,
        of_policy: false,
        sums: vec![(0.0, 0.0); header.joints.len()],
        result: WhatIf {
            recorded_settings: said(before.strategy, before.execution_horizon),
            changed_settings: said(control.scheduler.strategy, control.scheduler.execution_horizon),
            control_period_s: control.period.as_secs_f64(),
            joints: Vec::new(),
            recorded: Figures::default(),
            changed: Figures::default(),
            first_difference: None,
            simulated_from: None,
            exact_inferences: 0,
            simulated_inferences: 0,
            failed: BTreeMap::new(),
            gap_after: None,
            torn: None,
        },
    };
    let mut reader = open(file)?;
    for entry in reader.by_ref() {
        simulation.entry(entry);
        if simulation.result.gap_after.is_some() {
            break;
        }
    }
    if let Some(RecordingEnd::Torn(why)) = reader.end() {
        simulation.result.torn = Some(why.clone());
    }
    Ok(simulation.finish())
}

/// Reads what the run did about its orders.
fn known(file: &Path) -> Result<Known, Failure> {
    let mut known = Known::default();
    let mut asked: HashMap<u64, Stamp> = HashMap::new();
    for entry in open(file)? {
        match entry {
            Entry::Cycle(CycleRecord {
                number, cycle: Cycle { order: Some(order), .. }, ..
            }) => {
                known.orders.insert(number, order.request);
                asked.insert(order.request, order.at);
            }
            Entry::Inference(record) => drop(known.inferences.insert(record.request.id, record)),
            Entry::Event { now, event: EventRecord::Chunk(head), .. } => {
                known.arrivals.insert(head.request, now);
            }
            _ => {}
        }
    }
    let mut requests: Vec<_> = known.arrivals.iter().collect();
    requests.sort();
    known.latencies = requests
        .into_iter()
        .filter_map(|(request, arrived)| {
            let at = asked.get(request)?;
            let begun = known.inferences.get(request)?.begun;
            Some((begun.since(*at), arrived.since(*at)))
        })
        .collect();
    if known.latencies.is_empty() {
        return Err(failure(file, "holds no answered inference to take latencies from"));
    }
    Ok(known)
}

struct Simulation<'a> {
    header: &'a Header,
    core: ControlCore,
    again: &'a mut Again,
    known: Known,
    frames: Frames,
    sensors: Sensors,
    pending: Option<Pending>,
    made: u64,
    cycle: u64,
    /// The recorded event before was a chunk of the policy.
    of_policy: bool,
    /// Per joint: largest difference, sum of squares.
    sums: Vec<(f64, f64)>,
    result: WhatIf,
}

impl Simulation<'_> {
    fn entry(&mut self, entry: Entry) {
        let period = self.header.control.period;
        match entry {
            Entry::Frame { camera, frame, .. } => self.frames.push(camera, frame),
            Entry::Event { now, event, chunk, .. } => {
                self.of_policy = matches!(event, EventRecord::Chunk(_));
                match event {
                    // The run's answers are given when this core has asked for them.
                    EventRecord::Chunk(_) | EventRecord::ChunkFailed(_) => {}
                    event => {
                        if let Some(event) = event.join(chunk) {
                            drop(self.core.on_event(event, now));
                            while self.core.take_spent().is_some() {}
                        }
                    }
                }
            }
            Entry::Effect(effect) => {
                if self.of_policy && (effect.accepted || effect.refused.is_some()) {
                    self.result.recorded.chunk(effect.accepted, period);
                }
            }
            Entry::Cycle(record) if record.number == self.cycle + 1 => self.tick(&record),
            Entry::Cycle(_) => self.result.gap_after = Some(self.cycle),
            Entry::Gap(gap) if gap.kind == GapKind::Control => {
                self.result.gap_after = Some(self.cycle);
            }
            Entry::State { .. } | Entry::Inference(_) | Entry::Note(..) | Entry::Gap(_) => {}
        }
    }

    fn tick(&mut self, record: &CycleRecord) {
        let (now, period) = (record.now, self.header.control.period);
        self.cycle = record.number;
        self.work(now);
        if let Some(answer) = self.pending.take_if(|p| now >= p.arrive).and_then(|p| p.answer) {
            let chunk = matches!(answer, ControlEvent::Chunk(_));
            let effect = self.core.on_event(answer, now);
            if chunk {
                self.result.changed.chunk(effect.accepted, period);
            }
            while self.core.take_spent().is_some() {}
        }
        let cycle = self.core.tick(now);
        while self.core.take_spent().is_some() {}
        if let Some(order) = cycle.order {
            let plan = self.core.plan().copied();
            self.order(record, InferenceOrder { order, plan });
        }
        let joints = &self.header.joints;
        self.result.recorded.cycle(&record.cycle, period, joints);
        self.result.changed.cycle(&cycle, period, joints);
        self.compare(&record.cycle, &cycle);
    }

    /// An order of this core: answered as in the run where that made the same, simulated otherwise.
    fn order(&mut self, record: &CycleRecord, order: InferenceOrder) {
        let at = order.order.at;
        let exact = self.same(record, &order);
        let (begin, arrive) = match &exact {
            Some((inference, arrived)) => {
                self.result.exact_inferences += 1;
                (inference.begun, *arrived)
            }
            None => {
                self.result.simulated_from.get_or_insert(record.number);
                // `known` refuses a recording without any.
                let turn = self.made as usize % self.known.latencies.len();
                let (to_begin, to_arrive) = self.known.latencies[turn];
                (at + to_begin, at + to_arrive)
            }
        };
        self.made += 1;
        let exact = exact.map(|e| e.0);
        // A newer order takes the place of one that is still being answered.
        self.pending = Some(Pending { order, begin, arrive, exact, answer: None });
    }

    /// The run's inference for the same order, made in the same cycle, as long as nothing was simulated.
    fn same(
        &self,
        record: &CycleRecord,
        order: &InferenceOrder,
    ) -> Option<(InferenceRecord, Stamp)> {
        if self.result.simulated_from.is_some() {
            return None;
        }
        let request = self.known.orders.get(&record.number)?;
        let inference = self.known.inferences.get(request)?;
        let arrived = self.known.arrivals.get(request)?;
        let asked = self.again.request(inference, order);
        let same = *request == order.order.request && asked == inference.request;
        same.then(|| (inference.clone(), *arrived))
    }

    /// Does what the inference thread would have done by `now`.
    fn work(&mut self, now: Stamp) {
        let Some(pending) = self.pending.as_mut().filter(|p| p.answer.is_none() && now >= p.begin)
        else {
            return;
        };
        let request = pending.order.order.request;
        let made: Result<ActionChunk, String> = if let Some(record) = &pending.exact {
            // The frames of an exact inference lie before its answer in the file; wait for them.
            if now < pending.arrive {
                return;
            }
            match self.again.repeat(record, Some(&pending.order), &self.frames) {
                Ok(made) => made
                    .chunk
                    .map_err(|e| e.to_string())
                    .and_then(|c| c.ok_or_else(|| "dropped".to_owned())),
                Err(why) => Err(why),
            }
        } else {
            self.result.simulated_inferences += 1;
            let seed = self.header.seed.wrapping_add(self.made - 1);
            let steps = self.header.denoise_steps;
            self.sensors.observe(pending.begin).map_err(|e| e.to_string()).and_then(|seen| {
                self.again.answer(&pending.order, seen, steps, seed).map_err(|e| e.to_string())
            })
        };
        pending.answer = Some(match made {
            Ok(chunk) => ControlEvent::Chunk(chunk),
            Err(why) => {
                *self.result.failed.entry(why).or_default() += 1;
                pending.arrive = pending.begin + RETRY;
                ControlEvent::ChunkFailed(request)
            }
        });
    }

    fn compare(&mut self, recorded: &Cycle, changed: &Cycle) {
        let (Some(a), Some(b)) = (recorded.command, changed.command) else { return };
        let same = a.position == b.position && a.velocity == b.velocity;
        if !same {
            self.result.first_difference.get_or_insert(self.cycle);
        }
        if recorded.authority == Authority::Policy {
            let both = a.position.as_slice().iter().zip(b.position.as_slice());
            for ((most, squares), (x, y)) in self.sums.iter_mut().zip(both) {
                let apart = (x - y).abs();
                *most = most.max(apart);
                *squares += apart * apart;
            }
        }
    }

    fn finish(mut self) -> WhatIf {
        let n = self.result.recorded.cycles.max(1) as f64;
        let joint = |(joint, (max, squares)): (&String, &(f64, f64))| JointDifference {
            joint: joint.clone(),
            max: *max,
            rms: (squares / n).sqrt(),
        };
        self.result.joints = self.header.joints.iter().zip(&self.sums).map(joint).collect();
        self.result
    }
}
