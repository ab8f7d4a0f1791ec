//! The balloon: memory that a guest gives up is the host's.

use std::num::NonZero;

use api::client::ClientError;
use api::wire::{BalloonInfo, MigrationPhase, SendMigrationData, VmMigrationSet, VmResize};
use api::{AddDevice, Command as Ask, Control, ControlError, ErrorKind, EventKind, Reply};
use serde_json::json;

use crate::migrations::{Side, to, unix};
use crate::snapshots::vireo;
use crate::support::{Local, Served, Vireo, can_run, config, guest, until};

const MIB: u64 = 1 << 20;
/// What the guest fills and gives up.
const AREA: u64 = 32 * MIB;
/// What a monitor's memory may change by on its own.
const SLACK: u64 = 4 * MIB;

struct Case {
    served: Served,
}

impl Case {
    fn boot(words: &str, memory: &str, balloon: &str) -> Self {
        let words = format!("mib=32 {words}");
        let serial = "file={dir}/serial";
        let flags = ["--memory", memory, "--balloon", balloon, "--serial", serial];
        let served = Served::start("balloon", &words, &flags);
        Self { served }
    }

    fn hears(&self, what: &str) {
        until(what, || {
            let text = std::fs::read_to_string(self.served.path("serial"));
            let text = text.unwrap_or_default();
            assert!(!text.contains("error="), "{text}");
            text.contains(what).then_some(())
        });
    }

    /// Has the guest give up so many MiB, and waits until it has.
    fn resize(&self, mib: u64) {
        self.try_resize(mib * MIB).unwrap();
        until("the balloon's size", || {
            let info = self.balloon();
            assert_eq!(info.target, mib * MIB);
            (info.actual == mib * MIB).then_some(())
        });
    }

    fn try_resize(&self, size: u64) -> Result<(), ClientError> {
        self.served.client().resize(&VmResize {
            desired_balloon: Some(size),
            ..VmResize::default()
        })
    }

    fn balloon(&self) -> BalloonInfo {
        self.served.client().balloon().unwrap()
    }

