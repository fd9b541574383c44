//! The control cycle neither allocates nor frees, counted by this test's own global allocator, and makes no
//! system call, which the kernel itself watches.
//!
//! The unsafe code here: the allocator's pass-through to the system's, and three system calls.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sinew_drivers::sim::ArmDescription;
use sinew_runtime::arbiter::{Authority, AuthorityRequest, Claim, LeaseMode, Source};
use sinew_runtime::blackbox::{Header, Recorder};
use sinew_runtime::control::{
    ControlConfig, ControlCore, ControlEvent, OperatorRequest, ResidualConfig, ResidualSample,
    TeleopSample, TeleopTarget,
};
use sinew_runtime::scheduler::SchedulerConfig;
use sinew_runtime::scheduler::strategy::StrategyConfig;
use sinew_runtime::{ActionChunk, JointLimits, JointState, JointVec, Stamp};

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // A thread that is being torn down has no counter any more, and is none of ours.
    let _ = CALLS.try_with(|c| c.set(c.get() + 1));
}

// SAFETY: every call goes unchanged to `System`, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls() -> u64 {
    CALLS.with(Cell::get)
}

const PERIOD: Duration = Duration::from_millis(1);
const JOINTS: usize = 7;
/// Control periods of one run: four seconds.
const CYCLES: u32 = 4_000;

/// A core and everything that comes to it from other threads, made beforehand.
struct Run {
    core: ControlCore,
    chunks: Vec<ActionChunk>,
    kept: Vec<ActionChunk>,
}

/// What happened in a run.
#[derive(Debug, Default)]
struct Counts {
    commands: u64,
    accepted: u64,
    teleop: u64,
    corrected: u64,
}

impl Run {
    fn new(strategy: StrategyConfig) -> Self {
        let limit = JointLimits {
            lower: -2.0,
            upper: 2.0,
            velocity: 3.0,
            acceleration: 40.0,
            jerk: 1000.0,
        };
        let mut scheduler = SchedulerConfig::new(&[limit; JOINTS], PERIOD, 8);
        scheduler.strategy = strategy;
        let config = ControlConfig {
            limits: vec![limit; JOINTS],
            period: PERIOD,
            state_timeout: Duration::from_millis(250),
            scheduler,
        };
        let core = ControlCore::new(&config).expect("the limits are sound");
        let core =
            core.with_space(ArmDescription::desk_arm().space()).expect("the body fits its chain");
        let residual = ResidualConfig { limit: 0.1, timeout: Duration::from_millis(250) };
        let core = core.with_residual(residual, &[limit; JOINTS]);
        let chunk = |request: u64| {
            let mut values: Vec<f64> =
                (0..16 * JOINTS).map(|i| ((request * 31 + i as u64) % 17) as f64 * 0.05).collect();
            if request.is_multiple_of(7) {
                values[3] = f64::NAN;
            }
            ActionChunk::new(request, Stamp(0), Duration::from_millis(100), JOINTS, values)
                .expect("seven values an action")
        };
        Self { core, chunks: (1..=40).map(chunk).rev().collect(), kept: Vec::with_capacity(64) }
    }

    /// As on the robot: a chunk that is done with goes to another place to be freed.
    fn event(&mut self, event: ControlEvent, now: Stamp) -> bool {
        let effect = self.core.on_event(event, now);
        self.kept.extend(effect.freed);
        while let Some(chunk) = self.core.take_spent() {
            self.kept.push(chunk);
        }
        effect.accepted
    }

    fn play(&mut self) -> Counts {
        let mut counts = Counts::default();
        let mut answer: Option<(u32, u64)> = None;
        let someone = Source::literal("leader");
        for k in 0..CYCLES {
            let now = Stamp(0) + PERIOD * k;
            let position = JointVec::zeros(JOINTS);
            if k % 10 == 0 {
                let sequence = u64::from(k) + 1;
                let state = JointState { stamp: now, sequence, position, velocity: position };
                self.event(ControlEvent::State(state), now);
            }
            let asked = match k {
                5 => Some(AuthorityRequest::Policy),
                2_500 => Some(AuthorityRequest::Hold),
                2_700 => Some(AuthorityRequest::Policy),
                _ => None,
            };
            if let Some(request) = asked {
                self.event(ControlEvent::Authority(request), now);
            }
            if (3_000..3_400).contains(&k) {
                if k == 3_000 {
                    let (mode, duration) = (LeaseMode::Teleop, Duration::from_millis(200));
                    let request = AuthorityRequest::Take(Claim { mode, priority: 1, duration });
                    let taken = OperatorRequest { ticket: 1, by: someone, request };
                    self.event(ControlEvent::Operator(taken), now);
                }
                let target = TeleopTarget::Position(position);
                let sequence = u64::from(k);
                let (stamp, arrived) = (now, now);
                let sample = TeleopSample { source: someone, stamp, sequence, arrived, target };
                self.event(ControlEvent::Teleop(sample), now);
            }
            if let Some((due, request)) = answer
                && k >= due
                && let Some(mut chunk) = self.chunks.pop()
            {
                chunk.request = request;
                chunk.instant = now - Duration::from_millis(150);
                counts.accepted += u64::from(self.event(ControlEvent::Chunk(chunk), now));
                answer = None;
            }
            let cycle = self.core.tick(now);
            while let Some(chunk) = self.core.take_spent() {
                self.kept.push(chunk);
            }
            if let Some(input) = self.core.take_residual_input() {
                let (stamp, mut offset) = (input.stamp, input.planned);
                offset.as_mut_slice().iter_mut().for_each(|value| *value *= 0.1);
                let answer = ControlEvent::Residual(ResidualSample { stamp, offset });
                self.event(answer, now);
                counts.corrected += 1;
            }
            counts.commands += u64::from(cycle.command.is_some());
            counts.teleop += u64::from(cycle.authority == Authority::Teleop);
            if let Some(order) = cycle.order {
                std::hint::black_box(self.core.plan().copied());
                answer = Some((k + 150, order.request));
            }
        }
        counts
    }
}

