//! A virtio device as a PCI function (Virtio 1.2, 4.1).
//!
//! Everything is in one 64-bit memory BAR of 64 KiB:
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | doorbells, four bytes for each queue |
//! | 0x4000 | MSI-X table |
//! | 0x8000 | MSI-X pending bits |
//!
//! # Locks
//!
//! `config` is held for moments. `core` is held while the model is called,
//! which may last [`RESET_SLICE`](super::core::RESET_SLICE) on a vCPU and the
//! deadline in [`Unit::stop`]. Neither is taken while the other is held.
//! Doorbells, ISR status, MSI-X and everything that workers call need neither.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use devices::input::InputQueue;
use devices::pci::{
    BarKind, ConfigError, ConfigSpace, FunctionId, MSIX_CAPABILITY_ID, Msix, PciFunction,
};
use devices::{MsiAllocator, MsiError, StartError, StopError, Unit};
use migration::{RestoreError, SaveError, SavedState, Section, SectionSet};
use serde_json::Value;

use super::core::{COMMON_LEN, Core, CoreState, Parts};
use super::doorbell::{Doorbells, Kick};
use super::signals::{DeviceEvents, Signals};
use super::state::VirtioPciV1;
use crate::device::{
    Counters, DiskImage, ExchangeError, Identity, Preparation, Prepared, ReconfigureError,
    ResizeError, VirtioDevice,
};
use crate::memory::GuestMemory;
use crate::models::BuildContext;
use crate::models::balloon::{BalloonChange, BalloonView, NoBalloon};
use crate::models::mem::{MemoryView, NoMemory};

/// Byte offsets into the BAR.
mod layout {
    pub const BAR: u8 = 0;
    pub const SIZE: u64 = 0x1_0000;
    pub const COMMON: u32 = 0;
    pub const ISR: u32 = 0x1000;
    pub const DEVICE: u32 = 0x2000;
    pub const NOTIFY: u32 = 0x3000;
    pub const TABLE: u32 = 0x4000;
    pub const PBA: u32 = 0x8000;
    /// Each of the first four regions has a page.
    pub const REGION: u32 = 0x1000;
}

/// Bytes from one doorbell to the next.
const NOTIFY_MULTIPLIER: u32 = 4;
/// So that the table, with one more entry for configuration changes, ends
/// before the pending bits.
const MAX_QUEUES: usize = 1023;

/// Ids and capabilities (4.1.2, 4.1.4).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
/// Offsets in the capability that gives access through configuration space.
const PCI_CAP_BAR: u16 = 4;
const PCI_CAP_OFFSET: u16 = 8;
const PCI_CAP_LENGTH: u16 = 12;
const PCI_CAP_DATA: u16 = 16;

