//! `sinew bench cost`: what cameras, denoise steps and chunk length cost.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use sinew_benches::cost::{self, Axis, CostError, CostPlan, CostPoint, CostProfile, WHOLE};
use sinew_models::kernels::Compute;
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::Policy;
use tempfile::TempDir;

use crate::bench_verbs::{
    INSTRUCTION, choose, found_json, print_found, print_machine, write_files,
};
use crate::cli::{Failure, KernelArgs, say};
use crate::run::RunError;

/// `sinew bench cost`.
#[derive(Debug, Clone, Args)]
pub struct BenchCostArgs {
    /// Checkpoint folder of a policy whose weights fit every chunk length (SmolVLA, π).
    path: PathBuf,
    /// Numbers of cameras, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3, 4])]
    cameras: Vec<usize>,
    /// Numbers of denoise steps.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 5, 10, 20])]
    steps: Vec<usize>,
    /// Chunk lengths.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 25, 50, 100])]
    chunks: Vec<usize>,
    /// Cameras, steps and chunk length from which one is varied at a time.
    #[arg(long, num_args = 3, default_values_t = [2, 10, 50])]
    base: Vec<usize>,
    /// Times that each is measured.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Width and height of the cameras' images.
    #[arg(long, num_args = 2, default_values_t = [512, 512])]
    image: Vec<usize>,
    /// How layers compute: `exact`, or `w8a8` (8-bit weights and activations).
    #[arg(long, default_value = "exact")]
    compute: Compute,
    /// Where and with what the kernels run.
    #[command(flatten)]
    kernels: KernelArgs,
    /// Write cost.csv, cost.json and plots into this folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] of loading, running or writing.
pub fn run(args: &BenchCostArgs) -> Result<(), Failure> {
    choose(&args.kernels)?;
    let plan = CostPlan {
        cameras: args.cameras.clone(),
        steps: args.steps.clone(),
        chunks: args.chunks.clone(),
        base: CostPoint { cameras: args.base[0], steps: args.base[1], chunk: args.base[2] },
        rounds: args.rounds.max(1),
        image: [args.image[0], args.image[1]],
        instruction: INSTRUCTION.to_owned(),
    };
    let points = plan.points();
    if points.iter().any(|p| p.cameras == 0 || p.steps == 0 || p.chunk == 0) {
        let text = "cameras, steps and chunk lengths begin at 1";
        return Err(Failure::Result(text.to_owned()));
    }
    let load = |cameras: usize, chunk: usize| -> Result<Box<dyn Policy>, Failure> {
        let variant = variant(&args.path, cameras, chunk)?;
        let options = LoadOptions {
            action_rate_hz: Some(30.0),
            compute: args.compute,
            ..LoadOptions::default()
        };
        // Weights are mapped or packed by now: the folder may go.
        Ok(load_policy(variant.path(), &options)?)
    };
    let mut said = |text: &str| eprintln!("{text} …");
    let profile = cost::measure(&plan, args.compute, &load, &mut said).map_err(|e| match e {
        CostError::Load(e) => e,
        CostError::Run(e) => Failure::Run(RunError::Policy(e)),
        CostError::Other { wanted, cameras, chunk } => Failure::Result(format!(
            "{}: for {} cameras and chunks of {} it gave a policy with {cameras} and {chunk}",
            args.path.display(),
            wanted.cameras,
            wanted.chunk
        )),
    })?;
    if let Some(folder) = &args.out {
        write(folder, args, &profile)?;
    }
    if args.json {
        return print_found("cost", &profile);
    }
    print_machine();
    table(&profile);
    Ok(())
}

/// A folder that is the checkpoint `from`, by links, but for the cameras and the chunk length in its `config.json`.
fn variant(from: &Path, cameras: usize, chunk: usize) -> Result<TempDir, Failure> {
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| Failure::Result(format!("{path}: {e}"))
    };
    let folder = TempDir::new().map_err(io(&std::env::temp_dir()))?;
    let from = from.canonicalize().map_err(io(from))?;
    if !from.is_dir() {
        let text = "is no checkpoint folder; `sinew bench cost` changes a folder's config.json";
        return Err(Failure::Result(format!("{}: {text}", from.display())));
    }
    for entry in std::fs::read_dir(&from).map_err(io(&from))? {
        let entry = entry.map_err(io(&from))?;
        if entry.file_name() != "config.json" {
            let link = folder.path().join(entry.file_name());
            std::os::unix::fs::symlink(entry.path(), &link).map_err(io(&link))?;
        }
    }
    let file = from.join("config.json");
    let text = std::fs::read_to_string(&file).map_err(io(&file))?;
    let wrong = |reason: String| Failure::Result(format!("{}: {reason}", file.display()));
    let mut config: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    vary(&mut config, cameras, chunk).map_err(wrong)?;
    let file = folder.path().join("config.json");
    std::fs::write(&file, config.to_string()).map_err(io(&file))?;
    Ok(folder)
}

/// Sets the chunk length, and adds or removes cameras until there are `cameras`.
fn vary(config: &mut Value, cameras: usize, chunk: usize) -> Result<(), String> {
    for key in ["chunk_size", "n_action_steps"] {
        let value = config.get_mut(key);
        *value.ok_or_else(|| {
            format!("there is no key `{key}`; SmolVLA and π checkpoints have it")
        })? = json!(chunk);
    }
    let inputs = config.get_mut("input_features").and_then(Value::as_object_mut);
    let inputs = inputs.ok_or("there is no table `input_features`")?;
    let visual = |value: &Value| value["type"] == "VISUAL";
    let have: Vec<String> =
        inputs.iter().filter(|(_, v)| visual(v)).map(|(k, _)| k.clone()).collect();
    let one = have.first().and_then(|name| inputs.get(name)).cloned();
    let one = one.ok_or("`input_features` names no camera (`type`: `VISUAL`)")?;
    for surplus in have.iter().skip(cameras) {
        inputs.remove(surplus);
    }
    for index in have.len()..cameras {
        inputs.insert(format!("observation.images.added{index}"), one.clone());
    }
    Ok(())
}

