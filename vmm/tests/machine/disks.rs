//! Disks that fail, fill up, grow and tell.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::wire::{VmResizeDisk, VmUpdateDisk};
use api::{
    Command as Ask, DiskErrorAction, ErrorKind, EventKind, ExitReason, PauseReason, Reply, VmState,
};
use migration::SectionSet;
use serde_json::{Value, json};

use crate::support::{Local, Vireo, can_run, config, run_arguments, skip, until};

const MIB: u64 = 1 << 20;
/// Where files of this process may end: far from all that other tests write.
const FENCE: u64 = 1 << 40;
/// How much of a fenced disk lies on either side.
const SIDE: u64 = 2 * MIB;

/// While it lives, a write past [`FENCE`] fails, as `ulimit -f` makes it fail.
struct Fence(#[expect(dead_code, reason = "held, not used")] MutexGuard<'static, ()>);

impl Fence {
    fn new() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let held = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        limit_files(&FENCE.to_string());
        Self(held)
    }

    fn open() {
        limit_files("unlimited");
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        Self::open();
    }
}

fn limit_files(soft: &str) {
    let status = Command::new("prlimit")
        .arg(format!("--pid={}", std::process::id()))
        .arg(format!("--fsize={soft}:"))
        .status();
    assert!(status.unwrap().success());
}

/// Whether files can be limited to [`FENCE`] and hold more; says so when not.
fn can_fence(disk: &Path) -> bool {
    if Command::new("prlimit").arg("--version").output().is_err() {
        skip("prlimit is not installed");
        return false;
    }
    let file = fs::File::create(disk).unwrap();
    if let Err(error) = file.set_len(FENCE + SIDE) {
        skip(&format!(
            "no file of 1 TiB in {}: {error}",
            disk.parent().unwrap().display()
        ));
        return false;
    }
    true
}

/// A guest that writes to both sides of the fence, and what it says.
struct Fenced {
    machine: Local,
    serial: PathBuf,
    _directory: tempfile::TempDir,
    _fence: Fence,
}

impl Fenced {
    fn boot(more: Value) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        if !can_run() || !can_fence(&disk) {
            return None;
        }
        let serial = directory.path().join("serial");
        let mut blk = json!({ "path": disk, "num_queues": 2 });
        blk.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let more = json!({
            "devices": [{ "kind": "blk", "config": blk }],
            "serial": { "file": serial },
        });
        let cmdline = format!("verify keep queues=2 first={}", (FENCE - SIDE) / 512);
        let fence = Fence::new();
        let machine = Local::boot(&config("blk", &cmdline, more));
        Some(Self {
            machine,
            serial,
            _directory: directory,
            _fence: fence,
        })
    }

    /// Events until the machine is paused, which a disk's error has to be the reason for.
    fn paused(&self) -> Vec<EventKind> {
        let mut events = Vec::new();
        loop {
            let kind = self.machine.next_event();
            if let EventKind::State {
                state: VmState::Paused,
                pause,
            } = kind
            {
                assert_eq!(pause, Some(PauseReason::DiskError));
                return events;
            }
            events.push(kind);
        }
    }

    fn state(&self) -> (VmState, Option<PauseReason>) {
        self.machine.state()
    }

    /// The guest comes to its end, with all of its data right.
    fn succeeds(mut self) {
        let outcome = self.machine.outcome();
        let text = fs::read_to_string(&self.serial).unwrap();
        assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
        assert!(text.contains("verify=ok errors=0"), "{text}");
    }
}

fn stopping(engine: &str) -> Option<Fenced> {
    Fenced::boot(json!({ "werror": "stop", "aio": engine }))
}

#[test]
fn a_failed_write_pauses_the_machine_and_is_done_again_however_often_it_fails() {
    for engine in ["io_uring", "threads"] {
        let Some(fenced) = stopping(engine) else {
            return;
        };
        for round in 0..3 {
            let events = fenced.paused();
            let mut errors = 0;
            for kind in events {
                let EventKind::DiskError {
                    id,
                    operation,
                    offset,
                    reason,
                    no_space,
                    action,
                } = kind
                else {
                    continue;
                };
                assert_eq!((&*id, &*operation, no_space), ("_disk0", "write", false));
                assert!(offset.unwrap() >= FENCE, "{offset:?}");
                assert!(reason.contains("too large"), "{reason}");
                assert_eq!(action, DiskErrorAction::Stop);
                errors += 1;
            }
            assert!(errors > 0, "round {round}");
            let reason = Some(PauseReason::DiskError);
            assert_eq!(fenced.state(), (VmState::Paused, reason));
            if round == 2 {
                Fence::open();
            }
            assert_eq!(fenced.machine.ask(Ask::Resume), Ok(Reply::Done));
        }
        fenced.succeeds();
    }
}

