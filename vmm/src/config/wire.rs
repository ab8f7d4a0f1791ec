//! The machine as the control socket describes it: [`api::wire::VmConfig`] and
//! [`VmConfig`], one from the other.
//!
//! [`VmConfig::from_wire`] gives a complete and valid configuration, or says
//! what is wrong:
//!
//! * what makes no sense is [`ErrorKind::Invalid`];
//! * an id or a disk that is there twice is [`ErrorKind::Conflict`];
//! * what v1 knows and this monitor has not is [`ErrorKind::Unimplemented`], by its name.
//!
//! A machine without a kernel can be described and cannot be booted:
//! [`VmConfig::check_bootable`]. The socket's clients name devices or have them
//! named: [`name_devices`] tells how.
//!
//! [`VmConfig::to_wire`] is what clients are shown of a machine that was not
//! described by one of them. The description says less than the
//! configuration, so that nothing is made from it again.

mod balloon;
mod devices;
mod fs;
mod inputs;
mod migration;
mod missing;
pub(super) mod names;
mod networks;
mod restored;
mod rng;
#[cfg(test)]
mod tests;
mod vhost;
mod vsock;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use api::wire::{self, ConsoleMode};
use api::{ControlError, ErrorKind};
use virtio::limit::{Bucket, RateLimits};
use virtio::models::MODELS;

use super::fs::FsError;
use super::serial::{FileSink, SinkConfig, SocketSink};
use super::vsock::VsockError;
use super::{
    BootProtocol, ConfigError, CpuBaseline, CpuTopology, CpusConfig, CpusError,
    DEFAULT_SERIAL_REPLAY, DEFAULT_SHUTDOWN_TIMEOUT, DebugconConfig, GuestAction, HostLimits,
    HotplugMethod, MachineConfig, MemoryConfig, PayloadConfig, RateLimitGroupConfig, SerialConfig,
    SmbiosConfig, Thp, VmConfig,
};
use crate::layout::port;

pub use devices::{DiskUpdate, update_disk};
pub use fs::shown_fs;
pub use inputs::shown_input;
pub use migration::{check_receiving, check_sending};
pub use names::name_devices;
pub use networks::{NetUpdate, address_nets, update_net};
pub use rng::update_rng;

/// The chain of a refusal begins with this, as v1 clients expect.
const INVALID: &str = "Failed to validate config";

/// What makes no sense.
fn invalid(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Invalid, message).context(INVALID)
}

/// What something else has already.
fn conflict(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Conflict, message).context(INVALID)
}

impl From<&ConfigError> for ControlError {
    fn from(error: &ConfigError) -> Self {
        match error {
            ConfigError::DuplicateId { id, .. } => not_unique(id),
            ConfigError::TwoTerminals { first, second } => {
                let [first, second] = [first, second].map(|flag| flag.trim_start_matches('-'));
                invalid(format!(
                    "{first} and {second} are both Tty: there is one terminal: give one of them another mode"
                ))
            }
            ConfigError::SameDisk { .. }
            | ConfigError::SameMac { .. }
            | ConfigError::DuplicateSlot { .. }
            | ConfigError::OwnSlot { .. }
            | ConfigError::OutputInUse { .. }
            | ConfigError::Fs(FsError::SameTag { .. })
            | ConfigError::Vsock(VsockError::Two { .. }) => conflict(error.to_string()),
            _ => Self::from_error(ErrorKind::Invalid, error).context(INVALID),
        }
    }
}

fn not_unique(id: &str) -> ControlError {
    conflict(format!("Identifier {id} is not unique"))
}

/// A path that a system call can take.
fn path(field: &str, path: &Path) -> Result<PathBuf, ControlError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(invalid(format!("{field}: the path is empty")));
    }
    if bytes.contains(&0) {
        return Err(invalid(format!("{field}: the path holds a zero byte")));
    }
    Ok(path.to_owned())
}

