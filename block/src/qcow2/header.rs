//! The header ("Header") with all that belongs to it in the first cluster: extensions and the backing file's name.
//!
//! A [`Header`] that [`Header::load`] gave is within all limits: its tables are aligned, of a bearable size, and
//! below [`OFFSET_END`]; the tables' contents are not looked at. What is not known is kept and written back.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Serialize};

use super::extension::{
    BitmapsExtension, ExtensionError, Extensions, FeatureKind, FeatureNames, UnknownExtension,
};
use super::fields::{put, u32_at, u64_at};
use super::geometry::{CLUSTER_BITS, Geometry};
use crate::storage::Storage;

/// Incompatible: refcounts may be stale, and are to be repaired before the first write.
pub(crate) const DIRTY: u64 = 1 << 0;
/// Incompatible: anything may be wrong, and only a repair may write.
pub(crate) const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in a file of its own.
pub(crate) const DATA_FILE: u64 = 1 << 2;
/// Incompatible: clusters are compressed with something else than deflate.
pub(crate) const COMPRESSION: u64 = 1 << 3;
/// Incompatible: L2 entries have subclusters.
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: refcount updates may be put off, under [`DIRTY`].
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear: the bitmaps are consistent.
pub(crate) const BITMAPS: u64 = 1 << 0;
/// Autoclear: the data file alone is the disk, as a raw image.
pub(crate) const RAW_DATA_FILE: u64 = 1 << 1;

const INCOMPATIBLE_KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// The autoclear bits that are understood here; a writer clears all others first.
pub(crate) const AUTOCLEAR_KNOWN: u64 = BITMAPS | RAW_DATA_FILE;

/// Host offsets must be below this: entries have 56 bits for them.
pub(crate) const OFFSET_END: u64 = 1 << 56;
/// The largest L1 table in bytes.
pub(crate) const L1_MAX: u64 = 32 << 20;
/// The largest refcount table in bytes.
pub(crate) const REFTABLE_MAX: u64 = 8 << 20;
/// The most snapshots.
pub(crate) const SNAPSHOTS_MAX: u32 = 65_536;
/// The most bitmaps.
pub(crate) const BITMAPS_MAX: u32 = 65_535;
/// The largest bitmap directory in bytes.
pub(crate) const BITMAP_DIRECTORY_MAX: u64 = 64 << 20;
/// The longest name of a backing file, in bytes.
pub(crate) const BACKING_NAME_MAX: usize = 1023;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Deflate, without zlib's header.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Why an image's header cannot be used, or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    /// The host's error.
    #[error("the image's header cannot be read")]
    Read(#[source] io::Error),
    /// It does not start as qcow2 does.
    #[error("not a qcow2 image: it starts with {0:#010x}")]
    Magic(u32),
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not supported, only 2 and 3")]
    Version(u32),
    /// Clusters out of range.
    #[error("clusters of 2^{0} bytes are not supported, only 2^9 to 2^21")]
    ClusterBits(u32),
    /// A length that no header has.
    #[error(
        "a header length of {0} bytes: it must be a multiple of 8 from 104 to the cluster size"
    )]
    Length(u32),
    /// Features that are not known here.
    #[error("the image uses features that are not supported: {0}")]
    Incompatible(String),
    /// The image is encrypted.
    #[error(
        "the image is encrypted ({0}), which is not supported: decrypt it with qemu-img convert"
    )]
    Encrypted(&'static str),
    /// An encryption that nobody knows.
    #[error("the image uses unknown encryption method {0}")]
    EncryptionMethod(u32),
    /// The compression type is unknown, or contradicts the feature bit.
    #[error("compression type {kind} is unknown, or does not go with the feature bit ({bit})")]
    Compression {
        /// The header's field.
        kind: u8,
        /// Whether the feature bit is set.
        bit: bool,
    },
    /// Subclusters would be smaller than a sector.
    #[error("extended L2 entries need clusters of at least 16 KiB, but clusters have 2^{0} bytes")]
    ExtendedClusters(u32),
    /// Refcounts of more than 64 bits.
    #[error("refcounts of 2^{0} bits are not supported, only up to 64 bits")]
    RefcountOrder(u32),
    /// A table does not start where a cluster does.
    #[error("the {table} starts at {offset:#x}, which is no cluster of its own")]
    TableOffset {
        /// Which.
        table: &'static str,
        /// Its offset in bytes.
        offset: u64,
    },
    /// A table has more than is supported.
    #[error("the {table} has {len} {unit}, more than the {max} that are supported")]
    TableSize {
        /// Which.
        table: &'static str,
        /// How large it is.
        len: u64,
        /// In which unit.
        unit: &'static str,
        /// The limit.
        max: u64,
    },
    /// There is no refcount table.
    #[error("the image has no refcount table: repair it with check -r all")]
    NoRefcounts,
    /// The L1 table cannot map the whole disk.
    #[error("the L1 table has {entries} entries, but a disk of {size} bytes needs {needed}")]
    L1Short {
        /// How many there are.
        entries: u32,
        /// How many there must be.
        needed: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// The name of the backing file is not within the first cluster.
    #[error(
        "the backing file's name, {len} bytes at {offset:#x}, is too long or not in the first cluster"
    )]
    BackingName {
        /// Its offset in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// An extension is bad.
    #[error("a header extension cannot be used")]
    Extension(#[from] ExtensionError),
    /// The bitmaps' fields contradict themselves.
    #[error("the bitmaps extension is invalid: {count} bitmaps in a directory of {size} bytes")]
    Bitmaps {
        /// The number of bitmaps.
        count: u32,
        /// The size of the directory in bytes.
        size: u64,
    },
    /// The data file is said to be raw, but there is none.
    #[error("the image says that its data file is raw, but has no data file")]
    RawDataFile,
    /// Snapshots need refcounts, which a data file's clusters do not have.
    #[error("the image has a data file, and {0} snapshots, which cannot be")]
    DataFileSnapshots(u32),
    /// What belongs into the first cluster is more than that.
    #[error(
        "the header with its extensions and names needs {needed} bytes, but a cluster has {cluster}"
    )]
    Full {
        /// How much it is, in bytes.
        needed: u64,
        /// The cluster size in bytes.
        cluster: u64,
    },
}

