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
//!      DeviceRemoved ◄── closed ◄── off the bus ◄── drained ◄┘
//! ```
//!
//! Draining and closing may take as long as the host does, and are not done on the control thread.
//!
//! The request waits for a guest that has not started its driver yet, and can be
//! repeated for one that did not listen. A reset of the machine takes out what
//! had been asked for, and before the first instruction of a guest the device
//! goes at once. A back end that does not drain in time keeps its device, which [`EventKind::DeviceKept`]
//! tells; the next ejection tries again.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::EventKind;
use devices::pci::{EjectRequests, PciAddress};
use devices::{StopError, Unit};
use virtio::device::VirtioDevice;
use virtio::limit::RateGroups;
use virtio::models::Model;
use virtio::models::console::NoPorts;
use virtio::transport::VirtioPci;

use super::bay::{self, OpenDevice};
use super::inbox::{Mailbox, Message};
use super::inventory::Item;
use super::payload::Payload;
use super::{Machine, MachineError};
use crate::config::DeviceConfig;
use crate::opener::Opener;

/// How long the back end of a device that leaves may take to drain. The guest
/// runs on meanwhile, and drivers give all requests back before they eject.
const DRAIN: Duration = Duration::from_secs(5);

/// How long one may take that has drained already.
const DRAIN_AGAIN: Duration = Duration::from_millis(100);

/// Hands ejections to the control thread. They are few: the registers tell of
/// a slot anew only once the last ejection has been dealt with.
pub struct EjectDesk(pub Mailbox);

impl EjectRequests for EjectDesk {
    fn eject(&self, address: PciAddress) {
        self.0.send(Message::PciEject(address));
    }
}

/// The model of a device that is off the bus, and what is to be told when it has been dropped.
pub(super) type Removed = (Box<dyn VirtioDevice>, EventKind);

/// A device that the guest has given up.
pub(super) struct Ejection {
    device: Weak<VirtioPci>,
    drained: Result<(), StopError>,
}

impl Ejection {
    /// Has the back end bring to an end what it does. Takes as long as [`DRAIN`]; nothing of the
    /// machine is needed for it.
    pub(super) fn drain(mut self) -> Self {
        if let Some(device) = self.device.upgrade() {
            self.drained = bay::drain(&device, Instant::now() + DRAIN);
        }
        self
    }
}

