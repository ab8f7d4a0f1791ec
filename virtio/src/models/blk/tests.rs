use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread;

use block::Op;
use migration::DynSnapshot;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::*;
use crate::memory::GuestMemory;
use crate::testing::{
    DATA, Driver, END, NEXT, Notice, PATIENCE, Piece, SEAM, WRITE, memory, reset_reason, soon,
    start,
};

mod changes;
mod configuration;
mod counting;
mod disk;
mod errors;
mod hostile;
mod polling;

use disk::{Call, MemDisk, disk, info};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

const ALL: u64 = u64::MAX;
const EVENT_IDX: u64 = 1 << 29;
/// Where tests put a header and a status.
const HEADER: u64 = DATA - 0x1000;
const STATUS: u64 = DATA - 1;
/// What a status holds before the device writes it.
const UNSET: u8 = 0xee;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn settings(num_queues: u16) -> BlkSettings {
    let mut serial = [0; 20];
    serial[..5].copy_from_slice(b"vireo");
    BlkSettings {
        num_queues,
        queue_size: 16,
        serial,
        write_through: false,
        rerror: OnReadError::default(),
        werror: OnWriteError::default(),
    }
}

/// A running device with one queue.
struct Rig {
    memory: GuestMemory,
    disk: MemDisk,
    calls: Receiver<Call>,
    blk: Blk,
    driver: Driver,
    notices: Receiver<Notice>,
}

impl Rig {
    fn new() -> Self {
        Self::with(info(1024), ALL & !EVENT_IDX, 16)
    }

    fn with(info: DiskInfo, features: u64, size: u16) -> Self {
        Self::timed(info, features, size, None)
    }

    fn timed(info: DiskInfo, features: u64, size: u16, clock: Option<Clock>) -> Self {
        let memory = memory();
        let (disk, calls) = disk(info);
        let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings(1));
        if let Some(clock) = clock {
            blk.clock = clock;
        }
        let driver = Driver::new(&memory, 0, size);
        let queue = driver.activate_with(features & EVENT_IDX != 0);
        let notices = start(&mut blk, features, &memory, vec![queue]);
        Self {
            memory,
            disk,
            calls,
            blk,
            driver,
            notices,
        }
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        self.driver.put(at, kind);
        self.driver.put(at + 4, 0_u32);
        self.driver.put(at + 8, sector);
    }

    /// Offers a request with `data` between header and status.
    fn offer(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u16 {
        self.header(HEADER, kind, sector);
        self.driver.put(STATUS, UNSET);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend(data);
        pieces.push((STATUS, 1, true));
        self.driver.offer(&pieces)
    }

    /// Does a request and returns its status and how many bytes were written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        let head = self.offer(kind, sector, data);
        self.driver.kick();
        let (id, written) = self.driver.wait(&self.notices);
        assert_eq!(id, u32::from(head));
        (self.driver.get(STATUS), written)
    }

    fn segment(&self, at: u64, sector: u64, count: u32, flags: u32) {
        self.driver.put(at, sector);
        self.driver.put(at + 8, count);
        self.driver.put(at + 12, flags);
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.try_iter().collect()
    }

    /// The next thing that the disk is asked.
    fn call(&self) -> Call {
        self.calls.recv_timeout(PATIENCE).unwrap()
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_reads_back() {
    let mut rig = Rig::new();
    let data: Vec<u8> = (0..1024_u32).map(|i| i.to_le_bytes()[0]).collect();
    rig.driver.put_bytes(DATA, &data);
    assert_eq!(rig.request(OUT, 3, &[(DATA, 1024, false)]), (OK, 1));
    assert_eq!(rig.disk.0.data.lock().unwrap()[1536..2560], data);
    assert_eq!(
        rig.request(IN, 3, &[(DATA + 0x2000, 1024, true)]),
        (OK, 1025)
    );
    assert_eq!(rig.driver.bytes(DATA + 0x2000, 1024), data);
    let expected = [(Op::Write, 1536, 1024), (Op::Read, 1536, 1024)];
    assert_eq!(rig.calls(), expected);
}

#[test]
fn it_does_not_matter_how_a_request_is_cut_into_descriptors() {
    let mut rig = Rig::new();
    rig.header(HEADER, OUT, 0);
    rig.driver.put_bytes(DATA, &[7; 512]);
    // The header in two parts, the second with the first data behind it.
    rig.driver
        .put_bytes(DATA - 0x100, &rig.driver.bytes(HEADER + 5, 11));
    rig.driver.put_bytes(DATA - 0x100 + 11, &[7; 100]);
    let head = rig.driver.offer(&[
        (HEADER, 5, false),
        (HEADER, 0, false),
        (DATA - 0x100, 111, false),
        (DATA, 412, false),
        (STATUS, 1, true),
    ]);
    rig.driver.kick();
    assert_eq!(rig.driver.wait(&rig.notices), (head.into(), 1));
    assert_eq!(
        rig.disk.0.data.lock().unwrap()[..513],
        [&[7; 512][..], &[0xd1]].concat()
    );

    // A read whose data and status share a descriptor.
    rig.header(HEADER, IN, 0);
    rig.driver.put(DATA + 0x1000 + 512, UNSET);
    let pieces = [(HEADER, 16, false), (DATA + 0x1000, 513, true)];
    rig.driver.offer(&pieces);
    rig.driver.kick();
    assert_eq!(rig.driver.wait(&rig.notices).1, 513);
    let expected = [&[7; 512][..], &[OK]].concat();
    assert_eq!(rig.driver.bytes(DATA + 0x1000, 513), expected);
}

#[test]
fn data_may_lie_across_two_regions() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(IN, 0, &[(SEAM - 100, 512, true)]), (OK, 513));
    let bytes = rig.driver.bytes(SEAM - 101, 514);
    assert_eq!(bytes, [&[0][..], &[0xd1; 512], &[0]].concat());
}

