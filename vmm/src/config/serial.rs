//! Where the serial port leads: `--serial`, to any number of sinks at once.
//!
//! A sink is a word (`tty`, `pty`, `null`) or keys, the same on the command
//! line (`file=boot.log,append=on`) and in files
//! (`{ "file": "boot.log", "append": true }`). `off` means that there is no port.

use std::fmt::{self, Display, Formatter};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};

/// The most sinks that a configuration names.
pub const MAX_SINKS: usize = 16;
/// The least `max_size=` of a file, in bytes.
pub const MIN_FILE_SIZE: u64 = 4 << 10;
/// The longest path of a unix socket, in bytes (`sun_path` with its zero).
pub const MAX_SOCKET_PATH: usize = 107;

const OFF: &str = "off";

/// Where the first serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// There is no port.
    Off,
    /// There is a port. Every sink gets the output, and what they bring is the
    /// input; with none, output is dropped.
    Sinks(Vec<SinkConfig>),
}

/// One host end of a console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkConfig {
    /// This process's standard input and output; a terminal is put into raw mode.
    Tty,
    /// A new pseudo-terminal.
    Pty,
    /// Output is dropped and there is no input.
    Null,
    /// Output goes to a file.
    File(FileSink),
    /// Whoever connects to a unix socket gets the output, and types.
    Socket(SocketSink),
}

/// A file that gets a console's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSink {
    /// Where it is. It is created when it is not there.
    pub path: PathBuf,
    /// Whether what is in it already stays.
    pub append: bool,
    /// How large it grows, in bytes, before it becomes `PATH.1` and a new one
    /// is begun; at least [`MIN_FILE_SIZE`]. `None` sets no limit.
    pub max_size: Option<u64>,
}

/// A unix socket that gives a console's output to its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketSink {
    /// Where it is made.
    pub path: PathBuf,
    /// Whether a client first gets the last of what was written before it came.
    pub replay: bool,
}

impl FileSink {
    /// A file that is emptied first and grows without limit.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            append: false,
            max_size: None,
        }
    }

    /// What the file becomes when it is full, where it has a limit.
    #[must_use]
    pub fn rotated(&self) -> Option<PathBuf> {
        self.max_size.map(|_| rotated(&self.path))
    }
}

/// The path of a file that has been rotated: with `.1` at its end.
#[must_use]
pub fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned().into_vec();
    name.extend_from_slice(b".1");
    PathBuf::from(std::ffi::OsString::from_vec(name))
}

/// Why a sink cannot be as it is described.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// It is none of the forms.
    #[error("'{text}' is none of {}", SerialConfig::FORMS)]
    Form {
        /// What was given.
        text: String,
    },
    /// It says that there is no port, which is no sink.
    #[error("'off' is no place for output: give null, or remove what there is")]
    Off,
    /// A form that takes a path has none.
    #[error("'{text}' has no path: write {example}")]
    NoPath {
        /// What was given.
        text: String,
        /// How it is written.
        example: &'static str,
    },
    /// Its keys are not understood.
    #[error(transparent)]
    Keys(#[from] FlagError),
    /// Its keys do not fit together.
    #[error("{0}")]
    Shape(String),
    /// `off` beside a sink, or twice.
    #[error("'off' means that there is no port: give it alone, or leave it out")]
    OffAndSinks,
    /// More than one wants the terminal.
    #[error("'tty' is given twice: there is one terminal")]
    TwoTerminals,
    /// Too many.
    #[error("{count} sinks: a port has at most {MAX_SINKS}: leave some out")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// A cap that every few lines would reach.
    #[error("max_size={size}: a file holds at least 4K: give more")]
    FileSize {
        /// What was given, in bytes.
        size: u64,
    },
    /// The path does not fit into a socket's address.
    #[error(
        "socket={}: the path of a socket has at most {MAX_SOCKET_PATH} bytes: choose a shorter one",
        path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
}

/// The keys of a sink that is more than a word.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    append: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<bool>,
}

const FILE_FIELDS: &[Field] = &[
    Field {
        name: "file",
        kind: FieldKind::Path,
        required: true,
        help: "the file that gets the output",
    },
    Field {
        name: "append",
        kind: FieldKind::Switch,
        required: false,
        help: "keep what is in it already; default off",
    },
    Field {
        name: "max_size",
        kind: FieldKind::Bytes,
        required: false,
        help: "where it becomes PATH.1 and a new one is begun; default no limit",
    },
];

