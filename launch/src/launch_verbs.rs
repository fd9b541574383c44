//! `sinew launch` and `sinew check`.

use std::path::Path;
use std::process::ExitCode;

use crate::cli::{CheckArgs, Failure, LaunchArgs, print, print_json, say};
use crate::launch_file::{Finding, Findings, LaunchConfig, load, load_part};
use crate::prepare::{Unprepared, prepare};
use crate::run::{self, Part, Placement, Recording};

/// Runs what the launch file says.
///
/// # Errors
/// [`Failure`]; nothing half-started is left behind.
pub fn launch(args: &LaunchArgs) -> Result<ExitCode, Failure> {
    if let Some(offset) = args.clock_offset {
        sinew_runtime::Clock::adopt(offset);
    }
    let policy_here = args.only.is_empty() || args.only.iter().any(|p| p == "policy");
    let config = load_part(&args.file, &args.arguments, policy_here)?;
    if args.parent.is_none() {
        print_arguments(&config);
    }
    let placement = Placement::new(&config, &args.only)?;
    let prepared = prepare(config, placement)?;
    if !prepared.plan.placement.here(&Part::Control) {
        run::run_only(prepared, args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let recording =
        Recording::open(&prepared.config, args.record.as_deref()).map_err(Failure::Result)?;
    for file in [&args.json, &args.film].into_iter().flatten().filter(|f| **f != Path::new("-")) {
        writable(file)?;
    }
    let json = args.json.clone();
    let report = run::run(prepared, args, recording)?;
    match json.as_deref() {
        Some(file) if file == Path::new("-") => print_json(&report)?,
        Some(file) => {
            let text = serde_json::to_string_pretty(&report)
                .map_err(|e| Failure::Result(e.to_string()))?;
            std::fs::write(file, text)
                .map_err(|e| Failure::Result(format!("{}: {e}", file.display())))?;
            print(&report.render());
        }
        None => print(&report.render()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Reports every mistake of the launch file and of what it names.
///
/// # Errors
/// [`Failure::Launch`] or [`Failure::Model`] when there are mistakes.
pub fn check(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let checked = load(&args.file, &args.arguments).map_err(Failure::from).and_then(|config| {
        let placement = Placement::all_here(&config);
        let prepared = prepare(config, placement)?;
        Ok(prepared.config)
    });
    match checked {
        Ok(config) if args.json => print_json(&config)?,
        Ok(config) => {
            print_arguments(&config);
            say!("{}: nothing is wrong", args.file.display());
        }
        Err(Failure::Launch(Findings(findings))) if args.json => {
            print_json(&findings)?;
            return Ok(Failure::Launch(Findings(findings)).exit_code());
        }
        Err(Failure::Model(error)) if args.json => {
            let finding = Finding::of_file(&args.file, &error, "give another policy:=FILE");
            print_json(&[finding])?;
            return Ok(Failure::Model(error).exit_code());
        }
        Err(failure) => return Err(failure),
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds out before the run whether its result can be written.
fn writable(file: &Path) -> Result<(), Failure> {
    let opened = std::fs::File::options().create(true).append(true).open(file);
    opened.map(|_| ()).map_err(|e| Failure::Result(format!("{}: {e}", file.display())))
}

/// One line: every argument, its value and where that came from.
fn print_arguments(config: &LaunchConfig) {
    let list: Vec<_> = config
        .arguments
        .iter()
        .map(|a| {
            format!("{}:={:?} ({})", a.name, a.value, if a.given { "given" } else { "default" })
        })
        .collect();
    eprintln!("{}  {}", config.file.display(), list.join("  "));
}

impl From<Unprepared> for Failure {
    fn from(error: Unprepared) -> Self {
        match error {
            Unprepared::Launch(findings) => Failure::Launch(findings),
            Unprepared::Model(error) => Failure::Model(error),
        }
    }
}
