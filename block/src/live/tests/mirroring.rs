//! Copying disks whose guests are at work.

use std::fs;

use super::*;
use crate::live::mirror::{Mirror, MirrorError, MirrorTarget};

impl Guest {
    fn mirror(&self, path: &Path, format: Format, existing: bool) -> Result<Mirror, MirrorError> {
        let target = MirrorTarget {
            path: path.to_owned(),
            format,
            existing,
        };
        Mirror::of(Arc::clone(&self.disk), target, opener(), &self.options)
    }
}

/// Copies all while the guest works, and what that has changed.
pub(super) fn copy(guest: &mut Guest, mirror: &Mirror) {
    guest.disk = mirror.begin();
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut at = 0;
            while at < mirror.size() {
                at += mirror.step(at).unwrap().0;
            }
        });
        while !copying.is_finished() {
            guest.work(5);
        }
    });
    let mut at = 0;
    while let Some((_, end)) = mirror.catch_up(at).unwrap() {
        at = end;
    }
    guest.work(5);
    mirror.flush().unwrap();
}

#[test]
fn a_copy_holds_what_its_disk_held_at_the_end_and_the_disk_can_go_on_there() {
    for from in [Format::Raw, Format::Qcow2] {
        for to in [Format::Raw, Format::Qcow2] {
            for switch in [false, true] {
                let Some(bench) = Bench::with_qemu() else {
                    return;
                };
                let mut guest = Guest::on(&bench, from, 31);
                if from == Format::Qcow2 {
                    guest.work(20);
                    guest.snapshot(&bench.path("top"));
                }
                guest.work(20);
                let path = bench.path("copy");
                let mut mirror = guest.mirror(&path, to, false).unwrap();
                copy(&mut guest, &mirror);
                let there = mirror.finish(&|| true).unwrap();
                let held = guest.model.clone();
                guest.disk = if switch {
                    there
                } else {
                    drop(there);
                    mirror.given_up()
                };
                drop(mirror);
                guest.work(20);
                guest.holds_its_model();
                let Guest {
                    disk,
                    model,
                    path: own,
                    ..
                } = guest;
                drop(disk);
                let there = if switch { &model } else { &held };
                assert!(
                    read_by_qemu(&bench, "copy", to) == *there,
                    "{from:?} {to:?}"
                );
                let here = if switch { &held } else { &model };
                let own = own.file_name().unwrap().to_str().unwrap().to_owned();
                assert!(read_by_qemu(&bench, &own, from) == *here, "{from:?} {to:?}");
                for (name, format) in [("copy", to), (&own, from)] {
                    if format == Format::Qcow2 {
                        assert_eq!(bench.qemu_check(name), 0, "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_target_that_was_there_is_overwritten_where_it_may_be_and_nothing_else_is_left_behind() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 33);
    guest.work(30);
    let path = bench.path("copy");
    fs::write(&path, vec![9; SIZE]).unwrap();
    let refused = guest.mirror(&path, Format::Raw, false).unwrap_err();
    assert!(matches!(refused, MirrorError::Exists(_)), "{refused}");
    assert!(fs::read(&path).unwrap() == vec![9; SIZE]);
    let mut mirror = guest.mirror(&path, Format::Raw, true).unwrap();
    // Nobody else gets it meanwhile.
    let used = guest.mirror(&path, Format::Raw, true).unwrap_err();
    assert!(
        matches!(used, MirrorError::Open(OpenError::InUse { .. })),
        "{used}"
    );
    copy(&mut guest, &mirror);
    drop(mirror.finish(&|| true).unwrap());
    guest.disk = mirror.given_up();
    drop(mirror);
    assert!(fs::read(&path).unwrap() == guest.model);
    // The disk itself is in use, and others have to be as large.
    let own = guest
        .mirror(&bench.path("base"), Format::Qcow2, true)
        .unwrap_err();
    assert!(
        matches!(own, MirrorError::Open(OpenError::InUse { .. })),
        "{own}"
    );
    fs::write(&path, vec![9; SIZE / 2]).unwrap();
    let small = guest.mirror(&path, Format::Raw, true).unwrap_err();
    assert!(
        matches!(small, MirrorError::Unlike(Unlike::Size { .. })),
        "{small}"
    );
    // What was made goes with a copy that is not completed.
    let new = bench.path("new");
    let mut mirror = guest.mirror(&new, Format::Qcow2, false).unwrap();
    copy(&mut guest, &mirror);
    assert!(mirror.finish(&|| false).is_err() && new.exists());
    guest.disk = mirror.given_up();
    drop(mirror);
    assert!(!new.exists());
    guest.work(10);
    guest.holds_its_model();
}

#[test]
fn a_copy_that_is_given_up_late_leaves_what_has_its_name_by_then() {
    let bench = Bench::new();
    let guest = Guest::on(&bench, Format::Raw, 3);
    let path = bench.path("new");
    let first = guest.mirror(&path, Format::Raw, false).unwrap();
    // Somebody takes it for left behind, and makes another one.
    fs::rename(&path, bench.path("moved")).unwrap();
    let mut second = guest.mirror(&path, Format::Raw, false).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second.finish(&|| true).unwrap());
    drop(second);
    assert!(path.exists());
}
