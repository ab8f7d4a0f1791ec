//! What the tests share: guests, the monitor as a process, and in this process.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::{Command as Ask, Control, ControlError, Event, Reply, VmState};
use serde_json::{Value, json};
use virtio::models::MODELS;
use vmm::config::VmConfig;
use vmm::events::EventBus;
use vmm::gdb::Server;
use vmm::machine::build::{Built, build};
use vmm::machine::driver::{Driver, Outcome};
use vmm::machine::inbox::{ControlHandle, Mailbox, Message};
use vmm::machine::{Machine, MachineError};
use vmm::opener::Opener;

/// Nothing here takes long; who waits longer than this has found a fault.
pub const LIMIT: Duration = Duration::from_secs(100);

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
    pub control: ControlHandle,
    pub mailbox: Mailbox,
    pub events: Receiver<Event>,
    pub pty: Option<String>,
    driver: Option<JoinHandle<Result<Outcome, MachineError>>>,
    server: Option<Server>,
}

/// Builds a machine that is not run.
pub fn built(config: &VmConfig, events: &EventBus) -> Built {
    build(config, MODELS, &Arc::new(Opener::new()), events).unwrap()
}

impl Local {
    pub fn boot(config: &VmConfig) -> Self {
        let bus = EventBus::default();
        let events = bus.subscribe();
        let Built {
            machine,
            ears,
            mailbox,
            debugger,
            pty,
        } = built(config, &bus);
        let cpus = machine.vcpus().count();
        let timeout = Duration::from_secs(config.shutdown_timeout);
        let driver = Driver::new(machine, ears, bus, timeout);
        let server = debugger.map(|d| vmm::gdb::serve(d, mailbox.clone(), cpus).unwrap());
        let local = Self {
            control: ControlHandle::new(mailbox.clone()),
            mailbox,
            events,
            pty,
            driver: Some(thread::spawn(move || driver.run())),
            server,
        };
        // The first answer comes from a machine that has booted; some guests
        // have come to their end by then.
        let state = local.ask(Ask::State);
        let booted = [
            Ok(Reply::State {
                state: VmState::Running,
                pause: None,
            }),
            Err(ControlError::Ended),
        ];
        assert!(booted.contains(&state), "{state:?}");
        local
    }

    pub fn ask(&self, command: Ask) -> Result<Reply, ControlError> {
        self.control.call(command)
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
        let driver = self.driver.take().unwrap();
        until("the end of the machine", || {
            driver.is_finished().then_some(())
        });
        let outcome = driver.join().unwrap().unwrap();
        self.server = None;
        outcome
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            let _ = self.control.call(Ask::Stop);
            let _ = driver.join();
        }
    }
}
