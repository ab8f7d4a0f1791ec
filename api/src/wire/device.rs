//! The devices of a machine: their descriptions in `vm.create` and `vm.add-…`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::{ConsoleMode, SinkConfig, yes};

pub(super) fn is_false(value: &bool) -> bool {
    !value
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
    /// The unix socket of a user-mode network, instead. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
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
    /// Limits of what goes to the guest, instead. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter_config: Option<RateLimiterConfig>,
    /// Limits of what comes from the guest, instead. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter_config: Option<RateLimiterConfig>,
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
    /// What gets a copy of each frame. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<NetMirror>,
    /// Whether the host's kernel moves the frames (vhost-net); off where it is absent. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<NetVhost>,
}
}

/// Whether the host's kernel moves a network card's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetVhost {
    /// The monitor does.
    Off,
    /// The kernel does, or it is an error.
    On,
    /// The kernel does where it can.
    Auto,
}

/// What gets a copy of each frame of a network card, of both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum NetMirror {
    /// Nothing.
    Off,
    /// A tap of the host: frames come in there. It is made if there is none.
    Tap(String),
    /// A capture file.
    File(NetMirrorFile),
}

/// A capture file in the format of libpcap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetMirrorFile {
    /// Where it is. What a file there holds is overwritten.
    pub path: PathBuf,
    /// The most bytes that it may have; later frames are left out. 1 GiB where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
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
    /// Limits on what the guest gets. Beyond v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
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
            rate_limiter_config: None,
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
    /// How often the guest says how its memory is used, in seconds; absent or 0: when asked. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics_interval: Option<u32>,
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
    /// All sinks, where the fields above do not tell all there is to say. Given, they
    /// take the place of what those say. An addition to v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sinks: Option<Vec<SinkConfig>>,
}
}

impl ConsoleConfig {
    pub(super) const fn of_v1() -> Self {
        Self {
            mode: ConsoleMode::Tty,
            file: None,
            socket: None,
            sinks: None,
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

/// A port that the guest finds by its name, and the one place where it leads. The port
/// `org.qemu.guest_agent.0` that leads nowhere else is the monitor's own. An addition to v1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// Its name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// A unix socket that is made, for one client at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// A file that gets what the guest writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A new pseudo-terminal.
    #[serde(default, skip_serializing_if = "is_false")]
    pub pty: bool,
    /// Nowhere.
    #[serde(default, skip_serializing_if = "is_false")]
    pub null: bool,
}

/// A screen: a framebuffer that the guest draws on. An addition to v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DisplayConfig {
    /// Pixels of a line at power-on, 320 to 3840.
    pub width: u16,
    /// Lines at power-on, 200 to 2160.
    pub height: u16,
    /// Bytes of video memory: a power of two, 1 MiB to 256 MiB, with room for the picture of 4 bytes a pixel.
    pub memory: u64,
    /// Whether a virtio keyboard and a virtio tablet come with it, where no input devices are described.
    pub input: bool,
    /// The VNC server, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vnc: Option<VncConfig>,
    /// The console in the browser, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub web: Option<WebConfig>,
}

/// A console in the browser: the screen and the serial port. An addition to v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WebConfig {
    /// Where browsers connect: `HOST:PORT` or `:PORT`, on this host alone, or `unix:PATH`.
    pub address: String,
}

/// A VNC server of the screen. An addition to v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VncConfig {
    /// Where viewers connect: `HOST:PORT`, `:PORT` for this host alone, or `unix:PATH`.
    pub address: String,
    /// A file whose first line, 1 to 8 bytes, viewers must know. Needed where other hosts can connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// What a viewer gets that wants the screen for itself.
    #[serde(default)]
    pub share: VncShare,
    /// Whether texts that viewers' users cut are typed into the guest. Viewers send what is cut elsewhere, too.
    #[serde(default)]
    pub paste: bool,
    /// With it, viewers are let in by TLS alone (VeNCrypt, X509).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<VncTls>,
}

/// What proves to viewers which server it is, and to the server who they are. An addition to v1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VncTls {
    /// A PEM file with the server's certificate, and those between it and its authority behind it.
    pub certificate: PathBuf,
    /// A PEM file with its private key, without a passphrase.
    pub key: PathBuf,
    /// A PEM file with the certificates of authorities: viewers must have a certificate of one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_authority: Option<PathBuf>,
}

/// What a viewer gets that wants the screen for itself. An addition to v1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VncShare {
    /// It for itself: others are sent away, and who would share is not let in.
    #[default]
    AllowExclusive,
    /// Nothing: only those who share are let in.
    ForceShared,
    /// To share it like all others.
    Ignore,
}

impl VncConfig {
    /// A server at this address, with all else left open.
    #[must_use]
    pub fn at(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            password_file: None,
            share: VncShare::default(),
            paste: false,
            tls: None,
        }
    }
}

impl Default for DisplayConfig {
    fn default() -> Self {
        Self {
            width: 1024,
            height: 768,
            memory: 64 << 20,
            input: true,
            vnc: None,
            web: None,
        }
    }
}
