//! Assembly of a machine from its configuration, in the start order: VM and
//! capabilities, memory, interrupt controllers, devices, vCPUs.
//!
//! Everything that can be refused without KVM (files that the configuration
//! names) has been opened before ([`super::parts`]), so that a mistake leaves nothing behind.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use api::{DiskErrorAction, EventLog};
use devices::display::Adapter;
use devices::pci::{PciRoot, Windows};
use devices::{Bus, Unit};
use kvm_bindings::CpuId;
use virtio::device::{DiskReport, ErrorAction};
use virtio::limit::RateGroups;
use virtio::memory::GuestMap;
use virtio::models::mem::MemoryView;
use virtio::transport::{DeviceEvent, DeviceEvents};
use virtio::vhost::PeerReport;
use vm_memory::GuestAddressSpace;

use super::bay::{Bay, OpenDevice};
use super::doorbells::KvmDoorbells;
use super::hosts::{Hosts, Wanted};
use super::inbox::{DiskStopped, Mailbox, Message, RequestDesk};
use super::inventory::Item;
use super::loading::{Loaded, Loading, Revival};
use super::parts::{Parts, ReadFiles};
use super::platform::{Platform, Wiring};
use super::processors;
use super::resize::{Addable, Resizable, VcpuMaker};
use super::saved::{Saved, SavedState};
use super::tracking::Tracking;
use super::vcpus::{OnStop, StopFlag, Vcpus};
use super::{Machine, MachineError, PowerOn};
use crate::acpi::{AcpiConfig, AcpiImage, Processor, Window};
use crate::config::{CpuBaseline, CpusConfig, MemoryConfig, Thp, VmConfig};
use crate::console::Consoles;
use crate::console::port::PortBoard;
use crate::kvm::baseline::{Baseline, BaselineError, LoadError};
use crate::kvm::irq::IrqRouter;
use crate::kvm::vcpu::{Buses, Vcpu};
use crate::kvm::{Hypervisor, Vm, cpuid};
use crate::layout::{MEMORY_SLOTS, memory};
use crate::memory::{GuestRam, PlugRegion, RamSpec};
use crate::opener::Opener;

/// A machine that has been built, with what its driver needs.
pub struct Built {
    /// The machine, ready to be booted.
    pub machine: Machine,
    /// Where a debugger connects, if anywhere.
    pub debugger: Option<crate::gdb::Listener>,
    /// What it is to be as, when it does not begin at power-on.
    pub saved: Option<SavedState>,
}

/// How a machine begins.
pub enum Origin {
    /// After power-on.
    PowerOn,
    /// As a snapshot says.
    Snapshot(Box<Saved>),
    /// As another monitor says, which sends memory and state when it has been built, or has handed this memory over.
    Elsewhere(Option<Arc<File>>),
}

impl Origin {
    /// The snapshot, whether it comes from elsewhere, and the memory that was handed over.
    fn split(self) -> (Option<Saved>, bool, Option<Arc<File>>) {
        match self {
            Self::Snapshot(saved) => (Some(*saved), false, None),
            Self::PowerOn => (None, false, None),
            Self::Elsewhere(memory) => (None, true, memory),
        }
    }
}

/// A machine that has memory, and no kernel in it yet. Dropping it leaves nothing behind.
pub struct Frame {
    hypervisor: Hypervisor,
    vm: Vm,
    supported: CpuId,
    baseline: Option<Baseline>,
    groups: RateGroups,
    ports: Arc<PortBoard>,
    models: Vec<OpenDevice>,
    ram: GuestRam,
    /// For memory that comes and goes.
    region: Option<Arc<PlugRegion>>,
    space: AddressSpace,
    tables: AcpiConfig,
    acpi: AcpiImage,
}

