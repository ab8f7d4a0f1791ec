//! The ways in which memory comes out of a snapshot, and what becomes of a machine whose snapshot's file is damaged under it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use api::client::Client;
use api::wire::{
    JobState, MemoryRestoreMode, MemoryRestored, RestoreConfig, RestoreIdentity, SnapshotMode,
    VmInfoState, VmSnapshotConfig,
};
use api::{EventKind, PauseReason, Reason};
use serde_json::{Value, json};

use crate::snapshots::{ask, file, snapshot, tell, url, vireo};
use crate::support::{Vireo, can_run, until};

/// A machine of the snapshot in `path` that is paused, and a client of it.
pub fn restored(directory: &Path, path: &Path, keys: &str) -> (Vireo, Client) {
    let socket = directory.join("restored.sock");
    let place = format!("{},resume=off{keys}", path.display());
    let arguments = ["run", "--restore", &place, "--api-socket"];
    let machine = vireo(&[&arguments[..], &[socket.to_str().unwrap()]].concat());
    let client = until("the machine", || {
        let mut client = Client::connect(&socket).ok()?;
        (client.info().ok()?.state == VmInfoState::Paused).then_some(client)
    });
    (machine, client)
}

/// Until the machine is paused because memory is lost, and what it is refused then.
fn is_lost(machine: &mut Vireo, client: &mut Client, memory: &Path) {
    until("the pause", || {
        let info = client.info().unwrap();
        (info.pause == Some(PauseReason::MemoryLost)).then_some(())
    });
    let told = machine.stderr.wait_for("the machine is paused");
    assert!(told.contains(memory.to_str().unwrap()), "{told}");
    let refused = client.resume().unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::MemoryLost), "{refused}");
    // A guest that begins anew has all that it needs.
    client.reset().unwrap();
    assert_eq!(client.info().unwrap().memory_restored, None);
    client.resume().unwrap();
    machine.stdout.wait_for("pages=4096\n");
    ask(machine, 1);
}

/// The UUID of the machine, as clients are told it.
fn uuid(client: &mut Client) -> Option<String> {
    let config = client.info().unwrap().config;
    config.platform.and_then(|platform| platform.system_uuid)
}

#[test]
fn clients_say_what_is_another_of_a_machine_that_they_restore() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let copy = dir.path().join("copy");
    fs::copy(dir.path().join("disk"), &copy).unwrap();
    let socket = dir.path().join("other.sock");
    let mut other = vireo(&["serve", "--api-socket", socket.to_str().unwrap()]);
    let mut client = until("the socket", || Client::connect(&socket).ok());
    let mut events = client.events(None).unwrap();
    let request = |overrides: Value| RestoreConfig {
        overrides: Some(serde_json::from_value(overrides).unwrap()),
        ..RestoreConfig::of(url(&path))
    };
    let device = |id: &str, path: &Path| {
        let config = json!({ "path": path });
        json!({ "devices": [{ "id": id, "config": config }] })
    };
    for (overrides, words) in [
        (device("x", &copy), "has no \"x\", but d"),
        (device("d", Path::new("/no/such")), "/no/such"),
    ] {
        let told = client
            .restore(&request(overrides), &[])
            .unwrap_err()
            .to_string();
        assert!(told.contains(words), "{told}");
        assert_eq!(
            client.info().unwrap_err().reason(),
            Some(Reason::NotCreated)
        );
    }
    let spare = File::open(&copy).unwrap();
    let plain = RestoreConfig::of(url(&path));
    let told = client
        .restore(&plain, &[spare.as_fd()])
        .unwrap_err()
        .to_string();
    assert!(
        told.contains("net_fds wants 0 descriptors, and 1 came along"),
        "{told}"
    );

    let fine = RestoreConfig {
        identity: RestoreIdentity::New,
        resume: true,
        ..request(device("d", &copy))
    };
    client.restore(&fine, &[]).unwrap();
    assert!(uuid(&mut client).is_some());
    let disks = client.info().unwrap().config.disks.unwrap();
    assert_eq!(disks[0].path.as_deref(), Some(copy.as_path()));
    let mut next = || events.next().unwrap().unwrap().event().unwrap().kind;
    while next() != EventKind::Restoring {}
    while next() != EventKind::Restored {}
    ask(&mut other, 2);
    // The disk of the first is free.
    let mut again = vireo(&["run", "--restore", path.to_str().unwrap()]);
    ask(&mut again, 2);
    tell(&mut again, b"q");
    again.ends_with(0);
    client.delete().unwrap();
}

