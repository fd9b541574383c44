//! Anytime inference: how many denoise steps fit into the time that is left, and when to stop.
//!
//! Pure. It learns the tail of what everything before denoising takes and of one denoise step, plans the
//! steps at the start, plans again when the prefix is done and the time really used is known, and ends an
//! inference early when the executing chunk is about to run out. Every choice carries its reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Stamp;
use crate::latency::LatencyWindow;
use crate::scheduler::starvation::StepLatency;

/// Limits of the planning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnytimeConfig {
    /// Never fewer denoise steps than this; with the wanted number nothing is ever cut.
    pub least_steps: usize,
    /// A chunk must be there so long before the executing one is played out.
    pub margin: Duration,
    /// Whether an inference whose caches are left out is asked for when there is time for it.
    pub exact_in_time: bool,
}

/// Why an inference had as many denoise steps as it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The wanted number: there was time, or nothing was played.
    Wanted,
    /// Fewer were planned at the start: no more fitted.
    PlannedFewer,
    /// Fewer were planned after the prefix, which took longer than usual.
    PrefixTookLong,
    /// Denoising was ended early: a step took longer than usual.
    StepTookLong,
}

impl Why {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Why::Wanted => "wanted",
            Why::PlannedFewer => "planned fewer",
            Why::PrefixTookLong => "prefix took long",
            Why::StepTookLong => "step took long",
        }
    }
}

/// What was decided for one inference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Denoise steps wanted.
    pub wanted: usize,
    /// Denoise steps done.
    pub done: usize,
    /// Why.
    pub why: Why,
    /// Time there was from the start; `None` without a deadline.
    pub budget: Option<Duration>,
    /// Time that the wanted inference was expected to take.
    pub expected: Duration,
}

/// What to do after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Go on.
    GoOn,
    /// Go on with this number of denoise steps.
    Steps(usize),
    /// End with the best chunk so far.
    Finish,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    decision: Decision,
    deadline: Option<Stamp>,
    planned: usize,
    began: Stamp,
    last: Stamp,
    denoising: bool,
}

/// The planner of one policy.
#[derive(Debug)]
pub struct Anytime {
    config: AnytimeConfig,
    fixed: LatencyWindow,
    step: LatencyWindow,
    /// Whole inferences without caches.
    exact: LatencyWindow,
    running: Option<Running>,
}

impl Anytime {
    /// A planner that has seen nothing.
    pub fn new(config: AnytimeConfig) -> Self {
        let window = LatencyWindow::new;
        Self { config, fixed: window(), step: window(), exact: window(), running: None }
    }

    /// The tail latency seen, for an inference of `steps`; `None` before the first one ended.
    pub fn latency(&self, steps: usize) -> Option<StepLatency> {
        Some(StepLatency { fixed: self.fixed.tail()?, step: self.step.tail()?, steps })
    }

    /// An inference with `wanted` denoise steps begins, to be ready by `deadline`: the steps to ask for.
    pub fn begin(&mut self, wanted: usize, deadline: Option<Stamp>, now: Stamp) -> usize {
        let deadline = deadline.map(|d| d - self.config.margin);
        let expected = self.latency(wanted).map_or(Duration::ZERO, |l| l.total(wanted));
        let fixed = self.fixed.tail().unwrap_or_default();
        let planned = self.fitting(wanted, deadline, now + fixed);
        let why = if planned < wanted { Why::PlannedFewer } else { Why::Wanted };
        let budget = deadline.map(|d| d.since(now));
        let decision = Decision { wanted, done: 0, why, budget, expected };
        let running =
            Running { decision, deadline, planned, began: now, last: now, denoising: false };
        self.running = Some(running);
        planned
    }

