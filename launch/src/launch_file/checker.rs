//! Reads single values of a launch file and collects what is wrong with them.

use std::path::Path;
use std::time::Duration;

use sinew_runtime::units;
use toml::Spanned;

use crate::supervise::Restart;

use super::finding::{Finding, Findings, line_of, value_at};
use super::schema;
use super::settings::RunSettings;

/// Collects findings with the place that they are about.
pub(super) struct Checker<'a> {
    file: &'a Path,
    text: &'a str,
    pub(super) findings: Vec<Finding>,
    pub(super) lines: Vec<(&'static str, usize)>,
}

impl<'a> Checker<'a> {
    /// A checker of `text`, which `file` holds.
    pub fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text, findings: Vec::new(), lines: Vec::new() }
    }

    /// All that was found.
    pub fn done(self) -> Result<(), Findings> {
        if self.findings.is_empty() { Ok(()) } else { Err(Findings(self.findings)) }
    }

    pub fn report<T>(&mut self, key: &str, at: &Spanned<T>, problem: impl ToString, remedy: &str) {
        self.findings.push(Finding {
            file: self.file.to_owned(),
            line: Some(line_of(self.text, at.span().start)),
            key: key.to_owned(),
            value: value_at(self.text, &at.span()),
            problem: problem.to_string(),
            remedy: remedy.to_owned(),
        });
    }

    /// Remembers where `key` stands, for findings that are made later.
    pub fn note<T>(&mut self, key: &'static str, at: &Spanned<T>) {
        self.lines.push((key, line_of(self.text, at.span().start)));
    }

    pub fn duration(&mut self, key: &str, at: &schema::Text) -> Duration {
        let value = units::parse_duration(at.get_ref());
        match value {
            Ok(value) if !value.is_zero() => value,
            Ok(_) => {
                self.report(key, at, "must be longer than nothing", "write it like \"100 ms\"");
                Duration::from_millis(1)
            }
            Err(e) => {
                self.report(key, at, e, "");
                Duration::from_millis(1)
            }
        }
    }

    /// A frequency (Hz) between `lowest` and `highest`.
    pub(super) fn frequency(
        &mut self,
        key: &str,
        at: &schema::Text,
        lowest: f64,
        highest: f64,
    ) -> f64 {
        match units::parse_frequency(at.get_ref()) {
            Ok(hz) if (lowest..=highest).contains(&hz) => return hz,
            Ok(_) => {
                let problem = format!("outside {lowest} Hz to {highest} Hz");
                self.report(key, at, problem, "choose a rate in that range");
            }
            Err(e) => self.report(key, at, e, ""),
        }
        lowest
    }

    pub fn one_of(&mut self, key: &str, at: &schema::Text, known: &[&str]) {
        if !known.contains(&at.get_ref().as_str()) {
            let remedy = format!("it is one of: {}", known.join(", "));
            self.report(key, at, "is not known", &remedy);
        }
    }

    pub fn endpoint(&mut self, key: &str, at: &schema::Text) {
        if !["tcp/", "unixsock-stream/"].iter().any(|p| at.get_ref().starts_with(p)) {
            self.report(key, at, "is no endpoint", "write it like \"tcp/127.0.0.1:7447\"");
        }
    }

    /// The settings of `run` and `restart` under `table`.
    pub(super) fn run(
        &mut self,
        table: &str,
        run: Option<&schema::Text>,
        restart: Option<&schema::Text>,
    ) -> RunSettings {
        if let Some(at) = run {
            self.one_of(&format!("{table}.run"), at, &["thread", "process"]);
        }
        if let Some(at) = restart {
            self.one_of(&format!("{table}.restart"), at, &["on-failure", "never"]);
        }
        let process = run.is_some_and(|r| r.get_ref() == "process");
        let never = restart.is_some_and(|r| r.get_ref() == "never");
        if let (Some(at), false) = (restart, process) {
            let remedy = "give it run = \"process\", or leave `restart` out";
            self.report(&format!("{table}.restart"), at, "only a process is restarted", remedy);
        }
        RunSettings { process, restart: if never { Restart::Never } else { Restart::OnFailure } }
    }

    /// A share above 0 and at most 1; 1 when the file says none.
    pub(super) fn scale(&mut self, key: &str, at: Option<&Spanned<f64>>) -> f64 {
        let Some(at) = at else { return 1.0 };
        let value = *at.get_ref();
        if !(value > 0.0 && value <= 1.0) {
            self.report(
                key,
                at,
                "must be above 0 and at most 1",
                "1.0 uses the description's limits",
            );
        }
        value
    }
}