/// Begins to build the machine that `config` (complete and validated) describes from its `parts`. What is to be
/// loaded into it then is for another thread; of `consoles` that stays which is open and still wanted. Only with [`Origin::PowerOn`] it is built to be
/// booted.
///
/// # Errors
///
/// [`MachineError`]; nothing is left behind.
pub fn begin(
    config: &VmConfig,
    parts: Parts,
    opener: &Arc<Opener>,
    consoles: &Consoles,
    origin: Origin,
) -> Result<(Frame, Loading), MachineError> {
    let (saved, arrives, handed) = origin.split();
    let Parts {
        read,
        groups,
        ports,
        devices: models,
    } = parts;
    let ReadFiles {
        payload,
        baseline,
        secrets,
    } = read;
    // What excludes what is told before anything is made.
    let mode = saved.as_ref().map(|saved| saved.memory_mode(config));
    let mode = mode.transpose().map_err(MachineError::Restore)?;
    let hypervisor = open_hypervisor(config, opener)?;
    let vm = create_vm(&hypervisor)?;
    let supported = hypervisor.supported_cpuid()?;
    let spec = ram_spec(&config.memory);
    let mut ram = handed.map_or_else(
        || GuestRam::new(&spec),
        |file| GuestRam::of_file(&spec, file),
    )?;
    let space = AddressSpace::new(&ram, &config.memory, cpuid::address_bits(&supported))?;
    let region = match config.memory.plug_block() {
        Some(block) => Some(ram.reserve(&space.addable.area, block)?),
        None => None,
    };
    vm.set_memory(ram.slots())?;
    let tables = acpi_config(config, &space);
    let acpi = crate::acpi::build(&tables)?;
    let saved = match saved.zip(mode) {
        Some((saved, mode)) => {
            let memory = ram.restorable()?;
            Some(Revival {
                saved,
                memory,
                mode,
            })
        }
        None => None,
    };
    let loading = Loading {
        config: config.clone(),
        payload,
        memory: GuestMap::clone(&ram.memory().memory()),
        acpi: acpi.clone(),
        hosts: Wanted::new(config, consoles),
        viewers: consoles
            .display()
            .wanted(config, secrets, consoles.serial()),
        opener: Arc::clone(opener),
        saved,
        arrives,
    };
    let frame = Frame {
        hypervisor,
        vm,
        supported,
        baseline,
        groups,
        ports,
        models,
        ram,
        region,
        space,
        tables,
        acpi,
    };
    Ok((frame, loading))
}

/// Builds the rest. What the machine has to say goes to `mailbox`, and its consoles to `consoles`. Signals are blocked
/// already: back ends have threads, which are to leave them alone ([`super::Signals`]).
///
/// # Errors
///
/// [`MachineError`]; nothing is left behind.
pub fn finish(
    config: &VmConfig,
    (frame, loaded): (Frame, Loaded),
    opener: &Arc<Opener>,
    mailbox: &Mailbox,
    events: &EventLog,
    consoles: &Arc<Consoles>,
) -> Result<Built, MachineError> {
    let Frame {
        hypervisor,
        vm,
        supported,
        baseline,
        groups,
        ports,
        models,
        ram,
        region,
        space,
        tables,
        acpi,
    } = frame;
    let Loaded {
        payload,
        start,
        hosts,
        debugger,
        viewers,
    } = loaded;
    vm.create_irqchip()?;
    let hosts = Hosts::connect(config, hosts, opener, consoles, (&ports, mailbox))?;
    consoles.display().serve(viewers);

    let stop = StopFlag::new(AtomicBool::new(false));
    let pieces = Pieces {
        config,
        events,
        mailbox,
        stop: &stop,
        vm: &vm,
        ram: &ram,
        supported: &supported,
        baseline: baseline.as_ref(),
        space: &space,
        groups: &groups,
    };
    let devices = pieces.devices(models, hosts)?;
    let plugged = connect_memory(&devices.virtio, region);
    let (vcpus, power_on, maker) = pieces.vcpus(&hypervisor, devices.buses)?;
    let slots = devices.platform.slots();
    show(&devices.platform, &devices.virtio, consoles);
    let (entry, saved) = start.split();
    let machine = Machine {
        tracking: Tracking::new(ram.tracker(Box::new(vm.log().clone()))),
        vcpus,
        vm,
        ram,
        resizable: Resizable::new(slots, maker, space.addable, tables),
        units: devices.units,
        started: false,
        virtio: devices.virtio,
        bay: devices.bay,
        events: events.clone(),
        platform: devices.platform,
        payload: Some(payload),
        entry,
        acpi,
        power_on,
        clock: None,
        late_since: None,
        debug: None,
        plugged,
    };
    Ok(Built {
        machine,
        debugger,
        saved,
    })
}

