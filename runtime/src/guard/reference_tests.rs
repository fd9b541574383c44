//! The joint filter against time-optimal jerk-limited trajectories that Ruckig 0.19.4 computed.
//!
//! Ruckig plans once in continuous time; the guard decides anew in every period and keeps finite differences
//! within the limits. So it may come later by some periods, and never earlier by more than rounding to one.

use std::path::Path;

use super::joint::{JointFilter, Motion};
use crate::JointLimits;

const T: f64 = 1e-3;

#[derive(serde::Deserialize)]
struct Case {
    dofs: usize,
    current_position: Vec<f64>,
    current_velocity: Vec<f64>,
    current_acceleration: Vec<f64>,
    target_position: Vec<f64>,
    target_velocity: Vec<f64>,
    target_acceleration: Vec<f64>,
    max_velocity: Vec<f64>,
    max_acceleration: Vec<f64>,
    max_jerk: Vec<f64>,
    independent_min_durations: Vec<f64>,
}

/// Periods until `case`'s joint rests at its target; every period's limits are checked.
fn arrival(case: &Case, joint: usize) -> Result<u32, String> {
    let limits = JointLimits {
        lower: -1e3,
        upper: 1e3,
        velocity: case.max_velocity[joint],
        acceleration: case.max_acceleration[joint],
        jerk: case.max_jerk[joint],
    };
    let goal = case.target_position[joint];
    let mut filter = JointFilter::new(limits, T);
    let start = Motion {
        position: case.current_position[joint],
        velocity: case.current_velocity[joint],
        acceleration: case.current_acceleration[joint],
    };
    filter.accept(start, Some(0.0));
    let mut last = start;
    for k in 1..20_000 {
        let next = filter.step(goal, 0.0).motion;
        let jerk = (next.acceleration - last.acceleration) / T;
        // The brakes may have to pass the speed limit when the start is at its very edge.
        let within = next.velocity.abs() <= limits.velocity.max(last.velocity.abs()) * (1.0 + 1e-6)
            && next.acceleration.abs() <= limits.acceleration * (1.0 + 1e-6)
            && jerk.abs() <= limits.jerk * (1.0 + 1e-5);
        if !within {
            return Err(format!("period {k}: {next:?} after {last:?}, {limits:?}"));
        }
        filter.accept(next, Some(0.0));
        last = next;
        if (next.position - goal).abs() < 1e-9 && next.velocity.abs() < 1e-6 {
            return Ok(k);
        }
    }
    Err(format!("never arrived: {last:?}"))
}

#[test]
fn rest_targets_are_reached_nearly_as_fast_as_the_optimum() {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/ruckig_reference/cases.json");
    let Ok(text) = std::fs::read_to_string(&file) else {
        println!("skipped: no reference trajectories at ../shared/data/ruckig_reference");
        return;
    };
    let cases: Vec<Case> = serde_json::from_str(&text).expect("the reference file is JSON");
    let (mut count, mut worst, mut slow, mut total) = (0, 0.0f64, 0.0f64, 0.0f64);
    for (number, case) in cases.iter().enumerate() {
        for joint in 0..case.dofs {
            if case.target_velocity[joint] != 0.0 || case.target_acceleration[joint] != 0.0 {
                continue;
            }
            let periods = arrival(case, joint)
                .unwrap_or_else(|e| panic!("case {number}, joint {joint}: {e}"));
            let optimum = case.independent_min_durations[joint];
            let late = f64::from(periods) - optimum / T;
            count += 1;
            total += late;
            worst = worst.max(late);
            slow = slow.max(late * T / optimum);
            assert!(
                (-2.0..=20.0).contains(&late),
                "case {number}, joint {joint}: {periods} periods, optimum {optimum} s"
            );
        }
    }
    println!(
        "{count} joint motions: {:.1} periods of 1 ms later than the optimum on average, at most {worst:.1} ({:.2} %)",
        total / f64::from(count),
        100.0 * slow
    );
    assert!(count > 100, "{count} motions to rest in the reference");
}
