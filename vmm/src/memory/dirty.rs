//! Which pages of guest memory have been written.
//!
//! # Contract
//!
//! * A [`Consumer`] hears of each page that has been written since it began, or since it was asked last, whoever else
//!   asks: each has a set of its own. A page may be told of that was not written; none is missed.
//! * Told are pages that vCPUs and KVM have written ([`WriteLog`]), those that devices have ([`DirtyLog`]), and those that were given back to the
//!   host, which are zeros then. What a device is writing is told of when it has: all of it when devices are stopped.
//! * Without a consumer nothing is logged, and nothing costs anything.
//! * Memory that is added while it is logged is not told of.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::pages::PageSet;
use virtio::memory::DirtyLog;
use vm_memory::MmapRegion;

use super::mapping::Mapping;
use super::{GuestRam, RamSlot};

/// What writes a log of its own.
pub trait WriteLog: Send + Sync {
    /// Begins to log the writes to a slot that is there, or ends it.
    ///
    /// # Errors
    ///
    /// The host's.
    fn log(&self, slot: &RamSlot, on: bool) -> io::Result<()>;

    /// Takes what has been logged of it, a bit for each page. Of a log that has just begun it may be all pages.
    ///
    /// # Errors
    ///
    /// The host's; nothing has been taken then, or it is told of once more.
    fn fetch(&self, slot: &RamSlot) -> io::Result<Vec<u64>>;
}

/// Why it is not known what has been written.
#[derive(Debug, thiserror::Error)]
#[error("what the guest has written is not known: KVM's log of its memory at {address:#x}")]
pub struct DirtyError {
    /// Guest-physical: where the slot begins.
    address: u64,
    /// The host's reason.
    #[source]
    source: io::Error,
}

/// One slot.
struct Part {
    slot: RamSlot,
    written: DirtyLog,
    mapping: Arc<Mapping>,
}

struct Inner {
    sets: BTreeMap<u64, PageSet>,
    /// How many consumers there have been.
    count: u64,
}

/// Harvests all logs of guest memory.
pub struct Tracker {
    log: Box<dyn WriteLog>,
    /// By guest-physical address, as ranges of RAM are.
    parts: Vec<Part>,
    ranges: Vec<(u64, u64)>,
    inner: Mutex<Inner>,
}

impl GuestRam {
    /// What harvests the logs of the memory that there is now.
    #[must_use]
    pub fn tracker(&self, log: Box<dyn WriteLog>) -> Arc<Tracker> {
        let slots = self.slots.iter().zip(&self.regions).zip(&self.mappings);
        let mut parts: Vec<Part> = slots
            .map(|((slot, region), mapping)| {
                let region: &MmapRegion<DirtyLog> = region;
                Part {
                    slot: *slot,
                    written: region.bitmap().clone(),
                    mapping: Arc::clone(mapping),
                }
            })
            .collect();
        parts.sort_by_key(|part| part.slot.guest);
        let ranges = parts.iter().map(|part| (part.slot.guest, part.slot.len));
        Arc::new(Tracker {
            log,
            ranges: ranges.collect(),
            parts,
            inner: Mutex::new(Inner {
                sets: BTreeMap::new(),
                count: 0,
            }),
        })
    }
}

impl Tracker {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Sets only grow but for who takes one whole; a panic elsewhere leaves them sound.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to log, while the guest runs or stands. What was written before is not told of.
    ///
    /// # Errors
    ///
    /// [`DirtyError`]; nothing is logged then that was not before.
    pub fn begin(self: &Arc<Self>) -> Result<Consumer, DirtyError> {
        let mut inner = self.lock();
        let begun = if inner.sets.is_empty() {
            self.turn_on()
        } else {
            Ok(())
        };
        // Others keep what was written before; nobody, where there are none.
        if let Err(error) = begun.and_then(|()| self.harvest(&mut inner)) {
            if inner.sets.is_empty() {
                self.turn_off();
            }
            return Err(error);
        }
        inner.count = inner.count.wrapping_add(1);
        let id = inner.count;
        inner.sets.insert(id, PageSet::new(&self.ranges));
        Ok(Consumer {
            tracker: Arc::clone(self),
            id,
        })
    }

