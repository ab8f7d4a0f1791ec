//! The machine: built in a fixed order, driven by one thread.
//!
//! * [`beside`] is where files are opened and looked at: never on the control thread.
//! * [`parts`] are opened for it, which may take as long as storage does.
//! * [`loading`] reads the kernel into its memory, and makes the files that it is to have.
//! * [`build`] assembles it: VM, memory, interrupt controllers, devices, vCPUs.
//! * [`driver`] is the control thread and the only place where the state changes.
//! * [`vcpus`] are the vCPU threads, and [`throttle`] makes them stand part of their time.
//! * [`resize`] adds and removes vCPUs and memory while it runs.
//! * [`inbox`] is how everybody else reaches the control thread.
//! * [`bay`] is where devices are plugged, [`hotplug`] when that happens after the build.

pub(crate) mod alarm;
pub mod bay;
pub(crate) mod beside;
pub mod build;
pub mod chain;
pub mod coredump;
mod doorbells;
pub mod driver;
pub(crate) mod fault;
pub mod fixtures;
pub mod flatten;
mod hosts;
pub mod hotplug;
pub mod inbox;
pub mod inventory;
pub mod loading;
pub mod parts;
pub mod payload;
mod platform;
pub mod processors;
pub mod resize;
pub mod saved;
pub mod saving;
pub mod sealed;
mod secrets;
pub mod signals;
pub mod snapshot;
pub mod state;
pub mod throttle;
pub mod tracking;
pub mod vcpus;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use api::{ControlError, ErrorKind, EventLog};
use devices::pci::PciAddress;
use devices::{StartError, StopError, Unit};
use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_guest_debug};
use migration::{RestoreError, SaveError, SectionSet};
use virtio::memory::GuestMap;
use virtio::models::BuildContext;
use virtio::models::mem::MemoryView;
use virtio::transport::VirtioPci;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::acpi::{AcpiError, AcpiImage};
use crate::boot::{BootError, Entry};
use crate::config::ConfigError;
use crate::display::ViewersError;
use crate::kvm::vcpu::VcpuState;
use crate::kvm::{IrqchipState, KvmError, Vm};
use crate::memory::restored::Restored;
use crate::memory::still::RamParts;
use crate::memory::{GuestRam, RamError};
use crate::opener::Opener;
use crate::smbios::SmbiosImageError;
use bay::Bay;
use beside::BesideError;
use inventory::{Inventory, Item};
use payload::Payload;
use platform::Platform;
use resize::{Resizable, Resized};
use tracking::Tracking;
use vcpus::Vcpus;

pub use migration::manifest;
pub use signals::Signals;

