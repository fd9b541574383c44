//! The observer: what the arm did, from its own state stream, and what the parts said, on the bus.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sinew_drivers::sim::ArmDescription;
use sinew_runtime::arbiter::{Authority, Source};
use sinew_runtime::operator::{self, Confirmation};
use sinew_runtime::transport::{
    AuthorityAsk, Bus, Keys, Subscription, decode_command, decode_state,
};
use sinew_runtime::{Command, JointLimits, JointState, Stamp};

use crate::harness::{PATIENCE, wait_until};

/// Below this speed (rad/s) a joint is at rest.
const REST: f64 = 0.02;
/// The arm is at rest when it has been for this long.
const REST_TIME: Duration = Duration::from_millis(400);
/// The arm moves when a joint is faster than this (rad/s).
const MOVING: f64 = 0.25;
/// The simulator may catch up with this much time at once.
const CATCH_UP: f64 = 0.1;
/// A resting arm that moves this far (rad) from one state to the next was put there.
const SCENE_STEP: f64 = 0.05;
/// Control period of the launch under test (s).
const PERIOD: f64 = 0.01;

/// All that was heard.
#[derive(Default)]
struct Heard {
    states: Vec<(Instant, JointState)>,
    /// Publisher, its number, the command.
    commands: Vec<([u8; 16], u64, Command)>,
    status: Option<serde_json::Value>,
    alive: BTreeMap<String, BTreeSet<u32>>,
    sources: BTreeSet<[u8; 16]>,
    closed: bool,
}

impl Heard {
    /// Whether a message of `source` counts.
    fn believes(&mut self, source: [u8; 16]) -> bool {
        if !self.closed {
            self.sources.insert(source);
        }
        self.sources.contains(&source)
    }
}

/// An observer on the bus.
pub struct Watch {
    bus: Bus,
    pub keys: Keys,
    pub joints: Vec<String>,
    limits: Vec<JointLimits>,
    heard: Arc<Mutex<Heard>>,
    _subscriptions: Vec<Subscription>,
}

/// How the arm came to rest.
#[derive(Debug, Clone, Copy)]
pub struct Rest {
    /// From the fault to rest (s).
    pub seconds: f64,
    /// The farthest that a joint was from where it was at the fault (rad).
    pub moved: f64,
}

impl Watch {
    /// An observer that meets the others at `endpoint`.
    pub fn new(endpoint: &str) -> Self {
        let bus = Bus::meet(endpoint, &[]).expect("the address is one");
        let keys = Keys::new("desk");
        let arm = ArmDescription::desk_arm();
        let joints: Vec<String> = arm.joints.iter().map(|j| j.name.clone()).collect();
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let hear = || heard.clone();
        let mut subscriptions = Vec::new();
        let (to, names) = (hear(), joints.clone());
        subscriptions.push(bus.subscribe(&keys.state(), move |attachment, bytes| {
            let Some(a) = attachment else { return };
            let (mut heard, state) = (locked(&to), decode_state(&names, bytes, a.sequence));
            if let (Ok(state), true) = (state, heard.believes(a.publisher)) {
                heard.states.push((Instant::now(), state));
            }
        }));
        let (to, names) = (hear(), joints.clone());
        subscriptions.push(bus.subscribe(&keys.command(), move |attachment, bytes| {
            let Some(a) = attachment else { return };
            let (mut heard, command) = (locked(&to), decode_command(&names, bytes, 0));
            if let (Ok(command), true) = (command, heard.believes(a.publisher)) {
                heard.commands.push((a.publisher, a.sequence, command));
            }
        }));
        let to = hear();
        subscriptions.push(bus.subscribe(&keys.report("control"), move |_, bytes| {
            locked(&to).status = serde_json::from_slice(bytes).ok();
        }));
        let (to, own) = (hear(), keys.clone());
        subscriptions.push(bus.watch(&keys.all_parts(), move |token, alive| {
            let Some((part, process)) = own.part_of(token) else { return };
            let mut heard = locked(&to);
            let processes = heard.alive.entry(part).or_default();
            if alive {
                processes.insert(process)
            } else {
                processes.remove(&process)
            };
        }));
        let subscriptions = subscriptions.into_iter().map(|s| s.expect("declared")).collect();
        let limits = arm.limits();
        Self { bus, keys, joints, limits, heard, _subscriptions: subscriptions }
    }

