//! `sinew replay`: computes a recorded run again and says whether the same came out.
//!
//! The control core is rebuilt from the recorded configuration and driven by the recorded events and stamps; the
//! policy runs again on the recorded observations, and its new chunks, not the recorded ones, go to the core.

mod again;
mod compare;
mod exact;
mod figures;
mod report;
mod sensors;
mod what_if;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::action_space::InJoints;
use sinew_runtime::blackbox::{Entry, Header, Images, Recording};
use sinew_runtime::control::{ControlConfig, ControlCore};
use sinew_runtime::{Observation, Policy};

use crate::cli::{Failure, print, print_json};
use crate::launch_file::{CacheSettings, CandidateSettings};
use crate::prepare::with_candidates;
use crate::run::sums;
use again::{Again, Frames};

pub use compare::Difference;
pub use exact::Exact;
pub use figures::Figures;
pub use what_if::{JointDifference, WhatIf};

/// `sinew replay`.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// The recording.
    pub file: PathBuf,
    /// Where the recorded policy is now; without it, where it was.
    #[arg(long, value_name = "PATH")]
    pub policy: Option<PathBuf>,
    /// Replay the control cycles alone, from the recorded chunks.
    #[arg(long, conflicts_with = "what_if")]
    pub no_policy: bool,
    /// What another scheduler would have sent: keys of the scheduler table, such as strategy=rtc-guided execution_horizon=12.
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    pub what_if: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// A recording open for reading.
type Reader = Recording<BufReader<File>>;

/// Which policy a replay runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runs<'a> {
    /// The recorded one, from where it was.
    Recorded,
    /// The recorded one, from here.
    At(&'a Path),
    /// None: the recorded chunks are given to the core.
    Nothing,
}

