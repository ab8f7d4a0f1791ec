//! Internal snapshots: making one, going back to one, deleting one, and looking at one.
//!
//! A snapshot is a copy of the L1 table; what the table leads to is shared and counted once more. The
//! snapshot table is never changed in place: a new one is written, and one write to the header takes it for the old one.

use std::collections::BTreeSet;
use std::io;

use super::entry::COPIED;
use super::header::{Header, L1_MAX};
use super::image::Qcow2;
use super::meta::{eio, read_table};
use super::session::{ChangeError, Part, Session};
use super::snapshot_table::{self, Snapshot};
use crate::storage::Storage;

/// A snapshot that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewSnapshot<'a> {
    /// Its ID; `None`: a number that no snapshot has.
    pub id: Option<&'a str>,
    /// Its name. Several may have the same.
    pub name: &'a str,
    /// The time now: seconds since 1970.
    pub seconds: u32,
    /// The time now: nanoseconds within the second.
    pub nanoseconds: u32,
}

impl Qcow2 {
    /// Keeps the disk as it is now as a snapshot, without a machine's state; its ID. It is durable when this returns.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub fn create_snapshot(&self, new: NewSnapshot<'_>) -> Result<String, ChangeError> {
        let mut session = self.exclusive()?;
        if session.meta.geometry.data_file {
            return Err(ChangeError::DataFile);
        }
        let mut snapshots = session.snapshots()?;
        let id = unused_id(&snapshots, new.id)?;
        snapshots.push(Snapshot {
            id: id.clone().into_bytes(),
            name: new.name.as_bytes().to_vec(),
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            disk_size: Some(session.meta.header.size),
            l1_entries: session.meta.header.l1_entries,
            ..Snapshot::default()
        });
        // What cannot be is to be known before anything has changed.
        snapshot_table::encode(&snapshots).map_err(unusable)?;
        session.commit()?;
        let l1 = session.meta.l1.clone();
        session.check_room(&l1)?;
        session.mark()?;
        session.raise_tree(&l1)?;
        session.clear_l1_copied();
        if let Err(error) = session.add_snapshot(snapshots, &l1) {
            if !session.meta.stale {
                session.lower_tree(&l1, u64::MAX);
                session.refresh_copied()?;
            }
            session.finish();
            return Err(error);
        }
        session.finish();
        Ok(id)
    }

    /// Makes the disk what it was when a snapshot was taken, its size included. What has been written since, and is in no other
    /// snapshot, is lost. It is durable when this returns.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub fn apply_snapshot(&self, id_or_name: &str) -> Result<(), ChangeError> {
        let mut session = self.exclusive()?;
        let snapshots = session.snapshots()?;
        let snapshot = find(&snapshots, id_or_name)?;
        let size = snapshot.disk_size.unwrap_or(session.meta.header.size);
        let needed = session.meta.geometry.l1_entries(size);
        let needed = u32::try_from(needed)
            .ok()
            .filter(|needed| u64::from(*needed) * 8 <= L1_MAX)
            .ok_or(ChangeError::TooLarge {
                size,
                cluster: session.meta.geometry.cluster(),
            })?;
        // A machine's state is behind the disk's end, and stays with the snapshot alone.
        let mut l1 = session.l1_of(snapshot)?;
        l1.resize(usize::try_from(needed).map_err(|_| eio())?, 0);
        session.commit()?;
        session.check_room(&l1)?;
        session.arm_bitmaps()?;
        session.mark()?;
        session.raise_tree(&l1)?;
        let old = match session.replace_l1(&l1, size) {
            Ok(old) => old,
            Err(error) => {
                if !session.meta.stale {
                    session.lower_tree(&l1, u64::MAX);
                }
                session.finish();
                return Err(error);
            }
        };
        if let Err(error) = session.drop_tree(&old) {
            // The disk is as it should be.
            tracing::warn!(%error, "the space of the disk's former state was not given back");
            session.stay_marked();
        }
        session.finish();
        Ok(())
    }

    /// Deletes a snapshot, and frees what only it needed. It is durable when this returns.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the image is as it was then.
    pub fn delete_snapshot(&self, id_or_name: &str) -> Result<(), ChangeError> {
        let mut session = self.exclusive()?;
        let mut snapshots = session.snapshots()?;
        let found = find(&snapshots, id_or_name)?.clone();
        let l1 = session.l1_of(&found)?;
        session.commit()?;
        snapshots.retain(|snapshot| snapshot.id != found.id || *snapshot != found);
        session.check_drop(&l1, &snapshots)?;
        session.mark()?;
        if let Err(error) = session.replace_snapshots(&snapshots) {
            session.finish();
            return Err(error);
        }
        session.free_range(found.l1_offset, u64::from(found.l1_entries) * 8);
        let freed = session.drop_tree(&l1);
        if let Err(error) = freed.and_then(|()| session.refresh_copied()) {
            // The snapshot is gone all the same.
            tracing::warn!(%error, "the space of a deleted snapshot was not given back");
            session.stay_marked();
        }
        session.finish();
        Ok(())
    }
}

