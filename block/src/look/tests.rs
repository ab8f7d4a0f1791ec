use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::disk::Op;
use crate::ops::{NewImage, create};
use crate::qcow2::testing::Bench;
use crate::testing::{AnyPath, Arena, perform};
use crate::{BackingPolicy, CreateOptions, Disk, Preallocation, open_disk};

const SIZE: u64 = 8 << 20;

fn options(format: Format) -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(format),
            ..DiskOptions::default()
        },
        ..ImageOptions::default()
    }
}

fn read_only(format: Format) -> ImageOptions {
    let mut options = options(format);
    options.disk.read_only = true;
    options
}

/// A raw image, a qcow2 image, one with both below it, and one with a data file.
fn images(bench: &Bench) -> Vec<(PathBuf, ImageOptions)> {
    let raw = NewImage::Raw {
        size: SIZE,
        preallocation: Preallocation::Off,
    };
    create(&bench.path("raw"), &AnyPath, &raw).unwrap();
    let qcow2 = |name: &str, wanted: CreateOptions| {
        let image = NewImage::Qcow2(Box::new(CreateOptions {
            size: SIZE,
            ..wanted
        }));
        create(&bench.path(name), &AnyPath, &image).unwrap();
        (bench.path(name), options(Format::Qcow2))
    };
    let over = |below: &str, format: Format| CreateOptions {
        backing: Some((below.to_owned(), Some(format.name().to_owned()))),
        ..CreateOptions::default()
    };
    let lazy = CreateOptions {
        lazy_refcounts: true,
        ..CreateOptions::default()
    };
    let split = CreateOptions {
        data_file: Some("data".to_owned()),
        ..CreateOptions::default()
    };
    vec![
        (bench.path("raw"), options(Format::Raw)),
        qcow2("plain", lazy),
        qcow2("middle", over("raw", Format::Raw)),
        qcow2("top", over("middle", Format::Qcow2)),
        qcow2("split", split),
    ]
}

/// What an image is, to the byte, and when it was changed.
fn state(path: &Path) -> (Vec<u8>, i64, i64, i64) {
    let meta = fs::metadata(path).unwrap();
    let bytes = fs::read(path).unwrap();
    (bytes, meta.mtime(), meta.mtime_nsec(), meta.ctime_nsec())
}

fn look(path: &Path, options: &ImageOptions) -> Result<LookedAt, OpenError> {
    look_at_disk(path, &AnyPath, options)
}

fn write(disk: &Arc<dyn Disk>) {
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(4096);
    arena.put(0, &[7; 4096]);
    let buffers = arena.buffers(&[(0, 4096)]);
    perform(&mut *queue, Op::Write, 1 << 20, buffers).unwrap();
}

#[test]
fn a_look_tells_what_the_opened_disk_tells_and_changes_nothing() {
    let bench = Bench::new();
    for (path, options) in images(&bench) {
        for options in [&options, &read_only(options.disk.format.unwrap())] {
            let before = state(&path);
            let seen = look(&path, options).unwrap();
            assert!(state(&path) == before, "{}", path.display());
            let disk = open_disk(&path, &AnyPath, options).unwrap();
            assert_eq!(seen.info, disk.info(), "{}", path.display());
            assert_eq!(seen.info.size, SIZE);
        }
    }
}

#[test]
fn a_disk_that_is_written_is_seen_to_be_locked_and_is_neither_repaired_nor_kept() {
    let bench = Bench::new();
    for (path, options) in images(&bench) {
        let free = look(&path, &options).unwrap();
        assert_eq!(free.locks, SeenLocks::Free, "{}", path.display());
        let disk = open_disk(&path, &AnyPath, &options).unwrap();
        write(&disk);
        let before = state(&path);
        let seen = look(&path, &options).unwrap();
        assert!(state(&path) == before, "{}", path.display());
        assert_eq!(
            (seen.info, seen.locks),
            (disk.info(), SeenLocks::Held),
            "{}",
            path.display()
        );
        drop(disk);
        drop(open_disk(&path, &AnyPath, &options).unwrap());
    }
}

