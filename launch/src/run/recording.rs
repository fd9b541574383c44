//! The wiring of the black box: what a launch tells it, and where the threads' records go in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::Serialize;
use sha2::{Digest, Sha256};
use sinew_runtime::blackbox::{
    ControlTap, Header, Images, InferenceRecord, Note, RecordedPolicy, Recorder, RecorderInput,
    RecordingFigures,
};
use sinew_runtime::control::ControlConfig;
use sinew_runtime::{CameraFrame, JointState, Policy};

use super::Plan;
use super::operator;
use super::robot::RunError;
use crate::launch_file::LaunchConfig;
use crate::report::Machine;

/// Bytes read at once for a sum.
const BLOCK: usize = 1 << 20;

/// The recording of a run; of none, when nothing is to be recorded.
#[derive(Default)]
pub struct Recording {
    /// Until the recorder runs.
    setup: Option<Setup>,
    recorder: Option<(PathBuf, Recorder)>,
    inputs: Inputs,
}

/// Where the threads' records go in, once the recorder runs.
#[derive(Clone, Default)]
pub(super) struct Inputs(Arc<OnceLock<RecorderInput>>);

/// What is known before the run.
struct Setup {
    path: PathBuf,
    file: File,
    images: Images,
    policy: String,
    policy_sha256: BTreeMap<String, String>,
    launch_text: String,
    launch: serde_json::Value,
}

/// What the report says of a recording.
#[derive(Debug, Clone, Serialize)]
pub struct RecordingReport {
    /// The file.
    pub file: PathBuf,
    /// What is in it.
    #[serde(flatten)]
    pub figures: RecordingFigures,
}

impl Recording {
    /// Opens the file that `config`, or before it `given`, names; an existing one is kept and the name counted up.
    ///
    /// # Errors
    /// Why the file cannot be made, or the policy's files not be read.
    pub fn open(config: &LaunchConfig, given: Option<&Path>) -> Result<Self, String> {
        let Some(path) = given.or(config.record.file.as_deref()) else {
            return Ok(Self::default());
        };
        let (path, file) = create_new(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let text = |e: std::io::Error| format!("{}: {e}", config.file.display());
        let policy = &config.policy.file;
        let setup = Setup {
            policy_sha256: match policy.exists() {
                true => sums(policy).map_err(|e| format!("{}: {e}", policy.display()))?,
                // It runs on another computer.
                false => BTreeMap::new(),
            },
            policy: policy.display().to_string(),
            images: config.record.images,
            launch_text: std::fs::read_to_string(&config.file).map_err(text)?,
            launch: serde_json::to_value(config).map_err(|e| e.to_string())?,
            path,
            file,
        };
        Ok(Self { setup: Some(setup), ..Self::default() })
    }

    /// Frames are recorded, also when nobody else here needs them.
    pub(super) fn wants_frames(&self) -> bool {
        self.setup.as_ref().is_some_and(|s| s.images != Images::None)
    }

    /// Where records go in.
    pub(super) fn inputs(&self) -> Inputs {
        self.inputs.clone()
    }

    /// Starts the recorder, when there is one, and gives the control thread's end of it.
    pub(super) fn start(
        &mut self,
        plan: &Plan,
        control: &ControlConfig,
    ) -> Result<ControlTap, RunError> {
        let Some(setup) = self.setup.take() else { return Ok(ControlTap::off()) };
        let header = Header {
            authority: operator::control(plan),
            space: Some(plan.space.clone()),
            residual: plan.residual,
            denoise_steps: plan.denoise_steps,
            seed: plan.seed,
            views: plan.views.clone(),
            max_observation_age: plan.max_observation_age,
            images: setup.images,
            actions: plan.actions.clone(),
            policy: setup.policy,
            policy_sha256: setup.policy_sha256,
            launch_text: setup.launch_text,
            launch: setup.launch,
            // Plain text and numbers.
            machine: serde_json::to_value(Machine::this()).unwrap_or_default(),
            ..Header::new(&plan.robot, &plan.joints, control)
        };
        let (recorder, tap) = Recorder::start(Synced(setup.file), &header)
            .map_err(|e| RunError::Recording { file: setup.path.clone(), reason: e.to_string() })?;
        // Set once: `setup` was there.
        let _ = self.inputs.0.set(recorder.input());
        self.recorder = Some((setup.path, recorder));
        Ok(tap)
    }

    /// Ends the file; the control thread must have ended before.
    pub(super) fn finish(&mut self) -> Option<RecordingReport> {
        let (file, recorder) = self.recorder.take()?;
        Some(RecordingReport { file, figures: recorder.finish() })
    }
}

impl Inputs {
    pub fn frame(&self, camera: &Arc<str>, frame: &CameraFrame) {
        if let Some(input) = self.0.get() {
            input.frame(camera, frame);
        }
    }

