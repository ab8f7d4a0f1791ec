//! A machine that goes to another monitor, or comes from one.

use std::num::NonZero;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::device::is_false;
use super::restore::{RestoreOverrides, RestoredNet};

/// `vm.send-migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SendMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH`, where the other monitor waits. Beyond v1: `exec:COMMAND`, whose input and output lead there, and
    /// `fd:NUMBER`, a connected stream socket that comes along with the request, of any number.
    pub destination_url: String,
    /// Memory is handed over and not copied, to a monitor of this host.
    #[serde(default, skip_serializing_if = "is_false")]
    pub local: bool,
    /// With `local`: this machine stays, paused.
    #[serde(default, skip_serializing_if = "is_false")]
    pub preserve_source: bool,
    /// The longest pause of the guest; absent: 300, or what `preset` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<NonZero<u64>>,
    /// The longest time in all; absent: 3600, or what `preset` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<NonZero<u64>>,
    /// What becomes of a migration that takes longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_strategy: Option<MigrationTimeoutStrategy>,
    /// Over how many connections memory goes, 1 to 64; absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub connections: Option<u32>,
    /// The directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`; for `tcp:` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Whether all memory goes before the guest.
    #[serde(default)]
    pub memory_mode: MigrationMemoryMode,
    /// Parameters that belong together: `default`, `fast` or `datacentre`. Others that are given replace its own. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// The most bytes in a second; 0: no limit; absent: as `preset` says. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// It ends after so many seconds in which less has not been left than ever before. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_s: Option<NonZero<u64>>,
    /// Whether a guest is slowed that writes faster than it can be sent; absent: as `preset` says. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<bool>,
    /// How pages are compressed. Not in v1.
    #[serde(default)]
    pub compression: MigrationCompression,
    /// Bytes of memory for pages as they were sent last, of which only differences go then; absent: none. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_cache: Option<NonZero<u64>>,
    /// Whether memory may go over a network in the clear. Not in v1.
    #[serde(default, skip_serializing_if = "is_false")]
    pub insecure: bool,
    /// Whether disks are copied too; absent: both sides reach the same images. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_storage: Option<CopyStorage>,
    /// Whether the guest is asked through its balloon which pages it does not use, which then stay behind; absent: it is. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_page_hints: Option<bool>,
}

/// Whether all memory goes before the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationMemoryMode {
    /// It does.
    #[default]
    Precopy,
    /// The guest goes before the rest of its memory where that does not fit into the pause after two rounds.
    Postcopy,
}

/// What becomes of a migration that takes longer than it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationTimeoutStrategy {
    /// It ends, and the guest goes on here.
    #[default]
    Cancel,
    /// It switches, however long the pause.
    Ignore,
}

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MigrationCompression {
    /// They are not.
    #[default]
    None,
    /// With zstd.
    Zstd,
    /// With LZ4.
    Lz4,
}

/// Which images are copied with a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CopyStorage {
    /// All that each disk holds.
    All,
    /// What each disk's own image holds; the images below it are at the destination already.
    Inc,
}

/// `vm.receive-migration`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ReceiveMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH`, where the machine is waited for. Beyond v1: `exec:COMMAND`, whose input and output lead to
    /// the source, and `fd:NUMBER`, a stream socket that comes along with the request before those of taps, and listens or is connected to it.
    pub receiver_url: String,
    /// The directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`; for `tcp:` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// `Postcopy`: fails at once where no guest could come before its memory. It may with either where the source asks for it.
    #[serde(default)]
    pub memory_mode: MigrationMemoryMode,
    /// To be empty: there are no zones.
    #[serde(
        default,
        deserialize_with = "null_is_none",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Option<Vec<Value>>")]
    pub zone_updates: Vec<Value>,
    /// To be empty: there are no VFIO devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vfio_fds: Option<Vec<Value>>,
    /// To be absent, as those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<Value>,
    /// The cards that get the descriptors of taps which come along, in this order. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// What is not here as it is at the source. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Box<RestoreOverrides>>,
    /// Whether it may come over a network in the clear, from anybody. Not in v1.
    #[serde(default, skip_serializing_if = "is_false")]
    pub insecure: bool,
    /// For how many seconds a source is waited for; absent: until it comes. Not in v1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<NonZero<u64>>,
}

