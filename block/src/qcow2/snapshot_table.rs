//! The snapshot table ("Snapshots"): one entry of variable length per internal snapshot.
//!
//! Reading costs no more memory than the table takes in the file. What is past the fields known here is kept.

use std::borrow::Cow;
use std::io;

use super::fields::{put, u16_at, u32_at, u64_at};
use super::header::{Header, L1_MAX, OFFSET_END, SNAPSHOTS_MAX};
use crate::storage::Storage;

/// The largest snapshot table in bytes.
pub(crate) const TABLE_MAX: u64 = 64 << 20;
/// The most extra data of an entry, in bytes.
pub(crate) const EXTRA_MAX: u32 = 1024;

/// Why the snapshots cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// The host's error.
    #[error("the snapshot table cannot be read")]
    Read(#[source] io::Error),
    /// The table is not all there.
    #[error("the entry of snapshot {index} at {offset:#x} is past the end of the file")]
    PastEnd {
        /// Which one, from 0.
        index: u32,
        /// Where its entry is, in bytes.
        offset: u64,
    },
    /// An entry has more extra data than is supported.
    #[error("the entry of snapshot {index} has {len} bytes of extra data, more than {EXTRA_MAX}")]
    Extra {
        /// Which one, from 0.
        index: u32,
        /// How much, in bytes.
        len: u32,
    },
    /// The table is too large.
    #[error("the snapshot table has {0} bytes, more than {TABLE_MAX}: delete snapshots")]
    TableSize(u64),
    /// There are too many snapshots.
    #[error("{0} snapshots are more than {SNAPSHOTS_MAX}: delete some")]
    Count(usize),
    /// A name is too long for its field.
    #[error("a snapshot's id or name has {0} bytes, more than 65535")]
    Name(usize),
    /// A snapshot's L1 table cannot be where it is said to be.
    #[error("snapshot {name:?}: the L1 table cannot have {entries} entries at {offset:#x}")]
    L1 {
        /// The snapshot's name.
        name: String,
        /// The table's offset in bytes.
        offset: u64,
        /// How many entries it has.
        entries: u32,
    },
}

/// One internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Where its L1 table is, in bytes.
    pub l1_offset: u64,
    /// How many entries the L1 table has.
    pub l1_entries: u32,
    /// Its unique ID, a number by custom.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// When it was taken: nanoseconds within the second.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub guest_time: u64,
    /// The size of the machine's saved state in bytes; it is kept behind the disk's end.
    pub vm_state_size: u64,
    /// The size of the disk in bytes; an old entry does not say.
    pub disk_size: Option<u64>,
    /// How many instructions the guest had executed, where it is counted.
    pub instructions: Option<u64>,
    /// Extra data past the known fields.
    pub unknown: Vec<u8>,
}

impl Snapshot {
    /// The length of an entry's fixed part in bytes.
    pub(crate) const FIXED: usize = 40;

