//! Makes new images.
//!
//! The file is laid out front to back: header, refcount table, refcount blocks, L1 table, and with preallocation
//! the L2 tables and the data. The header is written last, so that a file is an image only once it is complete.

use std::io;

use serde::{Deserialize, Serialize};

use super::entry::COPIED;
use super::extension::{FeatureKind, FeatureNames};
use super::geometry::{CLUSTER_BITS, Geometry};
use super::header::{
    BACKING_NAME_MAX, COMPRESSION, Compression, DATA_FILE, EXTENDED_L2, Header, HeaderError,
    L1_MAX, LAZY_REFCOUNTS, OFFSET_END, RAW_DATA_FILE, REFTABLE_MAX,
};
use super::refblock;
use crate::storage::Storage;

/// How much is written at once, in bytes: a multiple of every cluster size's table entries.
const CHUNK: u64 = 1 << 20;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CreateOptions {
    /// The size of the disk in bytes; it is rounded up to a sector of 512 bytes.
    pub size: u64,
    /// The format's version: 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// The size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// The width of refcounts: a power of two from 1 to 64; version 2 has 16 only.
    pub refcount_bits: u32,
    /// The name and the format of the backing file. Both must be given.
    pub backing: Option<(String, Option<String>)>,
    /// Whether refcount updates may be put off.
    pub lazy_refcounts: bool,
    /// Whether L2 entries have subclusters; for clusters from 16 KiB.
    pub extended_l2: bool,
    /// How clusters get compressed.
    pub compression: Compression,
    /// The name of the data file.
    pub data_file: Option<String>,
    /// The data file alone must stay a valid raw image of the disk.
    pub data_file_raw: bool,
    /// What is allocated beforehand.
    pub preallocation: Preallocation,
    /// The encryption to use: none is supported, and whatever is asked for gets refused by its name.
    pub encryption: Option<String>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            backing: None,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            encryption: None,
        }
    }
}

