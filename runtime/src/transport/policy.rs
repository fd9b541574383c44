//! What the control process and a policy in another process say to each other.
//!
//! CBOR with named fields: a newer field has a default for the older side, and bytes that are something else
//! are refused with the reason. The version counts changes that the other side could not understand.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::blackbox::InferenceRecord;
use crate::inference::{InferenceOrder, InferenceReport};
use crate::scheduler::starvation::StepLatency;
use crate::{ActionChunk, PolicySpec};

use super::DecodeError;

/// Counts the changes of these messages that an older side would misunderstand.
pub const POLICY_PROTOCOL: u16 = 1;

/// The control side's demand for a chunk; sent again until it is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OrderMessage {
    /// Says whose order it is: numbers of a restarted control process begin anew.
    pub session: u64,
    /// What the scheduler asks for, and the plan that the chunk has to join.
    pub order: InferenceOrder,
    /// The instruction to follow.
    pub instruction: String,
}

/// The policy side's answer to one order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AnswerMessage {
    /// The order's session.
    pub session: u64,
    /// Number of the request.
    pub request: u64,
    /// The chunk; none when it could not be made, which the reports explain.
    pub chunk: Option<ActionChunk>,
    /// What the inference thread said since the last answer.
    pub reports: Vec<InferenceReport>,
    /// The inferences since the last answer, for the recording.
    pub records: Vec<InferenceRecord>,
}

/// What a policy that is ready says of itself, on request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicyIntroduction {
    /// The bundle or checkpoint that it runs.
    pub file: String,
    /// What it takes and gives.
    pub spec: PolicySpec,
    /// Its tail latency, measured before it was announced.
    pub latency: StepLatency,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u16,
    body: T,
}

/// `message` as bytes.
pub fn encode_policy<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing plain structs to memory cannot fail.
    #[allow(clippy::expect_used)]
    ciborium::into_writer(&Versioned { version: POLICY_PROTOCOL, body: message }, &mut bytes)
        .expect("plain structs serialise");
    bytes
}

/// The message in `bytes`.
///
/// # Errors
/// [`DecodeError`] for bytes that are no such message, or of another version.
pub fn decode_policy<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let wrong = |reason: String| DecodeError::new("message between control and policy", reason);
    #[derive(Deserialize)]
    struct Version {
        version: u16,
    }
    let Version { version } = ciborium::from_reader(bytes).map_err(|e| wrong(e.to_string()))?;
    if version != POLICY_PROTOCOL {
        let reason = format!(
            "version {version}, this side speaks {POLICY_PROTOCOL}: run the same Sinew on both"
        );
        return Err(wrong(reason));
    }
    let message: Versioned<T> = ciborium::from_reader(bytes).map_err(|e| wrong(e.to_string()))?;
    Ok(message.body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::ChunkOrder;
    use crate::scheduler::strategy::Guide;
    use crate::{CacheUse, ChunkReport, JointVec, PlannedBlock, StageTime, Stamp};
    use proptest::prelude::*;
    use std::time::Duration;

    fn answer() -> AnswerMessage {
        let dt = Duration::from_millis(100);
        let mut chunk = ActionChunk::new(7, Stamp(5), dt, 2, vec![0.25, f64::NAN, 1.0, -1.0])
            .expect("two actions of two values");
        chunk.report.stages.push(StageTime { stage: "vision", time: Duration::from_micros(80) });
        let used = CacheUse { lookups: 16, hits: 3, error: Some(0.5), ..CacheUse::default() };
        chunk.report.caches.push(("warm_start", used));
        let latency = Duration::from_millis(41);
        let ages = vec![("front".to_owned(), Duration::from_millis(12))];
        let report = InferenceReport::Chunk {
            instruction: "put it there".to_owned(),
            latency,
            report: chunk.report.clone(),
            decision: None,
            ages,
        };
        AnswerMessage {
            session: 3,
            request: 7,
            chunk: Some(chunk),
            reports: vec![report],
            records: Vec::new(),
        }
    }

    #[test]
    fn an_answer_comes_back_bit_for_bit() {
        let sent = answer();
        let got: AnswerMessage = decode_policy(&encode_policy(&sent)).expect("our own bytes");
        let bits = |m: &AnswerMessage| -> Vec<u64> {
            m.chunk.iter().flat_map(|c| c.values()).map(|v| v.to_bits()).collect()
        };
        assert_eq!(
            bits(&got),
            bits(&sent),
            "a value that is no number stays one, for the scheduler to refuse"
        );
        assert_eq!(format!("{got:?}"), format!("{sent:?}"));
    }

    #[test]
    fn an_order_carries_its_plan() {
        let dt = Duration::from_millis(100);
        let mut plan = PlannedBlock::empty(Stamp(9), dt, 2);
        for k in 0..5 {
            let row = JointVec::from_slice(&[f64::from(k), -0.5]).expect("two joints");
            assert!(plan.push(&row));
        }
        let guide = Guide::Guided { mask: Default::default(), max_weight: 5.0, horizon: None };
        let deadline = Some(Stamp(70));
        let order = ChunkOrder { request: 2, at: Stamp(1), expected: Stamp(40), deadline, guide };
        let order = InferenceOrder { order, plan: Some(plan) };
        let sent = OrderMessage { session: 1, order, instruction: "put it there".to_owned() };
        assert_eq!(decode_policy(&encode_policy(&sent)), Ok(sent));
    }

    #[test]
    fn another_version_and_a_misshapen_chunk_are_refused_with_the_reason() {
        #[derive(Serialize)]
        struct Newer {
            version: u16,
            body: u8,
        }
        let mut bytes = Vec::new();
        ciborium::into_writer(&Newer { version: 9, body: 0 }, &mut bytes).expect("plain");
        let error = decode_policy::<AnswerMessage>(&bytes).expect_err("version 9");
        assert!(error.to_string().contains("version 9"), "{error}");

        #[derive(Serialize)]
        struct Chunk {
            request: u64,
            instant: Stamp,
            dt: Duration,
            dim: usize,
            actions: Vec<f64>,
            report: ChunkReport,
        }
        let (instant, dt) = (Stamp(0), Duration::from_millis(100));
        let chunk = Chunk {
            request: 1,
            instant,
            dt,
            dim: 3,
            actions: vec![0.0; 4],
            report: ChunkReport::default(),
        };
        #[derive(Serialize)]
        struct Answer {
            session: u64,
            request: u64,
            chunk: Chunk,
            reports: Vec<InferenceReport>,
        }
        let bytes = encode_policy(&Answer { session: 1, request: 1, chunk, reports: vec![] });
        let error = decode_policy::<AnswerMessage>(&bytes).expect_err("4 values by 3");
        assert!(error.to_string().contains("cut into actions of 3"), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(flips in prop::collection::vec((0usize..400, any::<u8>()), 1..8), cut in 0usize..400) {
            let mut bytes = encode_policy(&answer());
            for (at, value) in flips {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            bytes.truncate(cut.max(1));
            let _ = decode_policy::<AnswerMessage>(&bytes);
            let _ = decode_policy::<OrderMessage>(&bytes);
            let _ = decode_policy::<PolicyIntroduction>(&bytes);
        }
    }
}
