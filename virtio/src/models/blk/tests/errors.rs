//! Failing disks: what the driver is told, what waits for the next start, what observers hear.

use super::*;
use crate::device::{DiskReport, ErrorAction, StoppedQueue};

fn rig(rerror: OnReadError, werror: OnWriteError) -> Rig {
    rig_of(ALL & !EVENT_IDX, 16, rerror, werror)
}

/// One in which every failure waits.
fn stopping() -> Rig {
    rig(OnReadError::Stop, OnWriteError::Stop)
}

fn rig_of(features: u64, size: u16, rerror: OnReadError, werror: OnWriteError) -> Rig {
    let memory = memory();
    let (disk, calls) = disk(info(1024));
    let settings = BlkSettings {
        rerror,
        werror,
        ..settings(1)
    };
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings);
    let driver = Driver::new(&memory, 0, size);
    let queue = driver.activate();
    let notices = start(&mut blk, features, &memory, vec![queue]);
    Rig {
        memory,
        disk,
        calls,
        blk,
        driver,
        notices,
    }
}

/// The next report, past interrupts.
fn report(rig: &Rig) -> DiskReport {
    loop {
        if let Notice::Disk(report) = rig.notices.recv_timeout(PATIENCE).unwrap() {
            return report;
        }
    }
}

/// What was tried, where, and what is done about it, of the next report.
fn told(rig: &Rig) -> (&'static str, Option<u64>, ErrorAction) {
    match report(rig) {
        DiskReport::Error {
            operation,
            offset,
            action,
            ..
        } => (operation, offset, action),
        other => panic!("{other:?}"),
    }
}

impl Rig {
    /// A write of one sector of `fill`, with its own header, data and status.
    fn offer_write(&mut self, sector: u64, fill: u8) -> u16 {
        let area = area(sector);
        self.header(area, OUT, sector);
        self.driver.put(area + 32, UNSET);
        self.driver.put_bytes(area + 512, &[fill; 512]);
        self.driver.offer(&[
            (area, 16, false),
            (area + 512, 512, false),
            (area + 32, 1, true),
        ])
    }

    fn status(&self, sector: u64) -> u8 {
        self.driver.get(area(sector) + 32)
    }

    fn sector(&self, sector: usize) -> Vec<u8> {
        self.disk.0.data.lock().unwrap()[sector * 512..][..512].to_vec()
    }

    /// Waits until these chains have come back, in any order.
    fn wait_for(&mut self, heads: &[u16]) {
        let mut back: Vec<_> = heads
            .iter()
            .map(|_| self.driver.wait(&self.notices))
            .collect();
        back.sort_unstable();
        let mut expected: Vec<_> = heads.iter().map(|head| (u32::from(*head), 1)).collect();
        expected.sort_unstable();
        assert_eq!(back, expected);
    }
}

fn area(sector: u64) -> u64 {
    DATA + 0x1000 * sector
}

/// Stops the device and starts it again; what waited in between.
fn restart(rig: &mut Rig) -> Vec<u16> {
    let stopped = rig.blk.stop(soon()).unwrap().into_iter().next().unwrap();
    let parked = stopped.parked.clone();
    let queue = Driver::reactivate(stopped);
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    parked
}

#[test]
fn a_full_host_has_the_write_wait_and_the_next_start_does_it() {
    let mut rig = rig(OnReadError::Report, OnWriteError::Enospc);
    rig.driver.put_bytes(DATA, &[7; 512]);
    rig.disk
        .fail(&[Some(ErrorKind::StorageFull), Some(ErrorKind::StorageFull)]);
    let head = rig.offer(OUT, 3, &[(DATA, 512, false)]);
    rig.driver.kick();
    assert_eq!(
        report(&rig),
        DiskReport::Error {
            operation: "write",
            offset: Some(3 * 512),
            reason: ErrorKind::StorageFull.to_string(),
            no_space: true,
            action: ErrorAction::Stop,
        }
    );
    assert_eq!(
        rig.driver.get::<u8>(STATUS),
        UNSET,
        "the driver hears nothing"
    );
    // Still full: it waits again, and is told again.
    assert_eq!(restart(&mut rig), [head]);
    assert!(matches!(report(&rig), DiskReport::Error { .. }));
    assert_eq!(rig.driver.returned(), None);
    assert_eq!(restart(&mut rig), [head]);
    assert_eq!(rig.driver.wait(&rig.notices), (head.into(), 1));
    assert_eq!(rig.driver.get::<u8>(STATUS), OK);
    assert_eq!(rig.request(IN, 3, &[(DATA + 4096, 512, true)]), (OK, 513));
    assert_eq!(rig.driver.bytes(DATA + 4096, 512), [7; 512]);
}

