//! Streams, reverts and mirrors whose monitor is killed, or whose storage fails, at each of their steps.

use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};

use super::merging::{killed, on_chain};
use super::*;
use crate::live::mirror::{Mirror, MirrorError, MirrorTarget};
use crate::live::revert::Revert;
use crate::live::stream::Stream;
use crate::qcow2::testing::Memory;
use crate::testing::Script;

const NAMES: [&str; 3] = ["base", "middle", "top"];

/// The guest writes and flushes; what a monitor that is killed then leaves holds that.
fn look(bench: &Bench, guest: &mut Guest, when: &str) {
    guest.work(3);
    guest.flush();
    killed(bench, &NAMES, &guest.model, when);
}

#[test]
fn a_stream_whose_monitor_is_killed_leaves_what_the_guest_had_flushed() {
    for format in [Format::Raw, Format::Qcow2] {
        for base in [None, Some("base")] {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = on_chain(&bench, format, 41, &NAMES[1..]);
            let below = base.map(|name| bench.path(name));
            let (disk, path) = (Arc::clone(&guest.disk), guest.path.clone());
            let stream = Stream::of(&*disk, &path, below.as_deref(), &AnyPath, &guest.options);
            let stream = stream.unwrap();
            let mut at = 0;
            while at < stream.size() {
                at += stream.step(at).unwrap().0;
                look(&bench, &mut guest, &format!("at {at}"));
            }
            stream.name().unwrap();
            look(&bench, &mut guest, "named");
            drop(disk);
            let cut = stream.finish(&guest.options, &|| true).unwrap();
            killed(&bench, &NAMES, &guest.model, "opened anew");
            guest.disk = cut.disk();
            cut.keep();
            look(&bench, &mut guest, "on its shorter chain");
        }
    }
}

#[test]
fn a_revert_whose_monitor_is_killed_leaves_the_disk_before_or_after_it() {
    for format in [Format::Raw, Format::Qcow2] {
        for layer in ["middle", "base"] {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = Guest::on(&bench, format, 43);
            guest.work(30);
            let oldest = guest.snapshot(&bench.path("middle"));
            guest.work(30);
            let newer = guest.snapshot(&bench.path("top"));
            look(&bench, &mut guest, "before");
            let (disk, path) = (Arc::clone(&guest.disk), guest.path.clone());
            let layer_path = bench.path(layer);
            let revert = Revert::of(&*disk, &path, Some(&layer_path), &AnyPath, &guest.options);
            let revert = revert.unwrap();
            drop(disk);
            look(&bench, &mut guest, "looked at");
            // All but the last step has been done when it is asked whether to go on.
            let model = guest.model.clone();
            let go = || {
                killed(&bench, &NAMES, &model, "written out");
                true
            };
            let (cut, emptied) = revert.finish(&guest.options, &go).unwrap();
            guest.model = if layer == "base" { oldest } else { newer };
            killed(&bench, &NAMES, &guest.model, "emptied");
            guest.disk = cut.disk();
            cut.keep();
            look(&bench, &mut guest, "on what is below");
            emptied.free();
            look(&bench, &mut guest, "freed");
            guest.holds_its_model();
        }
    }
}

fn mirror(guest: &Guest, path: &Path, format: Format) -> Result<Mirror, MirrorError> {
    let target = MirrorTarget {
        path: path.to_owned(),
        format,
        existing: false,
    };
    Mirror::of(Arc::clone(&guest.disk), target, opener(), &guest.options)
}

