//! Overlays of disks in use, against a plain model.
//!
//! `LIVE_SEEDS` says how many sequences are run.

use std::collections::BTreeSet;
use std::fs;

use super::*;
use crate::buffers::Buffers;
use crate::disk::Op;
use crate::open_disk;
use crate::options::{Discard, DiskOptions};
use crate::qcow2::image::Settings;
use crate::qcow2::snapshot::NewSnapshot;
use crate::qcow2::testing::Bench;
use crate::qcow2::tests::crash::blank;
use crate::testing::{AnyPath, Arena, Call, Scripted, perform};

const SIZE: usize = 2 << 20;
const GRAIN: usize = 4096;

/// A disk as its guest sees it, and what it should hold.
struct Guest {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    options: ImageOptions,
    model: Vec<u8>,
    random: u64,
}

fn qcow2() -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            format: Some(Format::Qcow2),
            discard: Discard::Unmap,
            ..DiskOptions::default()
        },
        ..ImageOptions::default()
    }
}

fn opener() -> Arc<dyn Opener> {
    Arc::new(AnyPath)
}

impl Guest {
    /// On a new image of this format.
    fn on(bench: &Bench, format: Format, seed: u64) -> Self {
        bench.line(&format!(
            "qemu-img create -q -f {} base {SIZE}",
            format.name()
        ));
        let mut options = qcow2();
        options.disk.format = Some(format);
        Self {
            disk: open_disk(&bench.path("base"), &AnyPath, &options).unwrap(),
            path: bench.path("base"),
            options,
            model: vec![0; SIZE],
            random: seed,
        }
    }

    fn next(&mut self, below: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(self.random >> 33).unwrap() % below
    }

    /// Does so many requests through a queue.
    fn work(&mut self, requests: usize) {
        let mut queue = self.disk.queue(4).unwrap();
        let arena = Arena::new(64 << 10);
        for _ in 0..requests {
            let at = self.next(SIZE / 512) * 512;
            let len = ((self.next(128) + 1) * 512).min(SIZE - at);
            let byte = u8::try_from(self.next(255) + 1).unwrap();
            let (op, value) = match self.next(8) {
                0 => (Op::Flush, None),
                1 => (
                    Op::WriteZeroes {
                        len: len as u64,
                        may_unmap: true,
                    },
                    Some(0),
                ),
                _ => (Op::Write, Some(byte)),
            };
            let (at, buffers) = match op {
                Op::Write => {
                    arena.put(0, &vec![byte; len]);
                    (at, arena.buffers(&[(0, len)]))
                }
                Op::Flush => (0, Buffers::none()),
                _ => (at, Buffers::none()),
            };
            perform(&mut *queue, op, at as u64, buffers).unwrap();
            if let Some(value) = value {
                self.model[at..at + len].fill(value);
            }
        }
    }

    fn holds_its_model(&self) {
        let mut queue = self.disk.queue(1).unwrap();
        let arena = Arena::new(GRAIN);
        for at in (0..SIZE).step_by(GRAIN) {
            let buffers = arena.buffers(&[(0, GRAIN)]);
            perform(&mut *queue, Op::Read, at as u64, buffers).unwrap();
            assert!(arena.get(0, GRAIN) == self.model[at..at + GRAIN], "{at:#x}");
        }
    }

    fn overlay(&self, path: &Path) -> Result<Overlay, OverlayError> {
        Overlay::create(&*self.disk, &self.path, path, opener(), &self.options)
    }

    /// Gets an overlay, with work between its making and the switch, and after that. What it then held.
    fn snapshot(&mut self, path: &Path) -> Vec<u8> {
        let overlay = self.overlay(path).unwrap();
        self.work(3);
        let attached = overlay.attach(&*self.disk).unwrap();
        self.disk = attached.disk();
        self.options = attached.options().clone();
        path.clone_into(&mut self.path);
        let (covered, held) = (attached.keep(), self.model.clone());
        // What is below is written out while the disk is worked on.
        self.work(3);
        covered.settle().unwrap();
        held
    }
}

/// How many sequences are run.
fn seeds() -> u64 {
    std::env::var("LIVE_SEEDS").map_or(1, |count| count.parse().unwrap())
}

