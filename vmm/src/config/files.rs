//! Rules on the files that a configuration names: no disk twice, and nothing
//! overwritten that is used otherwise.
//!
//! Files are told apart by device and inode (block devices by their number),
//! so other names and links for the same file are seen. What the images of disks refer to is used
//! as they are; for that alone files are opened. A file that cannot be looked at is left to whoever opens it.
//!
//! Messages name the parts of a machine, which are the same whether flags, a file or a client described
//! it; what only flags give is named by them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use block::ops::referred;
use block::{BackingPolicy, Format};
use serde_json::Value;
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::vsock::is_vsock;
use super::{COMS, CONSOLE_FLAGS, ConfigError, CpuBaseline, DeviceConfig, SinkConfig, VmConfig};
use crate::opener::Opener;
use crate::sandbox::files::Rule;

/// The kind of the model that is a disk, and its keys that matter here.
const DISK: &str = "blk";
const DISK_PATH: &str = "path";
const DISK_READ_ONLY: &str = "readonly";
const DISK_FORMAT: &str = "format";
const DISK_BACKING: &str = "backing";

/// What writes files.
const SERIAL: &str = "the serial port";
const CONSOLES: [&str; COMS + 1] = [
    SERIAL,
    "the second serial port",
    "the third serial port",
    "the fourth serial port",
    "the virtio console",
];
const PORT: &str = "a named port";
const DEBUGCON: &str = "the debug console";
const MIRROR: &str = "the mirror of a network card";
/// The key of that, which is no file that the machine reads.
const MIRROR_FILE: &str = "mirror_file";
/// What a core dump is called.
pub const DUMP: &str = "the core dump";
/// What a snapshot is called.
pub const SNAPSHOT: &str = "the snapshot";
/// What a new overlay of a disk is called.
pub const OVERLAY: &str = "the new overlay";
/// What another place for a disk is called.
pub const COPY: &str = "the copy";

/// What tells one file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Identity {
    /// A regular file: its file system and inode.
    File(u64, u64),
    /// A block device: its number.
    Block(u64),
    /// Not there yet.
    Absent(PathBuf),
}

impl Identity {
    /// `None` for what can be used twice without harm: character devices, pipes.
    fn of(path: &Path) -> Option<Self> {
        match fs::metadata(path) {
            Ok(facts) if facts.is_file() => Some(Self::File(facts.dev(), facts.ino())),
            Ok(facts) if facts.file_type().is_block_device() => Some(Self::Block(facts.rdev())),
            Ok(_) => None,
            Err(_) => Some(Self::Absent(absent(path))),
        }
    }
}

/// What is not there yet has one name, whatever links lead to its directory.
fn absent(path: &Path) -> PathBuf {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return path.to_owned(),
    };
    match (fs::canonicalize(directory), path.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => path.to_owned(),
    }
}

/// The files that a monitor writes for itself: its events, its log, its socket's lock. What has
/// been opened is known even under another name.
#[derive(Clone, Debug, Default)]
pub struct OwnFiles {
    files: Vec<(Identity, String)>,
}

impl OwnFiles {
    /// Takes up a file that has been opened, and what it is for.
    pub fn add(&mut self, path: &Path, user: &str) {
        let identity = Identity::of(path);
        self.files
            .extend(identity.map(|identity| (identity, user.to_owned())));
    }

    /// These, and where this process's standard output and error lead now.
    fn in_use(&self) -> Vec<(Identity, String)> {
        let mut used = self.files.clone();
        for (path, user) in [
            ("/proc/self/fd/1", "standard output"),
            ("/proc/self/fd/2", "standard error"),
        ] {
            let opened = fs::metadata(path).ok().filter(fs::Metadata::is_file);
            used.extend(opened.map(|facts| {
                let identity = Identity::File(facts.dev(), facts.ino());
                (identity, user.to_owned())
            }));
        }
        used
    }
}

/// Rules for the files of a machine: what it is described with, and what the images of its disks refer to.
#[must_use]
pub fn reached(config: &VmConfig, models: &[Model], opener: &Opener) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut each = |path: &mut PathBuf, write| rules.extend(Rule::of_use(path, write));
    config.clone().each_path(models, &mut each);
    let disks = config.devices.iter().filter(|device| device.kind == DISK);
    let below = disks.flat_map(|disk| below(&disk.config, opener));
    // An image names what it likes.
    rules.extend(below.filter_map(|path| Rule::of_use(&path, false)));
    rules
}

/// Checks the rules.
///
/// # Errors
///
/// [`ConfigError::SameDisk`] and [`ConfigError::OutputInUse`].
pub fn check(config: &VmConfig, models: &[Model], opener: &Opener) -> Result<(), ConfigError> {
    check_disks(config)?;
    check_outputs(config, models, opener)
}

