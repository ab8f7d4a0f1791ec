//! Bitmaps of a disk in use that has nowhere to keep them: they are in memory, and end with the disk.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::qcow2::ChangeError;
use crate::qcow2::bitmap::{ALL_BITS_MAX, BITS_MAX};
use crate::qcow2::bitmap_table::NAME_MAX;
use crate::qcow2::dirty::{Bits, Recorded, Recorder};

/// The granularity of a bitmap unless its maker says another, in bytes.
const GRANULARITY: u64 = 64 << 10;

/// How many bitmaps a disk may have here.
const MANY: usize = 64;

/// A bitmap of a disk in use: which parts of the disk have been written since it was made or cleared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveBitmap {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk are marked together.
    pub granularity: u64,
    /// It records what is written.
    pub enabled: bool,
    /// It does not tell of all changes, since it was not saved after its last use or has data of an unknown kind: it can only be
    /// removed.
    pub broken: bool,
    /// It is kept in the image. Otherwise it ends with the machine.
    pub persistent: bool,
    /// How many bytes of the disk it marks; `None`: it is not in memory.
    pub marked: Option<u64>,
}

/// A change of a bitmap of a disk in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveBitmapChange {
    /// Adds one that marks nothing.
    Add {
        /// How many bytes are marked together: a power of two from 512 to 2 GiB. `None`: the image's cluster size, within
        /// 4 KiB and 64 KiB, which is also that of raw disks.
        granularity: Option<u64>,
        /// It records from now on.
        enabled: bool,
    },
    /// Takes it away, in whatever state it is.
    Remove,
    /// It marks nothing any more.
    Clear,
    /// It records from now on.
    Enable,
    /// It stays as it is.
    Disable,
}

/// The bitmaps of a raw disk.
#[derive(Debug, Default)]
pub(crate) struct Tracks {
    recorder: Recorder,
    /// Those that do not record. Held before the recorder's lock.
    still: Mutex<Vec<Recorded>>,
}

impl Tracks {
    fn still(&self) -> MutexGuard<'_, Vec<Recorded>> {
        self.still.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a range of the disk is about to change, in bytes.
    pub(crate) fn note(&self, offset: u64, len: u64) {
        self.recorder.note(offset, len);
    }

    /// The disk has `size` bytes now.
    pub(crate) fn resize(&self, size: u64) {
        let mut still = self.still();
        still.iter_mut().for_each(|(_, bits)| bits.resize(size));
        self.recorder.resize(size);
    }

    pub(crate) fn list(&self) -> Vec<LiveBitmap> {
        let still = self.still();
        let told = |(name, bits): &Recorded, enabled| LiveBitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity: bits.granularity(),
            enabled,
            broken: false,
            persistent: false,
            marked: Some(bits.marked()),
        };
        let mut all: Vec<_> = still.iter().map(|it| told(it, false)).collect();
        // One without a name is a backup's.
        let recorded = self.recorder.read();
        let recording = recorded.iter().filter(|(name, _)| !name.is_empty());
        all.extend(recording.map(|it| told(it, true)));
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Changes bitmap `name` of a disk of `size` bytes. Nobody changes the disk meanwhile.
    pub(crate) fn change(
        &self,
        name: &str,
        change: LiveBitmapChange,
        size: u64,
    ) -> Result<(), ChangeError> {
        let mut still = self.still();
        let wanted = name.as_bytes();
        let place = |all: &[Recorded]| all.iter().position(|(other, _)| other == wanted);
        let rests = place(&still);
        let records = place(&self.recorder.read());
        if let LiveBitmapChange::Add {
            granularity,
            enabled,
        } = change
        {
            let bits = self.new_bits((name, granularity), size, &still)?;
            if rests.is_some() || records.is_some() {
                return Err(ChangeError::BitmapExists(name.into()));
            }
            let new = (wanted.to_vec(), bits);
            if enabled {
                self.recorder.edit(|all| all.push(new));
            } else {
                still.push(new);
            }
            return Ok(());
        }
        if rests.is_none() && records.is_none() {
            return Err(ChangeError::NoBitmap(name.into()));
        }
        let mut taken = match (rests, records) {
            (Some(place), _) => still.remove(place),
            (None, Some(place)) => self.recorder.edit(|all| all.remove(place)),
            (None, None) => return Err(ChangeError::NoBitmap(name.into())),
        };
        let enabled = match change {
            LiveBitmapChange::Remove => return Ok(()),
            LiveBitmapChange::Enable => true,
            LiveBitmapChange::Disable => false,
            LiveBitmapChange::Clear | LiveBitmapChange::Add { .. } => {
                let bits = taken.1.granularity().trailing_zeros();
                taken.1 = Bits::new(bits, size);
                records.is_some()
            }
        };
        if enabled {
            self.recorder.edit(|all| all.push(taken));
        } else {
            still.push(taken);
        }
        Ok(())
    }

