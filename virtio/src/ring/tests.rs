use proptest::prelude::*;
use vm_memory::GuestAddressSpace;

use super::*;
use crate::memory::GuestMemory;
use crate::testing::{
    DATA, Driver, END, INDIRECT, NEXT, Notice, Piece, SEAM, WRITE, memory, notices,
};

const NO_FEATURES: u64 = 0;
const INDIRECT_FEATURE: u64 = 1 << 28;

fn ring(driver: &Driver, features: u64) -> (Ring, std::sync::mpsc::Receiver<Notice>) {
    let (notifier, notices) = notices();
    (Ring::new(driver.activate(), features, notifier), notices)
}

fn extent(addr: u64, len: u32) -> Extent {
    Extent {
        addr: GuestAddress(addr),
        len,
    }
}

/// Takes the one chain that `prepare` has offered.
fn taken(features: u64, prepare: impl FnOnce(&mut Driver)) -> Result<Chain, RingError> {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 16);
    prepare(&mut driver);
    let (mut ring, _notices) = ring(&driver, features);
    let mut chain = Chain::default();
    let view = memory.memory();
    ring.take(&view, &mut chain).map(|there| {
        assert!(there);
        chain
    })
}

#[test]
fn a_chain_is_sorted_by_direction_and_keeps_its_order() {
    let pieces: &[Piece] = &[
        (DATA, 16, false),
        (DATA + 100, 0, false),
        (DATA + 200, 8, false),
        (DATA + 300, 4, true),
        (DATA + 400, 0, true),
    ];
    let chain = taken(NO_FEATURES, |driver| {
        driver.offer(pieces);
    })
    .unwrap();
    assert_eq!(chain.readable, [extent(DATA, 16), extent(DATA + 200, 8)]);
    assert_eq!(chain.writable, [extent(DATA + 300, 4)]);
    assert!(chain.ordered);

    let pieces: &[Piece] = &[(DATA, 16, true), (DATA + 200, 8, false)];
    let chain = taken(NO_FEATURES, |driver| {
        driver.offer(pieces);
    });
    assert!(!chain.unwrap().ordered);
}

#[test]
fn an_indirect_table_is_followed_alone_or_after_others() {
    let chain = taken(INDIRECT_FEATURE, |driver| {
        let table = driver.table();
        driver.describe(table, 0, SEAM, 1, NEXT, 5);
        driver.describe(table, 5, DATA, 32, INDIRECT, 0);
        driver.describe(DATA, 0, SEAM + 8, 2, NEXT, 1);
        driver.describe(DATA, 1, SEAM + 16, 3, WRITE, 0);
        driver.offer_head(0);
    })
    .unwrap();
    assert_eq!(chain.readable, [extent(SEAM, 1), extent(SEAM + 8, 2)]);
    assert_eq!(chain.writable, [extent(SEAM + 16, 3)]);
}

/// Checks that what `prepare` offers is refused with `reason`.
fn refused(features: u64, reason: &str, prepare: impl FnOnce(&mut Driver)) {
    let error = taken(features, prepare).unwrap_err().to_string();
    assert!(error.contains(reason), "{error} is not about {reason}");
}

#[test]
fn chains_that_break_the_rules_are_refused() {
    let none = NO_FEATURES;
    refused(none, "not in a table of 16", |d| d.offer_head(16));
    refused(none, "not in a table of 16", |d| d.offer_head(u16::MAX));
    refused(none, "not in a table of 16", |d| {
        d.describe(d.table(), 0, DATA, 1, NEXT, 16);
        d.offer_head(0);
    });
    refused(none, "loops", |d| {
        d.describe(d.table(), 0, DATA, 0, NEXT, 1);
        d.describe(d.table(), 1, DATA, 0, NEXT, 0);
        d.offer_head(0);
    });
    refused(none, "4 GiB", |d| {
        d.offer(&[(DATA, u32::MAX, false), (DATA, 1, true)]);
    });
    refused(none, "available ring", |d| d.set_avail_index(17));
    refused(none, "available ring", |d| d.set_avail_index(u16::MAX));
}