    pub fn state(&self, state: &JointState) {
        if let Some(input) = self.0.get() {
            input.state(state);
        }
    }

    /// An inference of a policy in another process; its frames come over the bus as well.
    pub fn inference(&self, record: InferenceRecord) {
        if let Some(input) = self.0.get() {
            input.inference(record, Vec::new());
        }
    }

    pub fn note(&self, note: Note) {
        if let Some(input) = self.0.get() {
            input.note(note);
        }
    }

    /// `policy`, its inferences recorded when the recorder runs.
    pub fn policy(&self, policy: Box<dyn Policy>) -> Box<dyn Policy> {
        match self.0.get() {
            Some(input) => {
                let input = input.clone();
                let sink = move |record, frames| input.inference(record, frames);
                Box::new(RecordedPolicy::new(policy, sink))
            }
            None => policy,
        }
    }
}

/// A file whose flush reaches the disk.
struct Synced(File);

impl Write for Synced {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.sync_data()
    }
}

impl Seek for Synced {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

/// A new file called `path`, or `path` with the first free number behind its stem.
fn create_new(path: &Path) -> std::io::Result<(PathBuf, File)> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let end = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    let mut tried = path.to_owned();
    for number in 2.. {
        match File::options().read(true).write(true).create_new(true).open(&tried) {
            Ok(file) => return Ok((tried, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                tried = path.with_file_name(format!("{stem}-{number}{end}"));
            }
            Err(e) => return Err(e),
        }
    }
    Err(std::io::ErrorKind::AlreadyExists.into())
}

/// SHA-256 of the policy's file, or of each file of its folder, by name; hidden ones are left out.
pub fn sums(policy: &Path) -> std::io::Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if policy.is_file() {
        out.insert(name(policy), sum(policy)?);
        return Ok(out);
    }
    for entry in std::fs::read_dir(policy)? {
        let path = entry?.path();
        let own = name(&path);
        if own.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            out.extend(sums(&path)?.into_iter().map(|(k, v)| (format!("{own}/{k}"), v)));
        } else {
            out.insert(own, sum(&path)?);
        }
    }
    Ok(out)
}

fn sum(file: &Path) -> std::io::Result<String> {
    let (mut file, mut hash) = (File::open(file)?, Sha256::new());
    let mut block = vec![0; BLOCK];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&block[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_recording_is_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("run.mcap");
        let name = |path: PathBuf| create_new(&path).expect("writable").0;
        assert_eq!(name(path.clone()), path);
        assert_eq!(name(path.clone()), folder.path().join("run-2.mcap"));
        assert_eq!(name(path), folder.path().join("run-3.mcap"));
    }

    #[test]
    fn every_file_of_a_policy_has_its_sum() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("vlm")).expect("writable");
        for (name, text) in [("config.json", "abc"), ("vlm/tokenizer.json", ""), (".cache", "x")] {
            std::fs::write(folder.path().join(name), text).expect("writable");
        }
        let found = sums(folder.path()).expect("readable");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(found["config.json"], abc);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["config.json", "vlm/tokenizer.json"]);
    }
}