/// Gives the device of memory that comes and goes its region, before a guest can see it.
fn connect_memory(items: &[Item], region: Option<Arc<PlugRegion>>) -> Option<Arc<MemoryView>> {
    let view = items.iter().find_map(|item| item.device.memory())?;
    view.connect(region?);
    Some(Arc::clone(view))
}

/// Shows the machine's screen, and leads keys and pointers to it.
fn show(platform: &Platform, virtio: &[Item], consoles: &Consoles) {
    let display = consoles.display();
    display
        .stage()
        .show(platform.display().map(Adapter::source));
    let hands = display.hands();
    hands.lead(Some(Arc::clone(platform.ps2())));
    let inputs = virtio.iter().filter_map(|item| item.device.input());
    hands.attach(inputs.cloned().collect());
}

/// Builds a machine here, for those who may wait for storage: [`begin`], [`Loading::run`] and [`finish`].
///
/// # Errors
///
/// [`MachineError`]; nothing is left behind.
pub fn build(
    config: &VmConfig,
    parts: Parts,
    opener: &Arc<Opener>,
    mailbox: &Mailbox,
    events: &EventLog,
    consoles: &Arc<Consoles>,
) -> Result<Built, MachineError> {
    let (frame, loading) = begin(config, parts, opener, consoles, Origin::PowerOn)?;
    let loaded = loading.run(&|| true)?;
    finish(config, (frame, loaded), opener, mailbox, events, consoles)
}

/// All that sits between the VM and its vCPUs.
struct Devices {
    buses: Buses,
    units: Vec<Arc<dyn Unit>>,
    virtio: Vec<Item>,
    bay: Bay,
    platform: Platform,
}

/// What the steps of [`build`] share.
struct Pieces<'a> {
    config: &'a VmConfig,
    events: &'a EventLog,
    mailbox: &'a Mailbox,
    stop: &'a StopFlag,
    vm: &'a Vm,
    ram: &'a GuestRam,
    supported: &'a CpuId,
    baseline: Option<&'a Baseline>,
    space: &'a AddressSpace,
    groups: &'a RateGroups,
}

impl Pieces<'_> {
    fn devices(&self, models: Vec<OpenDevice>, hosts: Hosts) -> Result<Devices, MachineError> {
        let buses = Buses {
            pio: Arc::new(Bus::default()),
            mmio: Arc::new(Bus::default()),
        };
        let router = IrqRouter::new(Arc::clone(self.vm.fd()));
        let requests = Arc::new(RequestDesk {
            mailbox: self.mailbox.clone(),
            stop: Arc::clone(self.stop),
        });
        let pci = PciRoot::new(Windows {
            low: window32(),
            high: self.space.window64.clone(),
        });
        let wiring = Wiring {
            router: &router,
            buses: &buses,
            requests,
            mailbox: self.mailbox,
            pci: &pci,
            pvpanic: self.config.pvpanic,
            watchdog: self.config.watchdog,
            display: self.config.display.as_ref(),
            vm: self.vm,
            cpu_slots: cpu_slots(&self.config.cpus),
            memory_slots: self.config.memory.has_slots(),
        };
        let (platform, mut units) = Platform::build(&wiring, hosts)?;
        units.push(Arc::clone(&pci) as Arc<dyn Unit>);
        let bay = self.bay(router, pci);
        let mut virtio = Vec::new();
        for device in models {
            let item = bay.plug(device, false)?;
            platform.hotplug().inserted(item.address);
            units.push(Arc::clone(&item.device) as Arc<dyn Unit>);
            virtio.push(item);
        }
        Ok(Devices {
            buses,
            units,
            virtio,
            bay,
            platform,
        })
    }

    fn bay(&self, router: IrqRouter, pci: Arc<PciRoot>) -> Bay {
        Bay {
            router,
            pci,
            doorbells: Arc::new(KvmDoorbells(Arc::clone(self.vm.fd()))),
            reporter: Arc::new(Reporter {
                events: self.events.clone(),
                mailbox: self.mailbox.clone(),
                memory: self.ram.size(),
            }),
            memory: self.ram.memory().clone(),
            groups: self.groups.clone(),
        }
    }

    fn vcpus(
        &self,
        hypervisor: &Hypervisor,
        buses: Buses,
    ) -> Result<(Vcpus, PowerOn, VcpuMaker), MachineError> {
        let host = |what| move |source| MachineError::Host { what, source };
        crate::kvm::vcpu::install_kick_handler()
            .map_err(host("the vCPUs' signal cannot be handled"))?;
        let cpuid = processors::shown(self.config, hypervisor, self.supported, self.baseline)?;
        let maker = VcpuMaker {
            cpuid,
            msrs: hypervisor.msr_indices()?,
            buses,
        };
        let mut vcpus = Vec::new();
        let mut states = Vec::new();
        for index in 0..u32::from(self.config.cpus.boot) {
            let (vcpu, state) = maker.make(self.vm, index)?;
            states.push(state);
            vcpus.push(vcpu);
        }
        let power_on = PowerOn {
            cpus: states,
            irqchip: self.vm.irqchip_state()?,
            msrs: maker.msrs.clone(),
            cpuid: maker.cpuid.clone(),
            tsc_khz: vcpus.first().map_or(0, Vcpu::tsc_khz),
            size: (vcpus.len(), self.ram.size()),
        };
        let mailbox = self.mailbox.clone();
        let on_stop: OnStop = Arc::new(move |index, stop| {
            mailbox.send(Message::Vcpu(index, stop));
        });
        let vcpus = Vcpus::start(vcpus, Arc::clone(self.stop), on_stop)
            .map_err(host("no thread for a vCPU"))?;
        Ok((vcpus, power_on, maker))
    }
}

