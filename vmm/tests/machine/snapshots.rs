//! Machines that are written into a directory and go on from there, as a guest sees it that counts in its memory.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};

use api::client::Client;
use api::wire::{JobState, RestoreConfig, VmInfoState, VmResize, VmSnapshotConfig};
use api::{Command as Ask, Control, ErrorKind, Reason, VmState};
use serde_json::{Value, json};
use vmm::machine::inbox::Message;

use crate::support::{Local, Served, Vireo, can_run, config, skip, until};

const FLAGS: [&str; 6] = [
    "--cpus",
    "2",
    "--serial",
    "tty",
    "--disk",
    "path={dir}/disk,id=d",
];

/// A machine that counts; its serial port is this test's pipes.
fn counting() -> Served {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let mut machine = Served::start_in(dir, "count", "mib=16", &FLAGS);
    machine.vireo.stdout.wait_for("pages=4096\n");
    machine
}

pub fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

fn save(machine: &Served, path: &Path) -> Result<(), api::client::ClientError> {
    machine.client().snapshot(&VmSnapshotConfig::of(url(path)))
}

pub fn tell(vireo: &mut Vireo, letter: &[u8]) {
    vireo.stdin.as_mut().unwrap().write_all(letter).unwrap();
}

/// How far the guest is, whose memory is as it should be and which has told so `times` times.
pub fn ask(vireo: &mut Vireo, times: u32) -> u64 {
    tell(vireo, b"c");
    let end = format!(" wrong=0 answer={times}\n");
    let text = vireo.stdout.wait_for(&end);
    let (number, _) = text.rsplit_once(&end).unwrap();
    let (_, number) = number.rsplit_once("count=").unwrap();
    number.parse().unwrap()
}

pub fn vireo(arguments: &[&str]) -> Vireo {
    Vireo::spawn(Command::new(env!("CARGO_BIN_EXE_vireo")).args(arguments))
}

fn names(directory: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

fn manifest(directory: &Path) -> Value {
    serde_json::from_slice(&fs::read(directory.join("manifest.json")).unwrap()).unwrap()
}

/// The only file of the snapshot whose name ends so.
pub fn file(directory: &Path, end: &str) -> PathBuf {
    let mut all = names(directory).into_iter();
    let found = all.find(|path| path.to_str().unwrap().ends_with(end));
    found.unwrap()
}

/// A snapshot of a machine that has ended, in a directory that goes with the first.
pub fn snapshot() -> (tempfile::TempDir, PathBuf) {
    let Served { mut vireo, dir } = {
        let mut machine = counting();
        ask(&mut machine.vireo, 1);
        save(&machine, &machine.path("s")).unwrap();
        machine
    };
    tell(&mut vireo, b"q");
    vireo.ends_with(0);
    let path = dir.path().join("s");
    (dir, path)
}

#[test]
fn a_machine_goes_on_from_its_snapshot_where_it_was() {
    if !can_run() {
        return;
    }
    let mut machine = counting();
    let before = ask(&mut machine.vireo, 1);
    let path = machine.path("deep/s");
    save(&machine, &path).unwrap();
    let files = names(&path);
    assert_eq!(files.len(), 3, "{files:?}");
    for name in &files {
        let mode = fs::metadata(name).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name:?}");
    }
    // The first goes on, too.
    let after = ask(&mut machine.vireo, 2);
    assert!(after > before);
    tell(&mut machine.vireo, b"q");
    machine.vireo.ends_with(0);

    let mut again = vireo(&["run", "--restore", path.to_str().unwrap()]);
    let restored = ask(&mut again, 2);
    assert!(restored > before, "{restored} {before}");
    tell(&mut again, b"q");
    again.ends_with(0);
}

