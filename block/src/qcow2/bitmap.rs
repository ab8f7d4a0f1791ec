//! Persistent bitmaps: recording what is written, and changing the bitmaps of an image.
//!
//! The enabled bitmaps of a writable image are loaded when it is opened. Before its first change they are
//! marked on disk as in use, so that after a crash nobody trusts them; when the image is closed they are written anew
//! and the mark is gone. Bitmaps that are in use when the image is opened were not saved by somebody, and stay as they
//! are; so do disabled ones.
//!
//! A directory is never changed in place, but for that mark: a new one is written, and one write to the header
//! takes it for the old one.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;

use super::allocate::Run;
use super::bitmap_table::{self, AUTO, Bitmap, DIRTY_TRACKING, EXTRA_COMPATIBLE, IN_USE, NAME_MAX};
use super::dirty::{self, Bits};
use super::entry::EntryError;
use super::extension::BitmapsExtension;
use super::geometry::Geometry;
use super::header::{BITMAPS, Header};
use super::image::Qcow2;
use super::meta::{Meta, eio};
use super::session::{ChangeError, Part, Session};
use super::words::each_word;
use super::write::Refusal;
use crate::storage::Storage;

/// The most bytes that the bits of one bitmap may have: QEMU's limit.
pub(crate) const BITS_MAX: u64 = 512 << 20;
/// The most bytes that the bits of all loaded bitmaps may have, if all of them were set. Clear ones cost a hundredth.
pub(crate) const ALL_BITS_MAX: u64 = 8 << 30;

/// A bitmap directory that is to take the place of the present one. It is written, but not referred to.
#[derive(Debug)]
pub(crate) struct NewDirectory {
    entries: Vec<Bitmap>,
    extension: Option<BitmapsExtension>,
    /// What it takes.
    fresh: Vec<Run>,
    /// What it makes superfluous, as (offset, length).
    old: Vec<(u64, u64)>,
}

impl NewDirectory {
    /// Makes the header refer to it.
    pub(crate) fn enter(&self, header: &mut Header) {
        header.bitmaps = self.extension;
        header.autoclear &= !BITMAPS;
        if self.extension.is_some() {
            header.autoclear |= BITMAPS;
        }
    }
}

/// Bitmaps that are being changed.
#[derive(Debug, Default)]
struct Edit {
    entries: Vec<Bitmap>,
    fresh: Vec<Run>,
    old: Vec<(u64, u64)>,
}

impl Edit {
    fn find(&mut self, name: &str) -> Result<&mut Bitmap, ChangeError> {
        find(&mut self.entries, name)
    }
}

fn find<'a>(entries: &'a mut [Bitmap], name: &str) -> Result<&'a mut Bitmap, ChangeError> {
    entries
        .iter_mut()
        .find(|bitmap| bitmap.name == name.as_bytes())
        .ok_or_else(|| ChangeError::NoBitmap(name.into()))
}

/// The bitmap, if it may be used.
pub(crate) fn usable(bitmap: &Bitmap) -> Result<&Bitmap, ChangeError> {
    if bitmap.flags & IN_USE != 0 {
        return Err(ChangeError::Inconsistent(bitmap.name().into_owned()));
    }
    if foreign(bitmap) {
        return Err(ChangeError::ForeignBitmap(bitmap.name().into_owned()));
    }
    Ok(bitmap)
}

