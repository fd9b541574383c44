use super::*;
use crate::guard::Cause;
use crate::scheduler::SchedulerConfig;

pub(super) const PERIOD: Duration = Duration::from_millis(10);

pub(super) fn core() -> ControlCore {
    let limit =
        JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 20.0, jerk: 1000.0 };
    let scheduler = SchedulerConfig::new(&[limit], PERIOD, 8);
    let config = ControlConfig {
        limits: vec![limit],
        period: PERIOD,
        state_timeout: Duration::from_millis(250),
        scheduler,
    };
    ControlCore::new(&config).expect("the limits are sound")
}

pub(super) fn state(stamp: Stamp, position: f64) -> ControlEvent {
    let position = JointVec::from_slice(&[position]).expect("one joint");
    ControlEvent::State(JointState { stamp, sequence: 1, position, velocity: JointVec::zeros(1) })
}

pub(super) fn chunk(request: u64, instant: Stamp, values: Vec<f64>) -> ActionChunk {
    ActionChunk::new(request, instant, Duration::from_millis(100), 1, values).expect("one joint")
}

pub(super) fn ask(core: &mut ControlCore, request: AuthorityRequest, now: Stamp) {
    core.on_event(ControlEvent::Authority(request), now);
}

#[test]
fn no_command_before_the_arm_was_seen() {
    let mut core = core();
    assert!(core.tick(Stamp(0)).command.is_none());
    core.on_event(state(Stamp(0), 0.4), Stamp(0));
    let command = core.tick(Stamp(0)).command.expect("the arm was seen");
    assert_eq!(command.position[0], 0.4, "the first command is where the arm is");
}

#[test]
fn an_arm_that_was_silent_is_held_where_it_stands_then() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    // The whole process was stopped: no cycle ran in the silence.
    let late = Stamp(0) + Duration::from_secs(1);
    let change = core.on_event(state(late, 0.3), late).change.expect("authority is lost");
    assert_eq!(change.to, Authority::Hold);
    let cycle = core.tick(late);
    assert_eq!(cycle.authority, Authority::Hold);
    assert_eq!(cycle.command.expect("seen").position[0], 0.3);
}

#[test]
fn where_no_cycle_ran_no_command_goes_out_until_the_arm_is_seen_again() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    let order = core.tick(Stamp(0)).order.expect("the first chunk is asked for");
    core.on_event(ControlEvent::Chunk(chunk(order.request, Stamp(0), vec![0.5; 16])), Stamp(0));
    let mut now = Stamp(0);
    let mut last = 0.0;
    for k in 1..=10u32 {
        now = Stamp(0) + PERIOD * k;
        core.on_event(state(now, last), now);
        last = core.tick(now).command.expect("seen").position[0];
    }
    assert!(core.guard.velocity()[0] > 0.0, "it was under way");
    // The process was stopped; its arm went on telling where it is, and what it told lies there now.
    let back = now + Duration::from_secs(1);
    for late in [0.2, 0.4, 0.6, 0.8, 0.99] {
        core.on_event(state(now + Duration::from_secs_f64(late), 0.1), back);
    }
    let cycle = core.tick(back);
    assert_eq!((cycle.command, cycle.authority), (None, Authority::Hold));
    let change = cycle.change.expect("authority is lost");
    assert_eq!(change.reason, crate::arbiter::Reason::StateStale);
    // Nobody gets it before the arm is seen.
    ask(&mut core, AuthorityRequest::Policy, back + PERIOD);
    let cycle = core.tick(back + PERIOD);
    assert_eq!((cycle.command, cycle.authority), (None, Authority::Hold));
    core.on_event(state(back + PERIOD, 0.12), back + PERIOD * 2);
    for k in 2..10 {
        let command = core.tick(back + PERIOD * k).command.expect("it was seen");
        assert_eq!((command.position[0], command.velocity[0]), (0.12, 0.0));
    }
}