const SOCKET_FIELDS: &[Field] = &[
    Field {
        name: "socket",
        kind: FieldKind::Path,
        required: true,
        help: "the socket that is made",
    },
    Field {
        name: "replay",
        kind: FieldKind::Switch,
        required: false,
        help: "begin with what was written before; default on",
    },
];

impl TryFrom<Keys> for SinkConfig {
    type Error = SinkError;

    fn try_from(keys: Keys) -> Result<Self, SinkError> {
        let shape = |text: &str| Err(SinkError::Shape(text.to_owned()));
        match keys {
            Keys {
                file: Some(path),
                socket: None,
                append,
                max_size,
                replay: None,
            } => Ok(Self::File(FileSink {
                path,
                append: append.unwrap_or(false),
                max_size,
            })),
            Keys {
                file: None,
                socket: Some(path),
                append: None,
                max_size: None,
                replay,
            } => Ok(Self::Socket(SocketSink {
                path,
                replay: replay.unwrap_or(true),
            })),
            Keys { file: Some(_), .. } => shape("'file' goes with 'append' and 'max_size' alone"),
            Keys {
                socket: Some(_), ..
            } => shape("'socket' goes with 'replay' alone"),
            _ => shape("neither 'file' nor 'socket' is there: add one"),
        }
    }
}

impl SinkConfig {
    /// Checks what needs no file.
    ///
    /// # Errors
    ///
    /// [`SinkError`], for the first rule broken.
    pub fn validate(&self) -> Result<(), SinkError> {
        match self {
            Self::File(FileSink {
                max_size: Some(size),
                ..
            }) if *size < MIN_FILE_SIZE => Err(SinkError::FileSize { size: *size }),
            Self::Socket(SocketSink { path, .. })
                if path.as_os_str().as_bytes().len() > MAX_SOCKET_PATH =>
            {
                Err(SinkError::SocketPath { path: path.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The files that it writes or replaces.
    pub fn outputs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let file = match self {
            Self::File(file) => Some(file),
            _ => None,
        };
        file.into_iter()
            .flat_map(|file| [Some(file.path.clone()), file.rotated()])
            .flatten()
    }

    fn word(&self) -> Option<&'static str> {
        match self {
            Self::Tty => Some("tty"),
            Self::Pty => Some("pty"),
            Self::Null => Some("null"),
            Self::File(_) | Self::Socket(_) => None,
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        match word {
            "tty" => Some(Self::Tty),
            "pty" => Some(Self::Pty),
            "null" => Some(Self::Null),
            _ => None,
        }
    }

    fn keys(&self) -> Keys {
        match self {
            Self::Tty | Self::Pty | Self::Null => Keys::default(),
            Self::File(file) => Keys {
                file: Some(file.path.clone()),
                append: file.append.then_some(true),
                max_size: file.max_size,
                ..Keys::default()
            },
            Self::Socket(socket) => Keys {
                socket: Some(socket.path.clone()),
                replay: (!socket.replay).then_some(false),
                ..Keys::default()
            },
        }
    }
}

/// As a person would name it: without the keys that say how.
impl Display for SinkConfig {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "file={}", file.path.display()),
            Self::Socket(socket) => write!(f, "socket={}", socket.path.display()),
            _ => f.write_str(self.word().unwrap_or_default()),
        }
    }
}

impl FromStr for SinkConfig {
    type Err = SinkError;

    fn from_str(text: &str) -> Result<Self, SinkError> {
        if let Some(sink) = Self::from_word(text) {
            return Ok(sink);
        }
        let (fields, name, example) = if text.starts_with("file=") {
            (FILE_FIELDS, "file", "file=PATH")
        } else if text.starts_with("socket=") {
            (SOCKET_FIELDS, "socket", "socket=PATH")
        } else if text == OFF {
            return Err(SinkError::Off);
        } else {
            return Err(SinkError::Form {
                text: text.to_owned(),
            });
        };
        if text.strip_prefix(name) == Some("=") {
            return Err(SinkError::NoPath {
                text: text.to_owned(),
                example,
            });
        }
        let table = FlagTable {
            flag: name,
            fields,
            shorthand: None,
        };
        let map = flag::parse(&table, text)?;
        let keys: Keys = serde_json::from_value(Value::Object(map))
            .map_err(|error| SinkError::Shape(error.to_string()))?;
        keys.try_into()
    }
}

impl Serialize for SinkConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.word() {
            Some(word) => serializer.serialize_str(word),
            None => self.keys().serialize(serializer),
        }
    }
}