/// What qemu-img reads from an image.
fn read_by_qemu(bench: &Bench, name: &str, format: Format) -> Vec<u8> {
    bench.line(&format!(
        "qemu-img convert -U -f {} -O raw {name} out",
        format.name()
    ));
    fs::read(bench.path("out")).unwrap()
}

#[test]
fn layers_hold_what_the_guest_had_written_when_they_were_covered() {
    for format in [Format::Raw, Format::Qcow2] {
        for seed in 0..seeds() {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = Guest::on(&bench, format, seed);
            let mut covered = vec![("base".to_owned(), format, Vec::new())];
            guest.work(40);
            for round in 0..4 {
                let name = format!("layer{round}");
                let held = guest.snapshot(&bench.path(&name));
                if let Some((_, _, model)) = covered.last_mut() {
                    *model = held;
                }
                covered.push((name, Format::Qcow2, Vec::new()));
                guest.work(25);
                guest.holds_its_model();
            }
            let Guest { disk, model, .. } = guest;
            drop(disk);
            if let Some((_, _, last)) = covered.last_mut() {
                *last = model;
            }
            for (name, format, model) in covered {
                let found = read_by_qemu(&bench, &name, format);
                assert!(found == model, "{name} of {seed} on {format:?}");
                if format == Format::Qcow2 {
                    assert_eq!(bench.qemu_check(&name), 0, "{name}");
                }
            }
        }
    }
}

/// Nobody else may write at any time, and read once the overlay stays.
fn is_locked_throughout(format: Format) {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let guest = Guest::on(&bench, format, 1);
    let may = |read_only: bool| {
        let mut options = guest.options.clone();
        options.disk.read_only = read_only;
        open_disk(&bench.path("base"), &AnyPath, &options).is_ok()
    };
    let overlay = guest.overlay(&bench.path("over")).unwrap();
    let attached = overlay.attach(&*guest.disk).unwrap();
    let disk = attached.disk();
    let covered = attached.keep();
    assert!(!may(true));
    covered.settle().unwrap();
    assert!(may(true) && !may(false));
    assert_eq!(disk.info().size, SIZE as u64);
}

#[test]
fn a_raw_image_is_never_anothers_to_write() {
    is_locked_throughout(Format::Raw);
}

#[test]
fn a_qcow2_image_is_never_anothers_to_write() {
    is_locked_throughout(Format::Qcow2);
}

#[test]
fn an_overlay_that_is_not_kept_leaves_the_disk_as_it_was() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for format in [Format::Raw, Format::Qcow2] {
        let mut guest = Guest::on(&bench, format, 5);
        guest.work(20);
        let overlay = guest.overlay(&bench.path("over")).unwrap();
        let attached = overlay.attach(&*guest.disk).unwrap();
        let disk = attached.disk();
        assert_eq!(disk.info().size, SIZE as u64);
        drop(disk);
        drop(attached);
        assert!(!bench.path("over").exists());
        guest.work(20);
        guest.holds_its_model();
        drop(guest.overlay(&bench.path("over")).unwrap());
        let names: BTreeSet<_> = fs::read_dir(bench.path(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, BTreeSet::from(["base".into()]));
        drop(guest);
        fs::remove_file(bench.path("base")).unwrap();
    }
}

#[test]
fn what_cannot_have_an_overlay_is_refused_and_nothing_is_left() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 9);
    fs::create_dir(bench.path("other")).unwrap();
    fs::write(bench.path("there"), b"precious").unwrap();
    let refused = |path: &str| guest.overlay(&bench.path(path)).unwrap_err();
    assert!(matches!(refused("there"), OverlayError::Exists { .. }));
    assert!(matches!(refused("base"), OverlayError::Exists { .. }));
    assert!(matches!(
        refused("other/over"),
        OverlayError::Elsewhere { .. }
    ));
    assert_eq!(fs::read(bench.path("there")).unwrap(), b"precious");
    let overlay = guest.overlay(&bench.path("over")).unwrap();
    guest.disk.resize(2 * SIZE as u64).unwrap();
    let error = overlay.attach(&*guest.disk).unwrap_err();
    assert!(matches!(error, OverlayError::Resized { .. }), "{error}");
    assert!(!bench.path("over").exists());
    // Where any file may be referred to, it may be anywhere.
    guest.options.backing = BackingPolicy::Any;
    let overlay = guest.overlay(&bench.path("other/over")).unwrap();
    let told = bench.line("qemu-img info -U other/over");
    assert!(
        told.contains(bench.path("base").to_str().unwrap()),
        "{told}"
    );
    drop(overlay);
    guest.options.disk.read_only = true;
    drop(guest.disk);
    guest.disk = open_disk(&guest.path, &AnyPath, &guest.options).unwrap();
    let error = guest.overlay(&bench.path("over")).unwrap_err();
    assert!(matches!(error, OverlayError::ReadOnly), "{error}");
}

