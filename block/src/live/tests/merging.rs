//! Merging images down whose guest is at work.

use std::fs;

use super::*;
use crate::live::changes::{Changes, Tracked};
use crate::live::copy::Copier;
use crate::live::merge::{Merge, MergeError, Merged};
use crate::live::revert::{Revert, RevertError};
use crate::live::stream::{Stream, StreamError};

impl Guest {
    pub(super) fn merge(&self, top: Option<&str>, base: Option<&str>) -> Result<Merge, MergeError> {
        let directory = self.path.parent().unwrap();
        let [top, base] = [top, base].map(|name| name.map(|name| directory.join(name)));
        let which = (top.as_deref(), base.as_deref());
        Merge::of(&*self.disk, &self.path, which, opener(), &self.options)
    }

    /// Puts the disk on the chain that can be merged.
    pub(super) fn begin(&mut self, merge: &mut Merge) {
        let cut = merge.begin(&|| true).unwrap();
        self.disk = cut.disk();
        cut.keep();
    }

    /// Lets go of what has been merged.
    pub(super) fn finish(&mut self, mut merge: Merge) {
        match merge.finish(&|| true).unwrap() {
            Merged::Shorter(cut) => {
                self.disk = cut.disk();
                cut.keep();
            }
            Merged::Base(disk, emptied) => {
                let (path, format) = merge.moves_to().unwrap();
                path.clone_into(&mut self.path);
                self.options.disk.format = Some(format);
                self.disk = disk;
                self.work(3);
                emptied.free();
                drop(merge);
                return;
            }
        }
        self.work(3);
        merge.settle().unwrap();
    }

    pub(super) fn flush(&self) {
        let mut queue = self.disk.queue(1).unwrap();
        perform(&mut *queue, Op::Flush, 0, Buffers::none()).unwrap();
    }
}

/// Copies all, while another queue works, and what that has changed.
pub(super) fn copy(guest: &mut Guest, merge: &Merge) {
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut at = 0;
            while at < merge.size() {
                at += merge.step(at).unwrap().0;
            }
        });
        while !copying.is_finished() {
            guest.work(5);
        }
    });
    let mut at = 0;
    while let Some((_, end)) = merge.catch_up(at).unwrap() {
        at = end;
    }
    guest.work(5);
}

/// The guest on a chain of these images above the base, the last one being its own.
pub(super) fn on_chain(bench: &Bench, format: Format, seed: u64, names: &[&str]) -> Guest {
    let mut guest = Guest::on(bench, format, seed);
    for name in names {
        guest.work(30);
        guest.snapshot(&bench.path(name));
    }
    guest.work(20);
    guest
}

#[test]
fn a_disks_own_image_is_merged_down_while_its_guest_writes() {
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
            let mut guest = on_chain(&bench, format, seed, &["middle", "top"]);
            let mut merge = guest.merge(None, base).unwrap();
            guest.begin(&mut merge);
            guest.holds_its_model();
            copy(&mut guest, &merge);
            guest.holds_its_model();
            merge.name().unwrap();
            guest.finish(merge);
            guest.work(20);
            guest.holds_its_model();
            let Guest { disk, model, .. } = guest;
            drop(disk);
            let (name, of) = match base {
                None => ("middle", Format::Qcow2),
                Some(_) => ("base", format),
            };
            assert!(read_by_qemu(&bench, name, of) == model, "{base:?} {seed}");
            // Who still opens the image that was merged sees the same.
            assert!(read_by_qemu(&bench, "top", Format::Qcow2) == model);
            for (name, of) in [(name, of), ("top", Format::Qcow2)] {
                if of == Format::Qcow2 {
                    assert_eq!(bench.qemu_check(name), 0, "{name}");
                }
            }
        }
    }
}

