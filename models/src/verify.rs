//! How far two forms of one policy differ, and where that begins.
//!
//! Both get the same random but plausible observations and the same starting noise. Besides the actions, the
//! outputs of the stages are compared in the order of the computation: vision tower per camera, keys and
//! values per text layer, velocity per denoise step.

use std::path::Path;

use candle_core::Tensor;
use serde::Serialize;
use sinew_runtime::{CameraFrame, Image, Observation, ObservedImage, PolicyError, Stamp};

use crate::ModelError;
use crate::checkpoint::Checkpoint;
use crate::processors::NormMode;
use crate::random::SplitMix64;
use crate::smolvla::{EulerSampler, Preparer, SmolVla, SmolVlaConfig, gaussian_noise};

/// Relative error (RMS) from which a stage counts as differing.
pub const STAGE_THRESHOLD: f64 = 0.05;

const INSTRUCTIONS: [&str; 4] = [
    "Pick up the red cube and place it in the bin.",
    "Open the top drawer",
    "push the button",
    "Move the blue block to the left, then stack it on the green one.",
];

/// How two forms of one policy differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Inputs that were compared.
    pub cases: usize,
    /// Mean action error as a share of the action range.
    pub mean_relative: f64,
    /// Largest action error as a share of the action range.
    pub max_relative: f64,
    /// Mean action error, in the action's own unit.
    pub mean_absolute: f64,
    /// Largest action error, in the action's own unit.
    pub max_absolute: f64,
    /// The same for each dimension of the action.
    pub dimensions: Vec<DimensionError>,
    /// Relative error (RMS over all cases) of each stage, in the order of the computation.
    pub stages: Vec<StageError>,
    /// The first stage whose error is above [`STAGE_THRESHOLD`].
    pub first_differing: Option<String>,
}

/// Error of one dimension of the action.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DimensionError {
    /// Joint name, or the index.
    pub name: String,
    /// Range of the dimension: by the statistics, or as the first policy used it.
    pub range: f64,
    /// Mean error.
    pub mean: f64,
    /// Largest error.
    pub max: f64,
}

/// Error of one stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageError {
    /// Stage, such as `vision`, `prefix layer 3 keys`, `denoise step 2`.
    pub stage: String,
    /// RMS of the difference over RMS of the first policy's values.
    pub relative: f64,
}

/// Actions in physical units, and every stage's values under its name.
type Outcome = (Vec<f64>, Vec<(String, Tensor)>);

struct Subject {
    model: SmolVla,
    preparer: Preparer,
}

impl Subject {
    fn load(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Ok(Self { model: SmolVla::load(checkpoint)?, preparer: Preparer::new(checkpoint, 0)? })
    }

    fn run(
        &mut self,
        observation: &Observation,
        noise: Vec<f32>,
        steps: usize,
    ) -> Result<Outcome, ModelError> {
        let inputs = self.preparer.prepare(observation).map_err(compute)?;
        let mut stages = Vec::new();
        let mut tokens = Vec::new();
        for (i, pixels) in inputs.pixels.iter().enumerate() {
            let features = self.model.encode_image(pixels)?;
            stages.push((format!("vision camera {}", i + 1), features.last_hidden));
            stages.push((format!("connector camera {}", i + 1), features.tokens.clone()));
            tokens.push(features.tokens);
        }
        let embeddings =
            self.model.embed_prefix(&tokens, inputs.dummies, &inputs.tokens, &inputs.state)?;
        let prefix = self.model.prefill(&embeddings)?;
        for (i, (keys, values)) in prefix.layers.iter().enumerate() {
            stages.push((format!("prefix layer {i} keys"), keys.clone()));
            stages.push((format!("prefix layer {i} values"), values.clone()));
        }
        let cache = self.model.prepare(&prefix)?;
        let mut sampler = EulerSampler::new(noise, self.model.sample_shape(), steps)?;
        while !sampler.is_done() {
            let velocity = self.model.velocity(&cache, sampler.sample(), &[sampler.time()])?;
            stages.push((format!("denoise step {}", sampler.done() + 1), velocity.clone()));
            sampler.step(&velocity)?;
        }
        let actions = self.preparer.actions(sampler.sample()).map_err(compute)?;
        Ok((actions, stages))
    }
}

