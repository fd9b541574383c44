//! Who may move the arm and how it is stopped: keys of `[robot]`, `[control]` and `[teleop]`.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sinew_drivers::peer::StopCategory;
use sinew_runtime::arbiter::{MAX_OPERATORS, Resume, Source};
use sinew_runtime::units;

use super::checker::Checker;
use super::finding::Findings;
use super::schema;
use super::{Override, args};

/// Where a driver listens when the launch file does not say: anywhere on this computer, found through the runtime.
const DRIVER_ENDPOINT: &str = "tcp/127.0.0.1:0";
/// Longest lease without a sign of life that makes sense for a hand on a device.
const LONGEST_LEASE: Duration = Duration::from_secs(5);

/// Authority, teleoperation and stops.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuthoritySettings {
    /// Where the arm's driver listens by itself, so that a stop reaches it without the runtime.
    pub driver_endpoint: String,
    /// How the arm stops when commands stay away.
    pub on_silence: StopCategory,
    /// How it stops when somebody stops it.
    pub on_stop: StopCategory,
    /// How the policy gets authority back.
    pub resume: Resume,
    /// Who may agree and reset; empty: everybody.
    pub operators: Vec<Source>,
    /// Longest lease without a sign of life.
    pub lease: Duration,
    /// A teleop sample older than this moves nothing.
    pub timeout: Duration,
    /// Speed (rad/s) at which the clutch's offset shrinks; zero: it stays.
    pub align_speed: f64,
    /// Largest correction (rad) of the policy.
    pub correction: f64,
}

pub(super) fn resolve(check: &mut Checker<'_>, file: &schema::File) -> AuthoritySettings {
    let (robot, control, teleop) = (&file.robot, &file.control, &file.teleop);
    if let Some(at) = &robot.endpoint {
        check.endpoint("robot.endpoint", at);
    }
    let mut category = |key: &str, at: &Option<schema::Text>| {
        let Some(at) = at else { return StopCategory::default() };
        check.one_of(key, at, &StopCategory::NAMES);
        StopCategory::from_name(at.get_ref()).unwrap_or_default()
    };
    let on_silence = category("robot.on_silence", &robot.on_silence);
    let on_stop = category("robot.on_stop", &robot.on_stop);
    let mut resume = Resume::Ask;
    if let Some(at) = &control.resume {
        check.one_of("control.resume", at, &["ask", "auto"]);
        if at.get_ref() == "auto" {
            resume = Resume::Auto;
        }
    }
    let mut operators = Vec::new();
    for at in &control.operators {
        match Source::new(at.get_ref()) {
            Ok(Source::RUN) => {
                let remedy = "an operator is a person; take another name";
                check.report("control.operators", at, "is the run's own name", remedy);
            }
            Ok(_) if operators.len() == MAX_OPERATORS => {
                let problem = format!("is beyond the {MAX_OPERATORS} operators that fit");
                check.report("control.operators", at, problem, "name fewer");
            }
            Ok(name) => operators.push(name),
            Err(error) => check.report("control.operators", at, error, ""),
        }
    }
    let mut time = |key: &str, at: &Option<schema::Text>, default: u64| {
        let Some(at) = at else { return Duration::from_millis(default) };
        let value = check.duration(key, at);
        if value > LONGEST_LEASE {
            let problem = format!("longer than {} s", LONGEST_LEASE.as_secs());
            check.report(key, at, problem, "a lost link must stop the arm soon: shorten it");
        }
        value
    };
    let lease = time("teleop.lease", &teleop.lease, 500);
    let timeout = time("teleop.timeout", &teleop.timeout, 150);
    let mut angle = |key: &str, at: &Option<schema::Text>, default: f64| {
        let Some(at) = at else { return default };
        match units::parse_angle(at.get_ref()) {
            Ok(value) if value >= 0.0 => return value,
            Ok(_) => check.report(key, at, "is negative", "0 switches it off"),
            Err(error) => check.report(key, at, error, ""),
        }
        default
    };
    let align_speed = angle("teleop.align_speed", &teleop.align_speed, 0.0);
    let correction = angle("teleop.correction", &teleop.correction, 0.15);
    let driver_endpoint = robot.endpoint.as_ref().map(|e| e.get_ref().clone());
    AuthoritySettings {
        driver_endpoint: driver_endpoint.unwrap_or_else(|| DRIVER_ENDPOINT.to_owned()),
        on_silence,
        on_stop,
        resume,
        operators,
        lease,
        timeout,
        align_speed,
        correction,
    }
}

/// How the parts of a launch are reached on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// The robot's name.
    pub robot: String,
    /// The runtime's endpoint and, where the file says it, the driver's own.
    pub endpoints: Vec<String>,
}

/// Reads from a launch file only how its parts are reached: a stop must not fail because of another key's mistake.
///
/// # Errors
/// [`Findings`] when the file cannot be read or lacks the name or the endpoint.
pub fn addresses(file: &Path, overrides: &[Override]) -> Result<Addresses, Findings> {
    #[derive(Deserialize)]
    struct Robot {
        name: String,
        endpoint: Option<String>,
    }
    #[derive(Deserialize)]
    struct Transport {
        endpoint: String,
    }
    #[derive(Deserialize)]
    struct Part {
        robot: Robot,
        transport: Transport,
    }
    let text = super::read(file)?;
    let (text, _) = args::apply(file, &text, overrides)?;
    let Part { robot, transport } =
        toml::from_str(&text).map_err(|e| schema::syntax(file, &text, &e))?;
    let endpoints = std::iter::once(transport.endpoint).chain(robot.endpoint).collect();
    Ok(Addresses { robot: robot.name, endpoints })
}