/// What is allocated when an image is made, or grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All clusters get their place in the file, which stays sparse.
    Metadata,
    /// Also, the host reserves the space.
    Falloc,
    /// Also, zeros are written to it.
    Full,
}

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A cluster size that does not exist.
    #[error("cluster_size={0}: it must be a power of two from 512 to 2M")]
    ClusterSize(u64),
    /// A refcount width that does not exist.
    #[error("refcount_bits={0}: it must be a power of two from 1 to 64")]
    RefcountBits(u32),
    /// A version that does not exist.
    #[error("qcow2 version {0}: it must be 2 (compat=0.10) or 3 (compat=1.1)")]
    Version(u32),
    /// Something that version 2 does not have.
    #[error("{0} needs compat=1.1")]
    NeedsVersion3(&'static str),
    /// Subclusters would be too small.
    #[error("extended_l2=on needs a cluster_size of at least 16k, not {0} bytes")]
    ExtendedClusters(u64),
    /// A raw data file without its name.
    #[error("data_file_raw=on needs a data_file")]
    RawDataFile,
    /// The data file would not be the disk.
    #[error("data_file_raw=on and a backing file exclude each other")]
    RawWithBacking,
    /// Preallocated clusters would hide the backing file.
    #[error("preallocation with a backing file needs extended_l2=on")]
    PreallocatedBacking,
    /// The backing file's format is not given.
    #[error("the format of backing file {0:?} must be stated")]
    BackingFormat(String),
    /// No name, or one that is too long.
    #[error("the backing file's name has {0} bytes; it must have from 1 to {BACKING_NAME_MAX}")]
    BackingName(usize),
    /// Encryption is not supported.
    #[error("{0} encryption is not supported")]
    Encryption(String),
    /// The disk, or the file it needs, is too large.
    #[error(
        "a disk of {size} bytes is too large for clusters of {cluster_size} bytes: try larger ones"
    )]
    TooLarge {
        /// The disk's size in bytes.
        size: u64,
        /// The cluster size in bytes.
        cluster_size: u64,
    },
    /// The data file was named, but not opened; or opened, but not named.
    #[error("a data file must be both named and opened")]
    DataFile,
    /// The names do not fit into the first cluster.
    #[error("the header cannot be written")]
    Header(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The host's error.
    #[error("the new image cannot be written")]
    Write(#[from] io::Error),
}

impl From<HeaderError> for CreateError {
    fn from(error: HeaderError) -> Self {
        Self::Header(Box::new(error))
    }
}

impl CreateOptions {
    fn check(&self) -> Result<(), CreateError> {
        let bits = self.cluster_size.checked_ilog2().unwrap_or(0);
        if !self.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return Err(CreateError::ClusterSize(self.cluster_size));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(CreateError::RefcountBits(self.refcount_bits));
        }
        if let Some(name) = &self.encryption {
            return Err(CreateError::Encryption(name.clone()));
        }
        self.check_version()?;
        if self.extended_l2 && bits < 14 {
            return Err(CreateError::ExtendedClusters(self.cluster_size));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(CreateError::RawDataFile);
        }
        self.check_backing()
    }

    fn check_version(&self) -> Result<(), CreateError> {
        let newer = [
            (self.refcount_bits != 16, "a refcount_bits other than 16"),
            (self.lazy_refcounts, "lazy_refcounts=on"),
            (self.extended_l2, "extended_l2=on"),
            (
                self.compression != Compression::Zlib,
                "a compression_type other than zlib",
            ),
            (self.data_file.is_some(), "data_file"),
        ];
        match self.version {
            2 => newer
                .iter()
                .find(|(used, _)| *used)
                .map_or(Ok(()), |(_, name)| Err(CreateError::NeedsVersion3(name))),
            3 => Ok(()),
            other => Err(CreateError::Version(other)),
        }
    }

    fn check_backing(&self) -> Result<(), CreateError> {
        let Some((name, format)) = &self.backing else {
            return Ok(());
        };
        if name.is_empty() || name.len() > BACKING_NAME_MAX {
            return Err(CreateError::BackingName(name.len()));
        }
        if format.is_none() {
            return Err(CreateError::BackingFormat(name.clone()));
        }
        if self.data_file_raw {
            return Err(CreateError::RawWithBacking);
        }
        if self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(CreateError::PreallocatedBacking);
        }
        Ok(())
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_size.ilog2(),
            extended: self.extended_l2,
            refcount_order: self.refcount_bits.ilog2(),
            version: self.version,
            data_file: self.data_file.is_some(),
        }
    }

    /// Whether all L2 tables are made now. In a raw data file all is mapped, always.
    fn maps_all(&self) -> bool {
        self.preallocation != Preallocation::Off || self.data_file_raw
    }

    fn header(&self, layout: &Layout) -> Header {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let (backing, backing_format) = match self.backing.clone() {
            Some((name, format)) => (Some(name.into()), format),
            None => (None, None),
        };
        let version3 = self.version >= 3;
        Header {
            version: self.version,
            cluster_bits: layout.geometry.cluster_bits,
            size: layout.size,
            l1_offset: if layout.l1.count == 0 {
                0
            } else {
                layout.offset(layout.l1.start)
            },
            l1_entries: layout.l1_entries,
            reftable_offset: layout.offset(layout.reftable.start),
            reftable_clusters: layout.reftable_clusters,
            snapshot_offset: 0,
            snapshots: 0,
            incompatible: bit(self.data_file.is_some(), DATA_FILE)
                | bit(self.compression != Compression::Zlib, COMPRESSION)
                | bit(self.extended_l2, EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, LAZY_REFCOUNTS),
            autoclear: bit(self.data_file_raw, RAW_DATA_FILE),
            refcount_order: layout.geometry.refcount_order,
            header_length: if version3 {
                Header::LENGTH
            } else {
                Header::LENGTH_V2
            },
            compression: self.compression,
            crypt: 0,
            backing,
            backing_format,
            data_file: self.data_file.clone().map(Into::into),
            // In small clusters the room is for the names of files.
            feature_names: (version3 && self.cluster_size > 4096).then(feature_names),
            bitmaps: None,
            unknown_fields: Vec::new(),
            unknown_extensions: Vec::new(),
        }
    }
}

/// The names that QEMU gives the features, for its users to recognise.
fn feature_names() -> FeatureNames {
    use FeatureKind::{Autoclear, Compatible, Incompatible};
    FeatureNames::new(&[
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ])
}

/// A run of clusters.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    start: u64,
    count: u64,
}

