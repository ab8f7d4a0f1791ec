//! What the tests share: guests, the monitor as a process, and in this process.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::client::Client;
use api::wire::VmInfoState;
use api::{
    Answer, Command as Ask, Control, ControlError, Event, EventKind, EventLog, ExitReason,
    PauseReason, Reply, VmState,
};
use serde_json::{Value, json};
use virtio::models::{MODELS, Model};
use vmm::config::VmConfig;
use vmm::console::Consoles;
use vmm::machine::build::{Built, build};
use vmm::machine::driver::Driver;
use vmm::machine::inbox::{Mailbox, Message, inbox};
use vmm::machine::parts::Parts;
use vmm::machine::{Machine, MachineError};
use vmm::monitor::{Description, Monitor, MonitorHandle, MonitorOptions};
use vmm::opener::Opener;
use vmm::sandbox;

/// Nothing here takes long on a machine that has time for it; who waits longer than this has found a fault on any.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Says why a test does not test.
pub fn skip(why: &str) {
    println!("skipped: {why}");
    eprintln!("skipped: {why}");
}

/// What `vireo doctor` says of this host: a fact of its report.
fn host(fact: &str) -> &'static Value {
    static REPORT: OnceLock<Value> = OnceLock::new();
    let report = REPORT.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(["doctor", "--json"])
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    });
    &report[fact]
}

/// Whether machines run here; says so when not.
pub fn can_run() -> bool {
    let usable = host("usable").as_bool().unwrap();
    if !usable {
        skip("this host has no usable KVM; see vireo doctor");
    }
    usable
}

/// Whether the processor runs guests. Without, KVM interprets their kernel
/// mode and does not see their breakpoints in user mode.
pub fn has_hardware() -> bool {
    host("hardware_virtualization").as_bool().unwrap()
}

/// Whether this host has `gib` GiB of memory; says so when not.
pub fn has_memory(gib: u64) -> bool {
    let enough = host("memory").as_u64().unwrap() >= gib << 30;
    if !enough {
        skip(&format!("this host has less than {gib} GiB of memory"));
    }
    enough
}

/// The small guest `name`, built on first use.
pub fn guest(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let dir = BUILT.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests");
        fs::create_dir_all(&out).unwrap();
        let lock = File::create(out.join("lock")).unwrap();
        lock.lock().unwrap();
        let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/guests");
        let output = Command::new("make")
            .args(["-s", "-C", sources])
            .arg(format!("OUT={}", out.display()))
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        out
    });
    dir.join(name)
}

/// The address of a symbol of the guest `name`.
pub fn symbol(name: &str, symbol: &str) -> u64 {
    let output = Command::new("nm").arg(guest(name)).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(symbol));
    let address = line.and_then(|line| line.split(' ').next()).unwrap();
    u64::from_str_radix(address, 16).unwrap()
}

/// Asks until the answer is `Some`, resting in between.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "{what} did not happen");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that a thread collects as they come.
pub struct Collected {
    bytes: Receiver<Vec<u8>>,
    so_far: Vec<u8>,
}

