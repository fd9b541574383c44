//! The `[scheduler]` section: a strategy, the settings of all of them, and how far inference may be cut short.
//!
//! Settings of another strategy than the chosen one are checked all the same: `strategy:=…` may choose it.

use serde::Serialize;
use sinew_runtime::MaskSchedule;
use sinew_runtime::scheduler::strategy::StrategyConfig;
use toml::Spanned;

use super::resolve::Checker;
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
