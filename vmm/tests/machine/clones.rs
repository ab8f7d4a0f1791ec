//! Templates, and the machines that are cloned of them: they share memory and images, and see nothing of each other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use api::client::Client;
use api::wire::{
    JobState, MirrorFormat, RateLimiterConfig, VmDiskMirror, VmSnapshotConfig, VmUpdateDisk,
};
use serde_json::Value;

use crate::snapshots::{file, url, vireo};
use crate::support::{Served, can_run, guest, until};

const SIZE: u64 = 4 << 20;

/// A template in the directory `t`, and its machine's.
struct Template {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn request(path: &Path) -> VmSnapshotConfig {
    VmSnapshotConfig {
        template: true,
        ..VmSnapshotConfig::of(url(path))
    }
}

/// Of a machine that is paused, and then ended.
fn of(machine: Served) -> Template {
    let path = machine.path("t");
    let mut client = machine.client();
    client.pause().unwrap();
    let (socket, place) = (machine.socket(), path.to_str().unwrap());
    let socket = socket.to_str().unwrap();
    let arguments = [
        "snapshot",
        "create",
        "--api-socket",
        socket,
        place,
        "--template",
    ];
    vireo(&arguments).ends_with(0);
    client.quit().unwrap();
    let Served { mut vireo, dir } = machine;
    vireo.ends_with(0);
    Template { dir, path }
}

impl Template {
    /// Of a guest that counts in its memory; its serial port is the socket `s`.
    fn counting() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = ["--serial", "socket={dir}/s,replay=off"];
        let machine = Served::start_in(dir, "count", "mib=16", &flags);
        let mut serial = UnixStream::connect(machine.path("s")).unwrap();
        serial.write_all(b"c").unwrap();
        heard(&mut serial, "answer=1\n");
        of(machine)
    }

    /// Of a guest that writes to its disk, slowly until it is let go, and checks what it reads.
    fn writing(format: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        if format == "raw" {
            File::create(&disk).unwrap().set_len(SIZE).unwrap();
        } else {
            let size = SIZE.to_string();
            let made = [
                "image",
                "create",
                "-q",
                "-f",
                format,
                disk.to_str().unwrap(),
                &size,
            ];
            vireo(&made).ends_with(0);
        }
        let flag =
            format!("path={{dir}}/disk,id=d,format={format},bw_size=131072,bw_refill_time=1000");
        let flags = ["--serial", "file={dir}/s", "--disk", &flag];
        of(Served::start_in(dir, "blk", "verify keep", &flags))
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `vireo clone`, whose control sockets are in a directory of this template.
    fn clone(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg("clone").arg(&self.path).args(arguments);
        command
    }

    /// The machines that run, when all do.
    fn clones(&self, arguments: &[&str]) -> Pool {
        let output = self.clone(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        Pool { report }
    }

    fn refused(&self, arguments: &[&str], code: i32) -> String {
        let output = self.clone(arguments);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// What is in the directory, with all bytes.
    fn content(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = Vec::new();
        for directory in [self.dir().to_owned(), self.path.clone()] {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    all.push((path.clone(), fs::read(&path).unwrap()));
                } else if path.is_dir() {
                    all.push((path, Vec::new()));
                }
            }
        }
        all.sort();
        all
    }
}

/// Machines that run; ended when dropped.
struct Pool {
    report: Value,
}

impl Pool {
    fn machines(&self) -> &[Value] {
        self.report["machines"].as_array().unwrap()
    }

    fn client(&self, index: usize) -> Client {
        Client::connect(self.machines()[index]["socket"].as_str().unwrap()).unwrap()
    }

    fn pids(&self) -> Vec<u64> {
        let pids = self
            .machines()
            .iter()
            .map(|machine| machine["pid"].as_u64().unwrap());
        pids.collect()
    }

    /// Ends them, and waits until they have ended.
    fn end(&self) {
        for machine in self.machines() {
            let socket = machine["socket"].as_str().unwrap();
            if let Ok(mut client) = Client::connect(socket) {
                let _ = client.quit();
            }
        }
        self.are_gone();
    }