#[test]
fn what_is_done_about_a_failure_follows_the_settings() {
    use ErrorAction::{Ignore, Report, Stop};
    let full = ErrorKind::StorageFull;
    let other = ErrorKind::Other;
    let table = [
        (OnWriteError::Enospc, full, Stop),
        (OnWriteError::Enospc, ErrorKind::QuotaExceeded, Stop),
        (OnWriteError::Enospc, other, Report),
        (OnWriteError::Report, full, Report),
        (OnWriteError::Ignore, full, Ignore),
        (OnWriteError::Stop, other, Stop),
        // No patience mends these.
        (OnWriteError::Stop, ErrorKind::InvalidInput, Report),
        (OnWriteError::Stop, ErrorKind::Unsupported, Report),
    ];
    for kind in [OUT, FLUSH] {
        for (werror, failure, action) in table {
            let mut rig = rig(OnReadError::Stop, werror);
            rig.disk.fail(&[Some(failure)]);
            let data: &[Piece] = if kind == OUT {
                &[(DATA, 512, false)]
            } else {
                &[]
            };
            rig.offer(kind, 0, data);
            rig.driver.kick();
            match action {
                Stop => {
                    report(&rig);
                    assert_eq!(rig.driver.returned(), None);
                    assert_eq!(restart(&mut rig).len(), 1);
                    rig.driver.wait(&rig.notices);
                    assert_eq!(rig.driver.get::<u8>(STATUS), OK);
                }
                Report => {
                    while rig.driver.returned().is_none() {
                        rig.notices.recv_timeout(PATIENCE).unwrap();
                    }
                    let status = rig.driver.get::<u8>(STATUS);
                    assert!(matches!(status, IOERR | UNSUPP), "{werror:?} {failure:?}");
                }
                Ignore => {
                    rig.driver.wait(&rig.notices);
                    assert_eq!(rig.driver.get::<u8>(STATUS), OK);
                }
            }
        }
    }
}

