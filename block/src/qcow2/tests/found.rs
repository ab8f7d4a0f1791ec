//! What random sequences have found, each in the fewest steps.

use std::sync::Arc;

use super::crash::{audit, blank, open};
use super::memory::Memory;
use crate::image::Image;
use crate::qcow2::check;
use crate::qcow2::entry::OFFSET;
use crate::qcow2::fields::{put, u64_at};
use crate::qcow2::header::{CORRUPT, Header};

fn bytes(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    image.read(offset, &mut bytes).unwrap();
    bytes
}

/// The image checks clean once it is closed.
#[track_caller]
fn closed(image: crate::Qcow2, storage: &Arc<Memory>) {
    drop(image);
    audit(&open(Memory::new(storage.bytes()), false));
    let mut findings = Vec::new();
    let report = check::check(&**storage, &mut |finding| findings.push(finding.message));
    let report = report.unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{findings:?}");
}

#[test]
fn zeros_for_part_of_a_compressed_cluster_with_subclusters_are_written() {
    let Some(blank) = blank("cluster_size=64k,extended_l2=on", 1 << 20) else {
        return;
    };
    for (start, len) in [(0, 32 << 10), (32 << 10, 32 << 10), (16 << 10, 144 << 10)] {
        for unmap in [false, true] {
            let storage = Memory::new(blank.clone());
            let image = open(Arc::clone(&storage), false);
            for cluster in 0..3 {
                let offset = cluster << 16;
                assert!(image.write_compressed(offset, &[7; 1 << 16]).unwrap());
            }
            image.write_zeroes(start, len, unmap).unwrap();
            let mut expected = vec![7; 3 << 16];
            let end = usize::try_from(start + len).unwrap();
            expected[usize::try_from(start).unwrap()..end].fill(0);
            assert!(bytes(&image, 0, 3 << 16) == expected, "{start}, {len}");
            closed(image, &storage);
        }
    }
}

#[test]
fn clusters_whose_refcount_block_was_given_back_can_be_allocated() {
    // A refcount block counts 64 clusters, 32 KiB.
    let Some(mut blank) = blank("cluster_size=512,refcount_bits=64", 1 << 20) else {
        return;
    };
    let storage = Memory::new(blank.clone());
    let image = open(Arc::clone(&storage), false);
    image.write(0, &[7; 300 << 10]).unwrap();
    image.write_zeroes(0, 300 << 10, true).unwrap();
    image.close().unwrap();
    drop(image);
    blank = storage.bytes();
    // Nothing is left in the midst of it but the blocks themselves.
    let header = Header::load(&*storage).unwrap();
    let table = usize::try_from(header.reftable_offset).unwrap();
    let mut given_back = 0;
    for number in 2..8 {
        let at = table + number * 8;
        let block = usize::try_from(u64_at(&blank, at) & OFFSET).unwrap();
        let counts = blank[block..block + 512].chunks_exact(8);
        let used = counts.filter(|count| **count != [0; 8]).count();
        if block != 0 && used == 1 && block >> 15 == number {
            put(&mut blank, at, &[0; 8]);
            given_back += 1;
        }
    }
    assert!(given_back > 0, "no block counts nothing but itself");
    let storage = Memory::new(blank);
    let image = open(Arc::clone(&storage), false);
    image.write(0, &[8; 300 << 10]).unwrap();
    image.flush().unwrap();
    assert!(bytes(&image, 0, 300 << 10) == vec![8; 300 << 10]);
    closed(image, &storage);
}

/// An image of which one word was changed.
fn poked(blank: &[u8], offset: u64, value: u64) -> (Arc<Memory>, crate::Qcow2) {
    let mut bytes = blank.to_vec();
    put(
        &mut bytes,
        usize::try_from(offset).unwrap(),
        &value.to_be_bytes(),
    );
    let storage = Memory::new(bytes);
    let image = open(Arc::clone(&storage), false);
    (storage, image)
}

