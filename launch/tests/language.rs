//! The launch-file language: precedence of arguments, paths, and the two files that show it.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{BASE, Folder, sinew};
use sinew_launch::launch_file::{KEYS, LaunchConfig, Override, load};

fn overrides(arguments: &[&str]) -> Vec<Override> {
    arguments.iter().map(|a| a.parse().expect("it has `:=`")).collect()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Loads a shipped launch file with a policy file that exists.
fn load_shipped(name: &str, folder: &Folder) -> LaunchConfig {
    let policy = format!("policy:={}", folder.path("policy.gguf"));
    match load(&shipped(name), &overrides(&[&policy])) {
        Ok(config) => config,
        Err(findings) => panic!("{findings}"),
    }
}

#[test]
fn the_command_line_comes_before_the_file() {
    let folder = Folder::new();
    let file = PathBuf::from(folder.launch_file(BASE));
    let with = |arguments: &[&str]| load(&file, &overrides(arguments)).expect("no mistakes");
    let plain = with(&[]);
    assert_eq!((plain.robot.seed, plain.control.rate_hz), (1, 100.0));
    let given = with(&["seed:=7", "rate:=200 Hz"]);
    assert_eq!((given.robot.seed, given.control.rate_hz), (7, 200.0));
    let from = |config: &LaunchConfig, name: &str| {
        config.arguments.iter().find(|a| a.name == name).map(|a| (a.value.clone(), a.given))
    };
    assert_eq!(from(&plain, "seed"), Some(("1".into(), false)));
    assert_eq!(from(&given, "seed"), Some(("7".into(), true)));
    // What neither gives has the built-in default.
    assert_eq!((plain.control.priority, plain.control.velocity_scale), (80, 1.0));
    assert_eq!(plain.scheduler.execution_horizon, None);
}

#[test]
fn the_arguments_are_printed_in_one_line_with_their_origin() {
    let folder = Folder::new();
    let file = folder.launch_file(BASE);
    // The policy cannot be loaded, so the launch ends right after that line.
    let output = sinew(&["launch", &file, "seed:=7", "--headless"]);
    let line = output.stderr.lines().find(|l| l.contains("seed")).unwrap_or_default();
    for part in ["launch.toml", "seed:=\"7\" (given)", "rate:=\"100 Hz\" (default)"] {
        assert!(line.contains(part), "`{part}` in {}", output.stderr);
    }
}

#[test]
fn values_with_quotes_and_backslashes_arrive_as_they_were_typed() {
    let folder = Folder::new();
    let text = BASE
        .replacen("[args]", "[args]\ntask = { type = \"string\", default = \"\" }", 1)
        .replacen("[policy]", "[policy]\ninstruction = \"$task\"", 1);
    let file = PathBuf::from(folder.launch_file(&text));
    for task in ["put the \"red\" cube\\left", "a = 1 # b", "$seed", "größer ✓"] {
        let given = Override { key: "task".into(), value: task.into() };
        let config = load(&file, &[given]).expect("no mistakes");
        assert_eq!(config.policy.instruction, task);
    }
}

#[test]
fn paths_belong_to_the_launch_file_or_to_where_the_command_runs() {
    let folder = Folder::new();
    let file = PathBuf::from(folder.launch_file(BASE));
    let config = load(&file, &[]).expect("no mistakes");
    assert_eq!(config.policy.file, folder.as_path().join("policy.gguf"));
    // `Cargo.toml` is there where the tests run, and not beside the launch file.
    let config = load(&file, &overrides(&["policy:=Cargo.toml"])).expect("no mistakes");
    assert!(config.policy.file.is_absolute() && config.policy.file.is_file());
}

#[test]
fn the_demo_fits_on_a_screen_and_loads() {
    let folder = Folder::new();
    let config = load_shipped("demo.toml", &folder);
    assert_eq!(config.arguments.len(), 6);
    let text = std::fs::read_to_string(shipped("demo.toml")).expect("it is shipped");
    assert!(text.lines().count() <= 50, "{} lines", text.lines().count());
    assert!(text.lines().all(|l| l.chars().count() <= 120));
}

#[test]
fn the_reference_loads_and_shows_every_key_and_no_other() {
    let folder = Folder::new();
    load_shipped("reference.toml", &folder);
    let text = std::fs::read_to_string(shipped("reference.toml")).expect("it is shipped");
    let table: toml::Table = text.parse().expect("it was just loaded");
    let mut shown = BTreeSet::new();
    for (section, content) in &table {
        let content = content.as_table().expect("only sections at the top");
        match section.as_str() {
            "args" => drop(shown.insert("args".to_owned())),
            "cameras" => {
                let cameras = content.values().filter_map(toml::Value::as_table);
                shown.extend(cameras.flat_map(toml::Table::keys).map(|k| format!("cameras.{k}")));
            }
            _ => shown.extend(content.keys().map(|key| format!("{section}.{key}"))),
        }
    }
    assert_eq!(shown, keys(""));
    for line in text.lines().filter(|l| l.contains(" = ") && !l.starts_with('#')) {
        let explained = line.contains('#') || line.contains("help =") || line.contains("driver =");
        assert!(explained || text.matches(line).count() > 1, "not explained: {line}");
    }
}

/// Asks the reader itself which keys a section has, by giving it one that it does not know.
#[test]
fn the_list_of_keys_is_the_readers() {
    let folder = Folder::new();
    for section in
        ["robot", "policy", "scheduler", "control", "teleop", "guard", "transport", "cameras.front"]
    {
        let header = format!("[{section}]");
        let text = match BASE.contains(&header) {
            true => BASE.replacen(&header, &format!("{header}\nno_such_key = 1"), 1),
            false => format!("{BASE}\n{header}\nno_such_key = 1\n"),
        };
        let file = PathBuf::from(folder.launch_file(&text));
        let findings = load(&file, &[]).expect_err("the key is not known").to_string();
        let (_, expected) = findings.split_once("expected").expect("it says what is known");
        let expected = expected.split_once("; ").map_or(expected, |e| e.0);
        let section = section.split('.').next().unwrap_or_default();
        let read: BTreeSet<String> =
            expected.split('`').skip(1).step_by(2).map(|k| format!("{section}.{k}")).collect();
        assert_eq!(read, keys(&format!("{section}.")), "{findings}");
    }
}

fn keys(prefix: &str) -> BTreeSet<String> {
    KEYS.iter().filter(|k| k.starts_with(prefix)).map(|k| (*k).to_owned()).collect()
}