impl Session<'_> {
    fn snapshots(&self) -> Result<Vec<Snapshot>, ChangeError> {
        snapshot_table::load(self.storage(), &self.meta.header).map_err(unusable)
    }

    /// The L1 table of a snapshot.
    pub(crate) fn l1_of(&self, snapshot: &Snapshot) -> io::Result<Vec<u64>> {
        // All of it is in the file, or the image would not have been opened.
        let entries = usize::try_from(snapshot.l1_entries).map_err(|_| eio())?;
        let mut l1 = read_table(self.storage(), snapshot.l1_offset, entries)?;
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        Ok(l1)
    }

    /// Writes a copy of the L1 table for the last one of `snapshots`, and then the table.
    fn add_snapshot(
        &mut self,
        mut snapshots: Vec<Snapshot>,
        l1: &[u64],
    ) -> Result<(), ChangeError> {
        let mut copy = None;
        if !l1.is_empty() {
            let bytes = l1.iter().flat_map(|entry| (entry & !COPIED).to_be_bytes());
            let run = self.put(bytes.collect())?;
            if let Some(snapshot) = snapshots.last_mut() {
                snapshot.l1_offset = self.offset(run);
            }
            copy = Some(run);
        }
        let added = self
            .commit()
            .map_err(ChangeError::from)
            .and_then(|()| self.replace_snapshots(&snapshots));
        if let (Err(_), Some(run)) = (&added, copy) {
            self.give_back(run);
        }
        added
    }

    /// Makes these all snapshots that the image has.
    fn replace_snapshots(&mut self, snapshots: &[Snapshot]) -> Result<(), ChangeError> {
        let table = snapshot_table::encode(snapshots).map_err(unusable)?;
        let (_, old_len) =
            snapshot_table::load_with_len(self.storage(), &self.meta.header).map_err(unusable)?;
        let old = self.meta.header.snapshot_offset;
        let mut header = self.meta.header.clone();
        header.snapshots = u32::try_from(snapshots.len()).map_err(|_| eio())?;
        header.snapshot_offset = 0;
        let mut run = None;
        if !table.is_empty() {
            let new = self.put(table)?;
            header.snapshot_offset = self.offset(new);
            run = Some(new);
        }
        let switched = self
            .commit()
            .and_then(|()| self.switch(header, Part::Snapshots));
        match (switched, run) {
            (Ok(()), _) => {
                self.free_range(old, old_len);
                Ok(())
            }
            (Err(error), run) => {
                run.into_iter().for_each(|run| self.give_back(run));
                Err(error.into())
            }
        }
    }

    /// Makes this the active L1 table, of a disk of `size` bytes. What it leads to has its references for that. The old
    /// one is returned, whose references are to be dropped.
    fn replace_l1(&mut self, l1: &[u64], size: u64) -> Result<Vec<u64>, ChangeError> {
        let mut header = self.meta.header.clone();
        let old = (header.l1_offset, u64::from(header.l1_entries) * 8);
        header.size = size;
        header.l1_entries = u32::try_from(l1.len()).map_err(|_| eio())?;
        header.l1_offset = 0;
        let mut run = None;
        if !l1.is_empty() {
            let new = self.put(l1.iter().flat_map(|entry| entry.to_be_bytes()).collect())?;
            header.l1_offset = self.offset(new);
            run = Some(new);
        }
        if let Err(error) = self.switch_size(header) {
            run.into_iter().for_each(|run| self.give_back(run));
            return Err(error);
        }
        self.free_range(old.0, old.1);
        self.meta.shared.recorder.note(0, size);
        Ok(std::mem::replace(&mut self.meta.l1, l1.to_vec()))
    }

    /// Makes this header, with another size or another L1 table, that of the image. The bitmaps go with the size.
    pub(crate) fn switch_size(&mut self, mut header: Header) -> Result<(), ChangeError> {
        let resized = if header.size == self.meta.header.size {
            None
        } else {
            self.resized_bitmaps(header.size)?
        };
        let part = match &resized {
            None => Part::Mapping,
            Some(directory) => {
                directory.enter(&mut header);
                Part::Whole
            }
        };
        let switched = self.commit().and_then(|()| self.switch(header, part));
        if let Err(error) = switched {
            if let Some(directory) = resized {
                self.drop_directory(directory);
            }
            return Err(error.into());
        }
        if let Some(directory) = resized {
            self.adopt_directory(directory);
        }
        self.announce_size();
        Ok(())
    }
}

