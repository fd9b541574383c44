//! The verbs' arguments.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use sinew_models::kernels::Compute;
use sinew_runtime::arbiter::Source;
use sinew_runtime::scheduler::strategy::StrategyConfig;

use crate::bench_cache::BenchCacheArgs;
use crate::bench_cost::BenchCostArgs;
use crate::bench_tail::BenchTailArgs;
use crate::launch_file::Override;

/// `sinew launch`.
#[derive(Debug, Clone, Args)]
pub struct LaunchArgs {
    /// The launch file.
    pub file: PathBuf,
    /// Arguments of the launch file, as key:=value.
    #[arg(value_name = "KEY:=VALUE")]
    pub arguments: Vec<Override>,
    /// End after this many scenes; without it the run goes on until Ctrl-C.
    #[arg(long)]
    pub episodes: Option<u64>,
    /// Play every scene twice: with its own instruction and with another object and place.
    #[arg(long)]
    pub swap: bool,
    /// No status line.
    #[arg(long)]
    pub headless: bool,
    /// Longest episode, such as "20 s".
    #[arg(long, value_name = "TIME", default_value = "20 s", value_parser = duration)]
    pub time_limit: std::time::Duration,
    /// Run only these parts: arm, cameras, cameras.NAME, policy, control. The others run elsewhere and meet here at the
    /// launch file's endpoint.
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    pub only: Vec<String>,
    /// The supervisor whose child this process is.
    #[arg(long, hide = true)]
    pub parent: Option<u32>,
    /// Its clock's offset (ns), so that stamps agree.
    #[arg(long, hide = true, allow_negative_numbers = true)]
    pub clock_offset: Option<i64>,
    /// Write the report as JSON to this file (`-`: stdout).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Record the run into this MCAP file, for `sinew replay`; an existing file is kept and the name counted up.
    #[arg(long, value_name = "FILE.mcap")]
    pub record: Option<PathBuf>,
    /// Write a contact sheet of what the cameras saw.
    #[arg(long, value_name = "FILE.png")]
    pub film: Option<PathBuf>,
}

/// `sinew check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// The launch file.
    pub file: PathBuf,
    /// Arguments of the launch file, as key:=value.
    #[arg(value_name = "KEY:=VALUE")]
    pub arguments: Vec<Override>,
    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// How a person reaches a robot: `sinew stop`, `sinew reset`.
#[derive(Debug, Clone, Args)]
pub struct OperatorArgs {
    /// The robot's name; without it the launch file's, or every robot that can be reached.
    #[arg(long)]
    pub robot: Option<String>,
    /// An endpoint of the runtime or of a driver; may be given several times. Without any and without a launch
    /// file: tcp/127.0.0.1:7447.
    #[arg(long)]
    pub endpoint: Vec<String>,
    /// Take name and endpoints from this launch file, and expect its driver.
    #[arg(long, value_name = "FILE")]
    pub launch: Option<PathBuf>,
    /// Arguments of the launch file, as key:=value.
    #[arg(value_name = "KEY:=VALUE")]
    pub arguments: Vec<Override>,
    /// Who asks, for the record.
    #[arg(long = "as", value_name = "NAME", default_value = "operator", value_parser = source)]
    pub source: Source,
    /// Wait at most this long for everybody's answer.
    #[arg(long, value_name = "TIME", default_value = "2 s", value_parser = duration)]
    pub timeout: std::time::Duration,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `sinew authority`.
#[derive(Debug, Clone, Args)]
pub struct AuthorityArgs {
    /// What to ask for.
    #[arg(value_enum, default_value = "status")]
    pub request: AuthorityWish,
    /// Where the robot is, and who asks.
    #[command(flatten)]
    pub operator: OperatorArgs,
}

/// `sinew say`.
#[derive(Debug, Clone, Args)]
pub struct SayArgs {
    /// The instruction, from now on; a chunk that is being made for the old one is dropped. Without any: what is
    /// followed and what waits.
    pub instruction: Option<String>,
    /// Let it wait until those before it are over: an episode ends by success or time, or by --next.
    #[arg(long, requires = "instruction")]
    pub queue: bool,
    /// Go on with the next that waits.
    #[arg(long, conflicts_with_all = ["instruction", "clear"])]
    pub next: bool,
    /// Forget all that wait.
    #[arg(long, conflicts_with = "instruction")]
    pub clear: bool,
    /// Where the robot is, and who speaks. Its KEY:=VALUE come after the instruction.
    #[command(flatten)]
    pub operator: OperatorArgs,
}

/// What `sinew authority` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AuthorityWish {
    /// Only say who holds it.
    Status,
    /// The policy may move the arm.
    Policy,
    /// Nobody may: the arm is held.
    Hold,
}

