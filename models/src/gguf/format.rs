//! GGUF version 3: metadata and tensors in one file, little-endian.
//!
//! The reader works on the mapped bytes and trusts nothing: every length is compared with what is left
//! of the file before anything is allocated. Source: ggml `docs/gguf.md`.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::path::Path;
use std::sync::Arc;

use crate::ModelError;
use crate::checkpoint::map::MappedFile;
use crate::checkpoint::{StoredTensor, StoredType};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Tensors begin at multiples of this many bytes.
pub(super) const ALIGNMENT: usize = 32;

const TYPE_U32: u32 = 4;
const TYPE_F32: u32 = 6;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;
const TYPE_F64: u32 = 12;

/// A metadata value of the kinds that bundles use.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// 32-bit unsigned.
    U32(u32),
    /// 64-bit float.
    F64(f64),
    /// Text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// 32-bit floats.
    Floats(Vec<f32>),
    /// A kind that bundles do not use; skipped.
    Other,
}

/// A parsed file.
#[derive(Debug)]
pub(super) struct Content {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<StoredTensor>,
    /// First byte of the tensor data.
    pub data: usize,
}

fn ggml_type(dtype: StoredType) -> u32 {
    match dtype {
        StoredType::F32 => 0,
        StoredType::F16 => 1,
        StoredType::Q4_0 => 2,
        StoredType::Q8_0 => 8,
        StoredType::Q4K => 12,
        StoredType::Bf16 => 30,
    }
}

fn stored_type(code: u32) -> Option<StoredType> {
    use StoredType::{Bf16, F16, F32, Q4_0, Q4K, Q8_0};
    [F32, F16, Q4_0, Q8_0, Q4K, Bf16].into_iter().find(|t| ggml_type(*t) == code)
}

/// A cursor over the mapped bytes.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], ModelError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            let left = self.bytes.len() - self.at;
            ModelError::malformed(
                self.path,
                what,
                format!("{n} bytes long"),
                format!("at most the {left} bytes left"),
            )
        })?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        let b = self.take(4, what)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        let b = self.take(8, what)?;
        Ok(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    /// A count of things that take at least `each` bytes.
    fn count(&mut self, each: usize, what: &str) -> Result<usize, ModelError> {
        let n = self.u64(what)?;
        let most = (self.bytes.len() - self.at) / each.max(1);
        usize::try_from(n).ok().filter(|n| *n <= most).ok_or_else(|| {
            ModelError::malformed(
                self.path,
                what,
                n,
                format!("at most {most}, by the file's length"),
            )
        })
    }

    fn text(&mut self, what: &str) -> Result<String, ModelError> {
        let n = self.count(1, what)?;
        let bytes = self.take(n, what)?.to_vec();
        String::from_utf8(bytes).map_err(|e| ModelError::malformed(self.path, what, e, "UTF-8"))
    }

    fn value(&mut self, key: &str) -> Result<Value, ModelError> {
        let what = format!("metadata `{key}`");
        let code = self.u32(&what)?;
        Ok(match code {
            TYPE_U32 => Value::U32(self.u32(&what)?),
            TYPE_F64 => Value::F64(f64::from_bits(self.u64(&what)?)),
            TYPE_STRING => Value::Text(self.text(&what)?),
            TYPE_ARRAY => self.array(&what)?,
            other => {
                self.skip(other, &what)?;
                Value::Other
            }
        })
    }

    fn array(&mut self, what: &str) -> Result<Value, ModelError> {
        let code = self.u32(what)?;
        Ok(match code {
            TYPE_STRING => {
                let n = self.count(8, what)?;
                Value::Texts((0..n).map(|_| self.text(what)).collect::<Result<_, _>>()?)
            }
            TYPE_F32 => {
                let n = self.count(4, what)?;
                let bytes = self.take(n * 4, what)?;
                let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Value::Floats(bytes.chunks_exact(4).map(word).collect())
            }
            other => {
                let n = self.count(1, what)?;
                for _ in 0..n {
                    self.skip(other, what)?;
                }
                Value::Other
            }
        })
    }

    fn skip(&mut self, code: u32, what: &str) -> Result<(), ModelError> {
        let bytes = match code {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            TYPE_STRING => return self.text(what).map(|_| ()),
            other => {
                return Err(ModelError::malformed(
                    self.path,
                    what,
                    format!("of type {other}"),
                    "a type that GGUF knows",
                ));
            }
        };
        self.take(bytes, what).map(|_| ())
    }
}