    /// From now on only those are believed who have been heard already: a rogue comes.
    pub fn believe_no_others(&self) {
        self.heard().closed = true;
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        locked(&self.heard)
    }

    /// The process that runs `part`, once there is one.
    pub fn process_of(&self, part: &str) -> u32 {
        let mut found = None;
        wait_until(&format!("part {part}"), || {
            found = self.heard().alive.get(part).and_then(|p| p.iter().next_back().copied());
            found.is_some()
        });
        found.expect("it was just found")
    }

    /// Waits until `part` runs in another process than `before`.
    pub fn wait_restarted(&self, part: &str, before: u32) -> u32 {
        wait_until(&format!("restart of {part}"), || {
            let heard = self.heard();
            heard.alive.get(part).is_some_and(|p| !p.is_empty() && !p.contains(&before))
        });
        self.process_of(part)
    }

    /// What the control process last said under `field`.
    pub fn says(&self, field: &str) -> String {
        let heard = self.heard();
        let value = heard.status.as_ref().and_then(|s| s.get(field)).cloned().unwrap_or_default();
        value.as_str().map_or_else(|| value.to_string(), str::to_owned)
    }

    /// Chunks that were played so far.
    pub fn chunks(&self) -> u64 {
        self.says("chunks").parse().unwrap_or(0)
    }

    /// Agrees, as an operator does with `sinew authority policy`, that the policy goes on.
    pub fn agree(&self) {
        let ask = AuthorityAsk::Policy;
        let status = operator::ask(&self.bus, &self.keys, Source::literal("test"), ask, PATIENCE);
        let status = status.expect("the runtime answers");
        assert_eq!(status.authority, Authority::Policy);
    }

    /// Presses stop; who confirmed it.
    pub fn stop(&self) -> Confirmation {
        let (who, wait) = (Source::literal("test"), Duration::from_secs(2));
        let expected = ["arm".to_owned()];
        let found = operator::stop(&self.bus, &self.keys, who, &expected, wait);
        found.expect("the bus can be asked")
    }

    /// Measured states heard so far.
    pub fn states(&self) -> usize {
        self.heard().states.len()
    }

    /// The newest measured state.
    pub fn state(&self) -> JointState {
        self.heard().states.last().expect("the arm was heard").1
    }

    /// Waits until `authority` holds it.
    pub fn wait_authority(&self, authority: &str) {
        wait_until(&format!("authority {authority}"), || self.says("authority") == authority);
    }

    /// Waits until the policy moves the arm, by chunks that it has made meanwhile.
    pub fn wait_policy_moves(&self) {
        self.wait_authority("policy");
        let before = self.chunks();
        wait_until("motion by the policy", || {
            let speed = self.heard().states.last().map_or(0.0, |s| self.speed(&s.1));
            self.says("authority") == "policy" && self.chunks() > before && speed > MOVING
        });
    }

    /// The fastest joint's speed (rad/s); the gripper, which objects push, is left out.
    fn speed(&self, state: &JointState) -> f64 {
        let arm = &state.velocity.as_slice()[..self.joints.len() - 1];
        arm.iter().fold(0.0, |m, v| v.abs().max(m))
    }