    /// What the monitor has of the host's memory, the guest's included, in bytes.
    fn resident(&self) -> u64 {
        let statm = format!("/proc/{}/statm", self.served.vireo.id());
        let statm = std::fs::read_to_string(statm).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// Waits until the monitor has no more than this, in bytes.
    fn shrinks_to(&self, most: u64) {
        until("the host's memory", || {
            (self.resident() <= most).then_some(())
        });
    }

    fn counted(&self, name: &str) -> u64 {
        self.served.client().counters().unwrap()["_balloon0"][name]
    }
}

fn gives_and_takes(words: &str, memory: &str) {
    let case = Case::boot(words, memory, "size=0,deflate_on_oom=on");
    case.hears("actual=0 zero=0");
    let full = case.resident();
    assert!(full >= AREA, "{full}");
    assert_eq!(
        case.served.client().info().unwrap().memory_actual_size,
        64 * MIB
    );

    case.resize(24);
    case.shrinks_to(full - 24 * MIB + SLACK);
    assert_eq!(
        case.served.client().info().unwrap().memory_actual_size,
        40 * MIB
    );
    until("the host's part", || {
        (case.counted("discarded_bytes") == 24 * MIB).then_some(())
    });

    // What was the host's comes back as zeros, and the guest writes it.
    case.resize(4);
    case.hears(&format!("actual=1024 zero={}", 20 * MIB / 4096));
    assert!(case.resident() >= full - 4 * MIB - SLACK);
    assert_eq!(case.counted("deflated_pages"), 20 * MIB / 4096);
    assert_eq!(
        case.counted("ignored_pages") + case.counted("discard_errors"),
        0
    );
}

#[test]
fn memory_that_a_guest_gives_up_is_the_hosts_until_it_comes_back() {
    if can_run() {
        gives_and_takes("", "size=64M");
    }
}

#[test]
fn shared_memory_goes_back_page_by_page_too() {
    if can_run() {
        gives_and_takes("scattered", "size=64M,shared=on");
    }
}

#[test]
fn free_pages_that_a_guest_reports_are_the_hosts() {
    if !can_run() {
        return;
    }
    let case = Case::boot("report", "size=64M", "size=0,free_page_reporting=on");
    case.hears(&format!("reported zero={}", AREA / 4096));
    assert_eq!(case.balloon().reported, AREA);
}

#[test]
fn statistics_are_what_the_guest_said_last_and_reading_asks_for_more() {
    if !can_run() {
        return;
    }
    let case = Case::boot("", "size=64M", "size=0");
    until("the first statistics", || {
        let statistics = case.balloon().statistics?;
        assert_eq!(statistics["total_memory"], AREA);
        assert!(!statistics.contains_key("swap_in"));
        (statistics["free_memory"] == AREA).then_some(())
    });
    case.resize(8);
    until("newer statistics", || {
        let info = case.balloon();
        assert!(info.statistics_age_ms.is_some());
        (info.statistics?["free_memory"] == AREA - 8 * MIB).then_some(())
    });
    assert!(case.counted("statistics_updates") >= 2);
    let metrics = case.served.client().metrics().unwrap();
    let line = format!("vireo_balloon_actual_bytes {}", 8 * MIB);
    assert!(metrics.contains(&line), "{metrics}");
}

#[test]
fn a_target_that_makes_no_sense_is_refused_and_one_stays_over_a_reset() {
    if !can_run() {
        return;
    }
    let case = Case::boot("", "size=64M", "size=4M");
    case.hears("actual=1024 ");
    for size in [64 * MIB, u64::MAX] {
        let refused = case.try_resize(size).unwrap_err().to_string();
        assert!(refused.contains("the guest has 64M"), "{refused}");
    }
    assert_eq!(case.balloon().target, 4 * MIB);
    case.resize(6);
    case.served.client().reset().unwrap();
    until("the balloon after the reset", || {
        (case.counted("inflated_pages") == 2 * 6 * MIB / 4096).then_some(())
    });
    until("its size", || {
        (case.balloon().actual == 6 * MIB).then_some(())
    });
    let info = case.served.client().info().unwrap();
    assert_eq!(info.config.balloon.unwrap().size, 6 * MIB);
}

#[test]
fn an_event_tells_when_the_guest_has_given_up_all_that_it_was_to() {
    if !can_run() {
        return;
    }
    let balloon = json!([{ "kind": "balloon", "config": { "size": 3 * MIB } }]);
    let machine = Local::boot(&config("balloon", "mib=4", json!({ "devices": balloon })));
    let told = |mib: u64| {
        let expected = EventKind::BalloonResized {
            id: "_balloon0".to_owned(),
            actual: mib * MIB,
        };
        until("the event", || {
            let events = machine.events();
            let told = |event: &api::Event| event.kind == expected;
            events.iter().any(told).then_some(())
        });
    };
    told(3);
    assert_eq!(resize(&machine, MIB), Ok(Reply::Done));
    told(1);
}

#[test]
fn a_target_that_is_not_below_the_guests_memory_is_refused_by_request_and_verb() {
    if !can_run() {
        return;
    }
    let case = Case::boot("", "64M", "size=1M");
    until("the machine to run", || case.try_resize(3 * MIB).ok());
    for size in [64 * MIB, 65 * MIB, u64::MAX] {
        let refused = case.try_resize(size).unwrap_err();
        assert_eq!(refused.status(), Some(400), "{size}");
        assert!(refused.to_string().contains("less"), "{refused}");
    }
    let mut verb = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
    verb.args(["resize", "--balloon", "64M", "--api-socket"]);
    let mut verb = Vireo::spawn(verb.arg(case.served.socket()));
    verb.ends_with(1);
    let told = verb.stderr.rest();
    assert!(
        told.contains("--balloon") && told.contains("less"),
        "{told}"
    );
    assert_eq!(case.balloon().target, 3 * MIB);
    let mut verb = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
    verb.args(["resize", "--balloon", "5M", "--api-socket"]);
    Vireo::spawn(verb.arg(case.served.socket())).ends_with(0);
    assert_eq!(case.balloon().target, 5 * MIB);
    let flags = ["--memory", "64M", "--balloon", "size=64M"];
    let mut run = Vireo::start("balloon", "mib=1", &flags);
    run.ends_with(2);
    assert!(run.stderr.rest().contains("--balloon"));
    case.resize(2);
}

/// A guest that tells of free pages when it is asked.
fn telling(dir: &std::path::Path) -> Side {
    let (socket, kernel) = (dir.join("source.sock"), guest("balloon"));
    let mut vireo = vireo(&[
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--cmdline",
        "mib=32 leave",
        "--memory",
        "64M",
        "--balloon",
        "size=0",
        "--serial",
        "tty",
        "--api-socket",
        socket.to_str().unwrap(),
    ]);
    vireo.stdout.wait_for("actual=0 zero=0\n");
    Side { vireo, socket }
}

/// Sends the guest on to a monitor of its own, but not before it has heard that it may use its free pages again, and `told` what they hold.
fn sent_on(dir: &std::path::Path, mut source: Side, name: &str, told: &str) -> Side {
    let url = unix(dir, &format!("{name}.migration"));
    let target = Side::empty(dir, name);
    let waits = target.receive(&url);
    // It never fits into the pause: the guest writes to its stack all the time.
    let endless = SendMigrationData {
        bandwidth: Some(1 << 16),
        downtime_ms: NonZero::new(1),
        throttle: Some(false),
        ..to(&url)
    };
    source.client().send_migration(&endless).unwrap();
    source.vireo.stdout.wait_for(told);
    let free = until("what is left out", || {
        let info = source.client().migration().ok()?;
        (info.free_pages > 0).then_some(info.free_pages)
    });
    assert_eq!(free, AREA / 4096);
    let on = VmMigrationSet {
        bandwidth: Some(0),
        downtime_ms: NonZero::new(20_000),
        ..VmMigrationSet::default()
    };
    source.client().set_migration(&on).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert_eq!(target.ended().phase, MigrationPhase::Completed);
    target
}

#[test]
fn free_pages_that_a_guest_tells_of_stay_behind_unless_it_writes_them() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = telling(dir.path());
    let there = sent_on(dir.path(), source, "one.sock", "hints-done left\n");
    // Of those that were left behind it had written one when it had told of it.
    let zeros = format!("hints-done zero={}\n", AREA / 4096 - 1);
    let there = sent_on(dir.path(), there, "two.sock", &zeros);
    there.vireo.signal("TERM");
}

