//! Arguments of a launch file: `[args]` declares them, `key:=value` sets them, `"$key"` stands for them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sinew_runtime::units;
use toml::Spanned;

use super::finding::{Finding, Findings, line_of};

/// `key:=value` from the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// The argument's name.
    pub key: String,
    /// Its value, as written.
    pub value: String,
}

impl std::str::FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text
            .split_once(":=")
            .ok_or_else(|| format!("`{text}` is no argument; write it like seed:=7"))?;
        Ok(Self { key: key.to_owned(), value: value.to_owned() })
    }
}

/// One argument as the launch runs with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Argument {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
    /// It came from the command line, not from the file's default.
    pub given: bool,
    /// What it is for.
    pub help: String,
}

#[derive(Deserialize)]
struct WithArgs {
    #[serde(default)]
    args: BTreeMap<String, Spanned<Declared>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Declared {
    #[serde(rename = "type")]
    kind: Kind,
    default: toml::Value,
    #[serde(default)]
    help: String,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    String,
    Path,
    Integer,
    Frequency,
    Duration,
}

impl Kind {
    /// Why `value` is none of this kind.
    fn refuse(self, value: &str) -> Option<String> {
        match self {
            Kind::String | Kind::Path => None,
            Kind::Integer => value
                .parse::<u64>()
                .is_err()
                .then(|| format!("`{value}` is no whole number; write it like 7")),
            Kind::Frequency => units::parse_frequency(value).err().map(|e| e.to_string()),
            Kind::Duration => units::parse_duration(value).err().map(|e| e.to_string()),
        }
    }
}

/// The text with every `"$name"` replaced by its value, and the values. Lines stay where they are.
pub(super) fn apply(
    file: &Path,
    text: &str,
    overrides: &[Override],
) -> Result<(String, Vec<Argument>), Findings> {
    let WithArgs { args } =
        toml::from_str(text).map_err(|e| super::schema::syntax(file, text, &e))?;
    let mut findings = Vec::new();
    let known = args.keys().cloned().collect::<Vec<_>>().join(", ");
    for given in overrides.iter().filter(|o| !args.contains_key(&o.key)) {
        findings.push(Finding {
            key: given.key.clone(),
            value: given.value.clone(),
            ..Finding::of_file(file, "the file has no such argument", format!("it has: {known}"))
        });
    }
    let mut out = text.to_owned();
    let mut arguments = Vec::new();
    for (name, declared) in &args {
        let line = line_of(text, declared.span().start);
        let declared = declared.get_ref();
        let given = overrides.iter().rfind(|o| o.key == *name);
        let value = match (given, &declared.default) {
            (Some(given), _) => given.value.clone(),
            (None, toml::Value::String(text)) => text.clone(),
            (None, other) => other.to_string(),
        };
        if let Some(problem) = declared.kind.refuse(&value) {
            findings.push(Finding {
                file: file.to_owned(),
                line: Some(line),
                key: format!("args.{name}"),
                value: value.clone(),
                problem,
                remedy: format!("give {name}:=… of the declared type, or mend the default"),
            });
            continue;
        }
        let written = match declared.kind {
            Kind::Integer => value.clone(),
            // A path from the command line is meant from where the command runs.
            Kind::Path if given.is_some() => {
                let path = std::path::absolute(&value).unwrap_or_else(|_| (&value).into());
                quoted(&path.display().to_string())
            }
            _ => quoted(&value),
        };
        // A value never spans lines, so that findings name the lines of the file.
        out = out.replace(&format!("\"${name}\""), &written);
        let (name, help) = (name.clone(), declared.help.clone());
        arguments.push(Argument { name, value, given: given.is_some(), help });
    }
    findings.extend(undeclared(file, text, &args, &known));
    if findings.is_empty() { Ok((out, arguments)) } else { Err(Findings(findings)) }
}

/// A TOML basic string on one line; JSON's escapes are a subset of TOML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A finding for every `"$name"` that no argument stands for.
fn undeclared(
    file: &Path,
    text: &str,
    args: &BTreeMap<String, Spanned<Declared>>,
    known: &str,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let code = line.split(" #").next().unwrap_or_default();
        let Some((_, rest)) = code.split_once("\"$") else { continue };
        if code.trim_start().starts_with('#') {
            continue;
        }
        let name: String = rest.chars().take_while(|c| *c != '"').collect();
        if args.contains_key(&name) {
            continue;
        }
        findings.push(Finding {
            file: file.to_owned(),
            line: Some(index + 1),
            key: code.split('=').next().unwrap_or_default().trim().to_owned(),
            value: format!("\"${name}\""),
            problem: "no such argument is declared".to_owned(),
            remedy: format!("[args] has: {known}"),
        });
    }
    findings
}
