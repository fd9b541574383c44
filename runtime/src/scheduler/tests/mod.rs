//! The scheduler under a virtual clock, with an arm that follows its wish exactly.

mod seam_bugs;
mod strategies;

use super::*;
use proptest::prelude::*;

const PERIOD: Duration = Duration::from_millis(10);
const DT: Duration = Duration::from_millis(100);

fn config() -> SchedulerConfig {
    let limits =
        JointLimits { lower: -4.0, upper: 4.0, velocity: 4.0, acceleration: 40.0, jerk: 1000.0 };
    SchedulerConfig::new(&[limits], PERIOD, 8)
}

fn chunk(request: u64, instant: Stamp, actions: Vec<f64>) -> ActionChunk {
    ActionChunk::new(request, instant, DT, 1, actions).expect("one joint")
}

fn ramp(from: f64, step: f64) -> Vec<f64> {
    (1..=16).map(|k| from + step * f64::from(k)).collect()
}

fn at(tick: u64) -> Stamp {
    Stamp(0) + PERIOD * tick as u32
}

/// A scheduler and its virtual clock.
struct Bench {
    scheduler: Scheduler,
    tick: u64,
    wish: Wish,
    command: CommandState,
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: SchedulerConfig) -> Self {
        let still = JointVec::zeros(config.joints.len());
        let command = CommandState::at_rest(&still);
        let mut scheduler = Scheduler::new(config);
        scheduler.start(&still);
        let wish = scheduler.tick(at(0), &command);
        Self { scheduler, tick: 0, wish, command }
    }

    fn strategy(strategy: StrategyConfig) -> Self {
        Self::with(SchedulerConfig { strategy, ..config() })
    }

    fn run(&mut self, ticks: u64) {
        for _ in 0..ticks {
            self.tick += 1;
            self.wish = self.scheduler.tick(at(self.tick), &self.command);
            let before = self.command;
            self.command.position = self.wish.position;
            self.command.velocity = self.wish.velocity;
            for joint in 0..before.position.len() {
                self.command.acceleration[joint] =
                    (self.wish.velocity[joint] - before.velocity[joint]) / PERIOD.as_secs_f64();
            }
        }
    }

    fn due(&mut self) -> Option<ChunkOrder> {
        self.scheduler.due(at(self.tick))
    }

    fn give(&mut self, chunk: ActionChunk) -> Result<(), Refusal> {
        let command = self.command;
        self.scheduler.on_chunk(chunk, at(self.tick), &command).map(|_| ()).map_err(|e| e.1)
    }
}

#[test]
fn a_chunk_is_spliced_at_the_actions_executed_since_its_observation() {
    let mut bench = Bench::new();
    let first = bench.scheduler.due(at(0)).expect("nothing is playing");
    assert_eq!(bench.give(chunk(first.request, at(0), ramp(0.0, 0.01))), Ok(()));
    bench.run(80);
    let order = bench.scheduler.due(at(bench.tick)).expect("the execution horizon is reached");
    let seen = bench.wish.position[0];
    bench.run(25); // inference takes 2.5 actions
    assert_eq!(bench.give(chunk(order.request, at(80), ramp(seen, 0.01))), Ok(()));
    bench.run(1);
    // The same line continues: 2.6 actions of 0.01 after the observation.
    assert!((bench.wish.position[0] - (seen + 0.026)).abs() < 1e-4, "{}", bench.wish.position[0]);
}

#[test]
fn starvation_holds_the_last_action_and_a_late_chunk_resumes_without_a_jump() {
    let mut bench = Bench::new();
    let first = bench.scheduler.due(at(0)).expect("nothing is playing");
    assert_eq!(bench.give(chunk(first.request, at(0), ramp(0.0, 0.01))), Ok(()));
    bench.run(80);
    let order = bench.scheduler.due(at(80)).expect("due");
    bench.run(120);
    assert_eq!(bench.wish.mode, Mode::Starved);
    assert!((bench.wish.position[0] - 0.16).abs() < 1e-9 && bench.wish.velocity[0] == 0.0);
    // Seen at tick 80 (8 actions executed then, 16 now): the chunk begins at its ninth action.
    assert_eq!(bench.give(chunk(order.request, at(80), ramp(0.08, 0.01))), Ok(()));
    bench.run(1);
    assert!((bench.wish.position[0] - 0.16).abs() < 0.002);
}

