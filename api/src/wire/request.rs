//! What endpoints other than `vm.create` take.

use std::borrow::Cow;
use std::num::NonZero;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::{NetMirror, RateLimiterConfig};

/// `vm.resize`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmResize {
    /// How many vCPUs there are to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// How much memory there is to be, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// How much of it the guest is to give up, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// `vm.boot-once`: what is absent is as described.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmBootOnce {
    /// Another kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Another initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Another command line of the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// `vm.resize-disk`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmResizeDisk {
    /// The disk's id.
    pub id: String,
    /// The new size in bytes.
    pub desired_size: u64,
}

/// `vm.remove-device`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmRemoveDevice {
    /// The device's id.
    pub id: String,
}

/// `vm.remove-port`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmRemovePort {
    /// The port's name.
    pub name: String,
}

/// `vm.coredump`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmCoredumpData {
    /// `file://` and the path of a file that does not exist yet.
    pub destination_url: String,
}

/// `vm.snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmSnapshotConfig {
    /// `file://` and the path of a directory that holds no snapshot; it is made where there is none.
    pub destination_url: String,
    /// Whether a guest that runs is paused until all is written.
    #[serde(default, skip_serializing_if = "super::device::is_false")]
    pub pause: bool,
    /// Whether what the guest says it does not use is left out, where it runs meanwhile and has a balloon.
    #[serde(default, skip_serializing_if = "super::device::is_false")]
    pub skip_free_pages: bool,
    /// Whether what the guest writes from its instant on is logged, so that it can be a parent.
    #[serde(default, skip_serializing_if = "super::device::is_false")]
    pub track: bool,
    /// The directory of the snapshot that was tracked last, as `file://` and its path, or as its absolute path: only what has changed since is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// How the file of memory is compressed, which can then not be mapped; not at all when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<SnapshotCompression>,
    /// Whether it becomes a template: machines are cloned of it, and nothing of it is written to any more, its disks' images included.
    #[serde(default, skip_serializing_if = "super::device::is_false")]
    pub template: bool,
}

/// How a snapshot's memory is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotCompression {
    /// By zstd, each 2 MiB by themselves.
    Zstd,
}

impl VmSnapshotConfig {
    /// A snapshot in the directory behind `destination_url`, made while the guest runs.
    #[must_use]
    pub fn of(destination_url: String) -> Self {
        Self {
            destination_url,
            pause: false,
            skip_free_pages: false,
            track: false,
            parent: None,
            compress: None,
            template: false,
        }
    }
}

/// `vm.update-disk`: what is absent stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdateDisk {
    /// The disk's id.
    pub id: String,
    /// New limits; one without buckets lifts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Another medium for a read-only disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// What the link of a network card is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// Frames go through.
    Up,
    /// The cable is out.
    Down,
}

/// `vm.update-rng`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdateRng {
    /// The device's id.
    pub id: String,
    /// New limits; one without buckets lifts them.
    pub rate_limiter_config: RateLimiterConfig,
}

/// `vm.update-net`: what is absent stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdateNet {
    /// The card's id.
    pub id: String,
    /// The link, until the machine is booted anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkState>,
    /// New limits of both directions; one without buckets lifts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// New limits of what goes to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter_config: Option<RateLimiterConfig>,
    /// New limits of what comes from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter_config: Option<RateLimiterConfig>,
    /// What gets copies of the frames from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<NetMirror>,
}

/// `vm.add-virtio`: a device of any kind, by its own schema.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VirtioConfig {
    /// The kind, as in `vireo run --device KIND`.
    pub kind: String,
    /// Its name, unique in the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The PCI slot, 1 to 31.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u8>,
    /// The model's own keys.
    #[serde(default)]
    pub config: serde_json::Map<String, Value>,
}

/// `vm.console`: adds or removes a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmConsole {
    /// A sink in the form of `--serial`, such as `file=/srv/boot.log`, of a console. Its path is absolute.
    Add(String, ConsolePort),
    /// The id of a sink, as `GET vm.console` lists it.
    Remove(String),
}

/// `vm.console`: one of `add` and `remove`.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename = "VmConsole", deny_unknown_fields)]
struct ConsoleFields {
    /// A sink in the form of `--serial`, such as `file=/srv/boot.log`. Its path is absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    add: Option<String>,
    /// The id of a sink, as `GET vm.console` lists it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remove: Option<String>,
    /// With `add`: which console; the first serial port where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<ConsolePort>,
}

impl Serialize for VmConsole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fields = match self.clone() {
            Self::Add(sink, port) => ConsoleFields {
                add: Some(sink),
                port: (port != ConsolePort::default()).then_some(port),
                ..ConsoleFields::default()
            },
            Self::Remove(id) => ConsoleFields {
                remove: Some(id),
                ..ConsoleFields::default()
            },
        };
        fields.serialize(serializer)
    }
}

impl JsonSchema for VmConsole {
    fn schema_name() -> Cow<'static, str> {
        ConsoleFields::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        ConsoleFields::json_schema(generator)
    }
}

/// Read by hand: the parser would not say which fields there are.
impl<'de> Deserialize<'de> for VmConsole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ConsoleFields { add, remove, port } = ConsoleFields::deserialize(deserializer)?;
        match (add, remove, port) {
            (Some(sink), None, port) => Ok(Self::Add(sink, port.unwrap_or_default())),
            (None, Some(id), None) => Ok(Self::Remove(id)),
            (None, Some(_), Some(_)) => Err(D::Error::custom(
                "`port` goes with `add`: an id says which sink",
            )),
            _ => Err(D::Error::custom("give one of `add` and `remove`")),
        }
    }
}

/// `vm.console-size`: how large the window is in which the virtio console is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConsoleSize {
    /// Characters of a line.
    pub columns: NonZero<u16>,
    /// Lines.
    pub rows: NonZero<u16>,
}

/// `vm.console-attach`: a stream to a console, by upgrade of the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleRequest {
    /// Whether what was written before comes first.
    #[serde(default)]
    pub replay: bool,
    /// Which console.
    #[serde(default)]
    pub port: ConsolePort,
}

/// A console that can be attached to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConsolePort {
    /// The first serial port.
    #[default]
    Serial,
    /// The second serial port.
    Serial2,
    /// The third serial port.
    Serial3,
    /// The fourth serial port.
    Serial4,
    /// The virtio console.
    Console,
}

impl ConsolePort {
    /// All of them, with their names.
    pub const ALL: [(&str, Self); 5] = [
        ("serial", Self::Serial),
        ("serial2", Self::Serial2),
        ("serial3", Self::Serial3),
        ("serial4", Self::Serial4),
        ("console", Self::Console),
    ];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        let named = Self::ALL.into_iter().find(|(_, port)| *port == self);
        named.map_or("serial", |(name, _)| name)
    }
}

/// `vm.job-cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobCancel {
    /// The job's id.
    pub id: String,
}
