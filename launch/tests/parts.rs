//! Which parts run where: what the launch file says, `--only`, and the mistakes that can be made in both.

mod common;

use std::path::Path;

use common::{BASE, Folder, line_of, sinew};
use sinew_launch::launch_file::{LaunchConfig, load};
use sinew_launch::run::{Part, Placement};

const CARD: &str = "\n[cameras.card]\ndriver = \"pattern\"\nsize = [64, 48]\nrate = \"10 Hz\"\n";

fn config(text: &str) -> LaunchConfig {
    let folder = Folder::new();
    let file = folder.launch_file(text);
    load(Path::new(&file), &[]).unwrap_or_else(|findings| panic!("{findings}"))
}

fn only(config: &LaunchConfig, names: &[&str]) -> Result<Vec<Part>, String> {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let placement = Placement::new(config, &names).map_err(|findings| findings.to_string())?;
    assert!(placement.children.is_empty(), "who runs some parts only supervises nobody");
    Ok(placement.here.into_iter().collect())
}

#[test]
fn everything_runs_in_one_process_unless_the_file_says_otherwise() {
    let plain = config(&format!("{BASE}{CARD}"));
    let placement = Placement::new(&plain, &[]).expect("no part is named");
    assert_eq!(placement, Placement::all_here(&plain));
    assert_eq!(
        placement.here.len(),
        4,
        "control, policy, arm, and the camera that is no simulated one"
    );

    let text = format!("{BASE}{CARD}run = \"process\"\n")
        .replace("[policy]\n", "[policy]\nrun = \"process\"\n");
    let split = Placement::new(&config(&text), &[]).expect("no part is named");
    let children: Vec<_> = split.children.into_iter().collect();
    assert_eq!(children, [Part::Policy, Part::Camera("card".to_owned())]);
    assert!(split.here.contains(&Part::Control) && split.here.contains(&Part::Arm));
}

#[test]
fn only_names_parts_and_refuses_what_is_none() {
    let config = config(&format!("{BASE}{CARD}"));
    assert_eq!(only(&config, &["policy"]), Ok(vec![Part::Policy]));
    assert_eq!(
        only(&config, &["cameras", "arm"]),
        Ok(vec![Part::Arm, Part::Camera("card".into())])
    );
    let refused = only(&config, &["legs"]).expect_err("an arm has none");
    assert!(refused.contains("the launch has no such part"), "{refused}");
    assert!(refused.contains("control, policy, arm, cameras.card"), "{refused}");
    let refused = only(&config, &["cameras.front"]).expect_err("it is the simulator's");
    assert!(refused.contains("run with the arm"), "{refused}");
}

#[test]
fn the_example_runs_its_policy_and_its_robot_as_processes() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("two_processes.toml");
    let config = load(&file, &[]).unwrap_or_else(|findings| panic!("{findings}"));
    let placement = Placement::new(&config, &[]).expect("no part is named");
    let children: Vec<_> = placement.children.into_iter().collect();
    assert_eq!(children, [Part::Policy, Part::Arm]);
}

#[test]
fn mistakes_about_processes_name_the_line_and_the_remedy() {
    let folder = Folder::new();
    let text = BASE
        .replace("[policy]\n", "[policy]\nrestart = \"never\"\n")
        .replace("[robot]\n", "[robot]\nrun = \"computer\"\n")
        .replace("[cameras.wrist]\n", "[cameras.wrist]\nrun = \"process\"\n");
    let file = folder.launch_file(&text);
    let output = sinew(&["check", &file]);
    assert_eq!(output.code, 3, "{}", output.stderr);
    output.assert_one_paragraph();
    for (part, problem) in [
        ("restart = \"never\"", "policy.restart = \"never\": only a process is restarted"),
        (
            "run = \"computer\"",
            "robot.run = \"computer\": is not known; it is one of: thread, process",
        ),
        ("run = \"process\"", "a simulated camera lives in the simulator"),
    ] {
        let line = format!("launch.toml:{}: ", line_of(&text, part));
        let said = output.stderr.lines().find(|l| l.contains(problem));
        assert!(said.is_some_and(|l| l.contains(&line)), "{problem}\n{}", output.stderr);
    }
}
