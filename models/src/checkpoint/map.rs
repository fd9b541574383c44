//! Files mapped into memory: the crate's only unsafe code.

#![allow(unsafe_code)]

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::ModelError;
use crate::gguf::hex;

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

    /// SHA-256 of the bytes from `start` on. Its pages are given back on the way: most of a file may be layers that are
    /// packed elsewhere, and tables of which a few rows are read.
    pub(crate) fn sha256(&self, start: usize) -> String {
        const PART: usize = 1 << 22;
        let mut hash = Sha256::new();
        let mut at = start;
        for part in self.bytes().get(start..).unwrap_or_default().chunks(PART) {
            hash.update(part);
            self.release(at..at + part.len());
            at += part.len();
        }
        hex(&hash.finalize())
    }

    /// Lets the kernel take back the pages of `range` (bytes), which were read for the last time, and those that it mapped
    /// with them.
    pub(crate) fn release(&self, range: std::ops::Range<usize>) {
        /// Bytes that the kernel maps at a time where one is read.
        const AROUND: usize = 64 << 10;
        let start = range.start / AROUND * AROUND;
        let end = range.end.next_multiple_of(AROUND).min(self.map.len());
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the mapping of `path` that are in memory.
    #[cfg(target_os = "linux")]
    fn resident(path: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
        let mut lines = maps.lines().skip_while(|l| !l.ends_with(&*path.to_string_lossy()));
        let line = lines.find_map(|l| l.strip_prefix("Rss:")).expect("it is mapped");
        let kilobytes = line.trim().trim_end_matches(" kB");
        kilobytes.parse::<usize>().expect("a number") << 10
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_are_given_back_when_they_were_hashed() {
        let dir = tempfile::tempdir().expect("there is room");
        let path = dir.path().join("weights");
        let bytes: Vec<u8> = (0..(9 << 20) + 77u32).map(|i| (i >> 3) as u8).collect();
        std::fs::write(&path, &bytes).expect("there is room");
        let file = MappedFile::open(&path).expect("it was written");
        assert_eq!(file.sha256(1001), hex(&Sha256::digest(&bytes[1001..])));
        assert!(resident(&path) < 1 << 20, "{} bytes", resident(&path));
        // They are there again when they are read.
        assert_eq!(file.bytes(), bytes);
        assert!(resident(&path) > 8 << 20, "{} bytes", resident(&path));
        file.release(0..bytes.len());
        assert_eq!(resident(&path), 0);
        assert_eq!(file.sha256(usize::MAX), hex(&Sha256::digest([])));
    }
}
