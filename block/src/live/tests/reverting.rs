//! Going back to what images below hold.

use super::*;
use crate::live::revert::{Revert, RevertError, revert};

/// A guest on a chain of two overlays, and what each image below its own holds.
fn covered(bench: &Bench, format: Format) -> (Guest, [Vec<u8>; 2]) {
    let mut guest = Guest::on(bench, format, 21);
    let held = ["middle", "top"].map(|name| {
        guest.work(20);
        guest.snapshot(&bench.path(name))
    });
    guest.work(20);
    (guest, held)
}

#[test]
fn a_disk_goes_back_to_any_image_of_its_chain_in_use_or_not() {
    for format in [Format::Raw, Format::Qcow2] {
        for (layer, which) in [(None, 1), (Some("middle"), 1), (Some("base"), 0)] {
            for in_use in [true, false] {
                let Some(bench) = Bench::with_qemu() else {
                    return;
                };
                let (mut guest, held) = covered(&bench, format);
                let layer = layer.map(|name| bench.path(name));
                if in_use {
                    let found = Revert::of(
                        &*guest.disk,
                        &guest.path,
                        layer.as_deref(),
                        &AnyPath,
                        &guest.options,
                    );
                    let (cut, emptied) = found.unwrap().finish(&guest.options, &|| true).unwrap();
                    guest.disk = cut.disk();
                    cut.keep();
                    guest.model.clone_from(&held[which]);
                    guest.holds_its_model();
                    emptied.free();
                } else {
                    let Guest {
                        disk,
                        path,
                        options,
                        model,
                        random,
                    } = guest;
                    let used = revert(&path, layer.as_deref(), &AnyPath, &options).unwrap_err();
                    assert!(
                        matches!(used, RevertError::Open(OpenError::InUse { .. })),
                        "{used}"
                    );
                    drop((disk, model));
                    revert(&path, layer.as_deref(), &AnyPath, &options).unwrap();
                    assert_eq!(bench.qemu_check("top"), 0);
                    let disk = open_disk(&path, &AnyPath, &options).unwrap();
                    let model = held[which].clone();
                    guest = Guest {
                        disk,
                        path,
                        options,
                        model,
                        random,
                    };
                }
                guest.work(10);
                guest.holds_its_model();
                let Guest { disk, model, .. } = guest;
                drop(disk);
                assert_eq!(bench.qemu_check("top"), 0);
                assert!(read_by_qemu(&bench, "top", Format::Qcow2) == model);
                // What is below is as it was.
                assert!(read_by_qemu(&bench, "middle", Format::Qcow2) == held[1]);
                assert!(read_by_qemu(&bench, "base", format) == held[0]);
            }
        }
    }
}

#[test]
fn what_cannot_go_back_is_refused_and_stays() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let (mut guest, _) = covered(&bench, Format::Qcow2);
    let of = |guest: &Guest, layer: Option<&str>| {
        let layer = layer.map(|name| bench.path(name));
        let (disk, path) = (&*guest.disk, &guest.path);
        Revert::of(disk, path, layer.as_deref(), &AnyPath, &guest.options)
    };
    for layer in ["top", "nothing"] {
        let error = of(&guest, Some(layer)).unwrap_err();
        assert!(matches!(error, RevertError::NotBelow(_)), "{error}");
    }
    let late = of(&guest, None).unwrap();
    assert!(late.finish(&guest.options, &|| false).is_err());
    guest.work(10);
    guest.holds_its_model();
    let Guest { disk, options, .. } = guest;
    drop(disk);
    let lowest = revert(&bench.path("base"), None, &AnyPath, &options).unwrap_err();
    assert!(matches!(lowest, RevertError::NoBacking), "{lowest}");
    bench.line("qemu-img snapshot -c one top");
    let path = bench.path("top");
    let leaning = revert(&path, Some(&bench.path("base")), &AnyPath, &options).unwrap_err();
    assert!(matches!(leaning, RevertError::Snapshots(1)), "{leaning}");
    // Going back to what they lean on as well leaves them.
    revert(&path, None, &AnyPath, &options).unwrap();
    assert_eq!(bench.qemu_check("top"), 0);
}

#[test]
fn after_a_job_whose_end_has_failed_the_image_that_is_opened_is_not_taken_for_the_one_that_is_named()
 {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 23);
    for name in ["a", "b", "c", "top"] {
        guest.work(20);
        guest.snapshot(&bench.path(name));
    }
    // The header names another image, and the disk goes on with all that were there.
    let taken = stream(&mut guest, &bench, Some("b"));
    taken.name().unwrap();
    drop(taken);
    let other = |error: &OpenError| {
        let told = std::error::Error::source(error).unwrap().to_string();
        assert!(told.contains("another image opened at its place"), "{told}");
    };
    for layer in [None, Some("b"), Some("a"), Some("base")] {
        let layer = layer.map(|name| bench.path(name));
        let (disk, path) = (&*guest.disk, &guest.path);
        match Revert::of(disk, path, layer.as_deref(), &AnyPath, &guest.options) {
            Err(RevertError::Open(error)) => other(&error),
            made => panic!("{layer:?}: {made:?}"),
        }
    }
    let a = bench.path("a");
    match Stream::of(
        &*guest.disk,
        &guest.path,
        Some(&a),
        &AnyPath,
        &guest.options,
    ) {
        Err(StreamError::Open(error)) => other(&error),
        made => panic!("{made:?}"),
    }
    guest.work(10);
    guest.holds_its_model();
    // All is well once it is opened anew.
    let Guest {
        disk,
        path,
        options,
        ..
    } = guest;
    drop(disk);
    let disk = open_disk(&path, &AnyPath, &options).unwrap();
    Revert::of(&*disk, &path, None, &AnyPath, &options).unwrap();
    Stream::of(&*disk, &path, Some(&a), &AnyPath, &options).unwrap();
}
