//! Drivers that break the rules: of a request, and of the queue.

use proptest::prelude::*;

use super::super::request::{Ask, parse};
use super::super::spec::Segment;
use super::*;
use crate::ring::{Chain, Extent, total};

/// Offers `pieces` as they are and returns the status and the bytes written.
fn raw(rig: &mut Rig, pieces: &[Piece]) -> (u8, u32) {
    rig.driver.put(STATUS, UNSET);
    let head = rig.driver.offer(pieces);
    rig.driver.kick();
    let (id, written) = rig.driver.wait(&rig.notices);
    assert_eq!(id, u32::from(head), "{pieces:?}");
    (rig.driver.get(STATUS), written)
}

fn expect(rig: &mut Rig, kind: u32, pieces: &[Piece], expected: (u8, u32)) {
    rig.header(HEADER, kind, 0);
    let result = raw(rig, pieces);
    assert_eq!(result, expected, "type {kind}, {pieces:?}");
}

const HEAD: Piece = (HEADER, 16, false);
const TAIL: Piece = (STATUS, 1, true);

#[test]
fn a_chain_of_the_wrong_shape_fails_alone() {
    let mut rig = Rig::new();
    let cases: &[(u32, &[Piece])] = &[
        // A header that is short, empty, absent, or not memory.
        (IN, &[(HEADER, 15, false), TAIL]),
        (IN, &[(HEADER, 0, false), TAIL]),
        (IN, &[TAIL]),
        (IN, &[(END, 16, false), TAIL]),
        (IN, &[(END - 8, 16, false), TAIL]),
        (IN, &[(u64::MAX - 4, 16, false), TAIL]),
        (IN, &[(HEADER, 16, true), TAIL]),
        // Data in the wrong direction, or in both.
        (IN, &[HEAD, (DATA, 512, false), TAIL]),
        (IN, &[HEAD, (DATA, 512, false), (DATA, 512, true), TAIL]),
        (OUT, &[HEAD, (DATA, 512, true), TAIL]),
        (OUT, &[HEAD, (DATA, 512, false), (DATA, 512, true), TAIL]),
        (IN, &[HEAD, (DATA, 512, true), (DATA, 512, false), TAIL]),
        (DISCARD, &[HEAD, (DATA, 16, true), TAIL]),
        // Not whole sectors.
        (IN, &[HEAD, (DATA, 511, true), TAIL]),
        (OUT, &[HEAD, (DATA, 513, false), TAIL]),
        // Data that is not memory, in part or whole.
        (IN, &[HEAD, (END, 512, true), TAIL]),
        (IN, &[HEAD, (END - 100, 512, true), TAIL]),
        (OUT, &[HEAD, (u64::MAX - 511, 512, false), TAIL]),
        (OUT, &[HEAD, (u64::MAX - 510, 512, false), TAIL]),
        // More than a request, and more than the disk, can hold.
        (IN, &[HEAD, (DATA, 0xffff_fe00, true), TAIL]),
        (IN, &[HEAD, (DATA, 1 << 30, true), (DATA, 512, true), TAIL]),
        (IN, &[HEAD, (DATA, 1025 * 512, true), TAIL]),
        // Ranges that are cut off, absent, or not memory.
        (DISCARD, &[HEAD, TAIL]),
        (DISCARD, &[HEAD, (DATA, 15, false), TAIL]),
        (ZEROES, &[HEAD, (DATA, 17, false), TAIL]),
        (ZEROES, &[HEAD, (END, 16, false), TAIL]),
        (
            ZEROES,
            &[HEAD, (DATA, 16 * (MAX_SEGMENTS + 1), false), TAIL],
        ),
    ];
    for (kind, pieces) in cases {
        expect(&mut rig, *kind, pieces, (IOERR, 1));
    }
    assert_eq!(rig.calls(), []);
    expect(&mut rig, IN, &[HEAD, (DATA, 512, true), TAIL], (OK, 513));
}

#[test]
fn without_a_place_for_a_status_nothing_is_done_or_told() {
    let mut rig = Rig::new();
    let cases: &[&[Piece]] = &[
        &[HEAD],
        &[HEAD, (DATA, 512, false)],
        &[HEAD, (DATA, 512, false), (STATUS, 1, false)],
        &[HEAD, (DATA, 512, false), (STATUS, 0, true)],
        &[HEAD, (DATA, 512, false), (END, 1, true)],
        &[HEAD, (DATA, 512, false), (u64::MAX, 1, true)],
        &[HEAD, (DATA, 512, false), (u64::MAX, 2, true)],
    ];
    for pieces in cases {
        expect(&mut rig, OUT, pieces, (UNSET, 0));
    }
    assert_eq!(rig.calls(), []);
}