#[test]
fn a_lapse_ends_authority_although_the_arm_is_seen_before_the_next_cycle() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    let back = Stamp(0) + Duration::from_secs(1);
    for part in 1..=5u32 {
        core.on_event(state(Stamp(0) + Duration::from_millis(200) * part, 0.3), back);
    }
    let cycle = core.tick(back);
    assert_eq!((cycle.authority, cycle.command.expect("seen").position[0]), (Authority::Hold, 0.3));
}

#[test]
fn an_arm_that_moves_before_the_first_cycle_is_held_where_it_is() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.on_event(state(Stamp(0) + PERIOD, 0.2), Stamp(0) + PERIOD);
    let command = core.tick(Stamp(0) + PERIOD).command.expect("seen");
    assert_eq!(command.position[0], 0.2);
}

#[test]
fn losing_the_state_brakes_the_arm_and_takes_authority_away() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    let order = core.tick(Stamp(0)).order.expect("the first chunk is asked for");
    core.on_event(ControlEvent::Chunk(chunk(order.request, Stamp(0), vec![0.1; 16])), Stamp(0));
    let mut last = 0.0;
    for k in 1..60u32 {
        let now = Stamp(0) + PERIOD * k;
        let cycle = core.tick(now);
        let p = cycle.command.expect("seen").position[0];
        if k < 25 {
            assert_eq!(cycle.authority, Authority::Policy);
        } else if k > 26 {
            assert_eq!(cycle.authority, Authority::Hold);
        }
        assert!(p >= last - 1e-12);
        last = p;
    }
}

#[test]
fn a_nan_chunk_never_reaches_the_guard() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    let order = core.tick(Stamp(0)).order.expect("asked");
    let effect = core.on_event(
        ControlEvent::Chunk(chunk(order.request, Stamp(0), vec![0.1, f64::NAN])),
        Stamp(0),
    );
    assert_eq!(effect.refused, Some(Refusal::NotFinite));
    let cycle = core.tick(Stamp(0) + PERIOD);
    assert!(!cycle.interventions.contains(0, Cause::NotFinite));
    assert_eq!(cycle.command.expect("seen").position[0], 0.0);
    assert!(cycle.order.is_some(), "another chunk is asked for");
}

#[test]
fn a_motion_within_the_limits_passes_the_guard_unchanged() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.2), Stamp(0));
    core.tick(Stamp(0));
    // A quintic, as homing uses it: 0.5 rad in 1 s.
    let at = |f: f64| 0.2 + 0.5 * f * f * f * (10.0 - 15.0 * f + 6.0 * f * f);
    let values = (1..=10).map(|k| at(f64::from(k) / 10.0)).collect();
    let effect = core.on_event(ControlEvent::Motion(chunk(0, Stamp(0), values)), Stamp(0));
    assert!(effect.accepted);
    for k in 1..=120u32 {
        let now = Stamp(0) + PERIOD * k;
        core.on_event(state(now, 0.2), now);
        let cycle = core.tick(now);
        let found = cycle.interventions;
        assert_eq!(found, Interventions::default(), "cycle {k}");
    }
    let end = core.guard.position()[0];
    assert!((end - 0.7).abs() < 1e-9, "{end}");
}

#[test]
fn stop_beats_a_playing_chunk_and_stays() {
    let mut core = core();
    core.on_event(state(Stamp(0), 0.0), Stamp(0));
    core.tick(Stamp(0));
    let motion = chunk(0, Stamp(0), vec![0.3; 10]);
    assert!(core.on_event(ControlEvent::Motion(motion), Stamp(0)).accepted);
    for k in 1..5 {
        core.tick(Stamp(0) + PERIOD * k);
    }
    ask(&mut core, AuthorityRequest::Stop, Stamp(0));
    ask(&mut core, AuthorityRequest::Policy, Stamp(0));
    assert_eq!(core.authority(), Authority::Stop);
    let motion = chunk(0, Stamp(0), vec![0.3; 10]);
    let effect = core.on_event(ControlEvent::Motion(motion), Stamp(0));
    assert_eq!(effect.refused, Some(Refusal::NotAsked));
}
