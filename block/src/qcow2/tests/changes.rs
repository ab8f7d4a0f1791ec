//! Power cuts and failing storage while snapshots, sizes and bitmaps change: an image is what it was before the change or
//! what it is after it, and the rest of it is not touched.
//!
//! `QCOW2_CHANGES` says how many sequences are run, `QCOW2_CHANGE` which one alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::crash::{Rng, audit, blank, open, open_over};
use super::memory::{Event, Memory};
use crate::image::Image;
use crate::qcow2::bitmap_table::{self, IN_USE};
use crate::qcow2::check::{self, Severity};
use crate::qcow2::create::Preallocation;
use crate::qcow2::header::{DIRTY, Header};
use crate::qcow2::image::Qcow2;
use crate::qcow2::repair::{Repair, repair};
use crate::qcow2::session::ChangeError;
use crate::qcow2::snapshot::{NewSnapshot, look_at};
use crate::qcow2::snapshot_table;

const SECTOR: u64 = 512;
/// What a bit of the bitmaps stands for.
const GRAIN: u64 = 4096;
/// What backing files are full of.
const BELOW: u8 = 200;

fn len(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// One byte for each sector, as all of a sector's bytes are the same.
type Content = Vec<u8>;

/// What an image is to hold.
#[derive(Clone, Default)]
struct State {
    now: Content,
    /// What a sector may be otherwise until the next flush.
    also: Vec<BTreeSet<u8>>,
    /// By ID.
    snapshots: Vec<(String, Content)>,
    /// The parts of the disk that the bitmap has to have, if there is one.
    bitmap: Option<BTreeSet<u64>>,
}

impl State {
    fn resize(&mut self, sectors: u64) {
        self.now.resize(len(sectors), 0);
        self.also.resize(len(sectors), BTreeSet::new());
        if let Some(bits) = &mut self.bitmap {
            bits.retain(|grain| grain * GRAIN < sectors * SECTOR);
        }
    }

    fn set(&mut self, first: u64, count: u64, byte: u8) {
        for sector in len(first)..len(first + count) {
            let old = std::mem::replace(&mut self.now[sector], byte);
            self.also[sector].insert(old);
            // Zeros that are written where zeros are need not be marked.
            if let Some(bits) = self.bitmap.as_mut().filter(|_| byte != 0 || old != 0) {
                bits.insert(sector as u64 * SECTOR / GRAIN);
            }
        }
    }

    fn flushed(&mut self) {
        self.also.iter_mut().for_each(BTreeSet::clear);
    }

    /// What is different in an image, if anything.
    fn differs(&self, image: &Qcow2, disk: &Disk) -> Option<String> {
        let storage = &disk.storage;
        if image.size() != self.now.len() as u64 * SECTOR {
            return Some(format!("{} bytes", image.size()));
        }
        for (number, found) in content(image).iter().enumerate() {
            if *found != self.now[number] && !self.also[number].contains(found) {
                return Some(format!(
                    "sector {number} is {found} and not {} or {:?}",
                    self.now[number], self.also[number]
                ));
            }
        }
        let header = Header::load(&**storage).unwrap();
        let snapshots = snapshot_table::load(&**storage, &header).unwrap();
        let found: Vec<String> = snapshots.iter().map(|it| it.id().into_owned()).collect();
        let wanted: Vec<String> = self.snapshots.iter().map(|(id, _)| id.clone()).collect();
        if found != wanted {
            return Some(format!("snapshots {found:?} and not {wanted:?}"));
        }
        for (id, wanted) in &self.snapshots {
            if content(&disk.open_at(id)) != *wanted {
                return Some(format!("snapshot {id}"));
            }
        }
        self.bitmap_differs(image)
    }

    fn bitmap_differs(&self, image: &Qcow2) -> Option<String> {
        let meta = image.lock();
        let header = &meta.header;
        let Some(extension) = header.consistent_bitmaps() else {
            return self.bitmap.is_some().then(|| "no bitmap".to_owned());
        };
        let Some(wanted) = &self.bitmap else {
            return Some("a bitmap".into());
        };
        let geometry = meta.geometry;
        let list = bitmap_table::load(&*meta.storage, &extension, &geometry, header.size).unwrap();
        if list[0].flags & IN_USE != 0 {
            return None;
        }
        let mut marked = BTreeSet::new();
        for (_, bits) in meta.shared.recorder.read().iter() {
            bits.each_range(|offset, len| {
                marked.extend(offset / GRAIN..(offset + len).div_ceil(GRAIN));
            });
        }
        let missing: Vec<_> = wanted.difference(&marked).collect();
        (!missing.is_empty()).then(|| format!("the bitmap misses {missing:?}"))
    }
}

fn content(image: &Qcow2) -> Content {
    let mut bytes = vec![0; len(image.size())];
    image.read(0, &mut bytes).unwrap();
    let sectors = bytes.chunks(512).map(|sector| {
        assert!(
            sector.iter().all(|byte| *byte == sector[0]),
            "a torn sector"
        );
        sector[0]
    });
    sectors.collect()
}

/// An image and what lies below it.
#[derive(Clone)]
struct Disk {
    storage: Arc<Memory>,
    base: Option<Arc<Memory>>,
}

impl Disk {
    fn open(&self) -> Qcow2 {
        open_over(Arc::clone(&self.storage), false, self.base.as_ref())
    }

    fn open_at(&self, snapshot: &str) -> Qcow2 {
        let mut header = Header::load(&*self.storage).unwrap();
        look_at(&mut header, &*self.storage, snapshot).unwrap();
        let storage = Memory::new(self.storage.bytes());
        header.store_mapping(&*storage).unwrap();
        open_over(storage, true, self.base.as_ref())
    }

    /// Opens what a power cut has left, as it is opened for writing: what is marked dirty gets repaired. The result is judged.
    fn reopen(&self, bytes: Vec<u8>) -> (Qcow2, Self) {
        let storage = Memory::new(bytes);
        // Whatever repair would mend: nothing may be lost without one.
        audit(&open(Memory::new(storage.bytes()), false));
        let header = Header::load(&*storage).unwrap();
        if header.incompatible & DIRTY != 0 {
            let report = repair(&*storage, Repair::All, &mut |_| ()).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0));
        } else if header.version >= 3 {
            let mut corruptions = Vec::new();
            let report = check::check(&*storage, &mut |finding| {
                if finding.severity != Severity::Leak {
                    corruptions.push(finding.message);
                }
            });
            assert_eq!(report.unwrap().corruptions, 0, "{corruptions:?}");
        }
        let disk = Self {
            storage,
            base: self.base.clone(),
        };
        (disk.open(), disk)
    }
}

