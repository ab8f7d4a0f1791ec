//! Named ports that come and go, in a machine's description.

use api::wire::{PortConfig, PortInfo};
use api::{Answer, Command, ControlError, ErrorKind, EventKind, Reply};
use serde_json::{Value, json};
use virtio::models::Model;

use super::description::Description;
use crate::config::port::{self, DEVICE_KIND, PortError};
use crate::config::{DeviceConfig, HostLimits, VmConfig};

/// A change of a machine's ports.
#[derive(Clone, Debug)]
pub enum PortChange {
    /// `vm.add-port`.
    Add(PortConfig),
    /// `vm.remove-port`, by its name.
    Remove(String),
}

impl PortChange {
    /// What the device in the machine is told.
    #[must_use]
    pub fn patch(&self) -> Value {
        match self {
            Self::Add(port) => json!({ "add": port.name }),
            Self::Remove(name) => json!({ "remove": name }),
        }
    }

    /// What is told once it has been done.
    #[must_use]
    pub fn event(&self) -> EventKind {
        match self {
            Self::Add(port) => EventKind::PortAdded {
                name: port.name.clone(),
            },
            Self::Remove(name) => EventKind::PortRemoved { name: name.clone() },
        }
    }
}

/// What answers `command`, which changes the description alone: a port that has been added has a name.
#[must_use]
pub fn answer_of(command: &Command, answer: Answer) -> Answer {
    let Command::AddPort(port) = command else {
        return answer;
    };
    let port = PortInfo {
        name: port.name.clone(),
        path: None,
    };
    Box::new(move |result| answer(result.map(|_| Reply::Port(port))))
}

/// The device that a machine's named ports are on.
///
/// # Errors
///
/// [`ErrorKind::Conflict`] for a machine that has none.
pub fn device(config: &VmConfig) -> Result<&DeviceConfig, ControlError> {
    let found = config
        .devices
        .iter()
        .find(|device| device.kind == DEVICE_KIND);
    found.ok_or_else(|| {
        let message = "the machine has no device for ports: start it with --port, or with --virtio-console max_ports=8";
        ControlError::new(ErrorKind::Conflict, message)
    })
}

impl Description {
    /// Takes up a change of the ports.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for what is no port, [`ErrorKind::Conflict`] for one that is there already, and
    /// [`ErrorKind::NotFound`] for one that is not. Nothing has changed then.
    pub fn change_ports(
        &mut self,
        change: &PortChange,
        models: &[Model],
    ) -> Result<(), ControlError> {
        let mut ports = self.config.ports.clone();
        match change {
            PortChange::Add(port) => {
                check_path(port)?;
                ports.push(port.clone());
            }
            PortChange::Remove(name) => {
                let index = ports.iter().position(|port| port.name == *name);
                let index = index.ok_or_else(|| {
                    let message = format!("there is no port '{name}'");
                    ControlError::new(ErrorKind::NotFound, message)
                })?;
                ports.remove(index);
            }
        }
        port::validate(&ports).map_err(|error| refused(&error))?;
        let mut config = self.config.clone();
        config.set_ports(ports, models);
        config
            .validate(models, &HostLimits::read())
            .map_err(|error| ControlError::from(&error))?;
        self.wire.ports = (!config.ports.is_empty()).then(|| config.ports.clone());
        self.config = config;
        Ok(())
    }
}

/// That a path means the same to the client as to the monitor, whose directories are two.
fn check_path(port: &PortConfig) -> Result<(), ControlError> {
    let path = port.socket.as_ref().or(port.file.as_ref());
    if path.is_none_or(|path| path.is_absolute()) {
        return Ok(());
    }
    let message = format!(
        "port {}: the path is not absolute: give the whole path, from / on",
        port.name
    );
    Err(ControlError::new(ErrorKind::Invalid, message))
}

fn refused(error: &PortError) -> ControlError {
    let kind = match error {
        PortError::Twice { .. } | PortError::SocketInUse { .. } | PortError::TooMany { .. } => {
            ErrorKind::Conflict
        }
        _ => ErrorKind::Invalid,
    };
    ControlError::from_error(kind, error)
}
