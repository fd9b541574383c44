//! `sinew bench cache`: what caches save and cost on the demo's camera streams.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;
use sinew_benches::cache::{self, CachePlan, CacheRow, Choice};
use sinew_benches::observed;
use sinew_drivers::sim::ArmDescription;
use sinew_models::caches::{CacheOptions, CompareConfig, DenoiserCache, VisionConfig};
use sinew_models::exits::EarlyExit;
use sinew_models::kernels::Compute;
use sinew_models::{LoadOptions, ModelError, load_policy};
use sinew_runtime::Policy;

use crate::bench_verbs::{choose, found_json, print_found, print_machine, write_files};
use crate::cli::{Failure, KernelArgs, say};
use crate::recorded::{self, Recorded};
use crate::run::RunError;

/// `sinew bench cache`.
#[derive(Debug, Clone, Args)]
pub struct BenchCacheArgs {
    /// The policy: a bundle or checkpoint folder; without recordings one trained for the demo's arm.
    #[arg(default_value = "models/demo/demo.q8_0.gguf")]
    path: PathBuf,
    /// The schedule of the denoiser's cache, from `sinew calibrate cache`; without it that cache is left out.
    #[arg(long, value_name = "FILE")]
    denoiser: Option<PathBuf>,
    /// Thresholds of early exits, from `sinew calibrate exit`; without it these are left out.
    #[arg(long, value_name = "FILE")]
    exit: Option<PathBuf>,
    /// Similarities from which the vision cache keeps a patch, separated by commas; the middle one is combined with the
    /// other caches. None: the policy has no such cache.
    #[arg(long, value_delimiter = ',', num_args = 0.., default_values_t = [0.9999, 0.996, 0.98])]
    vision: Vec<f64>,
    /// Inferences from one whole picture to the next.
    #[arg(long, default_value_t = 10)]
    refresh: u32,
    /// Keep tokens of the prefix that did not change, too.
    #[arg(long)]
    prefix: bool,
    /// Patches around a changed one that count as changed.
    #[arg(long, default_value_t = 0)]
    halo: usize,
    /// How its layers compute: `exact`, or `w8a8` (8-bit weights and activations).
    #[arg(long, default_value = "exact")]
    compute: Compute,
    /// What is measured beside: the policy without caches that computes as it does (same), or in 32-bit floats (exact).
    #[arg(long, value_enum, default_value_t = Beside::Same)]
    beside: Beside,
    /// Stream the observations of these recordings.
    #[arg(long, value_name = "FILE.mcap", num_args = 1..)]
    recordings: Vec<PathBuf>,
    /// Cameras, separated by commas, as the policy's name = that of the recorded robot; without it as recorded.
    #[arg(long, value_name = "POLICY=ROBOT", value_delimiter = ',', value_parser = recorded::camera,
          requires = "recordings")]
    cameras: Vec<(String, String)>,
    /// Stream at most so many chunks of each recording.
    #[arg(long, value_name = "COUNT", requires = "recordings")]
    chunks: Option<usize>,
    /// Without recordings: episodes of the demo whose observations are streamed.
    #[arg(long, default_value_t = 4)]
    streams: u64,
    /// Episodes of the demo played with each choice of caches, on a virtual clock; none with recordings.
    #[arg(long, default_value_t = 20)]
    episodes: u64,
    /// Seed of the first scene.
    #[arg(long, default_value_t = 6_000_001)]
    seed: u64,
    /// Every so many chunks the error is taken to be known; it states the bound for the others, once there are five.
    #[arg(long, value_name = "CHUNKS", default_value_t = 4)]
    compared: usize,
    /// Also all caches with one chunk in so many made a second time without them, as `cache_compare` does.
    #[arg(long, value_name = "CHUNKS")]
    compare: Option<u32>,
    /// Write cache.csv, cache.json and cache.svg there.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    kernels: KernelArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What caches are measured beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Beside {
    /// The policy that computes as they do.
    Same,
    /// The policy in 32-bit floats.
    Exact,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] of loading, running or writing.
pub fn run(args: &BenchCacheArgs) -> Result<(), Failure> {
    choose(&args.kernels)?;
    let recorded = match args.recordings.is_empty() {
        true => None,
        false => Some(Recorded::read(&args.recordings, &args.cameras)?),
    };
    let load = |compute: Compute, caches: &CacheOptions| {
        let options = LoadOptions { compute, caches: caches.clone(), ..LoadOptions::default() };
        let policy = load_policy(&args.path, &options)?;
        Ok::<_, ModelError>(match &recorded {
            Some(recorded) => recorded.seen_by(policy),
            None => policy,
        })
    };
    let streams = match &recorded {
        Some(recorded) => {
            let most = args.chunks.unwrap_or(usize::MAX);
            let first = |s: &Vec<_>| s.iter().take(most).cloned().collect();
            recorded.streams.iter().map(first).collect()
        }
        None => {
            let mut player = load(Compute::default(), &CacheOptions::default())?;
            let seeds = (0..args.streams.max(1)).map(|n| args.seed.wrapping_add(n));
            let played = seeds.map(|seed| observed::episode(player.as_mut(), seed));
            played.collect::<Result<_, _>>().map_err(RunError::Policy)?
        }
    };
    let choices: Vec<Choice<'_, ModelError>> = choices(args)
        .into_iter()
        .map(|(name, series, compute, caches)| {
            let load = move || -> Result<Box<dyn Policy>, ModelError> { load(compute, &caches) };
            Choice { name, series, load: Box::new(load) }
        })
        .collect();
    let plan = CachePlan {
        streams,
        compared: args.compared,
        episodes: if recorded.is_some() { 0 } else { args.episodes },
        seed: args.seed,
        latency: Duration::from_millis(100),
    };
    let mut said = |what: &str| eprint!("\r{what}          ");
    let rows = cache::measure(&plan, &choices, &mut said);
    eprintln!();
    let rows = rows.map_err(|e| match e {
        cache::CacheError::Load(e) => Failure::from(e),
        cache::CacheError::Run(e) => Failure::Run(RunError::Policy(e)),
    })?;
    if let Some(folder) = &args.out {
        write(folder, args, &rows)?;
    }
    if args.json {
        return print_found("cache", &rows);
    }
    print_machine();
    table(&rows);
    Ok(())
}