/// Writes table, figures and plots into `folder`.
fn write(folder: &Path, args: &BenchCostArgs, profile: &CostProfile) -> Result<(), Failure> {
    let name = args.path.file_name().unwrap_or(args.path.as_os_str()).to_string_lossy();
    let CostPoint { cameras, steps, chunk } = profile.base;
    let of = |axis: Axis| match axis {
        Axis::Cameras => format!("{steps} steps, {chunk} actions"),
        Axis::Steps => format!("{cameras} cameras, {chunk} actions"),
        Axis::Chunk => format!("{cameras} cameras, {steps} steps"),
    };
    let mut files = vec![
        ("cost.csv".to_owned(), csv(profile)),
        ("cost.json".to_owned(), found_json("cost", profile)? + "\n"),
    ];
    for axis in Axis::ALL {
        let title =
            format!("{name}, {}, {} threads: {}", profile.compute, profile.threads, of(axis));
        files.push((format!("cost_{}.svg", axis.name()), profile.plot(axis, &title).svg()));
    }
    write_files(folder, files)
}

fn csv(profile: &CostProfile) -> String {
    let stages: Vec<&String> = profile.models.keys().collect();
    let mut out = "cameras,steps,chunk".to_owned();
    for stage in &stages {
        out += &format!(",{stage}_min_ms,{stage}_p50_ms");
    }
    out += ",model_ms,residual\n";
    for row in &profile.rows {
        let CostPoint { cameras, steps, chunk } = row.point;
        out += &format!("{cameras},{steps},{chunk}");
        for stage in &stages {
            match row.times_ms.get(*stage) {
                Some(s) => out += &format!(",{:.3},{:.3}", s.min, s.p50),
                None => out += ",,",
            }
        }
        out += &format!(",{:.3},{:.4}\n", row.model_ms, row.residual);
    }
    out
}

fn table(profile: &CostProfile) {
    let stages: Vec<&String> = profile.models.keys().filter(|s| *s != WHOLE).collect();
    let names = |sep: &str| stages.iter().map(|s| format!(" {s}{sep}")).collect::<String>();
    say!(
        "{}, {}, {} threads; shortest of {} (ms)",
        profile.compute,
        profile.isa,
        profile.threads,
        profile.rounds
    );
    say!("| cameras | steps | actions |{} chunk | median | model | off |", names(" |"));
    say!("| --- | --- | --- |{} --- | --- | --- | --- |", " --- |".repeat(stages.len()));
    for row in &profile.rows {
        let at = |stage: &str, median: bool| {
            row.times_ms.get(stage).map_or(f64::NAN, |s| if median { s.p50 } else { s.min })
        };
        let each: String = stages.iter().map(|s| format!(" {:.1} |", at(s, false))).collect();
        let CostPoint { cameras, steps, chunk } = row.point;
        say!(
            "| {cameras} | {steps} | {chunk} |{each} {:.1} | {:.1} | {:.1} | {:+.1} % |",
            at(WHOLE, false),
            at(WHOLE, true),
            row.model_ms,
            100.0 * row.residual
        );
    }
    say!("");
    say!(
        "| linear model (ms) | fixed | camera | step | step x camera | step x action | off, mean | worst |"
    );
    say!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (stage, m) in &profile.models {
        say!(
            "| {stage} | {:.2} | {:.2} | {:.2} | {:.3} | {:.4} | {:.1} % | {:.1} % |",
            m.fixed,
            m.camera,
            m.step,
            m.step_camera,
            m.step_action,
            100.0 * m.mean_residual,
            100.0 * m.worst_residual
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_has_its_cameras_and_chunk_length() {
        let camera = json!({ "type": "VISUAL", "shape": [3, 8, 8] });
        let mut config = json!({
            "chunk_size": 50, "n_action_steps": 50, "n": 1,
            "input_features": { "observation.images.a": camera, "observation.state": { "type": "STATE" } },
        });
        vary(&mut config, 3, 7).expect("it has all keys");
        let inputs = config["input_features"].as_object().expect("a table");
        assert_eq!(inputs.values().filter(|v| **v == camera).count(), 3);
        assert_eq!((&config["chunk_size"], &config["n"]), (&json!(7), &json!(1)));
        vary(&mut config, 1, 9).expect("it has all keys");
        let inputs = config["input_features"].as_object().expect("a table");
        assert!(inputs.len() == 2 && inputs.contains_key("observation.images.a"));
        let mut none = json!({ "chunk_size": 1 });
        assert!(vary(&mut none, 1, 1).is_err_and(|e| e.contains("`n_action_steps`")));
        let mut blind = json!({ "chunk_size": 1, "n_action_steps": 1, "input_features": {} });
        assert!(vary(&mut blind, 1, 1).is_err_and(|e| e.contains("camera")));
    }

    #[test]
    fn a_bundle_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let refused = variant(file.path(), 1, 1).map(drop);
        assert!(refused.is_err_and(|e| e.to_string().contains("no checkpoint folder")));
    }
}
