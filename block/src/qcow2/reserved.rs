//! Where the metadata of snapshots and bitmaps is, so that no guest data is ever written there.
//!
//! Whatever the tables claim, each byte of the file is read once, and time and memory are bounded by what is in the
//! file: tables that lie over each other are read as one, holes are not read, and what is claimed is kept as ranges.

use std::io;

use super::bitmap_table;
use super::claims::Claims;
use super::entry::OFFSET;
use super::header::Header;
use super::snapshot_table;
use super::words::each_word;
use crate::storage::Storage;

/// Claims what the metadata of an image's snapshots and bitmaps takes.
///
/// # Errors
///
/// The host's, and `InvalidData` when the tables cannot be.
pub(crate) fn reserve(
    header: &Header,
    storage: &dyn Storage,
    claims: &mut Claims,
) -> io::Result<()> {
    let end = storage.len()?;
    let geometry = header.geometry();
    let mut table = |what: &str, name: &str, offset: u64, entries: u32| {
        let len = u64::from(entries) * 8;
        // The last cluster of a file may be cut off.
        let last = offset.checked_add(len);
        if last.is_none_or(|last| last > end.next_multiple_of(geometry.cluster())) {
            let why = format!("the {what} {name:?} has its table past the end of the file");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        claims.own(offset, len);
        Ok((offset, len))
    };
    let mut l1_tables = Vec::new();
    let mut misplaced = Ok(());
    let snapshots_len = snapshot_table::each(storage, header, |snapshot| {
        let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
        match table("snapshot", &snapshot.name(), offset, entries) {
            Ok(range) => l1_tables.push(range),
            Err(error) => misplaced = Err(error),
        }
    })
    .map_err(invalid)?;
    misplaced?;
    let mut bitmap_tables = Vec::new();
    if let Some(extension) = header.consistent_bitmaps() {
        for bitmap in bitmap_table::load_unchecked(storage, &extension).map_err(invalid)? {
            let (offset, entries) = (bitmap.table_offset, bitmap.table_entries);
            bitmap_tables.push(table("bitmap", &bitmap.name(), offset, entries)?);
        }
        claims.own(extension.directory_offset, extension.directory_size);
    }
    claims.own(header.snapshot_offset, snapshots_len);
    for (offset, len) in united(l1_tables) {
        each_word(storage, offset, len, io::Error::from, |_, entry| {
            let table = geometry.down(entry & OFFSET);
            if table != 0 {
                claims.table(table);
            }
            Ok(())
        })?;
    }
    // Entries of L1 tables and of bitmap tables are alike in where they keep an offset.
    for (offset, len) in united(bitmap_tables) {
        each_word(storage, offset, len, io::Error::from, |_, entry| {
            let part = geometry.down(entry & OFFSET);
            if part != 0 {
                claims.own(part, geometry.cluster());
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The same bytes in ranges that do not overlap.
fn united(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.retain(|(_, len)| *len != 0);
    ranges.sort_unstable();
    let mut united: Vec<(u64, u64)> = Vec::new();
    for (offset, len) in ranges {
        match united.last_mut() {
            Some((start, have)) if *start + *have >= offset => {
                *have = (*have).max(offset + len - *start);
            }
            _ => united.push((offset, len)),
        }
    }
    united
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_or_touch_are_united() {
        let ranges = vec![(100, 50), (0, 10), (120, 10), (150, 1), (10, 5), (300, 8)];
        assert_eq!(united(ranges), [(0, 15), (100, 51), (300, 8)]);
        assert_eq!(united(Vec::new()), []);
    }
}
