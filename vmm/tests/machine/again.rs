//! A machine that is booted right after another has ended finds its files free.

use std::fs;

use api::{Command as Ask, Reply};
use serde_json::json;
use vmm::machine::inventory::Inventory;
use vmm::monitor::MonitorOptions;

use crate::support::{Local, can_run, config};

/// How many devices there are that can go.
fn on_bus(inventory: &Inventory) -> usize {
    let devices = inventory.devices();
    devices.iter().filter(|device| device.bdf.is_some()).count()
}

#[test]
fn a_boot_finds_the_files_free_whoever_still_looks_at_the_machine_before() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let more = json!({
        "devices": [{ "kind": "blk", "id": "disk0", "config": { "path": disk } }],
        "serial": { "file": directory.path().join("serial") },
    });
    let options = MonitorOptions {
        no_shutdown: true,
        ..MonitorOptions::default()
    };
    let machine = Local::boot_in(&config("poke", "spin", more), options);
    // What a reader of the view has while it reads, for as long as the host does not let it go on.
    let mut readers = Vec::new();
    for round in 0..8 {
        readers.push(machine.machine(|machine| machine.inventory()));
        if round % 2 == 0 {
            assert_eq!(machine.ask(Ask::Reboot), Ok(Reply::Done), "{round}");
        } else {
            assert_eq!(machine.ask(Ask::Shutdown), Ok(Reply::Done), "{round}");
            assert_eq!(machine.ask(Ask::Boot), Ok(Reply::Done), "{round}");
        }
    }
    assert!(readers.iter().all(|reader| on_bus(reader) == 1));
}
