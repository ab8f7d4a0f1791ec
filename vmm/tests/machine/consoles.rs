//! Consoles, signals and the end of the process, as users meet them.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use api::{Command as Ask, EventKind, Reply};
use serde_json::json;
use vmm::console::open_pty;
use vmm::machine::driver::Driver;
use vmm::machine::inbox::Message;
use vmm::monitor::MonitorOptions;

use crate::support::{Collected, Local, Vireo, can_run, config, guest, run_arguments, until};

/// The line that the panic test's child looks for, to do what it is made for.
const PANIC_CHILD: &str = "VIREO_TEST_PANIC";

/// A terminal with a person's settings.
struct Terminal {
    near: File,
    far: OwnedFd,
    path: String,
}

impl Terminal {
    fn new() -> Self {
        let (near, far, path) = open_pty().unwrap();
        let terminal = Self { near, far, path };
        terminal.stty("sane");
        terminal.stty("intr ^X");
        terminal
    }

    fn stty(&self, words: &str) -> String {
        let output = Command::new("stty")
            .args(["-F", &self.path])
            .args(words.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn settings(&self) -> String {
        self.stty("-g")
    }

    fn far(&self) -> Stdio {
        Stdio::from(self.far.try_clone().unwrap())
    }

    /// Starts the monitor with this terminal as its input and output.
    fn start(&self, name: &str, cmdline: &str, flags: &[&str]) -> Vireo {
        self.spawn(
            Command::new(env!("CARGO_BIN_EXE_vireo")).args(run_arguments(name, cmdline, flags)),
        )
    }

    fn spawn(&self, command: &mut Command) -> Vireo {
        Vireo::of(
            command
                .stdin(self.far())
                .stdout(self.far())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    fn screen(&self) -> Collected {
        let near = self.near.try_clone().unwrap();
        Collected::from(Waiting(near))
    }

    fn keyboard(&self) -> Waiting {
        Waiting(self.near.try_clone().unwrap())
    }
}

/// The near end of a pseudo-terminal, waited for where it is not ready.
struct Waiting(File);

impl Read for Waiting {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        until("something on the terminal", || {
            let read = self.0.read(to);
            (read.as_ref().err().map(std::io::Error::kind) != Some(std::io::ErrorKind::WouldBlock))
                .then_some(read)
        })
    }
}

impl Write for Waiting {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        until("room on the terminal", || {
            let written = self.0.write(from);
            (written.as_ref().err().map(std::io::Error::kind)
                != Some(std::io::ErrorKind::WouldBlock))
            .then_some(written)
        })
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The debug console's file, by which a guest says that it has come so far.
struct Mark(tempfile::NamedTempFile);

impl Mark {
    fn new() -> Self {
        Self(tempfile::NamedTempFile::new().unwrap())
    }

    fn flag(&self) -> String {
        format!("file={}", self.0.path().display())
    }

    fn wait(&self) {
        until("the guest's mark", || {
            let text = fs::read_to_string(self.0.path()).unwrap();
            text.contains("here").then_some(())
        });
    }
}

/// Words that have the guest write more than a pipe or a terminal holds.
fn much() -> String {
    "cpuid ".repeat(80)
}

#[test]
fn the_escape_ends_the_machine_and_the_terminal_is_as_before() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mut screen = terminal.screen();
    let mut vireo = terminal.start("hello", "stay", &[]);
    screen.wait_for("Hello");
    assert_ne!(terminal.settings(), before, "raw while the guest runs");
    terminal.keyboard().write_all(b"\x01x").unwrap();
    vireo.ends_with(0);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn the_escape_is_heard_over_what_a_deaf_guest_does_not_take() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mut screen = terminal.screen();
    let mut vireo = terminal.start("hello", "stay", &[]);
    screen.wait_for("Hello");
    let mut keyboard = terminal.keyboard();
    keyboard.write_all(&[b'a'; 20_000]).unwrap();
    keyboard.write_all(b"\x01h").unwrap();
    vireo.stderr.wait_for("Ctrl-a x");
    keyboard.write_all(b"\x01x").unwrap();
    vireo.ends_with(0);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_large_paste_reaches_the_guest_whole() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let mut screen = terminal.screen();
    let mut vireo = terminal.start("poke", "serial-echo", &[]);
    screen.wait_for("echo=ready");
    let lines: Vec<String> = (0..1_700).map(|n| format!("{n:060}")).collect();
    let pasted = lines.join("\r");
    assert!(pasted.len() > 100_000);
    let mut keyboard = terminal.keyboard();
    keyboard.write_all(pasted.as_bytes()).unwrap();
    keyboard.write_all(b"\rq\r").unwrap();
    let text = screen.wait_for("poke=done");
    let echoed: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("echo:"))
        .collect();
    assert!(echoed.iter().eq(lines.iter().chain([&"q".to_owned()])));
    vireo.ends_with(0);
}

#[test]
fn what_a_pipe_brings_reaches_the_guest_whole_and_its_end_is_no_end() {
    if !can_run() {
        return;
    }
    for word in ["serial-echo", "serial-echo-irq"] {
        let mut vireo = Vireo::start("poke", word, &[]);
        // At once: it waits until the guest listens.
        let lines: Vec<String> = (0..1_700).map(|n| format!("{n:060}")).collect();
        let mut stdin = vireo.stdin.take().unwrap();
        let text = format!("{}\nq\n", lines.join("\n"));
        std::thread::spawn(move || stdin.write_all(text.as_bytes()).unwrap());
        let text = vireo.stdout.rest();
        let echoed: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("echo:"))
            .collect();
        assert!(
            echoed.iter().eq(lines.iter().chain([&"q".to_owned()])),
            "{word}"
        );
        assert!(text.contains("poke=done"), "{text}");
        vireo.ends_with(0);
    }
}

#[test]
fn a_signal_presses_the_power_button_and_then_ends_what_does_not_listen() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mut screen = terminal.screen();
    let mut vireo = terminal.start("hello", "stay", &["--shutdown-timeout", "1"]);
    screen.wait_for("Hello");
    vireo.signal("TERM");
    vireo.ends_with(6);
    assert!(vireo.stderr.rest().contains("--shutdown-timeout"));
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_second_signal_ends_the_machine_at_once() {
    if !can_run() {
        return;
    }
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    for aio in ["io_uring", "threads"] {
        let disk = format!("path={},aio={aio}", disk.path().display());
        let flags = ["--shutdown-timeout", "100000", "--disk", &disk];
        // Two of one kind, sent at once, are one signal to the process.
        for (first, second) in [("TERM", "INT"), ("INT", "HUP")] {
            let mut vireo = Vireo::start("blk", "bench=read count=1000000000", &flags);
            vireo.stdout.wait_for("bench=begin");
            vireo.signal(first);
            assert!(vireo.is_running());
            vireo.signal(second);
            vireo.ends_with(0);
        }
    }
}

#[test]
fn a_signal_during_the_start_ends_the_machine_too() {
    if !can_run() {
        return;
    }
    for _ in 0..10 {
        let mut vireo = Vireo::start("hello", "stay", &["--shutdown-timeout", "0"]);
        vireo.signal("TERM");
        // By the signal itself, or by its handling.
        vireo.end();
    }
}

/// Not a test by itself: [`a_panic_restores_the_terminal`] runs it on a terminal.
#[test]
fn panics_when_told_to() {
    if std::env::var_os(PANIC_CHILD).is_none() {
        return;
    }
    let machine = Local::boot(&config("hello", "stay", json!({ "serial": "tty" })));
    let (_kept, receiver) = channel::<()>();
    machine
        .mailbox
        .send(Message::Errand(Box::new(|_: &mut Driver| {
            panic!("as told");
        })));
    // The control thread takes the machine down with it.
    let _ = receiver.recv_timeout(Duration::from_millis(1));
}

#[test]
fn a_panic_restores_the_terminal() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mut screen = terminal.screen();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "consoles::panics_when_told_to", "--nocapture"])
        .env(PANIC_CHILD, "1");
    let mut child = terminal.spawn(&mut command);
    screen.wait_for("Hello");
    child.end();
    assert!(child.stderr.rest().contains("as told"));
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_pseudo_terminal_of_the_monitors_own_works_both_ways() {
    if !can_run() {
        return;
    }
    let mut vireo = Vireo::start("poke", "serial-echo", &["--serial", "pty"]);
    let text = vireo.stderr.wait_for("/dev/pts/");
    let text = if text.ends_with('\n') {
        text
    } else {
        vireo.stderr.wait_for("\n")
    };
    let path = text.trim().rsplit(' ').next().unwrap();
    let pty = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut screen = Collected::from(pty.try_clone().unwrap());
    screen.wait_for("echo=ready");
    (&pty).write_all(b"one\rtwo\x01x\r").unwrap();
    screen.wait_for("echo:one");
    screen.wait_for("echo:two\x01x");
    // Who leaves and comes back finds the machine running.
    drop(pty);
    let pty = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    (&pty).write_all(b"three\rq\r").unwrap();
    screen.wait_for("echo:three");
    vireo.ends_with(0);
}

