//! Guests that go to another monitor before their memory.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::num::NonZero;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use api::client::Client;
use api::wire::{
    MigrationCompression, MigrationMemoryMode, MigrationPhase, MigrationResolution,
    MigrationTimeoutStrategy, ReceiveMigrationData, SendMigrationData, VmInfoState, VmMigrationSet,
};
use api::{PauseReason, Reason};

use crate::migrations::{Side, Way, free_port, to, unix};
use crate::snapshots::{ask, tell};
use crate::support::{can_run, skip, until};

/// Whether this host has memory come while a guest runs; says so when not.
pub fn can_follow() -> bool {
    if !can_run() {
        return false;
    }
    let able = vmm::memory::missing::check(&vmm::opener::Opener::new());
    if let Err(error) = &able {
        skip(&format!("this host gives no userfaultfd: {error}"));
    }
    able.is_ok()
}

/// What never fits into the pause, so that the guest goes first; slow enough to be seen on its way.
pub fn first(url: &str) -> SendMigrationData {
    SendMigrationData {
        memory_mode: MigrationMemoryMode::Postcopy,
        downtime_ms: NonZero::new(1),
        timeout_strategy: Some(MigrationTimeoutStrategy::Ignore),
        throttle: Some(false),
        bandwidth: Some(8 << 20),
        ..to(url)
    }
}

fn until_phase(side: &Side, phase: MigrationPhase) {
    until(&format!("{phase:?}"), || {
        (Client::connect(&side.socket).ok()?.migration().ok()?.phase == phase).then_some(())
    });
}

/// Between both sides: connections can be ended, and none be made.
struct Gate {
    closed: Arc<AtomicBool>,
    all: Arc<Mutex<Vec<UnixStream>>>,
}

