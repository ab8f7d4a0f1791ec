//! Backups of disks whose guests are at work.

use std::fs;
use std::fs::File;

use super::*;
use crate::live::backup::{Backup, BackupError, BackupRequest};

/// The bitmap of these tests.
const BITMAP: &str = "since";

impl Guest {
    pub(super) fn backup(&self, request: BackupRequest) -> Result<Backup, BackupError> {
        Backup::of(Arc::clone(&self.disk), request, opener(), &self.options)
    }

    /// The instant of a backup; what the disk holds then.
    pub(super) fn begin_backup(&mut self, backup: &mut Backup) -> Vec<u8> {
        self.disk = backup.begin(&|| true).unwrap();
        self.model.clone()
    }

    /// Has a backup made while it works. What the disk held at the beginning.
    pub(super) fn backed_up(&mut self, request: BackupRequest) -> Vec<u8> {
        let mut backup = self.backup(request).unwrap();
        let held = self.begin_backup(&mut backup);
        // Before anything has been copied.
        self.work(5);
        go_through(self, &backup);
        backup.prepare().unwrap();
        self.work(5);
        backup.name().unwrap();
        backup.finish(&|| true).unwrap();
        self.disk = backup.given_up();
        held
    }

    pub(super) fn bitmap(&self) -> Option<LiveBitmap> {
        let bitmaps = self.disk.live().unwrap().bitmaps().unwrap();
        bitmaps.into_iter().find(|it| it.name == BITMAP)
    }

    fn change(&self, change: LiveBitmapChange) -> Result<(), ChangeError> {
        self.disk.live().unwrap().change_bitmap(BITMAP, change)
    }
}

/// Copies all while the guest works.
fn go_through(guest: &mut Guest, backup: &Backup) {
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut at = 0;
            while at < backup.size() {
                at += backup.step(at).unwrap().0;
            }
        });
        while !copying.is_finished() {
            guest.work(5);
        }
    });
}

/// A full backup, with the bitmap or without.
pub(super) fn full(bench: &Bench, name: &str, format: Format, bitmap: bool) -> BackupRequest {
    BackupRequest {
        path: bench.path(name),
        format,
        bitmap: bitmap.then(|| BITMAP.to_owned()),
        incremental: false,
        base: None,
    }
}

/// What has been written since, on an earlier backup or alone.
pub(super) fn since(bench: &Bench, name: &str, base: Option<(&str, Format)>) -> BackupRequest {
    BackupRequest {
        incremental: true,
        base: base.map(|(name, format)| (bench.path(name), format)),
        ..full(bench, name, Format::Qcow2, true)
    }
}

const ADD: LiveBitmapChange = LiveBitmapChange::Add {
    granularity: None,
    enabled: true,
};

fn names(bench: &Bench) -> BTreeSet<String> {
    let entries = fs::read_dir(bench.path("")).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    entries.map(name).collect()
}

#[test]
fn a_full_backup_and_incremental_ones_on_it_hold_what_the_disk_held_at_their_instants() {
    for (from, to) in [
        (Format::Raw, Format::Qcow2),
        (Format::Qcow2, Format::Raw),
        (Format::Qcow2, Format::Qcow2),
    ] {
        for seed in 0..seeds() {
            let Some(bench) = Bench::with_qemu() else {
                return;
            };
            let mut guest = Guest::on(&bench, from, 70 + seed);
            if from == Format::Qcow2 {
                guest.work(20);
                guest.snapshot(&bench.path("top"));
            }
            guest.work(20);
            let held = guest.backed_up(full(&bench, "full", to, true));
            let mut made = vec![("full".to_owned(), to, held)];
            for round in 0..3 {
                guest.work(3);
                let (base, format, _) = made.last().unwrap().clone();
                let name = format!("since{round}");
                let held = guest.backed_up(since(&bench, &name, Some((&base, format))));
                made.push((name, Format::Qcow2, held));
            }
            guest.work(10);
            guest.holds_its_model();
            assert_eq!(guest.bitmap().unwrap().persistent, from == Format::Qcow2);
            let Guest {
                disk, model, path, ..
            } = guest;
            drop(disk);
            let own = path.file_name().unwrap().to_str().unwrap();
            made.push((own.to_owned(), from, model));
            for (name, format, held) in made {
                assert!(read_by_qemu(&bench, &name, format) == held, "{name}");
                if format == Format::Qcow2 {
                    assert_eq!(bench.qemu_check(&name), 0, "{name}");
                }
            }
            assert!(names(&bench).iter().all(|name| !name.starts_with('.')));
        }
    }
}

