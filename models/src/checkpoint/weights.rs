//! Reading safetensors by memory map.

use std::path::Path;
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};

use super::map::MappedFile;
use super::store::{StoredTensor, StoredType, TensorStore};
use crate::ModelError;
use crate::families::Family;

const TOKEN_TABLE: &str = "text.embed_tokens.weight";
const OUTPUT_MATRIX: &str = "lm_head.weight";

/// Maps the safetensors file `path` of a policy of `family`; nothing is read but its header.
///
/// # Errors
/// [`ModelError::Malformed`] when the header and the file's length do not fit each other,
/// [`ModelError::TensorType`] for a type other than F32, F16 and BF16.
pub fn open_safetensors(path: &Path, family: &'static Family) -> Result<TensorStore, ModelError> {
    let file = Arc::new(MappedFile::open(path)?);
    // The crate checks the header's length, every offset against every shape, and the whole
    // against the file's length, before anything is allocated from them.
    let (header, metadata) = SafeTensors::read_metadata(file.bytes()).map_err(|e| {
        ModelError::malformed(path, "the safetensors header", e, "one that fits the file's length")
    })?;
    let data = header + 8;
    let mut store = TensorStore::new(path, Some(family));
    let tensors = metadata.tensors();
    // Tied tensors are stored once: the token table may be there as the output matrix only.
    let named = |short: &str| tensors.keys().any(|name| family.short_name(name) == short);
    let tied = !named(TOKEN_TABLE) && named(OUTPUT_MATRIX);
    for (name, info) in &tensors {
        let mut short = family.short_name(name);
        if tied && short == OUTPUT_MATRIX {
            short = TOKEN_TABLE.to_owned();
        }
        if (family.unused)(&short) {
            continue;
        }
        let dtype = match info.dtype {
            Dtype::F32 => StoredType::F32,
            Dtype::F16 => StoredType::F16,
            Dtype::BF16 => StoredType::Bf16,
            other => {
                return Err(ModelError::TensorType {
                    path: path.to_owned(),
                    tensor: name.clone(),
                    found: format!("{other:?}"),
                    expected: "F32, F16 or BF16",
                });
            }
        };
        let range = data + info.data_offsets.0..data + info.data_offsets.1;
        let tensor =
            StoredTensor::new(name.clone(), dtype, info.shape.clone(), range, file.clone())
                .ok_or_else(|| {
                    let what = format!("the byte range of tensor `{name}`");
                    let found = format!("{:?}", info.data_offsets);
                    ModelError::malformed(
                        path,
                        what,
                        found,
                        "the size of its shape, inside the file",
                    )
                })?;
        store.insert(short, tensor);
    }
    Ok(store)
}