/// A header, in the file's terms: offsets and sizes in bytes unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Clusters have `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// The size of the disk.
    pub size: u64,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// How many entries it has.
    pub l1_entries: u32,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// How many clusters it has.
    pub reftable_clusters: u32,
    /// Where the snapshot table is; of no meaning without snapshots.
    pub snapshot_offset: u64,
    /// How many snapshots there are.
    pub snapshots: u32,
    /// Feature bits that a user must understand; 0 in version 2.
    pub incompatible: u64,
    /// Feature bits that need not be understood; 0 in version 2.
    pub compatible: u64,
    /// Feature bits that a writer must understand or clear; 0 in version 2.
    pub autoclear: u64,
    /// Refcounts have `1 << refcount_order` bits; 4 in version 2.
    pub refcount_order: u32,
    /// How long the header is without extensions.
    pub header_length: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The encryption: 0 for none, as nothing else loads.
    pub crypt: u32,
    /// The name of the backing file.
    pub backing: Option<OsString>,
    /// The format of the backing file.
    pub backing_format: Option<String>,
    /// The name of the data file; it may be missing though the image has one.
    pub data_file: Option<OsString>,
    /// What the image calls its features.
    pub feature_names: Option<FeatureNames>,
    /// The bitmaps extension, outdated unless [`BITMAPS`] is set: see [`Header::consistent_bitmaps`].
    pub bitmaps: Option<BitmapsExtension>,
    /// Header fields past those that are known.
    pub unknown_fields: Vec<u8>,
    /// Extensions that are not known.
    pub unknown_extensions: Vec<UnknownExtension>,
}

impl Header {
    /// The length of a version 2 header.
    pub(crate) const LENGTH_V2: u32 = 72;
    /// The shortest length of a version 3 header.
    const LENGTH_V3: u32 = 104;
    /// The length of a version 3 header that has all fields known here.
    pub(crate) const LENGTH: u32 = 112;

    const MAGIC: u32 = 0x5146_49fb;
    const BACKING: usize = 8;
    const SIZE: usize = 24;
    const L1: usize = 36;
    const REFTABLE: usize = 48;
    const SNAPSHOTS: usize = 60;
    const FEATURES: usize = 72;
    const KIND: usize = 104;

    /// Reads and validates the header of an image.
    pub(crate) fn load(storage: &dyn Storage) -> Result<Self, HeaderError> {
        let header = Self::load_unchecked(storage)?;
        header.check_refcounts()?;
        header.check_l1()?;
        header.check_snapshots()?;
        header.check_bitmaps()?;
        Ok(header)
    }

    /// Reads the header without looking at where the tables are: for those who check and repair.
    pub(crate) fn load_unchecked(storage: &dyn Storage) -> Result<Self, HeaderError> {
        let mut start = [0; Self::LENGTH as usize];
        storage.read_at(&mut start, 0).map_err(HeaderError::Read)?;
        let cluster = cluster_size(&start)?;
        // A short file is not worth the memory of a whole cluster.
        let len = cluster.min(storage.len().map_err(HeaderError::Read)?);
        let mut area = vec![0; usize::try_from(len).unwrap_or(0).max(start.len())];
        storage.read_at(&mut area, 0).map_err(HeaderError::Read)?;
        Self::decode(&area)
    }

