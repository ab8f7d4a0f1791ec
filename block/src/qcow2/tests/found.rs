//! What random sequences have found, each in the fewest steps.

use std::sync::Arc;

use super::crash::{audit, blank, open};
use super::memory::Memory;
use crate::image::Image;
use crate::qcow2::check;
use crate::qcow2::entry::OFFSET;
use crate::qcow2::fields::{put, u64_at};
use crate::qcow2::header::Header;

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