    /// The ID as text.
    pub(crate) fn id(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.id)
    }

    /// The name as text.
    pub(crate) fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// Whether the L1 table can be where it is said to be.
    pub(crate) fn check_l1(&self, header: &Header) -> Result<(), SnapshotError> {
        let len = u64::from(self.l1_entries) * 8;
        let end = self.l1_offset.checked_add(len);
        let aligned = header.geometry().within(self.l1_offset) == 0;
        let placed = self.l1_offset != 0 || len == 0;
        if aligned && placed && len <= L1_MAX && end.is_some_and(|end| end <= OFFSET_END) {
            return Ok(());
        }
        Err(SnapshotError::L1 {
            name: self.name().into_owned(),
            offset: self.l1_offset,
            entries: self.l1_entries,
        })
    }

    /// Decodes an entry that is all there.
    fn decode(entry: &[u8]) -> Self {
        let [extra, id, name] =
            lengths(entry).map(|len| usize::try_from(len).unwrap_or(usize::MAX));
        let part = |start: usize, len: usize| {
            entry
                .get(start..)
                .and_then(|rest| rest.get(..len))
                .unwrap_or_default()
        };
        let after = Self::FIXED.saturating_add(extra);
        let extra = part(Self::FIXED, extra);
        let field = |end: usize| (extra.len() >= end).then(|| u64_at(extra, end - 8));
        let known = match extra.len() {
            24.. => 24,
            16.. => 16,
            len => len,
        };
        Self {
            l1_offset: u64_at(entry, 0),
            l1_entries: u32_at(entry, 8),
            id: part(after, id).to_vec(),
            name: part(after.saturating_add(id), name).to_vec(),
            seconds: u32_at(entry, 16),
            nanoseconds: u32_at(entry, 20),
            guest_time: u64_at(entry, 24),
            vm_state_size: field(8).unwrap_or(u64::from(u32_at(entry, 32))),
            disk_size: field(16),
            instructions: field(24),
            unknown: extra.get(known..).unwrap_or_default().to_vec(),
        }
    }

    fn extra(&self) -> Vec<u8> {
        let mut extra = Vec::new();
        if let Some(disk_size) = self.disk_size {
            extra.extend(self.vm_state_size.to_be_bytes());
            extra.extend(disk_size.to_be_bytes());
            extra.extend(
                self.instructions
                    .iter()
                    .flat_map(|number| number.to_be_bytes()),
            );
            extra.extend_from_slice(&self.unknown);
        } else if self.vm_state_size > u64::from(u32::MAX) {
            extra.extend(self.vm_state_size.to_be_bytes());
        }
        extra
    }

    fn encode(&self, index: usize, out: &mut Vec<u8>) -> Result<(), SnapshotError> {
        let length = |name: &[u8]| u16::try_from(name.len()).map_err(|_| name.len());
        let id = length(&self.id).map_err(SnapshotError::Name)?;
        let name = length(&self.name).map_err(SnapshotError::Name)?;
        let extra = self.extra();
        let len = u32::try_from(extra.len()).unwrap_or(u32::MAX);
        if len > EXTRA_MAX {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            return Err(SnapshotError::Extra { index, len });
        }
        let mut fixed = [0; Self::FIXED];
        put(&mut fixed, 0, &self.l1_offset.to_be_bytes());
        put(&mut fixed, 8, &self.l1_entries.to_be_bytes());
        put(&mut fixed, 12, &id.to_be_bytes());
        put(&mut fixed, 14, &name.to_be_bytes());
        put(&mut fixed, 16, &self.seconds.to_be_bytes());
        put(&mut fixed, 20, &self.nanoseconds.to_be_bytes());
        put(&mut fixed, 24, &self.guest_time.to_be_bytes());
        // Where it does not fit, the extra data has it.
        let short = u32::try_from(self.vm_state_size).unwrap_or(0);
        put(&mut fixed, 32, &short.to_be_bytes());
        put(&mut fixed, 36, &len.to_be_bytes());
        out.extend_from_slice(&fixed);
        out.extend_from_slice(&extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    }
}

/// The lengths of extra data, ID and name, in bytes.
fn lengths(entry: &[u8]) -> [u64; 3] {
    let (id, name) = (u16_at(entry, 12), u16_at(entry, 14));
    [u32_at(entry, 36).into(), id.into(), name.into()]
}

/// Reads the table entry by entry.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    storage: &'a dyn Storage,
    end: u64,
    offset: u64,
    start: u64,
    index: u32,
}

impl<'a> Entries<'a> {
    /// Starts with the first entry of the table at `offset`.
    pub(crate) fn new(storage: &'a dyn Storage, offset: u64) -> Result<Self, SnapshotError> {
        Ok(Self {
            storage,
            end: storage.len().map_err(SnapshotError::Read)?,
            offset,
            start: offset,
            index: 0,
        })
    }

    /// How many bytes the entries read so far have.
    pub(crate) fn table_len(&self) -> u64 {
        self.offset - self.start
    }