/// An image after a power cut, some of whose writes since the last sync are lost.
pub(super) fn cut(durable: &[u8], pending: &[Event], all: bool, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    for event in pending {
        let mut keep = |event: Event| {
            if all || rng.below(2) == 0 {
                event.apply_to(&mut bytes);
            }
        };
        match event {
            Event::Write(offset, data) => {
                for (at, sector) in (*offset..).step_by(512).zip(data.chunks(512)) {
                    keep(Event::Write(at, sector.to_vec()));
                }
            }
            other => keep(other.clone()),
        }
    }
    bytes
}

/// A sequence of changes, and what it should give.
struct Bench {
    rng: Rng,
    image: Option<Qcow2>,
    disk: Disk,
    state: State,
    /// The operation may write a header of several sectors, and lose the bitmaps when it is cut off.
    rewrites: bool,
    next_id: u64,
    /// The most that a disk grows to, in sectors.
    most: u64,
    v2: bool,
    /// Refcounts of more than one bit.
    counts: bool,
}

impl Bench {
    fn image(&self) -> &Qcow2 {
        self.image.as_ref().unwrap()
    }

    /// One operation; the states that an image may be in while it is under way, besides those before and after it.
    fn act(&mut self, byte: u8) -> (Result<(), ChangeError>, Vec<State>) {
        let sectors = self.state.now.len() as u64;
        let first = self.rng.below(sectors);
        let most = [1, 9, 64, 300][len(self.rng.below(4))];
        let count = (1 + self.rng.below(most)).min(sectors - first);
        let (offset, bytes) = (first * SECTOR, count * SECTOR);
        let mut after = self.state.clone();
        let what = self.rng.below(23);
        self.rewrites = matches!(what, 10 | 14 | 16..20);
        let result = match what {
            0..=5 => {
                after.set(first, count, byte);
                let result = self.image().write(offset, &vec![byte; len(bytes)]);
                result.map_err(ChangeError::from)
            }
            6 | 7 => {
                after.set(first, count, 0);
                let unmap = self.rng.below(2) == 0;
                let result = self.image().write_zeroes(offset, bytes, unmap);
                result.map_err(ChangeError::from)
            }
            8 | 9 => {
                let result = self.image().flush();
                after.flushed();
                result.map_err(ChangeError::from)
            }
            10 => {
                // Nobody would hear of a failure.
                self.disk.storage.fail(None);
                self.image = None;
                self.image = Some(self.disk.open());
                after.flushed();
                Ok(())
            }
            11..=13 => self.create(&mut after),
            14 => self.apply(&mut after),
            15 => self.delete(&mut after),
            16 | 17 => {
                let (result, between) = self.resize(&mut after);
                return self.end(result, after, between);
            }
            18 | 19 => self.bitmaps(&mut after),
            20 | 21 => self.compressed(&mut after, first, byte),
            _ => self.discard(&mut after, first, count),
        };
        let between = vec![self.mixed(&after)];
        self.end(result, after, between)
    }

