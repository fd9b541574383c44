//! From an observation to the graphs' inputs.

use std::path::Path;
use std::time::Duration;

use sinew_runtime::{ChunkRequest, Observation, PolicyError, Stamp};

use super::binding::{Inputs, check_type, find, fit};
use super::flow::place;
use super::graph::{Array, Data, Element, Port};
use super::image::ImagePort;
use super::manifest::{InstructionInput, Manifest, Recurrent, normalizer};
use crate::ModelError;
use crate::anytime::compute;
use crate::heads::flow::gaussian_noise;
use crate::processors::{Normalizer, Prompter};

/// No instruction is longer (tokens).
const TOKEN_LIMIT: usize = 1 << 16;

/// Whole numbers, as token ids come.
const WHOLE: [Element; 2] = [Element::Int64, Element::Int32];

/// Joint values with their units and normalisation.
pub(super) struct JointPort {
    pub input: String,
    shape: Vec<usize>,
    degrees: Vec<bool>,
    normalizer: Normalizer,
}

impl JointPort {
    /// Binds `input`, the manifest's `key`, to values of one name each.
    pub fn new(
        path: &Path,
        key: &str,
        state: &super::manifest::StateInput,
        inputs: &mut Inputs<'_>,
    ) -> Result<Self, ModelError> {
        let (width, input_key) = (state.names.len(), format!("{key}.input"));
        let port = inputs.take(&input_key, &state.input, &[Element::Float32])?;
        Ok(Self {
            input: state.input.clone(),
            shape: fit(path, &input_key, port, &[Some(width)])?,
            degrees: state.units.degrees(path, key, width)?,
            normalizer: normalizer(path, key, width, state.normalization.as_ref())?,
        })
    }

    /// Number of values.
    pub fn width(&self) -> usize {
        self.degrees.len()
    }

    /// `values` (rad) as the graph's input.
    pub fn array(&self, values: &[f64]) -> Result<Array, PolicyError> {
        if values.len() != self.width() {
            return Err(PolicyError::StateWidth { expected: self.width(), found: values.len() });
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(PolicyError::NotFinite { what: "state" });
        }
        let value = |(dim, (v, degrees)): (usize, (&f64, &bool))| {
            let v = if *degrees { v.to_degrees() } else { *v };
            self.normalizer.normalize(dim, v as f32)
        };
        let values = values.iter().zip(&self.degrees).enumerate().map(value).collect();
        Ok(Array::floats(self.shape.clone(), values))
    }
}

/// The instruction's inputs.
struct TextPort {
    ids: String,
    mask: Option<(String, Element)>,
    /// How many dimensions the ids have; the last is the length.
    rank: usize,
    length: usize,
    pad_token: Option<i64>,
    prompter: Prompter,
}

impl TextPort {
    fn new(
        path: &Path,
        text: &InstructionInput,
        inputs: &mut Inputs<'_>,
    ) -> Result<Self, ModelError> {
        let key = "instruction.input";
        let port = inputs.take(key, &text.input, &WHOLE)?;
        let shape = fit(path, key, port, &[text.length])?;
        let length = shape.last().copied().unwrap_or(0);
        if length > TOKEN_LIMIT {
            let reason = format!("is {length}, at most {TOKEN_LIMIT} tokens are usable");
            return Err(ModelError::config(path, "instruction.length", reason));
        }
        let fixed =
            port.shape.as_ref().is_some_and(|shape| shape.last().is_some_and(|n| n.is_some()));
        if fixed && text.pad_token.is_none() {
            let reason = format!("is missing, and the model always takes {length} tokens ({port})");
            return Err(ModelError::config(path, "instruction.pad_token", reason));
        }
        let mask = text.mask.as_ref().map(|name| {
            let key = "instruction.mask";
            let allowed = [Element::Bool, Element::Int64, Element::Int32, Element::Float32];
            let port = inputs.take(key, name, &allowed)?;
            let size = fixed.then_some(length).or(text.length);
            fit(path, key, port, &[size])?;
            Ok::<_, ModelError>((name.clone(), port.element))
        });
        let file = path.with_file_name("").join(&text.tokenizer);
        if !file.is_file() {
            let remedy =
                "the manifest's [instruction] names it; copy the tokenizer.json there".into();
            return Err(ModelError::FileMissing { path: file, remedy });
        }
        let json = std::fs::read(&file).map_err(|e| ModelError::io(&file, e))?;
        Ok(Self {
            ids: text.input.clone(),
            mask: mask.transpose()?,
            rank: shape.len(),
            length,
            pad_token: text.pad_token,
            prompter: Prompter::new(&file, &json, length, text.append_newline)?,
        })
    }

