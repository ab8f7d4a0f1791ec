//! Devices that another program serves: a real one, killed and started again under the guest.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use api::{Command as Ask, EventKind, ExitReason};
use serde_json::json;
use virtio::models::MODELS;
use vmm::config::DeviceConfig;
use vmm::machine::Machine;
use vmm::machine::driver::Driver;
use vmm::machine::inbox::Message;
use vmm::opener::Opener;

use crate::support::{Local, can_run, config, skip, until};

const PROGRAM: &str = "qemu-storage-daemon";

/// A disk in a program of its own; killed when dropped.
struct Storage(Child);

impl Storage {
    /// One that listens at `socket` in `directory`, beside the image.
    fn start(directory: &Path) -> Option<Self> {
        let [image, socket, pid] = ["image", "socket", "pid"].map(|name| directory.join(name));
        // Written when it listens.
        let _ = fs::remove_file(&pid);
        let child = Command::new(PROGRAM)
            .arg("--blockdev")
            .arg(format!("driver=file,filename={},node-name=f", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,addr.type=unix,addr.path={},node-name=f,writable=on,num-queues=2",
                socket.display()
            ))
            .arg("--pidfile")
            .arg(&pid)
            .stdin(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            skip(&format!("{PROGRAM} is not installed"));
            return None;
        };
        let storage = Self(child);
        until("the storage program", || pid.exists().then_some(()));
        Some(storage)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_disk_outlives_the_program_that_has_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = fs::File::create(directory.path().join("image")).unwrap();
    image.set_len(128 << 20).unwrap();
    if !can_run() {
        return;
    }
    let Some(mut storage) = Storage::start(directory.path()) else {
        return;
    };
    let serial = directory.path().join("serial");
    let more = json!({
        "serial": { "file": serial },
        "devices": [{
            "kind": "vhost-user-blk",
            "config": { "socket": directory.path().join("socket"), "num_queues": 2 },
        }],
    });
    let config = config("blk", "verify keep queues=2", more);
    assert!(config.memory.shared);
    let mut machine = Local::boot(&config);
    let hears = |machine: &Local, wanted: fn(&EventKind) -> bool| {
        while !wanted(&machine.next_event()) {}
    };
    hears(&machine, |event| {
        matches!(event, EventKind::DeviceActivated { .. })
    });
    assert!(machine.machine(|machine| machine.bound_devices().is_empty()));
    for round in 0..4 {
        drop(storage);
        hears(&machine, |event| {
            matches!(event, EventKind::DevicePeerLost { .. })
        });
        // A machine whose disk is away is paused and goes on like others. Otherwise the program's successor has its rings.
        if round % 2 == 1 {
            machine.ask(Ask::Pause).unwrap();
            machine.ask(Ask::Resume).unwrap();
        }
        storage = Storage::start(directory.path()).unwrap();
        hears(&machine, |event| {
            matches!(event, EventKind::DevicePeerConnected { .. })
        });
    }
    let outcome = machine.outcome();
    let said = fs::read_to_string(&serial).unwrap();
    assert_eq!(outcome.reason, ExitReason::PowerOff, "{said}");
    assert!(said.contains("verify=ok errors=0"), "{said}");
}

#[test]
fn a_disk_of_another_programs_comes_and_goes() {
    let directory = tempfile::tempdir().unwrap();
    let image = fs::File::create(directory.path().join("image")).unwrap();
    image.set_len(1 << 20).unwrap();
    if !can_run() {
        return;
    }
    let Some(_storage) = Storage::start(directory.path()) else {
        return;
    };
    let add = DeviceConfig {
        kind: "vhost-user-blk".to_owned(),
        id: "hot".to_owned(),
        address: None,
        config: json!({ "socket": directory.path().join("socket") }),
    };
    let serial = directory.path().join("serial");
    let mut config = config("hotplug", "", json!({ "serial": { "file": serial } }));
    config.memory.shared = true;
    let mut machine = Local::boot(&config);
    let says = |line: &str| {
        until(line, || {
            let said = fs::read_to_string(&serial).unwrap_or_default();
            said.contains(line).then_some(())
        });
    };
    says("hotplug=ready");
    let change = |work: fn(&mut Machine, &DeviceConfig)| {
        let add = add.clone();
        let errand = Box::new(move |driver: &mut Driver| work(driver.machine_mut(), &add));
        assert!(machine.mailbox.send(Message::Errand(errand)));
    };
    change(|machine, device| {
        let opener = Arc::new(Opener::new());
        machine.add_device(device, MODELS, &opener).unwrap();
    });
    says("sectors=2048 status=0");
    says("wrote=01 status=0");
    change(|machine, device| machine.request_removal(&device.id).unwrap());
    says("gone=01");
    let outcome = machine.outcome();
    assert_eq!(outcome.reason, ExitReason::PowerOff);
    let written = fs::read(directory.path().join("image")).unwrap();
    assert_eq!(written[512..1024], [0x5a; 512]);
}
