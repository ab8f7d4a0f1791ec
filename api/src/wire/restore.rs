//! What `vm.restore` takes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::SerialConfig;
use super::device::{ConsoleConfig, DisplayConfig, PortConfig, is_false};

/// `vm.restore`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreConfig {
    /// `file://` and the path of the snapshot's directory.
    pub source_url: String,
    /// Whether the guest goes on at once; it stays paused otherwise.
    #[serde(default, skip_serializing_if = "is_false")]
    pub resume: bool,
    /// How memory comes back.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Memory that is copied is all there.
    #[serde(default, skip_serializing_if = "is_false")]
    pub prefault: bool,
    /// The cards that get the descriptors of taps which come along, in this order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// What is not as it was. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Box<RestoreOverrides>>,
    /// Whether the machine is another one than that of the snapshot. Not in v1.
    #[serde(default, skip_serializing_if = "RestoreIdentity::is_same")]
    pub identity: RestoreIdentity,
}

impl RestoreConfig {
    /// All of a snapshot is read, and the machine stays paused.
    #[must_use]
    pub fn of(source_url: String) -> Self {
        Self {
            source_url,
            resume: false,
            memory_restore_mode: MemoryRestoreMode::Copy,
            prefault: false,
            net_fds: None,
            overrides: None,
            identity: RestoreIdentity::Same,
        }
    }
}

/// A card that gets descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoredNet {
    /// The card's id.
    pub id: String,
    /// How many of the descriptors: one for each pair of its queues.
    #[serde(default)]
    pub num_fds: usize,
}

/// Whether a restored machine is the one that was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RestoreIdentity {
    /// It is, and goes on in its place.
    #[default]
    Same,
    /// It is a copy that may run beside it: it gets a UUID and addresses of its own, where `overrides` says none, its links
    /// go down and up, and its clock is set.
    New,
}

impl RestoreIdentity {
    /// Whether nothing is made anew.
    #[must_use]
    pub fn is_same(&self) -> bool {
        *self == Self::Same
    }
}

/// What of a restored machine is not as it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RestoreOverrides {
    /// Its UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// What its memory is on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<RestoredMemory>,
    /// Devices of any kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<RestoredDevice>,
    /// Where the first serial port leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Where the second serial port leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial2: Option<SerialConfig>,
    /// Where the third serial port leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial3: Option<SerialConfig>,
    /// Where the fourth serial port leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial4: Option<SerialConfig>,
    /// Where the virtio console leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// Named ports, which replace those of the same names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortConfig>,
    /// Where the screen can be seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display: Option<DisplayConfig>,
}

/// What of a device is not as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoredDevice {
    /// Its id.
    pub id: String,
    /// Keys of its model, as in `vm.add-virtio`. What is absent stays, and `null` is as if it had never been said.
    pub config: Map<String, Value>,
}

/// What the memory of a restored machine is on the host; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RestoredMemory {
    /// Whether other processes can share it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<bool>,
    /// Whether it is of huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<bool>,
    /// How large they are, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether the kernel may make it of large pages by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thp: Option<bool>,
}

/// How a restored machine gets its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MemoryRestoreMode {
    /// All of it is read before the guest goes on.
    #[default]
    Copy,
    /// It is read when the guest needs it.
    OnDemand,
    /// The file is mapped in its place. Not in v1.
    Mmap,
}