/// Why a device could not be joined to the bus.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No interrupts.
    #[error("no interrupts for device {name}")]
    Msi {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: MsiError,
    },
    /// No doorbells.
    #[error("no doorbells for device {name}; the limit of open files may be too low")]
    Doorbell {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The model's identity makes no PCI function.
    #[error("device {name} cannot be a PCI function")]
    Config {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// The model's queues are too many, or of impossible sizes.
    #[error("device {name} has impossible queues: {sizes:?}")]
    Queues {
        /// The device.
        name: String,
        /// The sizes that the model stated.
        sizes: Vec<u16>,
    },
}

/// A virtio device on the PCI bus: put it into a
/// [`PciRoot`](devices::pci::PciRoot) and into the machine's list of units.
///
/// As a [`Unit`], `start` hands the queues to the model once the driver has
/// set the device up, and always succeeds: a model that does not start sets
/// `DEVICE_NEEDS_RESET` and is reported through [`DeviceEvents`], and the
/// machine goes on without it.
pub struct VirtioPci {
    name: String,
    signals: Arc<Signals>,
    kicks: Arc<[Kick]>,
    core: Mutex<Core>,
    config: Mutex<ConfigSpace>,
    counters: Option<Arc<dyn Counters>>,
    balloon: Option<Arc<BalloonView>>,
    input: Option<Arc<InputQueue>>,
    memory: Option<Arc<MemoryView>>,
    /// Where the MSI-X and the access capability are.
    msix_cap: u16,
    pci_cap: u16,
}

impl VirtioPci {
    /// Joins `device` to the bus as the unit `name`. It is not running, and
    /// has no address yet.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: &dyn MsiAllocator,
        doorbells: Arc<dyn Doorbells>,
        events: Arc<dyn DeviceEvents>,
    ) -> Result<Arc<Self>, TransportError> {
        let name = name.into();
        let identity = device.identity();
        let (counters, balloon) = (device.counters(), device.balloon());
        let (input, plugged) = (device.input(), device.memory());
        let queues = queue_count(&name, &identity.queue_sizes)?;
        let msix = Msix::new(msi, queues + 1).map_err(|source| TransportError::Msi {
            name: name.clone(),
            source,
        })?;
        let kicks: Arc<[Kick]> = (0..queues)
            .map(|_| Kick::new())
            .collect::<io::Result<_>>()
            .map_err(|source| TransportError::Doorbell {
                name: name.clone(),
                source,
            })?;
        let (config, msix_cap, pci_cap) =
            describe(&identity, &msix).map_err(|source| TransportError::Config {
                name: name.clone(),
                source,
            })?;
        let signals = Arc::new(Signals::new(
            name.clone(),
            msix,
            usize::from(queues),
            events,
        ));
        let core = Core::new(Parts {
            device,
            memory,
            signals: Arc::clone(&signals),
            kicks: Arc::clone(&kicks),
            doorbells,
            features: identity.features,
            queue_sizes: identity.queue_sizes,
            notify_multiplier: NOTIFY_MULTIPLIER.into(),
        });
        Ok(Arc::new(Self {
            name,
            signals,
            kicks,
            core: Mutex::new(core),
            config: Mutex::new(config),
            counters,
            balloon,
            input,
            memory: plugged,
            msix_cap,
            pci_cap,
        }))
    }

    /// The device's id, which is its unit's name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.name
    }

    /// Whether a driver uses the device. Takes no lock.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.signals.driver_ok.load(Ordering::Acquire)
    }

    /// Whether the device works no more until its driver resets it. Takes no lock.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.signals.needs_reset.load(Ordering::Acquire)
    }

    /// Whether the program that is to serve the device is gone. Takes no lock.
    #[must_use]
    pub fn peer_lost(&self) -> bool {
        self.signals.peer_lost.load(Ordering::Acquire)
    }

    /// What the model has counted, by name. Takes no lock.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.as_ref().map(|c| c.read()).unwrap_or_default()
    }

    /// Whether frames go through, of a network card whose link this process sets. Takes no lock.
    #[must_use]
    pub fn link(&self) -> Option<bool> {
        self.counters.as_ref().and_then(|c| c.link())
    }

    /// Lets go of model, back end and interrupts, for a device that has been
    /// stopped and taken off the bus. When what is returned has been dropped, files that the back end had
    /// open are closed; that may take as long as the host does. Others may hold the device for a while
    /// still: their accesses do nothing.
    #[must_use = "dropping it closes files, which may take long"]
    pub fn retire(&self) -> Box<dyn VirtioDevice> {
        let model = self.core().retire();
        self.signals.msix.reset();
        model
    }

    /// Makes the disk `size` bytes long and tells the driver. The guest may be running.
    ///
    /// # Errors
    ///
    /// [`ResizeError`]; the disk is then as it was.
    pub fn resize_disk(&self, size: u64) -> Result<(), ResizeError> {
        self.core().resize_disk(size)
    }

    /// The disk that requests go to, if it is a block device.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<dyn block::Disk>> {
        self.core().disk()
    }

    /// The features that are offered, and those of them that the driver uses: a device that is to be restored from this one has to offer those.
    #[must_use]
    pub fn features(&self) -> (u64, u64) {
        let (offered, taken) = self.core().features();
        (offered, offered & taken)
    }

    /// Has requests go to another image from the next start on; see [`VirtioDevice::exchange_disk`].
    ///
    /// # Errors
    ///
    /// [`ExchangeError`]; nothing is changed then.
    pub fn exchange_disk(&self, image: DiskImage) -> Result<DiskImage, ExchangeError> {
        self.core().exchange_disk(image)
    }

    /// What can be read of the device, if it is a balloon. Takes no lock.
    #[must_use]
    pub fn balloon(&self) -> Option<&Arc<BalloonView>> {
        self.balloon.as_ref()
    }

    /// What can be read of the device, if it is memory that comes and goes. Takes no lock.
    #[must_use]
    pub fn memory(&self) -> Option<&Arc<MemoryView>> {
        self.memory.as_ref()
    }

    /// Asks for another size of memory that comes and goes, and tells the driver. The guest may be running.
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub fn request_memory(&self, size: u64) -> Result<(), NoMemory> {
        self.core().request_memory(size)
    }

    /// The way to the guest's keyboard or pointer, if the device is one. Takes no lock.
    #[must_use]
    pub fn input(&self) -> Option<&Arc<InputQueue>> {
        self.input.as_ref()
    }

    /// Changes what the balloon is to do and tells the driver. The guest may be running.
    ///
    /// # Errors
    ///
    /// [`NoBalloon`].
    pub fn change_balloon(&self, change: BalloonChange) -> Result<(), NoBalloon> {
        self.core().change_balloon(change)
    }

    /// Begins to change the device's configuration by a patch of its model's shape; see
    /// [`VirtioDevice::prepare`]. The guest may be running.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`].
    pub fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        self.core().prepare(patch, context)
    }

    /// Carries out a change that has been prepared. The guest may be running, and finds the device's registers
    /// slow to answer until it is done.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`].
    pub fn reconfigure(&self, prepared: Prepared) -> Result<(), ReconfigureError> {
        self.core().reconfigure(prepared)
    }

    /// Has this process do what the device does to guest memory, or leaves it to the host's kernel again, where that is to; see
    /// [`VirtioDevice::serve_here`]. The guest may be running, and finds the device's registers slow to answer until it is done.
    ///
    /// # Errors
    ///
    /// [`ReconfigureError`].
    pub fn serve_here(&self, here: bool) -> Result<(), ReconfigureError> {
        self.core().serve_here(here)
    }

    /// Why the device cannot go to another host with its guest, if it cannot.
    #[must_use]
    pub fn bound_here(&self) -> Option<&'static str> {
        self.core().bound_here()
    }

    /// See [`VirtioDevice::renew`]. The device has been restored and not been started.
    pub fn renew(&self) {
        self.core().renew();
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config_space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// MSI-X message control as it stands in configuration space.
    fn message_control(&self, config: &ConfigSpace) -> u16 {
        let mut control = [0; 2];
        config.read(self.msix_cap + 2, &mut control);
        u16::from_le_bytes(control)
    }

    /// The BAR access that the access capability describes (4.1.4.9): offset
    /// and length, if they are a valid pair.
    fn window(&self) -> Option<(u64, usize)> {
        let config = self.config_space();
        let field = |offset: u16| {
            let mut bytes = [0; 4];
            config.read(self.pci_cap + offset, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let [bar, ..] = field(PCI_CAP_BAR).to_le_bytes();
        let offset = u64::from(field(PCI_CAP_OFFSET));
        let length = field(PCI_CAP_LENGTH);
        let valid = bar == layout::BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length.into())
            && offset < layout::SIZE;
        valid.then_some((offset, usize::try_from(length).ok()?))
    }

    fn touches_window(&self, offset: u16, len: usize) -> bool {
        overlaps(offset, len, self.pci_cap + PCI_CAP_DATA, 4)
    }

    /// A kick. Before the driver is ready nobody waits for it, and it is
    /// forgotten at the next reset.
    fn ring(&self, offset: u64) {
        if let Ok(queue) = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER))
            && let Some(kick) = self.kicks.get(queue)
        {
            kick.ring();
        }
    }
}