#[test]
fn a_guest_is_not_asked_for_free_pages_where_they_are_to_go_too() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = telling(dir.path());
    let url = unix(dir.path(), "place");
    let target = Side::empty(dir.path(), "there.sock");
    let waits = target.receive(&url);
    let whole = SendMigrationData {
        free_page_hints: Some(false),
        ..to(&url)
    };
    source.client().send_migration(&whole).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    let heard = source.vireo.stdout.rest();
    assert!(!heard.contains("hints"), "{heard}");
    let info = target.ended();
    assert_eq!(info.phase, MigrationPhase::Completed);
    assert!(info.pages >= (64 * MIB) / 4096, "{info:?}");
    target.vireo.signal("TERM");
}

fn resize(machine: &Local, size: u64) -> Result<Reply, ControlError> {
    machine.ask(Ask::Resize(VmResize {
        desired_balloon: Some(size),
        ..VmResize::default()
    }))
}

#[test]
fn without_a_balloon_nothing_is_asked_for_and_one_that_is_added_works() {
    if !can_run() {
        return;
    }
    let machine = Local::boot(&config("poke", "spin", json!({})));
    let refused = resize(&machine, MIB).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Invalid);
    assert!(
        refused
            .to_string()
            .contains("--balloon: the machine has no"),
        "{refused}"
    );
    let none = machine.handle.balloon().unwrap_err();
    assert_eq!(none.kind, ErrorKind::NotFound);
    let add = |id| {
        let device = json!({ "kind": "balloon", "id": id, "config": { "size": 0 } });
        let device = serde_json::from_value(device).unwrap();
        machine.ask(Ask::AddDevice(Box::new(AddDevice::Virtio(device))))
    };
    assert!(matches!(add("b"), Ok(Reply::Added(_))));
    let second = add("c").unwrap_err();
    assert!(second.to_string().contains("one balloon"), "{second}");
    assert_eq!(resize(&machine, MIB), Ok(Reply::Done));
    assert_eq!(machine.handle.balloon().unwrap().target, MIB);
    let shown = machine.handle.info().unwrap().config.balloon.unwrap();
    assert_eq!((shown.id.as_deref(), shown.size), (Some("b"), MIB));
    // No driver has told of any size.
    let told = |event: &api::Event| matches!(event.kind, EventKind::BalloonResized { .. });
    assert!(!machine.events().iter().any(told));
}
