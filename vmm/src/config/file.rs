//! A machine as a TOML file: [`VmConfig`] with its fields' own names.
//!
//! Sizes are numbers of bytes, or texts as on the command line (`size = "2G"`). Paths that are
//! not absolute begin at the file's directory. Fields that mean nothing are refused.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::flag::{ValueError, parse_bytes};
use super::validate::bytes;
use super::{DebugconConfig, GdbConfig, MEMORY_FIELDS, SerialConfig, SinkConfig, VmConfig};
use crate::opener::{OpenError, Opener};

/// The longest file, in bytes.
const LIMIT: u64 = 1 << 20;

/// Keys of the whole machine that are sizes.
const SIZES: &[&str] = &["serial_replay"];
/// Keys of a sink of the serial port that are.
const SINK_SIZES: &[&str] = &["max_size"];

/// Why a text is no machine.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no text.
    #[error("{} is not UTF-8: it is no TOML file", path.display())]
    Encoding {
        /// The file.
        path: PathBuf,
    },
    /// It is no TOML.
    #[error("{}: line {line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A size is none.
    #[error("{}: {key} = {value:?}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// The key, with those above it.
        key: String,
        /// The text.
        value: String,
        /// What is wrong with it.
        #[source]
        source: ValueError,
    },
    /// It says what no machine has, or says it wrongly.
    #[error("{}: {reason}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// What.
        reason: String,
    },
}

impl VmConfig {
    /// Reads a file. Devices keep their open ids and slots; nothing but its form is checked.
    ///
    /// # Errors
    ///
    /// [`FileError`], which names the file.
    pub fn from_file(path: &Path, models: &[Model], opener: &Opener) -> Result<Self, FileError> {
        let bytes = opener.read_document(path, LIMIT)?;
        let text = String::from_utf8(bytes).map_err(|_| FileError::Encoding {
            path: path.to_owned(),
        })?;
        let mut config = Self::from_toml(&text, path, models)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        config.make_paths_absolute(directory, models);
        Ok(config)
    }

    /// Reads the text of the file at `path`, whose paths stay as they are.
    ///
    /// # Errors
    ///
    /// As [`VmConfig::from_file`].
    pub fn from_toml(text: &str, path: &Path, models: &[Model]) -> Result<Self, FileError> {
        let mut table: Table = toml::from_str(text).map_err(|error| FileError::Syntax {
            path: path.to_owned(),
            line: error.span().map_or(1, |span| line_of(text, span.start)),
            reason: one_line(error.message()),
        })?;
        let sizes = Sizes { path, models };
        sizes.read(&mut table)?;
        Self::deserialize(Value::Table(table)).map_err(|error| FileError::Shape {
            path: path.to_owned(),
            reason: one_line(&error.to_string()),
        })
    }

    /// The text of a file that gives this machine. Sizes are as short as they can be.
    #[must_use]
    pub fn to_toml(&self, models: &[Model]) -> String {
        // What a configuration holds, TOML can say.
        let mut table = Table::try_from(self).unwrap_or_default();
        for_each_size(&mut table, models, &mut |_, value| {
            if let Some(count) = value
                .as_integer()
                .and_then(|count| u64::try_from(count).ok())
            {
                let text = bytes(count);
                if !text.ends_with(|c: char| c.is_ascii_digit()) {
                    *value = Value::String(text);
                }
            }
            Ok::<(), ()>(())
        })
        .unwrap_or_default();
        toml::to_string(&table).unwrap_or_default()
    }

    /// Puts `directory` before every path that is not absolute.
    pub fn make_paths_absolute(&mut self, directory: &Path, models: &[Model]) {
        let absolute = |path: &mut PathBuf| *path = directory.join(&*path);
        self.payload.kernel.iter_mut().for_each(absolute);
        self.payload.initramfs.iter_mut().for_each(absolute);
        if let SerialConfig::Sinks(sinks) = &mut self.serial {
            for sink in sinks {
                match sink {
                    SinkConfig::File(file) => absolute(&mut file.path),
                    SinkConfig::Socket(socket) => absolute(&mut socket.path),
                    SinkConfig::Tty | SinkConfig::Pty | SinkConfig::Null => (),
                }
            }
        }
        if let DebugconConfig::File(path) = &mut self.debugcon {
            absolute(path);
        }
        if let Some(GdbConfig::Unix(path)) = &mut self.gdb {
            absolute(path);
        }
        for device in &mut self.devices {
            make_device_paths_absolute(device, directory, models);
        }
    }
}

