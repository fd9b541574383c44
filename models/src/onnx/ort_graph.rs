//! Graphs run by ONNX Runtime, through its dynamic library.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Outlet, Tensor, TensorElementType, TensorRef, ValueType};

use super::graph::{Array, Data, Element, Graph, Port};

/// A process has one library and one environment; they stay until it ends.
static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

/// The environment of `library`, loaded when first asked for.
fn environment(library: &Path) -> Result<Environment, String> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((path, environment)) = loaded.as_ref() {
        if path == library {
            return Ok(environment.clone());
        }
        return Err(format!(
            "ONNX Runtime was already loaded from {}, and is now asked for from {}; a process has one: name the \
             same library everywhere",
            path.display(),
            library.display()
        ));
    }
    let builder = ort::init_from(library).map_err(|e| {
        format!(
            "ONNX Runtime cannot be loaded from {}: {e}; give the path of libonnxruntime 1.24 or later",
            library.display()
        )
    })?;
    let environment = builder.build().map_err(|e| e.to_string())?;
    *loaded = Some((library.to_owned(), environment.clone()));
    Ok(environment)
}

/// A graph in a session of ONNX Runtime, on the CPU.
pub(super) struct OrtGraph {
    session: Session,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl OrtGraph {
    /// Loads `path` with the library at `library`.
    pub fn open(path: &Path, library: &Path, threads: Option<usize>) -> Result<Self, String> {
        let environment = environment(library)?;
        let builder = Session::builder(&environment).map_err(|e| e.to_string())?;
        // Spinning threads would take the processor from the control loop.
        let mut builder = builder.with_intra_op_spinning(false).map_err(|e| e.to_string())?;
        if let Some(threads) = threads {
            builder = builder.with_intra_threads(threads).map_err(|e| e.to_string())?;
        }
        let session = builder
            .commit_from_file(path)
            .map_err(|e| format!("ONNX Runtime cannot load it: {e}; export it again"))?;
        let inputs = session.inputs().iter().map(port).collect();
        let outputs = session.outputs().iter().map(port).collect();
        Ok(Self { session, inputs, outputs })
    }
}

fn port(outlet: &Outlet) -> Port {
    let (element, shape) = match outlet.dtype() {
        ValueType::Tensor { ty, shape, .. } => {
            let sizes = shape.iter().map(|size| usize::try_from(*size).ok()).collect();
            (element(*ty), Some(sizes))
        }
        _ => (Element::Other, None),
    };
    Port { name: outlet.name().to_owned(), element, shape }
}

fn element(of: TensorElementType) -> Element {
    match of {
        TensorElementType::Float32 => Element::Float32,
        TensorElementType::Int64 => Element::Int64,
        TensorElementType::Int32 => Element::Int32,
        TensorElementType::Bool => Element::Bool,
        TensorElementType::Uint8 => Element::Uint8,
        _ => Element::Other,
    }
}

fn value<'a>(array: &'a Array, element: Element) -> ort::Result<SessionInputValue<'a>> {
    let shape = array.shape.clone();
    Ok(match (&array.data, element) {
        (Data::Float(v), _) => TensorRef::from_array_view((shape, v.as_slice()))?.into(),
        (Data::Byte(v), _) => TensorRef::from_array_view((shape, v.as_slice()))?.into(),
        (Data::Int(v), Element::Int32) => {
            // Token ids and masks fit; anything else is the nearest that does.
            let narrow =
                |v: &i64| i32::try_from(*v).unwrap_or(if *v < 0 { i32::MIN } else { i32::MAX });
            Tensor::from_array((shape, v.iter().map(narrow).collect::<Vec<_>>()))?.into()
        }
        (Data::Int(v), Element::Bool) => {
            Tensor::from_array((shape, v.iter().map(|v| *v != 0).collect::<Vec<_>>()))?.into()
        }
        (Data::Int(v), _) => TensorRef::from_array_view((shape, v.as_slice()))?.into(),
    })
}

fn array(value: &DynValue) -> Result<Array, String> {
    let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err("an output is no tensor".to_owned());
    };
    let shape = shape.iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
    let fail = |e: ort::Error| e.to_string();
    let data = match element(*ty) {
        Element::Float32 => {
            Data::Float(value.try_extract_tensor::<f32>().map_err(fail)?.1.to_vec())
        }
        Element::Int64 => Data::Int(value.try_extract_tensor::<i64>().map_err(fail)?.1.to_vec()),
        Element::Uint8 => Data::Byte(value.try_extract_tensor::<u8>().map_err(fail)?.1.to_vec()),
        Element::Int32 => {
            let values = value.try_extract_tensor::<i32>().map_err(fail)?.1;
            Data::Int(values.iter().map(|v| i64::from(*v)).collect())
        }
        Element::Bool => {
            let values = value.try_extract_tensor::<bool>().map_err(fail)?.1;
            Data::Int(values.iter().map(|v| i64::from(*v)).collect())
        }
        Element::Other | Element::Unknown => {
            return Err(format!("an output holds {ty}, which is not read here"));
        }
    };
    Ok(Array { shape, data })
}

impl Graph for OrtGraph {
    fn engine(&self) -> &'static str {
        "onnxruntime"
    }

    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn run(&mut self, inputs: &[(&str, &Array)]) -> Result<Vec<Array>, String> {
        let mut values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> =
            Vec::with_capacity(inputs.len());
        for (name, array) in inputs {
            let port = self.inputs.iter().find(|port| port.name == *name);
            let element = port.map_or(Element::Unknown, |port| port.element);
            values.push((
                (*name).into(),
                value(array, element).map_err(|e| format!("input `{name}`: {e}"))?,
            ));
        }
        let outputs = self.session.run(values).map_err(|e| e.to_string())?;
        outputs.values().map(|value| array(&value)).collect()
    }
}
