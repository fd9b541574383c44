//! From keys to settings: units are read, ranges checked, paths made relative to the file's folder.

use std::path::Path;
use std::time::Duration;

use sinew_models::onnx::Engine;
use sinew_runtime::blackbox::Images;
use sinew_runtime::rt::RealtimeMode;
use sinew_runtime::units;

use crate::run::PLACE;

use super::action_space;
use super::args::Argument;
use super::cache;
use super::checker::Checker;
use super::finding::{Findings, line_of};
use super::kernels;
use super::sampling;
use super::schema;
use super::settings::{
    CameraConfig, ControlSettings, LaunchConfig, PolicySettings, RecordSettings, ResidualSettings,
    RobotConfig,
};
use super::space;

/// Names of what `record.images` may be.
const IMAGES: [(&str, Images); 3] =
    [("all", Images::All), ("observed", Images::Observed), ("none", Images::None)];

/// Names of what `policy.onnx_engine` may be.
const ENGINES: [(&str, Engine); 3] =
    [("auto", Engine::Auto), ("onnx-runtime", Engine::OnnxRuntime), ("built-in", Engine::BuiltIn)];
/// Largest correction by a residual policy where the file does not say (rad).
const RESIDUAL_LIMIT: f64 = 5.0 * std::f64::consts::PI / 180.0;