    fn are_gone(&self) {
        for pid in self.pids() {
            until("the end of a clone", || is_gone(pid).then_some(()));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return self.end();
        }
        for pid in self.pids() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

fn is_gone(pid: u64) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    // What nobody waits for here.
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

fn heard(serial: &mut UnixStream, end: &str) -> String {
    serial
        .set_read_timeout(Some(crate::support::LIMIT))
        .unwrap();
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end.as_bytes()) {
        serial.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// A field of `/proc/PID/smaps_rollup` in KiB.
fn rolled_up(pid: u64, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What guests of these tests are called: no other machine of this user is.
fn name(test: &str) -> String {
    format!("vireo-test-{test}-{}", std::process::id())
}

#[test]
fn a_template_is_sealed_and_says_so() {
    if !can_run() {
        return;
    }
    let template = Template::writing("raw");
    for entry in fs::read_dir(&template.path).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400);
    }
    let disk = template.dir().join("disk");
    let mode = fs::metadata(&disk).unwrap().permissions().mode();
    assert_eq!(mode & 0o222, 0);
    let path = template.path.to_str().unwrap();
    let mut info = vireo(&["snapshot", "info", path]);
    let told = info.stdout.rest();
    assert!(
        told.contains("Template:") && told.contains(disk.to_str().unwrap()),
        "{told}"
    );
    let mut info = vireo(&["snapshot", "info", path, "--json"]);
    let told: Value = serde_json::from_str(&info.stdout.rest()).unwrap();
    assert_eq!(
        (&told["template"], &told["disks"][0]["id"]),
        (&true.into(), &"d".into())
    );

    let before = template.content();
    let other = template.dir().join("whole");
    let (kernel, writable) = (
        guest("count"),
        format!("path={},format=raw", disk.display()),
    );
    for (arguments, part) in [
        (vec!["run", "--restore", path], "disk"),
        (
            vec!["snapshot", "flatten", path, path],
            "holds a snapshot already",
        ),
        (
            vec![
                "run",
                "--kernel",
                kernel.to_str().unwrap(),
                "--disk",
                &writable,
            ],
            "nobody may write to it",
        ),
    ] {
        let mut refused = vireo(&arguments);
        let told = refused.stderr.rest();
        assert!(
            !refused.end().success() && told.contains(part),
            "{arguments:?}: {told}"
        );
    }
    assert!(template.content() == before);
    vireo(&["snapshot", "flatten", path, other.to_str().unwrap()]).ends_with(0);
    vireo(&["snapshot", "verify", path]).ends_with(0);
}

#[test]
fn a_template_is_made_of_what_stays_as_it_is() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Something to be copied.
    fs::write(dir.path().join("disk"), vec![1; 4 << 20]).unwrap();
    let flags = ["--serial", "null", "--disk", "path={dir}/disk,id=d"];
    let machine = Served::start_in(dir, "count", "mib=1", &flags);
    let (path, mut client) = (machine.path("t"), machine.client());
    let told = client.snapshot(&request(&path)).unwrap_err().to_string();
    assert!(
        told.contains("disk \"d\"") && told.contains("pause the machine"),
        "{told}"
    );
    let child = VmSnapshotConfig {
        parent: Some("/none".to_owned()),
        ..request(&path)
    };
    let told = client.snapshot(&child).unwrap_err().to_string();
    assert!(
        told.contains("template and parent exclude each other"),
        "{told}"
    );
    assert!(!path.exists());
    client.pause().unwrap();
    // Nor while a job works on one of its disks.
    let copy = VmDiskMirror {
        id: "d".to_owned(),
        path: machine.path("copy"),
        format: MirrorFormat::Raw,
        existing: false,
        switch: false,
        speed: Some(1),
    };
    let job = client.disk_mirror(&copy).unwrap();
    let told = client.snapshot(&request(&path)).unwrap_err().to_string();
    assert!(told.contains("a job works on it"), "{told}");
    client.cancel_job(&job.id).unwrap();
    until("the end of the job", || {
        let jobs = client.jobs().unwrap();
        jobs.iter()
            .all(|job| job.state == JobState::Cancelled)
            .then_some(())
    });
    client.snapshot(&request(&path)).unwrap();

    // Its machine could go on.
    let template = Template {
        dir: machine.dir,
        path,
    };
    let clone = |name: &str| template.refused(&["--name", name, "--json"], 1);
    let told = clone(&name("in-use"));
    assert!(told.contains("disk \"d\" of the template"), "{told}");
    client.quit().unwrap();
    let mut vireo = machine.vireo;
    vireo.ends_with(0);
    let disk = template.dir().join("disk");
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&disk, mode).unwrap();
    fs::write(&disk, vec![1; 4 << 20]).unwrap();
    let told = clone(&name("changed"));
    assert!(
        told.contains("written to since the template was made"),
        "{told}"
    );
}

#[test]
fn clones_are_other_machines_that_share_memory_until_they_write() {
    if !can_run() {
        return;
    }
    let template = Template::counting();
    let before = template.content();
    let own = name("shared");
    let pool = template.clones(&["--count", "3", "--name", &own]);
    assert_eq!(pool.machines().len(), 3);
    let mut uuids = BTreeSet::new();
    for (index, machine) in pool.machines().iter().enumerate() {
        let number = index + 1;
        assert_eq!(machine["name"], format!("{own}-{number}"));
        let info = pool.client(index).info().unwrap();
        uuids.insert(info.config.platform.unwrap().system_uuid.unwrap());
        let restored = info.memory_restored.unwrap();
        let memory = file(&template.path, ".memory");
        assert_eq!(restored.file.as_deref(), Some(memory.as_path()));
    }
    assert_eq!(uuids.len(), 3);
    let socket = |number: usize| template.dir().join(format!("s.{own}-{number}"));
    // Each counts on by itself, and finds its own memory whole.
    for round in 2..5 {
        for number in 1..=3 {
            let mut serial = UnixStream::connect(socket(number)).unwrap();
            serial.write_all(b"c").unwrap();
            let told = heard(&mut serial, &format!("answer={round}\n"));
            assert!(told.contains(" wrong=0 "), "{told}");
        }
    }
    assert!(pool.report["shared"].as_u64().unwrap() >= 16 << 20);
    pool.end();
    assert!(template.content() == before);
    for number in 1..=3 {
        assert!(!socket(number).exists());
    }
}

#[test]
fn what_clones_only_read_is_there_once() {
    if !can_run() {
        return;
    }
    // It holds: what it looks at is not written.
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--serial", "socket={dir}/s,replay=off"];
    let machine = Served::start_in(dir, "count", "mib=16", &flags);
    let mut serial = UnixStream::connect(machine.path("s")).unwrap();
    serial.write_all(b"ch").unwrap();
    heard(&mut serial, "answer=1\n");
    serial.write_all(b"t").unwrap();
    heard(&mut serial, "\n");
    drop(serial);
    let template = of(machine);
    let own = name("once");
    let pool = template.clones(&["--count", "4", "--name", &own]);
    for number in 1..=4 {
        let socket = template.dir().join(format!("s.{own}-{number}"));
        let mut serial = UnixStream::connect(socket).unwrap();
        serial.write_all(b"c").unwrap();
        heard(&mut serial, "answer=2\n");
    }
    for pid in pool.pids() {
        let (all, dirty) = (rolled_up(pid, "Rss:"), rolled_up(pid, "Private_Dirty:"));
        assert!(all > 16 << 10 && dirty < 8 << 10, "{all} {dirty}");
    }
}

/// Lets the guest's disk be as fast as it can, and waits until it has checked all.
fn let_go(pool: &Pool, template: &Template, own: &str) {
    for (index, machine) in pool.machines().iter().enumerate() {
        let unlimited = VmUpdateDisk {
            id: "d".to_owned(),
            rate_limiter_config: Some(RateLimiterConfig::default()),
            path: None,
        };
        pool.client(index).update_disk(&unlimited).unwrap();
        let serial = template.dir().join(format!("s.{own}-{}", index + 1));
        let done = |text: String| text.contains("read=").then_some(text);
        let text = until("the guest's look at its disk", || {
            done(fs::read_to_string(&serial).ok()?)
        });
        assert!(
            text.contains("errors=0") && !text.contains("wrong="),
            "{machine}: {text}"
        );
    }
}

#[test]
fn disks_of_clones_are_overlays_or_copies_or_gone_with_them() {
    if !can_run() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let template = Template::writing(format);
        let before = template.content();
        let own = name(&format!("thin-{format}"));
        let pool = template.clones(&["--count", "2", "--name", &own]);
        let image = |number: usize| template.dir().join(format!("{own}-{number}/d.qcow2"));
        assert_ne!(fs::read(image(1)).unwrap(), Vec::<u8>::new());
        let_go(&pool, &template, &own);
        pool.end();
        for number in 1..=2 {
            assert!(
                fs::metadata(image(number)).unwrap().len() > SIZE,
                "{number}"
            );
            let checked = vireo(&["image", "check", image(number).to_str().unwrap()]).end();
            assert!(checked.success());
        }

        let own = name(&format!("full-{format}"));
        let pool = template.clones(&["--full", "--name", &own]);
        let_go(&pool, &template, &own);
        pool.end();
        let copy = template.dir().join(format!("{own}-1/d.{format}"));
        assert!(fs::read(copy).unwrap().iter().any(|byte| *byte != 0));

        let own = name(&format!("gone-{format}"));
        let pool = template.clones(&["--stateless", "--name", &own]);
        let_go(&pool, &template, &own);
        pool.end();
        let pool = template.clones(&["--count", "2", "--stateless", "--name", &own]);
        for pid in pool.pids() {
            let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
            assert!(status.unwrap().success());
        }
        pool.are_gone();
        for number in ["1", "2"] {
            // As of every machine that is killed, the control socket stays.
            let name = format!("{own}-{number}");
            until("the end of its threads", || {
                let ended = vireo(&["destroy", &name]).end();
                ended.success().then_some(())
            });
        }
        assert!(!template.dir().join(format!("{own}-1")).exists());
        // The directories of clones aside, and their serial ports' files.
        let after = template.content().into_iter();
        let after: Vec<_> = after
            .filter(|(path, _)| !path.to_str().unwrap().contains("vireo-test-"))
            .collect();
        assert!(after == before);
    }
}

