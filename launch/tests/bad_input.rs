//! Every bad input of a launch: one clear message with file, line, key, value and remedy, the documented
//! exit code, and nothing half-started.

mod common;

use std::net::TcpListener;

use common::{BASE, Folder, line_of, sinew};

const LAUNCH_FILE: i32 = 3;
const MODEL: i32 = 4;
const USAGE: i32 = 2;

/// What replaces what in [`BASE`], a part of the line that is wrong then, and what the message must name.
type Mistake = (&'static str, &'static str, &'static str, &'static [&'static str]);

#[rustfmt::skip]
const MISTAKES: &[Mistake] = &[
    ("\"desk\"", "\"desk/1\"", "desk/1", &["robot.name", "\"desk/1\"", "letters"]),
    ("\"sim\"        # arm", "\"so101\"", "so101", &["robot.driver", "\"so101\"", "it is one of: sim"]),
    ("state_rate = \"100 Hz\"", "state_rate = \"100\"", "state_rate", &["robot.state_rate", "`100`", "`100 Hz`"]),
    ("\"200 ms\"", "\"10 ms\"", "watchdog", &["robot.watchdog", "\"10 ms\"", "control periods", "lengthen"]),
    ("\"200 ms\"", "\"-1 s\"", "watchdog", &["robot.watchdog", "`-1 s`", "`20 ms`"]),
    ("watchdog", "description = \"no_arm.toml\"\nwatchdog", "no_arm",
        &["robot.description", "\"no_arm.toml\"", "no such file", "relative to the launch file"]),
    ("[96, 96]", "[96, 0]", "[96, 0]", &["cameras.front.size", "[96, 0]", "16 to 4096", "[96, 96]"]),
    ("\"20 Hz\"", "\"0 Hz\"", "\"0 Hz\"", &["cameras.front.rate", "`0 Hz`", "`100 Hz`"]),
    ("front = \"front\"", "front = \"top\"", "\"top\"",
        &["policy.cameras.front", "\"top\"", "robot's cameras are: front, wrist"]),
    ("max_observation_age = \"250 ms\"", "max_observation_age = \"soon\"", "soon",
        &["policy.max_observation_age", "`soon`", "`20 ms`"]),
    ("max_observation_age", "denoise_steps = 0\nmax_observation_age", "denoise_steps",
        &["policy.denoise_steps = 0", "1 to 1000", "leave it out"]),
    ("max_observation_age", "action_space = \"cartesian\"\nmax_observation_age", "cartesian",
        &["policy.action_space = \"cartesian\"", "is not known", "joint_position, joint_delta, ee_pose, ee_delta"]),
    ("max_observation_age", "urdf = \"no.urdf\"\ntip = \"tip\"\nmax_observation_age", "no.urdf",
        &["policy.urdf", "no such file", "relative to the launch file"]),
    ("max_observation_age", "refuse_distance = \"-1 mm\"\nmax_observation_age", "-1 mm",
        &["policy.refuse_distance", "above zero"]),
    ("max_observation_age", "prompt = \"do it\"\nmax_observation_age", "do it",
        &["policy.prompt", "no place for the instruction", "{instruction}"]),
    ("max_observation_age", "solver = \"heun\"\nmax_observation_age", "heun",
        &["policy.solver = \"heun\"", "is not known", "euler, midpoint"]),
    ("max_observation_age", "candidates = 0\nmax_observation_age", "candidates",
        &["policy.candidates = 0", "1 to 64"]),
    ("max_observation_age", "cache_denoiser = \"no.cache.json\"\nmax_observation_age", "no.cache.json",
        &["policy.cache_denoiser = \"no.cache.json\"", "there is no such file", "sinew calibrate cache"]),
    ("max_observation_age", "streaming = true\ncandidates = 2\nmax_observation_age", "candidates",
        &["policy.candidates = 2", "do not go with streaming", "leave one of them out"]),
    ("max_observation_age", "streaming = 1\nmax_observation_age", "streaming", &["integer", "boolean"]),
    ("max_observation_age", "cache_denoiser = 3\nmax_observation_age", "cache_denoiser", &["integer", "string"]),
    ("max_observation_age", "cache_warm_start = \"yes\"\nmax_observation_age", "cache_warm_start", &["string", "boolean"]),
    ("max_observation_age", "cache_vision = 0.2\nmax_observation_age", "cache_vision",
        &["policy.cache_vision = 0.2", "0.5 to 1", "0.996"]),
    ("max_observation_age", "cache_vision = nan\nmax_observation_age", "cache_vision",
        &["policy.cache_vision = nan", "0.5 to 1"]),
    ("max_observation_age", "cache_vision = 0.99\ncache_vision_refresh = 0\nmax_observation_age", "cache_vision_refresh",
        &["policy.cache_vision_refresh = 0", "1 to 1000", "every picture whole"]),
    ("max_observation_age", "cache_vision_refresh = 5\nmax_observation_age", "cache_vision_refresh",
        &["policy.cache_vision_refresh = 5", "changes nothing", "no cache_vision"]),
    ("max_observation_age", "cache_prefix = true\nmax_observation_age", "cache_prefix",
        &["policy.cache_prefix = true", "changes nothing", "no cache_vision"]),
    ("max_observation_age", "cache_when = \"sometimes\"\nmax_observation_age", "sometimes",
        &["policy.cache_when = \"sometimes\"", "is not known", "always, short-of-time"]),
    ("max_observation_age", "cache_when = \"short-of-time\"\nmax_observation_age", "short-of-time",
        &["policy.cache_when = \"short-of-time\"", "changes nothing"]),
    ("max_observation_age", "cache_denoiser = \"launch.toml\"\ncache_check = 2.0\nmax_observation_age", "cache_check",
        &["policy.cache_check = 2.0", "0 to 1", "one reuse in fifty"]),
    ("max_observation_age", "cache_check = 0.1\nmax_observation_age", "cache_check",
        &["policy.cache_check = 0.1", "changes nothing", "no cache_denoiser"]),
    ("max_observation_age", "cache_denoiser = \"launch.toml\"\ncache_tolerance = 0.0\nmax_observation_age",
        "cache_tolerance", &["policy.cache_tolerance = 0.0", "0.1 to 100", "twice the error"]),
    ("max_observation_age", "cache_tolerance = 3.0\nmax_observation_age", "cache_tolerance",
        &["policy.cache_tolerance = 3.0", "changes nothing", "no cache_denoiser"]),
    ("max_observation_age", "cache_warm_start = true\ncache_compare = 0\nmax_observation_age", "cache_compare",
        &["policy.cache_compare = 0", "1 to 100000", "one chunk in fifty"]),
    ("max_observation_age", "cache_compare = 50\nmax_observation_age", "cache_compare",
        &["policy.cache_compare = 50", "changes nothing"]),
    ("max_observation_age", "cache_warm_start = true\ncache_compare = 9\ncache_compare_limit = 0.0\nmax_observation_age",
        "cache_compare_limit", &["policy.cache_compare_limit = 0.0", "0.0001 to 10"]),
    ("max_observation_age", "cache_warm_start = true\ncache_compare_limit = 0.1\nmax_observation_age",
        "cache_compare_limit", &["policy.cache_compare_limit = 0.1", "changes nothing", "no cache_compare"]),
    ("max_observation_age", "verifier = \"past_actions\"\nmax_observation_age", "past_actions",
        &["policy.verifier", "needs past actions", "lie before the observation"]),
    ("state_timeout", "priority = 120\nstate_timeout", "priority", &["control.priority = 120", "2 to 98"]),
    ("realtime = \"off\"", "realtime = \"please\"", "please",
        &["control.realtime", "\"please\"", "best-effort, enforce, off"]),
    ("[transport]", "[guard]\nvelocity_scale = 2.0\n[transport]", "velocity_scale",
        &["guard.velocity_scale = 2.0", "at most 1"]),
    ("[transport]", "[scheduler]\nexecution_horizon = 0\n[transport]", "execution_horizon",
        &["scheduler.execution_horizon = 0", "at least 1"]),
    ("\"tcp/", "\"http/", "endpoint", &["transport.endpoint", "\"http/", "tcp/127.0.0.1:7447"]),
    ("seed = \"$seed\"", "seed = \"7\"", "seed = \"7\"", &["\"7\"", "reference.toml"]),
    ("realtime =", "real_time =", "real_time", &["`real_time`", "`realtime`", "reference.toml"]),
    ("state_timeout = \"250 ms\"", "", "[control]", &["`state_timeout`", "missing", "reference.toml"]),
    ("[transport]", "[transport", "[transport", &["reference.toml"]),
];

#[test]
fn every_mistake_names_file_line_key_value_and_remedy() {
    let folder = Folder::new();
    for (from, to, at, named) in MISTAKES {
        let text = BASE.replacen(from, to, 1);
        assert_ne!(text, BASE, "{from}");
        let file = folder.launch_file(&text);
        let check = sinew(&["check", &file]);
        let context = format!("{from} -> {to}\n{}", check.stderr);
        assert_eq!(check.code, LAUNCH_FILE, "{context}");
        let place = format!("{file}:{}: ", line_of(&text, at));
        assert!(check.stderr.contains(&place), "{place} in {context}");
        for named in *named {
            assert!(check.stderr.contains(named), "`{named}` in {context}");
        }
        check.assert_one_paragraph();
    }
}

#[test]
fn all_mistakes_come_in_one_go() {
    let folder = Folder::new();
    let text = BASE
        .replacen("state_rate = \"100 Hz\"", "state_rate = \"fast\"", 1)
        .replacen("front = \"front\"", "front = \"top\"", 1)
        .replacen("realtime = \"off\"", "realtime = \"please\"", 1);
    let file = folder.launch_file(&text);
    let check = sinew(&["check", &file]);
    assert_eq!(check.code, LAUNCH_FILE);
    for key in ["robot.state_rate", "policy.cameras.front", "control.realtime"] {
        assert!(check.stderr.contains(key), "{key} in {}", check.stderr);
    }

    let json = sinew(&["check", &file, "--json"]);
    assert_eq!(json.code, LAUNCH_FILE);
    let findings: serde_json::Value = serde_json::from_str(&json.stdout).expect("stdout is JSON");
    assert_eq!(findings.as_array().map(Vec::len), Some(3), "{}", json.stdout);
    for key in ["file", "line", "key", "value", "problem", "remedy"] {
        assert!(findings[0].get(key).is_some(), "{key} in {}", json.stdout);
    }
}

#[test]
fn a_launch_file_that_cannot_be_read_is_named() {
    let folder = Folder::new();
    let missing = folder.path("no/such.toml");
    for path in [missing, folder.path(".")] {
        for verb in ["check", "launch"] {
            let output = sinew(&[verb, &path]);
            assert_eq!(output.code, LAUNCH_FILE, "{}", output.stderr);
            assert!(output.stderr.contains(&path) && output.stderr.contains("cannot be read"));
            assert!(output.stderr.contains("check the path"), "{}", output.stderr);
            output.assert_one_paragraph();
        }
    }
}

#[test]
fn arguments_of_the_wrong_type_or_name_are_refused() {
    let folder = Folder::new();
    let file = folder.launch_file(BASE);
    for (argument, named) in [
        ("seed:=seven", ["seed", "seven", "write it like 7"]),
        ("seed:=-1", ["seed", "-1", "whole number"]),
        ("seed:=", ["seed", "whole number", "seed:=…"]),
        ("rate:=200", ["rate", "200", "100 Hz"]),
        ("rate:=90000 Hz", ["control.rate", "90000 Hz", "1000 Hz"]),
        ("sede:=7", ["sede = 7", "no such argument", "seed"]),
        ("policy:=no_policy.gguf", ["policy.file", "no_policy.gguf", "no such file"]),
    ] {
        for verb in ["check", "launch"] {
            let output = sinew(&[verb, &file, argument]);
            assert_eq!(output.code, LAUNCH_FILE, "{argument}: {}", output.stderr);
            for word in named {
                assert!(output.stderr.contains(word), "`{word}`, {argument}: {}", output.stderr);
            }
            assert!(output.stderr.contains(&file), "{argument}: {}", output.stderr);
        }
    }
}

#[test]
fn a_wrong_command_line_has_its_own_exit_code() {
    let folder = Folder::new();
    let file = folder.launch_file(BASE);
    let wrong: [(&[&str], &str); 6] = [
        (&["check", &file, "seed=7"], "seed:=7"),
        (&["launch", &file, "--episodes", "many"], "many"),
        (&["launch", &file, "--time-limit", "20"], "20"),
        (&["launch"], "FILE"),
        (&["lunch", &file], "launch"),
        (&["model", "quantize", "folder", "--type", "q3", "-o", "x.gguf"], "q8_0"),
    ];
    for (arguments, named) in wrong {
        let output = sinew(arguments);
        assert_eq!(output.code, USAGE, "{arguments:?}: {}", output.stderr);
        assert!(output.stderr.contains(named), "{arguments:?}: {}", output.stderr);
    }
    let help = sinew(&["--help"]);
    assert_eq!(help.code, 0);
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 "] {
        assert!(help.stdout.contains(code), "exit code {code} in {}", help.stdout);
    }
}

#[test]
fn a_policy_that_cannot_be_read_is_a_model_error_and_nothing_starts() {
    let folder = Folder::new();
    let (endpoint, port) = common::free_endpoint();
    let text = BASE.replacen("tcp/127.0.0.1:7447", &endpoint, 1);
    let file = folder.launch_file(&text);
    let (json, film) = (folder.path("report.json"), folder.path("film.png"));
    for content in [&b""[..], b"GGUF", b"no policy at all"] {
        folder.write("policy.gguf", content);
        let output = sinew(&["launch", &file, "--headless", "--json", &json, "--film", &film]);
        assert_eq!(output.code, MODEL, "{}", output.stderr);
        assert!(output.stderr.contains("policy.gguf"), "{}", output.stderr);
        assert!(!output.stderr.contains("panicked"), "{}", output.stderr);
        assert!(!std::path::Path::new(&json).exists() && !std::path::Path::new(&film).exists());
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "the port is free again");
    }
}

#[test]
fn a_model_verb_names_the_path_that_is_missing() {
    let folder = Folder::new();
    let (missing, out) = (folder.path("no_model"), folder.path("out.gguf"));
    let verbs: [&[&str]; 3] = [
        &["model", "inspect", &missing],
        &["model", "verify", &missing, "--against", &missing],
        &["model", "quantize", &missing, "--type", "q8_0", "-o", &out],
    ];
    for arguments in verbs {
        let output = sinew(arguments);
        assert_eq!(output.code, MODEL, "{arguments:?}: {}", output.stderr);
        assert!(output.stderr.contains("no_model"), "{}", output.stderr);
        assert!(!std::path::Path::new(&out).exists(), "nothing is written");
        output.assert_one_paragraph();
    }
}
