//! `sinew stop`, `sinew reset`, `sinew authority` and `sinew say`: a person speaks to a running robot.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use sinew_runtime::operator::{self, Confirmation, EVERY_ROBOT};
use sinew_runtime::transport::{AuthorityAsk, AuthorityStatus, Bus, Keys};

use crate::cli::{AuthorityArgs, AuthorityWish, Failure, OperatorArgs, SayArgs, print_json, say};
use crate::launch_file::addresses;
use crate::run::{ARM, RunError, SayMessage, Saying, Told};

/// Where the demo's runtime listens.
const DEFAULT_ENDPOINT: &str = "tcp/127.0.0.1:7447";
/// Exit code of a stop that not everybody confirmed: a device or the bus failed.
const UNCONFIRMED: u8 = 5;

/// A way to the robot.
struct Line {
    bus: Bus,
    keys: Keys,
    expected: Vec<String>,
}

fn reach(args: &OperatorArgs) -> Result<Line, Failure> {
    let (mut endpoints, mut robot) = (args.endpoint.clone(), args.robot.clone());
    let mut expected = Vec::new();
    if let Some(file) = &args.launch {
        let found = addresses(file, &args.arguments)?;
        endpoints.extend(found.endpoints);
        robot = robot.or(Some(found.robot));
        expected.push(ARM.name().to_owned());
    }
    if endpoints.is_empty() {
        endpoints.push(DEFAULT_ENDPOINT.to_owned());
    }
    let bus = Bus::join(&[], &endpoints).map_err(RunError::Bus)?;
    let keys = Keys::new(robot.as_deref().unwrap_or(EVERY_ROBOT));
    Ok(Line { bus, keys, expected })
}

/// Stops the robot and waits for everybody's word.
///
/// # Errors
/// [`Failure`] when the robot cannot be reached.
pub fn stop(args: &OperatorArgs) -> Result<ExitCode, Failure> {
    let Line { bus, keys, expected } = reach(args)?;
    let found = operator::stop(&bus, &keys, args.source, &expected, args.timeout);
    report(args, "stop", &found.map_err(RunError::Bus)?)
}

/// Unlatches a stop.
///
/// # Errors
/// [`Failure`] when the robot cannot be reached.
pub fn reset(args: &OperatorArgs) -> Result<ExitCode, Failure> {
    let Line { bus, keys, expected } = reach(args)?;
    let found = operator::reset(&bus, &keys, args.source, &expected, args.timeout);
    report(args, "reset", &found.map_err(RunError::Bus)?)
}

/// Asks for authority, or who has it.
///
/// # Errors
/// [`Failure`] when the robot cannot be reached, or denies it.
pub fn authority(args: &AuthorityArgs) -> Result<ExitCode, Failure> {
    let (wish, args) = (args.request, &args.operator);
    let Line { bus, keys, .. } = reach(args)?;
    let request = match wish {
        AuthorityWish::Status => AuthorityAsk::Status,
        AuthorityWish::Policy => AuthorityAsk::Policy,
        AuthorityWish::Hold => AuthorityAsk::Hold,
    };
    let status = operator::ask(&bus, &keys, args.source, request, args.timeout);
    let status = status.map_err(RunError::Bus)?;
    if args.json {
        print_json(&status)?;
    } else {
        say!("{}", describe(&status));
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells the robot what to do.
///
/// # Errors
/// [`Failure`] when the robot cannot be reached, or does not take it.
pub fn speak(args: &SayArgs) -> Result<ExitCode, Failure> {
    let saying = match (&args.instruction, args.queue, args.next, args.clear) {
        (Some(text), true, ..) => Saying::Later(text.clone()),
        (Some(text), ..) => Saying::Now(text.clone()),
        (None, _, true, _) => Saying::Next,
        (None, _, _, true) => Saying::Clear,
        (None, ..) => Saying::Status,
    };
    let args = &args.operator;
    let Line { bus, keys, .. } = reach(args)?;
    let message = SayMessage { source: args.source, saying };
    let message = serde_json::to_vec(&message).map_err(|e| Failure::Result(e.to_string()))?;
    let answer = bus.query(&keys.instruction(), message, args.timeout).map_err(RunError::Bus)?;
    let told: Told = serde_json::from_slice(&answer)
        .map_err(|e| Failure::Result(format!("the robot's answer is none: {e}")))?;
    if args.json {
        print_json(&told)?;
        return Ok(ExitCode::SUCCESS);
    }
    say!("follows: {}", told.instruction);
    for (k, waits) in told.queue.iter().enumerate() {
        say!("{}. {waits}", k + 1);
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(status: &AuthorityStatus) -> String {
    // The reason's serialised name, in words.
    let reason = status.reason.and_then(|r| serde_json::to_value(r).ok());
    let reason = reason.and_then(|v| v.as_str().map(|s| format!(", {}", s.replace('_', " "))));
    let wait =
        if status.awaits_consent { "; the policy waits for an operator's consent" } else { "" };
    format!(
        "authority {} (by {}{}){wait}",
        status.authority.name(),
        status.holder,
        reason.unwrap_or_default()
    )
}

/// What `--json` prints of a stop or a reset.
#[derive(Serialize)]
struct Outcome<'a> {
    complete: bool,
    took_ms: f64,
    parts: Vec<Part<'a>>,
    missing: &'a [String],
    refused: &'a [String],
}

#[derive(Serialize)]
struct Part<'a> {
    robot: &'a str,
    part: &'a str,
    latched: bool,
    state: &'a str,
    fault: Option<&'a str>,
    after_ms: f64,
}

fn report(args: &OperatorArgs, what: &str, found: &Confirmation) -> Result<ExitCode, Failure> {
    let parts: Vec<Part<'_>> = found
        .parts
        .iter()
        .map(|p| Part {
            robot: &p.ack.robot,
            part: &p.ack.part,
            latched: p.ack.latched,
            state: &p.ack.state,
            fault: p.ack.fault.as_deref(),
            after_ms: ms(p.after),
        })
        .collect();
    if args.json {
        let (missing, refused) = (&found.missing[..], &found.refused[..]);
        let took_ms = ms(found.took);
        print_json(&Outcome { complete: found.complete(), took_ms, parts, missing, refused })?;
    } else {
        for p in &parts {
            say!("{}/{}: {} after {:.1} ms", p.robot, p.part, p.state, p.after_ms);
        }
        if found.complete() {
            say!("{what} confirmed by all in {:.1} ms", ms(found.took));
        }
    }
    if found.complete() {
        return Ok(ExitCode::SUCCESS);
    }
    for p in &found.parts {
        if let Some(fault) = &p.ack.fault {
            eprintln!("sinew: {}/{} heard it, but {fault}", p.ack.robot, p.ack.part);
        }
    }
    for reason in &found.refused {
        eprintln!("sinew: {what} refused: {reason}");
    }
    if !found.missing.is_empty() {
        let who = found.missing.join(", ").replace("*/", "");
        eprintln!(
            "sinew: {what} not confirmed by {who} within {:.1} s; look at the robot and use its hardware stop",
            found.took.as_secs_f64()
        );
    }
    Ok(ExitCode::from(UNCONFIRMED))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
