use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::*;
use crate::memory::{GuestRam, RamSpec};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// More than a test takes.
const LONG: Duration = Duration::from_secs(600);

/// Memory each chunk of which has been touched.
fn ram(size: u64, shared: bool) -> GuestRam {
    let ram = empty_ram(size, shared);
    let view = view(&ram);
    (0..size.div_ceil(CHUNK)).for_each(|chunk| put(&view, chunk * CHUNK, 0));
    ram
}

fn empty_ram(size: u64, shared: bool) -> GuestRam {
    let spec = RamSpec {
        size,
        shared,
        huge_page: None,
        thp: Some(false),
        prefault: false,
    };
    GuestRam::new(&spec).unwrap()
}

/// Whether this host lets memory be held still; tells otherwise.
fn can_hold() -> bool {
    use io::ErrorKind::{PermissionDenied, Unsupported};
    match UserFault::open(&Opener::new(), Waits::ToWrite) {
        Ok(_) => true,
        Err(error) if matches!(error.kind(), PermissionDenied | Unsupported) => {
            println!("skipped: no userfaultfd here: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

fn begin(ram: &GuestRam, limit: Duration) -> Held {
    Still::begin(ram.parts(), &Opener::new(), limit).unwrap()
}

/// The copy that was first is whole, and of its instant.
#[test]
fn a_second_copy_is_refused_and_leaves_the_first_as_it_is() {
    if !can_hold() {
        return;
    }
    let ram = ram(4 * MIB, false);
    let view = view(&ram);
    put(&view, 0, 7);
    let refuse = || {
        let second = Still::begin(ram.parts(), &Opener::new(), LONG).err();
        assert!(matches!(second, Some(StillError::Busy)), "{second:?}");
    };
    let held = begin(&ram, LONG);
    refuse();
    held.hold(&ram.parts()).unwrap();
    refuse();
    thread::scope(|scope| {
        scope.spawn(|| put(&view, 0, 8));
        wait_for_wants(held.still(), 1);
        assert_eq!(copy(held.still(), &view, 4 * MIB / PAGE)[0], 7);
    });
    assert_eq!(held.still().why(), None);
    drop(held);
    let again = begin(&ram, LONG);
    again.hold(&ram.parts()).unwrap();
    assert_eq!(copy(again.still(), &view, 4 * MIB / PAGE)[0], 8);
}

/// With the first chunk or the last: what is not protected any more is not of the instant.
#[test]
fn a_copy_is_lost_when_the_host_does_not_free_a_chunk() {
    if !can_hold() {
        return;
    }
    for before in 0..2 {
        let ram = ram(4 * MIB, false);
        let held = begin(&ram, LONG);
        held.hold(&ram.parts()).unwrap();
        let still = held.still();
        for _ in 0..before {
            still.saved(still.next().unwrap());
        }
        let chunk = still.next().unwrap();
        still.abandon();
        still.saved(chunk);
        assert_eq!(still.next(), None);
        assert_eq!(still.why(), Some("userfaultfd gave guest memory up"));
        put(&view(&ram), 0, 1);
    }
}

#[test]
fn storage_has_all_its_time_when_nobody_waits_for_what_is_not_copied() {
    if !can_hold() {
        return;
    }
    let ram = ram(4 * MIB, false);
    let view = view(&ram);
    let held = begin(&ram, LONG);
    held.hold(&ram.parts()).unwrap();
    let still = held.still();
    let chunk = still.next().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| put(&view, chunk as u64 * CHUNK, 1));
        wait_for_wants(still, 1);
        assert!(still.lock().since.is_some());
        still.saved(chunk);
    });
    assert_eq!(still.lock().since, None);
}

#[test]
fn what_the_host_has_nothing_of_is_zeros_and_nobody_waits_to_write_it() {
    if !can_hold() {
        return;
    }
    let ram = empty_ram(12 * MIB, false);
    let view = view(&ram);
    let place = ram.slots()[0];
    let told = Presence::open(&Opener::new()).and_then(|p| p.first(place.host, place.len));
    if let Err(error) = told {
        println!("skipped: the host does not tell what it has: {error}");
        return;
    }
    put(&view, 3 * MIB, 7);
    let held = begin(&ram, LONG);
    put(&view, 9 * MIB, 8);
    held.hold(&ram.parts()).unwrap();
    let still = held.still();
    assert_eq!(still.zeros(), [0, 2, 3, 5]);
    let all: u64 = still.untouched().iter().map(|r| r.end - r.start).sum();
    assert_eq!(all, 10 * MIB);
    for at in [0, 5 * MIB, 10 * MIB] {
        put(&view, at, 9);
    }
    let (sender, written) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            put(&view, 9 * MIB, 10);
            sender.send(()).unwrap();
        });
        wait_for_wants(still, 1);
        let words = copy(still, &view, 12 * MIB / PAGE);
        let at = |mib: u64| words[usize::try_from(mib * MIB / PAGE).unwrap()];
        assert_eq!([at(3), at(9)], [7, 8]);
        assert_eq!([at(0), at(5), at(7), at(11)], [u64::MAX; 4], "not given");
        written.recv().unwrap();
    });
    assert_eq!(still.why(), None);
    assert_eq!([word(&view, 0), word(&view, 9 * MIB)], [9, 10]);
}