/// Where everything goes, in clusters.
#[derive(Debug)]
struct Layout {
    geometry: Geometry,
    size: u64,
    l1_entries: u32,
    reftable_clusters: u32,
    reftable: Run,
    refblocks: Run,
    l1: Run,
    l2: Run,
    /// The data within this file; empty with a data file.
    data: Run,
    /// How many clusters the disk has.
    guest_clusters: u64,
    total: u64,
}

impl Layout {
    fn new(options: &CreateOptions) -> Result<Self, CreateError> {
        let geometry = options.geometry();
        let too_large = || CreateError::TooLarge {
            size: options.size,
            cluster_size: options.cluster_size,
        };
        let size = options
            .size
            .checked_next_multiple_of(512)
            .ok_or_else(too_large)?;
        let entries = geometry.l1_entries(size);
        if entries > L1_MAX / 8 {
            return Err(too_large());
        }
        let guest_clusters = geometry.clusters(size);
        let l2 = if options.maps_all() { entries } else { 0 };
        let data = if l2 != 0 && options.data_file.is_none() {
            guest_clusters
        } else {
            0
        };
        let l1 = geometry.clusters(entries * 8);
        let rest = 1 + l1 + l2 + data;
        let (reftable, refblocks) = refcounts_for(&geometry, rest);
        let total = rest + reftable + refblocks;
        if reftable << geometry.cluster_bits > REFTABLE_MAX
            || total > OFFSET_END >> geometry.cluster_bits
        {
            return Err(too_large());
        }
        let mut next = 1;
        let mut run = |count| {
            let start = next;
            next += count;
            Run { start, count }
        };
        Ok(Self {
            geometry,
            size,
            l1_entries: u32::try_from(entries).map_err(|_| too_large())?,
            reftable_clusters: u32::try_from(reftable).map_err(|_| too_large())?,
            reftable: run(reftable),
            refblocks: run(refblocks),
            l1: run(l1),
            l2: run(l2),
            data: run(data),
            guest_clusters,
            total,
        })
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }

    /// Writes a table of big-endian numbers into a run, the rest of it as zeros.
    fn write_table(
        &self,
        storage: &dyn Storage,
        run: Run,
        entry: impl Fn(u64) -> u64,
    ) -> io::Result<()> {
        let (start, len) = (self.offset(run.start), self.offset(run.count));
        let mut chunk = Vec::new();
        let mut done = 0;
        while done < len {
            let end = (done + CHUNK).min(len);
            chunk.clear();
            (done / 8..end / 8).for_each(|index| chunk.extend(entry(index).to_be_bytes()));
            storage.write_at(&chunk, start + done)?;
            done = end;
        }
        Ok(())
    }

    /// Writes refcounts of 1 for all clusters of the layout.
    fn write_refblocks(&self, storage: &dyn Storage) -> io::Result<()> {
        let order = self.geometry.refcount_order;
        let cluster = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let per_block = 1_u64 << self.geometry.refblock_bits();
        let mut full = vec![0; cluster];
        (0..refblock::capacity(cluster, order))
            .for_each(|index| refblock::set(&mut full, index, order, 1));
        for block in 0..self.refblocks.count {
            let left = self.total.saturating_sub(block * per_block).min(per_block);
            let offset = self.offset(self.refblocks.start + block);
            if left == per_block {
                storage.write_at(&full, offset)?;
                continue;
            }
            let mut part = vec![0; cluster];
            (0..usize::try_from(left).unwrap_or(0))
                .for_each(|index| refblock::set(&mut part, index, order, 1));
            storage.write_at(&part, offset)?;
        }
        Ok(())
    }

    fn write_reftable(&self, storage: &dyn Storage) -> io::Result<()> {
        self.write_table(storage, self.reftable, |block| {
            if block < self.refblocks.count {
                self.offset(self.refblocks.start + block)
            } else {
                0
            }
        })
    }