#[test]
fn indirect_tables_that_break_the_rules_are_refused() {
    let one = |address, len, flags| {
        move |d: &mut Driver| {
            d.describe(d.table(), 0, address, len, flags, 1);
            d.describe(DATA, 0, DATA, 16, INDIRECT, 0);
            d.offer_head(0);
        }
    };
    let all = INDIRECT_FEATURE;
    refused(NO_FEATURES, "not negotiated", one(DATA, 16, INDIRECT));
    refused(all, "next descriptor", one(DATA, 16, INDIRECT | NEXT));
    for len in [0, 1, 15, 17] {
        refused(all, "no whole entries", one(DATA, len, INDIRECT));
    }
    refused(all, "lies in an indirect", one(DATA, 16, INDIRECT));
    refused(all, "no memory at 0x200000", one(END, 16, INDIRECT));
    refused(all, "no memory", one(u64::MAX - 7, 16, INDIRECT));
    refused(all, "not in a table of 1", |d| {
        d.describe(d.table(), 0, DATA, 16, INDIRECT, 0);
        d.describe(DATA, 0, DATA, 1, NEXT, 1);
        d.offer_head(0);
    });
    // Very long, but not endless.
    refused(all, "more than 1026", |d| {
        d.describe(d.table(), 0, DATA, 16 * 2000, INDIRECT, 0);
        for i in 0..2000 {
            d.describe(DATA, i, SEAM, 1, NEXT, i + 1);
        }
        d.offer_head(0);
    });
}

#[test]
fn an_entry_that_is_announced_and_cannot_be_read_is_an_error_not_a_loop() {
    // The ring of 64 entries begins 100 bytes before the end of memory, so
    // that only some of them exist.
    let memory = memory();
    let mut queue = Queue::new(64).unwrap();
    queue.set_desc_table_address(Some(0x1000), None);
    queue.set_avail_ring_address(Some(u32::try_from(END).unwrap() - 100), None);
    queue.set_used_ring_address(Some(0x2000), None);
    queue.set_ready(true);
    queue.set_next_avail(60);
    let driver = Driver::new(&memory, 0, 16);
    driver.put(END - 98, 61_u16);
    let (notifier, _notices) = notices();
    let active = ActiveQueue {
        queue,
        ..driver.activate()
    };
    let mut ring = Ring::new(active, 0, notifier);
    let taken = ring.take(&memory.memory(), &mut Chain::default());
    assert!(matches!(taken, Err(RingError::Available { queue: 0 })));
}

#[test]
fn kicks_are_off_from_quiet_to_invite_and_entries_are_pending_meanwhile() {
    for event_idx in [false, true] {
        let memory = memory();
        let view = memory.memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let (notifier, _notices) = notices();
        let mut ring = Ring::new(driver.activate_with(event_idx), NO_FEATURES, notifier);
        let mut chain = Chain::default();
        assert!(driver.invited(0, event_idx));
        for entry in 0..40 {
            ring.quiet(&view).unwrap();
            assert!(!driver.invited(entry, event_idx));
            assert!(!ring.pending(&view).unwrap());
            assert!(!ring.next(&view, &mut chain).unwrap());
            assert!(!driver.invited(entry, event_idx));
            if entry % 2 == 0 {
                assert!(!ring.invite(&view).unwrap());
                assert!(driver.invited(entry, event_idx));
                ring.quiet(&view).unwrap();
            }
            driver.offer(&[(DATA, 1, false)]);
            assert!(ring.pending(&view).unwrap());
            assert!(ring.invite(&view).unwrap());
            ring.quiet(&view).unwrap();
            assert!(ring.next(&view, &mut chain).unwrap());
            ring.complete(&view, chain.head, 0).unwrap();
        }
    }
}

#[test]
fn parked_chains_come_first_and_what_was_not_served_is_given_back() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 16);
    let parked = [5, 6, 7].map(|_| driver.chain(&[(DATA, 1, true)]));
    let fresh = driver.offer(&[(DATA, 1, true)]);
    let (notifier, _notices) = notices();
    let mut active = driver.activate();
    active.parked = parked.to_vec();
    let mut ring = Ring::new(active, 0, notifier);
    let view = memory.memory();
    let mut chain = Chain::default();
    assert!(ring.take(&view, &mut chain).unwrap());
    assert_eq!(chain.head, parked[0]);
    // It is in flight when the queue is given back.
    let stopped = ring.stop([chain.head]);
    assert_eq!(stopped.parked, parked);

    let (notifier, _notices) = notices();
    let mut ring = Ring::new(Driver::reactivate(stopped), 0, notifier);
    for head in [parked[0], parked[1], parked[2], fresh] {
        assert!(ring.take(&view, &mut chain).unwrap());
        assert_eq!(chain.head, head);
    }
    assert!(!ring.take(&view, &mut chain).unwrap());
}

