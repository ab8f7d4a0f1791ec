//! Power cuts and failing storage while snapshots, sizes and bitmaps change: an image is what it was before the change or
//! what it is after it, and the rest of it is not touched.
//!
//! `QCOW2_CHANGES` says how many sequences are run, `QCOW2_CHANGE` which one alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::crash::{Rng, audit, blank, open};
use super::memory::{Event, Memory};
use crate::image::Image;
use crate::qcow2::bitmap_table::{self, IN_USE};
use crate::qcow2::check::{self, Severity};
use crate::qcow2::create::Preallocation;
use crate::qcow2::header::{DIRTY, Header};
use crate::qcow2::image::{Qcow2, Settings};
use crate::qcow2::repair::{Repair, repair};
use crate::qcow2::session::ChangeError;
use crate::qcow2::snapshot::{NewSnapshot, look_at};
use crate::qcow2::snapshot_table;

const SECTOR: u64 = 512;
/// What a bit of the bitmaps stands for.
const GRAIN: u64 = 4096;

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
    fn differs(&self, image: &Qcow2, storage: &Arc<Memory>) -> Option<String> {
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
            if content(&open_at(storage, id)) != *wanted {
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

fn open_at(storage: &Arc<Memory>, snapshot: &str) -> Qcow2 {
    let mut header = Header::load(&**storage).unwrap();
    look_at(&mut header, &**storage, snapshot).unwrap();
    let settings = Settings {
        read_only: true,
        sync: true,
        punch: false,
        cache: 1 << 20,
    };
    Qcow2::open(header, Arc::clone(storage) as _, None, None, settings).unwrap()
}

/// Opens what a power cut has left, as it is opened for writing: what is marked dirty gets repaired. The result is judged.
fn reopen(bytes: Vec<u8>) -> (Qcow2, Arc<Memory>) {
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
    (open(Arc::clone(&storage), false), storage)
}

/// An image after a power cut, some of whose writes since the last sync are lost.
fn cut(durable: &[u8], pending: &[Event], all: bool, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    for event in pending {
        let mut keep = |event: Event| {
            if all || rng.below(2) == 0 {
                event.apply_to(&mut bytes);
            }
        };
        match event {
            // The header's page is written as one.
            Event::Write(offset, data) if *offset != 0 => {
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
    storage: Arc<Memory>,
    state: State,
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
        let result = match self.rng.below(20) {
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
                self.storage.fail(None);
                self.image = None;
                self.image = Some(open(Arc::clone(&self.storage), false));
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
            _ => self.bitmaps(&mut after),
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
        // What is cut off may be lost before the size changes.
        let mut lost = self.mixed(&self.state);
        for sector in len(sectors)..lost.now.len() {
            lost.also[sector].insert(0);
        }
        after.resize(sectors);
        let result = self.image().resize(sectors * SECTOR, how);
        if result.is_err() {
            self.state = lost.clone();
        }
        (result, vec![lost])
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
    state.resize(sectors);
    let bench = Bench {
        rng,
        image: Some(open(Arc::clone(&storage), false)),
        storage,
        state,
        next_id: 1,
        most: 900,
        v2: options.contains("0.10"),
        counts: !options.ends_with("refcount_bits=1"),
    };
    Some((bench, bytes))
}

fn judge(bytes: Vec<u8>, states: &[State]) {
    let (image, storage) = reopen(bytes);
    let mut why = Vec::new();
    for state in states {
        match state.differs(&image, &storage) {
            None => return,
            Some(difference) => why.push(difference),
        }
    }
    panic!("the image is in none of its states: {why:?}");
}

fn sequence(seed: u64, options: &str) {
    let Some((mut bench, mut durable)) = bench(seed, options) else {
        return;
    };
    let mut pending: Vec<Event> = Vec::new();
    for number in 0..40_u8 {
        let seen = bench.storage.log_len();
        let (result, states) = bench.act(number + 1);
        match result {
            Ok(()) => {}
            Err(ChangeError::RefcountFull { .. }) if !bench.counts => {}
            Err(error) => panic!("operation {number}: {error}: {:?}", error),
        }
        for event in bench.storage.log().split_off(seen) {
            let sync = matches!(event, Event::Sync);
            pending.push(event);
            if sync {
                pending
                    .drain(..)
                    .for_each(|event| event.apply_to(&mut durable));
            }
            if bench.rng.below(4) == 0 {
                let all = bench.rng.below(3) == 0;
                judge(cut(&durable, &pending, all, &mut bench.rng), &states);
            }
        }
    }
    bench.image = None;
    let (image, storage) = reopen(bench.storage.bytes());
    assert_eq!(bench.state.differs(&image, &storage), None);
    let report = check::check(&*storage, &mut |_| ()).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
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
    for seed in seeds {
        let options = SHAPES[len(seed) % SHAPES.len()];
        let done = std::panic::catch_unwind(|| sequence(seed + 1, options));
        assert!(done.is_ok(), "sequence {seed} on {options} failed");
    }
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
        bench.storage.fail(Some(faults(skip, more, libc::ENOSPC)));
        let before = bench.state.clone();
        let (result, states) = bench.act(number + 1);
        bench.storage.fail(None);
        if result.is_ok() && !bench.state.now.is_empty() {
            let differs = bench.state.differs(bench.image(), &bench.storage);
            assert_eq!(differs, None, "operation {number}");
        }
        if let Err(error) = result {
            if !bench.image().is_corrupt() {
                // What failed is done or not done, and the image works on.
                let image = bench.image();
                image.flush().unwrap();
                let storage = &bench.storage;
                let why = |state: &State| state.differs(image, storage);
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
    let (image, storage) = reopen(bench.storage.bytes());
    assert_eq!(bench.state.differs(&image, &storage), None);
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
