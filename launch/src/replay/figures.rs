//! What a command stream was like: seams, starvation, guard.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;
use sinew_runtime::arbiter::Authority;
use sinew_runtime::control::Cycle;
use sinew_runtime::guard::Cause;
use sinew_runtime::scheduler::Mode;
use sinew_runtime::{JointVec, MAX_JOINTS};

/// A seam is what the command does this long after a chunk has taken over.
const SEAM: Duration = Duration::from_millis(100);

/// Figures of one command stream while the policy had authority.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
    /// Control cycles.
    pub cycles: u64,
    /// Chunks that took over.
    pub chunks: u64,
    /// Chunks refused.
    pub refused: u64,
    /// Times that a chunk ran out before the next came.
    pub starvations: u64,
    /// Control cycles spent so.
    pub starved_cycles: u64,
    /// Cycles in which the guard changed a joint, `joint: cause`.
    pub interventions: BTreeMap<String, u64>,
    /// Largest acceleration of a joint's command within 100 ms after a chunk took over (rad/s²).
    pub seam_acceleration: f64,
    /// Largest jerk of a joint's command there (rad/s³).
    pub seam_jerk: f64,
    /// The same outside the seams (rad/s³).
    pub other_jerk: f64,
    #[serde(skip)]
    mode: Option<Mode>,
    #[serde(skip)]
    last: VecDeque<JointVec>,
    #[serde(skip)]
    seam_left: u32,
}

impl Figures {
    /// A chunk was given to the core.
    pub fn chunk(&mut self, accepted: bool, period: Duration) {
        if accepted {
            self.chunks += 1;
            self.seam_left = SEAM.div_duration_f64(period).ceil() as u32;
        } else {
            self.refused += 1;
        }
    }

    /// The core made `cycle`.
    pub fn cycle(&mut self, cycle: &Cycle, period: Duration, joints: &[String]) {
        let (Some(command), Authority::Policy) = (cycle.command, cycle.authority) else {
            (self.mode, self.seam_left) = (None, 0);
            self.last.clear();
            return;
        };
        self.cycles += 1;
        if cycle.mode == Mode::Starved {
            self.starved_cycles += 1;
            self.starvations += u64::from(self.mode != Some(Mode::Starved));
        }
        self.mode = Some(cycle.mode);
        for joint in 0..command.position.len().min(MAX_JOINTS) {
            for cause in Cause::ALL {
                if cycle.interventions.contains(joint, cause) {
                    let name = joints.get(joint).map_or("?", String::as_str);
                    *self.interventions.entry(format!("{name}: {}", cause.name())).or_default() +=
                        1;
                }
            }
        }
        self.last.push_front(command.velocity);
        self.last.truncate(3);
        let h = period.as_secs_f64();
        for joint in 0..command.velocity.len() {
            let v = |k: usize| self.last.get(k).map(|p| p[joint]);
            if let (true, Some(now), Some(before)) = (self.seam_left > 0, v(0), v(1)) {
                let acceleration = ((now - before) / h).abs();
                self.seam_acceleration = self.seam_acceleration.max(acceleration);
            }
            if let (Some(now), Some(before), Some(first)) = (v(0), v(1), v(2)) {
                let jerk = ((now - 2.0 * before + first) / (h * h)).abs();
                let most =
                    if self.seam_left > 0 { &mut self.seam_jerk } else { &mut self.other_jerk };
                *most = most.max(jerk);
            }
        }
        self.seam_left = self.seam_left.saturating_sub(1);
    }
}