fn check_disks(config: &VmConfig) -> Result<(), ConfigError> {
    let disks: Vec<_> = config.devices.iter().filter(|d| d.kind == DISK).collect();
    if disks.len() < 2 {
        return Ok(());
    }
    let mut seen: Vec<(Identity, bool, &str, &Path)> = Vec::new();
    for disk in disks {
        let Some(path) = disk
            .config
            .get(DISK_PATH)
            .and_then(Value::as_str)
            .map(Path::new)
        else {
            continue;
        };
        let read_only = disk.config.get(DISK_READ_ONLY) == Some(&Value::Bool(true));
        let Some(identity) = Identity::of(path) else {
            continue;
        };
        let clash = seen.iter().find(|(other, other_read_only, ..)| {
            *other == identity && !(read_only && *other_read_only)
        });
        if let Some((_, _, first, first_path)) = clash {
            return Err(ConfigError::SameDisk {
                first: (*first).to_owned(),
                first_path: first_path.to_path_buf(),
                second: disk.id.clone(),
                second_path: path.to_owned(),
            });
        }
        seen.push((identity, read_only, &disk.id, path));
    }
    Ok(())
}

fn check_outputs(config: &VmConfig, models: &[Model], opener: &Opener) -> Result<(), ConfigError> {
    let outputs = outputs(config);
    if outputs.is_empty() {
        return Ok(());
    }
    let mut used = identified(inputs(config, models, opener));
    for (user, path) in outputs {
        claim(&mut used, user, path)?;
    }
    Ok(())
}

/// Checks that a sink of the serial port that is added to a running machine
/// writes over nothing that the machine or the monitor uses.
///
/// # Errors
///
/// [`ConfigError::OutputInUse`].
pub fn check_sink(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
    own: &OwnFiles,
    sink: &SinkConfig,
) -> Result<(), ConfigError> {
    let mut used = in_use(config, models, opener);
    used.extend(own.in_use());
    sink.outputs()
        .try_for_each(|path| claim(&mut used, SERIAL, path))
}

/// Checks that `what`, a file at `path` that is about to be made ([`DUMP`], [`SNAPSHOT`], [`OVERLAY`], [`COPY`]), is nothing that the machine or
/// the monitor uses or is about to make.
///
/// # Errors
///
/// [`ConfigError::OutputInUse`].
pub fn check_new(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
    own: &OwnFiles,
    (what, path): (&'static str, &Path),
) -> Result<(), ConfigError> {
    let mut used = in_use(config, models, opener);
    used.extend(own.in_use());
    claim(&mut used, what, path.to_owned())
}

/// Checks that files which the monitor writes for itself are none that the machine uses.
/// Each comes with its flag.
///
/// # Errors
///
/// [`ConfigError::OutputInUse`].
pub fn check_own<'a>(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
    own: impl Iterator<Item = (&'static str, &'a Path)>,
) -> Result<(), ConfigError> {
    let mut used = in_use(config, models, opener);
    own.into_iter()
        .try_for_each(|(flag, path)| claim(&mut used, flag, path.to_owned()))
}

/// [`check`] and [`check_machine`]: what holds of a machine of a client.
///
/// # Errors
///
/// [`ConfigError::SameDisk`] and [`ConfigError::OutputInUse`].
pub fn check_all(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
    own: &OwnFiles,
) -> Result<(), ConfigError> {
    check(config, models, opener)?;
    check_machine(config, models, opener, own)
}

/// Checks that a machine of a client neither writes over the monitor's own files nor reads what the monitor
/// writes.
///
/// # Errors
///
/// [`ConfigError::OutputInUse`].
pub fn check_machine(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
    own: &OwnFiles,
) -> Result<(), ConfigError> {
    let mut used = own.in_use();
    for (path, other) in inputs(config, models, opener) {
        let identity = Identity::of(&path);
        let writer = used.iter().find(|(own, _)| Some(own) == identity.as_ref());
        if let Some((_, output)) = writer {
            let output = output.clone();
            return Err(ConfigError::OutputInUse {
                output,
                path,
                other,
            });
        }
    }
    outputs(config)
        .into_iter()
        .try_for_each(|(user, path)| claim(&mut used, user, path))
}

/// The flag, without dashes, that gives what breaks one of these rules, where the machine comes from flags.
#[must_use]
pub fn flag_of(error: &ConfigError) -> Option<&'static str> {
    let output = match error {
        ConfigError::SameDisk { .. } => return Some("disk"),
        ConfigError::OutputInUse { output, .. } => output,
        _ => return None,
    };
    let consoles = CONSOLES.into_iter().zip(CONSOLE_FLAGS);
    let others = [
        (PORT, "--port"),
        (DEBUGCON, "--debugcon"),
        (MIRROR, "--net"),
    ];
    let mut writers = consoles.chain(others);
    let (_, flag) = writers.find(|(writer, _)| writer == output)?;
    Some(flag.trim_start_matches('-'))
}

