//! The policy, run again on what it saw.

use std::collections::{HashMap, VecDeque};

use sinew_runtime::blackbox::{Header, InferenceRecord, Steering};
use sinew_runtime::inference::{self, InferenceOrder};
use sinew_runtime::{
    ActionChunk, ActionKind, CameraFrame, ChunkRequest, Observation, ObservedImage, Policy,
    PolicyError, Progress,
};

use crate::run::Renamed;

/// Frames of a camera that are kept: more than a policy's slowest answer at 60 Hz.
const KEPT: usize = 256;

/// The frames read last, by camera.
#[derive(Default)]
pub(super) struct Frames {
    cameras: HashMap<String, VecDeque<CameraFrame>>,
}

impl Frames {
    /// Keeps `frame`.
    pub fn push(&mut self, camera: String, frame: CameraFrame) {
        let frames = self.cameras.entry(camera).or_default();
        if frames.len() == KEPT {
            frames.pop_front();
        }
        frames.push_back(frame);
    }

    /// The frame of `camera` with the number `sequence`, of which a recording keeps 32 bits.
    fn get(&self, camera: &str, sequence: u64) -> Option<CameraFrame> {
        let same = |f: &&CameraFrame| f.sequence as u32 == sequence as u32;
        let found = self.cameras.get(camera)?.iter().rev().find(same)?;
        Some(CameraFrame { sequence, ..found.clone() })
    }
}

/// The recorded policy.
pub(super) struct Again {
    policy: Renamed,
    kinds: Vec<ActionKind>,
}

/// An inference made again: the request as it was computed, and what came out; no chunk when it had been dropped.
pub(super) struct Made {
    pub request: ChunkRequest,
    pub chunk: Result<Option<ActionChunk>, PolicyError>,
}

impl Again {
    /// `policy`, seeing the cameras as in the run of `header`.
    pub fn new(policy: Box<dyn Policy>, header: &Header) -> Self {
        let kinds = header.control.scheduler.joints.iter().map(|j| j.kind).collect();
        let policy = Renamed::new(policy, header.views.clone());
        Self { policy: policy.with_prompt(super::prompt(header)), kinds }
    }

    /// Does the inference of `record` again, answering `order` as the core gave it now.
    ///
    /// # Errors
    /// A frame that the recording lacks.
    pub fn repeat(
        &mut self,
        record: &InferenceRecord,
        order: Option<&InferenceOrder>,
        frames: &Frames,
    ) -> Result<Made, String> {
        let mut seen = observation(record, frames)?;
        let mut request = record.request.clone();
        if let Some(InferenceOrder { order, plan }) = order {
            let dt = self.policy.spec().dt();
            let own = inference::prepare(order, plan.as_ref(), &mut seen, dt, &self.kinds);
            (request.id, request.prefix) = (own.id, own.prefix);
        }
        let chunk = self.steered(&seen, &request, &record.steering);
        Ok(Made { request, chunk: chunk.map(|c| c.map(|c| self.absolute(c, &seen))) })
    }

    /// Begins the inference of `record`, which made no chunk that counted: policies that keep something from one inference
    /// to the next know of it. `made`: it was ended all the same.
    pub fn drop(&mut self, record: &InferenceRecord, frames: &Frames, made: bool) {
        let Ok(seen) = observation(record, frames) else { return };
        // What it makes is of no interest, and neither is why it makes nothing.
        match made {
            true => drop(self.steered(&seen, &record.request, &record.steering)),
            false => drop(self.policy.begin(&seen, &record.request)),
        }
    }

    /// Answers `order` from `seen`, with `steps` denoise steps and noise of `seed`.
    ///
    /// # Errors
    /// What the policy gave.
    pub fn answer(
        &mut self,
        InferenceOrder { order, plan }: &InferenceOrder,
        mut seen: Observation,
        steps: Option<usize>,
        seed: u64,
    ) -> Result<ActionChunk, PolicyError> {
        let spec = self.policy.spec();
        let (dt, steps) = (spec.dt(), steps.unwrap_or(spec.denoise_steps));
        let request = inference::prepare(order, plan.as_ref(), &mut seen, dt, &self.kinds);
        let request = ChunkRequest { denoise_steps: Some(steps), seed, ..request };
        let chunk = inference::run(&mut self.policy, &seen, &request)?;
        Ok(self.absolute(chunk, &seen))
    }

    /// The request that `order` makes of the observation of `record`.
    pub fn request(
        &self,
        record: &InferenceRecord,
        InferenceOrder { order, plan }: &InferenceOrder,
    ) -> ChunkRequest {
        let mut seen = without_images(record);
        let dt = self.policy.spec().dt();
        let own = inference::prepare(order, plan.as_ref(), &mut seen, dt, &self.kinds);
        ChunkRequest { prefix: own.prefix, ..record.request.clone() }
    }

    fn absolute(&self, mut chunk: ActionChunk, seen: &Observation) -> ActionChunk {
        chunk.make_absolute(&self.kinds, &seen.proprioception);
        chunk
    }

    /// One inference, changed under way as `steering` says.
    fn steered(
        &mut self,
        seen: &Observation,
        request: &ChunkRequest,
        steering: &[Steering],
    ) -> Result<Option<ActionChunk>, PolicyError> {
        self.policy.begin(seen, request)?;
        let mut steering = steering.iter().peekable();
        for done in 1usize.. {
            if self.policy.advance()? == Progress::Done {
                break;
            }
            while let Some(turn) = steering.peek() {
                match **turn {
                    Steering::Steps { after, steps } if after == done => {
                        self.policy.set_denoise_steps(steps)?;
                    }
                    Steering::Finish { after } if after == done => {
                        if self.policy.finish_early()? {
                            return self.policy.take_chunk().map(Some);
                        }
                    }
                    _ => break,
                }
                steering.next();
            }
        }
        self.policy.take_chunk().map(Some)
    }
}

/// What `record` says was seen, its frames left out.
fn without_images(record: &InferenceRecord) -> Observation {
    let seen = &record.observation;
    Observation {
        instant: seen.instant,
        images: Vec::new(),
        proprioception: seen.proprioception.iter().map(|v| v.unwrap_or(f64::NAN)).collect(),
        proprioception_age: seen.proprioception_age,
        instruction: seen.instruction.clone(),
    }
}

/// What `record` says was seen.
///
/// # Errors
/// A frame that the recording lacks.
pub(super) fn observation(
    record: &InferenceRecord,
    frames: &Frames,
) -> Result<Observation, String> {
    let mut seen = without_images(record);
    for image in &record.observation.images {
        let frame = frames.get(&image.camera, image.sequence).ok_or_else(|| {
            format!(
                "frame {} of camera `{}`, which inference {} saw, is not in the recording",
                image.sequence, image.camera, record.request.id
            )
        })?;
        seen.images.push(ObservedImage { camera: image.camera.clone(), frame, age: image.age });
    }
    Ok(seen)
}