#[test]
fn a_reader_that_is_slow_holds_up_nobody_and_misses_nothing() {
    if !can_run() {
        return;
    }
    let words = format!("{}e9=here", much());
    let mut fast = Vireo::start("poke", &words, &[]);
    let whole = fast.stdout.rest();
    fast.ends_with(0);
    assert!(
        whole.len() > 80_000 && whole.len() < 1 << 20,
        "{}",
        whole.len()
    );

    let mark = Mark::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut slow = Vireo::of(
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(run_arguments("poke", &words, &["--debugcon", &mark.flag()]))
            .stdin(Stdio::null())
            .stdout(writer)
            .spawn()
            .unwrap(),
    );
    // The guest comes to its end while nobody has read a byte.
    mark.wait();
    let watched = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < watched {
        std::thread::sleep(Duration::from_millis(10));
        assert!(slow.is_running(), "it waits for its reader");
    }
    assert_eq!(Collected::from(reader).rest(), whole);
    slow.ends_with(0);
}

#[test]
fn a_reader_that_never_reads_is_left_after_a_signal() {
    if !can_run() {
        return;
    }
    let mark = Mark::new();
    let (_reader, writer) = std::io::pipe().unwrap();
    let words = format!("{}e9=here", much());
    let mut vireo = Vireo::of(
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(run_arguments("poke", &words, &["--debugcon", &mark.flag()]))
            .stdout(writer)
            .stdin(Stdio::null())
            .spawn()
            .unwrap(),
    );
    mark.wait();
    vireo.signal("TERM");
    vireo.ends_with(0);
}

