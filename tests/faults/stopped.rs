//! `kill -STOP` of each part, and `kill -CONT` afterwards: a process that hangs and comes back.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{ARM, CAMERA, POLICY, signal, wait_until};
use crate::{row, scene};

/// Long against every timeout of the launch, short against the bus's patience with a silent peer.
const PAUSE: Duration = Duration::from_secs(3);

#[test]
fn stopped_policy_is_a_late_chunk_and_motion_resumes_smoothly() {
    let (mut launch, watch) = scene(POLICY);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let policy = watch.process_of("policy");
    let fault = Instant::now();
    signal(policy, Signal::STOP);
    let rest = watch.rest_after(fault);
    assert_eq!(watch.says("mode"), "starved");
    std::thread::sleep(PAUSE.saturating_sub(fault.elapsed()));
    assert_eq!(watch.says("authority"), "policy", "late is not lost");
    let chunks = watch.chunks();
    signal(policy, Signal::CONT);
    wait_until("new chunks", || watch.chunks() > chunks);
    watch.wait_policy_moves();
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    assert!(report["chunks"]["starvations"].as_u64() >= Some(1));
    assert_eq!(report["children"][0]["restarts"], 0);
    launch.assert_no_panic();
    row("policy: kill -STOP, -CONT", rest, "plays out, starves at rest; resumes smoothly");
}

#[test]
fn stopped_camera_ends_in_a_hold_with_the_reason_and_comes_back() {
    let (mut launch, watch) = scene(CAMERA);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let camera = watch.process_of("cameras.front");
    let fault = Instant::now();
    signal(camera, Signal::STOP);
    let rest = watch.rest_after(fault);
    assert_eq!(watch.says("mode"), "starved");
    let chunks = watch.chunks();
    signal(camera, Signal::CONT);
    wait_until("new chunks", || watch.chunks() > chunks + 1);
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    let failed = report["chunks"]["failed"].to_string();
    assert!(failed.contains("camera `front` is stale"), "{failed}");
    launch.assert_no_panic();
    row("camera: kill -STOP, -CONT", rest, "no observation, starves; goes on with fresh frames");
}

#[test]
fn stopped_runtime_the_arm_holds_by_itself_and_is_not_pulled_back() {
    let (mut launch, watch) = scene(ARM);
    let control = launch.start_control(&[]);
    watch.wait_policy_moves();
    let fault = Instant::now();
    signal(control, Signal::STOP);
    let rest = watch.rest_after(fault);
    std::thread::sleep(PAUSE.saturating_sub(fault.elapsed()));
    let back = Instant::now();
    signal(control, Signal::CONT);
    watch.wait_authority("hold");
    let after = watch.rest_after(back);
    std::thread::sleep(Duration::from_millis(500));
    let pulled = watch.moved_since(back);
    assert!(pulled < 0.02, "the arm was pulled by {pulled} rad ({after:?})");
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    assert_eq!(report["held"], "state stale");
    launch.assert_no_panic();
    row("runtime: kill -STOP, -CONT", rest, "driver's watchdog holds; authority to hold on return");
}

#[test]
fn a_stop_reaches_the_driver_although_the_runtime_hangs() {
    let (mut launch, watch) = scene(ARM);
    let control = launch.start_control(&[]);
    watch.wait_policy_moves();
    signal(control, Signal::STOP);
    let pressed = Instant::now();
    let found = watch.stop();
    let arm = found.parts.iter().find(|p| p.ack.part == "arm").expect("the driver answers");
    assert!(arm.ack.latched && arm.ack.fault.is_none(), "{arm:?}");
    assert_eq!(found.missing, ["desk/runtime"], "who did not answer is named");
    let after = arm.after;
    let rest = watch.rest_after(pressed);
    signal(control, Signal::CONT);
    // The runtime finds its driver latched and stops too; it takes a person to go on.
    watch.wait_authority("stop");
    watch.assert_measured_motion_is_bounded();
    launch.finish();
    launch.assert_no_panic();
    row(
        "stop, runtime hangs",
        rest,
        &format!("driver latched after {:.1} ms", after.as_secs_f64() * 1e3),
    );
}

#[test]
fn stopped_driver_authority_goes_to_hold_and_the_arm_does_not_jump_on_return() {
    let (mut launch, watch) = scene(ARM);
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let arm = watch.process_of("arm");
    signal(arm, Signal::STOP);
    watch.wait_authority("hold");
    std::thread::sleep(Duration::from_secs(1));
    let (back, heard) = (Instant::now(), watch.states());
    signal(arm, Signal::CONT);
    wait_until("states", || watch.states() > heard + 20);
    let rest = watch.rest_after(back);
    assert_eq!(watch.says("authority"), "hold");
    // It was stopped in full motion; stopping from there takes some way, being pulled to an old target more.
    assert!(rest.moved < 0.2, "the arm moved by {} rad on its return", rest.moved);
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    assert_eq!(report["held"], "state stale");
    launch.assert_no_panic();
    row("driver: kill -STOP, -CONT", rest, "authority to hold; comes to rest from where it was");
}
