//! The guard in space, on an arm of five joints: distances are computed here anew, from positions alone.

use super::*;
use crate::kinematics::{Chain, ChainJoint, Pose, Sphere};
use nalgebra::{Isometry3, Point3, Translation3, Unit, UnitQuaternion, Vector3};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const LIMIT: JointLimits =
    JointLimits { lower: -1.75, upper: 1.75, velocity: 3.1, acceleration: 21.0, jerk: 470.0 };
const JOINTS: usize = 5;

/// Base turns about z; three joints lift forward; the hand rolls. Links of 15 cm.
fn arm(self_collision: bool) -> SpaceConfig {
    let turn = UnitQuaternion::from_axis_angle(&Vector3::y_axis(), std::f64::consts::FRAC_PI_2);
    let at = |z: f64, rotation| Isometry3::from_parts(Translation3::new(0.0, 0.0, z), rotation);
    let still = UnitQuaternion::identity();
    let origins =
        [at(0.0, still), at(0.12, still), at(0.15, turn), at(0.15, still), at(0.0, still)];
    let axes = [
        Vector3::z_axis(),
        Vector3::y_axis(),
        Vector3::y_axis(),
        Vector3::y_axis(),
        Vector3::z_axis(),
    ];
    let joints = origins.iter().zip(axes).enumerate();
    let joints = joints.map(|(index, (origin, axis))| ChainJoint { origin: *origin, axis, index });
    let ball = |name: &str, link, x: [f64; 3], radius| Sphere {
        name: name.to_owned(),
        link,
        centre: Point3::from(x),
        radius,
    };
    SpaceConfig {
        chain: Chain::new(joints.collect()).expect("five joints"),
        spheres: vec![
            ball("column", 0, [0.0, 0.0, 0.045], 0.04),
            ball("upper arm", 2, [0.0, 0.0, 0.08], 0.028),
            ball("elbow", 3, [0.0, 0.0, 0.0], 0.028),
            ball("wrist", 4, [0.0, 0.0, 0.0], 0.028),
            ball("palm", 5, [0.0, 0.0, 0.08], 0.045),
            ball("finger", 5, [0.0, 0.03, 0.138], 0.012),
            ball("tip", 5, [0.0, 0.0, 0.15], 0.0),
        ],
        planes: vec![
            plane("table", [0.0, 0.0, 1.0], 0.0),
            plane("wall", [0.0, -1.0, 0.0], -0.2),
            plane("ramp", [-1.0, 0.0, 0.5], -0.3),
        ],
        self_collision,
        rate: 10.0,
    }
}

fn plane(name: &str, normal: [f64; 3], offset: f64) -> Plane {
    let normal = Unit::new_normalize(Vector3::from(normal));
    Plane { name: name.to_owned(), normal, offset }
}

fn distance(config: &SpaceConfig, angles: &[f64]) -> f64 {
    let mut pose = Pose::default();
    config.chain.forward(angles, &mut pose);
    let mut least = f64::INFINITY;
    for a in &config.spheres {
        let centre = pose.centre(a);
        for plane in config.planes.iter().filter(|_| a.link > 0) {
            least = least.min(plane.normal.dot(&centre.coords) - plane.offset - a.radius);
        }
        for b in config.spheres.iter().filter(|b| config.self_collision && a.link + 1 < b.link) {
            least = least.min((pose.centre(b) - centre).norm() - a.radius - b.radius);
        }
    }
    least
}

fn guard(config: &SpaceConfig, period_ms: u64, start: &[f64; JOINTS]) -> Guard {
    let guard = Guard::new(&[LIMIT; JOINTS], Duration::from_millis(period_ms));
    let mut guard = guard.map(|g| g.with_space(config.clone()).expect("a sound space"));
    let guard = guard.as_mut().expect("sound limits");
    guard.rebase(&vec(start));
    guard.clone()
}

fn vec(values: &[f64; JOINTS]) -> JointVec {
    JointVec::from_slice(values).expect("five joints")
}