#[test]
fn a_terminal_that_takes_nothing_holds_up_nobody() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mark = Mark::new();
    let words = format!("{}e9=here stay", much());
    let mut vireo = terminal.start("poke", &words, &["--debugcon", &mark.flag()]);
    mark.wait();
    // Room for some of what waits, but not for all.
    let mut some = [0; 300];
    terminal.keyboard().read_exact(&mut some).unwrap();
    // Of two of a kind the second may be lost, while the first has not been seen.
    vireo.signal("TERM");
    vireo.signal("INT");
    vireo.ends_with(0);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_guest() {
    if !can_run() {
        return;
    }
    let mark = Mark::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut vireo = Vireo::of(
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(run_arguments(
                "poke",
                "cpuid cpuid e9=here",
                &["--debugcon", &mark.flag()],
            ))
            .stdin(Stdio::null())
            .stdout(writer)
            .spawn()
            .unwrap(),
    );
    mark.wait();
    vireo.ends_with(0);
}

#[test]
fn a_full_disk_under_the_serial_port_does_not_end_the_guest() {
    if !can_run() {
        return;
    }
    let mark = Mark::new();
    let flags = ["--serial", "file=/dev/full", "--debugcon", &mark.flag()];
    let mut vireo = Vireo::start("poke", "cpuid e9=here", &flags);
    mark.wait();
    vireo.ends_with(0);
}