#[test]
fn clients_of_v1_save_a_paused_machine_and_restore_it_paused() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let socket = dir.path().join("other.sock");
    let mut other = vireo(&["serve", "--api-socket", socket.to_str().unwrap()]);
    let mut client = until("the socket", || Client::connect(&socket).ok());
    let request = RestoreConfig::of(url(&path));
    client.restore(&request, &[]).unwrap();
    assert_eq!(client.info().unwrap().state, VmInfoState::Paused);
    let refused = client.restore(&request, &[]).unwrap_err();
    assert!(refused.to_string().contains("already created"), "{refused}");
    // It is saved again as it is.
    let second = dir.path().join("t");
    client
        .snapshot(&VmSnapshotConfig::of(url(&second)))
        .unwrap();
    assert_eq!(client.info().unwrap().state, VmInfoState::Paused);
    assert_ne!(manifest(&path)["id"], manifest(&second)["id"]);
    client.resume().unwrap();
    ask(&mut other, 2);
    client.delete().unwrap();
    assert!(client.info().is_err(), "nothing is left");
}

/// What a client hears of a snapshot that it restores, and that there is no machine then.
fn refused(directory: &Path) -> String {
    let socket = directory.join("refused.sock");
    let mut other = vireo(&["serve", "--api-socket", socket.to_str().unwrap()]);
    let mut client = until("the socket", || Client::connect(&socket).ok());
    let request = RestoreConfig::of(url(&directory.join("s")));
    let told = client.restore(&request, &[]).unwrap_err().to_string();
    let info = client.info().unwrap_err();
    assert_eq!(info.reason(), Some(Reason::NotCreated), "{info}");
    other.signal("TERM");
    other.ends_with(0);
    told
}

/// Changes a byte in the middle of a file, puts it back afterwards, and tells what was heard in between.
fn altered(directory: &Path, path: &Path) -> String {
    let before = fs::read(path).unwrap();
    let mut after = before.clone();
    let data = after.iter().position(|byte| *byte != 0).unwrap();
    let middle = data + (after.len() - data).min(4000) / 2;
    after[middle] ^= 0x40;
    fs::write(path, after).unwrap();
    let told = refused(directory);
    fs::write(path, before).unwrap();
    told
}

#[test]
fn a_snapshot_that_is_not_whole_is_refused_by_name_and_nothing_is_left() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let here = dir.path();
    let (memory, state) = (file(&path, ".memory"), file(&path, ".state"));
    let manifest = path.join("manifest.json");
    for (file, words) in [
        (&memory, "the memory at"),
        (&state, "is damaged: its checksum"),
    ] {
        let told = altered(here, file);
        assert!(
            told.contains(words) && told.contains(file.to_str().unwrap()),
            "{told}"
        );
    }
    for file in [&memory, &state] {
        let before = fs::read(file).unwrap();
        fs::write(file, &before[..before.len() - 1]).unwrap();
        let told = refused(here);
        assert!(told.contains("the snapshot is damaged"), "{told}");
        fs::remove_file(file).unwrap();
        let told = refused(here);
        assert!(told.contains(file.to_str().unwrap()), "{told}");
        fs::write(file, before).unwrap();
    }
    let text = fs::read_to_string(&manifest).unwrap();
    for (found, replaced, words) in [
        ("\"0.2\"", "\"0.1\"", "format 0.1"),
        ("vireo-dev", "vireo-9", "machine type vireo-9"),
        (
            "\"size\": 67108864",
            "\"size\": 33554432",
            "it claims 32 chunks of a range of memory, and there are 16",
        ),
        ("\"boot\": 2", "\"boot\": 1", "2 of them; the machine has 1"),
        ("\"boot\": 2", "\"boot\": 0", "config"),
        (
            "\"memory\": {\n    \"file\"",
            "\"parent\": {\"id\": \"00000000000000000000000000000000\", \"directory\": \"../../a\", \"checksum\": \"00000000\"},\n  \"memory\": {\n    \"file\"",
            "\"../../a\" is no place of a parent",
        ),
        ("\"id\": \"d\"", "\"id\": \"e\"", "section for e"),
        (
            ".memory\"",
            ".memory/../x\"",
            "not the name of a file beside",
        ),
    ] {
        assert!(text.contains(found), "{found}");
        fs::write(&manifest, text.replacen(found, replaced, 1)).unwrap();
        let told = refused(here);
        assert!(told.contains(words), "{told}");
    }
    fs::remove_file(&manifest).unwrap();
    let told = refused(here);
    assert!(told.contains("holds no snapshot"), "{told}");
}

