//! Where a guest range lives.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::entry::{self, Compressed, L2};
use super::image::{Backing, Qcow2};
use super::meta::{Lookup, Meta, eio};
use super::pages::Page;

/// How many pages a cursor holds; each maps 32 MiB at the usual cluster size.
const SLOTS: u64 = 64;

/// How many pages of a table are loaded together.
const AHEAD: u64 = 16;

/// How a range is kept in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// At this host offset. `sole`: nothing else refers to it, so it may be written in place.
    Data {
        /// Host offset in bytes of the range's first byte.
        host: u64,
        /// It may be written in place.
        sole: bool,
    },
    /// Zeros, with space reserved for it or not.
    Zero {
        /// Host offset in bytes of the range's first byte.
        host: Option<u64>,
    },
    /// Whatever the backing file holds.
    Absent,
    /// In compressed form; the range lies within one cluster.
    Compressed(Compressed),
}

/// A guest range that is kept in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// Length in bytes.
    pub len: u64,
    /// How.
    pub kind: Kind,
}

/// Where bytes are to be moved from or to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A file of the chain.
    File {
        /// Its index in [`Qcow2::files`].
        file: usize,
        /// Host offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Zeros.
    Zero {
        /// Length in bytes.
        len: u64,
    },
}

/// Why a range was not found at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// A table is not in memory, or somebody is at work on the tables: [`Qcow2::load`] mends that.
    Unloaded,
    /// It is not kept in a way that the caller can use as it is.
    Unfit,
}

/// Appends a piece, joined with the last where they are one.
pub(crate) fn join(pieces: &mut Vec<Piece>, piece: Piece) {
    match (pieces.last_mut(), piece) {
        (
            Some(Piece::File { file, offset, len }),
            Piece::File {
                file: next_file,
                offset: next,
                len: more,
            },
        ) if *file == next_file && *offset + *len == next => *len += more,
        (Some(Piece::Zero { len }), Piece::Zero { len: more }) => *len += more,
        _ => pieces.push(piece),
    }
}

/// Pages that one queue has looked at lately, so that it finds entries without a lock.
#[derive(Debug)]
pub(crate) struct Cursor {
    layers: Vec<LayerCursor>,
}

#[derive(Debug, Default)]
struct LayerCursor {
    generation: u64,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    /// Which part of the disk, plus one.
    slice: u64,
    /// `None`: there is no table for it.
    page: Option<Arc<Page>>,
}

impl Cursor {
    /// A cursor for an image and its chain.
    pub(crate) fn new(image: &Qcow2) -> Self {
        let mut layers = vec![LayerCursor::default()];
        let mut below = image.below();
        while let Some(Backing::Qcow2(next)) = below {
            layers.push(LayerCursor::default());
            below = next.below();
        }
        Self { layers }
    }
}