#[test]
fn flush_id_discard_and_zeroes_do_what_they_say() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(rig.driver.bytes(DATA, 6), b"vireo\0");
    // A short buffer gets a part.
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 3, true)]), (OK, 4));
    // A long one is not written past the number.
    rig.driver.put_bytes(DATA, &[9; 40]);
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 40, true)]), (OK, 21));
    assert_eq!(rig.driver.bytes(DATA + 20, 20), [9; 20]);

    rig.segment(DATA, 2, 3, 0);
    rig.segment(DATA + 16, 8, 0, 0);
    rig.segment(DATA + 32, 1023, 1, 0);
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 48, false)]), (OK, 1));
    rig.segment(DATA, 4, 1, 1);
    rig.segment(DATA + 16, 5, 1, 0);
    assert_eq!(rig.request(ZEROES, 0, &[(DATA, 32, false)]), (OK, 1));
    let zeroes = |may_unmap| Op::WriteZeroes {
        len: 512,
        may_unmap,
    };
    assert_eq!(
        rig.calls(),
        [
            (Op::Flush, 0, 0),
            (Op::Discard { len: 1536 }, 1024, 0),
            (Op::Discard { len: 512 }, 1023 * 512, 0),
            (zeroes(true), 2048, 0),
            (zeroes(false), 2560, 0),
        ]
    );
    // Nothing left to do is done.
    rig.segment(DATA, 0, 0, 0);
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 16, false)]), (OK, 1));
    assert_eq!(rig.request(IN, 0, &[]), (OK, 1));
    assert_eq!(rig.calls(), []);
}

#[test]
fn unknown_and_unaccepted_requests_are_unsupported() {
    let mut rig = Rig::new();
    for kind in [2, 3, 5, 10, 12, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[]), (UNSUPP, 1), "type {kind}");
    }
    let mut rig = Rig::with(info(64), 0, 16);
    rig.segment(DATA, 0, 1, 0);
    for kind in [DISCARD, ZEROES] {
        assert_eq!(rig.request(kind, 0, &[(DATA, 16, false)]), (UNSUPP, 1));
    }
}

#[test]
fn a_read_only_disk_refuses_writes_whatever_was_accepted_and_flushes() {
    let mut facts = info(64);
    facts.read_only = true;
    let mut rig = Rig::with(facts, 0, 16);
    rig.segment(DATA, 0, 1, 0);
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.calls(), [(Op::Flush, 0, 0)]);
    // A driver that claims features it was not offered.
    let facts = rig.disk.0.info.clone();
    let mut rig = Rig::with(facts, ALL & !EVENT_IDX, 16);
    rig.segment(DATA, 0, 1, 0);
    for kind in [DISCARD, ZEROES] {
        assert_eq!(rig.request(kind, 0, &[(DATA, 16, false)]), (IOERR, 1));
    }
    assert_eq!(rig.calls(), []);
}