#[test]
fn a_mirror_whose_monitor_is_killed_leaves_the_disk_and_a_whole_copy_once_it_is_there() {
    for format in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = on_chain(&bench, Format::Qcow2, 47, &NAMES[1..]);
        let mut mirror = mirror(&guest, &bench.path("copy"), format).unwrap();
        look(&bench, &mut guest, "made");
        guest.disk = mirror.begin();
        look(&bench, &mut guest, "begun");
        let mut at = 0;
        while at < mirror.size() {
            at += mirror.step(at).unwrap().0;
            look(&bench, &mut guest, &format!("at {at}"));
        }
        while let Some((_, end)) = mirror.catch_up(0).unwrap() {
            killed(&bench, &NAMES, &guest.model, &format!("again {end}"));
        }
        mirror.flush().unwrap();
        look(&bench, &mut guest, "flushed");
        let there = mirror.finish(&|| true).unwrap();
        // Whichever the next start has, it is all there.
        killed(&bench, &NAMES, &guest.model, "complete");
        assert!(read_by_qemu(&bench, "copy", format) == guest.model);
        let before = guest.model.clone();
        guest.disk = there;
        drop(mirror);
        for _ in 0..3 {
            guest.work(5);
            guest.flush();
            killed(&bench, &NAMES, &before, "left behind");
            assert!(read_by_qemu(&bench, "copy", format) == guest.model);
        }
        drop(guest);
        if format == Format::Qcow2 {
            assert_eq!(bench.qemu_check("copy"), 0);
        }
    }
}

/// The size of the disk in storage that fails.
const SMALL: u64 = 256 << 10;

/// An image in memory on a raw one, and what it shows.
struct Pair {
    bench: Bench,
    base: Vec<u8>,
    top: Vec<u8>,
    shown: Vec<u8>,
}

fn raw(bytes: &[u8]) -> Backing {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new(bytes.to_vec()));
    let size = bytes.len() as u64;
    Backing::Raw(RawBacking {
        image: Box::new(RawImage::new(Arc::clone(&storage), size, true, true)),
        storage,
        size,
    })
}

/// Opens an image, on `base` if it names one.
fn open(storage: Arc<dyn Storage>, base: &[u8]) -> Arc<Qcow2> {
    let header = Header::load(&*storage).unwrap();
    let backing = header.backing.is_some().then(|| raw(base));
    let settings = Settings {
        read_only: false,
        sync: true,
        punch: true,
        cache: 64 << 10,
    };
    Arc::new(Qcow2::open(header, storage, None, backing, settings).unwrap())
}

impl Pair {
    fn new() -> Option<Self> {
        let bench = Bench::with_qemu()?;
        let base: Vec<u8> = (0..SMALL)
            .map(|at| (at / 1000).to_le_bytes()[0] | 1)
            .collect();
        fs::write(bench.path("base"), &base).unwrap();
        bench.line("qemu-img create -q -f qcow2 -F raw -b base -o cluster_size=4k top");
        let storage = Arc::new(Memory::new(fs::read(bench.path("top")).unwrap()));
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &base);
        let mut shown = base.clone();
        for (at, len) in [(3000, 9000), (70_000, 20_000), (200_000, 100)] {
            image.write(at, &vec![0xEE; len]).unwrap();
            let at = usize::try_from(at).unwrap();
            shown[at..at + len].fill(0xEE);
        }
        image.write_zeroes(100_000, 30_000, true).unwrap();
        shown[100_000..130_000].fill(0);
        image.flush().unwrap();
        drop(image);
        let top = storage.bytes();
        Some(Self {
            bench,
            base,
            top,
            shown,
        })
    }

    /// What the next start finds in these bytes, in which nothing but space that nobody uses may be wrong.
    fn found(&self, bytes: &[u8], when: &str) -> Vec<u8> {
        fs::write(self.bench.path("found"), bytes).unwrap();
        assert!(matches!(self.bench.qemu_check("found"), 0 | 3), "{when}");
        let image = open(Arc::new(Memory::new(bytes.to_vec())), &self.base);
        all_of(&image)
    }
}

fn all_of(image: &Qcow2) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(SMALL).unwrap()];
    image.read(0, &mut all).unwrap();
    all
}

/// Writes, syncs and holes fail from the `left`th on, or that one alone.
fn failing(left: &Arc<AtomicI64>, code: i32, stays: bool) -> Script {
    let left = Arc::clone(left);
    Box::new(move |call| {
        if matches!(call, Call::Read(..)) {
            return None;
        }
        let now = left.fetch_sub(1, Ordering::SeqCst);
        (now == 0 || stays && now < 0).then_some(code)
    })
}

/// How storage fails: how, and whether it stays so.
const FAULTS: [(i32, bool); 4] = [
    (libc::ENOSPC, false),
    (libc::EIO, false),
    (libc::ENOSPC, true),
    (libc::EIO, true),
];