/// Checks that every file is there that the machine reads.
///
/// # Errors
///
/// [`ConfigError::Missing`].
pub fn check_present(
    config: &VmConfig,
    models: &[Model],
    opener: &Opener,
) -> Result<(), ConfigError> {
    let mut used = inputs(config, models, opener).into_iter();
    let missing = used.find(|(path, _)| {
        let absent = matches!(Identity::of(path), Some(Identity::Absent(_)));
        absent && !path.to_string_lossy().contains("://")
    });
    missing.map_or(Ok(()), |(path, user)| {
        Err(ConfigError::Missing { user, path })
    })
}

/// Every file that the machine uses or writes, and what does.
fn in_use(config: &VmConfig, models: &[Model], opener: &Opener) -> Vec<(Identity, String)> {
    let mut used = inputs(config, models, opener);
    let outputs = outputs(config).into_iter();
    used.extend(outputs.map(|(user, path)| (path, user.to_owned())));
    identified(used)
}

/// The files by what tells them apart.
fn identified(files: Vec<(PathBuf, String)>) -> Vec<(Identity, String)> {
    let files = files.into_iter();
    files
        .filter_map(|(path, user)| Some((Identity::of(&path)?, user)))
        .collect()
}

/// The files that the machine writes, and what writes them.
fn outputs(config: &VmConfig) -> Vec<(&'static str, PathBuf)> {
    let mut outputs = Vec::new();
    for (flag, console) in CONSOLES.into_iter().zip(config.consoles()) {
        let paths = console.sinks().iter().flat_map(SinkConfig::outputs);
        outputs.extend(paths.map(|path| (flag, path)));
    }
    let ports = config.ports.iter().filter_map(|port| port.file.clone());
    outputs.extend(ports.map(|path| (PORT, path)));
    let cards = config.devices.iter().filter_map(DeviceConfig::network);
    let mirrors = cards.filter_map(|card| card.mirror_file);
    outputs.extend(mirrors.map(|path| (MIRROR, path)));
    outputs.extend(
        config
            .debugcon
            .output()
            .map(|path| (DEBUGCON, path.to_owned())),
    );
    outputs
}

/// Adds a file that `user` writes to those in use.
fn claim(
    used: &mut Vec<(Identity, String)>,
    user: &'static str,
    path: PathBuf,
) -> Result<(), ConfigError> {
    let Some(identity) = Identity::of(&path) else {
        return Ok(());
    };
    if let Some((_, other)) = used.iter().find(|(other, _)| *other == identity) {
        let other = other.clone();
        return Err(ConfigError::OutputInUse {
            output: user.to_owned(),
            path,
            other,
        });
    }
    used.push((identity, user.to_owned()));
    Ok(())
}

/// Every file that the machine uses besides its outputs, and what uses it.
fn inputs(config: &VmConfig, models: &[Model], opener: &Opener) -> Vec<(PathBuf, String)> {
    let mut named: Vec<(PathBuf, String)> = Vec::new();
    if let Some(path) = &config.payload.kernel {
        named.push((path.clone(), "the kernel".to_owned()));
    }
    if let Some(path) = &config.payload.initramfs {
        named.push((path.clone(), "the initramfs".to_owned()));
    }
    if let CpuBaseline::File(path) = &config.cpus.baseline {
        named.push((path.clone(), "the CPU baseline".to_owned()));
    }
    // What a socket device listens at is not there before.
    let devices = config.devices.iter().filter(|device| !is_vsock(device));
    for device in devices {
        let fields = models
            .iter()
            .find(|model| model.kind == device.kind)
            .map_or(&[][..], |model| model.fields);
        let user = format!("'{}'", device.id);
        let read = |field: &&Field| field.kind == FieldKind::Path && field.name != MIRROR_FILE;
        for field in fields.iter().filter(read) {
            if let Some(path) = device.config.get(field.name).and_then(Value::as_str) {
                named.push((PathBuf::from(path), user.clone()));
            }
        }
        if device.kind == DISK {
            let others = below(&device.config, opener).into_iter();
            named.extend(others.map(|path| (path, user.clone())));
        }
    }
    named
}

/// The files that the image of a disk refers to.
fn below(disk: &Value, opener: &Opener) -> Vec<PathBuf> {
    let key = |name| disk.get(name).cloned().unwrap_or_default();
    let format = serde_json::from_value::<Format>(key(DISK_FORMAT)).ok();
    match disk.get(DISK_PATH).and_then(Value::as_str) {
        Some(path) if format == Some(Format::Qcow2) && !path.contains("://") => {
            let policy = serde_json::from_value::<BackingPolicy>(key(DISK_BACKING));
            referred(Path::new(path), opener, policy.unwrap_or_default())
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
