//! The brake law: from any velocity and acceleration to rest, as fast as the jerk limit allows, in discrete time.
//!
//! Units are normalised by the jerk limit `J` (rad/s³) and the control period `T` (s): accelerations in `J·T`,
//! velocities in `J·T²`, positions in `J·T³`. One period then is
//! `a' = a + j` with `|j| <= 1`, `v' = v + a'`, `p' = p + v'`: the finite differences of the command stream.
//!
//! [`run_down`] is the speed that an acceleration still takes away while it returns to zero in steps of one;
//! it is piecewise linear, so its inverse is exact and the law lands on `v = a = 0` without a residue. The whole
//! path is a ramp at full jerk, a plateau at the acceleration limit and a landing ramp, each with closed
//! sums: where the path ends and how far and fast it goes costs a few square roots, however long it takes.

/// Speed change while an acceleration of size `x` is taken back in steps of one: `x + (x-1) + (x-2) + …`.
pub(super) fn run_down(x: f64) -> f64 {
    let n = x.floor();
    (n + 1.0) * (x - 0.5 * n)
}

/// The acceleration whose [`run_down`] is `speed` (at least zero).
pub(super) fn run_down_inverse(speed: f64) -> f64 {
    let n = ((0.5 * ((1.0 + 8.0 * speed).sqrt() - 1.0)).floor()).max(0.0);
    speed / (n + 1.0) + 0.5 * n
}

/// Accelerations that are allowed: from `-down` to `up`, both above zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bounds {
    pub down: f64,
    pub up: f64,
}

/// The acceleration from which `v` and the acceleration reach zero together, within `bounds`.
fn landing(v: f64, bounds: Bounds) -> f64 {
    if v >= 0.0 {
        -run_down_inverse(v).min(bounds.down)
    } else {
        run_down_inverse(-v).min(bounds.up)
    }
}

/// The brake law: the next acceleration at velocity `v` and acceleration `a`.
pub(super) fn brake_acceleration(v: f64, a: f64, bounds: Bounds) -> f64 {
    landing(v, bounds).clamp(a - 1.0, a + 1.0)
}

/// The path that the brake law takes, relative to where it begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct BrakePath {
    /// Everything below is mirrored by this sign, so that the ramp goes down.
    sign: f64,
    v: f64,
    a: f64,
    /// Periods at full jerk.
    ramp: f64,
    /// Periods at the acceleration limit, and that limit.
    plateau: f64,
    limit: f64,
    /// Position and velocity after ramp and plateau.
    p_ramp: f64,
    v_ramp: f64,
    p_plateau: f64,
    v_plateau: f64,
    /// Acceleration of the first landing period, and the whole steps in it.
    x: f64,
    steps: f64,
}

impl BrakePath {
    /// The path from velocity `v` and acceleration `a`, which is within `bounds`.
    pub(super) fn new(v: f64, a: f64, bounds: Bounds) -> Self {
        let aim = landing(v, bounds);
        let up = if v >= 0.0 { a >= aim } else { a > aim };
        let (sign, v, a, limit) =
            if up { (1.0, v, a, bounds.down) } else { (-1.0, -v, -a, bounds.up) };
        let ramp = ramp_periods(v, a, limit);
        let (p_ramp, v_ramp) = ramp_at(v, a, ramp);
        let enough = run_down(limit);
        let plateau =
            if v_ramp >= enough { ((v_ramp - enough) / limit).floor() + 1.0 } else { 0.0 };
        let p_plateau = p_ramp + plateau * v_ramp - 0.5 * limit * plateau * (plateau + 1.0);
        let v_plateau = v_ramp - plateau * limit;
        let x = run_down_inverse(v_plateau.abs());
        let steps = x.floor();
        Self { sign, v, a, ramp, plateau, limit, p_ramp, v_ramp, p_plateau, v_plateau, x, steps }
    }

    /// Periods until the velocity is zero.
    pub(super) fn periods(&self) -> f64 {
        self.ramp + self.plateau + self.x.ceil()
    }

    /// Where it ends.
    pub(super) fn end(&self) -> f64 {
        self.sign * (self.p_plateau + self.landed(self.steps))
    }

    /// Where it is after `period` whole periods.
    pub(super) fn at(&self, period: f64) -> f64 {
        let on_plateau = period - self.ramp;
        let landing = on_plateau - self.plateau;
        let p = if on_plateau <= 0.0 {
            ramp_at(self.v, self.a, period).0
        } else if landing <= 0.0 {
            self.p_ramp + on_plateau * self.v_ramp
                - 0.5 * self.limit * on_plateau * (on_plateau + 1.0)
        } else {
            self.p_plateau + self.landed(landing.min(self.steps))
        };
        self.sign * p
    }

    /// Lowest and highest position on the way, the beginning (zero) included.
    pub(super) fn reach(&self) -> (f64, f64) {
        let end = self.p_plateau + self.landed(self.steps);
        // A path that begins backwards and ramps up turns round once.
        let turn = if self.v < 0.0 && self.ramp > 0.0 {
            let b = 2.0 * self.a - 1.0;
            let root = 0.5 * (b - (b * b + 8.0 * self.v).max(0.0).sqrt());
            ramp_at(self.v, self.a, root.floor().clamp(0.0, self.ramp)).0
        } else {
            0.0
        };
        let (low, high) = (end.min(turn).min(0.0), end.max(0.0));
        if self.sign > 0.0 { (low, high) } else { (-high, -low) }
    }

