//! Records are what the managers of Cloud Hypervisor read.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::net::UnixStream;

use super::*;
use crate::PauseReason;

fn state(state: VmState) -> EventKind {
    EventKind::State { state, pause: None }
}

/// A job that is so far.
fn job(kind: &str, done: u64, state: JobState) -> EventKind {
    EventKind::Job {
        info: JobInfo {
            id: format!("{kind}-1"),
            kind: kind.to_owned(),
            state,
            done,
            total: 10,
            error: None,
            snapshot: None,
            migration: None,
        },
    }
}

/// The words of all records, with their sources.
fn told(kinds: &[EventKind]) -> Vec<String> {
    let mut teller = Teller::new();
    let mut all = Vec::new();
    for kind in kinds {
        let (source, words) = teller.tell(kind);
        all.extend(words.iter().map(|word| format!("{source}:{word}")));
    }
    all
}

#[test]
fn a_record_is_written_as_it_was_captured() {
    let event = Event {
        id: 1,
        at_us: 2_018_404,
        kind: state(VmState::Booting),
    };
    let expected = "{\n  \"timestamp\": {\n    \"secs\": 2,\n    \"nanos\": 18404000\n  },\n  \
                    \"source\": \"vm\",\n  \"event\": \"booting\",\n  \"properties\": null\n}\n\n";
    assert_eq!(Teller::new().records(&event), [expected]);
}

#[test]
fn a_device_that_is_gone_is_told_with_its_address() {
    let event = Event {
        id: 1,
        at_us: 0,
        kind: EventKind::DeviceRemoved {
            id: "d0".to_owned(),
            bdf: "0000:00:05.0".to_owned(),
        },
    };
    let records = Teller::new().records(&event);
    assert_eq!(records.len(), 1);
    let record: serde_json::Value = serde_json::from_str(&records[0]).unwrap();
    assert_eq!(record["event"], "device-removed");
    assert_eq!(
        record["properties"],
        serde_json::json!({"id": "d0", "bdf": "0000:00:05.0"})
    );
}

#[test]
fn a_core_dump_is_told_once_and_other_jobs_are_not() {
    let all = [
        job("other", 0, JobState::Running),
        job("coredump", 0, JobState::Running),
        job("coredump", 5, JobState::Running),
        job("coredump", 10, JobState::Completed),
    ];
    assert_eq!(told(&all), ["vm:coredumping"]);
}

#[test]
fn machines_that_go_and_come_are_told_once_at_each_step() {
    for (end, word) in [
        (JobState::Completed, "vm:migration-finished"),
        (JobState::Failed, "vm:migration-failed"),
        (JobState::Cancelled, "vm:migration-failed"),
    ] {
        let going = [
            job("migration", 0, JobState::Running),
            job("migration", 5, JobState::Running),
            job("migration", 5, JobState::Cancelling),
            job("migration", 5, end),
        ];
        assert_eq!(told(&going), ["vm:migration-started", word]);
    }
    let coming = |done, end| {
        let mut jobs = vec![job("receive", 0, JobState::Running)];
        jobs.extend((1..=done).map(|done| job("receive", done, JobState::Running)));
        jobs.push(job("receive", done, end));
        told(&jobs)
    };
    let [ready, started, finished, failed] = [
        "vm:migration-receive-ready",
        "vm:migration-receive-started",
        "vm:migration-receive-finished",
        "vm:migration-receive-failed",
    ];
    for done in [0, 1, 3] {
        let all = coming(done, JobState::Completed);
        assert_eq!(all, [ready, started, finished], "{done}");
    }
    assert_eq!(coming(0, JobState::Failed), [ready, failed]);
    assert_eq!(coming(2, JobState::Cancelled), [ready, started, failed]);
}

#[test]
fn rounds_of_a_migration_are_told_with_their_number() {
    let event = Event {
        id: 1,
        at_us: 0,
        kind: EventKind::MigrationRound { round: 7 },
    };
    let records = Teller::new().records(&event);
    let [record] = records.as_slice() else {
        panic!("{records:?}");
    };
    let record: serde_json::Value = serde_json::from_str(record).unwrap();
    assert_eq!(record["event"], "migration-memory-iteration");
    assert_eq!(record["properties"], serde_json::json!({ "id": "7" }));
}

#[test]
fn a_life_is_told_from_boot_to_power_off() {
    let pause = |pause| EventKind::State {
        state: VmState::Paused,
        pause: Some(pause),
    };
    let life = [
        EventKind::Created,
        state(VmState::Booting),
        state(VmState::Running),
        pause(PauseReason::Command),
        pause(PauseReason::DiskError),
        state(VmState::Running),
        EventKind::CpusResized { count: 2 },
        EventKind::MemoryResized { size: 1 },
        EventKind::BalloonResized {
            id: "b".to_owned(),
            actual: 1,
        },
        EventKind::GuestPanic,
        state(VmState::ShuttingDown),
        state(VmState::Stopped),
        EventKind::Deleted,
    ];
    assert_eq!(
        told(&life),
        [
            "vm:booting",
            "vm:booted",
            "vm:pausing",
            "vm:paused",
            "vm:resuming",
            "vm:resumed",
            "vm:resizing",
            "vm:resized",
            "vm:resizing",
            "vm:resized",
            "vm:resizing",
            "vm:resized",
            "guest:panic",
            "vm:shutdown",
            "vm:deleted",
        ]
    );
}

