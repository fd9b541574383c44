//! The command line: few verbs, documented exit codes.

mod args;
mod failure;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::calibrate_verbs::{self, CalibrateVerb};
use crate::replay::{self, ReplayArgs};
use crate::{bench_verbs, launch_verbs, model_verbs, operator_verbs};

pub(crate) use args::frequency;
pub use args::{
    AuthorityArgs, AuthorityWish, BenchVerb, CheckArgs, KernelArgs, Kind, LaunchArgs, ModelVerb,
    OperatorArgs, SayArgs, Scheduling, Size,
};
pub use failure::Failure;

/// Runs vision-language-action policies on a robot arm's own computer, in real time.
#[derive(Debug, Parser)]
#[command(
    name = "sinew",
    version,
    after_help = "Exit codes: 0 done; 1 the run or the comparison failed; 2 the command line is wrong; \
                  3 the launch file is wrong; 4 the model is wrong; 5 a device or the bus failed.\n\
                  RUST_LOG sets what is logged to stderr (default: warn)."
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start what a launch file says.
    Launch(LaunchArgs),
    /// Read everything a launch needs and report every mistake; nothing moves.
    Check(CheckArgs),
    /// Stop a robot; returns when the runtime and every driver have confirmed it. Latched until `sinew reset`.
    ///
    /// This is no safety-rated emergency stop: keep one in hardware.
    Stop(OperatorArgs),
    /// Unlatch a stop; the arm is held until `sinew authority policy`.
    Reset(OperatorArgs),
    /// Say who holds authority over the arm, give it to the policy (the consent to go on), or take it away.
    Authority(AuthorityArgs),
    /// Tell a running robot what to do: now, after all that waits, or go on to the next.
    Say(SayArgs),
    /// Compute a recorded run again: are commands, decisions and inferred chunks the same, bit for bit?
    Replay(ReplayArgs),
    /// Measure once what is used from then on.
    #[command(subcommand)]
    Calibrate(CalibrateVerb),
    /// Make, convert and compare policies.
    #[command(subcommand)]
    Model(ModelVerb),
    /// Measure.
    #[command(subcommand)]
    Bench(BenchVerb),
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// [`Failure`], with its exit code.
    pub fn run(self) -> Result<ExitCode, Failure> {
        match self.verb {
            Verb::Launch(args) => launch_verbs::launch(&args),
            Verb::Check(args) => launch_verbs::check(&args),
            Verb::Stop(args) => operator_verbs::stop(&args),
            Verb::Reset(args) => operator_verbs::reset(&args),
            Verb::Authority(args) => operator_verbs::authority(&args),
            Verb::Say(args) => operator_verbs::speak(&args),
            Verb::Replay(args) => replay::run(&args),
            Verb::Calibrate(verb) => calibrate_verbs::run(&verb).map(|()| ExitCode::SUCCESS),
            Verb::Model(verb) => model_verbs::run(verb).map(|()| ExitCode::SUCCESS),
            Verb::Bench(verb) => bench_verbs::run(verb).map(|()| ExitCode::SUCCESS),
        }
    }
}

/// Writes `text` to stdout. Whoever stopped reading wants no more of it, so a closed pipe is no failure.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Writes one line to stdout, as [`print`] does.
macro_rules! say {
    ($($part:tt)*) => { $crate::cli::print(&format!("{}\n", format_args!($($part)*))) };
}
pub(crate) use say;

/// Prints `value` as JSON.
pub(crate) fn print_json<T: serde::Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Result(e.to_string()))?;
    say!("{text}");
    Ok(())
}
