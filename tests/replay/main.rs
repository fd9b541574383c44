//! A recorded run comes out again, bit for bit; and one bit elsewhere is found and named.
//!
//! The run is the demo launch with its real threads, a few seconds of it; it is made once for all tests.

mod edit;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Parser as _;
use sinew_launch::cli::{Cli, Failure};
use sinew_launch::replay::{Exact, Runs, exact, what_if};
use tempfile::TempDir;

const BUNDLE: &str = "demo.q8_0.gguf";

fn bundle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo").join(BUNDLE)
}

/// The folder of the recorded run `run.mcap`.
fn recorded() -> &'static TempDir {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../launch/demo.toml");
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let port = socket.local_addr().expect("it is bound").port();
        drop(socket);
        let text = std::fs::read_to_string(demo).expect("the demo's launch file");
        let launch = folder.path().join("launch.toml");
        // A busy machine may hold up a camera's thread; what is asked here is not about that.
        assert!(text.contains("\"250 ms\""), "the age of an observation");
        let text = text.replace("7447", &port.to_string()).replace("\"250 ms\"", "\"2 s\"");
        std::fs::write(&launch, text).expect("writable");
        let text = |path: PathBuf| path.display().to_string();
        let (run, report) = (folder.path().join("run.mcap"), folder.path().join("report.json"));
        let policy = format!("policy:={}", bundle().display());
        let arguments = [
            "sinew",
            "launch",
            &text(launch),
            &policy,
            "--episodes",
            "1",
            "--time-limit",
            "4 s",
            "--headless",
            "--record",
            &text(run),
            "--json",
            &text(report),
        ];
        let cli = Cli::try_parse_from(arguments).expect("the command line is right");
        cli.run().expect("the demo runs");
        folder
    })
}

fn run_file() -> PathBuf {
    recorded().path().join("run.mcap")
}

fn replay(file: &Path, runs: Runs<'_>) -> Exact {
    exact(file, runs).unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn a_recorded_run_replays_bit_for_bit() {
    let result = replay(&run_file(), Runs::Recorded);
    assert!(result.identical(), "{result:#?}");
    assert!(result.cycles > 200 && result.events > 200 && result.chunks >= 3, "{result:?}");
    assert_eq!((result.cycles_different, result.decisions_different), (0, 0));
    assert_eq!((result.chunks_different, result.torn.clone()), (0, None));
    let report = std::fs::read_to_string(recorded().path().join("report.json")).expect("written");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["recording"]["stopped"], serde_json::Value::Null);
    assert_eq!(report["recording"]["lost"], serde_json::json!({}));
    let cycles = &report["recording"]["messages"]["blackbox/cycle"];
    assert_eq!(cycles.as_u64(), Some(result.cycles));
}

#[test]
fn control_alone_replays_without_the_policy() {
    let result = replay(&run_file(), Runs::Nothing);
    assert!(result.identical() && result.chunks == 0 && result.policy.is_none(), "{result:?}");
}

#[test]
fn one_bit_of_a_recorded_chunk_is_found_and_the_policys_own_chunk_is_played() {
    let file = recorded().path().join("chunk.mcap");
    // The second chunk of the policy: the first two on the topic are the motions home.
    let mut chunks = 0;
    edit::rewrite(&run_file(), &file, |topic, data| {
        chunks += u32::from(topic == "blackbox/chunk");
        if topic == "blackbox/chunk" && chunks == 4 {
            edit::flip_last_position(data);
        }
    });
    let result = replay(&file, Runs::Recorded);
    assert!(!result.identical());
    assert_eq!(result.chunks_different, 1, "{result:?}");
    let found = result.difference.expect("one bit");
    assert!(found.field.starts_with("chunk 2: action "), "{found:?}");
    assert!(found.recorded != found.replayed && found.cycle > 1, "{found:?}");
    assert_eq!(
        result.cycles_different, 0,
        "the core was given the inferred chunk, not the recorded one"
    );
}

