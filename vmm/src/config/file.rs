//! A machine as a TOML file: [`VmConfig`] with its fields' own names.
//!
//! Sizes are numbers of bytes, or texts as on the command line (`size = "2G"`). Paths that are
//! not absolute begin at the file's directory. Keys that mean nothing are refused, with their line.

use std::ops::Range;
use std::path::{Path, PathBuf};

use api::spelling::nearest;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::flag::parse_bytes;
use super::{
    CpuBaseline, DebugconConfig, GdbConfig, MEMORY_FIELDS, SerialConfig, SinkConfig, VmConfig,
    bytes,
};
use crate::opener::{OpenError, Opener};

/// The longest file, in bytes.
pub const LIMIT: u64 = 1 << 20;

/// Where the list of devices is, and what is told of one.
const DEVICES: &str = "devices";
const DEVICE_CONFIG: &str = "devices.config";

/// Why a text is no machine.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no text.
    #[error("{what}: it is not UTF-8, and so no TOML file")]
    Encoding {
        /// The file.
        what: String,
    },
    /// It is no TOML, or says what no machine has, or says it wrongly.
    #[error("{what}{}: {reason}", line.map_or_else(String::new, |line| format!(": line {line}")))]
    Text {
        /// The file.
        what: String,
        /// Where, from 1, if that can be told.
        line: Option<usize>,
        /// What is wrong there.
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
        let what = path.display().to_string();
        let text = read(path, &what, opener)?;
        let mut config = Self::from_toml(&text, &what, models)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        config.make_paths_absolute(directory, models);
        Ok(config)
    }

    /// Reads a text, whose paths stay as they are. Errors call it `what`.
    ///
    /// # Errors
    ///
    /// As [`VmConfig::from_file`].
    pub fn from_toml(text: &str, what: &str, models: &[Model]) -> Result<Self, FileError> {
        let wrong = |error: &toml::de::Error| FileError::Text {
            what: what.to_owned(),
            line: error.span().map(|span| line_of(text, span.start)),
            reason: one_line(error.message()),
        };
        let parsed = DeTable::parse(text).map_err(|error| wrong(&error))?;
        let mut sizes = Sizes {
            models,
            found: Vec::new(),
        };
        sizes
            .visit_table(parsed.get_ref(), "", None)
            .map_err(|(place, reason)| FileError::Text {
                what: what.to_owned(),
                line: Some(line_of(text, place)),
                reason,
            })?;
        toml::from_str(&sizes.replaced(text)).map_err(|error| wrong(&error))
    }

    /// The text of a file that gives this machine. Sizes are as short as they can be.
    #[must_use]
    pub fn to_toml(&self, models: &[Model]) -> String {
        // What a configuration holds, TOML can say.
        let mut whole = Value::Table(Table::try_from(self).unwrap_or_default());
        shorten(&mut whole, "", None, models);
        toml::to_string(&whole).unwrap_or_default()
    }

    /// Puts `directory` before every path that is not absolute.
    pub fn make_paths_absolute(&mut self, directory: &Path, models: &[Model]) {
        self.each_path(models, &mut |path, _| *path = joined(directory, path));
    }

    /// Calls `each` for every path, with whether it may be written.
    pub fn each_path(&mut self, models: &[Model], each: &mut dyn FnMut(&mut PathBuf, bool)) {
        let read = self
            .payload
            .kernel
            .iter_mut()
            .chain(&mut self.payload.initramfs);
        read.for_each(|path| each(path, false));
        for console in self.consoles_mut() {
            let SerialConfig::Sinks(sinks) = console else {
                continue;
            };
            for sink in sinks {
                match sink {
                    SinkConfig::File(file) => each(&mut file.path, true),
                    SinkConfig::Socket(socket) => each(&mut socket.path, true),
                    SinkConfig::Tty | SinkConfig::Pty | SinkConfig::Null => (),
                }
            }
        }
        for port in &mut self.ports {
            let written = port.socket.iter_mut().chain(&mut port.file);
            written.for_each(|path| each(path, true));
        }
        if let CpuBaseline::File(path) = &mut self.cpus.baseline {
            each(path, false);
        }
        if let DebugconConfig::File(path) = &mut self.debugcon {
            each(path, true);
        }
        if let Some(GdbConfig::Unix(path)) = &mut self.gdb {
            each(path, true);
        }
        self.each_path_of_the_display(each);
        for device in &mut self.devices {
            each_path_of(device, models, each);
        }
    }

    fn each_path_of_the_display(&mut self, each: &mut dyn FnMut(&mut PathBuf, bool)) {
        let Some(display) = &mut self.display else {
            return;
        };
        let mut address = |address: &mut String| {
            if let Some(path) = address.strip_prefix("unix:") {
                let mut path = PathBuf::from(path);
                each(&mut path, true);
                *address = format!("unix:{}", path.display());
            }
        };
        display
            .web
            .iter_mut()
            .for_each(|web| address(&mut web.address));
        display
            .vnc
            .iter_mut()
            .for_each(|vnc| address(&mut vnc.address));
        if let Some(vnc) = &mut display.vnc {
            vnc.password_file
                .iter_mut()
                .for_each(|path| each(path, false));
            if let Some(tls) = &mut vnc.tls {
                let read = [&mut tls.certificate, &mut tls.key];
                let read = read.into_iter().chain(&mut tls.client_authority);
                read.for_each(|path| each(path, false));
            }
        }
    }
}