#[test]
fn a_disk_error_is_the_requests_and_nobody_elses() {
    let mut rig = Rig::new();
    rig.disk
        .fail(&[Some(ErrorKind::StorageFull), Some(ErrorKind::Unsupported)]);
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]), (IOERR, 1));
    rig.segment(DATA, 0, 1, 0);
    assert_eq!(rig.request(ZEROES, 0, &[(DATA, 16, false)]), (UNSUPP, 1));
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
    // A discard ends with its first range that fails.
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.segment(DATA, 0, 1, 0);
    rig.segment(DATA + 16, 1, 1, 0);
    rig.calls();
    assert_eq!(rig.request(DISCARD, 0, &[(DATA, 32, false)]), (IOERR, 1));
    assert_eq!(rig.calls(), [(Op::Discard { len: 512 }, 0, 0)]);
}

/// A write or write-zeroes, and whether a flush followed before it completed.
fn syncs(rig: &mut Rig) -> bool {
    rig.calls();
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), (OK, 1));
    let calls = rig.calls();
    rig.segment(DATA, 0, 1, 0);
    let (status, _) = rig.request(ZEROES, 0, &[(DATA, 16, false)]);
    if status == OK {
        assert_eq!(rig.calls().len(), calls.len());
    }
    match calls[..] {
        [(Op::Write, 0, 512)] => false,
        [(Op::Write, 0, 512), (Op::Flush, 0, 0)] => true,
        _ => panic!("{calls:?}"),
    }
}

#[test]
fn a_write_is_durable_before_it_completes_when_the_driver_cannot_or_will_not_flush() {
    let flush = bit(VIRTIO_BLK_F_FLUSH);
    let wce = bit(VIRTIO_BLK_F_CONFIG_WCE);
    assert!(syncs(&mut Rig::with(info(64), 0, 16)));
    assert!(syncs(&mut Rig::with(info(64), wce, 16)));
    assert!(!syncs(&mut Rig::with(info(64), flush, 16)));
    let mut rig = Rig::new();
    assert!(!syncs(&mut rig));
    rig.blk.write_config(WRITEBACK_OFFSET, &[0]);
    assert!(syncs(&mut rig));
    rig.blk.write_config(WRITEBACK_OFFSET, &[1]);
    assert!(!syncs(&mut rig));
}

