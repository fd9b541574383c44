//! An ONNX policy as an anytime task.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Prefix, PrefixSupport,
    PrefixUse, Progress,
};

use super::actions::ActionDecoder;
use super::binding::{Inputs, check_type, find};
use super::flow::{FlowHead, place};
use super::graph::{Array, Element, Graph, Port, open_graph};
use super::inputs::{Preparer, scaled_noise};
use super::manifest::{MANIFEST, Manifest};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, STEP_LIMIT, Ticket, compute, steps};
use crate::heads::flow::{EulerSampler, Guidance};
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 3] = ["preprocess", "network", "denoise"];
const NETWORK: usize = 1;
const DENOISE: usize = 2;

/// The sampling of a head in two graphs.
struct Sampling {
    sampler: EulerSampler,
    guidance: Option<Guidance>,
    /// What every step is fed; known once the first graph has run.
    context: Option<Vec<(String, Array)>>,
}

struct Run {
    ticket: Ticket<3>,
    inputs: Vec<(String, Array)>,
    sampling: Option<Sampling>,
    /// The network's actions.
    actions: Option<Array>,
    /// The next inference's states.
    memories: Vec<Array>,
}

/// A policy that an ONNX file computes: one step for the graph, or one for its first graph and one per denoise
/// step.
pub struct OnnxPolicy {
    graph: Box<dyn Graph>,
    preparer: Preparer,
    decoder: ActionDecoder,
    /// Place of the actions among the graph's outputs.
    output: usize,
    flow: Option<FlowHead>,
    spec: PolicySpec,
    run: Option<Run>,
    noise: Option<Vec<f32>>,
}

/// The manifest of `path`: the file itself, or the one in the folder.
pub fn manifest_of(path: &Path) -> Option<PathBuf> {
    let file = if path.is_dir() { path.join(MANIFEST) } else { path.to_owned() };
    let named = file.extension().is_some_and(|extension| extension == "toml");
    (named && file.is_file()).then_some(file)
}

