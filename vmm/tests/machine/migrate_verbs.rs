//! The verbs for migrations at a monitor that the test plays.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use api::http::{ServerHandle, ServerOptions, serve};
use api::wire::{self, JobInfo, JobState, MigrationInfo, MigrationOrder, MigrationPhase};
use api::{Answer, Command as Ask, Control, ControlError, ErrorKind, EventKind, EventLog, Reply};

use crate::snapshots::vireo;
use crate::support::{can_run, guest, until};

const JOB: &str = "migration-1";

/// A monitor that gives its machine away as the test says.
#[derive(Default)]
struct Fake {
    sent: Mutex<Option<wire::SendMigrationData>>,
    info: Mutex<Option<MigrationInfo>>,
    /// How often it has been asked how far it is.
    asked: AtomicU64,
    orders: Mutex<Vec<MigrationOrder>>,
    /// Why it does not begin.
    refusal: Mutex<Option<ErrorKind>>,
    events: EventLog,
}

fn nothing() -> ControlError {
    ControlError::new(ErrorKind::NotFound, "nothing is here")
}

impl Control for Fake {
    fn submit(&self, command: Ask, answer: Answer) {
        let Ask::SendMigration(request, _) = command else {
            return answer(Err(nothing()));
        };
        if let Some(kind) = *self.refusal.lock().unwrap() {
            return answer(Err(ControlError::new(kind, "why")));
        }
        *self.info.lock().unwrap() = Some(MigrationInfo {
            job: JOB.to_owned(),
            peer: request.destination_url.clone(),
            ..MigrationInfo::default()
        });
        *self.sent.lock().unwrap() = Some(*request);
        answer(Ok(Reply::Done));
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
    fn jobs(&self) -> Vec<JobInfo> {
        Vec::new()
    }
    fn cancel_job(&self, _: &str) -> Result<(), ControlError> {
        Err(nothing())
    }
    fn migration(&self) -> Result<MigrationInfo, ControlError> {
        let info = self.info.lock().unwrap().clone();
        self.asked.fetch_add(1, Ordering::SeqCst);
        info.ok_or_else(nothing)
    }
    fn steer_migration(&self, order: MigrationOrder) -> Result<(), ControlError> {
        self.migration()?;
        self.orders.lock().unwrap().push(order);
        Ok(())
    }
    fn consoles(&self) -> Vec<wire::ConsoleSink> {
        Vec::new()
    }
    fn open_console(&self, _: &wire::ConsoleRequest) -> Result<UnixStream, ControlError> {
        Err(nothing())
    }
    fn events(&self) -> &EventLog {
        &self.events
    }
}

struct Monitor {
    fake: Arc<Fake>,
    socket: PathBuf,
    server: ServerHandle,
    _directory: tempfile::TempDir,
}

impl Monitor {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let fake = Arc::new(Fake::default());
        let listener = UnixListener::bind(&socket).unwrap();
        let control: Arc<dyn Control> = Arc::clone(&fake) as _;
        Self {
            fake,
            socket,
            server: serve(listener, control, ServerOptions::default()).unwrap(),
            _directory: directory,
        }
    }

