//! A flow-matching head whose network is a graph of its own, run once in every denoise step.

use std::path::Path;

use super::actions::ActionDecoder;
use super::binding::{Inputs, check_type, find, fit};
use super::graph::{Array, Element, Graph, Port};
use super::inputs::check_scale;
use super::manifest::{ActionOutput, Flow};
use crate::ModelError;
use crate::anytime::STEP_LIMIT;
use crate::heads::flow::{FlowTime, NoiseAtOne, NoiseAtZero};
use crate::kernels::Matrix;

/// The graph of the denoise step, bound to what feeds it.
pub(super) struct FlowHead {
    graph: Box<dyn Graph>,
    sample: String,
    sample_shape: Vec<usize>,
    time: String,
    time_shape: Vec<usize>,
    /// Place of the velocity among the outputs.
    velocity: usize,
    noise_at_one: bool,
    /// Its input, and the place of the first graph's output that it takes.
    context: Vec<(String, usize)>,
    /// Steps of the manifest.
    pub steps: usize,
    /// Standard deviation of the noise.
    pub noise_scale: f32,
}

impl FlowHead {
    /// Binds `flow` to its `graph`; `outputs` are the first graph's. Also gives the actions' decoder: the sample
    /// at the end is the chunk.
    ///
    /// # Errors
    /// [`ModelError::Config`] for what the graphs contradict.
    pub fn new(
        path: &Path,
        flow: &Flow,
        action: &ActionOutput,
        graph: Box<dyn Graph>,
        ports: &[Port],
        outputs: &[Port],
        inputs: &mut Inputs<'_>,
    ) -> Result<(Self, ActionDecoder), ModelError> {
        if flow.steps == 0 || flow.steps > STEP_LIMIT {
            let reason = format!("is {}, expected 1 to {STEP_LIMIT}", flow.steps);
            return Err(ModelError::config(path, "flow.steps", reason));
        }
        if flow.noise_at > 1 {
            let reason = format!("is {}, expected 0 or 1", flow.noise_at);
            return Err(ModelError::config(path, "flow.noise_at", reason));
        }
        check_scale(path, "flow.noise_scale", flow.noise_scale)?;
        let own = |key: &str, name: &str| find(path, key, "input", name, ports.iter());
        own("flow.sample", &flow.sample)?;
        let sample = inputs.take("flow.sample", &flow.sample, &[Element::Float32])?;
        let decoder = ActionDecoder::new(path, "flow.sample", action, sample)?;
        own("flow.time", &flow.time)?;
        let time = inputs.take("flow.time", &flow.time, &[Element::Float32])?;
        let time_shape = fit(path, "flow.time", time, &[])?;
        let key = "flow.velocity";
        let velocity = find(path, key, "output", &flow.velocity, graph.outputs().iter())?;
        check_type(path, key, velocity, &[Element::Float32])?;
        let mut context = Vec::with_capacity(flow.context.len());
        for (input, output) in &flow.context {
            let key = format!("flow.context.{input}");
            own(&key, input)?;
            let all =
                [Element::Float32, Element::Int64, Element::Int32, Element::Bool, Element::Uint8];
            let takes = inputs.take(&key, input, &all)?;
            let gives = find(path, &key, "output", output, outputs.iter())?;
            check_type(path, &key, gives, &[takes.element])?;
            context.push((input.clone(), place(outputs, output)));
        }
        let head = Self {
            velocity: place(graph.outputs(), &flow.velocity),
            graph,
            sample: flow.sample.clone(),
            sample_shape: decoder.shape.clone(),
            time: flow.time.clone(),
            time_shape,
            noise_at_one: flow.noise_at == 1,
            context,
            steps: flow.steps,
            noise_scale: flow.noise_scale,
        };
        Ok((head, decoder))
    }

    /// What every step is fed besides sample and time: its share of `inputs`, and of the first graph's `outputs`.
    pub fn context(&self, inputs: &[(String, Array)], outputs: &[Array]) -> Vec<(String, Array)> {
        let ports = self.graph.inputs();
        let shared = inputs.iter().filter(|(name, _)| ports.iter().any(|port| port.name == *name));
        let context = self.context.iter().filter_map(|(name, place)| {
            outputs.get(*place).map(|array| (name.clone(), array.clone()))
        });
        shared.cloned().chain(context).collect()
    }

    /// Velocity of the sample `x` (`[H, W]`) at `time`, towards the noise.
    ///
    /// # Errors
    /// The engine's words, or the shape that came out.
    pub fn velocity(
        &mut self,
        context: &[(String, Array)],
        x: &Matrix,
        time: FlowTime<NoiseAtOne>,
    ) -> candle_core::Result<Matrix> {
        let sample = Array::floats(self.sample_shape.clone(), x.values().to_vec());
        let t = match self.noise_at_one {
            true => time.value(),
            false => FlowTime::<NoiseAtZero>::from(time).value(),
        };
        let time = Array::floats(self.time_shape.clone(), vec![t as f32]);
        let mut inputs: Vec<_> =
            context.iter().map(|(name, array)| (name.as_str(), array)).collect();
        inputs.extend([(self.sample.as_str(), &sample), (self.time.as_str(), &time)]);
        let mut outputs = self.graph.run(&inputs).map_err(candle_core::Error::msg)?;
        let output = outputs.drain(..).nth(self.velocity);
        let velocity = output.filter(|array| array.shape == self.sample_shape);
        let Some(values) = velocity.as_ref().and_then(Array::as_floats) else {
            candle_core::bail!("the velocity has not the sample's shape {:?}", self.sample_shape);
        };
        // Time from 0 to 1 runs the other way, and so does its velocity.
        let sign = if self.noise_at_one { 1.0 } else { -1.0 };
        Ok(Matrix::new(values, x.dims())?.scaled(sign))
    }
}

/// Place of `name` among `ports`, where it was found before.
pub(super) fn place(ports: &[Port], name: &str) -> usize {
    ports.iter().position(|port| port.name == name).unwrap_or(usize::MAX)
}