#[test]
fn what_waits_is_in_the_saved_state() {
    let Some(fenced) = stopping("auto") else {
        return;
    };
    fenced.paused();
    let machine = &fenced.machine;
    let bytes = machine.machine(|machine| machine.save_units().unwrap().to_bytes());
    // The units begin anew; all that waits, they have from the saved state.
    machine.machine(move |machine| {
        let set = SectionSet::from_bytes(&bytes).unwrap();
        machine.restore_units(set).unwrap();
    });
    Fence::open();
    assert_eq!(machine.ask(Ask::Resume), Ok(Reply::Done));
    fenced.succeeds();
}

#[test]
fn a_reset_drops_what_waits_and_an_explicit_pause_outlasts_the_disks() {
    let Some(fenced) = stopping("auto") else {
        return;
    };
    fenced.paused();
    let command = (VmState::Paused, Some(PauseReason::Command));
    assert_eq!(fenced.machine.ask(Ask::Pause), Ok(Reply::Done));
    assert_eq!(fenced.state(), command);
    Fence::open();
    assert_eq!(fenced.machine.ask(Ask::Reset), Ok(Reply::Done));
    assert_eq!(fenced.state(), command);
    assert_eq!(fenced.machine.ask(Ask::Resume), Ok(Reply::Done));
    // The guest's second life writes and reads all of it.
    fenced.succeeds();
}

#[test]
fn an_error_that_is_not_for_want_of_room_is_the_guests_by_default() {
    let Some(mut fenced) = Fenced::boot(json!({})) else {
        return;
    };
    let outcome = fenced.machine.outcome();
    let text = fs::read_to_string(&fenced.serial).unwrap();
    assert_eq!(outcome.reason, ExitReason::PowerOff, "{text}");
    assert!(text.contains("verify=bad"), "{text}");
    let mut errors = 0;
    for event in fenced.machine.events().into_iter() {
        if let EventKind::DiskError { action, .. } = event.kind {
            assert_eq!(action, DiskErrorAction::Report);
            errors += 1;
        }
    }
    assert!(errors > 0);
}

/// A shell that starts the monitor in a mount namespace of its own, where
/// `directory` is a file system of 12 MiB that holds an image of a disk of
/// 8 MiB and 8 MiB of something else.
fn on_a_full_file_system(directory: &Path, format: &str, arguments: &[String]) -> Command {
    let script = format!(
        "mount -t tmpfs -o size=12m none '{0}' && \"$1\" image create -q -f {format} '{0}/disk' 8M && \
         head -c 8M /dev/zero > '{0}/filler' && exec \"$@\"",
        directory.display()
    );
    let root = fs::metadata("/proc/self").is_ok_and(|facts| {
        use std::os::unix::fs::MetadataExt;
        facts.uid() == 0
    });
    let mut command = Command::new("unshare");
    if !root {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", &script, "sh"]);
    command.arg(env!("CARGO_BIN_EXE_vireo")).args(arguments);
    command
}

#[test]
fn a_full_file_system_pauses_the_machine_until_there_is_room_and_a_signal_says_so() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let version = ["--version".to_owned()];
    match on_a_full_file_system(directory.path(), "raw", &version).output() {
        Ok(output) if output.status.success() => {}
        _ => return skip("no file system can be mounted here"),
    }
    for format in ["raw", "qcow2"] {
        fills_up_and_goes_on(directory.path(), format);
    }
}

fn fills_up_and_goes_on(directory: &Path, format: &str) {
    let disk = format!("path={},format={format}", directory.join("disk").display());
    let arguments = run_arguments("blk", "verify keep", &["--disk", &disk]);
    let mut vireo = Vireo::spawn(&mut on_a_full_file_system(directory, format, &arguments));
    let said = vireo
        .stderr
        .wait_for(&format!("SIGCONT to process {}", vireo.id()));
    assert!(said.contains("disk _disk0: "), "{said}");
    assert!(said.contains("No space left on device"), "{said}");
    assert!(said.contains("vm.resume"), "{said}");
    let inside = format!("/proc/{}/root{}", vireo.id(), directory.display());
    fs::remove_file(Path::new(&inside).join("filler")).unwrap();
    vireo.signal("CONT");
    let text = vireo.stdout.wait_for("verify=");
    assert!(!text.contains("wrong="), "{text}");
    vireo.stdout.wait_for("verify=ok errors=0");
    vireo.ends_with(0);
}

