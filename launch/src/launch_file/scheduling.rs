//! The `[scheduler]` section: a strategy with its own settings, and how far inference may be cut short.

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
    match &mut strategy {
        StrategyConfig::Ensemble { decay } => {
            if let Some(at) = &keys.ensemble_decay {
                *decay = *at.get_ref();
                if !(-1.0..=1.0).contains(decay) {
                    let remedy = "0.01 favours older predictions a little, as ACT does";
                    check.report("scheduler.ensemble_decay", at, "must be -1 to 1", remedy);
                }
            }
        }
        StrategyConfig::RtcGuided { mask, max_weight, horizon: end } => {
            *end = horizon;
            if let Some(at) = &keys.guidance_mask {
                check.one_of("scheduler.guidance_mask", at, &MASKS.map(|m| m.0));
                if let Some((_, chosen)) = MASKS.iter().find(|m| m.0 == at.get_ref()) {
                    *mask = *chosen;
                }
            }
            if let Some(at) = &keys.guidance_weight {
                *max_weight = *at.get_ref();
                if !(0.0..=100.0).contains(max_weight) {
                    let remedy = "about as many as there are denoise steps";
                    check.report("scheduler.guidance_weight", at, "must be 0 to 100", remedy);
                }
            }
        }
        _ => {}
    }
    let name = strategy.name();
    let mut foreign = |key: &str, place: Option<std::ops::Range<usize>>, of: &str| {
        if let Some(span) = place
            && name != of
        {
            let at = Spanned::new(span, ());
            let remedy = format!("leave it out, or set strategy = \"{of}\"");
            check.report(key, &at, format!("does nothing with strategy \"{name}\""), &remedy);
        }
    };
    let span = |s: &Option<Spanned<f64>>| s.as_ref().map(Spanned::span);
    foreign("scheduler.ensemble_decay", span(&keys.ensemble_decay), "ensemble");
    foreign("scheduler.guidance_weight", span(&keys.guidance_weight), "rtc-guided");
    let mask = keys.guidance_mask.as_ref().map(Spanned::span);
    foreign("scheduler.guidance_mask", mask, "rtc-guided");
    let horizon = keys.guidance_horizon.as_ref().map(Spanned::span);
    foreign("scheduler.guidance_horizon", horizon, "rtc-guided");
    strategy
}
