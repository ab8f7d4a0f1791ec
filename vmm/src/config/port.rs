//! Ports that the guest finds by their names: `--port`, and the device that has
//! them and the console.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use api::wire::PortConfig;
use serde_json::Value;
use virtio::models::Model;
use virtio::models::console::{self, ConsoleConfig, MAX_PORTS, SEPARATOR, is_port_name};
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};
use super::serial::MAX_SOCKET_PATH;
use super::{DeviceConfig, VmConfig};

/// The port that QEMU's guest agent looks for.
pub const AGENT: &str = "org.qemu.guest_agent.0";

/// The name of the device that has the console and the ports, where none is given.
pub const DEVICE: &str = "__console";

/// The kind of that device.
pub const DEVICE_KIND: &str = console::MODEL.kind;

const FLAG: &str = "--port";

/// The keys of `--port`.
pub const PORT_FIELDS: &[Field] = &[
    Field {
        name: "name",
        kind: FieldKind::Text,
        required: true,
        help: "what the guest finds it by, as in /dev/virtio-ports/NAME",
    },
    Field {
        name: "socket",
        kind: FieldKind::Path,
        required: false,
        help: "a unix socket that is made; one client at a time, others wait",
    },
    Field {
        name: "file",
        kind: FieldKind::Path,
        required: false,
        help: "a file that gets what the guest writes",
    },
    Field {
        name: "pty",
        kind: FieldKind::Switch,
        required: false,
        help: "a new pseudo-terminal; 'pty' alone is pty=on",
    },
    Field {
        name: "null",
        kind: FieldKind::Switch,
        required: false,
        help: "nowhere; 'null' alone is null=on",
    },
];

/// Where a port leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortEnd<'a> {
    /// A unix socket.
    Socket(&'a Path),
    /// A file.
    File(&'a Path),
    /// A new pseudo-terminal.
    Pty,
    /// Nowhere.
    Null,
    /// The monitor, which asks the guest agent.
    Agent,
}

/// Why ports cannot be as they are described.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// The keys are not understood.
    #[error(transparent)]
    Keys(#[from] FlagError),
    /// A guest cannot use the name.
    #[error("name={name}: a name has 1 to 64 letters, digits, '.', '_' or '-'")]
    Name {
        /// What was given.
        name: String,
    },
    /// Two ports of one name.
    #[error("name={name}: there are two ports of this name: give each its own")]
    Twice {
        /// The name.
        name: String,
    },
    /// It leads nowhere.
    #[error("name={name}: it leads nowhere: add one of socket=PATH, file=PATH, pty, null")]
    NoEnd {
        /// The port.
        name: String,
    },
    /// It leads to several places.
    #[error("name={name}: it leads to one place: give one of socket=, file=, pty, null")]
    Ends {
        /// The port.
        name: String,
    },
    /// A path that a system call does not take.
    #[error("name={name}: the path is empty or holds a zero byte")]
    Path {
        /// The port.
        name: String,
    },
    /// The path does not fit into a socket's address.
    #[error(
        "name={name},socket={}: the path of a socket has at most {MAX_SOCKET_PATH} bytes: choose a shorter one",
        path.display()
    )]
    SocketPath {
        /// The port.
        name: String,
        /// The path.
        path: PathBuf,
    },
    /// Two ports, or a port and a console, want one socket.
    #[error("name={name},socket={}: something else has this socket: give each its own", path.display())]
    SocketInUse {
        /// The port.
        name: String,
        /// The path.
        path: PathBuf,
    },
    /// Too many.
    #[error("{count} ports: a machine has at most {}: leave some out", MAX_PORTS - 1)]
    TooMany {
        /// How many there are.
        count: usize,
    },
}

/// Reads the text of `--port`.
///
/// # Errors
///
/// [`PortError::Keys`]; what the keys say is checked by [`validate`].
pub fn from_flag(text: &str) -> Result<PortConfig, PortError> {
    let table = FlagTable {
        flag: FLAG,
        fields: PORT_FIELDS,
        shorthand: Some("name"),
    };
    let map = flag::parse(&table, &with_switches(text))?;
    let text = |key: &str| map.get(key).and_then(Value::as_str);
    let switch = |key: &str| map.get(key).and_then(Value::as_bool).unwrap_or(false);
    Ok(PortConfig {
        name: text("name").unwrap_or_default().to_owned(),
        socket: text("socket").map(PathBuf::from),
        file: text("file").map(PathBuf::from),
        pty: switch("pty"),
        null: switch("null"),
    })
}

