//! Files that calibration writes beside a checkpoint.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ModelError;

/// Reads the file at `path`, of at most `largest` bytes, which `writer` writes.
///
/// # Errors
/// [`ModelError`] for a file that cannot be read, is too long, or is none of these.
pub fn read<T: DeserializeOwned>(path: &Path, largest: u64, writer: &str) -> Result<T, ModelError> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|f| f.take(largest + 1).read_to_end(&mut text));
    read.map_err(|e| ModelError::io(path, e))?;
    if text.len() as u64 > largest {
        let expected = format!("at most {largest} bytes");
        return Err(ModelError::malformed(path, "the file", "longer", expected));
    }
    let expected = format!("what `{writer}` writes");
    serde_json::from_slice(&text).map_err(|e| ModelError::malformed(path, "the file", e, expected))
}

/// Writes `found`, a plain struct, to `path`.
///
/// # Errors
/// [`ModelError::Io`].
pub fn write(path: &Path, found: &impl Serialize) -> Result<(), ModelError> {
    // Plain structs with string keys serialise.
    #[allow(clippy::expect_used)]
    let text = serde_json::to_string_pretty(found).expect("plain structs serialise");
    std::fs::write(path, text + "\n").map_err(|e| ModelError::io(path, e))
}
