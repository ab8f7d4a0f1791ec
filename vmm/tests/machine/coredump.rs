//! Core files of machines, as `readelf` and `gdb` read them, and those that are not finished.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use api::client::Client;
use api::wire::{JobInfo, JobState, VmCoredumpData};
use api::{Command as Ask, Control, ErrorKind, EventKind, PauseReason, Reason, Reply, VmState};
use devices::GuestRequest;
use serde_json::json;
use vmm::machine::inbox::Message;

use crate::support::{Local, Vireo, can_run, config, guest, run_arguments, skip, symbol, until};

fn request(path: &Path) -> VmCoredumpData {
    VmCoredumpData {
        destination_url: format!("file://{}", path.display()),
    }
}

fn begin(machine: &Local, path: &Path) -> JobInfo {
    match machine.ask(Ask::Coredump(request(path))) {
        Ok(Reply::Started(job)) => job,
        other => panic!("{other:?}"),
    }
}

/// The job when it has ended.
fn ended(machine: &Local, id: &str) -> JobInfo {
    until("the end of the job", || {
        let job = machine.handle.jobs().into_iter().find(|job| job.id == id);
        job.filter(|job| !matches!(job.state, JobState::Running | JobState::Cancelling))
    })
}

fn kind(machine: &Local, command: Ask) -> Option<ErrorKind> {
    machine.ask(command).err().map(|error| error.kind)
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

/// A machine of so much memory that its dump takes a while.
fn large() -> Local {
    let more = json!({ "memory": { "size": 3_u64 << 30 } });
    Local::boot(&config("poke", "outs halt", more))
}

#[test]
fn a_running_machine_is_dumped_for_readelf_and_gdb_and_goes_on() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let core = directory.path().join("core");
    let more = json!({ "cpus": { "boot": 2 } });
    let machine = Local::boot(&config("poke", "outs halt", more));
    let job = begin(&machine, &core);
    let done = ended(&machine, &job.id);
    assert_eq!((done.state, done.error), (JobState::Completed, None));
    assert_eq!((done.done, done.total), (64 << 20, 64 << 20));
    until("the guest to go on", || {
        (machine.state().0 == VmState::Running).then_some(())
    });
    let facts = fs::metadata(&core).unwrap();
    assert_eq!(facts.permissions().mode() & 0o777, 0o600);
    assert!(facts.len() > 64 << 20 && facts.blocks() * 512 < 8 << 20);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);

    let headers = output(Command::new("readelf").arg("-lnW").arg(&core));
    assert!(headers.contains("CORE (Core file)"), "{headers}");
    assert_eq!(headers.matches("LOAD ").count(), 1, "{headers}");
    assert_eq!(headers.matches("NT_PRSTATUS").count(), 2, "{headers}");
    assert_eq!(headers.matches("QEMU ").count(), 2, "{headers}");

    let main = symbol("poke", "main");
    let text = output(
        Command::new("gdb")
            .args(["-nx", "-batch", "-ex", "info threads"])
            .args(["-ex", &format!("x/1gx {main:#x}")])
            .args(["-ex", "print/x $cs", "-ex", "print/x $rip"])
            .arg(guest("poke"))
            .arg(&core),
    );
    assert!(text.contains("LWP 1") && text.contains("LWP 2"), "{text}");
    assert!(
        text.contains(&format!("0x{:016x}", machine.word(main))),
        "{text}"
    );
    assert!(!text.contains("$2 = 0x0\n"), "{text}");
    // What is there is not written over.
    let again = kind(&machine, Ask::Coredump(request(&core)));
    assert_eq!(again, Some(ErrorKind::Conflict));
}

#[test]
fn a_paused_machine_stays_paused_and_a_dump_under_way_can_be_cancelled() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let core = directory.path().join("core");
    let machine = large();
    let job = begin(&machine, &core);
    assert_eq!((job.kind.as_str(), job.total), ("coredump", 3 << 30));
    for command in [Ask::Coredump(request(&core)), Ask::Resume, Ask::Reset] {
        assert_eq!(kind(&machine, command), Some(ErrorKind::Busy));
    }
    let state = (VmState::Paused, Some(PauseReason::Coredump));
    assert_eq!(machine.state(), state);
    let deaf = machine.ask(Ask::PowerButton).unwrap_err();
    assert_eq!(deaf.reason, Some(Reason::CoreDump));
    // It was to go on afterwards, and now is not.
    assert_eq!(kind(&machine, Ask::Pause), None);
    assert_eq!(kind(&machine, Ask::Pause), Some(ErrorKind::Conflict));
    machine.handle.cancel_job(&job.id).unwrap();
    assert_eq!(ended(&machine, &job.id).state, JobState::Cancelled);
    assert!(is_empty(directory.path()));
    assert_eq!(
        machine.state(),
        (VmState::Paused, Some(PauseReason::Command))
    );
    assert_eq!(kind(&machine, Ask::Resume), None);
}