#[test]
fn an_image_that_was_left_dirty_stays_so() {
    let bench = Bench::new();
    let (path, options) = images(&bench).swap_remove(1);
    let is_dirty = || {
        let info = crate::ops::info(&path, &AnyPath, Format::Qcow2, false);
        info.unwrap().qcow2.unwrap().dirty
    };
    // The last byte of the incompatible features, and an autoclear feature that nobody knows.
    bench.poke("plain", 79, &[1]);
    bench.poke("plain", 88, &[0x80]);
    assert!(is_dirty());
    let before = state(&path);
    look(&path, &options).unwrap();
    assert!(state(&path) == before && is_dirty());
    drop(open_disk(&path, &AnyPath, &options).unwrap());
    assert!(!is_dirty());
}

#[test]
fn readers_and_half_of_a_disk_are_not_taken_for_a_writer() {
    let bench = Bench::new();
    let images = images(&bench);
    let (raw, of_raw) = &images[0];
    let reader = open_disk(raw, &AnyPath, &read_only(Format::Raw)).unwrap();
    assert_eq!(look(raw, of_raw).unwrap().locks, SeenLocks::Free);
    drop(reader);
    let (split, of_split) = &images[4];
    let data = open_disk(&bench.path("data"), &AnyPath, of_raw).unwrap();
    assert_eq!(look(split, of_split).unwrap().locks, SeenLocks::Free);
    drop(data);
    let file = File::options().read(true).write(true).open(raw).unwrap();
    lock::acquire(&file, Intent::Write).unwrap();
    assert_eq!(look(raw, of_raw).unwrap().locks, SeenLocks::Held);
    lock::keep_reading(&file);
    assert_eq!(look(raw, of_raw).unwrap().locks, SeenLocks::Free);
}

#[test]
fn what_takes_no_locks_tells_of_none() {
    let bench = Bench::new();
    for (path, options) in images(&bench) {
        let _disk = open_disk(&path, &AnyPath, &options).unwrap();
        let mut unlocked = options.clone();
        unlocked.disk.lock = false;
        for options in [unlocked, read_only(options.disk.format.unwrap())] {
            let seen = look(&path, &options).unwrap();
            assert_eq!(seen.locks, SeenLocks::None, "{}", path.display());
        }
    }
}

#[test]
fn locks_of_several_files_are_held_where_all_are() {
    use SeenLocks::{Free, Held, None};
    for (one, other, both) in [
        (None, None, None),
        (None, Held, Held),
        (None, Free, Free),
        (Held, Held, Held),
        (Held, Free, Free),
        (Free, Free, Free),
    ] {
        assert_eq!((one.and(other), other.and(one)), (both, both));
    }
}

#[test]
fn what_cannot_be_had_is_told_as_where_it_is_opened() {
    let bench = Bench::new();
    let images = images(&bench);
    let same = |path: &Path, options: &ImageOptions| {
        let opened = open_disk(path, &AnyPath, options).err().unwrap();
        let seen = look(path, options).err().unwrap();
        assert_eq!(with_causes(&seen), with_causes(&opened));
        with_causes(&seen)
    };
    let gone = same(&bench.path("gone"), &options(Format::Qcow2));
    assert!(gone.contains("no such file"), "{gone}");
    let other = same(&images[0].0, &options(Format::Qcow2));
    assert!(other.contains("no usable qcow2 image"), "{other}");
    let (top, of_top) = &images[3];
    let mut denied = of_top.clone();
    denied.backing = BackingPolicy::Deny;
    let denied = same(top, &denied);
    assert!(denied.contains("not allowed"), "{denied}");
    fs::write(
        bench.path("raw"),
        [b"QFI\xfb".as_slice(), &[0; 1020]].concat(),
    )
    .unwrap();
    let unstated = same(&images[0].0, &ImageOptions::default());
    assert!(unstated.contains("looks like"), "{unstated}");
    fs::remove_file(bench.path("raw")).unwrap();
    let below = same(top, of_top);
    assert!(below.contains("its backing file"), "{below}");
}

/// An error with its causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