fn queue_count(name: &str, sizes: &[u16]) -> Result<u16, TransportError> {
    let possible = sizes.len() <= MAX_QUEUES && sizes.iter().all(|s| s.is_power_of_two());
    match u16::try_from(sizes.len()) {
        Ok(count) if possible => Ok(count),
        _ => Err(TransportError::Queues {
            name: name.to_owned(),
            sizes: sizes.to_vec(),
        }),
    }
}

/// The configuration space, and where its MSI-X and access capabilities are.
fn describe(identity: &Identity, msix: &Msix) -> Result<(ConfigSpace, u16, u16), ConfigError> {
    let id = FIRST_DEVICE.saturating_add(identity.device_type);
    let mut config = ConfigSpace::new(&FunctionId {
        vendor: VENDOR,
        device: id,
        revision: 1,
        class: identity.pci_class,
        subsystem_vendor: VENDOR,
        subsystem: id,
    });
    config.add_bar(layout::BAR, BarKind::Memory64, layout::SIZE)?;
    let msix_cap = config.add_capability(
        MSIX_CAPABILITY_ID,
        &msix.capability(layout::BAR, layout::TABLE, layout::PBA),
        &Msix::CAPABILITY_WRITABLE,
    )?;
    let mut add = |kind, offset: u32, length: u32, more: &[u8], writable: &[u8]| {
        let len = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
        let mut body = vec![len, kind, layout::BAR, 0, 0, 0];
        body.extend_from_slice(&offset.to_le_bytes());
        body.extend_from_slice(&length.to_le_bytes());
        body.extend_from_slice(more);
        config.add_capability(VENDOR_CAPABILITY, &body, writable)
    };
    add(CAP_COMMON, layout::COMMON, COMMON_LEN.into(), &[], &[])?;
    add(CAP_ISR, layout::ISR, 1, &[], &[])?;
    add(CAP_DEVICE, layout::DEVICE, layout::REGION, &[], &[])?;
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    add(CAP_NOTIFY, layout::NOTIFY, layout::REGION, &multiplier, &[])?;
    // The guest chooses BAR, offset and length, and has four bytes of data.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    let pci_cap = add(CAP_PCI, 0, 0, &[0; 4], &writable)?;
    Ok((config, msix_cap.into(), pci_cap.into()))
}

