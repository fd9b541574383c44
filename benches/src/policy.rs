//! How long a policy takes for one chunk, stage by stage, and how much memory it needs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sinew_models::kernels::pool::pool;
use sinew_models::kernels::tally::{self, Work};
use sinew_models::kernels::{Compute, Isa, peak};
use sinew_runtime::inference::run;
use sinew_runtime::{
    CameraFrame, ChunkRequest, Clock, Image, Observation, ObservedImage, Policy, PolicyError,
};

use crate::Spread;

/// The longest time that the peak is held after a chunk.
const HELD: Duration = Duration::from_millis(500);

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyCase {
    /// Chunks that are timed, after the warm-up.
    pub iterations: usize,
    /// Chunks before them that are not.
    pub warmup: usize,
    /// Cameras that the observation has (the first of the policy's inputs).
    pub cameras: usize,
    /// Size of the cameras' images (width, height).
    pub image: [usize; 2],
    /// Denoise steps; `None` for the checkpoint's own.
    pub denoise_steps: Option<usize>,
    /// The instruction.
    pub instruction: String,
}

/// Latency of one policy. Inside the interval: everything from the raw observation (RGB bytes, joint
/// positions, text) to the chunk in physical units.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct PolicyProfile {
    /// Chunks timed.
    pub iterations: usize,
    /// Cameras used.
    pub cameras: usize,
    /// One chunk (ms).
    pub chunk_ms: Spread,
    /// Stages of a chunk (ms).
    pub stages_ms: BTreeMap<String, Spread>,
    /// Processor time of one chunk, all threads (ms, mean).
    pub cpu_ms: f64,
    /// How layers compute.
    pub compute: &'static str,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of the kernels.
    pub threads: usize,
    /// Products with weights.
    pub layers: KernelWork,
    /// Attention.
    pub attention: KernelWork,
    /// Measured peak of the machine in 32-bit floats (10⁹ operations a second): the best moment between the chunks.
    pub peak_gflops: f64,
    /// What the machine held of it, for some time after each chunk, in the mean.
    pub held_gflops: f64,
    /// Resident memory after the last chunk (MB).
    pub rss_mb: f64,
    /// Highest resident memory of the process since it started, loading included (MB).
    pub peak_rss_mb: f64,
}

/// One kind of kernel, over all timed chunks.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct KernelWork {
    /// Time in them (ms a chunk).
    pub ms: f64,
    /// 10⁹ operations a second; a multiplication with an addition counts as two.
    pub gops: f64,
    /// The same as a share of the measured f32 peak in the best moment.
    pub of_peak: f64,
    /// The same as a share of what the machine held in the same run: both are means, with the same disturbances.
    pub of_held: f64,
}

impl KernelWork {
    fn of(works: &[Work], peak_gflops: f64, held_gflops: f64) -> Self {
        let products: u64 = works.iter().map(|w| w.products).sum();
        let seconds: f64 = works.iter().map(|w| w.time.as_secs_f64()).sum();
        let gops = if seconds > 0.0 { 2e-9 * products as f64 / seconds } else { 0.0 };
        let ms = seconds * 1e3 / works.len().max(1) as f64;
        Self { ms, gops, of_peak: gops / peak_gflops, of_held: gops / held_gflops }
    }
}

/// Times `policy`, whose layers compute as `compute` says, on images of seeded noise.
///
/// # Errors
/// What the policy gave.
pub fn profile(
    policy: &mut dyn Policy,
    case: &PolicyCase,
    compute: Compute,
) -> Result<PolicyProfile, PolicyError> {
    let mut chunks = Vec::with_capacity(case.iterations);
    let mut stages: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut cpu = 0.0;
    let (mut layers, mut attention) = (Vec::new(), Vec::new());
    let (mut peak, mut held) = (peak::floats(50), peak::Held::default());
    let mut cameras = 0;
    for k in 0..case.warmup + case.iterations {
        // Fresh frames for each chunk: frames that did not change would not be computed again.
        let observation = observation(policy, case, k as u32);
        cameras = observation.images.len();
        let request = ChunkRequest {
            id: k as u64,
            denoise_steps: case.denoise_steps,
            seed: k as u64,
            ..ChunkRequest::default()
        };
        tally::take();
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let chunk = run(policy, &observation, &request)?;
        if k < case.warmup {
            continue;
        }
        chunks.push(start.elapsed().as_secs_f64() * 1e3);
        cpu += cpu_seconds() - cpu_start;
        let tally = tally::take();
        layers.push(tally.layers);
        attention.push(tally.attention);
        peak = peak.max(peak::floats(10));
        held += peak::held((start.elapsed() / 4).min(HELD));
        for stage in chunk.report.stages {
            stages.entry(stage.stage.to_owned()).or_default().push(stage.time.as_secs_f64() * 1e3);
        }
    }
    let (peak_gflops, held_gflops) = (2e-9 * peak, 2e-9 * held.rate());
    let none = PolicyError::OutOfTurn("no iteration was asked for: measure at least one");
    Ok(PolicyProfile {
        iterations: case.iterations,
        cameras,
        chunk_ms: Spread::of(chunks).ok_or(none)?,
        stages_ms: stages.into_iter().filter_map(|(n, s)| Some((n, Spread::of(s)?))).collect(),
        cpu_ms: cpu * 1e3 / case.iterations as f64,
        compute: compute.name(),
        isa: Isa::current().name(),
        threads: pool().threads(),
        layers: KernelWork::of(&layers, peak_gflops, held_gflops),
        attention: KernelWork::of(&attention, peak_gflops, held_gflops),
        peak_gflops,
        held_gflops,
        rss_mb: memory_mb("VmRSS:"),
        peak_rss_mb: memory_mb("VmHWM:"),
    })
}

/// What a policy is given in turn `turn`: images of seeded noise, another one each turn.
pub(crate) fn observation(policy: &dyn Policy, case: &PolicyCase, turn: u32) -> Observation {
    let [width, height] = case.image;
    let now = Clock::now();
    let names = policy.spec().cameras.iter().take(case.cameras);
    let images = names.enumerate().map(|(index, camera)| {
        // A small generator is enough: the values only have to differ.
        let mut word = 0x9e37_79b9_u32.wrapping_mul(index as u32 + 1 + 16 * turn);
        let pixels: Arc<[u8]> = (0..width * height * 3)
            .map(|_| {
                word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (word >> 24) as u8
            })
            .collect();
        // The buffer was made with this very size.
        #[allow(clippy::expect_used)]
        let image = Image::new(width, height, pixels).expect("width * height * 3 bytes");
        let frame = CameraFrame { stamp: now, sequence: 1, image };
        ObservedImage { camera: camera.clone(), frame, age: std::time::Duration::ZERO }
    });
    Observation {
        instant: now,
        images: images.collect(),
        proprioception: vec![0.1; policy.spec().state_dim],
        proprioception_age: std::time::Duration::ZERO,
        instruction: case.instruction.clone(),
    }
}

/// Processor time of this process, all threads (s).
fn cpu_seconds() -> f64 {
    // User and system time of all threads, in the kernel's fixed 10 ms ticks for user space.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let ticks = |i: usize| after_name.split_whitespace().nth(i).and_then(|t| t.parse::<f64>().ok());
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) / 100.0
}

/// A line of `/proc/self/status` (MB); zero where there is none.
fn memory_mb(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
