//! What is done to the images of disks in use. Additions to v1.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `vm.disk-snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskSnapshot {
    /// The disks, which get their overlays at one instant: all of them or none.
    pub disks: Vec<DiskOverlay>,
    /// Whether the guest agent freezes the guest's file systems for that instant.
    #[serde(default)]
    pub quiesce: Quiesce,
}

/// A disk, and a new image on top of its present one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskOverlay {
    /// The disk's id.
    pub id: String,
    /// The qcow2 image that is made, where nothing is yet; what the guest writes goes there from then on.
    pub path: PathBuf,
}

/// Whether a guest's file systems are frozen for an instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quiesce {
    /// They are not: the disks are as after a power cut.
    #[default]
    Off,
    /// They are, if the agent can do it.
    Auto,
    /// They are, or nothing is done.
    Required,
}

/// The answer to `vm.disk-snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskSnapshotInfo {
    /// What the guest has written before is in these images, unchanged from now on.
    pub disks: Vec<DiskLayer>,
    /// How many file systems were frozen; absent: none was asked to be, and the disks are as after a power cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<u64>,
    /// Why the file systems were not frozen, or not thawed, where they were to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce_error: Option<String>,
    /// For how long the guest stood still, in microseconds.
    pub stall_us: u64,
}

/// A disk with a new overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskLayer {
    /// The disk's id.
    pub id: String,
    /// The overlay.
    pub path: PathBuf,
    /// The image before, which is its backing file.
    pub backing: PathBuf,
}

/// `vm.disk-stream`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskStream {
    /// The disk's id.
    pub id: String,
    /// The image of its chain that takes in what lies below it, and has nothing below it then; absent: the disk's own one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<PathBuf>,
    /// The image of its chain that stays below the disk's own; absent: none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// The most bytes to be copied in a second; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
}

/// `vm.disk-commit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskCommit {
    /// The disk's id.
    pub id: String,
    /// The topmost image of its chain that is merged; absent: the disk's own one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<PathBuf>,
    /// The image that takes all between, and stays; absent: the one right below `top`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// The most bytes to be copied in a second; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
}

/// `vm.disk-mirror`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskMirror {
    /// The disk's id.
    pub id: String,
    /// Where the copy is made: an absolute path.
    pub path: PathBuf,
    /// What the copy is.
    #[serde(default)]
    pub format: MirrorFormat,
    /// There is a file or block device of the disk's size already, which is overwritten.
    #[serde(default)]
    pub existing: bool,
    /// The disk goes on there at the end. Otherwise the copy holds what the disk held then.
    #[serde(default)]
    pub switch: bool,
    /// The most bytes to be copied in a second; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
}

/// What a copy of a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MirrorFormat {
    /// Its bytes are the disk's.
    #[default]
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// `vm.disk-backup`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskBackup {
    /// The disk's id.
    pub id: String,
    /// Where the backup is made, where nothing is yet: an absolute path. It appears there when it is complete.
    pub path: PathBuf,
    /// What the backup is.
    #[serde(default = "qcow2")]
    pub format: MirrorFormat,
    /// The bitmap of the disk that tells what has been written since. After the backup it marks what was written since the instant
    /// of the backup alone. A full backup makes it where it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// Only what the bitmap marks is copied, into a qcow2 image.
    #[serde(default)]
    pub incremental: bool,
    /// The backup before, which becomes the backing file of an incremental one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// What `base` is.
    #[serde(default = "qcow2")]
    pub base_format: MirrorFormat,
    /// The most bytes to be copied in a second; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
}

fn qcow2() -> MirrorFormat {
    MirrorFormat::Qcow2
}

/// `vm.disk-bitmap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskBitmap {
    /// The disk's id.
    pub id: String,
    /// The bitmap's name.
    pub name: String,
    /// What is done to it.
    pub action: BitmapAction,
    /// How many bytes a new one marks together: a power of two from 512 to 2147483648; absent: the cluster size of the disk's
    /// image, within 4096 and 65536, or 65536 where that is raw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
}

/// What is done to a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BitmapAction {
    /// It is made, and marks what is written from now on.
    Add,
    /// It goes.
    Remove,
    /// It marks nothing any more.
    Clear,
    /// It marks what is written from now on.
    Enable,
    /// It stays as it is.
    Disable,
}

/// The bitmaps of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskBitmaps {
    /// The disk's id.
    pub id: String,
    /// Its bitmaps.
    pub bitmaps: Vec<DiskBitmap>,
    /// Why they cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A bitmap: which parts of a disk have been written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskBitmap {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk are marked together.
    pub granularity: u64,
    /// It marks what is written.
    pub enabled: bool,
    /// It can only be removed: it was not saved after its last use, as after a crash, so that it does not tell of all that was
    /// written.
    pub broken: bool,
    /// It is kept in the disk's image; otherwise it ends with the machine.
    pub persistent: bool,
    /// How many bytes of the disk it marks; absent: that is not known without reading it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marked: Option<u64>,
}

/// `vm.disk-revert`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDiskRevert {
    /// The disk's id.
    pub id: String,
    /// The image of its chain that holds what the disk is to hold; absent: the one right below the disk's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<PathBuf>,
    /// The guest may be restarted in place, as by a reset: without, the request is refused.
    #[serde(default)]
    pub reset: bool,
}

/// What the chain of a disk consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskChain {
    /// The disk's id.
    pub id: String,
    /// Its images, the disk's own one first. Each one below holds what the disk held when it was covered.
    pub layers: Vec<ChainLayer>,
    /// Why they cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An image of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChainLayer {
    /// Where it is.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The size of the disk in it, in bytes.
    pub size: u64,
    /// How much space its file takes, in bytes.
    pub used: u64,
    /// When it was last written to, in seconds since 1970.
    pub changed: i64,
    /// How many internal snapshots it has.
    pub internal_snapshots: u64,
    /// The image from which a merge into this one, or into one below it, has not ended: by itself this one holds a mixture of two
    /// times until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<String>,
}