impl VmConfig {
    /// Makes the configuration of a machine that the socket describes. It is complete and valid, but may lack
    /// a kernel. No file is looked at.
    ///
    /// # Errors
    ///
    /// Of the kinds [`ErrorKind::Invalid`], [`ErrorKind::Conflict`] and [`ErrorKind::Unimplemented`].
    pub fn from_wire(described: &wire::VmConfig) -> Result<Self, ControlError> {
        missing::refuse(described)?;
        let mut named = described.clone();
        name_devices(&mut named);
        names::check(&named)?;
        let cpus = cpus(&named.cpus)?;
        let devices = devices::from_wire(&named, cpus.boot)?;
        let groups = named.rate_limit_groups.as_deref().unwrap_or_default();
        let mut config = Self {
            name: None,
            machine: MachineConfig::default(),
            cpus,
            memory: memory(&named.memory)?,
            payload: payload(named.payload.as_ref())?,
            devices,
            rate_limit_groups: groups.iter().map(RateLimitGroupConfig::from).collect(),
            serial: serial("serial", &named.serial)?,
            serial2: more_serial("serial2", named.serial2.as_ref())?,
            serial3: more_serial("serial3", named.serial3.as_ref())?,
            serial4: more_serial("serial4", named.serial4.as_ref())?,
            console: console(&named.console)?,
            ports: named.ports.clone().unwrap_or_default(),
            serial_replay: DEFAULT_SERIAL_REPLAY,
            debugcon: debugcon(&named.debug_console)?,
            gdb: None,
            smbios: smbios(named.platform.as_ref()),
            // What is to be done about it asks for who tells it.
            pvpanic: named.pvpanic || named.on_panic.is_some_and(|on| on != GuestAction::Exit),
            watchdog: named.watchdog
                || named
                    .on_watchdog
                    .is_some_and(|on| on != GuestAction::Restart),
            display: named.display.clone(),
            shutdown_timeout: DEFAULT_SHUTDOWN_TIMEOUT,
            on_poweroff: named.on_poweroff.unwrap_or(GuestAction::Exit),
            on_reboot: named.on_reboot.unwrap_or(GuestAction::Restart),
            on_panic: named.on_panic.unwrap_or(GuestAction::Exit),
            on_watchdog: named.on_watchdog.unwrap_or(GuestAction::Restart),
        };
        config.complete(MODELS);
        let checked = config.validate(MODELS, &HostLimits::read());
        checked.map_err(|error| ControlError::from(&error))?;
        Ok(config)
    }

    /// That the machine has something to boot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] when it has no kernel.
    pub fn check_bootable(&self) -> Result<(), ControlError> {
        if self.payload.kernel.is_some() {
            return Ok(());
        }
        Err(invalid("No bootitem provided: neither firmware nor kernel")
            .nested_in("Payload configuration is not bootable"))
    }

    /// The same machine with what one boot has instead.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`].
    pub fn boot_once(&self, request: &wire::VmBootOnce) -> Result<Self, ControlError> {
        let wire::VmBootOnce {
            kernel,
            initramfs,
            cmdline,
        } = request;
        let mut config = self.clone();
        if let Some(kernel) = kernel {
            config.payload.kernel = Some(path("kernel", kernel)?);
        }
        if let Some(initramfs) = initramfs {
            config.payload.initramfs = Some(path("initramfs", initramfs)?);
        }
        if let Some(cmdline) = cmdline {
            config.payload.cmdline.clone_from(cmdline);
        }
        let checked = config.validate(MODELS, &HostLimits::read());
        checked.map_err(|error| ControlError::from(&error))?;
        config.check_bootable()?;
        Ok(config)
    }

