//! Files mapped into memory: the crate's only unsafe code.

#![allow(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::ModelError;

/// A file mapped read-only.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// # Errors
    /// [`ModelError::Io`] when it cannot be opened; [`ModelError::Malformed`] when it is empty.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = std::fs::File::open(path).map_err(|e| ModelError::io(path, e))?;
        let size = file.metadata().map_err(|e| ModelError::io(path, e))?;
        if !size.is_file() {
            return Err(ModelError::malformed(path, "the path", "no regular file", "a file"));
        }
        if size.len() == 0 {
            return Err(ModelError::malformed(path, "the file", "empty", "a header"));
        }
        // SAFETY: the map is read-only and lives as long as every slice of it. Weights are files
        // that nothing writes to while a policy runs; replacing one by renaming leaves the mapped
        // inode alone. Whoever truncates a running policy's weights ends the process (SIGBUS).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| ModelError::io(path, e))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets the kernel take back the pages of `range` (bytes), which were read for the last time.
    pub(crate) fn release(&self, range: std::ops::Range<usize>) {
        const PAGE: usize = 4096;
        let start = range.start.next_multiple_of(PAGE);
        let end = range.end.min(self.map.len()) / PAGE * PAGE;
        if start < end {
            // SAFETY: a private, read-only map of a file: dropped pages are read from the file
            // again on the next access, with the same contents.
            let advised = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    start,
                    end - start,
                )
            };
            // Only advice: without it the pages stay resident a while longer.
            let _ = advised;
        }
    }
}