#[test]
fn the_counter_counts() {
    let before = calls();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(calls() - before, 2);
}

#[test]
fn control_cycles_do_not_allocate_whatever_the_strategy() {
    for strategy in StrategyConfig::ALL {
        let mut run = Run::new(strategy);
        let before = calls();
        let counts = run.play();
        let during = calls() - before;
        let name = strategy.name();
        assert!(counts.commands > 3_990 && counts.accepted >= 3, "{name}: {counts:?}");
        assert!(counts.teleop > 300 && counts.corrected > 100, "{name}: {counts:?}");
        assert!(run.kept.len() >= 3, "{name}: used chunks are handed back: {}", run.kept.len());
        assert_eq!(during, 0, "{name}: calls of the allocator in {CYCLES} control cycles");
    }
}

/// Runs `body` on a thread that the kernel ends at its first system call (read, write and exit apart): true when
/// it came to its end.
fn without_system_calls(body: impl FnOnce() + Send + 'static) -> bool {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = ended.clone();
    std::thread::spawn(move || {
        // SAFETY: the call takes integers only, and binds this thread alone.
        let strict = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
        if strict == 0 {
            body();
            flag.store(true, Ordering::SeqCst);
        }
        // SAFETY: ends this thread without the clean-up that would need other system calls; what it owns leaks.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    // Far longer than the body takes; a thread that was ended never sets the flag.
    for _ in 0..200 {
        if ended.load(Ordering::SeqCst) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

#[test]
fn control_cycles_make_no_system_call() {
    // The test of the test: another system call does end the thread.
    let other = || {
        // SAFETY: getppid has no preconditions.
        std::hint::black_box(unsafe { libc::syscall(libc::SYS_getppid) });
    };
    assert!(!without_system_calls(other));
    for strategy in StrategyConfig::ALL {
        let mut run = Run::new(strategy);
        let name = strategy.name();
        let ended = without_system_calls(move || {
            std::hint::black_box(run.play());
            // Freeing is for another thread.
            std::mem::forget(run);
        });
        assert!(ended, "{name}: a control cycle made a system call");
    }
}

#[test]
fn recording_does_not_allocate_on_the_control_thread() {
    let limit =
        JointLimits { lower: -2.0, upper: 2.0, velocity: 3.0, acceleration: 40.0, jerk: 1000.0 };
    let config = ControlConfig {
        limits: vec![limit; JOINTS],
        period: PERIOD,
        state_timeout: Duration::from_millis(250),
        scheduler: SchedulerConfig::new(&[limit; JOINTS], PERIOD, 8),
    };
    let mut core = ControlCore::new(&config).expect("the limits are sound");
    let joints: Vec<String> = (0..JOINTS).map(|j| format!("joint{j}")).collect();
    let header = Header::new("test", &joints, &config);
    let sink = std::io::Cursor::new(Vec::new());
    let (recorder, mut tap) = Recorder::start(sink, &header).expect("memory takes it");
    let motion = |now| {
        let values = vec![0.1; 50 * JOINTS];
        let chunk = ActionChunk::new(0, now, Duration::from_millis(20), JOINTS, values);
        ControlEvent::Motion(chunk.expect("seven values an action"))
    };
    let mut during = 0;
    for k in 0..10_000u32 {
        let now = Stamp(0) + PERIOD * k;
        let position = JointVec::zeros(JOINTS);
        let state =
            JointState { stamp: now, sequence: u64::from(k) + 1, position, velocity: position };
        let events = [Some(ControlEvent::State(state)), (k % 500 == 9).then(|| motion(now))];
        for event in events.into_iter().flatten() {
            let before = calls();
            tap.event(&event, now);
            during += calls() - before;
            let effect = core.on_event(event, now);
            let before = calls();
            tap.effect(&effect);
            during += calls() - before;
        }
        let cycle = core.tick(now);
        while core.take_spent().is_some() {}
        let before = calls();
        tap.cycle(&cycle, now, now, 0);
        during += calls() - before;
        if k % 20 == 0 {
            // Much faster than real time: let the writer follow.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    drop(tap);
    let figures = recorder.finish();
    assert_eq!(during, 0, "calls of the allocator while recording");
    assert_eq!(figures.messages.get("blackbox/cycle"), Some(&10_000), "{figures:?}");
    assert_eq!(figures.messages.get("blackbox/chunk"), Some(&20), "{figures:?}");
}
