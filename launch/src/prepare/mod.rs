//! From a launch file to parts that are ready to start: loads the description and the policy and checks
//! that they fit each other. `sinew check` stops here; nothing has moved.

mod actions;
mod sampling;

use nalgebra::{Unit, Vector3};
use sinew_drivers::pattern::PatternCamera;
use sinew_drivers::sim::{ArmDescription, CameraKind, SimConfig, SimHandle};
use sinew_models::kernels::pool::choose_threads;
use sinew_models::onnx::{OnnxOptions, ResidualNet};
use sinew_models::{LoadOptions, ModelError};
use sinew_runtime::control::ResidualConfig;
use sinew_runtime::guard::{Plane, SpaceConfig};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{ActionKind, JointLimits, Policy};

use crate::launch_file::{Finding, Findings, LaunchConfig, PolicySettings};
use crate::run::{Devices, Part, Placement, Plan};
pub use sampling::Successes;
pub(crate) use sampling::with_candidates;

/// Everything of a launch, loaded and checked.
pub struct Prepared {
    /// What the assembly needs to know.
    pub plan: Plan,
    /// The policy, when it runs here.
    pub policy: Option<Box<dyn Policy>>,
    /// The residual policy, when the control thread runs here and there is one.
    pub residual: Option<ResidualNet>,
    /// What the run adds to the policy's memory, when it has one here.
    pub successes: Option<Successes>,
    /// The arm's description.
    pub description: ArmDescription,
    /// The launch file's content.
    pub config: LaunchConfig,
}

/// Why a launch cannot be prepared.
#[derive(Debug)]
pub enum Unprepared {
    /// What the launch file names does not fit together.
    Launch(Findings),
    /// The policy cannot be loaded.
    Model(ModelError),
}