#[test]
fn two_machines_never_write_one_disk_and_a_directory_holds_one_snapshot() {
    if !can_run() {
        return;
    }
    let mut machine = counting();
    ask(&mut machine.vireo, 1);
    let path = machine.path("s");
    save(&machine, &path).unwrap();
    let mut second = vireo(&["run", "--restore", path.to_str().unwrap()]);
    second.ends_with(1);
    let told = second.stderr.rest();
    assert!(told.contains("/disk"), "{told}");
    let before = names(&path);
    let twice = save(&machine, &path).unwrap_err().to_string();
    assert!(twice.contains("holds a snapshot already"), "{twice}");
    assert_eq!(names(&path), before);
    let relative = VmSnapshotConfig::of("file://s".to_owned());
    let told = machine.client().snapshot(&relative).unwrap_err();
    assert_eq!(told.status(), Some(400), "{told}");
    // It still runs.
    ask(&mut machine.vireo, 2);
    // With another disk in the place of the first, both do.
    let other = machine.path("other");
    File::create(&other).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("path={},id=d", other.display());
    let place = format!("source_url=file://{},resume=off", path.display());
    let socket = machine.path("second.sock");
    let mut second = vireo(&[
        "run",
        "--restore",
        &place,
        "--disk",
        &disk,
        "--api-socket",
        socket.to_str().unwrap(),
    ]);
    let mut client = until("the machine", || {
        let mut client = Client::connect(&socket).ok()?;
        (client.info().ok()?.state == VmInfoState::Paused).then_some(client)
    });
    client.resume().unwrap();
    ask(&mut second, 2);
    ask(&mut machine.vireo, 3);
}

#[test]
fn a_restored_machine_that_stays_paused_is_detached_from_and_flags_that_change_it_are_named() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let here = path.to_str().unwrap();
    let copy = format!("path={}/copy,id=d,addr=9", dir.path().display());
    for (flags, words) in [
        (
            &["--memory", "128M"][..],
            "--memory: a machine that is restored keeps",
        ),
        (&["--cpus", "4"], "--cpus: a machine that is restored keeps"),
        (
            &["--rng"],
            "--rng: the snapshot has no such device, but d: give id=",
        ),
        (
            &["--disk", &copy],
            "--disk (id \"d\"): addr=9: the snapshot",
        ),
    ] {
        let all = [&["run", "--restore", here], flags].concat();
        let mut refused = vireo(&all);
        refused.ends_with(2);
        let told = refused.stderr.rest();
        assert!(told.contains(words), "{told}");
    }
    for (keys, words) in [
        (",resume=maybe", "resume"),
        (",resum=on", "vireo: --restore: unknown key 'resum'"),
        (",resume=off", "--name"),
    ] {
        let mut refused = vireo(&["run", "--restore", &format!("{here}{keys}")]);
        refused.ends_with(2);
        let told = refused.stderr.rest();
        assert!(told.contains(words), "{told}");
    }
    let socket = dir.path().join("detached.sock");
    let place = format!("{here},resume=off");
    let mut begun = vireo(&[
        "run",
        "--restore",
        &place,
        "--detach",
        "--api-socket",
        socket.to_str().unwrap(),
    ]);
    begun.ends_with(0);
    let mut client = Client::connect(&socket).unwrap();
    assert_eq!(client.info().unwrap().state, VmInfoState::Paused);
    client.quit().unwrap();
}

#[test]
fn what_a_snapshot_cannot_hold_yet_is_told_and_the_machine_goes_on() {
    if !can_run() {
        return;
    }
    let machine = Served::start(
        "resize",
        "",
        &["--cpus", "boot=1,max=2", "--serial", "null"],
    );
    let mut client = machine.client();
    client
        .resize(&VmResize {
            desired_vcpus: Some(2),
            ..VmResize::default()
        })
        .unwrap();
    let told = save(&machine, &machine.path("s")).unwrap_err();
    assert_eq!(told.status(), Some(501), "{told}");
    assert!(told.to_string().contains("vCPUs"), "{told}");
    assert_eq!(client.info().unwrap().state, VmInfoState::Running);
    assert!(!machine.path("s").exists());
}

