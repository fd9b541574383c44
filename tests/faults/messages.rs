//! Messages that nobody should have sent: random bytes, cut CDR, other joints, NaN, numbers of the past, a second
//! source. A rogue peer publishes them on the robot's keys while the policy moves the arm.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::{Rng as _, RngExt as _, SeedableRng as _};
use sinew_runtime::transport::{
    AnswerMessage, Bus, OrderMessage, Priority, Publisher, decode_policy, encode_command,
    encode_frame, encode_policy, encode_state,
};
use sinew_runtime::{ActionChunk, CameraFrame, Clock, Command, Image, JointState, JointVec, Stamp};
use zenoh::Wait as _;

use crate::harness::{POLICY, wait_until};
use crate::scene;
use crate::watch::Watch;

/// How long the rogue goes on.
const ATTACK: Duration = Duration::from_secs(4);
/// Where the rogue wants the arm (rad).
const ELSEWHERE: f64 = 0.3;

/// Publishers of a peer that is none of ours.
struct Rogue {
    command: Publisher,
    state: Publisher,
    camera: Publisher,
    chunk: Publisher,
    order: Publisher,
    _bus: Bus,
}

impl Rogue {
    fn new(watch: &Watch, endpoint: &str) -> Self {
        let bus = Bus::meet(endpoint, &[]).expect("the address is one");
        let publisher = |key: String| bus.publisher(&key, Priority::RealTime).expect("declared");
        let command = publisher(watch.keys.command());
        assert!(bus.wait_for_subscriber(&command, Duration::from_secs(10)), "the arm is there");
        Self {
            state: publisher(watch.keys.state()),
            camera: publisher(watch.keys.camera("front")),
            chunk: publisher(watch.keys.chunk()),
            order: publisher(watch.keys.order()),
            command,
            _bus: bus,
        }
    }

    fn everywhere(&self, bytes: &[u8]) {
        for key in [&self.command, &self.state, &self.camera, &self.chunk, &self.order] {
            key.put(bytes.to_vec(), Clock::now());
        }
    }
}

fn joints(watch: &Watch, value: f64) -> JointVec {
    JointVec::from_slice(&vec![value; watch.joints.len()]).expect("six joints")
}

fn command(watch: &Watch, value: f64, stamp: Stamp) -> Vec<u8> {
    let (position, velocity) = (joints(watch, value), joints(watch, 0.0));
    encode_command(&watch.joints, &Command { stamp, sequence: 0, position, velocity })
}

fn state(names: &[String], watch: &Watch, value: f64, stamp: Stamp) -> Vec<u8> {
    let (position, velocity) = (joints(watch, value), joints(watch, 0.0));
    encode_state(names, &JointState { stamp, sequence: 0, position, velocity })
}

fn frame(stamp: Stamp) -> Vec<u8> {
    let image = Image::new(96, 96, vec![255; 96 * 96 * 3].into()).expect("it fits");
    encode_frame("front", &CameraFrame { stamp, sequence: 0, image })
}