/// Publishes what devices report, and has the machine paused where that is asked for.
struct Reporter {
    events: EventLog,
    mailbox: Mailbox,
    /// What the guest has besides what it plugs, in bytes.
    memory: u64,
}

impl Reporter {
    fn disk(&self, id: &str, report: &DiskReport) {
        let id = id.to_owned();
        match report {
            DiskReport::Error {
                operation,
                offset,
                reason,
                no_space,
                action,
            } => {
                self.events.publish(api::EventKind::DiskError {
                    id: id.clone(),
                    operation: (*operation).to_owned(),
                    offset: *offset,
                    reason: reason.clone(),
                    no_space: *no_space,
                    action: match action {
                        ErrorAction::Report => DiskErrorAction::Report,
                        ErrorAction::Ignore => DiskErrorAction::Ignore,
                        ErrorAction::Stop => DiskErrorAction::Stop,
                    },
                });
                if *action == ErrorAction::Stop {
                    let place = offset.map_or_else(String::new, |at| format!(" at byte {at}"));
                    self.mailbox.send(Message::DiskStopped(DiskStopped {
                        id,
                        what: format!("{operation}{place} failed: {reason}"),
                        no_space: *no_space,
                    }));
                }
            }
            DiskReport::WriteThreshold { threshold, offset } => {
                self.events.publish(api::EventKind::DiskWriteThreshold {
                    id,
                    threshold: *threshold,
                    offset: *offset,
                });
            }
            DiskReport::Corrupt { reason } => {
                let reason = reason.clone();
                self.events
                    .publish(api::EventKind::DiskCorrupt { id, reason });
            }
        }
    }
}

impl Reporter {
    fn peer(&self, id: &str, report: &PeerReport) {
        let id = id.to_owned();
        self.events.publish(match report {
            PeerReport::Connected => api::EventKind::DevicePeerConnected { id },
            PeerReport::Lost { reason } => {
                let reason = reason.clone();
                api::EventKind::DevicePeerLost { id, reason }
            }
        });
    }
}

impl DeviceEvents for Reporter {
    fn device_event(&self, name: &str, event: DeviceEvent<'_>) {
        match event {
            DeviceEvent::NeedsReset { reason } => {
                let (id, reason) = (name.to_owned(), reason.to_owned());
                self.events
                    .publish(api::EventKind::DeviceNeedsReset { id, reason });
            }
            DeviceEvent::Disk(report) => self.disk(name, report),
            DeviceEvent::Peer(report) => self.peer(name, report),
            DeviceEvent::BalloonReached { actual } => {
                let id = name.to_owned();
                self.events
                    .publish(api::EventKind::BalloonResized { id, actual });
            }
            DeviceEvent::MemoryReached { plugged } => {
                let size = self.memory.saturating_add(plugged);
                self.events.publish(api::EventKind::MemoryResized { size });
            }
            DeviceEvent::Activated => {
                let id = name.to_owned();
                self.events.publish(api::EventKind::DeviceActivated { id });
            }
            DeviceEvent::Reset => {
                let id = name.to_owned();
                self.events.publish(api::EventKind::DeviceReset { id });
            }
        }
    }
}

