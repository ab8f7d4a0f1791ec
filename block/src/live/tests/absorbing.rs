//! Images in the middle of a chain that take in what is below them while a guest works.

use std::fs;

use super::merging::killed;
use super::*;
use crate::live::absorb::Absorb;
use crate::live::stream::StreamError;

const NAMES: [&str; 4] = ["base", "a", "b", "top"];

fn absorb(guest: &Guest, taker: &Path) -> Result<Absorb, StreamError> {
    Absorb::of(&*guest.disk, &guest.path, taker, &AnyPath, &guest.options)
}

#[test]
fn an_image_in_the_middle_takes_in_what_is_below_whoever_is_killed() {
    for format in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, format, 61);
        let mut held = Vec::new();
        for name in &NAMES[1..] {
            guest.work(25);
            held = guest.snapshot(&bench.path(name));
        }
        let look = |guest: &mut Guest, when: &str| {
            guest.work(3);
            guest.flush();
            killed(&bench, &NAMES, &guest.model, when);
        };
        // One that is given up on the way leaves what it has taken in.
        for ends in [false, true] {
            let mut absorb = absorb(&guest, &bench.path("b")).unwrap();
            look(&mut guest, "opened");
            let cut = absorb.begin(&|| true).unwrap();
            guest.disk = cut.disk();
            cut.keep();
            let mut at = 0;
            while at < absorb.size() {
                at += absorb.step(at).unwrap().0;
                look(&mut guest, &format!("at {at}"));
            }
            if ends {
                absorb.name().unwrap();
                look(&mut guest, "named");
                assert!(absorb.finish(&|| false).is_err());
                look(&mut guest, "late");
                drop(absorb);
                break;
            }
            absorb.settle().unwrap();
            guest.holds_its_model();
        }
        // Its header names nothing, which is all that is left to be seen by the next start.
        let Guest {
            disk,
            path,
            options,
            model,
            random,
        } = guest;
        drop(disk);
        for name in ["base", "a"] {
            fs::remove_file(bench.path(name)).unwrap();
        }
        let disk = open_disk(&path, &AnyPath, &options).unwrap();
        guest = Guest {
            disk,
            path,
            options,
            model,
            random,
        };
        guest.work(10);
        guest.holds_its_model();
        drop(guest);
        for name in ["b", "top"] {
            assert_eq!(bench.qemu_check(name), 0, "{name}");
        }
        assert!(read_by_qemu(&bench, "b", Format::Qcow2) == held);
    }
}

#[test]
fn a_disk_goes_on_when_an_image_below_it_has_taken_in_the_rest_and_others_may_read_that() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Raw, 67);
    for name in &NAMES[1..] {
        guest.work(25);
        guest.snapshot(&bench.path(name));
    }
    for (taker, said) in [
        ("top", "does not lie below"),
        ("nothing", "does not lie below"),
        ("base", "nothing to take in"),
    ] {
        let refused = absorb(&guest, &bench.path(taker)).unwrap_err().to_string();
        assert!(refused.contains(said), "{taker}: {refused}");
    }
    let mut absorb = absorb(&guest, &bench.path("a")).unwrap();
    let mut reader = guest.options.clone();
    reader.disk.read_only = true;
    let opens = || open_disk(&bench.path("a"), &AnyPath, &reader).is_ok();
    assert!(!opens());
    let cut = absorb.begin(&|| true).unwrap();
    guest.disk = cut.disk();
    cut.keep();
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut at = 0;
            while at < absorb.size() {
                at += absorb.step(at).unwrap().0;
            }
        });
        while !copying.is_finished() {
            guest.work(5);
            guest.holds_its_model();
        }
    });
    absorb.name().unwrap();
    let cut = absorb.finish(&|| true).unwrap();
    guest.disk = cut.disk();
    cut.keep();
    absorb.settle().unwrap();
    assert!(opens());
    fs::remove_file(bench.path("base")).unwrap();
    guest.work(20);
    guest.holds_its_model();
    let Guest { disk, model, .. } = guest;
    drop(disk);
    for name in &NAMES[1..] {
        assert_eq!(bench.qemu_check(name), 0, "{name}");
    }
    assert!(read_by_qemu(&bench, "top", Format::Qcow2) == model);
}