#[test]
fn a_machine_that_comes_back_is_not_told_as_shut_down() {
    let boot = [state(VmState::Booting), state(VmState::Running)];
    let again = [
        "vm:booting",
        "vm:booted",
        "vm:rebooting",
        "vm:booting",
        "vm:booted",
        "vm:rebooted",
    ];
    let by_guest = [&boot[..], &[EventKind::GuestReset], &boot].concat();
    assert_eq!(told(&by_guest), again);
    let ends = [
        EventKind::Rebooting,
        state(VmState::ShuttingDown),
        state(VmState::Stopped),
    ];
    let by_command = [&boot[..], &ends, &boot].concat();
    assert_eq!(told(&by_command), again);
    let reset = [&boot[..], &[EventKind::Reset], &boot].concat();
    assert_eq!(told(&reset), again);
    // One that stays paused has come back too: its end is told.
    let paused = || EventKind::State {
        state: VmState::Paused,
        pause: Some(PauseReason::Command),
    };
    let life = [
        paused(),
        EventKind::Reset,
        state(VmState::Booting),
        paused(),
        state(VmState::ShuttingDown),
        state(VmState::Stopped),
    ];
    let all = told(&life);
    assert_eq!(
        all.last().map(String::as_str),
        Some("vm:shutdown"),
        "{all:?}"
    );
}

#[test]
fn what_is_restored_is_told_as_such_and_not_as_booted() {
    let paused = || EventKind::State {
        state: VmState::Paused,
        pause: Some(PauseReason::Command),
    };
    let begun = [
        EventKind::Restoring,
        state(VmState::Booting),
        EventKind::Restored,
    ];
    let stays = [&begun[..], &[paused(), state(VmState::Running)]].concat();
    let resumed = ["vm:restoring", "vm:restored", "vm:resuming", "vm:resumed"];
    assert_eq!(told(&stays), resumed);
    let goes_on = [&begun[..], &[state(VmState::Running), paused()]].concat();
    let paused_later = [&resumed[..], &["vm:pausing", "vm:paused"]].concat();
    assert_eq!(told(&goes_on), paused_later);
    // One that could not be restored is no hindrance to the next boot.
    let failed = [&begun[..2], &[state(VmState::Stopped)]].concat();
    let boot = [state(VmState::Booting), state(VmState::Running)];
    let after = [&failed[..], &boot[..]].concat();
    assert_eq!(told(&after), ["vm:restoring", "vm:booting", "vm:booted"]);
}

#[test]
fn what_drivers_do_with_devices_is_told_with_the_devices_id() {
    let id = || "disk0".to_owned();
    let device = [
        EventKind::DeviceReset { id: id() },
        EventKind::DeviceActivated { id: id() },
    ];
    let expected = ["virtio-device:reset", "virtio-device:activated"];
    assert_eq!(told(&device), expected);
    let [reset, _] = device;
    let event = Event {
        id: 1,
        at_us: 0,
        kind: reset,
    };
    let [record] = &Teller::new().records(&event)[..] else {
        panic!("one record");
    };
    let record: serde_json::Value = serde_json::from_str(record).unwrap();
    assert_eq!(record["properties"], serde_json::json!({ "id": "disk0" }));
}

#[test]
fn a_boot_that_fails_is_not_told_as_a_shutdown() {
    let failed = [state(VmState::Booting), state(VmState::Stopped)];
    assert_eq!(told(&failed), ["vm:booting"]);
}

#[test]
fn a_monitor_writes_everything_from_its_start_to_its_end() {
    let mut file = tempfile::tempfile().unwrap();
    let log = EventLog::default();
    log.publish(state(VmState::Booting));
    let monitor = EventMonitor::start(&log, file.try_clone().unwrap().into()).unwrap();
    log.publish(state(VmState::Running));
    drop(monitor);
    log.publish(state(VmState::Paused));
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    let events: Vec<String> = serde_json::Deserializer::from_str(&text)
        .into_iter::<serde_json::Value>()
        .map(|record| record.unwrap()["event"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(events, ["starting", "booting", "booted", "shutdown"]);
}

#[test]
fn a_reader_that_never_reads_holds_nobody_up_and_its_loss_is_counted() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let log = EventLog::default();
    let monitor = EventMonitor::start(&log, ours.into()).unwrap();
    for count in 0..20_000 {
        log.publish(EventKind::CpusResized { count });
    }
    let shared = Arc::clone(&monitor.shared);
    drop(monitor);
    // Some were written until the socket was full, and the last ones were still tried.
    assert!(shared.lost.load(Ordering::Relaxed) > 0);
    drop(theirs);
}

#[test]
fn a_full_disk_loses_records_and_nothing_else() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let log = EventLog::default();
    let monitor = EventMonitor::start(&log, full.into()).unwrap();
    log.publish(state(VmState::Booting));
    let shared = Arc::clone(&monitor.shared);
    drop(monitor);
    assert_eq!(shared.lost.load(Ordering::Relaxed), 3);
}
