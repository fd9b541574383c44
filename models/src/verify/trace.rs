//! Running one form of a policy, with the outputs of its stages where the family gives them.

use std::sync::Arc;

use sinew_runtime::{ChunkRequest, Observation, PolicyError, inference};

use crate::checkpoint::Checkpoint;
use crate::kernels::Matrix;
use crate::smolvla::{self, EulerSampler, SmolVla, SmolVlaConfig, gaussian_noise};
use crate::xvla::{self, CleanSampler, Xvla, XvlaConfig};
use crate::{LoadOptions, ModelError};

/// Actions in physical units, and every stage's values under its name.
pub(super) type Outcome = (Vec<f64>, Vec<(String, Matrix)>);

/// Runs a policy on an observation, from noise of a seed.
type Run = dyn FnMut(&Observation, u64) -> Result<Outcome, ModelError>;

/// One form of a policy.
pub(super) struct Subject(Box<Run>);

impl Subject {
    /// The policy of `checkpoint`, with its stages where the family gives them.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        match checkpoint.family.name {
            "smolvla" => {
                let model = SmolVla::load(checkpoint)?;
                let mut preparer = smolvla::Preparer::new(checkpoint, 0)?;
                let steps = SmolVlaConfig::of(checkpoint)?.num_steps;
                Ok(Self(Box::new(move |observation, seed| {
                    run_smolvla(&model, &mut preparer, observation, seed, steps)
                })))
            }
            "xvla" => {
                let config = XvlaConfig::of(checkpoint)?;
                let model = Xvla::load(checkpoint, &config)?;
                let mut preparer = xvla::Preparer::new(checkpoint, &config, 0)?;
                let steps = config.num_denoising_steps;
                Ok(Self(Box::new(move |observation, seed| {
                    run_xvla(&model, &mut preparer, observation, seed, steps)
                })))
            }
            _ => Self::whole(checkpoint),
        }
    }

    /// The policy of `checkpoint`, without its stages.
    pub fn whole(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        // The time between two actions does not enter the comparison.
        let rate = checkpoint.actions.action_rate_hz.unwrap_or(1.0);
        let options = LoadOptions { action_rate_hz: Some(rate), ..LoadOptions::default() };
        let mut policy = (checkpoint.family.load)(checkpoint, &options)?;
        Ok(Self(Box::new(move |observation, seed| {
            let request = ChunkRequest { seed, ..ChunkRequest::default() };
            let chunk = inference::run(policy.as_mut(), observation, &request);
            Ok((chunk.map_err(compute)?.values().to_vec(), Vec::new()))
        })))
    }

    /// What was made before, one result after the other.
    pub fn recorded(actions: Vec<Vec<f64>>) -> Self {
        let mut actions = actions.into_iter();
        Self(Box::new(move |_, _| Ok((actions.next().unwrap_or_default(), Vec::new()))))
    }

    /// What it makes of `observation`, from noise of `seed`.
    pub fn run(&mut self, observation: &Observation, seed: u64) -> Result<Outcome, ModelError> {
        (self.0)(observation, seed)
    }
}

fn compute(error: PolicyError) -> ModelError {
    ModelError::Compute(candle_core::Error::Msg(error.to_string()))
}

fn run_smolvla(
    model: &SmolVla,
    preparer: &mut smolvla::Preparer,
    observation: &Observation,
    seed: u64,
    steps: usize,
) -> Result<Outcome, ModelError> {
    let inputs = preparer.prepare(observation).map_err(compute)?;
    let mut stages = Vec::new();
    let mut tokens = Vec::new();
    for (i, pixels) in inputs.pixels.iter().enumerate() {
        let features = model.encode_image(pixels)?;
        stages.push((format!("vision camera {}", i + 1), features.last_hidden));
        stages.push((format!("connector camera {}", i + 1), features.tokens.clone()));
        tokens.push(Arc::new(features.tokens));
    }
    let embeddings = model.embed_prefix(&tokens, inputs.dummies, &inputs.tokens, &inputs.state)?;
    let prefix = model.prefill(embeddings)?;
    for (i, layer) in prefix.layers.iter().enumerate() {
        stages.push((format!("prefix layer {i} keys"), layer.keys.clone()));
        stages.push((format!("prefix layer {i} values"), layer.values.clone()));
    }
    let cache = model.prepare(&prefix)?;
    let (rows, width) = model.sample_shape();
    let noise = gaussian_noise(seed, rows * width);
    let mut sampler = EulerSampler::new(noise, (rows, width), steps)?;
    while !sampler.is_done() {
        let velocity = model.velocity(&cache, sampler.sample(), &[sampler.flow_time()])?;
        stages.push((format!("denoise step {}", sampler.done() + 1), velocity.clone()));
        sampler.step(velocity)?;
    }
    Ok((preparer.actions(sampler.sample()).map_err(compute)?, stages))
}

fn run_xvla(
    model: &Xvla,
    preparer: &mut xvla::Preparer,
    observation: &Observation,
    seed: u64,
    steps: usize,
) -> Result<Outcome, ModelError> {
    let inputs = preparer.prepare(observation).map_err(compute)?;
    let mut stages = Vec::new();
    let mut images = Vec::new();
    for (i, pixels) in inputs.pixels.iter().enumerate() {
        let features = model.encode_image(pixels)?;
        stages.push((format!("vision camera {}", i + 1), features.last_hidden));
        stages.push((format!("projector camera {}", i + 1), features.tokens.clone()));
        images.push(Arc::new(features.tokens));
    }
    let features = model.encode(&images, &inputs.tokens)?;
    stages.push(("encoder".to_owned(), features.encoded.clone()));
    let (cache, state) = (model.prepare(&features)?, model.pad_state(&inputs.state));
    let (rows, width) = model.sample_shape();
    let noise = gaussian_noise(seed, rows * width);
    let mut sampler = CleanSampler::new(noise, (rows, width), steps)?;
    while !sampler.is_done() {
        let clean = model.predict(&cache, &sampler.sample()?, &state, sampler.time())?;
        stages.push((format!("denoise step {}", sampler.done() + 1), clean.clone()));
        sampler.step(clean);
    }
    Ok((model.actions(sampler.clean(), preparer.boundary()).map_err(compute)?, stages))
}
