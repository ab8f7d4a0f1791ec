//! What may take for ever is done beside the control thread.

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use api::wire::{SnapshotMode, VmRemoveDevice, VmResize, VmSnapshotConfig, VmUpdateDisk};
use api::{AddDevice, Answer, Command as Ask, Control, ControlError, ErrorKind, EventKind, Reply};
use devices::StopError;
use migration::{DynSnapshot, RestoreError, SaveError, Section};
use serde_json::{Value, json};
use virtio::device::{
    ActivateError, Activation, Identity, Preparation, Prepared, ReconfigureError, Reconfigured,
    StoppedQueue, VirtioDevice,
};
use virtio::models::{BuildContext, BuildError, Model, blk};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm::machine::inbox::Message;

use crate::support::{LIMIT, Local, can_run, config, skip, until};

/// What holds a device up: who waits there says so, and goes on when told.
struct Gate {
    arrived: Sender<()>,
    opened: Receiver<()>,
}

/// The gates of devices, by their ids.
static GATES: Mutex<BTreeMap<String, Gate>> = Mutex::new(BTreeMap::new());

/// Closes a gate before the device `id`: what arrives there, and what opens it.
fn close(id: &str) -> (Receiver<()>, Sender<()>) {
    let (arrived, arrivals) = channel();
    let (open, opened) = channel();
    let gate = Gate { arrived, opened };
    let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
    gates.insert(id.to_owned(), gate);
    (arrivals, open)
}

/// The gate of `id`, if it is closed. Nobody else comes to it.
fn reach(id: &str) -> Option<Gate> {
    let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
    gates.remove(id)
}

/// Waits before the gate of `id`, if it is closed.
fn pass(id: &str) {
    let gate = reach(id);
    if let Some(Gate { arrived, opened }) = gate {
        arrived.send(()).unwrap();
        // Nobody opens it any more when the test has ended.
        let _ = opened.recv();
    }
}

/// Guest memory that a disk writes when it starts and its gate is closed.
const WRITTEN: GuestAddress = GuestAddress(32 << 20);

/// A disk whose storage answers when its gate is open.
struct Slow {
    id: String,
    disk: Box<dyn VirtioDevice>,
}

const MODELS: &[Model] = &[Model {
    build,
    kind: blk::MODEL.kind,
    flag: blk::MODEL.flag,
    about: blk::MODEL.about,
    fields: blk::MODEL.fields,
}];

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    pass(&format!("{} opens", context.id));
    Ok(Box::new(Slow {
        id: context.id.clone(),
        disk: (blk::MODEL.build)(config, context)?,
    }))
}

impl Drop for Slow {
    fn drop(&mut self) {
        if let Some(gate) = reach(&format!("{} closes", self.id)) {
            let _ = gate.arrived.send(());
        }
    }
}

impl DynSnapshot for Slow {
    fn schema(&self) -> &'static str {
        self.disk.schema()
    }

    fn save_section(&self, unit: &str) -> Result<Section, SaveError> {
        self.disk.save_section(unit)
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.disk.restore_section(section)
    }
}

impl VirtioDevice for Slow {
    fn identity(&self) -> Identity {
        self.disk.identity()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.disk.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.disk.write_config(offset, data);
    }

    fn features_negotiated(&mut self, features: u64) {
        self.disk.features_negotiated(features);
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if reach(&format!("{} starts", self.id)).is_some() {
            let memory = activation.memory.memory();
            let byte = memory.read_obj::<u8>(WRITTEN).unwrap();
            memory.write_obj(byte, WRITTEN).unwrap();
        }
        self.disk.start(activation)
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        pass(&self.id);
        self.disk.stop(deadline)
    }

    fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        let (id, prepare) = (self.id.clone(), self.disk.prepare(patch, context)?);
        Ok(Box::new(move || {
            pass(&id);
            prepare()
        }))
    }

    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        self.disk.reconfigure(prepared)
    }

    fn reset(&mut self) {
        self.disk.reset();
    }
}

/// A machine with one read-only disk of this id, and another medium.
struct Case {
    machine: Local,
    id: String,
    directory: tempfile::TempDir,
}

impl Case {
    /// Adds the second disk under the case's id.
    fn adds_its_disk(&self) {
        let disk = json!({
            "id": self.id,
            "path": self.directory.path().join("second"),
            "readonly": true,
        });
        let disk = AddDevice::Disk(serde_json::from_value(disk).unwrap());
        let added = self.machine.ask(Ask::AddDevice(Box::new(disk)));
        assert!(matches!(added, Ok(Reply::Added(_))), "{added:?}");
    }