#[test]
fn a_write_whose_flush_fails_has_failed() {
    let mut rig = Rig::with(info(64), 0, 16);
    rig.disk.fail(&[None, Some(ErrorKind::Other)]);
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    // One that fails itself is not flushed.
    rig.calls();
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    assert_eq!(rig.request(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(rig.calls(), [(Op::Write, 0, 512)]);
}

#[test]
fn reads_mark_the_pages_they_fill_and_writes_mark_none() {
    let mut rig = Rig::new();
    let log = {
        let view = rig.memory.memory();
        let region = view.find_region(vm_memory::GuestAddress(0)).unwrap();
        std::ops::Deref::deref(region).bitmap().clone()
    };
    let page = |addr: u64| usize::try_from(addr).unwrap();
    log.enable();
    rig.request(OUT, 0, &[(DATA + 0x8000, 4096, false)]);
    rig.request(IN, 0, &[(DATA + 0x1800, 4096, true)]);
    for (addr, dirty) in [
        (STATUS, true),
        (DATA, false),
        (DATA + 0x1000, true),
        (DATA + 0x2000, true),
        (DATA + 0x3000, false),
        (DATA + 0x8000, false),
    ] {
        assert_eq!(log.dirty_at(page(addr)), dirty, "{addr:#x}");
    }
    // The used ring is the device's too.
    assert!(log.dirty_at(0x4000));
    // A read that fails may have written before it did.
    log.disable();
    log.enable();
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.request(IN, 0, &[(DATA + 0x4000, 512, true)]);
    assert!(log.dirty_at(page(DATA + 0x4000)));
}

#[test]
fn with_event_idx_the_driver_is_interrupted_where_it_asked() {
    let mut rig = Rig::with(info(64), ALL, 16);
    rig.disk.close();
    rig.driver.set_used_event(2);
    for _ in 0..3 {
        rig.offer(FLUSH, 0, &[]);
        rig.driver.kick();
        rig.call();
    }
    rig.disk.open();
    assert_eq!(rig.notices.recv_timeout(PATIENCE), Ok(Notice::Queue(0)));
    // It wants no more until the hundredth, and gets none for the fourth.
    assert_eq!(rig.driver.used_index(), 3);
    rig.driver.set_used_event(100);
    rig.offer(FLUSH, 0, &[]);
    rig.driver.kick();
    rig.call();
    let stopped = rig.blk.stop(soon()).unwrap();
    assert_eq!(rig.driver.used_index(), 4);
    assert_eq!(rig.notices.try_recv(), Err(TryRecvError::Disconnected));
    assert_eq!(stopped.len(), 1);
    // It asked to be kicked for whatever comes next.
    assert_eq!(rig.driver.avail_event(), 4);
}

#[test]
fn without_event_idx_the_drivers_flag_suppresses_interrupts() {
    let mut rig = Rig::new();
    rig.driver.set_avail_flags(1);
    rig.offer(FLUSH, 0, &[]);
    rig.driver.kick();
    rig.call();
    rig.blk.stop(soon()).unwrap();
    assert_eq!(rig.driver.used_index(), 1);
    assert_eq!(rig.notices.try_recv(), Err(TryRecvError::Disconnected));
    // The device for its part wants kicks, for it had emptied the ring.
    assert_eq!(rig.driver.used_flags(), 0);
}

#[test]
fn a_head_that_is_offered_again_and_again_never_fills_more_than_the_queue() {
    let mut rig = Rig::with(info(64), 0, 4);
    rig.disk.close();
    let head = rig.offer(FLUSH, 0, &[]);
    for _ in 0..3 {
        rig.driver.offer_head(head);
    }
    rig.driver.kick();
    for _ in 0..4 {
        rig.call();
    }
    // It is full now, and asks not to be kicked.
    assert_eq!(rig.driver.used_flags(), 1);
    for _ in 0..4 {
        rig.driver.offer_head(head);
    }
    rig.driver.kick();
    rig.disk.open();
    for _ in 0..8 {
        assert_eq!(rig.driver.wait(&rig.notices), (head.into(), 1));
    }
    rig.blk.stop(soon()).unwrap();
    assert_eq!(rig.disk.0.peak.load(Ordering::SeqCst), 4);
}

#[test]
fn the_deadline_passes_with_a_request_at_the_disk_and_the_device_works_on() {
    let mut rig = Rig::new();
    rig.disk.close();
    rig.offer(IN, 0, &[(DATA, 512, true)]);
    rig.driver.kick();
    rig.call();
    let late = rig.blk.stop(Instant::now());
    let Err(StopError::Deadline { unit, .. }) = late else {
        panic!("it stopped");
    };
    assert_eq!(unit, "disk0");
    rig.disk.open();
    assert_eq!(rig.driver.wait(&rig.notices).1, 513);
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    let stopped = rig.blk.stop(soon()).unwrap();
    assert!(stopped[0].parked.is_empty());
}

#[test]
fn a_stop_drains_what_is_at_the_disk_and_leaves_the_rest_in_the_ring() {
    let mut rig = Rig::new();
    rig.disk.close();
    rig.offer(IN, 0, &[(DATA, 512, true)]);
    rig.driver.kick();
    rig.call();
    let disk = rig.disk.clone();
    let stopped = thread::scope(|scope| {
        let stop = scope.spawn(|| rig.blk.stop(soon()));
        disk.open();
        stop.join().unwrap().unwrap()
    });
    assert_eq!(rig.driver.returned(), Some((0, 513)));
    rig.offer(FLUSH, 0, &[]);
    rig.driver.kick();

    let queue = Driver::reactivate(stopped.into_iter().next().unwrap());
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    rig.driver.wait(&rig.notices);
    assert_eq!(rig.call(), (Op::Flush, 0, 0));
}

#[test]
fn a_broken_engine_parks_its_requests_and_they_are_served_first_at_the_next_start() {
    let mut rig = Rig::new();
    rig.disk.close();
    let head = rig.offer(IN, 1, &[(DATA, 512, true)]);
    rig.driver.kick();
    rig.call();
    rig.disk.0.broken.store(true, Ordering::SeqCst);
    rig.disk.rouse();
    assert!(reset_reason(&rig.notices).contains("stalled"));
    let later = DATA - 0x100;
    rig.header(later, FLUSH, 0);
    rig.driver.offer(&[(later, 16, false), (STATUS, 1, true)]);
    let stopped = rig.blk.stop(soon()).unwrap();
    assert_eq!(stopped[0].parked, [head]);
    assert_eq!(rig.driver.used_index(), 0);

    rig.disk.open();
    let queue = Driver::reactivate(stopped.into_iter().next().unwrap());
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    assert_eq!(rig.driver.wait(&rig.notices), (head.into(), 513));
    assert_eq!(rig.driver.wait(&rig.notices).1, 1);
    assert_eq!(rig.calls(), [(Op::Read, 512, 512), (Op::Flush, 0, 0)]);
}

#[test]
fn a_worker_that_panics_is_reported_and_the_device_can_be_started_again() {
    let mut rig = Rig::new();
    rig.disk.0.panics.store(true, Ordering::SeqCst);
    rig.offer(FLUSH, 0, &[]);
    rig.driver.kick();
    assert!(reset_reason(&rig.notices).contains("disk0"));
    let lost = rig.blk.stop(soon());
    assert!(matches!(lost, Err(StopError::WorkerLost { unit }) if unit == "disk0"));
    assert!(rig.blk.stop(soon()).unwrap().is_empty());
    rig.blk.reset();
    rig.driver = Driver::new(&rig.memory, 1, 16);
    let queue = rig.driver.activate();
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn queues_work_at_the_same_time_and_are_stopped_together() {
    const QUEUES: u16 = 4;
    const ROUNDS: u64 = 64;
    let memory = memory();
    let (disk, _calls) = disk(info(u64::from(QUEUES) * ROUNDS));
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings(QUEUES));
    let mut drivers: Vec<_> = (0..QUEUES).map(|i| Driver::new(&memory, i, 16)).collect();
    let queues = drivers.iter().map(Driver::activate).collect();
    let notices = start(&mut blk, ALL & !EVENT_IDX, &memory, queues);
    let areas = |queue: u16| DATA + 0x1_0000 * u64::from(queue + 1);
    for round in 0..ROUNDS {
        for driver in &mut drivers {
            let area = areas(driver.index);
            let sector = u64::from(driver.index) * ROUNDS + round;
            driver.put(area, u64::from(OUT));
            driver.put(area + 8, sector);
            driver.put_bytes(area + 512, &[u8::try_from(sector % 251).unwrap(); 512]);
            let pieces = [
                (area, 16, false),
                (area + 512, 512, false),
                (area + 32, 1, true),
            ];
            driver.offer(&pieces);
            driver.kick();
        }
        let mut left = QUEUES;
        while left > 0 {
            let Notice::Queue(queue) = notices.recv_timeout(PATIENCE).unwrap() else {
                panic!("only interrupts are expected");
            };
            let driver = &mut drivers[usize::from(queue)];
            assert!(driver.returned().is_some());
            assert_eq!(driver.get::<u8>(areas(queue) + 32), OK);
            left -= 1;
        }
    }
    let stopped = blk.stop(soon()).unwrap();
    assert_eq!(
        stopped.iter().map(|q| q.index).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    let data = disk.0.data.lock().unwrap();
    for (sector, bytes) in data.chunks(512).enumerate() {
        let expected = u8::try_from(sector % 251).unwrap();
        assert!(bytes.iter().all(|b| *b == expected), "sector {sector}");
    }
}

#[test]
fn one_busy_queue_keeps_the_others_running_when_the_deadline_passes() {
    let memory = memory();
    let (disk, calls) = disk(info(64));
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings(2));
    let mut busy = Driver::new(&memory, 0, 16);
    let mut idle = Driver::new(&memory, 1, 16);
    let queues = vec![busy.activate(), idle.activate()];
    let notices = start(&mut blk, ALL & !EVENT_IDX, &memory, queues);
    busy.put(HEADER, FLUSH);
    disk.close();
    busy.offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    busy.kick();
    calls.recv_timeout(PATIENCE).unwrap();
    assert!(blk.stop(Instant::now()).is_err());
    disk.open();
    busy.wait(&notices);
    idle.offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    idle.kick();
    idle.wait(&notices);
    assert_eq!(blk.stop(soon()).unwrap().len(), 2);
}

#[test]
fn a_device_that_is_dropped_while_it_works_lets_go_of_its_disk() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1));
    assert!(Arc::strong_count(&rig.disk.0) > 1);
    drop(rig.blk);
    assert_eq!(Arc::strong_count(&rig.disk.0), 1);
}

#[test]
fn a_start_that_the_host_cannot_serve_leaves_the_device_inactive() {
    let memory = memory();
    let (disk, _calls) = disk(info(64));
    disk.0.exhausted.store(true, Ordering::SeqCst);
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings(1));
    let driver = Driver::new(&memory, 0, 16);
    let (notifier, _notices) = crate::testing::notices();
    let failed = blk.start(Activation {
        features: 0,
        memory: memory.clone(),
        queues: vec![driver.activate()],
        notifier,
    });
    assert!(failed.unwrap_err().to_string().contains("disk queue"));
    assert!(blk.stop(soon()).unwrap().is_empty());
    disk.0.exhausted.store(false, Ordering::SeqCst);
    start(&mut blk, 0, &memory, vec![driver.activate()]);
    assert_eq!(blk.stop(soon()).unwrap().len(), 1);
}
