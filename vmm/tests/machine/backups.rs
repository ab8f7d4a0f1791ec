//! Bitmaps and backups of disks whose guest is at work.

use std::fs;
use std::path::{Path, PathBuf};

use api::client::Client;
use api::wire::{
    BitmapAction, DiskBitmap, JobState, MirrorFormat, RateLimiterConfig, VmDiskBackup,
    VmDiskBitmap, VmDiskMirror, VmUpdateDisk,
};
use api::{Command as Ask, Control, ControlError, ErrorKind, ExitReason, Reply};
use block::ops::{NewImage, create};
use block::{BackingPolicy, CreateOptions, DiskOptions, Format, ImageOptions};
use serde_json::{Value, json};
use vmm::opener::Opener;

use crate::support::{Local, Served, can_run, config, until};

const SIZE: u64 = 4 << 20;

/// What is different in a request.
type Change<'a> = &'a dyn Fn(&mut VmDiskBackup);

/// A machine whose guest writes to its disk, slowly until it is let go, and checks what it reads.
struct Writer {
    machine: Local,
    format: Format,
    directory: tempfile::TempDir,
}

fn make(path: &Path, format: Format) {
    let image = match format {
        Format::Raw => NewImage::Raw {
            size: SIZE,
            preallocation: block::Preallocation::Off,
        },
        Format::Qcow2 => NewImage::Qcow2(Box::new(CreateOptions {
            size: SIZE,
            ..CreateOptions::default()
        })),
    };
    create(path, &Opener::new(), &image).unwrap();
}

/// Makes an image that holds something everywhere: to copy it takes two steps at least, and the second waits for its turn.
fn make_full(path: &Path) {
    let noise = path.with_extension("noise");
    let bytes: Vec<u8> = (1..=SIZE / 4)
        .flat_map(|n| u32::try_from(n).unwrap().to_le_bytes())
        .collect();
    fs::write(&noise, bytes).unwrap();
    let mut convert = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
    convert.args(["image", "convert", "-f", "raw", "-O", "qcow2"]);
    assert!(convert.args([&noise, path]).status().unwrap().success());
    fs::remove_file(noise).unwrap();
}

/// All that an image holds, which may be in use.
fn held(path: &Path, format: Format) -> Vec<u8> {
    let options = ImageOptions {
        disk: DiskOptions {
            format: Some(format),
            read_only: true,
            lock: false,
            ..DiskOptions::default()
        },
        backing: BackingPolicy::Directory,
        ..ImageOptions::default()
    };
    let image = block::open_image(path, &Opener::new(), &options).unwrap();
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read(0, &mut bytes).unwrap();
    bytes
}