#[test]
fn memory_that_others_may_write_is_protected_whatever_the_host_has_of_it() {
    if !can_hold() {
        return;
    }
    let ram = empty_ram(4 * MIB, true);
    let held = begin(&ram, LONG);
    held.hold(&ram.parts()).unwrap();
    assert_eq!(held.still().zeros(), [0_usize; 0]);
}

/// Returns when `count` chunks are waited for, or nobody has to wait any more.
fn wait_for_wants(still: &Still, count: usize) {
    let inner = still.lock();
    let waits = |inner: &mut Inner| inner.phase == Phase::Holding && inner.urgent.len() < count;
    drop(still.changed.wait_while(inner, waits).unwrap());
}

fn view(ram: &GuestRam) -> GuestMap {
    GuestMap::clone(&ram.memory().memory())
}

fn word(view: &GuestMap, at: u64) -> u64 {
    view.read_obj(GuestAddress(at)).unwrap()
}

fn put(view: &GuestMap, at: u64, value: u64) {
    view.write_obj(value, GuestAddress(at)).unwrap();
}

/// Copies all that is asked for, and gives the first word of each page.
fn copy(still: &Still, view: &GuestMap, pages: u64) -> Vec<u64> {
    let mut words = vec![u64::MAX; usize::try_from(pages).unwrap()];
    while let Some(chunk) = still.next() {
        let start = chunk as u64 * CHUNK;
        for at in (start..(start + CHUNK).min(pages * PAGE)).step_by(4096) {
            words[usize::try_from(at / PAGE).unwrap()] = word(view, at);
        }
        still.saved(chunk);
    }
    words
}