#[test]
fn an_incremental_backup_alone_holds_what_was_written_zeros_too_and_nothing_else() {
    for from in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, from, 75);
        guest.work(60);
        guest.backed_up(full(&bench, "full", Format::Qcow2, true));
        assert!(guest.bitmap().unwrap().marked > Some(0));
        guest.change(LiveBitmapChange::Clear).unwrap();
        let mut queue = guest.disk.queue(1).unwrap();
        let zeroes = Op::WriteZeroes {
            len: 200 << 10,
            may_unmap: true,
        };
        perform(&mut *queue, zeroes, 100 << 10, Buffers::none()).unwrap();
        drop(queue);
        guest.model[100 << 10..300 << 10].fill(0);
        assert_eq!(guest.bitmap().unwrap().marked, Some(256 << 10));
        let mut backup = guest.backup(since(&bench, "alone", None)).unwrap();
        let held = guest.begin_backup(&mut backup);
        go_through_still(&backup);
        backup.prepare().unwrap();
        backup.name().unwrap();
        backup.finish(&|| true).unwrap();
        guest.disk = backup.given_up();
        drop(backup);
        let map = bench.line("qemu-img map --output=json alone");
        let present = map
            .split('}')
            .filter(|part| part.contains("\"present\": true"));
        let length = |part: &str| {
            let text = part.split("\"length\": ").nth(1).unwrap();
            text.split(',').next().unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(present.map(length).sum::<u64>(), 256 << 10, "{map}");
        bench.line("qemu-img rebase -u -F qcow2 -b full alone");
        assert!(
            read_by_qemu(&bench, "alone", Format::Qcow2)[64 << 10..320 << 10]
                == held[64 << 10..320 << 10]
        );
        assert!(held == guest.model);
    }
}

fn go_through_still(backup: &Backup) {
    let mut at = 0;
    while at < backup.size() {
        at += backup.step(at).unwrap().0;
    }
}

#[test]
fn a_backup_that_does_not_come_to_its_end_leaves_no_file_and_the_bitmap_as_if_it_had_not_begun() {
    for from in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, from, 77);
        guest.work(30);
        guest.backed_up(full(&bench, "full", Format::Qcow2, true));
        guest.work(3);
        let there = names(&bench);
        for late in [false, true] {
            let request = since(&bench, "since", Some(("full", Format::Qcow2)));
            let mut backup = guest.backup(request).unwrap();
            assert_eq!(names(&bench).len(), there.len() + 1);
            assert!(!bench.path("since").exists());
            guest.begin_backup(&mut backup);
            guest.work(3);
            if late {
                go_through(&mut guest, &backup);
                backup.prepare().unwrap();
                assert!(backup.finish(&|| false).is_err());
            }
            guest.disk = backup.given_up();
            drop(backup);
            assert_eq!(names(&bench), there);
            guest.work(3);
        }
        let request = since(&bench, "since", Some(("full", Format::Qcow2)));
        let held = guest.backed_up(request);
        assert!(read_by_qemu(&bench, "since", Format::Qcow2) == held);
        // Another one got the name meanwhile.
        let request = since(&bench, "more", Some(("since", Format::Qcow2)));
        let mut backup = guest.backup(request.clone()).unwrap();
        guest.begin_backup(&mut backup);
        go_through(&mut guest, &backup);
        backup.prepare().unwrap();
        fs::write(bench.path("more"), b"precious").unwrap();
        let error = backup.name().unwrap_err();
        assert!(matches!(error, BackupError::Create(_)), "{error}");
        guest.disk = backup.given_up();
        drop(backup);
        assert_eq!(fs::read(bench.path("more")).unwrap(), b"precious");
        fs::remove_file(bench.path("more")).unwrap();
        let held = guest.backed_up(request);
        assert!(read_by_qemu(&bench, "more", Format::Qcow2) == held);
    }
}

/// Opens what it has created for reading alone, so that no write to it succeeds.
struct Full;

impl Opener for Full {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let hidden = path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with('.') && name.ends_with(".new")
        });
        if hidden {
            return File::open(path);
        }
        AnyPath.open(path, access)
    }

    fn create(&self, path: &Path, access: Access) -> io::Result<File> {
        AnyPath.create(path, access)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        AnyPath.remove(path)
    }
}