    /// Writes the L1 table, and the L2 tables if there are any.
    fn write_mapping(&self, storage: &dyn Storage, options: &CreateOptions) -> io::Result<()> {
        if self.l2.count == 0 {
            if storage.grows_zeroed() {
                return Ok(());
            }
            return storage.zero(self.offset(self.l1.start), self.offset(self.l1.count));
        }
        self.write_table(storage, self.l1, |table| {
            if table < self.l2.count {
                COPIED | self.offset(self.l2.start + table)
            } else {
                0
            }
        })?;
        let words = self.geometry.entry_size() / 8;
        // What the backing file has must stay visible: clusters are reserved, but nothing is in them.
        let parts = if options.backing.is_some() {
            0
        } else {
            u64::from(u32::MAX)
        };
        self.write_table(storage, self.l2, |word| {
            let cluster = word / words;
            if cluster >= self.guest_clusters {
                0
            } else if word % words == 1 {
                parts
            } else {
                COPIED | self.offset(self.data.start_for(options) + cluster)
            }
        })
    }
}

impl Run {
    /// Where data starts: in a data file, each cluster is at its guest offset.
    fn start_for(self, options: &CreateOptions) -> u64 {
        if options.data_file.is_some() {
            0
        } else {
            self.start
        }
    }
}

/// How many clusters the refcount table and the refcount blocks need that count themselves and `rest`
/// other clusters.
fn refcounts_for(geometry: &Geometry, rest: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed = (rest + table + blocks).div_ceil(1 << geometry.refblock_bits());
        let needed_table = geometry.clusters(needed * 8);
        if needed <= blocks && needed_table <= table {
            return (table, blocks);
        }
        blocks = blocks.max(needed);
        table = table.max(needed_table);
    }
}

/// How long the file of an image with these options becomes when all of its disk is written, in bytes; with a data
/// file, both files together.
///
/// # Errors
///
/// As [`create`], but for the host's.
pub(crate) fn full_size(options: &CreateOptions) -> Result<u64, CreateError> {
    options.check()?;
    let mapped = CreateOptions {
        preallocation: Preallocation::Metadata,
        data_file: None,
        data_file_raw: false,
        ..options.clone()
    };
    let layout = Layout::new(&mapped)?;
    Ok(layout.offset(layout.total))
}

/// Makes a new image of `storage`, whose contents are lost, as those of the data file.
///
/// A regular file becomes as long as it must be. When this fails, there is no image.
///
/// # Errors
///
/// Options that contradict each other or that the format cannot do, and the host's.
pub(crate) fn create(
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    options: &CreateOptions,
) -> Result<(), CreateError> {
    options.check()?;
    if data.is_some() != options.data_file.is_some() {
        return Err(CreateError::DataFile);
    }
    let layout = Layout::new(options)?;
    let header = options.header(&layout);
    // Whether all fits is to be known before anything is lost.
    header.encode()?;
    clear(storage)?;
    storage.set_len(layout.offset(layout.total))?;
    let (start, len) = (
        layout.offset(layout.data.start),
        layout.offset(layout.data.count),
    );
    preallocate(storage, start, len, options.preallocation)?;
    if let Some(data) = data {
        data.set_len(0)?;
        data.set_len(layout.size)?;
        preallocate(data, 0, layout.size, options.preallocation)?;
        if options.data_file_raw && !data.grows_zeroed() {
            data.zero(0, layout.size)?;
        }
        data.sync()?;
    }
    layout.write_refblocks(storage)?;
    layout.write_reftable(storage)?;
    layout.write_mapping(storage, options)?;
    storage.sync()?;
    header.store(storage)?;
    storage.sync()?;
    Ok(())
}

/// Makes an image that may have been there unusable, before its parts get overwritten.
fn clear(storage: &dyn Storage) -> io::Result<()> {
    storage.set_len(0)?;
    if !storage.grows_zeroed() {
        storage.write_at(&[0; 4096], 0)?;
        storage.sync()?;
    }
    Ok(())
}

/// Makes all of a range zeros, in the way that is asked for.
pub(crate) fn preallocate(
    storage: &dyn Storage,
    offset: u64,
    len: u64,
    how: Preallocation,
) -> io::Result<()> {
    if len == 0 || how == Preallocation::Off {
        return Ok(());
    }
    if how == Preallocation::Full {
        let zeros = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
        let mut done = 0;
        while done < len {
            let part = usize::try_from((len - done).min(CHUNK)).unwrap_or(0);
            storage.write_at(zeros.get(..part).unwrap_or_default(), offset + done)?;
            done += part as u64;
        }
        return Ok(());
    }
    if !storage.grows_zeroed() {
        storage.zero(offset, len)?;
    }
    if how == Preallocation::Falloc {
        storage.reserve(offset, len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