/// Parses the mapped file.
pub(super) fn read(file: &Arc<MappedFile>) -> Result<Content, ModelError> {
    let mut r = Reader { path: file.path(), bytes: file.bytes(), at: 0 };
    let magic = r.take(4, "the magic number")?;
    if magic != MAGIC {
        return Err(ModelError::malformed(
            file.path(),
            "the magic number",
            format!("{magic:02x?}"),
            "`GGUF`: give a .gguf bundle or a checkpoint folder",
        ));
    }
    let version = r.u32("the version")?;
    if version != VERSION {
        return Err(ModelError::malformed(file.path(), "the version", version, "3"));
    }
    let tensors = r.count(24, "the number of tensors")?;
    let pairs = r.count(12, "the number of metadata values")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = r.text("a metadata key")?;
        let value = r.value(&key)?;
        metadata.insert(key, value);
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        let name = r.text("a tensor's name")?;
        let what = format!("the header of tensor `{name}`");
        let dims = r.u32(&what)?;
        if dims > 4 {
            return Err(ModelError::malformed(
                file.path(),
                what,
                format!("{dims} dimensions"),
                "at most 4",
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let n = r.u64(&what)?;
            shape.push(usize::try_from(n).map_err(|_| {
                ModelError::malformed(file.path(), &what, n, "a size that fits the machine")
            })?);
        }
        shape.reverse(); // GGUF writes the innermost first
        let code = r.u32(&what)?;
        let dtype = stored_type(code).ok_or_else(|| ModelError::TensorType {
            path: file.path().to_owned(),
            tensor: name.clone(),
            found: format!("ggml type {code}"),
            expected: "F32, F16, BF16, Q8_0, Q4_0 or Q4_K",
        })?;
        let width = shape.last().copied().unwrap_or(dtype.block_values());
        if !width.is_multiple_of(dtype.block_values()) {
            return Err(ModelError::malformed(
                file.path(),
                what,
                format!("rows of {width} values"),
                format!("whole blocks of {} ({})", dtype.block_values(), dtype.name()),
            ));
        }
        infos.push((name, dtype, shape, r.u64(&what)?));
    }
    let data = r.at.next_multiple_of(ALIGNMENT);
    let tensors = infos
        .into_iter()
        .map(|(name, dtype, shape, offset)| {
            let start = usize::try_from(offset).ok().and_then(|o| data.checked_add(o));
            let range =
                start.zip(dtype.bytes(&shape)).and_then(|(s, n)| Some(s..s.checked_add(n)?));
            let shown = format!("{} {shape:?} at byte {offset}", dtype.name());
            range
                .and_then(|range| {
                    StoredTensor::new(name.clone(), dtype, shape, range, file.clone())
                })
                .ok_or_else(|| {
                    let what = format!("the place of tensor `{name}`");
                    ModelError::malformed(file.path(), what, shown, "a range inside the file")
                })
        })
        .collect::<Result<_, _>>()?;
    Ok(Content { metadata, tensors, data })
}

/// Name, type and shape (outermost first, as a layer has it) of a tensor to be written.
pub(super) struct TensorInfo {
    pub name: String,
    pub dtype: StoredType,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of its data; the shape was checked when it was made.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(&self.shape).unwrap_or(0)
    }
}

