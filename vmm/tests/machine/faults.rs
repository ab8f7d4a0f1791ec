//! Whose fault it is that a disk is not what was asked for: the sender's, or somebody's who holds it.

use std::fs;
use std::path::Path;

use api::wire::{DiskConfig, ImageType, VmResizeDisk};
use api::{AddDevice, Command as Ask, ErrorKind, VmState};
use block::{DiskOptions, Format, RawDisk};
use serde_json::json;
use vmm::opener::Opener;

use crate::support::{Local, can_run, config};

const MIB: u64 = 1 << 20;

fn file(path: &Path, size: u64) {
    fs::File::create(path).unwrap().set_len(size).unwrap();
}

#[test]
fn a_wrong_size_or_file_is_refused_as_the_clients_mistake_and_a_disk_in_use_as_a_conflict() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["root", "fixed", "held", "plain"] {
        file(&path(name), MIB);
    }
    file(&path("empty"), 0);
    file(&path("odd"), MIB + 1);
    fs::write(path("qcow2"), [b"QFI\xfb".as_slice(), &[0; 508]].concat()).unwrap();
    let raw = DiskOptions {
        format: Some(Format::Raw),
        ..DiskOptions::default()
    };
    let _held = RawDisk::open(&path("held"), &Opener::new(), &raw).unwrap();
    let more = json!({ "devices": [
        { "kind": "blk", "id": "root", "config": { "path": path("root") } },
        { "kind": "blk", "id": "fixed", "config": { "path": path("fixed"), "readonly": true } },
        { "kind": "rng", "id": "rng" },
    ]});
    let machine = Local::boot(&config("poke", "outs halt", more));
    let resize = |id: &str, desired_size| {
        let id = id.to_owned();
        Ask::ResizeDisk(VmResizeDisk { id, desired_size })
    };
    let add = |name: &str, image_type| {
        let disk = json!({ "path": path(name), "image_type": image_type });
        let disk: DiskConfig = serde_json::from_value(disk).unwrap();
        Ask::AddDevice(Box::new(AddDevice::Disk(disk)))
    };
    for (case, command, kind) in [
        ("smaller", resize("root", MIB / 2), ErrorKind::Invalid),
        ("unaligned", resize("root", MIB + 1), ErrorKind::Invalid),
        ("too large", resize("root", !0 << 9), ErrorKind::Invalid),
        ("read-only", resize("fixed", 2 * MIB), ErrorKind::Invalid),
        ("no disk", resize("rng", 2 * MIB), ErrorKind::Invalid),
        ("unknown", resize("nobody", 2 * MIB), ErrorKind::NotFound),
        (
            "missing",
            add("missing", ImageType::Raw),
            ErrorKind::Invalid,
        ),
        ("directory", add("", ImageType::Raw), ErrorKind::Invalid),
        ("empty", add("empty", ImageType::Raw), ErrorKind::Invalid),
        ("odd", add("odd", ImageType::Raw), ErrorKind::Invalid),
        (
            "damaged",
            add("qcow2", ImageType::Qcow2),
            ErrorKind::Invalid,
        ),
        (
            "no qcow2",
            add("plain", ImageType::Qcow2),
            ErrorKind::Invalid,
        ),
        (
            "unstated",
            add("qcow2", ImageType::Unknown),
            ErrorKind::Invalid,
        ),
        ("held", add("held", ImageType::Raw), ErrorKind::Conflict),
        ("there", add("root", ImageType::Raw), ErrorKind::Conflict),
    ] {
        let error = machine.ask(command).unwrap_err();
        assert_eq!(error.kind, kind, "{case}: {error}");
    }
    assert_eq!(machine.state().0, VmState::Running);
    assert_eq!(fs::metadata(path("root")).unwrap().len(), MIB);
}