    /// Waits until the arm, which says so itself, is at rest; measured from `fault`.
    pub fn rest_after(&self, fault: Instant) -> Rest {
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "the arm does not come to rest");
            std::thread::sleep(Duration::from_millis(20));
            let heard = self.heard();
            let fast = |s: &&(Instant, JointState)| s.0 >= fault && self.speed(&s.1) > REST;
            let last_fast = heard.states.iter().rev().find(fast).map_or(fault, |s| s.0);
            let newest = heard.states.last().map_or(fault, |s| s.0);
            if newest < last_fast + REST_TIME || newest < fault + REST_TIME {
                continue;
            }
            let at = heard.states.iter().rev().find(|s| s.0 <= fault).expect("it was heard before");
            let moved = |s: &(Instant, JointState)| distance(&s.1, &at.1, self.joints.len() - 1);
            let moved = heard.states.iter().filter(|s| s.0 >= fault).map(moved).fold(0.0, f64::max);
            return Rest { seconds: last_fast.duration_since(fault).as_secs_f64(), moved };
        }
    }

    /// The farthest (rad) that a joint moved from `since` on.
    pub fn moved_since(&self, since: Instant) -> f64 {
        let heard = self.heard();
        let mut later = heard.states.iter().filter(|s| s.0 >= since);
        let Some(first) = later.next() else { return 0.0 };
        later.map(|s| distance(&s.1, &first.1, self.joints.len() - 1)).fold(0.0, f64::max)
    }

    /// The arm never moved faster than its limits allow, and never jumped.
    pub fn assert_measured_motion_is_bounded(&self) {
        let heard = self.heard();
        assert!(heard.states.len() > 50, "the arm was hardly heard");
        for pair in heard.states.windows(2) {
            let (a, b) = (&pair[0].1, &pair[1].1);
            let seconds = b.stamp.seconds_from(a.stamp).max(0.0) + CATCH_UP;
            // A new scene puts the simulated arm, at rest before and after, where it begins.
            let new_scene = self.speed(a) < REST && self.speed(b) < REST;
            for joint in 0..self.joints.len() - 1 {
                let limit = &self.limits[joint];
                let name = &self.joints[joint];
                let speed = b.velocity[joint].abs();
                assert!(speed <= limit.velocity * 1.001, "{name}: {speed} rad/s");
                let step = (b.position[joint] - a.position[joint]).abs();
                assert!(
                    new_scene || step <= limit.velocity * seconds,
                    "{name} jumped by {step} rad"
                );
            }
        }
    }

    /// As [`Self::assert_commands_are_bounded`], up to when the arm's return made the runtime begin where it stands.
    pub fn assert_commands_are_bounded_until_hold(&self) {
        let held =
            |c: &&([u8; 16], u64, Command)| c.2.velocity.as_slice().iter().any(|v| *v != 0.0);
        let heard = self.heard();
        let moving = heard.commands.iter().rposition(|c| held(&c)).unwrap_or_default();
        self.assert_bounded(&heard, &heard.commands[..=moving]);
    }

    /// No command asked for more than the limits of speed and acceleration allow; judged by the commands' own
    /// numbers, so that a late one is no fault.
    pub fn assert_commands_are_bounded(&self) {
        let heard = self.heard();
        self.assert_bounded(&heard, &heard.commands);
    }

    /// When a new scene put the arm, at rest before and after, where it begins.
    fn new_scenes(&self, states: &[(Instant, JointState)]) -> Vec<Stamp> {
        let pairs = states.windows(2).map(|pair| (&pair[0].1, &pair[1].1));
        let moved = pairs.filter(|(a, b)| {
            let step = distance(a, b, self.joints.len() - 1);
            step > SCENE_STEP && self.speed(a) < REST && self.speed(b) < REST
        });
        moved.map(|(_, b)| b.stamp).collect()
    }

    fn assert_bounded(&self, heard: &Heard, commands: &[([u8; 16], u64, Command)]) {
        assert!(commands.len() > 50, "hardly a command was heard");
        let scenes = self.new_scenes(&heard.states);
        for pair in commands.windows(2) {
            let ((who, n, a), (same, m, b)) = (&pair[0], &pair[1]);
            if who != same || m <= n {
                continue;
            }
            // A held command follows an arm that a new scene put elsewhere.
            let still = |c: &Command| c.velocity.as_slice().iter().all(|v| *v == 0.0);
            let near = |at: &Stamp| b.stamp.seconds_from(*at).abs() < 1.0;
            if still(a) && still(b) && scenes.iter().any(near) {
                continue;
            }
            let seconds = (m - n) as f64 * PERIOD;
            for joint in 0..self.joints.len() {
                let limit = &self.limits[joint];
                let name = &self.joints[joint];
                let change = (b.velocity[joint] - a.velocity[joint]).abs();
                let most = limit.acceleration * seconds * 1.001 + 1e-6;
                assert!(
                    change <= most,
                    "{name}: commanded speed jumps by {change} rad/s, {most} allowed"
                );
                let step = (b.position[joint] - a.position[joint]).abs();
                let most = limit.velocity * seconds * 1.001 + 1e-6;
                assert!(step <= most, "{name}: command jumps by {step} rad, {most} allowed");
            }
        }
    }
}

fn locked(heard: &Arc<Mutex<Heard>>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn distance(a: &JointState, b: &JointState, joints: usize) -> f64 {
    let pairs = a.position.as_slice().iter().zip(b.position.as_slice()).take(joints);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}