#[test]
fn nothing_is_written_where_tables_lie_over_each_other() {
    let Some(blank) = blank("cluster_size=4096", 1 << 20) else {
        return;
    };
    let storage = Memory::new(blank);
    let image = open(Arc::clone(&storage), false);
    image.write(0, &[1; 300_000]).unwrap();
    drop(image);
    let good = storage.bytes();
    let header = Header::load(&*storage).unwrap();
    let (l1, reftable) = (header.l1_offset, header.reftable_offset);
    let word = |at: u64| u64_at(&good, usize::try_from(at).unwrap());
    let (table, block) = (word(l1) & OFFSET, word(reftable));
    let end = good.len() as u64;
    for (what, at, value) in [
        ("the block is the L1 table", reftable, l1),
        ("the block is the refcount table", reftable, reftable),
        ("the block is an L2 table", reftable, table),
        ("the block is the next block too", reftable + 8, block),
        ("the block is past the end", reftable, end + (1 << 20)),
        ("the first clusters count as free", block, 0),
        ("the refcount table is the L1 table", 48, l1),
        ("the L1 table is the refcount table", 40, reftable),
        ("the L2 table is the L1 table", l1, 1 << 63 | l1),
        ("the L2 table is the block", l1, 1 << 63 | block),
        ("the L2 table is past the end", l1, 1 << 63 | 1 << 50),
    ] {
        let (storage, image) = poked(&good, at, value);
        let before = storage.bytes();
        assert!(image.write(500_000, &[2; 100_000]).is_err(), "{what}");
        assert!(image.write(0, &[2; 100]).is_err(), "{what}");
        assert!(image.create_snapshot(snapshot("one")).is_err(), "{what}");
        drop(image);
        let after = storage.bytes();
        assert!(before[112..] == after[112..], "{what}");
        let header = Header::load(&*storage).unwrap();
        assert_ne!(header.incompatible & CORRUPT, 0, "{what}");
    }
}

fn snapshot(name: &str) -> crate::qcow2::NewSnapshot<'_> {
    crate::qcow2::NewSnapshot {
        id: None,
        name,
        seconds: 0,
        nanoseconds: 0,
    }
}

#[test]
fn nothing_is_packed_into_a_cluster_that_is_about_to_become_a_hole() {
    let Some(blank) = blank("cluster_size=64k", 1 << 20) else {
        return;
    };
    let image = open(Memory::new(blank), false);
    assert!(image.write_compressed(0, &[7; 1 << 16]).unwrap());
    image.flush().unwrap();
    let mut pins = image.pins();
    let epoch = pins.enter();
    image.write(0, &[1; 1 << 16]).unwrap();
    image.flush().unwrap();
    pins.leave(epoch);
    // What a checkpoint does before it makes the holes, without the lock.
    let mut meta = image.lock();
    let ready = meta.take_released(usize::MAX);
    let holes: Vec<_> = ready
        .iter()
        .flat_map(|run| meta.sole(*run).unwrap())
        .collect();
    assert_eq!(holes.len(), 1);
    let packed = meta.plan_packed(1 << 16, 100).unwrap();
    let (first, count) = holes[0];
    assert!(!(first..first + count).contains(&(packed.host >> 16)));
    meta.abandon_packed(1 << 16, &packed);
}

#[test]
fn a_refcount_table_that_moves_amid_a_change_stays_where_it_went() {
    // The first refcount table counts 4096 clusters.
    let Some(blank) = blank("cluster_size=512,refcount_bits=64", 4 << 20) else {
        return;
    };
    let mut moves = 0;
    for less in 0..10_usize {
        let storage = Memory::new(blank.clone());
        let image = open(Arc::clone(&storage), false);
        image.write(0, &vec![7; (3950 - less) << 9]).unwrap();
        let mut place = Header::load(&*storage).unwrap().reftable_offset;
        for number in 0..20 {
            image
                .create_snapshot(crate::NewSnapshot {
                    id: None,
                    name: "s",
                    seconds: 0,
                    nanoseconds: 0,
                })
                .unwrap();
            let header = Header::load(&*storage).unwrap();
            let known = image.lock().header.reftable_offset;
            assert_eq!(known, header.reftable_offset, "{less}, snapshot {number}");
            moves += usize::from(header.reftable_offset != place);
            place = header.reftable_offset;
        }
        image.write(0, &[8; 512]).unwrap();
        closed(image, &storage);
    }
    assert!(moves >= 5, "{moves}");
}