    /// Decodes the first cluster, which may be cut where only zeros follow.
    pub(crate) fn decode(area: &[u8]) -> Result<Self, HeaderError> {
        let cluster = cluster_size(area)?;
        let mut header = Self::decode_fields(area);
        let length = header.header_length;
        // The file may end within the first cluster, but not within the header.
        let known = usize::try_from(length).unwrap_or(0);
        if header.version == 3
            && (length < Self::LENGTH_V3 || known > area.len() || !length.is_multiple_of(8))
        {
            return Err(HeaderError::Length(length));
        }
        if let Some(unknown) = area.get(Self::LENGTH as usize..known) {
            header.unknown_fields = unknown.to_vec();
        }
        let backing = backing_name(area, cluster)?;
        let end = backing.as_ref().map_or(area.len(), |(offset, _)| *offset);
        let extensions = match Extensions::decode(area.get(..end).unwrap_or(area), known) {
            // Which feature is missing says more than what is wrong with what it made of the extensions.
            Err(_) if header.incompatible & !INCOMPATIBLE_KNOWN != 0 => Extensions::default(),
            other => other?,
        };
        header.backing = backing
            .map(|(_, name)| name)
            .filter(|name| !name.is_empty());
        header.take_extensions(extensions);
        header.check_features(area)?;
        Ok(header)
    }

    fn decode_fields(area: &[u8]) -> Self {
        let version = u32_at(area, 4);
        let v3 = |value: u64| if version >= 3 { value } else { 0 };
        let (refcount_order, header_length) = if version >= 3 {
            (u32_at(area, 96), u32_at(area, 100))
        } else {
            (4, Self::LENGTH_V2)
        };
        Self {
            version,
            cluster_bits: u32_at(area, 20),
            size: u64_at(area, Self::SIZE),
            crypt: u32_at(area, 32),
            l1_entries: u32_at(area, Self::L1),
            l1_offset: u64_at(area, 40),
            reftable_offset: u64_at(area, Self::REFTABLE),
            reftable_clusters: u32_at(area, 56),
            snapshots: u32_at(area, Self::SNAPSHOTS),
            snapshot_offset: u64_at(area, 64),
            incompatible: v3(u64_at(area, Self::FEATURES)),
            compatible: v3(u64_at(area, 80)),
            autoclear: v3(u64_at(area, 88)),
            refcount_order,
            header_length,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            feature_names: None,
            bitmaps: None,
            unknown_fields: Vec::new(),
            unknown_extensions: Vec::new(),
        }
    }

    fn take_extensions(&mut self, extensions: Extensions) {
        let Extensions {
            backing_format,
            data_file,
            feature_names,
            bitmaps,
            unknown,
        } = extensions;
        self.backing_format = backing_format;
        self.data_file = data_file;
        self.feature_names = feature_names;
        self.bitmaps = bitmaps;
        self.unknown_extensions = unknown;
    }

    fn extensions(&self) -> Extensions {
        Extensions {
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            feature_names: self.feature_names.clone(),
            bitmaps: self.bitmaps,
            unknown: self.unknown_extensions.clone(),
        }
    }

