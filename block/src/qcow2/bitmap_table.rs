//! Persistent bitmaps ("Bitmaps"): the directory, one entry of variable length per bitmap, and the entries of each
//! bitmap's table.

use std::borrow::Cow;
use std::io;

use super::entry::{EntryError, OFFSET};
use super::extension::BitmapsExtension;
use super::fields::{put, u16_at, u32_at, u64_at};
use super::geometry::Geometry;
use super::header::{BITMAP_DIRECTORY_MAX, BITMAPS_MAX, OFFSET_END};
use crate::storage::Storage;

/// The bitmap was not saved properly; what it says is worth nothing.
pub(crate) const IN_USE: u32 = 1 << 0;
/// The bitmap records changes.
pub(crate) const AUTO: u32 = 1 << 1;
/// Who does not know the extra data may use the bitmap all the same.
pub(crate) const EXTRA_COMPATIBLE: u32 = 1 << 2;
const FLAGS: u32 = IN_USE | AUTO | EXTRA_COMPATIBLE;

/// The one type of bitmaps: it tracks changes.
pub(crate) const DIRTY_TRACKING: u8 = 1;
/// The granularities that QEMU supports, as powers of two.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The longest name in bytes.
pub(crate) const NAME_MAX: usize = 1023;
/// The most extra data of a bitmap, in bytes.
const EXTRA_MAX: u32 = 1024;
/// More than an entry of the directory can have, in bytes.
const ENTRY_MAX: usize = 68 << 10;
/// How much of the directory is in memory at a time, in bytes.
const WINDOW: usize = 128 << 10;
/// The largest bitmap table in bytes.
const TABLE_MAX: u64 = 1 << 30;