const HOME: [f64; JOINTS] = [0.0, -0.2, 0.5, 1.2, 0.0];

#[test]
fn far_from_everything_nothing_changes() {
    let config = arm(true);
    let (mut plain, mut guarded) = (
        Guard::new(&[LIMIT; JOINTS], Duration::from_millis(5)).expect("sound"),
        guard(&config, 5, &HOME),
    );
    plain.rebase(&vec(&HOME));
    for k in 0..400 {
        let f = f64::from(k) * 0.02;
        let wish = vec(&[0.4 * f.sin(), -0.2 + 0.1 * f.sin(), 0.5, 1.2 - 0.1 * f.sin(), f.sin()]);
        let still = JointVec::zeros(JOINTS);
        assert_eq!(plain.filter(&wish, &still), guarded.filter(&wish, &still));
        assert_eq!(plain.position(), guarded.position());
    }
}

#[test]
fn a_wish_below_the_table_slides_along_it() {
    let config = arm(true);
    for period in [1u64, 5, 10] {
        let mut guard = guard(&config, period, &HOME);
        let still = JointVec::zeros(JOINTS);
        // Lifted far forward and down, and panned to the side: the tip would be under the table.
        let wish = vec(&[0.6, 0.9, 0.9, 0.6, 0.3]);
        assert!(distance(&config, wish.as_slice()) < -0.02, "the wish is below");
        let mut workspace = 0;
        let mut least = f64::INFINITY;
        for _ in 0..4000 / period {
            let changed = guard.filter(&wish, &still);
            workspace += u64::from((0..JOINTS).any(|j| changed.contains(j, Cause::Workspace)));
            least = least.min(distance(&config, guard.position().as_slice()));
        }
        let end = distance(&config, guard.position().as_slice());
        assert!(workspace > 100 && least > -1e-6, "{workspace} {least}");
        assert!(end < 2e-3, "it comes as near as allowed: {end}");
        assert!(guard.position()[0] > 0.4, "and slides: {:?}", guard.position());
        let moving = guard.velocity().as_slice().iter().fold(0.0f64, |m, v| m.max(v.abs()));
        assert!(moving < 0.1, "without chattering: {:?}", guard.velocity());
        // Back up at once.
        for _ in 0..2000 / period {
            guard.filter(&vec(&HOME), &still);
        }
        assert_eq!(guard.position(), &vec(&HOME));
    }
}

#[test]
fn a_start_that_is_already_too_near_comes_out_and_never_goes_deeper() {
    let config = arm(true);
    let deep = [0.2, 0.9, 0.9, 0.45, 0.0];
    let mut last = distance(&config, &deep);
    assert!(last < -0.02, "{last}");
    let mut guard = guard(&config, 10, &deep);
    let still = JointVec::zeros(JOINTS);
    for _ in 0..100 {
        guard.filter(&vec(&[0.2, 1.3, 0.9, 0.45, 0.0]), &still);
        let now = distance(&config, guard.position().as_slice());
        assert!(now >= last - 1e-3, "deeper: {last} {now}");
    }
    for _ in 0..300 {
        guard.filter(&vec(&HOME), &still);
        let now = distance(&config, guard.position().as_slice());
        last = now;
    }
    assert_eq!(guard.position(), &vec(&HOME), "{last}");
}

#[test]
fn unsound_spaces_are_refused() {
    let make = |change: &dyn Fn(&mut SpaceConfig)| {
        let mut config = arm(true);
        change(&mut config);
        let guard = Guard::new(&[LIMIT; JOINTS], Duration::from_millis(5)).expect("sound");
        guard.with_space(config).expect_err("unsound").to_string()
    };
    assert!(make(&|c| c.spheres[2].link = 9).contains("`elbow` is on link 9"));
    assert!(make(&|c| c.spheres[2].radius = f64::NAN).contains("the radius of ball `elbow`"));
    assert!(make(&|c| c.rate = 0.0).contains("rate"));
    assert!(make(&|c| c.planes[0].offset = f64::INFINITY).contains("plane `table`"));
}

