//! Assembly of a machine from its configuration, in the start order: VM and
//! capabilities, memory, interrupt controllers, devices, vCPUs.
//!
//! Everything that can be refused without KVM (files that the configuration
//! names) is opened first, so that a mistake leaves nothing behind.

use std::error::Error;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use api::DiskErrorAction;
use devices::pci::{PciRoot, Windows};
use devices::{Bus, Unit};
use kvm_bindings::CpuId;
use virtio::device::{DiskReport, ErrorAction, VirtioDevice};
use virtio::models::{BuildContext, Model};
use virtio::transport::{DeviceEvent, DeviceEvents, VirtioPci};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::doorbells::KvmDoorbells;
use super::driver::Ears;
use super::inbox::{DiskStopped, Mailbox, Message, RequestDesk};
use super::platform::{Hosts, Platform, Wiring};
use super::signals::Signals;
use super::vcpus::{OnStop, StopFlag, Vcpus};
use super::{Machine, MachineError, PowerOn};
use crate::acpi::{AcpiConfig, AcpiImage, Window};
use crate::boot::{self, BootError, BootSource, Entry, Protocol, Role};
use crate::config::{BootProtocol, DeviceConfig, MemoryConfig, SerialConfig, Thp, VmConfig};
use crate::events::EventBus;
use crate::kvm::cpuid::Shape;
use crate::kvm::irq::IrqRouter;
use crate::kvm::vcpu::{Buses, Vcpu};
use crate::kvm::{Hypervisor, Vm, cpuid};
use crate::layout::memory;
use crate::memory::{GuestRam, RamSpec};
use crate::opener::Opener;

/// What a machine boots. The files stay open, because a guest reset loads them again.
pub struct Payload {
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    cmdline: String,
    protocol: Protocol,
}

impl Payload {
    fn open(config: &VmConfig, opener: &Opener) -> Result<Self, MachineError> {
        let payload = &config.payload;
        let open = |flag, path: &Path| {
            opener
                .open_input(path)
                .map_err(|source| MachineError::Open { flag, source })
        };
        let kernel = open("--kernel", &payload.kernel)?;
        let initramfs = match &payload.initramfs {
            Some(path) => Some((path.clone(), open("--initramfs", path)?)),
            None => None,
        };
        Ok(Self {
            kernel: (payload.kernel.clone(), kernel),
            initramfs,
            cmdline: payload.cmdline.clone(),
            protocol: match payload.boot_protocol {
                BootProtocol::Auto => Protocol::Auto,
                BootProtocol::Linux => Protocol::Linux64,
                BootProtocol::Pvh => Protocol::Pvh,
            },
        })
    }

    /// Puts ACPI tables, kernel, initial RAM disk and command line into guest
    /// memory, which reads as zeros elsewhere.
    ///
    /// # Errors
    ///
    /// [`MachineError::Boot`], naming what could not be loaded.
    pub fn load(&mut self, ram: &GuestRam, acpi: &AcpiImage) -> Result<Entry, MachineError> {
        let view = ram.memory().memory();
        let address = acpi.address;
        view.write_slice(&acpi.bytes, GuestAddress(address))
            .map_err(|_| MachineError::GuestMemory { address })?;
        let source = BootSource {
            kernel: &mut self.kernel.1,
            initramfs: self.initramfs.as_mut().map(|(_, file)| file),
            cmdline: &self.cmdline,
            protocol: self.protocol,
        };
        boot::load(&view, source, address).map_err(|source| self.failed(source))
    }

    /// Names the flag and the file that `source` is about.
    #[must_use]
    pub fn failed(&self, source: BootError) -> MachineError {
        let what = match (subject(&source), &self.initramfs) {
            (Subject::Initramfs, Some((path, _))) => format!("--initramfs {}", path.display()),
            (Subject::CommandLine, _) => "--cmdline".to_owned(),
            _ => format!("--kernel {}", self.kernel.0.display()),
        };
        MachineError::Boot { what, source }
    }
}

enum Subject {
    Kernel,
    Initramfs,
    CommandLine,
}

