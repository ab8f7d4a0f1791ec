//! The program as Cloud Hypervisor's managers start it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Collected, LIMIT, Vireo, can_run, guest, run_arguments, until};

/// Asks the monitor, as v1 clients do, and gives status and body.
pub fn ask(socket: &Path, method: &str, what: &str, body: Option<&Value>) -> (u16, String) {
    let mut stream = until("the control socket", || UnixStream::connect(socket).ok());
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = match body.len() {
        0 => String::new(),
        len => format!("Content-Length: {len}\r\n"),
    };
    let head = format!(
        "{method} /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{length}\r\n"
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    let mut byte = [0];
    while !answer.ends_with("\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{answer}");
        answer.push(byte[0].into());
    }
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let length = answer.split("Content-Length: ").nth(1);
    let length = length.map_or(0, |rest| rest.split('\r').next().unwrap().parse().unwrap());
    let mut content = vec![0; length];
    stream.read_exact(&mut content).unwrap();
    (status, String::from_utf8(content).unwrap())
}

/// A description of a machine that runs the guest `name`, as clients give it.
pub fn description(name: &str, cmdline: &str) -> Value {
    json!({
        "payload": {"kernel": guest(name), "cmdline": cmdline},
        "memory": {"size": 64 << 20},
        "console": {"mode": "Off"},
    })
}

fn as_cloud_hypervisor(arguments: &[&str]) -> Vireo {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    Vireo::spawn(command.arg0("cloud-hypervisor").args(arguments))
}

/// Drives a monitor from its first request to the end of its guest.
fn boot_over(socket: &Path, monitor: &mut Vireo) {
    assert_eq!(ask(socket, "GET", "vmm.ping", None).0, 200);
    let created = ask(
        socket,
        "PUT",
        "vm.create",
        Some(&description("poke", "spin")),
    );
    assert_eq!(created, (204, String::new()));
    assert_eq!(ask(socket, "PUT", "vm.boot", None), (204, String::new()));
    assert_eq!(
        ask(socket, "PUT", "vm.shutdown", None),
        (204, String::new())
    );
    assert_eq!(ask(socket, "PUT", "vmm.shutdown", None).0, 200);
    monitor.ends_with(0);
    assert!(!socket.exists());
}

#[test]
fn a_manager_that_names_a_socket_gets_a_monitor_without_a_verb() {
    if !can_run() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let (socket, log) = (at("api.sock"), at("log"));
    let path = socket.to_str().unwrap();
    let log_path = log.to_str().unwrap();
    let flags = [
        "--api-socket",
        path,
        "-v",
        "--seccomp",
        "true",
        "--log-file",
        log_path,
    ];
    let mut monitor = as_cloud_hypervisor(&flags);
    boot_over(&socket, &mut monitor);
    let log = fs::read_to_string(log).unwrap();
    assert!(!log.contains("system call"), "{log}");
    assert_eq!(monitor.stdout.rest(), "");
}

#[test]
fn a_manager_that_passes_a_socket_and_reads_a_pipe_hears_what_happens() {
    if !can_run() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let (socket, events) = (place.path().join("api.sock"), place.path().join("events"));
    assert!(
        Command::new("mkfifo")
            .arg(&events)
            .status()
            .unwrap()
            .success()
    );
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = Command::new("sh");
    let redirect = "exec \"$0\" --api-socket fd=3 --event-monitor path=\"$1\" 3<&0 </dev/null";
    command
        .args(["-c", redirect, env!("CARGO_BIN_EXE_vireo")])
        .arg(&events);
    let child = command
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut monitor = Vireo::of(child.unwrap());
    assert_eq!(ask(&socket, "GET", "vmm.ping", None).0, 200);
    // It comes late, and has missed nothing.
    let mut told = Collected::from(File::open(&events).unwrap());
    told.wait_for("\"starting\"");
    ask(
        &socket,
        "PUT",
        "vm.create",
        Some(&description("poke", "spin")),
    );
    assert_eq!(ask(&socket, "PUT", "vm.boot", None).0, 204);
    told.wait_for("\"booted\"");
    assert_eq!(ask(&socket, "PUT", "vmm.shutdown", None).0, 200);
    monitor.ends_with(0);
    let told = told.rest();
    let words: Vec<String> = told
        .split("\n\n")
        .filter(|record| !record.is_empty())
        .map(|record| {
            let record: Value = serde_json::from_str(record).unwrap();
            format!("{}/{}", record["source"], record["event"]).replace('"', "")
        })
        .collect();
    let expected = [
        "vmm/starting",
        "vm/booting",
        "vm/booted",
        "vm/shutdown",
        "vmm/shutdown",
    ];
    assert_eq!(words, expected);
}

