//! The description of a machine (v1 `VmConfig`).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

fn is_false(value: &bool) -> bool {
    !value
}

const fn yes() -> bool {
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
    /// The virtio console.
    #[serde(default = "ConsoleConfig::of_v1")]
    pub console: ConsoleConfig,
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

/// The limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// So many tokens in so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenBucket {
    /// How many there are in a full bucket.
    pub size: u64,
    /// How many more there are once, at the start.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// How long it takes to fill the bucket, in milliseconds.
    pub refill_time: u64,
}

/// Limits that several disks share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RateLimitGroupConfig {
    /// Its name.
    pub id: String,
    /// The limits.
    pub rate_limiter_config: RateLimiterConfig,
}

/// Defines a PCI device: a struct with the fields that all of them have in
/// front of its own, or behind them with `pci last`. They are no struct of
/// their own, because one that is flattened hides unknown fields.
macro_rules! pci_device {
    ($(#[$attribute:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$attribute])*
        pub struct $name {
            /// Its name, unique in the machine.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub id: Option<String>,
            /// Whether it is behind an IOMMU.
            #[serde(default, skip_serializing_if = "is_false")]
            pub iommu: bool,
            /// The PCI segment.
            #[serde(default)]
            pub pci_segment: u16,
            /// The PCI device number.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pci_device_id: Option<u8>,
            $($own)*
        }
        pci_device!(@fields $name);
    };
    (pci last; $(#[$attribute:meta])* pub struct $name:ident { $($own:tt)* }) => {
        $(#[$attribute])*
        pub struct $name {
            $($own)*
            /// Its name, unique in the machine.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub id: Option<String>,
            /// Whether it is behind an IOMMU.
            #[serde(default, skip_serializing_if = "is_false")]
            pub iommu: bool,
            /// The PCI segment.
            #[serde(default)]
            pub pci_segment: u16,
            /// The PCI device number.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pci_device_id: Option<u8>,
        }
        pci_device!(@fields $name);
    };
    (@fields $name:ident) => {
        impl $name {
            /// What every PCI device has.
            #[must_use]
            pub fn pci(&self) -> PciFields<'_> {
                PciFields {
                    id: self.id.as_deref(),
                    iommu: self.iommu,
                    segment: self.pci_segment,
                    device: self.pci_device_id,
                }
            }
        }
    };
}

/// What every PCI device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciFields<'a> {
    /// Its name.
    pub id: Option<&'a str>,
    /// Whether it is behind an IOMMU.
    pub iommu: bool,
    /// The PCI segment.
    pub segment: u16,
    /// The PCI device number.
    pub device: Option<u8>,
}

pci_device! {
/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskConfig {
    /// The image: a file, a block device or an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's cache is passed by.
    #[serde(default)]
    pub direct: bool,
    /// How many queues there are.
    #[serde(default = "DiskConfig::queues")]
    pub num_queues: usize,
    /// How many requests a queue holds.
    #[serde(default = "DiskConfig::depth")]
    pub queue_size: u16,
    /// Whether the disk is in another process.
    #[serde(default)]
    pub vhost_user: bool,
    /// That process's socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Limits shared with other disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Limits of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Accepted for other monitors' clients; the engine is chosen by `engine`.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Accepted for other monitors' clients.
    #[serde(default)]
    pub disable_aio: bool,
    /// The serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Where queues are worked on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Whether the image may name a backing file.
    #[serde(default)]
    pub backing_files: bool,
    /// Whether discarded space goes back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// The image's format.
    #[serde(default)]
    pub image_type: ImageType,
    /// How the image is locked.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
}
}

impl DiskConfig {
    const fn queues() -> usize {
        1
    }
    const fn depth() -> u16 {
        128
    }
}

/// Where a queue is worked on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VirtQueueAffinity {
    /// The queue.
    pub queue_index: u16,
    /// The host's processors.
    pub host_cpus: Vec<usize>,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageType {
    /// VMware's, flat.
    FlatVmdk,
    /// Virtual PC's, of fixed size.
    FixedVhd,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// Bytes.
    Raw,
    /// Hyper-V's.
    Vhdx,
    /// Not said.
    #[default]
    Unknown,
}

/// How an image is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LockGranularity {
    /// The bytes that QEMU locks.
    #[default]
    ByteRange,
    /// The whole file.
    Full,
}

pci_device! {
/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetConfig {
    /// The host's interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The host's address on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// That address's mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// The card's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The interface's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<String>,
    /// The largest packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How many queues there are, for both directions together.
    #[serde(default = "NetConfig::queues")]
    pub num_queues: usize,
    /// How many packets a queue holds.
    #[serde(default = "NetConfig::depth")]
    pub queue_size: u16,
    /// Whether the back end is in another process.
    #[serde(default)]
    pub vhost_user: bool,
    /// That process's socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Who connects there.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// Limits of each direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Whether the host cuts large TCP packets.
    #[serde(default = "yes")]
    pub offload_tso: bool,
    /// Whether the host cuts large UDP packets.
    #[serde(default = "yes")]
    pub offload_ufo: bool,
    /// Whether the host makes checksums.
    #[serde(default = "yes")]
    pub offload_csum: bool,
    /// Ignored: descriptors come beside the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
}
}

impl NetConfig {
    const fn queues() -> usize {
        2
    }
    const fn depth() -> u16 {
        256
    }
}

/// Who connects to a vhost-user socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VhostMode {
    /// The monitor.
    #[default]
    Client,
    /// The back end.
    Server,
}

pci_device! {
/// The entropy source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RngConfig {
    /// The file that is read.
    pub src: PathBuf,
}
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            src: PathBuf::from("/dev/urandom"),
        }
    }
}

pci_device! {
/// The balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonConfig {
    /// How much the guest gives up, in bytes.
    pub size: u64,
    /// Whether it gets that back before it is out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells of free pages.
    #[serde(default)]
    pub free_page_reporting: bool,
}
}

pci_device! {
/// A shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FsConfig {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// The server's socket.
    pub socket: PathBuf,
    /// How many queues there are.
    #[serde(default = "FsConfig::queues")]
    pub num_queues: usize,
    /// How many requests a queue holds.
    #[serde(default = "FsConfig::depth")]
    pub queue_size: u16,
}
}

impl FsConfig {
    const fn queues() -> usize {
        1
    }
    const fn depth() -> u16 {
        1024
    }
}

pci_device! {
/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u32,
    /// The host's end.
    pub socket: PathBuf,
}
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
}

impl SerialConfig {
    const fn of_v1() -> Self {
        Self {
            mode: ConsoleMode::Null,
            file: None,
            socket: None,
        }
    }
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self::of_v1()
    }
}

pci_device! {
pci last;
/// The virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleConfig {
    /// Where it leads.
    pub mode: ConsoleMode,
    /// The file, or the pseudo-terminal once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}
}

impl ConsoleConfig {
    const fn of_v1() -> Self {
        Self {
            mode: ConsoleMode::Tty,
            file: None,
            socket: None,
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

impl Default for ConsoleConfig {
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
    /// How many PCI segments there are.
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

impl PlatformConfig {
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
