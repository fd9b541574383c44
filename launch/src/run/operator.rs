//! People at the running robot: the desk on the bus, and what a waiting run tells them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sinew_drivers::peer::{ArmPeerConfig, WatchdogConfig};
use sinew_runtime::arbiter::{ArbiterConfig, Authority, Operators, Source};
use sinew_runtime::control::{AuthorityConfig, TeleopConfig};
use sinew_runtime::operator::{Desk, DeskConfig};
use sinew_runtime::rt;
use sinew_runtime::stream::OperatorPort;
use sinew_runtime::transport::{Bus, Keys};

use super::assembly::Plan;
use super::episode::wait;
use super::robot::{Robot, RunError};

/// Command and measured position may differ by this much (rad) when a driver rejoins after a hold.
const REJOIN_TOLERANCE: f64 = 0.5;
/// The arm driver's name among the robot's parts: a stop must reach it.
pub const ARM: Source = Source::literal("arm");

/// The session of an arm's driver: it meets the others, and listens so that a stop reaches the driver without the
/// runtime.
pub(super) fn device_bus(plan: &Plan) -> Result<Bus, RunError> {
    let listen = std::slice::from_ref(&plan.authority.driver_endpoint);
    Ok(rt::with_fifo_threads(plan.beside(), || Bus::meet(&plan.endpoint, listen))?)
}

/// The arm's driver as the plan wants it.
pub(super) fn arm(plan: &Plan) -> ArmPeerConfig {
    ArmPeerConfig {
        name: ARM,
        state_period: plan.state_period,
        command_period: plan.period,
        watchdog: WatchdogConfig {
            timeout: plan.watchdog,
            rejoin_tolerance: REJOIN_TOLERANCE,
            on_silence: plan.authority.on_silence,
            on_stop: plan.authority.on_stop,
        },
        operators: operators(plan),
        priority: plan.beside(),
    }
}

/// Who may move the arm, as the plan wants it.
pub(super) fn control(plan: &Plan) -> AuthorityConfig {
    let settings = &plan.authority;
    AuthorityConfig {
        arbiter: ArbiterConfig {
            resume: settings.resume,
            operators: operators(plan),
            longest_lease: settings.lease,
        },
        teleop: TeleopConfig {
            timeout: settings.timeout,
            align_speed: settings.align_speed,
            correction: settings.correction,
        },
    }
}

/// Opens the runtime's desk.
pub(super) fn desk(
    plan: &Plan,
    joints: Vec<String>,
    bus: &Bus,
    keys: &Keys,
    port: OperatorPort,
) -> Result<Desk, RunError> {
    let drivers = vec![ARM.name().to_owned()];
    let config = DeskConfig { robot: plan.robot.clone(), joints, drivers, priority: plan.beside() };
    Ok(Desk::open(bus, keys, config, port)?)
}

/// True while a person has the arm, or must agree before the run goes on.
pub(super) fn interrupted(robot: &Robot) -> bool {
    let lent = matches!(
        robot.monitor.authority,
        Some(Authority::Teleop | Authority::Shared | Authority::Stop)
    );
    lent || robot.monitor.awaits_consent
}

/// Says once what the run waits for, and waits until nobody interrupts it any more; the time that took.
pub(super) fn wait_for_people(
    robot: &mut Robot,
    quit: &AtomicBool,
    observe: &mut dyn FnMut(&mut Robot),
) -> Duration {
    let start = std::time::Instant::now();
    let mut told = None;
    while interrupted(robot) && !quit.load(Ordering::Relaxed) {
        robot.held = reason(robot);
        let authority = robot.monitor.authority.unwrap_or(Authority::Hold);
        if told.replace(authority) != Some(authority) {
            eprintln!("sinew: {}", notice(robot, authority));
        }
        wait(robot, Duration::from_millis(20), quit, observe);
    }
    if !quit.load(Ordering::Relaxed) {
        robot.held.clear();
    }
    start.elapsed()
}

/// The last change's serialised reason, in words.
fn reason(robot: &Robot) -> String {
    let reason = robot.monitor.last_change.and_then(|c| serde_json::to_value(c.reason).ok());
    reason.and_then(|v| v.as_str().map(|s| s.replace('_', " "))).unwrap_or_default()
}

fn notice(robot: &Robot, authority: Authority) -> String {
    let name = robot.keys.robot();
    let why = robot
        .monitor
        .last_change
        .map_or_else(String::new, |c| format!(" ({}, by {})", reason(robot), c.by));
    match authority {
        Authority::Stop => format!(
            "{name} is stopped{why}; `sinew reset` unlatches it, then `sinew authority policy` lets it go on"
        ),
        Authority::Teleop | Authority::Shared => {
            format!("{name} is in a person's hands{why}; the run waits")
        }
        _ => format!("{name} is held{why}; `sinew authority policy` lets it go on"),
    }
}

/// Who may agree, reset and say.
pub(super) fn operators(plan: &Plan) -> Operators {
    Operators::new(plan.authority.operators.iter().copied())
}
