//! Temporal ensembling: does the scheduler play what LeRobot 0.6.1's `ACTTemporalEnsembler` gives out?
//!
//! The recorded chunks go into the scheduler one after the other, one each action, as the reference gets them. At
//! the end of an action's period the scheduler's wish is that action; joins have faded by then, since a period
//! here is a second.

mod common;

use std::time::Duration;

use common::{Case, Recorded, cases, max_difference, reference};
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::scheduler::{CommandState, Scheduler, SchedulerConfig};
use sinew_runtime::{ActionChunk, JointLimits, JointVec, Stamp};

const DT: Duration = Duration::from_secs(1);

/// The actions that the scheduler plays when it is given `chunks` (`[steps, 1, H, D]`) one by one.
fn played(chunks: &Recorded, decay: f64) -> Vec<f32> {
    let &[steps, 1, horizon, dim] = chunks.shape.as_slice() else {
        panic!("shape {:?}", chunks.shape)
    };
    let free =
        JointLimits { lower: -1e3, upper: 1e3, velocity: 1e6, acceleration: 1e9, jerk: 1e12 };
    let config = SchedulerConfig {
        strategy: StrategyConfig::Ensemble { decay },
        ..SchedulerConfig::new(&vec![free; dim], DT, 1)
    };
    let mut scheduler = Scheduler::new(config);
    let still = JointVec::zeros(dim);
    scheduler.start(&still);
    let mut command = CommandState::at_rest(&still);
    let mut now = Stamp(0);
    scheduler.tick(now, &command);
    let mut actions = Vec::new();
    for chunk in chunks.values.chunks_exact(horizon * dim) {
        let order = scheduler.due(now).expect("ensembling asks after every action");
        let values = chunk.iter().map(|v| f64::from(*v)).collect();
        let chunk = ActionChunk::new(order.request, now, DT, dim, values).expect("it fits");
        scheduler.on_chunk(chunk, now, &command).map_err(|e| e.1).expect("it was asked for");
        now = now + DT;
        let wish = scheduler.tick(now, &command);
        (command.position, command.velocity) = (wish.position, wish.velocity);
        actions.extend((0..dim).map(|joint| wish.position[joint] as f32));
    }
    assert_eq!(actions.len(), steps * dim);
    actions
}

/// The reference weighs in single precision, the scheduler in double.
const TOLERANCE: f32 = 2e-6;

fn check(name: &str, chunks: &Recorded, actions: &Recorded, decay: f64) {
    let ours = played(chunks, decay);
    let difference = max_difference(&ours, &actions.values);
    println!("{name}: {difference:.1e}");
    assert!(difference <= TOLERANCE, "{name} differs by {difference:e}");
    // The test can fail: another weight plays something else.
    let other = played(chunks, decay + 0.5);
    assert!(max_difference(&other, &actions.values) > 1e-3, "{name}: the weights do not matter");
}

#[test]
fn every_weight_table_matches_lerobot() {
    let Some(dir) = reference("preprocess") else { return };
    let case = Case::open(&dir.join("case_act_tables.safetensors"));
    for decay in ["-0.05", "0.0", "0.01"] {
        let get = |what: &str| case.get(&format!("ensemble.{decay}.{what}"));
        let number = decay.parse().expect("a number");
        check(&format!("decay {decay}"), get("chunks"), get("actions"), number);
    }
}

#[test]
fn an_ensembled_episode_matches_lerobot() {
    let Some(dir) = reference("act_ensemble") else { return };
    let list = cases(&dir);
    let entry = list.iter().find(|c| c["kind"] == "temporal_ensemble").expect("there is one");
    let case = Case::open(&dir.join(entry["file"].as_str().expect("a file")));
    let decay = entry["coefficient"].as_f64().expect("a number");
    check("episode", case.get("episode.chunks"), case.get("episode.actions_normalized"), decay);
}