#[test]
fn a_flush_after_the_switch_makes_durable_what_was_written_before_it() {
    let Some(image) = blank("cluster_size=64k", SIZE as u64) else {
        return;
    };
    let bench = Bench::new();
    let fail = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let failing = Arc::clone(&fail);
    let script = Box::new(move |call| {
        let sync = call == Call::Sync && failing.load(std::sync::atomic::Ordering::SeqCst);
        sync.then_some(libc::EIO)
    });
    let storage = Scripted::new(image, 1, script);
    let settings = Settings {
        read_only: false,
        sync: true,
        punch: false,
        cache: 1 << 20,
    };
    let header = Header::load(&*storage).unwrap();
    let scripted = Arc::clone(&storage) as Arc<dyn Storage>;
    let image = Qcow2::open(header, scripted, None, None, settings).unwrap();
    let disk = Qcow2Disk::new(Arc::new(image), &qcow2().disk).unwrap();
    let path = bench.path("over");
    let overlay = Overlay::create(&disk, &bench.path("base"), &path, opener(), &qcow2()).unwrap();
    disk.image().write(0, &[7; 512]).unwrap();
    fail.store(true, std::sync::atomic::Ordering::SeqCst);
    // The switch itself touches no storage.
    let calls = storage.calls().len();
    let attached = overlay.attach(&disk).unwrap();
    let (over, covered) = (attached.disk(), attached.keep());
    let mut queue = over.queue(1).unwrap();
    assert_eq!(storage.calls().len(), calls);
    let mut flush = || perform(&mut *queue, Op::Flush, 0, Buffers::none());
    assert!(flush().is_err());
    let error = covered.settle().unwrap_err();
    assert!(matches!(error, OverlayError::Flush(_)), "{error}");
    assert!(flush().is_err() && path.exists());
    fail.store(false, std::sync::atomic::Ordering::SeqCst);
    flush().unwrap();
    assert!(!disk.image().is_dirty());
    // That has been paid once for all.
    let syncs = storage.calls().len();
    flush().unwrap();
    assert_eq!(storage.calls().len(), syncs);
}

#[test]
fn an_overlay_goes_on_the_image_that_it_was_made_for_alone() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 9);
    let overlay = guest.overlay(&bench.path("late")).unwrap();
    guest.snapshot(&bench.path("first"));
    let error = overlay.attach(&*guest.disk).unwrap_err();
    assert!(matches!(error, OverlayError::Replaced), "{error}");
    assert!(!bench.path("late").exists());
}

/// A chain of a base and two overlays, and the guest on top of it.
fn chained(bench: &Bench, format: Format, seed: u64) -> Guest {
    let mut guest = Guest::on(bench, format, seed);
    for name in ["middle", "top"] {
        guest.work(30);
        guest.snapshot(&bench.path(name));
    }
    guest.work(10);
    guest
}

/// Takes all of what is to be taken, while another queue works.
fn stream(guest: &mut Guest, bench: &Bench, base: Option<&str>) -> Stream {
    let base = base.map(|name| bench.path(name));
    let stream = Stream::of(
        &*guest.disk,
        &guest.path,
        base.as_deref(),
        &AnyPath,
        &guest.options,
    );
    let stream = stream.unwrap();
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut at = 0;
            while at < stream.size() {
                at += stream.step(at).unwrap().0;
            }
        });
        while !copying.is_finished() {
            guest.work(5);
        }
    });
    guest.work(5);
    stream
}

