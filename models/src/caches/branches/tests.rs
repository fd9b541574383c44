use super::super::plan::{Block, BlockKind, Updates};
use super::super::schedule::{BlockPlan, Form};
use super::*;

const STEPS: usize = 6;
const ALL: [f32; STEPS] = [1.0, 4.0, 9.0, 16.0, 25.0, 36.0];

fn plan(updates: &[usize], slopes: &[f64]) -> BlockPlan {
    BlockPlan {
        name: Block::new(BlockKind::FeedForward, 0).name,
        updates: Some(updates.iter().copied().collect::<Updates>()),
        slopes: slopes.to_vec(),
        similarity: 1.0,
        spread: 0.0,
        volatility: 1.0,
    }
}

fn positions() -> Vec<f64> {
    (0..STEPS).map(|k| k as f64 / STEPS as f64).collect()
}

fn schedule(updates: &[usize]) -> Schedule {
    let plans = vec![plan(updates, &[])];
    Schedule::new(String::new(), positions(), (Form::Held, updates.len()), None, plans)
}

/// The block gives the square of the evaluation's number; what is added to zero at each of `steps` evaluations.
fn outputs(branches: &mut Branches, steps: usize) -> Vec<f32> {
    (0..steps)
        .map(|k| {
            let output = branches.evaluate(k as f64 / steps as f64, k + 1 == steps, |branches| {
                let output = (k as f32 + 1.0).powi(2);
                branches.add(0, Matrix::zeros(1, 1), |_| Ok(Matrix::of_row(&[output])))
            });
            output.expect("one value").values()[0]
        })
        .collect()
}

fn quiet() -> MonitorConfig {
    MonitorConfig { share: 0.0, ..MonitorConfig::default() }
}

#[test]
fn outputs_are_reused_until_the_next_update() {
    let mut branches = Branches::scheduled(schedule(&[0, 2]), quiet());
    for seed in 0..2 {
        branches.begin(seed, false);
        assert_eq!(outputs(&mut branches, STEPS), [1.0, 1.0, 9.0, 9.0, 9.0, 36.0]);
        let used = branches.end().expect("there is a cache");
        assert_eq!((used.lookups, used.hits, used.unused), (6, 3, None));
    }
    branches.begin(2, true);
    assert_eq!(outputs(&mut branches, STEPS), ALL);
    assert_eq!(branches.end().expect("a cache").unused, Some(Unused::Exact));
    branches.begin(3, false);
    assert_eq!(outputs(&mut branches, 2), [1.0, 4.0]);
    assert_eq!(branches.end().expect("a cache").unused, Some(Unused::FewSteps));
}

#[test]
fn a_closed_cache_computes_everything_and_says_so() {
    // Every output is far from the one before: the second comparison closes the cache.
    let config = MonitorConfig { share: 1.0, limit: 0.01, ..MonitorConfig::default() };
    let mut branches = Branches::scheduled(schedule(&[0]), config);
    branches.begin(1, false);
    assert_eq!(outputs(&mut branches, STEPS), ALL);
    let used = branches.end().expect("there is a cache");
    assert_eq!((used.hits, used.opening), (0, Opening::Closed));
    assert_eq!(used.error, None, "nothing was reused");
    branches.forget();
    branches.begin(1, false);
    assert_eq!(branches.end().expect("a cache").opening, Opening::Open);
}