    /// What the socket's clients are shown of this machine, as far as a
    /// description can say it.
    #[must_use]
    pub fn to_wire(&self) -> wire::VmConfig {
        let topology = |topology: CpuTopology| wire::CpuTopology {
            threads_per_core: topology.threads_per_core,
            cores_per_die: topology.cores_per_die,
            dies_per_package: topology.dies_per_package,
            packages: topology.packages,
        };
        let hotplug_size = self.memory.hotplug_size;
        let (disks, rng) = devices::to_wire(&self.devices, self.cpus.boot);
        let nets: Vec<_> = self.devices.iter().filter_map(networks::to_wire).collect();
        let groups: Vec<_> = self.rate_limit_groups.iter().map(Into::into).collect();
        wire::VmConfig {
            cpus: wire::CpusConfig {
                boot_vcpus: self.cpus.boot.into(),
                max_vcpus: self.cpus.most().into(),
                topology: self.cpus.topology.map(topology),
                nested: false,
                baseline: (!self.cpus.baseline.is_host())
                    .then(|| self.cpus.baseline.clone().into()),
                ..wire::CpusConfig::default()
            },
            memory: wire::MemoryConfig {
                size: self.memory.size,
                hotplug_method: match self.memory.hotplug_method {
                    HotplugMethod::Acpi => wire::HotplugMethod::Acpi,
                    HotplugMethod::VirtioMem => wire::HotplugMethod::VirtioMem,
                },
                hotplug_size: (hotplug_size > 0).then_some(hotplug_size),
                hotplugged_size: Some(self.memory.hotplugged_size).filter(|size| *size > 0),
                shared: self.memory.shared,
                hugepages: self.memory.hugepages,
                hugepage_size: self.memory.hugepage_size,
                prefault: self.memory.prefault,
                thp: self.memory.thp != Thp::Off,
                ..wire::MemoryConfig::default()
            },
            payload: Some(wire::PayloadConfig {
                firmware: None,
                kernel: self.payload.kernel.clone(),
                cmdline: Some(self.payload.cmdline.clone()),
                initramfs: self.payload.initramfs.clone(),
            }),
            rate_limit_groups: (!groups.is_empty()).then_some(groups),
            disks: (!disks.is_empty()).then_some(disks),
            net: (!nets.is_empty()).then_some(nets),
            rng: rng.unwrap_or_default(),
            balloon: self.shown_balloon(),
            input: self.shown_inputs(),
            fs: self.shown_directories(),
            vsock: self.shown_vsock(),
            serial: (&self.serial).into(),
            serial2: self.serial2.is_on().then(|| (&self.serial2).into()),
            serial3: self.serial3.is_on().then(|| (&self.serial3).into()),
            serial4: self.serial4.is_on().then(|| (&self.serial4).into()),
            console: self.console_to_wire(),
            ports: (!self.ports.is_empty()).then(|| self.ports.clone()),
            debug_console: (&self.debugcon).into(),
            pvpanic: self.pvpanic,
            watchdog: self.watchdog,
            display: self.display.clone(),
            platform: platform(&self.smbios),
            on_poweroff: other_than(GuestAction::Exit, self.on_poweroff),
            on_reboot: other_than(GuestAction::Restart, self.on_reboot),
            on_panic: other_than(GuestAction::Exit, self.on_panic),
            on_watchdog: other_than(GuestAction::Restart, self.on_watchdog),
            ..wire::VmConfig::default()
        }
    }
}

impl VmConfig {
    /// Shows a console as it is now.
    pub fn show_console(&self, port: wire::ConsolePort, shown: &mut wire::VmConfig) {
        let more = |serial: &SerialConfig| serial.is_on().then(|| serial.into());
        match port {
            wire::ConsolePort::Serial => shown.serial = (&self.serial).into(),
            wire::ConsolePort::Serial2 => shown.serial2 = more(&self.serial2),
            wire::ConsolePort::Serial3 => shown.serial3 = more(&self.serial3),
            wire::ConsolePort::Serial4 => shown.serial4 = more(&self.serial4),
            wire::ConsolePort::Console => {
                let wire::ConsoleConfig {
                    mode,
                    file,
                    socket,
                    sinks,
                    ..
                } = self.console_to_wire();
                shown.console = wire::ConsoleConfig {
                    mode,
                    file,
                    socket,
                    sinks,
                    ..shown.console.clone()
                };
            }
        }
    }

    /// The console in v1's words: its first sink; and all, where that does not tell everything.
    fn console_to_wire(&self) -> wire::ConsoleConfig {
        let wire::SerialConfig {
            mode,
            file,
            socket,
            sinks,
        } = (&self.console).into();
        let kind = virtio::models::console::MODEL.kind;
        let device = self.devices.iter().find(|device| device.kind == kind);
        wire::ConsoleConfig {
            mode,
            file,
            socket,
            sinks,
            id: device
                .map(|device| device.id.clone())
                .filter(|id| id != super::port::DEVICE),
            ..wire::ConsoleConfig::default()
        }
    }
}

/// An action that has to be told.
fn other_than(default: GuestAction, action: GuestAction) -> Option<GuestAction> {
    (action != default).then_some(action)
}

/// The cause's place in a chain: behind its first element.
trait Nested {
    fn nested_in(self, reason: &str) -> Self;
}

impl Nested for ControlError {
    fn nested_in(mut self, reason: &str) -> Self {
        self.chain.insert(1, reason.to_owned());
        self
    }
}

