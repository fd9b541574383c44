//! Writing bundles: which tensor becomes what, and why some stay in higher precision.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use sha2::{Digest, Sha256};
use sinew_runtime::action_space::SpaceKeys;

use super::format::{self, ALIGNMENT, TensorInfo, Value};
use super::{ARCHITECTURE, blocks, hex, keys};
use crate::ModelError;
use crate::checkpoint::map::MappedFile;
use crate::checkpoint::{Checkpoint, Processor, StoredTensor, StoredType, TensorStore};
use crate::families::Family;

/// Type of a bundle's large matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// 8 bits in blocks of 32.
    Q8_0,
    /// 4 bits in blocks of 32.
    Q4_0,
    /// 4 bits in blocks of 32 with a minimum each, 8 of them in a super-block.
    Q4K,
    /// Half precision.
    F16,
}

impl QuantType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::F16, Self::Q8_0, Self::Q4K, Self::Q4_0];

    /// Name, as in GGUF.
    pub fn name(self) -> &'static str {
        self.stored().name()
    }

    fn stored(self) -> StoredType {
        match self {
            Self::Q8_0 => StoredType::Q8_0,
            Self::Q4_0 => StoredType::Q4_0,
            Self::Q4K => StoredType::Q4K,
            Self::F16 => StoredType::F16,
        }
    }
}

/// Writes the checkpoint `folder` as one bundle `out`, its large matrices as `kind`.
///
/// The bundle holds weights, configuration, statistics, tokenizer, action names and units, and the
/// SHA-256 of the weights that it was made from. It is written beside `out` and renamed when complete.
///
/// # Errors
/// [`ModelError`] of reading the folder or writing the file.
pub fn quantize(folder: &Path, kind: QuantType, out: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(folder, true)?;
    let source = checkpoint.store.path();
    let hash = MappedFile::open(source)?.sha256(0);
    write_bundle(&checkpoint, kind, Some(&hash), &mut Stored(&checkpoint.store), out)
}

/// Values made, encoded and written at a time, about.
const SLICE: usize = 1 << 22;

/// Where the values of a bundle come from.
pub(crate) trait Weights {
    /// Our name and the shape of every tensor.
    fn tensors(&self) -> Vec<(String, Vec<usize>)>;
    /// Appends values `range` of tensor `index`, whole rows. Ranges follow each other, tensor by tensor.
    fn read(&mut self, index: usize, range: Range<usize>, out: &mut Vec<f32>);
    /// Tensor `index` will not be read again.
    fn release(&mut self, _index: usize) {}
}

/// The weights of a checkpoint folder.
struct Stored<'a>(&'a TensorStore);

impl Stored<'_> {
    fn get(&self, index: usize) -> Option<&StoredTensor> {
        self.0.iter().nth(index).map(|(_, tensor)| tensor)
    }
}

impl Weights for Stored<'_> {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.0.iter().map(|(name, tensor)| (name.to_owned(), tensor.shape.clone())).collect()
    }

    fn read(&mut self, index: usize, range: Range<usize>, out: &mut Vec<f32>) {
        if let Some(tensor) = self.get(index) {
            tensor.read(range, out);
        }
    }

    fn release(&mut self, index: usize) {
        if let Some(tensor) = self.get(index) {
            tensor.release();
        }
    }
}

/// Writes what `checkpoint` holds besides its weights, and `weights`, as one bundle `out`.
pub(crate) fn write_bundle(
    checkpoint: &Checkpoint,
    kind: QuantType,
    source_hash: Option<&str>,
    weights: &mut dyn Weights,
    out: &Path,
) -> Result<(), ModelError> {
    let part = out.with_extension("gguf.part");
    let written = write(checkpoint, kind, source_hash, weights, &part)
        .and_then(|()| std::fs::rename(&part, out).map_err(|e| ModelError::io(out, e)));
    if written.is_err() {
        // The partial file is of no use; that it cannot be removed is no further news.
        let _ = std::fs::remove_file(&part);
    }
    written
}

/// Rows are filled up with zeros to whole blocks when that adds no more than this part of them.
const FILL: usize = 8;

/// How tensor `name` is stored, and why when that is not as `kind`.
fn choose(
    family: &Family,
    name: &str,
    shape: &[usize],
    kind: QuantType,
) -> (StoredType, Option<&'static str>) {
    let width: usize = shape.iter().skip(1).product();
    if shape.len() < 2 {
        return (
            StoredType::F32,
            Some("norm gains and biases: few values, added to every activation"),
        );
    }
    if let Some((dtype, reason)) = (family.keep)(name) {
        return (dtype, Some(reason));
    }
    let matrix = matches!(shape.len(), 2 | 4);
    let fits = |dtype: StoredType| match dtype.filled(width) {
        Some(filled) if matrix => filled - width <= width / FILL,
        // Rows of other tensors are those of their innermost dimension.
        _ => shape.last().is_some_and(|width| width.is_multiple_of(dtype.block_values())),
    };
    match kind.stored() {
        wanted if fits(wanted) => (wanted, None),
        StoredType::Q4K if fits(StoredType::Q8_0) => (
            StoredType::Q8_0,
            Some(
                "rows much shorter than whole blocks of 256: 8 bits take no more than 4 filled up",
            ),
        ),
        _ => (StoredType::F16, Some("rows much shorter than whole blocks of 32")),
    }
}

