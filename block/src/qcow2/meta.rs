//! An image's tables in memory: what the image's one lock guards.
//!
//! The L1 table and the refcount table are held whole; L2 tables and refcount blocks are in
//! [`Pages`]. Nothing here is on disk before a checkpoint has written it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::bitmap_table::Bitmap;
use super::claims::Claims;
use super::clusters::Clusters;
use super::dirty::Recorder;
use super::entry::{self, L2};
use super::epoch::Epochs;
use super::fields::u64_at;
use super::geometry::Geometry;
use super::header::Header;
use super::pages::{MAX_PAGE, Page, Pages, Stage};
use crate::storage::Storage;

/// How many bytes of a table held whole are written together: an atomic sector.
pub(crate) const TABLE_SECTOR: usize = 512;

/// How much of a table held whole is read at once, in bytes.
const TABLE_CHUNK: usize = 64 << 10;

/// Bits of a refcount table entry that are not the block's offset.
const REFTABLE_RESERVED: u64 = 0x1ff;

/// Clusters that nothing in memory refers to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unlinked {
    /// The first cluster's number.
    pub first: u64,
    /// How many clusters.
    pub count: u64,
    /// What [`Epochs::advance`] gave when they were taken out.
    pub tag: u64,
}

/// A refcount table that is to take the old one's place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableMove {
    /// Where the new one is, and how many clusters it has.
    pub to: (u64, u32),
    /// The same of the old one.
    pub from: (u64, u32),
}

/// What queues may look at without the lock.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Who uses what was looked up.
    pub epochs: Arc<Epochs>,
    /// Changes when a page that a cursor may hold stops being the right one.
    pub generation: AtomicU64,
    /// Something is in memory that a flush has to write.
    pub dirty: AtomicBool,
    /// The image is known to be corrupt: nothing may be written any more.
    pub corrupt: AtomicBool,
    /// One past the highest host byte that was ever allocated.
    pub high_water: AtomicU64,
    /// The bitmaps that record changes.
    pub recorder: Recorder,
}

/// The tables of one image.
#[derive(Debug)]
pub(crate) struct Meta {
    pub geometry: Geometry,
    pub header: Header,
    pub storage: Arc<dyn Storage>,
    pub shared: Arc<Shared>,
    pub read_only: bool,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// Which sectors of it have changed.
    pub l1_dirty: BTreeSet<usize>,
    pub reftable: Vec<u64>,
    pub reftable_dirty: BTreeSet<usize>,
    pub reftable_move: Option<TableMove>,
    pub pages: Pages,
    /// L2 tables that no L1 entry on disk points to yet, with their L1 indices.
    pub new_tables: HashMap<u64, usize>,
    /// The numbers of all clusters with metadata. No guest data is ever written there. Empty on a read-only image.
    pub metadata: Clusters,
    /// Free clusters below the frontier, as first cluster and count.
    pub free: BTreeMap<u64, u64>,
    /// From here up to `scan_end`, refcounts have not been searched for free clusters.
    pub scan: u64,
    pub scan_end: u64,
    /// No cluster from here on has ever been used.
    pub frontier: u64,
    /// Clusters from here on read as zeros.
    pub fresh: u64,
    /// Taken out of the mapping since the last checkpoint began.
    pub unlinked: Vec<Unlinked>,
    /// Taken out of the mapping on disk too; waiting for their last users.
    pub released: VecDeque<Unlinked>,
    /// Guest clusters that a write is about to map.
    pub in_flight: HashSet<u64>,
    /// Who is to be told when clusters leave `in_flight`.
    pub waiters: Vec<Arc<EventFd>>,
    /// The first corruption that was found, until somebody asks.
    pub finding: Option<String>,
    /// The header on disk may not be this one: a change of it has failed.
    pub stale: bool,
    /// The image is marked dirty for the time of a change.
    pub marked: bool,
    /// The bitmap directory of a writable image.
    pub bitmaps: Vec<Bitmap>,
    /// How far compressed data has filled its last cluster, as a host offset.
    pub compressed_end: u64,
}

