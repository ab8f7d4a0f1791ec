//! Disks that come and go while the machine exists.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use api::{Command as Ask, EventKind, EventLog, ExitReason, Reply};
use devices::StopError;
use migration::{DynSnapshot, RestoreError, SaveError, Section};
use serde_json::{Value, json};
use virtio::device::{ActivateError, Activation, Identity, StoppedQueue, VirtioDevice};
use virtio::models::{BuildContext, BuildError, MODELS, Model, find};
use vmm::config::DeviceConfig;
use vmm::machine::driver::Driver;
use vmm::machine::inbox::Message;
use vmm::machine::{Machine, MachineError};
use vmm::opener::Opener;

use crate::support::{LIMIT, Local, built_with, can_run, config, until};

const MIB: u64 = 1 << 20;

/// A guest, its console, and an image to plug in.
struct Case {
    machine: Local,
    serial: PathBuf,
    disk: PathBuf,
    _directory: tempfile::TempDir,
}

fn blk(id: &str, path: &std::path::Path) -> DeviceConfig {
    DeviceConfig {
        kind: "blk".to_owned(),
        id: id.to_owned(),
        address: None,
        config: json!({ "path": path }),
    }
}

impl Case {
    fn boot(guest: &str, cmdline: &str, devices: Value) -> Option<Self> {
        if !can_run() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let serial = directory.path().join("serial");
        let disk = directory.path().join("disk");
        let mut image = b"sixteen letters.".to_vec();
        image.resize(usize::try_from(MIB).unwrap(), 0);
        fs::write(&disk, image).unwrap();
        let more = json!({ "serial": { "file": serial }, "devices": devices });
        Some(Self {
            machine: Local::boot(&config(guest, cmdline, more)),
            serial,
            disk,
            _directory: directory,
        })
    }

    /// Waits for a line of the guest; all that it has said.
    fn says(&self, line: &str) -> String {
        until(line, || {
            let said = fs::read_to_string(&self.serial).unwrap_or_default();
            said.contains(line).then_some(said)
        })
    }

    /// Has the control thread change the machine.
    fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Machine) -> T + Send + 'static,
    ) -> T {
        let (answer, receiver) = mpsc::channel();
        let errand = Box::new(move |driver: &mut Driver| {
            answer.send(work(driver.machine_mut())).unwrap();
        });
        assert!(self.machine.mailbox.send(Message::Errand(errand)));
        receiver.recv_timeout(LIMIT).unwrap()
    }

    fn add(&self, device: DeviceConfig) -> Result<String, String> {
        self.add_of(MODELS, device)
    }

    fn add_of(&self, models: &'static [Model], device: DeviceConfig) -> Result<String, String> {
        let added = self
            .change(move |machine| machine.add_device(&device, models, &Arc::new(Opener::new())));
        added
            .map(|address| address.to_string())
            .map_err(|error| chain(&error))
    }

    fn remove(&self, id: &str) {
        let id = id.to_owned();
        self.change(move |machine| machine.request_removal(&id))
            .unwrap();
    }

    /// The devices that are there, as id, address and whether they are to go.
    fn devices(&self) -> Vec<(String, String, bool)> {
        self.machine.machine(devices)
    }

    /// Waits for the event that tells that the device is there or is gone.
    fn hears(&self, event: &EventKind) {
        while self.machine.next_event() != *event {}
    }

    /// The guest powers itself off.
    fn ends(mut self) -> String {
        let outcome = self.machine.outcome();
        let said = fs::read_to_string(&self.serial).unwrap();
        assert_eq!(outcome.reason, ExitReason::PowerOff, "{said}");
        said
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}

fn devices(machine: &Machine) -> Vec<(String, String, bool)> {
    let of = |item: &vmm::machine::inventory::Item| {
        (
            item.device.id().to_owned(),
            item.address.to_string(),
            item.removing,
        )
    };
    machine.items().iter().map(of).collect()
}

fn added(id: &str, bdf: &str) -> EventKind {
    let (id, bdf) = (id.to_owned(), bdf.to_owned());
    EventKind::DeviceAdded { id, bdf }
}

fn removed(id: &str, bdf: &str) -> EventKind {
    let (id, bdf) = (id.to_owned(), bdf.to_owned());
    EventKind::DeviceRemoved { id, bdf }
}

#[test]
fn a_disk_comes_works_goes_and_comes_again_each_time_in_a_fresh_slot() {
    let devices = json!([{ "kind": "rng" }]);
    let Some(case) = Case::boot("hotplug", "count=3", devices) else {
        return;
    };
    case.says("hotplug=ready up=00000000 down=00000000");
    for slot in ["02", "03", "04"] {
        let bdf = format!("0000:00:{slot}.0");
        // The image is free again: its lock would refuse the second time.
        assert_eq!(case.add(blk("hot", &case.disk)), Ok(bdf.clone()));
        case.hears(&added("hot", &bdf));
        case.says(&format!("up={slot} id=10421af4"));
        case.says(&format!(
            "disk={slot} sectors=2048 status=0 text=sixteen letters."
        ));
        case.says(&format!("wrote={slot} status=0"));
        case.remove("hot");
        case.says(&format!("gone={slot} down=00000000 registers=ffffffff"));
        case.hears(&removed("hot", &bdf));
    }
    let disk = case.disk.clone();
    let bytes = fs::read(disk).unwrap();
    assert_eq!(bytes[512..1024], [0x5a; 512]);
    case.ends();
}

