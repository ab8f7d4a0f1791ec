//! The control socket: what a request costs, and a machine that is made over it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::Settings;
use super::measure::{Better, Measure, in_turns};
use super::monitor::{Job, MEMORY, Monitor};
use super::process::Process;
use super::qmp::Qmp;
use super::samples::Samples;
use crate::control::{Connection, bytes};
use crate::kit;

const LIMIT: Duration = Duration::from_secs(30);
/// Requests of one value, whose median it is.
const REQUESTS: usize = 2000;
const QUICK_REQUESTS: usize = 200;
/// A difference of a twentieth wants more values than others do.
const BOOTS: usize = 21;
/// The series with which a machine that is made over the socket is compared.
const BY_FLAGS: &str = "by flags";

/// Who answers, and what it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// Ours: which request, and the name of its series.
    Vireo(&'static str, &'static str),
    /// QEMU's QMP, `query-status`.
    Qmp,
}

const SUBJECTS: [Subject; 3] = [
    Subject::Vireo("GET vm.info", "vireo"),
    Subject::Vireo("GET vmm.ping", "vireo vmm.ping"),
    Subject::Qmp,
];

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Self::Vireo(_, name) => name,
            Self::Qmp => "qemu query-status",
        }
    }
}

/// Microseconds from a request to its answer, with a guest that has come up: on one
/// connection, and on a new connection each.
///
/// # Errors
/// A monitor does not come up or does not answer.
pub fn requests(settings: &Settings, monitors: &[Monitor]) -> Result<Vec<Measure>> {
    let directory = tempfile::tempdir()?;
    let socket = |monitor: Monitor| directory.path().join(monitor.name().replace(' ', "-"));
    let job = Job::guest("hello", "stay")?;
    let mut processes = Vec::new();
    let qemu = monitors.iter().copied().find(|m| *m == Monitor::Microvm);
    for monitor in std::iter::once(Monitor::Vireo).chain(qemu) {
        let mut command = monitor.command(&job)?;
        match monitor {
            Monitor::Vireo => command.arg("--api-socket").arg(socket(monitor)),
            _ => command.arg("-qmp").arg(format!(
                "unix:{},server=on,wait=off",
                socket(monitor).display()
            )),
        };
        let mut process = Process::start(command)?;
        process.until("H", LIMIT)?;
        processes.push(process);
    }
    let subjects: Vec<Subject> = SUBJECTS
        .into_iter()
        .filter(|subject| qemu.is_some() || *subject != Subject::Qmp)
        .collect();
    let count = if settings.quick {
        QUICK_REQUESTS
    } else {
        REQUESTS
    };
    let mut kept = Measure::new(
        "api.kept",
        "a request on a connection that is kept: vm.info",
        "µs",
        Better::Lower,
    );
    let mut fresh = Measure::new(
        "api.fresh",
        "a request on a connection of its own: vm.info",
        "µs",
        Better::Lower,
    );
    in_turns(
        settings.runs,
        &subjects,
        |subject| subject.name().to_owned(),
        |subject, counts| {
            let (one, each) = match subject {
                Subject::Vireo(request, _) => http(&socket(Monitor::Vireo), request, count)?,
                Subject::Qmp => qmp(&socket(Monitor::Microvm), count)?,
            };
            if counts {
                kept.push(subject.name(), one);
                fresh.push(subject.name(), each);
            }
            Ok(())
        },
    )?;
    Ok(vec![kept, fresh])
}

/// The median of `count` times that `one` takes, in microseconds.
fn median(count: usize, mut one: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Samples::default();
    for _ in 0..count {
        let begin = Instant::now();
        one()?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times.median())
}

fn http(socket: &Path, request: &str, count: usize) -> Result<(f64, f64)> {
    let request = bytes(request, "")?;
    let ask = |connection: &mut Connection| {
        connection.send(&request)?;
        let answer = connection.answer()?;
        ensure!(answer.status == 200, "{}", answer.status);
        Ok(())
    };
    let mut connection = Connection::open_within(socket, LIMIT)?;
    let kept = median(count, || ask(&mut connection))?;
    drop(connection);
    let fresh = median(count, || ask(&mut Connection::open(socket)?))?;
    Ok((kept, fresh))
}

fn qmp(socket: &Path, count: usize) -> Result<(f64, f64)> {
    const STATUS: &[u8] = br#"{"execute":"query-status"}"#;
    let mut connection = Qmp::open(socket)?;
    let kept = median(count, || connection.ask(STATUS).map(drop))?;
    // It serves one client at a time.
    drop(connection);
    let fresh = median(count, || Qmp::open(socket)?.ask(STATUS).map(drop))?;
    Ok((kept, fresh))
}

/// Process start to the guest's first byte, when the machine comes by flags and when it
/// is created and booted over the socket.
///
/// # Errors
/// A guest does not come up.
pub fn boot(settings: &Settings) -> Result<Measure> {
    let mut measure = Measure::new(
        "api.boot",
        "process start to the guest's first serial byte, created and booted over the socket",
        "ms",
        Better::Lower,
    );
    let job = Job::guest("hello", "stay")?;
    let runs = if settings.quick {
        settings.runs
    } else {
        settings.runs.max(BOOTS)
    };
    in_turns(
        runs,
        &["vireo", BY_FLAGS],
        |name| (*name).to_owned(),
        |name, counts| {
            let time = if *name == BY_FLAGS {
                let mut command = Monitor::Vireo.command(&job)?;
                // The API's machines all have one.
                command.arg("--rng");
                Process::start(command)?.until("H", LIMIT)?
            } else {
                created(&job)?
            };
            if counts {
                measure.push(name, time.as_secs_f64() * 1e3);
            }
            Ok(())
        },
    )?;
    Ok(measure)
}

/// The requests wait in a socket that the process is started with, so that nobody has
/// to find out when it listens.
fn created(job: &Job) -> Result<Duration> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let mut connection = Connection::open(&path)?;
    let description = json!({
        "memory": { "size": MEMORY << 20 },
        "payload": { "kernel": job.kernel, "cmdline": job.words },
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
    });
    connection.send(&bytes("PUT vm.create", &description.to_string())?)?;
    connection.send(&bytes("PUT vm.boot", "")?)?;
    inherited(&listener)?;
    let mut command = Command::new(kit::vireo()?);
    command
        .args(["serve", "--api-socket"])
        .arg(format!("fd={}", listener.as_raw_fd()));
    let mut process = Process::start(command)?;
    let time = process.until("H", LIMIT)?;
    for _ in 0..2 {
        let answer = connection.answer()?;
        ensure!(answer.status == 204, "{}", answer.text());
    }
    Ok(time)
}

/// Lets programs that are started from now on have the descriptor too.
#[expect(unsafe_code, reason = "a system call that has no safe wrapper")]
fn inherited(listener: &UnixListener) -> io::Result<()> {
    // SAFETY: F_SETFD changes a flag of the descriptor, which is open, and touches no memory.
    let result = unsafe { libc::fcntl(listener.as_raw_fd(), libc::F_SETFD, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