#[test]
fn a_surge_of_errors_closes_the_cache_and_calm_opens_it_step_by_step() {
    // A block that stands still, moves, and stands still again: six evaluations a chunk, one update.
    let config = MonitorConfig { share: 0.9, limit: 0.2, calm: 1, ..MonitorConfig::default() };
    let mut branches = Branches::scheduled(schedule(&[0]), config);
    let mut made = 0;
    let mut chunk = |branches: &mut Branches, moves: f32| {
        made += 1;
        branches.begin(made, false);
        for k in 0..STEPS {
            let output = branches.evaluate(k as f64 / STEPS as f64, k + 1 == STEPS, |branches| {
                let output = 1.0 + moves * k as f32;
                branches.add(0, Matrix::of_row(&[1.0]), |_| Ok(Matrix::of_row(&[output])))
            });
            output.expect("one value");
        }
        branches.end().expect("there is a cache")
    };
    for _ in 0..40 {
        assert_eq!(chunk(&mut branches, 0.0).opening, Opening::Open);
    }
    let surge = (0..40).map(|_| chunk(&mut branches, 3.0));
    let closed: Vec<CacheUse> = surge.skip_while(|used| used.opening == Opening::Open).collect();
    assert!(closed.len() >= 38, "two errors of {} bad chunks closed it", 40 - closed.len());
    assert!(closed.iter().all(|used| used.opening == Opening::Closed));
    assert!(closed[1..].iter().all(|used| used.hits == 0 && used.unused.is_none()));
    assert!(closed[30].bound.is_some_and(|bound| bound > 0.2), "{:?}", closed[30]);
    let calm: Vec<Opening> = (0..200).map(|_| chunk(&mut branches, 0.0).opening).collect();
    let mut order = calm.clone();
    order.dedup();
    assert_eq!(order, [Opening::Closed, Opening::Narrow, Opening::Open]);
    assert!(chunk(&mut branches, 0.0).bound.is_some_and(|bound| bound < 0.2));
}

#[test]
fn recordings_become_similarities() {
    let tuning = Tuning::default();
    let mut branches = Branches::tuned(tuning.clone(), 1);
    tuning.lock().mode = TunedMode::Record;
    branches.begin(1, false);
    outputs(&mut branches, 3);
    assert_eq!(branches.end(), None);
    {
        let tuned = tuning.lock();
        assert_eq!(tuned.positions.len(), 3);
        assert_eq!(tuned.likeness[0].samples(), 1);
        assert_eq!(tuned.likeness[0].similarity(0, 2), 1.0);
        // Of 1, 4 and 9: means of 3, 8 and 5.
        assert!((tuned.likeness[0].volatility() - 16.0 / 3.0).abs() < 1e-9);
        assert_eq!(tuned.whole.as_ref().expect("it was recorded").product(1, 2), 36.0);
    }
    tuning.lock().mode = TunedMode::Off;
    branches.begin(1, false);
    outputs(&mut branches, 3);
    assert_eq!((branches.end(), tuning.lock().likeness[0].samples()), (None, 1));
}

#[test]
fn outputs_go_on_where_the_plan_says_so() {
    let slopes = [0.0, 0.0, 1.0, 0.5, 0.0, 0.0];
    let plans = || vec![plan(&[0, 1], &slopes)];
    let schedule = Schedule::new(String::new(), positions(), (Form::Each, 2), None, plans());
    let mut branches = Branches::scheduled(schedule, quiet());
    branches.begin(0, false);
    // 4 and 1: it moved by 3; by one and by two steps of it more, whole and half; the last but one is held.
    let expected = [1.0, 4.0, 7.0, 7.0, 4.0, 36.0];
    let found = outputs(&mut branches, STEPS);
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");

    // The same of the network as a whole: its block is asked for with it, or not at all.
    let block = BlockPlan { updates: None, ..plan(&[], &[]) };
    let whole = plans().pop();
    let schedule = Schedule::new(String::new(), positions(), (Form::Whole, 2), whole, vec![block]);
    assert!((schedule.share() - 0.5).abs() < 1e-12, "0, 1 and the last");
    let mut branches = Branches::scheduled(schedule.clone(), quiet());
    branches.begin(0, false);
    let found = outputs(&mut branches, STEPS);
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?}");
    let used = branches.end().expect("there is a cache");
    assert_eq!((used.lookups, used.hits), (6, 3));
    // Compared each time: exact, and the error is known.
    let compared = MonitorConfig { share: 1.0, exceeded: 0.5, limit: 9.0, ..quiet() };
    let mut branches = Branches::scheduled(schedule, compared);
    branches.begin(0, false);
    assert_eq!(outputs(&mut branches, STEPS), ALL);
    let used = branches.end().expect("there is a cache");
    assert!(used.hits == 0 && used.bound.is_some_and(|b| b > 0.1 && b < 1.0), "{used:?}");
}