#[test]
fn a_parked_head_from_nowhere_is_refused() {
    let memory = memory();
    let driver = Driver::new(&memory, 0, 16);
    let (notifier, _notices) = notices();
    let mut active = driver.activate();
    active.parked = vec![16];
    let mut ring = Ring::new(active, 0, notifier);
    let taken = ring.take(&memory.memory(), &mut Chain::default());
    assert!(matches!(taken, Err(RingError::Index { index: 16, .. })));
}

#[test]
fn a_batch_is_announced_once_and_a_failed_ring_is_silent() {
    let memory = memory();
    let driver = Driver::new(&memory, 0, 16);
    let (mut ring, notices) = ring(&driver, 0);
    let view = memory.memory();
    ring.notify(&view).unwrap();
    ring.complete(&view, 1, 0).unwrap();
    ring.complete(&view, 2, 0).unwrap();
    ring.notify(&view).unwrap();
    ring.notify(&view).unwrap();
    assert_eq!(notices.try_iter().collect::<Vec<_>>(), [Notice::Queue(0)]);
    let Err(error) = ring.complete(&view, 16, 0) else {
        panic!("there is no such head");
    };
    ring.fail(&error);
    ring.fail(&error);
    ring.complete(&view, 1, 0).unwrap();
    ring.notify(&view).unwrap();
    let told: Vec<_> = notices.try_iter().collect();
    let [Notice::Reset(reason)] = &told[..] else {
        panic!("{told:?}");
    };
    // The reason goes down to the cause.
    assert!(
        reason.contains("returning a chain") && reason.contains("index"),
        "{reason}"
    );
    assert_eq!(driver.used_index(), 2);
}

#[test]
fn bytes_are_taken_off_the_front_across_extents() {
    let memory = memory();
    let driver = Driver::new(&memory, 0, 16);
    driver.put_bytes(SEAM - 2, &[1, 2, 3, 4]);
    driver.put_bytes(DATA, &[5, 6, 7]);
    let view = memory.memory();
    let mut extents = vec![extent(SEAM - 2, 4), extent(DATA, 3)];
    let whole = extents.clone();
    assert!(!take_front(&view, &mut extents, &mut [0; 8]));
    assert_eq!(extents, whole);
    let mut bytes = [0; 5];
    assert!(take_front(&view, &mut extents, &mut bytes));
    assert_eq!(bytes, [1, 2, 3, 4, 5]);
    assert_eq!(extents, [extent(DATA + 1, 2)]);
    let mut bytes = [0; 2];
    assert!(take_front(&view, &mut extents, &mut bytes));
    assert_eq!((bytes, extents), ([6, 7], vec![]));
    let mut outside = vec![extent(END - 1, 2)];
    assert!(!take_front(&view, &mut outside, &mut [0; 2]));
    assert_eq!(outside, [extent(END - 1, 2)]);
}

#[test]
fn the_front_is_filled_as_far_as_it_is_memory() {
    let memory = memory();
    let driver = Driver::new(&memory, 0, 16);
    let view = memory.memory();
    let extents = [extent(DATA, 2), extent(END, 2), extent(DATA + 8, 2)];
    assert_eq!(fill_front(&view, &extents, &[1, 2, 3, 4]), 2);
    assert_eq!(driver.bytes(DATA, 3), [1, 2, 0]);
    assert_eq!(fill_front(&view, &extents[..1], &[9]), 1);
    assert_eq!(fill_front(&view, &[], &[9]), 0);
    assert_eq!(driver.bytes(DATA, 2), [9, 2]);
}

#[test]
fn the_last_byte_is_taken_where_it_is() {
    let mut extents = vec![extent(DATA, 2), extent(SEAM, 1)];
    assert_eq!(take_last_byte(&mut extents), Some(GuestAddress(SEAM)));
    assert_eq!(take_last_byte(&mut extents), Some(GuestAddress(DATA + 1)));
    assert_eq!(take_last_byte(&mut extents), Some(GuestAddress(DATA)));
    assert_eq!(take_last_byte(&mut extents), None);
    assert_eq!(take_last_byte(&mut vec![extent(u64::MAX, 2)]), None);
}

