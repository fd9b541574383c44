//! How long a control cycle takes: scheduler, arbiter and guard together, without the clock.

use std::time::{Duration, Instant};

use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent};
use sinew_runtime::guard::GuardError;
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::telemetry::{Latencies, Quantiles};
use sinew_runtime::{ActionChunk, JointLimits, JointState, JointVec, Stamp};

/// Time of one control cycle (µs) while chunks play and are replaced.
///
/// # Errors
/// [`GuardError::JointCount`] for a number of joints that no arm has.
pub fn profile(joints: usize, cycles: u32) -> Result<Quantiles, GuardError> {
    let period = Duration::from_millis(1);
    let dt = Duration::from_millis(100);
    let limit =
        JointLimits { lower: -2.0, upper: 2.0, velocity: 3.0, acceleration: 40.0, jerk: 1000.0 };
    let mut core = ControlCore::new(&ControlConfig {
        limits: vec![limit; joints],
        period,
        state_timeout: Duration::from_secs(1),
        scheduler: SchedulerConfig::new(&vec![limit; joints], period, 8),
    })?;
    let mut times = Latencies::default();
    for k in 0..cycles {
        let now = Stamp(0) + period * k;
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
        assert_eq!(profile(6, 500).map(|q| q.count), Ok(500));
        assert!(profile(0, 1).is_err());
    }
}
