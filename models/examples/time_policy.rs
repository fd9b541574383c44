//! Times whole inferences of a policy: `time_policy CHECKPOINT [RUNS] [DENOISE_STEPS]`.
//!
//! Prints one JSON object: per stage and in all, the shortest and the median wall time (ms), how long loading
//! took, and the peak of the resident memory (`VmHWM`). Inputs are grey images and a zero state: the time
//! does not depend on them. `RAYON_NUM_THREADS` sets the number of threads.

use std::path::Path;
use std::time::{Duration, Instant};

use sinew_models::{LoadOptions, load_policy};
use sinew_runtime::{
    CameraFrame, ChunkRequest, Image, Observation, ObservedImage, Stamp, inference,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: time_policy CHECKPOINT [RUNS] [DENOISE_STEPS]")?;
    let runs: usize = arguments.get(1).map_or(Ok(3), |n| n.parse())?;
    let denoise_steps = arguments.get(2).map(|n| n.parse()).transpose()?;
    let start = Instant::now();
    let options = LoadOptions { action_rate_hz: Some(30.0), ..LoadOptions::default() };
    let mut policy = load_policy(Path::new(path), &options)?;
    let load = start.elapsed();
    let spec = policy.spec().clone();
    let image = Image::new(640, 480, vec![128; 640 * 480 * 3].into())?;
    let images = spec.cameras.iter().map(|camera| ObservedImage {
        camera: camera.clone(),
        frame: CameraFrame { stamp: Stamp(0), sequence: 1, image: image.clone() },
        age: Duration::ZERO,
    });
    let observation = Observation {
        instant: Stamp(0),
        images: images.collect(),
        proprioception: vec![0.0; spec.state_dim],
        proprioception_age: Duration::ZERO,
        instruction: "Pick up the red cube and place it in the bin.".into(),
    };
    let mut stages: Vec<(&'static str, Vec<Duration>)> = Vec::new();
    let mut totals = Vec::new();
    for id in 0..runs.max(1) as u64 {
        let request = ChunkRequest { id, denoise_steps, seed: id };
        let start = Instant::now();
        let chunk = inference::run(policy.as_mut(), &observation, &request)?;
        totals.push(start.elapsed());
        for (i, stage) in chunk.stages.iter().enumerate() {
            if stages.len() <= i {
                stages.push((stage.stage, Vec::new()));
            }
            stages[i].1.push(stage.time);
        }
    }
    stages.push(("total", totals));
    let times: serde_json::Map<String, serde_json::Value> = stages
        .into_iter()
        .map(|(name, mut times)| {
            times.sort();
            let ms = |d: Duration| (d.as_secs_f64() * 1e5).round() / 100.0;
            let entry = serde_json::json!({ "min_ms": ms(times[0]), "median_ms": ms(times[times.len() / 2]) });
            (name.to_owned(), entry)
        })
        .collect();
    let report = serde_json::json!({
        "checkpoint": path,
        "cameras": spec.cameras.len(),
        "denoise_steps": denoise_steps.unwrap_or(spec.denoise_steps),
        "runs": runs,
        "load_ms": load.as_millis() as u64,
        "times": times,
        "peak_memory_mib": peak_memory_kib().map(|kib| kib / 1024),
    });
    println!("{report:#}");
    Ok(())
}

/// Peak of the resident memory (KiB), where the system tells.
fn peak_memory_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
