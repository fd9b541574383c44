//! Where ONNX Runtime's dynamic library lies.
//!
//! It is looked for, in this order: where the options say; `ORT_DYLIB_PATH`; beside the running program (also in
//! `lib` there and in `../lib`); the folders of the dynamic loader's own variable; the usual library folders.
//! What is named must load; what is only found may be absent.

use std::env::consts::{ARCH, DLL_PREFIX, DLL_SUFFIX};
use std::path::{Path, PathBuf};

/// The variable that the `ort` crate and other programs know.
const VARIABLE: &str = "ORT_DYLIB_PATH";

/// Where the library is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Library {
    /// Here, or named to be here.
    At(PathBuf),
    /// Nowhere.
    Absent {
        /// Folders that were looked into.
        looked: Vec<PathBuf>,
    },
}

impl Library {
    /// The library at `named`, or else wherever it is.
    pub fn find(named: Option<&Path>) -> Self {
        let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match named.map(Path::to_owned).or(variable.map(PathBuf::from)) {
            Some(path) => Self::in_named(path),
            None => Self::in_folders(folders()),
        }
    }

    /// `path` itself, or the library in it when it is a folder.
    fn in_named(path: PathBuf) -> Self {
        if path.is_dir() {
            return match newest_in(&path) {
                Some(library) => Self::At(library),
                None => Self::Absent { looked: vec![path] },
            };
        }
        Self::At(path)
    }

    fn in_folders(folders: Vec<PathBuf>) -> Self {
        match folders.iter().find_map(|folder| newest_in(folder)) {
            Some(library) => Self::At(library),
            None => Self::Absent { looked: folders },
        }
    }

    /// What to do when it is absent, with what was tried.
    pub fn remedy(&self) -> String {
        let Self::Absent { looked } = self else { return String::new() };
        let looked: Vec<_> = looked.iter().map(|path| path.display().to_string()).collect();
        format!(
            "ONNX Runtime's library {} was not found (looked into {}); install ONNX Runtime 1.24 or later (its \
             release archive, or `pip install onnxruntime`, which holds it in onnxruntime/capi) and give the \
             library's path as [policy] onnx_library or in {VARIABLE}",
            file_name(),
            looked.join(", ")
        )
    }
}

fn file_name() -> String {
    format!("{DLL_PREFIX}onnxruntime{DLL_SUFFIX}")
}

/// The library in `folder`: the plain name, or else the highest version (`libonnxruntime.so.1.31.1`).
fn newest_in(folder: &Path) -> Option<PathBuf> {
    let plain = folder.join(file_name());
    if plain.is_file() {
        return Some(plain);
    }
    let (stem, suffix) = (format!("{DLL_PREFIX}onnxruntime"), DLL_SUFFIX);
    let version = |name: &str| -> Option<Vec<u32>> {
        // Linux writes the version behind the suffix, macOS before it.
        let rest = name.strip_prefix(&stem)?;
        let digits = match rest.strip_prefix(suffix) {
            Some(behind) => behind,
            None => rest.strip_suffix(suffix)?,
        };
        digits.strip_prefix('.')?.split('.').map(|part| part.parse().ok()).collect()
    };
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let versions = entries.filter_map(|entry| {
        let version = version(entry.file_name().to_str()?)?;
        Some((version, entry.path()))
    });
    versions.max().map(|(_, path)| path)
}

fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        folders.extend([folder.to_owned(), folder.join("lib"), folder.join("../lib")]);
    }
    let variable = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
    if let Some(list) = std::env::var_os(variable) {
        folders.extend(std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty()));
    }
    folders.push("/usr/local/lib".into());
    folders.push(format!("/usr/lib/{ARCH}-linux-gnu").into());
    folders.extend(
        ["/usr/lib", "/usr/lib64", "/opt/onnxruntime/lib", "/opt/homebrew/lib"].map(PathBuf::from),
    );
    folders
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn folder_with(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for file in files {
            std::fs::write(folder.path().join(file), "").expect("it can be written");
        }
        folder
    }

    #[test]
    fn the_highest_version_is_taken_by_number() {
        let folder = folder_with(&[
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.31.1",
            "libonnxruntime_providers_shared.so",
            "libonnxruntime.so.bak",
        ]);
        let found = Library::in_folders(vec!["/nowhere".into(), folder.path().to_owned()]);
        assert_eq!(found, Library::At(folder.path().join("libonnxruntime.so.1.31.1")));
    }

    #[test]
    fn the_plain_name_comes_first() {
        let folder = folder_with(&["libonnxruntime.so.1.31.1", "libonnxruntime.so"]);
        let found = Library::in_named(folder.path().to_owned());
        assert_eq!(found, Library::At(folder.path().join("libonnxruntime.so")));
    }

    #[test]
    fn an_absent_library_is_said_with_the_folders_and_the_fix() {
        let folder = folder_with(&["libonnxruntime_providers_shared.so"]);
        let remedy = Library::in_folders(vec![folder.path().to_owned()]).remedy();
        let path = folder.path().display().to_string();
        for word in [path.as_str(), "pip install onnxruntime", "onnx_library", VARIABLE, "1.24"] {
            assert!(remedy.contains(word), "{word}: {remedy}");
        }
    }
}
