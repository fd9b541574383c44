//! `sinew bench cache`: what caches save and cost on the demo's camera streams.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use sinew_benches::cache::{self, CachePlan, CacheRow, Load};
use sinew_drivers::sim::ArmDescription;
use sinew_models::caches::{CacheOptions, DenoiserCache, VisionConfig};
use sinew_models::{LoadOptions, ModelError, load_policy};

use crate::bench_verbs::print_found;
use crate::cli::{Failure, say};
use crate::run::RunError;

/// `sinew bench cache`.
#[derive(Debug, Clone, Args)]
pub struct BenchCacheArgs {
    /// The policy: a bundle or checkpoint folder trained for the demo's arm.
    #[arg(default_value = "models/demo/demo.q8_0.gguf")]
    path: PathBuf,
    /// The schedule of the denoiser's cache, from `sinew calibrate cache`; without it that cache is left out.
    #[arg(long, value_name = "FILE")]
    denoiser: Option<PathBuf>,
    /// Similarities from which the vision cache keeps a patch, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [0.9999, 0.996, 0.98])]
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
    /// Episodes whose observations are streamed.
    #[arg(long, default_value_t = 4)]
    streams: u64,
    /// Episodes played with each choice of caches, on a virtual clock.
    #[arg(long, default_value_t = 20)]
    episodes: u64,
    /// Seed of the first scene.
    #[arg(long, default_value_t = 6_000_001)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] of loading or running.
pub fn run(args: &BenchCacheArgs) -> Result<(), Failure> {
    let load = |caches: CacheOptions| {
        move || {
            load_policy(
                &args.path,
                &LoadOptions { caches: caches.clone(), ..LoadOptions::default() },
            )
        }
    };
    let mut choices: Vec<(String, Box<Load<'_, ModelError>>)> =
        vec![("none".to_owned(), Box::new(load(CacheOptions::default())))];
    let mut add = |name: String, caches: CacheOptions| choices.push((name, Box::new(load(caches))));
    let denoiser = args.denoiser.clone().map(DenoiserCache::File);
    let warm_start = || Some(ArmDescription::desk_arm().kinds());
    if let Some(denoiser) = &denoiser {
        let denoiser = denoiser.clone();
        add("denoiser".to_owned(), CacheOptions { denoiser, ..CacheOptions::default() });
    }
    let warm = CacheOptions { warm_start: warm_start(), ..CacheOptions::default() };
    add("warm start".to_owned(), warm);
    let (refresh, halo, prefix) = (args.refresh, args.halo, args.prefix);
    let vision =
        |similarity| VisionConfig { similarity, refresh, halo, prefix, ..VisionConfig::default() };
    for similarity in &args.vision {
        let vision = Some(vision(*similarity));
        add(format!("vision {similarity}"), CacheOptions { vision, ..CacheOptions::default() });
    }
    if let (Some(denoiser), Some(similarity)) = (denoiser, args.vision.get(args.vision.len() / 2)) {
        let vision = Some(vision(*similarity));
        let both = CacheOptions { denoiser, vision, ..CacheOptions::default() };
        add(format!("denoiser, vision {similarity}"), both.clone());
        let all = CacheOptions { warm_start: warm_start(), ..both };
        add(format!("denoiser, vision {similarity}, warm start"), all);
    }
    let plan = CachePlan {
        streams: args.streams.max(1),
        episodes: args.episodes,
        seed: args.seed,
        latency: Duration::from_millis(100),
    };
    let exact = load(CacheOptions::default());
    let mut said = |name: &str| eprintln!("{name} …");
    let rows = cache::measure(&plan, &exact, &choices, &mut said).map_err(|e| match e {
        cache::CacheError::Load(e) => Failure::from(e),
        cache::CacheError::Run(e) => Failure::Run(RunError::Policy(e)),
    })?;
    if args.json {
        return print_found("cache", &rows);
    }
    table(&rows);
    Ok(())
}

fn table(rows: &[CacheRow]) {
    say!(
        "| caches | time | vision | prefix | denoise | reused | mean error | p99 | max | mean of range | success |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let stage = |name: &str| row.stages.get(name).copied().unwrap_or(1.0);
        let reused = row.reused.iter().filter(|(_, share)| **share > 0.0);
        let reused: Vec<String> =
            reused.map(|(name, share)| format!("{name} {:.0} %", 100.0 * share)).collect();
        say!(
            "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {:.5} | {:.5} | {:.5} | {:.2} % | {} of {} |",
            row.name,
            row.time,
            stage("vision"),
            stage("prefix"),
            stage("denoise"),
            reused.join(", "),
            row.mean,
            row.p99,
            row.max,
            100.0 * row.mean_relative,
            row.successes,
            row.episodes
        );
    }
}