impl Writer {
    fn boot(format: Format) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make(&directory.path().join("disk"), format);
        Self::boot_in(directory, format)
    }

    fn boot_in(directory: tempfile::TempDir, format: Format) -> Self {
        let path = |name: &str| directory.path().join(name);
        let slow = json!({
            "path": path("disk"), "format": format, "bw_size": 256 << 10, "bw_refill_time": 1000,
        });
        let more = json!({
            "devices": [{ "kind": "blk", "id": "a", "config": slow }],
            "serial": { "file": path("serial") },
        });
        let machine = Local::boot(&config("blk", "verify keep", more));
        Self {
            machine,
            format,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn bitmap(&self, name: &str, action: BitmapAction) -> Result<Reply, ControlError> {
        self.machine.ask(Ask::DiskBitmap(VmDiskBitmap {
            id: "a".to_owned(),
            name: name.to_owned(),
            action,
            granularity: None,
        }))
    }

    fn bitmaps(&self) -> Vec<DiskBitmap> {
        match self.machine.ask(Ask::DiskBitmaps) {
            Ok(Reply::Bitmaps(mut disks)) => disks.remove(0).bitmaps,
            other => panic!("{other:?}"),
        }
    }

    fn request(&self, name: &str, base: Option<&str>) -> VmDiskBackup {
        VmDiskBackup {
            id: "a".to_owned(),
            path: self.path(name),
            format: MirrorFormat::Qcow2,
            bitmap: Some("daily".to_owned()),
            incremental: base.is_some(),
            base: base.map(|base| self.path(base)),
            base_format: MirrorFormat::Qcow2,
            speed: None,
        }
    }

    fn refused(&self, request: VmDiskBackup) -> (ErrorKind, String) {
        let error = self.machine.ask(Ask::DiskBackup(request)).unwrap_err();
        (error.kind, error.to_string())
    }

    fn started(&self, request: VmDiskBackup) -> String {
        match self.machine.ask(Ask::DiskBackup(request)) {
            Ok(Reply::Started(job)) => job.id,
            other => panic!("{other:?}"),
        }
    }

    fn end_of(&self, id: &str) -> (JobState, Option<String>) {
        until("the end of the job", || {
            let jobs = self.machine.handle.jobs();
            let job = jobs.into_iter().find(|job| job.id == id)?;
            let ended = !matches!(job.state, JobState::Running | JobState::Cancelling);
            ended.then_some((job.state, job.error))
        })
    }

    /// What the disk holds while its guest stands still.
    fn still(&self) -> Vec<u8> {
        if self.format == Format::Raw {
            return fs::read(self.path("disk")).unwrap();
        }
        // Tables of the image are in the monitor's memory.
        let request = VmDiskMirror {
            id: "a".to_owned(),
            path: self.path("still"),
            format: MirrorFormat::Raw,
            existing: false,
            switch: false,
            speed: None,
        };
        let Ok(Reply::Started(job)) = self.machine.ask(Ask::DiskMirror(request)) else {
            panic!("no copy");
        };
        assert_eq!(self.end_of(&job.id), (JobState::Completed, None));
        let bytes = fs::read(self.path("still")).unwrap();
        fs::remove_file(self.path("still")).unwrap();
        bytes
    }

    /// Begins a backup while the guest stands still, and has it go on then; what the disk held.
    fn backed_up(&self, name: &str, base: Option<&str>) -> Vec<u8> {
        assert_eq!(self.machine.ask(Ask::Pause), Ok(Reply::Done));
        let live = self.still();
        let id = self.started(VmDiskBackup {
            speed: Some(2 << 20),
            ..self.request(name, base)
        });
        assert_eq!(self.machine.ask(Ask::Resume), Ok(Reply::Done));
        // What is not copied yet is copied before the guest changes it.
        until("a write", || {
            self.marked("daily").filter(|marked| *marked > 0)
        });
        assert_eq!(self.end_of(&id), (JobState::Completed, None));
        live
    }

    fn marked(&self, name: &str) -> Option<u64> {
        self.bitmaps()
            .into_iter()
            .find(|it| it.name == name)?
            .marked
    }

    fn let_go(&self) {
        let unlimited = Ask::UpdateDisk(Box::new(VmUpdateDisk {
            id: "a".to_owned(),
            rate_limiter_config: Some(RateLimiterConfig::default()),
            path: None,
        }));
        assert_eq!(self.machine.ask(unlimited), Ok(Reply::Done));
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }

    fn succeeds(&mut self) {
        let outcome = self.machine.outcome();
        let text = fs::read_to_string(self.path("serial")).unwrap();
        assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
        assert!(text.contains("verify=ok errors=0"), "{text}");
    }
}

#[test]
fn backups_hold_what_the_disk_held_at_their_instants_while_its_guest_writes() {
    if !can_run() {
        return;
    }
    for format in [Format::Raw, Format::Qcow2] {
        let mut writer = Writer::boot(format);
        let held_then = writer.backed_up("full", None);
        let bitmap = writer.bitmaps().remove(0);
        assert_eq!(
            (bitmap.enabled, bitmap.persistent),
            (true, format == Format::Qcow2)
        );
        let mut made = vec![("full", held_then)];
        for (name, base) in [("since1", "full"), ("since2", "since1")] {
            until("a write", || writer.marked("daily").filter(|it| *it > 0));
            made.push((name, writer.backed_up(name, Some(base))));
        }
        for (name, held_then) in made {
            let same = held(&writer.path(name), Format::Qcow2) == held_then;
            assert!(same, "{name} of {format:?}");
        }
        let expected = ["disk", "full", "serial", "since1", "since2"];
        assert_eq!(writer.names(), expected);
        writer.let_go();
        writer.succeeds();
    }
}

#[test]
fn a_backup_that_is_cancelled_leaves_nothing_and_the_bitmap_tells_of_more() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    make_full(&directory.path().join("disk"));
    let mut writer = Writer::boot_in(directory, Format::Qcow2);
    let slow = VmDiskBackup {
        speed: Some(1),
        ..writer.request("full", None)
    };
    let id = writer.started(slow);
    // The job has the disk to itself.
    let (kind, text) = writer.refused(writer.request("other", None));
    assert!(
        kind == ErrorKind::Busy && text.contains("a job works"),
        "{text}"
    );
    let busy = writer.bitmap("daily", BitmapAction::Clear).unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy);
    writer.machine.handle.cancel_job(&id).unwrap();
    assert_eq!(writer.end_of(&id).0, JobState::Cancelled);
    assert_eq!(writer.names(), ["disk", "serial"]);
    assert_eq!(writer.marked("daily"), Some(SIZE));
    writer.backed_up("full", None);
    assert!(writer.marked("daily") < Some(SIZE));
    writer.let_go();
    writer.succeeds();
}