    fn new_bits(
        &self,
        (name, granularity): (&str, Option<u64>),
        size: u64,
        still: &[Recorded],
    ) -> Result<Bits, ChangeError> {
        let granularity = granularity.unwrap_or(GRANULARITY);
        if !granularity.is_power_of_two() || !(512..=2 << 30).contains(&granularity) {
            return Err(ChangeError::Granularity(granularity));
        }
        if name.is_empty() || name.len() > NAME_MAX {
            let why = "a bitmap's name must have from 1 to 1023 bytes";
            return Err(ChangeError::Bitmaps(why.into()));
        }
        let recorded = self.recorder.read();
        let count = still.len().saturating_add(recorded.len());
        if count >= MANY {
            return Err(ChangeError::ManyBitmaps(count));
        }
        let shift = granularity.trailing_zeros();
        let bytes = Bits::bytes_for(shift, size);
        let had = still.iter().chain(recorded.iter()).map(|(_, bits)| {
            let shift = bits.granularity().trailing_zeros();
            Bits::bytes_for(shift, size)
        });
        if bytes > BITS_MAX || had.sum::<u64>().saturating_add(bytes) > ALL_BITS_MAX {
            let name = name.to_owned();
            return Err(ChangeError::BitmapSize { name, bytes });
        }
        Ok(Bits::new(shift, size))
    }

    /// As `Qcow2::begin_next`, for a disk of `size` bytes.
    pub(crate) fn begin_next(
        &self,
        name: &str,
        (fresh, size): (bool, u64),
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), ChangeError> {
        let wanted = name.as_bytes();
        let look = |bits: &Bits| bits.each_range(&mut each);
        if self.recorder.look(wanted, look).is_none() {
            if self.still().iter().any(|(other, _)| other == wanted) {
                return Err(ChangeError::Disabled(name.into()));
            }
            if !fresh {
                return Err(ChangeError::NoBitmap(name.into()));
            }
            let add = LiveBitmapChange::Add {
                granularity: None,
                enabled: true,
            };
            self.change(name, add, size)?;
            self.recorder.look(wanted, |bits| bits.set(0, size));
        }
        if self.recorder.begin_next(wanted) {
            Ok(())
        } else {
            Err(ChangeError::NoBitmap(name.into()))
        }
    }

    /// As `Qcow2::adopt_next`.
    pub(crate) fn adopt_next(&self, name: &str) -> Result<(), ChangeError> {
        if self.recorder.adopt_next(name.as_bytes()) {
            Ok(())
        } else {
            Err(ChangeError::NoBitmap(name.into()))
        }
    }

    pub(crate) fn forget_next(&self) {
        self.recorder.forget_next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn marked(tracks: &Tracks) -> Vec<(String, bool, u64)> {
        let told = |it: LiveBitmap| (it.name, it.enabled, it.marked.unwrap());
        tracks.list().into_iter().map(told).collect()
    }

    #[test]
    fn a_bitmap_records_while_it_is_enabled_and_keeps_what_it_has_while_it_is_not() {
        let tracks = Tracks::default();
        let change = |change| tracks.change("a", change, SIZE);
        let add = LiveBitmapChange::Add {
            granularity: None,
            enabled: true,
        };
        change(add).unwrap();
        assert!(matches!(change(add), Err(ChangeError::BitmapExists(_))));
        tracks.note(0, 1);
        change(LiveBitmapChange::Disable).unwrap();
        tracks.note(SIZE - 1, 1);
        assert_eq!(marked(&tracks), [("a".into(), false, GRANULARITY)]);
        let refused = tracks.begin_next("a", (true, SIZE), |_, _| ());
        assert!(matches!(refused, Err(ChangeError::Disabled(_))));
        change(LiveBitmapChange::Enable).unwrap();
        tracks.note(SIZE - 1, 1);
        assert_eq!(marked(&tracks), [("a".into(), true, 2 * GRANULARITY)]);
        change(LiveBitmapChange::Clear).unwrap();
        assert_eq!(marked(&tracks), [("a".into(), true, 0)]);
        change(LiveBitmapChange::Remove).unwrap();
        assert_eq!(marked(&tracks), []);
        let gone = change(LiveBitmapChange::Clear);
        assert!(matches!(gone, Err(ChangeError::NoBitmap(_))));
    }

    #[test]
    fn a_bitmap_that_a_backup_makes_marks_everything_until_the_backup_has_succeeded() {
        let tracks = Tracks::default();
        let none = tracks.begin_next("a", (false, SIZE), |_, _| ());
        assert!(matches!(none, Err(ChangeError::NoBitmap(_))));
        tracks.begin_next("a", (true, SIZE), |_, _| ()).unwrap();
        tracks.note(0, 1);
        assert_eq!(marked(&tracks), [("a".into(), true, SIZE)]);
        tracks.adopt_next("a").unwrap();
        assert_eq!(marked(&tracks), [("a".into(), true, GRANULARITY)]);
    }

    #[test]
    fn names_sizes_and_numbers_are_bounded() {
        let tracks = Tracks::default();
        let add = |name: &str, granularity| {
            let add = LiveBitmapChange::Add {
                granularity,
                enabled: true,
            };
            tracks.change(name, add, 1 << 50)
        };
        assert!(add("", None).is_err() && add(&"x".repeat(1024), None).is_err());
        assert!(add("a", Some(1000)).is_err() && add("a", Some(256)).is_err());
        assert!(matches!(
            add("a", Some(512)),
            Err(ChangeError::BitmapSize { .. })
        ));
        for number in 0..MANY {
            add(&number.to_string(), Some(1 << 31)).unwrap();
        }
        let more = add("more", Some(1 << 31));
        assert!(matches!(more, Err(ChangeError::ManyBitmaps(MANY))));
    }
}
