//! What each strategy does with the chunks.

use super::*;
use strategy::BlendRule;

/// Plays a first chunk of zeros for `ticks`, asks, and gives the second one at once.
fn second(strategy: StrategyConfig, ticks: u64, actions: Vec<f64>) -> Bench {
    let mut bench = Bench::strategy(strategy);
    let order = bench.due().expect("nothing is playing");
    assert_eq!(bench.give(chunk(order.request, at(0), vec![0.0; 16])), Ok(()));
    bench.run(ticks);
    let order = bench.due().expect("the execution horizon is reached");
    assert_eq!(bench.give(chunk(order.request, at(ticks), actions)), Ok(()));
    bench
}

#[test]
fn blend_rules_weigh_the_overlap_and_nothing_else() {
    for (rule, share) in [
        (BlendRule::LatestOnly, 1.0),
        (BlendRule::WeightedAverage, 0.7),
        (BlendRule::Average, 0.5),
        (BlendRule::Conservative, 0.3),
    ] {
        let mut bench = second(StrategyConfig::Blend { rule }, 80, vec![0.2; 16]);
        // Eight actions overlap; the join is over after 0.7 s.
        bench.run(70);
        let overlap = bench.wish.position[0];
        assert!((overlap - 0.2 * share).abs() < 0.01, "{rule:?}: {overlap}");
        bench.run(90);
        assert!((bench.wish.position[0] - 0.2).abs() < 1e-6, "{rule:?}: past the overlap");
    }
}

#[test]
fn a_gripper_is_never_blended_into_half_a_value() {
    for strategy in [
        StrategyConfig::Blend { rule: BlendRule::Average },
        StrategyConfig::Ensemble { decay: 0.01 },
    ] {
        let mut config = SchedulerConfig { strategy, ..config() };
        config.joints[0].kind = ActionKind::Gripper;
        let mut bench = Bench::with(config);
        let order = bench.due().expect("nothing is playing");
        assert_eq!(bench.give(chunk(order.request, at(0), vec![0.0; 16])), Ok(()));
        bench.run(80);
        let order = bench.due().expect("due");
        assert_eq!(bench.give(chunk(order.request, at(80), vec![0.6; 16])), Ok(()));
        bench.run(75);
        assert!((bench.wish.position[0] - 0.6).abs() < 1e-3, "{}", bench.wish.position[0]);
    }
}

#[test]
fn a_switch_is_thrown_at_its_action_without_values_between() {
    let mut config = config();
    config.joints[0].kind = ActionKind::Switch;
    let mut bench = Bench::with(config);
    let order = bench.due().expect("nothing is playing");
    let actions = [vec![0.0; 4], vec![1.0; 12]].concat();
    assert_eq!(bench.give(chunk(order.request, at(0), actions)), Ok(()));
    for tick in 1..=100 {
        bench.run(1);
        let value = bench.wish.position[0];
        assert_eq!(value, if tick <= 40 { 0.0 } else { 1.0 }, "tick {tick}");
    }
}