#[test]
fn a_stream_keeps_what_the_guest_writes_meanwhile_and_frees_the_images_below() {
    for (format, base) in [
        (Format::Raw, None),
        (Format::Qcow2, None),
        (Format::Raw, Some("base")),
        (Format::Qcow2, Some("base")),
    ] {
        for seed in 0..seeds() {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = chained(&bench, format, seed);
            let stream = stream(&mut guest, &bench, base);
            stream.name().unwrap();
            guest.work(5);
            let cut = stream.finish(&guest.options, &|| true).unwrap();
            guest.disk = cut.disk();
            cut.keep();
            // What is needed no more may be anybody's, and gone.
            fs::remove_file(bench.path("middle")).unwrap();
            if base.is_none() {
                fs::remove_file(bench.path("base")).unwrap();
            }
            guest.work(10);
            guest.holds_its_model();
            let Guest { disk, model, .. } = guest;
            drop(disk);
            assert_eq!(bench.qemu_check("top"), 0);
            let found = read_by_qemu(&bench, "top", Format::Qcow2);
            assert!(found == model, "{base:?} of {seed} on {format:?}");
            let told = bench.line("qemu-img info top");
            assert_eq!(told.contains("backing file"), base.is_some(), "{told}");
        }
    }
}

#[test]
fn a_stream_that_is_given_up_leaves_the_disk_on_its_chain_and_can_begin_again() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = chained(&bench, Format::Qcow2, 3);
    drop(stream(&mut guest, &bench, None));
    guest.holds_its_model();
    let before = stream(&mut guest, &bench, None);
    // The chain has been cut, but the disk before goes on.
    before.name().unwrap();
    drop(before.finish(&guest.options, &|| true).unwrap());
    guest.work(20);
    guest.holds_its_model();
    // Nobody waits any more for what is written out.
    let late = Stream::of(&*guest.disk, &guest.path, None, &AnyPath, &guest.options);
    assert!(late.unwrap().finish(&guest.options, &|| false).is_err());
    guest.work(20);
    guest.holds_its_model();
    let options = guest.options.clone();
    let Guest { disk, model, .. } = guest;
    drop(disk);
    assert_eq!(bench.qemu_check("top"), 0);
    assert!(read_by_qemu(&bench, "top", Format::Qcow2) == model);
    let disk = open_disk(&bench.path("middle"), &AnyPath, &options).unwrap();
    let refused = |disk: &dyn Disk, path: &str, base: Option<&str>| {
        let base = base.map(|name| bench.path(name));
        Stream::of(disk, &bench.path(path), base.as_deref(), &AnyPath, &options).unwrap_err()
    };
    for base in ["base", "middle", "nothing"] {
        let error = refused(&*disk, "middle", Some(base));
        assert!(matches!(error, StreamError::NotBelow(_)), "{error}");
    }
    drop(disk);
    let disk = open_disk(&bench.path("base"), &AnyPath, &options).unwrap();
    assert!(matches!(
        refused(&*disk, "base", None),
        StreamError::NoBacking
    ));
}

#[test]
fn an_image_whose_snapshots_lean_on_what_is_below_is_not_cut_off_from_it() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let guest = chained(&bench, Format::Qcow2, 4);
    let Guest { disk, options, .. } = guest;
    drop(disk);
    let path = bench.path("top");
    bench.line("qemu-img snapshot -c one top");
    let of = |disk: &dyn Disk| Stream::of(disk, &path, None, &AnyPath, &options);
    let disk = open_disk(&path, &AnyPath, &options).unwrap();
    let error = of(&*disk).unwrap_err();
    assert!(matches!(error, StreamError::Snapshots(1)), "{error}");
    drop(disk);
    bench.line("qemu-img snapshot -d one top");
    let disk = open_disk(&path, &AnyPath, &options).unwrap();
    let stream = of(&*disk).unwrap();
    // One that is made after the look.
    let new = NewSnapshot {
        name: "two",
        id: None,
        seconds: 0,
        nanoseconds: 0,
    };
    let Some(Live(Top::Qcow2(image))) = disk.live() else {
        unreachable!("it is a qcow2 image");
    };
    image.create_snapshot(new).unwrap();
    drop(image);
    let error = stream.name().unwrap_err();
    assert!(matches!(error, StreamError::Snapshots(1)), "{error}");
    drop(stream);
    drop(disk);
    assert!(bench.line("qemu-img info top").contains("backing file"));
}

mod absorbing;
mod backing_up;
mod deleting;
mod faults;
mod handing_over;
mod kills;
mod merging;
mod mirroring;
mod moving;
mod random;
mod reverting;