impl Gate {
    fn start(path: PathBuf, there: PathBuf) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let (closed, all) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()));
        let gate = Self {
            closed: Arc::clone(&closed),
            all: Arc::clone(&all),
        };
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let mut all: std::sync::MutexGuard<'_, Vec<UnixStream>> = all.lock().unwrap();
                if closed.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = UnixStream::connect(&there) else {
                    continue;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || forward(from, to));
                }
                all.extend([near, far]);
            }
        });
        gate
    }

    fn close(&self) {
        let mut all = self.all.lock().unwrap();
        self.closed.store(true, Ordering::SeqCst);
        for stream in all.drain(..) {
            // It may have ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }
}

fn forward(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// A guest that has gone first, over a gate that is closed while its memory follows.
fn cut_off(dir: &Path) -> (Side, Side, Gate) {
    let source = Side::counting(dir);
    let target = Side::empty(dir, "t.sock");
    let there = dir.join("there");
    let waits = target.receive(&format!("unix:{}", there.display()));
    let gate = Gate::start(dir.join("gate"), there);
    let url = unix(dir, "gate");
    source.client().send_migration(&first(&url)).unwrap();
    until_phase(&source, MigrationPhase::Postcopy);
    gate.close();
    waits.join().unwrap().unwrap();
    for side in [&source, &target] {
        until_phase(side, MigrationPhase::PostcopyLost);
    }
    (source, target, gate)
}

fn is_paused_for(side: &Side, reason: PauseReason) {
    let info = side.client().info().unwrap();
    assert_eq!(
        (info.state, info.pause),
        (VmInfoState::Paused, Some(reason))
    );
}

#[test]
fn a_guest_goes_before_its_memory_over_each_kind_of_connection() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let mut last = ask(&mut source.vireo, 1);
    let plain = |url: &str| first(url);
    let four = |url: &str| SendMigrationData {
        connections: Some(4),
        compression: MigrationCompression::Zstd,
        ..first(url)
    };
    let deltas = |url: &str| SendMigrationData {
        compression: MigrationCompression::Lz4,
        delta_cache: NonZero::new(16 << 20),
        ..first(url)
    };
    let ways: [(Way<'_>, String); 3] = [
        (&plain, unix(dir.path(), "m")),
        (&four, free_port()),
        (&deltas, free_port()),
    ];
    for (index, (request, url)) in ways.into_iter().enumerate() {
        let mut target = Side::empty(dir.path(), &format!("{index}.sock"));
        let waits = target.receive(&url);
        source.client().send_migration(&request(&url)).unwrap();
        until_phase(&target, MigrationPhase::Postcopy);
        waits.join().unwrap().unwrap();
        // It runs, and is not changed before all of it is here.
        let refused = target.client().pause();
        if let Err(error) = refused {
            assert_eq!(error.reason(), Some(Reason::Migrating), "{error}");
        } else {
            target.client().resume().unwrap();
        }
        source.vireo.ends_with(0);
        let info = target.ended();
        assert_eq!((info.phase, info.error), (MigrationPhase::Completed, None));
        assert_eq!(info.remaining, 0);
        let now = ask(&mut target.vireo, u32::try_from(index).unwrap() + 2);
        assert!(now > last, "{now} {last}");
        last = now;
        source = target;
    }
}

#[test]
fn the_memory_of_shared_memory_follows_too() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting_in(dir.path(), "64M,shared=on");
    let url = unix(dir.path(), "m");
    let mut target = Side::empty(dir.path(), "t.sock");
    let waits = target.receive(&url);
    source.client().send_migration(&first(&url)).unwrap();
    until_phase(&target, MigrationPhase::Postcopy);
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert_eq!(target.ended().phase, MigrationPhase::Completed);
    ask(&mut target.vireo, 1);
}

#[test]
fn a_guest_goes_when_it_is_told_to_and_only_where_that_was_agreed_on() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let url = unix(dir.path(), "m");
    let now = VmMigrationSet {
        postcopy: true,
        bandwidth: Some(0),
        ..VmMigrationSet::default()
    };
    for mode in [MigrationMemoryMode::Precopy, MigrationMemoryMode::Postcopy] {
        let mut target = Side::empty(dir.path(), &format!("{mode:?}.sock"));
        let waits = target.receive(&url);
        let slow = SendMigrationData {
            memory_mode: mode,
            bandwidth: Some(1 << 18),
            ..first(&url)
        };
        source.client().send_migration(&slow).unwrap();
        until_phase(&source, MigrationPhase::Precopy);
        let told = source.client().set_migration(&now);
        if mode == MigrationMemoryMode::Precopy {
            let told = told.unwrap_err().to_string();
            assert!(told.contains("--postcopy"), "{told}");
            source.client().cancel_migration().unwrap();
            source.ended();
            assert!(waits.join().unwrap().is_err());
            continue;
        }
        told.unwrap();
        waits.join().unwrap().unwrap();
        source.vireo.ends_with(0);
        assert_eq!(target.ended().phase, MigrationPhase::Completed);
        ask(&mut target.vireo, 1);
        return;
    }
}

#[test]
fn a_connection_that_is_lost_is_found_again_and_the_guest_goes_on() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut target, gate) = cut_off(dir.path());
    is_paused_for(&target, PauseReason::Migration);
    is_paused_for(&source, PauseReason::InDoubt);
    let told = source.client().migration().unwrap().error.unwrap();
    assert!(told.contains("is lost"), "{told}");
    assert!(source.client().migration().unwrap().downtime_us.is_some());
    let missing = target.client().migration().unwrap().remaining;
    assert!(missing > 0);
    gate.open();
    source.vireo.ends_with(0);
    let info = target.ended();
    assert_eq!((info.phase, info.error), (MigrationPhase::Completed, None));
    ask(&mut target.vireo, 1);
    assert_eq!(target.state(), Some(VmInfoState::Running));
}