#[test]
fn images_in_between_are_merged_down_and_the_one_above_names_the_base() {
    for (format, top, base) in [
        (Format::Qcow2, "c", "b"),
        (Format::Raw, "c", "base"),
        (Format::Qcow2, "b", "a"),
        (Format::Raw, "a", "base"),
    ] {
        for seed in 0..seeds() {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = on_chain(&bench, format, seed, &["a", "b", "c", "d"]);
            let mut merge = guest.merge(Some(top), Some(base)).unwrap();
            let needless: Vec<_> = merge.merged().to_vec();
            guest.begin(&mut merge);
            copy(&mut guest, &merge);
            merge.name().unwrap();
            guest.work(5);
            guest.finish(merge);
            for path in needless {
                fs::remove_file(path).unwrap();
            }
            // What is only read again is open to others.
            let mut options = guest.options.clone();
            options.disk.read_only = true;
            options.disk.format = (base == "base").then_some(format).or(Some(Format::Qcow2));
            drop(open_disk(&bench.path(base), &AnyPath, &options).unwrap());
            guest.work(10);
            guest.holds_its_model();
            let Guest { disk, model, .. } = guest;
            drop(disk);
            assert!(
                read_by_qemu(&bench, "d", Format::Qcow2) == model,
                "{top} {seed}"
            );
            for name in ["a", "b", "c", "d"] {
                if bench.path(name).exists() {
                    assert_eq!(bench.qemu_check(name), 0, "{name} {top}");
                }
            }
        }
    }
}

/// What an image holds, as the host has its files.
fn held(bench: &Bench, name: &str, format: Format) -> Vec<u8> {
    let after = Bench::new();
    for file in fs::read_dir(bench.path("")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), after.path(file.file_name().to_str().unwrap())).unwrap();
    }
    read_by_qemu(&after, name, format)
}

/// What a killed monitor leaves: the files as the host has them.
pub(super) fn killed(bench: &Bench, names: &[&str], model: &[u8], when: &str) {
    let after = Bench::new();
    for name in names {
        fs::copy(bench.path(name), after.path(name)).unwrap();
    }
    let top = names.last().unwrap();
    let found = read_by_qemu(&after, top, Format::Qcow2);
    assert!(found == model, "{when}");
    // Nothing but space that nobody uses.
    for name in names {
        if *name != "base" {
            assert!(matches!(after.qemu_check(name), 0 | 3), "{name} {when}");
        }
    }
}

#[test]
fn whenever_the_monitor_is_killed_the_chain_holds_what_the_guest_had_flushed() {
    for format in [Format::Raw, Format::Qcow2] {
        for top in [None, Some("middle")] {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let names = ["base", "middle", "top"];
            let mut guest = on_chain(&bench, format, 7, &names[1..]);
            let instants = std::cell::RefCell::new(vec![held(&bench, "base", format)]);
            let look = |guest: &mut Guest, when: &str| {
                guest.work(3);
                guest.flush();
                killed(&bench, &names, &guest.model, when);
                // By itself the base holds what it held, or what the merged ones show, or it is refused.
                if format == Format::Qcow2 && opens(&bench, "base").is_ok() {
                    instants.borrow_mut().push(guest.model.clone());
                    instants
                        .borrow_mut()
                        .push(held(&bench, "middle", Format::Qcow2));
                    let found = held(&bench, "base", format);
                    assert!(instants.borrow().contains(&found), "{top:?} {when}");
                }
            };
            let mut merge = guest.merge(top, Some("base")).unwrap();
            look(&mut guest, "opened");
            guest.begin(&mut merge);
            look(&mut guest, "begun");
            let mut at = 0;
            while at < merge.size() {
                at += merge.step(at).unwrap().0;
                look(&mut guest, &format!("at {at}"));
            }
            while let Some((_, end)) = merge.catch_up(0).unwrap() {
                killed(&bench, &names, &guest.model, &format!("again {end}"));
            }
            merge.name().unwrap();
            look(&mut guest, "named");
            if let Merged::Base(disk, emptied) = merge.finish(&|| true).unwrap() {
                killed(&bench, &names, &guest.model, "emptied");
                guest.disk = disk;
                look(&mut guest, "on the base");
                emptied.free();
                look(&mut guest, "freed");
            }
        }
    }
}

