//! Authority on a real bus: a robot on loopback with sessions and threads of its own, stopped, reset and taken over
//! by others who only know where the runtime is.

use std::time::{Duration, Instant};

use sinew_benches::authority::{Rig, RigConfig};
use sinew_drivers::peer::StopCategory;
use sinew_runtime::arbiter::{Authority, AuthorityRequest, LeaseMode, Operators, Reason, Source};
use sinew_runtime::operator::{self, Confirmation, TeleopDevice};
use sinew_runtime::transport::{AuthorityAsk, AuthorityStatus, Bus, Endpoint, Priority};
use sinew_runtime::{Clock, JointVec};

const PATIENCE: Duration = Duration::from_secs(10);
const ANNA: Source = Source::literal("anna");

fn rig(config: RigConfig) -> Rig {
    Rig::start(config).expect("loopback has room for a robot")
}

fn ask(bus: &Bus, rig: &Rig, request: AuthorityAsk) -> Result<AuthorityStatus, String> {
    operator::ask(bus, &rig.keys, ANNA, request, PATIENCE).map_err(|e| e.to_string())
}

fn status(bus: &Bus, rig: &Rig) -> AuthorityStatus {
    ask(bus, rig, AuthorityAsk::Status).expect("the runtime answers")
}

fn stop(bus: &Bus, rig: &Rig) -> Confirmation {
    operator::stop(bus, &rig.keys, ANNA, &[], PATIENCE).expect("the bus can be asked")
}

fn names(found: &Confirmation) -> Vec<&str> {
    let mut names: Vec<_> = found.parts.iter().map(|p| p.ack.part.as_str()).collect();
    names.sort_unstable();
    names
}

fn until(rig: &Rig, what: &'static str, done: impl FnMut(&Rig) -> bool) {
    rig.wait_for(what, done).expect("it happens");
}

fn pose(value: f64) -> JointVec {
    JointVec::from_slice(&[value]).expect("one joint")
}

#[test]
fn a_stop_from_a_third_session_is_confirmed_by_all_and_latched_until_people_agree_twice() {
    let mut rig = rig(RigConfig::default());
    let person = rig.visitor().expect("the runtime listens");
    let run = |rig: &mut Rig| {
        rig.runtime.as_mut().expect("it runs").ask(AuthorityRequest::Policy);
    };
    run(&mut rig);
    until(&rig, "the policy's turn", |rig| status(&person, rig).authority == Authority::Policy);

    let found = stop(&person, &rig);
    assert!(found.complete(), "{found:?}");
    assert_eq!(names(&found), ["arm-0", "arm-1", "runtime"]);
    assert!(found.parts.iter().all(|p| p.ack.latched && p.after <= found.took), "{found:?}");
    let now = status(&person, &rig);
    assert_eq!((now.authority, now.holder), (Authority::Stop, ANNA));
    // The runtime still publishes; the drivers follow nothing.
    let writes = |rig: &Rig| rig.drivers.iter().map(|d| d.told().writes).sum::<u64>();
    let before = writes(&rig);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(writes(&rig), before);
    assert!(rig.drivers.iter().all(|d| d.told().holds == 1), "held once");
    let denied = ask(&person, &rig, AuthorityAsk::Policy).expect_err("a stop is latched");
    assert!(denied.contains("sinew reset"), "{denied}");

    let found = operator::reset(&person, &rig.keys, ANNA, &[], PATIENCE).expect("asked");
    assert!(found.complete() && found.parts.iter().all(|p| !p.ack.latched), "{found:?}");
    until(&rig, "commands that are followed again", |rig| writes(rig) > before + 10);
    run(&mut rig);
    std::thread::sleep(Duration::from_millis(50));
    let now = status(&person, &rig);
    assert_eq!((now.authority, now.awaits_consent), (Authority::Hold, true), "nobody agreed yet");
    let now = ask(&person, &rig, AuthorityAsk::Policy).expect("anna agrees");
    assert_eq!((now.authority, now.reason), (Authority::Policy, Some(Reason::Consented)));
}

