//! Clients and hosts that mean no good: the guest runs on, and answers after each.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use api::client::Client;
use api::wire::{ConsolePort, VmConsole};
use vmm::places;

use crate::sinks::Attached;
use crate::support::{LIMIT, Served, Vireo, can_run, run_arguments, until};

/// A machine whose guest says again what is typed.
struct Echoing {
    served: Served,
    console: Attached,
    lines: u32,
}

impl Echoing {
    fn start() -> Self {
        let served = Served::start("poke", "serial-echo", &["--serial", "null"]);
        let console = Attached::to(&served, true);
        Self {
            served,
            console,
            lines: 0,
        }
    }

    /// The guest answers, and the monitor does.
    fn lives(&mut self) {
        self.lines += 1;
        self.console.echo(&format!("line {}", self.lines));
        until("an answer", || {
            Client::connect(self.served.socket()).ok()?.ping().ok()
        });
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.served.socket()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The status that is answered to these bytes.
    fn status(&self, bytes: &[u8]) -> u16 {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        let text = std::str::from_utf8(&status[9..]).unwrap();
        text.parse().unwrap()
    }
}

fn put(endpoint: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "PUT /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[test]
fn bodies_that_make_no_sense_are_refused_and_the_guest_runs_on() {
    if !can_run() {
        return;
    }
    let mut machine = Echoing::start();
    let before = machine.served.client().info().unwrap();
    let deep = [b"[".repeat(10_000), b"]".repeat(10_000)].concat();
    let bodies: [(&str, &[u8], u16); 28] = [
        ("vm.create", &[b' '; (4 << 20) + 1], 400),
        ("vm.create", &deep, 400),
        ("vm.create", b"{\"payload\":{\"cmdline\":\"\xff\"}}", 400),
        ("vm.create", b"{\"memory\":{\"size\":\"1\"}}", 400),
        ("vm.create", b"{\"memory\":{\"size\":-1}}", 400),
        ("vm.create", b"{}", 409),
        ("vm.resize", b"{\"desired_vcpus\":-1}", 400),
        ("vm.resize", b"{\"desired_vcpus\":\"two\"}", 400),
        ("vm.resize", b"{\"desired_vcpus\":4294967296}", 400),
        ("vm.resize", b"{\"desired_vcpus\":4294967295}", 400),
        ("vm.resize", b"{\"desired_ram\":18446744073709551616}", 400),
        ("vm.resize", b"{\"desired_ram\":1e999}", 400),
        ("vm.resize", b"{\"desired_balloon\":1}", 400),
        (
            "vm.resize-disk",
            b"{\"id\":\"../../etc\",\"desired_size\":1}",
            404,
        ),
        ("vm.resize-disk", b"{\"id\":[],\"desired_size\":1}", 400),
        (
            "vm.add-disk",
            b"{\"path\":\"a\\u0000b\",\"image_type\":\"Raw\"}",
            400,
        ),
        (
            "vm.add-disk",
            b"{\"path\":\"\",\"image_type\":\"Raw\"}",
            400,
        ),
        (
            "vm.add-disk",
            b"{\"path\":\"../../../no/where\",\"image_type\":\"Raw\"}",
            400,
        ),
        ("vm.remove-device", b"{\"id\":\"a\\u0000b\"}", 404),
        ("vm.update-disk", b"{\"id\":\"none\",\"x\":1}", 400),
        (
            "vm.coredump",
            b"{\"destination_url\":\"file:///a\\u0000b\"}",
            400,
        ),
        (
            "vm.coredump",
            b"{\"destination_url\":\"file:///no/../where/core\"}",
            400,
        ),
        ("vm.console", b"{\"add\":\"file=a\\u0000b\"}", 400),
        ("vm.console", b"{\"add\":\"file=../no/where/x\"}", 400),
        ("vm.console", b"{\"add\":\"file=/no/where/x\"}", 400),
        ("vm.console", b"{\"add\":7}", 400),
        ("vm.console", b"{\"remove\":\"sink-1\"}", 400),
        ("vm.job-cancel", b"{\"id\":\"../job\"}", 404),
    ];
    for (endpoint, body, wanted) in bodies {
        let found = machine.status(&put(endpoint, body));
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
        assert_eq!(found, wanted, "{endpoint} {shown}");
        machine.lives();
    }
    assert_eq!(machine.served.client().info().unwrap(), before);
}

#[test]
fn half_requests_and_ten_thousand_connections_disturb_no_guest() {
    if !can_run() {
        return;
    }
    let mut machine = Echoing::start();
    let whole = put("vm.create", b"{\"payload\":{}}");
    let mut held = VecDeque::new();
    for end in [1, 20, whole.len() - 1] {
        let mut gone = machine.connect();
        gone.write_all(&whole[..end]).unwrap();
        drop(gone);
        let mut stays = machine.connect();
        stays.write_all(&whole[..end]).unwrap();
        held.push_back(stays);
        machine.lives();
    }
    // A test may not have 10,000 descriptors: the older ones are closed.
    for count in 0..10_000 {
        held.push_back(machine.connect());
        if held.len() > 300 {
            held.pop_front();
        }
        if count % 1000 == 0 {
            machine.lines += 1;
            machine.console.echo(&format!("among {count}"));
        }
    }
    drop(held);
    machine.lives();
}

#[test]
fn clients_that_never_read_disturb_no_guest() {
    if !can_run() {
        return;
    }
    let mut machine = Echoing::start();
    let mut deaf = machine.connect();
    let mut follower = machine.connect();
    follower
        .write_all(b"GET /api/v1/vm.events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    deaf.set_nonblocking(true).unwrap();
    let requests = b"GET /api/v1/vmm.openapi HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    // The server stops to read when its answers are not read.
    let refusal = loop {
        match deaf.write_all(&requests) {
            Ok(()) => machine.lives(),
            Err(error) => break error,
        }
    };
    assert_eq!(refusal.kind(), ErrorKind::WouldBlock);
    let mut client = machine.served.client();
    // Each pause and resume is two events more that the follower does not read.
    for _ in 0..200 {
        client.pause().unwrap();
        client.resume().unwrap();
    }
    machine.lives();
    follower.shutdown(Shutdown::Both).unwrap();
    machine.lives();
}

#[test]
fn a_full_disk_behind_the_log_disturbs_no_guest() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let flags = ["--serial", "null", "--api-socket", socket.to_str().unwrap()];
    let arguments = run_arguments("poke", "serial-echo", &flags);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(arguments)
        .env("VIREO_LOG", "trace")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    let mut vireo = Vireo::of(child);
    let stream = until("the boot", || {
        let client = Client::connect(&socket).ok()?;
        client.attach_console(true).ok()
    });
    let mut console = Attached::over(stream);
    console.output.wait_for("echo=ready");
    for line in 0..10 {
        Client::connect(&socket).unwrap().pause().unwrap();
        Client::connect(&socket).unwrap().resume().unwrap();
        console.echo(&format!("line {line}"));
    }
    assert!(vireo.is_running());
}

#[test]
fn a_monitor_that_was_killed_is_replaced_on_its_socket() {
    if !can_run() {
        return;
    }
    let mut machine = Echoing::start();
    machine.lives();
    let console = machine.served.path("console.sock");
    let sink = format!("socket={}", console.display());
    let add = |client: &mut Client| {
        client.change_console(&VmConsole::Add(sink.clone(), ConsolePort::Serial))
    };
    add(&mut machine.served.client()).unwrap();
    machine.served.vireo.signal("KILL");
    machine.served.vireo.end();
    assert!(machine.served.socket().exists() && console.exists());
    machine
        .served
        .restart("poke", "serial-echo", &["--serial", "null"]);
    machine.console = Attached::to(&machine.served, true);
    machine.lives();
    add(&mut machine.served.client()).unwrap();
    machine.lives();
}

#[test]
fn of_two_monitors_on_one_name_the_second_ends_and_the_first_runs_on() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let name = format!("test-{}", std::process::id());
    let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let runtime = directory.path().to_owned();
    let sockets = if root {
        PathBuf::from("/run/vireo")
    } else {
        runtime.join("vireo")
    };
    let arguments = run_arguments(
        "poke",
        "serial-echo",
        &["--serial", "null", "--name", &name],
    );
    let start = || {
        Vireo::spawn(
            Command::new(env!("CARGO_BIN_EXE_vireo"))
                .args(&arguments)
                .env("XDG_RUNTIME_DIR", &runtime),
        )
    };
    let mut first = start();
    let socket = places::socket(&sockets, &name);
    let stream = until("the boot", || {
        let client = Client::connect(&socket).ok()?;
        client.attach_console(true).ok()
    });
    let mut console = Attached::over(stream);
    console.output.wait_for("echo=ready");
    let mut second = start();
    let said = second.stderr.rest();
    assert!(said.contains("runs already"), "{said}");
    second.ends_with(1);
    console.echo("still here");
    assert!(first.is_running());
    drop(first);
    // Who is killed leaves its files.
    let lock = format!("{}.lock", socket.display());
    std::fs::remove_file(socket).unwrap();
    std::fs::remove_file(lock).unwrap();
}
