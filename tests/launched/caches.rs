//! The denoiser's cache: calibrated from a recorded run, and closed when its errors are not those of its calibration.

use std::path::{Path, PathBuf};

use crate::harness::{Launch, ONE_PROCESS};
use crate::sinew;
use crate::watch::Watch;

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo").join(name)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Plays until `count` chunks of the policy were played; the run's report.
fn play(launch: &mut Launch, arguments: &[&str], count: u64) -> serde_json::Value {
    let watch = Watch::new(&launch.endpoint);
    let arguments = [&["--episodes", "1", "--time-limit", "600 s"], arguments].concat();
    launch.start_control(&arguments);
    watch.wait_authority("policy");
    let before = watch.chunks();
    crate::harness::wait_until("chunks", || watch.chunks() >= before + count);
    launch.finish()
}

#[test]
fn errors_above_the_limit_close_the_cache_and_the_report_says_so() {
    let mut launch = Launch::new(ONE_PROCESS);
    let told = std::fs::read_to_string(demo("demo.cache.json")).expect("it is committed");
    let mut told: serde_json::Value = serde_json::from_str(&told).expect("it is JSON");
    // As if reuses had cost nothing when they were measured.
    told["reuse_error"] = 1e-9.into();
    std::fs::write(launch.path("strict.json"), told.to_string()).expect("writable");
    launch.add("policy", "cache_denoiser = \"strict.json\"\ncache_check = 0.5");
    let report = play(&mut launch, &[], 4);
    let used = &report["caches"]["denoiser"];
    let number = |key: &str| used[key].as_f64().unwrap_or_else(|| panic!("{key} in {used}"));
    assert_eq!(used["opening"], "closed", "{used}");
    assert!(number("not_open") >= 2.0 && number("not_open") >= number("chunks") - 2.0, "{used}");
    assert!(number("bound") > 1e-4, "{used}");
    assert!(number("hits") < 0.1 * number("lookups"), "{used}");

    // The committed schedule is not closed by what it was calibrated for.
    let mut launch = {
        drop(launch);
        Launch::new(ONE_PROCESS)
    };
    let schedule = text(&demo("demo.cache.json"));
    launch.add("policy", &format!("cache_denoiser = \"{schedule}\"\ncache_check = 0.2"));
    let used = play(&mut launch, &[], 4)["caches"]["denoiser"].clone();
    assert!(used["opening"] == "open" && used["hits"].as_u64() > Some(0), "{used}");
}

#[test]
fn a_recorded_run_calibrates_the_cache() {
    let mut launch = Launch::new(ONE_PROCESS);
    let file = launch.path("launch.toml");
    let mut toml = std::fs::read_to_string(&file).expect("it was written");
    toml.push_str("\n[scheduler]\nexecution_horizon = 1\n");
    std::fs::write(&file, toml).expect("writable");
    let [run, schedule] = ["run.mcap", "new.cache.json"].map(|name| text(&launch.path(name)));
    play(&mut launch, &["--record", &run], 20);

    let bundle = text(&demo("demo.q8_0.gguf"));
    let calibrate = |model: &str, more: &[&str]| {
        let arguments = ["calibrate", "cache", model, "--recordings", &run, "--seeds", "1"];
        let rest = ["--updates", "5", "--max-error", "1.0", "-o", &schedule];
        sinew(&[&arguments[..], &rest, more].concat())
    };
    let (code, said, wrong) = calibrate(&bundle, &["--json"]);
    assert_eq!(code, Some(0), "{wrong}");
    let tried: serde_json::Value = serde_json::from_str(&said).expect("it is JSON");
    let tried = tried.as_array().expect("a list");
    assert!(tried.iter().all(|t| t["budget"] == 5), "{tried:?}");
    let told = std::fs::read_to_string(&schedule).expect("it was written");
    let told: serde_json::Value = serde_json::from_str(&told).expect("it is JSON");
    assert!(told["samples"].as_u64() >= Some(8), "{told}");
    let error = told["measured"]["mean"].as_f64().expect("it was measured");
    assert!(error > 0.0 && error < 0.2, "{error} rad");

    // It goes into a launch, and only into one with this policy.
    launch.add("policy", "cache_denoiser = \"new.cache.json\"");
    let check = || sinew(&["check", &text(&launch.path("launch.toml"))]);
    let (code, _, wrong) = check();
    assert_eq!(code, Some(0), "{wrong}");
    let broken = std::fs::read_to_string(&schedule).expect("it was written");
    std::fs::write(&schedule, broken.replace("\"weights_sha256\": \"", "\"weights_sha256\": \"0"))
        .expect("writable");
    let (code, _, wrong) = check();
    assert_eq!(code, Some(4), "{wrong}");
    assert!(wrong.contains("new.cache.json") && wrong.contains("another policy"), "{wrong}");
    std::fs::write(&schedule, "{").expect("writable");
    let (code, _, wrong) = check();
    assert!(code == Some(4) && wrong.contains("sinew calibrate cache"), "{code:?}: {wrong}");

    // What cannot be calibrated says why.
    let (code, _, wrong) = calibrate(&bundle, &["--observations", "9"]);
    assert!(code == Some(1) && wrong.contains("at least 16 are needed"), "{code:?}: {wrong}");
    let (code, _, wrong) = calibrate(&text(&demo("masked.q8_0.gguf")), &[]);
    assert!(code == Some(1) && wrong.contains("no denoiser"), "{code:?}: {wrong}");
    let none = text(&launch.path("launch.toml"));
    let (code, _, wrong) = sinew(&["calibrate", "cache", &bundle, "--recordings", &none]);
    assert!(code == Some(1) && wrong.contains(&none), "{code:?}: {wrong}");
}
