//! vCPUs and memory that come and go while the machine runs.

use std::sync::mpsc::channel;

use api::wire::VmResize;
use api::{Command as Ask, Control, ControlError, ErrorKind, EventKind, Reply};
use migration::{RestoreError, SectionSet};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use vmm::machine::driver::Driver;
use vmm::machine::inbox::Message;
use vmm::machine::resize::ResizeError;

use crate::support::{LIMIT, Local, built, can_run, config, until};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A machine whose guest tells what comes and goes.
struct Grown {
    machine: Local,
    serial: tempfile::NamedTempFile,
}

impl Grown {
    fn boot(words: &str, cpus: Value, memory: Value) -> Self {
        let serial = tempfile::NamedTempFile::new().unwrap();
        let more = json!({
            "cpus": cpus,
            "memory": memory,
            "serial": { "file": serial.path() },
        });
        let machine = Local::boot(&config("resize", words, more));
        let grown = Self { machine, serial };
        grown.hears(" mib=");
        grown
    }

    fn cpus(words: &str, boot: u16, max: u16) -> Self {
        let cpus = json!({ "boot": boot, "max": max });
        Self::boot(words, cpus, json!({ "size": 64 * MIB }))
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.serial.path()).unwrap()
    }

    /// Waits for the guest to say this.
    fn hears(&self, what: &str) {
        until(what, || self.text().contains(what).then_some(()));
    }

    fn driver<T: Send + 'static>(&self, work: impl FnOnce(&mut Driver) -> T + Send + 'static) -> T {
        let (answer, receiver) = channel();
        let errand = Box::new(move |driver: &mut Driver| answer.send(work(driver)).unwrap());
        assert!(self.machine.mailbox.send(Message::Errand(errand)));
        receiver.recv_timeout(LIMIT).unwrap()
    }

    fn resize_cpus(&self, wanted: u32) -> Result<(), ResizeError> {
        self.driver(move |driver| driver.resize_cpus(wanted))
    }

    fn resize_memory(&self, wanted: u64) -> Result<(), ResizeError> {
        self.driver(move |driver| driver.resize_memory(wanted))
    }

    fn cpu_count(&self) -> u32 {
        self.machine.machine(|machine| machine.cpu_count())
    }

    fn ask(&self, command: Ask) {
        assert_eq!(self.machine.ask(command), Ok(Reply::Done));
    }

    /// Waits until there are so many vCPUs.
    fn settles(&self, count: u32) {
        until("the vCPUs", || (self.cpu_count() == count).then_some(()));
    }

    fn sizes(&self) -> Vec<EventKind> {
        let kinds = self.machine.events().into_iter().map(|event| event.kind);
        kinds
            .into_iter()
            .filter(|kind| {
                matches!(
                    kind,
                    EventKind::CpusResized { .. } | EventKind::MemoryResized { .. }
                )
            })
            .collect()
    }
}

fn resized(count: u32) -> EventKind {
    EventKind::CpusResized { count }
}

#[test]
fn a_vcpu_comes_is_started_leaves_and_comes_again() {
    if !can_run() {
        return;
    }
    let guest = Grown::cpus("", 1, 4);
    guest.hears("boot cpus=1 more=3");
    guest.resize_cpus(3).unwrap();
    assert_eq!(guest.cpu_count(), 3);
    guest.hears("cpu=1 starts=1");
    guest.hears("cpu=2 starts=1");

    // The guest cannot answer while it is paused.
    guest.ask(Ask::Pause);
    guest.resize_cpus(1).unwrap();
    assert_eq!(guest.cpu_count(), 3);
    match guest.resize_cpus(2) {
        Err(ResizeError::RemovalPending { slots }) => assert_eq!(slots, [1, 2]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        guest.resize_cpus(4),
        Err(ResizeError::RemovalPending { .. })
    ));
    guest.ask(Ask::Resume);
    guest.hears("gives=1");
    guest.hears("gives=2");
    guest.settles(1);

    guest.resize_cpus(4).unwrap();
    for text in ["cpu=1 starts=2", "cpu=2 starts=2", "cpu=3 starts=1"] {
        guest.hears(text);
    }
    let expected = [3, 2, 1, 4].map(resized);
    assert_eq!(guest.sizes(), expected);
}

