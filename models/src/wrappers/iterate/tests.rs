use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sinew_runtime::{PrefixSupport, inference};

use super::*;
use crate::anytime::compute;
use crate::heads::flow::{FlowTime, NoiseAtOne, Planned, Sampler, Solver, Start, gaussian_noise};
use crate::kernels::{Matrix, add_scaled};

const DT: Duration = Duration::from_millis(100);
const HORIZON: usize = 10;
const STEPS: usize = 10;

/// A head that makes a ramp of time in its first dimension and the given switch in its second; with a guess, that
/// guess. It tells what it was asked.
struct Head {
    spec: PolicySpec,
    asked: Arc<Mutex<Vec<ChunkRequest>>>,
    run: Option<(Stamp, ChunkRequest)>,
}

impl Policy for Head {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, asked: &ChunkRequest) -> Result<(), PolicyError> {
        self.asked.lock().expect("nobody died").push(asked.clone());
        self.run = Some((seen.instant, asked.clone()));
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        Ok(Progress::Done)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let (instant, asked) = self.run.take().ok_or(PolicyError::OutOfTurn("begin"))?;
        let values = match asked.prefix {
            // It knows better than the guess that a switch is on.
            Some(prefix) => {
                let rows = prefix.actions.chunks_exact(2);
                rows.flat_map(|row| [row[0], 1.0]).collect()
            }
            None => (0..HORIZON).flat_map(|k| [ramp(instant, k as f64), 1.0]).collect(),
        };
        let mut chunk = ActionChunk::new(asked.id, instant, DT, 2, values)
            .map_err(|e| PolicyError::Compute(e.to_string()))?;
        chunk.report.denoise_steps = asked.denoise_steps.unwrap_or(STEPS);
        Ok(chunk)
    }
}

/// Where the ramp is `k` actions after `instant`.
fn ramp(instant: Stamp, k: f64) -> f64 {
    instant.seconds_from(Stamp(0)) + 0.1 * k
}

fn iterate(config: IterateConfig) -> (Iterate, Arc<Mutex<Vec<ChunkRequest>>>) {
    let spec = PolicySpec {
        cameras: Vec::new(),
        optional_cameras: 0,
        state_dim: 2,
        action_dim: 2,
        action_names: Vec::new(),
        action_horizon: HORIZON,
        action_rate_hz: Some(10.0),
        denoise_steps: STEPS,
        prefix: PrefixSupport { guided: true, trained: None, warm_start: true },
    };
    let asked = Arc::<Mutex<Vec<_>>>::default();
    let head = Head { spec, asked: asked.clone(), run: None };
    let units = vec![Unit { middle: 0.0, size: 1.0 }; 2];
    let kinds = vec![ActionKind::Position, ActionKind::Switch];
    let made = Iterate::new(Box::new(head), units, kinds, NoiseLaw::Flow, config);
    (made.expect("the head can start from a guess"), asked)
}

fn seen(ms: i64, task: &str) -> Observation {
    let instant = Stamp(ms * 1_000_000);
    Observation {
        instant,
        images: Vec::new(),
        proprioception: vec![ramp(instant, 0.0), 1.0],
        proprioception_age: Duration::ZERO,
        instruction: task.to_owned(),
    }
}

fn used(policy: &mut Iterate, seen: &Observation) -> (ActionChunk, CacheUse) {
    let chunk = inference::run(policy, seen, &ChunkRequest::default()).expect("it runs");
    let used = chunk.report.caches.iter().find(|c| c.0 == WARM_START).expect("it says").1;
    (chunk, used)
}

/// The answers of so many chunks, 200 ms apart, from `from` (ms) on.
fn many(policy: &mut Iterate, from: i64, count: i64) -> Vec<Option<Unused>> {
    (0..count).map(|k| used(policy, &seen(from + 200 * k, "go")).1.unused).collect()
}

#[test]
fn guesses_are_measured_before_they_are_used_and_again_in_time() {
    let config = IterateConfig { learn: 2, renew: 3, ..IterateConfig::default() };
    let (mut policy, asked) = iterate(config);
    let fresh = Some(Unused::Fresh);
    let renewed = Some(Unused::Refresh);
    let expected = [fresh, fresh, fresh, None, None, None, renewed, None, None, None, renewed];
    assert_eq!(many(&mut policy, 0, 11), expected);
    let asked = asked.lock().expect("nobody died");
    assert!(asked[2].prefix.is_none() && asked[6].prefix.is_none());
    let warm = asked[3].prefix.as_ref().expect("a guess");
    let PrefixUse::WarmStart { time } = warm.usage else { panic!("{:?}", warm.usage) };
    assert_eq!(asked[3].denoise_steps, Some(part(STEPS, time)));
    assert!(asked[3].denoise_steps < Some(STEPS));
    // The ramp goes on where the chunk before has it, and stays at its end.
    assert!((warm.actions[0] - 0.6).abs() < 1e-9, "{:?}", warm.actions);
    assert!((warm.actions[2 * (HORIZON - 1)] - 1.3).abs() < 1e-9);
    assert!((warm.actions[1] - 0.1).abs() < 1e-12, "a switch is a tenth of itself");
}