fn subject(error: &BootError) -> Subject {
    match error {
        BootError::Directory(Role::Initramfs)
        | BootError::Empty(Role::Initramfs)
        | BootError::NotSeekable {
            role: Role::Initramfs,
            ..
        }
        | BootError::Read {
            role: Role::Initramfs,
            ..
        }
        | BootError::Truncated {
            role: Role::Initramfs,
            ..
        }
        | BootError::InitramfsNoRoom { .. }
        | BootError::InitramfsTooLarge { .. } => Subject::Initramfs,
        BootError::CommandLineTooLong { .. } | BootError::CommandLineNul { .. } => {
            Subject::CommandLine
        }
        _ => Subject::Kernel,
    }
}

/// A machine that has been built, with what its driver needs.
pub struct Built {
    /// The machine, ready to be booted.
    pub machine: Machine,
    /// What its driver listens to.
    pub ears: Ears,
    /// How others reach its driver.
    pub mailbox: Mailbox,
    /// Where a debugger connects, if anywhere.
    pub debugger: Option<crate::gdb::Listener>,
    /// The path of the serial port's pseudo-terminal, where it leads to one.
    pub pty: Option<String>,
}

/// Builds the machine that `config` (complete and validated) describes.
///
/// # Errors
///
/// [`MachineError`]; nothing is left behind.
pub fn build(
    config: &VmConfig,
    models: &[Model],
    opener: &Arc<Opener>,
    events: &EventBus,
) -> Result<Built, MachineError> {
    let host = |what| move |source| MachineError::Host { what, source };
    // Back ends have threads, which are to leave these signals alone.
    let signals = Signals::block().map_err(host("signals cannot be received"))?;
    let mut payload = Payload::open(config, opener)?;
    let models = open_devices(config, models, opener)?;
    let hypervisor = open_hypervisor(config, opener)?;

    let vm = hypervisor.create_vm()?;
    vm.enable_capabilities()?;
    let supported = hypervisor.supported_cpuid()?;
    let ram = GuestRam::new(&ram_spec(&config.memory))?;
    let space = AddressSpace::new(&ram, cpuid::address_bits(&supported))?;
    vm.set_memory(ram.slots())?;
    let acpi = crate::acpi::build(&acpi_config(config, &space))?;
    let entry = payload.load(&ram, &acpi)?;
    vm.create_irqchip()?;

    // Nothing is created on the host before the guest has been loaded: a
    // mistake in the flags must not leave files behind.
    let (mailbox, inbox) =
        super::inbox::inbox().map_err(host("no descriptor for the control thread"))?;
    let debugger = open_debugger(config, opener)?;
    let hosts = Hosts::open(config, opener, &mailbox)?;
    let pty = hosts.pty().map(str::to_owned);
    let (hosts, input, outputs) = hosts.split();

    let stop = StopFlag::new(AtomicBool::new(false));
    let pieces = Pieces {
        config,
        events,
        mailbox: &mailbox,
        stop: &stop,
        vm: &vm,
        ram: &ram,
        supported: &supported,
        space: &space,
    };
    let Devices {
        buses,
        units,
        virtio,
        platform,
    } = pieces.devices(models, hosts)?;
    let (vcpus, power_on) = pieces.vcpus(&hypervisor, &buses)?;
    let machine = Machine {
        vcpus,
        vm,
        ram,
        units,
        virtio,
        platform,
        payload,
        entry: Some(entry),
        acpi,
        power_on,
        clock: None,
    };
    let ears = Ears {
        inbox,
        signals: Some(signals),
        input,
        outputs,
    };
    Ok(Built {
        machine,
        ears,
        mailbox,
        debugger,
        pty,
    })
}

/// A device model whose back end is open.
struct OpenDevice<'a> {
    config: &'a DeviceConfig,
    flag: &'static str,
    model: Box<dyn VirtioDevice>,
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