fn compute(error: PolicyError) -> ModelError {
    ModelError::Compute(candle_core::Error::Msg(error.to_string()))
}

/// Squared difference and squared size of one stage, summed over the cases.
struct StageSum {
    stage: String,
    difference: f64,
    size: f64,
}

/// Compares the policies at `a` and `b` (folders or bundles) on `cases` inputs of `seed`.
///
/// # Errors
/// [`ModelError::NotComparable`] when they are not forms of one policy; what loading or running gives.
pub fn verify(a: &Path, b: &Path, cases: usize, seed: u64) -> Result<VerifyReport, ModelError> {
    let (one, other) = (Checkpoint::open(a, true)?, Checkpoint::open(b, true)?);
    comparable(&one, &other)?;
    let steps = SmolVlaConfig::of(&one)?;
    let (mut first, mut second) = (Subject::load(&one)?, Subject::load(&other)?);
    let mut random = SplitMix64::new(seed);
    let (rows, width) = first.model.sample_shape();
    let dim = first.preparer.boundary().action_dim();
    let cases = cases.max(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut sums: Vec<StageSum> = Vec::new();
    for case in 0..cases {
        let observation = observation(&one, &first.preparer, case, &mut random)?;
        let noise = gaussian_noise(random.next_u64(), rows * width);
        let steps = steps.num_steps;
        let (actions_a, stages_a) = first.run(&observation, noise.clone(), steps)?;
        let (actions_b, stages_b) = second.run(&observation, noise, steps)?;
        ours.extend(actions_a);
        theirs.extend(actions_b);
        for (index, ((stage, x), (_, y))) in stages_a.into_iter().zip(stages_b).enumerate() {
            let square = |t: Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
            let (difference, size) = (square((&x - &y)?)?, square(x)?);
            if sums.len() <= index {
                sums.push(StageSum { stage, difference: 0.0, size: 0.0 });
            }
            sums[index].difference += difference;
            sums[index].size += size;
        }
    }
    let ranges = ranges(&one, dim, &ours);
    let stages: Vec<StageError> = sums
        .into_iter()
        .map(|s| StageError {
            stage: s.stage,
            relative: (s.difference / s.size.max(f64::MIN_POSITIVE)).sqrt(),
        })
        .collect();
    let first_differing =
        stages.iter().find(|s| s.relative > STAGE_THRESHOLD).map(|s| s.stage.clone());
    Ok(report(cases, &one.actions.action_names, &ranges, &ours, &theirs, stages, first_differing))
}

fn report(
    cases: usize,
    names: &[String],
    ranges: &[f64],
    ours: &[f64],
    theirs: &[f64],
    stages: Vec<StageError>,
    first_differing: Option<String>,
) -> VerifyReport {
    let dim = ranges.len();
    let dimensions: Vec<DimensionError> = ranges
        .iter()
        .enumerate()
        .map(|(d, range)| {
            let errors = ours.iter().zip(theirs).skip(d).step_by(dim).map(|(a, b)| (a - b).abs());
            let count = (ours.len() / dim).max(1) as f64;
            DimensionError {
                name: names.get(d).cloned().unwrap_or_else(|| d.to_string()),
                range: *range,
                mean: errors.clone().sum::<f64>() / count,
                max: errors.fold(0.0, f64::max),
            }
        })
        .collect();
    let mean = |f: fn(&DimensionError) -> f64| dimensions.iter().map(f).sum::<f64>() / dim as f64;
    let max = |f: fn(&DimensionError) -> f64| dimensions.iter().map(f).fold(0.0, f64::max);
    VerifyReport {
        cases,
        mean_relative: mean(|d| d.mean / d.range),
        max_relative: max(|d| d.max / d.range),
        mean_absolute: mean(|d| d.mean),
        max_absolute: max(|d| d.max),
        dimensions,
        stages,
        first_differing,
    }
}

fn comparable(a: &Checkpoint, b: &Checkpoint) -> Result<(), ModelError> {
    let differ = |what: &'static str, a: String, b: String| {
        if a == b { Ok(()) } else { Err(ModelError::NotComparable { what, a, b }) }
    };
    differ("type", a.family.name.to_owned(), b.family.name.to_owned())?;
    let cameras =
        |c: &Checkpoint| c.features.cameras().map(|(key, _)| key).collect::<Vec<_>>().join(", ");
    differ("cameras", cameras(a), cameras(b))?;
    let dims = |c: &Checkpoint| {
        Ok::<_, ModelError>((c.features.state_dim(&c.path)?, c.features.action_dim(&c.path)?))
    };
    let ((state_a, action_a), (state_b, action_b)) = (dims(a)?, dims(b)?);
    differ("state width", state_a.to_string(), state_b.to_string())?;
    differ("action width", action_a.to_string(), action_b.to_string())?;
    let sizes = |c: &Checkpoint| (c.family.sizes)(c).map(|s| s.to_string());
    differ("sizes", sizes(a)?, sizes(b)?)
}