/// The features that CPUs have, unless they are all the host's.
pub(super) fn open_baseline(
    baseline: &CpuBaseline,
    opener: &Opener,
) -> Result<Option<Baseline>, MachineError> {
    match baseline {
        CpuBaseline::Host => Ok(None),
        CpuBaseline::V2 => Ok(Some(Baseline::v2())),
        CpuBaseline::V3 => Ok(Some(Baseline::v3())),
        CpuBaseline::File(path) => {
            let read = Baseline::load(path, opener);
            read.map(Some).map_err(|error| match error {
                LoadError::Open(source) => MachineError::Open {
                    flag: "--cpus baseline=",
                    source,
                },
                LoadError::Text { source, .. } => unfit(baseline, source),
            })
        }
    }
}

pub(super) fn unfit(baseline: &CpuBaseline, source: BaselineError) -> MachineError {
    MachineError::Baseline {
        baseline: baseline.clone().into(),
        source,
    }
}

/// KVM, which takes the machine's vCPUs.
pub(super) fn open_hypervisor(
    config: &VmConfig,
    opener: &Opener,
) -> Result<Hypervisor, MachineError> {
    let kvm = opener.open_kvm().map_err(|source| MachineError::Open {
        flag: "KVM",
        source,
    })?;
    let hypervisor = Hypervisor::new(kvm)?;
    check_cpus(config, &hypervisor)?;
    Ok(hypervisor)
}

fn create_vm(hypervisor: &Hypervisor) -> Result<Vm, MachineError> {
    let vm = hypervisor.create_vm()?;
    vm.enable_capabilities()?;
    Ok(vm)
}

fn check_cpus(config: &VmConfig, hypervisor: &Hypervisor) -> Result<(), MachineError> {
    let (wanted, most) = (config.cpus.most(), hypervisor.max_vcpus());
    if usize::from(wanted) > most {
        let key = if wanted > config.cpus.boot {
            "max"
        } else {
            "boot"
        };
        return Err(MachineError::TooManyCpus { key, wanted, most });
    }
    Ok(())
}

/// vCPUs that there may be and that are there at boot, where they come and go.
fn cpu_slots(config: &CpusConfig) -> Option<(u32, u32)> {
    config.max.map(|max| (max.into(), config.boot.into()))
}

pub(super) fn open_debugger(
    config: &VmConfig,
    opener: &Opener,
) -> Result<Option<crate::gdb::Listener>, MachineError> {
    use crate::config::GdbConfig;
    let failed = |source| MachineError::Open {
        flag: "--gdb",
        source,
    };
    Ok(match &config.gdb {
        None => None,
        Some(GdbConfig::Unix(path)) => Some(crate::gdb::Listener::Unix(
            opener.listen_unix(path).map_err(failed)?,
            opener.own_socket(path).map_err(failed)?,
        )),
        Some(GdbConfig::Tcp { host, port }) => Some(crate::gdb::Listener::Tcp(
            opener.listen_tcp(host, *port).map_err(failed)?,
        )),
    })
}

fn ram_spec(config: &MemoryConfig) -> RamSpec {
    RamSpec {
        size: config.size,
        shared: config.shared,
        huge_page: config.hugepages.then(|| config.page_size()),
        thp: match config.thp {
            Thp::On => Some(true),
            Thp::Off => Some(false),
            Thp::Host => None,
        },
        prefault: config.prefault,
    }
}

fn window32() -> Range<u64> {
    memory::PCI_MMIO32_START..memory::PCI_MMIO32_START + memory::PCI_MMIO32_LEN
}

/// What of the guest's physical addresses is used above RAM and 4 GiB.
struct AddressSpace {
    /// For memory that is added later.
    addable: Addable,
    /// For PCI, empty when the address width leaves no room.
    window64: Range<u64>,
}