/// Puts `directory` before those paths of a device that are not absolute.
/// An address, such as `nbd://host/disk`, stays.
pub fn make_device_paths_absolute(
    device: &mut super::DeviceConfig,
    directory: &Path,
    models: &[Model],
) {
    let model = models.iter().find(|model| model.kind == device.kind);
    let fields = model.map_or(&[][..], |model| model.fields);
    for field in fields.iter().filter(|field| field.kind == FieldKind::Path) {
        let Some(value) = device.config.get_mut(field.name) else {
            continue;
        };
        let relative = value.as_str().filter(|path| !path.contains("://"));
        let joined = relative.map(|path| directory.join(path));
        if let Some(path) = joined.as_deref().and_then(Path::to_str) {
            *value = serde_json::Value::String(path.to_owned());
        }
    }
}

/// Turns the sizes that are texts into numbers.
struct Sizes<'a> {
    path: &'a Path,
    models: &'a [Model],
}

impl Sizes<'_> {
    fn read(&self, table: &mut Table) -> Result<(), FileError> {
        for_each_size(table, self.models, &mut |key, value| {
            let Some(text) = value.as_str() else {
                return Ok(());
            };
            let wrong = |source| FileError::Size {
                path: self.path.to_owned(),
                key: key.to_owned(),
                value: text.to_owned(),
                source,
            };
            let count = parse_bytes(text).map_err(wrong)?;
            let count = i64::try_from(count).map_err(|_| wrong(ValueError::BytesOverflow))?;
            *value = Value::Integer(count);
            Ok(())
        })
    }
}

/// What is done with the value of a key.
type OnSize<'a, E> = &'a mut dyn FnMut(&str, &mut Value) -> Result<(), E>;

/// Goes through what is a size wherever it is.
fn for_each_size<E>(table: &mut Table, models: &[Model], change: OnSize<'_, E>) -> Result<(), E> {
    visit(table, "", SIZES.iter().copied(), change)?;
    let memory = table.get_mut("memory").and_then(Value::as_table_mut);
    if let Some(memory) = memory {
        visit(memory, "memory.", sizes_of(MEMORY_FIELDS), change)?;
    }
    for sink in tables(table.get_mut("serial")) {
        visit(sink, "serial.", SINK_SIZES.iter().copied(), change)?;
    }
    for group in tables(table.get_mut("rate_limit_groups")) {
        let limits = group.get_mut("limits").and_then(Value::as_table_mut);
        let bandwidth = limits.and_then(|limits| limits.get_mut("bandwidth"));
        if let Some(bucket) = bandwidth.and_then(Value::as_table_mut) {
            let keys = ["size", "one_time_burst"].into_iter();
            visit(bucket, "rate_limit_groups.limits.bandwidth.", keys, change)?;
        }
    }
    for device in tables(table.get_mut("devices")) {
        let kind = device.get("kind").and_then(Value::as_str);
        let model = models.iter().find(|model| Some(model.kind) == kind);
        let fields = model.map_or(&[][..], |model| model.fields);
        if let Some(config) = device.get_mut("config").and_then(Value::as_table_mut) {
            visit(config, "devices.config.", sizes_of(fields), change)?;
        }
    }
    Ok(())
}

fn sizes_of(fields: &[Field]) -> impl Iterator<Item = &'static str> + '_ {
    let sizes = fields.iter().filter(|field| field.kind == FieldKind::Bytes);
    sizes.map(|field| field.name)
}

/// The tables that there are: one alone, or those of a list.
fn tables(value: Option<&mut Value>) -> impl Iterator<Item = &mut Table> {
    let (one, many) = match value {
        Some(Value::Table(table)) => (Some(table), None),
        Some(Value::Array(list)) => (None, Some(list)),
        _ => (None, None),
    };
    let many = many.into_iter().flatten().filter_map(Value::as_table_mut);
    one.into_iter().chain(many)
}

fn visit<'a, E>(
    table: &mut Table,
    above: &str,
    keys: impl Iterator<Item = &'a str>,
    change: OnSize<'_, E>,
) -> Result<(), E> {
    for key in keys {
        if let Some(value) = table.get_mut(key) {
            change(&format!("{above}{key}"), value)?;
        }
    }
    Ok(())
}

/// The line, from 1, that has the byte at `offset`.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.bytes().take(offset);
    before
        .filter(|byte| *byte == b'\n')
        .count()
        .saturating_add(1)
}

/// The parser's message, which may have several lines.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::device::tests::TEST_MODELS;
    use virtio::models::MODELS;

    fn read(text: &str) -> Result<VmConfig, FileError> {
        VmConfig::from_toml(text, Path::new("vm.toml"), MODELS)
    }

    fn refusal(text: &str) -> String {
        crate::error::chain(&read(text).unwrap_err())
    }

    const FULL: &str = r#"