fn serve_all(memory: &GuestMemory, ring: &mut Ring) -> Result<u32, RingError> {
    let view = memory.memory();
    let mut chain = Chain::default();
    let mut served = 0;
    while ring.take(&view, &mut chain)? {
        assert!(chain.readable.len() + chain.writable.len() <= usize::from(MAX_CHAIN));
        ring.complete(&view, chain.head, 0)?;
        served += 1;
    }
    ring.notify(&view)?;
    Ok(served)
}

proptest! {
    /// Whatever is in the rings, serving them ends and nothing panics.
    #[test]
    fn arbitrary_rings_are_served_or_refused(
        descriptors in prop::collection::vec(
            (prop_oneof![Just(DATA), Just(0x1000), Just(END), any::<u64>()],
             prop_oneof![0..64_u32, any::<u32>()], 0..8_u16, 0..18_u16),
            16,
        ),
        heads in prop::collection::vec(0..18_u16, 16),
        index in prop_oneof![0..18_u16, any::<u16>()],
    ) {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        for (i, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let i = u16::try_from(i).unwrap();
            driver.describe(driver.table(), i, *addr, *len, *flags, *next);
            driver.describe(DATA, i, *addr, *len, *flags, *next);
        }
        for head in heads {
            driver.offer_head(head);
        }
        driver.set_avail_index(index);
        let (mut ring, _notices) = ring(&driver, INDIRECT_FEATURE);
        if let Ok(served) = serve_all(&memory, &mut ring) {
            prop_assert_eq!(served, u32::from(index));
            prop_assert_eq!(driver.used_index(), index);
        }
    }
}

#[test]
fn chains_that_are_returned_together_interrupt_at_any_of_them() {
    // Wherever the ring and the index wrap.
    for (before, asked, expected) in [
        (0_u16, 0_u16, true),
        (0, 2, true),
        (0, 3, true),
        (0, 4, false),
        (0, u16::MAX, false),
        (14, 15, true),
        (14, 17, true),
        (14, 18, false),
    ] {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        let (notifier, notices) = notices();
        let mut ring = Ring::new(driver.activate_with(true), NO_FEATURES, notifier);
        let view = memory.memory();
        for head in 0..before {
            ring.complete(&view, head, 0).unwrap();
            driver.returned();
        }
        ring.notify(&view).unwrap();
        while notices.try_recv().is_ok() {}
        driver.set_used_event(asked);
        let together = [(3, 10), (4, 20), (5, 30), (6, 40)];
        ring.complete_together(&view, &together).unwrap();
        assert_eq!(driver.used_index(), before + 4);
        for (head, written) in together {
            assert_eq!(driver.returned(), Some((u32::from(head), written)));
        }
        ring.notify(&view).unwrap();
        assert_eq!(notices.try_recv().is_ok(), expected, "{before} {asked}");
        // Nothing new: nothing to tell.
        ring.notify(&view).unwrap();
        assert!(notices.try_recv().is_err());
    }
}

#[test]
fn chains_that_are_put_back_are_in_the_ring_again_or_parked_where_it_says_otherwise() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, 4);
    let heads: Vec<u16> = (0..4)
        .map(|n| driver.offer(&[(DATA + 0x100 * n, 16, true)]))
        .collect();
    let (mut ring, _notices) = ring(&driver, NO_FEATURES);
    let view = memory.memory();
    let mut chain = Chain::default();
    let mut take = |ring: &mut Ring| ring.take(&view, &mut chain).unwrap().then_some(chain.head);
    while take(&mut ring).is_some() {}
    // Not the last ones.
    ring.untake_all(&view, &heads[..2]);
    assert_eq!(Vec::from(ring.parked.clone()), heads[..2]);
    assert_eq!(ring.queue.next_avail(), 4);
    // The last ones, but others come first.
    ring.untake_all(&view, &heads[2..]);
    assert_eq!(ring.parked.len(), 4);
    let mut again: Vec<u16> = std::iter::from_fn(|| take(&mut ring)).collect();
    again.sort_unstable();
    assert_eq!(again, heads);
    ring.untake_all(&view, &heads[1..]);
    assert!(ring.parked.is_empty());
    assert_eq!(ring.queue.next_avail(), 1);
    let again: Vec<u16> = std::iter::from_fn(|| take(&mut ring)).collect();
    assert_eq!(again, heads[1..]);
    // One that was offered twice, where the ring does not say so.
    ring.untake_all(&view, &[heads[0], heads[0]]);
    assert_eq!(Vec::from(ring.parked.clone()), heads[..1]);
}