/// A list of nothing where there is none.
fn null_is_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Value>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// `vm.migration-set`: what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VmMigrationSet {
    /// The most bytes in a second; 0: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// The longest pause of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<NonZero<u64>>,
    /// The longest time in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<NonZero<u64>>,
    /// What becomes of a migration that takes longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_strategy: Option<MigrationTimeoutStrategy>,
    /// Whether the guest is slowed where it writes faster than it can be sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<bool>,
    /// `true`: the guest goes now, and the rest of its memory while it runs there; for a migration that was begun with
    /// `memory_mode` `Postcopy`.
    #[serde(skip_serializing_if = "is_false")]
    pub postcopy: bool,
}

/// `vm.migration-resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmMigrationResolve {
    /// What an operator has seen to.
    pub resolution: MigrationResolution,
}

/// What an operator says of a guest of which it is not known where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationResolution {
    /// It neither runs at the destination nor ever will: it goes on here.
    Resume,
    /// It runs at the destination, or is not wanted: it ends here.
    Abandon,
}

/// What a migration is told while it is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationOrder {
    /// To end.
    Cancel,
    /// To go on with other parameters.
    Set(VmMigrationSet),
    /// What an operator has seen to.
    Resolve(MigrationResolution),
}

/// Which way a machine goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationDirection {
    /// To another monitor.
    #[default]
    Outgoing,
    /// From another monitor.
    Incoming,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// The other side is being reached, or waited for.
    #[default]
    Connecting,
    /// Both sides compare what they have.
    Checking,
    /// Memory goes while the guest runs at the source.
    Precopy,
    /// The guest stands; the rest goes.
    Switching,
    /// The destination may run the guest, and has not answered: it is paused here until that is known.
    InDoubt,
    /// The guest runs at the destination, and memory follows.
    Postcopy,
    /// As before, but the connection is lost: the guest waits.
    PostcopyLost,
    /// The guest runs at the destination.
    Completed,
    /// It has failed; the guest is at the source.
    Failed,
    /// Somebody has ended it; the guest is at the source.
    Cancelled,
}

impl MigrationPhase {
    /// Whether nothing follows.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether the guest has not been given away, and runs at the source.
    #[must_use]
    pub fn is_early(self) -> bool {
        matches!(self, Self::Connecting | Self::Checking | Self::Precopy)
    }
}

/// How far disks are that are copied with a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationStorage {
    /// Bytes of them over the wire.
    pub transferred: u64,
    /// Bytes that are left to be gone through, as far as is known.
    pub remaining: u64,
    /// Bytes of all of them.
    pub total: u64,
}

/// The answer to `vm.migration`: the one that is under way, or the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationInfo {
    /// The job's id.
    pub job: String,
    /// Which way.
    pub direction: MigrationDirection,
    /// The other side, or where it is waited for.
    pub peer: String,
    /// How far it is.
    pub phase: MigrationPhase,
    /// Bytes of memory of the machine.
    pub memory: u64,
    /// How often memory has been gone through; the first time is 1.
    pub rounds: u64,
    /// Pages that went in all; one that went twice counts twice.
    pub pages: u64,
    /// Of those that held zeros.
    pub zero_pages: u64,
    /// Of those that went as differences.
    pub delta_pages: u64,
    /// Pages that were left out of the first round, because the guest has told through its balloon that it does not use them.
    #[serde(default)]
    pub free_pages: u64,
    /// Bytes over the wire.
    pub bytes: u64,
    /// Bytes of memory in a second, as the last round had them.
    pub rate: u64,
    /// Bytes of memory that are left to be sent, as far as is known.
    pub remaining: u64,
    /// Disks that are copied with it, at the source; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<MigrationStorage>,
    /// Bytes of memory that the guest has written in a second.
    pub dirty_rate: u64,
    /// How much the guest is slowed, in percent.
    pub throttle: u8,
    /// The limit, in bytes a second; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// The longest pause that is wanted, in milliseconds.
    pub downtime_ms: u64,
    /// How long the pause would be now, in microseconds, where anything has been measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_us: Option<u64>,
    /// How long the guest stood, in microseconds: here from its pause to the destination's answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_us: Option<u64>,
    /// How long it has taken so far, or took, in microseconds.
    pub elapsed_us: u64,
    /// Why it has failed, or why the connection is lost while memory follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