#[test]
fn corrupt_messages_are_counted_and_the_policy_goes_on() {
    let (mut launch, watch) = scene(POLICY);
    launch.relax();
    launch.start_control(&[]);
    watch.wait_policy_moves();
    watch.believe_no_others();
    let rogue = Rogue::new(&watch, &launch.endpoint);
    let mut random = rand_pcg::Pcg64::seed_from_u64(7);
    let (end, chunks, mut rounds) = (Instant::now() + ATTACK, watch.chunks(), 0u64);
    let others: Vec<String> = (0..watch.joints.len()).map(|k| format!("leg_{k}")).collect();
    while Instant::now() < end {
        let now = Clock::now();
        let mut bytes = vec![0; random.random_range(0..300)];
        random.fill_bytes(&mut bytes);
        rogue.everywhere(&bytes);
        let whole = [command(&watch, 0.1, now), state(&watch.joints, &watch, 0.1, now), frame(now)];
        for sound in whole {
            let cut = random.random_range(0..sound.len());
            rogue.everywhere(&sound[..cut]);
        }
        // Well formed, and wrong.
        rogue.command.put(command(&watch, f64::NAN, now), now);
        rogue.state.put(state(&others, &watch, 0.1, now), now);
        rogue.state.put(state(&watch.joints, &watch, f64::NAN, now), now);
        rounds += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(watch.says("held"), "", "nobody lost authority");
    assert!(watch.chunks() > chunks, "chunks go on");
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    let invalid = report["stream"]["invalid"].as_u64().unwrap_or(0);
    assert!(invalid >= rounds, "{invalid} of at least {rounds} were counted");
    launch.assert_no_panic();
    println!(
        "| corrupt bytes on five keys | | | {invalid} commands refused in {rounds} rounds; goes on |"
    );
}

#[test]
fn a_second_source_of_commands_states_or_frames_is_not_followed() {
    let (mut launch, watch) = scene(POLICY);
    launch.relax();
    launch.start_control(&[]);
    watch.wait_policy_moves();
    watch.believe_no_others();
    let rogue = Rogue::new(&watch, &launch.endpoint);
    let (end, chunks, mut rounds) = (Instant::now() + ATTACK, watch.chunks(), 0u64);
    while Instant::now() < end {
        let now = Clock::now();
        rogue.command.put(command(&watch, ELSEWHERE, now), now);
        rogue.state.put(state(&watch.joints, &watch, ELSEWHERE, now), now);
        rogue.camera.put(frame(now), now);
        // An hour ahead: believed, it would make every real one look old.
        let ahead = now + Duration::from_secs(3600);
        rogue.state.put(state(&watch.joints, &watch, ELSEWHERE, ahead), ahead);
        rounds += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(watch.says("held"), "", "nobody lost authority");
    assert!(watch.chunks() > chunks, "chunks go on");
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    let refused = report["stream"]["refused"].as_u64().unwrap_or(0);
    assert!(refused >= rounds / 2, "{refused} of {rounds} were counted");
    assert_eq!(report["chunks"]["stale_state_holds"], 0);
    launch.assert_no_panic();
    println!("| a second source | | | {refused} of {rounds} commands refused; goes on |");
}

#[test]
fn replayed_messages_with_numbers_of_the_past_are_not_followed() {
    let (mut launch, watch) = scene(POLICY);
    launch.relax();
    launch.start_control(&[]);
    watch.wait_policy_moves();
    // Every command as it was sent, attachment and all, and sent again a moment later.
    let mut config = zenoh::Config::default();
    for (key, value) in [
        ("mode", "\"peer\"".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("connect/endpoints", format!("[\"{}\"]", launch.endpoint)),
        ("listen/endpoints", "[\"tcp/127.0.0.1:0\"]".to_owned()),
    ] {
        config.insert_json5(key, &value).expect("zenoh knows the key");
    }
    let session = zenoh::open(config).wait().expect("the control process listens");
    let heard = session.declare_subscriber(watch.keys.command()).wait().expect("declared");
    let mut kept = Vec::new();
    let keep_until = Instant::now() + Duration::from_secs(1);
    while let Ok(Some(sample)) = heard.recv_deadline(keep_until) {
        let attachment = sample.attachment().expect("ours are numbered").to_bytes().to_vec();
        kept.push((sample.payload().to_bytes().to_vec(), attachment));
    }
    assert!(kept.len() > 20, "{} commands heard", kept.len());
    drop(heard);
    let before = watch.state();
    let chunks = watch.chunks();
    for (payload, attachment) in kept.iter().cycle().take(400) {
        let put = session.put(watch.keys.command(), payload.clone()).attachment(attachment.clone());
        put.wait().expect("the session is open");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(watch.says("held"), "", "nobody lost authority");
    assert!(watch.chunks() > chunks && watch.state().stamp > before.stamp);
    watch.assert_measured_motion_is_bounded();
    let report = launch.finish();
    let (late, old) = (&report["stream"]["refused"], &report["stream"]["reordered"]);
    let counted = late.as_u64().unwrap_or(0) + old.as_u64().unwrap_or(0);
    assert!(counted >= 300, "{counted} of 400 were counted");
    launch.assert_no_panic();
    println!("| 400 replayed commands | | | {counted} refused; goes on |");
}

#[test]
fn answers_that_are_no_chunks_are_refused_and_asked_for_again() {
    let (mut launch, watch) = scene(POLICY);
    launch.relax();
    let asked = std::sync::Arc::new(AtomicU64::new(0));
    let bus = Bus::meet(&launch.endpoint, &[]).expect("the address is one");
    let answers = bus.publisher(&watch.keys.chunk(), Priority::RealTime).expect("declared");
    let (count, answers, last) = (asked.clone(), Mutex::new(answers), AtomicU64::new(0));
    launch.start_control(&[]);
    watch.wait_policy_moves();
    let chunks = watch.chunks();
    // Quicker than the policy: every order gets a wrong answer first, of a different kind each time.
    let rogue = bus.subscribe(&watch.keys.order(), move |_, bytes| {
        let Ok(OrderMessage { session, order, .. }) = decode_policy(bytes) else { return };
        let request = order.order.request;
        if last.swap(request, Ordering::Relaxed) == request {
            return;
        }
        let kind = count.fetch_add(1, Ordering::Relaxed) % 4;
        let (dim, value) =
            if kind == 1 { (5, 0.0) } else { (6, [f64::NAN, 0.0, 0.0, 0.0][kind as usize]) };
        let long_ago = Duration::from_secs(if kind == 2 { 60 } else { 0 });
        let instant = Clock::now() - long_ago;
        let dt = Duration::from_millis(if kind == 3 { 0 } else { 100 });
        let chunk = ActionChunk::new(request, instant, dt, dim, vec![value; 16 * dim]);
        let chunk = Some(chunk.expect("whole rows"));
        let answer =
            AnswerMessage { session, request, chunk, reports: Vec::new(), records: Vec::new() };
        let answers = answers.lock().expect("no panic while held");
        answers.put(encode_policy(&answer), Clock::now());
    });
    let rogue = rogue.expect("declared");
    wait_until("a dozen orders", || asked.load(Ordering::Relaxed) >= 12);
    drop(rogue);
    let after = watch.chunks();
    wait_until("chunks again", || watch.chunks() > after + 1);
    assert!(after >= chunks);
    watch.assert_measured_motion_is_bounded();
    watch.assert_commands_are_bounded();
    let report = launch.finish();
    let refused = &report["chunks"]["refused"];
    for why in ["not_finite", "wrong_shape"] {
        assert!(refused[why].as_u64() >= Some(1), "{why}: {refused}");
    }
    launch.assert_no_panic();
    println!("| NaN, wrong-shaped, outdated chunks | | | refused: {refused}; asked again |");
}