/// A machine that tells of 16 MiB as free when it is asked, which hold something; its memory is 64 MiB.
fn hinting(words: &str) -> Served {
    let flags = ["--serial", "tty", "--balloon", "size=0"];
    let mut machine = Served::start("balloon", words, &flags);
    machine.vireo.stdout.wait_for("actual=0 zero=0\n");
    machine
}

/// What was said of a snapshot that leaves free pages out; `None` where the host has no userfaultfd.
fn leaves_out(machine: &Served, name: &str) -> Option<Value> {
    let report = create(machine, name, &["--skip-free-pages"]);
    if let Some(reason) = report["reason"].as_str() {
        assert!(reason.contains("no userfaultfd"), "{reason}");
        assert_eq!(report["free_pages"], 0, "{report}");
        skip(reason);
        return None;
    }
    Some(report)
}

/// The guest writes one of the pages that it has told of: it comes back, with the 2 MiB about it.
#[test]
fn free_pages_are_left_out_of_a_snapshot_but_for_what_was_written_since() {
    if !can_run() {
        return;
    }
    let mut machine = hinting("");
    let Some(report) = leaves_out(&machine, "s") else {
        return;
    };
    let free = 4096 - 512;
    assert_eq!(report["free_pages"], free, "{report}");
    assert!(report.get("free_pages_reason").is_none(), "{report}");
    assert!(report["bytes"].as_u64().unwrap() < 4 << 20, "{report}");
    // To the guest that goes on nothing has happened.
    machine.vireo.stdout.wait_for("hinted round=2\n");
    machine.vireo.stdout.wait_for("hints-done zero=0\n");
    let path = machine.path("s");
    let mut ends = vireo(&[
        "destroy",
        "--api-socket",
        machine.socket().to_str().unwrap(),
    ]);
    ends.ends_with(0);
    let socket = machine.path("again.sock");
    let flags = ["--api-socket", socket.to_str().unwrap()];
    // What is mapped from a file cannot be held still.
    let from = format!("source_url={},memory_restore_mode=copy", path.display());
    let restore = ["run", "--restore", &from];
    let mut again = vireo(&[restore.as_slice(), &flags].concat());
    // It was waiting to hear that it may use them again.
    again.stdout.wait_for(&format!("hints-done zero={free}\n"));
    // Its driver takes no round that has the id of the last one for a new one.
    let request = VmSnapshotConfig {
        skip_free_pages: true,
        ..VmSnapshotConfig::of(url(&machine.path("t")))
    };
    let mut client = until("the restored machine", || Client::connect(&socket).ok());
    client.snapshot(&request).unwrap();
    again.stdout.wait_for("hinted round=3\n");
    again.stdout.wait_for("hints-done zero=0\n");
}

#[test]
fn a_guest_that_writes_its_free_pages_has_them_saved() {
    if !can_run() {
        return;
    }
    let machine = hinting("rewrite");
    let Some(report) = leaves_out(&machine, "s") else {
        return;
    };
    assert_eq!(report["free_pages"], 0, "{report}");
    let reason = report["free_pages_reason"].as_str().unwrap();
    assert!(reason.contains("written all of them"), "{reason}");
    assert!(report["bytes"].as_u64().unwrap() > 16 << 20, "{report}");
}

/// It is taken in full, and says why.
#[test]
fn nothing_is_left_out_where_the_guest_cannot_tell_or_stands() {
    if !can_run() {
        return;
    }
    let machine = counting();
    let Some(report) = leaves_out(&machine, "none") else {
        return;
    };
    let told = |report: &Value, words: &str| {
        assert_eq!(report["free_pages"], 0, "{report}");
        let reason = report["free_pages_reason"].as_str().unwrap();
        assert!(reason.contains(words), "{reason}");
    };
    told(&report, "no balloon");
    let deaf = Served::start("poke", "outs halt", &["--balloon", "size=0"]);
    told(&leaves_out(&deaf, "deaf").unwrap(), "uses no balloon");
    let machine = hinting("");
    let mut client = machine.client();
    let request = VmSnapshotConfig {
        pause: true,
        skip_free_pages: true,
        ..VmSnapshotConfig::of(url(&machine.path("s")))
    };
    client.snapshot(&request).unwrap();
    let job = client.jobs().unwrap().pop().unwrap();
    let report = serde_json::to_value(job.snapshot.unwrap()).unwrap();
    told(&report, "the guest stands");
}