    /// Whether the inference that begins now is to be made without caches: when that is wanted, and nothing is played or
    /// the tail of what such inferences take ends before `deadline`. How long they take is learnt while nothing is played.
    pub fn exact(&self, deadline: Option<Stamp>, now: Stamp) -> bool {
        let in_time = match (deadline, self.exact.tail()) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(deadline), Some(tail)) => now + tail <= deadline - self.config.margin,
        };
        self.config.exact_in_time && in_time
    }

    /// An inference without caches took `time`.
    pub fn exact_took(&mut self, time: Duration) {
        self.exact.push(time);
    }

    /// How many of `most` denoise steps fit between `from` and `deadline`.
    fn fitting(&self, most: usize, deadline: Option<Stamp>, from: Stamp) -> usize {
        let (Some(deadline), Some(step)) = (deadline, self.step.tail()) else { return most };
        let fit = deadline.since(from).as_nanos() / step.as_nanos().max(1);
        let least = self.config.least_steps.clamp(1, most.max(1));
        usize::try_from(fit).unwrap_or(usize::MAX).clamp(least, most.max(least))
    }

    /// A step of `stage` ended at `now`; `denoised` says whether it was a denoise step.
    ///
    /// `next_denoises` is true when only denoise steps follow.
    pub fn on_step(&mut self, denoised: bool, next_denoises: bool, now: Stamp) -> Choice {
        let Some(mut running) = self.running else { return Choice::GoOn };
        let mut choice = Choice::GoOn;
        if denoised {
            self.step.push(now.since(running.last));
            running.decision.done += 1;
            let tail = self.step.tail().unwrap_or_default();
            let late = running.deadline.is_some_and(|d| now + tail > d);
            let may_end = running.decision.done >= self.config.least_steps.max(1);
            // A head may take more steps than were planned, such as to mend actions that break a limit.
            let more = next_denoises || running.decision.done < running.planned;
            if late && may_end && more {
                running.decision.why = Why::StepTookLong;
                choice = Choice::Finish;
            }
        } else if next_denoises && !running.denoising {
            running.denoising = true;
            self.fixed.push(now.since(running.began));
            let fitting = self.fitting(running.planned, running.deadline, now);
            if fitting < running.planned {
                running.planned = fitting;
                running.decision.why = Why::PrefixTookLong;
                choice = Choice::Steps(fitting);
            }
        }
        running.last = now;
        self.running = Some(running);
        choice
    }

    /// The inference ended: what was decided. `None` when none was running.
    pub fn end(&mut self) -> Option<Decision> {
        self.running.take().map(|r| r.decision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AnytimeConfig =
        AnytimeConfig { least_steps: 3, margin: Duration::from_millis(10), exact_in_time: true };

    fn at(ms: i64) -> Stamp {
        Stamp(ms * 1_000_000)
    }

    /// One inference: the prefix takes `fixed` ms, every denoise step `step` ms.
    fn infer(
        anytime: &mut Anytime,
        from: i64,
        deadline: Option<i64>,
        fixed: i64,
        step: i64,
    ) -> Decision {
        let mut now = from;
        let mut planned = anytime.begin(10, deadline.map(at), at(now));
        now += fixed;
        if let Choice::Steps(n) = anytime.on_step(false, true, at(now)) {
            planned = n;
        }
        for k in 0..planned {
            now += step;
            let choice = anytime.on_step(true, k + 1 < planned, at(now));
            if choice == Choice::Finish {
                break;
            }
        }
        anytime.end().expect("it was running")
    }

    #[test]
    fn what_is_not_known_yet_is_not_cut() {
        let mut anytime = Anytime::new(CONFIG);
        let first = infer(&mut anytime, 0, Some(50), 20, 5);
        assert_eq!((first.wanted, first.why), (10, Why::StepTookLong), "only time itself cuts");
        assert!(first.done >= 3);
    }

    #[test]
    fn steps_are_planned_on_the_tail_and_cut_for_a_reason() {
        let mut anytime = Anytime::new(CONFIG);
        for k in 0..5 {
            let seen = infer(&mut anytime, k * 1000, None, 20, 5);
            assert_eq!((seen.done, seen.why), (10, Why::Wanted));
        }
        assert_eq!(anytime.latency(10).map(|l| l.total(10)), Some(Duration::from_millis(70)));
        let roomy = infer(&mut anytime, 6000, Some(6100), 20, 5);
        assert_eq!((roomy.done, roomy.why), (10, Why::Wanted));
        // 60 ms less the margin: 50 - 20 leaves six steps of 5 ms.
        let tight = infer(&mut anytime, 7000, Some(7060), 20, 5);
        assert_eq!((tight.done, tight.why), (6, Why::PlannedFewer));
        // The prefix takes 25 ms longer: 95 - 10 - 45 = 40 ms are left.
        let slow = infer(&mut anytime, 8000, Some(8095), 45, 5);
        assert_eq!((slow.done, slow.why), (8, Why::PrefixTookLong));
        let least = infer(&mut anytime, 9000, Some(9005), 20, 5);
        assert_eq!(least.done, 3, "never fewer than the least");
    }

    #[test]
    fn caches_are_left_out_when_there_is_time_to() {
        let mut anytime = Anytime::new(CONFIG);
        assert!(anytime.exact(None, at(0)), "nothing is played");
        assert!(!anytime.exact(Some(at(9000)), at(0)), "it is not known how long it takes");
        anytime.exact_took(Duration::from_millis(70));
        assert!(anytime.exact(Some(at(80)), at(0)));
        assert!(!anytime.exact(Some(at(79)), at(0)), "the margin is kept");
        let always = AnytimeConfig { exact_in_time: false, ..CONFIG };
        assert!(!Anytime::new(always).exact(None, at(0)));
    }

    #[test]
    fn a_slow_step_ends_denoising_early() {
        let mut anytime = Anytime::new(CONFIG);
        infer(&mut anytime, 0, None, 20, 5);
        let slow = infer(&mut anytime, 1000, Some(1090), 20, 12);
        assert_eq!(slow.why, Why::StepTookLong);
        assert!((3..10).contains(&slow.done), "{}", slow.done);
    }

    #[test]
    fn steps_beyond_the_plan_end_when_time_is_up() {
        let mut anytime = Anytime::new(CONFIG);
        infer(&mut anytime, 0, None, 20, 5);
        anytime.begin(10, Some(at(1100)), at(1000));
        anytime.on_step(false, true, at(1020));
        for k in 1..=10 {
            assert_eq!(anytime.on_step(true, true, at(1020 + 5 * k)), Choice::GoOn, "{k} of 10");
        }
        // 1090 ms less the next step's 5 ms is where the eleventh to fourteenth end; the margin is kept.
        let extra =
            (11..20).find(|k| anytime.on_step(true, true, at(1020 + 5 * k)) == Choice::Finish);
        assert_eq!(extra, Some(14));
        assert_eq!(anytime.end().map(|d| (d.done, d.why)), Some((14, Why::StepTookLong)));
    }
}