#[test]
fn what_cannot_be_backed_up_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let writer = Writer::boot(Format::Raw);
    fs::write(writer.path("there"), b"precious").unwrap();
    let names = writer.names();
    let with = |change: &dyn Fn(&mut VmDiskBackup)| {
        let mut request = writer.request("new", None);
        change(&mut request);
        writer.refused(request)
    };
    let invalid = ErrorKind::Invalid;
    let cases: [(Change<'_>, ErrorKind, &str); 9] = [
        (
            &|it| it.id = "nothing".into(),
            ErrorKind::NotFound,
            "nothing",
        ),
        (&|it| it.path = "new".into(), invalid, "absolute"),
        (
            &|it| it.path = writer.path("disk"),
            ErrorKind::Conflict,
            "disk",
        ),
        (
            &|it| it.path = writer.path("there"),
            ErrorKind::Conflict,
            "there",
        ),
        (&|it| it.path = writer.path("absent/new"), invalid, "absent"),
        (
            &|it| it.base = Some(writer.path("there")),
            invalid,
            "full backup",
        ),
        (&|it| it.incremental = true, ErrorKind::NotFound, "daily"),
        (
            &|it| (it.incremental, it.bitmap) = (true, None),
            invalid,
            "name of the bitmap",
        ),
        (
            &|it| (it.incremental, it.format) = (true, MirrorFormat::Raw),
            invalid,
            "qcow2",
        ),
    ];
    for (change, kind, said) in cases {
        let (found, text) = with(change);
        assert!(found == kind && text.contains(said), "{found:?}: {text}");
    }
    assert_eq!(writer.names(), names);
    assert_eq!(fs::read(writer.path("there")).unwrap(), b"precious");
}

#[test]
fn bitmaps_of_a_running_machine_are_changed_and_what_cannot_be_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let writer = Writer::boot(Format::Raw);
    let names = writer.names();
    for action in [
        BitmapAction::Remove,
        BitmapAction::Clear,
        BitmapAction::Disable,
    ] {
        let error = writer.bitmap("daily", action).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    }
    assert_eq!(writer.bitmap("daily", BitmapAction::Add), Ok(Reply::Done));
    let twice = writer.bitmap("daily", BitmapAction::Add).unwrap_err();
    assert_eq!(twice.kind, ErrorKind::Conflict, "{twice}");
    assert_eq!(
        writer.bitmap("daily", BitmapAction::Disable),
        Ok(Reply::Done)
    );
    let (kind, text) = writer.refused(VmDiskBackup {
        incremental: true,
        ..writer.request("new", None)
    });
    assert!(
        kind == ErrorKind::Conflict && text.contains("disabled"),
        "{text}"
    );
    assert_eq!(
        writer.bitmap("daily", BitmapAction::Enable),
        Ok(Reply::Done)
    );
    assert_eq!(writer.bitmap("daily", BitmapAction::Clear), Ok(Reply::Done));
    assert_eq!(
        writer.bitmap("daily", BitmapAction::Remove),
        Ok(Reply::Done)
    );
    assert_eq!(writer.bitmaps(), []);
    assert_eq!(writer.names(), names);
}

#[test]
fn a_monitor_that_is_killed_leaves_no_backup_by_its_name_and_a_bitmap_that_nobody_trusts() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    make_full(&directory.path().join("disk"));
    let disk = "path={dir}/disk,format=qcow2,id=a,bw_size=256K,bw_refill_time=1000";
    let flags = ["--disk", disk, "--serial", "null"];
    let mut served = Served::start_in(directory, "blk", "verify keep", &flags);
    let marked = |client: &mut Client| {
        let disk = client.disk_bitmaps().unwrap().remove(0);
        disk.bitmaps.into_iter().next()
    };
    let request = json!({ "id": "a", "path": served.path("full"), "bitmap": "daily", "speed": 1 });
    let request: VmDiskBackup = serde_json::from_value::<VmDiskBackup>(request).unwrap();
    let mut client = served.client();
    client.disk_backup(&request).unwrap();
    // It is marked as in use from then on.
    until("the bitmap", || marked(&mut client)?.marked);
    served.vireo.signal("KILL");
    served.vireo.end();
    assert!(!served.path("full").exists());
    served.restart("blk", "verify keep", &flags);
    let mut client = served.client();
    let left = marked(&mut client).unwrap();
    assert!(left.broken && left.marked.is_none(), "{left:?}");
    let since: Value = json!({
        "id": "a", "path": served.path("since"), "bitmap": "daily", "incremental": true,
    });
    let since = serde_json::from_value::<VmDiskBackup>(since).unwrap();
    let refused = client.disk_backup(&since).unwrap_err().to_string();
    assert!(refused.contains("was not saved"), "{refused}");
    let remove = VmDiskBitmap {
        id: "a".to_owned(),
        name: "daily".to_owned(),
        action: BitmapAction::Remove,
        granularity: None,
    };
    client.disk_bitmap(&remove).unwrap();
    assert_eq!(marked(&mut client), None);
}