#[test]
fn one_that_cannot_be_started_leaves_none() {
    if !can_run() {
        return;
    }
    let template = Template::writing("raw");
    let own = name("third");
    // The third finds a directory where its serial port's file is to be.
    let blocked = template.dir().join(format!("s.{own}-3"));
    fs::create_dir(&blocked).unwrap();
    let before = template.content();
    let told = template.refused(&["--count", "5", "--name", &own, "--json"], 1);
    assert!(
        told.contains(&format!("no machine was started: {own}-3 (3 of 5)")),
        "{told}"
    );
    assert!(told.contains(blocked.to_str().unwrap()), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    let mut list = vireo(&["list"]);
    assert!(!list.stdout.rest().contains(&own));
    for number in 1..=5 {
        assert!(
            !template.dir().join(format!("{own}-{number}")).exists(),
            "{number}"
        );
    }
    // The output of those that ran stays.
    let after = template.content().into_iter();
    let is_output = |path: &Path| path.is_file() && path.to_str().unwrap().contains(&own);
    let after: Vec<_> = after.filter(|(path, _)| !is_output(path)).collect();
    assert!(after == before);
    fs::remove_dir(&blocked).unwrap();
    template.clones(&["--count", "3", "--name", &own, "--stateless"]);
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_starts() {
    if !can_run() {
        return;
    }
    let template = Template::counting();
    let own = name("refused");
    for (arguments, part) in [
        (["--count", "0"], "1..=4096"),
        (["--count", "100000"], "1..=4096"),
        (["--count", "x"], "--count"),
        (["--name", "a/b"], "--name \"a/b\""),
        (["--tap", "n=t{n}"], "the template has no card \"n\""),
        (["--tap", "n"], "--tap"),
    ] {
        let told = template.refused(&arguments, 2);
        assert!(told.contains(part), "{arguments:?}: {told}");
    }
    let pool = template.clones(&["--name", &own]);
    let told = template.refused(&["--count", "2", "--name", &own], 1);
    assert!(
        told.contains(&format!("machine '{own}-1' runs already")),
        "{told}"
    );
    pool.end();

    let memory = file(&template.path, ".memory");
    let whole = fs::read(&memory).unwrap();
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o600)).unwrap();
    let mut damaged = whole.clone();
    let place = damaged.iter().position(|byte| *byte != 0).unwrap();
    damaged[place] ^= 1;
    fs::write(&memory, &damaged).unwrap();
    let told = template.refused(&["--name", &own], 1);
    assert!(told.contains("is damaged: the checksum"), "{told}");
    fs::write(&memory, &whole[..whole.len() - 1]).unwrap();
    let told = template.refused(&["--name", &own], 1);
    assert!(told.contains("the snapshot is damaged"), "{told}");
    fs::write(&memory, &whole).unwrap();
    drop(template.clones(&["--name", &own]));

    let empty = Template {
        path: template.dir().to_owned(),
        dir: tempfile::tempdir().unwrap(),
    };
    let told = empty.refused(&["--name", &own], 1);
    assert!(told.contains("holds no snapshot"), "{told}");
}

#[test]
fn a_snapshot_that_is_no_template_is_not_cloned() {
    if !can_run() {
        return;
    }
    let (dir, path) = crate::snapshots::snapshot();
    let plain = Template { dir, path };
    let told = plain.refused(&["--name", "no"], 1);
    assert!(
        told.contains("is no template") && told.contains("--template"),
        "{told}"
    );
}