impl AddressSpace {
    /// What can be added follows RAM, and the window that, as far as addresses of
    /// `bits` bits go.
    fn new(ram: &GuestRam, config: &MemoryConfig, bits: u32) -> Result<Self, MachineError> {
        let (size, limit) = (ram.size(), 1 << bits);
        if ram.end() > limit {
            return Err(MachineError::AddressWidth { size, bits });
        }
        let mut ram_end = ram.end();
        let mut area = ram_end..ram_end;
        let size = config.hotplug_size;
        if size > 0 {
            area.start = ram_end.next_multiple_of(memory::HOTPLUG_ALIGN);
            area.end = area.start.saturating_add(size);
            if area.end > limit {
                return Err(MachineError::HotplugWidth { size, bits });
            }
            ram_end = area.end;
        }
        let start = ram_end.next_multiple_of(memory::PCI_MMIO64_ALIGN);
        let end = start.saturating_add(memory::PCI_MMIO64_LEN).min(limit);
        Ok(Self {
            addable: Addable {
                area,
                block: config.hotplug_block(),
            },
            window64: start.min(end)..end,
        })
    }
}

fn acpi_config(config: &VmConfig, space: &AddressSpace) -> AcpiConfig {
    let window = |range: Range<u64>| Window {
        start: range.start,
        len: range.end - range.start,
    };
    let (boot, most) = (config.cpus.boot, config.cpus.most());
    let processor = |index| {
        if index < boot {
            Processor::Present
        } else {
            Processor::Absent
        }
    };
    AcpiConfig {
        processors: (0..most).map(processor).collect(),
        cpu_slots: cpu_slots(&config.cpus).is_some(),
        memory_slots: if config.memory.has_slots() {
            MEMORY_SLOTS
        } else {
            0
        },
        pci_mmio32: window(window32()),
        pci_mmio64: Some(space.window64.clone())
            .filter(|range| !range.is_empty())
            .map(window),
        serials: config.serials().map(crate::config::SerialConfig::is_on),
        pvpanic: config.pvpanic,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn space(size: u64, addable: u64, bits: u32) -> Result<AddressSpace, MachineError> {
        let ram = GuestRam::new(&RamSpec {
            size,
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        })
        .unwrap();
        let config = MemoryConfig {
            hotplug_size: addable,
            ..MemoryConfig::default()
        };
        AddressSpace::new(&ram, &config, bits)
    }

    fn window(size: u64, bits: u32) -> Range<u64> {
        space(size, 0, bits).unwrap().window64
    }

    #[test]
    fn the_window_follows_ram() {
        assert_eq!(window(GIB, 39), 4 * GIB..68 * GIB);
        assert_eq!(window(4 * GIB, 39), 5 * GIB..69 * GIB);
    }

    #[test]
    fn the_window_ends_where_addresses_do() {
        assert_eq!(window(GIB, 36), 4 * GIB..64 * GIB);
        assert!(window(63 * GIB, 36).is_empty());
    }

    #[test]
    fn memory_to_be_added_lies_between_ram_and_the_window() {
        let layout = |size, addable| {
            let space = space(size, addable, 39).unwrap();
            (space.addable.area, space.window64)
        };
        let (addable, window) = layout(GIB, GIB / 8);
        assert_eq!(addable, 4 * GIB..4 * GIB + GIB / 8);
        assert_eq!(window, 5 * GIB..69 * GIB);
        let (addable, window) = layout(3 * GIB + GIB / 2, 2 * GIB);
        assert_eq!((addable, window), (5 * GIB..7 * GIB, 7 * GIB..71 * GIB));
        let error = space(GIB, 60 * GIB + GIB / 8, 36).err().unwrap();
        assert!(error.to_string().contains("hotplug_size="), "{error}");
        assert!(space(GIB, 60 * GIB, 36).unwrap().window64.is_empty());
    }

    #[test]
    fn ram_past_the_address_width_is_refused() {
        let error = space(64 * GIB, 0, 36).err().unwrap().to_string();
        assert!(
            error.contains("--memory") && error.contains("36 bits"),
            "{error}"
        );
    }
}
