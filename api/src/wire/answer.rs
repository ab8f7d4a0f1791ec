//! What endpoints give back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ConsolePort, LinkState, MemoryRestoreMode, MigrationInfo, VmConfig};
use crate::PauseReason;

/// `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmmPingResponse {
    /// The release with its build.
    pub build_version: String,
    /// The release.
    pub version: String,
    /// The monitor's process.
    pub pid: i64,
    /// What this monitor can do.
    pub features: Vec<String>,
}

/// The state of a machine as v1 clients know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmInfoState {
    /// There is a description, and no machine.
    Created,
    /// The machine runs or boots.
    Running,
    /// It is on its way out.
    Shutdown,
    /// It is paused.
    Paused,
    /// A debugger holds it.
    BreakPoint,
}

/// `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// The description.
    pub config: VmConfig,
    /// The state.
    pub state: VmInfoState,
    /// Why the machine is paused, while it is. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<PauseReason>,
    /// How much memory the guest has, in bytes.
    pub memory_actual_size: u64,
    /// How memory came from a snapshot, as long as that matters. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_restored: Option<MemoryRestored>,
    /// The console in the browser, where there is one that listens. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_console: Option<WebConsole>,
    /// The devices by id; absent when there is no machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// How the guest's memory came from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryRestored {
    /// The way.
    pub mode: MemoryRestoreMode,
    /// The file that gives bytes that the guest has not written since; absent when all are in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// How many bytes of it have not been read yet, where it is read on demand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<u64>,
}

/// Where the console in the browser is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WebConsole {
    /// Where it listens, as the description has it.
    pub address: String,
    /// What lets a browser in, once: the next one is let in by another.
    pub token: String,
    /// Both, for a browser on this host; absent for a unix socket, to which a tunnel is to lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// A device in `vm.info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceNode {
    /// Its id.
    pub id: String,
    /// What it occupies.
    pub resources: Vec<Resource>,
    /// The device that it sits on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The devices that sit on it.
    pub children: Vec<String>,
    /// Its PCI address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// What a device occupies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Resource {
    /// Ports.
    PioAddressRange {
        /// The first.
        base: u16,
        /// How many.
        size: u16,
    },
    /// Guest-physical addresses.
    MmioAddressRange {
        /// The first.
        base: u64,
        /// How many.
        size: u64,
    },
    /// What a PCI base address register decodes.
    PciBar {
        /// Which register.
        index: usize,
        /// The first address.
        base: u64,
        /// How many.
        size: u64,
        /// What kind of addresses.
        type_: PciBarType,
        /// Whether reading has no effects.
        prefetchable: bool,
    },
    /// A pin of the interrupt controller.
    LegacyIrq(u32),
    /// The address of a network card.
    MacAddress(String),
    /// A slot of guest memory.
    KvmMemSlot(u32),
}

/// What kind of addresses a PCI base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PciBarType {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Mmio32,
    /// Memory anywhere.
    Mmio64,
}

/// `vm.counters`: device, counter, value.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// `vm.balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BalloonInfo {
    /// How much the guest is to give up, in bytes.
    pub target: u64,
    /// How much it has given up, in bytes.
    pub actual: u64,
    /// How many bytes of free pages it has reported and the host has got back, each time that it did.
    pub reported: u64,
    /// What it said last of how its memory is used, by name; absent before it has said anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<BTreeMap<String, u64>>,
    /// How long ago that was, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics_age_ms: Option<u64>,
}

/// Where a device has been put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciDeviceInfo {
    /// Its id.
    pub id: String,
    /// Its PCI address.
    pub bdf: String,
}

/// A device in `vm.devices`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceInfo {
    /// Its id.
    pub id: String,
    /// Its kind, as in `vireo run --device KIND`; of those that every machine has or a flag of their own gives it:
    /// `debugcon`, `display`, `i8042`, `pvpanic`, `rtc`, `serial`, `vmgenid`, `watchdog`.
    pub kind: String,
    /// Its PCI address, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bdf: Option<String>,
    /// Where the guest finds it otherwise: `port 0x3f8`, `memory 0xf7000`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// What it is doing.
    pub state: DeviceState,
    /// Of a network card: whether frames go through. Absent where another program serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkState>,
}

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// The machine has not been built.
    Configured,
    /// It is there; no driver uses it.
    Present,
    /// A driver uses it.
    Active,
    /// It works no more until its driver resets it.
    NeedsReset,
    /// A driver uses it, and the program that serves it is gone: requests wait for its return. Or its network is
    /// gone: the link is down.
    PeerLost,
    /// The guest has been asked to give it up.
    Removing,
}

/// A job in `vm.jobs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: String,
    /// How far it is.
    pub state: JobState,
    /// What has been done, in the job's own unit.
    pub done: u64,
    /// What there is to do, as far as it is known.
    pub total: u64,
    /// Why it failed, or why it was cancelled if no request has asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What a snapshot was like that has been made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotReport>,
    /// What a migration was like that has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<Box<MigrationInfo>>,
}

/// How a snapshot was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotReport {
    /// Whether the guest ran while its memory was written.
    pub mode: SnapshotMode,
    /// Why it did not, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long the guest stood, in microseconds: with all that is in `drain_us`. Absent where it was paused before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// How much of that was waiting for devices to end what they were doing, in microseconds.
    pub drain_us: u64,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
    /// How many bytes of memory and state were written.
    pub bytes: u64,
    /// How many pages of memory were written.
    #[serde(default)]
    pub pages: u64,
    /// How many pages of memory hold zeros and were not written, or were left out.
    pub zero_pages: u64,
    /// How many pages were left out because the guest does not use them. Absent where that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_pages: Option<u64>,
    /// Why none were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_pages_reason: Option<String>,
    /// The id of the snapshot that has all other pages, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// Whether the guest runs while its memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMode {
    /// It runs.
    Live,
    /// It is paused.
    Paused,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It goes on.
    Running,
    /// It has been asked to end.
    Cancelling,
    /// It has done what it was to do.
    Completed,
    /// It has ended before.
    Cancelled,
    /// It has failed.
    Failed,
}

/// The answer to `vm.add-port`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortInfo {
    /// The port's name.
    pub name: String,
    /// The far end of the pseudo-terminal that has been made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// A sink in `vm.console`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleSink {
    /// Its id, which no sink of another console has.
    pub id: String,
    /// Which console it is of.
    #[serde(default)]
    pub port: ConsolePort,
    /// `tty`, `pty`, `file`, `socket`, `stream` or `null`.
    pub kind: String,
    /// Its file, socket or pseudo-terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How many clients a socket has.
    #[serde(default)]
    pub clients: u64,
    /// Bytes that wait for its reader; of a socket's clients, for the slowest.
    pub waiting: u64,
    /// Bytes that it has missed; of a socket's clients, all together.
    pub lost: u64,
}
