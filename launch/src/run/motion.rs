//! Motions of the runtime's own: smooth joint-space moves, fed through scheduler and guard like a chunk.

use std::time::Duration;

use sinew_runtime::{ActionChunk, JointLimits, Stamp};

/// Time between two targets of a motion.
const DT: Duration = Duration::from_millis(50);
/// A motion uses this share of each joint's speed limit.
const SPEED_SHARE: f64 = 0.5;
/// Peak speed of the quintic, in mean speeds.
const PEAK: f64 = 1.875;
/// Shortest motion.
const SHORTEST: Duration = Duration::from_millis(300);

/// A rest-to-rest motion from `from` to `to` (rad) along a quintic (minimum jerk), beginning at `now`.
pub(super) fn plan(from: &[f64], to: &[f64], limits: &[JointLimits], now: Stamp) -> ActionChunk {
    let seconds = from
        .iter()
        .zip(to)
        .zip(limits)
        .map(|((a, b), l)| PEAK * (b - a).abs() / (SPEED_SHARE * l.velocity))
        .fold(SHORTEST.as_secs_f64(), f64::max);
    let steps = (seconds / DT.as_secs_f64()).ceil() as usize;
    let mut values = Vec::with_capacity(steps * from.len());
    for k in 1..=steps {
        let f = k as f64 / steps as f64;
        let s = f * f * f * (10.0 - 15.0 * f + 6.0 * f * f);
        values.extend(from.iter().zip(to).map(|(a, b)| a + (b - a) * s));
    }
    // `steps` is at least 6 and every row has one value per joint.
    #[allow(clippy::expect_used)]
    ActionChunk::new(0, now, DT, from.len(), values).expect("whole rows, at least one")
}

/// How long `chunk` takes.
pub(super) fn length(chunk: &ActionChunk) -> Duration {
    chunk.dt * chunk.horizon() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_motion_ends_at_its_goal_within_its_share_of_the_speed_limit() {
        let limit = JointLimits {
            lower: -2.0,
            upper: 2.0,
            velocity: 2.0,
            acceleration: 20.0,
            jerk: 1000.0,
        };
        let chunk = plan(&[0.0, 0.5], &[1.0, 0.5], &[limit; 2], Stamp(0));
        let last = chunk.action(chunk.horizon() - 1).expect("there is one");
        assert!((last[0] - 1.0).abs() < 1e-12 && last[1] == 0.5);
        let mut before = 0.0;
        for k in 0..chunk.horizon() {
            let now = chunk.action(k).expect("within the horizon")[0];
            assert!((now - before) / 0.05 <= 2.0 * SPEED_SHARE + 1e-9);
            before = now;
        }
    }
}