fn overlaps(offset: u16, len: usize, start: u16, size: usize) -> bool {
    let (offset, start) = (usize::from(offset), usize::from(start));
    offset < start.saturating_add(size) && start < offset.saturating_add(len)
}

/// Splits a BAR offset into the start of its region and the offset into that.
fn region(offset: u64) -> (u32, u64) {
    let page = offset & !u64::from(layout::REGION - 1);
    let start = match u32::try_from(page).unwrap_or(u32::MAX) {
        page if page >= layout::PBA => layout::PBA,
        page if page >= layout::TABLE => layout::TABLE,
        page => page,
    };
    (start, offset.saturating_sub(start.into()))
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let mut window = [0xff; 4];
            let window = window.split_at_mut(len).0;
            self.bar_read(layout::BAR, at, window);
            self.config_space().set(self.pci_cap + PCI_CAP_DATA, window);
        }
        self.config_space().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        {
            let mut config = self.config_space();
            config.write(offset, data);
            if overlaps(offset, data.len(), self.msix_cap + 2, 2) {
                self.signals.msix.set_control(self.message_control(&config));
            }
        }
        if self.touches_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let mut window = [0; 4];
            let window = window.split_at_mut(len).0;
            self.config_space()
                .read(self.pci_cap + PCI_CAP_DATA, window);
            self.bar_write(layout::BAR, at, window);
        }
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        match region(offset) {
            (layout::COMMON, at) => self.core().common_read(at, data),
            (layout::ISR, at) => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.signals.isr.swap(0, Ordering::AcqRel);
                }
            }
            (layout::DEVICE, at) => self.core().device_read(at, data),
            (layout::TABLE, at) => self.signals.msix.table_read(at, data),
            (layout::PBA, at) => self.signals.msix.pba_read(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        match region(offset) {
            (layout::COMMON, at) => self.core().common_write(at, data),
            (layout::DEVICE, at) => self.core().device_write(at, data),
            (layout::NOTIFY, at) => self.ring(at),
            (layout::TABLE, at) => self.signals.msix.table_write(at, data),
            _ => {}
        }
    }

    fn bar_mapped(&self, _bar: u8, base: Option<u64>) {
        let notify = base.and_then(|base| base.checked_add(layout::NOTIFY.into()));
        self.core().set_notify_base(notify);
    }
}

impl Unit for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self) -> Result<(), StartError> {
        self.core().start();
        Ok(())
    }

    fn stop(&self, deadline: Instant) -> Result<(), StopError> {
        self.core().stop(deadline)
    }

    fn cut_short(&self, cut: bool) {
        self.signals.patience.end(cut);
    }

    fn reset(&self) {
        self.core().reset();
        self.config_space().reset();
        self.signals.msix.reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let core = self.core();
        let CoreState {
            status,
            isr,
            generation,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            config_vector,
            queues,
        } = core.save();
        let device = core.save_device(&self.name)?;
        drop(core);
        let transport = VirtioPciV1 {
            config: self.config_space().save(),
            msix: self.signals.msix.save(),
            status,
            isr,
            generation,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            config_vector,
            queues,
        };
        Ok(vec![Section::encode(&self.name, &transport)?, device])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let VirtioPciV1 {
            config,
            msix,
            status,
            isr,
            generation,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            config_vector,
            queues,
        } = set.take(&self.name, VirtioPciV1::SCHEMA)?.decode()?;
        let schema = self.core().device_schema();
        let device = set.take(&self.name, schema)?;
        let control = {
            let mut space = self.config_space();
            space.restore(VirtioPciV1::SCHEMA, config)?;
            self.message_control(&space)
        };
        self.signals
            .msix
            .restore(VirtioPciV1::SCHEMA, msix, control)?;
        let state = CoreState {
            status,
            isr,
            generation,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            config_vector,
            queues,
        };
        self.core().restore(state, &device)
    }
}
