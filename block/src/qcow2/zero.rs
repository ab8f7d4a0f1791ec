//! Taking ranges out of the mapping: discard and write-zeroes.

use std::io;
use std::sync::Arc;

use super::entry::{COPIED, L2, ZERO};
use super::meta::{Lookup, Meta};
use super::pages::Page;
use super::write::Refusal;

/// What a range is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clear {
    /// Anything; preferably zeros that take no space.
    Discard,
    /// Nothing that this image says: the backing file's bytes.
    Forget,
    /// Zeros, whatever any backing file may hold there.
    Hide,
    /// Zeros.
    Zero {
        /// The space may be given back.
        unmap: bool,
    },
}

/// A range to clear.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cleared {
    /// Guest offset in bytes, at the start of a subcluster or cluster.
    pub offset: u64,
    /// Length in bytes, in whole subclusters or clusters.
    pub len: u64,
    /// How far the backing file reaches, in bytes; 0 when that is to show through, and the largest
    /// number when nothing may.
    pub backing: u64,
    /// What it becomes.
    pub clear: Clear,
}

/// What an entry becomes.
struct New {
    entry: u64,
    bitmap: u64,
    drop: bool,
}

impl Meta {
    /// Clears from the start of a range as far as one L2 page goes; how many bytes that was. `Ok(None)`: the
    /// image cannot say that the first cluster is zeros (version 2; a part of a compressed cluster), so they have to be written.
    pub(crate) fn clear(&mut self, range: Cleared) -> Result<Option<u64>, Refusal> {
        self.writable()?;
        let geometry = self.geometry;
        let per_page = (self.pages.size() / geometry.entry_size()) << geometry.cluster_bits;
        let len = range.len.min(per_page - range.offset % per_page);
        let end = range.offset + len;
        let bits = geometry.cluster_bits;
        let clusters = range.offset >> bits..((end - 1) >> bits) + 1;
        if clusters.clone().any(|c| self.in_flight.contains(&c)) {
            return Err(Refusal::Busy);
        }
        if self.pages.crowded() {
            return Err(Refusal::Checkpoint);
        }
        self.record(range.offset, len, false)?;
        if matches!(self.l2_page(range.offset, true)?, Lookup::NoTable)
            && range.offset >= range.backing
        {
            return Ok(Some(len));
        }
        if geometry.version < 3 && range.offset < range.backing {
            // It has no entry that hides the backing file.
            return Ok(match range.clear {
                Clear::Discard | Clear::Forget => Some(len),
                Clear::Zero { .. } | Clear::Hide => None,
            });
        }
        if geometry.version < 3 && range.clear == (Clear::Zero { unmap: false }) {
            return Ok(None);
        }
        let table = self.own_table(range.offset, false)?;
        let mut unlinked = Vec::new();
        let mut at = range.offset;
        while at < end {
            let next = end.min(geometry.down(at) + geometry.cluster());
            if next - at < geometry.cluster() && !self.has_parts(at)? {
                break;
            }
            unlinked.extend(self.clear_cluster(table, at, next - at, range)?);
            at = next;
        }
        self.unlink_all(&unlinked);
        Ok((at > range.offset).then_some(at - range.offset))
    }

    /// Whether part of a cluster can be cleared: none of a compressed one, for example.
    fn has_parts(&mut self, offset: u64) -> io::Result<bool> {
        let Lookup::Page { page, .. } = self.l2_page(offset, true)? else {
            return Ok(false);
        };
        let word = self.place(offset).word;
        let entry = self.l2_entry(&page, word, offset)?;
        Ok(self.geometry.extended && !matches!(entry, L2::Compressed(_)))
    }

