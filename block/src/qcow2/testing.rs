//! What the tests of the format share: images in files, made and judged by qemu-img where it is installed.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use crate::file::{HostFile, Kind};
use crate::storage::{FileStorage, Storage};

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
        self.try_run(&words).status.code().unwrap_or(134)
    }
}

fn open(path: &Path) -> FileStorage {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).unwrap();
    FileStorage::new(Arc::new(HostFile::new(file, Kind::Regular, false).unwrap()))
}

/// Storage in memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// It cannot grow, and has no zeros past its end: a device.
    fixed: bool,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            fixed: false,
        }
    }

    /// A device with these contents.
    pub(crate) fn device(bytes: Vec<u8>) -> Self {
        Self {
            fixed: true,
            ..Self::new(bytes)
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.fill(0);
        let bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        let rest = &bytes[start..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let end = start + buf.len();
        if bytes.len() < end {
            assert!(!self.fixed, "a write past the end of a device");
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !self.fixed {
            let len = usize::try_from(len).unwrap();
            self.bytes.lock().unwrap().resize(len, 0);
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; usize::try_from(len).unwrap()], offset)
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn grows_zeroed(&self) -> bool {
        !self.fixed
    }
}

/// What was done to a [`Recorder`].
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write(u64, Vec<u8>),
    Sync,
}

/// Memory that remembers every write and sync.
#[derive(Debug)]
pub(crate) struct Recorder {
    memory: Memory,
    start: Vec<u8>,
    steps: Mutex<Vec<Step>>,
}

impl Recorder {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            memory: Memory::new(bytes.clone()),
            start: bytes,
            steps: Mutex::default(),
        }
    }

    /// Contents after a loss of power, at each step: all that was synced, and of the rest of the writes each one
    /// that `kept` says.
    pub(crate) fn crashes(&self, mut kept: impl FnMut() -> bool) -> Vec<Vec<u8>> {
        let steps = self.steps.lock().unwrap();
        let apply = |memory: &Memory, step: &Step| match step {
            Step::Write(offset, bytes) => memory.write_at(bytes, *offset).unwrap(),
            Step::Sync => {}
        };
        let mut contents = Vec::new();
        for end in 0..=steps.len() {
            let done = &steps[..end];
            let is_sync = |step: &Step| matches!(step, Step::Sync);
            let synced = done.iter().rposition(is_sync).map_or(0, |last| last + 1);
            let memory = Memory::new(self.start.clone());
            done[..synced].iter().for_each(|step| apply(&memory, step));
            done[synced..]
                .iter()
                .filter(|_| kept())
                .for_each(|step| apply(&memory, step));
            contents.push(memory.bytes());
        }
        contents
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.memory.bytes()
    }
}

impl Storage for Recorder {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.steps
            .lock()
            .unwrap()
            .push(Step::Write(offset, buf.to_vec()));
        self.memory.write_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.steps.lock().unwrap().push(Step::Sync);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        panic!("not recorded")
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; usize::try_from(len).unwrap()], offset)
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn grows_zeroed(&self) -> bool {
        true
    }
}
