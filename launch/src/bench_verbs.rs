//! `sinew bench …`: measures and prints.

use std::path::Path;

use serde::Serialize;
use sinew_benches::kernels::KernelProfile;
use sinew_benches::policy::PolicyCase;
use sinew_benches::seams::{self, SeamPlan, SeamRow};
use sinew_benches::{Spread, control, policy};
use sinew_models::LoadOptions;
use sinew_models::kernels::Isa;
use sinew_models::kernels::pool::{Threads, choose_threads};
use sinew_runtime::scheduler::strategy::StrategyConfig;

use crate::cli::{BenchVerb, Failure, KernelArgs, say};
use crate::report::Machine;
use crate::run::RunError;
use crate::{bench_authority, bench_cache, bench_cost, bench_stream, bench_tail};

/// What a policy is told while its time is measured.
pub(crate) const INSTRUCTION: &str = "put the red cube in the left bin";

/// Does what `verb` says.
///
/// # Errors
/// [`Failure`] of loading or running.
pub fn run(verb: BenchVerb) -> Result<(), Failure> {
    match verb {
        BenchVerb::Policy {
            path,
            iterations,
            warmup,
            cameras,
            image,
            denoise_steps,
            compute,
            kernels,
            json,
        } => {
            choose(&kernels)?;
            let mut loaded = sinew_models::load_policy(
                &path,
                &LoadOptions { action_rate_hz: Some(30.0), compute, ..LoadOptions::default() },
            )?;
            let case = PolicyCase {
                iterations: iterations.max(1),
                warmup,
                cameras,
                image: [image[0], image[1]],
                denoise_steps,
                instruction: INSTRUCTION.to_owned(),
            };
            let profile =
                policy::profile(loaded.as_mut(), &case, compute).map_err(RunError::Policy)?;
            if json {
                return print_found("policy", &profile);
            }
            print_machine();
            say!(
                "{}: {} cameras, {} chunks; {:.0} MB resident, peak {:.0} MB; {:.0} ms of processor time a chunk",
                path.display(),
                profile.cameras,
                profile.iterations,
                profile.rss_mb,
                profile.peak_rss_mb,
                profile.cpu_ms
            );
            say!("  {:<12} {:>9} {:>9} {:>9} {:>9} {:>9}", "ms", "min", "p50", "p90", "p99", "max");
            print_row("chunk", &profile.chunk_ms);
            for (stage, spread) in &profile.stages_ms {
                print_row(stage, spread);
            }
            say!(
                "  kernels: {}, {}, {} threads; measured peak {:.0} GFLOP/s in f32, {:.0} held",
                profile.compute,
                profile.isa,
                profile.threads,
                profile.peak_gflops,
                profile.held_gflops
            );
            for (what, work) in [("layers", profile.layers), ("attention", profile.attention)] {
                say!(
                    "  {what:<12} {:>9.1} ms a chunk, {:.0} GOP/s, {:.0} % of the peak, {:.0} % of what was held",
                    work.ms,
                    work.gops,
                    work.of_peak * 100.0,
                    work.of_held * 100.0
                );
            }
        }
        BenchVerb::Kernels { filter, rounds, kernels, json } => {
            choose(&kernels)?;
            let profile = sinew_benches::kernels::profile(&filter, rounds.max(1))
                .map_err(|e| Failure::Result(e.to_string()))?;
            if json {
                return print_found("kernels", &profile);
            }
            print_machine();
            print_kernels(&profile);
        }
        BenchVerb::Cache(args) => return bench_cache::run(&args),
        BenchVerb::Cost(args) => return bench_cost::run(&args),
        BenchVerb::Tail(args) => return bench_tail::run(&args),
        BenchVerb::Busy => bench_tail::busy(),
        BenchVerb::Seams {
            path,
            compute,
            strategies,
            latencies,
            episodes,
            seed,
            execution_horizon,
            guidance_horizon,
            guidance_weight,
            json,
        } => {
            let options = LoadOptions { compute, ..LoadOptions::default() };
            let load = || sinew_models::load_policy(&path, &options);
            let spec = load()?.spec().clone();
            let mut strategies: Vec<StrategyConfig> = match strategies.is_empty() {
                true => StrategyConfig::ALL.into_iter().filter(|s| spec.supports(*s)).collect(),
                false => strategies,
            };
            if let Some(foreign) = strategies.iter().find(|s| !spec.supports(**s)) {
                return Err(Failure::Result(format!(
                    "the head of {} does not support the strategy `{}`",
                    path.display(),
                    foreign.name()
                )));
            }
            for strategy in &mut strategies {
                if let StrategyConfig::RtcGuided { max_weight, horizon, .. } = strategy {
                    (*max_weight, *horizon) = (guidance_weight, guidance_horizon);
                }
            }
            let threads = std::thread::available_parallelism().map_or(1, Into::into);
            let plan = SeamPlan {
                strategies,
                latencies,
                episodes: episodes.max(1),
                seed,
                execution_horizon,
                threads,
            };
            let progress = |done, all| eprint!("\r{done} of {all} cells ");
            let rows = seams::measure(&plan, &load, &progress);
            eprintln!();
            let rows = rows.map_err(|e| match e {
                seams::SeamError::Load(e) => Failure::from(e),
                seams::SeamError::Run(e) => Failure::Run(RunError::Policy(e)),
            })?;
            if json {
                return print_found("seams", &rows);
            }
            print_machine();
            print_seams(&plan, &rows);
        }
        BenchVerb::Stream { rate, time, scheduling, priority, cpu, idle, json } => {
            let wanted = bench_stream::Wanted { rate, time, scheduling, priority, cpu, idle, json };
            return bench_stream::run(&wanted);
        }
        BenchVerb::StreamSubscriber { endpoint, period_ns, priority } => {
            let period = std::time::Duration::from_nanos(period_ns);
            return bench_stream::subscribe(&endpoint, period, priority);
        }
        BenchVerb::Authority { rate, drivers, stops, takeovers, json } => {
            return bench_authority::run(rate, drivers, stops, takeovers, json);
        }
        BenchVerb::Control { joints, cycles, json } => {
            let cases = control::profile(joints, cycles).map_err(RunError::Guard)?;
            if json {
                return print_found("control", &cases);
            }
            print_machine();
            let head = format!("us, {joints} joints, {cycles} cycles of 1 ms");
            say!("  {head:<34} {:>8} {:>8} {:>8} {:>8}", "p50", "p99", "p99.9", "max");
            for control::ControlCase { case, what, times_us: q } in cases {
                say!(
                    "  control/{case:<26} {:>8.2} {:>8.2} {:>8.2} {:>8.2}  {what}",
                    q.p50,
                    q.p99,
                    q.p999,
                    q.max
                );
            }
        }
    }
    Ok(())
}

