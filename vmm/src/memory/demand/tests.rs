use std::fs::File;
use std::os::fd::RawFd;
use std::thread;

use migration::pages::{Layer, PageIndex, Ram};
use virtio::memory::{Backing, GuestMap};
use vm_memory::GuestAddressSpace;

use super::super::restored::Restored;
use super::super::{GuestRam, RamSpec};
use super::*;
use crate::machine::saved::RestoreFailure;
use crate::machine::snapshot::SnapshotRam;

const MIB: u64 = 1 << 20;

fn ram() -> (GuestRam, SnapshotRam) {
    let ram = GuestRam::new(&RamSpec {
        size: 8 * MIB,
        shared: false,
        huge_page: None,
        thp: None,
        prefault: false,
    })
    .unwrap();
    let view = SnapshotRam::new(GuestMap::clone(&ram.memory().memory()), false);
    (ram, view)
}

fn at(view: &SnapshotRam, address: u64) -> u8 {
    let mut byte = [0];
    view.read(address, &mut byte).unwrap();
    byte[0]
}

type Unserved = (GuestRam, SnapshotRam, Arc<Restored>, Arc<Demand>);

/// Where each byte of the file of [`restored`] is, and which.
const BYTES: [(u64, u8); 5] = [
    (0, 1),
    (2 * MIB + 3 * 4096, 2),
    (2 * MIB + 7 * 4096, 3),
    (4 * MIB, 4),
    (6 * MIB + 9, 5),
];

/// Memory that is read on demand from a file with [`BYTES`]; `None` where the host has no userfaultfd.
fn restored(directory: &Path) -> Option<(GuestRam, SnapshotRam, Arc<Restored>)> {
    let (ram, view, restored, demand) = unserved()?;
    let opener = Arc::new(Opener::new());
    demand
        .start(WorkingSet::of(directory, "i", &opener))
        .unwrap();
    Some((ram, view, restored))
}

/// The same, and nothing is read yet.
fn unserved() -> Option<Unserved> {
    unserved_of(&BYTES, RUNS)
}

fn layers(file: File, index: PageIndex) -> Layers {
    let path = PathBuf::from("/f");
    Layers::new(vec![Layer { path, index, file }]).unwrap()
}

/// The same of a file with `bytes`, of which up to `runs` runs are registered by themselves.
fn unserved_of(bytes: &[(u64, u8)], runs: usize) -> Option<Unserved> {
    let opener = Arc::new(Opener::new());
    if let Err(error) = UserFault::open(&opener, Waits::ForPages) {
        println!("skipped: no userfaultfd: {error}");
        return None;
    }
    let (_first, view) = ram();
    for (address, byte) in bytes {
        view.write(*address, &[*byte]).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let index = PageIndex::write(&file, &view, &mut |_| true).unwrap();
    let (mut ram, view) = ram();
    let restored = ram.restorable().unwrap();
    let demand = restored
        .prepare(layers(file, index), (&opener, runs))
        .unwrap();
    Some((ram, view, restored, demand))
}

/// What is wrong with the memory, which nobody may take for the guest's.
fn all_is_lost(view: &SnapshotRam, restored: &Restored) -> String {
    for (address, _) in BYTES {
        view.read(address, &mut [0]).unwrap_err();
    }
    assert!(restored.is_lost());
    assert_eq!(restored.info().unwrap().left, None);
    restored.reason()
}

#[test]
fn memory_is_lost_when_nobody_hears_who_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some((_ram, view, restored, demand)) = unserved() else {
        return;
    };
    let null = File::open("/dev/null").unwrap();
    let fds: [RawFd; 2] = [null.as_raw_fd(), demand.fault.as_fd().as_raw_fd()];
    // SAFETY: both are open; the second, which is the userfaultfd's, ends, and its owner closes what is there instead.
    #[expect(unsafe_code, reason = "a descriptor is exchanged under its owner")]
    let result = unsafe { libc::dup2(fds[0], fds[1]) };
    assert_eq!(result, fds[1]);
    let opener = Arc::new(Opener::new());
    let working = WorkingSet::of(dir.path(), "i", &opener);
    Arc::clone(&demand).serve(working);
    let reason = all_is_lost(&view, &restored);
    assert!(
        reason.starts_with("it cannot be read on demand"),
        "{reason}"
    );
}

#[test]
fn memory_that_the_host_refuses_to_watch_is_not_called_a_missing_userfaultfd() {
    let opener = Opener::new();
    let Some((_ram, _view, restored, demand)) = unserved() else {
        return;
    };
    let file = tempfile::tempfile().unwrap();
    let (_first, view) = ram();
    view.write(0, &[1]).unwrap();
    let index = PageIndex::write(&file, &view, &mut |_| true).unwrap();
    // Somebody else has it already.
    let again = restored.prepare(layers(file, index), (&opener, RUNS));
    let error = again.err().unwrap();
    assert!(matches!(error, DemandError::Memory(_)), "{error}");
    let told = chain(&RestoreFailure::Demand(error));
    let beginning = "memory_restore_mode=ondemand: memory cannot be read on demand: ";
    assert!(told.starts_with(beginning), "{told}");
    assert!(told.len() > beginning.len(), "{told}");
    drop(demand);
}

