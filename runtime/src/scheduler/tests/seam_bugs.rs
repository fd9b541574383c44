//! The published seam bugs, one test each: what made other runtimes' arms jump must not come back here.

use super::*;
use crate::inference::prepare;
use crate::{MaskSchedule, Observation};

fn guided() -> StrategyConfig {
    StrategyConfig::RtcGuided { mask: MaskSchedule::Linear, max_weight: 10.0, horizon: None }
}

fn seen(instant: Stamp, position: f64) -> Observation {
    Observation {
        instant,
        images: Vec::new(),
        proprioception: vec![position],
        proprioception_age: Duration::ZERO,
        instruction: String::new(),
    }
}

/// A bench that has played `ticks` of a ramp of 0.01 rad per action, asked for at standstill.
fn playing(strategy: StrategyConfig, ticks: u64) -> Bench {
    let mut bench = Bench::strategy(strategy);
    let first = bench.due().expect("nothing is playing");
    assert_eq!(bench.give(chunk(first.request, at(0), ramp(0.0, 0.01))), Ok(()));
    bench.run(ticks);
    bench
}

#[test]
fn warm_up_latency_trusted_at_standstill() {
    for strategy in StrategyConfig::ALL {
        let mut bench = Bench::strategy(strategy);
        let order = bench.due().expect("nothing is playing");
        bench.run(150); // 1.5 s of warm-up: nothing was executed meanwhile
        assert_eq!(bench.wish.mode, Mode::Waiting);
        assert_eq!(bench.give(chunk(order.request, at(0), ramp(0.0, 0.01))), Ok(()));
        bench.run(1);
        let position = bench.wish.position[0];
        assert!(position < 0.01, "{}: warm-up must not skip actions", strategy.name());
    }
}

#[test]
fn zero_padding_in_the_prefix() {
    let mut bench = playing(guided(), 80);
    let order = bench.due().expect("the execution horizon is reached");
    let mut observation = seen(at(80), 0.08);
    let plan = bench.scheduler.plan().copied();
    let request = prepare(&order, plan.as_ref(), &mut observation, DT, &[ActionKind::Position]);
    let prefix = request.prefix.expect("the strategy guides");
    assert_eq!(prefix.rows(), 8, "eight actions are left, none is invented");
    assert!(prefix.actions.iter().all(|a| *a > 0.08), "{:?}", prefix.actions);
    let weights = prefix.weights(MaskSchedule::Ones, 16);
    assert!(weights[8..].iter().all(|w| *w == 0.0), "what is not planned does not pull");
}

#[test]
fn prefix_shifted_by_the_delay() {
    let mut bench = playing(guided(), 80);
    let order = bench.due().expect("due");
    let plan = bench.scheduler.plan().copied();
    // The camera's frame is 50 ms older than the order: half an action.
    for (instant, first) in [(at(80), 0.09), (at(75), 0.085)] {
        let mut observation = seen(instant, 0.0);
        let request = prepare(&order, plan.as_ref(), &mut observation, DT, &[ActionKind::Position]);
        let prefix = request.prefix.expect("guided");
        for (k, action) in prefix.actions.iter().take(6).enumerate() {
            let wanted = first + 0.01 * k as f64;
            assert!((action - wanted).abs() < 2e-4, "row {k}: {action}, expected {wanted}");
        }
    }
}

#[test]
fn stale_frame_for_relative_actions() {
    // Made from an observation at 0.3 rad; the arm has moved to 0.5 rad before the chunk is handed over.
    let observation = seen(at(0), 0.3);
    let mut chunk = chunk(1, at(0), vec![0.1, 0.2, 0.3]);
    chunk.make_absolute(&[ActionKind::Delta], &observation.proprioception);
    let absolute: Vec<f64> = vec![0.4, 0.5, 0.6];
    for (ours, wanted) in chunk.values().iter().zip(absolute) {
        assert!((ours - wanted).abs() < 1e-12, "displacements count from the observation");
    }
}

#[test]
fn chunk_expiry_sawtooth() {
    // Latency of 2.5 s, chunks of 1.6 s: every chunk is played out before the next comes.
    for strategy in StrategyConfig::ALL {
        let mut bench = Bench::strategy(strategy);
        let (mut highest, mut accepted) = (0.0f64, 0);
        for _ in 0..6 {
            let Some(order) = (0..300).find_map(|_| {
                let order = bench.due();
                if order.is_none() {
                    bench.run(1);
                }
                order
            }) else {
                panic!("{}: nothing is asked for any more", strategy.name());
            };
            let (instant, position) = (at(bench.tick), bench.wish.position[0]);
            for _ in 0..250 {
                bench.run(1);
                let now = bench.wish.position[0];
                assert!(now >= highest - 2e-3, "{}: back to {now}", strategy.name());
                highest = highest.max(now);
            }
            // The policy goes on from where it saw the arm; it never looks back.
            let from = match order.guide {
                Guide::RollForward => {
                    bench.scheduler.plan().and_then(|p| p.row(0)).map_or(position, |r| r[0])
                }
                _ => position,
            };
            if bench.give(chunk(order.request, instant, ramp(from, 0.01))).is_ok() {
                accepted += 1;
            }
        }
        assert_eq!(accepted, 6, "{}: a late chunk is still of use", strategy.name());
        assert!(highest > 0.3, "{}: {highest}", strategy.name());
    }
}