/// Chooses instruction set and threads of the kernels.
pub(crate) fn choose(args: &KernelArgs) -> Result<(), Failure> {
    if let Some(name) = &args.isa {
        let isa = Isa::from_name(name).filter(|isa| isa.choose());
        if isa.is_none() {
            let here = Isa::ALL.into_iter().filter(|isa| isa.available()).map(Isa::name);
            let here: Vec<_> = here.collect();
            return Err(Failure::Result(format!(
                "`{name}` is no instruction set of this machine; it has {}",
                here.join(", ")
            )));
        }
    }
    let threads = Threads { count: args.threads, cores: args.cores.clone() };
    Ok(choose_threads(threads)?)
}

fn print_kernels(profile: &KernelProfile) {
    say!(
        "{}, {} threads; measured peak {:.0} GFLOP/s in f32",
        profile.isa,
        profile.threads,
        profile.peak_gflops
    );
    say!(
        "  {:<26} {:>18} {:<14} {:>8} {:>8} {:>8} {:>8}",
        "product",
        "rows x in x out",
        "form",
        "GOP/s",
        "best",
        "x f32",
        "of peak"
    );
    for row in &profile.rows {
        let [m, k, n] = row.sizes;
        say!(
            "  {:<26} {:>18} {:<14} {:>8.0} {:>8.0} {:>8.2} {:>7.0}%",
            row.shape,
            format!("{m}x{k}x{n}"),
            row.form,
            row.gops,
            row.best_gops,
            row.against_f32,
            row.of_peak * 100.0
        );
    }
}

fn print_seams(plan: &SeamPlan, rows: &[SeamRow]) {
    say!(
        "{} episodes each, execution horizon {}; jerk in shares of the joint's limit",
        plan.episodes,
        plan.execution_horizon
    );
    say!(
        "  {:<18} {:>8} {:>9} {:>9} {:>10} {:>12} {:>9} {:>8} {:>8}",
        "strategy",
        "latency",
        "success",
        "time",
        "seam jerk",
        "seam dv",
        "rms jerk",
        "guarded",
        "starved"
    );
    for row in rows {
        let time = row.seconds.map_or("-".to_owned(), |s| format!("{s:.1} s"));
        say!(
            "  {:<18} {:>5} ms {:>7.1} % {:>9} {:>10.3} {:>6.3} rad/s {:>9.4} {:>6.1} % {:>6.1} %",
            row.strategy,
            row.latency_ms,
            100.0 * row.successes as f64 / row.episodes as f64,
            time,
            row.seam_jerk,
            row.seam_velocity_step,
            row.rms_jerk,
            100.0 * row.guarded,
            100.0 * row.starved
        );
    }
}

/// Prints the machine that figures were measured on.
pub(crate) fn print_machine() {
    say!("{}", Machine::this());
}

/// Prints what `bench` found as JSON, with the machine that it was found on.
pub(crate) fn print_found<T: Serialize>(bench: &str, found: &T) -> Result<(), Failure> {
    say!("{}", found_json(bench, found)?);
    Ok(())
}

/// What [`print_found`] prints.
pub(crate) fn found_json<T: Serialize>(bench: &str, found: &T) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Found<'a, T> {
        bench: &'a str,
        machine: Machine,
        found: &'a T,
    }
    let found = Found { bench, machine: Machine::this(), found };
    serde_json::to_string_pretty(&found).map_err(|e| Failure::Result(e.to_string()))
}

/// Writes a bench's files, each a name and its text, into `folder`.
pub(crate) fn write_files(folder: &Path, files: Vec<(String, String)>) -> Result<(), Failure> {
    let failed =
        |path: &Path, e: std::io::Error| Failure::Result(format!("{}: {e}", path.display()));
    std::fs::create_dir_all(folder).map_err(|e| failed(folder, e))?;
    for (file, text) in files {
        let file = folder.join(file);
        std::fs::write(&file, text).map_err(|e| failed(&file, e))?;
    }
    Ok(())
}

fn print_row(name: &str, s: &Spread) {
    say!("  {name:<12} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}", s.min, s.p50, s.p90, s.p99, s.max);
}
