//! From the plan on its own instants to the prefix on the chunk's.

use std::time::Duration;

use crate::scheduler::ChunkOrder;
use crate::scheduler::strategy::Guide;
use crate::{ActionKind, Observation, PlannedBlock, Prefix, PrefixUse};

/// The planned actions that a chunk of `observation` has to join, `dt` apart; `None` for a chunk of its own.
///
/// Row `k` is the plan at `observation + (k + 1)·dt`: it never depends on when the chunk arrives. The
/// frozen rows are those that will have been executed by the expected arrival. Displacements count from
/// *this* observation's position.
pub fn prefix_of(
    order: &ChunkOrder,
    plan: Option<&PlannedBlock>,
    observation: &Observation,
    dt: Duration,
    kinds: &[ActionKind],
) -> Option<Prefix> {
    let usage = match order.guide {
        Guide::Guided { mask, max_weight, .. } => PrefixUse::Guided { schedule: mask, max_weight },
        Guide::Trained => PrefixUse::Trained,
        Guide::Free | Guide::RollForward => return None,
    };
    let plan = plan?;
    let mut actions = Vec::new();
    let mut rows = 0;
    while let Some(row) = plan.sample(observation.instant + dt * (rows + 1)) {
        for (joint, value) in row.as_slice().iter().enumerate() {
            let origin = match kinds.get(joint) {
                Some(ActionKind::Delta) => observation.proprioception.get(joint).copied(),
                _ => None,
            };
            actions.push(value - origin.unwrap_or(0.0));
        }
        rows += 1;
    }
    if rows == 0 {
        return None;
    }
    let delay = order.expected.since(observation.instant).as_secs_f64() / dt.as_secs_f64();
    let dim = actions.len() / rows as usize;
    let frozen = (delay.ceil() as usize).min(rows as usize);
    let horizon = match order.guide {
        Guide::Guided { horizon: Some(n), .. } => n,
        _ => rows as usize,
    };
    Some(Prefix { actions, dim, frozen, horizon, usage })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{JointVec, MaskSchedule, Stamp};

    const DT: Duration = Duration::from_millis(100);

    fn at(ms: i64) -> Stamp {
        Stamp(ms * 1_000_000)
    }

    fn order(guide: Guide) -> ChunkOrder {
        ChunkOrder { request: 1, at: at(1000), expected: at(1150), deadline: None, guide }
    }

    fn guided() -> Guide {
        Guide::Guided { mask: MaskSchedule::Linear, max_weight: 10.0, horizon: None }
    }

    fn seen(ms: i64, position: f64) -> Observation {
        Observation {
            instant: at(ms),
            images: Vec::new(),
            proprioception: vec![position],
            proprioception_age: Duration::ZERO,
            instruction: String::new(),
        }
    }

    /// A plan that is at `t` (s) at time `t`, from 0.5 s to 2 s.
    fn plan() -> PlannedBlock {
        let mut plan = PlannedBlock::empty(at(500), DT, 1);
        for k in 0..=15 {
            plan.push(&JointVec::from_slice(&[0.5 + 0.1 * f64::from(k)]).expect("one joint"));
        }
        plan
    }

    #[test]
    fn rows_belong_to_the_observations_instants_not_to_the_arrival() {
        let kinds = [ActionKind::Position];
        let prefix = prefix_of(&order(guided()), Some(&plan()), &seen(940, 0.0), DT, &kinds)
            .expect("guided");
        assert!((prefix.actions[0] - 1.04).abs() < 1e-9, "{}", prefix.actions[0]);
        assert!((prefix.actions[1] - 1.14).abs() < 1e-9);
        assert_eq!(prefix.rows(), 10, "rows past the plan are left out, not filled");
        assert_eq!(prefix.frozen, 3, "1150 - 940 ms is more than two actions");
    }

    #[test]
    fn displacements_count_from_the_new_observation() {
        let kinds = [ActionKind::Delta];
        let prefix = prefix_of(&order(guided()), Some(&plan()), &seen(1000, 0.9), DT, &kinds)
            .expect("guided");
        assert!((prefix.actions[0] - 0.2).abs() < 1e-9);
    }

    #[test]
    fn free_chunks_have_no_prefix() {
        let kinds = [ActionKind::Position];
        assert!(
            prefix_of(&order(Guide::Free), Some(&plan()), &seen(1000, 0.0), DT, &kinds).is_none()
        );
        assert!(prefix_of(&order(guided()), None, &seen(1000, 0.0), DT, &kinds).is_none());
    }
}
