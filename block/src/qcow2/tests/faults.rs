//! Failing storage: what failed is reported, what was refused can be done again, and nothing is damaged.

use std::sync::Arc;

use super::crash::{audit, blank, open};
use super::memory::{Event, Memory};
use crate::image::Image;
use crate::qcow2::header::Header;

/// Fails the change that comes after `skip` others, once.
fn one_fault(skip: usize, code: i32) -> super::memory::Fault {
    let mut left = skip;
    let mut done = false;
    Box::new(move |_: &Event| {
        if done || left > 0 {
            left = left.saturating_sub(1);
            return None;
        }
        done = true;
        Some(code)
    })
}

#[test]
fn a_failure_at_any_change_leaves_an_image_that_works_on() {
    let Some(bytes) = blank("cluster_size=512", 1 << 20) else {
        return;
    };
    for skip in 0..60 {
        let storage = Memory::new(bytes.clone());
        let image = open(Arc::clone(&storage), false);
        image.write(0, &[1; 3000]).unwrap();
        storage.fail(Some(one_fault(skip, libc::ENOSPC)));
        let mut failures = 0;
        for number in 0..12_u8 {
            let offset = u64::from(number) * 70_000 + 100;
            let data = vec![number + 2; 5000];
            // Twice: what failed is done again.
            if image.write(offset, &data).is_err() {
                failures += 1;
                image.write(offset, &data).unwrap();
            }
            if image.flush().is_err() {
                failures += 1;
                image.flush().unwrap();
            }
        }
        assert!(failures <= 1, "one fault gives one failure at most");
        storage.fail(None);
        image.flush().unwrap();
        drop(image);
        let image = open(Memory::new(storage.bytes()), false);
        audit(&image);
        let mut bytes = vec![0; 5000];
        for number in 0..12_u8 {
            image
                .read(u64::from(number) * 70_000 + 100, &mut bytes)
                .unwrap();
            assert!(bytes.iter().all(|b| *b == number + 2), "write {number}");
        }
    }
}

#[test]
fn a_table_that_a_failed_flush_has_linked_changes_after_its_refcounts() {
    let Some(blank) = blank("cluster_size=4096", 1 << 20) else {
        return;
    };
    let storage = Memory::new(blank);
    let l1 = Header::load(&*storage).unwrap().l1_offset;
    let image = open(Arc::clone(&storage), false);
    image.write(0, &[1; 4096]).unwrap();
    let mut linked = false;
    storage.fail(Some(Box::new(move |event: &Event| match event {
        Event::Write(offset, _) => {
            linked |= *offset == l1;
            None
        }
        Event::Sync => linked.then_some(libc::EIO),
        _ => None,
    })));
    image.flush().unwrap_err();
    storage.fail(None);
    let mut durable = storage.bytes();
    let seen = storage.log_len();
    image.write(8192, &[2; 4096]).unwrap();
    image.flush().unwrap();
    let mut pending = Vec::new();
    for event in storage.log().split_off(seen) {
        if matches!(event, Event::Sync) {
            pending
                .drain(..)
                .for_each(|event: Event| event.apply_to(&mut durable));
            continue;
        }
        pending.push(event);
        // Any one of them may be all that a power cut leaves.
        for event in &pending {
            let mut bytes = durable.clone();
            event.apply_to(&mut bytes);
            audit(&open(Memory::new(bytes), false));
        }
    }
}

#[test]
fn a_refcount_table_whose_move_may_have_failed_is_added_to_in_order() {
    // The first refcount table counts 2 MiB.
    let Some(blank) = blank("cluster_size=512,refcount_bits=64", 8 << 20) else {
        return;
    };
    let storage = Memory::new(blank);
    let old = Header::load(&*storage).unwrap().reftable_offset;
    let image = open(Arc::clone(&storage), false);
    let mut at = 0;
    let step = |at: &mut u64, clusters: usize| {
        let done = image.write(*at, &vec![7; clusters << 9]);
        *at += (clusters << 9) as u64;
        done.and_then(|()| image.flush())
    };
    let mut moved = false;
    storage.fail(Some(Box::new(move |event: &Event| match event {
        Event::Write(48, _) => {
            moved = true;
            None
        }
        Event::Sync => moved.then_some(libc::EIO),
        _ => None,
    })));
    while step(&mut at, 20).is_ok() {
        assert!(at < 4 << 20, "the refcount table never moved");
    }
    storage.fail(None);
    let on_disk = Header::load(&*storage).unwrap();
    assert_ne!(on_disk.reftable_offset, old, "the header had been written");
    // What failed to be synced, the move among it, may be durable or not; here it is.
    let mut durable = storage.bytes();
    audit(&open(Memory::new(durable.clone()), false));
    let seen = storage.log_len();
    for _ in 0..4 {
        // They need several more refcount blocks.
        step(&mut at, 200).unwrap();
    }
    let mut pending = Vec::new();
    for event in storage.log().split_off(seen) {
        if matches!(event, Event::Sync) {
            pending
                .drain(..)
                .for_each(|event: Event| event.apply_to(&mut durable));
            continue;
        }
        pending.push(event);
        // Any one of them may be all that a power cut leaves.
        for event in &pending {
            let mut bytes = durable.clone();
            event.apply_to(&mut bytes);
            audit(&open(Memory::new(bytes), false));
        }
    }
    let mut bytes = vec![0; usize::try_from(at).unwrap()];
    drop(image);
    let image = open(Memory::new(storage.bytes()), false);
    audit(&image);
    image.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}
