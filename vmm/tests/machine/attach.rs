//! `vireo console` at a monitor that the test plays.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use api::http::{ServerHandle, ServerOptions, serve};
use api::{Answer, Command as Ask, Control, ControlError, ErrorKind, EventLog, wire};
use vmm::console::open_pty;

use crate::support::{Collected, LIMIT, Vireo};

/// A monitor that has a console and nothing else.
struct Fake {
    consoles: Mutex<Sender<UnixStream>>,
    events: EventLog,
}

fn nothing() -> ControlError {
    ControlError::new(ErrorKind::NotFound, "nothing is here")
}

impl Control for Fake {
    fn submit(&self, _: Ask, answer: Answer) {
        answer(Err(nothing()));
    }
    fn ping(&self) -> wire::VmmPingResponse {
        wire::VmmPingResponse {
            build_version: String::new(),
            version: String::new(),
            pid: 0,
            features: Vec::new(),
        }
    }
    fn info(&self) -> Result<wire::VmInfo, ControlError> {
        Err(nothing())
    }
    fn counters(&self) -> Result<wire::VmCounters, ControlError> {
        Err(nothing())
    }
    fn balloon(&self) -> Result<wire::BalloonInfo, ControlError> {
        Err(nothing())
    }
    fn devices(&self) -> Result<Vec<wire::DeviceInfo>, ControlError> {
        Err(nothing())
    }
    fn metrics(&self) -> String {
        String::new()
    }
    fn jobs(&self) -> Vec<wire::JobInfo> {
        Vec::new()
    }
    fn cancel_job(&self, _: &str) -> Result<(), ControlError> {
        Err(nothing())
    }
    fn migration(&self) -> Result<wire::MigrationInfo, ControlError> {
        Err(nothing())
    }
    fn steer_migration(&self, _: wire::MigrationOrder) -> Result<(), ControlError> {
        Err(nothing())
    }
    fn consoles(&self) -> Vec<wire::ConsoleSink> {
        Vec::new()
    }
    fn open_console(&self, request: &wire::ConsoleRequest) -> Result<UnixStream, ControlError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(LIMIT)).unwrap();
        if request.replay {
            theirs.write_all(b"earlier\n").unwrap();
        }
        self.consoles.lock().unwrap().send(theirs).unwrap();
        Ok(ours)
    }
    fn events(&self) -> &EventLog {
        &self.events
    }
}

struct Monitor {
    socket: PathBuf,
    consoles: Receiver<UnixStream>,
    _server: ServerHandle,
    _directory: tempfile::TempDir,
}

impl Monitor {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let (consoles, receiver) = channel();
        let fake = Fake {
            consoles: Mutex::new(consoles),
            events: EventLog::default(),
        };
        let listener = UnixListener::bind(&socket).unwrap();
        let server = serve(listener, Arc::new(fake), ServerOptions::default());
        Self {
            socket,
            consoles: receiver,
            _server: server.unwrap(),
            _directory: directory,
        }
    }

    fn verb(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg("console").arg("--api-socket").arg(&self.socket);
        command.args(flags).env_remove("VIREO_LOG");
        command
    }

    /// The guest's end of the console that was opened.
    fn console(&self) -> UnixStream {
        self.consoles.recv_timeout(LIMIT).unwrap()
    }
}

/// A terminal, and a user at it.
struct Terminal {
    keys: File,
    screen: Collected,
    far: OwnedFd,
    path: String,
}

impl Terminal {
    fn new() -> Self {
        let (keys, far, path) = open_pty().unwrap();
        // The other descriptor may block.
        let screen = Collected::from(Waiting(keys.try_clone().unwrap()));
        let terminal = Self {
            keys,
            screen,
            far,
            path,
        };
        terminal.stty("sane");
        terminal
    }

    fn stty(&self, word: &str) -> String {
        let mut command = Command::new("stty");
        let output = command.args(["-F", &self.path, word]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn start(&self, mut command: Command) -> Vireo {
        let far = || Stdio::from(self.far.try_clone().unwrap());
        let child = command.stdin(far()).stdout(far()).stderr(Stdio::piped());
        Vireo::of(child.spawn().unwrap())
    }
}

/// Reads of a descriptor that does not block.
struct Waiting(File);

impl Read for Waiting {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fds = [rustix::event::PollFd::new(
                        &self.0,
                        rustix::event::PollFlags::IN,
                    )];
                    rustix::event::poll(&mut fds, None)?;
                }
                other => return other,
            }
        }
    }
}

#[test]
fn a_terminal_shows_what_was_types_detaches_and_is_as_before() {
    for key in [b'd', b'x'] {
        let (monitor, mut terminal) = (Monitor::new(), Terminal::new());
        let before = terminal.stty("-g");
        let mut verb = terminal.start(monitor.verb(&[]));
        let mut guest = monitor.console();
        terminal.screen.wait_for("earlier");
        verb.stderr.wait_for("Ctrl-a d");
        assert_ne!(terminal.stty("-g"), before);
        terminal.keys.write_all(b"ls\r\x03\x01a").unwrap();
        let mut typed = [0; 5];
        guest.read_exact(&mut typed).unwrap();
        // Ctrl-c is the guest's.
        assert_eq!(&typed, b"ls\r\x03\x01");
        guest.write_all(b"file\r\n").unwrap();
        terminal.screen.wait_for("file");
        terminal.keys.write_all(&[1, key]).unwrap();
        verb.stderr.wait_for("detached from");
        verb.ends_with(0);
        assert_eq!(terminal.stty("-g"), before);
        // The monitor hears that it has gone.
        assert_eq!(guest.read(&mut typed).unwrap(), 0);
    }
}

#[test]
fn a_signal_and_the_end_of_the_machine_leave_the_terminal_as_it_was() {
    for signal in [Some("TERM"), Some("HUP"), None] {
        let (monitor, mut terminal) = (Monitor::new(), Terminal::new());
        let before = terminal.stty("-g");
        let mut verb = terminal.start(monitor.verb(&[]));
        let guest = monitor.console();
        terminal.screen.wait_for("earlier");
        match signal {
            Some(signal) => verb.signal(signal),
            None => drop(guest),
        }
        verb.ends_with(0);
        assert_eq!(terminal.stty("-g"), before);
    }
}

#[test]
fn pipes_carry_every_byte_and_output_goes_on_behind_the_end_of_input() {
    let monitor = Monitor::new();
    let mut verb = Vireo::spawn(&mut monitor.verb(&["--no-replay"]));
    let mut guest = monitor.console();
    let text = b"\x01d\x01x\xff".to_vec();
    verb.stdin.take().unwrap().write_all(&text).unwrap();
    let mut typed = Vec::new();
    guest.read_to_end(&mut typed).unwrap();
    assert_eq!(typed, text);
    guest.write_all(b"later").unwrap();
    drop(guest);
    assert_eq!(verb.stdout.rest(), "later");
    verb.ends_with(0);
}