#[test]
fn it_starts_anew_after_another_task_a_gap_or_a_hand() {
    let config = IterateConfig { learn: 1, renew: 100, ..IterateConfig::default() };
    let (mut policy, _) = iterate(config);
    assert_eq!(many(&mut policy, 0, 4)[2..], [None, None]);
    assert_eq!(used(&mut policy, &seen(800, "stop")).1.unused, Some(Unused::Changed));
    assert_eq!(used(&mut policy, &seen(1000, "stop")).1.unused, None);
    assert_eq!(used(&mut policy, &seen(9000, "stop")).1.unused, Some(Unused::Fresh), "a gap");
    assert_eq!(used(&mut policy, &seen(9200, "stop")).1.unused, None);
    assert_eq!(used(&mut policy, &seen(100, "stop")).1.unused, Some(Unused::Fresh), "back");
    assert_eq!(used(&mut policy, &seen(300, "stop")).1.unused, None);
    let mut moved = seen(500, "stop");
    moved.proprioception[0] += 1.5;
    assert_eq!(used(&mut policy, &moved).1.unused, Some(Unused::Changed), "a person moved it");
}

#[test]
fn a_plan_of_the_strategy_comes_first_and_saved_steps_are_told() {
    let config = IterateConfig { learn: 1, ..IterateConfig::default() };
    let (mut policy, asked) = iterate(config);
    many(&mut policy, 0, 2);
    let (chunk, warm) = used(&mut policy, &seen(400, "go"));
    assert_eq!(warm.lookups as usize, STEPS);
    assert_eq!(warm.hits as usize, STEPS - chunk.report.denoise_steps);
    assert!(warm.bound.is_some());
    let prefix =
        Prefix { actions: vec![0.5; 4], dim: 2, frozen: 1, horizon: 2, usage: PrefixUse::Trained };
    let request = ChunkRequest { prefix: Some(prefix.clone()), ..ChunkRequest::default() };
    policy.begin(&seen(600, "go"), &request).expect("it fits");
    let last = asked.lock().expect("nobody died").last().cloned().expect("it was asked");
    assert_eq!((last.prefix, last.denoise_steps), (Some(prefix), None));
}

#[test]
fn a_wrong_guess_asks_for_more_noise_and_a_hopeless_one_for_all() {
    let mut trust = Trust::new(IterateConfig { learn: 1, ..Default::default() }, NoiseLaw::Flow);
    assert_eq!(trust.start(), Err(Unused::Fresh));
    trust.measured(0.0);
    assert_eq!(trust.start(), Ok(0.15), "never less than the least");
    trust.measured(0.4);
    let near = trust.start().expect("near enough");
    trust.measured(0.9);
    assert!(trust.start().expect("near enough") > near);
    (0..8).for_each(|_| trust.measured(5.0));
    assert_eq!(trust.start(), Err(Unused::Changed));
    trust.measured(f64::NAN);
    assert!(trust.error().is_some_and(f64::is_finite));
}

/// A flow-matching head that knows its actions: every velocity points from where the sample is to them.
struct Knowing {
    spec: PolicySpec,
    actions: Vec<f32>,
    run: Option<(ChunkRequest, Stamp, Planned, Sampler<NoiseAtOne>)>,
}