fn write(
    checkpoint: &Checkpoint,
    kind: QuantType,
    source_hash: Option<&str>,
    weights: &mut dyn Weights,
    out: &Path,
) -> Result<(), ModelError> {
    let io = |e| ModelError::io(out, e);
    let mut infos = Vec::new();
    let mut kept = Vec::new();
    for (name, shape) in weights.tensors() {
        let (dtype, reason) = choose(checkpoint.family, &name, &shape, kind);
        if let Some(reason) = reason {
            kept.push(format!("{name}|{}|{reason}", dtype.name()));
        }
        // A convolution is stored as the matrix that it is used as.
        let shape = match shape.as_slice() {
            [outputs, rest @ ..] if rest.len() == 3 => vec![*outputs, rest.iter().product()],
            other => other.to_vec(),
        };
        infos.push(TensorInfo { name, dtype, shape });
    }
    let widths: Vec<_> = infos
        .iter()
        .filter_map(|info| {
            let (width, filled) = info.dtype.widths(&info.shape);
            (width != filled).then(|| format!("{}|{width}", info.name))
        })
        .collect();
    let metadata = |data_hash: String| {
        let lists = [(keys::KEPT, kept.clone()), (keys::WIDTHS, widths.clone())];
        metadata(checkpoint, kind, source_hash, data_hash, lists)
    };
    let mut file = BufWriter::new(File::create(out).map_err(io)?);
    // The hash of the data is known last; it has a fixed length, so the header is written twice.
    format::write_header(&mut file, &metadata("0".repeat(64)), &infos).map_err(io)?;
    let mut hash = Sha256::new();
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    for (index, info) in infos.iter().enumerate() {
        let (count, mut written) = (info.shape.iter().product::<usize>(), 0);
        let width = info.shape.last().map_or(1, |width| (*width).max(1));
        let slice = (SLICE / width).max(1) * width;
        for start in (0..count).step_by(slice) {
            values.clear();
            bytes.clear();
            weights.read(index, start..count.min(start + slice), &mut values);
            blocks::encode_rows(info.dtype, width, &values, &mut bytes);
            written += bytes.len();
            hash.update(&bytes);
            file.write_all(&bytes).map_err(io)?;
        }
        weights.release(index);
        let padding = vec![0; written.next_multiple_of(ALIGNMENT) - written];
        hash.update(&padding);
        file.write_all(&padding).map_err(io)?;
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    format::write_header(&mut file, &metadata(hex(&hash.finalize())), &infos).map_err(io)?;
    file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)
}

fn metadata(
    checkpoint: &Checkpoint,
    kind: QuantType,
    source_hash: Option<&str>,
    data_hash: String,
    lists: [(&str, Vec<String>); 2],
) -> Vec<(String, Value)> {
    let text = |key: &str, text: &str| (key.to_owned(), Value::Text(text.to_owned()));
    let mut all = vec![
        text(keys::ARCHITECTURE, &format!("{ARCHITECTURE}{}", checkpoint.family.name)),
        (keys::ALIGNMENT.to_owned(), Value::U32(ALIGNMENT as u32)),
        text(keys::WRITTEN_BY, concat!("sinew ", env!("CARGO_PKG_VERSION"))),
        text(keys::QUANTIZATION, kind.stored().name()),
        text(keys::DATA_HASH, &data_hash),
        text(keys::CONFIG, &checkpoint.config_text),
        (keys::ACTION_NAMES.to_owned(), Value::Texts(checkpoint.actions.action_names.clone())),
        (keys::ACTION_UNITS.to_owned(), Value::Texts(checkpoint.actions.action_units.clone())),
    ];
    all.extend(lists.into_iter().map(|(key, list)| (key.to_owned(), Value::Texts(list))));
    if checkpoint.actions.action_space != SpaceKeys::default() {
        let keys = serde_json::json!(checkpoint.actions.action_space);
        all.push(text(keys::ACTION_SPACE, &keys.to_string()));
    }
    all.extend(source_hash.map(|hash| text(keys::SOURCE_HASH, hash)));
    all.extend(checkpoint.extras.iter().map(|(role, f)| text(&keys::extra(role), &f.text)));
    let numbers = [
        (keys::ACTION_RATE, checkpoint.actions.action_rate_hz),
        (keys::NOISE_SCALE, checkpoint.actions.noise_scale),
        (keys::TRAINED_PREFIX, checkpoint.actions.trained_prefix.map(|n| n as f64)),
    ];
    let given = numbers.into_iter().filter_map(|(k, v)| Some((k.to_owned(), Value::F64(v?))));
    all.extend(given);
    let mut processor = |key: &str, processor: &Processor| {
        all.push(text(key, &processor.text));
        let prefix = keys::statistics(key);
        for (name, values) in &processor.statistics {
            all.push((format!("{prefix}{name}"), Value::Floats(values.clone())));
        }
    };
    processor(keys::PREPROCESSOR, &checkpoint.preprocessor);
    processor(keys::POSTPROCESSOR, &checkpoint.postprocessor);
    all
}
