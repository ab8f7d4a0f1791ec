//! Where virtio devices are plugged: one way onto the PCI bus and one way off
//! it, before the machine boots and while it runs.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use devices::pci::PciRoot;
use devices::{StopError, Unit};
use virtio::device::VirtioDevice;
use virtio::limit::RateGroups;
use virtio::memory::GuestMemory;
use virtio::models::console::PortHost;
use virtio::models::{BuildContext, Model};
use virtio::transport::{DeviceEvents, VirtioPci};

use super::MachineError;
use super::doorbells::KvmDoorbells;
use super::inventory::Item;
use crate::config::DeviceConfig;
use crate::kvm::irq::IrqRouter;
use crate::opener::Opener;

/// A device model whose back end is open, ready to be plugged. Dropping it
/// closes the back end again.
pub struct OpenDevice {
    kind: String,
    id: String,
    slot: Option<u8>,
    flag: &'static str,
    model: Box<dyn VirtioDevice>,
}

impl OpenDevice {
    /// Makes the model that `config` describes, which opens its back end. That
    /// may take as long as the host does; it needs no machine and may be done
    /// on any thread. `cpus` are the machine's, a good number of queues, and
    /// `groups` the limits that its devices share; `ports` has the ends of a console's ports. The image of an `awaited` disk is left with who has it.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`], naming flag and id.
    pub fn open(
        config: &DeviceConfig,
        models: &[Model],
        (opener, awaited): (&Arc<Opener>, Option<block::DiskInfo>),
        cpus: u16,
        (groups, ports): (&RateGroups, Arc<dyn PortHost>),
    ) -> Result<Self, MachineError> {
        let DeviceConfig {
            kind,
            id,
            address,
            config,
        } = config;
        let Some(Model { flag, build, .. }) = models.iter().find(|model| model.kind == kind) else {
            let reason = format!("there is no kind of device '{kind}'");
            return Err(device_error("device", id, reason));
        };
        let context = BuildContext {
            id: id.clone(),
            opener: Arc::clone(opener) as Arc<dyn block::Opener>,
            networks: Arc::clone(opener) as Arc<dyn net::Opener>,
            cpus,
            groups: groups.clone(),
            ports,
            awaited,
        };
        let model =
            build(config.clone(), &context).map_err(|error| device_error(flag, id, error))?;
        Ok(Self {
            kind: kind.clone(),
            id: id.clone(),
            slot: *address,
            flag,
            model,
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// An error that names it.
    pub(super) fn error(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> MachineError {
        device_error(self.flag, &self.id, source)
    }
}

fn device_error(
    flag: &str,
    id: &str,
    source: impl Into<Box<dyn Error + Send + Sync>>,
) -> MachineError {
    MachineError::Device {
        device: format!("--{flag} (id {id})"),
        source: source.into(),
    }
}

/// What every device on the PCI bus is connected to.
pub struct Bay {
    /// Interrupts.
    pub router: IrqRouter,
    /// The bus.
    pub pci: Arc<PciRoot>,
    /// Kicks.
    pub doorbells: Arc<KvmDoorbells>,
    /// Who hears of devices.
    pub reporter: Arc<dyn DeviceEvents>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The limits that devices share.
    pub groups: RateGroups,
}

impl Bay {
    /// Puts a device on the bus: at the slot that was asked for, else at one
    /// that has never been used. With `started` the machine's units are
    /// started, and so is it, before the guest can see it.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`]; nothing is left of the device then.
    pub fn plug(&self, device: OpenDevice, started: bool) -> Result<Item, MachineError> {
        let OpenDevice {
            kind,
            id,
            slot,
            flag,
            model,
        } = device;
        let function = VirtioPci::new(
            id.as_str(),
            model,
            self.memory.clone(),
            &self.router,
            Arc::clone(&self.doorbells) as _,
            Arc::clone(&self.reporter),
        )
        .map_err(|error| device_error(flag, &id, error))?;
        if started {
            function.start()?;
        }
        let address = self
            .pci
            .add(Arc::clone(&function) as _, slot)
            .map_err(|error| device_error(flag, &id, error))?;
        Ok(Item {
            kind,
            address,
            device: function,
            removing: false,
        })
    }

    /// Takes a device off the bus, whether or not a driver uses it. When this
    /// returns, the guest does not see it, and when what is returned has been dropped, the host's resources are free.
    ///
    /// # Errors
    ///
    /// [`StopError::Deadline`] when the back end did not drain in time; the
    /// device then works on as before.
    pub fn unplug(
        &self,
        item: &Item,
        deadline: Instant,
    ) -> Result<Box<dyn VirtioDevice>, StopError> {
        let Item {
            address, device, ..
        } = item;
        drain(device, deadline)?;
        self.pci.remove(*address);
        Ok(device.retire())
    }
}

/// Stops a device that is to go.
///
/// # Errors
///
/// As [`Bay::unplug`].
pub fn drain(device: &VirtioPci, deadline: Instant) -> Result<(), StopError> {
    match device.stop(deadline) {
        Err(error @ StopError::WorkerLost { .. }) => {
            tracing::warn!(device = device.id(), %error, "removed nevertheless");
            // Without its worker there is nothing left to drain.
            device.stop(deadline)
        }
        stopped => stopped,
    }
}