impl OnnxPolicy {
    /// Loads the policy of the manifest `path`.
    ///
    /// # Errors
    /// [`ModelError`] naming the manifest's key and what the ONNX file has instead.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let manifest = Manifest::read(path)?;
        let file = |name: &Path| path.with_file_name("").join(name);
        let graph = open_graph(&file(&manifest.model), &options.onnx)?;
        let step = manifest.flow.as_ref().map(|flow| open_graph(&file(&flow.model), &options.onnx));
        Self::bind(path, &manifest, graph, step.transpose()?, options)
    }

    fn bind(
        path: &Path,
        manifest: &Manifest,
        graph: Box<dyn Graph>,
        step: Option<Box<dyn Graph>>,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        let step_ports = step.as_ref().map_or(Vec::new(), |step| step.inputs().to_vec());
        // An input that both graphs have is one thing, fed to both.
        let extra =
            step_ports.iter().filter(|port| place(graph.inputs(), &port.name) == usize::MAX);
        let mut inputs = Inputs::new(path, graph.inputs().iter().chain(extra));
        let preparer = Preparer::new(path, manifest, &mut inputs, graph.outputs())?;
        let action = &manifest.action;
        let (decoder, output, flow) = match (&manifest.flow, step, &action.output) {
            (Some(flow), Some(step), None) => {
                let outputs = graph.outputs();
                let bound =
                    FlowHead::new(path, flow, action, step, &step_ports, outputs, &mut inputs);
                let (head, decoder) = bound?;
                (decoder, usize::MAX, Some(head))
            }
            (None, _, Some(name)) => {
                let key = "action.output";
                let port = find(path, key, "output", name, graph.outputs().iter())?;
                check_type(path, key, port, &[Element::Float32])?;
                let decoder = ActionDecoder::new(path, key, action, port)?;
                (decoder, place(graph.outputs(), name), None)
            }
            (flow, ..) => {
                let reason = if flow.is_some() {
                    "is given, but with [flow] the sample is the action: leave it out"
                } else {
                    "is missing: name the model's output that holds the actions"
                };
                return Err(ModelError::config(path, "action.output", reason));
            }
        };
        inputs.all_fed()?;
        let spec = spec(path, manifest, &preparer, &decoder, flow.as_ref(), options)?;
        Ok(Self { graph, preparer, decoder, output, flow, spec, run: None, noise: None })
    }

    /// Name of the engine that runs it: `onnxruntime` or `rten`.
    pub fn engine(&self) -> &'static str {
        self.graph.engine()
    }

    /// Starts the next inference from `noise` (row by row) instead of the request's seed.
    pub fn set_noise(&mut self, noise: Vec<f32>) {
        self.noise = Some(noise);
    }

    /// The sampling of a head in two graphs, from the request's noise.
    fn sampling(&mut self, request: &ChunkRequest) -> Result<Option<Sampling>, PolicyError> {
        let Some(flow) = &self.flow else { return Ok(None) };
        let steps = steps(request, &self.spec, STEP_LIMIT)?;
        let shape = (self.decoder.horizon(), self.decoder.width());
        let noise =
            scaled_noise(self.noise.take(), request.seed, shape.0 * shape.1, flow.noise_scale)?;
        let sampler = EulerSampler::new(noise, shape, steps).map_err(compute)?;
        let guidance = match &request.prefix {
            Some(prefix) if prefix.rows() > 0 => Some(self.guidance(prefix, shape)?),
            _ => None,
        };
        Ok(Some(Sampling { sampler, guidance, context: None }))
    }

    fn guidance(&self, prefix: &Prefix, shape: (usize, usize)) -> Result<Guidance, PolicyError> {
        let PrefixUse::Guided { schedule, max_weight } = prefix.usage else {
            return Err(PolicyError::Unsupported("this use of planned actions"));
        };
        let expected = self.spec.action_dim;
        if prefix.dim != expected {
            return Err(PolicyError::PrefixWidth { expected, found: prefix.dim });
        }
        let mut rows = self.decoder.encode(&prefix.actions)?;
        rows.resize(shape.0 * shape.1, 0.0);
        let weights = prefix.weights(schedule, shape.0);
        Guidance::new(&rows, &weights, shape, max_weight).map_err(compute)
    }

    /// Runs the first graph, which gives the actions or what the denoise steps need.
    fn network(&mut self) -> Result<(), PolicyError> {
        let Some(run) = &mut self.run else { return Ok(()) };
        let ports = self.graph.inputs();
        let own = run.inputs.iter().filter(|(name, _)| place(ports, name) != usize::MAX);
        let inputs: Vec<_> = own.map(|(name, array)| (name.as_str(), array)).collect();
        let mut outputs = self.graph.run(&inputs).map_err(PolicyError::Compute)?;
        for memory in &self.preparer.memories {
            let value = outputs.get(memory.output).filter(|value| memory.takes(value));
            let value = value.ok_or_else(|| {
                PolicyError::Compute("a recurrent output has not its input's shape".to_owned())
            })?;
            run.memories.push(value.clone());
        }
        match (&mut run.sampling, &self.flow) {
            (Some(sampling), Some(flow)) => {
                sampling.context = Some(flow.context(&run.inputs, &outputs));
            }
            _ if self.output < outputs.len() => {
                run.actions = Some(outputs.swap_remove(self.output))
            }
            _ => return Err(PolicyError::Compute("the model gave too few outputs".to_owned())),
        }
        Ok(())
    }

    /// One denoise step; the last one gives the actions.
    fn denoise(&mut self) -> Result<(), PolicyError> {
        let (Some(run), Some(flow)) = (&mut self.run, &mut self.flow) else { return Ok(()) };
        let Some(Sampling { sampler, guidance, context: Some(context) }) = &mut run.sampling else {
            return Ok(());
        };
        let (x, time) = (sampler.sample().clone(), sampler.flow_time());
        let mut velocity = flow.velocity(context, &x, time).map_err(compute)?;
        if let Some(guidance) = guidance {
            velocity = guidance.correct(velocity, &x, time).map_err(compute)?;
        }
        sampler.step(velocity).map_err(compute)?;
        self.finish_sampling()
    }

    /// Takes the sample as the actions when it is done.
    fn finish_sampling(&mut self) -> Result<(), PolicyError> {
        let Some(run) = &mut self.run else { return Ok(()) };
        if let Some(Sampling { sampler, .. }) =
            run.sampling.as_ref().filter(|s| s.sampler.is_done())
        {
            let values = sampler.sample().values().to_vec();
            run.actions = Some(Array::floats(self.decoder.shape.clone(), values));
        }
        Ok(())
    }
}

/// What an ONNX policy takes and gives, and what runs it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct OnnxInspection {
    /// Name of the engine that runs it here: `onnxruntime` or `rten`.
    pub engine: &'static str,
    /// What it takes and gives.
    pub spec: PolicySpec,
    /// Inputs of the graph, with type and shape.
    pub inputs: Vec<String>,
    /// Its outputs.
    pub outputs: Vec<String>,
}