pub(super) fn resolve(
    file: &Path,
    text: &str,
    parsed: schema::File,
    arguments: Vec<Argument>,
    policy_here: bool,
) -> Result<LaunchConfig, Findings> {
    let mut check = Checker::new(file, text);
    let folder = file.parent().unwrap_or(Path::new("."));
    let path = |at: &schema::Text| folder.join(at.get_ref());

    let robot = &parsed.robot;
    check.one_of("robot.driver", &robot.driver, &["sim"]);
    let name_ok = !robot.name.get_ref().is_empty()
        && robot.name.get_ref().chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    if !name_ok {
        let remedy = "use letters, digits, `_` and `-`: it is part of the keys on the bus";
        check.report("robot.name", &robot.name, "is no name", remedy);
    }
    if let Some(description) = &robot.description {
        check.note("robot.description", description);
        if !path(description).is_file() {
            check.report(
                "robot.description",
                description,
                "there is no such file",
                "paths are relative to the launch file",
            );
        }
    }
    let robot_run = check.run("robot", robot.run.as_ref(), robot.restart.as_ref());
    let state_rate = check.frequency("robot.state_rate", &robot.state_rate, 1.0, 2000.0);
    let watchdog = check.duration("robot.watchdog", &robot.watchdog);

    let mut cameras = Vec::new();
    for (name, camera) in &parsed.cameras {
        let key = |end: &str| format!("cameras.{name}.{end}");
        check.one_of(&key("driver"), &camera.driver, &["sim", "pattern"]);
        let run =
            check.run(&format!("cameras.{name}"), camera.run.as_ref(), camera.restart.as_ref());
        if let (Some(at), true, "sim") =
            (&camera.run, run.process, camera.driver.get_ref().as_str())
        {
            let remedy =
                "leave `run` out; [robot] run = \"process\" takes the simulator's cameras along";
            check.report(&key("run"), at, "a simulated camera lives in the simulator", remedy);
        }
        let size = *camera.size.get_ref();
        if !size.iter().all(|s| (16..=4096).contains(s)) {
            check.report(
                &key("size"),
                &camera.size,
                "a side is outside 16 to 4096 pixels",
                "write it like [96, 96]",
            );
        }
        let rate = check.frequency(&key("rate"), &camera.rate, 1.0, 240.0);
        cameras.push(CameraConfig {
            name: name.clone(),
            driver: camera.driver.get_ref().clone(),
            size,
            period: Duration::from_secs_f64(1.0 / rate),
            run,
            line: line_of(text, camera.driver.span().start),
        });
    }

    let policy = &parsed.policy;
    check.note("policy.file", &policy.file);
    let policy_run = check.run("policy", policy.run.as_ref(), policy.restart.as_ref());
    if policy_here && !path(&policy.file).exists() {
        let remedy = "give policy:=FILE, or fetch or quantize one with `sinew model`";
        check.report("policy.file", &policy.file, "there is no such file", remedy);
    }
    for (input, camera) in &policy.cameras {
        check.note("policy.cameras", camera);
        if !parsed.cameras.contains_key(camera.get_ref()) {
            let known = parsed.cameras.keys().cloned().collect::<Vec<_>>().join(", ");
            let remedy = format!("the robot's cameras are: {known}");
            check.report(
                &format!("policy.cameras.{input}"),
                camera,
                "the robot has no such camera",
                &remedy,
            );
        }
    }
    if let Some(prompt) = &policy.prompt
        && !prompt.get_ref().contains(PLACE)
    {
        let remedy = "write {instruction} where the instruction is to stand";
        check.report("policy.prompt", prompt, "has no place for the instruction", remedy);
    }
    let actions = action_space::resolve(&mut check, policy, folder);
    let sampling = sampling::resolve(&mut check, policy, folder);
    let cache = cache::resolve(&mut check, policy, folder, policy_here);
    let kernels = kernels::resolve(&mut check, policy);
    if let Some(steps) = &policy.denoise_steps
        && !(1..=1000).contains(steps.get_ref())
    {
        check.report(
            "policy.denoise_steps",
            steps,
            "must be 1 to 1000",
            "leave it out for the checkpoint's own",
        );
    }
    let max_observation_age =
        check.duration("policy.max_observation_age", &policy.max_observation_age);

    let control = &parsed.control;
    check.note("control.rate", &control.rate);
    let rate_hz = check.frequency("control.rate", &control.rate, 10.0, 1000.0);
    let period = Duration::from_secs_f64(1.0 / rate_hz);
    let realtime = match control.realtime.get_ref().as_str() {
        "off" => RealtimeMode::Off,
        "enforce" => RealtimeMode::Enforce,
        _ => RealtimeMode::BestEffort,
    };
    check.one_of("control.realtime", &control.realtime, &["best-effort", "enforce", "off"]);
    let priority = control.priority.as_ref().map_or(80, |p| *p.get_ref());
    if let Some(at) = &control.priority
        && !(2..=98).contains(&priority)
    {
        check.report("control.priority", at, "must be 2 to 98", "80 is a good start");
    }
    let state_timeout = check.duration("control.state_timeout", &control.state_timeout);
    if watchdog < period * 3 {
        let problem =
            format!("shorter than three control periods of {} ms", period.as_secs_f64() * 1e3);
        check.report(
            "robot.watchdog",
            &robot.watchdog,
            problem,
            "one late command must not stop the arm: lengthen it",
        );
    }
    let cpu = control.cpu.as_ref().map(|c| *c.get_ref());
    if let Some(at) = &control.cpu {
        let processors = sinew_runtime::rt::processors();
        if *at.get_ref() >= processors {
            let problem = format!("this computer has the processors 0 to {}", processors - 1);
            check.report("control.cpu", at, problem, "leave it out for any");
        }
    }
    let scheduler = super::scheduling::resolve(&mut check, &parsed.scheduler);
    let velocity_scale = check.scale("guard.velocity_scale", parsed.guard.velocity_scale.as_ref());
    let acceleration_scale =
        check.scale("guard.acceleration_scale", parsed.guard.acceleration_scale.as_ref());
    let jerk_scale = check.scale("guard.jerk_scale", parsed.guard.jerk_scale.as_ref());
    let space = space::resolve(&mut check, &parsed.guard);
    let onnx_engine = policy.onnx_engine.as_ref().map_or(Engine::Auto, |at| {
        check.one_of("policy.onnx_engine", at, &ENGINES.map(|e| e.0));
        let found = ENGINES.into_iter().find(|e| e.0 == at.get_ref());
        found.map_or(Engine::Auto, |e| e.1)
    });
    let residual_limit = policy.residual_limit.as_ref().map_or(RESIDUAL_LIMIT, |at| {
        let (key, remedy) = ("policy.residual_limit", "expected above 0 deg, at most 90 deg");
        match units::parse_angle(at.get_ref()) {
            Ok(limit) if limit > 0.0 && limit <= std::f64::consts::FRAC_PI_2 => return limit,
            Ok(_) => check.report(key, at, "is no bound of a correction", remedy),
            Err(error) => check.report(key, at, error, ""),
        }
        RESIDUAL_LIMIT
    });
    if let Some(at) = &policy.residual {
        check.note("policy.residual", at);
    }
    let residual = policy.residual.as_ref();
    let residual = residual.map(|at| ResidualSettings { folder: path(at), limit: residual_limit });

    let endpoint = &parsed.transport.endpoint;
    check.note("transport.endpoint", endpoint);
    check.endpoint("transport.endpoint", endpoint);
    let authority = super::authority::resolve(&mut check, &parsed);

    let images = parsed.record.images.as_ref().map_or(Images::All, |at| {
        let names = IMAGES.map(|i| i.0);
        check.one_of("record.images", at, &names);
        let found = IMAGES.into_iter().find(|i| i.0 == at.get_ref());
        found.map_or(Images::All, |i| i.1)
    });

    let config = LaunchConfig {
        file: file.to_owned(),
        arguments,
        robot: RobotConfig {
            name: robot.name.get_ref().clone(),
            driver: robot.driver.get_ref().clone(),
            description: robot.description.as_ref().map(path),
            state_period: Duration::from_secs_f64(1.0 / state_rate),
            watchdog,
            run: robot_run,
            seed: robot.seed,
        },
        cameras,
        scheduler,
        policy: PolicySettings {
            file: path(&policy.file),
            instruction: policy.instruction.clone(),
            prompt: policy.prompt.as_ref().map(|p| p.get_ref().clone()),
            cameras: policy.cameras.iter().map(|(i, c)| (i.clone(), c.get_ref().clone())).collect(),
            actions,
            sampling,
            cache,
            kernels,
            denoise_steps: policy.denoise_steps.as_ref().map(|s| *s.get_ref()),
            max_observation_age,
            onnx_engine,
            onnx_library: policy.onnx_library.as_ref().map(path),
            residual,
            run: policy_run,
            seed: policy.seed,
        },
        control: ControlSettings {
            period,
            rate_hz,
            realtime,
            priority,
            state_timeout,
            velocity_scale,
            acceleration_scale,
            cpu,
            jerk_scale,
            space,
        },
        authority,
        endpoint: endpoint.get_ref().clone(),
        record: RecordSettings { file: parsed.record.file.as_ref().map(path), images },
        lines: check.lines,
    };
    if check.findings.is_empty() { Ok(config) } else { Err(Findings(check.findings)) }
}