/// Writes out what may be given as a word. In a text with quotes it may not.
fn with_switches(text: &str) -> String {
    if text.contains('"') {
        return text.to_owned();
    }
    let mut items: Vec<String> = text.split(',').map(str::to_owned).collect();
    for item in &mut items {
        if item == "pty" || item == "null" {
            item.push_str("=on");
        }
    }
    items.join(",")
}

/// Where a port leads.
///
/// # Errors
///
/// [`PortError::NoEnd`], [`PortError::Ends`].
pub fn end_of(port: &PortConfig) -> Result<PortEnd<'_>, PortError> {
    let PortConfig {
        name,
        socket,
        file,
        pty,
        null,
    } = port;
    let named = [
        socket.as_deref().map(PortEnd::Socket),
        file.as_deref().map(PortEnd::File),
        pty.then_some(PortEnd::Pty),
        null.then_some(PortEnd::Null),
    ];
    let mut ends = named.into_iter().flatten();
    match (ends.next(), ends.next()) {
        (Some(end), None) => Ok(end),
        (None, _) if name == AGENT => Ok(PortEnd::Agent),
        (None, _) => Err(PortError::NoEnd { name: name.clone() }),
        (Some(_), Some(_)) => Err(PortError::Ends { name: name.clone() }),
    }
}

/// Checks what needs no file.
///
/// # Errors
///
/// [`PortError`], for the first rule broken.
pub fn validate(ports: &[PortConfig]) -> Result<(), PortError> {
    let count = ports.len();
    if count >= MAX_PORTS {
        return Err(PortError::TooMany { count });
    }
    for (index, port) in ports.iter().enumerate() {
        let name = || port.name.clone();
        if !is_port_name(&port.name) {
            return Err(PortError::Name { name: name() });
        }
        let before = ports.get(..index).unwrap_or_default();
        if before.iter().any(|other| other.name == port.name) {
            return Err(PortError::Twice { name: name() });
        }
        let path = match end_of(port)? {
            PortEnd::Socket(path) | PortEnd::File(path) => path,
            PortEnd::Pty | PortEnd::Null | PortEnd::Agent => continue,
        };
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(PortError::Path { name: name() });
        }
        if port.socket.is_some() {
            let path = || path.to_owned();
            if bytes.len() > MAX_SOCKET_PATH {
                let (name, path) = (name(), path());
                return Err(PortError::SocketPath { name, path });
            }
            if before.iter().any(|other| other.socket == port.socket) {
                let (name, path) = (name(), path());
                return Err(PortError::SocketInUse { name, path });
            }
        }
    }
    Ok(())
}

impl VmConfig {
    /// Whether the machine has a port to the guest agent that is the monitor's own.
    #[must_use]
    pub fn has_agent(&self) -> bool {
        let mut ports = self.ports.iter();
        ports.any(|port| end_of(port) == Ok(PortEnd::Agent))
    }

    /// Has the machine have these named ports and no others. Where it has a device for them, that is told.
    pub fn set_ports(&mut self, ports: Vec<PortConfig>, models: &[Model]) {
        self.ports = ports;
        let kind = console::MODEL.kind;
        let mut devices = self.devices.iter_mut();
        if let Some(device) = devices.find(|device| device.kind == kind)
            && let Value::Object(config) = &mut device.config
        {
            // Put back where there are any.
            config.remove("ports");
        }
        self.complete(models);
    }

