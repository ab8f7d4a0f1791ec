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
    /// The image of its chain that stays below it; absent: none does.
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