impl Qcow2 {
    /// Finds where a range is to be read from, without a system call and without waiting.
    /// When that cannot be told at once, [`crate::Image::read`] can.
    ///
    /// The caller has pinned an epoch, and keeps it until it has read. The range lies within the disk.
    pub(crate) fn map_read(
        &self,
        cursor: &mut Cursor,
        offset: u64,
        len: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Miss> {
        pieces.clear();
        self.map_layer(&mut cursor.layers, 0, offset, len, pieces)
    }

    fn map_layer(
        &self,
        cursors: &mut [LayerCursor],
        depth: usize,
        offset: u64,
        len: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Miss> {
        let (own, rest) = cursors.split_first_mut().ok_or(Miss::Unfit)?;
        let end = offset + len;
        let inside = end.min(self.disk_size());
        let mut at = offset;
        while at < inside {
            let range = self.quick_range(own, at, inside - at)?;
            match range.kind {
                Kind::Data { host, .. } => join(
                    pieces,
                    Piece::File {
                        file: depth,
                        offset: host,
                        len: range.len,
                    },
                ),
                Kind::Zero { .. } => join(pieces, Piece::Zero { len: range.len }),
                Kind::Compressed(_) => return Err(Miss::Unfit),
                Kind::Absent => match self.below() {
                    None => join(pieces, Piece::Zero { len: range.len }),
                    Some(Backing::Qcow2(next)) => {
                        next.map_layer(rest, depth + 1, at, range.len, pieces)?;
                    }
                    Some(Backing::Raw(raw)) => {
                        let held = raw.size.saturating_sub(at).min(range.len);
                        if held > 0 {
                            join(
                                pieces,
                                Piece::File {
                                    file: depth + 1,
                                    offset: at,
                                    len: held,
                                },
                            );
                        }
                        if held < range.len {
                            let len = range.len - held;
                            join(pieces, Piece::Zero { len });
                        }
                    }
                },
            }
            at += range.len;
        }
        if at < end {
            // A backing file that is shorter than what lies on it.
            join(pieces, Piece::Zero { len: end - at });
        }
        Ok(())
    }

    /// Finds where a range may be written in place, as [`Qcow2::map_read`].
    pub(crate) fn map_write(
        &self,
        cursor: &mut Cursor,
        offset: u64,
        len: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Miss> {
        pieces.clear();
        let own = cursor.layers.first_mut().ok_or(Miss::Unfit)?;
        let shared = self.shared();
        if shared.corrupt.load(Ordering::Acquire) || shared.recorder.is_idle() {
            return Err(Miss::Unfit);
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            match self.quick_range(own, at, end - at)? {
                Range {
                    len,
                    kind: Kind::Data { host, sole: true },
                } if !own.holds_suspect(self, at) => {
                    join(
                        pieces,
                        Piece::File {
                            file: 0,
                            offset: host,
                            len,
                        },
                    );
                    at += len;
                }
                _ => return Err(Miss::Unfit),
            }
        }
        if shared.recorder.noted(offset, len) {
            Ok(())
        } else {
            Err(Miss::Unfit)
        }
    }

    /// The range at `offset`, up to `max` bytes long, unless only a slower look can tell.
    fn quick_range(&self, cursor: &mut LayerCursor, offset: u64, max: u64) -> Result<Range, Miss> {
        let geometry = self.geometry();
        if geometry.extended {
            // Two words are one entry there: only the lock keeps them together.
            let mut meta = self.try_lock().ok_or(Miss::Unloaded)?;
            let range = meta.range(offset, max, false);
            return range.map_err(|_| Miss::Unfit)?.ok_or(Miss::Unloaded);
        }
        // Not before the caller's pin: see `Qcow2::exclusive`.
        let generation = self.shared().generation.load(Ordering::SeqCst);
        if cursor.generation != generation || cursor.slots.is_empty() {
            cursor.slots.clear();
            cursor
                .slots
                .resize(usize::try_from(SLOTS).unwrap_or(1), Slot::default());
            cursor.generation = generation;
        }
        let shift = self.slice_bits();
        let slice = offset >> shift;
        let slot = cursor
            .slots
            .get_mut(usize::try_from(slice % SLOTS).unwrap_or(0))
            .ok_or(Miss::Unfit)?;
        if slot.slice != slice + 1 {
            let mut meta = self.try_lock().ok_or(Miss::Unloaded)?;
            slot.page = match meta.l2_page(offset, false).map_err(|_| Miss::Unfit)? {
                Lookup::Miss => return Err(Miss::Unloaded),
                Lookup::NoTable => None,
                Lookup::Page { page, .. } => Some(page),
            };
            slot.slice = slice + 1;
        }
        let left = ((slice + 1) << shift) - offset;
        let max = max.min(left);
        let Some(page) = &slot.page else {
            return Ok(Range {
                len: max,
                kind: Kind::Absent,
            });
        };
        page.touch();
        let mut word =
            usize::try_from((offset >> geometry.cluster_bits) & self.slice_mask()).unwrap_or(0);
        let mut found: Option<Range> = None;
        let mut at = offset;
        while at < offset + max {
            let entry = entry::l2(page.get(word), 0, geometry).map_err(|_| Miss::Unfit)?;
            let part = (geometry.cluster() - geometry.within(at)).min(offset + max - at);
            let next = simple(entry, geometry.within(at), part).ok_or(Miss::Unfit)?;
            if !extend(&mut found, next) {
                break;
            }
            at += part;
            word += 1;
        }
        found.ok_or(Miss::Unfit)
    }

    /// Loads the tables that say where a range is; `deep`: in the images below too, where it is there.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` for tables that make no sense.
    pub(crate) fn load(&self, offset: u64, len: u64, deep: bool) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.disk_size());
        let mut at = offset;
        while at < end {
            let range = {
                let mut meta = self.lock();
                meta.load_ahead(at)?;
                meta.range(at, end - at, true)?.ok_or_else(eio)?
            };
            if range.kind == Kind::Absent
                && deep
                && let Some(Backing::Qcow2(next)) = self.below()
            {
                next.load(at, range.len, deep)?;
            }
            at += range.len;
        }
        Ok(())
    }

    /// Which part of the disk [`Qcow2::load`] loads the tables of together, if there is room for them.
    pub(crate) fn loaded_with(&self, offset: u64) -> u64 {
        offset >> (self.slice_bits() + AHEAD.trailing_zeros())
    }
}

impl LayerCursor {
    fn holds_suspect(&self, image: &Qcow2, offset: u64) -> bool {
        if image.geometry().extended {
            let page = image.try_lock().map(|mut meta| meta.l2_page(offset, false));
            return !matches!(page, Some(Ok(Lookup::Page { page, .. })) if !page.is_suspect());
        }
        let slice = offset >> image.slice_bits();
        let slot = usize::try_from(slice % SLOTS).unwrap_or(0);
        self.slots
            .get(slot)
            .and_then(|slot| slot.page.as_ref())
            .is_some_and(|page| page.is_suspect())
    }
}

/// The range of an entry that is of one kind throughout; `None` for an extended entry with parts.
fn simple(entry: L2, within: u64, len: u64) -> Option<Range> {
    let kind = match entry {
        L2::Absent => Kind::Absent,
        L2::Zero { host, .. } => Kind::Zero {
            host: host.map(|host| host + within),
        },
        L2::Data { host, copied } => Kind::Data {
            host: host + within,
            sole: copied,
        },
        L2::Compressed(compressed) => Kind::Compressed(compressed),
        L2::Parts { .. } => return None,
    };
    Some(Range { len, kind })
}

/// Adds a range that follows `found`, if it is of the same kind; whether it was.
fn extend(found: &mut Option<Range>, next: Range) -> bool {
    let Some(found) = found else {
        *found = Some(next);
        return !matches!(next.kind, Kind::Compressed(_));
    };
    let same = match (found.kind, next.kind) {
        (Kind::Absent, Kind::Absent) | (Kind::Zero { host: None }, Kind::Zero { host: None }) => {
            true
        }
        (Kind::Zero { host: Some(a) }, Kind::Zero { host: Some(b) }) => a + found.len == b,
        (Kind::Data { host: a, sole: x }, Kind::Data { host: b, sole: y }) => {
            a + found.len == b && x == y
        }
        _ => false,
    };
    if same {
        found.len += next.len;
    }
    same
}

impl Meta {
    /// Loads the page with the entry for `offset` and, in the same read, those beside it in the table, as long as the
    /// cache has room to spare. Does nothing when the page is there.
    fn load_ahead(&mut self, offset: u64) -> io::Result<()> {
        let size = self.pages.size();
        let ahead = size * AHEAD;
        if !matches!(self.l2_page(offset, false)?, Lookup::Miss) || !self.pages.has_room(AHEAD) {
            return Ok(());
        }
        let place = self.place(offset);
        let Some(table) = self.table(place.table)? else {
            return Ok(());
        };
        let first = place.page - place.page % ahead;
        let len = ahead.min(self.geometry.cluster() - first);
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        // Whoever needs one of them finds the error, if it is that page's.
        if self.storage.read_at(&mut bytes, table + first).is_err() {
            return Ok(());
        }
        let chunks = bytes.chunks_exact(usize::try_from(size).map_err(io::Error::other)?);
        for (at, bytes) in (table + first..)
            .step_by(usize::try_from(size).map_err(io::Error::other)?)
            .zip(chunks)
        {
            if self.pages.get(at).is_none() {
                let page = self.pages.insert(at, Page::new(bytes));
                if !self.read_only && self.judge(&page).is_err() {
                    page.suspect();
                }
            }
        }
        Ok(())
    }