/// Loads what the parts of `config` that run here need, and checks it as a whole.
///
/// # Errors
/// [`Unprepared::Launch`] with all findings; [`Unprepared::Model`] for a policy that cannot be loaded.
pub fn prepare(config: LaunchConfig, placement: Placement) -> Result<Prepared, Unprepared> {
    let description = match &config.robot.description {
        None => Ok(ArmDescription::desk_arm()),
        Some(file) => ArmDescription::from_file(file),
    };
    let description = description.map_err(|e| {
        let value = config.robot.description.as_ref().map(|f| f.display().to_string());
        let remedy = "mend the description";
        let finding = config.finding("robot.description", value.unwrap_or_default(), e, remedy);
        Unprepared::Launch(Findings::one(finding))
    })?;
    let mut findings = fit_devices(&config, &placement);
    let one = |finding: Box<Finding>| Unprepared::Launch(Findings::one(*finding));
    let actions = actions::joint_map(&config, &description).map_err(one)?;
    if config.policy.cache.warm_start && actions.is_some() {
        let problem = "chunks of poses or displacements cannot be shifted";
        findings.push(config.finding("policy.cache_warm_start", true, problem, "leave it out"));
    }
    let mut successes = None;
    let policy = match placement.here(&Part::Policy) {
        true => {
            let kernels = &config.policy.kernels;
            choose_threads(kernels.threads(config.control.cpu)).map_err(|e| {
                let cores = kernels.cores.iter().map(usize::to_string).collect::<Vec<_>>();
                let remedy = "change threads or cores of the policy";
                Unprepared::Launch(Findings::one(config.finding(
                    "policy.cores",
                    cores.join(", "),
                    e,
                    remedy,
                )))
            })?;
            early_exit(&config).map_or(Ok(()), |finding| Err(one(finding)))?;
            let options = load_options(&config.policy, &description.kinds());
            let policy = sinew_models::load_policy(&config.policy.file, &options)
                .map_err(Unprepared::Model)?;
            let candidates = &config.policy.sampling.candidates;
            let policy = with_candidates(policy, candidates.as_ref()).map_err(|e| {
                let count = candidates.map_or(0, |c| c.count);
                let remedy = "change candidates, verifier or past_actions";
                Unprepared::Launch(Findings::one(config.finding(
                    "policy.candidates",
                    count,
                    e,
                    remedy,
                )))
            })?;
            let policy = actions::in_joints(policy, actions.as_ref(), &config).map_err(one)?;
            findings.splice(0..0, fit(&config, &description, policy.as_ref()));
            if findings.is_empty() {
                let kinds = description.kinds();
                let (policy, kept) = sampling::with_memory(policy, &config, &kinds).map_err(one)?;
                successes = kept;
                Some(policy)
            } else {
                Some(policy)
            }
        }
        false => None,
    };
    let wanted = config.policy.residual.as_ref().filter(|_| placement.here(&Part::Control));
    let residual = match wanted {
        Some(settings) => {
            // It is small: more threads would cost more than they bring.
            let options =
                OnnxOptions { threads: Some(1), ..load_options(&config.policy, &[]).onnx };
            let net = ResidualNet::load(&settings.folder, &options).map_err(Unprepared::Model)?;
            findings.extend(fit_residual(&config, &description, &net));
            Some(net)
        }
        None => None,
    };
    if !findings.is_empty() {
        return Err(Unprepared::Launch(Findings(findings)));
    }
    let limits = description.joints.iter().map(|j| JointLimits {
        velocity: j.limits.velocity * config.control.velocity_scale,
        acceleration: j.limits.acceleration * config.control.acceleration_scale,
        jerk: j.limits.jerk * config.control.jerk_scale,
        ..j.limits
    });
    let camera_of = |input: &String| config.policy.cameras.iter().find(|c| c.0 == *input).cloned();
    let residual_config =
        config.policy.residual.as_ref().zip(residual.as_ref()).map(|(settings, net)| {
            let own = std::time::Duration::from_secs_f64(1.0 / net.rate_hz());
            let slowest = own.max(config.control.period).max(config.robot.state_period);
            // One answer may be lost, and one be late.
            ResidualConfig { limit: settings.limit, timeout: slowest * 3 }
        });
    let plan = Plan {
        residual: residual_config,
        placement,
        robot: config.robot.name.clone(),
        endpoint: config.endpoint.clone(),
        joints: description.joints.iter().map(|j| j.name.clone()).collect(),
        limits: limits.collect(),
        space: space(&config, &description),
        ready: sinew_drivers::sim::scene::home(&description).to_vec(),
        // Only the policy itself knows the order of its inputs.
        views: match &policy {
            Some(policy) => policy.spec().cameras.iter().filter_map(camera_of).collect(),
            None => config.policy.cameras.clone(),
        },
        period: config.control.period,
        state_period: config.robot.state_period,
        state_timeout: config.control.state_timeout,
        watchdog: config.robot.watchdog,
        authority: config.authority.clone(),
        frame_period: config.cameras.iter().map(|c| c.period).max().unwrap_or_default(),
        max_observation_age: config.policy.max_observation_age,
        realtime: config.control.realtime,
        priority: config.control.priority,
        kinds: description.kinds(),
        actions,
        cpu: config.control.cpu,
        strategy: config.scheduler.strategy,
        execution_horizon: config.scheduler.execution_horizon,
        least_denoise_steps: config.scheduler.least_denoise_steps,
        exact_in_time: config.policy.cache.when_short,
        early_exit: config.policy.cache.early_exit.is_some(),
        prompt: config.policy.prompt.clone(),
        policy_file: config.policy.file.display().to_string(),
        // With candidates the policy itself says how many there are in all.
        denoise_steps: match config.policy.sampling.candidates {
            Some(_) => None,
            None => config.policy.denoise_steps,
        },
        seed: config.policy.seed,
    };
    Ok(Prepared { plan, policy, residual, successes, description, config })
}

