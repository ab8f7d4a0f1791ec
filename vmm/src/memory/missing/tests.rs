use std::thread;

use migration::pages::Ram;
use virtio::memory::{Backing, GuestMap};
use vm_memory::GuestAddressSpace;

use super::super::{GuestRam, RamSpec};
use super::*;
use crate::machine::snapshot::SnapshotRam;

const MIB: u64 = 1 << 20;

fn ram(shared: bool) -> (GuestRam, SnapshotRam) {
    let ram = GuestRam::new(&RamSpec {
        size: 8 * MIB,
        shared,
        huge_page: None,
        thp: None,
        prefault: false,
    });
    let ram = ram.unwrap();
    let view = SnapshotRam::new(GuestMap::clone(&ram.memory().memory()), false);
    (ram, view)
}

fn at(view: &SnapshotRam, address: u64) -> u8 {
    let mut byte = [0];
    view.read(address, &mut byte).unwrap();
    byte[0]
}

/// Memory of ones, of which `runs` are missing; `None` where the host has no userfaultfd.
fn missing(shared: bool, runs: &[(u64, u64)]) -> Option<(GuestRam, SnapshotRam, Arc<Missing>)> {
    use vm_memory::Bytes;
    let (ram, view) = ram(shared);
    let ones = vec![1; 8 << 20];
    let map = GuestMap::clone(&ram.memory().memory());
    map.write_slice(&ones, vm_memory::GuestAddress(0)).unwrap();
    match Missing::begin(&ram.parts(), runs, &Opener::new()) {
        Ok(missing) => Some((ram, view, missing)),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

const PART: [(u64, u64); 2] = [(4096, 2 * 4096), (4 * MIB, MIB)];

#[test]
fn who_touches_a_page_waits_for_it_and_all_others_are_as_they_were() {
    for shared in [false, true] {
        let Some((_ram, view, missing)) = missing(shared, &PART) else {
            return;
        };
        assert_eq!((missing.left(), missing.runs()), (258, PART.to_vec()));
        assert_eq!(at(&view, 0), 1);
        assert_eq!(at(&view, 3 * 4096), 1);
        thread::scope(|scope| {
            let reader = scope.spawn(|| (at(&view, 4096 + 5), at(&view, 4 * MIB)));
            let mut wanted = Vec::new();
            while wanted.is_empty() {
                wanted = missing.wait(Duration::from_millis(100)).unwrap();
            }
            assert_eq!(wanted, [4096]);
            assert_eq!(missing.awaited(), [4096]);
            missing.fill(4096, &[7; 4096]).unwrap();
            let mut wanted = Vec::new();
            while wanted.is_empty() {
                wanted = missing.wait(Duration::from_millis(100)).unwrap();
            }
            assert_eq!(wanted, [4 * MIB]);
            missing.zero(4 * MIB, MIB).unwrap();
            assert_eq!(reader.join().unwrap(), (7, 0));
        });
        assert_eq!(missing.runs(), [(8192, 4096)]);
        missing.fill(8192, &[9; 4096]).unwrap();
        assert_eq!(missing.left(), 0);
        assert_eq!(at(&view, 8192), 9);
    }
}

#[test]
fn a_page_that_comes_twice_or_was_not_missing_changes_nothing() {
    let Some((_ram, view, missing)) = missing(false, &PART) else {
        return;
    };
    missing.fill(4096, &[7; 4096]).unwrap();
    missing.fill(0, &[8; 4 * 4096]).unwrap();
    missing.zero(0, 4 * 4096).unwrap();
    missing.fill(8 * MIB, &[8; 4096]).unwrap();
    missing.fill(u64::MAX - 4095, &[8; 4096]).unwrap();
    let found = [0, 1, 2, 3].map(|page| at(&view, page * 4096));
    assert_eq!(found, [1, 7, 8, 1]);
    assert_eq!(missing.left(), 256);
    missing.give_up();
    assert_eq!((missing.left(), at(&view, 4 * MIB)), (0, 0));
    // What comes now comes too late.
    missing.fill(4 * MIB, &[8; 4096]).unwrap();
    assert_eq!(at(&view, 4 * MIB), 0);
}

#[test]
fn what_is_given_back_does_not_come_later() {
    for shared in [false, true] {
        let Some((ram, view, missing)) = missing(shared, &PART) else {
            return;
        };
        let parts = ram.parts();
        let (_, mapping) = &parts.parts()[0];
        // One that is missing, and one that is not.
        mapping.discard(8192, 2 * 4096).unwrap();
        missing.fill(8192, &[9; 4096]).unwrap();
        let watched = Arc::clone(&missing);
        thread::scope(|scope| {
            let reader = scope.spawn(|| (at(&view, 8192), at(&view, 3 * 4096)));
            while !reader.is_finished() {
                assert!(watched.wait(Duration::from_millis(10)).unwrap().is_empty());
            }
            assert_eq!(reader.join().unwrap(), (0, 0));
        });
        mapping.discard_all().unwrap();
        assert_eq!(missing.left(), 0);
        assert_eq!(at(&view, 4 * MIB), 0);
    }
}