#[test]
fn ensembling_is_the_weighted_mean_of_all_predictions() {
    let decay = 0.1;
    let mut bench = Bench::strategy(StrategyConfig::Ensemble { decay });
    // Prediction i says i for every instant.
    let mut given = 0;
    for _ in 0..6 {
        let order = bench.due().expect("after every action");
        let value = f64::from(given) * 0.01;
        assert_eq!(bench.give(chunk(order.request, at(bench.tick), vec![value; 16])), Ok(()));
        given += 1;
        bench.run(10);
        assert!(given == 6 || bench.scheduler.open.is_none());
    }
    // The last instants of the newest chunk were predicted by fewer: look where all six speak.
    let old = bench
        .scheduler
        .blocks
        .old_plan(&chunk(99, at(bench.tick), vec![0.0; 16]), bench.scheduler.played());
    let old = old.expect("it plays");
    let weights: Vec<f64> = (0..6).map(|i| (-decay * f64::from(i)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mean: f64 = weights.iter().enumerate().map(|(i, w)| w * 0.01 * i as f64).sum::<f64>() / sum;
    assert_eq!(old.predictions(3), 6);
    let ours = old.at_action(3).expect("inside")[0];
    assert!((ours - mean).abs() < 1e-4, "{ours}, expected {mean}");
}

#[test]
fn the_synchronous_arm_rests_before_it_asks_and_while_it_waits() {
    let mut bench = Bench::strategy(StrategyConfig::Synchronous);
    let order = bench.due().expect("nothing is playing");
    assert_eq!(bench.give(chunk(order.request, at(0), ramp(0.0, 0.01))), Ok(()));
    for _ in 0..79 {
        bench.run(1);
        assert_eq!(bench.due(), None, "not while it moves");
    }
    bench.run(1);
    assert!(bench.due().is_some());
    bench.run(50);
    assert!((bench.wish.position[0] - 0.08).abs() < 1e-9 && bench.wish.velocity[0] == 0.0);
}

#[test]
fn roll_forward_shows_the_take_over_state_and_waits_for_it() {
    let mut config = SchedulerConfig { strategy: StrategyConfig::RollForward, ..config() };
    config.latency = Some(Duration::from_millis(300));
    let mut bench = Bench::with(config);
    let first = bench.due().expect("nothing is playing");
    assert_eq!(first.guide, Guide::Free, "at standstill the state is what it is");
    assert_eq!(bench.give(chunk(first.request, at(0), ramp(0.0, 0.01))), Ok(()));
    bench.run(50);
    let order = bench.due().expect("three actions before the horizon");
    assert_eq!(order.guide, Guide::RollForward);
    let state = bench.scheduler.plan().and_then(|p| p.row(0)).expect("a plan")[0];
    assert!((state - 0.08).abs() < 1e-6, "the state at the horizon, not now: {state}");
    // It comes early, and goes on from that state in the other direction.
    assert_eq!(bench.give(chunk(order.request, at(50), ramp(0.08, -0.005))), Ok(()));
    assert_eq!(bench.due(), None, "one chunk waits already");
    bench.run(30);
    assert!((bench.wish.position[0] - 0.08).abs() < 1e-6, "the old chunk goes on until then");
    bench.run(50);
    // Five actions of -0.005 on.
    assert!((bench.wish.position[0] - 0.055).abs() < 2e-3, "{}", bench.wish.position[0]);
}

#[test]
fn a_chunk_too_long_to_play_is_refused() {
    let mut bench = Bench::new();
    let order = bench.due().expect("nothing is playing");
    let long = chunk(order.request, at(0), vec![0.0; MAX_HORIZON + 1]);
    assert_eq!(bench.give(long), Err(Refusal::TooLong));
}

proptest! {
    /// Whatever arrives when: play time counts every period once, and positions, velocities stay continuous.
    #[test]
    fn no_strategy_skips_or_repeats(
        which in 0usize..StrategyConfig::ALL.len(),
        arrivals in prop::collection::vec((0u64..60, -0.2..0.2f64, -0.02..0.02f64), 1..10),
    ) {
        let mut bench = Bench::strategy(StrategyConfig::ALL[which]);
        for (delay, level, slope) in arrivals {
            let order = bench.due();
            let observed = at(bench.tick);
            for _ in 0..=delay {
                let (before, wish) = (bench.scheduler.played(), bench.wish);
                bench.run(1);
                let step = bench.scheduler.played() - before;
                prop_assert!((-1e-12..=0.01 + 1e-9).contains(&step), "played {step} in a period");
                if wish.mode == Mode::Playing && bench.wish.mode == Mode::Playing {
                    prop_assert!(step > 0.0);
                }
                let moved = (bench.wish.position[0] - wish.position[0]).abs();
                prop_assert!(moved < 0.1, "{moved} in a period");
                // Continuous acceleration: the velocity changes by little in one period.
                let kick = (bench.wish.velocity[0] - wish.velocity[0]).abs();
                prop_assert!(kick < 1.6, "velocity jumped by {kick}");
            }
            if let Some(order) = order {
                let _ = bench.give(chunk(order.request, observed, ramp(level, slope)));
            }
        }
    }
}