/// What is wrong with the early exits that `config` asks for.
fn early_exit(config: &LaunchConfig) -> Option<Box<Finding>> {
    let file = config.policy.cache.early_exit.as_ref()?;
    let (problem, remedy) = if !file.is_file() {
        ("there is no such file", "make it with `sinew calibrate exit`")
    } else if config.policy.denoise_steps.is_some() {
        (
            "says the steps of each exit, so denoise_steps does not go with it",
            "leave one of them out",
        )
    } else {
        return None;
    };
    Some(Box::new(config.finding("policy.early_exit", file.display(), problem, remedy)))
}

/// How the policy of `settings` is loaded: the steps of one candidate, where there are several, belong to the head.
fn load_options(settings: &PolicySettings, kinds: &[ActionKind]) -> LoadOptions {
    let PolicySettings { onnx_engine, onnx_library, .. } = settings;
    LoadOptions {
        denoise_steps: settings.sampling.candidates.and(settings.denoise_steps),
        solver: settings.sampling.solver,
        streaming: settings.sampling.streaming,
        compute: settings.kernels.compute,
        onnx: OnnxOptions { engine: *onnx_engine, library: onnx_library.clone(), threads: None },
        caches: settings.cache.options(kinds),
        ..LoadOptions::default()
    }
}

/// What does not fit between the arm and the residual policy.
fn fit_residual(
    config: &LaunchConfig,
    description: &ArmDescription,
    net: &ResidualNet,
) -> Option<Finding> {
    let joints: Vec<String> = description.joints.iter().map(|j| j.name.clone()).collect();
    (net.names() != joints).then(|| {
        let folder = config.policy.residual.as_ref().map(|r| r.folder.display().to_string());
        let problem =
            format!("it corrects {}, the arm has {}", net.names().join(", "), joints.join(", "));
        let remedy = "its names must be the arm's joints, in the arm's order";
        config.finding("policy.residual", folder.unwrap_or_default(), problem, remedy)
    })
}

/// Where the arm may be: by its description, and by the launch file.
fn space(config: &LaunchConfig, description: &ArmDescription) -> SpaceConfig {
    let settings = &config.control.space;
    let mut space = description.space();
    space.planes.extend(settings.half_spaces.iter().map(|h| Plane {
        name: h.name.clone(),
        normal: Unit::new_normalize(Vector3::from(h.normal)),
        offset: h.offset,
    }));
    SpaceConfig { self_collision: settings.self_collision, rate: settings.barrier_rate, ..space }
}

/// What does not fit between the launch file, the arm and the policy.
fn fit(config: &LaunchConfig, description: &ArmDescription, policy: &dyn Policy) -> Vec<Finding> {
    let spec = policy.spec();
    let mut findings = Vec::new();
    let list = |names: &[String]| names.join(", ");
    let joints: Vec<String> = description.joints.iter().map(|j| j.name.clone()).collect();
    let foreign = |problem: String| {
        let remedy = "choose a policy that was trained for this arm";
        config.finding("policy.file", config.policy.file.display(), problem, remedy)
    };
    for (what, found) in [("actions", spec.action_dim), ("states", spec.state_dim)] {
        if found != joints.len() {
            let problem = format!(
                "its {what} have {found} values, the arm has {} joints ({})",
                joints.len(),
                list(&joints)
            );
            findings.push(foreign(problem));
        }
    }
    if !spec.action_names.is_empty()
        && spec.action_dim == joints.len()
        && spec.action_names != joints
    {
        let problem = format!(
            "its actions are ({}), the arm's joints are ({})",
            list(&spec.action_names),
            list(&joints)
        );
        findings.push(foreign(problem));
    }
    for (input, camera) in &config.policy.cameras {
        if !spec.cameras.contains(input) {
            let problem = "the policy has no such camera input";
            let remedy = format!("its inputs are: {}", list(&spec.cameras));
            findings.push(config.finding(
                "policy.cameras",
                format!("{{ {input} = \"{camera}\" }}"),
                problem,
                remedy,
            ));
        }
    }
    let given = |c: &&String| !config.policy.cameras.iter().any(|m| m.0 == **c);
    let missing: Vec<String> = spec.cameras.iter().filter(given).cloned().collect();
    if missing.len() > spec.optional_cameras {
        let problem = format!("the policy's camera inputs {} are given no camera", list(&missing));
        findings.push(config.finding(
            "policy.cameras",
            "{ … }",
            problem,
            "name a camera of the robot for each",
        ));
    }
    if !spec.supports(config.scheduler.strategy) {
        let known = StrategyConfig::ALL.into_iter().filter(|s| spec.supports(*s));
        let known: Vec<_> = known.map(|s| s.name().to_owned()).collect();
        findings.push(config.finding(
            "scheduler.strategy",
            format!("\"{}\"", config.scheduler.strategy.name()),
            "this policy's head does not support it",
            format!("it supports: {}", list(&known)),
        ));
    }
    if let Some(horizon) = config.scheduler.execution_horizon
        && horizon > spec.action_horizon
    {
        let problem = format!("the policy's chunks have only {} actions", spec.action_horizon);
        findings.push(config.finding(
            "scheduler.execution_horizon",
            horizon,
            problem,
            "choose fewer, about half",
        ));
    }
    findings
}