#[test]
fn a_file_gets_the_output_and_nothing_else_does() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log");
    let flag = format!("file={}", file.display());
    let mut vireo = Vireo::start("hello", "", &["--serial", &flag]);
    assert_eq!(vireo.stdout.rest(), "");
    vireo.ends_with(0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "Hello\n");
    for serial in ["null", "off"] {
        let mut vireo = Vireo::start("hello", "", &["--serial", serial]);
        assert_eq!(vireo.stdout.rest(), "");
        vireo.ends_with(0);
    }
}

/// What the threads of a process are called.
fn threads(id: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

#[test]
fn several_sinks_at_once_all_get_the_output_and_type() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (log, socket) = (dir.path().join("log"), dir.path().join("socket"));
    let (file, listen) = (
        format!("file={},max_size=1M", log.display()),
        format!("socket={}", socket.display()),
    );
    let flags = ["--serial", "tty", "--serial", &file, "--serial", &listen];
    let mut vireo = Vireo::start("poke", "serial-echo", &flags);
    vireo.stdout.wait_for("echo=ready");
    // They come late, and get what was written before.
    let clients = [(); 2].map(|()| UnixStream::connect(&socket).unwrap());
    let mut screens = clients.each_ref().map(|client| {
        let client = client.try_clone().unwrap();
        Collected::from(client)
    });
    screens[0].wait_for("echo=ready");
    (&clients[0]).write_all(b"one\r").unwrap();
    screens[1].wait_for("echo:one");
    (&clients[1]).write_all(b"two\r").unwrap();
    screens[0].wait_for("echo:two");
    vireo.stdout.wait_for("echo:two");
    drop(clients);
    vireo.stdin.take().unwrap().write_all(b"q\r").unwrap();
    let whole = screens[0].rest();
    vireo.ends_with(0);
    assert!(whole.ends_with("poke=done\n"), "{whole}");
    assert_eq!(screens[1].rest(), whole);
    assert_eq!(fs::read_to_string(&log).unwrap(), whole);
    assert!(!socket.exists());
}

#[test]
fn a_console_has_a_thread_only_where_somebody_is_waited_for() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = format!("file={}", dir.path().join("log").display());
    for (serial, count) in [("null", 0), ("off", 0), (file.as_str(), 0), ("tty", 1)] {
        let mark = Mark::new();
        let flags = ["--serial", serial, "--debugcon", &mark.flag()];
        let vireo = Vireo::start("poke", "e9=here stay", &flags);
        mark.wait();
        // A thread that has just begun still has the name of the process.
        let threads = until("the threads' names", || {
            let threads = threads(vireo.id());
            let unnamed = threads.iter().filter(|name| *name == "vireo").count();
            (unnamed == 1).then_some(threads)
        });
        let consoles = threads.iter().filter(|name| *name == "console").count();
        assert_eq!(consoles, count, "{serial}: {threads:?}");
    }
}

#[test]
fn a_second_machine_finds_the_sinks_and_clients_of_the_first() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (log, socket) = (dir.path().join("log"), dir.path().join("socket"));
    let serial = json!({ "serial": ["pty", { "file": log }, { "socket": socket }] });
    let config = config("poke", "serial-echo", serial);
    let stays = MonitorOptions {
        no_shutdown: true,
        serial_replay: 1 << 16,
        ..MonitorOptions::default()
    };
    let mut machine = Local::boot_in(&config, stays);
    let path = machine.pty();
    let pty = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut screen = Collected::from(pty.try_clone().unwrap());
    let client = UnixStream::connect(&socket).unwrap();
    let mut other = Collected::from(client.try_clone().unwrap());
    for word in ["first", "second"] {
        screen.wait_for("echo=ready");
        other.wait_for("echo=ready");
        (&client).write_all(format!("{word}\r").as_bytes()).unwrap();
        screen.wait_for(&format!("echo:{word}"));
        (&pty).write_all(b"q\r").unwrap();
        other.wait_for("poke=done");
        until("the end of the guest", || {
            let events = machine.new_events();
            let ended = |kind: &EventKind| matches!(kind, EventKind::Exit { .. });
            events.iter().any(ended).then_some(())
        });
        if word == "first" {
            assert_eq!(machine.ask(Ask::Boot), Ok(Reply::Done));
            assert_eq!(machine.pty(), path);
        }
    }
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(text.matches("poke=done").count(), 2, "{text}");
    assert!(text.contains("echo:first") && text.contains("echo:second"));
    assert_eq!(machine.ask(Ask::Quit), Ok(Reply::Done));
    machine.outcome();
    assert!(!socket.exists());
}