    fn turn_on(&self) -> Result<(), DirtyError> {
        for part in &self.parts {
            part.written.enable();
            part.mapping.given_back_log().enable();
            self.log.log(&part.slot, true).map_err(failed(part))?;
        }
        Ok(())
    }

    fn turn_off(&self) {
        for part in &self.parts {
            if let Err(error) = self.log.log(&part.slot, false) {
                tracing::warn!("guest memory is still logged, for nobody: {error}");
            }
            part.written.disable();
            part.mapping.given_back_log().disable();
        }
    }

    /// Gives what all logs have to every set.
    fn harvest(&self, inner: &mut Inner) -> Result<(), DirtyError> {
        for (range, part) in self.parts.iter().enumerate() {
            let words = self.log.fetch(&part.slot).map_err(failed(part))?;
            let mut tell = |word: usize, pages: u64| {
                let sets = inner.sets.values_mut();
                sets.for_each(|set| set.add_word(range, word, pages));
            };
            let written = words.into_iter().enumerate();
            written
                .filter(|(_, pages)| *pages != 0)
                .for_each(|(word, pages)| tell(word, pages));
            part.written.harvest(&mut tell);
            part.mapping.given_back_log().harvest(&mut tell);
        }
        Ok(())
    }
}

fn failed(part: &Part) -> impl Fn(io::Error) -> DirtyError {
    let address = part.slot.guest;
    move |source| DirtyError { address, source }
}

/// Who wants to know. When the last one is dropped, nothing is logged any more.
pub struct Consumer {
    tracker: Arc<Tracker>,
    id: u64,
}

impl Consumer {
    /// What has been written, and stays to be told of.
    ///
    /// # Errors
    ///
    /// [`DirtyError`]; nothing is lost.
    pub fn look(&self) -> Result<PageSet, DirtyError> {
        let mut inner = self.tracker.lock();
        self.tracker.harvest(&mut inner)?;
        Ok(inner
            .sets
            .get(&self.id)
            .cloned()
            .unwrap_or_else(|| self.none()))
    }

    /// What has been written, which is not told of again.
    ///
    /// # Errors
    ///
    /// [`DirtyError`]; nothing is lost.
    pub fn take(&self) -> Result<PageSet, DirtyError> {
        let mut inner = self.tracker.lock();
        self.tracker.harvest(&mut inner)?;
        let mut taken = self.none();
        if let Some(set) = inner.sets.get_mut(&self.id) {
            std::mem::swap(set, &mut taken);
        }
        Ok(taken)
    }

