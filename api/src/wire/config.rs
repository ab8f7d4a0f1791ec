//! The description of a machine (v1 `VmConfig`).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::{
    BalloonConfig, ConsoleConfig, DiskConfig, DisplayConfig, FsConfig, NetConfig, PortConfig,
    RateLimitGroupConfig, RngConfig, VsockConfig,
};
use super::input::InputConfig;

pub(super) const fn yes() -> bool {
    true
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmConfig {
    /// The processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// The memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What is booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Limits that several disks share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
    /// The disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// The network cards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// The entropy source.
    #[serde(default)]
    pub rng: RngConfig,
    /// The balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Shared directories.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Devices of any kind in other processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<serde_json::Value>>,
    /// Persistent memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<serde_json::Value>>,
    /// The first serial port.
    #[serde(default = "SerialConfig::of_v1")]
    pub serial: SerialConfig,
    /// The second serial port; not in v1. Without it there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial2: Option<SerialConfig>,
    /// The third serial port; not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial3: Option<SerialConfig>,
    /// The fourth serial port; not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial4: Option<SerialConfig>,
    /// The virtio console.
    #[serde(default = "ConsoleConfig::of_v1")]
    pub console: ConsoleConfig,
    /// Ports that the guest finds by their names; not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<PortConfig>>,
    /// Keyboards, tablets and mice; not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Vec<InputConfig>>,
    /// The debug console, port 0xE9.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// Devices of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<serde_json::Value>>,
    /// Devices by vfio-user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<serde_json::Value>>,
    /// Devices by vDPA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Vec<serde_json::Value>>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Whether the guest's kernel can report a panic.
    #[serde(default)]
    pub pvpanic: bool,
    /// Whether there is an IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// NUMA nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<serde_json::Value>>,
    /// Whether there is a watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// The screen; not in v1. By default there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display: Option<DisplayConfig>,
    /// The virtio clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtc: Option<serde_json::Value>,
    /// More PCI segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<serde_json::Value>>,
    /// Identity and platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// The TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<serde_json::Value>,
    /// Whether the monitor restricts its own access to files.
    #[serde(default)]
    pub landlock_enable: bool,
    /// What it may access then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
    /// What is done when the guest powers itself off; not in v1. By default the monitor ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_poweroff: Option<GuestAction>,
    /// What is done when the guest asks for a reset; not in v1. By default it is restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_reboot: Option<GuestAction>,
    /// What is done when the guest's kernel panics and says so; not in v1. By default the monitor ends. Anything else
    /// brings `pvpanic`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_panic: Option<GuestAction>,
    /// What is done when the guest does not feed its watchdog in time; not in v1. By default it is restarted. Anything
    /// else brings `watchdog`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_watchdog: Option<GuestAction>,
}

/// What is done about something that the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestAction {
    /// The machine ends, and the monitor with it.
    Exit,
    /// The machine ends. The monitor stays for another boot.
    Stop,
    /// The guest starts again.
    Restart,
    /// The machine is paused as it is.
    Pause,
}

/// The processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CpusConfig {
    /// How many there are at boot.
    pub boot_vcpus: u32,
    /// How many there can be.
    pub max_vcpus: u32,
    /// How they are grouped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Whether KVM shows Hyper-V's interface.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// The most bits of a guest-physical address.
    #[serde(default = "CpusConfig::phys_bits")]
    pub max_phys_bits: u8,
    /// Where vCPUs may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Features to be shown.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Whether the guest may run guests.
    #[serde(default = "yes")]
    pub nested: bool,
    /// Who may share a core with a vCPU.
    #[serde(default)]
    pub core_scheduling: CoreScheduling,
    /// Which processor is shown.
    #[serde(default)]
    pub profile: CpuProfile,
    /// The features that are shown of the host's: `host`, `x86-64-v2`, `x86-64-v3`, or the path of a
    /// baseline's file. Not part of v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
}

impl CpusConfig {
    const fn phys_bits() -> u8 {
        46
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: Self::phys_bits(),
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: CoreScheduling::Vm,
            profile: CpuProfile::Host,
            baseline: None,
        }
    }
}

/// How vCPUs are grouped; the product is the most there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuTopology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

/// Where a vCPU may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuAffinity {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The host's processors.
    pub host_cpus: Vec<usize>,
}

/// Features of processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuFeatures {
    /// Matrix registers.
    #[serde(default)]
    pub amx: bool,
}

/// Who may share a core with a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CoreScheduling {
    /// The machine's own vCPUs.
    #[default]
    Vm,
    /// No other vCPU.
    Vcpu,
    /// Anybody.
    Off,
}

/// Which processor is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuProfile {
    /// The host's.
    #[default]
    Host,
}