#[test]
fn a_closed_terminal_ends_the_machine() {
    if !can_run() {
        return;
    }
    let terminal = Terminal::new();
    let mark = Mark::new();
    let flags = ["--debugcon", &mark.flag()];
    let mut vireo = terminal.start("poke", "e9=here stay", &flags);
    mark.wait();
    drop(terminal);
    vireo.ends_with(0);
}

#[test]
fn a_socket_as_standard_output_that_nobody_reads_holds_up_nobody() {
    if !can_run() {
        return;
    }
    let mark = Mark::new();
    let (reader, writer) = UnixStream::pair().unwrap();
    // It is full before the guest says anything, and a blocking one.
    writer.set_nonblocking(true).unwrap();
    let filled = (0..).take_while(|_| (&writer).write(b"x").is_ok()).count();
    writer.set_nonblocking(false).unwrap();
    let words = format!("{}e9=here", much());
    let mut vireo = Vireo::of(
        Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(run_arguments("poke", &words, &["--debugcon", &mark.flag()]))
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(writer))
            .spawn()
            .unwrap(),
    );
    mark.wait();
    let text = Collected::from(reader).rest();
    assert!(text.trim_start_matches('x').len() > 80_000);
    assert!(text.starts_with(&"x".repeat(filled)) && text.ends_with("poke=done\n"));
    vireo.ends_with(0);
}

#[test]
fn a_file_that_cannot_be_written_is_told_once_with_its_flag() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let file = format!("file={}", log.display());
    let flags = ["--serial", "file=/dev/full", "--serial", &file];
    let mut vireo = Vireo::start("poke", "cpuid", &flags);
    let told = vireo.stderr.rest();
    vireo.ends_with(0);
    assert_eq!(told.matches("--serial file=/dev/full").count(), 1, "{told}");
    assert!(told.contains("No space left on device"), "{told}");
    assert!(fs::read_to_string(&log).unwrap().ends_with("poke=done\n"));
}

#[test]
fn a_shared_standard_output_is_left_as_it_was() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .unwrap();
    (&file).write_all(b"before\n").unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_vireo"))
        .args(run_arguments("hello", "", &[]))
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .status()
        .unwrap();
    assert!(status.success());
    (&file).write_all(b"after\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "before\nHello\nafter\n");
    let terminal = Terminal::new();
    let _screen = terminal.screen();
    let mut vireo = terminal.start("hello", "", &[]);
    vireo.ends_with(0);
    let flags = descriptor_flags(&terminal.far);
    assert_eq!(flags & libc::O_NONBLOCK, 0, "{flags:#o}");
}

/// The flags of an open file, which all who share it see.
fn descriptor_flags(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(Path::new(&path)).unwrap();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    i32::from_str_radix(flags.unwrap().trim(), 8).unwrap()
}

#[test]
fn the_ways_in_which_guests_end_have_their_exit_codes() {
    if !can_run() {
        return;
    }
    for (words, code) in [("poweroff", 0), ("panic", 3), ("triple", 4)] {
        let mut vireo = Vireo::start("poke", words, &[]);
        vireo.ends_with(code);
    }
    assert!(guest("poke").exists());
}