    fn check_features(&mut self, area: &[u8]) -> Result<(), HeaderError> {
        let unknown = self.incompatible & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            return Err(HeaderError::Incompatible(self.names(unknown)));
        }
        match self.crypt {
            0 => {}
            1 => return Err(HeaderError::Encrypted("AES")),
            2 => return Err(HeaderError::Encrypted("LUKS")),
            other => return Err(HeaderError::EncryptionMethod(other)),
        }
        if self.refcount_order > 6 {
            return Err(HeaderError::RefcountOrder(self.refcount_order));
        }
        if self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            return Err(HeaderError::ExtendedClusters(self.cluster_bits));
        }
        let has_kind = self.header_length > Self::LENGTH_V3;
        let kind = area
            .get(Self::KIND)
            .filter(|_| has_kind)
            .copied()
            .unwrap_or(0);
        let bit = self.incompatible & COMPRESSION != 0;
        self.compression = match (kind, bit) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            _ => return Err(HeaderError::Compression { kind, bit }),
        };
        if !self.has_data_file() && self.autoclear & RAW_DATA_FILE != 0 {
            return Err(HeaderError::RawDataFile);
        }
        Ok(())
    }

    fn names(&self, bits: u64) -> String {
        let set = (0..64).filter(|bit| bits >> bit & 1 != 0);
        let name = |bit| {
            let table = self.feature_names.as_ref()?;
            table.name(FeatureKind::Incompatible, bit)
        };
        let names: Vec<String> = set
            .map(|bit| name(bit).unwrap_or_else(|| format!("unknown feature of bit {bit}")))
            .collect();
        names.join(", ")
    }

    fn check_table(&self, table: &'static str, offset: u64, len: u64) -> Result<(), HeaderError> {
        let end = offset.checked_add(len);
        let within = end.is_some_and(|end| end <= OFFSET_END);
        if offset == 0 || !offset.is_multiple_of(1 << self.cluster_bits) || !within {
            return Err(HeaderError::TableOffset { table, offset });
        }
        Ok(())
    }

    /// Whether the refcount table's place and size can be.
    pub(crate) fn check_refcounts(&self) -> Result<(), HeaderError> {
        let len = u64::from(self.reftable_clusters) << self.cluster_bits;
        if len == 0 {
            return Err(HeaderError::NoRefcounts);
        }
        limit("refcount table", len, "bytes", REFTABLE_MAX)?;
        self.check_table("refcount table", self.reftable_offset, len)
    }

    /// Whether the L1 table's place and size can be.
    pub(crate) fn check_l1(&self) -> Result<(), HeaderError> {
        let len = u64::from(self.l1_entries) * 8;
        limit("L1 table", len, "bytes", L1_MAX)?;
        let (entries, size) = (self.l1_entries, self.size);
        let needed = self.geometry().l1_entries(size);
        if u64::from(entries) < needed {
            return Err(HeaderError::L1Short {
                entries,
                needed,
                size,
            });
        }
        if entries == 0 {
            return Ok(());
        }
        self.check_table("L1 table", self.l1_offset, len)
    }

    /// Whether the snapshot table's place and number of entries can be.
    pub(crate) fn check_snapshots(&self) -> Result<(), HeaderError> {
        let (count, max) = (u64::from(self.snapshots), u64::from(SNAPSHOTS_MAX));
        limit("snapshot table", count, "entries", max)?;
        if count == 0 {
            return Ok(());
        }
        if self.has_data_file() {
            return Err(HeaderError::DataFileSnapshots(self.snapshots));
        }
        // No entry is shorter than its 40 fixed bytes.
        self.check_table("snapshot table", self.snapshot_offset, count * 40)
    }

    /// Whether the bitmap directory's place and size can be, as far as they count.
    pub(crate) fn check_bitmaps(&self) -> Result<(), HeaderError> {
        let Some(bitmaps) = self.consistent_bitmaps() else {
            return Ok(());
        };
        let (count, size) = (bitmaps.count, bitmaps.directory_size);
        limit("bitmap directory", size, "bytes", BITMAP_DIRECTORY_MAX)?;
        let (number, max) = (u64::from(count), u64::from(BITMAPS_MAX));
        limit("bitmap directory", number, "entries", max)?;
        // No entry is shorter than its 24 fixed bytes.
        if count == 0 || bitmaps.reserved != 0 || size < number * 24 {
            return Err(HeaderError::Bitmaps { count, size });
        }
        self.check_table("bitmap directory", bitmaps.directory_offset, size)
    }

    /// The bitmaps, if the last writer knew about them.
    pub(crate) fn consistent_bitmaps(&self) -> Option<BitmapsExtension> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS != 0)
    }

    /// Whether guest data is in a file of its own.
    pub(crate) fn has_data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Whether the data file alone is the disk.
    pub(crate) fn has_raw_data_file(&self) -> bool {
        self.has_data_file() && self.autoclear & RAW_DATA_FILE != 0
    }

    /// The sizes that follow.
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            extended: self.incompatible & EXTENDED_L2 != 0,
            refcount_order: self.refcount_order,
            version: self.version,
            data_file: self.has_data_file(),
        }
    }

    /// Encodes all that belongs into the first cluster; what follows it there is of no meaning.
    ///
    /// The feature names, which are advice only, are left out when there is no room for them.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        let cluster = 1 << self.cluster_bits;
        let area = self.encode_with(self.extensions());
        if area.len() as u64 <= cluster {
            return Ok(area);
        }
        let area = self.encode_with(Extensions {
            feature_names: None,
            ..self.extensions()
        });
        let needed = area.len() as u64;
        if needed > cluster {
            return Err(HeaderError::Full { needed, cluster });
        }
        Ok(area)
    }

    fn encode_with(&self, extensions: Extensions) -> Vec<u8> {
        let mut area = self.encode_fields();
        extensions.encode(&mut area);
        if let Some(name) = self.backing.as_ref().filter(|name| !name.is_empty()) {
            let offset = area.len() as u64;
            // Its length was checked when it was loaded, or is against the cluster size.
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            put(&mut area, Self::BACKING, &offset.to_be_bytes());
            put(&mut area, Self::BACKING + 8, &len.to_be_bytes());
            area.extend_from_slice(name.as_bytes());
        }
        area
    }

    fn encode_fields(&self) -> Vec<u8> {
        let mut area = vec![0; Self::LENGTH as usize];
        put(&mut area, 0, &Self::MAGIC.to_be_bytes());
        put(&mut area, 4, &self.version.to_be_bytes());
        put(&mut area, 20, &self.cluster_bits.to_be_bytes());
        put(&mut area, Self::SIZE, &self.size.to_be_bytes());
        put(&mut area, 32, &self.crypt.to_be_bytes());
        put(&mut area, Self::L1, &self.l1_field());
        put(&mut area, Self::REFTABLE, &self.reftable_field());
        put(&mut area, Self::SNAPSHOTS, &self.snapshots_field());
        if self.version < 3 {
            area.truncate(Self::LENGTH_V2 as usize);
            return area;
        }
        put(&mut area, Self::FEATURES, &self.features_field());
        put(&mut area, 96, &self.refcount_order.to_be_bytes());
        let long = self.compression != Compression::Zlib || !self.unknown_fields.is_empty();
        let length = if long {
            Self::LENGTH
        } else {
            self.header_length.min(Self::LENGTH)
        };
        put(&mut area, Self::KIND, &[self.compression as u8]);
        area.truncate(usize::try_from(length).unwrap_or(0));
        area.extend_from_slice(&self.unknown_fields);
        let length = u32::try_from(area.len()).unwrap_or(u32::MAX);
        put(&mut area, 100, &length.to_be_bytes());
        area
    }

    fn l1_field(&self) -> [u8; 12] {
        let mut field = [0; 12];
        put(&mut field, 0, &self.l1_entries.to_be_bytes());
        put(&mut field, 4, &self.l1_offset.to_be_bytes());
        field
    }

    fn reftable_field(&self) -> [u8; 12] {
        let mut field = [0; 12];
        put(&mut field, 0, &self.reftable_offset.to_be_bytes());
        put(&mut field, 8, &self.reftable_clusters.to_be_bytes());
        field
    }

    fn snapshots_field(&self) -> [u8; 12] {
        let mut field = [0; 12];
        put(&mut field, 0, &self.snapshots.to_be_bytes());
        put(&mut field, 4, &self.snapshot_offset.to_be_bytes());
        field
    }

    fn features_field(&self) -> [u8; 24] {
        let mut field = [0; 24];
        put(&mut field, 0, &self.incompatible.to_be_bytes());
        put(&mut field, 8, &self.compatible.to_be_bytes());
        put(&mut field, 16, &self.autoclear.to_be_bytes());
        field
    }
}