#[test]
fn a_target_that_takes_nothing_ends_the_backup_and_holds_no_write_of_the_guest_up() {
    for from in [Format::Raw, Format::Qcow2] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut guest = Guest::on(&bench, from, 79);
        guest.work(30);
        let there = names(&bench);
        let request = full(&bench, "full", Format::Raw, true);
        let disk = Arc::clone(&guest.disk);
        let backup = Backup::of(disk, request, Arc::new(Full), &guest.options);
        let mut backup = backup.unwrap();
        guest.begin_backup(&mut backup);
        guest.work(20);
        guest.holds_its_model();
        let mut at = 0;
        let failed = loop {
            match backup.step(at) {
                Ok((done, _)) => at += done,
                Err(error) => break error,
            }
        };
        assert!(backup.prepare().is_err(), "{failed}");
        assert!(backup.finish(&|| true).is_err());
        guest.disk = backup.given_up();
        drop(backup);
        guest.work(10);
        guest.holds_its_model();
        assert_eq!(names(&bench), there);
        // It tells of the whole disk: there is no backup since which it could tell less.
        assert_eq!(guest.bitmap().unwrap().marked, Some(SIZE as u64));
    }
}

#[test]
fn what_cannot_be_backed_up_is_refused_and_nothing_is_left() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 81);
    guest.work(10);
    fs::create_dir(bench.path("other")).unwrap();
    let there = names(&bench);
    let refused = |request| guest.backup(request).unwrap_err();
    let own = refused(full(&bench, "base", Format::Qcow2, false));
    assert!(matches!(own, BackupError::Exists(_)), "{own}");
    let raw = BackupRequest {
        format: Format::Raw,
        ..since(&bench, "new", None)
    };
    assert!(matches!(refused(raw), BackupError::Raw));
    let nothing = BackupRequest {
        bitmap: None,
        ..since(&bench, "new", None)
    };
    assert!(matches!(refused(nothing), BackupError::NoBitmap));
    let based = BackupRequest {
        base: Some((bench.path("full"), Format::Qcow2)),
        ..full(&bench, "new", Format::Qcow2, false)
    };
    assert!(matches!(refused(based), BackupError::Base));
    // The disk's own image is in use, others have to be there, and where they may be the disk's user says.
    let own = refused(since(&bench, "new", Some(("base", Format::Qcow2))));
    assert!(matches!(own, BackupError::Open(_)), "{own}");
    let absent = refused(since(&bench, "new", Some(("absent", Format::Qcow2))));
    assert!(matches!(absent, BackupError::Open(_)), "{absent}");
    let far = refused(since(&bench, "other/new", Some(("full", Format::Qcow2))));
    assert!(matches!(far, BackupError::Elsewhere { .. }), "{far}");
    for add in [false, true] {
        if add {
            guest.change(ADD).unwrap();
            guest.change(LiveBitmapChange::Disable).unwrap();
        }
        let mut backup = guest.backup(since(&bench, "new", None)).unwrap();
        let error = backup.begin(&|| true).err().unwrap();
        let BackupError::Bitmap(error) = error else {
            panic!("{error}");
        };
        assert!(
            matches!(
                (add, &error),
                (false, ChangeError::NoBitmap(_)) | (true, ChangeError::Disabled(_))
            ),
            "{error}"
        );
    }
    assert_eq!(names(&bench), there);
    guest.work(10);
    guest.holds_its_model();
}

