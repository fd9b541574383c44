//! `sinew bench …`: measures and prints.

use sinew_benches::policy::PolicyCase;
use sinew_benches::{Spread, control, policy};
use sinew_models::LoadOptions;

use crate::cli::{BenchVerb, Failure, print_json, say};
use crate::report::Machine;
use crate::run::RunError;

/// Does what `verb` says.
///
/// # Errors
/// [`Failure`] of loading or running.
pub fn run(verb: BenchVerb) -> Result<(), Failure> {
    match verb {
        BenchVerb::Policy { path, iterations, warmup, cameras, image, denoise_steps, json } => {
            let mut loaded = sinew_models::load_policy(
                &path,
                &LoadOptions { action_rate_hz: Some(30.0), ..LoadOptions::default() },
            )?;
            let case = PolicyCase {
                iterations: iterations.max(1),
                warmup,
                cameras,
                image: [image[0], image[1]],
                denoise_steps,
                instruction: "put the red cube in the left bin".to_owned(),
            };
            let profile = policy::profile(loaded.as_mut(), &case).map_err(RunError::Policy)?;
            if json {
                return print_json(&profile);
            }
            print_machine();
            say!(
                "{}: {} cameras, {} chunks; {:.0} MB resident, peak {:.0} MB; {:.0} ms of processor time a chunk",
                path.display(),
                profile.cameras,
                profile.iterations,
                profile.rss_mb,
                profile.peak_rss_mb,
                profile.cpu_ms
            );
            say!("  {:<12} {:>9} {:>9} {:>9} {:>9} {:>9}", "ms", "min", "p50", "p90", "p99", "max");
            print_row("chunk", &profile.chunk_ms);
            for (stage, spread) in &profile.stages_ms {
                print_row(stage, spread);
            }
        }
        BenchVerb::Control { joints, cycles, json } => {
            let q = control::profile(joints, cycles).map_err(RunError::Guard)?;
            if json {
                return print_json(&q);
            }
            print_machine();
            say!(
                "control/cycle/joints-{joints}: n {}  p50 {:.2} us  p99 {:.2} us  p99.9 {:.2} us  max {:.2} us",
                q.count,
                q.p50,
                q.p99,
                q.p999,
                q.max
            );
        }
    }
    Ok(())
}

fn print_machine() {
    let Machine { cpu, cores, kernel } = Machine::this();
    say!("{cpu}, {cores} cores, Linux {kernel}");
}

fn print_row(name: &str, s: &Spread) {
    say!("  {name:<12} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}", s.min, s.p50, s.p90, s.p99, s.max);
}
