//! A memory of successes: one run fills it, the next starts from it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sinew_runtime::Clock;
use sinew_runtime::transport::{Bus, Keys, Priority};

use crate::harness::{Launch, ONE_PROCESS, runs, wait_until};
use crate::watch::Watch;

const FILE: &str = "successes.bin";

/// Plays an episode of the same scene until three chunks were played, and has the referee say `verdict`; the report.
fn episode(launch: &mut Launch, verdict: &str) -> serde_json::Value {
    let watch = Watch::new(&launch.endpoint);
    let process = launch.start_control(&["--episodes", "1", "--time-limit", "600 s"]);
    watch.wait_authority("policy");
    let before = watch.chunks();
    wait_until("three chunks", || watch.chunks() >= before + 3);
    // The policy is not what is tested: the referee's word decides, whatever the arm did.
    let bus = Bus::meet(&launch.endpoint, &[]).expect("the address is one");
    let keys = Keys::new("desk");
    let truth: Arc<Mutex<Option<serde_json::Value>>> = Arc::default();
    let heard = truth.clone();
    let _hears = bus.subscribe(&keys.ground_truth(), move |_, bytes| {
        *heard.lock().unwrap_or_else(PoisonError::into_inner) = serde_json::from_slice(bytes).ok();
    });
    let mut said = None;
    wait_until("the referee", || {
        said = truth.lock().unwrap_or_else(PoisonError::into_inner).take();
        said.is_some()
    });
    let mut said = said.expect("it was just found");
    said[verdict] = true.into();
    let said = serde_json::to_vec(&said).expect("it was JSON");
    let publisher = bus.publisher(&keys.ground_truth(), Priority::Data).expect("declared");
    wait_until("the end of the run", || {
        publisher.put(said.clone(), Clock::now());
        std::thread::sleep(Duration::from_millis(2));
        !runs(process)
    });
    assert_eq!(launch.wait_end(), Some(0), "{}", launch.logs());
    launch.forget("control");
    launch.report()
}

#[test]
fn what_succeeded_is_remembered_and_the_next_run_starts_from_it() {
    let mut launch = Launch::new(ONE_PROCESS);
    launch.add("policy", "instruction = \"watch and wait\"");
    launch.add("policy", &format!("memory = \"{FILE}\""));
    // A wrong object teaches nothing.
    let report = episode(&mut launch, "wrong_object");
    assert_eq!(report["episodes"][0]["outcome"], "wrong_object");
    let size = |launch: &Launch| std::fs::metadata(launch.path(FILE)).map_or(0, |m| m.len());
    let empty = size(&launch);

    let report = episode(&mut launch, "success");
    assert_eq!(report["episodes"][0]["outcome"], "success");
    assert_eq!(report["caches"]["success_memory"]["hits"].as_u64().unwrap_or(0), 0, "{report}");
    let filled = size(&launch);
    assert!(filled > empty, "{filled} bytes, {empty} before");

    // The same scene again: its first pictures are alike.
    let report = episode(&mut launch, "wrong_object");
    let used = &report["caches"]["success_memory"];
    assert!(used["hits"].as_u64().unwrap_or(0) > 0, "{used}");
    assert_eq!(size(&launch), filled, "nothing was forgotten, and nothing learned");

    // Another policy does not take it.
    let other =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/masked.q8_0.gguf");
    launch.replace("demo.q8_0.gguf", &other);
    let (code, _, said) =
        crate::sinew(&["check", &launch.path("launch.toml").display().to_string()]);
    assert!(code == Some(3) && said.contains(FILE), "{code:?}: {said}");
}