/// Writes the header; the tensors' data follow in the same order, each padded to [`ALIGNMENT`].
pub(super) fn write_header<W: Write + Seek>(
    out: &mut W,
    metadata: &[(String, Value)],
    tensors: &[TensorInfo],
) -> std::io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&(tensors.len() as u64).to_le_bytes())?;
    let known = metadata.iter().filter(|(_, v)| *v != Value::Other);
    out.write_all(&(known.clone().count() as u64).to_le_bytes())?;
    for (key, value) in known {
        text(out, key)?;
        match value {
            Value::U32(n) => {
                out.write_all(&TYPE_U32.to_le_bytes())?;
                out.write_all(&n.to_le_bytes())?;
            }
            Value::F64(x) => {
                out.write_all(&TYPE_F64.to_le_bytes())?;
                out.write_all(&x.to_le_bytes())?;
            }
            Value::Text(t) => {
                out.write_all(&TYPE_STRING.to_le_bytes())?;
                text(out, t)?;
            }
            Value::Texts(list) => {
                array(out, TYPE_STRING, list.len())?;
                list.iter().try_for_each(|t| text(out, t))?;
            }
            Value::Floats(list) => {
                array(out, TYPE_F32, list.len())?;
                list.iter().try_for_each(|x| out.write_all(&x.to_le_bytes()))?;
            }
            Value::Other => {}
        }
    }
    let mut offset = 0usize;
    for tensor in tensors {
        text(out, &tensor.name)?;
        out.write_all(&(tensor.shape.len() as u32).to_le_bytes())?;
        let (_, filled) = tensor.dtype.widths(&tensor.shape);
        let inner = tensor.shape.last().map(|_| filled);
        for n in inner.iter().chain(tensor.shape.iter().rev().skip(1)) {
            out.write_all(&(*n as u64).to_le_bytes())?;
        }
        out.write_all(&ggml_type(tensor.dtype).to_le_bytes())?;
        out.write_all(&(offset as u64).to_le_bytes())?;
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    let at = out.stream_position()? as usize;
    out.write_all(&vec![0; at.next_multiple_of(ALIGNMENT) - at])
}

fn array(out: &mut impl Write, code: u32, len: usize) -> std::io::Result<()> {
    out.write_all(&TYPE_ARRAY.to_le_bytes())?;
    out.write_all(&code.to_le_bytes())?;
    out.write_all(&(len as u64).to_le_bytes())
}

fn text(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one tensor `name`, whose header `change` may damage; its data are `bytes` bytes.
    fn written(info: TensorInfo, bytes: usize, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = std::io::Cursor::new(Vec::new());
        write_header(&mut out, &[], &[info]).expect("memory has room");
        let mut all = out.into_inner();
        change(&mut all);
        all.resize(all.len() + bytes, 0);
        all
    }

    fn read_back(bytes: &[u8]) -> Result<Content, ModelError> {
        let dir = tempfile::tempdir().expect("there is room");
        let path = dir.path().join("one.gguf");
        std::fs::write(&path, bytes).expect("there is room");
        read(&Arc::new(MappedFile::open(&path)?))
    }

    #[test]
    fn rows_are_whole_blocks_in_a_file_and_as_wide_as_a_layer_has_them_after_that() {
        let info =
            || TensorInfo { name: "layer".into(), dtype: StoredType::Q4K, shape: vec![5, 720] };
        let content = read_back(&written(info(), 5 * 3 * 144, |_| {})).expect("it is whole");
        let [tensor] = content.tensors.as_slice() else { panic!("one tensor") };
        assert_eq!((tensor.shape.as_slice(), tensor.dtype), ([5, 768].as_slice(), info().dtype));
        let narrow = tensor.narrowed(720).expect("that is what it was");
        assert_eq!(
            (narrow.shape.as_slice(), narrow.bytes().len()),
            ([5, 720].as_slice(), 15 * 144)
        );
        assert_eq!(narrow.row_bytes(4..5).map(<[u8]>::len), Some(3 * 144));
        assert!(narrow.row_bytes(4..6).is_none());
        for width in [0, 512, 769, usize::MAX] {
            assert!(tensor.narrowed(width).is_none(), "{width}");
        }
        // One byte less than the blocks take.
        let error = read_back(&written(info(), 5 * 3 * 144 - 1, |_| {})).expect_err("cut off");
        assert!(error.to_string().contains("Q4_K [5, 768]"), "{error}");
        // A row that ends inside a block.
        let wider = |bytes: &mut Vec<u8>| {
            let width = 768u64.to_le_bytes();
            let at = bytes.windows(8).position(|w| w == width).expect("it is in the header");
            bytes[at..at + 8].copy_from_slice(&769u64.to_le_bytes());
        };
        let error = read_back(&written(info(), 1 << 14, wider)).expect_err("no whole blocks");
        for word in ["layer", "769", "256", "Q4_K"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