/// The path in the directory, unless it is absolute, without steps that lead nowhere.
fn joined(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path).components().collect()
}

/// Puts `directory` before those paths of a device that are not absolute.
/// An address, such as `nbd://host/disk`, stays.
pub(crate) fn make_device_paths_absolute(
    device: &mut super::DeviceConfig,
    directory: &Path,
    models: &[Model],
) {
    let mut each = |path: &mut PathBuf, _| *path = joined(directory, path);
    each_path_of(device, models, &mut each);
}

/// Calls `each` for the paths of a device, which may be written; addresses are none.
fn each_path_of(
    device: &mut super::DeviceConfig,
    models: &[Model],
    each: &mut dyn FnMut(&mut PathBuf, bool),
) {
    let model = models.iter().find(|model| model.kind == device.kind);
    let fields = model.map_or(&[][..], |model| model.fields);
    for field in fields.iter().filter(|field| field.kind == FieldKind::Path) {
        let Some(value) = device.config.get_mut(field.name) else {
            continue;
        };
        let Some(path) = value.as_str().filter(|path| !path.contains("://")) else {
            continue;
        };
        let mut path = PathBuf::from(path);
        each(&mut path, true);
        if let Some(path) = path.to_str() {
            *value = serde_json::Value::String(path.to_owned());
        }
    }
}

/// The text of a file, which is called `what`.
///
/// # Errors
///
/// [`FileError`].
pub fn read(path: &Path, what: &str, opener: &Opener) -> Result<String, FileError> {
    let bytes = opener.read_document(path, LIMIT)?;
    String::from_utf8(bytes).map_err(|_| FileError::Encoding {
        what: what.to_owned(),
    })
}

/// What is wrong, and the byte of the text where.
type Wrong = (usize, String);

/// Finds the sizes that are texts. Lists do not count as levels of a path: `devices.config.path`.
struct Sizes<'a> {
    models: &'a [Model],
    /// Where they are, and their numbers; in order.
    found: Vec<(Range<usize>, String)>,
}