impl Collected {
    pub fn from(mut source: impl Read + Send + 'static) -> Self {
        let (sender, bytes) = channel();
        thread::spawn(move || {
            let mut chunk = vec![0; 65536];
            while let Ok(len @ 1..) = source.read(&mut chunk) {
                if sender.send(chunk[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            bytes,
            so_far: Vec::new(),
        }
    }

    /// All that came until `text` did.
    pub fn wait_for(&mut self, text: &str) -> String {
        let end = Instant::now() + LIMIT;
        let mut searched = 0_usize;
        loop {
            let from = searched.saturating_sub(text.len());
            let fresh = &self.so_far[from..];
            if fresh.windows(text.len()).any(|w| w == text.as_bytes()) {
                return self.text();
            }
            searched = self.so_far.len();
            match self.bytes.recv_timeout(end - Instant::now()) {
                Ok(bytes) => self.so_far.extend(bytes),
                Err(_) => panic!("no '{text}' in: {}", self.text()),
            }
        }
    }

    /// All that has come by now.
    pub fn so_far(&mut self) -> String {
        while let Ok(bytes) = self.bytes.try_recv() {
            self.so_far.extend(bytes);
        }
        self.text()
    }

    /// All until the end.
    pub fn rest(&mut self) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            match self.bytes.recv_timeout(end - Instant::now()) {
                Ok(bytes) => self.so_far.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => return self.text(),
                Err(RecvTimeoutError::Timeout) => panic!("no end of: {}", self.text()),
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.so_far).into_owned()
    }
}

/// The arguments of `vireo run` for a guest.
pub fn run_arguments(name: &str, cmdline: &str, flags: &[&str]) -> Vec<String> {
    let kernel = guest(name).into_os_string().into_string().unwrap();
    let mut all: Vec<String> = ["run", "--kernel"].map(str::to_owned).into();
    all.push(kernel);
    all.extend(["--cmdline".to_owned(), cmdline.to_owned()]);
    if !flags.contains(&"--memory") {
        all.extend(["--memory", "64M"].map(str::to_owned));
    }
    all.extend(flags.iter().map(|&flag| flag.to_owned()));
    all
}

/// A `vireo run` as a process; killed when dropped.
pub struct Vireo {
    child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: Collected,
    pub stderr: Collected,
}

impl Vireo {
    /// With pipes for standard input and output.
    pub fn start(name: &str, cmdline: &str, flags: &[&str]) -> Self {
        Self::spawn(
            Command::new(env!("CARGO_BIN_EXE_vireo")).args(run_arguments(name, cmdline, flags)),
        )
    }

    /// `command` with pipes where nothing else has been said.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self::of(child)
    }

    pub fn of(mut child: Child) -> Self {
        let collect = |pipe: Option<Box<dyn Read + Send>>| {
            Collected::from(pipe.unwrap_or_else(|| Box::new(std::io::empty())))
        };
        Self {
            stdin: child.stdin.take(),
            stdout: collect(child.stdout.take().map(|p| Box::new(p) as _)),
            stderr: collect(child.stderr.take().map(|p| Box::new(p) as _)),
            child,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let id = self.id().to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status();
        assert!(status.unwrap().success());
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn end(&mut self) -> ExitStatus {
        until("the end of the process", || self.child.try_wait().unwrap())
    }

    /// The process ends with exit code `code`.
    pub fn ends_with(&mut self, code: i32) {
        let status = self.end();
        let text = self.stderr.rest();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(code), None),
            "{text}"
        );
    }
}

impl Drop for Vireo {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `vireo run` with a control socket, in a directory of its own.
pub struct Served {
    pub vireo: Vireo,
    pub dir: tempfile::TempDir,
}

impl Served {
    /// The guest and its flags are as for [`Vireo::start`]; `{dir}` in flags is the directory.
    pub fn start(name: &str, cmdline: &str, flags: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), name, cmdline, flags)
    }

    /// As [`Served::start`], where files are already.
    pub fn start_in(dir: tempfile::TempDir, name: &str, cmdline: &str, flags: &[&str]) -> Self {
        let vireo = Self::run(dir.path(), name, cmdline, flags);
        Self { vireo, dir }
    }

    /// Another process on the same socket, when the first has ended.
    pub fn restart(&mut self, name: &str, cmdline: &str, flags: &[&str]) {
        self.vireo = Self::run(self.dir.path(), name, cmdline, flags);
    }

    fn run(dir: &Path, name: &str, cmdline: &str, flags: &[&str]) -> Vireo {
        let here = dir.to_str().unwrap();
        let flags: Vec<String> = flags.iter().map(|f| f.replace("{dir}", here)).collect();
        let socket = format!("{here}/api.sock");
        let mut all: Vec<&str> = flags.iter().map(String::as_str).collect();
        all.extend(["--api-socket", &socket]);
        let vireo = Vireo::start(name, cmdline, &all);
        until("the boot", || {
            let info = Client::connect(&socket).ok()?.info().ok()?;
            (info.state == VmInfoState::Running).then_some(())
        });
        vireo
    }

    pub fn socket(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// A file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn client(&self) -> Client {
        Client::connect(self.socket()).unwrap()
    }
}

/// A configuration for [`Local::boot`]: 64 MiB, one vCPU, no serial port,
/// with the fields of `more` on top.
pub fn config(name: &str, cmdline: &str, more: Value) -> VmConfig {
    let mut whole = json!({
        "payload": { "kernel": guest(name), "cmdline": cmdline },
        "memory": { "size": 64 << 20 },
        "serial": "off",
        "shutdown_timeout": 1000,
    });
    let fields = whole.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    let mut config: VmConfig = serde_json::from_value(whole).unwrap();
    config.complete(MODELS);
    config
}

/// A machine in this process.
pub struct Local {
    pub mailbox: Mailbox,
    pub handle: MonitorHandle,
    /// The last event that [`Local::next_event`] gave.
    seen: AtomicU64,
    monitor: Option<JoinHandle<Result<ExitReason, MachineError>>>,
}

/// Builds a machine that is not run.
pub fn built(config: &VmConfig) -> Built {
    built_with(config, &EventLog::default())
}

/// The same; what happens to it goes to `events`.
pub fn built_with(config: &VmConfig, events: &EventLog) -> Built {
    let (mailbox, _) = inbox().unwrap();
    let (opener, consoles) = (Arc::new(Opener::new()), Arc::new(Consoles::new(0).unwrap()));
    let parts = Parts::open(config, MODELS, &opener).unwrap();
    build(config, parts, &opener, &mailbox, events, &consoles).unwrap()
}

/// Has what monitors of this process start be filtered.
pub fn confine() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| sandbox::begin(sandbox::Mode::True).unwrap());
}

impl Local {
    pub fn boot(config: &VmConfig) -> Self {
        Self::boot_in(config, MonitorOptions::default())
    }

    /// As [`Local::boot`], in a monitor that behaves so.
    pub fn boot_in(config: &VmConfig, options: MonitorOptions) -> Self {
        Self::boot_with(MODELS, config, options)
    }