    /// Gives the machine the device that its console and ports are on, and
    /// lets one that is there already have them.
    pub(super) fn complete_console(&mut self, models: &[Model]) {
        let kind = console::MODEL.kind;
        let wanted = self.console.is_on() || !self.ports.is_empty();
        if !wanted || !models.iter().any(|model| model.kind == kind) {
            return;
        }
        let known = self.devices.iter().find(|device| device.kind == kind);
        let known = known.and_then(|device| serde_json::from_value(device.config.clone()).ok());
        let max_ports = known.and_then(|config: ConsoleConfig| config.max_ports);
        let names: Vec<&str> = self.ports.iter().map(|port| port.name.as_str()).collect();
        let config = ConsoleConfig {
            console: self.console.is_on(),
            ports: names.join(&SEPARATOR.to_string()),
            max_ports,
        };
        // It has the shape of an object.
        let config = serde_json::to_value(config).unwrap_or_default();
        match self.devices.iter_mut().find(|device| device.kind == kind) {
            Some(device) => device.config = config,
            None => self.devices.push(DeviceConfig {
                kind: kind.to_owned(),
                id: DEVICE.to_owned(),
                address: None,
                config,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio::models::MODELS;

    use super::*;

    fn port(text: &str) -> Result<PortConfig, PortError> {
        let port = from_flag(text)?;
        validate(std::slice::from_ref(&port))?;
        Ok(port)
    }

    #[test]
    fn a_port_has_a_name_and_one_end() {
        for (text, end) in [
            ("name=a,socket=/s", PortEnd::Socket(Path::new("/s"))),
            ("a,file=/f", PortEnd::File(Path::new("/f"))),
            ("name=a,pty", PortEnd::Pty),
            ("name=a,pty=on", PortEnd::Pty),
            ("name=a,null", PortEnd::Null),
            ("name=org.qemu.guest_agent.0", PortEnd::Agent),
            ("name=org.qemu.guest_agent.0,pty", PortEnd::Pty),
        ] {
            assert_eq!(end_of(&port(text).unwrap()), Ok(end), "{text}");
        }
    }

    #[test]
    fn what_is_no_port_is_refused_and_says_what_is() {
        let long = format!("a,socket=/{}", "x".repeat(MAX_SOCKET_PATH));
        for (text, part) in [
            ("", "name"),
            ("pty", "'name' is missing"),
            ("name=a", "add one of socket=PATH"),
            ("name=a,pty,null", "leads to one place"),
            ("name=a,socket=/s,file=/f", "leads to one place"),
            ("name=a/b,pty", "letters, digits"),
            ("name=a,x=1", "unknown key 'x'"),
            (long.as_str(), "at most 107 bytes"),
        ] {
            let error = port(text).unwrap_err();
            let chain = crate::error::chain(&error);
            assert!(chain.contains(part), "{text}: {chain}");
        }
        let twice = [port("a,pty").unwrap(), port("a,null").unwrap()];
        assert!(matches!(validate(&twice), Err(PortError::Twice { .. })));
        let one = [port("a,socket=/s").unwrap(), port("b,socket=/s").unwrap()];
        assert!(matches!(validate(&one), Err(PortError::SocketInUse { .. })));
        let many: Vec<_> = (0..MAX_PORTS)
            .map(|n| port(&format!("p{n},null")).unwrap())
            .collect();
        assert_eq!(validate(&many[1..]), Ok(()));
        assert_eq!(validate(&many), Err(PortError::TooMany { count: 31 }));
    }

    #[test]
    fn console_and_ports_are_on_one_device_which_may_be_named() {
        let mut config = VmConfig::default();
        config.complete(MODELS);
        assert!(config.devices.is_empty());
        config.ports = vec![port("a,pty").unwrap(), port("b,null").unwrap()];
        config.complete(MODELS);
        let [device] = config.devices.as_slice() else {
            panic!("{:?}", config.devices);
        };
        assert_eq!((device.id.as_str(), device.address), (DEVICE, Some(1)));
        let own = serde_json::json!({"console": false, "ports": "a:b"});
        assert_eq!(device.config, own);
        config.devices[0].id = "mine".to_owned();
        config.console = super::super::SinkConfig::Pty.into();
        config.complete(MODELS);
        let own = serde_json::json!({"console": true, "ports": "a:b"});
        assert_eq!(config.devices.len(), 1);
        assert_eq!(
            (config.devices[0].id.as_str(), &config.devices[0].config),
            ("mine", &own)
        );
    }
}