name = "web"
shutdown_timeout = 5
serial_replay = "1M"
serial = [{ file = "log", max_size = "8K" }, "pty"]

[payload]
kernel = "vmlinuz"
cmdline = "quiet"

[cpus]
boot = 2
max = 4

[memory]
size = "2G"
hotplug_size = 134217728

[[devices]]
kind = "blk"
id = "root"
config = { path = "a.img", l2_cache_size = "1M", bw_size = "10M", bw_refill_time = 1000 }

[[devices]]
kind = "blk"
config = { path = "nbd://host/disk" }

[[rate_limit_groups]]
id = "all"
limits.bandwidth = { size = "1M", refill_time = 100 }
"#;

    #[test]
    fn a_file_gives_a_machine_with_sizes_as_people_write_them() {
        let config = read(FULL).unwrap();
        assert_eq!(config.name.as_deref(), Some("web"));
        assert_eq!(
            (config.memory.size, config.memory.hotplug_size),
            (2 << 30, 128 << 20)
        );
        assert_eq!(config.serial_replay, 1 << 20);
        assert_eq!(config.devices[0].config["l2_cache_size"], json!(1 << 20));
        assert_eq!(config.devices[0].config["bw_size"], json!(10 << 20));
        let limits = config.rate_limit_groups[0].limits;
        assert_eq!(limits.bandwidth.unwrap().size, 1 << 20);
        assert!(config.pvpanic);
    }

    #[test]
    fn what_is_written_is_read_as_the_same() {
        let config = read(FULL).unwrap();
        let text = config.to_toml(MODELS);
        assert!(text.contains("size = \"2G\""), "{text}");
        assert_eq!(read(&text).unwrap(), config, "{text}");
        let empty = VmConfig::default();
        assert_eq!(read(&empty.to_toml(MODELS)).unwrap(), empty);
        assert_eq!(read("").unwrap(), empty);
    }

    #[test]
    fn relative_paths_begin_at_the_directory_and_addresses_stay() {
        let mut config = read(FULL).unwrap();
        config.debugcon = DebugconConfig::File("dbg".into());
        config.gdb = Some(GdbConfig::Unix("gdb".into()));
        config.make_paths_absolute(Path::new("/vm"), MODELS);
        assert_eq!(
            config.payload.kernel.as_deref(),
            Some(Path::new("/vm/vmlinuz"))
        );
        assert_eq!(config.devices[0].config["path"], json!("/vm/a.img"));
        assert_eq!(config.devices[1].config["path"], json!("nbd://host/disk"));
        assert_eq!(config.debugcon.output(), Some(Path::new("/vm/dbg")));
        assert_eq!(config.gdb, Some(GdbConfig::Unix("/vm/gdb".into())));
        let outputs: Vec<_> = config
            .serial
            .sinks()
            .iter()
            .flat_map(SinkConfig::outputs)
            .collect();
        assert_eq!(outputs[0], Path::new("/vm/log"));
        let before = config.clone();
        config.make_paths_absolute(Path::new("/other"), TEST_MODELS);
        assert_eq!(config, before);
    }

    #[test]
    fn what_is_wrong_is_named_on_one_line() {
        for (text, part) in [
            ("a = ", "vm.toml: line 1: "),
            ("name = \"x\"\n[memory\n", "vm.toml: line 2: "),
            (
                "[memory]\nsize = \"2Q\"",
                "memory.size = \"2Q\": not a size",
            ),
            ("[memory]\nsise = 1", "unknown field `sise`"),
            ("[memory]\nsize = -1", "vm.toml: "),
            ("colour = 1", "unknown field `colour`"),
            ("memory = 1", "vm.toml: "),
            ("[[devices]]\nkind = 1", "vm.toml: "),
            ("serial_replay = \"99999999999T\"", "serial_replay"),
        ] {
            let told = refusal(text);
            assert!(
                told.contains(part) && !told.contains('\n'),
                "{text}: {told}"
            );
        }
    }

    #[test]
    fn a_file_that_is_long_or_no_text_is_refused_and_deep_ones_do_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.toml");
        let from_file = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            VmConfig::from_file(&path, MODELS, &Opener::new())
        };
        let long = vec![b'#'; (1 << 20) + 1];
        assert!(
            from_file(&long)
                .unwrap_err()
                .to_string()
                .contains("too large")
        );
        assert!(
            from_file(b"name = \"\xff\"")
                .unwrap_err()
                .to_string()
                .contains("UTF-8")
        );
        let deep = format!("devices = {}", "[".repeat(100_000));
        assert!(from_file(deep.as_bytes()).is_err());
        let config = from_file(b"payload.kernel = \"k\"").unwrap();
        assert_eq!(config.payload.kernel, Some(directory.path().join("k")));
    }
}