/// Why a machine could not be built or driven.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file or device of the host could not be opened.
    #[error("{flag}")]
    Open {
        /// The flag that names it.
        flag: &'static str,
        /// What failed, naming the path.
        #[source]
        source: crate::opener::OpenError,
    },
    /// The machine's files are not its own.
    #[error(transparent)]
    Files(ConfigError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is not enough memory.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// The host has not the features that the CPUs are to have, or they are not known.
    #[error("--cpus baseline={baseline}")]
    Baseline {
        /// What was asked for.
        baseline: String,
        /// What is wrong with it.
        #[source]
        source: crate::kvm::baseline::BaselineError,
    },
    /// There is nothing to boot.
    #[error("the machine has no kernel: describe one (payload.kernel, or --kernel)")]
    NoKernel,
    /// The kernel or the initial RAM disk could not be loaded.
    #[error("{what}")]
    Boot {
        /// What was loaded, naming flag and path.
        what: String,
        /// Why it failed.
        #[source]
        source: BootError,
    },
    /// The machine is not as its snapshot says.
    #[error(transparent)]
    Restore(saved::RestoreFailure),
    /// The ACPI tables could not be made.
    #[error("ACPI tables")]
    Acpi(#[from] AcpiError),
    /// The SMBIOS tables could not be made.
    #[error("--smbios")]
    Smbios(#[from] SmbiosImageError),
    /// The ACPI tables or registers could not be put into guest memory.
    #[error("guest memory at {address:#x} could not be written; give the guest more memory")]
    GuestMemory {
        /// The guest-physical address.
        address: u64,
    },
    /// A device could not be made.
    #[error("{device}")]
    Device {
        /// The device's flag and id.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More vCPUs than KVM gives a VM.
    #[error("--cpus {key}={wanted}: this host's KVM gives a VM at most {most}")]
    TooManyCpus {
        /// `boot`, or `max` when that is more.
        key: &'static str,
        /// What was asked for.
        wanted: u16,
        /// What there is.
        most: usize,
    },
    /// RAM reaches past the last address that the host's processors know.
    #[error(
        "--memory size={size}: this host's guests have addresses of {bits} bits: give a smaller size"
    )]
    AddressWidth {
        /// The bytes asked for.
        size: u64,
        /// The width.
        bits: u32,
    },
    /// Memory that can be added reaches past that address.
    #[error(
        "--memory hotplug_size={size}: this host's guests have addresses of {bits} bits: give a \
         smaller size"
    )]
    HotplugWidth {
        /// The bytes asked for.
        size: u64,
        /// The width.
        bits: u32,
    },
    /// A console could not be set up.
    #[error("{flag}")]
    Console {
        /// The flag.
        flag: &'static str,
        /// Why.
        #[source]
        source: crate::console::ConsoleError,
    },
    /// Viewers cannot be served.
    #[error("--display")]
    Display(#[from] ViewersError),
    /// The host refused something that every machine needs.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// What opens files cannot begin.
    #[error(transparent)]
    Beside(#[from] BesideError),
    /// What ends the machine has come meanwhile.
    #[error("the machine is being ended")]
    Cut,
    /// There is no such device.
    #[error("there is no device with the id {id}")]
    NoDevice {
        /// The id.
        id: String,
    },
    /// It is memory, which goes block by block.
    #[error("{id} is the machine's memory and stays: vm.resize takes memory away")]
    Stays {
        /// The id.
        id: String,
    },
    /// The machine has something that a snapshot cannot hold.
    #[error("snapshots do not yet hold {what}: take what the manual names (snapshots.md)")]
    NotYetSaved {
        /// What it is.
        what: &'static str,
    },
    /// What comes from another monitor does not fit.
    #[error("the machine is not taken: {reason}")]
    NotTaken {
        /// Why.
        reason: String,
    },
    /// It is part of every machine of this description.
    #[error("{id} is part of the machine and stays while it exists")]
    Fixed {
        /// The id.
        id: String,
    },
    /// A unit did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A unit did not stop.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The control thread cannot wait for anything any more.
    #[error("the control thread cannot wait")]
    Wait(#[source] io::Error),
}

impl MachineError {
    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        match self {
            Self::Files(error) => ControlError::from(error),
            Self::Restore(error) => error.to_control(),
            error => ControlError::from_error(error.kind(), error),
        }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDevice { .. } => ErrorKind::NotFound,
            Self::Beside(BesideError::Full) => ErrorKind::Busy,
            Self::NotYetSaved { .. } => ErrorKind::Unimplemented,
            Self::Cut | Self::NotTaken { .. } => ErrorKind::Conflict,
            Self::TooManyCpus { .. }
            | Self::AddressWidth { .. }
            | Self::HotplugWidth { .. }
            | Self::Stays { .. }
            | Self::Fixed { .. } => ErrorKind::Invalid,
            Self::Device { source, .. } => fault::of(&**source),
            Self::Open { source, .. } => fault::of(source),
            Self::Display(source) => fault::of(source),
            Self::Console { source, .. } => fault::of(source),
            _ => ErrorKind::Failed,
        }
    }
}