    fn end(
        &mut self,
        result: Result<(), ChangeError>,
        after: State,
        mut between: Vec<State>,
    ) -> (Result<(), ChangeError>, Vec<State>) {
        between.push(self.state.clone());
        between.push(after.clone());
        if result.is_ok() {
            self.state = after;
        }
        (result, between)
    }

    /// The state before, each sector of which may also be as after.
    fn mixed(&self, after: &State) -> State {
        let mut mixed = self.state.clone();
        if mixed.now.len() == after.now.len() {
            for (sector, also) in mixed.also.iter_mut().enumerate() {
                also.insert(after.now[sector]);
            }
        }
        mixed
    }

    /// Writes the whole cluster that a sector is in.
    fn compressed(&self, after: &mut State, sector: u64, byte: u8) -> Result<(), ChangeError> {
        let cluster = self.image().geometry().cluster() / SECTOR;
        let first = sector - sector % cluster;
        let count = cluster.min(self.state.now.len() as u64 - first);
        after.set(first, count, byte);
        let data = vec![byte; len(count * SECTOR)];
        let image = self.image();
        if !image.write_compressed(first * SECTOR, &data)? {
            image.write(first * SECTOR, &data)?;
        }
        Ok(())
    }

    /// What it takes away becomes zeros.
    fn discard(&self, after: &mut State, first: u64, count: u64) -> Result<(), ChangeError> {
        let image = self.image();
        let result = image.discard(first * SECTOR, count * SECTOR);
        for (sector, byte) in (0..).zip(content(image)) {
            if byte != after.now[len(sector)] {
                assert!((first..first + count).contains(&sector) && byte == 0);
                after.set(sector, 1, byte);
            }
        }
        Ok(result?)
    }

    fn create(&mut self, after: &mut State) -> Result<(), ChangeError> {
        if self.state.snapshots.len() > 3 {
            return Ok(());
        }
        let new = NewSnapshot {
            id: None,
            name: "a name",
            seconds: 1,
            nanoseconds: 2,
        };
        let id = self.image().create_snapshot(new)?;
        after.flushed();
        after.snapshots.push((id, after.now.clone()));
        self.next_id += 1;
        Ok(())
    }