#[test]
fn one_bit_of_a_recorded_command_is_found_and_named() {
    let file = recorded().path().join("command.mcap");
    let mut commands = 0;
    edit::rewrite(&run_file(), &file, |topic, data| {
        commands += u32::from(topic == "sinew/desk/command");
        if topic == "sinew/desk/command" && commands == 150 {
            edit::flip_last_position(data);
        }
    });
    let result = replay(&file, Runs::Nothing);
    assert_eq!(result.cycles_different, 1, "{result:?}");
    let found = result.difference.expect("one bit");
    assert_eq!(found.field, "command.position[5] (gripper)");
    // Cycles before the first measured state have no command.
    assert!((150..160).contains(&found.cycle), "{found:?}");
}

#[test]
fn one_bit_of_the_weights_is_found_and_the_file_named() {
    let copy = recorded().path().join("other.gguf");
    let mut bytes = std::fs::read(bundle()).expect("the demo's bundle is committed");
    let at = bytes.len() - 1000;
    bytes[at] ^= 1;
    std::fs::write(&copy, bytes).expect("writable");
    let failure = exact(&run_file(), Runs::At(&copy)).expect_err("the bundle checks its weights");
    let text = failure.to_string();
    assert!(matches!(failure, Failure::Model(_)) && text.contains("other.gguf"), "{text}");
    // The same weights under another name are the same weights.
    std::fs::copy(bundle(), &copy).expect("writable");
    let result = replay(&run_file(), Runs::At(&copy));
    assert!(result.identical(), "{result:?}");
}

#[test]
fn another_policy_is_named_even_when_it_can_run() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/smolvla_tiny");
    match exact(&run_file(), Runs::At(&tiny)) {
        Ok(result) => {
            let policy = result.policy.as_ref().expect("it was run");
            assert!(policy.different.iter().any(|d| d.0 == "model.safetensors"), "{policy:?}");
            assert!(!result.identical());
        }
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn one_bit_of_the_configuration_is_found_and_named() {
    let file = recorded().path().join("config.mcap");
    let mut bytes = std::fs::read(run_file()).expect("recorded");
    let key = b"\"execution_horizon\":8";
    let at = bytes.windows(key.len()).position(|w| w == key).expect("it is in the header");
    bytes[at + key.len() - 1] ^= 1;
    std::fs::write(&file, bytes).expect("writable");
    let failure = exact(&file, Runs::Nothing).expect_err("the header has its sums");
    assert!(failure.to_string().contains("`control` is damaged"), "{failure}");
}

#[test]
fn a_torn_file_is_replayed_as_far_as_it_is_whole() {
    let file = recorded().path().join("torn.mcap");
    let bytes = std::fs::read(run_file()).expect("recorded");
    std::fs::write(&file, &bytes[..bytes.len() * 7 / 10]).expect("writable");
    let whole = replay(&run_file(), Runs::Nothing);
    let result = replay(&file, Runs::Recorded);
    assert!(result.torn.is_some() && result.identical(), "{result:?}");
    assert!(result.cycles > 50 && result.cycles < whole.cycles, "{result:?}");
}

#[test]
fn the_same_scheduler_would_have_sent_the_same() {
    let answer = what_if(&run_file(), Runs::Recorded, &["execution_horizon=8".to_owned()]);
    let answer = answer.unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!((answer.first_difference, answer.simulated_from), (None, None), "{answer:?}");
    assert!(answer.exact_inferences >= 3 && answer.simulated_inferences == 0);
    assert!(answer.joints.iter().all(|j| j.max == 0.0 && j.rms == 0.0));
    assert_eq!(answer.recorded.chunks, answer.changed.chunks);
}

#[test]
fn another_scheduler_would_have_sent_something_else() {
    let changes = ["strategy=synchronous".to_owned(), "execution_horizon=4".to_owned()];
    let answer = what_if(&run_file(), Runs::Recorded, &changes);
    let answer = answer.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(answer.first_difference.is_some() && answer.simulated_inferences > 0, "{answer:?}");
    assert!(answer.joints.iter().any(|j| j.max > 1e-3 && j.rms > 0.0 && j.rms <= j.max));
    assert!(answer.changed.starvations > answer.recorded.starvations, "it stops to think");
    assert!(answer.failed.is_empty(), "{answer:?}");
    let wrong = what_if(&run_file(), Runs::Recorded, &["strateggy=synchronous".to_owned()]);
    let text = wrong.expect_err("no such key").to_string();
    assert!(text.contains("strateggy"), "{text}");
}