fn plain(mib: u64, more: Value) -> (tempfile::NamedTempFile, Value) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(mib * MIB).unwrap();
    let mut blk = json!({ "path": file.path() });
    blk.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    (
        file,
        json!([{ "kind": "blk", "config": blk }, { "kind": "rng" }]),
    )
}

#[test]
fn a_running_guest_gets_another_medium_and_is_told() {
    if !can_run() {
        return;
    }
    let (_first, devices) = plain(1, json!({"readonly": true}));
    let (second, _) = plain(3, json!({}));
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    let more = json!({ "devices": devices, "serial": { "file": serial } });
    let mut machine = Local::boot(&config("blk", "grow", more));
    let said = || fs::read_to_string(&serial).unwrap();
    until("the guest's wait", || {
        said().contains("grow=ready").then_some(())
    });
    let update = |id: &str, path: &Path| {
        Ask::UpdateDisk(Box::new(VmUpdateDisk {
            id: id.to_owned(),
            rate_limiter_config: None,
            path: Some(path.to_owned()),
        }))
    };
    for (command, kind) in [
        (update("disk7", second.path()), ErrorKind::NotFound),
        (update("_rng1", second.path()), ErrorKind::Invalid),
        (
            update("_disk0", Path::new("/does/not/exist")),
            ErrorKind::Invalid,
        ),
    ] {
        assert_eq!(machine.ask(command).unwrap_err().kind, kind);
    }
    assert_eq!(
        machine.ask(update("_disk0", second.path())),
        Ok(Reply::Done)
    );
    assert_eq!(machine.outcome().reason, ExitReason::PowerOff);
    assert!(said().contains("grown-to=6144"), "{}", said());
}

#[test]
fn a_running_disk_grows_and_its_guest_is_told() {
    if !can_run() {
        return;
    }
    let (disk, devices) = plain(1, json!({}));
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    let more = json!({ "devices": devices, "serial": { "file": serial } });
    let mut machine = Local::boot(&config("blk", "grow", more));
    let said = || fs::read_to_string(&serial).unwrap();
    until("the guest's wait", || {
        said().contains("grow=ready").then_some(())
    });
    assert!(said().contains("sectors=2048 past-end=1"), "{}", said());
    let resize = |id: &str, desired_size| {
        Ask::ResizeDisk(VmResizeDisk {
            id: id.to_owned(),
            desired_size,
        })
    };
    for (command, why) in [
        (resize("disk7", 2 * MIB), "no device with the id disk7"),
        (resize("_rng1", 2 * MIB), "no disk"),
        (resize("_disk0", MIB / 2), "shrink"),
        (resize("_disk0", MIB + 1), "512"),
    ] {
        match machine.ask(command) {
            Err(error) => {
                assert!(error.to_string().contains(why), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(machine.ask(resize("_disk0", 3 * MIB)), Ok(Reply::Done));
    assert_eq!(machine.outcome().reason, ExitReason::PowerOff);
    let grown = "grown-to=6144 write-last=0 write-past-end=1";
    assert!(said().contains(grown), "{}", said());
    let bytes = fs::read(disk.path()).unwrap();
    assert_eq!(u64::try_from(bytes.len()).unwrap(), 3 * MIB);
    assert!(bytes.ends_with(&[0xa5; 512]));
    let resized = EventKind::DiskResized {
        id: "_disk0".to_owned(),
        size: 3 * MIB,
    };
    assert_eq!(
        machine
            .events()
            .into_iter()
            .filter(|event| event.kind == resized)
            .count(),
        1
    );
}

#[test]
fn a_write_past_the_threshold_is_told_once() {
    if !can_run() {
        return;
    }
    let (_disk, devices) = plain(8, json!({ "write_threshold": 4 * MIB, "num_queues": 2 }));
    let more = json!({ "devices": devices });
    let mut machine = Local::boot(&config("blk", "verify keep queues=2", more));
    assert_eq!(machine.outcome().reason, ExitReason::PowerOff);
    let told: Vec<_> = machine
        .events()
        .into_iter()
        .filter_map(|event| match event.kind {
            EventKind::DiskWriteThreshold {
                id,
                threshold,
                offset,
            } => Some((id, threshold, offset)),
            _ => None,
        })
        .collect();
    let [(id, threshold, offset)] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!((id.as_str(), *threshold), ("_disk0", 4 * MIB));
    assert!(*offset > 4 * MIB, "{offset}");
}
