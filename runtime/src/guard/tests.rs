//! The guard as a whole: what it passes, what it changes, and what it never lets out.

use super::*;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const LIMIT: JointLimits =
    JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 8.0, jerk: 160.0 };
/// A joint of the desk arm, nearly.
const QUICK: JointLimits =
    JointLimits { lower: -1.9, upper: 1.9, velocity: 3.1, acceleration: 21.0, jerk: 470.0 };

fn guard(limit: JointLimits, period_ms: u64) -> Guard {
    Guard::new(&[limit; 2], Duration::from_millis(period_ms)).expect("the limits are sound")
}

fn vec(values: &[f64]) -> JointVec {
    JointVec::from_slice(values).expect("they fit")
}

/// Checks a command stream by its finite differences alone.
struct Watch {
    limit: JointLimits,
    t: f64,
    p: f64,
    v: f64,
    a: f64,
}

impl Watch {
    fn new(limit: JointLimits, guard: &Guard, t: f64) -> Self {
        Self { limit, t, p: guard.position()[0], v: 0.0, a: 0.0 }
    }

    fn look(&mut self, p: f64) -> Result<(), String> {
        let JointLimits { lower, upper, velocity, acceleration, jerk } = self.limit;
        let v = (p - self.p) / self.t;
        let a = (v - self.v) / self.t;
        let j = (a - self.a) / self.t;
        // Rounding of a position, as differences enlarge it.
        let rounding = 8.0 * f64::EPSILON * p.abs().max(1.0);
        let bad = |what: &str, value: f64, limit: f64, order: i32| {
            let allowed = limit * (1.0 + 1e-6) + rounding / self.t.powi(order);
            (value.abs() > allowed).then(|| format!("{what} {value} of {limit}"))
        };
        let outside = !(lower - 1e-9..=upper + 1e-9).contains(&p);
        let found = bad("velocity", v, velocity, 1)
            .or(bad("acceleration", a, acceleration, 2))
            .or(bad("jerk", j, jerk, 3))
            .or(outside.then(|| format!("position {p}")));
        (self.p, self.v, self.a) = (p, v, a);
        found.map_or(Ok(()), Err)
    }
}

#[test]
fn a_wish_within_limits_passes_unchanged() {
    for period in [1u64, 5, 10] {
        let (mut guard, t) = (guard(LIMIT, period), period as f64 * 1e-3);
        // A quintic: 0.8 rad in 1 s, at most 1.5 rad/s, 4.6 rad/s², 48 rad/s³.
        let at = |f: f64| 0.8 * f * f * f * (10.0 - 15.0 * f + 6.0 * f * f);
        let slope = |f: f64| 0.8 * f * f * (30.0 - 60.0 * f + 30.0 * f * f);
        for k in 1..=1000 / period + 5 {
            let f = (k as f64 * t).min(1.0);
            let wish = vec(&[at(f), -at(f)]);
            let changed = guard.filter(&wish, &vec(&[slope(f), -slope(f)]));
            assert!(changed.is_empty(), "{changed:?} at {f}, period {period} ms");
            assert_eq!(guard.position(), &wish);
        }
        assert!(guard.at_rest());
    }
}

#[test]
fn nan_brakes_and_is_named() {
    let mut guard = guard(LIMIT, 10);
    for _ in 1..20 {
        guard.filter(&vec(&[0.5, 0.0]), &vec(&[0.0, 0.0]));
    }
    let before = guard.velocity()[0];
    let mut top = before;
    for _ in 0..40 {
        let changed = guard.filter(&vec(&[f64::NAN, 0.0]), &vec(&[0.0, 0.0]));
        assert!(changed.contains(0, Cause::NotFinite) && !changed.contains(1, Cause::NotFinite));
        assert!(guard.position().is_finite());
        top = top.max(guard.velocity()[0]);
    }
    // The acceleration under way runs down at the jerk limit: a²/2J more.
    assert!(before > 0.5 && top < before + 8.0 * 8.0 / 320.0, "{before} {top}");
    assert!(guard.at_rest());
}

#[test]
fn a_far_step_arrives_without_overshoot_and_without_delay() {
    for period in [1u64, 5, 10] {
        let mut guard = guard(LIMIT, period);
        let (wish, still) = (vec(&[0.7, -0.7]), JointVec::zeros(2));
        // Time-optimal: 0.7 rad at 2 rad/s, and the times to reach that speed and full acceleration.
        let optimum = 0.7 / 2.0 + 2.0 / 8.0 + 8.0 / 160.0;
        let mut arrived = 0.0;
        for k in 1..=1500 / period {
            guard.filter(&wish, &still);
            assert!(guard.position()[0] <= 0.7 + 1e-9, "{}", guard.position()[0]);
            if arrived == 0.0 && guard.position()[0] > 0.7 - 1e-9 {
                arrived = (k * period) as f64 * 1e-3;
            }
        }
        assert_eq!(guard.position(), &wish, "bit for bit in the end");
        assert!(guard.at_rest());
        assert!(arrived <= optimum + 1e-3 * period as f64, "{arrived} s, optimum {optimum} s");
    }
}

#[test]
fn a_start_outside_the_range_comes_in_and_never_goes_further_out() {
    let mut guard = guard(LIMIT, 10);
    guard.rebase(&vec(&[1.2, 0.0]));
    let (wish, still) = (vec(&[3.0, 0.0]), JointVec::zeros(2));
    let mut last = 1.2;
    for _ in 0..200 {
        assert!(guard.filter(&wish, &still).contains(0, Cause::Position));
        assert!(guard.position()[0] <= last + 1e-12);
        last = guard.position()[0];
    }
    assert!((last - 1.0).abs() < 1e-9, "{last}");
}