    /// Lowest and highest velocity on the way, the beginning included.
    pub(super) fn speeds(&self) -> (f64, f64) {
        let top = self.a.floor().clamp(0.0, self.ramp);
        let high = ramp_at(self.v, self.a, top).1.max(self.v).max(0.0);
        let low = self.v.min(0.0);
        if self.sign > 0.0 { (low, high) } else { (-high, -low) }
    }

    /// Way of the first `m` (at most `steps`) landing periods.
    fn landed(&self, m: f64) -> f64 {
        let (x, n) = (self.x, self.steps);
        let full = 0.5 * x * m * (m + 1.0) - m * (m + 1.0) * (2.0 * m + 1.0) / 6.0;
        let rest = m * ((n - m) * x - 0.5 * (n * (n + 1.0) - m * (m + 1.0)));
        (full + rest).copysign(self.v_plateau)
    }
}

/// Position and velocity after `k` periods in which the acceleration falls by one each.
fn ramp_at(v: f64, a: f64, k: f64) -> (f64, f64) {
    let p = k * v + 0.5 * a * k * (k + 1.0) - k * (k + 1.0) * (k + 2.0) / 6.0;
    (p, v + k * a - 0.5 * k * (k + 1.0))
}

/// Periods of the ramp down from `a`, until the landing curve or `-limit` is less than one step away.
fn ramp_periods(v: f64, a: f64, limit: f64) -> f64 {
    if v < 0.0 && run_down((a - 1.0).max(0.0)) < -v {
        return 0.0; // one step meets the landing curve from above
    }
    let until_limit = (a + limit).floor().max(0.0);
    let least = a.floor().max(0.0).min(until_limit);
    // A full step is taken while the speed left is at least what its acceleration takes away.
    let full = |i: f64| ramp_at(v, a, i).1 >= run_down((i + 1.0 - a).max(0.0));
    let guess = (v + 0.5 * (a * a - a)).max(0.0).sqrt() + a;
    let mut k = guess.floor().clamp(least, until_limit);
    // The guess is the smooth curve's, off by one or two periods at most.
    for _ in 0..4 {
        if k < until_limit && full(k) {
            k += 1.0;
        } else if k > least && !full(k - 1.0) {
            k -= 1.0;
        } else {
            break;
        }
    }
    k
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn run_down_and_its_inverse_agree() {
        assert_eq!((run_down(0.4), run_down(1.0), run_down(2.5)), (0.4, 1.0, 4.5));
        for k in 0..4000 {
            let x = f64::from(k) * 0.013;
            assert!((run_down_inverse(run_down(x)) - x).abs() < 1e-9, "{x}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn the_closed_sums_are_those_of_the_law_run_period_by_period(
            v in prop_oneof![-3000.0..3000.0f64, -9.0..9.0f64, Just(0.0)],
            share in -1.0..=1.0f64,
            down in prop_oneof![0.2..6.0f64, 0.2..90.0f64],
            up in prop_oneof![0.2..6.0f64, 0.2..90.0f64],
        ) {
            let bounds = Bounds { down, up };
            let a = if share > 0.0 { share * up } else { share * down };
            let path = BrakePath::new(v, a, bounds);
            let (mut p, mut vel, mut acc) = (0.0f64, v, a);
            let (mut low, mut high, mut slow, mut fast) = (0.0f64, 0.0f64, v.min(0.0), v.max(0.0));
            let top = v.abs() + a * a;
            let scale = 1.0 + top * (top / down.min(up) + down + up);
            let mut periods = 0.0;
            while vel.abs() > 1e-9 || acc.abs() > 1e-9 {
                let next = brake_acceleration(vel, acc, bounds);
                prop_assert!((next - acc).abs() <= 1.0 + 1e-9 && next <= up + 1e-9 && next >= -down - 1e-9);
                acc = next;
                vel += acc;
                p += vel;
                periods += 1.0;
                (low, high) = (low.min(p), high.max(p));
                (slow, fast) = (slow.min(vel), fast.max(vel));
                prop_assert!((path.at(periods) - p).abs() < 1e-9 * scale, "at {periods}: {} {p} {path:?}", path.at(periods));
                prop_assert!(periods < 1e5);
            }
            prop_assert!((path.end() - p).abs() < 1e-9 * scale, "{} {p} {path:?}", path.end());
            let (l, h) = path.reach();
            prop_assert!((l - low).abs() < 1e-9 * scale && (h - high).abs() < 1e-9 * scale, "{l} {low} {h} {high} {path:?}");
            let (s, f) = path.speeds();
            prop_assert!((s - slow).abs() < 1e-6 && (f - fast).abs() < 1e-6, "{s} {slow} {f} {fast} {path:?}");
            prop_assert!(path.periods() <= periods + 1.0 && path.periods() >= periods - 2.0);
        }
    }
}