/// A guest that counts: page `n % pages` is written last by the greatest `n` so far.
#[test]
fn what_is_copied_is_of_one_instant_while_others_write_on() {
    const PAGES: u64 = 11 * MIB / PAGE;
    if !can_hold() {
        return;
    }
    for shared in [false, true] {
        let ram = ram(PAGES * PAGE, shared);
        let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let paused = Mutex::new(());
        let (view, seen) = (view(&ram), view(&ram));
        let stands = AtomicBool::new(false);
        thread::scope(|scope| {
            let write = || {
                while !stop.load(Ordering::Relaxed) {
                    while stands.load(Ordering::Relaxed) {
                        thread::yield_now();
                    }
                    let _running = paused.lock().unwrap();
                    for _ in 0..500 {
                        let next = count.load(Ordering::Relaxed) + 1;
                        put(&view, next % PAGES * PAGE, next);
                        count.store(next, Ordering::Relaxed);
                    }
                }
            };
            scope.spawn(write);
            for _ in 0..20 {
                let held = begin(&ram, LONG);
                stands.store(true, Ordering::Relaxed);
                let now = {
                    let _standing = paused.lock().unwrap();
                    held.hold(&ram.parts()).unwrap();
                    stands.store(false, Ordering::Relaxed);
                    count.load(Ordering::Relaxed)
                };
                let words = copy(held.still(), &seen, PAGES);
                assert_eq!(held.still().why(), None);
                for (page, word) in (0..).zip(words) {
                    let behind = (now % PAGES + PAGES - page) % PAGES;
                    assert_eq!(word, now.saturating_sub(behind), "page {page} at {now}");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn pages_that_are_given_back_are_copied_before() {
    if !can_hold() {
        return;
    }
    for shared in [false, true] {
        let ram = ram(8 * MIB, shared);
        let view = view(&ram);
        for at in (0..8 * MIB).step_by(4096) {
            put(&view, at, at + 1);
        }
        let held = begin(&ram, LONG);
        held.hold(&ram.parts()).unwrap();
        thread::scope(|scope| {
            let gone = scope.spawn(|| {
                let region = view.find_region(GuestAddress(5 * MIB)).unwrap();
                let backing = vm_memory::GuestMemoryRegion::bitmap(region)
                    .backing()
                    .unwrap();
                backing.discard(5 * MIB, 2 * MIB).unwrap();
                ram.discard().unwrap();
            });
            wait_for_wants(held.still(), 1);
            let words = copy(held.still(), &view, 8 * MIB / PAGE);
            for (at, word) in (0..).step_by(4096).zip(words) {
                assert_eq!(word, at + 1);
            }
            gone.join().unwrap();
        });
        assert_eq!(word(&view, 6 * MIB), 0);
    }
}

#[test]
fn pages_given_back_before_the_instant_are_protected_again() {
    if !can_hold() {
        return;
    }
    let ram = ram(4 * MIB, false);
    let view = view(&ram);
    put(&view, 0, 7);
    let held = begin(&ram, LONG);
    ram.discard().unwrap();
    held.hold(&ram.parts()).unwrap();
    let (sender, written) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            put(&view, 0, 8);
            sender.send(()).unwrap();
        });
        wait_for_wants(held.still(), 1);
        assert_eq!(copy(held.still(), &view, 1)[0], 0);
        written.recv().unwrap();
    });
    assert_eq!(word(&view, 0), 8);
}

/// That whoever writes goes on when `end` has been done, though nothing is copied.
fn goes_on(limit: Duration, end: impl FnOnce(Held) -> Option<Held>) -> Option<&'static str> {
    let ram = ram(4 * MIB, false);
    let view = view(&ram);
    let held = begin(&ram, limit);
    held.hold(&ram.parts()).unwrap();
    let still = Arc::clone(held.still());
    thread::scope(|scope| {
        scope.spawn(|| put(&view, 3 * MIB, 1));
        wait_for_wants(&still, 1);
        scope.spawn(|| ram.discard().unwrap());
        wait_for_wants(&still, 2);
        drop(end(held));
    });
    assert_eq!(still.next(), None);
    still.why()
}

#[test]
fn nobody_waits_for_a_copy_that_is_dropped_cancelled_or_stuck() {
    if !can_hold() {
        return;
    }
    let why = goes_on(LONG, |held| {
        drop(held);
        None
    });
    assert_eq!(why, Some("it was given up"));
    let why = goes_on(LONG, |held| {
        held.still().heed(|| false);
        wait_for_release(held.still());
        Some(held)
    });
    assert_eq!(why, Some("it was cancelled"));
    let why = goes_on(Duration::from_millis(1), |held| {
        wait_for_release(held.still());
        Some(held)
    });
    assert!(why.unwrap().contains("storage"), "{why:?}");
}

fn wait_for_release(still: &Still) {
    let inner = still.lock();
    let waits = |inner: &mut Inner| inner.phase != Phase::Released;
    drop(still.changed.wait_while(inner, waits).unwrap());
}

#[test]
fn nobody_waits_when_the_thread_that_hears_dies() {
    if !can_hold() {
        return;
    }
    let why = goes_on(LONG, |held| {
        held.still().heed(|| panic!("on purpose"));
        wait_for_release(held.still());
        Some(held)
    });
    assert!(why.unwrap().contains("the thread"), "{why:?}");
}

#[test]
fn memory_that_has_changed_or_cannot_be_protected_is_not_held() {
    if !can_hold() {
        return;
    }
    let mut ram = ram(4 * MIB, false);
    let held = begin(&ram, LONG);
    let more = ram.map_more(4 << 30, 4 * MIB).unwrap();
    ram.adopt(more);
    let refused = held.hold(&ram.parts());
    assert!(matches!(refused, Err(StillError::Changed)), "{refused:?}");
    drop(held);
    // Somebody else has it.
    let other = UserFault::open(&Opener::new(), Waits::ToWrite).unwrap();
    let slot = self::ram(4 * MIB, false);
    let place = slot.slots()[0];
    other.register(place.host, place.len).unwrap();
    let refused = Still::begin(slot.parts(), &Opener::new(), LONG).err();
    assert!(matches!(refused, Some(StillError::Kind(_))), "{refused:?}");
    // A file's own pages, mapped privately.
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB).unwrap();
    let bytes = usize::try_from(MIB).unwrap();
    let mapping = Mapping::new(bytes, Some((&file, 0)), false, None).unwrap();
    let parts = RamParts::new(vec![(0, Arc::new(mapping))], Arc::default());
    let refused = Still::begin(parts, &Opener::new(), LONG).err();
    assert!(matches!(refused, Some(StillError::Kind(_))), "{refused:?}");
}