#[test]
fn unsound_limits_are_refused() {
    for (what, bad) in [
        ("velocity", JointLimits { velocity: f64::NAN, ..LIMIT }),
        ("jerk", JointLimits { jerk: 0.0, ..LIMIT }),
    ] {
        let error = Guard::new(&[LIMIT, bad], Duration::from_millis(10)).expect_err("unsound");
        assert!(
            matches!(error, GuardError::Limit { joint: 1, what: w, .. } if w == what),
            "{error}"
        );
    }
    assert!(Guard::new(&[], Duration::from_millis(10)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_command_leaves_the_limits(
        wishes in prop::collection::vec(
            (prop_oneof![4 => -3.0..3.0f64, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY)], -4.0..4.0f64, 1..60u32),
            1..20,
        ),
        period in prop_oneof![Just(1u64), Just(5), Just(10), Just(40)],
        share in 0.01..20.0f64,
    ) {
        let limit = JointLimits { jerk: LIMIT.jerk * share, ..LIMIT };
        let mut guard = guard(limit, period);
        let mut watch = Watch::new(limit, &guard, period as f64 * 1e-3);
        for (k, (wish, feed, times)) in wishes.iter().enumerate() {
            for _ in 0..*times {
                if k % 7 == 6 { guard.brake(); } else {
                    guard.filter(&vec(&[*wish, 0.0]), &vec(&[*feed, 0.0]));
                }
                watch.look(guard.position()[0]).map_err(TestCaseError::fail)?;
            }
        }
    }

    #[test]
    fn a_constant_wish_is_reached_from_anywhere(
        before in prop::collection::vec((-1.5..1.5f64, 1..80u32), 0..6),
        goal in -1.0..=1.0f64,
        period in prop_oneof![Just(1u64), Just(5), Just(10)],
    ) {
        let mut guard = guard(QUICK, period);
        let still = JointVec::zeros(2);
        for (wish, times) in before {
            for _ in 0..times { guard.filter(&vec(&[wish, 0.0]), &still); }
        }
        let wish = vec(&[goal, 0.0]);
        // Overshoot is only what was under way: where the brakes alone would end.
        let (mut low, mut high) = (guard.position()[0].min(goal), guard.position()[0].max(goal));
        let mut braked = guard.clone();
        for _ in 0..3000 / period {
            braked.brake();
            (low, high) = (low.min(braked.position()[0]), high.max(braked.position()[0]));
        }
        for _ in 0..4000 / period {
            guard.filter(&wish, &still);
            let p = guard.position()[0];
            prop_assert!(p >= low - 1e-9 && p <= high + 1e-9, "{low} {p} {high}");
        }
        prop_assert_eq!(guard.position()[0], goal);
        prop_assert!(guard.at_rest());
    }
}

/// Sequences of the long test; `SINEW_GUARD_SEQUENCES` sets another number.
const SEQUENCES: u64 = 2_000;
/// Periods in each.
const LENGTH: u32 = 300;

/// One random sequence: kinds of wishes change every few periods.
fn sequence(seed: u64) -> Result<(), String> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let period = [1u64, 5, 10][rng.random_range(0..3)];
    let t = period as f64 * 1e-3;
    let limit = JointLimits { jerk: rng.random_range(20.0..2000.0), ..QUICK };
    let mut guard = guard(limit, period);
    guard.rebase(&vec(&[rng.random_range(limit.lower..=limit.upper), 0.0]));
    let mut watch = Watch::new(limit, &guard, t);
    let (mut p, mut v, mut left, mut kind) = (0.0f64, 0.0f64, 0, 0);
    for _ in 0..LENGTH {
        if left == 0 {
            kind = rng.random_range(0..9);
            left = rng.random_range(1..80);
            (p, v) = (rng.random_range(-2.5..2.5), rng.random_range(-4.0..4.0));
        }
        left -= 1;
        match kind {
            0 => (p, v) = (p, 0.0),                           // a step
            1 => p += v * t,                                  // a ramp
            2 => p += rng.random_range(-0.02..0.02),          // a random walk
            3 => (p, v) = (rng.random_range(-9.0..9.0), 1e9), // nonsense
            4 => (p, v) = (f64::NAN, 0.0),                    // not finite
            5 => (p, v) = (limit.upper.copysign(v), 0.1 * v), // a position limit
            6 => (p, v) = (guard.position()[0] + v * t, v),   // a velocity
            7 => p = guard.position()[0] + rng.random_range(-1e-3..1e-3),
            _ => {
                guard.brake();
                watch.look(guard.position()[0])?;
                continue;
            }
        }
        let before = *guard.filters[0].motion();
        let changed = guard.filter(&vec(&[p, 0.0]), &vec(&[v, 0.0]));
        let now = guard.position()[0];
        if changed.is_empty() != (now == p) {
            return Err(format!("wish {p}, command {now}, said {changed:?}; before {before:?}"));
        }
        watch.look(now).map_err(|e| format!("{e}, kind {kind}, wish {p} {v}, {before:?}"))?;
    }
    // Whatever came before, the brakes bring the joint to rest inside its limits.
    for _ in 0..6000 / period {
        guard.brake();
        watch.look(guard.position()[0])?;
    }
    if guard.at_rest() { Ok(()) } else { Err(format!("not at rest: {:?}", guard.velocity())) }
}

#[test]
fn random_sequences_never_leave_the_limits() {
    let set = std::env::var("SINEW_GUARD_SEQUENCES").ok().and_then(|n| n.parse().ok());
    for seed in 0..set.unwrap_or(SEQUENCES) {
        if let Err(what) = sequence(seed) {
            panic!("sequence {seed}: {what}");
        }
    }
}
