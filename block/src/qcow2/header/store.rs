//! Writing a header, so that a power cut never leaves a mixture of two.
//!
//! What is written together is one sector at most. Fields are in the first sector, and are written alone. Where more changes, the
//! header that is there first becomes one that needs no other sector.

use std::io;

use super::{BITMAPS, Header};
use crate::qcow2::fields::{put, u32_at, u64_at};
use crate::storage::Storage;

/// What is written at once, or not at all, in bytes.
const SECTOR: usize = 512;

impl Header {
    /// Writes all that belongs into the first cluster. Syncs between its steps, if there are several, and not after the
    /// last.
    ///
    /// A power cut leaves the old header, this one, or the old one without what can be done without: feature names,
    /// bitmaps and unknown extensions, but for the mark of a merge. (Where names are so long that they leave no room for that, it may leave a mixture.)
    pub(crate) fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        let mut area = self.encode().map_err(io::Error::other)?;
        // Nothing of an older, longer header is left in the sector that this one ends in.
        area.resize(area.len().next_multiple_of(SECTOR), 0);
        let mut present = vec![0; area.len()];
        storage.read_at(&mut present, 0)?;
        let sectors = area.chunks(SECTOR).zip(present.chunks(SECTOR));
        let differ: Vec<usize> = (0..)
            .zip(sectors)
            .filter_map(|(number, (new, old))| (new != old).then_some(number))
            .collect();
        let (first, rest) = area.split_at(SECTOR);
        if let [one] = *differ {
            let (at, end) = (one * SECTOR, (one + 1) * SECTOR);
            return storage.write_at(area.get(at..end).unwrap_or_default(), at as u64);
        }
        if !differ.is_empty() && Self::shorten(storage, &present, area.len())? {
            storage.write_at(rest, SECTOR as u64)?;
            storage.sync()?;
            return storage.write_at(first, 0);
        }
        storage.write_at(&area, 0)
    }

    /// Makes the header that is there need nothing of the first `len` bytes but the first sector, `present`. `false` if it
    /// cannot be done, or if there is none.
    fn shorten(storage: &dyn Storage, present: &[u8], len: usize) -> io::Result<bool> {
        let Ok(old) = Self::load(storage) else {
            return Ok(false);
        };
        let short = Self {
            autoclear: old.autoclear & !BITMAPS,
            bitmaps: None,
            feature_names: None,
            unknown_extensions: old.mark(),
            ..old
        };
        let mut sector = short.encode_fields();
        short.extensions().encode(&mut sector);
        if sector.len() > SECTOR {
            return Ok(false);
        }
        sector.resize(SECTOR, 0);
        if let Some(name) = short.backing.as_ref().filter(|name| !name.is_empty()) {
            let (offset, bytes) = (u64_at(present, Self::BACKING), name.as_encoded_bytes());
            let end = offset.saturating_add(u32_at(present, Self::BACKING + 8).into());
            let room = end.max(len as u64).next_multiple_of(SECTOR as u64);
            if room.saturating_add(bytes.len() as u64) > 1 << short.cluster_bits {
                return Ok(false);
            }
            storage.write_at(bytes, room)?;
            storage.sync()?;
            put(&mut sector, Self::BACKING, &room.to_be_bytes());
            put(
                &mut sector,
                Self::BACKING + 8,
                &u32::try_from(bytes.len()).unwrap_or(0).to_be_bytes(),
            );
        }
        storage.write_at(&sector, 0)?;
        storage.sync()?;
        Ok(true)
    }

    /// Writes the size of the disk, and the place and the size of the L1 table, in one write. Does not sync,
    /// as the others below.
    pub(crate) fn store_mapping(&self, storage: &dyn Storage) -> io::Result<()> {
        // The encryption method is between them.
        let mut field = [0; 24];
        put(&mut field, 0, &self.size.to_be_bytes());
        put(&mut field, 8, &self.crypt.to_be_bytes());
        put(&mut field, Self::L1 - Self::SIZE, &self.l1_field());
        storage.write_at(&field, Self::SIZE as u64)
    }

    /// Writes the place and the size of the refcount table alone, in one write.
    pub(crate) fn store_reftable(&self, storage: &dyn Storage) -> io::Result<()> {
        storage.write_at(&self.reftable_field(), Self::REFTABLE as u64)
    }

    /// Writes the place and the length of the snapshot table alone, in one write.
    pub(crate) fn store_snapshots(&self, storage: &dyn Storage) -> io::Result<()> {
        storage.write_at(&self.snapshots_field(), Self::SNAPSHOTS as u64)
    }

    /// Writes the places and the sizes of the refcount table and of the snapshot table, in one write.
    pub(crate) fn store_tables(&self, storage: &dyn Storage) -> io::Result<()> {
        // The two fields are neighbours.
        let field = [self.reftable_field(), self.snapshots_field()].concat();
        storage.write_at(&field, Self::REFTABLE as u64)
    }

    /// Writes the three fields of feature bits alone, in one write; version 2 has none.
    pub(crate) fn store_features(&self, storage: &dyn Storage) -> io::Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        storage.write_at(&self.features_field(), Self::FEATURES as u64)
    }
}
