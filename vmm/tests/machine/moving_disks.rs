//! Machines whose disks are copied with them, as a guest sees it that writes to its disk all the way.

use std::fs::{self, File};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use api::client::Client;
use api::wire::{
    CopyStorage, MigrationPhase, ReceiveMigrationData, SendMigrationData, VmInfoState,
};
use serde_json::json;

use crate::migrations::{Side, to, unix};
use crate::snapshots::{ask, tell, vireo};
use crate::support::{can_run, guest, skip, until};

const MIB: u64 = 1 << 20;
/// Of the guest's disk.
const SIZE: u64 = 16 * MIB;

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn can_compare() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        skip("qemu-img is not installed");
    }
    can_run() && there
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Something in each part of a file that is a disk.
fn fill(path: &Path) {
    let block = |number: u64| number.wrapping_mul(0x9e37_79b9).to_le_bytes().repeat(512);
    let bytes: Vec<u8> = (0..SIZE / 4096)
        .flat_map(|number| {
            if number % 5 == 0 {
                vec![0; 4096]
            } else {
                block(number)
            }
        })
        .collect();
    fs::write(path, bytes).unwrap();
}

/// A guest that writes to `disk`, as that is described.
fn churning(dir: &Path, disk: &str) -> Side {
    let socket = dir.join("source.sock");
    let mut vireo = vireo(&[
        "run",
        "--kernel",
        text(&guest("blk")),
        "--cmdline",
        "churn",
        "--memory",
        "64M",
        "--serial",
        "tty",
        "--disk",
        disk,
        "--api-socket",
        text(&socket),
    ]);
    vireo.stdout.wait_for("churn=4096\n");
    let side = Side { vireo, socket };
    until("the boot", || {
        let info = Client::connect(&side.socket).ok()?.info().ok()?;
        (info.state == VmInfoState::Running).then_some(())
    });
    side
}

fn with(url: &str, how: CopyStorage) -> SendMigrationData {
    SendMigrationData {
        copy_storage: Some(how),
        ..to(url)
    }
}

/// Where the disk is at the other side.
fn at(path: &Path) -> ReceiveMigrationData {
    let overrides = json!({ "devices": [{ "id": "d", "config": { "path": path } }] });
    ReceiveMigrationData {
        overrides: Some(serde_json::from_value(overrides).unwrap()),
        ..ReceiveMigrationData::default()
    }
}

/// Sends the machine to another monitor, where its disk is at `path`.
fn moved(source: &mut Side, (dir, name): (&Path, &str), path: &Path, how: CopyStorage) -> Side {
    let url = unix(dir, name);
    let target = Side::empty(dir, &format!("{name}.sock"));
    let waits = target.receive_as(&url, at(path));
    source.client().send_migration(&with(&url, how)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    let info = target.ended();
    assert_eq!((info.phase, info.error), (MigrationPhase::Completed, None));
    target
}

/// Has the guest end, and look at its whole disk before.
fn end(side: &mut Side, answers: u32) -> u64 {
    tell(&mut side.vireo, b"h");
    let count = ask(&mut side.vireo, answers);
    tell(&mut side.vireo, b"q");
    side.vireo.stdout.wait_for("churn=end\n");
    side.vireo.ends_with(0);
    count
}

#[test]
fn a_raw_disk_goes_there_and_back_while_its_guest_writes_to_it() {
    if !can_compare() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    fill(&here);
    let mut source = churning(dir.path(), &format!("path={},id=d", here.display()));
    let before = ask(&mut source.vireo, 1);
    let mut target = moved(&mut source, (dir.path(), "m0"), &there, CopyStorage::All);
    let gone = fs::read(&here).unwrap();
    let count = ask(&mut target.vireo, 2);
    assert!(count > before, "{count} {before}");
    // What was here is not touched, and is not what the guest goes on with.
    assert_eq!(fs::read(&here).unwrap(), gone);
    // The way back needs another place, or none.
    let url = unix(dir.path(), "back");
    let full = Side::empty(dir.path(), "full.sock");
    let waits = full.receive_as(&url, at(&here));
    let request = with(&url, CopyStorage::All);
    target.client().send_migration(&request).unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    assert!(told.contains("there is a file of that name"), "{told}");
    let told = target.ended().error.unwrap();
    assert!(told.contains("there is a file of that name"), "{told}");
    assert_eq!(fs::read(&here).unwrap(), gone);
    // An empty file holds nothing that could be lost.
    File::create(&here).unwrap();
    let mut back = moved(&mut target, (dir.path(), "m1"), &here, CopyStorage::All);
    let mode = fs::metadata(&there).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&mode) & 0o777, 0o600);
    assert!(end(&mut back, 3) > count);
}