    fn any_snapshot(&mut self) -> Option<usize> {
        let count = self.state.snapshots.len() as u64;
        (count != 0).then(|| len(self.rng.below(count)))
    }

    fn apply(&mut self, after: &mut State) -> Result<(), ChangeError> {
        let Some(number) = self.any_snapshot() else {
            return Ok(());
        };
        let (id, content) = self.state.snapshots[number].clone();
        self.image().apply_snapshot(&id)?;
        after.resize(content.len() as u64);
        after.set(0, content.len() as u64, 0);
        after.now = content;
        after.flushed();
        Ok(())
    }

    fn delete(&mut self, after: &mut State) -> Result<(), ChangeError> {
        let Some(number) = self.any_snapshot() else {
            return Ok(());
        };
        let (id, _) = after.snapshots.remove(number);
        after.flushed();
        self.image().delete_snapshot(&id)
    }

    fn resize(&mut self, after: &mut State) -> (Result<(), ChangeError>, Vec<State>) {
        if self.v2 && !self.state.snapshots.is_empty() {
            return (Ok(()), Vec::new());
        }
        let sectors = 1 + self.rng.below(self.most);
        let how = match self.rng.below(4) {
            0 => Preallocation::Metadata,
            1 => Preallocation::Full,
            _ => Preallocation::Off,
        };
        after.flushed();
        let flushed = self.mixed(&self.state);
        after.resize(sectors);
        let result = self.image().resize(sectors * SECTOR, how);
        (result, vec![flushed])
    }

    fn bitmaps(&mut self, after: &mut State) -> Result<(), ChangeError> {
        if self.v2 {
            return Ok(());
        }
        if after.bitmap.take().is_some() {
            return self.image().remove_bitmap("bits");
        }
        after.bitmap = Some(BTreeSet::new());
        self.image().add_bitmap("bits", Some(GRAIN), true)
    }
}

fn bench(seed: u64, options: &str) -> Option<(Bench, Vec<u8>)> {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let sectors = 100 + rng.below(400);
    let bytes = blank(options, sectors * SECTOR)?;
    let storage = Memory::new(bytes.clone());
    let mut state = State::default();
    let mut base = None;
    if rng.below(3) == 0 {
        let below = 1 + rng.below(2 * sectors);
        state.now.resize(len(below), BELOW);
        base = Some(Memory::new(vec![BELOW; len(below * SECTOR)]));
    }
    state.resize(sectors);
    let disk = Disk { storage, base };
    let bench = Bench {
        rng,
        image: Some(disk.open()),
        disk,
        state,
        rewrites: false,
        next_id: 1,
        most: 900,
        v2: options.contains("0.10"),
        counts: !options.ends_with("refcount_bits=1"),
    };
    Some((bench, bytes))
}

fn judge(disk: &Disk, bytes: Vec<u8>, states: &[State]) {
    let (image, disk) = disk.reopen(bytes);
    let mut why = Vec::new();
    for state in states {
        match state.differs(&image, &disk) {
            None => return,
            Some(difference) => why.push(difference),
        }
    }
    panic!("the image is in none of its states: {why:?}");
}

