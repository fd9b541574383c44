//! Parts without the control thread: `--only PART`, and the children that the launching process starts for it.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sinew_runtime::Clock;
use sinew_runtime::transport::{Bus, Keys};

use super::devices::RunningDevices;
use super::parts::{Part, parts};
use super::policy_part::RunningPolicy;
use super::robot::RunError;
use super::{on_interrupt, operator};
use crate::cli::{Failure, LaunchArgs};
use crate::launch_file::LaunchConfig;
use crate::prepare::Prepared;
use crate::supervise::{ChildSpec, Supervision, end_with};

/// How often a part looks whether it is to end.
const TICK: Duration = Duration::from_millis(20);

/// Runs the parts of `prepared` that belong here until Ctrl-C, SIGTERM or the end of its supervisor.
///
/// # Errors
/// [`Failure`] of starting.
pub fn run_only(prepared: Prepared, args: &LaunchArgs) -> Result<(), Failure> {
    let quit = on_interrupt()?;
    if args.parent.is_some_and(|parent| !end_with(parent)) {
        return Ok(());
    }
    let devices = prepared.devices().map_err(RunError::Device)?;
    let Prepared { plan, policy, .. } = prepared;
    let keys = Keys::new(&plan.robot);
    let bus = match plan.placement.here(&Part::Arm) {
        true => operator::device_bus(&plan)?,
        false => Bus::meet(&plan.endpoint, &[]).map_err(RunError::Bus)?,
    };
    let devices = RunningDevices::start(devices, &plan, &keys, &bus)?;
    let policy = policy.map(|p| RunningPolicy::start(p, &plan, &keys, &bus, &quit)).transpose();
    let policy = match policy {
        Err(RunError::Ended) => return Ok(()),
        other => other?,
    };
    if args.parent.is_none() {
        let names: Vec<_> = plan.placement.here.iter().map(ToString::to_string).collect();
        eprintln!("sinew: {} at {}; Ctrl-C ends", names.join(", "), plan.endpoint);
    }
    while !quit.load(Ordering::Relaxed) {
        std::thread::sleep(TICK);
    }
    drop(policy);
    drop(devices); // the arm is held
    Ok(())
}

/// Starts the parts that run in processes of their own; `None` without any.
pub(super) fn children(
    prepared: &Prepared,
    args: &LaunchArgs,
) -> Result<Option<Supervision>, Failure> {
    let children = specs(&prepared.config, args);
    if children.is_empty() || !args.only.is_empty() {
        return Ok(None);
    }
    let supervision = Supervision::start(children);
    let fail = |e: std::io::Error| RunError::System {
        what: "starting the supervisor of the parts",
        reason: e.to_string(),
    };
    Ok(Some(supervision.map_err(fail)?))
}

fn specs(config: &LaunchConfig, args: &LaunchArgs) -> Vec<ChildSpec> {
    let child = |(part, run): (Part, crate::launch_file::RunSettings)| ChildSpec {
        arguments: arguments(&args.file, &part, args),
        part: part.to_string(),
        restart: run.restart,
    };
    parts(config).into_iter().filter(|p| p.1.process).map(child).collect()
}

/// The command line of the child that runs `part`.
fn arguments(file: &Path, part: &Part, args: &LaunchArgs) -> Vec<std::ffi::OsString> {
    let mut list: Vec<std::ffi::OsString> = vec!["launch".into(), file.into()];
    list.extend(args.arguments.iter().map(|a| format!("{}:={}", a.key, a.value).into()));
    for option in [
        format!("--only={part}"),
        format!("--parent={}", std::process::id()),
        format!("--clock-offset={}", Clock::offset()),
    ] {
        list.push(option.into());
    }
    list
}