/// Range of each action dimension: by the statistics, else as `actions` spread.
fn ranges(checkpoint: &Checkpoint, dim: usize, actions: &[f64]) -> Vec<f64> {
    let statistics = &checkpoint.postprocessor.statistics;
    let known = |stat: &str, d: usize| {
        statistics.get(&format!("action.{stat}")).and_then(|v| v.get(d)).map(|v| f64::from(*v))
    };
    let unit = |d: usize| {
        let degrees = checkpoint.actions.action_units.get(d).is_some_and(|u| u == "deg");
        if degrees { std::f64::consts::PI / 180.0 } else { 1.0 }
    };
    (0..dim)
        .map(|d| {
            let spread = actions.iter().skip(d).step_by(dim);
            let low = spread.clone().fold(f64::INFINITY, |m, v| m.min(*v));
            let high = spread.fold(f64::NEG_INFINITY, |m, v| m.max(*v));
            let stated =
                known("max", d).zip(known("min", d)).map(|(max, min)| (max - min) * unit(d));
            stated.filter(|r| *r > 1e-9 && r.is_finite()).unwrap_or((high - low).max(1e-9))
        })
        .collect()
}

/// A made-up observation: soft gradients with grain, a state within its statistics.
fn observation(
    checkpoint: &Checkpoint,
    preparer: &Preparer,
    case: usize,
    random: &mut SplitMix64,
) -> Result<Observation, ModelError> {
    let stamp = Stamp(0);
    let shapes = checkpoint.features.cameras();
    let mut images = Vec::new();
    for (camera, (_, shape)) in preparer.boundary().cameras().into_iter().zip(shapes) {
        let (height, width) = match shape {
            [_, h, w] if (1..=4096).contains(h) && (1..=4096).contains(w) => (*h, *w),
            _ => (256, 256),
        };
        let image = image(width, height, random)
            .map_err(|e| ModelError::Compute(candle_core::Error::Msg(e.to_string())))?;
        let frame = CameraFrame { stamp, sequence: 1, image };
        images.push(ObservedImage { camera, frame, age: Default::default() });
    }
    let (state, _) = preparer.boundary().normalizers();
    let (low, high) = state.statistics();
    let proprioception = (0..preparer.boundary().state_dim())
        .map(|d| match state.mode() {
            NormMode::Identity => f64::from(random.bell()),
            NormMode::MeanStd => f64::from(low[d] + high[d] * random.bell()),
            _ => f64::from(low[d]) + f64::from(high[d] - low[d]) * random.open_unit(),
        })
        .zip(0..)
        .map(|(value, d)| {
            let degrees = checkpoint.actions.action_units.get(d).is_some_and(|u| u == "deg");
            if degrees { value.to_radians() } else { value }
        })
        .collect();
    Ok(Observation {
        instant: stamp,
        images,
        proprioception,
        proprioception_age: Default::default(),
        instruction: INSTRUCTIONS[case % INSTRUCTIONS.len()].to_owned(),
    })
}

fn image(
    width: usize,
    height: usize,
    random: &mut SplitMix64,
) -> Result<Image, sinew_runtime::ImageShapeError> {
    let waves: Vec<[f64; 4]> = (0..3).map(|_| [(); 4].map(|()| random.open_unit())).collect();
    let mut data = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            let grain = f64::from(random.bell()) * 6.0;
            for [across, down, phase, level] in &waves {
                let (u, v) = (x as f64 / width as f64, y as f64 / height as f64);
                let wave = (6.0 * (across * u + down * v) + 6.3 * phase).sin();
                data.push((127.0 + 80.0 * wave + 40.0 * (level - 0.5) + grain) as u8);
            }
        }
    }
    Image::new(width, height, data.into())
}