#[test]
fn a_disk_that_its_driver_never_reset_goes_all_the_same() {
    for word in ["busy", "undriven"] {
        let Some(case) = Case::boot("hotplug", word, json!([])) else {
            return;
        };
        case.says("hotplug=ready");
        case.add(blk("hot", &case.disk)).unwrap();
        case.says(if word == "busy" { "wrote=" } else { "up=" });
        case.remove("hot");
        case.hears(&removed("hot", "0000:00:01.0"));
        let said = case.ends();
        assert!(said.contains("gone=01"), "{said}");
    }
}

#[test]
fn a_guest_may_give_up_what_nobody_asked_for() {
    let Some(case) = Case::boot("hotplug", "unasked", json!([])) else {
        return;
    };
    case.says("hotplug=ready");
    case.add(blk("hot", &case.disk)).unwrap();
    case.hears(&removed("hot", "0000:00:01.0"));
    assert!(case.ends().contains("gone=01"));
}

#[test]
fn a_paused_machine_takes_both_and_the_guest_hears_of_them_when_it_goes_on() {
    let Some(case) = Case::boot("hotplug", "", json!([])) else {
        return;
    };
    case.says("hotplug=ready");
    assert_eq!(case.machine.ask(Ask::Pause), Ok(Reply::Done));
    case.add(blk("hot", &case.disk)).unwrap();
    let there = |removing| vec![("hot".to_owned(), "0000:00:01.0".to_owned(), removing)];
    assert_eq!(case.devices(), there(false));
    assert_eq!(case.machine.ask(Ask::Resume), Ok(Reply::Done));
    case.says("wrote=01 status=0");

    assert_eq!(case.machine.ask(Ask::Pause), Ok(Reply::Done));
    case.remove("hot");
    assert_eq!(case.devices(), there(true));
    // What is asked for is part of the machine's state, and survives being put back.
    case.change(|machine| {
        let set = machine.save_units().unwrap();
        machine.restore_units(set).unwrap();
    });
    assert_eq!(case.machine.ask(Ask::Resume), Ok(Reply::Done));
    case.hears(&removed("hot", "0000:00:01.0"));
    assert!(case.ends().contains("gone=01"));
}

#[test]
fn a_request_waits_for_a_guest_that_does_not_listen_yet() {
    let devices = |disk: &std::path::Path| json!([{ "kind": "blk", "config": { "path": disk } }]);
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let Some(case) = Case::boot("hotplug", "irq", devices(file.path())) else {
        return;
    };
    // The interrupt comes while the guest has its pin masked.
    case.says("hotplug=deaf");
    case.remove("_disk0");
    case.hears(&removed("_disk0", "0000:00:01.0"));
    let said = case.ends();
    assert!(said.contains("interrupts=1"), "{said}");
}

#[test]
fn a_reset_takes_out_what_a_deaf_guest_was_asked_for_and_leaves_the_rest() {
    let Some(case) = Case::boot("poke", "spin", json!([{ "kind": "rng" }])) else {
        return;
    };
    case.says("spin=begin");
    case.add(blk("hot", &case.disk)).unwrap();
    case.remove("hot");
    case.remove("hot");
    assert_eq!(case.devices().len(), 2);
    assert_eq!(case.machine.ask(Ask::Reset), Ok(Reply::Done));
    case.hears(&removed("hot", "0000:00:02.0"));
    let rng = ("_rng0".to_owned(), "0000:00:01.0".to_owned(), false);
    assert_eq!(case.devices(), [rng]);
    // The image is free, and the slot is not used again.
    let again = case.add(blk("hot", &case.disk));
    assert_eq!(again, Ok("0000:00:03.0".to_owned()));
    assert_eq!(case.machine.ask(Ask::Reset), Ok(Reply::Done));
    assert_eq!(case.devices().len(), 2, "nobody asked for it");
}

