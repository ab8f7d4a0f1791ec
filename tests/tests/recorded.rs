//! What real clients sent, byte for byte and piece for piece, sent to a real monitor with a
//! guest; and its answers, byte for byte.
//!
//! The recordings are in `tests/recordings`. Each line is one of
//!
//! ```text
//! # words for people
//! connect                    a new connection; what came on the last has been answered in full
//! >> "…"                     sent in one piece, as a JSON string
//! << "…"                     the answer to all that was sent since the last; {*} stands for anything
//! ```
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tests::control::{Answer, Connection};
use tests::{kit, places, probe, suite};

/// Everything here takes milliseconds.
const LIMIT: Duration = Duration::from_secs(60);

/// One line of a recording.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Connect,
    Sent(String),
    Answered(String),
}

fn lines(text: &str) -> Vec<Line> {
    let text_of = |json: &str| serde_json::from_str::<String>(json).unwrap();
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| match line.split_at(3.min(line.len())) {
            (">> ", json) => Line::Sent(text_of(json)),
            ("<< ", json) => Line::Answered(text_of(json)),
            _ => {
                assert_eq!(line, "connect");
                Line::Connect
            }
        })
        .collect()
}

/// Whether `text` is `pattern`, in which `{*}` is any text.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split("{*}");
    let first = parts.next().unwrap_or("");
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Waits until the other end has taken in all that was sent, so that the next piece is one by itself.
#[expect(
    unsafe_code,
    reason = "a request of the kernel that has no safe wrapper"
)]
fn taken(stream: &UnixStream) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut waiting: libc::c_int = 0;
        // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one int to the place that it is given.
        let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
        assert_eq!(result, 0);
        if waiting == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{waiting} bytes are not taken");
        thread::yield_now();
    }
}

/// A monitor in a directory with what the recordings name: a guest that drives disks
/// that come, and two disks.
struct Monitor {
    directory: tempfile::TempDir,
    child: Child,
}

impl Monitor {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::copy(kit::file("guests/hotplug").unwrap(), path("kernel")).unwrap();
        for disk in ["image", "hot"] {
            fs::File::create(path(disk))
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
        }
        let child = Command::new(kit::vireo().unwrap())
            .args(["serve", "--api-socket", "socket"])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("errors")).unwrap())
            .spawn()
            .unwrap();
        Self { directory, child }
    }

    fn connect(&self) -> Connection {
        Connection::open_within(&self.directory.path().join("socket"), LIMIT).unwrap()
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.directory.path().join("errors")).unwrap_or_default()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It has ended by itself when all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fails with the first answer that is not as it was recorded.
fn replay(name: &str) {
    if let Err(error) = probe::open_kvm() {
        println!("SKIP  {name}: cannot open /dev/kvm: {error}");
        suite::note(&format!("recorded-{name}"), &format!("skipped: {error}")).unwrap();
        return;
    }
    let path = places::workspace().join(format!("tests/recordings/{name}.txt"));
    let mut monitor = Monitor::start();
    let mut connection = monitor.connect();
    let mut exchanges = 0;
    for line in lines(&fs::read_to_string(path).unwrap()) {
        match line {
            Line::Connect => connection = monitor.connect(),
            Line::Sent(piece) => {
                connection.send(piece.as_bytes()).unwrap();
                taken(connection.stream());
            }
            Line::Answered(recorded) => {
                exchanges += 1;
                let Answer { mut head, body, .. } = connection.answer().unwrap();
                head.extend(body);
                let answered = String::from_utf8(head).unwrap();
                assert!(answered.is_ascii(), "{answered}");
                assert!(
                    matches(&recorded, &answered),
                    "answer {exchanges} is\n{answered}\nand not\n{recorded}\n{}",
                    monitor.errors()
                );
            }
        }
    }
    assert!(exchanges > 0);
    // What is not asked for is not said.
    let mut rest = Vec::new();
    connection.stream().read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    let status = monitor.child.wait().unwrap();
    assert!(status.success(), "{status}: {}", monitor.errors());
    println!("{name}: {exchanges} exchanges as they were recorded");
    suite::note(&format!("recorded-{name}"), "ran direct").unwrap();
}

#[test]
fn ch_remote_is_answered_as_it_was_recorded() {
    replay("ch-remote");
}

#[test]
fn katas_client_is_answered_as_it_was_recorded() {
    replay("kata");
}

#[test]
fn libvirts_driver_is_answered_as_it_was_recorded() {
    replay("libvirt");
}

#[test]
fn a_mask_stands_for_any_text_and_nothing_else_does() {
    assert!(matches("pid {*}, {*}!", "pid 7, two, three!"));
    assert!(matches("{*}", ""));
    assert!(matches("plain", "plain"));
    for other in ["plain ", "plai", "", "xplain"] {
        assert!(!matches("plain", other), "{other}");
    }
    assert!(!matches("a{*}b", "a b "));
    assert!(!matches("ab{*}bc", "abc"));
}

#[test]
fn every_recording_is_replayed_here() {
    let mut names: Vec<String> =
        fs::read_dir(Path::new(&places::workspace()).join("tests/recordings"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
    names.sort();
    assert_eq!(names, ["ch-remote.txt", "kata.txt", "libvirt.txt"]);
}