struct SinkVisitor;

impl<'de> Visitor<'de> for SinkVisitor {
    type Value = SinkConfig;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("tty, pty, null, or an object with 'file' or 'socket'")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<SinkConfig, E> {
        SinkConfig::from_word(text)
            .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SinkConfig, A::Error> {
        let keys = Keys::deserialize(MapAccessDeserializer::new(map))?;
        keys.try_into().map_err(A::Error::custom)
    }
}

impl<'de> Deserialize<'de> for SinkConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SinkVisitor)
    }
}

impl SerialConfig {
    /// The forms on the command line.
    pub const FORMS: &str = "tty, pty, null, off, file=PATH, socket=PATH";

    /// Whether the machine has the port.
    #[must_use]
    pub fn is_on(&self) -> bool {
        *self != Self::Off
    }

    /// The sinks; none where there is no port.
    #[must_use]
    pub fn sinks(&self) -> &[SinkConfig] {
        match self {
            Self::Off => &[],
            Self::Sinks(sinks) => sinks,
        }
    }

    /// What the values of the flag mean together.
    ///
    /// # Errors
    ///
    /// [`SinkError`], also for rules that [`SerialConfig::validate`] checks.
    pub fn from_flags<T: AsRef<str>>(texts: &[T]) -> Result<Self, SinkError> {
        let mut sinks = Vec::new();
        let mut off = false;
        for text in texts.iter().map(T::as_ref) {
            if text == OFF {
                off = true;
            } else {
                sinks.push(text.parse()?);
            }
        }
        let config = match (off, texts.len()) {
            (true, 1) => Self::Off,
            (true, _) => return Err(SinkError::OffAndSinks),
            (false, _) => Self::Sinks(sinks),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what needs no file.
    ///
    /// # Errors
    ///
    /// [`SinkError`], for the first rule broken.
    pub fn validate(&self) -> Result<(), SinkError> {
        let sinks = self.sinks();
        if sinks.len() > MAX_SINKS {
            let count = sinks.len();
            return Err(SinkError::TooMany { count });
        }
        if sinks.iter().filter(|s| **s == SinkConfig::Tty).count() > 1 {
            return Err(SinkError::TwoTerminals);
        }
        sinks.iter().try_for_each(SinkConfig::validate)
    }
}

/// This terminal.
impl Default for SerialConfig {
    fn default() -> Self {
        SinkConfig::Tty.into()
    }
}

impl From<SinkConfig> for SerialConfig {
    fn from(sink: SinkConfig) -> Self {
        Self::Sinks(vec![sink])
    }
}

/// A single sink is itself; others are a list.
impl Serialize for SerialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str(OFF),
            Self::Sinks(sinks) => match sinks.as_slice() {
                [sink] => sink.serialize(serializer),
                sinks => sinks.serialize(serializer),
            },
        }
    }
}

struct SerialVisitor;