/// What vCPUs and interrupt controllers are at power-on.
struct PowerOn {
    cpus: Vec<VcpuState>,
    irqchip: IrqchipState,
    /// The MSRs that belong to a vCPU's state.
    msrs: Vec<u32>,
    /// What CPUID answers, without what differs from one vCPU to the other.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// How fast their time-stamp counters run, in kHz; 0 where the host does not say.
    tsc_khz: u32,
    /// How many vCPUs there were, and how many bytes of RAM.
    size: (usize, u64),
}

/// Everything that is the machine. It belongs to the control thread.
pub struct Machine {
    // Dropped first: no vCPU runs while the rest goes away.
    vcpus: Vcpus,
    vm: Vm,
    ram: GuestRam,
    /// In the order in which they start; they stop in reverse.
    units: Vec<Arc<dyn Unit>>,
    /// The units have been started, and a new one is to be started too.
    started: bool,
    /// The virtio devices, which are among the units.
    virtio: Vec<Item>,
    bay: Bay,
    events: EventLog,
    platform: Platform,
    /// Away while another thread loads it, and gone when that is not waited for any more.
    payload: Option<Payload>,
    /// The kernel's entry, when it has been loaded and not been entered.
    entry: Option<Entry>,
    acpi: AcpiImage,
    resizable: Resizable,
    power_on: PowerOn,
    clock: Option<kvm_clock_data>,
    /// The clock that is stopped is to be set by the time since then, in nanoseconds since 1970.
    late_since: Option<u64>,
    /// How vCPUs that come are debugged.
    debug: Option<kvm_guest_debug>,
    /// Memory that comes and goes.
    plugged: Option<Arc<MemoryView>>,
    /// What is known of writes to RAM.
    tracking: Arc<Tracking>,
}

/// What was to be loaded, and where it is to be entered.
type Reloaded = (Payload, Result<Entry, MachineError>);

/// Stops all units, those that drain last-started first. One that does not
/// stop keeps no other from stopping; the first failure is returned.
fn stop_all(units: &[Arc<dyn Unit>], deadline: Instant) -> Result<(), MachineError> {
    let mut result = Ok(());
    for unit in units.iter().rev() {
        result = result.and(unit.stop(deadline).map_err(MachineError::from));
    }
    result
}

impl Machine {
    /// The vCPU threads.
    #[must_use]
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// vCPUs that come from now on are debugged so, before they run; `None`: not.
    pub fn debug_new_cpus(&mut self, debug: Option<kvm_guest_debug>) {
        self.debug = debug;
    }

    /// The ways in which KVM can debug this machine's vCPUs, as `KVM_GUESTDBG_*` bits.
    #[must_use]
    pub fn debug_controls(&self) -> u32 {
        self.vm.debug_controls()
    }

    /// What loads the kernel once more, for another thread; [`Machine::loaded`] takes what it gives. `None` when
    /// the kernel is in memory. vCPUs are idle.
    ///
    /// # Errors
    ///
    /// [`MachineError::Host`], when the files are being read that a boot before has not waited for.
    fn begin_load(
        &mut self,
    ) -> Result<Option<impl FnOnce() -> Reloaded + Send + use<>>, MachineError> {
        if self.entry.is_some() {
            return Ok(None);
        }
        let mut payload = self.payload.take().ok_or(MachineError::Host {
            what: "the kernel's file",
            source: io::ErrorKind::ResourceBusy.into(),
        })?;
        let (memory, acpi) = (self.memory_map(), self.acpi.clone());
        Ok(Some(move || {
            let entry = payload.load(&memory, &acpi);
            (payload, entry)
        }))
    }

    fn loaded(&mut self, (payload, entry): Reloaded) -> Result<(), MachineError> {
        self.payload = Some(payload);
        self.entry = Some(entry?);
        Ok(())
    }