#[test]
fn a_copy_has_a_uuid_of_its_own_and_the_same_machine_the_one_that_it_had() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let given = "00112233-4455-6677-8899-aabbccddeeff";
    let mut seen = Vec::new();
    for (keys, flags) in [
        ("", &[][..]),
        (",identity=same", &[]),
        (",identity=new", &[]),
        (",identity=new", &[]),
        (",identity=new", &["--smbios", &format!("uuid={given}")]),
    ] {
        let socket = dir.path().join("copy.sock");
        let place = format!("{}{keys}", path.display());
        let words = [
            "run",
            "--restore",
            &place,
            "--api-socket",
            socket.to_str().unwrap(),
        ];
        let mut machine = vireo(&[&words[..], flags].concat());
        ask(&mut machine, 2);
        seen.push(uuid(&mut Client::connect(&socket).unwrap()));
        tell(&mut machine, b"q");
        machine.ends_with(0);
    }
    assert_eq!(seen[..2], [None, None]);
    assert!(
        seen[2].is_some() && seen[3].is_some() && seen[2] != seen[3],
        "{seen:?}"
    );
    assert_eq!(seen[4].as_deref(), Some(given));
}

#[test]
fn memory_is_told_to_be_of_the_file_or_copied_and_the_file_stays_as_it_is() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let before = fs::read(&memory).unwrap();
    for (keys, mode, of_file) in [
        ("", MemoryRestoreMode::Mmap, true),
        (",memory_restore_mode=mmap", MemoryRestoreMode::Mmap, true),
        (",memory_restore_mode=copy", MemoryRestoreMode::Copy, false),
        (",prefault=on", MemoryRestoreMode::Copy, false),
    ] {
        let (mut machine, mut client) = restored(dir.path(), &path, keys);
        let told = client.info().unwrap().memory_restored;
        let file = of_file.then(|| memory.clone());
        assert_eq!(
            told,
            Some(MemoryRestored {
                mode,
                file,
                left: None
            }),
            "{keys}"
        );
        client.resume().unwrap();
        let first = ask(&mut machine, 2);
        // What it is restored from again is what it is now.
        client.pause().unwrap();
        let second = dir.path().join("again");
        let destination_url = url(&second);
        client
            .snapshot(&VmSnapshotConfig::of(destination_url))
            .unwrap();
        client.quit().unwrap();
        machine.ends_with(0);
        let mut again = vireo(&["run", "--restore", second.to_str().unwrap()]);
        assert!(ask(&mut again, 3) > first);
        tell(&mut again, b"q");
        again.ends_with(0);
        fs::remove_dir_all(second).unwrap();
        assert_eq!(fs::read(&memory).unwrap(), before);
    }
}