/// Replays a recording as the command line says; exit code 1 when something else came out.
///
/// # Errors
/// [`Failure`] for a file that is no recording, or a policy that cannot be run.
pub fn run(args: &ReplayArgs) -> Result<ExitCode, Failure> {
    let runs = match &args.policy {
        _ if args.no_policy => Runs::Nothing,
        Some(path) => Runs::At(path),
        None => Runs::Recorded,
    };
    if !args.what_if.is_empty() {
        let answer = what_if(&args.file, runs, &args.what_if)?;
        match args.json {
            true => print_json(&answer)?,
            false => print(&answer.render()),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let result = exact(&args.file, runs)?;
    match args.json {
        true => print_json(&result)?,
        false => print(&result.render(&args.file)),
    }
    Ok(if result.identical() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Computes the run recorded in `file` again.
///
/// # Errors
/// As [`run`].
pub fn exact(file: &Path, runs: Runs<'_>) -> Result<Exact, Failure> {
    let recording = open(file)?;
    let mut policy = policy(recording.header(), runs)?;
    let again = policy.as_mut().map(|p| &mut p.0);
    let mut result = exact::replay(recording, again).map_err(|e| failure(file, e))?;
    result.policy = policy.map(|p| p.1);
    Ok(result)
}

/// What a scheduler changed by `changes` (`key=value`) would have sent in the run recorded in `file`.
///
/// # Errors
/// As [`run`]; also for keys that are none, and without a policy or all frames.
pub fn what_if(file: &Path, runs: Runs<'_>, changes: &[String]) -> Result<WhatIf, Failure> {
    let header = open(file)?.header().clone();
    let Some((mut again, _)) = policy(&header, runs)? else {
        return Err(failure(
            file,
            "another scheduler asks for other chunks: that needs the policy",
        ));
    };
    what_if::run(file, &header, &mut again, changes)
}

/// The header of the recording `file`, and what its policy saw, inference by inference, under the robot's names.
///
/// # Errors
/// [`Failure::Result`] for a file that is no recording, or has no frames.
pub(crate) fn observations(file: &Path) -> Result<(Header, Vec<Observation>), Failure> {
    let mut recording = open(file)?;
    let (mut frames, mut all) = (Frames::default(), Vec::new());
    for entry in recording.by_ref() {
        match entry {
            Entry::Frame { camera, frame, .. } => frames.push(camera, frame),
            // One whose frame is missing was not recorded whole.
            Entry::Inference(record) => all.extend(again::observation(&record, &frames)),
            _ => {}
        }
    }
    if all.is_empty() {
        return Err(failure(file, "there is no observation with its frames in it"));
    }
    Ok((recording.header().clone(), all))
}

/// What instructions stood in, in the run of `header`.
pub(crate) fn prompt(header: &Header) -> Option<String> {
    said(header, "/policy/prompt").flatten()
}

/// The core of the run of `header`, set as `control` says.
fn core(header: &Header, control: &ControlConfig) -> Result<ControlCore, String> {
    let core = ControlCore::new(control).map_err(|e| e.to_string())?;
    let core = core.with_authority(&header.authority, &control.limits);
    let core = match header.residual {
        Some(residual) => core.with_residual(residual, &control.limits),
        None => core,
    };
    match &header.space {
        Some(space) => core.with_space(space.clone()).map_err(|e| e.to_string()),
        None => Ok(core),
    }
}

/// Opens `file` and reads its header.
fn open(file: &Path) -> Result<Reader, Failure> {
    let opened = File::open(file).map_err(|e| failure(file, e))?;
    Recording::open(BufReader::with_capacity(1 << 20, opened)).map_err(|e| failure(file, e))
}

fn failure(file: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::Result(format!("{}: {error}", file.display()))
}

/// Whether the policy is the recorded one.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PolicyIdentity {
    /// Where it is.
    pub path: PathBuf,
    /// Files that differ: name, recorded SHA-256, found SHA-256.
    pub different: Vec<(String, String, String)>,
}

/// Loads the policy of `header`, when one is to run.
fn policy(header: &Header, runs: Runs<'_>) -> Result<Option<(Again, PolicyIdentity)>, Failure> {
    let path = match runs {
        Runs::Recorded => Path::new(&header.policy),
        Runs::At(path) => path,
        Runs::Nothing => return Ok(None),
    };
    if header.images == Images::None {
        let text =
            "the recording has no camera frames, so the policy cannot run again; add --no-policy";
        return Err(Failure::Result(text.to_owned()));
    }
    let found = sums(path).map_err(|e| {
        Failure::Result(format!(
            "{}: the recorded policy: {e}; say with --policy where it is now, or add --no-policy",
            path.display()
        ))
    })?;
    let different = differing(&header.policy_sha256, &found);
    if header.launch.pointer("/policy/sampling/memory").is_some_and(|m| !m.is_null()) {
        let text = "the recorded policy started from a memory of successes, which has grown since; add --no-policy";
        return Err(Failure::Result(text.to_owned()));
    }
    // With candidates the steps of one are the head's own.
    let candidates: Option<CandidateSettings> = said(header, "/policy/sampling/candidates");
    let denoise_steps = candidates.and_then(|_| said(header, "/policy/denoise_steps"));
    let solver = said(header, "/policy/sampling/solver");
    let streaming = said(header, "/policy/sampling/streaming").unwrap_or_default();
    let compute = said(header, "/policy/kernels/compute").unwrap_or_default();
    let caches: Option<CacheSettings> = said(header, "/policy/cache");
    let kinds: Vec<_> = header.control.scheduler.joints.iter().map(|j| j.kind).collect();
    let caches = caches.unwrap_or_default().options(&kinds);
    let options =
        LoadOptions { denoise_steps, solver, streaming, compute, caches, ..LoadOptions::default() };
    let policy = load_policy(path, &options).inspect_err(|_| {
        for (name, before, now) in &different {
            eprintln!("sinew: {name} is not the recorded file: SHA-256 {now}, recorded {before}");
        }
    })?;
    let policy = with_candidates(policy, candidates.as_ref())
        .map_err(|e| Failure::Result(format!("{}: {e}", path.display())))?;
    let policy: Box<dyn Policy> = match &header.actions {
        Some(map) => Box::new(InJoints::new(policy, map.clone()).map_err(|e| {
            Failure::Result(format!("{}: {e}; it is not the recorded policy", path.display()))
        })?),
        None => policy,
    };
    let identity = PolicyIdentity { path: path.to_owned(), different };
    Ok(Some((Again::new(policy, header), identity)))
}

/// What the launch of `header` said at `pointer`; none in recordings from before there was such a key.
fn said<T: serde::de::DeserializeOwned>(header: &Header, pointer: &str) -> Option<T> {
    let value = header.launch.pointer(pointer)?;
    serde_json::from_value(value.clone()).ok()
}

/// Files whose sums differ. A single file may have another name.
fn differing(
    recorded: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
) -> Vec<(String, String, String)> {
    if let ([(name, before)], [(_, now)]) =
        (&recorded.iter().collect::<Vec<_>>()[..], &found.iter().collect::<Vec<_>>()[..])
    {
        let same = before == now;
        return if same {
            vec![]
        } else {
            vec![((*name).clone(), (*before).clone(), (*now).clone())]
        };
    }
    let mut names: Vec<&String> = recorded.keys().chain(found.keys()).collect();
    names.sort();
    names.dedup();
    let of = |sums: &BTreeMap<String, String>, name: &String| {
        sums.get(name).cloned().unwrap_or_else(|| "missing".to_owned())
    };
    let entry = |name: &String| (name.clone(), of(recorded, name), of(found, name));
    names.into_iter().map(entry).filter(|(_, before, now)| before != now).collect()
}
