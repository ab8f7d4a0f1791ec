//! Failing disks: what the driver is told, what waits for the next start, what observers hear.

use super::*;
use crate::device::{DiskReport, ErrorAction};

fn rig(rerror: OnReadError, werror: OnWriteError) -> Rig {
    let memory = memory();
    let (disk, calls) = disk(info(1024));
    let settings = BlkSettings {
        rerror,
        werror,
        ..settings(1)
    };
    let mut blk = Blk::new("disk0", Arc::new(disk.clone()), settings);
    let driver = Driver::new(&memory, 0, 16);
    let queue = driver.activate();
    let notices = start(&mut blk, ALL & !EVENT_IDX, &memory, vec![queue]);
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
    rig.disk.fail(&[Some(ErrorKind::StorageFull), Some(ErrorKind::StorageFull)]);
    let head = rig.offer(OUT, 3, &[(DATA, 512, false)]);
    rig.driver.kick();
    assert_eq!(
        report(&rig),
        DiskReport::Error {
            operation: "write",
            reason: ErrorKind::StorageFull.to_string(),
            no_space: true,
            action: ErrorAction::Stop,
        }
    );
    assert_eq!(rig.driver.get::<u8>(STATUS), UNSET, "the driver hears nothing");
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
            let data: &[Piece] = if kind == OUT { &[(DATA, 512, false)] } else { &[] };
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
    assert!(matches!(report(&rig), DiskReport::Error { operation: "read", .. }));
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