/// Loads the policy of the manifest `path` and says what it is.
///
/// # Errors
/// [`ModelError`] when it cannot be loaded.
pub fn inspect(path: &Path) -> Result<OnnxInspection, ModelError> {
    let policy = OnnxPolicy::load(path, &LoadOptions::default())?;
    let list = |ports: &[Port]| ports.iter().map(|port| format!("{}: {port}", port.name)).collect();
    Ok(OnnxInspection {
        engine: policy.engine(),
        inputs: list(policy.graph.inputs()),
        outputs: list(policy.graph.outputs()),
        spec: policy.spec,
    })
}

fn spec(
    path: &Path,
    manifest: &Manifest,
    preparer: &Preparer,
    decoder: &ActionDecoder,
    flow: Option<&FlowHead>,
    options: &LoadOptions,
) -> Result<PolicySpec, ModelError> {
    let rate = match options.action_rate_hz {
        Some(rate) => Some(rate),
        None => manifest.action_rate_hz(path)?,
    };
    let rate = rate.filter(|rate| rate.is_finite() && *rate > 0.0).ok_or_else(|| {
        let reason = "is missing: how many actions a second was the policy trained at? Write it like \"30 Hz\"";
        ModelError::config(path, "action_rate", reason)
    })?;
    Ok(PolicySpec {
        cameras: preparer.images.iter().map(|image| image.camera.clone()).collect(),
        optional_cameras: 0,
        // A policy that does not see the joints takes any state of the arm.
        state_dim: preparer.state.as_ref().map_or(decoder.dim(), |state| state.width()),
        action_dim: decoder.dim(),
        action_names: manifest.action.names.clone(),
        action_horizon: decoder.horizon(),
        action_rate_hz: Some(rate),
        denoise_steps: flow.map_or(1, |flow| options.denoise_steps.unwrap_or(flow.steps)),
        prefix: PrefixSupport { guided: flow.is_some(), ..PrefixSupport::default() },
    })
}

impl Policy for OnnxPolicy {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.run = None;
        let start = Instant::now();
        if self.flow.is_none() && request.prefix.as_ref().is_some_and(|prefix| prefix.rows() > 0) {
            return Err(PolicyError::Unsupported("planned actions"));
        }
        let sampling = self.sampling(request)?;
        let inputs = self.preparer.prepare(observation, request, self.noise.take())?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            sampling,
            actions: None,
            memories: Vec::new(),
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        let run = self.run.as_ref().ok_or(NOT_BEGUN)?;
        if run.actions.is_some() {
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = match &run.sampling {
            Some(Sampling { context: Some(_), .. }) => DENOISE,
            _ => NETWORK,
        };
        if stage == DENOISE {
            self.denoise()?
        } else {
            self.network()?
        }
        let Some(run) = &mut self.run else { return Ok(Progress::Done) };
        run.ticket.add(stage, start);
        match &run.sampling {
            Some(Sampling { sampler, .. }) if run.actions.is_none() => Ok(Progress::Step {
                stage: STAGES[stage],
                done: 1 + sampler.done(),
                total: 1 + sampler.steps(),
                denoised: stage == DENOISE,
                next_denoises: true,
            }),
            _ => Ok(Progress::Done),
        }
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.actions.is_some()).ok_or(NOT_DONE)?;
        let Run { actions: Some(actions), .. } = &run else {
            return Err(NOT_DONE);
        };
        let actions = self.decoder.decode(actions)?;
        let steps = run.sampling.as_ref().map_or(1, |sampling| sampling.sampler.done());
        let mut chunk = run.ticket.chunk(&self.spec, actions, steps)?;
        if run.sampling.is_none() {
            chunk.report.stages.truncate(DENOISE);
        }
        // Only a chunk that somebody has may move the network's own state on.
        for (memory, value) in self.preparer.memories.iter_mut().zip(run.memories) {
            memory.keep(value, run.ticket.instant());
        }
        Ok(chunk)
    }

    fn set_denoise_steps(&mut self, steps: usize) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        let sampling = run.sampling.as_mut();
        Ok(sampling.is_some_and(|sampling| sampling.sampler.set_steps(steps.min(STEP_LIMIT))))
    }

    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        let Some(sampling) = &mut run.sampling else { return Ok(false) };
        let finished = sampling.sampler.finish().map_err(compute)?;
        self.finish_sampling()?;
        Ok(finished)
    }
}
