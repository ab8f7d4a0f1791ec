//! Devices that come and go while the machine exists.
//!
//! A device that is added is on the bus when [`Machine::add_device`] returns.
//! A guest that is up is told and looks; one that is not finds it when it
//! enumerates the bus. In a paused machine the device begins to work, and the
//! guest hears of it, when the machine goes on.
//!
//! A removal is the guest's to carry out:
//!
//! ```text
//!  request_removal ──► the guest is asked ──► it writes to the eject register
//!                                                        │ Message::PciEject
//!                            DeviceRemoved ◄── eject ◄───┘
//! ```
//!
//! The request waits for a guest that has not started its driver yet, and can be
//! repeated for one that did not listen. A reset of the machine takes out what
//! had been asked for, and before the first instruction of a guest the device
//! goes at once. A back end that does not drain in time keeps its device; the
//! next ejection tries again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::EventKind;
use devices::Unit;
use devices::pci::{EjectRequests, PciAddress};
use virtio::limit::RateGroups;
use virtio::models::Model;

use super::bay::OpenDevice;
use super::inbox::{Mailbox, Message};
use super::inventory::Item;
use super::{Machine, MachineError};
use crate::config::DeviceConfig;
use crate::opener::Opener;

/// How long the back end of a device that leaves may take to drain. The guest
/// runs on meanwhile, and drivers give all requests back before they eject.
const DRAIN: Duration = Duration::from_secs(5);

/// Hands ejections to the control thread. They are few: the registers tell of
/// a slot anew only once the last ejection has been dealt with.
pub struct EjectDesk(pub Mailbox);

impl EjectRequests for EjectDesk {
    fn eject(&self, address: PciAddress) {
        self.0.send(Message::PciEject(address));
    }
}

impl Machine {
    /// The devices on the PCI bus.
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.virtio
    }

    /// The limits that its devices share.
    pub(super) fn rate_groups(&self) -> RateGroups {
        self.bay.groups.clone()
    }

    /// Whether there is such a device on the PCI bus.
    #[must_use]
    pub fn has_device(&self, id: &str) -> bool {
        self.virtio.iter().any(|item| item.device.id() == id)
    }

    /// Adds the device that `config` (with an id, and valid) describes: opens
    /// its back end, puts it on the bus and tells the guest. The machine is
    /// running, paused or not booted yet. Returns where it is.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`], naming flag and id; the machine is then as it
    /// was, and what was opened is closed again.
    pub fn add_device(
        &mut self,
        config: &DeviceConfig,
        models: &[Model],
        opener: &Arc<Opener>,
    ) -> Result<PciAddress, MachineError> {
        let cpus = u16::try_from(self.vcpus.count()).unwrap_or(u16::MAX);
        let groups = &self.bay.groups;
        self.insert_device(OpenDevice::open(config, models, opener, cpus, groups)?)
    }

    /// The second half of [`Machine::add_device`], for a back end that was
    /// opened on another thread.
    ///
    /// # Errors
    ///
    /// As [`Machine::add_device`].
    pub fn insert_device(&mut self, device: OpenDevice) -> Result<PciAddress, MachineError> {
        // The id names the unit in saved state, so it is none of the platform's either.
        if self.units.iter().any(|unit| unit.name() == device.id()) {
            return Err(device.error("the id is taken: give it another"));
        }
        let item = self.bay.plug(device, self.started)?;
        let (id, address) = (item.device.id().to_owned(), item.address);
        self.units.push(Arc::clone(&item.device) as Arc<dyn Unit>);
        self.virtio.push(item);
        let hotplug = self.platform.hotplug();
        hotplug.inserted(address);
        if self.guest_began() {
            hotplug.announce(address);
        }
        let bdf = address.to_string();
        self.events.publish(EventKind::DeviceAdded { id, bdf });
        Ok(address)
    }

    /// Asks the guest to give up the device `id`; an event tells when it has.
    /// Asking again tells the guest again.
    ///
    /// # Errors
    ///
    /// [`MachineError::NoDevice`]; [`MachineError::Stop`] when the guest has not
    /// begun and the back end does not let go.
    pub fn request_removal(&mut self, id: &str) -> Result<(), MachineError> {
        let began = self.guest_began();
        let found = self.virtio.iter_mut().find(|item| item.device.id() == id);
        let Some(item) = found else {
            return Err(MachineError::NoDevice { id: id.to_owned() });
        };
        let address = item.address;
        item.removing = began;
        if began {
            self.platform.hotplug().request_removal(address);
            Ok(())
        } else {
            self.take_out(address, Instant::now() + DRAIN)
        }
    }

    /// The guest has given up what is at `address`, if that has not been dealt
    /// with already.
    pub(super) fn eject(&mut self, address: PciAddress) {
        if !self.platform.hotplug().is_ejecting(address) {
            return;
        }
        if let Err(error) = self.take_out(address, Instant::now() + DRAIN) {
            self.platform.hotplug().kept(address);
            tracing::warn!(
                "the guest gave up {address}, but it stays: {}; the next removal tries again",
                crate::error::chain(&error)
            );
        }
    }

    /// Takes out what the guest was asked for or has given up: it is about to
    /// be reset and will not do so itself. Units are stopped.
    pub(super) fn finish_removals(&mut self) -> Result<(), MachineError> {
        for address in self.platform.hotplug().leaving() {
            self.take_out(address, Instant::now())?;
        }
        Ok(())
    }

    /// Removes a device from everywhere.
    fn take_out(&mut self, address: PciAddress, deadline: Instant) -> Result<(), MachineError> {
        let place = self.virtio.iter().position(|item| item.address == address);
        if let Some(index) = place {
            self.bay.unplug(&self.virtio[index], deadline)?;
            let Item { device, .. } = self.virtio.remove(index);
            // By identity: names are unique only among devices.
            let gone = Arc::as_ptr(&device);
            self.units
                .retain(|unit| !std::ptr::addr_eq(Arc::as_ptr(unit), gone));
            let (id, bdf) = (device.id().to_owned(), address.to_string());
            self.events.publish(EventKind::DeviceRemoved { id, bdf });
        }
        self.platform.hotplug().removed(address);
        Ok(())
    }

    /// Whether the guest's first instruction may have run.
    fn guest_began(&self) -> bool {
        self.entry.is_none()
    }
}