impl Sizes<'_> {
    fn visit(
        &mut self,
        value: &Spanned<DeValue<'_>>,
        path: &str,
        kind: Option<&str>,
    ) -> Result<(), Wrong> {
        match value.get_ref() {
            DeValue::Table(table) => self.visit_table(table, path, kind),
            DeValue::Array(list) => list
                .iter()
                .try_for_each(|item| self.visit(item, path, kind)),
            DeValue::String(text) if is_size(path, kind, self.models) => {
                let span = value.span();
                let count = parse_bytes(text)
                    .map_err(|error| (span.start, format!("{path} = {text:?}: {error}")))?;
                self.found.push((span, count.to_string()));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn visit_table(
        &mut self,
        table: &DeTable<'_>,
        path: &str,
        kind: Option<&str>,
    ) -> Result<(), Wrong> {
        let own = table.iter().find(|(key, _)| key.get_ref() == "kind");
        let own = own.and_then(|(_, value)| value.get_ref().as_str());
        let kind = if path == DEVICES { own } else { kind };
        for (key, value) in table {
            let name = key.get_ref();
            if path == DEVICE_CONFIG {
                check_key(name, kind, self.models).map_err(|reason| (key.span().start, reason))?;
            }
            self.visit(value, &below(path, name), kind)?;
        }
        Ok(())
    }

    /// The text with numbers in place of what has been found. Its lines stay, because a size has one.
    fn replaced(mut self, text: &str) -> String {
        self.found.sort_by_key(|(span, _)| span.start);
        let mut whole = text.to_owned();
        for (span, number) in self.found.iter().rev() {
            whole.replace_range(span.clone(), number);
        }
        whole
    }
}

/// Makes those sizes texts that have a short form.
fn shorten(value: &mut Value, path: &str, kind: Option<&str>, models: &[Model]) {
    match value {
        Value::Table(table) => {
            let own = table.get("kind").and_then(Value::as_str).map(str::to_owned);
            let kind = if path == DEVICES {
                own.as_deref()
            } else {
                kind
            };
            for (key, value) in table.iter_mut() {
                shorten(value, &below(path, key), kind, models);
            }
        }
        Value::Array(list) => list
            .iter_mut()
            .for_each(|item| shorten(item, path, kind, models)),
        Value::Integer(count) if is_size(path, kind, models) => {
            let text = u64::try_from(*count).map_or_else(|_| count.to_string(), bytes);
            if !text.ends_with(|c: char| c.is_ascii_digit()) {
                *value = Value::String(text);
            }
        }
        _ => (),
    }
}

fn below(path: &str, key: &str) -> String {
    if path.is_empty() {
        return key.to_owned();
    }
    format!("{path}.{key}")
}

/// Whether what is there is a size in bytes; `kind` is that of the device that it is in.
fn is_size(path: &str, kind: Option<&str>, models: &[Model]) -> bool {
    let (above, key) = path.rsplit_once('.').unwrap_or(("", path));
    let is_in = |fields: &[Field]| {
        let mut sizes = fields.iter().filter(|field| field.kind == FieldKind::Bytes);
        sizes.any(|field| field.name == key)
    };
    match above {
        "" => key == "serial_replay",
        "display" => key == "memory",
        "memory" => is_in(MEMORY_FIELDS),
        "serial" | "serial2" | "serial3" | "serial4" | "console" => key == "max_size",
        "rate_limit_groups.limits.bandwidth" => matches!(key, "size" | "one_time_burst"),
        DEVICE_CONFIG => fields_of(kind, models).is_some_and(is_in),
        _ => false,
    }
}

fn fields_of(kind: Option<&str>, models: &[Model]) -> Option<&'static [Field]> {
    let model = models.iter().find(|model| Some(model.kind) == kind)?;
    Some(model.fields)
}

/// Refuses what is no key of a device. A kind that there is not is found later.
fn check_key(key: &str, kind: Option<&str>, models: &[Model]) -> Result<(), String> {
    let Some(fields) = fields_of(kind, models) else {
        return Ok(());
    };
    if fields.iter().any(|field| field.name == key) {
        return Ok(());
    }
    let near = nearest(key, fields.iter().map(|field| field.name));
    let hint = near.map_or_else(String::new, |near| format!(": did you mean '{near}'?"));
    let kind = kind.unwrap_or_default();
    Err(format!("unknown key '{key}' of a {kind} device{hint}"))
}

/// The line, from 1, that has the byte at `offset`.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.bytes().take(offset);
    before
        .filter(|byte| *byte == b'\n')
        .count()
        .saturating_add(1)
}

/// The parser's message, which may have several lines, without the names of Rust's types.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut line = lines.collect::<Vec<_>>().join(": ");
    for number in ["u8", "u16", "u32", "u64", "usize"] {
        if line.ends_with(&format!("expected {number}")) {
            line.truncate(line.len().saturating_sub(number.len()));
            line.push_str("a whole number");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::device::tests::TEST_MODELS;
    use virtio::models::MODELS;

    fn read(text: &str) -> Result<VmConfig, FileError> {
        VmConfig::from_toml(text, "vm.toml", MODELS)
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

[display]
memory = "16M"

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
        assert_eq!(config.display.unwrap().memory, 16 << 20);
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
            ("[memory]\nsise = 1", "line 2: unknown field `sise`"),
            ("[memory]\nsize = -1", "vm.toml: "),
            (
                "name = \"x\"\nserial_replay = \"1M\"\ncolour = 1",
                "line 3: unknown field `colour`",
            ),
            ("memory = 1", "vm.toml: "),
            ("[cpus]\nmax = \"x\"", "expected a whole number"),
            ("[[devices]]\nkind = 1", "vm.toml: "),
            ("serial_replay = \"99999999999T\"", "line 1: serial_replay"),
            (
                "[[devices]]\nkind = \"blk\"\n[devices.config]\npaht = \"a\"",
                "line 4: unknown key 'paht' of a blk device: did you mean 'path'?",
            ),
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