#[test]
fn a_merge_that_is_given_up_leaves_the_disk_on_its_chain_and_can_begin_again() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = on_chain(&bench, Format::Qcow2, 11, &["middle", "top"]);
    for _ in 0..2 {
        let mut merge = guest.merge(None, Some("base")).unwrap();
        guest.begin(&mut merge);
        copy(&mut guest, &merge);
        guest.disk = merge.given_up().unwrap();
        merge.settle().unwrap();
        guest.work(10);
        guest.holds_its_model();
    }
    // Nobody waits any more when it is to change something.
    let mut merge = guest.merge(None, Some("base")).unwrap();
    assert!(merge.begin(&|| false).is_err());
    drop(merge);
    guest.work(10);
    let mut merge = guest.merge(None, Some("base")).unwrap();
    guest.begin(&mut merge);
    copy(&mut guest, &merge);
    assert!(merge.finish(&|| false).is_err());
    guest.work(10);
    copy(&mut guest, &merge);
    guest.finish(merge);
    guest.holds_its_model();
    let Guest { disk, model, .. } = guest;
    drop(disk);
    assert!(read_by_qemu(&bench, "base", Format::Qcow2) == model);
}

#[test]
fn a_base_that_is_smaller_grows_and_one_that_is_larger_is_refused() {
    for format in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let guest = on_chain(&bench, format, 3, &["top"]);
        let Guest {
            disk,
            options,
            mut model,
            path,
            ..
        } = guest;
        disk.resize(2 * SIZE as u64).unwrap();
        model.resize(2 * SIZE, 0);
        drop(disk);
        let disk = open_disk(&path, &AnyPath, &options).unwrap();
        let mut guest = Guest {
            disk,
            path,
            options,
            model,
            random: 5,
        };
        let mut merge = guest.merge(None, None).unwrap();
        guest.begin(&mut merge);
        copy(&mut guest, &merge);
        guest.finish(merge);
        let Guest {
            disk,
            model,
            options,
            ..
        } = guest;
        drop(disk);
        assert!(read_by_qemu(&bench, "base", format) == model);
        bench.line(&format!(
            "qemu-img create -q -f qcow2 -F {} -b base small {}",
            format.name(),
            SIZE
        ));
        let mut options = options;
        options.disk.format = Some(Format::Qcow2);
        let path = bench.path("small");
        let disk = open_disk(&path, &AnyPath, &options).unwrap();
        let error = Merge::of(&*disk, &path, (None, None), opener(), &options).unwrap_err();
        assert!(
            matches!(error, MergeError::Unlike(Unlike::Size { .. })),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_be_merged_is_refused_and_the_disk_is_as_it_was() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = on_chain(&bench, Format::Qcow2, 13, &["middle", "top"]);
    let refused =
        |guest: &Guest, top: Option<&str>, base: Option<&str>| guest.merge(top, base).unwrap_err();
    let nowhere = refused(&guest, None, Some("nowhere"));
    assert!(matches!(nowhere, MergeError::NotInChain(_)), "{nowhere}");
    let wrong = refused(&guest, Some("middle"), Some("top"));
    assert!(matches!(wrong, MergeError::NotBelow { .. }), "{wrong}");
    let lowest = refused(&guest, Some("base"), None);
    assert!(matches!(lowest, MergeError::NoBacking(_)), "{lowest}");
    // Somebody else reads the base.
    let mut options = guest.options.clone();
    options.disk.read_only = true;
    let other = open_disk(&bench.path("base"), &AnyPath, &options).unwrap();
    let used = refused(&guest, None, Some("base"));
    assert!(
        matches!(used, MergeError::Open(OpenError::InUse { .. })),
        "{used}"
    );
    drop(other);
    guest.work(10);
    guest.holds_its_model();
    // And nobody can read it while it is written.
    let merge = guest.merge(None, Some("base")).unwrap();
    assert!(open_disk(&bench.path("base"), &AnyPath, &options).is_err());
    drop(merge);
    assert!(open_disk(&bench.path("base"), &AnyPath, &options).is_ok());
    // Another file under its name is not it.
    fs::rename(bench.path("base"), bench.path("moved")).unwrap();
    fs::copy(bench.path("moved"), bench.path("base")).unwrap();
    let other = refused(&guest, None, Some("base"));
    assert!(
        matches!(other, MergeError::Open(OpenError::Unusable { .. })),
        "{other}"
    );
}

/// Whether an image can be opened as a disk.
fn opens(bench: &Bench, name: &str) -> Result<(), String> {
    let mut options = qcow2();
    options.disk.read_only = true;
    options.disk.lock = false;
    match open_disk(&bench.path(name), &AnyPath, &options) {
        Ok(_) => Ok(()),
        Err(OpenError::Unfinished { top, .. }) => Err(top),
        Err(OpenError::Part { source, .. }) => match *source {
            OpenError::Unfinished { top, .. } => Err(top),
            other => panic!("{name}: {other}"),
        },
        Err(other) => panic!("{name}: {other}"),
    }
}

/// A merge that is given up when some of it has been done.
fn give_up(guest: &mut Guest, (top, base): (Option<&str>, &str)) {
    let mut merge = guest.merge(top, Some(base)).unwrap();
    guest.begin(&mut merge);
    merge.step(0).unwrap();
    guest.disk = merge.given_up().unwrap();
    merge.settle().unwrap();
    guest.work(5);
}

#[test]
fn a_base_stays_marked_where_nobody_waits_for_the_end_of_its_merge() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = on_chain(&bench, Format::Qcow2, 23, &["top"]);
    let mut merge = guest.merge(None, Some("base")).unwrap();
    guest.begin(&mut merge);
    copy(&mut guest, &merge);
    // The guest goes on meanwhile, and the base may hold parts of several instants.
    assert!(merge.finish(&|| false).is_err());
    guest.disk = merge.given_up().unwrap();
    merge.settle().unwrap();
    guest.work(5);
    assert_eq!(opens(&bench, "base"), Err("top".to_owned()));
    finish(&mut guest, (None, "base"));
    drop(guest.disk);
    assert_eq!(opens(&bench, "base"), Ok(()));
    assert_eq!(bench.qemu_check("base"), 0);
}