/// The memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryConfig {
    /// How much, in bytes.
    pub size: u64,
    /// Whether the host merges equal pages.
    #[serde(default)]
    pub mergeable: bool,
    /// How memory is added.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// How much can be added, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// How much has been added, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Whether other processes can map it.
    #[serde(default)]
    pub shared: bool,
    /// Whether it comes from the host's pool of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// The size of those, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether all of it is allocated before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Whether the host sets swap aside for it.
    #[serde(default)]
    pub reserve: bool,
    /// Zones with backing of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<serde_json::Value>>,
    /// Whether the host may use transparent huge pages.
    #[serde(default = "yes")]
    pub thp: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            hotplug_method: HotplugMethod::Acpi,
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            zones: None,
            thp: true,
        }
    }
}

/// How memory is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HotplugMethod {
    /// By ACPI memory devices.
    #[default]
    Acpi,
    /// By virtio-mem.
    VirtioMem,
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PayloadConfig {
    /// A firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// A kernel: a bzImage or an ELF image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
}

/// Where a console leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConsoleMode {
    /// There is none.
    Off,
    /// A new pseudo-terminal.
    Pty,
    /// The monitor's own terminal.
    Tty,
    /// A file.
    File,
    /// A unix socket.
    Socket,
    /// Nowhere.
    Null,
}

/// The first serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SerialConfig {
    /// Where it leads.
    pub mode: ConsoleMode,
    /// The file, or the pseudo-terminal once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// All sinks, where the fields above do not tell all there is to say. Given, they
    /// take the place of what those say. An addition to v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<Vec<SinkConfig>>,
}

/// One sink of the serial port. An addition to v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SinkConfig {
    /// What it is; there is no `Off`.
    pub mode: ConsoleMode,
    /// The file, with mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Whether what is in the file stays; without, it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<bool>,
    /// How large the file grows, in bytes, before it becomes `PATH.1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<u64>,
    /// The socket, with mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Whether clients of the socket first get what was written before; without, they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<bool>,
}

impl SinkConfig {
    /// A sink of a mode that says everything.
    #[must_use]
    pub const fn of_mode(mode: ConsoleMode) -> Self {
        Self {
            mode,
            file: None,
            append: None,
            max_size: None,
            socket: None,
            replay: None,
        }
    }
}

impl SerialConfig {
    const fn of_v1() -> Self {
        Self {
            mode: ConsoleMode::Null,
            file: None,
            socket: None,
            sinks: None,
        }
    }
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self::of_v1()
    }
}

/// The debug console, port 0xE9.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DebugConsoleConfig {
    /// Where it leads.
    pub mode: ConsoleMode,
    /// The file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Off,
            file: None,
            iobase: Some(233),
        }
    }
}

/// Identity and platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlatformConfig {
    /// How many PCI segments there are. There is one: 2 to 16 are taken and mean nothing, for clients that
    /// always send them.
    #[serde(default = "PlatformConfig::segments")]
    pub num_pci_segments: u16,
    /// Those behind an IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// The IOMMU's address width.
    #[serde(default = "PlatformConfig::iommu_bits")]
    pub iommu_address_width_bits: u8,
    /// SMBIOS: the system's serial number.
    #[serde(
        default,
        alias = "serial_number",
        skip_serializing_if = "Option::is_none"
    )]
    pub system_serial_number: Option<String>,
    /// SMBIOS: the system's UUID.
    #[serde(default, alias = "uuid", skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// SMBIOS: strings of the maker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// SMBIOS: the maker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// SMBIOS: the product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// SMBIOS: its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// SMBIOS: its family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// SMBIOS: its stock-keeping unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// SMBIOS: the chassis's tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Whether devices are assigned by iommufd.
    #[serde(default)]
    pub iommufd: bool,
    /// Whether assigned devices reach each other.
    #[serde(default = "yes")]
    pub vfio_p2p_dma: bool,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: Self::segments(),
            iommu_segments: None,
            iommu_address_width_bits: Self::iommu_bits(),
            system_serial_number: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
            iommufd: false,
            vfio_p2p_dma: true,
        }
    }
}

impl VmConfig {
    /// The field that is taken and means nothing here, if it is given.
    #[must_use]
    pub fn ignored(&self) -> Option<&'static str> {
        let segments = self.platform.as_ref()?.num_pci_segments;
        let taken = 2..=PlatformConfig::MAX_SEGMENTS;
        taken
            .contains(&segments)
            .then_some("platform.num_pci_segments")
    }
}

impl PlatformConfig {
    /// The most PCI segments that a description may name.
    pub const MAX_SEGMENTS: u16 = 16;

    const fn segments() -> u16 {
        1
    }
    const fn iommu_bits() -> u8 {
        64
    }
}

/// A path that the monitor may access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LandlockConfig {
    /// The path.
    pub path: PathBuf,
    /// `r`, `w` or both.
    pub access: String,
}
