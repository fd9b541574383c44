//! Launched runs, each with real `sinew` processes on a real bus: a residual stage and its replay, words at run time,
//! a memory of successes,
//! caches, early exits. The tests judge what happened, not how fast.
//!
//! The target belongs to the launch crate, so that the command is built for it.
#![allow(clippy::unwrap_used)]

mod caches;
mod exits;
// Each target uses a part of what the tests of failures and of replays have.
#[allow(dead_code)]
#[path = "../replay/edit.rs"]
mod edit;
#[allow(dead_code)]
#[path = "../faults/harness.rs"]
mod harness;
mod memory;
mod residual;
mod said;
#[allow(dead_code)]
#[path = "../faults/watch.rs"]
mod watch;

/// Runs a verb of the command to its end: its exit code, and what it said on stdout and on stderr.
fn sinew(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_sinew")).args(arguments).output();
    let output = output.expect("the command was built for this test");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}