/// A merge that comes to its end.
fn finish(guest: &mut Guest, (top, base): (Option<&str>, &str)) {
    let mut merge = guest.merge(top, Some(base)).unwrap();
    guest.begin(&mut merge);
    copy(guest, &merge);
    merge.name().unwrap();
    guest.finish(merge);
    guest.holds_its_model();
}

#[test]
fn a_base_whose_merge_has_not_ended_is_refused_by_itself_until_one_has() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = on_chain(&bench, Format::Qcow2, 19, &["a", "b", "top"]);
    give_up(&mut guest, (None, "a"));
    let mixed = || Err("top".to_owned());
    for (name, opened) in [
        ("base", Ok(())),
        ("a", mixed()),
        // It may be the one that was called so.
        ("b", Ok(())),
        ("top", Ok(())),
    ] {
        assert_eq!(opens(&bench, name), opened, "{name}");
    }
    assert_eq!(bench.qemu_check("a"), 0);
    let told = crate::ops::info(&bench.path("a"), &AnyPath, Format::Qcow2, false).unwrap();
    assert_eq!(told.unfinished.as_deref(), Some("top"));
    // Nothing goes back to it, and nothing goes that makes it whole.
    let unfinished = |error: &OpenError| matches!(error, OpenError::Unfinished { .. });
    for layer in [Some("b"), Some("a"), None] {
        let layer = layer.map(|name| bench.path(name));
        let (disk, path) = (&*guest.disk, &guest.path);
        let refused = Revert::of(disk, path, layer.as_deref(), &AnyPath, &guest.options);
        assert!(matches!(refused, Err(RevertError::Open(error)) if unfinished(&error)));
    }
    let refused = guest.merge(None, Some("b")).unwrap_err();
    assert!(matches!(refused, MergeError::Open(error) if unfinished(&error)));
    guest.snapshot(&bench.path("above"));
    let a = bench.path("a");
    let refused = Stream::of(
        &*guest.disk,
        &guest.path,
        Some(&a),
        &AnyPath,
        &guest.options,
    );
    assert!(matches!(refused, Err(StreamError::Open(error)) if unfinished(&error)));
    let bottom = Revert::of(
        &*guest.disk,
        &guest.path,
        Some(&bench.path("base")),
        &AnyPath,
        &guest.options,
    );
    bottom.unwrap();
    // A merge of less of it does not make it whole.
    finish(&mut guest, (Some("b"), "a"));
    assert_eq!(opens(&bench, "a"), mixed());
    finish(&mut guest, (Some("top"), "a"));
    for name in ["base", "a", "above"] {
        assert_eq!(opens(&bench, name), Ok(()), "{name}");
        if name != "above" {
            assert_eq!(bench.qemu_check(name), 0, "{name}");
        }
    }
    give_up(&mut guest, (None, "a"));
    assert_eq!(opens(&bench, "a"), Err("above".to_owned()));
    finish(&mut guest, (None, "a"));
    assert_eq!(opens(&bench, "a"), Ok(()));
    let Guest { disk, model, .. } = guest;
    drop(disk);
    assert!(read_by_qemu(&bench, "a", Format::Qcow2) == model);
}