    fn boot(id: &str, guest: &str, words: &str) -> Option<Self> {
        if !can_run() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        for name in ["first", "second"] {
            fs::write(directory.path().join(name), vec![0; 1 << 20]).unwrap();
        }
        let path = directory.path().join("first");
        let disk = json!({ "path": path, "readonly": true });
        let more = json!({
            "devices": [{ "kind": "blk", "id": id, "config": disk }],
            "serial": { "file": directory.path().join("serial") },
            "cpus": { "boot": 1, "max": 2 },
        });
        let machine = Local::boot_of(MODELS, &config(guest, words, more));
        let id = id.to_owned();
        Some(Self {
            machine,
            id,
            directory,
        })
    }

    /// Begins a command; its answer.
    fn begin(&self, command: Ask) -> Receiver<Result<Reply, ControlError>> {
        let (sender, receiver) = channel();
        let answer: Answer = Box::new(move |result| {
            let _ = sender.send(result);
        });
        assert!(self.machine.mailbox.send(Message::Command(command, answer)));
        receiver
    }

    fn insert(&self, name: &str) -> Ask {
        Ask::UpdateDisk(Box::new(VmUpdateDisk {
            id: self.id.clone(),
            rate_limiter_config: None,
            path: Some(self.directory.path().join(name)),
        }))
    }

    /// How many devices there are that can go.
    fn on_bus(&self) -> usize {
        let devices = self.machine.handle.devices().unwrap();
        devices.iter().filter(|device| device.bdf.is_some()).count()
    }

    /// Reads and commands that have nothing to do with the disk are answered.
    fn is_responsive(&self) {
        self.machine.handle.info().unwrap();
        self.machine.handle.counters().unwrap();
        let more = VmResize {
            desired_vcpus: Some(1),
            ..VmResize::default()
        };
        assert_eq!(self.machine.ask(Ask::Resize(more)), Ok(Reply::Done));
    }

    fn says(&self, what: &str) {
        let serial = self.directory.path().join("serial");
        let said = || fs::read_to_string(&serial).unwrap_or_default();
        until(what, || said().contains(what).then_some(()));
    }
}

#[test]
fn a_medium_that_takes_for_ever_to_open_holds_nobody_up_and_ends_with_the_machine() {
    let Some(case) = Case::boot("slow-medium", "poke", "spin") else {
        return;
    };
    case.says("spin=begin");
    let (arrivals, open) = close(&case.id);
    let first = case.begin(case.insert("second"));
    arrivals.recv_timeout(LIMIT).unwrap();
    case.is_responsive();
    // The machine can be stopped and go on meanwhile.
    assert_eq!(case.machine.ask(Ask::Pause), Ok(Reply::Done));
    assert_eq!(case.machine.ask(Ask::Resume), Ok(Reply::Done));
    let second = case.machine.ask(case.insert("second")).unwrap_err();
    assert_eq!(second.kind, ErrorKind::Busy, "{second}");
    assert!(first.try_recv().is_err(), "not answered yet");
    open.send(()).unwrap();
    assert_eq!(first.recv_timeout(LIMIT).unwrap(), Ok(Reply::Done));
    let told = EventKind::DiskUpdated {
        id: case.id.clone(),
    };
    while case.machine.next_event() != told {}
    let shown = case.machine.handle.info().unwrap().config;
    let path = shown.disks.unwrap()[0].path.clone();
    assert_eq!(path, Some(case.directory.path().join("second")));
    // One that is never answered does not keep the machine from its end.
    let (arrivals, _open) = close(&case.id);
    let never = case.begin(case.insert("first"));
    arrivals.recv_timeout(LIMIT).unwrap();
    assert_eq!(case.machine.ask(Ask::Quit), Ok(Reply::Done));
    let late = never.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert_eq!(late.kind, ErrorKind::Conflict, "{late}");
}