/// What `vireo snapshot create --json` says of a snapshot of `machine` in its directory `name`.
fn create(machine: &Served, name: &str, flags: &[&str]) -> Value {
    let (socket, path) = (machine.socket(), machine.path(name));
    let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["snapshot", "create", "--json", "--api-socket"])
        .args([socket.as_os_str(), path.as_os_str()])
        .args(flags)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["directory"].as_str(), path.to_str());
    assert!(report["pause_us"].as_u64() <= report["total_us"].as_u64());
    assert!(report["drain_us"].as_u64() <= report["pause_us"].as_u64());
    // Of 64 MiB all that is not zeros, and the state besides.
    let number = |name: &str| report[name].as_u64().unwrap();
    let data = (64 << 20) - number("zero_pages") * 4096;
    let state = number("bytes").checked_sub(data).unwrap();
    assert!(data > 0 && (1..1 << 20).contains(&state), "{report}");
    report
}

/// The guest writes all of its pages over and over, and finds whether they are of one instant.
#[test]
fn a_machine_that_runs_is_saved_as_it_is_at_one_instant_or_paused_when_told_so() {
    if !can_run() {
        return;
    }
    let mut machine = counting();
    let mut asked = 0;
    for round in ["a", "b", "c"] {
        let report = create(&machine, round, &[]);
        if let Some(reason) = report["reason"].as_str() {
            // The host's doing; any other reason is this program's.
            assert!(reason.contains("no userfaultfd"), "{report}");
            assert_eq!(report["mode"], "paused", "{report}");
            skip(&format!("no snapshot while the guest runs: {reason}"));
        } else {
            assert_eq!(report["mode"], "live", "{report}");
        }
        let told = machine.client().jobs().unwrap().pop().unwrap();
        let told = serde_json::to_value(told.snapshot.unwrap()).unwrap();
        assert_eq!(told["pause_us"], report["pause_us"]);
        asked += 1;
        ask(&mut machine.vireo, asked);
    }
    let report = create(&machine, "paused", &["--pause"]);
    assert_eq!(report["mode"], "paused", "{report}");
    assert!(report["reason"].is_null() && report["pause_us"].is_u64());
    machine.client().pause().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(["snapshot", "create", "--api-socket"])
        .args([machine.socket(), machine.path("still")])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("is written: the machine was paused;"),
        "{text}"
    );
    machine.client().resume().unwrap();
    tell(&mut machine.vireo, b"q");
    machine.vireo.ends_with(0);
    for (name, times) in [("a", 1), ("c", 3), ("paused", 4), ("still", 4)] {
        let path = machine.path(name);
        let mut again = vireo(&["run", "--restore", path.to_str().unwrap()]);
        ask(&mut again, times);
        tell(&mut again, b"q");
        again.ends_with(0);
    }
}

/// Has the kernel refuse userfaultfd to the process that `command` begins, by system call and by device.
#[expect(unsafe_code, reason = "a filter is put in place between fork and exec")]
fn without_userfaultfd(command: &mut Command) {
    const LOAD: u16 = 0x20;
    const JUMP_IF: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let install = move || {
        let mut steps = [
            // The number, and the lower half of the second argument, as `struct seccomp_data` has them.
            step(LOAD, 0, 0, 0),
            step(JUMP_IF, 3, 0, 323),
            step(JUMP_IF, 0, 3, 16),
            step(LOAD, 0, 0, 24),
            step(JUMP_IF, 0, 1, 0xaa00),
            step(RETURN, 0, 0, REFUSE),
            step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: 7,
            filter: steps.as_mut_ptr(),
        };
        // SAFETY: the program outlives the call, and the kernel copies it.
        let set = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const program,
                ) == 0
        };
        if set {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: two system calls, and no memory but the stack's.
    unsafe { command.pre_exec(install) };
}