/// Does `act` with storage that fails at each of its calls in turn, until none is left. `after` hears of each failure.
fn at_each_call(
    pair: &Pair,
    fault: (i32, bool),
    act: impl Fn(&Arc<Qcow2>) -> Result<Vec<u8>, String>,
    after: impl Fn(&Arc<Qcow2>, &Scripted, &str),
) {
    let (code, stays) = fault;
    for nth in 0.. {
        let left = Arc::new(AtomicI64::new(i64::MAX));
        let storage = Scripted::new(pair.top.clone(), 1, failing(&left, code, stays));
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &pair.base);
        left.store(nth, Ordering::SeqCst);
        let done = act(&image);
        let failed = left.swap(i64::MAX, Ordering::SeqCst) < 0;
        let when = format!("the failure {code} of call {nth}, which stays: {stays}");
        match done {
            Ok(shown) => {
                assert!(pair.found(&storage.bytes(), &when) == shown, "{when}");
                if !failed {
                    assert!(nth > 5, "{nth}");
                    return;
                }
            }
            Err(error) => {
                assert!(failed, "{error}");
                after(&image, &storage, &when);
            }
        }
    }
}

fn stream_all(image: &Arc<Qcow2>) -> Result<(), String> {
    let said = |error: &dyn std::error::Error| error.to_string();
    let disk = Qcow2Disk::new(Arc::clone(image), &qcow2().disk).map_err(|error| said(&error))?;
    let stream = Stream::of(&disk, Path::new("/x/top"), None, &AnyPath, &qcow2());
    let stream = stream.map_err(|error| said(&error))?;
    let mut at = 0;
    while at < stream.size() {
        at += stream.step(at).map_err(|error| said(&error))?.0;
    }
    stream.name().map_err(|error| said(&error))?;
    let cut = stream.finish(&qcow2(), &|| true);
    cut.map_err(|error| said(&error))?.keep();
    Ok(())
}

#[test]
fn a_stream_whose_storage_fails_anywhere_loses_nothing_and_the_next_one_ends_it() {
    let Some(pair) = Pair::new() else {
        return;
    };
    for fault in FAULTS {
        let stream = |image: &Arc<Qcow2>| stream_all(image).map(|()| pair.shown.clone());
        at_each_call(&pair, fault, stream, |image, storage, when| {
            assert!(all_of(image) == pair.shown, "{when}");
            let bytes = storage.bytes();
            assert!(pair.found(&bytes, when) == pair.shown, "{when}");
            // The next start does it again, unless all has been done.
            let again = Arc::new(Memory::new(bytes));
            let next = open(Arc::clone(&again) as Arc<dyn Storage>, &pair.base);
            if next.backing().is_some() {
                stream_all(&next).unwrap();
            }
            drop(next);
            let header = Header::load(&*again).unwrap();
            assert!(header.backing.is_none(), "{when}");
            assert!(pair.found(&again.bytes(), when) == pair.shown, "{when}");
        });
    }
}

#[test]
fn a_revert_whose_storage_fails_anywhere_leaves_the_disk_as_it_was_or_has_gone_back() {
    let Some(pair) = Pair::new() else {
        return;
    };
    for fault in FAULTS {
        for name in [None, Some(("base".to_owned(), Format::Raw))] {
            let revert = |image: &Arc<Qcow2>| {
                let revert = Revert::below(Arc::clone(image), 1, name.clone());
                let done = revert.finish(&qcow2(), &|| true);
                let (cut, emptied) = done.map_err(|error| error.to_string())?;
                let disk = cut.disk();
                cut.keep();
                // Whether or not its space can be given back.
                emptied.free();
                drop(disk);
                Ok(pair.base.clone())
            };
            at_each_call(&pair, fault, revert, |image, storage, when| {
                let found = pair.found(&storage.bytes(), when);
                // Storage that does not recover may have taken the last write, and not said so.
                assert!(
                    found == pair.shown || fault.1 && found == pair.base,
                    "{when}"
                );
                if !fault.1 {
                    assert!(all_of(image) == pair.shown, "{when}");
                    image.write(0, &[7; 512]).unwrap();
                    image.flush().unwrap();
                }
            });
        }
    }
}