#[test]
fn memory_that_has_been_copied_in_needs_no_file_and_is_held_still_while_the_guest_runs() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let (mut machine, mut client) = restored(dir.path(), &path, "");
    let of_file = |client: &mut Client| client.info().unwrap().memory_restored.unwrap().file;
    assert_eq!(of_file(&mut client), Some(memory.clone()));
    client.resume().unwrap();
    let before = ask(&mut machine, 2);
    let socket = dir.path().join("restored.sock");
    let verb = |words: &[&str]| {
        let socket = socket.to_str().unwrap();
        let mut verb = vireo(&[words, &["--api-socket", socket]].concat());
        let code = verb.end().code();
        (code, verb.stdout.rest(), verb.stderr.rest())
    };
    // The guest writes to all of it meanwhile.
    let (code, told, errors) = verb(&["snapshot", "copy-in"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(told.contains("needs no file"), "{told}");
    assert_eq!(of_file(&mut client), None);
    let job = client.jobs().unwrap().pop().unwrap();
    assert_eq!((job.kind.as_str(), job.done), ("copy-in", job.total));
    let (code, _, errors) = verb(&["snapshot", "copy-in"]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("no memory of this machine"), "{errors}");
    cut_short(&memory);
    assert!(ask(&mut machine, 3) > before);
    let second = dir.path().join("again");
    let request = VmSnapshotConfig::of(url(&second));
    client.snapshot(&request).unwrap();
    let report = client.jobs().unwrap().pop().unwrap().snapshot.unwrap();
    match report.reason {
        Some(reason) => assert!(reason.contains("no userfaultfd"), "{reason}"),
        None => assert_eq!(report.mode, SnapshotMode::Live),
    }
    ask(&mut machine, 4);
    client.quit().unwrap();
    machine.ends_with(0);
    let mut again = vireo(&["run", "--restore", second.to_str().unwrap()]);
    assert!(ask(&mut again, 4) > before);
    tell(&mut again, b"q");
    again.ends_with(0);
}

#[test]
fn memory_whose_file_fails_is_not_copied_in() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let (mut machine, mut client) = restored(dir.path(), &path, "");
    cut_short(&memory);
    let id = client.snapshot_copy_in().unwrap().id;
    let error = until("the end of the job", || {
        let jobs = client.jobs().unwrap();
        let job = jobs.into_iter().find(|job| job.id == id).unwrap();
        (job.state == JobState::Failed).then_some(job.error)
    });
    assert!(error.unwrap().contains("does not give its bytes"));
    is_lost(&mut machine, &mut client, &memory);
}

#[test]
fn memory_is_read_on_demand_and_what_was_needed_first_is_kept_for_the_next_time() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let place = format!("{},memory_restore_mode=ondemand", path.display());
    let set = path.join("working_set");
    for known in [false, true] {
        assert_eq!(set.exists(), known);
        let socket = dir.path().join("demand.sock");
        let socket = socket.to_str().unwrap();
        let mut machine = vireo(&["run", "--restore", &place, "--api-socket", socket]);
        ask(&mut machine, 2);
        let mut client = Client::connect(Path::new(socket)).unwrap();
        until("all of the memory", || {
            let told = client.info().unwrap().memory_restored.unwrap();
            assert_eq!(told.mode, MemoryRestoreMode::OnDemand);
            told.left.is_none().then_some(())
        });
        until("the working set", || set.exists().then_some(()));
        ask(&mut machine, 3);
        client.quit().unwrap();
        machine.ends_with(0);
    }
    // What is damaged is passed over.
    let mut bytes = fs::read(&set).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&set, bytes).unwrap();
    let mut machine = vireo(&["run", "--restore", &place]);
    ask(&mut machine, 2);
    let told = machine.stderr.wait_for("it is passed over");
    assert!(told.contains("working_set"), "{told}");
    tell(&mut machine, b"q");
    machine.ends_with(0);
}

#[test]
fn a_chunk_that_is_damaged_is_never_seen_by_a_guest_on_demand() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let mut bytes = fs::read(&memory).unwrap();
    // Every chunk that holds anything.
    for byte in bytes.iter_mut().filter(|byte| **byte != 0) {
        *byte ^= 0xff;
    }
    fs::write(&memory, bytes).unwrap();
    let socket = dir.path().join("demand.sock");
    let place = format!("{},memory_restore_mode=ondemand,resume=off", path.display());
    let arguments = [
        "run",
        "--restore",
        &place,
        "--api-socket",
        socket.to_str().unwrap(),
    ];
    let mut machine = vireo(&arguments);
    let mut client = until("the machine", || Client::connect(&socket).ok());
    until("the loss", || {
        let info = client.info().ok()?;
        (info.pause == Some(PauseReason::MemoryLost)).then_some(())
    });
    let told = machine.stderr.wait_for("the machine is paused");
    assert!(told.contains("is damaged: the checksum"), "{told}");
    client.quit().unwrap();
    machine.ends_with(0);
}

