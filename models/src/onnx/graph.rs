//! An ONNX graph that can be run, whatever runs it.
//!
//! Two engines: ONNX Runtime, when its library is on the computer ([`super::library`]), and else `rten`, in
//! pure Rust and always there. `rten` was chosen over `tract-onnx` and `candle-onnx`: it compiles in seconds
//! (`tract` takes minutes), reads the ONNX file itself, refuses an operator that it does not know when the
//! file is loaded and not in the middle of a run (`candle-onnx` interprets node by node), packs the weights
//! once, and is kept well. Its `onnx_format` and `contrib` features are all that exported policies need.

use std::fmt;
use std::path::{Path, PathBuf};

use super::library::Library;
use super::{ort_graph, rten_graph};
use crate::ModelError;

/// Type of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// 32-bit floats.
    Float32,
    /// 64-bit integers.
    Int64,
    /// 32-bit integers. `rten` calls every wider integer and every truth value so.
    Int32,
    /// Truth values.
    Bool,
    /// Bytes.
    Uint8,
    /// Any other, which no input or output here can have.
    Other,
    /// The file does not say, or the engine does not pass it on.
    Unknown,
}

/// One input or output of a graph, as its file declares it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Type of the values.
    pub element: Element,
    /// Dimensions; `None` where the size is free. `None` as a whole when the file does not say.
    pub shape: Option<Vec<Option<usize>>>,
}

impl fmt::Display for Port {
    /// Type and shape: `Float32 [1, 3, ?, ?]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.element)?;
        let Some(shape) = &self.shape else { return Ok(()) };
        let sizes = shape.iter().map(|size| size.map_or("?".to_owned(), |n| n.to_string()));
        write!(f, " [{}]", sizes.collect::<Vec<_>>().join(", "))
    }
}

/// A tensor's values, row by row.
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Floats.
    Float(Vec<f32>),
    /// Whole numbers and truth values.
    Int(Vec<i64>),
    /// Bytes.
    Byte(Vec<u8>),
}

/// A tensor that goes into a graph or comes out of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// As many values as `shape` asks for.
    pub data: Data,
}

impl Array {
    /// Floats of `shape`.
    pub fn floats(shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self { shape, data: Data::Float(values) }
    }

    /// Zeros of `shape`, of a kind that `element` can hold.
    pub fn zeros(shape: Vec<usize>, element: Element) -> Self {
        let count = shape.iter().product();
        let data = match element {
            Element::Uint8 => Data::Byte(vec![0; count]),
            Element::Int64 | Element::Int32 | Element::Bool => Data::Int(vec![0; count]),
            Element::Float32 | Element::Other | Element::Unknown => Data::Float(vec![0.0; count]),
        };
        Self { shape, data }
    }

    /// The floats, when it holds such.
    pub fn as_floats(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Float(values) => Some(values),
            _ => None,
        }
    }
}

/// A loaded graph.
pub trait Graph: Send {
    /// Name of the engine that runs it.
    fn engine(&self) -> &'static str;

    /// What it takes.
    fn inputs(&self) -> &[Port];

    /// What it gives.
    fn outputs(&self) -> &[Port];

    /// Runs it with `inputs` by name; gives one array per output, in their order.
    ///
    /// # Errors
    /// The engine's own words.
    fn run(&mut self, inputs: &[(&str, &Array)]) -> Result<Vec<Array>, String>;
}

/// Which engine runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// ONNX Runtime where its library is found, else the built-in one.
    #[default]
    Auto,
    /// ONNX Runtime, or an error.
    OnnxRuntime,
    /// The one in pure Rust.
    BuiltIn,
}

/// How ONNX graphs are run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OnnxOptions {
    /// Which engine.
    pub engine: Engine,
    /// ONNX Runtime's library; looked for where left out.
    pub library: Option<PathBuf>,
    /// Threads of one run; left out: the engine's own choice.
    pub threads: Option<usize>,
}

/// Loads the graph in `path`.
///
/// # Errors
/// [`ModelError::Onnx`] when the file cannot be read by the engine, or ONNX Runtime is asked for and absent.
pub fn open_graph(path: &Path, options: &OnnxOptions) -> Result<Box<dyn Graph>, ModelError> {
    let fail = |reason: String| ModelError::Onnx { path: path.to_owned(), reason };
    if !path.is_file() {
        let remedy = "the manifest names it; put the ONNX file there, or correct the name".into();
        return Err(ModelError::FileMissing { path: path.to_owned(), remedy });
    }
    let library = match options.engine {
        Engine::BuiltIn => Library::Absent { looked: Vec::new() },
        _ => Library::find(options.library.as_deref()),
    };
    match library {
        Library::At(library) => {
            let graph = ort_graph::OrtGraph::open(path, &library, options.threads);
            Ok(Box::new(graph.map_err(fail)?))
        }
        absent if options.engine == Engine::OnnxRuntime => Err(fail(absent.remedy())),
        absent => {
            let graph = rten_graph::RtenGraph::open(path, options.threads).map_err(|reason| {
                let advice = match options.engine {
                    Engine::Auto => format!("; {}", absent.remedy()),
                    _ => "; ONNX Runtime knows more operators: use the engine `auto`".to_owned(),
                };
                fail(format!("the built-in engine cannot load it: {reason}{advice}"))
            })?;
            Ok(Box::new(graph))
        }
    }
}