impl Machine {
    /// The devices on the PCI bus.
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.virtio
    }

    /// Has this process serve all network cards that the host's kernel serves (`vhost=on`), which does not tell what it writes to guest
    /// memory; or the kernel again, where it is to. The machine runs or stands. What the kernel has written counts as all of memory, for those who have it
    /// logged already: log it after this. Cards that come later are not meant. It may take a second for each card.
    ///
    /// # Errors
    ///
    /// [`MachineError::Device`] of the first that stays with whom it is. For `here` the others are the kernel's again; without, they are as they
    /// are to be.
    pub fn serve_cards_here(&self, here: bool) -> Result<(), MachineError> {
        let mut first = Ok(());
        for (index, item) in self.virtio.iter().enumerate() {
            let Err(error) = item.device.serve_here(here) else {
                continue;
            };
            if first.is_ok() {
                let flag = format!("--{} (id {})", item.kind, item.device.id());
                first = Err(MachineError::Device {
                    device: flag,
                    source: error.into(),
                });
            }
            if here {
                self.give_back(index);
                break;
            }
        }
        first
    }

    /// Leaves those of the first devices to the kernel that are to be.
    fn give_back(&self, count: usize) {
        for item in self.virtio.iter().take(count) {
            if let Err(error) = item.device.serve_here(false) {
                tracing::error!(
                    device = item.device.id(),
                    "the host's kernel does not serve it again: {error}"
                );
            }
        }
    }

    /// Devices that cannot go to another host with their guest, each with its id, its kind and the reason. What other programs serve over
    /// vhost-user can, but for directories: their rings go through this process, which logs what they write and drains them.
    #[must_use]
    pub fn bound_devices(&self) -> Vec<String> {
        let bound = |item: &Item| {
            let why = item.device.bound_here()?;
            Some(format!("{} ({}): {why}", item.device.id(), item.kind))
        };
        self.virtio.iter().filter_map(bound).collect()
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
        let ports = Arc::new(NoPorts) as _;
        let opened = OpenDevice::open(config, models, (opener, None), cpus, (groups, ports))?;
        self.insert_device(opened)
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
    /// [`MachineError::NoDevice`], [`MachineError::Stays`], [`MachineError::Fixed`]; [`MachineError::Stop`] when the guest has not
    /// begun and the back end does not let go.
    pub fn request_removal(&mut self, id: &str) -> Result<(), MachineError> {
        let began = self.guest_began();
        let found = self.virtio.iter_mut().find(|item| item.device.id() == id);
        let Some(item) = found else {
            let id = id.to_owned();
            let mut fixtures = self.platform.fixtures().iter();
            let stays = fixtures.any(|fixture| fixture.id == id);
            return Err(if stays {
                MachineError::Fixed { id }
            } else {
                MachineError::NoDevice { id }
            });
        };
        if item.device.memory().is_some() {
            return Err(MachineError::Stays { id: id.to_owned() });
        }
        let address = item.address;
        item.removing = began;
        if began {
            self.platform.hotplug().request_removal(address);
            Ok(())
        } else {
            self.take_out(address, Instant::now() + DRAIN)
        }
    }

    /// What there is to drain because the guest has given it up, if that has not been dealt
    /// with already.
    pub(super) fn begin_ejection(&self, address: PciAddress) -> Option<Ejection> {
        let hotplug = self.platform.hotplug();
        if !hotplug.is_ejecting(address) {
            return None;
        }
        let item = self.virtio.iter().find(|item| item.address == address);
        if item.is_none() {
            hotplug.removed(address);
        }
        item.map(|item| Ejection {
            device: Arc::downgrade(&item.device),
            drained: Ok(()),
        })
    }

    /// The guest is told that what it has given up is there still.
    pub(super) fn keep(&self, address: PciAddress) {
        self.platform.hotplug().kept(address);
    }

    /// Takes out what has been drained, unless something else has become of it meanwhile. What is
    /// returned is to be dropped, which may take long, and then told.
    pub(super) fn finish_ejection(
        &mut self,
        address: PciAddress,
        ejection: Ejection,
    ) -> Option<Removed> {
        let Ejection { device, drained } = ejection;
        let item = self.virtio.iter().find(|item| item.address == address)?;
        let same = device.ptr_eq(&Arc::downgrade(&item.device));
        if !same || !self.platform.hotplug().is_ejecting(address) {
            return None;
        }
        let id = item.device.id().to_owned();
        // It may have been started again with the others.
        let deadline = Instant::now() + DRAIN_AGAIN;
        let taken = drained
            .map_err(MachineError::from)
            .and_then(|()| self.take_off(address, deadline));
        match taken {
            Ok(taken) => taken,
            Err(error) => {
                self.platform.hotplug().kept(address);
                let reason = crate::error::chain(&error);
                tracing::warn!(
                    "the guest gave up {address}, but it stays: {reason}; the next removal tries again"
                );
                let bdf = address.to_string();
                let kept = EventKind::DeviceKept { id, bdf, reason };
                self.events.publish(kept);
                None
            }
        }
    }

    /// Takes out what the guest was asked for or has given up: it is about to
    /// be reset, or has ended, and will not do so itself. Units are stopped. What goes is added to `gone`, to be
    /// dropped and then told.
    pub(super) fn finish_removals(&mut self, gone: &mut Vec<Removed>) -> Result<(), MachineError> {
        for address in self.platform.hotplug().leaving() {
            gone.extend(self.take_off(address, Instant::now())?);
        }
        Ok(())
    }

    /// Takes the models out of all devices, at the machine's end: when what is returned has been dropped, their
    /// files are closed, whoever still looks at the devices. Units are stopped; what has not drained keeps its files.
    pub(super) fn retire_devices(&self) -> Vec<Box<dyn VirtioDevice>> {
        let mut models = Vec::new();
        for item in &self.virtio {
            match self.bay.unplug(item, Instant::now()) {
                Ok(model) => models.push(model),
                Err(error) => {
                    let id = item.device.id();
                    tracing::warn!("{id} is still in use at the end of its machine: {error}");
                }
            }
        }
        models
    }

    /// Takes out what has been booted, at the machine's end.
    pub(super) fn retire_payload(&mut self) -> Option<Payload> {
        self.payload.take()
    }

    /// Removes a device from everywhere.
    fn take_out(&mut self, address: PciAddress, deadline: Instant) -> Result<(), MachineError> {
        if let Some((model, gone)) = self.take_off(address, deadline)? {
            drop(model);
            self.events.publish(gone);
        }
        Ok(())
    }

    /// Removes a device from the machine: its model, which is to be dropped, and what is to be told then.
    fn take_off(
        &mut self,
        address: PciAddress,
        deadline: Instant,
    ) -> Result<Option<Removed>, MachineError> {
        let place = self.virtio.iter().position(|item| item.address == address);
        let mut taken = None;
        if let Some(index) = place {
            let model = self.bay.unplug(&self.virtio[index], deadline)?;
            let Item { device, .. } = self.virtio.remove(index);
            // By identity: names are unique only among devices.
            let gone = Arc::as_ptr(&device);
            self.units
                .retain(|unit| !std::ptr::addr_eq(Arc::as_ptr(unit), gone));
            let (id, bdf) = (device.id().to_owned(), address.to_string());
            taken = Some((model, EventKind::DeviceRemoved { id, bdf }));
        }
        self.platform.hotplug().removed(address);
        Ok(taken)
    }

    /// Whether the guest's first instruction may have run.
    fn guest_began(&self) -> bool {
        self.entry.is_none()
    }
}