#[test]
fn a_driver_latches_a_stop_with_the_runtime_dead_and_tells_the_next_runtime() {
    let mut rig = rig(RigConfig { drivers: 1, ..RigConfig::default() });
    drop(rig.runtime.take());
    let driver = Endpoint::Connect(rig.drivers[0].endpoint.clone());
    let person = Bus::open(&driver).expect("the driver listens by itself");
    let timeout = Duration::from_millis(600);
    let found = operator::stop(&person, &rig.keys, ANNA, &[], timeout).expect("asked");
    assert_eq!(names(&found), ["arm-0"]);
    assert_eq!(found.missing, ["rig/runtime"], "its silence is told");
    assert!(!found.complete() && found.took >= timeout);

    let before = rig.drivers[0].told().writes;
    rig.restart().expect("the port is free again");
    // The driver connects again by itself; its latch stops the new runtime too.
    until(&rig, "a stop of the new runtime", |rig| {
        let status = ask(&person, rig, AuthorityAsk::Status);
        status.is_ok_and(|s| {
            s.authority == Authority::Stop && s.reason == Some(Reason::DriverStopped)
        })
    });
    assert_eq!(rig.drivers[0].told().writes, before, "nothing is followed");
}

#[test]
fn who_does_not_answer_or_cannot_hold_is_named() {
    let mut rig = rig(RigConfig::default());
    let person = rig.visitor().expect("the runtime listens");
    assert!(stop(&person, &rig).complete());
    operator::reset(&person, &rig.keys, ANNA, &[], PATIENCE).expect("asked");

    rig.drivers[0].told().broken = true;
    let found = stop(&person, &rig);
    assert!(found.missing.is_empty() && !found.complete(), "{found:?}");
    let fault =
        found.parts.iter().find(|p| p.ack.part == "arm-0").and_then(|p| p.ack.fault.clone());
    assert!(fault.is_some_and(|f| f.contains("motor does not answer")), "{found:?}");

    // A driver that is gone is known to the runtime, and missed.
    drop(rig.drivers.remove(0));
    let start = Instant::now();
    let timeout = Duration::from_millis(700);
    let found = operator::stop(&person, &rig.keys, ANNA, &[], timeout).expect("asked");
    assert_eq!(found.missing, ["rig/arm-0"]);
    assert!(start.elapsed() >= timeout && start.elapsed() < timeout * 3);
}

#[test]
fn any_message_on_the_stop_key_stops_and_only_operators_reset() {
    let mut config = RigConfig { drivers: 1, ..RigConfig::default() };
    config.authority.arbiter.operators = Operators::new([ANNA]);
    let rig = rig(config);
    let person = rig.visitor().expect("the runtime listens");
    let button = person.publisher(&rig.keys.stop(), Priority::Urgent).expect("declared");
    assert!(person.wait_for_subscriber(&button, PATIENCE));
    until(&rig, "a stop", |rig| {
        button.put(b"\xff not JSON".to_vec(), Clock::now());
        status(&person, rig).authority == Authority::Stop && rig.drivers[0].told().holds > 0
    });
    let other = Source::literal("passer-by");
    let timeout = Duration::from_millis(300);
    let found = operator::reset(&person, &rig.keys, other, &[], timeout).expect("asked");
    assert!(found.parts.is_empty() && !found.complete(), "{found:?}");
    assert_eq!(status(&person, &rig).authority, Authority::Stop);
    let found = operator::reset(&person, &rig.keys, ANNA, &[], PATIENCE).expect("asked");
    assert!(found.complete(), "{found:?}");
}

