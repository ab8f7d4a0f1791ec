//! Where the testbed keeps its files.

use std::path::{Path, PathBuf};

/// The workspace's top directory, as an absolute path.
#[must_use]
pub fn workspace() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.parent().unwrap_or(crate_dir).to_path_buf()
}

/// Cargo's target directory; `CARGO_TARGET_DIR` moves it.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// What `tests/setup` unpacked and what the testbed builds from it.
#[must_use]
pub fn testbed() -> PathBuf {
    workspace().join("target/testbed")
}

/// Logs of guests and of the nested machine; kept until the next run.
#[must_use]
pub fn logs() -> PathBuf {
    testbed().join("logs")
}
