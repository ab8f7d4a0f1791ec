//! Tables of big-endian 64-bit words: reading what is in them.

use std::io;

use super::fields::u64_at;
use crate::storage::Storage;

/// How much of a table is read at once, in bytes.
const CHUNK: u64 = 64 << 10;

/// Tables below this size, in bytes, are read sooner than it is found out whether they are there.
const SMALL: u64 = 64 << 10;

/// Calls `visit` with the index and the value of each word of a table that is not 0. Holes are not read, so that it takes no longer
/// than what the table has in the file.
///
/// # Errors
///
/// Those of `visit`, and the host's as `unreadable` makes them.
pub(crate) fn each_word<E>(
    storage: &dyn Storage,
    offset: u64,
    len: u64,
    unreadable: impl Fn(io::Error) -> E,
    mut visit: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut chunk = Vec::new();
    let mut done = 0;
    while done < len {
        let (part, data) = storage.extent(offset.saturating_add(done), len - done);
        let hole = if data { 0 } else { part - part % 8 };
        if hole == 0 {
            // Words are read whole.
            let end = (done + part.max(1)).next_multiple_of(8).min(len);
            each_in(
                storage,
                offset,
                done..end,
                &mut chunk,
                &unreadable,
                &mut visit,
            )?;
            done = end;
        }
        done += hole;
    }
    Ok(())
}

/// Whether all of a table is a hole, which is worth asking for large ones only.
pub(crate) fn is_hole(storage: &dyn Storage, offset: u64, len: u64) -> bool {
    if len < SMALL {
        return false;
    }
    let (part, data) = storage.extent(offset, len);
    !data && part >= len
}

fn each_in<E>(
    storage: &dyn Storage,
    offset: u64,
    range: std::ops::Range<u64>,
    chunk: &mut Vec<u8>,
    unreadable: &impl Fn(io::Error) -> E,
    visit: &mut impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut done = range.start;
    while done < range.end {
        let part = (range.end - done).min(CHUNK);
        chunk.resize(usize::try_from(part).unwrap_or(0), 0);
        storage
            .read_at(chunk, offset.saturating_add(done))
            .map_err(unreadable)?;
        for (index, bytes) in (done / 8..).zip(chunk.chunks_exact(8)) {
            match u64_at(bytes, 0) {
                0 => {}
                word => visit(index, word)?,
            }
        }
        done += part;
    }
    Ok(())
}
