//! `sinew bench tail`: a policy's tail latency beside bare products, while others want the same cores.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use sinew_benches::policy::PolicyCase;
use sinew_benches::tail::{self, TailPlan, TailProfile};
use sinew_models::LoadOptions;
use sinew_models::kernels::Compute;

use crate::bench_verbs::{INSTRUCTION, choose, print_found, print_machine};
use crate::cli::{Failure, KernelArgs, frequency, say};
use crate::run::RunError;

/// `sinew bench tail`.
#[derive(Debug, Clone, Args)]
pub struct BenchTailArgs {
    /// Checkpoint folder or bundle.
    path: PathBuf,
    /// Calls of each kind.
    #[arg(long, default_value_t = 200)]
    calls: usize,
    /// Control cycles a second.
    #[arg(long, default_value = "1 kHz", value_parser = frequency)]
    rate: f64,
    /// SCHED_FIFO priority of the control thread, where it is permitted.
    #[arg(long, default_value_t = 80)]
    priority: i32,
    /// Keep the control thread on this processor.
    #[arg(long)]
    cpu: Option<usize>,
    /// Foreign processes that compute without a pause.
    #[arg(long, default_value_t = 1)]
    foreign: usize,
    /// Cameras that the observation has.
    #[arg(long, default_value_t = 2)]
    cameras: usize,
    /// Width and height of the cameras' images.
    #[arg(long, num_args = 2, default_values_t = [512, 512])]
    image: Vec<usize>,
    /// Denoise steps; the checkpoint's own without it.
    #[arg(long)]
    denoise_steps: Option<usize>,
    /// How layers compute: `exact`, or `w8a8` (8-bit weights and activations).
    #[arg(long, default_value = "exact")]
    compute: Compute,
    /// Where and with what the kernels run.
    #[command(flatten)]
    kernels: KernelArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
///
/// # Errors
/// [`Failure`] of loading or running.
pub fn run(args: &BenchTailArgs) -> Result<(), Failure> {
    choose(&args.kernels)?;
    let compute = args.compute;
    let options = LoadOptions { action_rate_hz: Some(30.0), compute, ..LoadOptions::default() };
    let mut policy = sinew_models::load_policy(&args.path, &options)?;
    let plan = TailPlan {
        calls: args.calls.max(1),
        period: Duration::from_secs_f64(1.0 / args.rate),
        priority: args.priority,
        cpu: args.cpu,
        case: PolicyCase {
            iterations: 0,
            warmup: 0,
            cameras: args.cameras,
            image: [args.image[0], args.image[1]],
            denoise_steps: args.denoise_steps,
            instruction: INSTRUCTION.to_owned(),
        },
    };
    let foreign: Result<Vec<Foreign>, Failure> =
        (0..args.foreign).map(|_| Foreign::start()).collect();
    let foreign = foreign?;
    let profile = tail::measure(policy.as_mut(), &plan, compute).map_err(|e| match e {
        tail::TailError::Policy(e) => Failure::Run(RunError::Policy(e)),
        tail::TailError::Guard(e) => Failure::Run(RunError::Guard(e)),
        other => Failure::Result(other.to_string()),
    });
    drop(foreign);
    let profile = profile?;
    if args.json {
        return print_found("tail", &profile);
    }
    print_machine();
    table(&profile, args.foreign);
    Ok(())
}

/// A process that computes until it is dropped, or until this one dies.
struct Foreign {
    child: Child,
    /// Its input: the process ends when it is closed.
    input: Option<ChildStdin>,
}

impl Foreign {
    fn start() -> Result<Self, Failure> {
        let fail = |e: std::io::Error| RunError::System {
            what: "starting a foreign process",
            reason: e.to_string(),
        };
        let mut command = Command::new(std::env::current_exe().map_err(fail)?);
        command.args(["bench", "busy"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().map_err(fail)?;
        let input = child.stdin.take();
        Ok(Self { child, input })
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// The foreign process: one thread computes until its input is closed.
pub fn busy() {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    std::thread::spawn(move || {
        // It ends when the other side closes the pipe, or dies.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        seen.store(true, Ordering::Relaxed);
    });
    tail::busy(&stop);
}

fn table(profile: &TailProfile, foreign: usize) {
    let [rows, inputs, outputs] = profile.product;
    say!(
        "{} calls each in turn; control thread {} every {} ms; {foreign} foreign busy processes; {}, {}, {} threads",
        profile.calls,
        profile.scheduling,
        profile.period_ms,
        profile.compute,
        profile.isa,
        profile.threads
    );
    say!("a bare call: {} products {rows}x{inputs}x{outputs} in f32", profile.products);
    say!(
        "  {:<32} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}   {:>9} {:>9} {:>9} {:>7}",
        "ms",
        "min",
        "p50",
        "p90",
        "p99",
        "max",
        "p90/p50",
        "p99/p50",
        "late p50",
        "p99 us",
        "max",
        "missed"
    );
    for row in &profile.rows {
        let (s, c) = (&row.call_ms, &row.control_us);
        say!(
            "  {:<32} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>8.2}   {:>9.1} {:>9.1} {:>9.1} {:>7}",
            row.what,
            s.min,
            s.p50,
            s.p90,
            s.p99,
            s.max,
            row.shoulder,
            row.tail,
            c.p50,
            c.p99,
            c.max,
            row.missed
        );
    }
    for (index, bare) in profile.rows.iter().enumerate().skip(1) {
        if let Some(ratio) = profile.against(index) {
            say!("  the policy's p99/p50 is {ratio:.2} x that of {}", bare.what);
        }
    }
}
