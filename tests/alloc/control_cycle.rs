//! The control cycle neither allocates nor frees: counted by this test's own global allocator.
//!
//! The only unsafe code here is the allocator's pass-through to the system's.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use sinew_drivers::sim::ArmDescription;
use sinew_runtime::arbiter::AuthorityRequest;
use sinew_runtime::control::{ControlConfig, ControlCore, ControlEvent};
use sinew_runtime::guard::{Cause, Guard};
use sinew_runtime::scheduler::SchedulerConfig;
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

#[test]
fn the_counter_counts() {
    let before = calls();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(calls() - before, 2);
}

#[test]
fn ten_seconds_of_control_cycles_do_not_allocate() {
    let limit =
        JointLimits { lower: -2.0, upper: 2.0, velocity: 3.0, acceleration: 40.0, jerk: 1000.0 };
    let config = ControlConfig {
        limits: vec![limit; JOINTS],
        period: PERIOD,
        state_timeout: Duration::from_millis(250),
        scheduler: SchedulerConfig::new(&[limit; JOINTS], PERIOD, 8),
    };
    let core = ControlCore::new(&config).expect("the limits are sound");
    let mut core =
        core.with_space(ArmDescription::desk_arm().space()).expect("the body fits its chain");
    // Everything that comes in from other threads is made beforehand.
    let mut chunks: Vec<ActionChunk> = (1..=40)
        .map(|request| {
            let mut values: Vec<f64> =
                (0..16 * JOINTS).map(|i| ((request * 31 + i as u64) % 17) as f64 * 0.05).collect();
            if request % 7 == 0 {
                values[3] = f64::NAN;
            }
            ActionChunk::new(request, Stamp(0), Duration::from_millis(100), JOINTS, values)
                .expect("seven values an action")
        })
        .rev()
        .collect();
    let mut kept = Vec::with_capacity(64);
    let mut commands = 0u64;
    let mut accepted = 0u64;

    let before = calls();
    let mut answer: Option<(u32, u64)> = None;
    for k in 0..10_000u32 {
        let now = Stamp(0) + PERIOD * k;
        if k % 10 == 0 {
            let position = JointVec::zeros(JOINTS);
            let state =
                JointState { stamp: now, sequence: u64::from(k) + 1, position, velocity: position };
            core.on_event(ControlEvent::State(state), now);
        }
        match k {
            5 => drop(core.on_event(ControlEvent::Authority(AuthorityRequest::Policy), now)),
            6_000 => drop(core.on_event(ControlEvent::Authority(AuthorityRequest::Hold), now)),
            6_500 => drop(core.on_event(ControlEvent::Authority(AuthorityRequest::Policy), now)),
            _ => {}
        }
        if let Some((due, request)) = answer
            && k >= due
            && let Some(mut chunk) = chunks.pop()
        {
            chunk.request = request;
            chunk.instant = now - Duration::from_millis(150);
            let effect = core.on_event(ControlEvent::Chunk(chunk), now);
            accepted += u64::from(effect.accepted);
            // As on the robot: a chunk that is done with goes to another place to be freed.
            if let Some(chunk) = effect.freed {
                kept.push(chunk);
            }
            answer = None;
        }
        let cycle = core.tick(now);
        commands += u64::from(cycle.command.is_some());
        if let Some(order) = cycle.order {
            answer = Some((k + 150, order.request));
        }
    }
    let during = calls() - before;
    assert!(commands > 9_990 && accepted >= 8, "{commands} commands, {accepted} chunks");
    assert!(kept.len() >= 8, "used and refused chunks are handed back: {}", kept.len());
    // The hold at cycle 6,000 hands its chunk back in an effect that this test drops: one chunk, one free.
    assert!(during <= 2, "{during} calls of the allocator in 10,000 control cycles");
}

#[test]
fn the_guard_does_not_allocate_whatever_it_has_to_change() {
    let arm = ArmDescription::desk_arm();
    let joints = arm.joints.len();
    let mut guard = Guard::new(&arm.limits(), PERIOD)
        .expect("the limits are sound")
        .with_space(arm.space())
        .expect("the body fits its chain");
    let mut met = [0u32; Cause::ALL.len()];
    let mut wish = JointVec::zeros(joints);
    let mut feed = JointVec::zeros(joints);
    let before = calls();
    for k in 0..60_000u32 {
        // Every joint wanders over more than its range at its own pace; now and then wishes jump or are none.
        for joint in 0..joints {
            let phase = f64::from(k) * 1e-3 * (0.9 + 0.37 * joint as f64);
            let jump = if k % 4_000 < 500 { 0.3 } else { 0.0 };
            wish[joint] = 2.4 * phase.sin() + jump;
            feed[joint] = if k % 3_000 < 1_500 { 0.0 } else { 2.4 * phase.cos() };
        }
        if k % 5_000 < 60 {
            wish[2] = f64::NAN;
        }
        if k % 7_000 < 200 {
            guard.brake();
            continue;
        }
        if k == 30_000 {
            guard.rebase(&JointVec::zeros(joints));
        }
        let changed = guard.filter(&wish, &feed);
        for (count, cause) in met.iter_mut().zip(Cause::ALL) {
            *count += u32::from((0..joints).any(|joint| changed.contains(joint, cause)));
        }
    }
    assert_eq!(calls() - before, 0);
    assert!(met.iter().all(|n| *n > 10), "every cause was met: {met:?} of {:?}", Cause::ALL);
}
