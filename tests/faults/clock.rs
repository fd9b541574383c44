//! The wall clock is set while the arm moves: an hour forth, then two hours back. A small library between the
//! processes and the C library sets it for them alone; the computer's own clock is not touched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Launch, POLICY, signal, wait_until};
use crate::scene;

/// Builds the library; why not, where there is no C compiler.
fn library(folder: &Path) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/faults/wall_clock.c");
    let library = folder.join("wall_clock.so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source);
    let output = cc.output().map_err(|e| format!("cc: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(library) } else { Err(said) }
}

fn seconds_of_wall_clock(library: &Path, step: &Path) -> i64 {
    let mut date = Command::new("date");
    date.arg("+%s").env("LD_PRELOAD", library).env("WALL_CLOCK_STEP", step);
    let text = date.output().expect("date runs").stdout;
    String::from_utf8_lossy(&text).trim().parse().expect("a number")
}

#[test]
fn a_step_of_the_wall_clock_changes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let library = match library(folder.path()) {
        Ok(library) => library,
        Err(why) => {
            println!("SKIPPED: the library that sets the clock could not be built ({why})");
            return;
        }
    };
    let step = folder.path().join("step");
    let set = |seconds: &str| {
        std::fs::write(folder.path().join("new"), seconds).expect("the folder is writable");
        std::fs::rename(folder.path().join("new"), &step).expect("it was just written");
    };
    set("0");
    let before = seconds_of_wall_clock(&library, &step);
    set("3600");
    let ahead = seconds_of_wall_clock(&library, &step) - before;
    assert!((3590..3700).contains(&ahead), "the library sets the clock: {ahead} s");
    set("0");

    let (mut launch, watch) = scene(POLICY);
    preloaded(&mut launch, &library, &step);
    watch.wait_policy_moves();
    let mut chunks = watch.chunks();
    for seconds in ["3600", "-3600"] {
        set(seconds);
        let since = Instant::now();
        wait_until("chunks after the step", || watch.chunks() > chunks + 2);
        assert!(since.elapsed() < Duration::from_secs(20));
        assert_eq!(watch.says("held"), "", "nobody lost authority");
        chunks = watch.chunks();
    }
    // A part that starts after the step stamps as the others do.
    watch.wait_policy_moves();
    let policy = watch.process_of("policy");
    signal(policy, Signal::KILL);
    watch.wait_restarted("policy", policy);
    // Between two scenes nobody is held, and the new policy goes on by itself.
    let chunks = watch.chunks();
    wait_until("a restarted policy that sees", || {
        !watch.says("held").is_empty() || watch.chunks() > chunks + 1
    });
    // The processes really lived an hour ago: their logs say so.
    let mut date = Command::new("date");
    date.args(["-u", "+%Y-%m-%dT%H:"]).env("LD_PRELOAD", &library).env("WALL_CLOCK_STEP", &step);
    let hour = String::from_utf8_lossy(&date.output().expect("date runs").stdout).trim().to_owned();
    assert!(launch.logs().contains(&hour), "{hour}\n{}", launch.logs());
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    assert_eq!(report["chunks"]["stale_state_holds"], 0);
    // Only what came before the driver was seen; a clock that counts would refuse all.
    assert!(report["stream"]["refused"].as_u64() < Some(100), "{}", report["stream"]);
    launch.assert_no_panic();
    let played = report["chunks"]["accepted"].to_string();
    println!("| wall clock +1 h, then −2 h | | | nothing: {played} chunks played |");
}

fn preloaded(launch: &mut Launch, library: &Path, step: &Path) {
    launch.start_control_by(&[], |command| {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args()).env("LD_PRELOAD", library).env("WALL_CLOCK_STEP", step);
        same
    });
}
