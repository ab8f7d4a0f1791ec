//! Overlays of disks whose guest is at work.

use std::fs;
use std::path::{Path, PathBuf};

use api::wire::{
    DiskOverlay, DiskSnapshotInfo, ImageType, JobState, MirrorFormat, Quiesce, RateLimiterConfig,
    VmDiskCommit, VmDiskMirror, VmDiskRevert, VmDiskSnapshot, VmDiskStream, VmSnapshotConfig,
    VmUpdateDisk,
};
use api::{AddDevice, Command as Ask, Control, ErrorKind, EventKind, ExitReason, Reply, VmState};
use block::ops::{NewImage, create};
use block::{CreateOptions, Format};
use serde_json::{Value, json};
use vmm::opener::Opener;

use crate::support::{Local, can_run, config, until};

const SIZE: u64 = 4 << 20;

fn overlay(id: &str, path: &Path) -> DiskOverlay {
    DiskOverlay {
        id: id.to_owned(),
        path: path.to_owned(),
    }
}

fn snapshot(disks: Vec<DiskOverlay>, quiesce: Quiesce) -> Ask {
    Ask::DiskSnapshot(VmDiskSnapshot { disks, quiesce })
}

/// A machine whose guest writes to its first disk, slowly until it is let go, and checks what it reads.
struct Writer {
    machine: Local,
    serial: PathBuf,
    directory: tempfile::TempDir,
}