#[test]
fn what_lies_between_very_many_runs_is_zeros_and_is_free_when_all_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = [(2 * MIB, 1), (6 * MIB, 2)];
    for (most, count) in [(1, 1), (2, 2)] {
        let Some((ram, view, _restored, demand)) = unserved_of(&bytes, most) else {
            return;
        };
        assert_eq!(demand.registered.len(), count);
        let opener = Arc::new(Opener::new());
        let elsewhere = UserFault::open(&opener, Waits::ForPages).unwrap();
        let (address, len) = (ram.mappings[0].address(), ram.mappings[0].len());
        elsewhere.register(address, len).unwrap_err();
        let working = WorkingSet::of(dir.path(), "i", &opener);
        demand.start(working).unwrap();
        for place in [0, 4 * MIB + 4096 + 7, 6 * MIB - 1] {
            assert_eq!(at(&view, place), 0, "{place:#x}");
        }
        for (address, byte) in bytes {
            assert_eq!(at(&view, address), byte);
        }
        // Until the last chunk has been settled.
        drop(demand.lock());
        assert_eq!(demand.left(), 0);
        elsewhere.register(address, len).unwrap();
    }
}

#[test]
fn chunks_that_touch_are_one_run() {
    let Some((ram, _view, _restored, demand)) = unserved() else {
        return;
    };
    let start = ram.mappings[0].address();
    assert_eq!(demand.registered.len(), 1);
    assert_eq!(demand.registered.first(), Some(&(start..start + 8 * MIB)));
}

#[test]
fn nobody_waits_when_the_thread_that_serves_dies() {
    let Some((_ram, view, restored, demand)) = unserved() else {
        return;
    };
    let died = thread::spawn(move || {
        let _serving = Serving {
            demand: &demand,
            failed: None,
        };
        let _held = demand.lock();
        std::panic::resume_unwind(Box::new(()));
    });
    died.join().unwrap_err();
    let reason = all_is_lost(&view, &restored);
    assert!(reason.ends_with("has ended"), "{reason}");
}

#[test]
fn what_is_given_back_before_it_was_read_is_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let Some((ram, view, restored)) = restored(dir.path()) else {
        return;
    };
    let mapping = &ram.mappings[0];
    mapping.discard(2 * MIB + 3 * 4096, 4096).unwrap();
    mapping.discard(4 * MIB, 2 * MIB).unwrap();
    for (address, byte) in BYTES {
        let gone = byte == 2 || byte == 4;
        assert_eq!(
            at(&view, address),
            if gone { 0 } else { byte },
            "{address:#x}"
        );
    }
    mapping.discard(0, 8 * MIB).unwrap();
    assert_eq!(restored.info().unwrap().left, None);
    assert_eq!(BYTES.map(|(address, _)| at(&view, address)), [0; 5]);
}

#[test]
fn memory_that_is_cleared_is_not_read_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let Some((ram, view, restored)) = restored(dir.path()) else {
        return;
    };
    assert_eq!(at(&view, 0), 1);
    ram.discard().unwrap();
    assert_eq!(BYTES.map(|(address, _)| at(&view, address)), [0; 5]);
    assert_eq!(restored.info(), None);
}

#[test]
fn nothing_is_recorded_of_a_guest_that_did_not_run() {
    let dir = tempfile::tempdir().unwrap();
    for ran in [false, true] {
        let Some((ram, view, restored, demand)) = unserved() else {
            return;
        };
        if ran {
            restored.runs();
        }
        let opener = Arc::new(Opener::new());
        let working = WorkingSet::of(dir.path(), "i", &opener);
        assert!(working.known.is_empty());
        let own = Arc::clone(&demand);
        // Who touches the memory has it as long as that takes, and nobody has it then.
        let touching = thread::spawn(move || {
            let byte = at(&view, 4 * MIB);
            drop((restored, demand, ram));
            byte
        });
        own.serve(working);
        assert_eq!(touching.join().unwrap(), 4);
        let known = WorkingSet::of(dir.path(), "i", &opener).known;
        assert_eq!(known, if ran { &[2][..] } else { &[] });
    }
}

#[test]
fn the_time_that_is_recorded_begins_when_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let opener = Arc::new(Opener::new());
    let restored = Instant::now();
    let mut recorder = Recorder {
        working: Some(WorkingSet::of(dir.path(), "i", &opener)),
        chunks: vec![1],
        restored,
    };
    let part = RECORDED / 4;
    assert_eq!(recorder.rest(None, restored + part), Some(RECORDED - part));
    assert_eq!(recorder.rest(None, restored + RECORDED), None);
    let ran = restored + part;
    let rest = recorder.rest(Some(ran), restored + RECORDED);
    assert_eq!(rest, Some(part));
    assert_eq!(recorder.rest(Some(ran), ran + RECORDED), None);
    recorder.end(Some(ran));
    assert_eq!(recorder.rest(Some(ran), ran), None, "once");
    assert_eq!(WorkingSet::of(dir.path(), "i", &opener).known, [1]);
}

#[test]
fn a_working_set_is_read_again_and_one_that_is_damaged_or_foreign_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let opener = Arc::new(Opener::new());
    let known = |id| WorkingSet::of(dir.path(), id, &opener).known;
    assert!(known("i").is_empty());
    let chunks = vec![3, 0, u32::MAX];
    WorkingSet::of(dir.path(), "i", &opener).write(chunks.clone());
    assert_eq!(known("i"), chunks);
    assert!(known("j").is_empty());
    let path = dir.path().join(NAME);
    let bytes = std::fs::read(&path).unwrap();
    for end in 0..bytes.len() {
        WorkingSetV1::parse(&bytes[..end], "i")
            .map(|_| ())
            .unwrap_err();
    }
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1;
        WorkingSetV1::parse(&damaged, "i").map(|_| ()).unwrap_err();
    }
    let long = [&bytes[..], b"x"].concat();
    WorkingSetV1::parse(&long, "i").map(|_| ()).unwrap_err();
}