fn cpus(described: &wire::CpusConfig) -> Result<CpusConfig, ControlError> {
    let wire::CpusConfig {
        boot_vcpus,
        max_vcpus,
        ..
    } = *described;
    if max_vcpus < boot_vcpus {
        return Err(invalid(format!(
            "cpus: max_vcpus {max_vcpus} is less than boot_vcpus {boot_vcpus}"
        )));
    }
    let number = |key, count: u32| {
        count.try_into().map_err(|_| {
            let count = count.into();
            ControlError::from(&ConfigError::from(CpusError::Count { key, count }))
        })
    };
    let topology = |described: wire::CpuTopology| CpuTopology {
        threads_per_core: described.threads_per_core,
        cores_per_die: described.cores_per_die,
        dies_per_package: described.dies_per_package,
        packages: described.packages,
    };
    Ok(CpusConfig {
        boot: number("boot", boot_vcpus)?,
        // v1 always says it; only more than at boot asks for something.
        max: if max_vcpus > boot_vcpus {
            Some(number("max", max_vcpus)?)
        } else {
            None
        },
        topology: described.topology.map(topology),
        baseline: match &described.baseline {
            None => CpuBaseline::Host,
            Some(text) => CpuBaseline::try_from(text.clone())
                .map_err(|error| invalid(format!("cpus.{error}")))?,
        },
    })
}

/// Memory that had been added by ACPI before the machine's first boot is there from the start, and there
/// is so much less to add.
fn memory(described: &wire::MemoryConfig) -> Result<MemoryConfig, ControlError> {
    let room = described.hotplug_size.unwrap_or(0);
    let added = described.hotplugged_size.unwrap_or(0);
    let Some(left) = room.checked_sub(added) else {
        return Err(invalid(format!(
            "memory.hotplugged_size: {added} bytes are more than memory.hotplug_size, {room}"
        )));
    };
    let by_blocks = described.hotplug_method == wire::HotplugMethod::VirtioMem;
    let mut memory = MemoryConfig {
        size: described.size,
        hotplug_size: if by_blocks { room } else { left },
        hotplug_method: if by_blocks {
            HotplugMethod::VirtioMem
        } else {
            HotplugMethod::Acpi
        },
        hotplugged_size: if by_blocks { added } else { 0 },
        shared: described.shared,
        hugepages: described.hugepages,
        hugepage_size: described.hugepage_size,
        thp: if described.thp { Thp::On } else { Thp::Off },
        prefault: described.prefault,
    };
    if by_blocks {
        return Ok(memory);
    }
    let block = memory.hotplug_block();
    if !added.is_multiple_of(block) {
        return Err(invalid(format!(
            "memory.hotplugged_size: memory is added in pieces of {block} bytes, and {added} is no multiple"
        )));
    }
    memory.size = memory.size.saturating_add(added);
    Ok(memory)
}

fn payload(described: Option<&wire::PayloadConfig>) -> Result<PayloadConfig, ControlError> {
    let wire::PayloadConfig {
        firmware: _,
        kernel,
        cmdline,
        initramfs,
    } = described.cloned().unwrap_or_default();
    let file = |field, given: Option<PathBuf>| given.map(|given| path(field, &given)).transpose();
    Ok(PayloadConfig {
        kernel: file("payload.kernel", kernel)?,
        initramfs: file("payload.initramfs", initramfs)?,
        // v1 has no default.
        cmdline: cmdline.unwrap_or_default(),
        boot_protocol: BootProtocol::Auto,
    })
}

fn file(field: &str, given: Option<&Path>) -> Result<PathBuf, ControlError> {
    let given =
        given.ok_or_else(|| invalid(format!("{field}: its mode is File, and no file is given")))?;
    path(&format!("{field}.file"), given)
}

fn more_serial(
    field: &'static str,
    described: Option<&wire::SerialConfig>,
) -> Result<SerialConfig, ControlError> {
    described.map_or(Ok(SerialConfig::Off), |described| serial(field, described))
}

/// The virtio console. Clients that do not say have the terminal: that is no request
/// for the device.
fn console(described: &wire::ConsoleConfig) -> Result<SerialConfig, ControlError> {
    if described.mode == ConsoleMode::Tty && described.sinks.is_none() {
        return Ok(SerialConfig::Off);
    }
    let described = wire::SerialConfig {
        mode: described.mode,
        file: described.file.clone(),
        socket: described.socket.clone(),
        sinks: described.sinks.clone(),
    };
    serial("console", &described)
}