impl Writer {
    fn boot() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::File::create(path("a.img"))
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        let options = CreateOptions {
            size: SIZE,
            ..CreateOptions::default()
        };
        let image = NewImage::Qcow2(Box::new(options));
        create(&path("b.qcow2"), &Opener::new(), &image).unwrap();
        let slow = json!({
            "path": path("a.img"), "bw_size": 128 << 10, "bw_refill_time": 1000,
        });
        let more = json!({
            "devices": [
                { "kind": "blk", "id": "a", "config": slow },
                { "kind": "blk", "id": "b", "config": { "path": path("b.qcow2"), "format": "qcow2" } },
                { "kind": "blk", "id": "c", "config": { "path": path("b.qcow2"), "readonly": true,
                    "format": "raw", "lock": false } },
            ],
            "serial": { "file": path("serial") },
        });
        let machine = Local::boot(&config("blk", "verify keep", more));
        Self {
            machine,
            serial: path("serial"),
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn both(&self, suffix: &str) -> Vec<DiskOverlay> {
        ["a", "b"]
            .map(|id| overlay(id, &self.path(&format!("{id}.{suffix}"))))
            .into()
    }

    fn snapshot(&self, suffix: &str, quiesce: Quiesce) -> DiskSnapshotInfo {
        match self.machine.ask(snapshot(self.both(suffix), quiesce)) {
            Ok(Reply::Overlaid(info)) => info,
            other => panic!("{other:?}"),
        }
    }

    fn refused(&self, disks: Vec<DiskOverlay>, quiesce: Quiesce) -> (ErrorKind, String) {
        let error = self.machine.ask(snapshot(disks, quiesce)).unwrap_err();
        (error.kind, error.to_string())
    }

    /// No limit any more.
    fn let_go(&self) {
        let unlimited = Ask::UpdateDisk(Box::new(VmUpdateDisk {
            id: "a".to_owned(),
            rate_limiter_config: Some(RateLimiterConfig::default()),
            path: None,
        }));
        assert_eq!(self.machine.ask(unlimited), Ok(Reply::Done));
    }

    fn commit(&self, id: &str, top: Option<&str>, base: Option<&str>) -> Result<String, String> {
        let [top, base] = [top, base].map(|name| name.map(|name| self.path(name)));
        let request = VmDiskCommit {
            id: id.to_owned(),
            top,
            base,
            speed: None,
        };
        match self.machine.ask(Ask::DiskCommit(request)) {
            Ok(Reply::Started(job)) => Ok(job.id),
            Err(error) => Err(error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    fn image_of(&self, id: &str) -> (PathBuf, ImageType) {
        let info = self.machine.handle.info().unwrap();
        let disks = info.config.disks.unwrap();
        let disk = disks
            .into_iter()
            .find(|disk| disk.id.as_deref() == Some(id));
        let disk = disk.unwrap();
        (disk.path.unwrap(), disk.image_type)
    }

    /// Waits for the end of a job.
    fn ends_well(&self, id: &str) {
        let end = until("the end of the job", || {
            let jobs = self.machine.handle.jobs();
            let job = jobs.into_iter().find(|job| job.id == id)?;
            let ended = !matches!(job.state, JobState::Running | JobState::Cancelling);
            ended.then_some(job)
        });
        assert_eq!((end.state, end.error), (JobState::Completed, None));
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// The guest's last words.
fn succeeded(machine: &mut Local, serial: &Path) {
    let outcome = machine.outcome();
    let text = fs::read_to_string(serial).unwrap();
    assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
    assert!(text.contains("verify=ok errors=0"), "{text}");
}

/// Takes what lies below the first disk into it, and what lies between the second and its first overlay. The guest works on.
fn shorten_chains(writer: &Writer) {
    let stream = |id: &str, base: Option<PathBuf>| {
        let (id, speed) = (id.to_owned(), None);
        writer.machine.ask(Ask::DiskStream(VmDiskStream {
            id,
            top: None,
            base,
            speed,
        }))
    };
    for (id, base) in [("a", None), ("b", Some(writer.path("b.1")))] {
        let Ok(Reply::Started(job)) = stream(id, base) else {
            panic!("no job for {id}");
        };
        writer.ends_well(&job.id);
    }
    for (id, base, said) in [
        ("a", None, "no backing file"),
        ("b", Some(writer.path("b.1")), "no image between"),
        ("c", None, "not of format qcow2"),
        ("nothing", None, "nothing"),
    ] {
        let refused = stream(id, base).unwrap_err().to_string();
        assert!(refused.contains(said), "{id}: {refused}");
    }
    for name in ["a.img", "a.1", "a.2", "b.2"] {
        fs::remove_file(writer.path(name)).unwrap();
    }
}

#[test]
fn disks_are_switched_together_and_again_while_their_guest_writes() {
    if !can_run() {
        return;
    }
    let mut writer = Writer::boot();
    let first = writer.snapshot("1", Quiesce::Off);
    let layers: Vec<_> = first
        .disks
        .iter()
        .map(|disk| (&*disk.id, disk.path.clone(), disk.backing.clone()))
        .collect();
    let expected = [
        ("a", writer.path("a.1"), writer.path("a.img")),
        ("b", writer.path("b.1"), writer.path("b.qcow2")),
    ];
    assert_eq!(layers, expected);
    assert_eq!((first.frozen, &first.quiesce_error), (None, &None));
    let covered = fs::read(writer.path("a.img")).unwrap();
    // Without an agent it is as after a power cut, and says so.
    let second = writer.snapshot("2", Quiesce::Auto);
    assert!(fs::read(writer.path("a.img")).unwrap() == covered);
    assert!(second.quiesce_error.unwrap().contains("--agent"));

    let info = writer.machine.handle.info().unwrap();
    for (disk, name) in info.config.disks.unwrap().iter().zip(["a.2", "b.2"]) {
        assert_eq!(disk.path, Some(writer.path(name)));
        assert_eq!(
            (disk.image_type, disk.backing_files),
            (ImageType::Qcow2, true)
        );
    }
    assert_eq!(writer.machine.state().0, VmState::Running);
    assert_eq!(writer.machine.ask(Ask::Pause), Ok(Reply::Done));
    let third = writer.snapshot("3", Quiesce::Off);
    assert_eq!(third.stall_us, 0);
    assert_eq!(writer.machine.state().0, VmState::Paused);
    assert_eq!(writer.machine.ask(Ask::Resume), Ok(Reply::Done));

    shorten_chains(&writer);
    writer.let_go();
    succeeded(&mut writer.machine, &writer.serial);
    let told = writer.machine.events();
    let updated = |id: &str| {
        let event = EventKind::DiskUpdated { id: id.to_owned() };
        told.iter().filter(|other| other.kind == event).count()
    };
    assert_eq!((updated("a"), updated("b")), (5, 4));

    // As the description has it now, the next machine finds all that was written.
    let serial = writer.path("serial2");
    let more: Value = json!({
        "devices": [{ "kind": "blk", "config": { "path": writer.path("a.3"), "format": Format::Qcow2 } }],
        "serial": { "file": serial },
    });
    let mut next = Local::boot(&config("blk", "verify keep reread", more));
    succeeded(&mut next, &serial);
}

#[test]
fn what_cannot_be_switched_is_refused_and_no_disk_is_changed() {
    if !can_run() {
        return;
    }
    let writer = Writer::boot();
    let files = writer.files();
    let at = |name: &str| writer.path(name);
    fs::create_dir(at("elsewhere")).unwrap();
    let invalid = ErrorKind::Invalid;
    let second = |id: &str, name: &str| vec![overlay("a", &at("x")), overlay(id, &at(name))];
    for (disks, kind, said) in [
        (vec![], invalid, "at least one"),
        (vec![overlay("a", Path::new("x"))], invalid, "absolute"),
        (second("a", "y"), invalid, "twice"),
        (second("nothing", "y"), ErrorKind::NotFound, "nothing"),
        // The first one has an overlay by the time that the second is refused.
        (second("b", "a.img"), ErrorKind::Conflict, "a.img"),
        (second("b", "elsewhere/y"), invalid, "backing=any"),
        (second("c", "y"), invalid, "read-only"),
        (second("b", "absent/y"), invalid, "absent"),
        (second("b", "serial"), ErrorKind::Conflict, "serial"),
    ] {
        let (found, text) = writer.refused(disks, Quiesce::Off);
        assert!(found == kind && text.contains(said), "{found:?}: {text}");
    }
    let (kind, text) = writer.refused(writer.both("x"), Quiesce::Required);
    assert!(
        kind == ErrorKind::Conflict && text.contains("not frozen"),
        "{text}"
    );
    fs::remove_dir(at("elsewhere")).unwrap();
    assert_eq!(writer.files(), files);
    let info = writer.machine.handle.info().unwrap();
    let first = info.config.disks.unwrap().remove(0);
    assert_eq!(first.path, Some(at("a.img")));
    // None of them is held by what was refused.
    writer.snapshot("1", Quiesce::Off);
}

#[test]
fn images_are_merged_down_while_their_guest_writes_and_a_snapshot_can_be_taken_meanwhile() {
    if !can_run() {
        return;
    }
    let mut writer = Writer::boot();
    for suffix in ["1", "2", "3"] {
        writer.snapshot(suffix, Quiesce::Off);
    }
    // One in the middle, two at the top, and all.
    let middle = writer.commit("a", Some("a.2"), Some("a.1")).unwrap();
    writer.ends_well(&middle);
    assert_eq!(writer.image_of("a"), (writer.path("a.3"), ImageType::Qcow2));
    fs::remove_file(writer.path("a.2")).unwrap();
    let refused = writer.commit("a", None, Some("a.2")).unwrap_err();
    assert!(refused.contains("not in the disk's chain"), "{refused}");
    for (id, name, kind) in [
        ("b", "b.qcow2", ImageType::Qcow2),
        ("a", "a.img", ImageType::Raw),
    ] {
        let job = writer.commit(id, None, Some(name)).unwrap();
        writer.ends_well(&job);
        assert_eq!(writer.image_of(id), (writer.path(name), kind), "{id}");
    }
    // A job that is slow, and the machine's state is written down meanwhile.
    writer.snapshot("4", Quiesce::Off);
    let slow = Ask::DiskStream(VmDiskStream {
        id: "a".to_owned(),
        top: None,
        base: None,
        speed: Some(1),
    });
    let Ok(Reply::Started(job)) = writer.machine.ask(slow) else {
        panic!("no job");
    };
    fs::create_dir(writer.path("saved")).unwrap();
    let destination_url = format!("file://{}", writer.path("saved").display());
    let saving = json!({ "destination_url": destination_url });
    let saving: VmSnapshotConfig = serde_json::from_value(saving).unwrap();
    assert_eq!(writer.machine.ask(Ask::Snapshot(saving)), Ok(Reply::Done));
    assert!(writer.path("saved").read_dir().unwrap().count() > 1);
    writer.machine.handle.cancel_job(&job.id).unwrap();
    until("the end of the job", || {
        let jobs = writer.machine.handle.jobs();
        let state = jobs.into_iter().find(|other| other.id == job.id)?.state;
        (state == JobState::Cancelled).then_some(())
    });
    writer.let_go();
    succeeded(&mut writer.machine, &writer.serial);
    let serial = writer.path("serial2");
    let more: Value = json!({
        "devices": [{ "kind": "blk", "config": { "path": writer.path("a.4"), "format": Format::Qcow2 } }],
        "serial": { "file": serial },
    });
    let mut next = Local::boot(&config("blk", "verify keep reread", more));
    succeeded(&mut next, &serial);
}

#[test]
fn a_disk_is_copied_while_its_guest_writes_and_goes_on_there() {
    if !can_run() {
        return;
    }
    let mut writer = Writer::boot();
    let mirror = |id: &str, name: &str, format, existing, switch| {
        let request = VmDiskMirror {
            id: id.to_owned(),
            path: writer.path(name),
            format,
            existing,
            switch,
            speed: None,
        };
        match writer.machine.ask(Ask::DiskMirror(request)) {
            Ok(Reply::Started(job)) => Ok(job.id),
            Err(error) => Err((error.kind, error.to_string())),
            other => panic!("{other:?}"),
        }
    };
    let (raw, qcow2) = (MirrorFormat::Raw, MirrorFormat::Qcow2);
    for (id, name, existing, kind, said) in [
        ("a", "b.qcow2", false, ErrorKind::Conflict, "b.qcow2"),
        ("a", "b.qcow2", true, ErrorKind::Conflict, "b.qcow2"),
        ("a", "absent/x", false, ErrorKind::Invalid, "absent"),
        ("nothing", "x", false, ErrorKind::NotFound, "nothing"),
    ] {
        let (found, text) = mirror(id, name, raw, existing, false).unwrap_err();
        assert!(found == kind && text.contains(said), "{found:?}: {text}");
    }
    // A copy, and the two places where the disk is then.
    writer.ends_well(&mirror("a", "copy.img", raw, false, false).unwrap());
    assert_eq!(
        writer.image_of("a"),
        (writer.path("a.img"), ImageType::Unknown)
    );
    assert_eq!(fs::metadata(writer.path("copy.img")).unwrap().len(), SIZE);
    writer.ends_well(&mirror("a", "there.qcow2", qcow2, false, true).unwrap());
    assert_eq!(
        writer.image_of("a"),
        (writer.path("there.qcow2"), ImageType::Qcow2)
    );
    fs::remove_file(writer.path("a.img")).unwrap();
    writer.ends_well(&mirror("a", "copy.img", raw, true, true).unwrap());
    assert_eq!(
        writer.image_of("a"),
        (writer.path("copy.img"), ImageType::Raw)
    );
    writer.let_go();
    succeeded(&mut writer.machine, &writer.serial);
    let serial = writer.path("serial2");
    let more: Value = json!({
        "devices": [{ "kind": "blk", "config": { "path": writer.path("copy.img"), "format": Format::Raw } }],
        "serial": { "file": serial },
    });
    let mut next = Local::boot(&config("blk", "verify keep reread", more));
    succeeded(&mut next, &serial);
}

#[test]
fn a_disk_goes_back_and_its_guest_begins_anew() {
    if !can_run() {
        return;
    }
    let mut writer = Writer::boot();
    writer.snapshot("1", Quiesce::Off);
    writer.snapshot("2", Quiesce::Off);
    let Ok(Reply::Layers(chains)) = writer.machine.ask(Ask::DiskLayers) else {
        panic!("no chains");
    };
    let paths = |id: &str| {
        let chain = chains.iter().find(|chain| chain.id == id).unwrap();
        let paths = chain.layers.iter().map(|layer| layer.path.clone());
        paths.collect::<Vec<_>>()
    };
    assert_eq!(
        paths("a"),
        ["a.2", "a.1", "a.img"].map(|name| writer.path(name))
    );
    assert_eq!(paths("b").len(), 3);
    // What an image below holds can be shown to the guest meanwhile.
    let preview = json!({
        "kind": "blk", "id": "p",
        "config": { "path": writer.path("a.1"), "format": "qcow2", "readonly": true },
    });
    let preview = AddDevice::Virtio(serde_json::from_value(preview).unwrap());
    let added = writer.machine.ask(Ask::AddDevice(Box::new(preview)));
    assert!(matches!(added, Ok(Reply::Added(_))), "{added:?}");
    let revert = |id: &str, layer: Option<&str>, reset| {
        writer.machine.ask(Ask::DiskRevert(VmDiskRevert {
            id: id.to_owned(),
            layer: layer.map(|name| writer.path(name)),
            reset,
        }))
    };
    for (id, layer, reset, said) in [
        ("a", None, false, "reset"),
        ("a", Some("a.2"), true, "does not lie below"),
        ("c", None, true, "not of format qcow2"),
        ("nothing", None, true, "nothing"),
    ] {
        let error = revert(id, layer, reset).unwrap_err().to_string();
        assert!(error.contains(said), "{id}: {error}");
    }
    assert_eq!(revert("a", Some("a.img"), true), Ok(Reply::Done));
    assert_eq!(writer.machine.state().0, VmState::Running);
    // The guest begins anew, and ends as it would have.
    writer.let_go();
    succeeded(&mut writer.machine, &writer.serial);
    let told = writer.machine.events();
    assert!(told.iter().any(|event| event.kind == EventKind::Reset));
    fs::remove_file(writer.path("a.1")).unwrap();
    let chain = block::ops::chain(
        &writer.path("a.2"),
        &Opener::new(),
        Format::Qcow2,
        block::BackingPolicy::Directory,
        true,
    );
    assert_eq!(chain.unwrap().len(), 2);
}