impl<'de> Visitor<'de> for SerialVisitor {
    type Value = SerialConfig;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("off, a sink, or a list of sinks: ")?;
        SinkVisitor.expecting(f)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<SerialConfig, E> {
        if text == OFF {
            return Ok(SerialConfig::Off);
        }
        SinkVisitor.visit_str(text).map(SerialConfig::from)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SerialConfig, A::Error> {
        SinkVisitor.visit_map(map).map(SerialConfig::from)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<SerialConfig, A::Error> {
        let mut sinks = Vec::new();
        while let Some(sink) = list.next_element()? {
            sinks.push(sink);
        }
        Ok(SerialConfig::Sinks(sinks))
    }
}

impl<'de> Deserialize<'de> for SerialConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SerialVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(path: &str, append: bool, max_size: Option<u64>) -> SinkConfig {
        SinkConfig::File(FileSink {
            path: path.into(),
            append,
            max_size,
        })
    }

    fn socket(path: &str, replay: bool) -> SinkConfig {
        SinkConfig::Socket(SocketSink {
            path: path.into(),
            replay,
        })
    }

    #[test]
    fn every_form_of_a_sink_is_understood() {
        for (text, sink) in [
            ("tty", SinkConfig::Tty),
            ("pty", SinkConfig::Pty),
            ("null", SinkConfig::Null),
            ("file=/a", file("/a", false, None)),
            (
                "file=/a,append=on,max_size=1M",
                file("/a", true, Some(1 << 20)),
            ),
            ("file=\"/a,b=c\"", file("/a,b=c", false, None)),
            ("socket=/s", socket("/s", true)),
            ("socket=/s,replay=off", socket("/s", false)),
        ] {
            assert_eq!(text.parse(), Ok(sink), "{text}");
        }
    }

    #[test]
    fn what_is_no_sink_is_refused_and_says_what_is() {
        for (text, part) in [
            ("", "file=PATH"),
            ("TTY", "file=PATH"),
            ("file", "file=PATH"),
            ("file:/a", "socket=PATH"),
            ("tty ", "is none of tty"),
            ("off", "give null, or remove"),
            ("file=", "has no path: write file=PATH"),
            ("socket=", "has no path: write socket=PATH"),
            ("file=/a,replay=on", "unknown key 'replay'"),
            ("file=/a,file=/b", "'file' is given twice"),
            ("file=/a,append=maybe", "not a switch"),
            ("socket=/s,append=on", "unknown key 'append'"),
        ] {
            let error = text.parse::<SinkConfig>().unwrap_err();
            let message = format!("{error}: {:?}", std::error::Error::source(&error));
            let chain = crate::error::chain(&error);
            assert!(chain.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn several_flags_are_several_sinks_and_off_stands_alone() {
        let flags = |texts: &[&str]| SerialConfig::from_flags(texts);
        assert_eq!(flags(&["off"]), Ok(SerialConfig::Off));
        let both = vec![SinkConfig::Tty, file("/a", false, None)];
        assert_eq!(
            flags(&["tty", "file=/a"]),
            Ok(SerialConfig::Sinks(both.clone()))
        );
        assert_eq!(flags(&["off", "tty"]), Err(SinkError::OffAndSinks));
        assert_eq!(flags(&["tty", "off"]), Err(SinkError::OffAndSinks));
        assert_eq!(flags(&["tty", "tty"]), Err(SinkError::TwoTerminals));
        let count = MAX_SINKS + 1;
        assert_eq!(
            flags(&vec!["pty"; count]),
            Err(SinkError::TooMany { count })
        );
        assert_eq!(
            flags(&["file=/a,max_size=4095"]),
            Err(SinkError::FileSize { size: 4095 })
        );
        let long = format!("socket=/{}", "x".repeat(MAX_SOCKET_PATH));
        assert!(matches!(flags(&[&long]), Err(SinkError::SocketPath { .. })));
    }

    #[test]
    fn a_single_value_and_a_list_are_read_and_written() {
        for (value, config) in [
            (json!("off"), SerialConfig::Off),
            (json!("tty"), SinkConfig::Tty.into()),
            (json!({"file": "/a"}), file("/a", false, None).into()),
            (json!({"socket": "/s"}), socket("/s", true).into()),
            (
                json!(["pty", {"file": "/a", "append": true, "max_size": 8192}, {"socket": "/s", "replay": false}]),
                SerialConfig::Sinks(vec![
                    SinkConfig::Pty,
                    file("/a", true, Some(8192)),
                    socket("/s", false),
                ]),
            ),
            (json!([]), SerialConfig::Sinks(Vec::new())),
        ] {
            let read: SerialConfig = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(read, config);
            assert_eq!(serde_json::to_value(config).unwrap(), value);
        }
    }

    #[test]
    fn what_is_no_serial_port_in_a_file_is_refused_by_name() {
        for (value, part) in [
            (json!("of"), "null"),
            (json!(7), "list of sinks"),
            (json!(["off"]), "'file' or 'socket'"),
            (json!({"file": "/a", "x": 1}), "unknown field `x`"),
            (json!({"file": "/a", "socket": "/s"}), "'file' goes with"),
            (
                json!({"socket": "/s", "append": true}),
                "'socket' goes with",
            ),
            (json!({"append": true}), "neither"),
            (json!({"file": 7}), "path"),
        ] {
            let error = serde_json::from_value::<SerialConfig>(value.clone()).unwrap_err();
            assert!(error.to_string().contains(part), "{value}: {error}");
        }
    }

    #[test]
    fn a_file_with_a_limit_writes_two() {
        let paths: Vec<_> = file("/a", false, Some(8192)).outputs().collect();
        assert_eq!(paths, [PathBuf::from("/a"), PathBuf::from("/a.1")]);
        assert_eq!(file("/a", false, None).outputs().count(), 1);
        assert_eq!(socket("/s", true).outputs().count(), 0);
    }
}
