//! Kernel modules out of an unpacked kernel package, in loading order.
//!
//! Packages carry no `modules.dep`; what a module needs is in the `depends=`
//! entry of its `.modinfo` section.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::through;

/// One module, inflated.
#[derive(Debug)]
pub struct Module {
    /// Its name with underscores, as `lsmod` prints it.
    pub name: String,
    /// The ELF file that `insmod` takes.
    pub content: Vec<u8>,
}

/// Reads `wanted` and everything they depend on, in the order in which they
/// can be loaded. A name that the package does not have is left out: in some
/// kernels it is built in.
///
/// # Errors
/// The package has no modules directory, or a module cannot be read.
pub fn in_load_order(package: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    index(&modules_directory(package)?, &mut files)?;
    let mut loaded = Vec::new();
    for name in wanted {
        load(name, &files, &mut loaded)?;
    }
    Ok(loaded)
}

fn modules_directory(package: &Path) -> Result<PathBuf> {
    ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|dir| package.join(dir))
        .find(|dir| dir.is_dir())
        .with_context(|| format!("{} has no lib/modules; run `make setup`", package.display()))
}

fn index(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((stem, _)) = name.split_once(".ko")
        {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn load(name: &str, files: &HashMap<String, PathBuf>, loaded: &mut Vec<Module>) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let packed = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let content = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => through("xz", &packed)?,
        Some("zst") => through("zstd", &packed)?,
        Some("gz") => through("gzip", &packed)?,
        _ => packed,
    };
    for dependency in dependencies(&content) {
        load(&dependency, files, loaded)?;
    }
    loaded.push(Module { name, content });
    Ok(())
}

/// The names in the module's `depends=` entry.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("lib/modules/6.1/kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (file, depends) in modules {
            let content = format!("license=GPL\0depends={depends}\0retpoline=Y\0");
            fs::write(kernel.join(file), content).unwrap();
        }
        dir
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = package(&[
            ("virtio_pci.ko", "virtio,virtio-ring"),
            ("virtio-ring.ko", "virtio"),
            ("virtio.ko", ""),
        ]);
        let modules = in_load_order(dir.path(), &["virtio_pci", "virtio", "built_in"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci"]);
    }

    #[test]
    fn a_package_without_modules_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(in_load_order(dir.path(), &["virtio"]).is_err());
    }
}
