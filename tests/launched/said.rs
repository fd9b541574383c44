//! `sinew say` while the policy moves the arm.

use serde_json::json;

use crate::harness::{Launch, ONE_PROCESS, POLICY, Setup, wait_until};
use crate::watch::Watch;

const OTHER: &str = "put the green cube into the left bin";
const THIRD: &str = "put the red cube into the right bin";

/// What `sinew say` answers, as JSON.
fn say(launch: &Launch, arguments: &[&str]) -> serde_json::Value {
    let all = [&["say", "--endpoint", &launch.endpoint, "--json"], arguments].concat();
    let (code, said, wrong) = crate::sinew(&all);
    assert_eq!(code, Some(0), "{wrong}");
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// Waits until the policy has the arm and has played `count` more chunks.
fn wait_chunks(watch: &Watch, count: u64) {
    watch.wait_authority("policy");
    let before = watch.chunks();
    wait_until("more chunks", || watch.chunks() >= before + count);
}

/// The instruction of a run changes while the policy moves: from the next observation on chunks follow the new one.
fn the_instruction_changes(setup: Setup) {
    let mut launch = Launch::new(setup);
    let watch = Watch::new(&launch.endpoint);
    launch.add("policy", "instruction = \"watch and wait\"");
    launch.start_control(&["--episodes", "1", "--time-limit", "600 s"]);
    wait_chunks(&watch, 2);
    let first = watch.says("instruction");
    assert!(![OTHER, THIRD].contains(&first.as_str()), "{first}");

    assert_eq!(say(&launch, &[OTHER]), json!({ "instruction": OTHER, "queue": [] }));
    wait_until("the new instruction", || watch.says("instruction") == OTHER);
    wait_chunks(&watch, 4);
    // One that waits changes nothing until it is its turn.
    assert_eq!(
        say(&launch, &[THIRD, "--queue"]),
        json!({ "instruction": OTHER, "queue": [THIRD] })
    );
    assert_eq!(watch.says("instruction"), OTHER);
    assert_eq!(say(&launch, &["--next"]), json!({ "instruction": THIRD, "queue": [] }));
    wait_until("the one that waited", || watch.says("instruction") == THIRD);
    wait_chunks(&watch, 4);

    let report = launch.finish();
    let episode = &report["episodes"][0];
    assert_eq!(episode["instruction"], first, "it is judged by its own: {episode}");
    assert_eq!(episode["said"], json!([OTHER, THIRD]));
    // Every chunk says what it was made for, and none is counted twice.
    let made = report["instructions"].as_object().expect("a table");
    let count = |name: &str| made.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    for instruction in [first.as_str(), OTHER, THIRD] {
        assert!(count(instruction) >= 2, "{instruction}: {made:?}");
    }
    let all: u64 = made.values().filter_map(serde_json::Value::as_u64).sum();
    assert_eq!(Some(all), report["chunks"]["made"].as_u64());
    launch.assert_no_panic();
}

#[test]
fn an_instruction_that_is_said_is_followed_from_the_next_chunk_on() {
    the_instruction_changes(ONE_PROCESS);
}

#[test]
fn an_instruction_that_is_said_reaches_a_policy_in_another_process() {
    the_instruction_changes(POLICY);
}

#[test]
fn words_that_cannot_be_followed_are_refused_and_change_nothing() {
    let mut launch = Launch::new(ONE_PROCESS);
    let watch = Watch::new(&launch.endpoint);
    launch.add("control", "operators = [\"anna\"]");
    launch.add("policy", "instruction = \"watch and wait\"");
    launch.start_control(&["--episodes", "1", "--time-limit", "600 s"]);
    wait_chunks(&watch, 1);
    let before = watch.says("instruction");
    let refused = |arguments: &[&str], why: &str| {
        let all = [&["say", "--endpoint", &launch.endpoint], arguments].concat();
        let (code, _, said) = crate::sinew(&all);
        assert!(code != Some(0) && said.contains(why), "{code:?}: {said}");
    };
    refused(&[OTHER], "operator");
    refused(&[OTHER, "--as", "bert"], "operator");
    refused(&["", "--as", "anna"], "1 to 1000 bytes");
    refused(&["--next", "--as", "anna"], "no instruction waits");
    assert_eq!(say(&launch, &[])["instruction"], before, "anybody may ask");
    let report = launch.finish();
    assert_eq!(report["episodes"][0]["said"], json!([]));
}