/// A target whose writes fail when it says so.
#[derive(Debug)]
struct Failing {
    image: Arc<dyn Image>,
    left: std::sync::atomic::AtomicI64,
}

impl Failing {
    fn may(&self) -> io::Result<()> {
        match self.left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(()),
        }
    }
}

impl Image for Failing {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.may()?;
        self.image.write(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.may()?;
        self.image.write_zeroes(offset, len, may_unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.may()?;
        self.image.flush()
    }

    fn extent(&self, offset: u64, max: u64) -> io::Result<crate::Extent> {
        self.image.extent(offset, max)
    }

    fn backing(&self) -> Option<&dyn Image> {
        self.image.backing()
    }
}

#[test]
fn a_write_that_fails_anywhere_loses_no_note_and_what_follows_makes_the_copy_whole() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = on_chain(&bench, Format::Qcow2, 17, &["top"]);
    bench.line(&format!("qemu-img create -q -f qcow2 copy {SIZE}"));
    let Some(Live(Top::Qcow2(image))) = guest.disk.live() else {
        unreachable!("it is a qcow2 image");
    };
    let target = crate::open_image(&bench.path("copy"), &AnyPath, &qcow2()).unwrap();
    let changes = Arc::new(Changes::new(SIZE as u64));
    guest.disk = Arc::new(Tracked::new(Arc::clone(&guest.disk), Arc::clone(&changes)));
    let failing = Arc::new(Failing {
        image: Arc::clone(&target),
        left: (-1).into(),
    });
    let copier = Copier {
        image,
        from: 0,
        layers: None,
        target: Arc::clone(&failing) as Arc<dyn Image>,
        changes: Some(changes),
    };
    let mut at = 0;
    while at < copier.size() {
        at += copier.step(at).unwrap().0;
    }
    let mut failures = 0;
    for nth in 0.. {
        guest.work(6);
        failing.left.store(nth, std::sync::atomic::Ordering::SeqCst);
        let failed = copier.complete();
        failing.left.store(-1, std::sync::atomic::Ordering::SeqCst);
        copier.complete().unwrap();
        let mut held = vec![0; SIZE];
        target.read(0, &mut held).unwrap();
        assert!(held == guest.model, "after the failure of write {nth}");
        if failed.is_ok() {
            break;
        }
        failures += 1;
    }
    assert!(failures >= 2, "{failures}");
}