#[test]
fn the_end_of_the_machine_ends_its_dump_and_leaves_no_file() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut machine = large();
    let job = begin(&machine, &directory.path().join("core"));
    machine.ask(Ask::Quit).unwrap();
    machine.outcome();
    let job = ended(&machine, &job.id);
    let why = Some("the machine has ended".to_owned());
    assert_eq!((job.state, job.error), (JobState::Cancelled, why));
    assert!(is_empty(directory.path()));
}

/// So much that its dump takes longer than a message to the machine.
fn some_memory() -> serde_json::Value {
    json!({ "memory": { "size": 256 << 20 } })
}

/// What the guest has asked for at the last moment before its dump.
fn says(machine: &Local, request: GuestRequest) {
    assert!(machine.mailbox.send(Message::Guest(request)));
}

#[test]
fn a_reset_that_the_guest_has_asked_for_waits_for_the_end_of_its_dump() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let core = directory.path().join("core");
    let machine = Local::boot(&config("poke", "outs halt", some_memory()));
    let job = begin(&machine, &core);
    says(&machine, GuestRequest::Reset);
    let done = ended(&machine, &job.id);
    assert_eq!((done.state, done.error), (JobState::Completed, None));
    assert!(core.exists());
    let mut over = false;
    loop {
        match machine.next_event() {
            EventKind::Job { info } => over = info.state == JobState::Completed,
            EventKind::GuestReset => break,
            _ => (),
        }
    }
    assert!(over, "it was reset under its dump");
    let running = EventKind::State {
        state: VmState::Running,
        pause: None,
    };
    while machine.next_event() != running {}
}

#[test]
fn a_pause_that_the_guest_has_asked_for_lasts_longer_than_its_dump() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut more = some_memory();
    more["on_poweroff"] = json!("pause");
    let machine = Local::boot(&config("poke", "outs halt", more));
    let job = begin(&machine, &directory.path().join("core"));
    says(&machine, GuestRequest::PowerOff);
    assert_eq!(ended(&machine, &job.id).state, JobState::Completed);
    let paused = EventKind::State {
        state: VmState::Paused,
        pause: Some(PauseReason::PowerOff),
    };
    while machine.next_event() != paused {}
    assert_eq!(
        machine.state(),
        (VmState::Paused, Some(PauseReason::PowerOff))
    );
}

#[test]
fn a_destination_that_cannot_be_is_refused_at_once() {
    if !can_run() {
        return;
    }
    let machine = Local::boot(&config("poke", "outs halt", json!({})));
    for (url, wanted) in [
        ("/tmp/core", ErrorKind::Invalid),
        ("http://host/core", ErrorKind::Invalid),
        ("file://core", ErrorKind::Invalid),
        ("file:///", ErrorKind::Invalid),
        ("file:///tmp/..", ErrorKind::Invalid),
        ("file:///tmp/a\0b", ErrorKind::Invalid),
        ("file:///no/where/core", ErrorKind::Invalid),
        ("file:///dev/null", ErrorKind::Conflict),
    ] {
        let destination_url = url.to_owned();
        let found = kind(&machine, Ask::Coredump(VmCoredumpData { destination_url }));
        assert_eq!(found, Some(wanted), "{url}");
        assert_eq!(machine.state().0, VmState::Running);
    }
    assert_eq!(machine.handle.jobs(), []);
}

/// `vireo` in a mount namespace of its own, where `directory` has room for 64 KiB.
fn with_little_room(directory: &Path) -> Command {
    let script = format!(
        "mount -t tmpfs -o size=64k none '{}' && exec \"$@\"",
        directory.display()
    );
    let mut command = Command::new("unshare");
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", &script, "sh"]);
    command.arg(env!("CARGO_BIN_EXE_vireo"));
    command
}

#[test]
fn a_full_disk_is_the_reason_of_a_failed_job_and_the_guest_goes_on() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let full = directory.path().join("full");
    fs::create_dir(&full).unwrap();
    match with_little_room(&full).arg("--version").output() {
        Ok(output) if output.status.success() => {}
        _ => return skip("no file system can be mounted here"),
    }
    let socket = directory.path().join("api.sock");
    let flags = ["--serial", "off", "--api-socket", socket.to_str().unwrap()];
    let arguments = run_arguments("poke", "outs halt", &flags);
    let vireo = Vireo::spawn(with_little_room(&full).args(arguments));
    let mut client = until("the boot", || {
        let mut client = Client::connect(&socket).ok()?;
        let state = client.info().ok()?.state;
        (state == api::wire::VmInfoState::Running).then_some(client)
    });
    let core = full.join("core");
    let job = client.coredump(&request(&core)).unwrap().unwrap();
    let failed = until("the end of the job", || {
        let jobs = client.jobs().unwrap();
        let job = jobs.into_iter().find(|found| found.id == job.id)?;
        (job.state != JobState::Running).then_some(job)
    });
    assert_eq!(failed.state, JobState::Failed);
    let reason = failed.error.unwrap();
    assert!(
        reason.contains("No space left") && reason.contains("core"),
        "{reason}"
    );
    let inside = format!("/proc/{}/root{}", vireo.id(), full.display());
    assert!(is_empty(Path::new(&inside)));
    until("the guest to go on", || {
        (client.info().unwrap().state == api::wire::VmInfoState::Running).then_some(())
    });
}
