//! Disks whose files another machine has for a while.

use super::*;
use crate::live::away::{AwayError, Back};
use crate::raw::OpenError;

fn opened(guest: &Guest) -> Result<Arc<dyn Disk>, OpenError> {
    open_disk(&guest.path, &AnyPath, &guest.options)
}

fn is_in_use(opened: Result<Arc<dyn Disk>, OpenError>) -> bool {
    match opened.err() {
        Some(OpenError::InUse { .. }) => true,
        Some(OpenError::Part { source, .. }) => matches!(*source, OpenError::InUse { .. }),
        _ => false,
    }
}

/// Disks of each kind, the last with an image below.
fn guests(each: impl Fn(Guest, &Bench)) {
    for (format, over) in [
        (Format::Raw, false),
        (Format::Qcow2, false),
        (Format::Qcow2, true),
    ] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, format, 41);
        guest.work(20);
        if over {
            guest.snapshot(&bench.path("top"));
        }
        guest.work(20);
        each(guest, &bench);
    }
}

#[test]
fn another_machine_gets_a_disk_and_it_goes_on_here_where_that_does_nothing_with_it() {
    guests(|mut guest, bench| {
        assert!(is_in_use(opened(&guest)));
        let away = guest.disk.live().unwrap().let_go().unwrap();
        assert!(away.is_locked());
        let other = opened(&guest).unwrap();
        let error = away.take_back().unwrap_err();
        assert!(matches!(error, AwayError::Busy), "{error}");
        drop(other);
        assert_eq!(away.take_back().unwrap(), Back::Same);
        away.go_on();
        assert!(is_in_use(opened(&guest)));
        guest.work(20);
        guest.holds_its_model();
        let name = guest.path.file_name().unwrap().to_str().unwrap().to_owned();
        let format = guest.options.disk.format.unwrap();
        drop((away, guest.disk));
        assert!(read_by_qemu(bench, &name, format) == guest.model);
        if format == Format::Qcow2 {
            assert_eq!(bench.qemu_check(&name), 0);
        }
    });
}

#[test]
fn what_another_machine_has_written_is_found_and_all_of_it_was_there_for_it() {
    guests(|guest, bench| {
        let away = guest.disk.live().unwrap().let_go().unwrap();
        let Guest {
            disk: here,
            path,
            options,
            model,
            random,
        } = guest;
        let disk = open_disk(&path, &AnyPath, &options).unwrap();
        let mut there = Guest {
            disk,
            path,
            options,
            model,
            random,
        };
        there.holds_its_model();
        there.work(30);
        there.holds_its_model();
        let name = there.path.file_name().unwrap().to_str().unwrap().to_owned();
        let format = there.options.disk.format.unwrap();
        let (path, options) = (there.path.clone(), there.options.clone());
        drop(there.disk);
        assert_eq!(away.take_back().unwrap(), Back::Touched);
        // Nothing that was known here before is written over that.
        let other = open_disk(&path, &AnyPath, &options);
        assert!(is_in_use(other));
        away.give_up();
        drop(open_disk(&path, &AnyPath, &options).unwrap());
        assert_eq!(away.take_back().unwrap(), Back::Touched);
        drop((away, here));
        assert!(read_by_qemu(bench, &name, format) == there.model);
        if format == Format::Qcow2 {
            assert_eq!(bench.qemu_check(&name), 0);
        }
    });
}

#[test]
fn a_reader_below_keeps_a_disk_from_being_taken_back_in_part() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 43);
    guest.work(10);
    guest.snapshot(&bench.path("top"));
    guest.work(10);
    let away = guest.disk.live().unwrap().let_go().unwrap();
    let below = open_disk(&bench.path("base"), &AnyPath, &qcow2()).unwrap();
    let error = away.take_back().unwrap_err();
    assert!(matches!(error, AwayError::Busy), "{error}");
    drop(below);
    // The disk's own image was given up again, too.
    let other = opened(&guest).unwrap();
    away.take_back().unwrap_err();
    drop(other);
    assert_eq!(away.take_back().unwrap(), Back::Same);
    away.go_on();
    guest.work(10);
    guest.holds_its_model();
}

#[test]
fn a_disk_that_is_only_read_is_handed_over_and_stays_so() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 44);
    guest.work(10);
    let Guest {
        disk,
        path,
        mut options,
        model,
        random,
    } = guest;
    drop(disk);
    options.disk.read_only = true;
    let disk = open_disk(&path, &AnyPath, &options).unwrap();
    let away = disk.live().unwrap().let_go().unwrap();
    assert!(!away.is_locked());
    assert_eq!(away.take_back().unwrap(), Back::Same);
    away.go_on();
    let guest = Guest {
        disk,
        path,
        options,
        model,
        random,
    };
    guest.holds_its_model();
    assert!(guest.disk.info().read_only);
    let live = guest.disk.live().unwrap();
    assert!(live.let_go().is_ok());
}

#[test]
fn a_disk_that_somebody_has_had_is_known_by_it_though_nothing_was_written() {
    guests(|guest, _| {
        let away = guest.disk.live().unwrap().let_go().unwrap();
        let other = opened(&guest).unwrap();
        other.live().unwrap().mark().unwrap();
        drop(other);
        assert_eq!(away.take_back().unwrap(), Back::Touched);
    });
}