    /// A verb, whose words beside the machine are `words`.
    fn start(&self, verb: &str, words: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.arg(verb).arg("--api-socket").arg(&self.socket);
        command.args(words).env_remove("VIREO_LOG");
        command.stdin(File::open("/dev/null").unwrap());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn verb(&self, verb: &str, words: &[&str]) -> Output {
        self.start(verb, words).wait_with_output().unwrap()
    }

    /// `vireo migrate`, which follows what it has begun.
    fn migrate(&self) -> Child {
        let verb = self.start("migrate", &["unix:/there"]);
        self.until_asked();
        verb
    }

    /// Waits until somebody has asked how far it is, and been told what is so now.
    fn until_asked(&self) {
        let before = self.fake.asked.load(Ordering::SeqCst);
        until("a look at the migration", || {
            let asked = self.fake.asked.load(Ordering::SeqCst);
            (asked > before).then_some(())
        });
    }

    fn change(&self, change: impl FnOnce(&mut MigrationInfo)) {
        change(self.fake.info.lock().unwrap().as_mut().unwrap());
    }

    fn tell(&self, state: JobState, error: Option<&str>) {
        self.fake.events.publish(EventKind::Job {
            info: JobInfo {
                id: JOB.to_owned(),
                kind: "migration".to_owned(),
                state,
                done: 1,
                total: 1,
                error: error.map(str::to_owned),
                snapshot: None,
                migration: None,
            },
        });
    }

    /// The monitor ends, and its socket with it.
    fn end(self) {
        std::fs::remove_file(&self.socket).unwrap();
        self.server.stop();
    }
}

/// That a verb has done what it was to do; what it has printed.
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// That a verb has failed; why.
fn failed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_migration_is_followed_to_its_end_and_told_of() {
    let monitor = Monitor::new();
    let verb = monitor.migrate();
    monitor.change(|info| info.phase = MigrationPhase::Precopy);
    monitor.until_asked();
    monitor.change(|info| {
        info.phase = MigrationPhase::Completed;
        info.rounds = 3;
        info.downtime_us = Some(12_300);
    });
    let told = done(&verb.wait_with_output().unwrap());
    assert!(told.contains("runs at unix:/there"), "{told}");
    assert!(told.contains("in 3 rounds"), "{told}");
    assert!(told.contains("stood for 12.3 ms"), "{told}");
}

#[test]
fn a_migration_that_fails_names_the_reason() {
    let monitor = Monitor::new();
    let verb = monitor.migrate();
    monitor.change(|info| {
        info.phase = MigrationPhase::Failed;
        info.error = Some("a cable".to_owned());
    });
    monitor.tell(JobState::Failed, Some("a cable"));
    let told = failed(&verb.wait_with_output().unwrap());
    assert!(told.contains("the guest is here: a cable"), "{told}");
}

#[test]
fn the_last_words_of_a_source_that_ends_are_heard() {
    let monitor = Monitor::new();
    let verb = monitor.migrate();
    monitor.change(|info| info.phase = MigrationPhase::Switching);
    monitor.until_asked();
    monitor.tell(JobState::Completed, None);
    monitor.until_asked();
    monitor.until_asked();
    monitor.end();
    let told = done(&verb.wait_with_output().unwrap());
    assert!(told.contains("runs at unix:/there"), "{told}");
    assert!(told.contains("was not heard"), "{told}");
}

#[test]
fn a_source_that_ends_without_a_word_is_no_success() {
    for phase in [MigrationPhase::Precopy, MigrationPhase::InDoubt] {
        let monitor = Monitor::new();
        let verb = monitor.migrate();
        monitor.change(|info| info.phase = phase);
        monitor.until_asked();
        monitor.until_asked();
        monitor.end();
        let told = failed(&verb.wait_with_output().unwrap());
        assert!(told.contains("was not heard"), "{told}");
        assert!(told.contains("runs at unix:/there"), "{told}");
    }
}

#[test]
fn ctrl_c_cancels_a_migration() {
    let monitor = Monitor::new();
    let verb = monitor.migrate();
    let process = rustix::process::Pid::from_child(&verb);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    until("the cancellation", || {
        let orders = monitor.fake.orders.lock().unwrap();
        (*orders == [MigrationOrder::Cancel]).then_some(())
    });
    monitor.change(|info| info.phase = MigrationPhase::Cancelled);
    let told = failed(&verb.wait_with_output().unwrap());
    assert!(told.contains("was cancelled"), "{told}");
    assert_eq!(monitor.fake.orders.lock().unwrap().len(), 1);
}

#[test]
fn a_migration_that_nobody_waits_for_is_watched_and_steered_by_other_verbs() {
    let monitor = Monitor::new();
    let words = [
        "unix:/there",
        "--detach",
        "--preset",
        "fast",
        "--bandwidth",
        "1M",
    ];
    let told = done(&monitor.verb("migrate", &words));
    assert!(told.contains("vireo migrate-status"), "{told}");
    let sent = monitor.fake.sent.lock().unwrap().clone().unwrap();
    assert_eq!(sent.preset.as_deref(), Some("fast"));
    let told = done(&monitor.verb("migrate-status", &[]));
    assert!(told.contains(JOB) && told.contains("connecting"), "{told}");
    let told = done(&monitor.verb("migrate-status", &["--json"]));
    let info: MigrationInfo = serde_json::from_str(&told).unwrap();
    assert_eq!(info, monitor.fake.info.lock().unwrap().clone().unwrap());
    done(&monitor.verb("migrate-set", &["--throttle", "off"]));
    done(&monitor.verb("migrate-resolve", &["--abandon"]));
    done(&monitor.verb("migrate-cancel", &[]));
    let set = wire::VmMigrationSet {
        throttle: Some(false),
        ..wire::VmMigrationSet::default()
    };
    assert_eq!(
        *monitor.fake.orders.lock().unwrap(),
        [
            MigrationOrder::Set(set),
            MigrationOrder::Resolve(wire::MigrationResolution::Abandon),
            MigrationOrder::Cancel,
        ]
    );
}

#[test]
fn wrong_usage_is_told_from_what_could_not_be_and_programs_hear_the_reason_too() {
    let monitor = Monitor::new();
    for (kind, code) in [(ErrorKind::Invalid, 2), (ErrorKind::Conflict, 1)] {
        *monitor.fake.refusal.lock().unwrap() = Some(kind);
        let told = monitor.verb("migrate", &["unix:/there", "--json"]);
        assert_eq!(told.status.code(), Some(code), "{told:?}");
        let (out, words) = (
            String::from_utf8(told.stdout).unwrap(),
            String::from_utf8(told.stderr).unwrap(),
        );
        assert!(
            words.contains(": why") && !words.contains("dispatching"),
            "{words}"
        );
        if kind == ErrorKind::Conflict {
            let value: serde_json::Value = serde_json::from_str(&out).unwrap();
            assert!(value["error"].as_str().unwrap().ends_with(": why"), "{out}");
        }
    }
    *monitor.fake.refusal.lock().unwrap() = None;
    let verb = monitor.start("migrate", &["unix:/there", "--json"]);
    monitor.until_asked();
    monitor.change(|info| {
        info.phase = MigrationPhase::Failed;
        info.error = Some("a cable".to_owned());
    });
    let output = verb.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let info: MigrationInfo = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(info.phase, MigrationPhase::Failed);
    assert_eq!(info.error.as_deref(), Some("a cable"));
}

/// A verb with a socket as its descriptor 7, and as its input, from which nothing of it may be taken.
fn with_socket(socket: OwnedFd, dir: &std::path::Path, words: &[&str]) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 7<&0"]);
    command.arg(env!("CARGO_BIN_EXE_vireo")).args(words);
    command.env_remove("VIREO_LOG").env("XDG_RUNTIME_DIR", dir);
    command.stdin(Stdio::from(socket));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn a_machine_moves_over_a_socket_that_both_sides_were_given() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let side = crate::migrations::Side::counting(dir.path());
    let socket = side.socket.to_str().unwrap();
    let name = format!("vireo-test-given-{}", std::process::id());
    let no_socket = || OwnedFd::from(File::open("/dev/null").unwrap());
    let datagrams = || OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().unwrap());
    for (given, number, part) in [
        (no_socket(), "fd:7", "no socket"),
        (datagrams(), "fd:7", "no stream socket"),
        (no_socket(), "fd:77", "not started with it"),
        (no_socket(), "fd:0", "not started with it"),
    ] {
        let again = given.try_clone().unwrap();
        let receive = with_socket(given, dir.path(), &["receive", &name, number]);
        let migrate = ["migrate", "--api-socket", socket, number];
        for verb in [receive, with_socket(again, dir.path(), &migrate)] {
            let told = verb.wait_with_output().unwrap();
            assert_eq!(told.status.code(), Some(2), "{told:?}");
            let words = String::from_utf8(told.stderr).unwrap();
            assert!(words.contains(part), "{words}");
        }
    }
    let (here, there) = UnixStream::pair().unwrap();
    let receive = ["receive", &name, "fd:7"];
    let receives = with_socket(there.into(), dir.path(), &receive);
    let migrate = ["migrate", "--api-socket", socket, "fd:7"];
    let migrates = with_socket(here.into(), dir.path(), &migrate);
    let told = done(&migrates.wait_with_output().unwrap());
    assert!(told.contains("runs at fd:7"), "{told}");
    let mut destroy = Command::new(env!("CARGO_BIN_EXE_vireo"));
    destroy
        .args(["destroy", &name])
        .env("XDG_RUNTIME_DIR", dir.path());
    done(&destroy.output().unwrap());
    receives.wait_with_output().unwrap();
}