#[test]
fn a_connection_that_is_lost_for_good_leaves_a_guest_that_runs_nowhere() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut target, _gate) = cut_off(dir.path());
    let told = source.client().cancel_migration().unwrap_err().to_string();
    assert!(told.contains("runs at the destination"), "{told}");
    let resume = MigrationResolution::Resume;
    let told = source.client().resolve_migration(resume).unwrap_err();
    assert!(told.to_string().contains("--abandon"), "{told}");
    let refused = source.client().resume().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::InDoubt), "{refused}");
    let refused = target.client().resume().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Migrating), "{refused}");
    is_paused_for(&target, PauseReason::Migration);
    is_paused_for(&source, PauseReason::InDoubt);
    // Nothing of what waits for memory goes on.
    target.vireo.signal("TERM");
    target.vireo.ends_with(1);
    let abandon = MigrationResolution::Abandon;
    source.client().resolve_migration(abandon).unwrap();
    source.vireo.ends_with(0);
}

#[test]
fn a_destination_that_is_killed_takes_the_guest_with_it() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut source, target, gate) = cut_off(dir.path());
    target.vireo.signal("KILL");
    drop(target);
    gate.open();
    assert_eq!(source.phase(), MigrationPhase::PostcopyLost);
    is_paused_for(&source, PauseReason::InDoubt);
    // Another monitor at the same place knows nothing of it.
    std::fs::remove_file(dir.path().join("there")).unwrap();
    let other = Side::empty(dir.path(), "o.sock");
    let _waits = other.receive(&format!("unix:{}", dir.path().join("there").display()));
    until("what became of it", || {
        let told = source.client().migration().unwrap().error?;
        told.contains("the guest with it").then_some(())
    });
    is_paused_for(&source, PauseReason::InDoubt);
    let abandon = MigrationResolution::Abandon;
    source.client().resolve_migration(abandon).unwrap();
    source.vireo.ends_with(0);
}

#[test]
fn a_destination_that_cannot_is_told_of_before_memory_moves() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let url = unix(dir.path(), "m");
    let target = Side::empty(dir.path(), "t.sock");
    let request = ReceiveMigrationData {
        overrides: Some(serde_json::from_str("{\"memory\":{\"hugepages\":true}}").unwrap()),
        ..ReceiveMigrationData::default()
    };
    let waits = target.receive_as(&url, request);
    source.client().send_migration(&first(&url)).unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(
        told.contains("post-copy") && told.contains("huge pages"),
        "{told}"
    );
    let info = source.ended();
    let told = info.error.unwrap();
    assert!(
        told.contains("post-copy") && told.contains("huge pages"),
        "{told}"
    );
    assert_eq!(info.pages, 0);
    ask(&mut source.vireo, 1);
}

/// A guest that has gone before nearly all of its memory, which it does not touch.
fn far_ahead(dir: &Path) -> (Side, Side) {
    let mut source = Side::counting(dir);
    // It has written all before it looks at what it is told, and holds then.
    tell(&mut source.vireo, b"ht");
    source.vireo.stdout.wait_for("at=");
    let target = Side::empty(dir, "t.sock");
    let url = unix(dir, "m");
    let waits = target.receive(&url);
    let slow = SendMigrationData {
        bandwidth: Some(1 << 16),
        ..first(&url)
    };
    source.client().send_migration(&slow).unwrap();
    until_phase(&source, MigrationPhase::Precopy);
    let now = VmMigrationSet {
        postcopy: true,
        ..VmMigrationSet::default()
    };
    source.client().set_migration(&now).unwrap();
    waits.join().unwrap().unwrap();
    until_phase(&target, MigrationPhase::Postcopy);
    let info = target.client().migration().unwrap();
    assert!(info.remaining > 8 << 20, "{}", info.remaining);
    (source, target)
}

#[test]
fn a_guest_that_switches_itself_off_before_its_memory_is_there_ends_on_both_sides() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut target) = far_ahead(dir.path());
    tell(&mut target.vireo, b"q");
    source.vireo.ends_with(0);
    target.vireo.ends_with(0);
}

#[test]
fn a_guest_that_resets_before_its_memory_is_there_begins_anew_without_it() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut target) = far_ahead(dir.path());
    tell(&mut target.vireo, b"r");
    target.vireo.stdout.wait_for("pages=4096\n");
    source.vireo.ends_with(0);
    assert_eq!(target.ended().phase, MigrationPhase::Completed);
    ask(&mut target.vireo, 1);
}