/// How many power cuts there were.
fn sequence(seed: u64, options: &str) -> u64 {
    let Some((mut bench, mut durable)) = bench(seed, options) else {
        return 0;
    };
    let mut cuts = 0;
    let mut pending: Vec<Event> = Vec::new();
    for number in 0..40_u8 {
        let seen = bench.disk.storage.log_len();
        let (result, mut states) = bench.act(number + 1);
        if bench.rewrites {
            states.extend(states.clone().into_iter().map(|state| State {
                bitmap: None,
                ..state
            }));
        }
        match result {
            Ok(()) => {}
            Err(ChangeError::RefcountFull { .. }) if !bench.counts => {}
            Err(error) => panic!("operation {number}: {error}: {:?}", error),
        }
        for event in bench.disk.storage.log().split_off(seen) {
            let sync = matches!(event, Event::Sync);
            pending.push(event);
            if sync {
                pending
                    .drain(..)
                    .for_each(|event| event.apply_to(&mut durable));
            }
            if bench.rng.below(4) == 0 {
                let all = bench.rng.below(3) == 0;
                let left = cut(&durable, &pending, all, &mut bench.rng);
                judge(&bench.disk, left, &states);
                cuts += 1;
            }
        }
    }
    bench.image = None;
    let (image, disk) = bench.disk.reopen(bench.disk.storage.bytes());
    assert_eq!(bench.state.differs(&image, &disk), None);
    let report = check::check(&*disk.storage, &mut |_| ()).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    cuts
}

const SHAPES: [&str; 8] = [
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=64k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=1024,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=512,refcount_bits=8",
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn power_cuts_during_changes_leave_the_old_or_the_new() {
    let count = number("QCOW2_CHANGES").unwrap_or(16);
    let seeds = number("QCOW2_CHANGE").map_or(0..count, |seed| seed..seed + 1);
    let mut cuts = 0;
    for seed in seeds {
        let options = SHAPES[len(seed) % SHAPES.len()];
        let done = std::panic::catch_unwind(|| sequence(seed + 1, options));
        cuts += done.unwrap_or_else(|_| panic!("sequence {seed} on {options} failed"));
    }
    eprintln!("{cuts} power cuts");
}

/// Lets the change that comes after `skip` others fail, and `more` after it.
fn faults(skip: u64, more: u64, code: i32) -> super::memory::Fault {
    let mut number = 0;
    Box::new(move |_: &Event| {
        number += 1;
        (skip < number && number <= skip + 1 + more).then_some(code)
    })
}

fn failing(seed: u64, options: &str) {
    let Some((mut bench, _)) = bench(seed, options) else {
        return;
    };
    for number in 0..60_u8 {
        let skip = bench.rng.below(12);
        let more = bench.rng.below(3);
        let storage = &bench.disk.storage;
        storage.fail(Some(faults(skip, more, libc::ENOSPC)));
        let before = bench.state.clone();
        let (result, states) = bench.act(number + 1);
        bench.disk.storage.fail(None);
        if result.is_ok() && !bench.state.now.is_empty() {
            let differs = bench.state.differs(bench.image(), &bench.disk);
            assert_eq!(differs, None, "operation {number}");
        }
        if let Err(error) = result {
            if !bench.image().is_corrupt() {
                // What failed is done or not done, and the image works on.
                let image = bench.image();
                image.flush().unwrap();
                let disk = &bench.disk;
                let why = |state: &State| state.differs(image, disk);
                let found = states.iter().find(|state| why(state).is_none());
                let all = || states.iter().map(why).collect::<Vec<_>>();
                let found = found.unwrap_or_else(|| panic!("{error:?}: {:?}", all()));
                let mut found = found.clone();
                found.now = content(image);
                found.bitmap = before.bitmap;
                found.flushed();
                bench.state = found;
            }
            assert!(!bench.image().is_corrupt(), "{error}");
        }
    }
    bench.image = None;
    let (image, disk) = bench.disk.reopen(bench.disk.storage.bytes());
    assert_eq!(bench.state.differs(&image, &disk), None);
}

#[test]
fn a_change_that_fails_leaves_an_image_that_works_on() {
    let count = number("QCOW2_CHANGES").unwrap_or(16);
    let seeds = number("QCOW2_CHANGE").map_or(0..count, |seed| seed..seed + 1);
    for seed in seeds {
        let options = SHAPES[len(seed) % SHAPES.len()];
        let done = std::panic::catch_unwind(|| failing(seed + 1, options));
        assert!(done.is_ok(), "sequence {seed} on {options} failed");
    }
}
