//! A residual stage at control rate, and the replay of what it did.

use std::path::{Path, PathBuf};

use sinew_launch::replay::{Exact, Runs, exact};
use sinew_runtime::blackbox::{Entry, EventRecord, Recording};
use sinew_runtime::control::ResidualSample;

use crate::edit::rewrite;
use crate::harness::{Launch, ONE_PROCESS, wait_until};
use crate::watch::Watch;

/// The most that each joint is corrected by (rad): less than the network's 0.02.
const LIMIT: f64 = 0.015;

/// A recorded run with a residual stage of the simulated arm, and its report.
fn recorded() -> (Launch, PathBuf, serde_json::Value) {
    let mut launch = Launch::new(ONE_PROCESS);
    let watch = Watch::new(&launch.endpoint);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/onnx/desk_residual");
    launch.add("policy", "instruction = \"watch and wait\"");
    launch.add("policy", &format!("residual = \"{}\"", folder.display()));
    launch.add("policy", &format!("residual_limit = \"{LIMIT} rad\""));
    launch.add("policy", "onnx_engine = \"built-in\"");
    let file = launch.path("run.mcap");
    let text = file.display().to_string();
    launch.start_control(&["--episodes", "1", "--time-limit", "600 s", "--record", &text]);
    watch.wait_authority("policy");
    let before = watch.chunks();
    wait_until("six chunks", || watch.chunks() >= before + 6);
    let report = launch.finish();
    launch.assert_no_panic();
    (launch, file, report)
}

/// The residual network's answers in a recording.
fn answers(file: &Path) -> Vec<ResidualSample> {
    let mut recording = Recording::open(std::fs::File::open(file).unwrap()).unwrap();
    let answers = recording.by_ref().filter_map(|entry| match entry {
        Entry::Event { event: EventRecord::Residual(sample), .. } => Some(sample),
        _ => None,
    });
    answers.collect()
}

fn replay(file: &Path) -> Exact {
    exact(file, Runs::Recorded).unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn a_run_with_a_residual_stage_is_corrected_and_replays_bit_for_bit() {
    let (launch, file, report) = recorded();
    let answers = answers(&file);
    assert!(answers.len() >= 20, "{} answers", answers.len());
    // It leans to one side, each joint by its own bias: no two joints alike, none at rest.
    let far = |joint: usize| answers.iter().map(|a| a.offset[joint].abs()).fold(0.0, f64::max);
    assert!((0..6).all(|joint| far(joint) > 1e-3 && far(joint) <= 0.02 + 1e-9), "{answers:?}");
    assert!(report["recording"]["lost"].as_object().is_some_and(|lost| lost.is_empty()));

    let result = replay(&file);
    assert!(result.identical(), "{result:#?}");
    assert!(result.cycles > 100 && result.chunks >= 5, "{result:?}");
    assert_eq!((result.cycles_different, result.decisions_different), (0, 0));

    // One answer that was another: the commands after it are others, and the replay says so.
    let changed = launch.path("changed.mcap");
    let mut seen = 0;
    let wanted = answers.len() / 2;
    rewrite(&file, &changed, |topic, data| {
        if topic != "blackbox/event" {
            return;
        }
        let mut record: serde_json::Value = serde_json::from_slice(data).unwrap();
        let Some(sample) = record.pointer_mut("/event/residual/offset/0") else { return };
        seen += 1;
        if seen >= wanted {
            *sample = (-sample.as_f64().unwrap()).into();
            *data = serde_json::to_vec(&record).unwrap();
        }
    });
    assert_eq!(seen, answers.len());
    let result = replay(&changed);
    assert!(!result.identical() && result.cycles_different > 0, "{result:?}");
    let found = result.difference.expect("the arm would have been elsewhere");
    // Its command, or what the guard changed of that: a bit for each joint, the shoulder's the lowest.
    let bits = |text: &str| text.parse::<u16>().unwrap_or_default();
    let shoulder = found.field.starts_with("interventions.joints")
        && bits(&found.recorded) ^ bits(&found.replayed) == 1;
    assert!(shoulder || found.field.contains("shoulder_pan"), "{found:?}");
}