#[test]
fn reads_have_a_policy_of_their_own() {
    for (rerror, status) in [(OnReadError::Report, IOERR), (OnReadError::Ignore, OK)] {
        let mut rig = rig(rerror, OnWriteError::Stop);
        rig.disk.fail(&[Some(ErrorKind::Other)]);
        rig.offer(IN, 0, &[(DATA, 512, true)]);
        rig.driver.kick();
        while rig.driver.returned().is_none() {
            rig.notices.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!(rig.driver.get::<u8>(STATUS), status, "{rerror:?}");
    }
    let mut rig = rig(OnReadError::Stop, OnWriteError::Report);
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.offer(IN, 0, &[(DATA, 512, true)]);
    rig.driver.kick();
    assert!(matches!(
        report(&rig),
        DiskReport::Error {
            operation: "read",
            ..
        }
    ));
    restart(&mut rig);
    assert_eq!(rig.driver.wait(&rig.notices).1, 513);
}

#[test]
fn a_reset_forgets_what_waits() {
    let mut rig = rig(OnReadError::Report, OnWriteError::Stop);
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.offer(FLUSH, 0, &[]);
    rig.driver.kick();
    report(&rig);
    rig.blk.stop(soon()).unwrap();
    rig.blk.reset();
    rig.calls();
    rig.driver = Driver::new(&rig.memory, 1, 16);
    let queue = rig.driver.activate();
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(rig.calls(), [(Op::Read, 0, 512)]);
}

#[test]
fn nothing_is_taken_while_a_request_waits_and_what_came_later_comes_after_it() {
    let mut rig = stopping();
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    let head = rig.offer_write(3, 7);
    rig.driver.kick();
    assert_eq!(told(&rig), ("write", Some(1536), ErrorAction::Stop));
    assert_eq!(rig.call(), (Op::Write, 1536, 512));
    let later = rig.offer_write(4, 8);
    // Between the two the worker has had a whole turn.
    rig.driver.kick_and_wait();
    rig.driver.kick_and_wait();
    assert_eq!(rig.calls(), []);
    assert_eq!(restart(&mut rig), [head]);
    rig.wait_for(&[head, later]);
    assert_eq!((rig.status(3), rig.status(4)), (OK, OK));
    assert_eq!((rig.sector(3), rig.sector(4)), (vec![7; 512], vec![8; 512]));
    let again = [(Op::Write, 1536, 512), (Op::Write, 2048, 512)];
    assert_eq!(rig.calls(), again);
    assert!(restart(&mut rig).is_empty());
}

#[test]
fn what_is_at_the_disk_goes_on_and_only_what_fails_waits() {
    let mut rig = stopping();
    rig.disk.close();
    rig.disk
        .fail(&[Some(ErrorKind::Other), None, Some(ErrorKind::Other)]);
    let heads: Vec<_> = (1..=3).map(|n| rig.offer_write(n, 5)).collect();
    rig.driver.kick();
    for _ in 0..3 {
        rig.call();
    }
    rig.disk.open();
    rig.wait_for(&[heads[1]]);
    assert_eq!(restart(&mut rig), [heads[0], heads[2]]);
    rig.wait_for(&[heads[0], heads[2]]);
    assert!((1..=3).all(|n| rig.sector(n) == [5; 512]));
}

#[test]
fn requests_wait_in_the_order_in_which_they_came_not_in_which_they_failed() {
    let mut rig = stopping();
    rig.disk.close();
    // The discard's second range fails after the write that came later.
    let bad = Some(ErrorKind::Other);
    rig.disk.fail(&[None, bad, bad]);
    rig.segment(DATA, 0, 1, 0);
    rig.segment(DATA + 16, 1, 1, 0);
    let first = rig.offer(DISCARD, 0, &[(DATA, 32, false)]);
    let second = rig.offer_write(7, 5);
    rig.driver.kick();
    rig.call();
    rig.call();
    rig.disk.open();
    assert_eq!(told(&rig), ("write", Some(7 * 512), ErrorAction::Stop));
    assert_eq!(told(&rig), ("discard", Some(512), ErrorAction::Stop));
    rig.calls();
    assert_eq!(restart(&mut rig), [first, second]);
    rig.wait_for(&[first, second]);
    // All of the discard is done again.
    let mut calls = rig.calls();
    calls.sort_by_key(|(_, offset, _)| *offset);
    let discard = Op::Discard { len: 512 };
    let expected = [
        (discard, 0, 0),
        (discard, 512, 0),
        (Op::Write, 7 * 512, 512),
    ];
    assert_eq!(calls, expected);
}

#[test]
fn a_write_whose_flush_failed_is_written_and_flushed_again() {
    let mut rig = rig_of(0, 16, OnReadError::Stop, OnWriteError::Stop);
    rig.disk.fail(&[None, Some(ErrorKind::Other)]);
    let head = rig.offer_write(1, 3);
    rig.driver.kick();
    assert_eq!(told(&rig), ("flush", None, ErrorAction::Stop));
    rig.calls();
    let stopped = rig.blk.stop(soon()).unwrap().remove(0);
    assert_eq!(stopped.parked, [head]);
    let queue = Driver::reactivate(stopped);
    rig.notices = start(&mut rig.blk, 0, &rig.memory, vec![queue]);
    rig.wait_for(&[head]);
    assert_eq!(rig.calls(), [(Op::Write, 512, 512), (Op::Flush, 0, 0)]);
}

#[test]
fn the_ranges_after_one_that_failed_and_is_ignored_are_done() {
    let mut rig = rig(OnReadError::Ignore, OnWriteError::Ignore);
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    rig.segment(DATA, 0, 1, 0);
    rig.segment(DATA + 16, 9, 1, 0);
    assert_eq!(rig.request(ZEROES, 0, &[(DATA, 32, false)]), (OK, 1));
    assert_eq!(rig.sector(9), [0; 512]);
    rig.disk.fail(&[Some(ErrorKind::Other)]);
    assert_eq!(rig.request(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_request_that_breaks_a_rule_is_answered_and_stops_nobody() {
    let mut rig = stopping();
    assert_eq!(rig.request(OUT, 1024, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(rig.request(OUT, 0, &[(DATA, 100, false)]), (IOERR, 1));
    rig.blk.stop(soon()).unwrap();
    assert!(
        rig.notices
            .try_iter()
            .all(|notice| !matches!(notice, Notice::Disk(_)))
    );
}

#[test]
fn a_head_that_was_offered_twice_waits_once() {
    let mut rig = rig_of(0, 4, OnReadError::Stop, OnWriteError::Stop);
    rig.disk.close();
    rig.disk.fail(&[Some(ErrorKind::Other); 4]);
    let head = rig.offer(FLUSH, 0, &[]);
    for _ in 0..3 {
        rig.driver.offer_head(head);
    }
    rig.driver.kick();
    for _ in 0..4 {
        rig.call();
    }
    rig.disk.open();
    report(&rig);
    assert_eq!(rig.blk.stop(soon()).unwrap()[0].parked, [head]);
}

#[test]
fn when_a_stop_is_given_up_what_waits_is_done_again() {
    let memory = memory();
    let (disk, calls) = disk(info(64));
    let settings = BlkSettings {
        werror: OnWriteError::Stop,
        ..settings(2)
    };
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings);
    let mut drivers = [0, 1].map(|index| Driver::new(&memory, index, 16));
    let queues = drivers.iter().map(Driver::activate).collect();
    let notices = start(&mut blk, ALL & !EVENT_IDX, &memory, queues);
    let flush = |driver: &mut Driver| {
        let at = DATA + 0x1000 * u64::from(driver.index);
        driver.put(at, FLUSH);
        driver.offer(&[(at, 16, false), (at + 32, 1, true)]);
        driver.kick();
    };
    disk.fail(&[Some(ErrorKind::Other)]);
    flush(&mut drivers[0]);
    let notice = notices.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(notice, Notice::Disk(_)), "{notice:?}");
    calls.recv_timeout(PATIENCE).unwrap();
    disk.close();
    flush(&mut drivers[1]);
    calls.recv_timeout(PATIENCE).unwrap();
    assert!(blk.stop(Instant::now()).is_err());
    // The one that waited is at the disk again.
    calls.recv_timeout(PATIENCE).unwrap();
    disk.open();
    for driver in &drivers {
        while driver.used_index() == 0 {
            notices.recv_timeout(PATIENCE).unwrap();
        }
    }
    let stopped = blk.stop(soon()).unwrap();
    assert!(stopped.iter().all(|queue| queue.parked.is_empty()));
}

#[test]
fn what_waits_moves_to_another_device_of_the_same_disk() {
    let mut rig = stopping();
    rig.disk.close();
    rig.disk
        .fail(&[Some(ErrorKind::Other), Some(ErrorKind::Other)]);
    let heads = [rig.offer_write(1, 1), rig.offer_write(2, 2)];
    rig.driver.kick();
    rig.call();
    rig.call();
    rig.disk.open();
    report(&rig);
    let stopped = rig.blk.stop(soon()).unwrap().remove(0);
    let section = rig.blk.save_section("disk0").unwrap();
    assert_eq!(stopped.parked, heads);

    rig.blk = Blk::new("disk0", Arc::new(rig.disk.clone()), settings(1));
    rig.blk.features_negotiated(ALL & !EVENT_IDX);
    rig.blk.restore_section(&section).unwrap();
    let queue = Driver::reactivate(StoppedQueue {
        queue: stopped.queue.state().try_into().unwrap(),
        ..stopped
    });
    rig.notices = start(&mut rig.blk, ALL & !EVENT_IDX, &rig.memory, vec![queue]);
    rig.wait_for(&heads);
    assert_eq!((rig.sector(1), rig.sector(2)), (vec![1; 512], vec![2; 512]));
}

#[test]
fn many_failures_are_told_a_few_times_and_one_that_waits_always() {
    let mut rig = rig(OnReadError::Report, OnWriteError::Enospc);
    for _ in 0..3 * devices::LogLimit::BURST {
        rig.disk.fail(&[Some(ErrorKind::Other)]);
        rig.offer(FLUSH, 0, &[]);
        rig.driver.kick();
        while rig.driver.returned().is_none() {
            thread::yield_now();
        }
        assert_eq!(rig.driver.get::<u8>(STATUS), IOERR);
    }
    rig.disk.fail(&[Some(ErrorKind::StorageFull)]);
    rig.offer_write(1, 1);
    rig.driver.kick();
    let mut reported = 0;
    while told(&rig).2 != ErrorAction::Stop {
        reported += 1;
    }
    assert_eq!(reported, devices::LogLimit::BURST);
}

#[test]
fn what_the_disk_tells_is_passed_on() {
    let rig = stopping();
    let observers = rig.disk.0.observers.lock().unwrap().clone();
    let [observer] = &observers[..] else {
        panic!("a device watches its disk once");
    };
    observer.event(&DiskEvent::WriteThreshold {
        threshold: 10,
        offset: 20,
    });
    let threshold = DiskReport::WriteThreshold {
        threshold: 10,
        offset: 20,
    };
    assert_eq!(report(&rig), threshold);
    let message = "bad table".to_owned();
    observer.event(&DiskEvent::Corrupt {
        message: message.clone(),
    });
    assert_eq!(report(&rig), DiskReport::Corrupt { reason: message });
}

#[test]
fn a_disk_that_has_grown_is_larger_to_the_driver_at_once() {
    let mut rig = stopping();
    let capacity = |blk: &Blk| {
        let mut bytes = [0; 8];
        blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(rig.request(IN, 1024, &[(DATA, 512, true)]), (IOERR, 1));
    rig.blk.resize_disk(2048 * 512).unwrap();
    assert_eq!(capacity(&rig.blk), 2048);
    assert_eq!(rig.request(IN, 2047, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(rig.request(IN, 2048, &[(DATA, 512, true)]), (IOERR, 1));
    let refused = rig.blk.resize_disk(512);
    assert!(matches!(refused, Err(ResizeError::Disk { size: 512, .. })));
    assert_eq!(capacity(&rig.blk), 2048);
    // What is saved fits the disk as it is now.
    rig.blk.stop(soon()).unwrap();
    let section = rig.blk.save_section("disk0").unwrap();
    let disk = Arc::new(rig.disk.clone());
    Blk::new("disk0", disk, settings(1))
        .restore_section(&section)
        .unwrap();
}