#[test]
fn a_qcow2_disk_goes_whole_into_one_image_and_what_is_there_stays_as_the_guest_had_it() {
    if !can_compare() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top.qcow2"));
    let there = dir.path().join("there.qcow2");
    fill(&base);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        text(&top),
    ]);
    let disk = format!("path={},id=d,format=qcow2,backing=directory", top.display());
    let mut source = churning(dir.path(), &disk);
    ask(&mut source.vireo, 1);
    // A guest that does not write leaves two images of which each can be compared.
    tell(&mut source.vireo, b"h");
    ask(&mut source.vireo, 2);
    let mut target = moved(&mut source, (dir.path(), "m"), &there, CopyStorage::All);
    ask(&mut target.vireo, 3);
    let same = [
        "compare",
        "-U",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        text(&top),
        text(&there),
    ];
    qemu_img(&same);
    let info = qemu_img(&["info", "-U", text(&there)]);
    assert!(!info.contains("backing file"), "{info}");
    tell(&mut target.vireo, b"h");
    end(&mut target, 4);
    qemu_img(&["check", "-q", text(&there)]);
}

#[test]
fn what_lies_below_an_image_stays_where_it_is_and_has_to_be_there() {
    if !can_compare() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    fill(&one.join("base"));
    let (top, there) = (one.join("top"), two.join("top"));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        "raw",
        text(&top),
    ]);
    let disk = format!("path={},id=d,format=qcow2,backing=directory", top.display());
    let mut source = churning(dir.path(), &disk);
    ask(&mut source.vireo, 1);
    let refused = |source: &Side, wanted: &str| {
        let url = unix(dir.path(), "r");
        let target = Side::empty(dir.path(), "r.sock");
        let waits = target.receive_as(&url, at(&there));
        let request = with(&url, CopyStorage::Inc);
        source.client().send_migration(&request).unwrap();
        let told = waits.join().unwrap().unwrap_err().to_string();
        assert!(told.contains(wanted), "{told}");
        assert!(!there.exists());
        until("the end at the source", || {
            source
                .client()
                .migration()
                .unwrap()
                .phase
                .is_end()
                .then_some(())
        });
    };
    refused(&source, "backing file");
    File::create(two.join("base"))
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    refused(&source, "at the source");
    fs::copy(one.join("base"), two.join("base")).unwrap();
    let base = fs::read(two.join("base")).unwrap();
    let mut target = moved(&mut source, (dir.path(), "m"), &there, CopyStorage::Inc);
    assert!(ask(&mut target.vireo, 2) > 0);
    end(&mut target, 3);
    qemu_img(&["check", "-q", text(&there)]);
    let info = qemu_img(&["info", text(&there)]);
    assert!(info.contains("backing file: base"), "{info}");
    assert_eq!(fs::read(two.join("base")).unwrap(), base);
}

#[test]
fn one_that_is_cancelled_while_its_disk_goes_leaves_the_disk_and_nothing_there() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    fill(&here);
    let mut source = churning(dir.path(), &format!("path={},id=d", here.display()));
    ask(&mut source.vireo, 1);
    let url = unix(dir.path(), "m");
    let target = Side::empty(dir.path(), "t.sock");
    for (index, here_cancels) in [(0, true), (1, false)] {
        let waits = target.receive_as(&url, at(&there));
        let slow = SendMigrationData {
            bandwidth: Some(1 << 20),
            ..with(&url, CopyStorage::All)
        };
        source.client().send_migration(&slow).unwrap();
        let storage = until("the disk", || {
            let storage = source.client().migration().ok()?.storage?;
            (storage.transferred > 0).then_some(storage)
        });
        assert_eq!(storage.total, SIZE);
        assert!(storage.remaining > 0 && there.exists());
        // Other jobs on disks wait for its end.
        let side = if here_cancels { &source } else { &target };
        side.client().cancel_migration().unwrap();
        let told = waits.join().unwrap().unwrap_err().to_string();
        assert!(told.contains("cancelled"), "{told}");
        until("the end at the source", || {
            source
                .client()
                .migration()
                .unwrap()
                .phase
                .is_end()
                .then_some(())
        });
        until("the image to be removed", || {
            (!there.exists()).then_some(())
        });
        ask(&mut source.vireo, index + 2);
    }
    // Nothing of it keeps the machine from going in the end.
    let mut target = moved(&mut source, (dir.path(), "m2"), &there, CopyStorage::All);
    end(&mut target, 4);
}

/// Leads to `to`, for every connection, until so many bytes have come on the `which`th: then that one is cut.
fn cut_after(which: usize, bytes: u64, to: &str) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("tcp:{}", listener.local_addr().unwrap());
    let to = to.strip_prefix("tcp:").unwrap().to_owned();
    let seen = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&seen);
    thread::spawn(move || {
        for (index, from) in listener.incoming().enumerate() {
            let (Ok(from), Ok(there)) = (from, TcpStream::connect(&to)) else {
                return;
            };
            let limit = if index == which { bytes } else { u64::MAX };
            let counts = (index == which).then(|| Arc::clone(&counts));
            let (back, forth) = (there.try_clone().unwrap(), from.try_clone().unwrap());
            thread::spawn(move || pass(from, there, limit, counts.as_deref()));
            thread::spawn(move || pass(back, forth, u64::MAX, None));
        }
    });
    (place, seen)
}

