//! What a machine is made from, as its clients gave it and as it is built.

use api::{AddDevice, Command, ControlError, ErrorKind, VmState, wire};
use virtio::models::Model;

use crate::config::{VmConfig, files};
use crate::error::chain;
use crate::machine::state::wrong_state;

/// A machine's description in both forms, which say the same.
#[derive(Clone)]
pub struct Description {
    /// As clients of the socket see it.
    pub wire: wire::VmConfig,
    /// As the machine is built.
    pub config: VmConfig,
}

impl Description {
    /// The description of a machine that the command line or a file has given.
    /// It is complete and has been validated.
    #[must_use]
    pub fn of(config: VmConfig) -> Self {
        Self {
            wire: config.to_wire(),
            config,
        }
    }

    /// The description that a client has given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] and [`ErrorKind::Conflict`] for what makes no sense, and
    /// [`ErrorKind::Unimplemented`] for what this monitor has not.
    pub fn from_wire(wire: wire::VmConfig) -> Result<Self, ControlError> {
        let config = VmConfig::from_wire(&wire)?;
        Ok(Self { wire, config })
    }

    /// Whether there is anything to boot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`].
    pub fn check_bootable(&self) -> Result<(), ControlError> {
        self.config.check_bootable()
    }

    /// The description after `command`, which only changes it: there is no machine.
    ///
    /// # Errors
    ///
    /// Why it makes no sense; [`ErrorKind::Conflict`] for a command that needs a machine.
    pub fn changed(&self, command: Command) -> Result<Self, ControlError> {
        let mut wire = self.wire.clone();
        match command {
            Command::AddDevice(device) => add(&mut wire, *device)?,
            Command::RemoveDevice(request) => remove(&mut wire, &request.id)?,
            Command::Resize(request) => {
                if let Some(count) = request.desired_vcpus {
                    wire.cpus.boot_vcpus = count;
                }
                if let Some(size) = request.desired_ram {
                    wire.memory.size = size;
                }
                match (request.desired_balloon, &mut wire.balloon) {
                    (None, _) => (),
                    (Some(size), Some(balloon)) => balloon.size = size,
                    (Some(_), None) => {
                        let message = "the machine has no balloon";
                        return Err(ControlError::new(ErrorKind::NotFound, message));
                    }
                }
            }
            other => return Err(wrong_state(VmState::Created, &other)),
        }
        Self::from_wire(wire)
    }

    /// The rules that need the host's files, which may have changed since.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`].
    pub fn check_files(&self, models: &'static [Model]) -> Result<(), ControlError> {
        files::check(&self.config, models).map_err(|error| {
            ControlError::new(ErrorKind::Invalid, chain(&error))
                .context("Failed to validate config")
        })
    }
}

fn add(wire: &mut wire::VmConfig, device: AddDevice) -> Result<(), ControlError> {
    match device {
        AddDevice::Disk(disk) => wire.disks.get_or_insert_default().push(disk),
        AddDevice::Net(net, fds) if fds.is_empty() => wire.net.get_or_insert_default().push(net),
        AddDevice::Net(..) => {
            let message = "descriptors can be passed to a machine that has been booted only";
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        AddDevice::Fs(fs) => wire.fs.get_or_insert_default().push(fs),
        AddDevice::Vsock(_) if wire.vsock.is_some() => {
            let message = "Too many virtio-vsock devices";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        AddDevice::Vsock(vsock) => wire.vsock = Some(vsock),
        AddDevice::Virtio(_) => {
            let message = "vm.add-virtio needs a machine that has been booted";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
    }
    Ok(())
}

fn remove(wire: &mut wire::VmConfig, id: &str) -> Result<(), ControlError> {
    let mut removed = false;
    if let Some(disks) = &mut wire.disks
        && let Some(at) = disks.iter().position(|disk| disk.id.as_deref() == Some(id))
    {
        disks.remove(at);
        removed = true;
    }
    if let Some(cards) = &mut wire.net
        && let Some(at) = cards.iter().position(|card| card.id.as_deref() == Some(id))
    {
        cards.remove(at);
        removed = true;
    }
    if removed {
        return Ok(());
    }
    let message = format!("No device with id {id:?} to remove");
    Err(ControlError::new(ErrorKind::NotFound, message))
}
