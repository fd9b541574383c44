//! The `[scheduler]` section: a strategy, the settings of all of them, and how far inference may be cut short.
//!
//! Settings of another strategy than the chosen one are checked all the same: `strategy:=…` may choose it.

use std::path::Path;

use serde::Serialize;
use sinew_runtime::MaskSchedule;
use sinew_runtime::scheduler::strategy::StrategyConfig;
use toml::Spanned;

use super::checker::Checker;
use super::finding::{Finding, Findings};
use super::schema;

/// How chunks are asked for and played.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SchedulerSettings {
    /// How chunks follow each other.
    pub strategy: StrategyConfig,
    /// Actions executed before the next chunk takes over; `None` for half the chunk.
    pub execution_horizon: Option<usize>,
    /// Never fewer denoise steps than this; `None`: never fewer than wanted.
    pub least_denoise_steps: Option<usize>,
}

const MASKS: [(&str, MaskSchedule); 4] = [
    ("exponential", MaskSchedule::Exponential),
    ("linear", MaskSchedule::Linear),
    ("ones", MaskSchedule::Ones),
    ("zeros", MaskSchedule::Zeros),
];

/// The settings `strategy` and `execution_horizon`, changed by `changes` (`key=value`).
///
/// # Errors
/// A finding for every change that is none.
pub fn what_if_settings(
    strategy: StrategyConfig,
    execution_horizon: usize,
    changes: &[String],
) -> Result<SchedulerSettings, Findings> {
    let file = Path::new("--what-if");
    let wrong = |value: &str, problem: String, remedy: &str| {
        Findings::one(Finding {
            value: value.to_owned(),
            ..Finding::of_file(file, problem, remedy.to_owned())
        })
    };
    // A strategy that stays keeps its own settings; another one begins with the defaults.
    let mut keys = toml::Table::new();
    keys.insert("strategy".into(), strategy.name().into());
    keys.insert("execution_horizon".into(), toml::Value::Integer(execution_horizon as i64));
    match strategy {
        StrategyConfig::Ensemble { decay } => {
            keys.insert("ensemble_decay".into(), decay.into());
        }
        StrategyConfig::RtcGuided { mask, max_weight, horizon } => {
            if let Some((name, _)) = MASKS.iter().find(|m| m.1 == mask) {
                keys.insert("guidance_mask".into(), (*name).into());
            }
            keys.insert("guidance_weight".into(), max_weight.into());
            if let Some(horizon) = horizon {
                keys.insert("guidance_horizon".into(), toml::Value::Integer(horizon as i64));
            }
        }
        _ => {}
    }
    for change in changes {
        let remedy = "write it like strategy=rtc-guided or execution_horizon=12";
        let (key, value) = change
            .split_once('=')
            .ok_or_else(|| wrong(change, "is no key=value".to_owned(), remedy))?;
        if key == "least_denoise_steps" {
            let problem = "inference is not cut short in a replay".to_owned();
            return Err(wrong(change, problem, "leave it out"));
        }
        let value = value.parse::<toml::Value>().unwrap_or_else(|_| value.into());
        keys.insert(key.to_owned(), value);
    }
    let text = keys.to_string();
    let keys: schema::Scheduler =
        toml::from_str(&text).map_err(|e| schema::syntax(file, &text, &e))?;
    let mut check = Checker::new(file, &text);
    let settings = resolve(&mut check, &keys);
    check.done().map(|()| settings)
}

pub(super) fn resolve(check: &mut Checker<'_>, keys: &schema::Scheduler) -> SchedulerSettings {
    let mut at_least_one = |key: &'static str, at: &Option<Spanned<usize>>| {
        let at = at.as_ref()?;
        check.note(key, at);
        if *at.get_ref() == 0 {
            check.report(key, at, "must be at least 1", "");
        }
        Some(*at.get_ref())
    };
    let execution_horizon = at_least_one("scheduler.execution_horizon", &keys.execution_horizon);
    let horizon = at_least_one("scheduler.guidance_horizon", &keys.guidance_horizon);
    let least_denoise_steps =
        at_least_one("scheduler.least_denoise_steps", &keys.least_denoise_steps);
    let strategy = strategy(check, keys, horizon);
    SchedulerSettings { strategy, execution_horizon, least_denoise_steps }
}

fn strategy(
    check: &mut Checker<'_>,
    keys: &schema::Scheduler,
    horizon: Option<usize>,
) -> StrategyConfig {
    let mut strategy = StrategyConfig::default();
    if let Some(at) = &keys.strategy {
        check.note("scheduler.strategy", at);
        let names = StrategyConfig::ALL.map(StrategyConfig::name);
        check.one_of("scheduler.strategy", at, &names);
        strategy = StrategyConfig::from_name(at.get_ref()).unwrap_or_default();
    }
    let mut number = |key: &str, at: &Option<Spanned<f64>>, lowest: f64, highest: f64, remedy| {
        let at = at.as_ref()?;
        if !(lowest..=highest).contains(at.get_ref()) {
            check.report(key, at, format!("must be {lowest} to {highest}"), remedy);
        }
        Some(*at.get_ref())
    };
    let remedy = "0.01 favours older predictions a little, as ACT does";
    let given_decay = number("scheduler.ensemble_decay", &keys.ensemble_decay, -1.0, 1.0, remedy);
    let remedy = "about as many as there are denoise steps";
    let given_weight =
        number("scheduler.guidance_weight", &keys.guidance_weight, 0.0, 100.0, remedy);
    let mut given_mask = None;
    if let Some(at) = &keys.guidance_mask {
        check.one_of("scheduler.guidance_mask", at, &MASKS.map(|m| m.0));
        given_mask = MASKS.iter().find(|m| m.0 == at.get_ref()).map(|m| m.1);
    }
    match &mut strategy {
        StrategyConfig::Ensemble { decay } => *decay = given_decay.unwrap_or(*decay),
        StrategyConfig::RtcGuided { mask, max_weight, horizon: end } => {
            *mask = given_mask.unwrap_or(*mask);
            *max_weight = given_weight.unwrap_or(*max_weight);
            *end = horizon;
        }
        _ => {}
    }
    strategy
}
