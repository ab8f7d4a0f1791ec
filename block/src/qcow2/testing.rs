//! What the tests of the format share: images in files, made and judged by qemu-img where it is installed.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use tempfile::TempDir;

use crate::file::{HostFile, Kind};
use crate::storage::FileStorage;

/// A directory with images that go with it.
pub(crate) struct Bench {
    dir: TempDir,
}

impl Bench {
    /// An empty one; `None`, with a word about it, where qemu-img is not installed.
    pub(crate) fn with_qemu() -> Option<Self> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("skipped: qemu-img is not installed");
            return None;
        }
        Some(Self::new())
    }

    pub(crate) fn new() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command in the directory.
    pub(crate) fn try_run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(self.dir.path());
        command.output().unwrap()
    }

    /// Runs a command in the directory that must succeed; what it printed.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        let output = self.try_run(words);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {out}{err}");
        out
    }

    /// Runs a command given as one line, in words without spaces.
    pub(crate) fn line(&self, line: &str) -> String {
        self.run(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// A storage on a file, which is made if it is not there.
    pub(crate) fn storage(&self, name: &str) -> FileStorage {
        open(&self.path(name))
    }

    pub(crate) fn bytes(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        let file = std::fs::File::open(self.path(name)).unwrap();
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match file
                .read_at(&mut bytes[done..], offset + done as u64)
                .unwrap()
            {
                0 => break,
                n => done += n,
            }
        }
        bytes
    }

    pub(crate) fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = OpenOptions::new()
            .write(true)
            .open(self.path(name))
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// What `qemu-img check` exits with.
    pub(crate) fn qemu_check(&self, name: &str) -> i32 {
        let words = ["qemu-img", "check", "-q", "-f", "qcow2", name];
        self.try_run(&words).status.code().unwrap()
    }
}

fn open(path: &Path) -> FileStorage {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).unwrap();
    FileStorage::new(Arc::new(HostFile::new(file, Kind::Regular, false).unwrap()))
}
