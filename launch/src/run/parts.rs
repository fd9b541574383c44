//! The parts of a launch, and which of them run where.

use std::collections::BTreeSet;
use std::fmt;

use crate::launch_file::{Finding, Findings, LaunchConfig, RunSettings};

/// A part of a launch: what can run in a process of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The control thread with scheduler, arbiter and guard, and the run itself.
    Control,
    /// Ingest and the policy.
    Policy,
    /// The arm's driver; with `driver = "sim"` the simulator and its cameras.
    Arm,
    /// A camera's driver.
    Camera(String),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Control => write!(f, "control"),
            Part::Policy => write!(f, "policy"),
            Part::Arm => write!(f, "arm"),
            Part::Camera(name) => write!(f, "cameras.{name}"),
        }
    }
}

/// Where the parts of a launch run. What is neither here nor a child runs elsewhere: in another process, or on
/// another computer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// In this process.
    pub here: BTreeSet<Part>,
    /// In supervised processes of their own.
    pub children: BTreeSet<Part>,
}

/// All parts of `config`, and how each is to run. The simulator's cameras are no parts: they live in the arm's.
pub fn parts(config: &LaunchConfig) -> Vec<(Part, RunSettings)> {
    let control = RunSettings { process: false, restart: crate::supervise::Restart::Never };
    let mut list = vec![
        (Part::Control, control),
        (Part::Policy, config.policy.run),
        (Part::Arm, config.robot.run),
    ];
    let own = config.cameras.iter().filter(|c| c.driver != "sim");
    list.extend(own.map(|c| (Part::Camera(c.name.clone()), c.run)));
    list
}

impl Placement {
    /// Everything in this process.
    pub fn all_here(config: &LaunchConfig) -> Self {
        let here = parts(config).into_iter().map(|p| p.0).collect();
        Self { here, children: BTreeSet::new() }
    }

    /// What the launch file says, or just the parts named in `only`.
    ///
    /// # Errors
    /// A finding for a name that is no part of the launch.
    pub fn new(config: &LaunchConfig, only: &[String]) -> Result<Self, Findings> {
        let all = parts(config);
        if only.is_empty() {
            let (children, here): (Vec<_>, Vec<_>) = all.into_iter().partition(|p| p.1.process);
            let names = |list: Vec<(Part, RunSettings)>| list.into_iter().map(|p| p.0).collect();
            return Ok(Self { here: names(here), children: names(children) });
        }
        let mut here = BTreeSet::new();
        let mut findings = Vec::new();
        for name in only {
            let named = |p: &&(Part, RunSettings)| {
                p.0.to_string() == *name || (name == "cameras" && matches!(p.0, Part::Camera(_)))
            };
            let found: Vec<Part> = all.iter().filter(named).map(|p| p.0.clone()).collect();
            if found.is_empty() {
                let known = all.iter().map(|p| p.0.to_string()).collect::<Vec<_>>().join(", ");
                let simulated =
                    config.cameras.iter().any(|c| format!("cameras.{}", c.name) == *name);
                let problem = match simulated || name == "cameras" {
                    true => "the simulator's cameras run with the arm",
                    false => "the launch has no such part",
                };
                let remedy = format!("its parts are: {known}");
                findings.push(Finding {
                    key: "--only".to_owned(),
                    value: name.clone(),
                    ..Finding::of_file(&config.file, problem, remedy)
                });
            }
            here.extend(found);
        }
        if findings.is_empty() {
            Ok(Self { here, children: BTreeSet::new() })
        } else {
            Err(Findings(findings))
        }
    }

    /// Whether `part` runs in this process.
    pub fn here(&self, part: &Part) -> bool {
        self.here.contains(part)
    }
}