#[test]
fn ways_that_exclude_each_other_are_told_before_anything_starts() {
    if !can_run() {
        return;
    }
    let (_dir, path) = snapshot();
    let place = format!("{},memory_restore_mode=mmap", path.display());
    let prefault = format!("{place},prefault=on");
    for (arguments, other) in [
        (&["--restore", &prefault][..], "and prefault=on exclude"),
        (
            &["--restore", &place, "--memory", "shared=on"],
            "and --memory shared=on exclude",
        ),
    ] {
        let mut refused = vireo(&[&["run"], arguments].concat());
        refused.ends_with(2);
        let told = refused.stderr.rest();
        assert!(told.contains("memory_restore_mode=mmap"), "{told}");
        assert!(told.contains(other), "{told}");
    }
}

fn cut_short(file: &Path) {
    let file = File::options().write(true).open(file).unwrap();
    file.set_len(0).unwrap();
}

#[test]
fn a_guest_whose_file_is_cut_short_is_paused_and_can_be_started_anew() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let (mut machine, mut client) = restored(dir.path(), &path, "");
    cut_short(&memory);
    client.resume().unwrap();
    is_lost(&mut machine, &mut client, &memory);
}

#[test]
fn a_monitor_that_reads_memory_whose_file_is_cut_short_keeps_nothing_of_it() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let memory = file(&path, ".memory");
    let (mut machine, mut client) = restored(dir.path(), &path, "");
    cut_short(&memory);
    let destination_url = url(&dir.path().join("t"));
    let told = client
        .snapshot(&VmSnapshotConfig::of(destination_url))
        .unwrap_err();
    assert!(
        told.to_string().contains("does not give its bytes"),
        "{told}"
    );
    assert!(!dir.path().join("t/manifest.json").exists());
    is_lost(&mut machine, &mut client, &memory);
}

#[test]
fn snapshots_are_told_of_verified_and_listed_without_a_monitor() {
    if !can_run() {
        return;
    }
    let (dir, path) = snapshot();
    let directory = path.to_str().unwrap();
    let told = |arguments: &[&str], code| {
        let mut verb = vireo(&[&["snapshot"], arguments].concat());
        verb.ends_with(code);
        verb.stdout.rest() + &verb.stderr.rest()
    };
    let info: Value = serde_json::from_str(&told(&["info", directory, "--json"], 0)).unwrap();
    assert_eq!(
        (&info["cpus"], &info["memory"]),
        (&2.into(), &(64 << 20).into())
    );
    let id = info["id"].as_str().unwrap();
    for (arguments, words) in [
        (["info", directory], id),
        (["verify", directory], "is whole: "),
        (["list", dir.path().to_str().unwrap()], id),
    ] {
        let text = told(&arguments, 0);
        assert!(text.contains(words), "{text}");
    }
    let missing = told(&["verify", dir.path().to_str().unwrap()], 1);
    assert!(missing.contains("holds no snapshot"), "{missing}");
    let memory = file(&path, ".memory");
    let mut bytes = fs::read(&memory).unwrap();
    let data = bytes.iter().position(|byte| *byte != 0).unwrap();
    bytes[data] ^= 1;
    fs::write(&memory, bytes).unwrap();
    let damaged = told(&["verify", directory], 1);
    assert!(
        damaged.contains("the memory at") && damaged.contains(memory.to_str().unwrap()),
        "{damaged}"
    );
    fs::write(path.join("manifest.json"), "{}").unwrap();
    let foreign = told(&["list", dir.path().to_str().unwrap()], 0);
    assert!(
        foreign.contains("not the manifest of a snapshot"),
        "{foreign}"
    );
}