/// As vhost does. The control thread, which has it start, waits for nothing that it has yet to begin itself.
#[test]
fn a_device_that_writes_memory_when_it_starts_goes_on_during_a_snapshot() {
    let Some(mut case) = Case::boot("boots", "hotplug", "busy") else {
        return;
    };
    case.says("hotplug=ready");
    "writes".clone_into(&mut case.id);
    case.adds_its_disk();
    case.says("wrote=02");
    let (_arrivals, _open) = close("writes starts");
    let path = case.directory.path().join("snapshot");
    let request = VmSnapshotConfig::of(format!("file://{}", path.display()));
    let answer = case.begin(Ask::Snapshot(request)).recv_timeout(LIMIT);
    assert_eq!(answer.unwrap(), Ok(Reply::Done));
    assert!(reach("writes starts").is_none(), "it has started again");
    let job = case.machine.handle.jobs().pop().unwrap();
    let report = job.snapshot.unwrap();
    if let Some(reason) = report.reason {
        assert!(reason.contains("no userfaultfd"), "{reason}");
        return skip(&reason);
    }
    assert_eq!(report.mode, SnapshotMode::Live);
}

#[test]
fn a_disk_that_drains_for_long_when_it_is_ejected_holds_nobody_up() {
    let Some(mut case) = Case::boot("first", "hotplug", "busy") else {
        return;
    };
    case.says("hotplug=ready");
    "slow-eject".clone_into(&mut case.id);
    case.adds_its_disk();
    // The driver does not reset it, so that there is something to stop.
    case.says("wrote=02");
    let (arrivals, open) = close(&case.id);
    let removal = VmRemoveDevice {
        id: case.id.clone(),
    };
    assert_eq!(
        case.machine.ask(Ask::RemoveDevice(removal)),
        Ok(Reply::Done)
    );
    arrivals.recv_timeout(LIMIT).unwrap();
    case.is_responsive();
    let busy = case.machine.ask(case.insert("first")).unwrap_err();
    assert_eq!(busy.kind, ErrorKind::Busy, "{busy}");
    assert_eq!(case.on_bus(), 2);
    open.send(()).unwrap();
    let gone = EventKind::DeviceRemoved {
        id: case.id.clone(),
        bdf: "0000:00:02.0".to_owned(),
    };
    while case.machine.next_event() != gone {}
    case.says("gone=02");
}

#[test]
fn what_a_deaf_guest_was_to_give_up_is_gone_everywhere_after_its_restart_or_end() {
    for (id, last) in [
        ("deaf-reset", Ask::Reset),
        ("deaf-reboot", Ask::Reboot),
        ("deaf-shutdown", Ask::Shutdown),
    ] {
        let Some(case) = Case::boot(id, "poke", "spin") else {
            return;
        };
        case.says("spin=begin");
        let removal = VmRemoveDevice { id: id.to_owned() };
        assert_eq!(
            case.machine.ask(Ask::RemoveDevice(removal)),
            Ok(Reply::Done)
        );
        assert!(case.machine.handle.info().unwrap().config.disks.is_some());
        assert_eq!(case.machine.ask(last), Ok(Reply::Done));
        let gone = |kind: &EventKind| matches!(kind, EventKind::DeviceRemoved { id: gone, .. } if gone == id);
        while !gone(&case.machine.next_event()) {}
        assert_eq!(case.on_bus(), 0, "{id}");
        assert_eq!(
            case.machine.handle.info().unwrap().config.disks,
            None,
            "{id}"
        );
    }
}

#[test]
fn a_disk_that_is_opened_for_a_machine_is_not_the_next_ones() {
    let Some(case) = Case::boot("before", "poke", "spin") else {
        return;
    };
    case.says("spin=begin");
    let disk = json!({
        "id": "late",
        "path": case.directory.path().join("second"),
        "readonly": true,
    });
    let disk = AddDevice::Disk(serde_json::from_value(disk).unwrap());
    let (opens, open) = close("late opens");
    let (closes, _close) = close("late closes");
    let added = case.begin(Ask::AddDevice(Box::new(disk)));
    opens.recv_timeout(LIMIT).unwrap();
    assert_eq!(case.machine.ask(Ask::Reboot), Ok(Reply::Done));
    let ended = added.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert_eq!(ended.kind, ErrorKind::Conflict, "{ended}");
    // The new machine runs by now, and must not take what is opened for the old one.
    open.send(()).unwrap();
    closes.recv_timeout(LIMIT).unwrap();
    case.is_responsive();
    assert_eq!(case.on_bus(), 1);
    let shown = case.machine.handle.info().unwrap().config;
    assert_eq!(shown.disks.unwrap().len(), 1);
}
