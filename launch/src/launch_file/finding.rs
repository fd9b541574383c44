//! What is wrong with a launch, where, and what to do about it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The file that it is in.
    pub file: PathBuf,
    /// Line, from 1; `None` where the file as a whole is meant.
    pub line: Option<usize>,
    /// Key, such as `control.rate`; empty where the file as a whole is meant.
    pub key: String,
    /// What stands there.
    pub value: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    /// A mistake of `file` as a whole.
    pub fn of_file(file: &Path, problem: impl ToString, remedy: impl ToString) -> Self {
        Self {
            file: file.to_owned(),
            line: None,
            key: String::new(),
            value: String::new(),
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": ")?;
        if !self.key.is_empty() {
            write!(f, "{} = {}: ", self.key, self.value)?;
        }
        write!(f, "{}", self.problem)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

/// All mistakes of a launch; never empty when it is an error.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
#[serde(transparent)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    /// A single mistake.
    pub fn one(finding: Finding) -> Self {
        Self(vec![finding])
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (k, finding) in self.0.iter().enumerate() {
            if k > 0 {
                writeln!(f)?;
            }
            write!(f, "{finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Findings {}

/// The line (from 1) of byte `at` in `text`.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}

/// What stands at `span` in `text`, on one line.
pub(super) fn value_at(text: &str, span: &Range<usize>) -> String {
    text.get(span.clone()).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}