#[test]
fn a_connection_that_brings_no_machine_ends_the_wait() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("vireo-test-only-{}", std::process::id());
    let receive = ["receive", &name, "fd:7"];
    for said in [&b""[..], b"GET / HTTP/1.1\r\n\r\n"] {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(said).unwrap();
        let receives = with_socket(there.into(), dir.path(), &receive);
        drop(here);
        let told = receives.wait_with_output().unwrap();
        assert_eq!(told.status.code(), Some(1), "{told:?}");
        let words = String::from_utf8(told.stderr).unwrap();
        assert!(words.contains("the only one"), "{words}");
    }
}

#[test]
fn a_socket_that_strangers_reach_is_not_waited_at() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("vireo-test-open-{}", std::process::id());
    let open = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let receives = with_socket(open.into(), dir.path(), &["receive", &name, "fd:7"]);
    let told = receives.wait_with_output().unwrap();
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    let words = String::from_utf8(told.stderr).unwrap();
    assert!(words.contains("--insecure"), "{words}");
}

#[test]
fn where_the_host_has_chosen_a_port_it_is_told_and_one_that_is_in_use_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let verb = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(words).env_remove("VIREO_LOG");
        command.env("XDG_RUNTIME_DIR", dir.path());
        command.stdin(File::open("/dev/null").unwrap());
        command.output().unwrap()
    };
    let name = format!("vireo-test-port-{}", std::process::id());
    let waits = ["receive", &name, "tcp:127.0.0.1:0", "--detach", "--json"];
    let waits: serde_json::Value = serde_json::from_str(&done(&verb(&waits))).unwrap();
    let url = waits["url"].as_str().unwrap();
    assert!(
        url.starts_with("tcp:127.0.0.1:") && !url.ends_with(":0"),
        "{url}"
    );
    let other = format!("{name}-other");
    let told = failed(&verb(&["receive", &other, url, "--detach"]));
    assert!(told.contains("in use"), "{told}");
    // Programs hear why as of all verbs: of the place, and of the name.
    let free = format!("unix:{}", dir.path().join("free").display());
    for (name, place) in [(&other, url), (&name, free.as_str())] {
        let output = verb(&["receive", name, place, "--detach", "--json"]);
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let why = told["error"].as_str().unwrap();
        assert!(why.contains("in use") || why.contains(name), "{why}");
        assert!(failed(&output).contains(why), "{output:?}");
    }
    done(&verb(&["destroy", &name]));
}

