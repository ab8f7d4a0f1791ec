//! Where the debug console and debuggers are attached: `--debugcon`, `--gdb`.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where bytes go that the guest writes to port 0xE9.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DebugconConfig {
    /// Nowhere: there is no such port.
    #[default]
    Off,
    /// Standard output.
    Stdio,
    /// A file, which is created, or emptied when it is there.
    File(PathBuf),
}

/// Where a debugger may attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GdbConfig {
    /// A unix socket, which is created.
    Unix(PathBuf),
    /// A TCP socket that listens.
    Tcp {
        /// The address or name to listen at, an IPv6 address without brackets.
        host: String,
        /// The port; not 0.
        port: u16,
    },
}

/// Why the text of an endpoint was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It is none of the forms.
    #[error("'{text}' is none of {forms}")]
    Form {
        /// What was given.
        text: String,
        /// What can be.
        forms: &'static str,
    },
    /// A form that takes a path has none.
    #[error("'{text}' has no path: write {example}")]
    NoPath {
        /// What was given.
        text: String,
        /// How it is written.
        example: &'static str,
    },
    /// No port, or none from 1 to 65535.
    #[error("'{text}' has no port from 1 to 65535: write tcp:HOST:PORT")]
    Port {
        /// What was given.
        text: String,
    },
}

impl DebugconConfig {
    /// The forms on the command line.
    pub const FORMS: &str = "off, stdio, file=PATH";

    /// The file that is written, where there is one.
    #[must_use]
    pub fn output(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Off | Self::Stdio => None,
        }
    }
}

impl FromStr for DebugconConfig {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text {
            "off" => Ok(Self::Off),
            "stdio" => Ok(Self::Stdio),
            _ => file(text, Self::FORMS).map(Self::File),
        }
    }
}

impl GdbConfig {
    /// The forms on the command line.
    pub const FORMS: &str = "unix:PATH, tcp:HOST:PORT";
}

/// As on the command line.
impl Display for GdbConfig {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

impl FromStr for GdbConfig {
    type Err = EndpointError;

    /// Without a host, TCP listens on 127.0.0.1 only: who can talk to the
    /// debugger owns the guest.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return path_in(path, text, "unix:PATH").map(Self::Unix);
        }
        let Some(address) = text.strip_prefix("tcp:") else {
            return Err(EndpointError::Form {
                text: text.to_owned(),
                forms: Self::FORMS,
            });
        };
        let bad_port = || EndpointError::Port {
            text: text.to_owned(),
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(bad_port)?;
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad_port());
        }
        let port: u16 = port.parse().map_err(|_| bad_port())?;
        if port == 0 {
            return Err(bad_port());
        }
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let host = if bare.is_empty() { "127.0.0.1" } else { bare };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

fn file(text: &str, forms: &'static str) -> Result<PathBuf, EndpointError> {
    match text.strip_prefix("file=") {
        Some(path) => path_in(path, text, "file=PATH"),
        None => Err(EndpointError::Form {
            text: text.to_owned(),
            forms,
        }),
    }
}

fn path_in(path: &str, text: &str, example: &'static str) -> Result<PathBuf, EndpointError> {
    if path.is_empty() {
        return Err(EndpointError::NoPath {
            text: text.to_owned(),
            example,
        });
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_debug_console_is_understood() {
        assert_eq!("off".parse(), Ok(DebugconConfig::Off));
        assert_eq!("stdio".parse(), Ok(DebugconConfig::Stdio));
        assert_eq!("file=x".parse(), Ok(DebugconConfig::File("x".into())));
    }

    #[test]
    fn every_form_of_a_debugger_is_understood() {
        let tcp = |host: &str, port| {
            Ok(GdbConfig::Tcp {
                host: host.to_owned(),
                port,
            })
        };
        assert_eq!("unix:/a:b".parse(), Ok(GdbConfig::Unix("/a:b".into())));
        assert_eq!("tcp:localhost:1234".parse(), tcp("localhost", 1234));
        assert_eq!("tcp::1234".parse(), tcp("127.0.0.1", 1234));
        assert_eq!("tcp:[::1]:65535".parse(), tcp("::1", 65535));
        for text in ["unix:/a:b", "tcp:localhost:1234", "tcp:[::1]:65535"] {
            let parsed: GdbConfig = text.parse().unwrap();
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_form_is_refused_with_the_forms() {
        for text in ["", "STDIO", "file", "file:/a", "stdio ", "tty"] {
            let error = text.parse::<DebugconConfig>().unwrap_err();
            assert!(error.to_string().contains("file=PATH"), "{error}");
        }
        assert!(matches!(
            "file=".parse::<DebugconConfig>(),
            Err(EndpointError::NoPath { .. })
        ));
        assert!(matches!(
            "unix:".parse::<GdbConfig>(),
            Err(EndpointError::NoPath { .. })
        ));
        for text in [
            "tcp:",
            "tcp:h",
            "tcp:h:",
            "tcp:h:0",
            "tcp:h:65536",
            "tcp:h:+1",
            "tcp:h:x",
        ] {
            assert!(
                matches!(text.parse::<GdbConfig>(), Err(EndpointError::Port { .. })),
                "{text}"
            );
        }
        assert!(matches!(
            "localhost:1234".parse::<GdbConfig>(),
            Err(EndpointError::Form { .. })
        ));
    }
}
