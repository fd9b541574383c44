//! How long a control cycle takes, without the clock, and what the guard's parts take of it.

use std::time::{Duration, Instant};

use nalgebra::{Isometry3, Point3, Unit, Vector3};
use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent};
use sinew_runtime::guard::{Guard, GuardError, Plane, SpaceConfig};
use sinew_runtime::kinematics::{Chain, ChainJoint, Sphere};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::telemetry::{Latencies, Quantiles};
use sinew_runtime::{ActionChunk, JointLimits, JointState, JointVec, Stamp};

const PERIOD: Duration = Duration::from_millis(1);
const LIMIT: JointLimits =
    JointLimits { lower: -2.0, upper: 2.0, velocity: 3.0, acceleration: 40.0, jerk: 1000.0 };

/// Times (µs) of one case.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct ControlCase {
    /// `cycle/…`: scheduler, arbiter and guard together; `guard/…`: the guard alone.
    pub case: &'static str,
    /// What is in it.
    pub what: &'static str,
    /// Its times (µs).
    pub times_us: Quantiles,
}

/// Times every case with an arm of `joints` joints, `cycles` periods of 1 ms each.
///
/// # Errors
/// [`GuardError::JointCount`] for a number of joints that no arm has.
pub fn profile(joints: usize, cycles: u32) -> Result<Vec<ControlCase>, GuardError> {
    let limits = vec![LIMIT; joints];
    let plain = || Guard::new(&limits, PERIOD);
    // The chain has as many joints as a guard takes, so the space is sound.
    #[allow(clippy::expect_used)]
    let spaced = || plain().map(|g| g.with_space(space(joints)).expect("a sound space"));
    let wave = |k: u32, size: f64, quick: f64| {
        let phase = f64::from(k) * quick;
        let wish =
            JointVec::from_slice(&vec![size * phase.sin(); joints]).unwrap_or(JointVec::zeros(0));
        let rate = size * quick * 1e3 * phase.cos();
        (wish, JointVec::from_slice(&vec![rate; joints]).unwrap_or(JointVec::zeros(0)))
    };
    let passing = |k: u32| wave(k, 0.2, 2e-3);
    let beyond = |k: u32| wave(k / 137, 2.5, 1.0);
    let deep = |k: u32| wave(k, 1.9, 1e-3);
    Ok(vec![
        ControlCase {
            case: "cycle/limits",
            what: "scheduler, arbiter, joint limits; chunks play and are replaced",
            times_us: cycle(joints, cycles, false)?,
        },
        ControlCase {
            case: "cycle/space",
            what: "the same with workspace and self-collision",
            times_us: cycle(joints, cycles, true)?,
        },
        ControlCase {
            case: "guard/passing",
            what: "joint limits, every wish passes",
            times_us: guard(plain()?, cycles, passing),
        },
        ControlCase {
            case: "guard/tracking",
            what: "joint limits, every wish is out of reach",
            times_us: guard(plain()?, cycles, beyond),
        },
        ControlCase {
            case: "guard/space",
            what: "with workspace and self-collision, away from them",
            times_us: guard(spaced()?, cycles, passing),
        },
        ControlCase {
            case: "guard/barrier",
            what: "with both, wishes through table, walls and arm",
            times_us: guard(spaced()?, cycles, deep),
        },
    ])
}

/// An arm of `joints` joints that turn and bend in turn, a ball on every link, a table and five walls.
fn space(joints: usize) -> SpaceConfig {
    let joint = |index: usize| ChainJoint {
        origin: Isometry3::translation(0.0, 0.0, if index == 0 { 0.0 } else { 0.12 }),
        axis: if index.is_multiple_of(2) { Vector3::z_axis() } else { Vector3::y_axis() },
        index,
    };
    let sphere = |link: usize| Sphere {
        name: format!("link {link}"),
        link,
        centre: Point3::new(0.0, 0.0, 0.06),
        radius: 0.045,
    };
    let plane = |normal: [f64; 3], offset| Plane {
        name: "side".to_owned(),
        normal: Unit::new_normalize(Vector3::from(normal)),
        offset,
    };
    // `profile` makes its guards first, and they refuse the numbers of joints that a chain refuses.
    #[allow(clippy::expect_used)]
    let chain =
        Chain::new((0..joints).map(joint).collect()).expect("as many joints as an arm may have");
    SpaceConfig {
        chain,
        spheres: (0..=joints).map(sphere).collect(),
        planes: vec![
            plane([0.0, 0.0, 1.0], 0.0),
            plane([1.0, 0.0, 0.0], -0.4),
            plane([-1.0, 0.0, 0.0], -0.4),
            plane([0.0, 1.0, 0.0], -0.4),
            plane([0.0, -1.0, 0.0], -0.4),
            plane([0.0, 0.0, -1.0], -0.95),
        ],
        self_collision: true,
        rate: SpaceConfig::RATE,
    }
}

fn guard(mut guard: Guard, cycles: u32, wishes: impl Fn(u32) -> (JointVec, JointVec)) -> Quantiles {
    let mut times = Latencies::default();
    for k in 0..cycles {
        let (wish, rate) = wishes(k);
        let start = Instant::now();
        let changed = guard.filter(&wish, &rate);
        times.record(start.elapsed());
        std::hint::black_box(changed);
    }
    times.quantiles()
}

fn cycle(joints: usize, cycles: u32, spaced: bool) -> Result<Quantiles, GuardError> {
    let dt = Duration::from_millis(100);
    let mut core = ControlCore::new(&ControlConfig {
        limits: vec![LIMIT; joints],
        period: PERIOD,
        state_timeout: Duration::from_secs(1),
        scheduler: SchedulerConfig::new(&vec![LIMIT; joints], PERIOD, 8),
    })?;
    if spaced {
        #[allow(clippy::expect_used)] // as above
        let with = core.with_space(space(joints)).expect("a sound space");
        core = with;
    }
    let mut times = Latencies::default();
    for k in 0..cycles {
        let now = Stamp(0) + PERIOD * k;
        let still = JointVec::zeros(joints);
        let state =
            JointState { stamp: now, sequence: u64::from(k) + 1, position: still, velocity: still };
        core.on_event(ControlEvent::State(state), now);
        if k == 1 {
            core.on_event(ControlEvent::Authority(AuthorityRequest::Policy), now);
        }
        let start = Instant::now();
        let cycle = core.tick(now);
        times.record(start.elapsed());
        if let Some(order) = cycle.order {
            let values = (0..16 * joints).map(|i| f64::from((k + i as u32) % 13) * 0.03).collect();
            if let Ok(chunk) = ActionChunk::new(order.request, now, dt, joints, values) {
                core.on_event(ControlEvent::Chunk(chunk), now);
            }
        }
    }
    Ok(times.quantiles())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cycle_is_timed_and_no_joints_is_an_error() {
        for joints in [1, 6] {
            let cases = profile(joints, 300).expect("an arm");
            assert!(cases.len() == 6 && cases.iter().all(|c| c.times_us.count == 300));
        }
        assert!(profile(0, 1).is_err() && profile(99, 1).is_err());
    }
}
