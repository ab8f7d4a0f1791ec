//! What a machine that is to move tells of itself, against what another monitor of this host finds for it.

use std::path::Path;

use api::{Command as Ask, Reply};
use migration::transport::compare::Fact;
use migration::transport::message::Disks;
use migration::transport::protocol::Locks;
use serde_json::json;
use vmm::config::VmConfig;
use vmm::machine::Machine;
use vmm::machine::processors::Processors;
use vmm::migrate::facts::{self, Found, Side};
use vmm::opener::Opener;

use crate::support::{Local, built, can_run, config, until};

/// A machine with one disk of two queues, and what writes to it.
fn machine(disk: &Path, serial: &Path, queues: u32) -> VmConfig {
    let more = json!({
        "devices": [
            { "kind": "blk", "id": "d", "config": { "path": disk, "num_queues": queues } },
            { "kind": "rng", "id": "r" },
        ],
        "serial": { "file": serial },
    });
    config("blk", "bench=write count=1000000000 depth=8 queues=2", more)
}

fn offered(config: &VmConfig, machine: &Machine) -> Vec<Fact> {
    let processors = Ok(machine.processors());
    let images = facts::images(machine);
    let side = Side {
        processors: &processors,
        images: &images,
        disks: Disks::Shared,
    };
    let mut all = facts::facts(config, side);
    all.extend(facts::features_in_use(machine));
    all
}

/// What the other monitor has, and what it sees of locks.
fn here(config: &VmConfig, offered: &[Fact]) -> (Vec<Fact>, Locks) {
    let opener = Opener::new();
    let Found { images, locks } = facts::look(config, &opener, &[]);
    let speed = facts::offered_tsc(offered);
    let processors = Processors::here(config, &opener, speed).map_err(|error| error.to_string());
    let side = Side {
        processors: &processors,
        images: &images,
        disks: Disks::Shared,
    };
    (facts::facts(config, side), locks)
}

#[test]
fn a_machine_that_runs_fits_another_monitor_of_its_host_but_for_what_is_taken_away() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [disk, serial] = ["disk", "serial"].map(|name| dir.path().join(name));
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(4 << 20).unwrap();
    let described = machine(&disk, &serial, 2);
    let running = Local::boot(&described);
    until("work", || {
        let text = std::fs::read_to_string(&serial).unwrap();
        text.contains("bench=begin").then_some(())
    });
    let own = described.clone();
    let offer = running.machine(move |machine| offered(&own, machine));
    let (found, locks) = here(&described, &offer);
    assert_eq!(locks, Locks::Shared);
    let refused = facts::differences(&offer, found);
    assert!(refused.is_empty(), "{}", facts::refuse(&refused));
    let info = facts::offered_disk(&offer, "d").unwrap();
    assert_eq!((info.size, info.read_only), (4 << 20, false));

    // The machine that is built for it, once the disk is free, offers what the guest's drivers use; one with a single queue does not.
    assert_eq!(running.ask(Ask::Pause), Ok(Reply::Done));
    drop(running);
    let lacks = |queues| {
        let other = machine(&disk, Path::new("/dev/null"), queues);
        facts::features_lacking(&offer, &built(&other).machine)
    };
    assert_eq!(lacks(2), []);
    // VIRTIO_BLK_F_MQ.
    assert_eq!(
        lacks(1)[0].to_string(),
        "device.d.features: the destination lacks 12"
    );

    let (found, locks) = here(&machine(&disk, &serial, 1), &offer);
    assert_eq!(locks, Locks::Separate);
    let refused = facts::refuse(&facts::differences(&offer, found));
    assert!(
        refused.contains("device.d.queues: 2 at the source, 1"),
        "{refused}"
    );
    std::fs::remove_file(&disk).unwrap();
    let (found, locks) = here(&described, &offer);
    assert_eq!(locks, Locks::None);
    let refused = facts::refuse(&facts::differences(&offer, found));
    assert!(refused.contains("no such file"), "{refused}");
}