    /// The ranges of memory that its sets are of: guest-physical starts and lengths in bytes.
    #[must_use]
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.tracker.ranges
    }

    /// Has pages that were taken be told of again.
    pub fn give_back(&self, pages: &PageSet) {
        if let Some(set) = self.tracker.lock().sets.get_mut(&self.id) {
            set.add(pages);
        }
    }

    fn none(&self) -> PageSet {
        PageSet::new(&self.tracker.ranges)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let mut inner = self.tracker.lock();
        inner.sets.remove(&self.id);
        if inner.sets.is_empty() {
            self.tracker.turn_off();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::{
        Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
    };

    use super::*;
    use crate::memory::RamSpec;

    const GIB: u64 = 1 << 30;

    /// What KVM would have: words by slot.
    #[derive(Default)]
    struct Fake {
        on: AtomicBool,
        fails: AtomicBool,
        words: Mutex<BTreeMap<u32, Vec<u64>>>,
    }

    impl WriteLog for Arc<Fake> {
        fn log(&self, slot: &RamSlot, on: bool) -> io::Result<()> {
            self.on.store(on, Ordering::SeqCst);
            // As KVM does: all pages, at first.
            let words = vec![u64::MAX; usize::try_from(slot.len >> 18).unwrap()];
            self.words.lock().unwrap().insert(slot.slot, words);
            Ok(())
        }

        fn fetch(&self, slot: &RamSlot) -> io::Result<Vec<u64>> {
            if slot.slot == 1 && self.fails.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            let mut words = self.words.lock().unwrap();
            let found = words.get_mut(&slot.slot).unwrap();
            let none = vec![0; found.len()];
            Ok(std::mem::replace(found, none))
        }
    }

    impl Fake {
        fn write(&self, slot: u32, page: usize) {
            let mut words = self.words.lock().unwrap();
            words.get_mut(&slot).unwrap()[page / 64] |= 1 << (page % 64);
        }
    }

    fn memory() -> (GuestRam, Arc<Fake>, Arc<Tracker>) {
        let ram = GuestRam::new(&RamSpec {
            size: 3 * GIB + (4 << 20),
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        });
        let (ram, fake) = (ram.unwrap(), Arc::new(Fake::default()));
        let tracker = ram.tracker(Box::new(Arc::clone(&fake)));
        (ram, fake, tracker)
    }

    /// A set of pages of both slots.
    fn set(low: &[usize], high: &[usize]) -> PageSet {
        let mut all = PageSet::new(&[(0, 3 * GIB), (4 * GIB, 4 << 20)]);
        for (range, pages) in [low, high].into_iter().enumerate() {
            for page in pages {
                all.add_word(range, page / 64, 1 << (page % 64));
            }
        }
        all
    }

    #[test]
    fn each_consumer_hears_of_what_anybody_has_written_since_it_asked() {
        let (ram, fake, tracker) = memory();
        let view = ram.memory().memory();
        view.write_obj(1_u8, GuestAddress(0)).unwrap();
        let first = tracker.begin().unwrap();
        assert_eq!(first.look().unwrap(), set(&[], &[]));
        fake.write(0, 70);
        view.write_obj(u32::MAX, GuestAddress(4 * GIB + 0xffe))
            .unwrap();
        let second = tracker.begin().unwrap();
        let given = view.find_region(GuestAddress(0)).unwrap();
        given
            .bitmap()
            .backing()
            .unwrap()
            .discard(0x5000, 0x2000)
            .unwrap();
        assert_eq!(second.take().unwrap(), set(&[5, 6], &[]));
        assert_eq!(second.take().unwrap(), set(&[], &[]));
        let told = first.take().unwrap();
        assert_eq!(told, set(&[5, 6, 70], &[0, 1]));
        fake.write(1, 3);
        first.give_back(&told);
        assert_eq!(first.look().unwrap(), set(&[5, 6, 70], &[0, 1, 3]));
        assert_eq!(first.take().unwrap(), set(&[5, 6, 70], &[0, 1, 3]));
        assert_eq!(second.take().unwrap(), set(&[], &[3]));
    }

    #[test]
    fn nothing_is_logged_when_nobody_wants_to_know() {
        let (ram, fake, tracker) = memory();
        let view = ram.memory().memory();
        let consumers = [tracker.begin().unwrap(), tracker.begin().unwrap()];
        assert!(fake.on.load(Ordering::SeqCst));
        view.write_obj(1_u8, GuestAddress(0)).unwrap();
        let [first, second] = consumers;
        drop(first);
        assert!(fake.on.load(Ordering::SeqCst));
        drop(second);
        assert!(!fake.on.load(Ordering::SeqCst));
        view.write_obj(1_u8, GuestAddress(0x2000)).unwrap();
        // Who begins anew hears of nothing older.
        let third = tracker.begin().unwrap();
        assert_eq!(third.take().unwrap(), set(&[], &[]));
    }

    #[test]
    fn a_log_that_cannot_be_read_loses_nothing() {
        let (ram, fake, tracker) = memory();
        fake.fails.store(true, Ordering::SeqCst);
        assert!(tracker.begin().is_err());
        assert!(!fake.on.load(Ordering::SeqCst));
        fake.fails.store(false, Ordering::SeqCst);
        let consumer = tracker.begin().unwrap();
        fake.write(0, 7);
        let view = ram.memory().memory();
        view.write_obj(1_u8, GuestAddress(0)).unwrap();
        view.write_obj(1_u8, GuestAddress(4 * GIB)).unwrap();
        fake.fails.store(true, Ordering::SeqCst);
        let error = consumer.take().unwrap_err();
        assert!(error.to_string().contains("0x100000000"), "{error}");
        fake.fails.store(false, Ordering::SeqCst);
        assert_eq!(consumer.take().unwrap(), set(&[0, 7], &[0]));
    }
}
