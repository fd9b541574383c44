//! The launch file's keys, as serde reads them. Meanings and units are in `launch/reference.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use super::finding::{Finding, Findings, line_of};

/// Every key of a launch file; `reference.toml` shows each of them.
pub const KEYS: &[&str] = &[
    "args",
    "robot.name",
    "robot.driver",
    "robot.description",
    "robot.state_rate",
    "robot.watchdog",
    "robot.on_silence",
    "robot.on_stop",
    "robot.endpoint",
    "robot.run",
    "robot.restart",
    "robot.seed",
    "cameras.driver",
    "cameras.size",
    "cameras.rate",
    "cameras.run",
    "cameras.restart",
    "policy.file",
    "policy.instruction",
    "policy.prompt",
    "policy.cameras",
    "policy.action_space",
    "policy.frame",
    "policy.rotation",
    "policy.delta_from",
    "policy.gripper",
    "policy.gripper_range",
    "policy.state",
    "policy.urdf",
    "policy.base",
    "policy.tip",
    "policy.refuse_distance",
    "policy.refuse_angle",
    "policy.rotation_lever",
    "policy.candidates",
    "policy.solver",
    "policy.streaming",
    "policy.verifier",
    "policy.past_actions",
    "policy.memory",
    "policy.memory_records",
    "policy.memory_similarity",
    "policy.cache_denoiser",
    "policy.cache_warm_start",
    "policy.cache_vision",
    "policy.cache_vision_refresh",
    "policy.cache_prefix",
    "policy.cache_when",
    "policy.cache_check",
    "policy.cache_tolerance",
    "policy.early_exit",
    "policy.cache_compare",
    "policy.cache_compare_limit",
    "policy.denoise_steps",
    "policy.compute",
    "policy.threads",
    "policy.cores",
    "policy.max_observation_age",
    "policy.seed",
    "policy.onnx_engine",
    "policy.onnx_library",
    "policy.residual",
    "policy.residual_limit",
    "policy.run",
    "policy.restart",
    "scheduler.strategy",
    "scheduler.execution_horizon",
    "scheduler.ensemble_decay",
    "scheduler.guidance_mask",
    "scheduler.guidance_weight",
    "scheduler.guidance_horizon",
    "scheduler.least_denoise_steps",
    "control.rate",
    "control.realtime",
    "control.priority",
    "control.cpu",
    "control.state_timeout",
    "control.resume",
    "control.operators",
    "teleop.lease",
    "teleop.timeout",
    "teleop.align_speed",
    "teleop.correction",
    "guard.velocity_scale",
    "guard.acceleration_scale",
    "guard.jerk_scale",
    "guard.workspace",
    "guard.planes",
    "guard.self_collision",
    "guard.barrier_rate",
    "transport.endpoint",
    "record.file",
    "record.images",
];

