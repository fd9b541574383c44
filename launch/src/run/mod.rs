//! Assembles the parts of a launch and runs it: threads joined by bounded channels, zenoh between the
//! runtime and the devices.

mod agenda;
mod assembly;
mod devices;
mod episode;
mod intake;
mod monitor;
mod motion;
mod only;
mod operator;
mod parts;
mod policy_part;
mod recording;
mod referee;
mod remote;
mod residual;
mod robot;
mod roster;
mod status;
mod views;
mod waiting;

pub use agenda::{SayMessage, Saying, Told};
pub use assembly::Plan;
pub use devices::{Devices, NamedCamera};
pub use episode::{EpisodeResult, Outcome, SceneReply, SceneRequest};
pub use operator::ARM;
pub use parts::{Part, Placement};
pub use recording::{Recording, RecordingReport, sums};
pub use robot::RunError;
pub use roster::Presence;
pub use status::{ControlStatus, PartStatus};
pub use views::{PLACE, Renamed};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use assembly::Launched;
use episode::EpisodePlan;
use monitor::Monitor;
use robot::Robot;
use sinew_runtime::blackbox::Note;
use waiting::Waiting;

use crate::cli::{Failure, LaunchArgs};
use crate::film::Film;
use crate::launch_file::LaunchConfig;
use crate::prepare::{Prepared, Successes};
use crate::report::{ChunkFigures, LoopFigures, Machine, RunReport, StatusLine, Tally};
use crate::supervise::Supervision;

pub use only::run_only;

/// Time between two pictures of the film.
const FILM_PERIOD: Duration = Duration::from_millis(400);
/// Rows of the film.
const FILM_ROWS: usize = 8;

/// Runs a prepared launch until its episodes are over or Ctrl-C, and reports.
///
/// # Errors
/// [`Failure`] of starting or going on; the arm is held by then.
pub fn run(
    prepared: Prepared,
    args: &LaunchArgs,
    recording: Recording,
) -> Result<RunReport, Failure> {
    let quit = on_interrupt()?;
    let supervision = only::children(&prepared, args)?;
    let devices = prepared.devices().map_err(RunError::Device)?;
    let Prepared { plan, policy, residual, successes, config, .. } = prepared;
    let waiting = Waiting {
        file: &args.file,
        quit: &quit,
        supervision: supervision.as_ref(),
        alone: plan.placement == Placement::all_here(&config),
    };
    let mut launched = Launched::start(
        &plan,
        devices,
        policy,
        residual,
        args.film.is_some(),
        &waiting,
        recording,
    )?;
    let realtime = realtime_text(&config, &launched);
    if launched.realtime_denied.is_some() {
        eprintln!("sinew: no real-time scheduling: {realtime}");
    }

    let mut episodes = Vec::new();
    let mut film = Film::default();
    let mut watch = Watch::new(args, config.control.rate_hz);
    let last = args.episodes.unwrap_or(u64::MAX);
    'run: for k in 0..last {
        for swap in [false, true] {
            if swap && !args.swap {
                continue;
            }
            if quit.load(Ordering::Relaxed) {
                break 'run;
            }
            let task = &config.policy.instruction;
            let queued = launched.robot.agenda.next();
            let told = queued.is_some();
            let instruction = queued.or_else(|| (!task.is_empty()).then(|| task.clone()));
            let seed = config.robot.seed.wrapping_add(k);
            let scene = SceneRequest { seed, instruction, swap };
            let plan = EpisodePlan { scene, told, time_limit: args.time_limit };
            let tally = Tally::of(episodes.iter());
            let robot = &mut launched.robot;
            // What was made before, such as the runs that were timed, belongs to no episode.
            if let Some(successes) = &successes {
                successes.episode.end(false);
            }
            let result = episode::play(robot, &plan, &quit, &mut |robot| {
                watch.look(robot, tally, supervision.as_ref());
                if args.film.is_some() && watch.film_due() {
                    film.add(assembly::frames(robot));
                }
            })?;
            if let Some(successes) = &successes {
                successes.episode.end(result.outcome == Outcome::Success);
            }
            // Plain numbers and names.
            let said = serde_json::to_value(&result).unwrap_or_default();
            launched.robot.recorder.note(Note::Episode(said));
            episodes.push(result);
        }
    }
    // The arm is held before anything ends; on Ctrl-C it stays where it is.
    if !quit.load(Ordering::Relaxed) && launched.robot.held.is_empty() {
        episode::go_home(&mut launched.robot, &quit, &mut |_| {})?;
    }
    if let Some(Successes { episode, file }) = &successes {
        episode.save(file).map_err(|e| Failure::Result(e.to_string()))?;
    }
    launched.robot.drain();
    let mut report = report(&launched, &config, &plan, realtime, episodes, supervision.as_ref());
    report.recording = launched.end();
    drop(launched);
    drop(supervision); // the arm's process, if it has one, saw the hold
    if let Some(file) = &args.film {
        film.save(file, FILM_ROWS).map_err(Failure::Result)?;
    }
    Ok(report)
}