    fn arrays(
        &mut self,
        instruction: &str,
        out: &mut Vec<(String, Array)>,
    ) -> Result<(), PolicyError> {
        let ids = self.prompter.encode(instruction).map_err(compute)?;
        let mut ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let mut mask = vec![1; ids.len()];
        if let Some(pad) = self.pad_token {
            ids.resize(self.length, pad);
            mask.resize(self.length, 0);
        }
        let mut shape = vec![1; self.rank];
        if let Some(last) = shape.last_mut() {
            *last = ids.len();
        }
        if let Some((name, element)) = &self.mask {
            let data = match element {
                Element::Float32 => Data::Float(mask.iter().map(|v| *v as f32).collect()),
                _ => Data::Int(mask),
            };
            out.push((name.clone(), Array { shape: shape.clone(), data }));
        }
        out.push((self.ids.clone(), Array { shape, data: Data::Int(ids) }));
        Ok(())
    }
}

/// A state that goes from one inference to the next.
pub(super) struct Memory {
    input: String,
    /// Place of its output.
    pub output: usize,
    zero: Array,
    value: Array,
    /// Instant of the observation that it comes from.
    from: Option<Stamp>,
    pause: Duration,
}

impl Memory {
    fn new(
        path: &Path,
        recurrent: &Recurrent,
        inputs: &mut Inputs<'_>,
        outputs: &[Port],
    ) -> Result<Self, ModelError> {
        let (input, output) = (&recurrent.input, &recurrent.output);
        let any = [Element::Float32, Element::Int64, Element::Int32, Element::Bool, Element::Uint8];
        let port = inputs.take("recurrent.input", input, &any)?;
        let key = "recurrent.output";
        let next = find(path, key, "output", output, outputs.iter())?;
        check_type(path, key, next, &[port.element])?;
        let sizes = |port: &Port| -> Option<Vec<usize>> {
            Some(port.shape.as_ref()?.iter().map(|size| size.unwrap_or(1)).collect())
        };
        let shape = sizes(port).unwrap_or_else(|| vec![1]);
        if sizes(next).is_some_and(|next| next != shape) {
            let reason = format!("is `{output}` ({next}), but the input `{input}` is {port}");
            return Err(ModelError::config(path, key, reason));
        }
        let shape =
            fit(path, "recurrent.input", port, &shape.into_iter().map(Some).collect::<Vec<_>>())?;
        let zero = Array::zeros(shape, port.element);
        let output = place(outputs, output);
        let pause = recurrent.pause(path)?;
        Ok(Self { input: input.clone(), output, value: zero.clone(), zero, from: None, pause })
    }

    /// What the inference of the observation of `instant` begins with.
    fn at(&self, instant: Stamp) -> &Array {
        let kept =
            self.from.is_some_and(|from| instant >= from && instant.since(from) <= self.pause);
        if kept { &self.value } else { &self.zero }
    }

    /// Keeps `value`, computed from the observation of `instant`.
    pub fn keep(&mut self, value: Array, instant: Stamp) {
        (self.value, self.from) = (value, Some(instant));
    }

    /// Whether `value` can be the next input.
    pub fn takes(&self, value: &Array) -> bool {
        value.shape == self.zero.shape
            && std::mem::discriminant(&value.data) == std::mem::discriminant(&self.zero.data)
    }
}