    /// Points the boot CPU at the entry of the kernel, which has been loaded. vCPUs are idle and in their power-on state.
    fn enter_kernel(&mut self) -> Result<(), MachineError> {
        let (Some(entry), Some(payload)) = (self.entry.take(), &self.payload) else {
            return Err(MachineError::NoKernel);
        };
        let view = self.ram.memory().memory();
        let sregs = self.ask_boot_cpu(|vcpu| vcpu.sregs())?;
        let (regs, sregs) = entry
            .registers(&view, &sregs)
            .map_err(|source| payload.failed(source))?;
        self.ask_boot_cpu(move |vcpu| {
            vcpu.set_sregs(&sregs)?;
            vcpu.set_regs(&regs)
        })
    }

    fn ask_boot_cpu<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut crate::kvm::vcpu::Vcpu) -> Result<T, KvmError> + Send + 'static,
    ) -> Result<T, MachineError> {
        match self.vcpus.ask(0, ask) {
            Some(answer) => Ok(answer?),
            None => Err(MachineError::Host {
                what: "the boot CPU's thread",
                source: io::ErrorKind::BrokenPipe.into(),
            }),
        }
    }

    fn start_units(&mut self) -> Result<(), MachineError> {
        for unit in &self.units {
            unit.start()?;
        }
        self.started = true;
        Ok(())
    }

    /// All units, in the order in which they start.
    fn units(&self) -> Vec<Arc<dyn Unit>> {
        self.units.clone()
    }

    /// Takes note of what came of [`stop_all`].
    fn stopped(&mut self, result: &Result<(), MachineError>) {
        self.started &= result.is_err();
    }

    /// Takes the state of all units. They are stopped, and vCPUs are idle.
    ///
    /// # Errors
    ///
    /// [`SaveError`] of the first unit that could not tell its state.
    pub fn save_units(&self) -> Result<SectionSet, SaveError> {
        let mut set = SectionSet::default();
        for unit in &self.units {
            unit.save()?
                .into_iter()
                .for_each(|section| set.push(section));
        }
        Ok(set)
    }

    /// Puts state into the units that [`Machine::save_units`] took from a
    /// machine of the same configuration. They are stopped or not yet started,
    /// and vCPUs are idle. `set` is not trusted.
    ///
    /// # Errors
    ///
    /// [`RestoreError`] also when a section is left that no unit has taken. The
    /// machine is then to be dropped.
    pub fn restore_units(&self, mut set: SectionSet) -> Result<(), RestoreError> {
        for unit in &self.units {
            unit.restore(&mut set)?;
        }
        self.check_slots()?;
        set.finish()
    }

    /// Forgets what [`Machine::take_over`] has put into it, but not its memory: it can be put in again. It has not run.
    fn forget_state(&mut self) -> Result<(), MachineError> {
        for unit in &self.units {
            unit.reset();
        }
        self.vm.set_irqchip_state(&self.power_on.irqchip)?;
        self.clock = None;
        self.late_since = None;
        Ok(())
    }

    /// Puts everything back to power-on: devices, vCPUs, and memory, which
    /// reads as zeros and costs the host nothing. Devices that are to go have
    /// been taken out before. vCPUs and units are stopped.
    /// The guest finds the vCPUs and the memory that it had, less the vCPUs that it was
    /// to give up; those are returned.
    fn reset(&mut self) -> Result<Vec<Resized>, MachineError> {
        for unit in &self.units {
            unit.reset();
        }
        let resized = self.take_resized()?;
        self.renew_tables()?;
        if let Some(memory) = &self.plugged {
            memory.unplug_all();
        }
        self.ram.discard()?;
        self.vm.set_irqchip_state(&self.power_on.irqchip)?;
        for index in 0..self.vcpus.count() {
            self.power_up(index)?;
        }
        self.clock = None;
        self.late_since = None;
        Ok(resized)
    }

    /// Has the watchdog not count, or count on: for a guest that stands while its devices do not.
    fn hold_watchdog(&self, hold: bool) {
        self.platform.hold_watchdog(hold);
    }

    /// Stops the guest's clock: the time until [`Machine::start_clock`] does not pass for it.
    fn stop_clock(&mut self) -> Result<(), MachineError> {
        self.clock = Some(self.vm.clock()?);
        Ok(())
    }

    /// Lets the guest's clock go on; it stays stopped on failure.
    fn start_clock(&mut self) -> Result<(), MachineError> {
        if let Some(clock) = self.clock {
            let clock = snapshot::set_forward(clock, self.late_since, crate::kvm::realtime());
            self.vm.set_clock(&clock)?;
        }
        self.clock = None;
        self.late_since = None;
        for index in 0..self.vcpus.count() {
            self.vcpus.ask(index, |vcpu| vcpu.announce_pause());
        }
        Ok(())
    }

    /// What is in the machine, for readers.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        let fixtures = Arc::clone(self.platform.fixtures());
        Inventory::new(
            self.virtio.clone(),
            fixtures,
            self.vcpus.views(),
            self.memory_size(),
        )
        .with_restored(self.ram.restored().cloned())
    }

    fn item(&self, id: &str) -> Result<&Item, MachineError> {
        let found = self.virtio.iter().find(|item| item.device.id() == id);
        found.ok_or_else(|| MachineError::NoDevice { id: id.to_owned() })
    }

    /// All virtio devices.
    fn virtio_devices(&self) -> Vec<Arc<VirtioPci>> {
        let all = self.virtio.iter();
        all.map(|item| Arc::clone(&item.device)).collect()
    }

    /// The device `id` and its address.
    fn device(&self, id: &str) -> Result<(Arc<VirtioPci>, PciAddress), MachineError> {
        let item = self.item(id)?;
        Ok((Arc::clone(&item.device), item.address))
    }

    /// What the device `id` would be built with now.
    fn context(&self, id: &str, opener: &Arc<Opener>) -> BuildContext {
        BuildContext {
            id: id.to_owned(),
            opener: Arc::clone(opener) as Arc<dyn block::Opener>,
            networks: Arc::clone(opener) as Arc<dyn net::Opener>,
            cpus: u16::try_from(self.vcpus.count()).unwrap_or(u16::MAX),
            groups: self.bay.groups.clone(),
            ports: Arc::new(virtio::models::console::NoPorts),
            awaited: None,
        }
    }

    /// How memory came from a snapshot, if it did.
    fn restored_memory(&self) -> Option<&Arc<Restored>> {
        self.ram.restored()
    }

    /// RAM as it is now. It stays mapped as long as this is held; what is added later is not in it.
    fn memory_map(&self) -> GuestMap {
        GuestMap::clone(&self.ram.memory().memory())
    }

    /// The file behind RAM, where others can share it and nothing has been added.
    fn memory_file(&self) -> Option<Arc<std::fs::File>> {
        self.ram.file()
    }

    /// What of RAM has been written since a snapshot.
    fn tracking(&self) -> &Arc<Tracking> {
        &self.tracking
    }

    /// RAM as it can be held still.
    fn ram_parts(&self) -> RamParts {
        self.ram.parts()
    }

    /// Gives every vCPU a non-maskable interrupt.
    fn inject_nmi(&self) -> Result<(), MachineError> {
        Ok(self.vm.signal_nmi()?)
    }

    fn press_power_button(&self) {
        self.platform.press_power_button();
    }

    /// Serves what is due on the real-time clock.
    fn tick(&self) {
        self.platform.tick();
    }

    /// Readable when [`Machine::tick`] has something to serve.
    fn tick_fds(&self) -> [Option<RawFd>; 2] {
        self.platform.tick_fds()
    }

    /// Reads guest RAM at a guest-physical address into `data`, or writes it
    /// from there; `false` when not all of it is RAM.
    pub fn access_memory(&self, physical: u64, data: &mut [u8], write: bool) -> bool {
        let view = self.ram.memory().memory();
        let address = GuestAddress(physical);
        if write {
            view.write_slice(data, address).is_ok()
        } else {
            view.read_slice(data, address).is_ok()
        }
    }
}