    /// The range at `offset`, up to `max` bytes long; `None` when a page would have to be loaded and
    /// `load` forbids it.
    pub(crate) fn range(&mut self, offset: u64, max: u64, load: bool) -> io::Result<Option<Range>> {
        let geometry = self.geometry;
        let (page, left) = match self.l2_page(offset, load)? {
            Lookup::Miss => return Ok(None),
            Lookup::NoTable => {
                let left =
                    (1 << geometry.table_bits()) - (offset & ((1 << geometry.table_bits()) - 1));
                return Ok(Some(Range {
                    len: max.min(left),
                    kind: Kind::Absent,
                }));
            }
            Lookup::Page { page, .. } => {
                let entries = self.pages.size() / geometry.entry_size();
                let slice = entries << geometry.cluster_bits;
                (page, slice - offset % slice)
            }
        };
        let max = max.min(left);
        let step = if geometry.extended { 2 } else { 1 };
        let mut word = self.place(offset).word;
        let mut found = None;
        let mut at = offset;
        while at < offset + max {
            let entry = self.l2_entry(&page, word, at)?;
            let within = geometry.within(at);
            let part = (geometry.cluster() - within).min(offset + max - at);
            let next = match simple(entry, within, part) {
                Some(next) => next,
                None => part_range(entry, within, part, geometry.grain()),
            };
            let len = next.len;
            if !extend(&mut found, next) {
                break;
            }
            at += len;
            if geometry.within(at) == 0 {
                word += step;
            }
        }
        Ok(found)
    }
}

/// The first subclusters of one kind from `within` on.
fn part_range(entry: L2, within: u64, len: u64, grain: u64) -> Range {
    let L2::Parts {
        host,
        copied,
        allocated,
        zero,
    } = entry
    else {
        return Range {
            len,
            kind: Kind::Absent,
        };
    };
    let state = |at: u64| {
        let bit = 1_u32.checked_shl(u32::try_from(at / grain).unwrap_or(32));
        let bit = bit.unwrap_or(0);
        (allocated & bit != 0, zero & bit != 0)
    };
    let first = state(within);
    let mut end = within;
    while end < within + len && state(end) == first {
        end = (end / grain + 1) * grain;
    }
    let at = host.map(|host| host + within);
    let kind = match (first, at) {
        ((true, _), Some(host)) => Kind::Data { host, sole: copied },
        ((_, true), host) => Kind::Zero { host },
        _ => Kind::Absent,
    };
    Range {
        len: (end - within).min(len),
        kind,
    }
}