/// The choices: name, series, how the layers compute, and the caches. The first is what the others are measured beside.
fn choices(args: &BenchCacheArgs) -> Vec<(String, String, Compute, CacheOptions)> {
    let none = CacheOptions::default();
    let mut all = Vec::new();
    let mut add = |name: &str, series: &str, caches: CacheOptions| {
        all.push((name.to_owned(), series.to_owned(), args.compute, caches));
    };
    add("none", "none", none.clone());
    let denoiser = args.denoiser.clone().map(DenoiserCache::File);
    let warm_start = Some(ArmDescription::desk_arm().kinds());
    if let Some(denoiser) = &denoiser {
        let denoiser = denoiser.clone();
        add("denoiser", "denoiser", CacheOptions { denoiser, ..none.clone() });
    }
    if let Some(file) = &args.exit {
        let early_exit = EarlyExit::File(file.clone());
        add("early exit", "early exit", CacheOptions { early_exit, ..none.clone() });
    }
    let warm = CacheOptions { warm_start: warm_start.clone(), ..none.clone() };
    add("warm start", "warm start", warm);
    let (refresh, halo, prefix) = (args.refresh, args.halo, args.prefix);
    let vision = |similarity| {
        let config = VisionConfig { similarity, refresh, halo, prefix, ..VisionConfig::default() };
        CacheOptions { vision: Some(config), ..CacheOptions::default() }
    };
    for similarity in &args.vision {
        add(&format!("vision {similarity}"), "vision", vision(*similarity));
    }
    if let (Some(denoiser), Some(similarity)) = (denoiser, args.vision.get(args.vision.len() / 2)) {
        let both = CacheOptions { denoiser, ..vision(*similarity) };
        add(&format!("denoiser, vision {similarity}"), "combined", both.clone());
        if let Some(every) = args.compare {
            let compare = Some(CompareConfig { every: every.max(1), limit: f64::MAX });
            let name = format!("denoiser, vision {similarity}, compared 1 in {every}");
            add(&name, "compared", CacheOptions { compare, ..both.clone() });
        }
        let all = CacheOptions { warm_start, ..both };
        add(&format!("denoiser, vision {similarity}, warm start"), "combined", all);
    }
    if args.beside == Beside::Exact && args.compute != Compute::default() {
        let exact = "32-bit floats, none".to_owned();
        all.insert(0, (exact.clone(), exact, Compute::default(), none));
    }
    all
}

/// Writes the table and the plot into `folder`.
fn write(folder: &Path, args: &BenchCacheArgs, rows: &[CacheRow]) -> Result<(), Failure> {
    let name = args.path.file_name().unwrap_or(args.path.as_os_str()).to_string_lossy();
    let told = json!({"policy": name, "compute": args.compute.name(), "rows": rows});
    let told = found_json("cache", &told)?;
    let title = format!("{name}, {}: what caches save and cost", args.compute.name());
    let files = [
        ("cache.csv", cache::csv(rows)),
        ("cache.json", told + "\n"),
        ("cache.svg", cache::plot(rows, &title).svg()),
    ];
    write_files(folder, files.map(|(file, text)| (file.to_owned(), text)).into())
}

fn table(rows: &[CacheRow]) {
    say!(
        "| caches | time | median | vision | prefix | denoise | reused | mean of range | p99 of range | bound | above it | \
         success |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let stage = |name: &str| row.stages.get(name).copied().unwrap_or(1.0);
        let reused = row.reused.iter().filter(|(_, share)| **share > 0.0);
        let reused: Vec<String> =
            reused.map(|(name, share)| format!("{name} {:.0} %", 100.0 * share)).collect();
        let percent =
            |share: Option<f64>| share.map_or("-".to_owned(), |s| format!("{:.2} %", 100.0 * s));
        say!(
            "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {} | {} | {} | {} | {} of {} |",
            row.name,
            row.time,
            row.time_p50,
            stage("vision"),
            stage("prefix"),
            stage("denoise"),
            reused.join(", "),
            percent(Some(row.mean_relative)),
            percent(Some(row.p99_relative)),
            percent(row.bound),
            percent(row.above_bound),
            row.successes,
            row.episodes
        );
    }
}
