use std::io::{Cursor, Error, ErrorKind, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::arbiter::AuthorityRequest;
use crate::control::{ControlConfig, ControlCore, ControlEvent};
use crate::scheduler::SchedulerConfig;
use crate::{
    ActionChunk, CameraFrame, Image, JointLimits, JointState, JointVec, MAX_JOINTS, Stamp,
};

const PERIOD: Duration = Duration::from_millis(10);

/// A file in memory that its owner can look at; writing fails past `room` bytes.
#[derive(Clone)]
struct Disk {
    data: Arc<Mutex<Cursor<Vec<u8>>>>,
    room: u64,
    slow: Duration,
}

impl Disk {
    fn new(room: u64) -> Self {
        Self { data: Arc::default(), room, slow: Duration::ZERO }
    }

    fn bytes(&self) -> Vec<u8> {
        self.data.lock().expect("no thread panics while it holds this").get_ref().clone()
    }
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::thread::sleep(self.slow);
        let mut data = self.data.lock().expect("no thread panics while it holds this");
        let left = self.room.saturating_sub(data.position());
        match bytes.len().min(left as usize) {
            0 if !bytes.is_empty() => Err(Error::from(ErrorKind::StorageFull)),
            n => data.write(&bytes[..n]),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Disk {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.data.lock().expect("no thread panics while it holds this").seek(to)
    }
}

fn config() -> ControlConfig {
    let limit =
        JointLimits { lower: -1.0, upper: 1.0, velocity: 2.0, acceleration: 20.0, jerk: 1000.0 };
    ControlConfig {
        limits: vec![limit; 2],
        period: PERIOD,
        state_timeout: Duration::from_millis(250),
        scheduler: SchedulerConfig::new(&[limit; 2], PERIOD, 8),
    }
}

fn header() -> Header {
    Header::new("test", &["pan".to_owned(), "lift".to_owned()], &config())
}

fn state(now: Stamp, sequence: u64, values: [f64; 2]) -> ControlEvent {
    let position = JointVec::from_slice(&values).expect("two joints");
    let velocity = JointVec::zeros(2);
    ControlEvent::State(JointState { stamp: now, sequence, position, velocity })
}

/// Runs `cycles` control cycles, each with what `events` gives; what a reader is to find.
fn drive(
    tap: &mut ControlTap,
    cycles: u64,
    mut events: impl FnMut(u64, Stamp) -> Vec<ControlEvent>,
) -> Vec<Entry> {
    let mut core = ControlCore::new(&config()).expect("the limits are sound");
    let mut told = Vec::new();
    for number in 1..=cycles {
        let now = Stamp(1_000_000_000) + PERIOD * number as u32;
        for event in events(number, now) {
            tap.event(&event, now);
            let (record, chunk) = EventRecord::split(&event);
            told.push(Entry::Event { cycle: number, now, event: record, chunk: chunk.cloned() });
            let effect = core.on_event(event, now);
            tap.effect(&effect);
            let effect = EffectRecord::of(&effect);
            if effect != EffectRecord::default() {
                told.push(Entry::Effect(effect));
            }
        }
        let cycle = core.tick(now);
        while core.take_spent().is_some() {}
        tap.cycle(&cycle, now, now, 0);
        let last_work = Duration::ZERO;
        told.push(Entry::Cycle(CycleRecord { number, now, due: now, missed: 0, last_work, cycle }));
    }
    told
}

fn simple(number: u64, now: Stamp) -> Vec<ControlEvent> {
    let mut events = vec![state(now, number, [0.1, 0.2])];
    if number == 3 {
        events.push(ControlEvent::Authority(AuthorityRequest::Policy));
    }
    events
}

fn read(bytes: &[u8]) -> (Vec<Entry>, RecordingEnd) {
    let mut recording = Recording::open(bytes).expect("the header is whole");
    let entries: Vec<_> = recording.by_ref().collect();
    (entries, recording.end().expect("it was read to its end").clone())
}

fn any_event() -> impl Strategy<Value = (u8, Vec<f64>)> {
    let value = prop_oneof![8 => -2.0..2.0f64, 1 => any::<f64>()];
    (0u8..6, prop::collection::vec(value, 2..40))
}

fn event((kind, values): &(u8, Vec<f64>), number: u64, now: Stamp) -> ControlEvent {
    let whole = &values[..values.len() / 2 * 2];
    let dt = Duration::from_millis(50);
    let chunk = || ActionChunk::new(number, now, dt, 2, whole.to_vec()).expect("whole rows");
    match kind {
        0 => state(now, number, [values[0], values[1]]),
        1 => ControlEvent::Chunk(chunk()),
        2 => ControlEvent::ChunkFailed(number),
        3 => ControlEvent::Authority(AuthorityRequest::Policy),
        4 => ControlEvent::Authority(AuthorityRequest::Stop),
        _ => ControlEvent::Motion(chunk()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_recorded_is_read_back_in_order(given in prop::collection::vec(any_event(), 1..60)) {
        let disk = Disk::new(u64::MAX);
        let (recorder, mut tap) = Recorder::start(disk.clone(), &header()).expect("there is room");
        let count = given.len() as u64;
        let mut told = drive(&mut tap, count, |number, now| {
            vec![state(now, number, [0.0, 0.0]), event(&given[number as usize - 1], number, now)]
        });
        drop(tap);
        let figures = recorder.finish();
        prop_assert!(figures.lost.is_empty() && figures.stopped.is_none(), "{figures:?}");
        let (entries, end) = read(&disk.bytes());
        prop_assert_eq!(end, RecordingEnd::Whole);
        // A state that is not finite comes back as not finite, whichever way it was so; NaN equals NaN here.
        for entry in &mut told {
            if let Entry::Event { event: EventRecord::State(state), .. } = entry {
                for joint in 0..state.position.len() {
                    let value = &mut state.position[joint];
                    *value = if value.is_finite() { *value } else { f64::NAN };
                }
            }
        }
        prop_assert_eq!(format!("{entries:?}"), format!("{told:?}"));
    }

    #[test]
    fn damaged_files_never_panic(flips in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6), cut in 0.0..1.0f64) {
        let disk = Disk::new(u64::MAX);
        let (recorder, mut tap) = Recorder::start(disk.clone(), &header()).expect("there is room");
        drive(&mut tap, 20, simple);
        drop(tap);
        recorder.finish();
        let mut bytes = disk.bytes();
        for (at, value) in flips {
            let n = bytes.len();
            bytes[at % n] ^= value;
        }
        bytes.truncate((bytes.len() as f64 * cut) as usize);
        if let Ok(recording) = Recording::open(&bytes[..]) {
            prop_assert!(recording.count() <= 60);
        }
    }
}

/// A recording of several chunks of the file, and what is in it.
fn long(disk: &Disk) -> (RecordingFigures, Vec<Entry>) {
    let (recorder, mut tap) = Recorder::start(disk.clone(), &header()).expect("there is room");
    let told = drive(&mut tap, 4000, |number, now| {
        if number % 200 == 0 {
            // The writer follows: a run at 100 Hz gives it much longer.
            std::thread::sleep(Duration::from_millis(30));
        }
        simple(number, now)
    });
    drop(tap);
    (recorder.finish(), told)
}

#[test]
fn a_torn_file_is_read_to_its_last_whole_part() {
    let disk = Disk::new(u64::MAX);
    let (figures, told) = long(&disk);
    assert!(figures.lost.is_empty(), "{figures:?}");
    let bytes = disk.bytes();
    assert_eq!(figures.bytes, bytes.len() as u64);
    let (whole, _) = read(&bytes);
    assert_eq!(whole, told);
    let (mut last, mut shortest) = (0, usize::MAX);
    for part in 2..10 {
        let (entries, end) = read(&bytes[..bytes.len() * part / 10]);
        assert_eq!(entries, whole[..entries.len()], "what is there is as it was");
        assert!(entries.len() >= last);
        assert!(matches!(end, RecordingEnd::Torn(_)), "{part}: {end:?}");
        last = entries.len();
        shortest = shortest.min(last);
    }
    // The file ends with its index, so a long first part of it may hold everything.
    assert!(last > 0 && shortest < whole.len(), "{shortest} to {last} of {}", whole.len());
}

#[test]
fn a_full_disk_ends_the_recording_not_the_run() {
    let roomy = Disk::new(u64::MAX);
    let (_, told) = long(&roomy);
    let full = Disk::new(roomy.bytes().len() as u64 * 3 / 5);
    let (figures, all_the_same) = long(&full);
    assert_eq!(told, all_the_same, "the core does the same");
    let why = figures.stopped.expect("the disk was full");
    assert!(why.contains("no storage space"), "{why}");
    assert!(figures.unwritten > 0);
    let (entries, _) = read(&full.bytes());
    assert!(!entries.is_empty() && entries.len() < told.len());
    assert_eq!(entries, told[..entries.len()], "up to there the file is readable");
}

#[test]
fn a_disk_that_is_full_from_the_start_is_an_error_before_the_run() {
    let error = Recorder::start(Disk::new(100), &header()).map(|_| ()).expect_err("no room");
    assert!(error.to_string().contains("no storage space"), "{error}");
}

#[test]
fn frames_that_find_no_room_are_counted_and_written_down() {
    let disk = Disk { slow: Duration::from_millis(50), ..Disk::new(u64::MAX) };
    let (recorder, tap) = Recorder::start(disk.clone(), &header()).expect("there is room");
    let input = recorder.input();
    let camera: Arc<str> = Arc::from("front");
    let data: Arc<[u8]> = (0..300 * 300 * 3).map(|i| (i * 7919 % 251) as u8).collect();
    let image = Image::new(300, 300, data).expect("whole");
    for sequence in 1..=200 {
        let frame =
            CameraFrame { stamp: Stamp(sequence), sequence: sequence as u64, image: image.clone() };
        input.frame(&camera, &frame);
    }
    drop(tap);
    let figures = recorder.finish();
    let lost = figures.lost.get(&GapKind::Frames).copied().unwrap_or_default();
    assert!(lost > 0, "{figures:?}");
    let (entries, _) = read(&disk.bytes());
    let frames = entries.iter().filter(|e| matches!(e, Entry::Frame { .. })).count() as u64;
    let said: u64 = entries
        .iter()
        .map(|e| match e {
            Entry::Gap(Gap { kind: GapKind::Frames, lost }) => *lost,
            _ => 0,
        })
        .sum();
    assert_eq!((frames + lost, said), (200, lost));
}

#[test]
fn a_damaged_header_is_named() {
    let disk = Disk::new(u64::MAX);
    let (recorder, tap) = Recorder::start(disk.clone(), &header()).expect("there is room");
    drop(tap);
    recorder.finish();
    let mut bytes = disk.bytes();
    let key = b"\"execution_horizon\":8";
    let at = bytes.windows(key.len()).position(|w| w == key).expect("it is in the header");
    bytes[at + key.len() - 1] ^= 1;
    let error = Recording::open(&bytes[..]).map(|_| ()).expect_err("one bit");
    assert!(error.to_string().contains("`control` is damaged"), "{error}");
    assert!(Recording::open(&b"no recording at all"[..]).is_err());
    let mut nothing: &[u8] = &[];
    assert_eq!(nothing.read(&mut [0; 1]).expect("memory"), 0);
    assert!(Recording::open(nothing).is_err());
}

#[test]
fn a_record_of_the_control_thread_is_small() {
    // The ring holds thousands of them.
    assert!(
        size_of::<ControlRecord>() < 6 * MAX_JOINTS * size_of::<f64>(),
        "{}",
        size_of::<ControlRecord>()
    );
}