#[test]
fn a_machine_that_has_not_booted_takes_devices_and_gives_them_up_at_once() {
    if !can_run() {
        return;
    }
    let events = EventLog::default();
    let mut machine = built_with(&config("hello", "", json!({})), &events).machine;
    let mut seen = 0;
    let opener = Arc::new(Opener::new());
    let rng = |id: &str| DeviceConfig {
        kind: "rng".to_owned(),
        id: id.to_owned(),
        address: None,
        config: json!({}),
    };
    // Far more often than there are interrupt numbers: 4096, two for each device.
    // Fresh slots first, then the lowest.
    for slot in (1..=31).chain([1; 2100]) {
        let address = machine.add_device(&rng("hot"), MODELS, &opener).unwrap();
        assert_eq!(address.slot(), slot);
        machine.request_removal("hot").unwrap();
        assert_eq!(devices(&machine), []);
        let bdf = address.to_string();
        for expected in [added("hot", &bdf), removed("hot", &bdf)] {
            assert_eq!(events.after(seen, 1)[0].kind, expected);
            seen += 1;
        }
    }
    let gone = machine.request_removal("hot").unwrap_err();
    assert!(matches!(gone, MachineError::NoDevice { id } if id == "hot"));
}

#[test]
fn what_cannot_be_added_leaves_nothing_behind() {
    let devices = json!([{ "kind": "rng" }]);
    let Some(case) = Case::boot("poke", "spin", devices) else {
        return;
    };
    case.says("spin=begin");
    let before = case.devices();
    let disk = || blk("hot", &case.disk);
    let refused = |change: &dyn Fn(&mut DeviceConfig), why: &str| {
        let mut device = disk();
        change(&mut device);
        let error = case.add(device).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert_eq!(case.devices(), before, "{why}");
    };
    for _ in 0..1500 {
        // With more than two interrupts each, 4096 would not last if these kept any.
        refused(&|d| d.address = Some(1), "PCI slot 1 is in use");
    }
    refused(&|d| d.address = Some(32), "there is no PCI slot 32");
    refused(&|d| d.id = "_rng0".to_owned(), "the id is taken");
    refused(&|d| d.id = "pci".to_owned(), "the id is taken");
    refused(&|d| d.kind = "nic".to_owned(), "no kind of device 'nic'");
    refused(&|d| d.config = json!({ "path": "/no/such" }), "/no/such");
    refused(&|d| d.config = json!({ "nonsense": 1 }), "shape");
    // The image was opened by some of those, and is free.
    assert_eq!(case.add(disk()), Ok("0000:00:02.0".to_owned()));
    let told: Vec<_> = case.machine.events().into_iter().map(|e| e.kind).collect();
    let of_devices = told.iter().filter(|kind| {
        matches!(
            kind,
            EventKind::DeviceAdded { .. } | EventKind::DeviceRemoved { .. }
        )
    });
    assert_eq!(of_devices.count(), 1, "{told:?}");
    // All slots taken.
    for number in 3..=31 {
        let mut rng = blk(&format!("r{number}"), &case.disk);
        (rng.kind, rng.config) = ("rng".to_owned(), json!({}));
        assert_eq!(case.add(rng), Ok(format!("0000:00:{number:02x}.0")));
    }
    let full = DeviceConfig {
        kind: "rng".to_owned(),
        id: "full".to_owned(),
        address: None,
        config: json!({}),
    };
    let error = case.add(full).unwrap_err();
    assert!(error.contains("all 31 PCI slots"), "{error}");
}

/// How often the next stops of a [`Stuck`] fail.
static STUCK: AtomicU32 = AtomicU32::new(0);

/// A disk whose back end does not drain when it is told not to.
struct Stuck(Box<dyn VirtioDevice>);

const STUCK_MODELS: &[Model] = &[Model {
    kind: "blk",
    flag: "disk",
    about: "a disk",
    fields: &[],
    build: build_stuck,
}];

fn build_stuck(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let build = find("blk").unwrap().build;
    Ok(Box::new(Stuck(build(config, context)?)))
}

impl DynSnapshot for Stuck {
    fn schema(&self) -> &'static str {
        self.0.schema()
    }

    fn save_section(&self, unit: &str) -> Result<Section, SaveError> {
        self.0.save_section(unit)
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.0.restore_section(section)
    }
}

impl VirtioDevice for Stuck {
    fn identity(&self) -> Identity {
        self.0.identity()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write_config(offset, data);
    }

    fn features_negotiated(&mut self, features: u64) {
        self.0.features_negotiated(features);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let fails = STUCK.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if fails.is_ok() {
            return Err(StopError::Deadline {
                unit: "hot".to_owned(),
                in_flight: 1,
            });
        }
        self.0.stop(deadline)
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[test]
fn a_back_end_that_does_not_drain_keeps_its_device_until_the_next_ejection() {
    let Some(case) = Case::boot("hotplug", "busy", json!([])) else {
        return;
    };
    case.says("hotplug=ready");
    case.add_of(STUCK_MODELS, blk("hot", &case.disk)).unwrap();
    case.says("wrote=01 status=0");
    STUCK.store(1, Ordering::SeqCst);
    case.remove("hot");
    // The device is there still, and so is the wish.
    case.says("kept=01 down=00000002");
    let there = ("hot".to_owned(), "0000:00:01.0".to_owned(), true);
    assert_eq!(case.devices(), [there]);
    case.remove("hot");
    case.hears(&removed("hot", "0000:00:01.0"));
    assert!(case.ends().contains("gone=01"));
}