#[test]
fn where_memory_cannot_be_held_the_guest_is_paused_and_the_answer_says_why() {
    if !can_run() {
        return;
    }
    let first = counting();
    save(&first, &first.path("s")).unwrap();
    drop(first.vireo);
    let mut dir = first.dir;
    for (name, mode, refused, words) in [
        ("t", "copy", true, "no userfaultfd"),
        ("u", "mmap", false, "memory is mapped from the file"),
    ] {
        let (socket, path) = (dir.path().join("api.sock"), dir.path().join("s"));
        let from = format!("{},memory_restore_mode={mode}", path.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(["run", "--restore", &from, "--api-socket"]);
        command.arg(&socket);
        if refused {
            without_userfaultfd(&mut command);
        }
        let vireo = Vireo::spawn(&mut command);
        until("the machine", || {
            let info = Client::connect(&socket).ok()?.info().ok()?;
            (info.state == VmInfoState::Running).then_some(())
        });
        let mut machine = Served { vireo, dir };
        let report = create(&machine, name, &[]);
        assert_eq!(report["mode"], "paused", "{report}");
        let reason = report["reason"].as_str().unwrap();
        assert!(reason.contains(words), "{reason}");
        ask(&mut machine.vireo, 1);
        tell(&mut machine.vireo, b"q");
        machine.vireo.ends_with(0);
        dir = machine.dir;
    }
}

/// As large as fits, so that there is time to cancel it.
#[test]
fn a_snapshot_that_is_cancelled_leaves_nothing_and_the_machine_goes_on() {
    if !can_run() {
        return;
    }
    let more = json!({ "memory": { "size": 3_u64 << 30 } });
    let machine = Local::boot(&config("poke", "outs halt", more));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (sender, receiver) = channel();
    let request = VmSnapshotConfig::of(url(&path));
    let answer = Box::new(move |answer| drop(sender.send(answer)));
    machine
        .mailbox
        .send(Message::Command(Ask::Snapshot(request), answer));
    let job = until("the job", || machine.handle.jobs().into_iter().next());
    // It may have ended by itself; it may not be both.
    let cancelled = machine.handle.cancel_job(&job.id).is_ok();
    let answer = receiver.recv().unwrap();
    until("the guest to go on", || {
        (machine.state().0 == VmState::Running).then_some(())
    });
    until("the end of the job", || {
        let job = machine.handle.jobs().into_iter().next()?;
        (!matches!(job.state, JobState::Running | JobState::Cancelling)).then_some(())
    });
    assert_eq!(cancelled, answer.is_err(), "{answer:?}");
    assert_eq!(names(&path).is_empty(), cancelled);
}

/// The second is asked for before anything else can be done.
#[test]
fn a_second_snapshot_is_refused_while_the_first_is_begun() {
    if !can_run() {
        return;
    }
    let machine = Local::boot(&config("poke", "outs halt", json!({})));
    let dir = tempfile::tempdir().unwrap();
    let [(first, one), (second, two)] = [channel(), channel()];
    let ask = |name: &str, sender: Sender<_>| {
        let request = VmSnapshotConfig::of(url(&dir.path().join(name)));
        let answer = Box::new(move |answer| drop(sender.send(answer)));
        Message::Command(Ask::Snapshot(request), answer)
    };
    let (first, second) = (ask("first", first), ask("second", second));
    let mailbox = machine.mailbox.clone();
    let both = Box::new(move |_: &mut _| {
        mailbox.send(first);
        mailbox.send(second);
    });
    machine.mailbox.send(Message::Errand(both));
    one.recv().unwrap().unwrap();
    let refused = two.recv().unwrap().unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Busy, "{refused:?}");
    assert_eq!(names(&dir.path().join("first")).len(), 3);
    assert!(!dir.path().join("second").exists());
}