/// Sequences of the long test; `SINEW_GUARD_SPACE_SEQUENCES` sets another number.
const SEQUENCES: u64 = 150;
/// Periods in each.
const LENGTH: usize = 400;

/// One random sequence; gives the least distance and how many periods were changed for space.
fn sequence(seed: u64) -> Result<(f64, u64), String> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let period = [1u64, 5, 10][rng.random_range(0..3)];
    let t = period as f64 * 1e-3;
    let config = arm(rng.random_range(0..4) > 0);
    let start = loop {
        let start = std::array::from_fn(|_| rng.random_range(LIMIT.lower..LIMIT.upper));
        if distance(&config, &start) > 0.0 {
            break start;
        }
    };
    let mut guard = guard(&config, period, &start);
    let (mut p, mut v, mut a) = (start, [0.0; JOINTS], [0.0; JOINTS]);
    let mut wish = start;
    let (mut left, mut kind, mut least, mut changes) = (0, 0, f64::INFINITY, 0);
    for _ in 0..LENGTH {
        if left == 0 {
            (kind, left) = (rng.random_range(0..5), rng.random_range(5..150));
            wish = std::array::from_fn(|_| rng.random_range(-2.2..2.2));
        }
        left -= 1;
        let mut feed = [0.0; JOINTS];
        match kind {
            0 => {}
            1 => wish.iter_mut().for_each(|w| *w += rng.random_range(-0.03..0.03)),
            2 => {
                feed = std::array::from_fn(|j| wish[j]);
                wish = std::array::from_fn(|j| guard.position()[j] + feed[j] * t);
            }
            3 => wish[2] = f64::NAN,
            _ => guard.brake(),
        }
        if kind < 4 {
            let changed = guard.filter(&vec(&wish), &vec(&feed));
            let space = |j| {
                changed.contains(j, Cause::Workspace) || changed.contains(j, Cause::SelfCollision)
            };
            changes += u64::from((0..JOINTS).any(space));
        }
        if kind == 2 {
            wish = feed;
        } else if kind == 3 {
            wish[2] = 0.0;
        }
        for j in 0..JOINTS {
            let new_p = guard.position()[j];
            let new_v = (new_p - p[j]) / t;
            let new_a = (new_v - v[j]) / t;
            let jerk = (new_a - a[j]) / t;
            let inside = new_v.abs() <= LIMIT.velocity * (1.0 + 1e-6)
                && new_a.abs() <= LIMIT.acceleration * (1.0 + 1e-6)
                && jerk.abs() <= LIMIT.jerk * (1.0 + 1e-5) + 3e-15 / (t * t * t)
                && (LIMIT.lower - 1e-9..=LIMIT.upper + 1e-9).contains(&new_p);
            if !inside {
                return Err(format!("joint {j}: {new_p} {new_v} {new_a} {jerk}"));
            }
            (p[j], v[j], a[j]) = (new_p, new_v, new_a);
        }
        let now = distance(&config, &p);
        least = least.min(now);
        // Between the samples of a long brake path a ball can sag by a fraction of a millimetre.
        if now < -3e-4 {
            return Err(format!("distance {now}, kind {kind}, period {period}"));
        }
    }
    Ok((least, changes))
}

#[test]
fn random_sequences_stay_in_the_space_and_in_the_joint_limits() {
    let set = std::env::var("SINEW_GUARD_SPACE_SEQUENCES").ok().and_then(|n| n.parse().ok());
    let (mut least, mut changes, mut sequences) = (f64::INFINITY, 0, 0);
    for seed in 0..set.unwrap_or(SEQUENCES) {
        match sequence(seed) {
            Ok((near, changed)) => {
                (least, changes, sequences) = (least.min(near), changes + changed, sequences + 1);
            }
            Err(what) => panic!("sequence {seed}: {what}"),
        }
    }
    println!(
        "{sequences} sequences, {changes} periods changed for space, least distance {least:.6} m"
    );
    assert!(changes > 10 * sequences, "the barriers were met: {changes}");
}