#[test]
fn sectors_past_the_end_are_refused_however_large() {
    let mut rig = Rig::new();
    let wraps = u64::MAX / 512 + 1;
    for sector in [1024, 1 << 40, wraps, wraps + 1, u64::MAX - 1, u64::MAX] {
        for (kind, writable) in [(IN, true), (OUT, false)] {
            let result = rig.request(kind, sector, &[(DATA, 1024, writable)]);
            assert_eq!(result, (IOERR, 1), "type {kind}, sector {sector}");
        }
        rig.segment(DATA, sector, 2, 0);
        for kind in [DISCARD, ZEROES] {
            let result = rig.request(kind, 0, &[(DATA, 16, false)]);
            assert_eq!(result, (IOERR, 1), "type {kind}, sector {sector}");
        }
    }
    // The last sector, and one more.
    assert_eq!(rig.request(IN, 1023, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(rig.request(IN, 1023, &[(DATA, 1024, true)]), (IOERR, 1));
    assert_eq!(rig.calls().len(), 1);
}

#[test]
fn ranges_past_the_stated_limits_and_with_unknown_flags_are_refused() {
    let mut rig = Rig::with(info(1 << 17), ALL & !EVENT_IDX, 16);
    let cases = [
        (DISCARD, 1, 1, UNSUPP),
        (DISCARD, 1, 2, UNSUPP),
        (ZEROES, 1, 2, UNSUPP),
        (ZEROES, 1, 3, UNSUPP),
        (ZEROES, MAX_ZEROES_SECTORS, 1, OK),
        (ZEROES, MAX_ZEROES_SECTORS + 1, 0, IOERR),
        (DISCARD, MAX_DISCARD_SECTORS + 1, 0, IOERR),
        (DISCARD, u32::MAX, 0, IOERR),
    ];
    for (kind, count, flags, status) in cases {
        rig.segment(DATA, 0, count, flags);
        let result = rig.request(kind, 0, &[(DATA, 16, false)]);
        assert_eq!(result, (status, 1), "type {kind}, {count} sectors, {flags}");
    }
    // One bad range and none of them is done; nor later, by somebody else.
    rig.calls();
    rig.segment(DATA, 0, 1, 0);
    rig.segment(DATA + 16, u64::MAX, 1, 0);
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 32, false)]), (IOERR, 1));
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.calls(), [(Op::Flush, 0, 0)]);
}

#[test]
fn a_failed_read_gives_the_driver_its_status_alone() {
    let mut rig = Rig::new();
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.driver.put_bytes(DATA, &[9; 512]);
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]), (IOERR, 1));
    assert_eq!(rig.driver.bytes(DATA, 512), [9; 512]);
}

#[test]
fn a_broken_queue_needs_a_reset_and_is_left_alone() {
    type Break = fn(&mut Rig);
    let cases: [(&str, Break); 3] = [
        ("loops", |rig| {
            rig.driver
                .describe(rig.driver.table(), 0, DATA, 0, NEXT | WRITE, 0);
            rig.driver.offer_head(0);
        }),
        ("not in a table", |rig| rig.driver.offer_head(16)),
        ("available ring", |rig| rig.driver.set_avail_index(20)),
    ];
    for (reason, breaks) in cases {
        let mut rig = Rig::new();
        assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
        rig.calls();
        rig.disk.close();
        rig.offer(FLUSH, 0, &[]);
        rig.driver.kick();
        rig.call();
        breaks(&mut rig);
        rig.driver.kick();
        let told = reset_reason(&rig.notices);
        assert!(told.contains(reason), "{told}");
        rig.disk.open();
        rig.offer(FLUSH, 0, &[]);
        rig.driver.kick();
        assert_eq!(rig.blk.stop(soon()).unwrap().len(), 1);
        assert_eq!(rig.driver.used_index(), 1);
        assert_eq!(rig.notices.try_recv(), Err(TryRecvError::Disconnected));
    }
}

fn extents() -> impl Strategy<Value = Vec<Extent>> {
    let addr = prop_oneof![
        DATA..DATA + 0x2000,
        SEAM - 600..SEAM + 600,
        END - 600..END + 600,
        any::<u64>()
    ];
    let len = prop_oneof![1..40_u32, Just(512), 1..5000_u32, 1..=u32::MAX];
    let extent = (addr, len).prop_map(|(addr, len)| Extent {
        addr: vm_memory::GuestAddress(addr),
        len,
    });
    prop::collection::vec(extent, 0..5)
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0..20_u64, 1000..1050_u64, any::<u64>()]
}

proptest! {
    /// Whatever is asked, what reaches the disk lies within it.
    #[test]
    fn nothing_that_is_asked_leaves_the_disk(
        kind in prop_oneof![0..16_u32, any::<u32>()],
        sector in value(),
        segment in (value(), any::<u32>(), 0..4_u32),
        readable in extents(),
        writable in extents(),
        ordered in any::<bool>(),
    ) {
        let memory = memory();
        let view = memory.memory();
        let driver = Driver::new(&memory, 0, 16);
        driver.put(HEADER, kind);
        driver.put(HEADER + 8, sector);
        let segment = Segment {
            sector: segment.0.into(),
            num_sectors: segment.1.into(),
            flags: segment.2.into(),
        };
        driver.put_bytes(DATA, segment.as_bytes());
        let header = Extent { addr: vm_memory::GuestAddress(HEADER), len: 16 };
        let mut chain = Chain {
            head: 0,
            readable: [vec![header], readable].concat(),
            writable,
            ordered,
        };
        let limits = Limits {
            capacity: Arc::new(1024.into()),
            read_only: false,
            discard: true,
            write_zeroes: true,
            serial: [0; 20],
        };
        let mut ranges = Vec::new();
        let parsed = parse(&view, &mut chain, &limits, &mut ranges);
        let ask = parsed.map(|parsed| parsed.ask);
        match ask {
            Some(Ok(Ask::Read(offset))) => {
                prop_assert!(offset + total(&chain.writable) <= 1024 * 512);
            }
            Some(Ok(Ask::Write(offset))) => {
                prop_assert!(offset + total(&chain.readable) <= 1024 * 512);
            }
            Some(Ok(Ask::Discard | Ask::Zeroes)) => {
                for range in ranges {
                    prop_assert!(range.len > 0 && range.offset + range.len <= 1024 * 512);
                }
            }
            _ => {}
        }
    }
}