/// A failure because the image contradicts itself.
pub(crate) fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Meta {
    /// Loads the tables that are held whole. `cache` is the budget for the others, in bytes.
    pub(crate) fn load(
        header: Header,
        storage: Arc<dyn Storage>,
        read_only: bool,
        cache: usize,
    ) -> io::Result<Self> {
        let geometry = header.geometry();
        let end = geometry.clusters(storage.len()?);
        let l1_bytes = u64::from(header.l1_entries) * 8;
        inside(&geometry, end, "L1 table", header.l1_offset, l1_bytes)?;
        let l1 = read_table(&*storage, header.l1_offset, header.l1_entries as usize)?;
        let clusters = u64::from(header.reftable_clusters);
        let reftable = if read_only {
            Vec::new()
        } else {
            let bytes = clusters * geometry.cluster();
            inside(
                &geometry,
                end,
                "refcount table",
                header.reftable_offset,
                bytes,
            )?;
            let entries = usize::try_from(bytes / 8).unwrap_or(usize::MAX);
            read_table(&*storage, header.reftable_offset, entries)?
        };
        let page = geometry.cluster().min(MAX_PAGE);
        let mut meta = Self {
            geometry,
            header,
            storage,
            shared: Arc::default(),
            read_only,
            l1,
            l1_dirty: BTreeSet::new(),
            reftable,
            reftable_dirty: BTreeSet::new(),
            reftable_move: None,
            pages: Pages::new(usize::try_from(page).unwrap_or(4096), cache),
            new_tables: HashMap::new(),
            metadata: Clusters::default(),
            free: BTreeMap::new(),
            scan: 0,
            scan_end: end,
            frontier: end,
            fresh: end,
            unlinked: Vec::new(),
            released: VecDeque::new(),
            in_flight: HashSet::new(),
            waiters: Vec::new(),
            finding: None,
            stale: false,
            marked: false,
            bitmaps: Vec::new(),
            compressed_end: 0,
        };
        if !read_only {
            meta.find_metadata()?;
            meta.load_bitmaps()?;
            if !meta.storage.grows_zeroed() {
                meta.find_frontier()?;
            }
        }
        let high = meta.frontier.saturating_mul(geometry.cluster());
        meta.shared.high_water.store(high, Ordering::Relaxed);
        Ok(meta)
    }

    /// Notes that a flush has something to write.
    pub(crate) fn soil(&self) {
        self.shared.dirty.store(true, Ordering::Release);
    }

    /// Marks the image corrupt, in memory and in its header, and gives the error that the request ends with.
    pub(crate) fn corrupt(&mut self, finding: String) -> io::Error {
        if self.read_only || self.shared.corrupt.swap(true, Ordering::SeqCst) {
            return eio();
        }
        tracing::error!(%finding, "the image is corrupt; nothing is written to it any more");
        self.finding = Some(finding);
        self.header.incompatible |= super::header::CORRUPT;
        // Version 2 has no place for the bit. Failing to set it changes nothing about refusing.
        if self.geometry.version >= 3 {
            let stored = self
                .header
                .store_features(&*self.storage)
                .and_then(|()| self.storage.sync());
            if let Err(error) = stored {
                tracing::warn!(%error, "the image could not be marked as corrupt");
            }
        }
        eio()
    }

    /// Refuses changes to an image that must not be written.
    pub(crate) fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if self.shared.corrupt.load(Ordering::SeqCst) {
            return Err(eio());
        }
        Ok(())
    }

    /// The page at a host offset of a table, loaded if `load`; `None` when it is not in memory.
    pub(crate) fn page(&mut self, at: u64, load: bool) -> io::Result<Option<Arc<Page>>> {
        if let Some(page) = self.pages.get(at) {
            return Ok(Some(page));
        }
        if !load {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(self.pages.size()).unwrap_or(4096)];
        self.storage.read_at(&mut bytes, at)?;
        Ok(Some(self.pages.insert(at, Page::new(&bytes))))
    }

    /// Where the L2 table of a guest offset is; `None` when there is none.
    pub(crate) fn table(&mut self, index: usize) -> io::Result<Option<u64>> {
        let Some(&entry) = self.l1.get(index) else {
            return Ok(None);
        };
        match entry::l1(entry, &self.geometry) {
            Ok(table) => Ok(table),
            Err(error) => Err(self.corrupt(format!("L1 entry {index}: {error}"))),
        }
    }

    /// Where in its L2 table the entry for a guest offset is.
    pub(crate) fn place(&self, offset: u64) -> Place {
        let geometry = &self.geometry;
        let number = (offset >> geometry.cluster_bits) & (geometry.l2_entries() - 1);
        let byte = number * geometry.entry_size();
        let within = byte & (self.pages.size() - 1);
        Place {
            table: usize::try_from(offset >> geometry.table_bits()).unwrap_or(usize::MAX),
            page: byte - within,
            word: usize::try_from(within / 8).unwrap_or(0),
        }
    }

    /// The page with the L2 entry for a guest offset. `Ok(None)`: there is no table.
    ///
    /// A page that has to be loaded gives [`Lookup::Miss`] unless `load`.
    pub(crate) fn l2_page(&mut self, offset: u64, load: bool) -> io::Result<Lookup> {
        let place = self.place(offset);
        let Some(table) = self.table(place.table)? else {
            return Ok(Lookup::NoTable);
        };
        let at = table + place.page;
        if let Some(page) = self.pages.get(at) {
            return Ok(Lookup::Page { page, at });
        }
        if !load {
            return Ok(Lookup::Miss);
        }
        let page = self.table_page(at)?;
        Ok(Lookup::Page { page, at })
    }

    /// The page of an L2 table at a host offset.
    pub(crate) fn table_page(&mut self, at: u64) -> io::Result<Arc<Page>> {
        if let Some(page) = self.pages.get(at) {
            return Ok(page);
        }
        let page = self.page(at, true)?.ok_or_else(eio)?;
        if !self.read_only {
            self.judge(&page)?;
        }
        Ok(page)
    }

    /// Decodes the L2 entry at a place.
    pub(crate) fn l2_entry(&mut self, page: &Page, word: usize, offset: u64) -> io::Result<L2> {
        let bitmap = if self.geometry.extended {
            page.get(word + 1)
        } else {
            0
        };
        entry::l2(page.get(word), bitmap, &self.geometry)
            .map_err(|error| self.corrupt(format!("L2 entry for offset {offset:#x}: {error}")))
    }

    /// Looks whether all entries of a freshly loaded L2 page may be written through: not
    /// to metadata, and not to clusters that count as free.
    pub(crate) fn judge(&mut self, page: &Page) -> io::Result<()> {
        if self.geometry.data_file {
            return Ok(());
        }
        let step = if self.geometry.extended { 2 } else { 1 };
        for word in (0..page.len()).step_by(step) {
            let raw = page.get(word);
            if raw == 0 || raw & entry::COMPRESSED != 0 {
                continue;
            }
            let cluster = (raw & entry::OFFSET) >> self.geometry.cluster_bits;
            if raw & entry::OFFSET != 0
                && (self.metadata.contains(cluster) || self.refcount(cluster)? == 0)
            {
                page.suspect();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Refuses to write to a host cluster that a table on disk claims for metadata or counts as free.
    pub(crate) fn check_target(&mut self, host: u64) -> io::Result<()> {
        if self.geometry.data_file {
            return Ok(());
        }
        let cluster = host >> self.geometry.cluster_bits;
        if self.metadata.contains(cluster) {
            return Err(self.corrupt(format!(
                "a write to host offset {host:#x} would overwrite metadata"
            )));
        }
        if self.refcount(cluster)? == 0 {
            return Err(self.corrupt(format!(
                "the cluster at host offset {host:#x} is in use and counts as free"
            )));
        }
        Ok(())
    }

    /// Sets a sector of a table that is held whole as changed.
    pub(crate) fn l1_changed(&mut self, index: usize) {
        self.l1_dirty.insert(index * 8 / TABLE_SECTOR);
        self.soil();
    }

    /// As [`Meta::l1_changed`] for the refcount table.
    pub(crate) fn reftable_changed(&mut self, index: usize) {
        self.reftable_dirty.insert(index * 8 / TABLE_SECTOR);
        self.soil();
    }

    /// When a changed page of the L2 table at `table` is to be written.
    pub(crate) fn table_stage(&self, table: u64) -> Stage {
        if self.new_tables.contains_key(&table) {
            Stage::Early
        } else {
            Stage::Late
        }
    }

    /// Marks a page of the L2 table at `table` as changed.
    pub(crate) fn mark_l2(&mut self, table: u64, page_at: u64) {
        let stage = self.table_stage(table);
        self.pages.mark(page_at, stage);
        self.soil();
    }

    /// The host offset of the block at an index of the refcount table.
    pub(crate) fn refblock(&mut self, index: usize) -> io::Result<Option<u64>> {
        let Some(&entry) = self.reftable.get(index) else {
            return Ok(None);
        };
        if entry & REFTABLE_RESERVED != 0 || self.geometry.within(entry) != 0 {
            return Err(self.corrupt(format!("refcount table entry {index} is {entry:#x}")));
        }
        Ok((entry != 0).then_some(entry))
    }

    /// Finds all clusters with metadata. When two tables claim the same one, or what everything else hangs on
    /// counts as free, the image is corrupt: whatever is written next would destroy some of it.
    fn find_metadata(&mut self) -> io::Result<()> {
        let cluster = self.geometry.cluster();
        let header = &self.header;
        let l1 = (header.l1_offset, u64::from(header.l1_entries) * 8);
        let reftable = u64::from(header.reftable_clusters) * cluster;
        let reftable = (header.reftable_offset, reftable);
        let mut claims = Claims::new(self.geometry);
        for (offset, len) in [(0, cluster), l1, reftable] {
            claims.own(offset, len);
        }
        for block in self.reftable.iter().filter(|entry| **entry != 0) {
            claims.own(block & !REFTABLE_RESERVED, cluster);
        }
        let tables = self.l1.iter().map(|entry| entry & entry::OFFSET);
        tables
            .filter(|table| *table != 0)
            .for_each(|table| claims.table(table));
        super::reserved::reserve(header, &*self.storage, &mut claims)?;
        let (metadata, twice) = claims.into_parts();
        self.metadata = metadata;
        if let Some(cluster) = twice {
            self.corrupt(format!("cluster {cluster} holds two kinds of metadata"));
            return Ok(());
        }
        if let Some(cluster) = self.metadata.next_from(self.frontier) {
            let finding = format!("cluster {cluster} holds metadata and is past the file's end");
            self.corrupt(finding);
            return Ok(());
        }
        for (what, (offset, len)) in [
            ("header", (0, cluster)),
            ("L1 table", l1),
            ("refcount table", reftable),
        ] {
            if len != 0 && self.refcount(offset >> self.geometry.cluster_bits)? == 0 {
                self.corrupt(format!("the {what} at {offset:#x} counts as free"));
                return Ok(());
            }
        }
        Ok(())
    }

    /// On a device the end of the file says nothing: the last used cluster does.
    pub(crate) fn find_frontier(&mut self) -> io::Result<()> {
        let bits = self.geometry.refblock_bits();
        let mut frontier = 0;
        for index in (0..self.reftable.len()).rev() {
            if self.refblock(index)?.is_none() {
                continue;
            }
            let first = (index as u64) << bits;
            for cluster in (first..first + (1 << bits)).rev() {
                if self.refcount(cluster)? != 0 {
                    frontier = cluster + 1;
                    break;
                }
            }
            if frontier != 0 {
                break;
            }
        }
        self.frontier = frontier;
        self.scan_end = frontier;
        self.fresh = u64::MAX;
        Ok(())
    }
}

/// Where an L2 entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The index of the table's L1 entry.
    pub table: usize,
    /// The offset of the page in the table, in bytes.
    pub page: u64,
    /// The entry's first word in the page.
    pub word: usize,
}

/// What a look-up of an L2 page gives.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// There is no L2 table: everything it would map is absent.
    NoTable,
    /// The page, and its host offset.
    Page {
        /// The page.
        page: Arc<Page>,
        /// Its host offset in bytes.
        at: u64,
    },
    /// It has to be loaded first.
    Miss,
}

