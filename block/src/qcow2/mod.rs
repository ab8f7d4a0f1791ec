//! qcow2, versions 2 and 3: mapping, allocation, snapshots, checks.
//!
//! The format is that of QEMU's interoperability document (`docs/interop/qcow2`).

mod allocate;
pub(crate) mod bitmap_table;
pub(crate) mod check;
mod checkpoint;
mod compress;
pub(crate) mod create;
pub(crate) mod disk;
pub(crate) mod entry;
mod epoch;
pub(crate) mod extension;
pub(crate) mod fields;
pub(crate) mod geometry;
pub(crate) mod header;
mod holes;
pub(crate) mod image;
pub(crate) mod map;
pub(crate) mod meta;
mod packed;
mod pages;
mod queue;
pub(crate) mod refblock;
mod refcount;
pub(crate) mod repair;
mod resize;
mod slow;
pub(crate) mod snapshot_table;
#[cfg(test)]
mod testing;
pub(crate) mod write;
mod zero;

#[cfg(test)]
mod tests;

pub use check::{CheckReport, Finding, Severity};
pub use create::{CreateError, CreateOptions, Preallocation};
pub use header::Compression;
pub use image::Qcow2;
pub use repair::Repair;

/// Where an image's snapshots and bitmaps have their tables and their data, as (offset, length) in bytes.
///
/// # Errors
///
/// The host's; `InvalidData` when a table cannot be what it is said to be.
fn snapshot_metadata(
    header: &header::Header,
    storage: &dyn crate::storage::Storage,
) -> std::io::Result<Vec<(u64, u64)>> {
    let broken = |error| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    let geometry = header.geometry();
    let mut found = Vec::new();
    if header.snapshots > 0 {
        let snapshots = snapshot_table::load(storage, header)
            .map_err(|error| broken(Box::new(error) as Box<dyn std::error::Error + Send + Sync>))?;
        let len = snapshot_table::encode(&snapshots).map_or(geometry.cluster(), |t| t.len() as u64);
        found.push((header.snapshot_offset, len));
        for snapshot in snapshots {
            let entries = usize::try_from(snapshot.l1_entries).unwrap_or(0);
            let l1 = meta::read_table(storage, snapshot.l1_offset, entries)?;
            found.push((snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8));
            let tables = l1.iter().map(|entry| entry & entry::OFFSET);
            found.extend(
                tables
                    .filter(|table| *table != 0)
                    .map(|table| (table, geometry.cluster())),
            );
        }
    }
    if let Some(extension) = header.consistent_bitmaps() {
        let bitmaps = bitmap_table::load(storage, &extension, &geometry, header.size)
            .map_err(|error| broken(Box::new(error)))?;
        found.push((extension.directory_offset, extension.directory_size));
        for bitmap in bitmaps {
            let entries = usize::try_from(bitmap.table_entries).unwrap_or(0);
            found.push((bitmap.table_offset, u64::from(bitmap.table_entries) * 8));
            for entry in meta::read_table(storage, bitmap.table_offset, entries)? {
                if let Ok(bitmap_table::Bits::At(offset)) = bitmap_table::bits(entry, &geometry) {
                    found.push((offset, geometry.cluster()));
                }
            }
        }
    }
    Ok(found)
}