/// `sinew model …`.
#[derive(Debug, Clone, Subcommand)]
pub enum ModelVerb {
    /// Say what a checkpoint folder or a bundle holds; for an .onnx file print a manifest to begin with.
    Inspect {
        /// Checkpoint folder, .gguf bundle, folder with an ONNX file and its manifest, or .onnx file.
        path: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List what can be run: architectures, heads, quantization, strategies, caches, and what proves them.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run two forms of a policy on the same inputs and report how their actions differ.
    Verify {
        /// Checkpoint folder or bundle.
        path: PathBuf,
        /// How its layers compute: `exact`, or `w8a8` (8-bit weights and activations).
        #[arg(long, default_value = "exact")]
        compute: Compute,
        /// The one that it is compared with, computed exactly.
        #[arg(long)]
        against: PathBuf,
        /// Inputs to compare on.
        #[arg(long, default_value_t = 8)]
        cases: usize,
        /// Seed of the inputs.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Fail (exit code 1) when the mean action error is above this share of the action range.
        #[arg(long, value_name = "SHARE")]
        max_mean_error: Option<f64>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what quantising costs: action errors of q8_0, q4_k, q4_0 and w8a8 for each checkpoint, in one table.
    Errors {
        /// LeRobot checkpoint folders.
        #[arg(required = true)]
        folders: Vec<PathBuf>,
        /// Inputs to compare on.
        #[arg(long, default_value_t = 8)]
        cases: usize,
        /// Seed of the inputs.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Folder for the bundles, which are removed again; without it the system's temporary folder.
        #[arg(long, value_name = "FOLDER")]
        scratch: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say which layers quantising hurts: the action error when one group of layers alone is quantised.
    Sensitivity {
        /// LeRobot checkpoint folder.
        folder: PathBuf,
        /// Type of the group's matrices.
        #[arg(long = "type", value_enum, default_value = "q8_0")]
        kind: Kind,
        /// How the group computes: `exact`, or `w8a8` (8-bit weights and activations).
        #[arg(long, default_value = "w8a8")]
        compute: Compute,
        /// Inputs to compare on.
        #[arg(long, default_value_t = 4)]
        cases: usize,
        /// Seed of the inputs.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Folder for the bundle, which is removed again; without it the system's temporary folder.
        #[arg(long, value_name = "FOLDER")]
        scratch: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a self-contained GGUF bundle of a checkpoint folder.
    Quantize {
        /// LeRobot checkpoint folder.
        folder: PathBuf,
        /// Type of the large matrices.
        #[arg(long = "type", value_enum)]
        kind: Kind,
        /// The bundle.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Write a checkpoint folder, or a bundle, with seeded random weights.
    Random {
        /// Architecture.
        #[arg(value_parser = sinew_models::RANDOM_ARCHITECTURES)]
        architecture: String,
        /// Size.
        #[arg(long, value_enum, default_value = "full")]
        size: Size,
        /// Seed of the weights.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The folder; a name that ends in .gguf makes a Q8_0 bundle at once.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Download a checkpoint from the model hub (needs a build with `--features hub`).
    Fetch {
        /// Repository, such as lerobot/smolvla_base.
        repository: String,
        /// The folder.
        #[arg(short, long)]
        output: PathBuf,
    },
}

/// Type of a bundle's large matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// 8 bits, blocks of 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, blocks of 32.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, blocks of 32 with a scale and a minimum in super-blocks of 256.
    #[value(name = "q4_k")]
    Q4K,
    /// 16-bit floats.
    F16,
}

/// Size of a random checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// As published: 450 M parameters.
    Full,
    /// For tests: well under a million.
    Tiny,
}

/// Where and with what the kernels run.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    /// Threads, the caller's included; one for each core without it.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Cores for the worker threads, separated by commas.
    #[arg(long, value_delimiter = ',')]
    pub cores: Vec<usize>,
    /// Instruction set: portable, neon-dotprod, avx2, avx-vnni, avx512,
    /// avx512-vnni; the processor's best without it.
    #[arg(long)]
    pub isa: Option<String>,
}

/// `sinew bench …`.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchVerb {
    /// Latency of one chunk, stage by stage, and memory.
    Policy {
        /// Checkpoint folder or bundle.
        path: PathBuf,
        /// Chunks to time.
        #[arg(long, default_value_t = 5)]
        iterations: usize,
        /// Chunks before them that are not timed.
        #[arg(long, default_value_t = 1)]
        warmup: usize,
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
    },
    /// Speed of every family's products, beside the machine's peak and the gemm crate's product.
    Kernels {
        /// Only shapes whose name contains this.
        #[arg(default_value = "")]
        filter: String,
        /// Times that each is run.
        #[arg(long, default_value_t = 15)]
        rounds: usize,
        /// Where and with what the kernels run.
        #[command(flatten)]
        kernels: KernelArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Time of a chunk against cameras, denoise steps and chunk length, beside a linear model.
    Cost(BenchCostArgs),
    /// Tail of a policy's latency beside bare products, while a control thread runs and others want the same cores.
    Tail(BenchTailArgs),
    /// A process that computes until its input is closed.
    #[command(hide = true)]
    Busy,
    /// What caches save and cost on the demo's camera streams, beside the policy without them.
    Cache(BenchCacheArgs),
    /// Smoothness and success of the demo's task under injected latency, for every strategy.
    Seams {
        /// The policy: a bundle or checkpoint folder trained for the demo's arm.
        #[arg(default_value = "models/demo/demo.q8_0.gguf")]
        path: PathBuf,
        /// How layers compute: `exact`, or `w8a8` (8-bit weights and activations).
        #[arg(long, default_value = "exact")]
        compute: Compute,
        /// Strategies, separated by commas; all that the policy supports without it.
        #[arg(long, value_delimiter = ',', value_parser = strategy)]
        strategies: Vec<StrategyConfig>,
        /// Latencies from order to chunk, separated by commas.
        #[arg(long, value_delimiter = ',', value_parser = duration,
              default_value = "0 ms,100 ms,200 ms,300 ms")]
        latencies: Vec<std::time::Duration>,
        /// Episodes of each strategy and latency.
        #[arg(long, default_value_t = 20)]
        episodes: u64,
        /// Seed of the first scene.
        #[arg(long, default_value_t = 4_000_001)]
        seed: u64,
        /// Actions executed before the next chunk takes over.
        #[arg(long, default_value_t = 8)]
        execution_horizon: usize,
        /// rtc-guided: planned actions from here on are free; without it none are.
        #[arg(long)]
        guidance_horizon: Option<usize>,
        /// rtc-guided: largest guidance weight.
        #[arg(long, default_value_t = 10.0)]
        guidance_weight: f64,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The command stream under full load, beside a bare clock loop and at a subscriber in another process.
    Stream {
        /// Commands a second.
        #[arg(long, default_value = "1 kHz", value_parser = frequency)]
        rate: f64,
        /// How long, for each kind of scheduling.
        #[arg(long, default_value = "30 s", value_parser = duration)]
        time: std::time::Duration,
        /// Kinds of scheduling, separated by commas: fifo, other.
        #[arg(long, value_delimiter = ',', default_value = "fifo,other")]
        scheduling: Vec<Scheduling>,
        /// SCHED_FIFO priority.
        #[arg(long, default_value_t = 80)]
        priority: i32,
        /// Keep the control thread on this processor.
        #[arg(long)]
        cpu: Option<usize>,
        /// Leave the cores idle.
        #[arg(long)]
        idle: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Time of a confirmed stop and of a take-over by a person, on loopback with real sessions and probe arms.
    Authority {
        /// Commands a second.
        #[arg(long, value_name = "FREQUENCY", default_value = "100 Hz", value_parser = frequency)]
        rate: f64,
        /// Drivers that must confirm.
        #[arg(long, default_value_t = 2)]
        drivers: usize,
        /// Stops.
        #[arg(long, default_value_t = 1000)]
        stops: usize,
        /// Take-overs.
        #[arg(long, default_value_t = 1000)]
        takeovers: usize,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The other end of `sinew bench stream`, in a process of its own.
    #[command(hide = true)]
    StreamSubscriber {
        /// Where the stream's process listens.
        endpoint: String,
        /// Control period in nanoseconds.
        period_ns: u64,
        /// SCHED_FIFO priority of the bus's threads; none without it.
        #[arg(long)]
        priority: Option<i32>,
    },
    /// Time of one control cycle: scheduler, arbiter and guard.
    Control {
        /// Joints.
        #[arg(long, default_value_t = 7)]
        joints: usize,
        /// Cycles to time.
        #[arg(long, default_value_t = 100_000)]
        cycles: u32,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A kind of scheduling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scheduling {
    /// SCHED_FIFO, memory locked.
    Fifo,
    /// SCHED_OTHER: as any thread.
    Other,
}

fn strategy(text: &str) -> Result<StrategyConfig, String> {
    StrategyConfig::from_name(text.trim()).ok_or_else(|| {
        let known = StrategyConfig::ALL.map(StrategyConfig::name).join(", ");
        format!("there is no strategy of that name; it is one of: {known}")
    })
}

/// Reads a frequency with its unit.
pub(crate) fn frequency(text: &str) -> Result<f64, String> {
    sinew_runtime::units::parse_frequency(text).map_err(|e| e.to_string())
}

fn source(text: &str) -> Result<Source, String> {
    match Source::new(text) {
        Ok(Source::RUN) => Err("that is the run's own name".to_owned()),
        other => other.map_err(|e| e.to_string()),
    }
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    sinew_runtime::units::parse_duration(text).map_err(|e| e.to_string())
}