impl Policy for Knowing {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(&mut self, seen: &Observation, asked: &ChunkRequest) -> Result<(), PolicyError> {
        let noise = gaussian_noise(seen.instant.0 as u64, 2 * HORIZON);
        let steps = asked.denoise_steps.unwrap_or(STEPS);
        let start = Start { noise, shape: (HORIZON, 2), steps, solver: Solver::Euler };
        let to_model = |rows: &[f64], _| Ok(rows.iter().map(|v| *v as f32).collect());
        let (planned, sampler) = Planned::start(asked.prefix.as_ref(), to_model, start)?;
        self.run = Some((asked.clone(), seen.instant, planned, sampler));
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let (.., planned, sampler) = self.run.as_mut().ok_or(PolicyError::OutOfTurn("begin"))?;
        let actions = Matrix::new(&self.actions, (HORIZON, 2)).map_err(compute)?;
        let velocity = |x: &Matrix, times: &[FlowTime<NoiseAtOne>]| {
            let mut v = x.clone();
            add_scaled(&mut v, &actions, -1.0)?;
            Ok(v.scaled((1.0 / times[0].level()) as f32))
        };
        planned.step(sampler, velocity).map_err(compute)?;
        let (done, total) = (sampler.done(), sampler.steps());
        Ok(match sampler.is_done() {
            true => Progress::Done,
            false => Progress::Step {
                stage: "denoise",
                done,
                total,
                denoised: true,
                next_denoises: true,
            },
        })
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let (asked, instant, _, sampler) =
            self.run.take().ok_or(PolicyError::OutOfTurn("begin"))?;
        let values = sampler.sample().values().iter().copied().map(f64::from).collect();
        let mut chunk = ActionChunk::new(asked.id, instant, DT, 2, values)
            .map_err(|e| PolicyError::Compute(e.to_string()))?;
        chunk.report.denoise_steps = sampler.done();
        Ok(chunk)
    }
}

#[test]
fn what_a_knowing_head_makes_is_the_same_from_every_start_and_takes_fewer_steps() {
    let spec = iterate(IterateConfig::default()).0.spec().clone();
    // Two positions, so that nothing is shrunk.
    let actions = |at: f32| (0..2 * HORIZON).map(|k| at + 0.01 * k as f32).collect::<Vec<_>>();
    let (units, kinds) = (vec![Unit { middle: 0.0, size: 1.0 }; 2], vec![ActionKind::Position; 2]);
    let config = IterateConfig { learn: 2, renew: 6, ..IterateConfig::default() };
    for target in [0.2, -0.7] {
        let head = Knowing { actions: actions(target), run: None, spec: spec.clone() };
        let mut policy = Iterate::new(
            Box::new(head),
            units.clone(),
            kinds.clone(),
            NoiseLaw::Flow,
            config.clone(),
        )
        .expect("it can start from a guess");
        let mut fewest = STEPS;
        for k in 0..20 {
            let mut seen = seen(100 * k, "go");
            seen.proprioception = vec![f64::from(target); 2];
            let (chunk, used) = used(&mut policy, &seen);
            let off = chunk.values().iter().zip(actions(target));
            let off = off.map(|(a, b)| (a - f64::from(b)).abs()).fold(0.0, f64::max);
            assert!(off < 1e-4, "chunk {k} is off by {off}");
            assert_eq!(used.hits as usize, STEPS - chunk.report.denoise_steps);
            fewest = fewest.min(chunk.report.denoise_steps);
        }
        assert_eq!(fewest, 2, "the least part of the way, of ten steps");
    }
}

/// 100 steps of the squared-cosine schedule; `../shared` is not needed for its published ratios.
#[test]
fn noise_levels_are_those_of_their_law() {
    assert!((NoiseLaw::Flow.time(1.0) - 0.5).abs() < 1e-12);
    let law = NoiseLaw::Diffusion(vec![0.04, 0.1, 0.3, 0.8]);
    assert_eq!([0.01, 0.1, 0.2, 9.0].map(|r| law.time(r)), [0.25, 0.5, 0.75, 1.0]);
}

proptest! {
    #[test]
    fn shifts_add_up_and_end_at_the_last_row(
        values in prop::collection::vec(-1.0..1.0f64, 2 * HORIZON), shifts in 1i64..5
    ) {
        let kinds = [ActionKind::Position, ActionKind::Switch];
        let made = |values: Vec<f64>| Made {
            chunk: ActionChunk::new(0, Stamp(0), DT, 2, values).expect("two dimensions"),
            instruction: String::new(),
            proprioception: Vec::new(),
        };
        let step = |values: Vec<f64>, by: i64| {
            made(values).shifted(Stamp(by * 100_000_000), &kinds).expect("within").0
        };
        // Stamps over periods are rounded.
        let same = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
        prop_assert_eq!(step(values.clone(), 0), values.clone());
        let mut one_by_one = values.clone();
        for _ in 0..shifts {
            one_by_one = step(one_by_one, 1);
        }
        prop_assert!(same(&step(values.clone(), shifts), &one_by_one));
        for _ in 0..HORIZON {
            one_by_one = step(one_by_one, 1);
        }
        let last = &values[2 * (HORIZON - 1)..];
        prop_assert!(one_by_one.chunks_exact(2).all(|row| same(row, last)));
        let between = made(values.clone()).shifted(Stamp(40_000_000), &kinds).expect("within");
        prop_assert!((between.0[0] - (0.6 * values[0] + 0.4 * values[2])).abs() < 1e-12);
        prop_assert_eq!((between.0[1], between.1), (values[1], HORIZON - 1));
    }
}