#[test]
fn unusable_chunks_are_refused_by_name() {
    let mut bench = Bench::new();
    let order = bench.scheduler.due(at(0)).expect("nothing is playing");
    assert_eq!(bench.give(chunk(order.request + 7, at(0), ramp(0.0, 0.1))), Err(Refusal::NotAsked));
    let mut bad = ramp(0.0, 0.1);
    bad[5] = f64::NAN;
    assert_eq!(bench.give(chunk(order.request, at(0), bad)), Err(Refusal::NotFinite));
    let order = bench.scheduler.due(at(0)).expect("the refused chunk is asked for again");
    let two = ActionChunk::new(order.request, at(0), DT, 2, vec![0.0; 4]).expect("two joints");
    assert_eq!(bench.give(two), Err(Refusal::WrongShape));
    let order = bench.scheduler.due(at(0)).expect("due");
    assert_eq!(bench.give(chunk(order.request, at(0), ramp(0.0, 0.1))), Ok(()));
    bench.run(140);
    let order = bench.scheduler.due(at(140)).expect("due");
    assert_eq!(bench.give(chunk(order.request, at(0), vec![0.0; 3])), Err(Refusal::Expired));
}

#[test]
fn the_next_chunk_is_asked_for_ahead_of_the_tail_latency() {
    let mut bench = Bench::new();
    let order = bench.scheduler.due(at(0)).expect("nothing is playing");
    bench.run(30);
    assert_eq!(bench.give(chunk(order.request, at(0), ramp(0.0, 0.01))), Ok(()));
    // Latency 300 ms is three actions: due after 8 - 3 = 5 actions, not before.
    bench.run(49);
    assert_eq!(bench.due(), None);
    bench.run(2);
    assert!(bench.due().is_some());
    assert_eq!(bench.due(), None, "one request is open at a time");
}

#[test]
fn plans_do_not_count_on_a_policy_that_is_often_early() {
    let slow = Duration::from_millis(300);
    let mut bench =
        Bench::with(SchedulerConfig { latency: Some(slow), least_latency: slow, ..config() });
    for tick in [0, 51] {
        let order = bench.due().expect("nothing is playing, or it is time");
        assert_eq!(order.expected, at(tick) + slow);
        // At once: it ended at the first exit.
        let seen = bench.wish.position[0];
        assert_eq!(bench.give(chunk(order.request, at(tick), ramp(seen, 0.01))), Ok(()));
        // The next one is still due after 8 - 3 = 5 actions.
        bench.run(49);
        assert_eq!(bench.due(), None);
        bench.run(2);
    }
    assert!(bench.due().is_some());
}

#[test]
fn a_chunk_that_turns_back_does_not_swing_the_arm_past_both_curves() {
    let mut bench = Bench::new();
    let first = bench.scheduler.due(at(0)).expect("nothing is playing");
    assert_eq!(bench.give(chunk(first.request, at(0), ramp(0.0, 0.2))), Ok(()));
    bench.run(80); // 2 rad/s, at 1.6 rad
    let order = bench.scheduler.due(at(80)).expect("due");
    let turn = bench.wish.position[0];
    assert_eq!(bench.give(chunk(order.request, at(80), vec![turn - 0.8; 16])), Ok(()));
    let mut highest = turn;
    for _ in 0..160 {
        bench.run(1);
        highest = highest.max(bench.wish.position[0]);
    }
    // Two rad/s of difference cannot be braked away in less: 30 rad/s² and 660 rad/s³ are what a join may use.
    assert!(highest - turn < 0.25, "swung out by {} rad", highest - turn);
    assert!((bench.wish.position[0] - (turn - 0.8)).abs() < 1e-9);
}

#[test]
fn a_new_start_forgets_what_was_asked() {
    let mut bench = Bench::new();
    let order = bench.scheduler.due(at(0)).expect("due");
    bench.scheduler.start(&JointVec::zeros(1));
    assert_eq!(bench.give(chunk(order.request, at(0), ramp(0.0, 0.1))), Err(Refusal::NotAsked));
}

proptest! {
    #[test]
    fn joins_are_continuous_and_time_never_runs_back(
        arrivals in prop::collection::vec((1u64..40, -0.3..0.3f64, -0.02..0.02f64), 1..12)
    ) {
        let mut bench = Bench::new();
        let mut executed = 0.0;
        for (delay, level, slope) in arrivals {
            let order = bench.scheduler.due(at(bench.tick));
            let observed = at(bench.tick);
            for _ in 0..delay {
                let before = bench.wish;
                bench.run(1);
                let step = bench.wish.position[0] - before.position[0];
                // Chunk slope (up to 1.5 · 0.32 per action at a start) plus join speed bound every step.
                prop_assert!(step.abs() <= 0.01 * (4.8 + 3.0 + 2.0), "step {step}");
                prop_assert!(bench.scheduler.played() >= executed);
                executed = bench.scheduler.played();
            }
            if let Some(order) = order {
                let before = bench.wish.position[0];
                if bench.give(chunk(order.request, observed, ramp(level, slope))).is_ok() {
                    bench.run(1);
                    prop_assert!((bench.wish.position[0] - before).abs() < 0.12, "jump at a splice");
                    executed = bench.scheduler.played();
                }
            }
        }
    }
}