fn serial(
    field: &'static str,
    described: &wire::SerialConfig,
) -> Result<SerialConfig, ControlError> {
    let wire::SerialConfig {
        mode,
        file,
        socket,
        sinks,
    } = described;
    if *mode == ConsoleMode::Off && sinks.is_none() {
        return Ok(SerialConfig::Off);
    }
    let sinks = match sinks {
        Some(sinks) => sinks
            .iter()
            .map(|described| sink(field, described))
            .collect::<Result<_, _>>()?,
        None => vec![sink(
            field,
            &wire::SinkConfig {
                file: file.clone().filter(|_| *mode == ConsoleMode::File),
                socket: socket.clone().filter(|_| *mode == ConsoleMode::Socket),
                ..wire::SinkConfig::of_mode(*mode)
            },
        )?],
    };
    Ok(SerialConfig::Sinks(sinks))
}

fn sink(field: &'static str, described: &wire::SinkConfig) -> Result<SinkConfig, ControlError> {
    let wire::SinkConfig {
        mode,
        file: output,
        append,
        max_size,
        socket,
        replay,
    } = described;
    let (of_file, of_socket) = (
        output.is_some() || append.is_some() || max_size.is_some(),
        socket.is_some() || replay.is_some(),
    );
    let misplaced = match mode {
        ConsoleMode::File => of_socket.then_some("socket and replay"),
        ConsoleMode::Socket => of_file.then_some("file, append and max_size"),
        _ => (of_file || of_socket).then_some("file and socket"),
    };
    if let Some(fields) = misplaced {
        return Err(invalid(format!(
            "{field}.sinks: {fields} do not go with the mode {mode:?}"
        )));
    }
    Ok(match mode {
        ConsoleMode::Off => return Err(invalid(format!("{field}.sinks: Off is no sink"))),
        ConsoleMode::Pty => SinkConfig::Pty,
        ConsoleMode::Tty => SinkConfig::Tty,
        ConsoleMode::Null => SinkConfig::Null,
        ConsoleMode::File => SinkConfig::File(FileSink {
            path: file(field, output.as_deref())?,
            append: append.unwrap_or(false),
            max_size: *max_size,
        }),
        ConsoleMode::Socket => {
            let Some(socket) = socket.as_deref() else {
                return Err(invalid(format!(
                    "{field}: its mode is Socket, and no socket is given"
                )));
            };
            SinkConfig::Socket(SocketSink {
                path: path(&format!("{field}.socket"), socket)?,
                replay: replay.unwrap_or(true),
            })
        }
    })
}

/// The first sink in v1's words; and all, where these do not tell everything.
impl From<&SerialConfig> for wire::SerialConfig {
    fn from(serial: &SerialConfig) -> Self {
        let sinks: Vec<_> = serial.sinks().iter().map(wire::SinkConfig::from).collect();
        let first = match (serial, sinks.first()) {
            (SerialConfig::Off, _) => wire::SinkConfig::of_mode(ConsoleMode::Off),
            (SerialConfig::Sinks(_), None) => wire::SinkConfig::of_mode(ConsoleMode::Null),
            (SerialConfig::Sinks(_), Some(first)) => first.clone(),
        };
        let wire::SinkConfig {
            mode,
            file,
            append,
            max_size,
            socket,
            replay,
        } = first;
        let more = sinks.len() > 1 || append.is_some() || max_size.is_some() || replay.is_some();
        Self {
            mode,
            file,
            socket,
            sinks: more.then_some(sinks),
        }
    }
}

impl From<&SinkConfig> for wire::SinkConfig {
    fn from(sink: &SinkConfig) -> Self {
        match sink {
            SinkConfig::Tty => Self::of_mode(ConsoleMode::Tty),
            SinkConfig::Pty => Self::of_mode(ConsoleMode::Pty),
            SinkConfig::Null => Self::of_mode(ConsoleMode::Null),
            SinkConfig::File(FileSink {
                path,
                append,
                max_size,
            }) => Self {
                file: Some(path.clone()),
                append: append.then_some(true),
                max_size: *max_size,
                ..Self::of_mode(ConsoleMode::File)
            },
            SinkConfig::Socket(SocketSink { path, replay }) => Self {
                socket: Some(path.clone()),
                replay: (!replay).then_some(false),
                ..Self::of_mode(ConsoleMode::Socket)
            },
        }
    }
}

