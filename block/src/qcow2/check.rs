//! Checks images: whether every cluster's refcount is the number of references to it, and whether all tables are
//! sound.
//!
//! A check reads the image through its [`Storage`] only, and nobody may write to the image meanwhile. Memory and
//! time are bounded by what is in the file, whatever its header claims.
//!
//! Holes are not read, and tables in holes are not believed beyond a limit. Each cluster is looked at once, however many snapshots share it: tables are read once, with the number of times
//! that they are referred to.

mod counts;
mod scan;
mod tables;

use std::io;

use serde::Serialize;

use super::bitmap_table::BitmapError;
use super::header::HeaderError;
use super::snapshot_table::SnapshotError;
use crate::storage::Storage;

pub(super) use counts::Counts;
pub(super) use scan::{Leniency, Run, Scan, scan};

/// Why an image cannot be checked, or repaired, at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// The header cannot be used.
    #[error("the image cannot be checked")]
    Header(#[from] HeaderError),
    /// The snapshots cannot be used.
    #[error("the snapshot table cannot be used; check -r all drops what cannot be kept")]
    Snapshots(#[from] SnapshotError),
    /// The bitmaps cannot be used.
    #[error("the bitmaps cannot be used")]
    Bitmaps(#[from] BitmapError),
    /// The host's error.
    #[error("the image cannot be read")]
    Read(#[source] io::Error),
    /// The host's error.
    #[error("the image cannot be repaired")]
    Write(#[source] io::Error),
    /// Tables that nobody has written.
    #[error(
        "its tables are not to be believed: more than {most} clusters of what each would be the {what} are holes \
         of the file; the disk can be read, and converted to a new image"
    )]
    Hollow {
        /// What they would be.
        what: String,
        /// How many clusters may be.
        most: u64,
    },
    /// There is more to repair than leaks.
    #[error("the refcount structures are broken: repair them with check -r all")]
    NeedsRebuild,
    /// No room for new refcount structures.
    #[error("there is no room for new refcount structures of {0} clusters")]
    NoRoom(u64),
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Space is lost, and nothing else.
    Leak,
    /// Data is lost or in danger.
    Corruption,
    /// It was a finding, and has been mended.
    Repaired,
}

/// Something that is wrong with an image, or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, for people.
    pub message: String,
}

/// Who gets the findings, one by one: there may be very many.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Finding);

/// What a check found, in the terms of `qemu-img check`; serialized as its JSON, which leaves zeros out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Errors of the check itself.
    pub check_errors: u64,
    /// Corruptions that are there now.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Leaked clusters that are there now.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Corruptions that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaked clusters that were freed.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// How many clusters the disk has.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// How many of them have space of their own.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// How many of them are not where the one before would have them.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// How many of them are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Checks an image without changing it. Every finding goes to `sink`.
///
/// # Errors
///
/// An image that is none, or so broken that there is no checking it; and the host's.
pub(crate) fn check(storage: &dyn Storage, sink: Sink<'_>) -> Result<CheckReport, CheckError> {
    Ok(scan(storage, sink, Leniency::Strict)?.report)
}

#[cfg(test)]
mod tests;
