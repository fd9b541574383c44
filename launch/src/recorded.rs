//! What policies saw in recorded runs, for calibrating and measuring others on it.

use std::path::PathBuf;

use sinew_runtime::{Observation, Policy};

use crate::cli::Failure;
use crate::replay;
use crate::run::Renamed;

/// Cameras: policy's name, robot's name.
type Views = Vec<(String, String)>;

/// Observations run by run, and how a policy sees them.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// Run by run, in the order in which they were made, under the robot's names.
    pub streams: Vec<Vec<Observation>>,
    views: Views,
    prompt: Option<String>,
}

impl Recorded {
    /// What is in the recordings `files`. `cameras` (policy's name, robot's name) replaces what they say of those.
    ///
    /// # Errors
    /// [`Failure::Result`] for a file that is no recording, has no frames, speaks of poses, or does not go with those
    /// before it.
    pub fn read(files: &[PathBuf], cameras: &[(String, String)]) -> Result<Self, Failure> {
        let mut streams = Vec::with_capacity(files.len());
        let mut view: Option<(Views, Option<String>)> = None;
        for file in files {
            let (header, seen) = replay::observations(file)?;
            if header.actions.is_some() {
                return Err(Failure::Result(format!(
                    "{}: its policy speaks of poses; use recordings in joint positions",
                    file.display()
                )));
            }
            let own = (header.views.clone(), replay::prompt(&header));
            if view.get_or_insert_with(|| own.clone()) != &own {
                return Err(Failure::Result(format!(
                    "{}: it was made with other cameras or another prompt than the recordings before it",
                    file.display()
                )));
            }
            streams.push(seen);
        }
        let (views, prompt) = view.unwrap_or_default();
        let views = if cameras.is_empty() { views } else { cameras.to_vec() };
        Ok(Self { streams, views, prompt })
    }

    /// At most `most` observations, spread over all runs.
    pub fn spread(&self, most: usize) -> Vec<Observation> {
        let all: usize = self.streams.iter().map(Vec::len).sum();
        let step = all.div_ceil(most.max(1)).max(1);
        self.streams.iter().flatten().step_by(step).cloned().collect()
    }

    /// `policy`, seeing these observations as its own.
    pub fn seen_by(&self, policy: Box<dyn Policy>) -> Box<dyn Policy> {
        let renamed = Renamed::new(policy, self.views.clone());
        Box::new(renamed.with_prompt(self.prompt.clone()))
    }
}

/// A camera on the command line: `POLICY=ROBOT`.
///
/// # Errors
/// When there is no `=` between two names.
pub fn camera(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((policy, robot)) if !policy.is_empty() && !robot.is_empty() => {
            Ok((policy.to_owned(), robot.to_owned()))
        }
        _ => Err("write it like camera1=front: the policy's name, then the robot's".to_owned()),
    }
}