#[test]
fn a_vcpu_that_comes_to_a_paused_machine_waits_for_it_to_go_on() {
    if !can_run() {
        return;
    }
    let guest = Grown::cpus("", 1, 2);
    guest.ask(Ask::Pause);
    guest.resize_cpus(2).unwrap();
    assert_eq!(guest.cpu_count(), 2);
    assert!(!guest.text().contains("cpu=1"));
    guest.ask(Ask::Resume);
    guest.hears("cpu=1 starts=1");
}

#[test]
fn a_guest_may_keep_a_vcpu_and_be_asked_again() {
    if !can_run() {
        return;
    }
    let guest = Grown::cpus("keep", 1, 2);
    guest.resize_cpus(2).unwrap();
    guest.hears("cpu=1 starts=1");
    for times in 1..=3 {
        guest.resize_cpus(1).unwrap();
        until("the answer", || {
            (guest.text().matches("keeps=1").count() == times).then_some(())
        });
        // Its answer comes after its word.
        until("the end of the removal", || {
            let result = guest.resize_cpus(2);
            matches!(result, Ok(())).then_some(())
        });
        assert_eq!(guest.cpu_count(), 2);
    }
}

#[test]
fn a_guest_that_takes_no_notice_can_be_asked_no_more() {
    if !can_run() {
        return;
    }
    let guest = Grown::cpus("deaf", 2, 2 + 1);
    guest.resize_cpus(1).unwrap();
    assert!(guest.resize_cpus(1).is_err());
    guest.resize_cpus(2).unwrap();
    guest.resize_cpus(3).unwrap();
    assert_eq!(guest.cpu_count(), 3);
}

#[test]
fn a_reset_keeps_what_came_and_finishes_what_was_to_go() {
    if !can_run() {
        return;
    }
    let memory = json!({ "size": 64 * MIB, "hotplug_size": GIB });
    let guest = Grown::boot("", json!({ "boot": 2, "max": 5 }), memory.clone());
    guest.hears("boot cpus=2 more=3 mib=64");
    guest.resize_cpus(4).unwrap();
    guest.resize_memory(320 * MIB).unwrap();
    guest.hears("memory=0 at=100000000 mib=256 clear=1");
    guest.ask(Ask::Reset);
    guest.hears("boot cpus=4 more=1 mib=320");
    // Memory is clear again, and its slots are free.
    assert_eq!(guest.machine.word(4 * GIB), 0);
    guest.resize_memory(448 * MIB).unwrap();
    guest.hears("memory=0 at=110000000 mib=128 clear=1");
    assert_eq!(guest.machine.word(4 * GIB + 256 * MIB), 4 * GIB + 256 * MIB);

    let guest = Grown::boot("deaf", json!({ "boot": 3, "max": 4 }), memory);
    guest.hears("boot cpus=3 more=1");
    guest.resize_cpus(1).unwrap();
    guest.ask(Ask::Reset);
    guest.hears("boot cpus=1 more=3");
    assert_eq!(guest.cpu_count(), 1);
    assert_eq!(guest.sizes(), [2, 1].map(resized));
}