/// All verbs together, with a guest.
#[test]
fn a_machine_that_is_waited_for_arrives_under_its_new_name() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (socket, place) = (path("source.sock"), format!("unix:{}", path("place")));
    let kernel = guest("count");
    let mut source = vireo(&[
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--cmdline",
        "mib=1",
        "--memory",
        "32M",
        "--api-socket",
        &socket,
    ]);
    source.stdout.wait_for("pages=256\n");
    let name = format!("vireo-test-arrives-{}", std::process::id());
    let verb = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
        command.args(words).env_remove("VIREO_LOG");
        command.env("XDG_RUNTIME_DIR", dir.path());
        command.stdin(File::open("/dev/null").unwrap());
        command.output().unwrap()
    };
    // It returns before the machine comes.
    let waits = verb(&[
        "receive", &name, &place, "--serial", "null", "--detach", "--json",
    ]);
    let waits: serde_json::Value = serde_json::from_str(&done(&waits)).unwrap();
    assert_eq!(waits["url"], place);
    let told = done(&verb(&["jobs", "list", &name]));
    assert!(told.contains("receive-1"), "{told}");
    let told = done(&verb(&["migrate", "--api-socket", &socket, &place]));
    assert!(told.contains("the guest stood for"), "{told}");
    let told = done(&verb(&["migrate-status", &name]));
    assert!(
        told.contains("incoming") && told.contains("completed"),
        "{told}"
    );
    let told = done(&verb(&["info", &name]));
    assert!(told.contains("running"), "{told}");
    done(&verb(&["destroy", &name]));
    source.ends_with(0);
}

/// What waits can be told that nothing comes.
#[test]
fn who_waits_for_a_machine_can_be_cancelled_as_a_job_and_as_a_migration() {
    let dir = tempfile::tempdir().unwrap();
    let place = format!("unix:{}", dir.path().join("place").display());
    for (number, cancels) in [&["jobs", "cancel"][..], &["migrate-cancel"]]
        .into_iter()
        .enumerate()
    {
        let name = format!("vireo-test-waits-{}-{number}", std::process::id());
        let verb = |words: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
            command.args(words).env_remove("VIREO_LOG");
            command.env("XDG_RUNTIME_DIR", dir.path());
            command.stdin(File::open("/dev/null").unwrap());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        let waits = verb(&["receive", &name, &place]);
        until("the job", || {
            let listed = verb(&["jobs", "list", &name]).wait_with_output().unwrap();
            let listed = String::from_utf8(listed.stdout).unwrap();
            listed.contains("receive-1").then_some(())
        });
        let mut words = cancels.to_vec();
        words.push(&name);
        if cancels.len() == 2 {
            words.push("receive-1");
        }
        done(&verb(&words).wait_with_output().unwrap());
        let told = failed(&waits.wait_with_output().unwrap());
        assert!(told.contains("cancelled"), "{told}");
    }
}