    /// Reads the next entry. Extra data over the limit is cut to the known fields, and its length is returned too.
    pub(crate) fn next(&mut self) -> Result<(Snapshot, Option<u32>), SnapshotError> {
        let (index, offset) = (self.index, self.offset);
        let past_end = SnapshotError::PastEnd { index, offset };
        let mut entry = vec![0; Snapshot::FIXED];
        let Some(mut at) = self.within(offset, entry.len() as u64) else {
            return Err(past_end);
        };
        self.storage
            .read_at(&mut entry, offset)
            .map_err(SnapshotError::Read)?;
        let [extra, id, name] = lengths(&entry);
        let kept = if extra > EXTRA_MAX.into() { 24 } else { extra };
        for (len, wanted) in [(kept, kept), (extra - kept, 0), (id, id), (name, name)] {
            let Some(next) = self.within(at, len) else {
                return Err(past_end);
            };
            let start = entry.len();
            entry.resize(start + usize::try_from(wanted).unwrap_or(0), 0);
            if let Some(room) = entry.get_mut(start..) {
                self.storage
                    .read_at(room, at)
                    .map_err(SnapshotError::Read)?;
            }
            at = next;
        }
        put(
            &mut entry,
            36,
            &u32::try_from(kept).unwrap_or(0).to_be_bytes(),
        );
        self.offset = offset + (at - offset).next_multiple_of(8);
        self.index += 1;
        if self.table_len() > TABLE_MAX {
            return Err(SnapshotError::TableSize(self.table_len()));
        }
        let cut = (kept != extra).then_some(u32::try_from(extra).unwrap_or(u32::MAX));
        Ok((Snapshot::decode(&entry), cut))
    }

    /// The end of a part of an entry, if that is within the file.
    fn within(&self, offset: u64, len: u64) -> Option<u64> {
        offset.checked_add(len).filter(|end| *end <= self.end)
    }
}

