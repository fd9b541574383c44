//! What only shows once the policy is loaded: cameras, joints and chunks that do not fit, a port that is taken.
//!
//! The policy is a tiny checkpoint with random weights, made by the command itself and adapted per test.

mod common;

use std::net::TcpListener;
use std::path::Path;

use common::{BASE, Folder, Output, free_endpoint, line_of, sinew};
use serde_json::{Value, json};

/// Joints of the simulated arm, in its order.
const JOINTS: [&str; 6] =
    ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"];
const LAUNCH_FILE: i32 = 3;

/// A tiny checkpoint in `folder` whose states and actions have one value for each of `names`.
fn checkpoint(folder: &Folder, names: &[&str]) -> Vec<String> {
    let dir = folder.path("checkpoint");
    let made = sinew(&["model", "random", "smolvla", "--size", "tiny", "-o", &dir]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let file = |name: &str| Path::new(&dir).join(name);
    // Statistics have the width that the checkpoint was made with; without normalisation any width will do.
    for name in ["config.json", "policy_preprocessor.json", "policy_postprocessor.json"] {
        let text = std::fs::read_to_string(file(name)).expect("the checkpoint has it");
        std::fs::write(file(name), text.replace("MEAN_STD", "IDENTITY"))
            .expect("it can be written");
    }
    let info = json!({ "action_names": names, "action_rate_hz": 20.0 });
    std::fs::write(file("sinew.json"), info.to_string()).expect("it can be written");
    let text = std::fs::read_to_string(file("config.json")).expect("the checkpoint has it");
    let mut config: Value = serde_json::from_str(&text).expect("it is JSON");
    config["input_features"]["observation.state"]["shape"] = json!([names.len()]);
    config["output_features"]["action"]["shape"] = json!([names.len()]);
    std::fs::write(file("config.json"), config.to_string()).expect("it can be written");
    let inputs = config["input_features"].as_object().expect("features by name");
    let images = inputs.keys().filter_map(|name| name.strip_prefix("observation.images."));
    images.map(str::to_owned).collect()
}

/// A launch file for that checkpoint at a free port, with `extra` in its table of cameras.
fn launch_text(inputs: &[String], extra: &str) -> (String, u16) {
    let robot = ["\"front\"", "\"wrist\""];
    let views: Vec<String> = inputs
        .iter()
        .zip(robot.iter().cycle())
        .map(|(input, at)| format!("{input} = {at}"))
        .collect();
    let views = format!("cameras = {{ {}{extra} }}", views.join(", "));
    let (endpoint, port) = free_endpoint();
    let text = BASE
        .replacen("policy.gguf", "checkpoint", 1)
        .replacen("cameras = { front = \"front\", wrist = \"wrist\" }", &views, 1)
        .replacen("tcp/127.0.0.1:7447", &endpoint, 1);
    (text, port)
}

fn assert_finding(output: &Output, place: &str, named: &[&str]) {
    assert_eq!(output.code, LAUNCH_FILE, "{}", output.stderr);
    assert!(output.stderr.contains(place), "{place} in {}", output.stderr);
    for word in named {
        assert!(output.stderr.contains(word), "`{word}` in {}", output.stderr);
    }
    output.assert_one_paragraph();
}

#[test]
fn a_launch_without_mistakes_passes_the_check() {
    let folder = Folder::new();
    let (text, _) = launch_text(&checkpoint(&folder, &JOINTS), "");
    let file = folder.launch_file(&text);
    let check = sinew(&["check", &file, "seed:=7"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    assert!(check.stdout.contains("nothing is wrong"), "{}", check.stdout);
    assert!(check.stderr.contains("seed:=\"7\" (given)"), "{}", check.stderr);
    let check = sinew(&["check", &file, "rate:=50 Hz", "--json"]);
    let config: Value = serde_json::from_str(&check.stdout).expect("stdout is JSON");
    assert_eq!(config["control"]["rate_hz"], json!(50.0), "{}", check.stdout);
}

#[test]
fn a_camera_that_the_policy_does_not_know_is_refused() {
    let folder = Folder::new();
    let inputs = checkpoint(&folder, &JOINTS);
    let (text, _) = launch_text(&inputs, ", ceiling = \"front\"");
    let file = folder.launch_file(&text);
    let place = format!("{file}:{}: policy.cameras", line_of(&text, "ceiling"));
    let named = ["ceiling", "no such camera input", "its inputs are", &inputs[0]];
    assert_finding(&sinew(&["check", &file]), &place, &named);
    assert_finding(&sinew(&["launch", &file, "--headless"]), &place, &named);
}

#[test]
fn an_input_without_a_camera_is_refused() {
    let folder = Folder::new();
    let inputs = checkpoint(&folder, &JOINTS);
    let (text, _) = launch_text(&[], "");
    let file = folder.launch_file(&text);
    let named = ["policy.cameras", "given no camera", &inputs[0]];
    assert_finding(&sinew(&["check", &file]), &file, &named);
}

#[test]
fn a_policy_for_another_number_of_joints_is_refused() {
    let folder = Folder::new();
    let (text, _) = launch_text(&checkpoint(&folder, &JOINTS[1..]), "");
    let file = folder.launch_file(&text);
    let place = format!("{file}:{}: policy.file", line_of(&text, "\"$policy\""));
    let named = ["5 values", "6 joints", "shoulder_pan", "trained for this arm"];
    assert_finding(&sinew(&["check", &file]), &place, &named);
    assert_finding(&sinew(&["launch", &file, "--headless"]), &place, &named);
}

#[test]
fn a_policy_for_joints_in_another_order_is_refused() {
    let folder = Folder::new();
    let mut names = JOINTS;
    names.swap(0, 1);
    let (text, _) = launch_text(&checkpoint(&folder, &names), "");
    let file = folder.launch_file(&text);
    let named = ["policy.file", "shoulder_lift, shoulder_pan", "trained for this arm"];
    assert_finding(&sinew(&["check", &file]), &file, &named);
}

#[test]
fn an_execution_horizon_beyond_the_chunk_is_refused() {
    let folder = Folder::new();
    let (text, _) = launch_text(&checkpoint(&folder, &JOINTS), "");
    let text = format!("{text}\n[scheduler]\nexecution_horizon = 9999\n");
    let file = folder.launch_file(&text);
    let place = format!("{file}:{}: ", line_of(&text, "9999"));
    assert_finding(
        &sinew(&["check", &file]),
        &place,
        &["execution_horizon = 9999", "choose fewer"],
    );
}

#[test]
fn a_port_that_is_taken_is_refused_before_anything_starts() {
    let folder = Folder::new();
    let (text, port) = launch_text(&checkpoint(&folder, &JOINTS), "");
    let file = folder.launch_file(&text);
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("it was free a moment ago");
    let place = format!("{file}:{}: transport.endpoint", line_of(&text, "endpoint"));
    let port = port.to_string();
    let named = ["cannot listen", &port, "another"];
    assert_finding(&sinew(&["check", &file]), &place, &named);
    let json = folder.path("report.json");
    assert_finding(&sinew(&["launch", &file, "--headless", "--json", &json]), &place, &named);
    assert!(!Path::new(&json).exists(), "nothing is written");
    drop(taken);
}

/// A launch of a policy with `names` as its values, with `keys` in its `[policy]`.
fn with_policy_keys(folder: &Folder, names: &[&str], keys: &str) -> String {
    let (text, _) = launch_text(&checkpoint(folder, names), "");
    text.replacen("[policy]", &format!("[policy]\n{keys}"), 1)
}

/// The shipped model of the simulated arm.
fn desk_arm() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("desk_arm.urdf");
    format!("urdf = \"{}\"\ntip = \"tip\"", file.display())
}

#[test]
fn a_policy_of_poses_needs_a_model_and_fits_its_space() {
    let seven = ["x", "y", "z", "ax", "ay", "az", "grip"];
    let pose = "action_space = \"ee_pose\"\nrotation = \"axis_angle\"\nstate = \"pose\"";
    let cases: [(&str, String, &[&str]); 4] = [
        ("ee_pose", pose.to_owned(), &["policy.action_space", "kinematic model", "urdf and tip"]),
        (
            "ee_delta",
            format!("action_space = \"ee_delta\"\nrotation = \"6d\"\n{}", desk_arm()),
            &["frame is missing", "base or tool"],
        ),
        (
            "desk_arm.urdf",
            format!("{pose}\n{}", desk_arm().replace("\"tip\"", "\"nose\"")),
            &["policy.urdf", "`nose`", "no such link", "jaw"],
        ),
        (
            "ee_pose",
            format!("{}\n{}", pose.replace("axis_angle", "6d"), desk_arm()),
            &["policy.action_space", "7 values", "10"],
        ),
    ];
    for (at, keys, named) in cases {
        let folder = Folder::new();
        let text = with_policy_keys(&folder, &seven, &keys);
        let file = folder.launch_file(&text);
        let place = format!("{file}:{}: ", line_of(&text, at));
        assert_finding(&sinew(&["check", &file]), &place, named);
    }
    let folder = Folder::new();
    let text = with_policy_keys(&folder, &seven, &format!("{pose}\n{}", desk_arm()));
    let check = sinew(&["check", &folder.launch_file(&text)]);
    assert_eq!(check.code, 0, "{}", check.stderr);
}

#[test]
fn a_checkpoint_says_its_own_action_space() {
    let folder = Folder::new();
    let (text, _) = launch_text(&checkpoint(&folder, &JOINTS), "");
    let info = json!({ "action_rate_hz": 20.0, "action_space": { "kind": "joint_delta" } });
    let at = Path::new(&folder.path("checkpoint")).join("sinew.json");
    std::fs::write(at, info.to_string()).expect("it can be written");
    let named = ["policy.action_space", "delta_from is missing"];
    let file = folder.launch_file(&text);
    assert_finding(&sinew(&["check", &file]), &file, &named);
    // The launch file says what the checkpoint leaves open.
    let text = text.replacen("[policy]", "[policy]\ndelta_from = \"observation\"", 1);
    let check = sinew(&["check", &folder.launch_file(&text)]);
    assert_eq!(check.code, 0, "{}", check.stderr);
}