/// It must be left as it is.
fn foreign(bitmap: &Bitmap) -> bool {
    !bitmap.extra.is_empty() && bitmap.flags & EXTRA_COMPATIBLE == 0
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ChangeError {
    ChangeError::Bitmaps(error.into())
}

fn wrong(bitmap: &Bitmap, what: &'static str) -> ChangeError {
    invalid(bitmap_table::BitmapError::Entry {
        name: bitmap.name().into_owned(),
        what,
    })
}

/// Calls `each` with the index and the value of each entry of a bitmap's table that is not zero.
fn each_entry(
    storage: &dyn Storage,
    bitmap: &Bitmap,
    each: impl FnMut(u64, u64) -> Result<(), ChangeError>,
) -> Result<(), ChangeError> {
    let len = u64::from(bitmap.table_entries) * 8;
    let end = bitmap.table_offset.checked_add(len);
    if end.is_none_or(|end| end > storage.len().unwrap_or(0).next_multiple_of(1 << 21)) {
        return Err(wrong(bitmap, "its table is past the end of the file"));
    }
    each_word(storage, bitmap.table_offset, len, ChangeError::from, each)
}

/// Loads a bitmap for a disk of `size` bytes. `seen` are clusters of other bitmaps: none is in two places.
fn load(
    storage: &dyn Storage,
    geometry: &Geometry,
    bitmap: &Bitmap,
    size: u64,
    seen: &mut HashSet<u64>,
) -> Result<Bits, ChangeError> {
    let granularity = u32::from(bitmap.granularity_bits);
    let bytes = Bits::bytes_for(granularity, size);
    if bytes > BITS_MAX {
        let name = bitmap.name().into_owned();
        return Err(ChangeError::BitmapSize { name, bytes });
    }
    let bits = Bits::new(granularity, size);
    let end = storage.len()?;
    let cluster = geometry.cluster();
    let mut buf = vec![0; usize::try_from(cluster).unwrap_or(0)];
    each_entry(storage, bitmap, |index, entry| {
        let start = index.saturating_mul(cluster);
        match bitmap_table::bits(entry, geometry) {
            Ok(bitmap_table::Bits::Zeros) => {}
            Ok(bitmap_table::Bits::Ones) => {
                let unit = |byte: u64| byte.saturating_mul(8).saturating_mul(1 << granularity);
                bits.set(unit(start), unit(cluster));
            }
            Ok(bitmap_table::Bits::At(offset)) if offset < end => {
                if !seen.insert(offset) {
                    return Err(wrong(bitmap, "a cluster of it is used twice"));
                }
                storage.read_at(&mut buf, offset)?;
                bits.take_in(start, &buf);
            }
            Ok(bitmap_table::Bits::At(_)) => {
                return Err(wrong(bitmap, "a cluster of it is past the end of the file"));
            }
            Err(error) => return Err(entry_error(bitmap, error)),
        }
        Ok(())
    })?;
    Ok(bits)
}

fn entry_error(bitmap: &Bitmap, error: EntryError) -> ChangeError {
    tracing::debug!(name = %bitmap.name(), %error, "a bitmap's table");
    wrong(bitmap, "an entry of its table is invalid")
}

impl Meta {
    /// Loads the directory and the bitmaps that record.
    pub(crate) fn load_bitmaps(&mut self) -> io::Result<()> {
        self.bitmaps.clear();
        let mut recorded = Vec::new();
        if let Some(extension) = self.header.consistent_bitmaps() {
            let (geometry, size) = (self.geometry, self.header.size);
            let unusable = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let bitmaps = bitmap_table::load(&*self.storage, &extension, &geometry, size)
                .map_err(unusable_entry)?;
            let mut seen = HashSet::new();
            let mut all = 0_u64;
            for bitmap in &bitmaps {
                if bitmap.flags & (AUTO | IN_USE) != AUTO || foreign(bitmap) {
                    continue;
                }
                let bytes = Bits::bytes_for(bitmap.granularity_bits.into(), size);
                all = all.saturating_add(bytes);
                if all > ALL_BITS_MAX {
                    let name = bitmap.name().into_owned();
                    return Err(unusable(ChangeError::BitmapSize { name, bytes }));
                }
                let bits =
                    load(&*self.storage, &geometry, bitmap, size, &mut seen).map_err(unusable)?;
                recorded.push((bitmap.name.clone(), bits));
            }
            self.bitmaps = bitmaps;
        }
        self.shared.recorder.replace(recorded);
        Ok(())
    }

    /// Records that a range of the disk is about to change. The first time, the bitmaps on disk are marked, which
    /// takes waiting.
    pub(crate) fn record(&mut self, offset: u64, len: u64, quick: bool) -> Result<(), Refusal> {
        if self.shared.recorder.is_idle() {
            if quick {
                return Err(Refusal::Slow);
            }
            self.arm_bitmaps().map_err(Refusal::Failed)?;
        }
        self.shared.recorder.note(offset, len);
        Ok(())
    }

    /// Marks the bitmaps that record as in use, durably.
    pub(crate) fn arm_bitmaps(&mut self) -> io::Result<()> {
        if !self.shared.recorder.is_idle() {
            return Ok(());
        }
        let Some(extension) = self.header.consistent_bitmaps() else {
            return Ok(());
        };
        let mut bitmaps = self.bitmaps.clone();
        {
            let recorded = self.shared.recorder.read();
            for bitmap in &mut bitmaps {
                if recorded.iter().any(|(name, _)| *name == bitmap.name) {
                    bitmap.flags |= IN_USE;
                }
            }
        }
        let directory = bitmap_table::encode(&bitmaps).map_err(unusable_entry)?;
        if directory.len() as u64 != extension.directory_size {
            return Err(eio());
        }
        self.storage
            .write_at(&directory, extension.directory_offset)?;
        self.storage.sync()?;
        self.bitmaps = bitmaps;
        self.shared.recorder.set_armed(true);
        Ok(())
    }
}

fn unusable_entry(error: bitmap_table::BitmapError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Session<'_> {
    /// As [`Meta::arm_bitmaps`].
    pub(crate) fn arm_bitmaps(&mut self) -> io::Result<()> {
        self.meta.arm_bitmaps()
    }

    /// Writes the bitmaps that record, and takes their marks away.
    pub(crate) fn store_bitmaps(&mut self) -> Result<(), ChangeError> {
        if !self.meta.shared.recorder.is_armed() {
            return Ok(());
        }
        // Who writes meanwhile marks them again, after this.
        self.meta.shared.recorder.begin_store();
        let mut edit = self.edit();
        let stored = self.store_into(&mut edit);
        let installed = self.install(edit, stored);
        if installed.is_err() {
            self.meta.shared.recorder.set_armed(true);
        }
        installed
    }

    fn store_into(&mut self, edit: &mut Edit) -> Result<(), ChangeError> {
        let shared = std::sync::Arc::clone(&self.meta.shared);
        for (name, bits) in shared.recorder.read().iter() {
            let bitmap = edit.entries.iter().find(|bitmap| bitmap.name == *name);
            let Some(mut bitmap) = bitmap.cloned() else {
                continue;
            };
            bitmap.flags &= !IN_USE;
            self.write_bits(edit, &bitmap, bits)?;
        }
        Ok(())
    }

    fn edit(&self) -> Edit {
        Edit {
            entries: self.meta.bitmaps.clone(),
            ..Edit::default()
        }
    }

    /// Writes the bits of a bitmap to fresh clusters, and makes `bitmap` with those its entry.
    fn write_bits(
        &mut self,
        edit: &mut Edit,
        bitmap: &Bitmap,
        bits: &Bits,
    ) -> Result<(), ChangeError> {
        let cluster = self.meta.geometry.cluster();
        let size = bits.size();
        let entries = Bitmap::entries_for(&self.meta.geometry, bitmap.granularity_bits, size);
        let mut table = Vec::new();
        for index in 0..entries {
            let entry = match bits.part(index * cluster, cluster) {
                dirty::Part::Zeros => 0,
                dirty::Part::Ones => 1,
                dirty::Part::Bytes(bytes) => {
                    let run = self.put(bytes)?;
                    edit.fresh.push(run);
                    self.offset(run)
                }
            };
            table.extend(entry.to_be_bytes());
        }
        let run = self.put(table)?;
        edit.fresh.push(run);
        let old = edit.find(&bitmap.name())?.clone();
        self.retire(edit, &old)?;
        let entry = edit.find(&bitmap.name())?;
        *entry = bitmap.clone();
        entry.table_offset = self.offset(run);
        entry.table_entries = u32::try_from(entries).map_err(|_| eio())?;
        Ok(())
    }

    /// Notes what a bitmap's present table and clusters take, to be freed.
    fn retire(&self, edit: &mut Edit, bitmap: &Bitmap) -> Result<(), ChangeError> {
        let geometry = self.meta.geometry;
        if bitmap.table_entries == 0 {
            return Ok(());
        }
        edit.old
            .push((bitmap.table_offset, u64::from(bitmap.table_entries) * 8));
        each_entry(self.storage(), bitmap, |_, entry| {
            if let Ok(bitmap_table::Bits::At(offset)) = bitmap_table::bits(entry, &geometry) {
                edit.old.push((offset, geometry.cluster()));
            }
            Ok(())
        })
    }

    /// Writes the directory of an edit.
    fn write_directory(&mut self, edit: Edit) -> Result<NewDirectory, ChangeError> {
        let Edit {
            entries,
            mut fresh,
            mut old,
        } = edit;
        let result = bitmap_table::encode(&entries)
            .map_err(invalid)
            .and_then(|directory| {
                if directory.is_empty() {
                    return Ok(None);
                }
                let directory_size = directory.len() as u64;
                let run = self.put(directory)?;
                fresh.push(run);
                Ok(Some(BitmapsExtension {
                    count: u32::try_from(entries.len()).map_err(|_| eio())?,
                    reserved: 0,
                    directory_size,
                    directory_offset: self.offset(run),
                }))
            });
        let extension = match result {
            Ok(extension) => extension,
            Err(error) => {
                fresh.into_iter().for_each(|run| self.give_back(run));
                return Err(error);
            }
        };
        if let Some(extension) = self.meta.header.consistent_bitmaps() {
            old.push((extension.directory_offset, extension.directory_size));
        }
        Ok(NewDirectory {
            entries,
            extension,
            fresh,
            old,
        })
    }

    /// The header refers to the directory now: what it replaces is freed.
    pub(crate) fn adopt_directory(&mut self, new: NewDirectory) {
        self.meta.bitmaps = new.entries;
        for (offset, len) in new.old {
            self.free_range(offset, len);
        }
    }

    /// Frees a directory that the header will not refer to.
    pub(crate) fn drop_directory(&mut self, new: NewDirectory) {
        for run in new.fresh {
            self.give_back(run);
        }
    }

    /// Makes an edit, if it has succeeded, what the image has.
    fn install(&mut self, edit: Edit, made: Result<(), ChangeError>) -> Result<(), ChangeError> {
        if let Err(error) = made {
            edit.fresh.into_iter().for_each(|run| self.give_back(run));
            return Err(error);
        }
        let new = self.write_directory(edit)?;
        let mut header = self.meta.header.clone();
        new.enter(&mut header);
        let switched = self
            .commit()
            .and_then(|()| self.switch(header, Part::Whole));
        match switched {
            Ok(()) => {
                self.adopt_directory(new);
                Ok(())
            }
            Err(error) => {
                self.drop_directory(new);
                Err(error.into())
            }
        }
    }

    /// The directory for a disk of `size` bytes: bitmaps that are up to date on disk get tables that go with it. `None` without
    /// bitmaps. Those that record are marked as in use, and go with the size in memory.
    pub(crate) fn resized_bitmaps(
        &mut self,
        size: u64,
    ) -> Result<Option<NewDirectory>, ChangeError> {
        if self.meta.bitmaps.is_empty() {
            return Ok(None);
        }
        self.arm_bitmaps()?;
        let mut edit = self.edit();
        let resized = self.resize_into(&mut edit, size);
        if let Err(error) = resized {
            edit.fresh.into_iter().for_each(|run| self.give_back(run));
            return Err(error);
        }
        self.write_directory(edit).map(Some)
    }

    fn resize_into(&mut self, edit: &mut Edit, size: u64) -> Result<(), ChangeError> {
        let (geometry, old) = (self.meta.geometry, self.meta.header.size);
        let mut seen = HashSet::new();
        for bitmap in edit.entries.clone() {
            if bitmap.flags & IN_USE != 0 {
                continue;
            }
            usable(&bitmap)?;
            if Bits::bytes_for(bitmap.granularity_bits.into(), size) > BITS_MAX {
                let name = bitmap.name().into_owned();
                let bytes = Bits::bytes_for(bitmap.granularity_bits.into(), size);
                return Err(ChangeError::BitmapSize { name, bytes });
            }
            let mut bits = load(self.storage(), &geometry, &bitmap, old, &mut seen)?;
            bits.resize(size);
            self.write_bits(edit, &bitmap, &bits)?;
        }
        Ok(())
    }

    fn load_one(&self, bitmap: &Bitmap) -> Result<Bits, ChangeError> {
        let (geometry, size) = (self.meta.geometry, self.meta.header.size);
        load(self.storage(), &geometry, bitmap, size, &mut HashSet::new())
    }
}

impl Qcow2 {
    /// Changes the bitmaps as they are on disk.
    fn change_bitmaps(
        &self,
        change: impl FnOnce(&mut Session<'_>, &mut Edit) -> Result<(), ChangeError>,
    ) -> Result<(), ChangeError> {
        let mut session = self.exclusive()?;
        if session.meta.geometry.version < 3 {
            return Err(ChangeError::NeedsVersion3("a bitmap"));
        }
        session.store_bitmaps()?;
        let mut edit = session.edit();
        let made = change(&mut session, &mut edit);
        session.install(edit, made)?;
        if let Err(error) = session.meta.load_bitmaps() {
            // Without them nothing may be written, or they would not be told.
            session.meta.shared.corrupt.store(true, Ordering::SeqCst);
            return Err(error.into());
        }
        session.finish();
        Ok(())
    }

    /// Adds a bitmap in which nothing is marked. A bit stands for `granularity` bytes of the disk: a power of two from 512 to
    /// 2 GiB; `None`: the cluster size, within 4 KiB and 64 KiB. It records changes if `enabled`. The
    /// change is durable when this returns, as those of the functions below.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub fn add_bitmap(
        &self,
        name: &str,
        granularity: Option<u64>,
        enabled: bool,
    ) -> Result<(), ChangeError> {
        let usual = self.geometry().cluster().clamp(4 << 10, 64 << 10);
        let granularity = granularity.unwrap_or(usual);
        if !granularity.is_power_of_two() || !(512..=2 << 30).contains(&granularity) {
            return Err(ChangeError::Granularity(granularity));
        }
        let granularity_bits = u8::try_from(granularity.ilog2()).unwrap_or(0);
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(invalid("a bitmap's name must have from 1 to 1023 bytes"));
        }
        self.change_bitmaps(|session, edit| {
            if edit.find(name).is_ok() {
                return Err(ChangeError::BitmapExists(name.into()));
            }
            let bits = session.empty_bits(name, granularity_bits)?;
            let bitmap = Bitmap {
                table_offset: 0,
                table_entries: 0,
                flags: if enabled { AUTO } else { 0 },
                kind: DIRTY_TRACKING,
                granularity_bits,
                name: name.as_bytes().to_vec(),
                extra: Vec::new(),
            };
            edit.entries.push(bitmap.clone());
            // What cannot be is to be known before anything is written.
            bitmap_table::encode(&edit.entries).map_err(invalid)?;
            session.write_bits(edit, &bitmap, &bits)
        })
    }

    /// Removes a bitmap, in whatever state it is.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::add_bitmap`].
    pub fn remove_bitmap(&self, name: &str) -> Result<(), ChangeError> {
        self.change_bitmaps(|session, edit| {
            let bitmap = edit.find(name)?.clone();
            session.retire(edit, &bitmap)?;
            edit.entries.retain(|other| other.name != bitmap.name);
            Ok(())
        })
    }

    /// Clears all marks of a bitmap.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::add_bitmap`].
    pub fn clear_bitmap(&self, name: &str) -> Result<(), ChangeError> {
        self.change_bitmaps(|session, edit| {
            let bitmap = usable(edit.find(name)?)?.clone();
            let bits = session.empty_bits(name, bitmap.granularity_bits)?;
            session.write_bits(edit, &bitmap, &bits)
        })
    }

    /// Makes a bitmap record changes, or not.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::add_bitmap`].
    pub fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<(), ChangeError> {
        self.change_bitmaps(|session, edit| {
            session.load_one(usable(edit.find(name)?)?)?;
            let bitmap = edit.find(name)?;
            bitmap.flags &= !AUTO;
            if enabled {
                bitmap.flags |= AUTO;
            }
            Ok(())
        })
    }

    /// Marks in bitmap `target` all that is marked in bitmap `name`, of another image or (`None`) of this one. The
    /// granularities may differ, the sizes of the disks may not.
    ///
    /// # Errors
    ///
    /// As [`Qcow2::add_bitmap`].
    pub fn merge_bitmap(
        &self,
        target: &str,
        source: Option<&Self>,
        name: &str,
    ) -> Result<(), ChangeError> {
        let foreign = source.map(|source| source.bits_of(name)).transpose()?;
        self.change_bitmaps(|session, edit| {
            let from = match foreign {
                Some(bits) => bits,
                None => session.load_one(usable(edit.find(name)?)?)?,
            };
            let bitmap = usable(edit.find(target)?)?.clone();
            let bits = session.load_one(&bitmap)?;
            if from.size() != bits.size() {
                return Err(ChangeError::DiskSizes {
                    from: from.size(),
                    to: bits.size(),
                });
            }
            from.each_range(|offset, len| bits.set(offset, len));
            session.write_bits(edit, &bitmap, &bits)
        })
    }

    /// The bitmaps as they are on disk.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Bitmaps`] where the directory cannot be read.
    pub(crate) fn list_bitmaps(&self) -> Result<Vec<Bitmap>, ChangeError> {
        let header = self.lock().header.clone();
        let Some(extension) = header.consistent_bitmaps() else {
            return Ok(Vec::new());
        };
        let (geometry, storage) = (header.geometry(), self.storage());
        bitmap_table::load(storage, &extension, &geometry, header.size).map_err(invalid)
    }

    /// A bitmap as it is on disk.
    fn bits_of(&self, name: &str) -> Result<Bits, ChangeError> {
        let mut bitmaps = self.list_bitmaps()?;
        let bitmap = usable(find(&mut bitmaps, name)?)?;
        let (geometry, size) = (self.geometry(), self.disk_size());
        load(self.storage(), geometry, bitmap, size, &mut HashSet::new())
    }
}

impl Session<'_> {
    fn empty_bits(&self, name: &str, granularity_bits: u8) -> Result<Bits, ChangeError> {
        let size = self.meta.header.size;
        let bytes = Bits::bytes_for(granularity_bits.into(), size);
        if bytes > BITS_MAX {
            let name = name.to_owned();
            return Err(ChangeError::BitmapSize { name, bytes });
        }
        if size == 0 {
            return Err(invalid("a disk without bytes cannot have bitmaps"));
        }
        Ok(Bits::new(granularity_bits.into(), size))
    }
}

#[cfg(test)]
mod tests;
