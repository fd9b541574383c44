//! Early exits: refused for a network that was not trained to end early, unless that is allowed; followed and reported then.

use std::path::Path;

use crate::harness::{Launch, ONE_PROCESS, wait_until};
use crate::sinew;
use crate::watch::Watch;

#[test]
fn exits_are_calibrated_from_the_demo_and_followed_in_a_run() {
    let mut launch = Launch::new(ONE_PROCESS);
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/demo.q8_0.gguf");
    let (bundle, file) = (bundle.display().to_string(), launch.path("new.exit.json"));
    let file_text = file.display().to_string();
    let calibrate = |more: &[&str]| {
        let arguments = ["calibrate", "exit", &bundle, "--demo", "16", "--seeds", "1"];
        sinew(&[&arguments[..], &["-o", &file_text], more].concat())
    };
    let (code, said, wrong) = calibrate(&["--every", "1"]);
    assert_eq!(code, Some(1), "{wrong}");
    assert!(said.contains("exits after layers 1, 2, 3, 4"), "{said}");
    assert!(wrong.contains("no thresholds written") && wrong.contains("--max-error"), "{wrong}");
    assert!(!file.exists());
    let (code, _, wrong) = calibrate(&[]);
    assert!(code == Some(1) && wrong.contains("after every 2 of 4 layers"), "{code:?}: {wrong}");
    let (code, _, wrong) = calibrate(&["--every", "1", "--max-error", "1000", "--ratios", "0.5"]);
    assert_eq!(code, Some(0), "{wrong}");
    let told = std::fs::read_to_string(&file).expect("it was written");
    let told: serde_json::Value = serde_json::from_str(&told).expect("it is JSON");
    assert_eq!(told["ratio"], 0.5);

    let plain = std::fs::read_to_string(launch.path("launch.toml")).expect("it was written");
    for (keys, problem) in [
        (
            "early_exit = \"none.json\"",
            "there is no such file; make it with `sinew calibrate exit`",
        ),
        ("early_exit = \"new.exit.json\"\ndenoise_steps = 5", "denoise_steps does not go with it"),
        ("early_exit = \"new.exit.json\"\ncache_warm_start = true", "leave `cache_warm_start` out"),
    ] {
        launch.add("policy", keys);
        let (code, _, wrong) = sinew(&["check", &launch.path("launch.toml").display().to_string()]);
        assert!(code != Some(0) && wrong.contains(problem), "{code:?}: {wrong}");
        std::fs::write(launch.path("launch.toml"), &plain).expect("writable");
    }
    launch.add("policy", "early_exit = \"new.exit.json\"");
    let watch = Watch::new(&launch.endpoint);
    launch.start_control(&["--episodes", "1", "--time-limit", "600 s"]);
    watch.wait_authority("policy");
    let before = watch.chunks();
    wait_until("chunks", || watch.chunks() >= before + 4);
    let report = launch.finish();
    let used = &report["caches"]["early_exit"];
    assert!(used["chunks"].as_u64() >= Some(4) && used["hits"].as_u64() > Some(0), "{used}");
    assert_eq!(report["latency"]["steps"], 4, "planned with all exits: {}", report["latency"]);
}
