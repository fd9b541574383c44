//! `kill -9` of each part.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{ARM, CAMERA, Launch, ONE_PROCESS, POLICY, runs, signal, wait_until};
use crate::watch::Watch;
use crate::{row, scene};

/// The arm is held, and stays where it is although everything it needs is back.
fn assert_stays_held(watch: &Watch) {
    watch.wait_authority("hold");
    let (since, chunks) = (Instant::now(), watch.chunks());
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(watch.says("authority"), "hold");
    assert_eq!(watch.chunks(), chunks, "no chunk is played without authority");
    let crept = watch.moved_since(since);
    assert!(crept < 0.01, "the held arm moved by {crept} rad");
}

#[test]
fn killed_policy_the_arm_is_held_until_somebody_agrees_although_the_policy_is_restarted() {
    let (mut launch, watch) = scene(POLICY);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let policy = watch.process_of("policy");
    let fault = Instant::now();
    signal(policy, Signal::KILL);
    let rest = watch.rest_after(fault);
    let again = watch.wait_restarted("policy", policy);
    assert_stays_held(&watch);
    assert_eq!(watch.says("held"), "policy lost");
    // A person agrees: the restarted policy goes on where the old one was, without a jump.
    watch.agree();
    watch.wait_policy_moves();
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    assert_eq!(report["children"][0]["restarts"], 1);
    assert_eq!(report["parts"]["policy"]["lost"], 1);
    wait_until("the end of the policy with the launch", || !runs(again));
    launch.assert_no_panic();
    row(
        "policy: kill -9",
        rest,
        "plays out its committed block, hold; restarted; goes on by consent",
    );
}

#[test]
fn killed_camera_the_arm_comes_to_rest_and_goes_on_when_the_camera_is_back() {
    let (mut launch, watch) = scene(CAMERA);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let camera = watch.process_of("cameras.front");
    // The supervisor starts it again in a moment; without a file to start it has to wait longer.
    let fault = Instant::now();
    signal(camera, Signal::KILL);
    let again = watch.wait_restarted("cameras.front", camera);
    let chunks = watch.chunks();
    wait_until("new chunks", || watch.chunks() > chunks + 2);
    assert_eq!(watch.says("authority"), "policy", "a short gap costs nobody authority");
    signal(again, Signal::STOP);
    let stopped = Instant::now();
    let rest = watch.rest_after(stopped);
    signal(again, Signal::KILL);
    assert!(fault < stopped);
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    let failed = report["chunks"]["failed"].to_string();
    assert!(failed.contains("camera `front` is stale"), "{failed}");
    assert!(report["children"][0]["restarts"].as_u64() >= Some(1));
    launch.assert_no_panic();
    row("camera: kill -9, then silent", rest, "no observation; starves; hold");
}

#[test]
fn killed_runtime_the_arm_holds_by_its_own_watchdog_and_a_new_one_begins_where_it_stands() {
    let (mut launch, watch) = scene(ONE_PROCESS);
    // Nothing is anybody's child, and the devices are there first.
    launch.start("arm", &["--only", "arm"]);
    launch.start("policy", &["--only", "policy"]);
    let control = launch.start_control(&["--only", "control"]);
    watch.wait_policy_moves();
    let fault = Instant::now();
    signal(control, Signal::KILL);
    let rest = watch.rest_after(fault);
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    assert!(launch.logs().contains("the arm stops by itself"), "{}", launch.logs());

    launch.forget("control");
    launch.start_control(&["--only", "control"]);
    watch.wait_restarted("control", control);
    watch.wait_policy_moves();
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    assert_eq!(report["held"], "");
    launch.assert_no_panic();
    row("runtime: kill -9", rest, "driver's watchdog holds; a new runtime goes on");
}

#[test]
fn killed_driver_authority_is_lost_and_the_restarted_arm_stays_where_it_is() {
    let (mut launch, watch) = scene(ARM);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let arm = watch.process_of("arm");
    signal(arm, Signal::KILL);
    watch.wait_authority("hold");
    watch.wait_restarted("arm", arm);
    let heard = watch.states();
    wait_until("states of the new arm", || watch.states() > heard + 20);
    // The new arm stands elsewhere; nobody may drive it to where the old one was.
    let since = Instant::now();
    assert_stays_held(&watch);
    let rest = watch.rest_after(since);
    assert!(rest.moved < 0.01, "the new arm moved by {} rad", rest.moved);
    watch.assert_commands_are_bounded_until_hold();
    let report = launch.finish();
    assert_eq!(report["held"], "state stale");
    assert_eq!(report["children"][0]["restarts"], 1);
    launch.assert_no_panic();
    row("driver: kill -9", rest, "authority to hold; restarted; does not move");
}

#[test]
fn killed_launch_no_part_is_left_behind() {
    let (mut launch, watch) = scene(ARM);
    let control = launch.start_control(&[]);
    watch.wait_policy_moves();
    let arm = watch.process_of("arm");
    signal(control, Signal::KILL);
    wait_until("the end of the children", || !runs(arm));
    launch.assert_no_panic();
}

#[test]
fn a_missing_part_is_named_and_the_order_of_starting_does_not_matter() {
    let (mut launch, watch) = scene(ONE_PROCESS);
    launch.start_control(&["--only", "control"]);
    wait_until("word of what is missing", || {
        launch.logs().contains("sinew: waiting for arm, policy")
    });
    assert!(launch.logs().contains("--only arm,policy`, or check that it reaches tcp/"));
    launch.start("policy", &["--only", "policy"]);
    launch.start("arm", &["--only", "arm"]);
    watch.wait_policy_moves();
    launch.finish();
    launch.assert_no_panic();
}

#[test]
fn a_part_that_cannot_run_ends_the_launch_with_its_reason() {
    let mut launch = Launch::new(POLICY);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, b"no policy").expect("the folder is writable");
    launch.replace("demo.q8_0.gguf", &broken);
    launch.start_control(&[]);
    let code = launch.wait_end();
    let logs = launch.logs();
    assert_eq!(code, Some(5), "{logs}");
    assert!(logs.contains("the part `policy` cannot run (exit code 4)"), "{logs}");
    assert!(logs.contains("broken.gguf"), "{logs}");
    launch.assert_no_panic();
}