pub(super) type Text = Spanned<String>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default, rename = "args")]
    pub _args: toml::Table,
    pub robot: Robot,
    #[serde(default)]
    pub cameras: BTreeMap<String, Camera>,
    pub policy: Policy,
    #[serde(default)]
    pub scheduler: Scheduler,
    pub control: Control,
    #[serde(default)]
    pub teleop: Teleop,
    #[serde(default)]
    pub guard: Guard,
    pub transport: Transport,
    #[serde(default)]
    pub record: Record,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub file: Option<Text>,
    pub images: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Robot {
    pub name: Text,
    pub driver: Text,
    pub description: Option<Text>,
    pub state_rate: Text,
    pub watchdog: Text,
    pub on_silence: Option<Text>,
    pub on_stop: Option<Text>,
    pub endpoint: Option<Text>,
    pub run: Option<Text>,
    pub restart: Option<Text>,
    #[serde(default)]
    pub seed: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Camera {
    pub driver: Text,
    pub size: Spanned<[usize; 2]>,
    pub rate: Text,
    pub run: Option<Text>,
    pub restart: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    pub file: Text,
    #[serde(default)]
    pub instruction: String,
    pub prompt: Option<Text>,
    pub cameras: BTreeMap<String, Text>,
    pub action_space: Option<Text>,
    pub frame: Option<Text>,
    pub rotation: Option<Text>,
    pub delta_from: Option<Text>,
    pub gripper: Option<Text>,
    pub gripper_range: Option<Spanned<[f64; 2]>>,
    pub state: Option<Text>,
    pub urdf: Option<Text>,
    pub base: Option<Text>,
    pub tip: Option<Text>,
    pub refuse_distance: Option<Text>,
    pub refuse_angle: Option<Text>,
    pub rotation_lever: Option<Text>,
    pub candidates: Option<Spanned<usize>>,
    pub solver: Option<Text>,
    #[serde(default)]
    pub streaming: bool,
    pub verifier: Option<Text>,
    pub past_actions: Option<Spanned<usize>>,
    pub memory: Option<Text>,
    pub memory_records: Option<Spanned<usize>>,
    pub memory_similarity: Option<Spanned<f64>>,
    pub cache_denoiser: Option<Text>,
    #[serde(default)]
    pub cache_warm_start: bool,
    pub cache_vision: Option<Spanned<f64>>,
    pub cache_vision_refresh: Option<Spanned<usize>>,
    pub cache_prefix: Option<Spanned<bool>>,
    pub early_exit: Option<Text>,
    pub cache_when: Option<Text>,
    pub cache_check: Option<Spanned<f64>>,
    pub cache_tolerance: Option<Spanned<f64>>,
    pub cache_compare: Option<Spanned<usize>>,
    pub cache_compare_limit: Option<Spanned<f64>>,
    pub denoise_steps: Option<Spanned<usize>>,
    pub compute: Option<Text>,
    pub threads: Option<Spanned<usize>>,
    pub cores: Option<Spanned<Vec<usize>>>,
    pub max_observation_age: Text,
    pub onnx_engine: Option<Text>,
    pub onnx_library: Option<Text>,
    pub residual: Option<Text>,
    pub residual_limit: Option<Text>,
    pub run: Option<Text>,
    pub restart: Option<Text>,
    #[serde(default)]
    pub seed: u64,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Scheduler {
    pub strategy: Option<Text>,
    pub execution_horizon: Option<Spanned<usize>>,
    pub ensemble_decay: Option<Spanned<f64>>,
    pub guidance_mask: Option<Text>,
    pub guidance_weight: Option<Spanned<f64>>,
    pub guidance_horizon: Option<Spanned<usize>>,
    pub least_denoise_steps: Option<Spanned<usize>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Control {
    pub rate: Text,
    pub realtime: Text,
    pub priority: Option<Spanned<i32>>,
    pub cpu: Option<Spanned<usize>>,
    pub state_timeout: Text,
    pub resume: Option<Text>,
    #[serde(default)]
    pub operators: Vec<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Teleop {
    pub lease: Option<Text>,
    pub timeout: Option<Text>,
    pub align_speed: Option<Text>,
    pub correction: Option<Text>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct Guard {
    pub velocity_scale: Option<Spanned<f64>>,
    pub acceleration_scale: Option<Spanned<f64>>,
    pub jerk_scale: Option<Spanned<f64>>,
    pub workspace: Option<Spanned<Workspace>>,
    #[serde(default)]
    pub planes: Vec<Spanned<Plane>>,
    pub self_collision: Option<bool>,
    pub barrier_rate: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workspace {
    pub x: Option<[String; 2]>,
    pub y: Option<[String; 2]>,
    pub z: Option<[String; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plane {
    pub normal: [f64; 3],
    pub offset: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Transport {
    pub endpoint: Text,
}

/// Reads the keys of `text`.
pub(super) fn parse(file: &Path, text: &str) -> Result<File, Findings> {
    toml::from_str(text).map_err(|e| syntax(file, text, &e))
}

/// The finding for text that is no TOML or not of the schema.
pub(super) fn syntax(file: &Path, text: &str, error: &toml::de::Error) -> Findings {
    let line = error.span().map(|span| line_of(text, span.start));
    let problem = error.message().trim().replace('\n', ", ");
    let remedy = "every key is explained in launch/reference.toml";
    Findings::one(Finding { line, ..Finding::of_file(file, problem, remedy) })
}