/// Everything that the graphs are fed from outside, checked against them.
pub(super) struct Preparer {
    pub images: Vec<ImagePort>,
    pub state: Option<JointPort>,
    instruction: Option<TextPort>,
    /// Input, shape and deviation.
    noise: Option<(String, Vec<usize>, f32)>,
    pub memories: Vec<Memory>,
}

impl Preparer {
    /// Binds the inputs of `manifest`; `outputs` are the first graph's.
    pub fn new(
        path: &Path,
        manifest: &Manifest,
        inputs: &mut Inputs<'_>,
        outputs: &[Port],
    ) -> Result<Self, ModelError> {
        let state = manifest.state.as_ref();
        let state = state.map(|state| JointPort::new(path, "state", state, inputs)).transpose()?;
        let mut images = Vec::with_capacity(manifest.images.len());
        for (camera, image) in &manifest.images {
            images.push(ImagePort::new(path, camera, image, inputs)?);
        }
        let text = manifest.instruction.as_ref();
        let instruction = text.map(|text| TextPort::new(path, text, inputs)).transpose()?;
        let noise = manifest.noise.as_ref().map(|noise| {
            let port = inputs.take("noise.input", &noise.input, &[Element::Float32])?;
            let own = port.shape.clone().unwrap_or_default();
            // The batch is the one size that nobody writes down.
            let own: Vec<_> =
                own.into_iter().skip_while(|size| size.is_none_or(|n| n == 1)).collect();
            let wanted = noise.shape.as_ref().map(|shape| shape.iter().map(|n| Some(*n)).collect());
            let shape = fit(path, "noise.input", port, &wanted.unwrap_or(own))?;
            check_scale(path, "noise.scale", noise.scale)?;
            Ok::<_, ModelError>((noise.input.clone(), shape, noise.scale))
        });
        let memories = manifest.recurrent.iter().map(|r| Memory::new(path, r, inputs, outputs));
        let memories = memories.collect::<Result<_, _>>()?;
        Ok(Self { images, state, instruction, noise: noise.transpose()?, memories })
    }

    /// The inputs of `observation`, by name; the noise from `request`'s seed, or `noise` where given.
    pub fn prepare(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
        noise: Option<Vec<f32>>,
    ) -> Result<Vec<(String, Array)>, PolicyError> {
        let mut out = Vec::new();
        if let Some(state) = &self.state {
            out.push((state.input.clone(), state.array(&observation.proprioception)?));
        }
        for port in &self.images {
            let seen = observation.images.iter().find(|image| image.camera == port.camera);
            let seen =
                seen.ok_or_else(|| PolicyError::MissingCamera { camera: port.camera.clone() })?;
            out.push((port.input.clone(), port.array(&seen.frame.image)?));
        }
        if let Some(text) = &mut self.instruction {
            text.arrays(&observation.instruction, &mut out)?;
        }
        if let Some((input, shape, scale)) = &self.noise {
            let values = scaled_noise(noise, request.seed, shape.iter().product(), *scale)?;
            out.push((input.clone(), Array::floats(shape.clone(), values)));
        }
        for memory in &self.memories {
            out.push((memory.input.clone(), memory.at(observation.instant).clone()));
        }
        Ok(out)
    }
}

/// `given`, or else `count` values of `seed` with the standard deviation `scale`.
pub(super) fn scaled_noise(
    given: Option<Vec<f32>>,
    seed: u64,
    count: usize,
    scale: f32,
) -> Result<Vec<f32>, PolicyError> {
    match given {
        Some(noise) if noise.len() == count => Ok(noise),
        Some(noise) => Err(PolicyError::Compute(format!(
            "the noise has {} values, the model takes {count}",
            noise.len()
        ))),
        None => Ok(gaussian_noise(seed, count).into_iter().map(|v| v * scale).collect()),
    }
}

/// Checks a standard deviation of noise.
pub(super) fn check_scale(path: &Path, key: &str, scale: f32) -> Result<(), ModelError> {
    if (0.0..=10.0).contains(&scale) {
        return Ok(());
    }
    Err(ModelError::config(path, key, format!("is {scale}, expected 0 to 10")))
}
