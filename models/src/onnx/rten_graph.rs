//! Graphs run in pure Rust, by `rten`.

use std::path::Path;
use std::sync::Arc;

use rten::{
    DataType, Dimension, Model, NodeId, RunOptions, ThreadPool, Value, ValueOrView, ValueType,
    ValueView,
};
use rten_tensor::{Layout, Tensor};

use super::graph::{Array, Data, Element, Graph, Port};

/// A graph in memory, its weights packed.
pub(super) struct RtenGraph {
    model: Model,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    pool: Option<Arc<ThreadPool>>,
}

impl RtenGraph {
    /// Loads `path`.
    pub fn open(path: &Path, threads: Option<usize>) -> Result<Self, String> {
        let model = Model::load_file(path).map_err(|e| e.to_string())?;
        let inputs = model.input_ids().iter().map(|id| port(&model, *id)).collect();
        let outputs = model.output_ids().iter().map(|id| port(&model, *id)).collect();
        let pool = threads.map(|threads| Arc::new(ThreadPool::with_num_threads(threads)));
        Ok(Self { model, inputs, outputs, pool })
    }
}

fn port(model: &Model, id: NodeId) -> Port {
    let info = model.node_info(id);
    let name = info.as_ref().and_then(|info| info.name()).unwrap_or_default().to_owned();
    let element = match info.as_ref().and_then(|info| info.dtype()) {
        Some(ValueType::Tensor(DataType::Float)) => Element::Float32,
        Some(ValueType::Tensor(DataType::Int32)) => Element::Int32,
        Some(ValueType::Tensor(DataType::UInt8)) => Element::Uint8,
        Some(_) => Element::Other,
        None => Element::Unknown,
    };
    let size = |dimension: Dimension| match dimension {
        Dimension::Fixed(size) => Some(size),
        Dimension::Symbolic(_) => None,
    };
    let shape = info.and_then(|info| info.shape());
    Port { name, element, shape: shape.map(|sizes| sizes.into_iter().map(size).collect()) }
}

fn value(array: &Array) -> Result<ValueOrView<'_>, String> {
    let shape = &array.shape;
    Ok(match &array.data {
        Data::Float(v) => ValueView::from_shape(shape, v).map_err(|e| e.to_string())?.into(),
        Data::Byte(v) => ValueView::from_shape(shape, v).map_err(|e| e.to_string())?.into(),
        Data::Int(v) => {
            // Token ids and masks fit; anything else is the nearest that does.
            let narrow =
                |v: &i64| i32::try_from(*v).unwrap_or(if *v < 0 { i32::MIN } else { i32::MAX });
            let narrow = v.iter().map(narrow).collect();
            Value::from_shape::<i32>(shape, narrow).map_err(|e| e.to_string())?.into()
        }
    })
}

fn array(value: Value) -> Result<Array, String> {
    fn parts<T: Clone>(tensor: Tensor<T>) -> (Vec<usize>, Vec<T>) {
        (tensor.shape().to_vec(), tensor.into_data())
    }
    Ok(match value {
        Value::FloatTensor(tensor) => {
            let (shape, values) = parts(tensor);
            Array { shape, data: Data::Float(values) }
        }
        Value::Int32Tensor(tensor) => {
            let (shape, values) = parts(tensor);
            Array { shape, data: Data::Int(values.into_iter().map(i64::from).collect()) }
        }
        Value::UInt8Tensor(tensor) => {
            let (shape, values) = parts(tensor);
            Array { shape, data: Data::Byte(values) }
        }
        _ => return Err("an output holds a type that is not read here".to_owned()),
    })
}

impl Graph for RtenGraph {
    fn engine(&self) -> &'static str {
        "rten"
    }

    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn run(&mut self, inputs: &[(&str, &Array)]) -> Result<Vec<Array>, String> {
        let mut values = Vec::with_capacity(inputs.len());
        for (name, array) in inputs {
            let id = self.model.node_id(name).map_err(|e| e.to_string())?;
            values.push((id, value(array).map_err(|e| format!("input `{name}`: {e}"))?));
        }
        let options = RunOptions::default().with_thread_pool(self.pool.clone());
        let outputs = self.model.run(values, self.model.output_ids(), Some(options));
        outputs.map_err(|e| e.to_string())?.into_iter().map(array).collect()
    }
}