/// Why the bitmaps cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BitmapError {
    /// The host's error.
    #[error("the bitmap directory cannot be read")]
    Read(#[source] io::Error),
    /// The directory is not all there.
    #[error("the bitmap directory, {size} bytes at {offset:#x}, is past the end of the file")]
    PastEnd {
        /// Where it is, in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The directory does not have as many entries as it is said to.
    #[error("the bitmap directory has not {0} entries, or something after them")]
    Count(u32),
    /// A bitmap has more extra data than is supported.
    #[error("a bitmap has {0} bytes of extra data, more than {EXTRA_MAX}")]
    Extra(u32),
    /// A bitmap is not as it must be.
    #[error("bitmap {name:?}: {what}")]
    Entry {
        /// Its name.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Two bitmaps have one name.
    #[error("there are two bitmaps {0:?}")]
    Twice(String),
    /// More than can be written.
    #[error("{count} bitmaps in {size} bytes are too many")]
    TooMany {
        /// How many.
        count: usize,
        /// The directory's size in bytes.
        size: usize,
    },
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    /// Where its table is, in bytes.
    pub table_offset: u64,
    /// How many entries the table has.
    pub table_entries: u32,
    /// [`IN_USE`], [`AUTO`], [`EXTRA_COMPATIBLE`].
    pub flags: u32,
    /// [`DIRTY_TRACKING`].
    pub kind: u8,
    /// A bit stands for `1 << granularity_bits` bytes of the disk.
    pub granularity_bits: u8,
    /// Its name.
    pub name: Vec<u8>,
    /// Data of its type, unknown here.
    pub extra: Vec<u8>,
}

impl Bitmap {
    const FIXED: usize = 24;

    /// The name as text.
    pub(crate) fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// The length of its directory entry in bytes.
    pub(crate) fn entry_len(&self) -> u64 {
        (Self::FIXED as u64 + self.extra.len() as u64 + self.name.len() as u64).next_multiple_of(8)
    }

    /// How many table entries a bitmap of this granularity needs for a disk of `size` bytes.
    pub(crate) fn entries_for(geometry: &Geometry, granularity_bits: u8, size: u64) -> u64 {
        let bits = size.div_ceil(
            1_u64
                .checked_shl(granularity_bits.into())
                .unwrap_or(u64::MAX),
        );
        geometry.clusters(bits.div_ceil(8))
    }

    /// Checks all that does not depend on the table's contents. `size` is that of the disk in bytes.
    pub(crate) fn check(&self, geometry: &Geometry, size: u64) -> Result<(), BitmapError> {
        let wrong = |what| {
            let name = self.name().into_owned();
            Err(BitmapError::Entry { name, what })
        };
        if self.kind != DIRTY_TRACKING {
            return wrong("its type is unknown");
        }
        if self.flags & !FLAGS != 0 {
            return wrong("it has unknown flags");
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return wrong("its granularity is not from 512 bytes to 2 GiB");
        }
        if self.name.is_empty() || self.name.len() > NAME_MAX {
            return wrong("its name must have from 1 to 1023 bytes");
        }
        let len = u64::from(self.table_entries) * 8;
        let end = self.table_offset.checked_add(len);
        if self.table_offset == 0
            || geometry.within(self.table_offset) != 0
            || len == 0
            || len > TABLE_MAX
            || end.is_none_or(|end| end > OFFSET_END)
        {
            return wrong("its table has an impossible place or size");
        }
        // One that was not saved may be from before a resize.
        let needed = Self::entries_for(geometry, self.granularity_bits, size);
        if self.flags & IN_USE == 0 && u64::from(self.table_entries) != needed {
            return wrong("its table does not go with the size of the disk");
        }
        Ok(())
    }

    /// Decodes the entry that `bytes` start with, if they have all of it; its length.
    fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, BitmapError> {
        match bytes.get(..Self::FIXED).map(|fixed| u32_at(fixed, 20)) {
            Some(len) if len > EXTRA_MAX => Err(BitmapError::Extra(len)),
            _ => Ok(Self::decode_small(bytes)),
        }
    }

    fn decode_small(bytes: &[u8]) -> Option<(Self, usize)> {
        let fixed = bytes.get(..Self::FIXED)?;
        let name_len = usize::from(u16_at(fixed, 18));
        let extra_len = usize::try_from(u32_at(fixed, 20)).ok()?;
        let rest = bytes.get(Self::FIXED..)?;
        let (extra, rest) = rest.split_at_checked(extra_len)?;
        let name = rest.get(..name_len)?;
        let len = (Self::FIXED + extra_len + name_len).next_multiple_of(8);
        let padding = bytes.get(Self::FIXED + extra_len + name_len..len)?;
        let bitmap = Self {
            table_offset: u64_at(fixed, 0),
            table_entries: u32_at(fixed, 8),
            flags: u32_at(fixed, 12),
            kind: *fixed.get(16)?,
            granularity_bits: *fixed.get(17)?,
            name: name.to_vec(),
            extra: extra.to_vec(),
        };
        padding
            .iter()
            .all(|&byte| byte == 0)
            .then_some((bitmap, len))
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<(), BitmapError> {
        let too_long = || BitmapError::Entry {
            name: self.name().into_owned(),
            what: "its name or extra data is too long",
        };
        let name = u16::try_from(self.name.len()).map_err(|_| too_long())?;
        let extra = u32::try_from(self.extra.len()).map_err(|_| too_long())?;
        let mut fixed = [0; Self::FIXED];
        put(&mut fixed, 0, &self.table_offset.to_be_bytes());
        put(&mut fixed, 8, &self.table_entries.to_be_bytes());
        put(&mut fixed, 12, &self.flags.to_be_bytes());
        put(&mut fixed, 16, &[self.kind, self.granularity_bits]);
        put(&mut fixed, 18, &name.to_be_bytes());
        put(&mut fixed, 20, &extra.to_be_bytes());
        out.extend_from_slice(&fixed);
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    }
}

/// Reads and validates the directory. `size` is that of the disk in bytes.
pub(crate) fn load(
    storage: &dyn Storage,
    extension: &BitmapsExtension,
    geometry: &Geometry,
    size: u64,
) -> Result<Vec<Bitmap>, BitmapError> {
    let bitmaps = load_unchecked(storage, extension)?;
    let mut names: Vec<&[u8]> = bitmaps.iter().map(|it| it.name.as_slice()).collect();
    names.sort_unstable();
    let mut pairs = names.iter().zip(names.iter().skip(1));
    if let Some((name, _)) = pairs.find(|(a, b)| a == b) {
        return Err(BitmapError::Twice(
            String::from_utf8_lossy(name).into_owned(),
        ));
    }
    bitmaps
        .iter()
        .try_for_each(|bitmap| bitmap.check(geometry, size))?;
    Ok(bitmaps)
}

/// Reads the directory without looking at what the entries say.
pub(crate) fn load_unchecked(
    storage: &dyn Storage,
    extension: &BitmapsExtension,
) -> Result<Vec<Bitmap>, BitmapError> {
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    let end = storage.len().map_err(BitmapError::Read)?;
    let past_end = offset.checked_add(size).is_none_or(|last| last > end);
    if past_end || size > BITMAP_DIRECTORY_MAX {
        return Err(BitmapError::PastEnd { offset, size });
    }
    let mut window = Vec::new();
    // Of the window, and of the directory.
    let (mut used, mut read) = (0, 0);
    let mut bitmaps = Vec::new();
    for _ in 0..extension.count {
        if window.len() - used < ENTRY_MAX && read < size {
            window.drain(..used);
            used = 0;
            let have = window.len();
            let more = (size - read).min((WINDOW - have) as u64);
            window.resize(have + usize::try_from(more).unwrap_or(0), 0);
            storage
                .read_at(window.get_mut(have..).unwrap_or_default(), offset + read)
                .map_err(BitmapError::Read)?;
            read += more;
        }
        let rest = window.get(used..).unwrap_or_default();
        let Some((bitmap, len)) = Bitmap::decode(rest)? else {
            return Err(BitmapError::Count(extension.count));
        };
        used += len;
        bitmaps.push(bitmap);
    }
    if used != window.len() || read != size {
        return Err(BitmapError::Count(extension.count));
    }
    Ok(bitmaps)
}

/// Encodes a directory.
pub(crate) fn encode(bitmaps: &[Bitmap]) -> Result<Vec<u8>, BitmapError> {
    let mut directory = Vec::new();
    for bitmap in bitmaps {
        bitmap.encode(&mut directory)?;
    }
    let (count, size) = (bitmaps.len(), directory.len());
    if count > BITMAPS_MAX as usize || size as u64 > BITMAP_DIRECTORY_MAX {
        return Err(BitmapError::TooMany { count, size });
    }
    Ok(directory)
}

/// Where a cluster of a bitmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// All bits are clear.
    Zeros,
    /// All bits are set.
    Ones,
    /// At this host offset, in bytes.
    At(u64),
}

/// Decodes an entry of a bitmap's table.
pub(crate) fn bits(entry: u64, geometry: &Geometry) -> Result<Bits, EntryError> {
    match (entry & OFFSET, entry & !OFFSET) {
        (0, 0) => Ok(Bits::Zeros),
        (0, 1) => Ok(Bits::Ones),
        (offset, 0) if geometry.within(offset) == 0 => Ok(Bits::At(offset)),
        (_, 0) => Err(EntryError::Unaligned(entry)),
        _ => Err(EntryError::Reserved(entry)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Header;
    use crate::qcow2::testing::Bench;

    fn image(bench: &Bench) -> Header {
        bench.line("qemu-img create -q -f qcow2 image 100M");
        bench.line("qemu-img bitmap --add image first");
        bench.line("qemu-img bitmap --add -g 1M --disable image second-one");
        Header::load(&bench.storage("image")).unwrap()
    }

    #[test]
    fn directories_of_qemu_are_read_and_encode_to_the_same_bytes() {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let header = image(&bench);
        let extension = header.consistent_bitmaps().unwrap();
        let (storage, geometry) = (bench.storage("image"), header.geometry());
        let bitmaps = load(&storage, &extension, &geometry, header.size).unwrap();
        let facts: Vec<_> = bitmaps
            .iter()
            .map(|it| {
                (
                    it.name().into_owned(),
                    it.flags,
                    it.granularity_bits,
                    it.table_entries,
                )
            })
            .collect();
        let expected = [
            ("first".into(), AUTO, 16, 1),
            ("second-one".into(), 0, 20, 1),
        ];
        assert_eq!(facts, expected);
        let directory = encode(&bitmaps).unwrap();
        assert_eq!(directory.len() as u64, extension.directory_size);
        let theirs = bench.bytes("image", extension.directory_offset, directory.len());
        assert_eq!(directory, theirs);
        let resized = load(&storage, &extension, &geometry, 1 << 40);
        assert!(matches!(resized, Err(BitmapError::Entry { .. })));
    }

    fn geometry() -> Geometry {
        Geometry {
            cluster_bits: 16,
            extended: false,
            refcount_order: 4,
            version: 3,
            data_file: false,
        }
    }

    fn sample() -> Bitmap {
        Bitmap {
            table_offset: 0x50000,
            table_entries: 1,
            flags: AUTO,
            kind: DIRTY_TRACKING,
            granularity_bits: 16,
            name: b"a".into(),
            extra: Vec::new(),
        }
    }

    fn stored(directory: &[u8], count: u32) -> Result<Vec<Bitmap>, BitmapError> {
        let bench = Bench::new();
        let storage = bench.storage("directory");
        storage.write_at(directory, 0).unwrap();
        let extension = BitmapsExtension {
            count,
            reserved: 0,
            directory_size: directory.len() as u64,
            directory_offset: 0,
        };
        load(&storage, &extension, &geometry(), 1 << 20)
    }

    #[test]
    fn bitmaps_that_cannot_be_are_refused() {
        let tried = |change: fn(&mut Bitmap)| {
            let mut bitmap = sample();
            change(&mut bitmap);
            stored(&encode(&[bitmap]).unwrap(), 1)
        };
        assert!(tried(|_| ()).is_ok());
        assert!(tried(|it| it.extra = vec![1; 9]).is_ok());
        assert!(tried(|it| (it.flags, it.table_entries) = (IN_USE, 7)).is_ok());
        let bad: [fn(&mut Bitmap); 12] = [
            |it| it.kind = 0,
            |it| it.flags = 8,
            |it| it.granularity_bits = 8,
            |it| it.granularity_bits = 32,
            |it| it.granularity_bits = 255,
            |it| it.name = Vec::new(),
            |it| it.name = vec![b'x'; 1024],
            |it| it.table_offset = 0,
            |it| it.table_offset = 0x50200,
            |it| it.table_offset = 1 << 56,
            |it| it.table_entries = 2,
            |it| (it.flags, it.table_entries) = (IN_USE, u32::MAX),
        ];
        for change in bad {
            assert!(matches!(tried(change), Err(BitmapError::Entry { .. })));
        }
        let two = encode(&[sample(), sample()]).unwrap();
        assert!(matches!(stored(&two, 2), Err(BitmapError::Twice(_))));
        assert!(matches!(stored(&two, 1), Err(BitmapError::Count(1))));
        assert!(matches!(stored(&two, 3), Err(BitmapError::Count(3))));
        let mut long = sample();
        long.name = vec![0; 1 << 16];
        assert!(matches!(encode(&[long]), Err(BitmapError::Entry { .. })));
        let many = vec![sample(); 65_536];
        assert!(matches!(encode(&many), Err(BitmapError::TooMany { .. })));
    }

    #[test]
    fn table_entries_decode() {
        let geometry = geometry();
        assert_eq!(bits(0, &geometry), Ok(Bits::Zeros));
        assert_eq!(bits(1, &geometry), Ok(Bits::Ones));
        assert_eq!(bits(0x30000, &geometry), Ok(Bits::At(0x30000)));
        assert_eq!(bits(0x30001, &geometry), Err(EntryError::Reserved(0x30001)));
        assert_eq!(
            bits(0x30200, &geometry),
            Err(EntryError::Unaligned(0x30200))
        );
        assert_eq!(bits(1 << 56, &geometry), Err(EntryError::Reserved(1 << 56)));
    }

    #[test]
    fn a_directory_that_is_not_there_costs_nothing() {
        let bench = Bench::new();
        let extension = BitmapsExtension {
            count: 65_535,
            reserved: 0,
            directory_size: 64 << 20,
            directory_offset: 1 << 50,
        };
        let loaded = load(&bench.storage("empty"), &extension, &geometry(), 1 << 20);
        assert!(matches!(loaded, Err(BitmapError::PastEnd { .. })));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_directories_never_panic(
            directory in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            count in 0..4_u32,
        ) {
            let _ = stored(&directory, count);
        }
    }
}