/// Refuses a table that reaches past the end of the file: memory is only spent on what is there.
fn inside(geometry: &Geometry, end: u64, what: &str, offset: u64, len: u64) -> io::Result<()> {
    if offset.saturating_add(len) <= end << geometry.cluster_bits {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("its {what} of {len} bytes at {offset:#x} is not within the file"),
    ))
}

/// Reads a table of big-endian words. It takes memory for the parts that are not zeros.
pub(crate) fn read_table(
    storage: &dyn Storage,
    offset: u64,
    entries: usize,
) -> io::Result<Vec<u64>> {
    let mut table = vec![0; entries];
    let mut chunk = vec![0; TABLE_CHUNK.min(entries.saturating_mul(8))];
    for (words, at) in table
        .chunks_mut(TABLE_CHUNK / 8)
        .zip((offset..).step_by(TABLE_CHUNK))
    {
        chunk.truncate(words.len() * 8);
        storage.read_at(&mut chunk, at)?;
        // What is not touched takes no memory.
        for (word, bytes) in words.iter_mut().zip(chunk.chunks_exact(8)) {
            let value = u64_at(bytes, 0);
            if value != 0 {
                *word = value;
            }
        }
    }
    Ok(table)
}

/// The changed sectors of a table that is held whole, as (host offset, bytes).
pub(crate) fn table_sectors(
    table: &[u64],
    offset: u64,
    sectors: &BTreeSet<usize>,
) -> Vec<(u64, Vec<u8>)> {
    sectors
        .iter()
        .map(|&sector| {
            let words = TABLE_SECTOR / 8;
            let bytes = table
                .iter()
                .skip(sector * words)
                .take(words)
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            (offset + (sector * TABLE_SECTOR) as u64, bytes)
        })
        .collect()
}