/// What does not fit between the launch file, the simulator and this computer.
fn fit_devices(config: &LaunchConfig, placement: &Placement) -> Vec<Finding> {
    let mut findings = Vec::new();
    for camera in config.cameras.iter().filter(|c| c.driver == "sim") {
        if CameraKind::from_name(&camera.name).is_none() {
            findings.push(Finding {
                file: config.file.clone(),
                line: Some(camera.line),
                key: format!("cameras.{}", camera.name),
                value: format!("\"{}\"", camera.driver),
                problem: "the simulator has no such camera".to_owned(),
                remedy: format!("it has: {}", CameraKind::ALL.map(CameraKind::name).join(", ")),
            });
        }
    }
    if placement.here(&Part::Control)
        && let Some(address) = config.endpoint.strip_prefix("tcp/")
        && let Err(error) = std::net::TcpListener::bind(address)
    {
        let remedy = "is another Sinew running? Choose another port";
        findings.push(config.finding(
            "transport.endpoint",
            format!("\"{}\"", config.endpoint),
            format!("cannot listen there: {error}"),
            remedy,
        ));
    }
    findings
}

impl Prepared {
    /// Starts the devices that run here: the simulator on its own real-time thread.
    ///
    /// # Errors
    /// What the simulator says.
    pub fn devices(&self) -> Result<Devices, sinew_runtime::DeviceError> {
        let here = |part: &Part| self.plan.placement.here(part);
        let mut devices = Devices::default();
        for camera in self.config.cameras.iter().filter(|c| here(&Part::Camera(c.name.clone()))) {
            let [width, height] = camera.size;
            let eye = PatternCamera::new(width, height, camera.period);
            devices.cameras.push((camera.name.clone(), Box::new(eye)));
        }
        if !here(&Part::Arm) {
            return Ok(devices);
        }
        let arm = self.description.clone();
        let sim =
            SimHandle::start(&SimConfig { arm, seed: self.config.robot.seed, instruction: None })?;
        for camera in self.config.cameras.iter().filter(|c| c.driver == "sim") {
            // Names without a kind were refused before.
            let Some(kind) = CameraKind::from_name(&camera.name) else { continue };
            let [width, height] = camera.size;
            let eye = sim.camera(&camera.name, kind, width, height, camera.period);
            devices.cameras.push((camera.name.clone(), Box::new(eye)));
        }
        devices.arm = Some(Box::new(sim.arm()));
        devices.sim = Some(sim);
        Ok(devices)
    }
}