/// Makes the models of all devices, which opens their back ends.
fn open_devices<'a>(
    config: &'a VmConfig,
    models: &[Model],
    opener: &Arc<Opener>,
) -> Result<Vec<OpenDevice<'a>>, MachineError> {
    let open = |device: &'a DeviceConfig| {
        let DeviceConfig {
            kind,
            id,
            config: value,
            ..
        } = device;
        let Some(Model { flag, build, .. }) = models.iter().find(|model| model.kind == kind) else {
            return Err(device_error(
                "device",
                id,
                format!("there is no kind of device '{kind}'"),
            ));
        };
        let context = BuildContext {
            id: id.clone(),
            opener: Arc::clone(opener) as Arc<dyn block::Opener>,
            cpus: config.cpus.boot,
        };
        let model =
            build(value.clone(), &context).map_err(|error| device_error(flag, id, error))?;
        Ok(OpenDevice {
            config: device,
            flag,
            model,
        })
    };
    config.devices.iter().map(open).collect()
}

/// All that sits between the VM and its vCPUs.
struct Devices {
    buses: Buses,
    units: Vec<Arc<dyn Unit>>,
    virtio: Vec<Arc<VirtioPci>>,
    platform: Platform,
}

/// What the steps of [`build`] share.
struct Pieces<'a> {
    config: &'a VmConfig,
    events: &'a EventBus,
    mailbox: &'a Mailbox,
    stop: &'a StopFlag,
    vm: &'a Vm,
    ram: &'a GuestRam,
    supported: &'a CpuId,
    space: &'a AddressSpace,
}

impl Pieces<'_> {
    fn devices(&self, models: Vec<OpenDevice<'_>>, hosts: Hosts) -> Result<Devices, MachineError> {
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
        };
        let (platform, mut units) = Platform::build(&wiring, hosts)?;
        units.push(Arc::clone(&pci) as Arc<dyn Unit>);
        let mut virtio = Vec::new();
        for device in models {
            virtio.push(self.plug(device, &router, &pci)?);
        }
        units.extend(virtio.iter().map(|device| Arc::clone(device) as _));
        Ok(Devices {
            buses,
            units,
            virtio,
            platform,
        })
    }

    /// Puts a device on the PCI bus.
    fn plug(
        &self,
        device: OpenDevice<'_>,
        router: &IrqRouter,
        pci: &Arc<PciRoot>,
    ) -> Result<Arc<VirtioPci>, MachineError> {
        let OpenDevice {
            config,
            flag,
            model,
        } = device;
        let DeviceConfig { id, address, .. } = config;
        let doorbells = Arc::new(KvmDoorbells(Arc::clone(self.vm.fd())));
        let reporter = Arc::new(Reporter {
            events: self.events.clone(),
            mailbox: self.mailbox.clone(),
        });
        let memory = self.ram.memory().clone();
        let function = VirtioPci::new(id.as_str(), model, memory, router, doorbells, reporter)
            .map_err(|error| device_error(flag, id, error))?;
        pci.add(Arc::clone(&function) as _, *address)
            .map_err(|error| device_error(flag, id, error))?;
        Ok(function)
    }

    fn vcpus(
        &self,
        hypervisor: &Hypervisor,
        buses: &Buses,
    ) -> Result<(Vcpus, PowerOn), MachineError> {
        let host = |what| move |source| MachineError::Host { what, source };
        crate::kvm::vcpu::install_kick_handler()
            .map_err(host("the vCPUs' signal cannot be handled"))?;
        let cpus = u32::from(self.config.cpus.boot);
        let shape = Shape {
            cpus,
            tsc_deadline: hypervisor.tsc_deadline(),
        };
        let set = cpuid::for_machine(self.supported, shape);
        let msrs = hypervisor.msr_indices()?;
        let mut vcpus = Vec::new();
        let mut states = Vec::new();
        for index in 0..cpus {
            let cpuid = cpuid::for_vcpu(&set, index).map_err(|_| MachineError::Host {
                what: "KVM takes no CPUID set of this size",
                source: std::io::ErrorKind::InvalidInput.into(),
            })?;
            let vcpu = Vcpu::new(self.vm, index, &cpuid, buses.clone())?;
            states.push(vcpu.state(&msrs)?);
            vcpus.push(vcpu);
        }
        let power_on = PowerOn {
            cpus: states,
            irqchip: self.vm.irqchip_state()?,
        };
        let mailbox = self.mailbox.clone();
        let on_stop: OnStop = Arc::new(move |index, stop| {
            mailbox.send(Message::Vcpu(index, stop));
        });
        let vcpus = Vcpus::start(vcpus, Arc::clone(self.stop), &on_stop)
            .map_err(host("no thread for a vCPU"))?;
        Ok((vcpus, power_on))
    }
}