/// A flag that Ctrl-C and SIGTERM set.
fn on_interrupt() -> Result<Arc<AtomicBool>, Failure> {
    let quit = Arc::new(AtomicBool::new(false));
    let pressed = quit.clone();
    ctrlc::set_handler(move || pressed.store(true, Ordering::Relaxed)).map_err(|e| {
        Failure::Run(RunError::System { what: "catching Ctrl-C", reason: e.to_string() })
    })?;
    Ok(quit)
}

/// What a person sees while it runs.
struct Watch {
    headless: bool,
    set_rate_hz: f64,
    next: Instant,
    cycles: u64,
    film_next: Instant,
}

impl Watch {
    fn new(args: &LaunchArgs, set_rate_hz: f64) -> Self {
        let next = Instant::now();
        Self { headless: args.headless, set_rate_hz, next, cycles: 0, film_next: next }
    }

    fn look(&mut self, robot: &Robot, tally: Tally, supervision: Option<&Supervision>) {
        let now = Instant::now();
        if self.headless || now < self.next {
            return;
        }
        let seconds = 1.0 + now.duration_since(self.next).as_secs_f64();
        self.next = now + Duration::from_secs(1);
        let before = std::mem::replace(&mut self.cycles, robot.monitor.cycles);
        let rate_hz =
            if before == 0 { self.set_rate_hz } else { (self.cycles - before) as f64 / seconds };
        let children = supervision.map(Supervision::figures).unwrap_or_default();
        let Monitor { authority, missed, chunk_latency, buffer_left, .. } = &robot.monitor;
        let status = StatusLine {
            instruction: &robot.instruction(),
            authority: authority.map_or("-", |a| a.name()),
            rate_hz,
            overruns: *missed,
            chunk: chunk_latency.quantiles(),
            buffer_ms: buffer_left.as_millis(),
            successes: (tally.success, tally.episodes),
            parts: &children,
        };
        eprintln!("{status}");
    }

    fn film_due(&mut self) -> bool {
        let due = Instant::now() >= self.film_next;
        if due {
            self.film_next = Instant::now() + FILM_PERIOD;
        }
        due
    }
}

fn realtime_text(config: &LaunchConfig, launched: &Launched) -> String {
    if let Some(denied) = &launched.realtime_denied {
        return denied.clone();
    }
    let memory = match &launched.memory_locked {
        Ok(()) => "memory locked".to_owned(),
        Err(why) => format!("memory not locked: {why}"),
    };
    match config.control.realtime {
        sinew_runtime::rt::RealtimeMode::Off => "off, as the launch file says".to_owned(),
        _ => format!("SCHED_FIFO {}, {memory}", config.control.priority),
    }
}

fn report(
    launched: &Launched,
    config: &LaunchConfig,
    plan: &Plan,
    realtime: String,
    episodes: Vec<EpisodeResult>,
    supervision: Option<&Supervision>,
) -> RunReport {
    let m = &launched.robot.monitor;
    let name = |joint: usize| plan.joints.get(joint).map_or("?", String::as_str);
    let by_name = |list: &BTreeMap<String, sinew_runtime::telemetry::Latencies>| {
        list.iter().map(|(k, v)| (k.clone(), v.quantiles())).collect()
    };
    RunReport {
        machine: Machine::this(),
        recording: None,
        policy: config.policy.file.display().to_string(),
        arguments: config.arguments.iter().map(|a| (a.name.clone(), a.value.clone())).collect(),
        realtime,
        simulation_skipped_ms: launched.simulation_skipped_ms(),
        held: launched.robot.held.clone(),
        parts: launched.robot.roster.all(),
        children: supervision.map(Supervision::figures).unwrap_or_default(),
        episodes,
        set_rate_hz: config.control.rate_hz,
        stream: launched.figures(),
        control: LoopFigures {
            cycles: m.cycles,
            missed: m.missed,
            lateness_us: m.lateness.quantiles(),
        },
        bare_clock: LoopFigures {
            cycles: m.bare_cycles,
            missed: m.bare_missed,
            lateness_us: m.bare_lateness.quantiles(),
        },
        cycle_work_us: m.work.quantiles(),
        dropped_commands: m.dropped,
        chunk_latency_us: m.chunk_latency.quantiles(),
        stages_us: m.stages.iter().map(|(k, v)| ((*k).to_owned(), v.quantiles())).collect(),
        ages_us: by_name(&m.ages),
        strategy: config.scheduler.strategy.name().to_owned(),
        margins: launched.margins,
        latency: launched.latency,
        denoise_steps: m
            .decisions
            .iter()
            .map(|((why, steps), n)| (format!("{steps} ({why})"), *n))
            .collect(),
        instructions: m.instructions.clone(),
        caches: m.caches.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect(),
        reach: m.reach,
        handover_us: m.handover.quantiles(),
        chunks: ChunkFigures {
            made: m.chunk_latency.quantiles().count,
            accepted: m.accepted,
            refused: m.refused.clone(),
            failed: m.failures.clone(),
            residual_refused: m.residual_refused.clone(),
            starvations: m.starvations,
            starved_cycles: m.starved_cycles,
            stale_state_holds: m.stale_stops,
        },
        interventions: m
            .interventions
            .iter()
            .map(|((joint, cause), n)| (format!("{}: {cause}", name(*joint)), *n))
            .collect(),
        sensors: launched.sensors(),
    }
}