/// Checks what must be right before anything else can be read; the cluster size.
fn cluster_size(start: &[u8]) -> Result<u64, HeaderError> {
    let (magic, version, bits) = (u32_at(start, 0), u32_at(start, 4), u32_at(start, 20));
    if magic != Header::MAGIC {
        return Err(HeaderError::Magic(magic));
    }
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Version(version));
    }
    if !CLUSTER_BITS.contains(&bits) {
        return Err(HeaderError::ClusterBits(bits));
    }
    Ok(1 << bits)
}

fn limit(table: &'static str, len: u64, unit: &'static str, max: u64) -> Result<(), HeaderError> {
    if len > max {
        return Err(HeaderError::TableSize {
            table,
            len,
            unit,
            max,
        });
    }
    Ok(())
}

/// The backing file's name and where it starts.
fn backing_name(area: &[u8], cluster: u64) -> Result<Option<(usize, OsString)>, HeaderError> {
    let (offset, len) = (
        u64_at(area, Header::BACKING),
        u32_at(area, Header::BACKING + 8),
    );
    if offset == 0 {
        return Ok(None);
    }
    let error = HeaderError::BackingName { offset, len };
    let (Ok(start), Ok(length)) = (usize::try_from(offset), usize::try_from(len)) else {
        return Err(error);
    };
    if length > BACKING_NAME_MAX || offset.saturating_add(u64::from(len)) > cluster {
        return Err(error);
    }
    let mut name = area.get(start..).unwrap_or_default().to_vec();
    name.resize(length, 0);
    Ok(Some((start, OsString::from_vec(name))))
}

mod store;
#[cfg(test)]
mod tests;