/// Publishes what devices report, and has the machine paused where that is asked for.
struct Reporter {
    events: EventBus,
    mailbox: Mailbox,
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

impl DeviceEvents for Reporter {
    fn device_event(&self, name: &str, event: DeviceEvent<'_>) {
        match event {
            DeviceEvent::NeedsReset { reason } => {
                let (id, reason) = (name.to_owned(), reason.to_owned());
                self.events
                    .publish(api::EventKind::DeviceNeedsReset { id, reason });
            }
            DeviceEvent::Disk(report) => self.disk(name, report),
            DeviceEvent::Activated | DeviceEvent::Reset => {
                tracing::debug!(device = name, ?event);
            }
        }
    }
}

fn open_hypervisor(config: &VmConfig, opener: &Opener) -> Result<Hypervisor, MachineError> {
    let kvm = opener.open_kvm().map_err(|source| MachineError::Open {
        flag: "KVM",
        source,
    })?;
    let hypervisor = Hypervisor::new(kvm)?;
    check_cpus(config, &hypervisor)?;
    Ok(hypervisor)
}

fn check_cpus(config: &VmConfig, hypervisor: &Hypervisor) -> Result<(), MachineError> {
    let (wanted, most) = (config.cpus.boot, hypervisor.max_vcpus());
    if usize::from(wanted) > most {
        return Err(MachineError::TooManyCpus { wanted, most });
    }
    Ok(())
}

fn open_debugger(
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

/// What of the guest's physical addresses is used above 4 GiB.
struct AddressSpace {
    /// For PCI, empty when the address width leaves no room.
    window64: Range<u64>,
}

impl AddressSpace {
    /// The window follows RAM, as far as addresses of `bits` bits go.
    fn new(ram: &GuestRam, bits: u32) -> Result<Self, MachineError> {
        let (size, limit) = (ram.size(), 1 << bits);
        if ram.end() > limit {
            return Err(MachineError::AddressWidth { size, bits });
        }
        let start = ram.end().next_multiple_of(memory::PCI_MMIO64_ALIGN);
        let end = start.saturating_add(memory::PCI_MMIO64_LEN).min(limit);
        Ok(Self {
            window64: start.min(end)..end,
        })
    }
}

fn acpi_config(config: &VmConfig, space: &AddressSpace) -> AcpiConfig {
    let window = |range: Range<u64>| Window {
        start: range.start,
        len: range.end - range.start,
    };
    AcpiConfig {
        cpus: u32::from(config.cpus.boot),
        pci_mmio32: window(window32()),
        pci_mmio64: Some(space.window64.clone())
            .filter(|range| !range.is_empty())
            .map(window),
        serial: config.serial != SerialConfig::Off,
        pvpanic: config.pvpanic,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn space(size: u64, bits: u32) -> Result<Range<u64>, MachineError> {
        let ram = GuestRam::new(&RamSpec {
            size,
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        })
        .unwrap();
        AddressSpace::new(&ram, bits).map(|space| space.window64)
    }

    #[test]
    fn the_window_follows_ram() {
        assert_eq!(space(GIB, 39).unwrap(), 4 * GIB..68 * GIB);
        assert_eq!(space(4 * GIB, 39).unwrap(), 5 * GIB..69 * GIB);
    }

    #[test]
    fn the_window_ends_where_addresses_do() {
        assert_eq!(space(GIB, 36).unwrap(), 4 * GIB..64 * GIB);
        assert!(space(63 * GIB, 36).unwrap().is_empty());
    }

    #[test]
    fn ram_past_the_address_width_is_refused() {
        let error = space(64 * GIB, 36).unwrap_err().to_string();
        assert!(
            error.contains("--memory") && error.contains("36 bits"),
            "{error}"
        );
    }
}