fn unusable(error: snapshot_table::SnapshotError) -> ChangeError {
    ChangeError::Snapshots(Box::new(error))
}

/// The ID for a new snapshot: the wanted one, or the number after the largest, or the smallest free one if there is none after.
fn unused_id(snapshots: &[Snapshot], wanted: Option<&str>) -> Result<String, ChangeError> {
    if let Some(id) = wanted {
        if snapshots
            .iter()
            .any(|snapshot| snapshot.id == id.as_bytes())
        {
            return Err(ChangeError::SnapshotExists(id.into()));
        }
        return Ok(id.into());
    }
    let numbers = snapshots
        .iter()
        .filter_map(|snapshot| snapshot.id().parse::<u64>().ok());
    let numbers: BTreeSet<u64> = numbers.collect();
    let after = numbers.last().map_or(Some(1), |last| last.checked_add(1));
    let free = || (1..).find(|number| !numbers.contains(number));
    Ok(after.or_else(free).unwrap_or(1).to_string())
}

/// The snapshot of this ID, or else the first of this name.
pub(crate) fn find<'a>(
    snapshots: &'a [Snapshot],
    id_or_name: &str,
) -> Result<&'a Snapshot, ChangeError> {
    let wanted = id_or_name.as_bytes();
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == wanted);
    by_id
        .or_else(|| snapshots.iter().find(|snapshot| snapshot.name == wanted))
        .ok_or_else(|| ChangeError::NoSnapshot(id_or_name.into()))
}

/// Makes `header` that of the disk as a snapshot has it, to be opened read-only.
pub(crate) fn look_at(
    header: &mut Header,
    storage: &dyn Storage,
    id_or_name: &str,
) -> Result<(), ChangeError> {
    let snapshots = snapshot_table::load(storage, header).map_err(unusable)?;
    let snapshot = find(&snapshots, id_or_name)?;
    header.l1_offset = snapshot.l1_offset;
    header.l1_entries = snapshot.l1_entries;
    header.size = snapshot.disk_size.unwrap_or(header.size);
    header.bitmaps = None;
    Ok(())
}

#[cfg(test)]
mod tests;