#[test]
fn memory_that_comes_is_memory_to_the_guest_and_to_its_devices() {
    if !can_run() {
        return;
    }
    for shared in [false, true] {
        let memory = json!({ "size": 64 * MIB, "hotplug_size": GIB, "shared": shared });
        let guest = Grown::boot("", json!({ "boot": 1 }), memory);
        let inside = 4 * GIB + 128 * MIB;
        let reads = move |at: u64| {
            move |machine: &vmm::machine::Machine| machine.access_memory(at, &mut [0; 8], false)
        };
        assert!(!guest.machine.machine(reads(4 * GIB)));
        guest.resize_memory(192 * MIB).unwrap();
        guest.resize_memory(576 * MIB).unwrap();
        guest.hears("memory=0 at=100000000 mib=128 clear=1");
        guest.hears("memory=1 at=108000000 mib=384 clear=1");
        assert_eq!(guest.machine.word(inside), inside);
        assert!(!guest.machine.machine(reads(4 * GIB + 512 * MIB)));
        guest.resize_memory(576 * MIB).unwrap();
        let grown = |mib| EventKind::MemoryResized { size: mib * MIB };
        assert_eq!(guest.sizes(), [grown(192), grown(576)]);
        let size = guest.machine.machine(|machine| machine.memory_size());
        assert_eq!(size, 576 * MIB);
        for (wanted, part) in [
            (64 * MIB, "not removed"),
            (600 * MIB, "in pieces of 128M (134217728 bytes)"),
            (2 * GIB, "--memory hotplug_size: "),
            (u64::MAX, "--memory hotplug_size: "),
            (0, "not removed"),
        ] {
            let error = guest.resize_memory(wanted).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn memory_is_added_as_often_as_there_are_slots_and_again_after_a_reset() {
    if !can_run() {
        return;
    }
    let memory = json!({ "size": 64 * MIB, "hotplug_size": 5 * GIB });
    let guest = Grown::boot("deaf", json!({ "boot": 1 }), memory);
    let size = |times: u64| (64 + 128 * times) * MIB;
    for times in 1..=32 {
        guest.resize_memory(size(times)).unwrap();
    }
    let refused = guest.resize_memory(size(33));
    assert!(matches!(refused, Err(ResizeError::MemorySlots)));
    guest.ask(Ask::Reset);
    guest.hears("mib=4160");
    guest.resize_memory(size(33)).unwrap();
}

#[test]
fn a_machine_without_room_refuses_by_name_and_has_nothing_for_it() {
    if !can_run() {
        return;
    }
    let guest = Grown::boot("", json!({ "boot": 2 }), json!({ "size": 64 * MIB }));
    guest.hears("boot cpus=2 more=0");
    guest.resize_cpus(2).unwrap();
    for wanted in [0, 1, 3] {
        let error = guest.resize_cpus(wanted).unwrap_err().to_string();
        assert!(error.contains("--cpus max="), "{error}");
    }
    guest.resize_memory(64 * MIB).unwrap();
    let more = guest.resize_memory(192 * MIB).unwrap_err().to_string();
    assert!(more.contains("--memory hotplug_size: "), "{more}");
    guest.ask(Ask::Pause);
    let units = guest.machine.machine(|m| m.save_units().unwrap());
    assert!(
        units
            .sections()
            .iter()
            .all(|s| !s.unit.starts_with("acpi-cpus"))
    );
    assert!(
        units
            .sections()
            .iter()
            .all(|s| !s.unit.starts_with("acpi-memory"))
    );

    let guest = Grown::cpus("", 1, 4);
    for wanted in [0, 5, u32::MAX] {
        let error = guest.resize_cpus(wanted).unwrap_err().to_string();
        assert!(error.contains("1 to 4"), "{error}");
    }
}

#[test]
fn a_command_resizes_and_the_description_follows() {
    if !can_run() {
        return;
    }
    let memory = json!({ "size": 64 * MIB, "hotplug_size": GIB });
    let guest = Grown::boot("", json!({ "boot": 1, "max": 4 }), memory);
    let resize = |desired_vcpus, desired_ram| {
        guest.machine.ask(Ask::Resize(VmResize {
            desired_vcpus,
            desired_ram,
            desired_balloon: None,
        }))
    };
    let kind = |result: Result<Reply, ControlError>| result.unwrap_err().kind;
    assert_eq!(resize(None, None), Ok(Reply::Done));
    assert_eq!(resize(Some(3), Some(320 * MIB)), Ok(Reply::Done));
    guest.hears("cpu=2 starts=1");
    guest.hears("memory=0 ");
    assert_eq!(kind(resize(Some(5), None)), ErrorKind::Invalid);
    assert_eq!(kind(resize(None, Some(64 * MIB))), ErrorKind::Invalid);
    guest.ask(Ask::Pause);
    assert_eq!(resize(Some(2), None), Ok(Reply::Done));
    assert_eq!(kind(resize(Some(1), None)), ErrorKind::Busy);
    let shown = || {
        let info = guest.machine.handle.info().unwrap();
        let (cpus, memory) = (info.config.cpus, info.config.memory);
        (
            cpus.boot_vcpus,
            memory.hotplugged_size,
            info.memory_actual_size,
        )
    };
    assert_eq!(shown(), (2, Some(256 * MIB), 320 * MIB));
    guest.ask(Ask::Resume);
    guest.settles(2);
    // The next machine has it all from the start, and as much room as was left.
    guest.ask(Ask::Reboot);
    guest.hears("boot cpus=2 more=2 mib=320");
    assert_eq!(resize(None, Some(1088 * MIB)), Ok(Reply::Done));
    assert_eq!(kind(resize(None, Some(1216 * MIB))), ErrorKind::Invalid);
    assert_eq!(shown().1, Some(GIB));
    // Without a machine too; and then it can be less again.
    guest.ask(Ask::Shutdown);
    assert_eq!(shown(), (2, Some(GIB), 1088 * MIB));
    assert_eq!(resize(None, Some(128 * MIB)), Ok(Reply::Done));
    assert_eq!(shown(), (2, None, 128 * MIB));
    guest.ask(Ask::Boot);
    guest.hears("boot cpus=2 more=2 mib=128");
    assert_eq!(resize(None, Some(1152 * MIB)), Ok(Reply::Done));
}

#[test]
fn the_state_of_slots_is_for_a_machine_that_has_what_they_hold() {
    if !can_run() {
        return;
    }
    let cpus = |boot: u16| json!({ "boot": boot, "max": 4 });
    let memory = json!({ "size": 64 * MIB, "hotplug_size": GIB });
    let guest = Grown::boot("deaf", cpus(1), memory.clone());
    guest.resize_cpus(3).unwrap();
    guest.ask(Ask::Pause);
    let save = |guest: &Grown| guest.machine.machine(|m| m.save_units().unwrap());
    let grown = save(&guest);
    let twin = |boot| {
        let more = json!({ "cpus": cpus(boot), "memory": memory, "serial": "null" });
        built(&config("resize", "", more)).machine
    };
    let three = twin(3);
    three.restore_units(grown.clone()).unwrap();
    assert_eq!(three.save_units().unwrap(), grown);
    let refused = |result| match result {
        Err(RestoreError::Invalid { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let reason = refused(twin(2).restore_units(grown));
    assert!(
        reason.contains("0, 1, 2, and the machine has 0, 1"),
        "{reason}"
    );
    guest.resize_memory(192 * MIB).unwrap();
    let larger: SectionSet = save(&guest);
    let reason = refused(three.restore_units(larger));
    assert!(reason.contains("no memory here"), "{reason}");
}

#[test]
fn any_sequence_of_sizes_pauses_and_resets_ends_with_the_vcpus_asked_for() {
    if !can_run() {
        return;
    }
    #[derive(Clone, Debug)]
    enum Step {
        Cpus(u32),
        WhilePaused(u32),
        Reset,
    }
    let step = prop_oneof![
        4 => (1u32..=4).prop_map(Step::Cpus),
        2 => (1u32..=4).prop_map(Step::WhilePaused),
        1 => Just(Step::Reset),
    ];
    let mut runner = TestRunner::new(Config {
        cases: 12,
        failure_persistence: None,
        ..Config::default()
    });
    let steps = prop::collection::vec(step, 1..10);
    let result = runner.run(&steps, |steps| {
        let guest = Grown::cpus("", 2, 4);
        let mut boots = 1;
        for step in steps {
            match step {
                Step::Cpus(count) => {
                    guest.resize_cpus(count).unwrap();
                    guest.settles(count);
                }
                Step::WhilePaused(count) => {
                    guest.ask(Ask::Pause);
                    guest.resize_cpus(count).unwrap();
                    guest.ask(Ask::Resume);
                    guest.settles(count);
                }
                Step::Reset => {
                    let count = guest.cpu_count();
                    guest.ask(Ask::Reset);
                    boots += 1;
                    until("the boot", || {
                        (guest.text().matches(" mib=").count() == boots).then_some(())
                    });
                    let text = guest.text();
                    let last = text.rsplit("boot ").next().unwrap();
                    let wanted = format!("cpus={count} more={}", 4 - count);
                    prop_assert!(last.starts_with(&wanted), "{last}");
                }
            }
        }
        Ok(())
    });
    result.unwrap();
}
