//! ROS 2 messages as they lie on the wire, and their conversion to ours.
//!
//! CDR, little-endian, behind the 4-byte encapsulation header `00 01 00 00` (OMG DDS-XTypes 1.3, XCDR1).

use cdr_encoding::{from_bytes, to_vec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::arbiter::Source;
use crate::control::{TeleopSample, TeleopTarget};
use crate::{ActionChunk, CameraFrame, Command, Image, JointState, JointVec, MAX_JOINTS, Stamp};

const ENCAPSULATION: [u8; 4] = [0, 1, 0, 0];

/// A payload that is not the message that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {message}: {reason}")]
pub struct DecodeError {
    message: &'static str,
    reason: String,
}

impl DecodeError {
    pub(super) fn new(message: &'static str, reason: String) -> Self {
        Self { message, reason }
    }
}

#[derive(Serialize, Deserialize)]
struct Time {
    sec: i32,
    nanosec: u32,
}

#[derive(Serialize, Deserialize)]
struct Header {
    stamp: Time,
    frame_id: String,
}

#[derive(Serialize, Deserialize)]
struct RosJointState {
    header: Header,
    name: Vec<String>,
    position: Vec<f64>,
    velocity: Vec<f64>,
    effort: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
struct RosTrajectoryPoint {
    positions: Vec<f64>,
    velocities: Vec<f64>,
    accelerations: Vec<f64>,
    effort: Vec<f64>,
    time_from_start: Time,
}

#[derive(Serialize, Deserialize)]
struct RosJointTrajectory {
    header: Header,
    joint_names: Vec<String>,
    points: Vec<RosTrajectoryPoint>,
}

#[derive(Serialize, Deserialize)]
struct RosImage {
    header: Header,
    height: u32,
    width: u32,
    encoding: String,
    is_bigendian: u8,
    step: u32,
    data: Vec<u8>,
}

/// A joint state as `sensor_msgs/msg/JointState`.
pub fn encode_state(names: &[String], state: &JointState) -> Vec<u8> {
    encode(&RosJointState {
        header: header(state.stamp, ""),
        name: names.to_vec(),
        position: state.position.as_slice().to_vec(),
        velocity: state.velocity.as_slice().to_vec(),
        effort: Vec::new(),
    })
}

/// A command as `trajectory_msgs/msg/JointTrajectory` with one point.
pub fn encode_command(names: &[String], command: &Command) -> Vec<u8> {
    encode(&RosJointTrajectory {
        header: header(command.stamp, ""),
        joint_names: names.to_vec(),
        points: vec![RosTrajectoryPoint {
            positions: command.position.as_slice().to_vec(),
            velocities: command.velocity.as_slice().to_vec(),
            accelerations: Vec::new(),
            effort: Vec::new(),
            time_from_start: Time { sec: 0, nanosec: 0 },
        }],
    })
}

/// A teleop device's sample as `sensor_msgs/msg/JointState`: a jog has velocities and no positions.
pub fn encode_teleop(
    names: &[String],
    source: Source,
    target: &TeleopTarget,
    at: Stamp,
) -> Vec<u8> {
    let (position, velocity) = match target {
        TeleopTarget::Position(values) => (values.as_slice().to_vec(), Vec::new()),
        TeleopTarget::Velocity(values) => (Vec::new(), values.as_slice().to_vec()),
    };
    let (header, name) = (header(at, source.name()), names.to_vec());
    encode(&RosJointState { header, name, position, velocity, effort: Vec::new() })
}

/// A chunk as `trajectory_msgs/msg/JointTrajectory`: a point for each action, from the observation's instant on.
pub fn encode_chunk(names: &[String], chunk: &ActionChunk) -> Vec<u8> {
    let point = |(k, action): (usize, &[f64])| {
        let time = chunk.dt * k as u32;
        // Actions are seconds, not decades, from the observation.
        let sec = i32::try_from(time.as_secs()).unwrap_or(i32::MAX);
        RosTrajectoryPoint {
            positions: action.to_vec(),
            velocities: Vec::new(),
            accelerations: Vec::new(),
            effort: Vec::new(),
            time_from_start: Time { sec, nanosec: time.subsec_nanos() },
        }
    };
    encode(&RosJointTrajectory {
        header: header(chunk.instant, ""),
        joint_names: names.to_vec(),
        points: chunk.values().chunks_exact(chunk.dim()).enumerate().map(point).collect(),
    })
}

/// The values of a chunk, row-major.
///
/// # Errors
/// [`DecodeError`] for bytes that are no JointTrajectory.
pub fn decode_chunk(bytes: &[u8]) -> Result<Vec<f64>, DecodeError> {
    let message: RosJointTrajectory = decode("trajectory_msgs/JointTrajectory", bytes)?;
    Ok(message.points.into_iter().flat_map(|p| p.positions).collect())
}

/// A frame as `sensor_msgs/msg/Image` in `rgb8`.
pub fn encode_frame(camera: &str, frame: &CameraFrame) -> Vec<u8> {
    encode(&RosImage {
        header: header(frame.stamp, camera),
        height: frame.image.height() as u32,
        width: frame.image.width() as u32,
        encoding: "rgb8".to_owned(),
        is_bigendian: 0,
        step: frame.image.width() as u32 * 3,
        data: frame.image.data().to_vec(),
    })
}

/// A joint state, its joints in the order of `names`.
///
/// # Errors
/// [`DecodeError`] for bytes that are no JointState, or that lack one of `names`.
pub fn decode_state(
    names: &[String],
    bytes: &[u8],
    sequence: u64,
) -> Result<JointState, DecodeError> {
    const MESSAGE: &str = "sensor_msgs/JointState";
    let message: RosJointState = decode(MESSAGE, bytes)?;
    let position = ordered(MESSAGE, names, &message.name, &message.position)?;
    let velocity = if message.velocity.is_empty() {
        JointVec::zeros(names.len())
    } else {
        ordered(MESSAGE, names, &message.name, &message.velocity)?
    };
    Ok(JointState { stamp: stamp(&message.header), sequence, position, velocity })
}

/// A command, its joints in the order of `names`.
///
/// # Errors
/// [`DecodeError`] for bytes that are no JointTrajectory of one point, or that lack one of `names`.
pub fn decode_command(
    names: &[String],
    bytes: &[u8],
    sequence: u64,
) -> Result<Command, DecodeError> {
    const MESSAGE: &str = "trajectory_msgs/JointTrajectory";
    let message: RosJointTrajectory = decode(MESSAGE, bytes)?;
    let [point] = message.points.as_slice() else {
        return Err(wrong(
            MESSAGE,
            format!("a command has one point, found {}", message.points.len()),
        ));
    };
    let position = ordered(MESSAGE, names, &message.joint_names, &point.positions)?;
    let velocity = ordered(MESSAGE, names, &message.joint_names, &point.velocities)?;
    if !position.is_finite() || !velocity.is_finite() {
        return Err(wrong(MESSAGE, "a value is not finite".to_owned()));
    }
    Ok(Command { stamp: stamp(&message.header), sequence, position, velocity })
}

/// A teleop device's sample that arrived at `arrived`, its joints in the order of `names`.
///
/// # Errors
/// [`DecodeError`] for bytes that are no JointState, lack one of `names`, or name no device in `frame_id`.
pub fn decode_teleop(
    names: &[String],
    bytes: &[u8],
    sequence: u64,
    arrived: Stamp,
) -> Result<TeleopSample, DecodeError> {
    const MESSAGE: &str = "sensor_msgs/JointState";
    let message: RosJointState = decode(MESSAGE, bytes)?;
    let target = if message.position.is_empty() {
        TeleopTarget::Velocity(ordered(MESSAGE, names, &message.name, &message.velocity)?)
    } else {
        TeleopTarget::Position(ordered(MESSAGE, names, &message.name, &message.position)?)
    };
    let source = Source::new(&message.header.frame_id)
        .map_err(|e| wrong(MESSAGE, format!("frame_id must name the device: {e}")))?;
    Ok(TeleopSample { source, stamp: stamp(&message.header), sequence, arrived, target })
}

/// A camera frame.
///
/// # Errors
/// [`DecodeError`] for bytes that are no Image, or an encoding other than `rgb8`.
pub fn decode_frame(bytes: &[u8], sequence: u64) -> Result<CameraFrame, DecodeError> {
    const MESSAGE: &str = "sensor_msgs/Image";
    let message: RosImage = decode(MESSAGE, bytes)?;
    if message.encoding != "rgb8" {
        return Err(wrong(
            MESSAGE,
            format!("encoding `{}`, only `rgb8` is read", message.encoding),
        ));
    }
    let stamp = stamp(&message.header);
    let (width, height) = (message.width as usize, message.height as usize);
    let image = Image::new(width, height, message.data.into())
        .map_err(|e| wrong(MESSAGE, e.to_string()))?;
    Ok(CameraFrame { stamp, sequence, image })
}

fn header(stamp: Stamp, frame_id: &str) -> Header {
    let (sec, nanosec) = (stamp.0.div_euclid(1_000_000_000), stamp.0.rem_euclid(1_000_000_000));
    // builtin_interfaces/Time has 32-bit seconds; it ends in 2038.
    let sec = i32::try_from(sec).unwrap_or(i32::MAX);
    Header { stamp: Time { sec, nanosec: nanosec as u32 }, frame_id: frame_id.to_owned() }
}

fn stamp(header: &Header) -> Stamp {
    Stamp(i64::from(header.stamp.sec) * 1_000_000_000 + i64::from(header.stamp.nanosec))
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = ENCAPSULATION.to_vec();
    // Writing plain structs of numbers, strings and sequences to memory cannot fail.
    #[allow(clippy::expect_used)]
    let body = to_vec::<T, byteorder::LittleEndian>(message).expect("plain structs serialise");
    bytes.extend(body);
    bytes
}

fn decode<T: DeserializeOwned>(message: &'static str, bytes: &[u8]) -> Result<T, DecodeError> {
    let Some((head, body)) = bytes.split_at_checked(ENCAPSULATION.len()) else {
        return Err(wrong(message, format!("{} bytes are too few", bytes.len())));
    };
    if head[..2] != ENCAPSULATION[..2] {
        return Err(wrong(
            message,
            format!("encapsulation {head:02x?}, expected {ENCAPSULATION:02x?}"),
        ));
    }
    from_bytes::<T, byteorder::LittleEndian>(body)
        .map(|(value, _)| value)
        .map_err(|e| wrong(message, e.to_string()))
}

/// The values of `names`, in that order, from a message that may order them otherwise.
fn ordered(
    message: &'static str,
    names: &[String],
    found: &[String],
    values: &[f64],
) -> Result<JointVec, DecodeError> {
    if found.len() != values.len() || names.len() > MAX_JOINTS {
        let reason = format!("{} joint names beside {} values", found.len(), values.len());
        return Err(wrong(message, reason));
    }
    let mut out = JointVec::zeros(names.len());
    for (joint, name) in names.iter().enumerate() {
        let at = found.iter().position(|f| f == name);
        let at = at.ok_or_else(|| wrong(message, format!("joint `{name}` is missing")))?;
        out[joint] = values[at];
    }
    Ok(out)
}

fn wrong(message: &'static str, reason: String) -> DecodeError {
    DecodeError::new(message, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> Vec<String> {
        vec!["a".into(), "b".into()]
    }

    fn state() -> JointState {
        let position = JointVec::from_slice(&[0.5, -1.5]).expect("two joints");
        JointState {
            stamp: Stamp(1_700_000_000_123_456_789),
            sequence: 7,
            position,
            velocity: JointVec::zeros(2),
        }
    }

    #[test]
    fn states_and_commands_and_frames_come_back() {
        let bytes = encode_state(&names(), &state());
        assert_eq!(decode_state(&names(), &bytes, 7), Ok(state()));
        let reversed = vec!["b".to_owned(), "a".to_owned()];
        let swapped = decode_state(&reversed, &bytes, 7).expect("the same joints");
        assert_eq!(swapped.position.as_slice(), [-1.5, 0.5], "joints are found by name");
        let s = state();
        let command =
            Command { stamp: s.stamp, sequence: 9, position: s.position, velocity: s.velocity };
        assert_eq!(decode_command(&names(), &encode_command(&names(), &command), 9), Ok(command));
        let image = Image::new(2, 1, vec![1u8, 2, 3, 4, 5, 6].into()).expect("two pixels");
        let frame = CameraFrame { stamp: s.stamp, sequence: 3, image };
        assert_eq!(decode_frame(&encode_frame("front", &frame), 3), Ok(frame));
    }

    #[test]
    fn teleop_samples_come_back_and_must_name_their_device() {
        let (source, at) = (Source::literal("leader"), Stamp(5_000_000_007));
        let values = JointVec::from_slice(&[0.5, -0.25]).expect("two joints");
        for target in [TeleopTarget::Position(values), TeleopTarget::Velocity(values)] {
            let bytes = encode_teleop(&names(), source, &target, at);
            let sample = decode_teleop(&names(), &bytes, 3, Stamp(9)).expect("our own");
            let expected =
                TeleopSample { source, stamp: at, sequence: 3, arrived: Stamp(9), target };
            assert_eq!(sample, expected);
        }
        let error = decode_teleop(&names(), &encode_state(&names(), &state()), 1, at);
        assert!(error.expect_err("no frame_id").to_string().contains("frame_id"));
    }

    #[test]
    fn a_joint_state_has_the_bytes_ros_gives_it() {
        // Header: sec, nanosec, frame_id "" (length 1, NUL), then aligned sequences.
        let bytes = encode_state(
            &["a".to_owned()],
            &JointState {
                stamp: Stamp(2_000_000_003),
                sequence: 1,
                position: JointVec::from_slice(&[1.0]).expect("one joint"),
                velocity: JointVec::zeros(1),
            },
        );
        let mut expected = vec![0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([1, 0, 0, 0, 2, 0, 0, 0, b'a', 0, 0, 0, 1, 0, 0, 0]);
        expected.extend(1.0f64.to_le_bytes());
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend(0.0f64.to_le_bytes());
        expected.extend([0, 0, 0, 0]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_missing_joint_is_named() {
        let bytes = encode_state(&names(), &state());
        let error = decode_state(&["c".to_owned()], &bytes, 1).expect_err("no joint c");
        assert!(error.to_string().contains("joint `c` is missing"), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(flips in prop::collection::vec((0usize..200, any::<u8>()), 1..8), cut in 0usize..200) {
            let mut bytes = encode_state(&names(), &state());
            for (at, value) in flips {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            bytes.truncate(cut.max(1));
            let _ = decode_state(&names(), &bytes, 1);
            let _ = decode_command(&names(), &bytes, 1);
            let _ = decode_frame(&bytes, 1);
            let _ = decode_teleop(&names(), &bytes, 1, Stamp(0));
        }
    }
}
