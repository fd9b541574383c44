//! Why a verb failed, and the exit code that says so.

use std::fmt;
use std::process::ExitCode;

use sinew_models::ModelError;

use crate::launch_file::Findings;
use crate::run::RunError;

/// Why a verb failed.
#[derive(Debug)]
pub enum Failure {
    /// The launch file, or what it names, is wrong.
    Launch(Findings),
    /// A model is wrong.
    Model(ModelError),
    /// A run did not start or go on.
    Run(RunError),
    /// A run's or a comparison's result is bad, or its files could not be written.
    Result(String),
}

impl Failure {
    /// The process's exit code.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Result(_) => 1,
            Failure::Launch(_) => 3,
            Failure::Model(_) | Failure::Run(RunError::Policy(_)) => 4,
            Failure::Run(_) => 5,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Launch(findings) if findings.0.len() > 1 => {
                write!(f, "{} mistakes; nothing was started\n{findings}", findings.0.len())
            }
            Failure::Launch(findings) => write!(f, "{findings}"),
            Failure::Model(error) => write!(f, "{error}"),
            Failure::Run(error) => write!(f, "{error}"),
            Failure::Result(text) => write!(f, "{text}"),
        }
    }
}

impl From<Findings> for Failure {
    fn from(findings: Findings) -> Self {
        Failure::Launch(findings)
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Failure::Model(error)
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        Failure::Run(error)
    }
}