#[test]
fn a_monitor_that_is_killed_in_a_backup_leaves_a_bitmap_that_is_whole_or_that_nobody_trusts() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Qcow2, 83);
    guest.work(30);
    guest.backed_up(full(&bench, "full", Format::Qcow2, true));
    guest.work(3);
    let Guest {
        disk,
        path,
        options,
        model,
        random,
    } = guest;
    drop(disk);
    let marked = bench.line("qemu-img info base");
    assert!(
        marked.contains(BITMAP) && !marked.contains("in-use"),
        "{marked}"
    );
    let mut guest = Guest {
        disk: open_disk(&path, &AnyPath, &options).unwrap(),
        path,
        options,
        model,
        random,
    };
    let before = guest.bitmap().unwrap().marked;
    let cut = |name: &str| {
        fs::copy(bench.path("base"), bench.path(name)).unwrap();
        let disk = open_disk(&bench.path(name), &AnyPath, &qcow2()).unwrap();
        let bitmap = disk.live().unwrap().bitmaps().unwrap().remove(0);
        (bitmap.broken, bitmap.marked)
    };
    let request = since(&bench, "since", Some(("full", Format::Qcow2)));
    let mut backup = guest.backup(request).unwrap();
    guest.begin_backup(&mut backup);
    go_through_still(&backup);
    backup.prepare().unwrap();
    // Nothing was written: the bitmap tells of what the backup holds, as before.
    assert_eq!(cut("still"), (false, before));
    guest.work(5);
    guest.disk.live().unwrap().flush().unwrap();
    assert_eq!(cut("written"), (true, None));
    backup.name().unwrap();
    backup.finish(&|| true).unwrap();
    // It forgets only in memory, until it is saved.
    assert_eq!(cut("ended"), (true, None));
    guest.disk = backup.given_up();
    drop(backup);
    guest.work(3);
    let marked = guest.bitmap().unwrap().marked;
    drop(guest.disk);
    assert_eq!(cut("closed"), (false, marked));
    assert_eq!(bench.qemu_check("closed"), 0);
    let refused = open_disk(&bench.path("written"), &AnyPath, &qcow2()).unwrap();
    let request = since(&bench, "more", None);
    let mut backup = Backup::of(refused, request, opener(), &qcow2()).unwrap();
    let error = backup.begin(&|| true).err().unwrap();
    assert!(
        matches!(error, BackupError::Bitmap(ChangeError::Inconsistent(_))),
        "{error}"
    );
}

#[test]
fn bitmaps_of_a_disk_in_use_are_changed_as_qemu_sees_them_and_by_both() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line(&format!("qemu-img create -q -f qcow2 base {SIZE}"));
    bench.line("qemu-img bitmap --add -g 4k base theirs");
    bench.line("qemu-img bitmap --add --disable base still");
    let disk = open_disk(&bench.path("base"), &AnyPath, &qcow2()).unwrap();
    let mut guest = Guest {
        disk,
        path: bench.path("base"),
        options: qcow2(),
        model: vec![0; SIZE],
        random: 5,
    };
    guest.work(5);
    guest.change(ADD).unwrap();
    assert!(matches!(
        guest.change(ADD),
        Err(ChangeError::BitmapExists(_))
    ));
    let queue = guest.disk.queue(1).unwrap();
    drop(queue);
    guest.work(5);
    let live = guest.disk.live().unwrap();
    let told: Vec<_> = live.bitmaps().unwrap();
    let states: Vec<_> = told
        .iter()
        .map(|it| (it.name.as_str(), it.granularity, it.enabled, it.broken))
        .collect();
    let expected = [
        ("theirs", 4096, true, false),
        ("still", 65536, false, false),
        (BITMAP, 65536, true, false),
    ];
    assert_eq!(states, expected);
    live.change_bitmap("theirs", LiveBitmapChange::Remove)
        .unwrap();
    live.change_bitmap("still", LiveBitmapChange::Enable)
        .unwrap();
    let gone = live.change_bitmap("theirs", LiveBitmapChange::Clear);
    assert!(matches!(gone, Err(ChangeError::NoBitmap(_))));
    drop(live);
    guest.work(1);
    drop(guest.disk);
    let info = bench.line("qemu-img info base");
    assert!(
        !info.contains("theirs") && !info.contains("in-use"),
        "{info}"
    );
    assert_eq!(info.matches("auto").count(), 2, "{info}");
    bench.line(&format!("qemu-img bitmap --clear base {BITMAP}"));
    let disk = open_disk(&bench.path("base"), &AnyPath, &qcow2()).unwrap();
    let bitmaps = disk.live().unwrap().bitmaps().unwrap();
    let marked = |name: &str| bitmaps.iter().find(|it| it.name == name).unwrap().marked;
    assert_eq!(marked(BITMAP), Some(0));
    assert!(marked("still") > Some(0));
}

#[test]
fn a_disk_that_was_left_guarded_is_backed_up_again() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let mut guest = Guest::on(&bench, Format::Raw, 11);
    let mut backup = guest
        .backup(full(&bench, "first", Format::Raw, false))
        .unwrap();
    guest.begin_backup(&mut backup);
    // It fails, and the disk cannot be put back.
    drop(backup);
    guest.work(5);
    guest.disk = guest.disk.plain().unwrap();
    assert!(guest.disk.plain().is_none());
    let held = guest.backed_up(full(&bench, "second", Format::Raw, false));
    assert!(read_by_qemu(&bench, "second", Format::Raw) == held);
}
