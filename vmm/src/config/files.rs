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

use super::{COMS, CONSOLE_FLAGS, ConfigError, CpuBaseline, DeviceConfig, SinkConfig, VmConfig};
use crate::opener::Opener;

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
            Err(_) => Some(Self::Absent(path.to_owned())),
        }
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
    for device in &config.devices {
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
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::super::device::tests::TEST_MODELS;
    use super::super::serial::FileSink;
    use super::super::{DebugconConfig, SerialConfig};
    use super::*;

    struct Case {
        dir: tempfile::TempDir,
        config: VmConfig,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("a.img"), "a").unwrap();
            fs::write(dir.path().join("kernel"), "k").unwrap();
            symlink("a.img", dir.path().join("link")).unwrap();
            let kernel = dir.path().join("kernel");
            let config = serde_json::from_value(json!({"payload": {"kernel": kernel}})).unwrap();
            Self { dir, config }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn disk(mut self, name: &str, read_only: bool) -> Self {
            self.config.devices.push(DeviceConfig {
                kind: "blk".to_owned(),
                id: format!("disk{}", self.config.devices.len()),
                address: None,
                config: json!({"path": self.path(name), "readonly": read_only}),
            });
            self
        }

        fn serial(mut self, name: &str) -> Self {
            self.config.serial = SinkConfig::File(FileSink::new(self.path(name))).into();
            self
        }

        fn check(&self) -> Result<(), String> {
            check(&self.config, TEST_MODELS, &Opener::new()).map_err(|error| error.to_string())
        }
    }

    #[test]
    fn the_registry_and_the_test_models_have_the_disks_keys() {
        for model in virtio::models::MODELS.iter().chain(TEST_MODELS) {
            if model.kind == DISK {
                let has = |name, kind| {
                    let mut fields = model.fields.iter();
                    fields.any(|field| field.name == name && field.kind == kind)
                };
                assert!(has(DISK_PATH, FieldKind::Path));
                assert!(has(DISK_READ_ONLY, FieldKind::Switch));
            }
        }
    }

    #[test]
    fn the_same_disk_under_two_names_is_refused_and_both_are_named() {
        let message = Case::new().disk("a.img", false).disk("link", true).check();
        let message = message.unwrap_err();
        for part in ["a.img", "link", "'disk0'", "'disk1'", "readonly"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn the_same_disk_may_be_read_twice() {
        let case = Case::new().disk("a.img", true).disk("link", true);
        assert_eq!(case.check(), Ok(()));
        assert!(case.disk("a.img", false).check().is_err());
    }

    #[test]
    fn a_missing_disk_given_twice_is_refused_and_different_ones_are_not() {
        assert!(
            Case::new()
                .disk("x", false)
                .disk("x", false)
                .check()
                .is_err()
        );
        assert_eq!(
            Case::new().disk("x", false).disk("y", false).check(),
            Ok(())
        );
    }

    #[test]
    fn an_output_does_not_overwrite_what_the_machine_uses() {
        for (case, other) in [
            (Case::new().serial("kernel"), "the kernel"),
            (Case::new().disk("a.img", true).serial("link"), "'disk0'"),
        ] {
            let message = case.check().unwrap_err();
            assert!(message.starts_with("the serial port: "), "{message}");
            assert!(message.contains(other), "{message}");
        }
        assert_eq!(
            Case::new().disk("a.img", true).serial("log").check(),
            Ok(())
        );
    }

    #[test]
    fn two_outputs_are_two_files_unless_they_keep_nothing() {
        let mut case = Case::new().serial("log");
        case.config.debugcon = DebugconConfig::File(case.path("log"));
        assert!(case.check().unwrap_err().contains("the debug console"));
        let null = SinkConfig::File(FileSink::new("/dev/null"));
        case.config.serial = SerialConfig::Sinks(vec![null.clone(), null]);
        case.config.debugcon = DebugconConfig::File("/dev/null".into());
        assert_eq!(case.check(), Ok(()));
    }

    #[test]
    fn each_console_and_port_writes_to_a_file_of_its_own_and_its_flag_is_known() {
        let mut own = OwnFiles::default();
        let mut case = Case::new();
        fs::write(case.path("own"), "").unwrap();
        own.add(&case.path("own"), "--log-file");
        let to = |path: &Path| SerialConfig::from(SinkConfig::File(FileSink::new(path)));
        for (index, flag) in CONSOLE_FLAGS.into_iter().enumerate() {
            let mut config = case.config.clone();
            *config.consoles_mut()[index] = to(&case.path("kernel"));
            let refused = check(&config, TEST_MODELS, &Opener::new()).unwrap_err();
            assert_eq!(flag_of(&refused), Some(flag.trim_start_matches('-')));
            *config.consoles_mut()[index] = to(&case.path("own"));
            assert!(check_machine(&config, TEST_MODELS, &Opener::new(), &own).is_err());
            *config.consoles_mut()[index] = to(&case.path("log"));
            assert_eq!(check(&config, TEST_MODELS, &Opener::new()), Ok(()));
        }
        for (name, fits) in [("kernel", false), ("log", true)] {
            case.config.ports = vec![api::wire::PortConfig {
                name: "a".to_owned(),
                file: Some(case.path(name)),
                ..Default::default()
            }];
            let checked = check(&case.config, TEST_MODELS, &Opener::new());
            let flag = checked.as_ref().err().and_then(flag_of);
            assert_eq!((checked.is_ok(), flag), (fits, (!fits).then_some("port")));
        }
        case.config.console = to(&case.path("log"));
        assert!(case.check().unwrap_err().contains("a named port"));
    }

    #[test]
    fn a_file_with_a_limit_does_not_replace_what_the_machine_uses() {
        let mut case = Case::new().disk("log.1", false).serial("log");
        assert_eq!(case.check(), Ok(()));
        let limited = SinkConfig::File(FileSink {
            max_size: Some(1 << 20),
            ..FileSink::new(case.path("log"))
        });
        case.config.serial = limited.clone().into();
        assert!(case.check().unwrap_err().contains("'disk0'"));
        case.config.serial = SerialConfig::Off;
        let check = |sink| {
            check_sink(
                &case.config,
                TEST_MODELS,
                &Opener::new(),
                &OwnFiles::default(),
                sink,
            )
        };
        assert!(check(&limited).unwrap_err().to_string().contains("'disk0'"));
        assert_eq!(check(&SinkConfig::Pty), Ok(()));
    }

    #[test]
    fn a_sink_that_is_added_later_writes_to_a_file_of_its_own() {
        let case = Case::new().serial("log");
        let check = |name| {
            let sink = SinkConfig::File(FileSink::new(case.path(name)));
            check_sink(
                &case.config,
                TEST_MODELS,
                &Opener::new(),
                &OwnFiles::default(),
                &sink,
            )
        };
        assert!(
            check("log")
                .unwrap_err()
                .to_string()
                .contains("the serial port")
        );
        assert!(check("kernel").is_err());
        assert_eq!(check("other"), Ok(()));
    }

    #[test]
    fn what_an_image_refers_to_is_in_use_as_far_as_the_policy_lets_it() {
        let mut case = Case::new().disk("top", false);
        for (name, backing, format, data_file) in [
            ("middle", "a.img", "raw", None),
            ("top", "middle", "qcow2", Some("data".to_owned())),
        ] {
            let options = block::CreateOptions {
                size: 1 << 20,
                backing: Some((backing.to_owned(), Some(format.to_owned()))),
                data_file,
                ..block::CreateOptions::default()
            };
            let image = block::ops::NewImage::Qcow2(Box::new(options));
            block::ops::create(&case.path(name), &Opener::new(), &image).unwrap();
        }
        for (format, backing, refused) in [
            ("qcow2", "directory", true),
            ("qcow2", "any", true),
            ("qcow2", "deny", false),
            ("raw", "any", false),
        ] {
            let disk = &mut case.config.devices[0].config;
            disk["format"] = json!(format);
            disk["backing"] = json!(backing);
            for name in ["a.img", "middle", "data"] {
                case = case.serial(name);
                let found = case.check();
                assert_eq!(
                    found.is_err(),
                    refused,
                    "{name} {format} {backing}: {found:?}"
                );
            }
        }
        case.config.devices[0].config["format"] = json!("qcow2");
        case = case.serial("top");
        assert!(case.check().unwrap_err().contains("'disk0'"));
        fs::remove_file(case.path("a.img")).unwrap();
        let missing = check_present(&case.config, TEST_MODELS, &Opener::new());
        assert!(
            missing
                .unwrap_err()
                .to_string()
                .contains("a.img cannot be found")
        );
    }

    #[test]
    fn the_monitors_own_files_are_no_sinks_even_under_another_name() {
        let case = Case::new();
        for name in ["log", "elsewhere"] {
            fs::write(case.path(name), "").unwrap();
        }
        let mut own = OwnFiles::default();
        own.add(&case.path("log"), "--log-file");
        fs::rename(case.path("log"), case.path("log.old")).unwrap();
        let sink = |name| SinkConfig::File(FileSink::new(case.path(name)));
        let check = |name| check_sink(&case.config, TEST_MODELS, &Opener::new(), &own, &sink(name));
        let refused = check("log.old").unwrap_err().to_string();
        assert!(refused.contains("--log-file"), "{refused}");
        assert_eq!(check("elsewhere"), Ok(()));
        let mut machine = case.config.clone();
        machine.serial = sink("log.old").into();
        let check = |machine: &VmConfig| check_machine(machine, TEST_MODELS, &Opener::new(), &own);
        assert!(check(&machine).is_err());
        machine.serial = sink("elsewhere").into();
        assert_eq!(check(&machine), Ok(()));
        machine.payload.initramfs = Some(case.path("log.old"));
        let refused = check(&machine).unwrap_err().to_string();
        assert!(refused.starts_with("--log-file: "), "{refused}");
        assert!(refused.contains("the initramfs"), "{refused}");
    }
}