    /// As [`Local::boot`], with other devices behind the names of models.
    pub fn boot_of(models: &'static [Model], config: &VmConfig) -> Self {
        Self::boot_with(models, config, MonitorOptions::default())
    }

    fn boot_with(models: &'static [Model], config: &VmConfig, options: MonitorOptions) -> Self {
        let opener = Arc::new(Opener::new());
        let monitor = Monitor::new(models, opener, options).unwrap();
        confine();
        let (mailbox, handle) = (monitor.mailbox(), monitor.handle());
        let description = Description::of(config.clone());
        let local = Self {
            mailbox,
            handle,
            seen: AtomicU64::new(0),
            monitor: Some(thread::spawn(move || monitor.run(description))),
        };
        // Some guests have come to their end by then.
        until("the boot", || {
            let events = local.events();
            let booted = |event: &Event| {
                matches!(
                    event.kind,
                    EventKind::State {
                        state: VmState::Running,
                        ..
                    }
                )
            };
            events.iter().any(booted).then_some(())
        });
        local
    }

    /// A monitor without a description, which stays when its machine has ended.
    pub fn idle() -> Self {
        let options = MonitorOptions {
            no_shutdown: true,
            ..MonitorOptions::default()
        };
        let monitor = Monitor::new(MODELS, Arc::new(Opener::new()), options).unwrap();
        confine();
        Self {
            mailbox: monitor.mailbox(),
            handle: monitor.handle(),
            seen: AtomicU64::new(0),
            monitor: Some(thread::spawn(move || monitor.serve())),
        }
    }

    pub fn ask(&self, command: Ask) -> Result<Reply, ControlError> {
        self.mailbox.call(command)
    }

    /// The state now, and why it is paused.
    pub fn state(&self) -> (VmState, Option<PauseReason>) {
        let (answer, receiver) = channel();
        let errand = Box::new(move |driver: &mut Driver| {
            answer.send(driver.state()).unwrap();
        });
        assert!(self.mailbox.send(Message::Errand(errand)));
        receiver.recv_timeout(LIMIT).unwrap()
    }

    /// Whether the monitor answers no more.
    pub fn has_ended(&self) -> bool {
        let nothing: Answer = Box::new(|_| ());
        !self.mailbox.send(Message::Command(Ask::Boot, nothing))
    }

    /// All that has happened.
    pub fn events(&self) -> Vec<Event> {
        let events = self.handle.events().after(0, usize::MAX);
        events.iter().map(|event| Event::clone(event)).collect()
    }

    /// What has happened that [`Local::next_event`] has not told yet.
    pub fn new_events(&self) -> Vec<EventKind> {
        let seen = self.seen.load(Ordering::Acquire);
        let events = self.handle.events().after(seen, usize::MAX);
        if let Some(last) = events.last() {
            self.seen.store(last.id, Ordering::Release);
        }
        events.iter().map(|event| event.kind.clone()).collect()
    }

    /// Waits for the next event.
    pub fn next_event(&self) -> EventKind {
        let seen = self.seen.load(Ordering::Acquire);
        let event = until("an event", || self.handle.events().after(seen, 1).pop());
        self.seen.store(event.id, Ordering::Release);
        event.kind.clone()
    }

    /// The far end of the serial port's pseudo-terminal.
    pub fn pty(&self) -> PathBuf {
        self.handle.info().unwrap().config.serial.file.unwrap()
    }

    /// Has the control thread do something with the machine.
    pub fn machine<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Machine) -> T + Send + 'static,
    ) -> T {
        let (answer, receiver) = channel();
        let errand = Box::new(move |driver: &mut Driver| {
            answer.send(work(driver.machine())).unwrap();
        });
        assert!(self.mailbox.send(Message::Errand(errand)));
        receiver.recv_timeout(LIMIT).unwrap()
    }

    /// The 64-bit word at a guest-physical address.
    pub fn word(&self, address: u64) -> u64 {
        self.machine(move |machine| {
            let mut bytes = [0; 8];
            assert!(machine.access_memory(address, &mut bytes, false));
            u64::from_le_bytes(bytes)
        })
    }

    /// Waits for the end that the guest or a command has brought about.
    pub fn outcome(&mut self) -> Outcome {
        let monitor = self.monitor.take().unwrap();
        until("the end of the machine", || {
            monitor.is_finished().then_some(())
        });
        let reason = monitor.join().unwrap().unwrap();
        let detail = self
            .events()
            .into_iter()
            .rev()
            .find_map(|event| match event.kind {
                EventKind::Exit { detail, .. } => Some(detail),
                _ => None,
            });
        Outcome {
            reason,
            detail: detail.flatten(),
        }
    }
}

/// What is published at the end of a machine of which nothing was wrong.
pub fn exit(reason: ExitReason) -> EventKind {
    EventKind::Exit {
        reason,
        detail: None,
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Outcome {
    pub reason: ExitReason,
    pub detail: Option<String>,
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(monitor) = self.monitor.take() {
            let _ = self.ask(Ask::Quit);
            let _ = monitor.join();
        }
    }
}
