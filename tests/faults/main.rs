//! Failures, each with real `sinew` processes on a real bus: what the arm did is measured from its own state stream,
//! which an observer in this process subscribes to. The tests judge what happened, not how fast.
//!
//! The target belongs to the launch crate, so that the command is built for it.
#![allow(clippy::unwrap_used)]

mod clock;
mod harness;
mod killed;
mod messages;
mod network;
mod stopped;
mod watch;

use harness::{Launch, Setup};
use watch::{Rest, Watch};

/// One line of the table of failures.
fn row(what: &str, rest: Rest, then: &str) {
    println!("| {what} | {:.2} s | {:.3} rad | {then} |", rest.seconds, rest.moved);
}

/// A launch as `setup` says, and its observer.
fn scene(setup: Setup) -> (Launch, Watch) {
    let launch = Launch::new(setup);
    let watch = Watch::new(&launch.endpoint);
    (launch, watch)
}