#[test]
fn a_controlled_stop_takes_the_torque_off_at_standstill() {
    let on_stop = StopCategory::StopThenTorqueOff;
    let rig = rig(RigConfig { drivers: 1, on_stop, ..RigConfig::default() });
    let person = rig.visitor().expect("the runtime listens");
    let found = stop(&person, &rig);
    let state = |found: &Confirmation| {
        let part = found.parts.iter().find(|p| p.ack.part == "arm-0");
        part.map(|p| p.ack.state.clone()).unwrap_or_default()
    };
    assert_eq!(state(&found), "stopping");
    until(&rig, "the torque to go", |rig| rig.drivers[0].told().torque_offs == 1);
    assert_eq!(state(&stop(&person, &rig)), "torque off");
    let holds = rig.drivers[0].told().holds;
    operator::reset(&person, &rig.keys, ANNA, &[], PATIENCE).expect("asked");
    assert_eq!(rig.drivers[0].told().holds, holds + 1, "a hold puts the torque on again");
}

#[test]
fn a_device_moves_the_arm_from_where_it_is_and_a_lost_link_ends_in_a_hold() {
    let mut rig = rig(RigConfig { drivers: 1, ..RigConfig::default() });
    let person = rig.visitor().expect("the runtime listens");
    rig.runtime.as_mut().expect("it runs").ask(AuthorityRequest::Policy);
    until(&rig, "the policy's turn", |rig| status(&person, rig).authority == Authority::Policy);
    let link = rig.visitor().expect("the runtime listens");
    let leader = Source::literal("leader");
    let device = TeleopDevice::new(&link, &rig.keys, leader, &rig.joints).expect("declared");
    assert!(device.wait_for_runtime(&link, PATIENCE));

    let start = rig.drivers[0].told().position;
    device.take(LeaseMode::Teleop, 1, Duration::from_millis(300));
    // Its own pose is far from the arm's; only its motion counts.
    for k in 0..60 {
        device.position(&pose(-2.0 + 0.004 * f64::from(k.min(50))));
        std::thread::sleep(Duration::from_millis(10));
    }
    let now = status(&person, &rig);
    assert_eq!((now.authority, now.holder), (Authority::Teleop, leader));
    let moved = rig.drivers[0].told().position - start;
    assert!((0.12..0.21).contains(&moved), "the device moved by 0.2 rad, the arm by {moved}");

    drop(device);
    drop(link);
    until(&rig, "the end of the lease", |rig| {
        status(&person, rig).reason == Some(Reason::LeaseExpired)
    });
    let now = status(&person, &rig);
    assert_eq!((now.authority, now.awaits_consent), (Authority::Hold, true));
}

#[test]
fn one_of_two_devices_holds_the_arm() {
    let rig = rig(RigConfig { drivers: 1, ..RigConfig::default() });
    let (first, second) = (Source::literal("first"), Source::literal("second"));
    let person = rig.visitor().expect("the runtime listens");
    let take = |who, priority| {
        let request = AuthorityAsk::Take { mode: LeaseMode::Teleop, priority, lease_ms: 400 };
        operator::ask(&person, &rig.keys, who, request, PATIENCE).map(|s| s.holder)
    };
    assert_eq!(take(first, 5), Ok(first));
    let denied = take(second, 5).expect_err("one holds it already").to_string();
    assert!(denied.contains("same or a higher priority"), "{denied}");
    assert_eq!(status(&person, &rig).holder, first);
    assert_eq!(take(second, 6), Ok(second), "a higher one takes it");
    // The first device's samples renew nothing and move nothing.
    let device = TeleopDevice::new(&person, &rig.keys, first, &rig.joints).expect("declared");
    assert!(device.wait_for_runtime(&person, PATIENCE));
    let before = rig.drivers[0].told().position;
    let end = Instant::now() + PATIENCE;
    while status(&person, &rig).authority == Authority::Teleop {
        assert!(Instant::now() < end, "the second's lease ends");
        device.jog(&pose(0.5));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(status(&person, &rig).holder, second);
    assert_eq!(rig.drivers[0].told().position, before);
}