/// Reads and validates the whole table.
pub(crate) fn load(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>, SnapshotError> {
    load_with_len(storage, header).map(|(snapshots, _)| snapshots)
}

/// As [`load`], with the table's length in bytes.
pub(crate) fn load_with_len(
    storage: &dyn Storage,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64), SnapshotError> {
    let mut snapshots = Vec::new();
    let len = each(storage, header, |snapshot| snapshots.push(snapshot))?;
    Ok((snapshots, len))
}

/// Reads and validates the table, and gives each entry to `visit`, so that they are not all in memory; the table's length in
/// bytes.
pub(crate) fn each(
    storage: &dyn Storage,
    header: &Header,
    mut visit: impl FnMut(Snapshot),
) -> Result<u64, SnapshotError> {
    if header.snapshots == 0 {
        return Ok(0);
    }
    let mut entries = Entries::new(storage, header.snapshot_offset)?;
    for index in 0..header.snapshots {
        let (snapshot, cut) = entries.next()?;
        if let Some(len) = cut {
            return Err(SnapshotError::Extra { index, len });
        }
        snapshot.check_l1(header)?;
        visit(snapshot);
    }
    Ok(entries.table_len())
}

/// Encodes a table.
pub(crate) fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>, SnapshotError> {
    if snapshots.len() > SNAPSHOTS_MAX as usize {
        return Err(SnapshotError::Count(snapshots.len()));
    }
    let mut table = Vec::new();
    for (index, snapshot) in snapshots.iter().enumerate() {
        snapshot.encode(index, &mut table)?;
    }
    if table.len() as u64 > TABLE_MAX {
        return Err(SnapshotError::TableSize(table.len() as u64));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::Bench;

    fn header(bench: &Bench) -> Header {
        Header::load(&bench.storage("image")).unwrap()
    }

    fn image(bench: &Bench, snapshots: &[&str]) -> Header {
        bench.line("qemu-img create -q -f qcow2 image 10M");
        for name in snapshots {
            bench.line(&format!("qemu-img snapshot -c {name} image"));
        }
        header(bench)
    }

    #[test]
    fn tables_of_qemu_are_read_and_encode_to_the_same_bytes() {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let header = image(&bench, &["one", "two-and-more", "drei-ä"]);
        let snapshots = load(&bench.storage("image"), &header).unwrap();
        let names: Vec<_> = snapshots.iter().map(|it| it.name()).collect();
        assert_eq!(names, ["one", "two-and-more", "drei-ä"]);
        assert_eq!(snapshots[2].id(), "3");
        assert!(snapshots.iter().all(|it| it.disk_size == Some(10 << 20)));
        assert!(snapshots.iter().all(|it| it.instructions.is_some()));
        assert!(
            snapshots
                .iter()
                .all(|it| it.vm_state_size == 0 && it.l1_entries == 1)
        );
        let table = encode(&snapshots).unwrap();
        assert_eq!(
            bench.bytes("image", header.snapshot_offset, table.len()),
            table
        );
    }

    fn sample(disk_size: Option<u64>) -> Snapshot {
        Snapshot {
            l1_offset: 0x50000,
            l1_entries: 1,
            id: b"12".into(),
            name: b"\xff name".into(),
            seconds: 1,
            nanoseconds: 2,
            guest_time: 3,
            vm_state_size: 4,
            disk_size,
            ..Snapshot::default()
        }
    }

    fn reread(table: &[u8]) -> Result<Vec<Snapshot>, SnapshotError> {
        let bench = Bench::new();
        let storage = bench.storage("table");
        storage.write_at(table, 0).unwrap();
        let mut entries = Entries::new(&storage, 0).unwrap();
        let mut all = Vec::new();
        while entries.table_len() < table.len() as u64 {
            all.push(entries.next()?.0);
        }
        Ok(all)
    }

    #[test]
    fn entries_of_all_ages_survive_a_round_trip() {
        let old = sample(None);
        let mut large = sample(None);
        large.vm_state_size = 1 << 40;
        let middle = sample(Some(5));
        let mut new = sample(Some(6));
        new.instructions = Some(7);
        let mut unknown = new.clone();
        unknown.unknown = b"more than is known".into();
        let mut odd = middle.clone();
        odd.unknown = b"odd".into();
        let all = [old, large, middle, new, unknown, odd];
        let table = encode(&all).unwrap();
        assert_eq!(table.len() % 8, 0);
        assert_eq!(reread(&table).unwrap(), all);
    }

    #[test]
    fn what_cannot_be_encoded_is_refused() {
        let mut snapshot = sample(None);
        snapshot.name = vec![b'x'; 65_536];
        assert!(matches!(
            encode(&[snapshot.clone()]),
            Err(SnapshotError::Name(65_536))
        ));
        snapshot.name.pop();
        assert!(encode(&[snapshot.clone()]).is_ok());
        let table = vec![snapshot; 1024];
        assert!(matches!(encode(&table), Err(SnapshotError::TableSize(_))));
        let table = vec![Snapshot::default(); 65_537];
        assert!(matches!(encode(&table), Err(SnapshotError::Count(65_537))));
        let mut extra = sample(Some(0));
        extra.unknown = vec![0; 1009];
        assert!(matches!(
            encode(&[extra]),
            Err(SnapshotError::Extra { len: 1025, .. })
        ));
    }

    #[test]
    fn entries_past_the_end_and_bad_fields_are_refused() {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let header = image(&bench, &["one"]);
        bench.line("truncate -s +8K image");
        let storage = bench.storage("image");
        let at = header.snapshot_offset;
        let tried = |offset: u64, bytes: &[u8]| {
            let old = bench.bytes("image", at + offset, bytes.len());
            bench.poke("image", at + offset, bytes);
            let result = load(&storage, &header);
            bench.poke("image", at + offset, &old);
            result
        };
        assert!(tried(0, &[]).is_ok());
        assert!(matches!(tried(0, &[0x80]), Err(SnapshotError::L1 { .. })));
        assert!(matches!(tried(6, &[2]), Err(SnapshotError::L1 { .. })));
        assert!(matches!(tried(8, &[0x7f]), Err(SnapshotError::L1 { .. })));
        assert!(matches!(
            tried(36, &[0, 0, 4, 1]),
            Err(SnapshotError::Extra { len: 1025, .. })
        ));
        assert!(matches!(
            tried(36, &[0xff; 4]),
            Err(SnapshotError::PastEnd { index: 0, .. })
        ));
        let mut claims = header.clone();
        claims.snapshots = 65_536;
        claims.snapshot_offset = 1 << 50;
        assert!(matches!(
            load(&storage, &claims),
            Err(SnapshotError::PastEnd { index: 0, .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_tables_never_panic(
            table in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600),
        ) {
            if let Ok(all) = reread(&table) {
                let again = encode(&all).unwrap();
                proptest::prop_assert_eq!(reread(&again).unwrap(), all);
            }
        }
    }
}
