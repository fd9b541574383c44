//! The network between the runtime and the arm is cut, and comes back. The two run in network namespaces that
//! this test makes, which takes root; it says so and skips where that is denied.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Launch, ONE_PROCESS, wait_until};
use crate::row;
use crate::watch::Watch;

/// A network namespace with a cable to this one; both go when it is dropped.
struct Namespace {
    name: String,
    near: String,
    far: String,
    /// Third number of the addresses 10.231.n.1 (here) and 10.231.n.2 (there).
    net: u32,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|e| format!("ip: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {said}")) }
}

impl Namespace {
    fn new() -> Result<Self, String> {
        let id = std::process::id() % 100_000;
        let name = format!("sinew{id}");
        ip(&format!("netns add {name}"))?;
        let (near, far) = (format!("sn{id}a"), format!("sn{id}b"));
        let made = Self { name, near, far, net: id % 250 };
        let Self { name, near, far, net } = &made;
        ip(&format!("link add {near} type veth peer name {far}"))?;
        ip(&format!("link set {far} netns {name}"))?;
        ip(&format!("addr add 10.231.{net}.1/30 dev {near}"))?;
        ip(&format!("link set {near} up"))?;
        ip(&format!("-n {name} addr add 10.231.{net}.2/30 dev {far}"))?;
        ip(&format!("-n {name} link set {far} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(made)
    }

    fn cable(&self, state: &str) {
        ip(&format!("-n {} link set {} {state}", self.name, self.far))
            .expect("it was set up before");
    }

    /// `command`, run in this namespace.
    fn run(&self, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.name]).arg(command.get_program());
        inside.args(command.get_args());
        inside
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The cable may have gone with the namespace.
        let _ = ip(&format!("link del {}", self.near));
        let _ = ip(&format!("netns del {}", self.name));
    }
}

#[test]
fn cut_network_the_arm_holds_by_itself_and_nothing_resumes_when_it_is_back() {
    let there = match Namespace::new() {
        Ok(there) => there,
        Err(why) => {
            println!("SKIPPED: no network namespace could be made ({why})");
            return;
        }
    };
    let mut launch = Launch::at(format!("tcp/10.231.{}.2:7447", there.net), ONE_PROCESS);
    let watch = Watch::new(&launch.endpoint);
    launch.start("arm", &["--only", "arm"]);
    launch.start_control_by(&["--only", "control,policy"], |command| there.run(command));
    watch.wait_policy_moves();

    let fault = Instant::now();
    there.cable("down");
    let rest = watch.rest_after(fault);
    assert!(launch.logs().contains("the arm stops by itself"), "{}", launch.logs());
    std::thread::sleep(Duration::from_secs(2).saturating_sub(fault.elapsed()));

    let back = Instant::now();
    there.cable("up");
    wait_until("the runtime's word", || !watch.says("held").is_empty());
    assert_eq!(watch.says("authority"), "hold");
    std::thread::sleep(Duration::from_secs(1));
    let pulled = watch.moved_since(back);
    assert!(pulled < 0.2, "the arm was pulled by {pulled} rad");
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    assert!(report["chunks"]["stale_state_holds"].as_u64() >= Some(1));
    launch.assert_no_panic();
    row("network cut, and back", rest, "driver's watchdog holds; authority to hold; hold stays");
}