fn pass(mut from: TcpStream, mut to: TcpStream, limit: u64, counts: Option<&AtomicU64>) {
    use std::io::{Read, Write};
    let mut left = limit;
    let mut buffer = vec![0; 4096];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
        left -= len as u64;
        counts.inspect(|counts| {
            counts.fetch_add(len as u64, Ordering::SeqCst);
        });
        if left == 0 {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn a_connection_of_disks_that_is_cut_anywhere_leaves_the_guest_with_its_disk() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    fill(&here);
    let mut source = churning(dir.path(), &format!("path={},id=d", here.display()));
    ask(&mut source.vireo, 1);
    // Within the preamble, in the first frames, and far in; the first connection is the stream.
    for (index, bytes) in [(0, 17), (1, 47), (2, 300_000), (3, 9 * MIB)] {
        let target = Side::empty(dir.path(), &format!("{index}.sock"));
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp:{}", port.local_addr().unwrap());
        drop(port);
        let waits = target.receive_as(&url, at(&there));
        let (through, seen) = cut_after(1, bytes, &url);
        let request = with(&through, CopyStorage::All);
        source.client().send_migration(&request).unwrap();
        waits.join().unwrap().unwrap_err();
        assert_eq!(seen.load(Ordering::SeqCst), bytes);
        let info = source.ended();
        assert_eq!(info.phase, MigrationPhase::Failed, "{info:?}");
        until("the image to be removed", || {
            (!there.exists()).then_some(())
        });
        ask(&mut source.vireo, index + 2);
    }
    end(&mut source, 6);
}

#[test]
fn a_destination_that_is_full_says_so_and_the_guest_goes_on() {
    if !can_run() {
        return;
    }
    if Command::new("prlimit").arg("--version").output().is_err() {
        skip("prlimit is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("here");
    let there = dir.path().join("there.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&here), "16M"]);
    let disk = format!("path={},id=d,format=qcow2", here.display());
    let mut source = churning(dir.path(), &disk);
    until("enough that is written", || {
        (fs::metadata(&here).unwrap().len() > 8 * MIB).then_some(())
    });
    ask(&mut source.vireo, 1);
    let target = Side::empty(dir.path(), "t.sock");
    // Files of that process end there, as on a full host.
    let status = Command::new("prlimit")
        .arg(format!("--pid={}", target.vireo.id()))
        .arg(format!("--fsize={}:", 4 * MIB))
        .status();
    assert!(status.unwrap().success());
    let url = unix(dir.path(), "m");
    let waits = target.receive_as(&url, at(&there));
    let request = with(&url, CopyStorage::All);
    source.client().send_migration(&request).unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    let info = source.ended();
    assert_eq!(info.phase, MigrationPhase::Failed);
    let here = info.error.unwrap();
    assert!(
        here.contains("disk d: ") && here.contains("there.qcow2"),
        "{here}"
    );
    assert!(told.contains("disk d: "), "{told}");
    until("the image to be removed", || {
        (!there.exists()).then_some(())
    });
    end(&mut source, 2);
}

#[test]
fn a_destination_that_one_connection_reaches_refuses_disks_before_anything_is_made() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [here, there, near, far] = ["here", "there", "in", "out"].map(|name| dir.path().join(name));
    fill(&here);
    let disk = format!("path={},id=d,format=raw", here.display());
    let mut source = churning(dir.path(), &disk);
    let made = Command::new("mkfifo").args([&near, &far]).status();
    assert!(made.unwrap().success());
    let through = |from: &Path, to: &Path| {
        let (from, to) = (from.display(), to.display());
        format!("exec:cat {from} & cat > {to}")
    };
    let target = Side::empty(dir.path(), "t.sock");
    let request = ReceiveMigrationData {
        receiver_url: through(&near, &far),
        ..at(&there)
    };
    let mut client = target.client();
    let waits = thread::spawn(move || client.receive_migration(&request, &[]));
    let request = with(&through(&far, &near), CopyStorage::All);
    source.client().send_migration(&request).unwrap();
    let told = waits.join().unwrap().unwrap_err().to_string();
    let info = source.ended();
    assert_eq!((info.phase, info.pages), (MigrationPhase::Failed, 0));
    for told in [told, info.error.unwrap()] {
        assert!(
            told.contains("--copy-storage") && told.contains("exec:"),
            "{told}"
        );
    }
    assert!(!there.exists());
    ask(&mut source.vireo, 1);
    end(&mut source, 2);
}