fn debugcon(described: &wire::DebugConsoleConfig) -> Result<DebugconConfig, ControlError> {
    let elsewhere = described.iobase.is_some_and(|at| at != port::DEBUGCON);
    Ok(match described.mode {
        // A port whose bytes are dropped is as good as none.
        ConsoleMode::Off | ConsoleMode::Null => DebugconConfig::Off,
        _ if elsewhere => return Err(missing::named("debug_console.iobase other than 233")),
        ConsoleMode::Tty => DebugconConfig::Stdio,
        ConsoleMode::File => {
            DebugconConfig::File(file("debug_console", described.file.as_deref())?)
        }
        ConsoleMode::Pty => return Err(missing::named("debug_console.mode=Pty")),
        ConsoleMode::Socket => return Err(missing::named("debug_console.mode=Socket")),
    })
}

impl From<&DebugconConfig> for wire::DebugConsoleConfig {
    fn from(debugcon: &DebugconConfig) -> Self {
        let (mode, file) = match debugcon {
            DebugconConfig::Off => (ConsoleMode::Off, None),
            DebugconConfig::Stdio => (ConsoleMode::Tty, None),
            DebugconConfig::File(path) => (ConsoleMode::File, Some(path.clone())),
        };
        Self {
            mode,
            file,
            iobase: Some(port::DEBUGCON),
        }
    }
}

fn smbios(described: Option<&wire::PlatformConfig>) -> SmbiosConfig {
    let Some(platform) = described.cloned() else {
        return SmbiosConfig::default();
    };
    SmbiosConfig {
        manufacturer: platform.system_manufacturer,
        product: platform.system_product_name,
        version: platform.system_version,
        serial: platform.system_serial_number,
        uuid: platform.system_uuid,
        sku: platform.system_sku_number,
        family: platform.system_family,
        asset_tag: platform.chassis_asset_tag,
        oem_strings: platform.oem_strings.unwrap_or_default(),
    }
}

fn platform(smbios: &SmbiosConfig) -> Option<wire::PlatformConfig> {
    if *smbios == SmbiosConfig::default() {
        return None;
    }
    let SmbiosConfig {
        manufacturer,
        product,
        version,
        serial,
        uuid,
        sku,
        family,
        asset_tag,
        oem_strings,
    } = smbios.clone();
    Some(wire::PlatformConfig {
        system_manufacturer: manufacturer,
        system_product_name: product,
        system_version: version,
        system_serial_number: serial,
        system_uuid: uuid,
        system_sku_number: sku,
        system_family: family,
        chassis_asset_tag: asset_tag,
        oem_strings: (!oem_strings.is_empty()).then_some(oem_strings),
        ..wire::PlatformConfig::default()
    })
}

/// Limits as the device models know them, not checked. A bucket of no size limits nothing.
#[must_use]
pub fn rate_limits(described: &wire::RateLimiterConfig) -> RateLimits {
    let bucket = |described: wire::TokenBucket| {
        let wire::TokenBucket {
            size,
            one_time_burst,
            refill_time,
        } = described;
        let bucket = Bucket {
            size,
            one_time_burst: one_time_burst.unwrap_or(0),
            refill_time,
        };
        (size > 0).then_some(bucket)
    };
    RateLimits {
        bandwidth: described.bandwidth.and_then(bucket),
        ops: described.ops.and_then(bucket),
    }
}

/// Limits as clients are shown them; `None` where there are none.
#[must_use]
pub fn rate_limiter(limits: RateLimits) -> Option<wire::RateLimiterConfig> {
    let bucket = |bucket: Bucket| wire::TokenBucket {
        size: bucket.size,
        one_time_burst: (bucket.one_time_burst > 0).then_some(bucket.one_time_burst),
        refill_time: bucket.refill_time,
    };
    (limits != RateLimits::default()).then(|| wire::RateLimiterConfig {
        bandwidth: limits.bandwidth.map(bucket),
        ops: limits.ops.map(bucket),
    })
}

impl From<&wire::RateLimitGroupConfig> for RateLimitGroupConfig {
    fn from(described: &wire::RateLimitGroupConfig) -> Self {
        Self {
            id: described.id.clone(),
            limits: rate_limits(&described.rate_limiter_config),
        }
    }
}

impl From<&RateLimitGroupConfig> for wire::RateLimitGroupConfig {
    fn from(group: &RateLimitGroupConfig) -> Self {
        Self {
            id: group.id.clone(),
            rate_limiter_config: rate_limiter(group.limits).unwrap_or_default(),
        }
    }
}