    fn clear_cluster(
        &mut self,
        table: u64,
        offset: u64,
        len: u64,
        range: Cleared,
    ) -> io::Result<Option<(u64, u64)>> {
        let Lookup::Page { page, at } = self.l2_page(offset, true)? else {
            return Ok(None);
        };
        let word = self.place(offset).word;
        let entry = self.l2_entry(&page, word, offset)?;
        let hides = offset < range.backing;
        let new = if self.geometry.extended {
            self.cleared_parts(entry, offset, len, range.clear, hides)
        } else {
            self.cleared_whole(entry, range.clear, hides)
        };
        let Some(new) = new else {
            return Ok(None);
        };
        self.change(&page, word, &new);
        self.mark_l2(table, at);
        Ok(if new.drop { self.held(entry) } else { None })
    }

    fn change(&self, page: &Arc<Page>, word: usize, new: &New) {
        self.set_entry(page, word, new.entry, new.bitmap);
    }

    /// The clusters that an entry refers to, as first and count.
    pub(crate) fn held(&self, entry: L2) -> Option<(u64, u64)> {
        let bits = self.geometry.cluster_bits;
        match entry {
            L2::Compressed(data) => {
                let first = data.offset >> bits;
                let last = (data.offset + data.len - 1) >> bits;
                Some((first, last - first + 1))
            }
            _ if self.geometry.data_file => None,
            L2::Data { host, .. } => Some((host >> bits, 1)),
            L2::Zero { host, .. } | L2::Parts { host, .. } => host.map(|host| (host >> bits, 1)),
            L2::Absent => None,
        }
    }

    /// What the entry of a whole cluster without subclusters becomes; `None` when it stays.
    fn cleared_whole(&self, entry: L2, clear: Clear, hides: bool) -> Option<New> {
        let zero = if self.geometry.version >= 3 { ZERO } else { 0 };
        let empty = match clear {
            Clear::Forget => 0,
            Clear::Discard if !hides => 0,
            _ => zero,
        };
        let gone = Some(New {
            entry: empty,
            bitmap: 0,
            drop: true,
        });
        match (entry, clear) {
            (L2::Absent, _) if !hides => None,
            (L2::Absent, _) => gone,
            (L2::Zero { .. }, Clear::Forget) => gone,
            (L2::Zero { host: None, .. }, _) => None,
            (L2::Zero { .. }, Clear::Zero { unmap: false }) => None,
            (L2::Data { host, copied: true }, Clear::Zero { unmap: false }) => Some(New {
                entry: host | COPIED | zero,
                bitmap: 0,
                drop: false,
            }),
            _ => gone,
        }
    }

    /// What an extended entry becomes.
    fn cleared_parts(
        &self,
        entry: L2,
        offset: u64,
        len: u64,
        clear: Clear,
        hides: bool,
    ) -> Option<New> {
        let geometry = &self.geometry;
        let whole = len == geometry.cluster();
        let (host, copied, allocated, zero) = match entry {
            L2::Absent if !hides => return None,
            L2::Absent => (None, false, 0, 0),
            L2::Data { host, copied } => (Some(host), copied, u32::MAX, 0),
            L2::Parts {
                host,
                copied,
                allocated,
                zero,
            } => (host, copied, allocated, zero),
            L2::Zero { host, copied } => (host, copied, 0, u32::MAX),
            L2::Compressed(_) => (None, false, 0, 0),
        };
        let first = geometry.within(offset) / geometry.grain();
        let count = len / geometry.grain();
        let mask = u32::try_from(((1_u64 << count) - 1) << first).unwrap_or(u32::MAX);
        let allocated = allocated & !mask;
        let zero = if matches!(clear, Clear::Discard | Clear::Forget) && !hides && whole {
            0
        } else {
            zero | mask
        };
        let keep =
            host.filter(|_| allocated != 0 || (clear == Clear::Zero { unmap: false } && copied));
        let flag = if copied { COPIED } else { 0 };
        Some(New {
            entry: keep.map_or(0, |host| host | flag),
            bitmap: u64::from(zero) << 32 | u64::from(allocated),
            drop: keep.is_none(),
        })
    }
}