#[test]
fn a_machine_is_booted_without_a_verb_where_there_is_a_kernel() {
    if !can_run() {
        return;
    }
    let kernel = guest("hello").into_os_string().into_string().unwrap();
    let flags = [
        "--kernel", &kernel, "--cpus", "boot=1", "--memory", "size=64M",
    ];
    let mut monitor =
        as_cloud_hypervisor(&[&flags[..], &["--serial", "tty", "--pvpanic"]].concat());
    monitor.ends_with(0);
    assert!(monitor.stdout.rest().contains("Hello"));
}

#[test]
fn a_full_disk_behind_events_log_and_messages_never_stops_a_machine() {
    if !can_run() {
        return;
    }
    let flags = [
        "--event-monitor",
        "/dev/full",
        "--log-file",
        "/dev/full",
        "-vvv",
        "--serial",
        "pty",
    ];
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let child = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(run_arguments("hello", "", &flags))
        .stdin(Stdio::null())
        .stdout(full())
        .stderr(full())
        .spawn();
    Vireo::of(child.unwrap()).ends_with(0);
}

#[test]
fn what_makes_no_sense_is_told_in_one_line_that_names_the_flag() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("s");
    let socket = socket.to_str().unwrap();
    for (flags, part) in [
        (&["--api-socket", "fd=77"][..], "--api-socket"),
        (&["--api-socket", "fd=two"], "--api-socket"),
        (
            &["--api-socket", socket, "--event-monitor", "fd=99"],
            "--event-monitor",
        ),
        (
            &["--api-socket", socket, "--event-monitor", "path="],
            "--event-monitor",
        ),
        (
            &["--api-socket", socket, "--log-file", "/none/log"],
            "--log-file",
        ),
        (&["--api-socket", socket, "--seccomp", "1"], "--seccomp"),
        (&["--cpus", "boot=1"], "--api-socket"),
        (
            &["--event-monitor", "a", "--kernel", "a"],
            "--event-monitor: it would overwrite a,",
        ),
    ] {
        let mut monitor = as_cloud_hypervisor(flags);
        let status = monitor.end();
        let told = monitor.stderr.rest();
        assert!(matches!(status.code(), Some(1 | 2)), "{flags:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(told.starts_with("vireo: ") && told.contains(part), "{told}");
    }
}

#[test]
fn a_number_that_the_process_was_not_started_with_is_none_of_its_own_files() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let (socket, log) = (path("s"), path("log"));
    // Who runs the tests may have left some open.
    let close = "exec \"$@\" 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-";
    // The first files that are opened have the lowest numbers.
    for fd in 3..10 {
        let fd = format!("fd={fd}");
        for flag in ["--event-monitor", "--api-socket"] {
            let mut flags = vec!["--log-file", &log, flag, &fd];
            if flag == "--event-monitor" {
                flags.extend(["--api-socket", &socket]);
            }
            let mut command = Command::new("sh");
            command.args(["-c", close, "sh", env!("CARGO_BIN_EXE_vireo"), "serve"]);
            let mut monitor = Vireo::spawn(command.args(flags));
            let status = monitor.end();
            let told = monitor.stderr.rest();
            let expected = format!("vireo: {flag} {fd}: this process was not started with it");
            assert!(told.starts_with(&expected), "{told}");
            assert_eq!(status.code(), Some(2), "{told}");
        }
    }
    assert!(!place.path().join("log").exists());
}
