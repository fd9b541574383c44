//! Episodes: a scene, an instruction, authority to the policy, an outcome. Then home again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sinew_runtime::Clock;
use sinew_runtime::arbiter::{Authority, AuthorityRequest};
use sinew_runtime::control::ControlEvent;

use super::motion;
use super::operator;
use super::robot::{Robot, RunError};

/// How an episode ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// What the instruction says was done.
    Success,
    /// Another object was moved.
    WrongObject,
    /// The object went to the other place.
    WrongPlace,
    /// Time ran out.
    Timeout,
    /// The run was ended from outside, or authority was lost for good.
    Stopped,
}

/// One episode.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EpisodeResult {
    /// Seed of the scene.
    pub seed: u64,
    /// The instruction that the policy was given first, and that it is judged by.
    pub instruction: String,
    /// The instructions that people gave it meanwhile.
    pub said: Vec<String>,
    /// The instruction is not the scene's own but the swapped one of the control experiment.
    pub swapped: bool,
    /// How it ended.
    pub outcome: Outcome,
    /// From authority to outcome (s), without the time in which people had the arm.
    pub seconds: f64,
}

/// What the simulator is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SceneRequest {
    /// Seed of the scene.
    pub seed: u64,
    /// The task, or the scene's own.
    pub instruction: Option<String>,
    /// Another object and the other place than the scene's own task names.
    pub swap: bool,
}

/// What the simulator set up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SceneReply {
    /// Seed of the scene.
    pub seed: u64,
    /// The instruction that the scene is judged by.
    pub instruction: String,
}

/// What one episode is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EpisodePlan {
    pub scene: SceneRequest,
    /// Its instruction waited in the queue.
    pub told: bool,
    pub time_limit: Duration,
}

/// Motions and scenes may take this long to be answered.
const PATIENCE: Duration = Duration::from_secs(5);
/// The policy's name among the parts.
const POLICY: &str = "policy";
/// Time between two requests for authority after an interruption.
const ASK_AGAIN: Duration = Duration::from_millis(200);
const TICK: Duration = Duration::from_millis(10);

/// Plays one episode; while a person has the arm, or must agree first, it waits. `observe` is called about a hundred times a second.
pub(super) fn play(
    robot: &mut Robot,
    plan: &EpisodePlan,
    quit: &AtomicBool,
    observe: &mut dyn FnMut(&mut Robot),
) -> Result<EpisodeResult, RunError> {
    operator::wait_for_people(robot, quit, observe);
    go_home(robot, quit, observe)?;
    let reply = match robot.new_scene(&plan.scene) {
        Err(error) if plan.told => {
            let said = plan.scene.instruction.as_deref().unwrap_or_default();
            eprintln!("sinew: `{said}` is no task here: {error}");
            robot.new_scene(&SceneRequest { instruction: None, ..plan.scene.clone() })?
        }
        reply => reply?,
    };
    robot.set_instruction(&reply.instruction);
    // Fresh pictures of the new scene: two frames of the slowest camera.
    wait(robot, robot.frame_period * 2 + Duration::from_millis(100), quit, observe);
    robot.forget_outcome();
    robot.said.clear();
    robot.request(ControlEvent::Authority(AuthorityRequest::Policy))?;
    let start = Instant::now();
    let mut interrupted = Duration::ZERO;
    let mut granted = false;
    let outcome = loop {
        wait(robot, TICK, quit, observe);
        interrupted += operator::wait_for_people(robot, quit, observe);
        let elapsed = start.elapsed().saturating_sub(interrupted);
        let moves = robot.monitor.authority.is_some_and(Authority::moves);
        granted |= moves;
        if let Some(outcome) = robot.outcome() {
            break outcome;
        }
        if quit.load(Ordering::Relaxed) || (!granted && elapsed > PATIENCE) {
            break Outcome::Stopped;
        }
        if granted && !moves {
            interrupted += TICK;
            ask_again(robot)?;
        }
        // What was committed is played out; by then the arm is at rest.
        if moves && robot.lost_part() == Some(POLICY) && robot.monitor.buffer_left.is_zero() {
            robot.request(ControlEvent::Authority(AuthorityRequest::PolicyLost))?;
        }
        if elapsed >= plan.time_limit {
            break Outcome::Timeout;
        }
    };
    let seconds = start.elapsed().saturating_sub(interrupted).as_secs_f64();
    robot.request(ControlEvent::Authority(AuthorityRequest::Hold))?;
    let SceneReply { seed, instruction } = reply;
    let said = std::mem::take(&mut robot.said);
    Ok(EpisodeResult { seed, instruction, said, swapped: plan.scene.swap, outcome, seconds })
}

/// Where nobody's consent is needed, the run asks for the policy again once everything is there.
fn ask_again(robot: &mut Robot) -> Result<(), RunError> {
    let due = robot.asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN);
    if due && !robot.monitor.awaits_consent && robot.complete() {
        robot.asked = Some(Instant::now());
        robot.request(ControlEvent::Authority(AuthorityRequest::Policy))?;
    }
    Ok(())
}

/// Opens the gripper where it is, then moves to the ready pose and holds there.
pub(super) fn go_home(
    robot: &mut Robot,
    quit: &AtomicBool,
    observe: &mut dyn FnMut(&mut Robot),
) -> Result<(), RunError> {
    robot.request(ControlEvent::Authority(AuthorityRequest::Hold))?;
    wait(robot, Duration::from_millis(100), quit, observe);
    let here = robot.measured()?;
    let mut open = here.clone();
    if let (Some(gripper), Some(ready)) = (open.last_mut(), robot.ready.last()) {
        *gripper = *ready;
    }
    let ready = robot.ready.clone();
    for goal in [open, ready] {
        if quit.load(Ordering::Relaxed) {
            break;
        }
        let from = robot.measured()?;
        let chunk = motion::plan(&from, &goal, &robot.limits, Clock::now());
        let length = motion::length(&chunk);
        robot.request(ControlEvent::Motion(chunk))?;
        wait(robot, length + Duration::from_millis(100), quit, observe);
    }
    robot.request(ControlEvent::Authority(AuthorityRequest::Hold))?;
    wait(robot, Duration::from_millis(50), quit, observe);
    Ok(())
}

/// Lets `time` pass, observing, or until `quit`.
pub(super) fn wait(
    robot: &mut Robot,
    time: Duration,
    quit: &AtomicBool,
    observe: &mut dyn FnMut(&mut Robot),
) {
    let end = Instant::now() + time;
    loop {
        robot.drain();
        observe(robot);
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || quit.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(left.min(TICK));
    }
}
