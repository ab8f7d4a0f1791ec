//! The saved state of all units of a machine.

use std::os::unix::net::UnixListener;
use std::path::Path;

use api::wire::VmResize;
use api::{Command as Ask, Reply};
use migration::{RestoreError, Section, SectionSet};
use serde_json::{Value, json};
use vmm::config::VmConfig;
use vmm::machine::Machine;

use crate::support::{Local, built, can_run, config, until};

fn disk() -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(4 << 20).unwrap();
    disk
}

fn devices(disk: &tempfile::NamedTempFile) -> Value {
    json!([
        { "kind": "blk", "config": { "path": disk.path(), "num_queues": 2, "serial": "s1" } },
        { "kind": "rng" },
    ])
}

/// The state of a machine with every device, paused in the midst of its work.
fn saved(disk: &tempfile::NamedTempFile) -> SectionSet {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let more = json!({
        "devices": devices(disk),
        "serial": { "file": serial },
        "debugcon": { "file": dir.path().join("debug") },
    });
    let cmdline = "bench=write count=1000000000 depth=8 queues=2";
    let machine = Local::boot(&config("blk", cmdline, more));
    until("work", || {
        let text = std::fs::read_to_string(&serial).unwrap();
        text.contains("bench=begin").then_some(())
    });
    assert_eq!(machine.ask(Ask::PowerButton), Ok(Reply::Done));
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
    machine.machine(|machine| machine.save_units().unwrap())
}

/// A configuration whose machine has the same units.
fn twin(disk: &tempfile::NamedTempFile) -> VmConfig {
    let more = json!({
        "devices": devices(disk),
        "serial": "null",
        "debugcon": { "file": "/dev/null" },
    });
    config("blk", "", more)
}

#[test]
fn the_state_of_every_unit_survives_its_bytes() {
    if !can_run() {
        return;
    }
    let disk = disk();
    let set = saved(&disk);
    let units: Vec<_> = set.sections().iter().map(|s| s.unit.as_str()).collect();
    for unit in ["com1", "i8042", "rtc", "pci", "_disk0", "_rng1"] {
        assert!(units.contains(&unit), "{unit} is not among {units:?}");
    }
    let machine = built(&twin(&disk)).machine;
    let fresh = machine.save_units().unwrap();
    assert_ne!(fresh, set, "the first machine has done something");
    let bytes = set.to_bytes();
    let read = SectionSet::from_bytes(&bytes).unwrap();
    machine.restore_units(read).unwrap();
    let again = machine.save_units().unwrap();
    for (before, after) in set.sections().iter().zip(again.sections()) {
        assert_eq!(before, after);
    }
    assert_eq!(again.to_bytes(), bytes);
}

/// A machine with a device of each kind that needs nobody else, and nothing of the host's that its twin has too.
fn full(disk: &tempfile::NamedTempFile, dir: &Path) -> VmConfig {
    let network = dir.join("network");
    let more = json!({
        "devices": [
            { "kind": "blk", "config": { "path": disk.path() } },
            { "kind": "rng" },
            { "kind": "net", "config": { "socket": network, "mac": "52:54:00:00:00:07" } },
            { "kind": "balloon", "config": { "size": 1 << 20, "free_page_reporting": true } },
            { "kind": "vsock", "config": { "cid": 3, "socket": dir.join("vsock") } },
            { "kind": "input", "config": { "type": "tablet" } },
            { "kind": "console", "config": { "ports": "agent" } },
        ],
        "serial": { "file": dir.join("serial") },
        "watchdog": true,
    });
    config("blk", "bench=write count=1000000000 depth=8", more)
}

#[test]
fn a_device_of_each_kind_takes_its_state_over_in_another_machine() {
    if !can_run() {
        return;
    }
    let disk = disk();
    let dir = tempfile::tempdir().unwrap();
    let network = UnixListener::bind(dir.path().join("network")).unwrap();
    let machine = Local::boot(&full(&disk, dir.path()));
    until("work", || {
        let text = std::fs::read_to_string(dir.path().join("serial"));
        text.ok()?.contains("bench=begin").then_some(())
    });
    let larger = VmResize {
        desired_balloon: Some(5 << 20),
        ..VmResize::default()
    };
    machine.ask(Ask::Resize(larger)).unwrap();
    assert_eq!(machine.ask(Ask::Pause), Ok(Reply::Done));
    let set = machine.machine(|machine| machine.save_units().unwrap());
    drop(machine);
    let schemas: Vec<_> = set.sections().iter().map(|s| s.schema.as_str()).collect();
    for kind in ["blk", "rng", "net", "balloon", "vsock", "input", "console"] {
        let schema = format!("virtio-{kind}");
        assert!(schemas.contains(&schema.as_str()), "{schema}: {schemas:?}");
    }
    assert!(schemas.contains(&"i6300esb"), "{schemas:?}");
    drop(network);

    let other = tempfile::tempdir().unwrap();
    let _network = UnixListener::bind(other.path().join("network")).unwrap();
    let machine = built(&full(&disk, other.path())).machine;
    let target = |machine: &Machine| machine.inventory().balloon().unwrap().target();
    assert_eq!(target(&machine), 1 << 20);
    let read = SectionSet::from_bytes(&set.to_bytes()).unwrap();
    machine.restore_units(read).unwrap();
    assert_eq!(target(&machine), 5 << 20);
    let again = machine.save_units().unwrap();
    for (before, after) in set.sections().iter().zip(again.sections()) {
        assert_eq!(before, after);
    }
    assert_eq!(again.to_bytes(), set.to_bytes());
}

#[test]
fn a_machine_with_other_units_refuses_the_state() {
    if !can_run() {
        return;
    }
    let disk = disk();
    let set = saved(&disk);
    let less = json!({
        "devices": [devices(&disk)[0]],
        "serial": "null",
        "debugcon": { "file": "/dev/null" },
    });
    let machine = built(&config("blk", "", less)).machine;
    match machine.restore_units(set.clone()) {
        Err(RestoreError::Unexpected { unit }) => assert_eq!(unit, "_rng1"),
        Err(RestoreError::Invalid { .. }) => (),
        other => panic!("{other:?}"),
    }
    drop(machine);
    let machine = built(&twin(&disk)).machine;
    let mut fewer = SectionSet::default();
    for section in set.sections().iter().filter(|s| s.unit != "_disk0") {
        fewer.push(section.clone());
    }
    assert!(matches!(
        machine.restore_units(fewer),
        Err(RestoreError::Missing { unit, .. }) if unit == "_disk0"
    ));
}

#[test]
fn state_that_was_tampered_with_is_refused_or_taken_and_harms_nobody() {
    if !can_run() {
        return;
    }
    let disk = disk();
    let set = saved(&disk);
    let machine = built(&twin(&disk)).machine;
    let sections = set.sections();
    for (index, section) in sections.iter().enumerate() {
        for at in 0..section.body.len() {
            for flip in [0x01, 0x80, 0xFF] {
                let mut body = section.body.clone();
                body[at] ^= flip;
                let damaged = Section {
                    body,
                    ..section.clone()
                };
                let mut all = SectionSet::default();
                for (n, section) in sections.iter().enumerate() {
                    let section = if n == index { &damaged } else { section };
                    all.push(section.clone());
                }
                // Either answer will do: the value may be a valid other one.
                let _ = machine.restore_units(all);
            }
        }
    }
    machine.restore_units(set.clone()).unwrap();
    assert_eq!(machine.save_units().unwrap(), set);
}
